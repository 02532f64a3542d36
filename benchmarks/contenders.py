"""One meta-gradient by meta_peft and by what else there is: by hand, with learn2learn, TorchOpt or higher.

Each contender takes a model and a batch and returns a function that computes the gradient of the mean query loss after
the inner steps, by parameter name. All of them get the same frozen model, the same tokens and the same attention: what
torch picks for first order, plain matrix products for second order, since fused kernels have no second derivative.

The peers adapt one task at a time, which is the only way they have. Nothing of a task outlives it, so that one task's
graph is there at a time. learn2learn and TorchOpt take every parameter of a module for a fast weight: frozen ones are
made buffers first. Without that TorchOpt does not run, and learn2learn copies the base for every task.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from typing import Any, Protocol

import peers
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from workload import MAX_COMPLETION, Workload, keywords, lora_parameters, parts, saved_names

from meta_peft import MAML, SGD, AdapterLoss, InnerRule, MemoryPlan, meta_gradient
from meta_peft.types import EpisodeBatch, Params, Rows


class Step(Protocol):
    """A contender's whole work; or, to warm up one that goes task by task, that of the first tasks alone."""

    def __call__(self, first_tasks: int | None = None) -> Params: ...


def ours(
    model: PeftModel,
    batch: EpisodeBatch,
    workload: Workload,
    *,
    memory: str | int | None = None,
    tasks_per_forward: int | None = None,
) -> Step:
    """`meta_peft.meta_gradient`; with neither option, what fits is found as `MetaTrainer` does it."""
    inner = InnerRule(SGD(), lr=workload.lr, steps=workload.steps)
    algorithm = MAML(inner, first_order=not workload.second_order, **memory_option(memory))
    loss_fn = AdapterLoss(model, second_order=workload.second_order)
    found = memory is None and tasks_per_forward is None
    plan = MemoryPlan() if found else MemoryPlan(tasks_per_forward, budget=math.inf)

    def step(first_tasks: int | None = None) -> Params:  # always all: they go together
        # As new rows: what meta_peft remembers of a batch, the layers below the adapter, is part of the work.
        fresh = batch.to("cpu")
        return meta_gradient(loss_fn, fresh, algorithm, tasks_per_forward=plan).grads.adapter

    return step


def memory_option(memory: str | int | None) -> dict[str, Any]:
    """The argument of `MAML` for a memory mode; versions without modes keep the whole graph."""
    if memory is None:
        return {}
    if any(field.name == "memory" for field in fields(MAML)):
        return {"memory": memory}
    if memory == "unrolled":
        return {}
    raise ValueError(f"This version of meta_peft has no memory={memory!r}.")


def plain(model: PeftModel, batch: EpisodeBatch, workload: Workload) -> Step:
    """What a careful user writes by hand: PEFT's own forward with other weights, its loss, and autograd."""
    return _by_hand(lambda fast, rows: functional_call(model, fast, (), keywords(rows)).loss, model, batch, workload)


def plain_labelled(model: PeftModel, batch: EpisodeBatch, workload: Workload) -> Step:
    """The same by someone who knows that the head is a fifth of the work: logits only where completions may be."""
    kept = MAX_COMPLETION + 1  # the token at a position is predicted one position earlier

    def loss(fast: dict[str, Tensor], rows: Rows) -> Tensor:
        arguments = {**rows.inputs, "use_cache": False, "logits_to_keep": kept}
        logits = functional_call(model, fast, (), arguments).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), rows.labels_BL[:, 1 - kept :].flatten(), ignore_index=-100)

    return _by_hand(loss, model, batch, workload)


def _by_hand(
    loss_of: Callable[[dict[str, Tensor], Rows], Tensor], model: PeftModel, batch: EpisodeBatch, workload: Workload
) -> Step:
    start = lora_parameters(model)

    def of_task(task: EpisodeBatch) -> tuple[Tensor, ...]:
        with attention(workload):
            fast: dict[str, Tensor] = start
            for _ in range(workload.steps):
                loss = loss_of(fast, task.support)
                grads = torch.autograd.grad(loss, list(fast.values()), create_graph=workload.second_order)
                fast = {n: p - workload.lr * g for (n, p), g in zip(fast.items(), grads, strict=True)}
            loss = loss_of(fast, task.query) / batch.n_tasks
        return torch.autograd.grad(loss, list(start.values()))

    def step(first_tasks: int | None = None) -> Params:
        total = {name: torch.zeros_like(p) for name, p in start.items()}
        for task in parts(batch, 1)[:first_tasks]:
            for name, grad in zip(start, of_task(task), strict=True):
                total[name] += grad
        return saved_names(total)

    return step


