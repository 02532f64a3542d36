"""Multi-task training with a head for each task, against the sum of losses that it is the gradient of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from surface import config, tiny_folder

from meta_peft import ModelArguments
from meta_peft.base.new_adapter import new_model
from meta_peft.base.tokenizers import tokenizer_for
from meta_peft.lora.fast_weights import is_lora
from meta_peft.protocol.task_heads import TaskHeadsTrainer


@pytest.fixture
def trainer(tmp_path: Path) -> TaskHeadsTrainer:
    how = {"objective": "sequence_classification", "num_labels": 2, "lora_target_modules": ["q_proj", "v_proj"]}
    model_args = ModelArguments(str(tiny_folder()), **how)
    tasks = {name: [{"text": f"{name}{n}", "label": n % 2} for n in range(12)] for name in "abcde"}
    options = {"shots": 2, "query_size": 3, "max_steps": 3, "learning_rate": 0.01, "lr_scheduler_type": "constant"}
    args = config(tmp_path / "out", algorithm="multitask", per_device_train_batch_size=2, **options)
    return TaskHeadsTrainer(new_model(model_args, 0), args, tasks, processing_class=tokenizer_for(model_args))


def test_gradients_are_those_of_the_mean_loss_each_task_under_its_own_head(trainer: TaskHeadsTrainer):
    trainer.loss_fn.model.double()
    for n, head in enumerate(trainer.heads.values()):
        for p in head.values():
            p.data = torch.full_like(p, 0.01 * n, dtype=torch.float64) * torch.arange(len(p))[:, None]
    share = next(iter(trainer.get_train_dataloader()))
    loss = trainer.training_step(None, share)
    (batch,) = share.batches
    shared = {name: p for name, p in trainer.loss_fn.weights.parameters().items() if is_lora(name)}
    every = [*shared.values(), *(p for head in trainer.heads.values() for p in head.values())]
    found = {id(p): p.grad for p in every}
    for p in every:
        p.grad = None
    losses = []
    for t, task in enumerate(batch.tasks):
        weights, episode = {**shared, **trainer.heads[task]}, batch.part(t, t + 1)
        losses += [(trainer.loss_fn(weights, episode.support) + trainer.loss_fn(weights, episode.query)) / 2]
    expected = torch.cat(losses).mean()
    torch.testing.assert_close(loss, expected.detach())
    expected.backward()
    for task, head in trainer.heads.items():
        for p in head.values():
            assert (found[id(p)] is not None) == (task in batch.tasks)
    for p in (*shared.values(), *(p for task in batch.tasks for p in trainer.heads[task].values())):
        torch.testing.assert_close(found[id(p)], p.grad)


def test_a_head_stands_still_while_its_task_is_not_drawn(trainer: TaskHeadsTrainer):
    """Three steps of two tasks are one round of five and one task more."""
    own = {n: p.clone() for n, p in trainer.loss_fn.weights.parameters().items() if not is_lora(n)}
    first, step = {}, trainer.training_step

    def recorded(model, inputs, *more):
        first.setdefault("tasks", inputs.batches[0].tasks)
        if trainer.state.global_step == 1:
            first["heads"] = {t: [p.detach().clone() for p in h.values()] for t, h in trainer.heads.items()}
        return step(model, inputs, *more)

    trainer.training_step = recorded
    trainer.train()
    for task, heads in first["heads"].items():
        assert any(p.any() for p in heads) == (task in first["tasks"])
    assert all(p.any() for head in trainer.heads.values() for p in head.values())
    assert all(p.grad is None for head in trainer.heads.values() for p in head.values()), "cleared after each step"
    for name, p in own.items():
        assert torch.equal(trainer.loss_fn.weights.parameters()[name], p)
