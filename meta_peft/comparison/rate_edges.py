"""Whether the best rate of a start may lie outside of those that were tried."""

from __future__ import annotations

from collections.abc import Sequence

from meta_peft.utils.words import listed

EDGES = {"smallest": "smaller", "largest": "larger"}


def at_the_edge(
    steps: Sequence[int], chosen: Sequence[Sequence[float | None]], tried: Sequence[float]
) -> dict[str, list[int]]:
    """Numbers of steps at which most seeds chose the ``"smallest"`` or the ``"largest"`` rate factor.

    Args:
        steps: numbers of adaptation steps; at none there is no rate.
        chosen: for each seed, the factor for each of them.
        tried: all factors that there were to choose from.
    """
    if len(set(tried)) == 1:
        return {}
    found: dict[str, list[int]] = {}
    for edge, factor in zip(EDGES, (min(tried), max(tried)), strict=True):
        for column, n in enumerate(steps):
            if n and 2 * sum(factors[column] == factor for factors in chosen) > len(chosen):
                found.setdefault(edge, []).append(n)
    return found


def edges_in_words(title: str, edges: dict[str, list[int]]) -> list[str]:
    """What `at_the_edge` found of the start that tables call `title`."""
    return [
        f"The best of the rates that were tried for {title} after {listed(steps)} step"
        f"{'' if steps == [1] else 's'} is the {edge}: {EDGES[edge]} rate_factors may do better."
        for edge, steps in edges.items()
    ]