def learn2learn(model: PeftModel, batch: EpisodeBatch, workload: Workload) -> Step:
    """`learn2learn.algorithms.MAML`, through its own `clone` and `adapt`."""
    maml_class = peers.learn2learn_algorithms().MAML
    frozen_as_buffers(model)
    maml = maml_class(model, lr=workload.lr, first_order=not workload.second_order, allow_nograd=True)

    def backward(task: EpisodeBatch) -> None:
        with attention(workload):
            learner = maml.clone()
            for _ in range(workload.steps):
                learner.adapt(learner(**keywords(task.support)).loss)
            loss = learner(**keywords(task.query)).loss / batch.n_tasks
        loss.backward()

    return _accumulated(backward, model, batch)


def torchopt(model: PeftModel, batch: EpisodeBatch, workload: Workload) -> Step:
    """`torchopt.MetaSGD` in second order. It always differentiates twice: first order takes the functional SGD."""
    library = peers.torchopt()
    frozen_as_buffers(model)
    return (_torchopt_meta if workload.second_order else _torchopt_functional)(library, model, batch, workload)


def _torchopt_meta(library: Any, model: PeftModel, batch: EpisodeBatch, workload: Workload) -> Step:
    optimizer = library.MetaSGD(model, lr=workload.lr)
    before = library.extract_state_dict(model, by="reference", with_buffers=False)
    optimizer_before = library.extract_state_dict(optimizer, by="reference")

    def backward(task: EpisodeBatch) -> None:
        with attention(workload):
            for _ in range(workload.steps):
                optimizer.step(model(**keywords(task.support)).loss)
            loss = model(**keywords(task.query)).loss / batch.n_tasks
        loss.backward()
        library.recover_state_dict(model, before)
        library.recover_state_dict(optimizer, optimizer_before)

    return _accumulated(backward, model, batch)


def _torchopt_functional(library: Any, model: PeftModel, batch: EpisodeBatch, workload: Workload) -> Step:
    start = lora_parameters(model)
    rule = library.sgd(lr=workload.lr)

    def loss_of(fast: tuple[Tensor, ...], rows: Rows) -> Tensor:
        loss: Tensor = functional_call(model, dict(zip(start, fast, strict=True)), (), keywords(rows)).loss
        return loss

    def backward(task: EpisodeBatch) -> None:
        fast, state = tuple(start.values()), rule.init(tuple(start.values()))
        for _ in range(workload.steps):
            grads = torch.autograd.grad(loss_of(fast, task.support), fast)
            updates, state = rule.update(grads, state, inplace=False)
            fast = library.apply_updates(fast, updates, inplace=False)
        (loss_of(fast, task.query) / batch.n_tasks).backward()

    return _accumulated(backward, model, batch)


def higher(model: PeftModel, batch: EpisodeBatch, workload: Workload) -> Step:
    """`higher.innerloop_ctx`, as its documentation has it."""
    library = peers.higher()
    optimizer = torch.optim.SGD(list(lora_parameters(model).values()), lr=workload.lr)
    options = {"copy_initial_weights": False, "track_higher_grads": workload.second_order}

    def backward(task: EpisodeBatch) -> None:
        with attention(workload), library.innerloop_ctx(model, optimizer, **options) as (functional, inner):
            for _ in range(workload.steps):
                inner.step(functional(**keywords(task.support)).loss)
            (functional(**keywords(task.query)).loss / batch.n_tasks).backward()

    return _accumulated(backward, model, batch)


def _accumulated(backward: Callable[[EpisodeBatch], None], model: PeftModel, batch: EpisodeBatch) -> Step:
    """One task's `backward` after the other, whose gradients add up in the parameters' own ``.grad``."""
    start = lora_parameters(model)

    def step(first_tasks: int | None = None) -> Params:
        model.zero_grad()
        for task in parts(batch, 1)[:first_tasks]:
            backward(task)  # a function of its own: nothing of a task outlives it
        return saved_names({n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in start.items()})

    return step


def attention(workload: Workload) -> AbstractContextManager[None]:
    """The kernels that have the derivatives the workload needs."""
    return sdpa_kernel(SDPBackend.MATH) if workload.second_order else nullcontext()


def frozen_as_buffers(model: nn.Module) -> None:
    """Every parameter without a gradient becomes a buffer; the model computes the same."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and not parameter.requires_grad:
                del module._parameters[name]
                module.register_buffer(name, parameter, persistent=False)


CONTENDERS: dict[str, Callable[..., Step]] = {
    "ours": ours,
    "plain": plain,
    "plain_labelled": plain_labelled,
    "learn2learn": learn2learn,
    "torchopt": torchopt,
    "higher": higher,
}
PEERS = [name for name in CONTENDERS if name != "ours"]
BY_DEFAULT = [name for name in PEERS if name != "plain_labelled"]
