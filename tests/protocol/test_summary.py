"""What cells say together, by hand-made numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from meta_peft import MetaPeftError
from meta_peft.protocol.cells import PROTOCOL, Cell, Found
from meta_peft.protocol.page import as_markdown, tables
from meta_peft.protocol.summary import Summary
from meta_peft.protocol.verdict import verdict

ABOUT = {"training": {"shots": 4}, "tasks": {"n_train": 9}, "comparison": {"rate_factors": [0.5, 0.25, 1.0]}}
TASKS = [f"task {i}" for i in range(8)]
COUNTS = [[2.0, 1.0, 1.0], [2.0, 1.8, 1.0]]  # of two bins: half of each is right, at a confidence of 0.5 and 0.9
COST = {"outer_steps": 3.0, "training_seconds": 2.0, "support_tokens": 40.0, "seconds_per_step": 0.5}


def cell(start: str, score: tuple[float, float], seed: int = 0, task_count: int | None = None, **changes) -> Found:
    """Scores before adaptation and after 10 steps, the same for all tasks but the last, which is worse by 0.1."""
    steps = [0] if start == "in_context" else [0, 10]
    rows = [[value - 0.1 * (i == len(TASKS) - 1) for value in score[: len(steps)]] for i in range(len(TASKS))]
    values = {
        "tasks": TASKS,
        "steps": steps,
        "factors": [1.0, 0.5][: len(steps)],
        "score": rows,
        "at": 10,
        "cost": COST,
        "protocol": PROTOCOL,
    }
    values |= {"loss": (1 - np.array(rows)).tolist(), "calibration": [COUNTS] * len(steps), "metric": "exact_match"}
    return Found(Cell(seed, start, task_count), **(values | changes))


def summary_of(*found: Found) -> Summary:
    return Summary.of(found, ABOUT)


def test_tasks_are_averaged_over_seeds_and_matched_by_name():
    turned = cell("plain", (0.2, 0.6), seed=1)
    turned = replace(turned, tasks=TASKS[::-1], score=turned.score[::-1])
    summary = summary_of(cell("plain", (0.0, 0.4)), turned, cell("meta", (0, 1)), cell("meta", (0, 1), seed=1))
    curve = summary.report.curves["plain LoRA"]
    np.testing.assert_allclose(curve.score, [[0.1, 0.5]] * 7 + [[0.0, 0.4]])
    assert summary.seeds == (0, 1)
    assert summary.tasks == TASKS


def test_only_seeds_that_every_start_has_count():
    summary = summary_of(cell("plain", (0, 1)), cell("meta", (0, 1)), cell("meta", (0, 1), seed=1))
    assert summary.seeds == (0,)
    left_out = "Left out, since not all starts are measured with them yet: seed 1 of meta-learned LoRA."
    assert left_out in verdict(summary)
    whole = summary_of(*(cell(start, (0, 1), seed) for start in ("plain", "meta") for seed in (0, 1)))
    assert not any("Left out" in sentence for sentence in verdict(whole))
    with pytest.raises(MetaPeftError, match="No seed has all its starts"):
        summary_of(cell("plain", (0, 1)), cell("meta", (0, 1), seed=1))


def test_cells_of_other_tasks_are_refused():
    other = cell("meta", (0, 1), tasks=["another", *TASKS[1:]])
    with pytest.raises(MetaPeftError, match="seed0-meta is of other held-out tasks"):
        _ = summary_of(cell("plain", (0, 1)), other).report


def test_the_difference_is_paired_and_so_is_that_of_the_gains():
    """The last task is worse in both, so the difference is the same for all tasks and its interval has no width."""
    summary = summary_of(cell("multitask", (0.3, 0.5)), cell("meta", (0.1, 0.6)))
    before, after = summary.differences()
    assert (before.other, before.steps, after.steps) == ("multitask", 0, 10)
    assert after.mean == pytest.approx(0.1)
    assert after.interval == pytest.approx((0.1, 0.1))
    assert after.by_seed == pytest.approx((0.1,))
    assert after.of_gains[0] == pytest.approx(0.3)  # 0.5 from its own start, 0.2 from the other
    assert before.of_gains is None
    assert after.ahead
    assert before.behind


def test_seeds_that_disagree_leave_it_open():
    """All tasks say the same in each seed, so that over tasks alone the mean of the seeds would be certain."""
    found = [cell(start, (0.0, 0.5), seed) for start in ("plain", "multitask") for seed in range(4)]
    one_sided = [cell("meta", (0.0, 0.5 + gain), seed) for seed, gain in enumerate((0.1, 0.2, 0.1, 0.2))]
    divided = [cell("meta", (0.0, 0.5 + gain), seed) for seed, gain in enumerate((0.2, -0.1, 0.2, -0.1))]
    after = {d.other: d for d in summary_of(*found, *one_sided).differences() if d.steps == 10}["multitask"]
    assert after.ahead
    assert after.interval[0] >= 0.1 - 1e-9
    assert after.by_seed == pytest.approx((0.1, 0.2, 0.1, 0.2))
    summary = summary_of(*found, *divided)
    after = {d.other: d for d in summary.differences() if d.steps == 10}["multitask"]
    assert after.mean == pytest.approx(0.05)
    assert (after.ahead, after.behind) == (False, False)
    assert "level with it: plain LoRA and multi-task LoRA" in verdict(summary)[0]
    assert verdict(summary)[1].startswith("Whether meta-training paid for itself is open")


def test_for_an_error_rate_less_is_ahead():
    found = [cell(start, score, metric="wer") for start, score in (("plain", (1.0, 0.8)), ("meta", (1.0, 0.5)))]
    after = summary_of(*found).differences()[1]
    assert after.mean == pytest.approx(0.3)
    assert after.ahead


def test_calibration_error_of_all_tasks_together():
    summary = summary_of(cell("plain", (0, 1)), cell("meta", (0, 1)))
    assert summary.calibration("plain") == pytest.approx([0.8 / 4] * 2)


def test_along_shots_and_training_tasks():
    shots = {"1": {"loss": [1.0] * 8, "score": [0.25] * 8}}
    few = cell("meta", (0, 0.5), task_count=3)
    summary = summary_of(cell("plain", (0, 0.4)), cell("meta", (0, 1.0), shots=shots), few)
    assert {n: v.mean() for n, v in summary.along_shots()["meta"].items()} == pytest.approx({1: 0.25, 4: 1 - 0.1 / 8})
    counts = summary.along_tasks()
    assert list(counts) == ["meta"]
    assert {n: v.mean() for n, v in counts["meta"].items()} == pytest.approx({3: 0.5 - 0.1 / 8, 9: 1 - 0.1 / 8})


def test_along_the_training():
    """Of starts that were trained and whose cells all have it; seeds without a finite loss have no mean."""
    meta = {seed: {"0.25": [1.0, 0.8 + 0.2 * seed], "1": [0.9, 0.5]} for seed in (0, 1)}
    multitask = {0: {"0.25": [1.0, 0.8], "1": [0.9, None]}, 1: {"0.25": [1.0, 0.8], "1": [0.9, 0.5]}}
    found = [cell("meta", (0, 1), seed, along_training=meta[seed]) for seed in (0, 1)]
    found += [cell("multitask", (0, 1), seed, along_training=multitask[seed]) for seed in (0, 1)]
    found += [cell("plain", (0, 1), seed, along_training={"1": [1.0, 0.9]}) for seed in (0, 1)]
    found += [cell("fomaml", (0, 1), seed, along_training=meta[0] if seed else {}) for seed in (0, 1)]
    summary = summary_of(*found)
    assert summary.along_training() == {
        "multitask": {0.25: pytest.approx(0.8), 1.0: None},
        "meta": {0.25: pytest.approx(0.9), 1.0: pytest.approx(0.5)},
    }
    (table,) = [table for table in tables(summary) if table[0].startswith("Part of the training")]
    assert table[1:] == (
        ["start", "25 %", "100 %"],
        [["multi-task LoRA", "0.800", ""], ["meta-learned LoRA", "0.900", "0.500"]],
    )


@pytest.mark.parametrize(
    ("multitask", "meta", "said"),
    [
        (0.4, 0.6, "paid for itself: at equal compute it is ahead of multi-task LoRA by 20 points"),
        (0.7, 0.6, "did not pay for itself: at equal compute it is behind multi-task LoRA by 10 points"),
        (0.6, 0.6, "is open: at equal compute it is level with multi-task LoRA"),
    ],
)
def test_the_verdict_says_whether_it_paid(multitask: float, meta: float, said: str):
    words = verdict(summary_of(cell("multitask", (0.1, multitask)), cell("meta", (0.1, meta))))
    assert any(said in sentence for sentence in words)
    best = "multi-task LoRA" if multitask >= meta else "meta-learned LoRA"
    assert words[0].startswith(f"Best on these tasks: {best}, {100 * max(multitask, meta) - 1:.0f} % exact match")
    assert ("level with it" in words[0]) == (multitask == meta)


@pytest.mark.parametrize(
    ("classifier", "said"),
    [
        (0.3, "Meta-training paid for itself: at equal compute it is ahead of multi-task LoRA by 10 points"),
        (
            0.5,
            "Whether meta-training paid for itself is open: at equal compute it is level with one classifier, new head",
        ),
        (
            0.7,
            "Meta-training did not pay for itself: at equal compute it is behind one classifier, new head by 20 points",
        ),
    ],
)
def test_what_was_trained_without_an_inner_loop_and_is_best_is_what_counts(classifier: float, said: str):
    found = [cell("multitask", (0.1, 0.4)), cell("classifier", (0.1, classifier)), cell("meta", (0.1, 0.5))]
    words = verdict(summary_of(*found))
    assert any(sentence.startswith(said) for sentence in words)
    assert sum("multi-task LoRA" in sentence for sentence in words[1:]) == 1
    assert sum("one classifier" in sentence for sentence in words[1:]) == 1


def test_the_rival_that_it_is_not_ahead_of_counts():
    """Level with one, over tasks that disagree, and ahead of another by less: it is not known whether it paid."""
    disagree = [[0.1, 0.2 if i % 2 else 0.75] for i in range(len(TASKS))]
    rival = replace(cell("classifier", (0, 0)), score=disagree)
    words = verdict(summary_of(cell("multitask", (0.1, 0.45)), rival, cell("meta", (0.1, 0.5))))
    assert words[1].startswith(
        "Whether meta-training paid for itself is open: at equal compute it is level with one cl"
    )
    assert any("ahead of multi-task LoRA by 5 points" in sentence for sentence in words)


@pytest.mark.parametrize(("n", "told"), [(1, False), (5, False), (6, True)])
def test_few_tasks_tell_nothing(n: int, told: bool):
    starts = (("multitask", 0.5), ("meta", 0.6))
    found = [replace(cell(name, (0, 0)), tasks=TASKS[:n], score=[[0.1, score]] * n) for name, score in starts]
    found = [replace(each, loss=each.loss[:n]) for each in found]
    words = verdict(summary_of(*found))
    assert words[1].startswith("Meta-training paid for itself:") == told
    assert words[1].endswith("but the held-out tasks are too few to tell.") != told
    said = f"Held-out tasks: {n}. Others may move all numbers; twenty or more would tell."
    assert (said in words) != told


def test_the_report_says_how_many_query_rows_there_are():
    found = [cell("plain", (0.1, 0.5)), cell("meta", (0.1, 0.6))]
    assert "## Held-out tasks: 8, 1 seed\n" in as_markdown(summary_of(*found)), "of cells that do not say"
    found = [replace(each, query_rows=n) for each, n in zip(found, (4, 1), strict=True)]
    assert "## Held-out tasks: 8, 1 query row each, 1 seed\n" in as_markdown(summary_of(*found))


@pytest.mark.parametrize(
    ("plain", "in_context", "said"),
    [
        (0.5, 0.5, "Meta-training paid for itself: at equal compute it is ahead of multi-task LoRA by 10 points"),
        (
            0.6,
            0.5,
            "Whether meta-training paid for itself is open: at equal compute it is ahead of multi-task LoRA by 10",
        ),
        (
            0.7,
            0.6,
            "Meta-training did not pay for itself: at equal compute it is ahead of multi-task LoRA by 10 points",
        ),
        (
            0.5,
            0.7,
            "Meta-training did not pay for itself: at equal compute it is ahead of multi-task LoRA by 10 points",
        ),
    ],
)
def test_it_pays_only_if_it_is_better_than_no_training(plain: float, in_context: float, said: str):
    found = [cell("plain", (0.1, plain)), cell("in_context", (in_context, 0)), cell("multitask", (0.1, 0.5))]
    words = verdict(summary_of(*found, cell("meta", (0.1, 0.6))))
    assert words[1].startswith(said)
    if max(plain, in_context) >= 0.6:
        cheapest = "plain LoRA" if plain > in_context else "in-context examples"
        assert f"{cheapest} by 10 points" in words[1] or f"level with {cheapest}" in words[1]
        assert words[1].endswith("which takes no training.")


def test_a_rival_that_could_not_stop_early_leaves_it_open():
    words = verdict(summary_of(cell("multitask", (0.1, 0.5), protocol=1), cell("meta", (0.1, 0.6))))
    assert words[1].startswith(
        "Whether meta-training paid for itself is open: at equal compute it is ahead of multi-task"
    )
    assert "may do better if stopped early" in words[1]


def test_the_best_is_told_with_those_that_are_level():
    """Better on some tasks and worse on others is level; worse by as much on each is not."""
    unlike, same = [[0.1, 0.5 + 0.1 * (-1) ** i] for i in range(len(TASKS))], [[0.1, 0.5]] * len(TASKS)
    scores = {"plain": unlike, "meta": same, "multitask": [[0.1, 0.4]] * len(TASKS), "in_context": [[0.5]] * len(TASKS)}
    found = [replace(cell(start, (0, 0)), score=score) for start, score in scores.items()]
    first, *_ = verdict(summary_of(*found))
    level = "level with it: meta-learned LoRA and in-context examples"
    assert first == f"Best on these tasks: plain LoRA, 50 % exact match after 10 steps on 4 examples; {level}."


def test_to_be_ahead_of_what_cannot_learn_proves_nothing():
    """Multi-task training has nothing to learn from classes that are called something else in each episode."""
    about = {**ABOUT, "training": {"shots": 2, "ways": 4, "label_words": "permuted"}}
    multitask, meta = cell("multitask", (0.1, 0.4)), cell("meta", (0.1, 0.6))
    words = verdict(Summary.of([multitask, meta], about))
    assert any("is ahead of multi-task LoRA by 20 points" in sentence for sentence in words)
    assert any("is not known until a start that can is measured" in sentence for sentence in words)
    assert not any("paid for itself:" in sentence for sentence in words)
    words = verdict(Summary.of([multitask, meta, cell("classifier", (0.1, 0.5))], about))
    assert any(
        sentence.startswith("Meta-training paid for itself: at equal compute it is ahead of one") for sentence in words
    )
    words = verdict(Summary.of([multitask, cell("meta", (0.1, 0.3))], about))
    assert any("did not pay for itself" in sentence for sentence in words)


def test_the_verdict_says_of_what_there_are_so_many_examples():
    found = [cell("plain", (0.1, 0.2)), cell("meta", (0.1, 0.6))]
    about = {**ABOUT, "training": {"shots": 2, "ways": 4}}
    assert verdict(Summary.of(found, about))[0].endswith("after 10 steps on 2 examples of each of 4 classes.")
    found = [replace(each, shots={"1": {"loss": [1.0] * 8, "score": [0.25] * 8}}) for each in found]
    for summary, title in (
        (Summary.of(found, about), "Examples of each class"),
        (summary_of(*found), "Examples of a task"),
    ):
        assert f"{title}, after 10 steps" in [name.partition(":")[0] for name, *_ in tables(summary)]


def test_the_table_says_by_which_rule_a_start_did_best():
    """Of two seeds one may have done best by the run's own rule; cells of old have no such entry."""
    other = "Adam on all weights"
    plain = [cell("plain", (0.1, 0.2), how=["", other]), cell("plain", (0.1, 0.3), seed=1)]
    summary = summary_of(*plain, cell("meta", (0.1, 0.6)), cell("meta", (0.1, 0.6), seed=1))
    counted = f"{other} (1 of 2 seeds)"
    assert summary.report.curves["plain LoRA"].how == ("", counted)
    assert [row["rate_factor"] for row in summary.report.texts()] == ["", f"0.5, {counted}", "", "0.5"]
    curve = replace(summary.report.curves["plain LoRA"], factors=(1.0, None), how=("a quarter of its training", other))
    texts = replace(summary.report, curves={"plain LoRA": curve}).texts()
    assert [row["rate_factor"] for row in texts] == ["a quarter of its training", other], "seeds had other factors"
    same = summary_of(*(cell("plain", (0.1, 0.2), seed=seed, how=["", other]) for seed in (0, 1)))
    assert same.report.curves["plain LoRA"].how == ("", other)


