"""How many tasks go through the model at once, and how many graphs of inner steps are kept, within a budget of memory.

The graph of one inner step of one task is measured, once for each larger size of rows, by what autograd saves for it.
Then as many graphs are kept as the budget allows, as long as enough tokens go through the model at once for its matrix
products to be efficient. Neither choice changes a result, so nothing depends on how much memory a machine has.
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from meta_peft.algorithms import MAML
from meta_peft.errors import MetaPeftError
from meta_peft.functional.slow_prefix import AboveSlow, above_of
from meta_peft.functional.task_rows import RowsRearrangedError
from meta_peft.inner_loop.hessian import GradientGraph
from meta_peft.inner_loop.inner_loop import start
from meta_peft.inner_optimizers import InnerRule
from meta_peft.params import leaves
from meta_peft.types import EpisodeBatch, LossFn, Meta, Rows
from meta_peft.utils.checked import is_whole, shown
from meta_peft.utils.memory import available

logger = logging.getLogger("meta_peft")

SHARE = {"cpu": 0.5, "cuda": 0.85}  # of what is available; other programs share a machine's main memory
EFFICIENT_TOKENS = {"cpu": 512, "cuda": 4096}  # beyond, more tokens at once bring little
COPIES = 8  # of a task's fast weights and optimizer state, on the way through an inner step and back
MARGIN = 1.25  # for what is in use while a graph is walked back


class MemoryPlan:
    """The choice for a run, remembered from batch to batch.

    Args:
        tasks_per_forward: how many tasks go through the model at once, where that is to be fixed.
        budget: bytes for activations, graphs and fast weights; by default a share of what the device has left. With
            `math.inf` nothing is planned: everything is tried, and halved where memory runs out.
    """

    def __init__(self, tasks_per_forward: int | None = None, budget: float | None = None):
        if tasks_per_forward is not None and not (is_whole(tasks_per_forward) and tasks_per_forward >= 1):
            raise MetaPeftError(
                f"tasks_per_forward must be 1 or more, or None to find it; got {shown(tasks_per_forward)}: a whole number."
            )
        if budget is not None and not budget > 0:
            raise MetaPeftError(f"A memory budget must be positive, got {budget}.")
        self.tasks_per_forward, self.budget = tasks_per_forward, budget
        self.spare = 0.0  # bytes that the last choice left over
        self.halvings = 0  # how often memory ran out
        self._most_tasks: int | None = None  # found by running out of memory
        self._needs: dict[tuple[bool, InnerRule], _Needs] = {}
        self._said: set[tuple[int, int | None]] = set()

    def settle(self, algorithm: Any, loss_fn: LossFn, meta: Meta, batch: EpisodeBatch) -> tuple[Any, int]:
        """The algorithm with its memory mode decided, and for how many tasks one forward is to be."""
        undecided = isinstance(algorithm, MAML) and algorithm.second_order and algorithm.memory == "auto"
        self.spare = 0.0
        if self._most_tasks == 0:  # not even one task fits with graphs kept
            return (replace(algorithm, memory="replay") if undecided else algorithm), 1
        largest = min(self.tasks_per_forward or batch.n_tasks, self._most_tasks or batch.n_tasks, batch.n_tasks)
        if self.budget == math.inf or (not undecided and self.tasks_per_forward is not None):
            return algorithm, largest
        needs, budget = self._of_one_task(algorithm, loss_fn, meta, batch), self._budget(meta)
        graphs, size = _graphs(algorithm), largest
        if self.tasks_per_forward is None:
            device = next(iter(meta.adapter.values())).device.type
            enough = min(largest, math.ceil(EFFICIENT_TOKENS.get(device, 4096) / needs.tokens))
            if device == "cpu":  # more at once would only be more memory to be handed out by the system
                largest = enough
            size = min(largest, needs.tasks_in(budget, graphs))
            if undecided and size < enough:
                size = min(enough, needs.tasks_in(budget, 1))
            size = math.ceil(batch.n_tasks / math.ceil(batch.n_tasks / max(size, 1)))
        if undecided and size > needs.tasks_in(budget, graphs):
            graphs = min(graphs, max(0, needs.graphs_in(budget, size)))
        self.spare = max(0.0, budget - size * needs.of_task(graphs))
        self._say(size, graphs if undecided else None, needs, budget)
        return (replace(algorithm, memory=graphs) if undecided else algorithm), size

    def shrink(self, n_tasks: int) -> bool:
        """After memory ran out with `n_tasks` tasks: try fewer from now on. False if there is nothing left to try."""
        if self._most_tasks == 0:
            return False
        self._most_tasks, self.halvings = n_tasks // 2, self.halvings + 1
        if self.budget is not None:
            self.budget /= 2  # else twice as many graphs would be kept of half as many tasks
        logger.warning(
            "Memory ran out with %d tasks at once; going on with %s.",
            n_tasks,
            f"{self._most_tasks}" if self._most_tasks else "one, of which nothing is kept that can be computed again",
        )
        return True

    def state(self) -> dict[str, Any]:
        """What was found out, for a run that goes on later to make the same choices."""
        needs = [[second_order, rule.to_dict(), asdict(of)] for (second_order, rule), of in self._needs.items()]
        return {"budget": self.budget, "most_tasks": self._most_tasks, "halvings": self.halvings, "needs": needs}

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on with what `state` gave, but not with a budget that this machine does not have."""
        if self.budget is None and state["budget"] is not None and state["budget"] <= available(device):
            self.budget = state["budget"]
        self._most_tasks, self.halvings = state["most_tasks"], state["halvings"]
        for second_order, rule, of in state["needs"]:
            self._needs[bool(second_order), InnerRule.from_dict(rule)] = _Needs(**of)

    def _budget(self, meta: Meta) -> float:
        if self.budget is None:
            device = next(iter(meta.adapter.values())).device
            self.budget = int(SHARE.get(device.type, 0.85) * available(device))
        return self.budget

    def _of_one_task(self, algorithm: Any, loss_fn: LossFn, meta: Meta, batch: EpisodeBatch) -> _Needs:
        support, query = batch.support.positions_per_task, batch.query.positions_per_task
        kind = (bool(algorithm.second_order), algorithm.inner)
        known = self._needs.get(kind)
        if known is None or known.tokens < support or known.query_tokens < query:
            support_graph, forward, below = _graph_bytes(loss_fn, meta, batch.support, algorithm)
            fast, _ = algorithm.inner.split(meta.adapter)
            weights = sum(p.nbytes for p in fast.values())
            states = len(algorithm.inner.init(fast)) / max(len(fast), 1)
            copies = int(weights * (COPIES + 2 * states))
            once = below * (support + query) // support
            known = _Needs(support, query, support_graph, forward * query // support, copies, once)
            self._needs[kind] = known
        return known

    def _say(self, size: int, graphs: int | None, needs: _Needs, budget: float) -> None:
        if (size, graphs) not in self._said:
            self._said.add((size, graphs))
            kept = "" if graphs is None else f", the graphs of the last {graphs} inner steps are kept"
            logger.info(
                "%d tasks go through the model at once%s: one needs %.0f MB for a step, and %.1f GB are there.",
                *(size, kept, needs.graph / 1e6, budget / 1e9),
            )


@dataclass(frozen=True)
class _Needs:
    """Bytes for one task: the graph of an inner step, the graph of the query loss, copies of its fast weights.

    `once` is for the graph of what lies below the fast weights, of support and query together (see `slow_prefix`).
    """

    tokens: int
    query_tokens: int
    graph: int
    query_graph: int
    copies: int
    once: int = 0

    def tasks_in(self, budget: float, graphs: int) -> int:
        return int(budget / self.of_task(graphs))

    def of_task(self, graphs: int) -> float:
        return MARGIN * (max(graphs, 1) * self.graph + self.query_graph + self.copies + self.once)

    def graphs_in(self, budget: float, n_tasks: int) -> int:
        return int(
            (budget / MARGIN / max(n_tasks, 1) - self.query_graph - self.copies - self.once) / max(self.graph, 1)
        )


def _graphs(algorithm: Any) -> int:
    """How many graphs of inner steps `algorithm` holds at once, if nothing else is decided."""
    return algorithm.kept_graphs if isinstance(algorithm, MAML) and algorithm.second_order else 1


def _graph_bytes(loss_fn: LossFn, meta: Meta, support: Rows, algorithm: Any) -> tuple[int, int, int]:
    """What autograd saves for an inner step of one task, for the forward of it alone, and for what is run once below it."""
    if (above := above_of(algorithm, loss_fn, meta.adapter)) is not None:
        try:
            return _saved_bytes(loss_fn, meta, support, algorithm, above)
        except RowsRearrangedError as reason:
            above.model.apart(reason)
    return _saved_bytes(loss_fn, meta, support, algorithm, None)


def _saved_bytes(
    loss_fn: LossFn, meta: Meta, support: Rows, algorithm: Any, above: AboveSlow | None
) -> tuple[int, int, int]:
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            saved[storage._cdata] = storage.nbytes()  # on the meta device no storage has an address of its values
        return tensor.detach()  # with a graph of its own, the result of an operation would keep that operation alive

    rows = support.tasks(0, 1)
    fast, slow = start(meta.adapter, algorithm.inner, 1)
    below = 0
    with saved_tensors_hooks(note, lambda tensor: tensor):
        if above is not None:
            reached = above.reach(leaves(slow), rows)
            loss_fn, slow, below = above, {**slow, **leaves(reached)}, sum(saved.values())
            saved.clear()
        forward_only = loss_fn({**slow, **leaves(fast)}, rows)
        forward = sum(saved.values())
        del forward_only
        if not algorithm.second_order:
            return forward, forward, below
        saved.clear()
        graph = GradientGraph(loss_fn, fast, slow, rows)
        total = sum(saved.values())
        del graph
    return total, forward, below
