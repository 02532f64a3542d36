"""Derivatives through the inner loop, walked back one step at a time.

The loop is ``g_k = grad L(f_k)``, ``(f_{k+1}, m_{k+1}) = U_k(f_k, g_k, m_k, h)`` with fast weights f, optimizer state m
and rates h. For adjoints a of f and b of m, a step back is

    (a', u, b', c) = vjp of U_k at (a, b)         elementwise, on tensors of the adapter's size
    a <- a' + u H_k                               the only part that needs the model
    b <- b',  adjoint of h += c,  adjoint of the slow weights += u dg_k/ds

What a step needs of the model is g_k, and its graph for ``u H_k``. Keeping the graphs of all steps is the usual
unrolling; rebuilding each one when it is needed, from f_k alone, makes memory independent of the number of steps (step
replay: reverse accumulation with checkpoints, Griewank & Walther 2000); keeping the last ones only lies between. The
graph of a step is the same whenever it is built, so results do not depend on it by a bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from meta_peft.errors import MetaPeftError, did_you_mean
from meta_peft.inner_loop.hessian import GradientGraph, difference_product
from meta_peft.inner_loop.inner_loop import start
from meta_peft.inner_loop.shelf import Shelf
from meta_peft.inner_optimizers import InnerRule
from meta_peft.params import dot, gradients, leaves
from meta_peft.types import LossFn, Meta, Params, Rows
from meta_peft.utils.checked import is_whole, shown

MEMORY_MODES = ("auto", "unrolled", "replay", "finite_differences")


def check_memory(memory: str | int) -> None:
    """Raise `MetaPeftError` unless `memory` is a mode, or a number of inner steps whose graphs are kept."""
    known = memory in MEMORY_MODES if isinstance(memory, str) else is_whole(memory) and memory >= 0
    if not known:
        raise MetaPeftError(
            f"memory must be one of {', '.join(MEMORY_MODES)}, or a number of inner steps; got {shown(memory)}."
            f"{did_you_mean(str(memory), MEMORY_MODES)}"
        )


@dataclass(frozen=True)
class Remember:
    """What of the inner steps is differentiated, and what is kept for it.

    Args:
        second_order_steps: inner gradients of this many last steps are differentiated, those before are constants.
        graphs: the graphs of this many last steps are kept, those before are rebuilt.
        differences: products with the Hessian come from central differences; no graph is kept or rebuilt.
        stops: whether the walk back stops at every step for what arrives there.
    """

    second_order_steps: int
    graphs: int
    differences: bool = False
    stops: bool = False


@dataclass
class _Step:
    """A step on the way: f_k and m_k, with the graph of g_k or (a place for) its numbers."""

    point: Callable[[], tuple[Params, Params, Params]]
    graph: GradientGraph | None = None


@dataclass
class Adjoint:
    """What the walk back carries: the adjoints of the fast and slow weights, the optimizer's state and the rates."""

    fast: Params
    slow: Params
    state: Params = field(default_factory=dict)
    hyper: Params = field(default_factory=dict)