def test_the_verdict_says_where_the_best_rate_may_not_have_been_tried():
    """At no steps there is no rate; and it counts what most seeds chose."""
    rows = [[0.1] * 4] * len(TASKS)
    steps = {"steps": [0, 1, 3, 10], "loss": rows, "score": rows, "calibration": [COUNTS] * 4}
    chosen = {"plain": [[0.25, 1.0, 0.5, 0.25]] * 2, "meta": [[0.25, 0.25, 0.25, 0.25], [0.25, 0.5, 0.25, 0.25]]}
    found = [
        replace(cell(start, (0, 0), seed), factors=factors, **steps)
        for start, each in chosen.items()
        for seed, factors in enumerate(each)
    ]
    rates = [sentence for sentence in verdict(summary_of(*found)) if "rate_factors" in sentence]
    assert rates == [
        f"The best of the rates that were tried for {words} rate_factors may do better."
        for words in (
            "plain LoRA after 10 steps is the smallest: smaller",
            "plain LoRA after 1 step is the largest: larger",
            "meta-learned LoRA after 3 and 10 steps is the smallest: smaller",
        )
    ]
    one = {**ABOUT, "comparison": {"rate_factors": [0.25]}}
    assert not any("rate_factors" in sentence for sentence in verdict(Summary.of(found, one)))


