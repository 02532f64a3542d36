"""Multi-task LoRA with a head for each training task: what is left of multi-task training where labels share no names.

Learning features that many tasks have in common under a linear layer for each (Caruana 1997, Machine Learning 28;
Wang et al., ICML 2021, arXiv 2106.09017, who hold it against gradient-based meta-learning).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from meta_peft.algorithms import MultiTask
from meta_peft.lora.fast_weights import is_lora
from meta_peft.processes import Share
from meta_peft.training.trainer import MetaTrainer
from meta_peft.types import Meta, Params


class TaskHeadsTrainer(MetaTrainer):
    """Trains LoRA by `MultiTask`, each task under a head of its own; all heads begin as the model's, which stays as it is.

    In one process. A head has a gradient in the outer steps that its task is in, and stands still in the others.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        weights = self.loss_fn.weights.parameters()
        self._shared = {name: p for name, p in weights.items() if is_lora(name)}
        first = {name: p.detach() for name, p in weights.items() if not is_lora(name)}
        tasks = self.train_dataset.tasks.names
        self.heads = {task: {name: nn.Parameter(p.clone()) for name, p in first.items()} for task in tasks}

    def _parameters(self) -> nn.ParameterList:
        return nn.ParameterList(p for head in self.heads.values() for p in head.values())

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        optimizer.add_param_group({"params": list(self._parameters()), "weight_decay": self.args.weight_decay})
        return optimizer

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """The heads are what the Trainer clips, and clears the gradients of, as well."""
        return nn.ModuleList([super()._wrap_model(model, training, dataloader), self._parameters()])

    def training_step(self, model: nn.Module, inputs: Share, num_items_in_batch: Any = None) -> Tensor:
        """One task after the other. Returns the mean loss of the share."""
        if inputs.error is not None:
            raise inputs.error
        losses = []
        for batch in inputs.batches:
            for place, task in enumerate(batch.tasks):
                weights: Params = {**self._shared, **self.heads[task]}
                episode = batch.part(place, place + 1).to(self.args.device)
                found = MultiTask()(self.loss_fn, Meta(weights, {}), episode)
                for name, grad in found.grads.adapter.items():
                    share, before = grad / self.args.tasks_in_a_step, weights[name].grad
                    weights[name].grad = share if before is None else before + share
                losses.append(found.metrics["loss"])
        self.run_log.count(len(losses))
        return torch.cat(losses).mean()
