"""The comparison in plain words: which start is best, and whether meta-training paid for itself."""

from __future__ import annotations

import numpy as np

from meta_peft.protocol.arguments import IN_CONTEXT, META, MULTITASK, TITLES, WITHOUT_INNER_LOOP
from meta_peft.protocol.summary import Difference, Summary
from meta_peft.tasks.labelling import of_classes

BY = {True: "ahead of", False: "behind"}
UNKNOWN = {
    False: "Multi-task LoRA was not measured, so whether meta-training paid for itself is not known.",
    True: "Classes are called something else in each episode, of which multi-task LoRA can learn nothing: whether"
    " meta-training paid for itself is not known until a start that can is measured without an inner loop (classifier, for"
    " models with a head).",
}


def verdict(summary: Summary) -> list[str]:
    """A few sentences, the most important one first."""
    scores = {start: float(np.mean(by_shots[summary.shots])) for start, by_shots in summary.along_shots().items()}
    metric, sign = summary.metric, 1 if summary.metric.higher_is_better else -1
    best = max(scores, key=lambda start: sign * scores[start])
    shown = metric.shown(scores[best])
    after = "" if best == IN_CONTEXT else f" after {summary.at} steps"
    which = "Best on these tasks" if len(scores) > 1 else "Nothing to compare with yet"
    said = [
        f"{which}: {TITLES[best]}, {' '.join(filter(None, (shown, metric.unit, metric.title)))}{after} on"
        f" {summary.shots} examples{of_classes(summary.ways)}."
    ]
    at = {d.other: d for d in summary.differences() if d.steps == summary.at}
    rivals = [at[start] for start in WITHOUT_INNER_LOOP if start in at]
    if summary.renames_classes:  # to be ahead of what cannot learn proves nothing
        rivals = [difference for difference in rivals if difference.other != MULTITASK or not difference.ahead]
    rival = min(rivals, key=lambda difference: difference.mean, default=None)
    if rival is not None:
        said.append(_paid(summary, rival))
    said += [f"Meta-learned LoRA is {_compared(summary, each)}." for each in at.values() if each is not rival]
    if META in summary.starts and rival is None:
        said.append(UNKNOWN[summary.renames_classes])
    said += [_more_rates(start, *of) for start in summary.starts for of in summary.at_the_edge(start).items()]
    if earlier := summary.by_earlier_protocols:
        cells = ", ".join(f"{TITLES[start]} ({n})" for start, n in earlier.items())
        said.append(
            f"Measured at the end of their training, where others may stop early, by an earlier version: {cells}. To have"
            " them measured again, remove their cells."
        )
    if len(summary.seeds) < 3:
        said.append(
            f"Seeds: {len(summary.seeds)}. Another training seed may move all numbers; three or more would tell."
        )
    return said


def _paid(summary: Summary, difference: Difference) -> str:
    """Against the best start that was trained on the same tasks without an inner loop."""
    compared = _compared(summary, difference)
    if difference.ahead:
        return f"Meta-training paid for itself: at equal compute it is {compared}."
    if difference.behind:
        return f"Meta-training did not pay for itself: at equal compute it is {compared}. Take that."
    return f"Whether meta-training paid for itself is open: at equal compute it is {compared}."


def _more_rates(start: str, edge: str, steps: list[int]) -> str:
    after = " and ".join(", ".join(map(str, steps)).rsplit(", ", 1))
    return (
        f"The best of the rates that were tried for {TITLES[start]} after {after} step{'' if steps == [1] else 's'} is the"
        f" {edge}: {'smaller' if edge == 'smallest' else 'larger'} rate_factors may do better."
    )


def _compared(summary: Summary, difference: Difference) -> str:
    metric = summary.metric
    low, high = (metric.shown(bound) for bound in difference.by_tasks)
    far = f"{metric.shown(abs(difference.mean))} points" if metric.unit else metric.shown(abs(difference.mean))
    interval = f"95 % interval of the difference {low} to {high}"
    if difference.ahead or difference.behind:
        return f"{BY[difference.ahead]} {TITLES[difference.other]} by {far} ({interval})"
    return f"level with {TITLES[difference.other]} ({interval})"