def test_the_verdict_says_what_an_earlier_version_measured_otherwise():
    found = [cell(start, (0.1, 0.5), seed, protocol=1) for start in ("plain", "multitask") for seed in (0, 1)]
    found += [cell("meta", (0.1, 0.5), seed, protocol=PROTOCOL - seed) for seed in (0, 1)]
    (said,) = [sentence for sentence in verdict(summary_of(*found)) if "by an earlier version" in sentence]
    assert "multi-task LoRA (2), meta-learned LoRA (1). " in said, "plain LoRA is not trained"
    present = [replace(each, protocol=PROTOCOL) for each in found]
    assert not any("by an earlier version" in sentence for sentence in verdict(summary_of(*present)))


def test_of_one_start_nothing_is_said_to_be_best():
    first, *_ = verdict(summary_of(cell("plain", (0, 0.4))))
    assert first == "Nothing to compare with yet: plain LoRA, 39 % exact match after 10 steps on 4 examples."


def test_the_verdict_claims_nothing_that_was_not_measured():
    words = verdict(summary_of(cell("plain", (0.1, 0.2)), cell("meta", (0.1, 0.6)), cell("in_context", (0.9, 0))))
    assert any("is not known" in sentence for sentence in words)
    assert any("is behind in-context examples by 30 points" in sentence for sentence in words)
    assert words[0].startswith("Best on these tasks: in-context examples, 89 % exact match on 4 examples")
    assert any("Seeds: 1." in sentence for sentence in words)
