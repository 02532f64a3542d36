"""The comparison in plain words: which start is best, and whether meta-training paid for itself."""

from __future__ import annotations

from meta_peft.comparison.rate_edges import edges_in_words
from meta_peft.evaluation.intervals import interval
from meta_peft.protocol.arguments import IN_CONTEXT, META, MULTITASK, TITLES, UNTRAINED, WITHOUT_INNER_LOOP
from meta_peft.protocol.summary import Difference, Summary
from meta_peft.tasks.labelling import of_classes
from meta_peft.utils.words import listed

BY = {True: "ahead of", False: "behind"}
UNKNOWN = {
    False: "Multi-task LoRA was not measured, so whether meta-training paid for itself is not known.",
    True: "Classes are called something else in each episode, of which multi-task LoRA can learn nothing: whether"
    " meta-training paid for itself is not known until a start that can is measured without an inner loop (classifier, for"
    " models with a head).",
}
PAID, NOT_PAID = "Meta-training paid for itself", "Meta-training did not pay for itself"
OPEN = "Whether meta-training paid for itself is open"
FEW_TASKS = 6  # intervals over fewer are too narrow: of five tasks and one seed, 11 % are above 0 where nothing differs


def verdict(summary: Summary) -> list[str]:
    """A few sentences, the most important one first."""
    said = [_best(summary)]
    at = {d.other: d for d in summary.differences() if d.steps == summary.at}
    rivals = [at[start] for start in WITHOUT_INNER_LOOP if start in at]
    if summary.renames_classes:  # to be ahead of what cannot learn proves nothing
        rivals = [difference for difference in rivals if difference.other != MULTITASK or not difference.ahead]
    rival = min(rivals, key=lambda each: (not each.behind, each.ahead, each.mean), default=None)  # the hardest to beat
    if rival is not None:
        said.append(_paid(summary, rival, [at[start] for start in UNTRAINED if start in at]))
    said += [f"Meta-learned LoRA is {_compared(summary, each)}." for each in at.values() if each is not rival]
    if META in summary.starts and rival is None:
        said.append(UNKNOWN[summary.renames_classes])
    said += [words for start in summary.starts for words in edges_in_words(TITLES[start], summary.at_the_edge(start))]
    if earlier := summary.by_earlier_protocols:
        cells = ", ".join(f"{TITLES[start]} ({n})" for start, n in earlier.items())
        said.append(
            f"Measured at the end of their training, where others may stop early, by an earlier version: {cells}. To have"
            " them measured again, remove their cells."
        )
    if summary.left_out:
        seeds = "; ".join(
            f"seed {seed} of {listed([TITLES[start] for start in starts])}" for seed, starts in summary.left_out.items()
        )
        said.append(f"Left out, since not all starts are measured with them yet: {seeds}.")
    if len(summary.tasks) < FEW_TASKS:
        said.append(f"Held-out tasks: {len(summary.tasks)}. Others may move all numbers; twenty or more would tell.")
    if len(summary.seeds) < 3:
        said.append(
            f"Seeds: {len(summary.seeds)}. Another training seed may move all numbers; three or more would tell."
        )
    return said


def _best(summary: Summary) -> str:
    """The start with the best score, and those of which tasks and seeds do not tell it apart."""
    scores = {start: summary.at_by_seed(start) for start in summary.starts}
    metric, sign = summary.metric, 1 if summary.metric.higher_is_better else -1
    best = max(scores, key=lambda start: sign * float(scores[start].mean()))
    shown = metric.shown(float(scores[best].mean()))
    after = "" if best == IN_CONTEXT else f" after {summary.at} steps"
    which = "Best on these tasks" if len(scores) > 1 else "Nothing to compare with yet"
    level = [
        TITLES[start]
        for start, its in scores.items()
        if start != best and interval(sign * (scores[best] - its))[0] <= 0
    ]
    too = f"; level with it: {listed(level)}" if level else ""
    return (
        f"{which}: {TITLES[best]}, {' '.join(filter(None, (shown, metric.unit, metric.title)))}{after} on"
        f" {summary.shots} examples{of_classes(summary.ways)}{too}."
    )


def _paid(summary: Summary, rival: Difference, untrained: list[Difference]) -> str:
    """Against the best start that was trained on the same tasks without an inner loop, and those that need no training."""
    compared = _compared(summary, rival)
    if len(summary.tasks) < FEW_TASKS:
        return f"{OPEN}: at equal compute it is {compared}, but the held-out tasks are too few to tell."
    if rival.behind:
        return f"{NOT_PAID}: at equal compute it is {compared}. Take that."
    if not rival.ahead:
        return f"{OPEN}: at equal compute it is {compared}."
    cheapest = min((each for each in untrained if not each.ahead), key=lambda each: each.mean, default=None)
    if cheapest is not None:
        said = NOT_PAID if cheapest.behind else OPEN
        return (
            f"{said}: at equal compute it is {compared}, but {_compared(summary, cheapest)}, which takes no training."
        )
    if rival.other in summary.by_earlier_protocols:
        return (
            f"{OPEN}: at equal compute it is {compared}, which was measured at the end of its training and may do better if"
            " stopped early."
        )
    return f"{PAID}: at equal compute it is {compared}."


def _compared(summary: Summary, difference: Difference) -> str:
    metric = summary.metric
    low, high = (metric.shown(bound) for bound in difference.interval)
    far = f"{metric.shown(abs(difference.mean))} points" if metric.unit else metric.shown(abs(difference.mean))
    interval = f"95 % interval of the difference {low} to {high}"
    if difference.ahead or difference.behind:
        return f"{BY[difference.ahead]} {TITLES[difference.other]} by {far} ({interval})"
    return f"level with {TITLES[difference.other]} ({interval})"
