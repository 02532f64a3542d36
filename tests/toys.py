"""Losses of tasks without a model: one whose every derivative is known, and one that is no quadratic."""

from __future__ import annotations

import torch
from torch import Tensor

from meta_peft.types import EpisodeBatch, Params, Rows


def quadratic(adapter: Params, rows: Rows) -> Tensor:
    """``sum over entries of curvature * (w - centre)^2 / 2``, for each task its own."""
    terms = (rows.inputs["curvature"] * (adapter["w"] - rows.inputs["centre"]) ** 2 / 2, 0 * adapter["unused"])
    return sum(term.sum((-2, -1)) for term in terms)


def quadratic_rows(seed: int, n_tasks: int = 4) -> Rows:
    g = torch.Generator().manual_seed(seed)
    values = [torch.rand(n_tasks, 2, 3, generator=g, dtype=torch.float64) + 0.5 for _ in range(2)]
    return Rows(dict(zip(("curvature", "centre"), values, strict=True)), torch.zeros(n_tasks, 1), n_tasks)


def quadratic_problem() -> tuple[Params, EpisodeBatch]:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    adapter = {"unused": torch.zeros(1, 1, dtype=torch.float64), "w": w}
    return adapter, EpisodeBatch(quadratic_rows(1), quadratic_rows(2), list("abcd"))


def network(adapter: Params, rows: Rows) -> Tensor:
    """The mean square error of ``B tanh(A x)`` on 4 rows for each task."""
    x, y = (rows.inputs[name].view(rows.n_tasks, -1, 3) for name in ("x", "y"))
    hidden = torch.tanh(x @ adapter["a"].transpose(-1, -2))
    return ((hidden @ adapter["b"].transpose(-1, -2) - y) ** 2).mean((1, 2))


def network_rows(seed: int, n_tasks: int = 3) -> Rows:
    g = torch.Generator().manual_seed(seed)
    values = {name: torch.randn(4 * n_tasks, 3, generator=g, dtype=torch.float64) for name in ("x", "y")}
    return Rows(values, torch.zeros(4 * n_tasks, 1), n_tasks)


def network_problem() -> tuple[Params, EpisodeBatch]:
    g = torch.Generator().manual_seed(0)
    adapter = {n: torch.randn(s, generator=g, dtype=torch.float64) for n, s in {"a": (2, 3), "b": (3, 2)}.items()}
    return adapter, EpisodeBatch(network_rows(1), network_rows(2), list("abc"))
