"""How many outer steps of one algorithm cost what those of another do, counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from surface import config

from meta_peft.comparison.equal_compute import at_equal_compute, compute_ratio, unwatched
from meta_peft.tasks import TaskSet
from meta_peft.training.trainer_options import check_evaluation
from meta_peft.types import Stack

TASKS = TaskSet.of({f"task {i}": [{"input": str(j), "target": str(i)} for j in range(50)] for i in range(20)})


@pytest.mark.parametrize(
    ("algorithm", "products"),
    [
        ("maml", 48 + 2 * (3 * 4 * 4 + 2 * 8)),  # below once; an inner step is 4 products, then 2 for the query rows
        ("fomaml", 48 + 2 * (3 * 2 * 4 + 2 * 8)),
        ("reptile", 48 + 2 * (3 * 2 * 12)),  # its inner steps are on all rows
        ("multitask", 96),
        ("imaml", 48 + 2 * (3 * 2 * 4 + (2 + 2 * 6) * 4 + 2 * 8)),  # 5 iterations and one product to check
    ],
)
def test_compute_ratio_by_hand(tmp_path: Path, algorithm: str, products: int):
    args = config(tmp_path, algorithm=algorithm, shots=4, query_size=8, inner_steps=3, proximal=1.0)
    assert compute_ratio(Stack(6, 4), args) == pytest.approx(products / 96)


@pytest.mark.parametrize(
    ("options", "products"),
    [
        ({"second_order_steps": 1}, 48 + 2 * ((2 + 2 + 4) * 4 + 2 * 8)),
        ({"memory": "replay"}, 48 + 2 * (3 * 6 * 4 + 2 * 8)),  # the gradient of every step once more
        ({"memory": "1"}, 48 + 2 * ((6 + 6 + 4) * 4 + 2 * 8)),
        ({"memory": "finite_differences"}, 48 + 2 * ((3 * 6 + 4) * 4 + 2 * 8)),  # two gradients for each product
    ],
)
def test_compute_ratio_of_what_is_kept_and_rebuilt(tmp_path: Path, options: dict, products: int):
    args = config(tmp_path, shots=4, query_size=8, inner_steps=3, **options)
    assert compute_ratio(Stack(6, 4), args) == pytest.approx(products / 96)


def test_compute_ratio_is_the_mean_over_the_schedule(tmp_path: Path):
    """8 outer steps: 2 of warm-up, which are not counted, 2 of first order, and the mean of query losses up to the 6th."""
    options = {"multitask_warmup_steps": 2, "first_order_until": 4, "multi_step_until": 6, "max_steps": 8}
    args = config(tmp_path, shots=4, query_size=8, inner_steps=3, **options)
    support, queries = (
        [2, 2, 4, 4, 4, 4],
        [3, 3, 3, 3, 1, 1],
    )  # of one inner step, and how often the query rows are seen
    steps = [48 + 2 * (3 * s * 4 + 2 * 8 * q) for s, q in zip(support, queries, strict=True)]
    assert compute_ratio(Stack(6, 4), args) == pytest.approx(sum(steps) / 6 / 96)


def test_compute_ratio_where_all_layers_are_adapted(tmp_path: Path):
    args = config(tmp_path, shots=4, query_size=4, inner_steps=1)
    assert compute_ratio(Stack(6, 0), args) == pytest.approx((4 * 4 + 2 * 4) / (2 * 8))


def test_others_get_the_steps_that_the_same_compute_buys(tmp_path: Path):
    """6 layers, 4 of them run once: a step of MAML costs 176 products, of multi-task training 96, of first order 128."""
    args = config(tmp_path, shots=4, query_size=8, inner_steps=3, max_steps=60)
    steps = {
        name: at_equal_compute(args, Stack(6, 4), TASKS, algorithm=name).max_steps
        for name in ("maml", "multitask", "fomaml")
    }
    assert steps == {"maml": 60, "multitask": round(60 * 176 / 96), "fomaml": round(60 * 176 / 128)}
    assert args.max_steps == 60, "the options given stay as they are"


def test_steps_of_warm_up_stay_as_they_are(tmp_path: Path):
    args = config(tmp_path, shots=4, query_size=8, inner_steps=3, max_steps=60, multitask_warmup_steps=20)
    own = at_equal_compute(args, Stack(6, 4), TASKS, algorithm="multitask")
    assert own.max_steps == 20 + round(40 * 176 / 96)


def test_layers_below_the_fast_weights_cost_as_much_as_in_multi_task_training(tmp_path: Path):
    """Of 6 layers 1 is frozen, 3 are slow, 2 are fast: a forward, forward and backward, a forward and inner steps."""
    options = {"shots": 4, "query_size": 8, "inner_steps": 3, "max_steps": 60}
    args = config(tmp_path, fast_weights="lora_B", **options)
    products = 12 + 3 * 2 * 12 + 2 * (12 + 3 * 4 * 4 + 2 * 8)
    assert compute_ratio(Stack(6, 1, 3), args) == pytest.approx(products / (12 + 5 * 2 * 12))
    # With the head alone an outer step costs what one of multi-task training does.
    assert at_equal_compute(args, Stack(6, 1, 5), TASKS, algorithm="multitask").max_steps == 60
    everything = config(tmp_path, **options)  # without fast weights of their own none are slow
    assert compute_ratio(Stack(6, 1, 3), everything) == compute_ratio(Stack(6, 1), everything)


@pytest.mark.parametrize(
    ("options", "frozen"),
    [
        ({"frozen_cache_gb": 1}, 0),  # 60 steps of 4 tasks draw 2880 times from 1000 rows
        ({"frozen_cache_gb": 1, "max_steps": 20}, 48),  # 960 times: hardly a row twice
        ({}, 48),
    ],
)
def test_layers_whose_output_is_kept_cost_every_start_the_same(tmp_path: Path, options: dict, frozen: int):
    shape = {"shots": 4, "query_size": 8, "inner_steps": 3, "max_steps": 60, "per_device_train_batch_size": 4}
    args = config(tmp_path, **shape | options)
    own = at_equal_compute(args, Stack(6, 4), TASKS, algorithm="multitask")
    assert own.max_steps == round(args.max_steps * (frozen + 128) / (frozen + 48))


def test_a_baseline_without_an_inner_loop_learns_its_head(tmp_path: Path):
    """With `learn_head: false` nothing would ever move a head at zero, and LoRA under it has no gradient."""
    args = config(tmp_path, learn_head=False, ways=2, label_words="permuted", label_column="target")
    baseline = at_equal_compute(args, Stack(6, 4), TASKS, algorithm="multitask")
    assert baseline.learns_head
    assert not at_equal_compute(args, Stack(6, 4), TASKS, algorithm="fomaml").learns_head


def test_what_is_neither_evaluated_nor_saved_has_no_best_checkpoint(tmp_path: Path):
    """A trainer refuses to look for one, and once did when the run's own training was done."""
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 2}
    args = config(tmp_path, eval_strategy="steps", eval_steps=2, **best)
    own = unwatched(args)
    check_evaluation(own, validation=False)
    assert own.save_strategy == "no"
    check_evaluation(args, validation=True)
    assert args.load_best_model_at_end, "the options given stay as they are"