class InnerPath:
    """The inner loop from `meta.adapter`, run once; `fast` is where it ended, `slow` what it left alone."""

    def __init__(self, loss_fn: LossFn, meta: Meta, support: Rows, rule: InnerRule, remember: Remember):
        self._loss_fn, self._support, self._rule, self._remember = loss_fn, support, rule, remember
        self._hyper = {name: value.detach() for name, value in meta.hyper.items()}
        self._steps: list[_Step] = []
        self.losses: list[Tensor] = []  # the support losses before each step, [T] each
        self.difference_error_T: Tensor | None = None
        self.fast, slow = start(meta.adapter, rule, support.n_tasks)
        self.slow = {**slow, **meta.given}
        self._start, self._shelf, state = self.fast, Shelf(), rule.init(self.fast)
        for k in range(rule.steps):  # the gradient has no name here, so that it is gone before the next one is computed
            self.fast, state = rule.step(k, self.fast, self._gradient(k, state), state, self._hyper)

    def _gradient(self, k: int, state: Params) -> Params:
        """g_k; the step is remembered if the walk back has to pass it."""
        fast, last = self.fast, self._rule.steps - k <= self._remember.graphs
        if self._exact(k) and last:
            graph = GradientGraph(self._loss_fn, fast, self.slow, self._support)
            self._steps.append(_Step(lambda: (fast, state, {}), graph))
            self.losses.append(graph.loss_T)
            return graph.values
        at = leaves(fast)
        loss_T = self._loss_fn({**self.slow, **at}, self._support)
        self.losses.append(loss_T.detach())
        grads = gradients(loss_T.sum(), at)
        if self._second_order(k) or self._remember.stops or not self._rule.passes_adjoints_on:
            known_later = self._exact(k)
            self._steps.append(_Step(self._set_aside(k, fast, state, {} if known_later else grads)))
        return grads

    def _set_aside(
        self, k: int, fast: Params, state: Params, grads: Params
    ) -> Callable[[], tuple[Params, Params, Params]]:
        if k == 0:  # the start is there anyway
            get, rule = self._shelf.put(grads), self._rule  # not self, or graphs would wait for the garbage collector
            return lambda: (fast, rule.init(fast), get())
        places = [self._shelf.put(part) for part in (fast, state, grads)]
        return lambda: (places[0](), places[1](), places[2]())

    def _second_order(self, k: int) -> bool:
        return self._rule.steps - k <= self._remember.second_order_steps

    def _exact(self, k: int) -> bool:
        return self._second_order(k) and not self._remember.differences

    def walk_back(
        self, adjoint: Adjoint, arriving: Callable[[int, Params], tuple[Params, Params]] | None = None
    ) -> None:
        """Take `adjoint` from the end of the loop back to its start. It can be walked once.

        With `stops`, `arriving(k, fast)` gives what is to be added to the adjoints of f_k, for k >= 1 but the last, and
        of the slow weights.
        """
        self.fast = {}  # large, like all that is carried here: nothing is held longer than it is needed
        for k in reversed(range(self._rule.steps)):
            if not self._steps:
                break  # what lies before changes no adjoint
            at = self._step_back(k, adjoint)
            if arriving is not None and k > 0:
                here, here_slow = arriving(k, at)
                adjoint.fast, adjoint.slow = _sum(adjoint.fast, here), _sum(adjoint.slow, here_slow)
            del at
        if adjoint.state:
            adjoint.fast = self._through_init(adjoint.fast, adjoint.state)

    def _step_back(self, k: int, adjoint: Adjoint) -> Params:
        """Take `adjoint` back through step k; returns the fast weights there."""
        step = self._steps.pop()
        fast, state, grads = step.point()
        graph = step.graph
        if self._exact(k):
            graph = graph or GradientGraph(self._loss_fn, fast, self.slow, self._support)
            grads = graph.values
        adjoint.fast, of_grads, adjoint.state, of_rates = _through_update(
            self._rule, k, (fast, grads, state, self._hyper), adjoint.fast, adjoint.state
        )
        adjoint.hyper = _sum(adjoint.hyper, of_rates)
        del grads, state
        if graph is not None:
            more, more_slow = graph.product(of_grads)
        elif self._second_order(k):
            more, more_slow = self._difference_product(k, fast, of_grads)
        else:
            more, more_slow = {}, {}
        adjoint.fast, adjoint.slow = _sum(adjoint.fast, more), _sum(adjoint.slow, more_slow)
        return fast

    def _difference_product(self, k: int, fast: Params, u: Params) -> tuple[Params, Params]:
        at = (self._loss_fn, fast, self.slow, self._support, u)
        product = difference_product(*at)
        if self.difference_error_T is None:  # once: the error of the last step's product, from one of twice the width
            wider, _ = difference_product(*at, wider=2.0)
            gap = {n: product[0][n] - wider[n] for n in wider}
            tiny = torch.finfo(next(iter(wider.values())).dtype).tiny
            self.difference_error_T = (dot(gap, gap) / dot(wider, wider).clamp_min(tiny)).sqrt()
        return product

    def _through_init(self, of_fast: Params, of_state: Params) -> Params:
        fast = leaves(self._start)
        state = {n: s for n, s in self._rule.init(fast).items() if s.requires_grad and n in of_state}
        if not state:
            return of_fast
        found = torch.autograd.grad(list(state.values()), list(fast.values()), [of_state[n] for n in state])
        return {n: of_fast[n] + more for n, more in zip(fast, found, strict=True)}


def _through_update(
    rule: InnerRule, k: int, inputs: tuple[Params, Params, Params, Params], of_fast: Params, of_state: Params
) -> tuple[Params, Params, Params, Params]:
    """The vector-Jacobian product of `rule.step`: adjoints of (fast, grads, state, hyper) from those of its results."""
    with torch.enable_grad():
        fast, grads, state = (leaves(part) for part in inputs[:3])
        hyper = leaves(inputs[3]) if rule.learn_rates else inputs[3]
        moved, after = rule.step(k, fast, grads, state, hyper)
    results = [(moved[n], of_fast[n]) for n in moved] + [(after[n], of_state[n]) for n in after if n in of_state]
    of = [*fast.values(), *grads.values(), *state.values(), *(hyper.values() if rule.learn_rates else ())]
    found = iter(
        torch.autograd.grad(
            [result for result, _ in results], of, [adjoint for _, adjoint in results], allow_unused=True
        )
    )

    def adjoints(part: Params, *, fill: bool = False) -> Params:
        values = {n: next(found) for n in part}
        return {n: torch.zeros_like(part[n]) if v is None else v for n, v in values.items() if fill or v is not None}

    return (
        adjoints(fast, fill=True),
        adjoints(grads, fill=True),
        adjoints(state),
        adjoints(hyper) if rule.learn_rates else {},
    )


def _sum(total: Params, more: Params) -> Params:
    return {**total, **{n: total[n] + p if n in total else p for n, p in more.items()}}
