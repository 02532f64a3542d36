from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from meta_peft.errors import MetaPeftError
from meta_peft.survival import training_state
from meta_peft.tasks.episodes import EpisodeDataset
from meta_peft.tasks.sampling import SAMPLINGS, Adaptive, TaskSampling, task_sampling
from meta_peft.tasks.task_set import TaskSet
from meta_peft.types import Meta, MetaGradient

N, T = 7, 3
SIZES = [4, 8, 16, 32, 64, 128, 256]
DIRECTIONS = np.random.default_rng(5).normal(size=(N, 40))


def made(name: str, n: int = N, per_step: int = T, **options) -> TaskSampling:
    sampling = task_sampling(name, SIZES[:n], seed=3, tasks_per_step=per_step, curriculum_steps=5, **options)
    sampling.begin(lambda: np.arange(n, 0.0, -1))
    return sampling


def gradient(task: int, loss: float) -> MetaGradient:
    values = {"w": torch.from_numpy(DIRECTIONS[task])}
    return MetaGradient(Meta(values, {}), 1, {"loss": torch.tensor([loss], dtype=torch.float64)})


def take_steps(sampling: TaskSampling, first: int, last: int, loss=lambda task: 1.0 + task) -> list[list[int]]:
    """The tasks of outer steps `first` to `last`; an adaptive rule is told of each."""
    found = []
    for step in range(first, last):
        tasks = [sampling.task(step * T + place) for place in range(T)]
        if isinstance(sampling, Adaptive):
            sampling.update(torch.cat([sampling.note(gradient(task, loss(task))) for task in tasks]))
        found.append(tasks)
    return found


# ---- every rule


@pytest.mark.parametrize("name", SAMPLINGS)
def test_tasks_are_a_function_of_the_seed_and_of_what_was_seen(name: str):
    assert take_steps(made(name), 0, 12) == take_steps(made(name), 0, 12)
    other = task_sampling(name, SIZES, seed=4, tasks_per_step=T, curriculum_steps=5)
    other.begin(lambda: np.arange(N, 0.0, -1))
    assert take_steps(other, 0, 12) != take_steps(made(name), 0, 12)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_run_that_goes_on_draws_the_same(name: str, tmp_path: Path):
    """The state goes through the files of a checkpoint."""
    whole = take_steps(made(name), 0, 12)
    half = made(name)
    assert take_steps(half, 0, 6) == whole[:6]
    training_state.save(tmp_path, {"sampling": half.state()})
    resumed = task_sampling(name, SIZES, seed=3, tasks_per_step=T, curriculum_steps=5)
    resumed.restore(training_state.load(tmp_path)["sampling"])
    assert take_steps(resumed, 6, 12) == whole[6:]


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_new_run_starts_anew(name: str):
    sampling = made(name)
    first = take_steps(sampling, 0, 6)
    sampling.begin(lambda: np.arange(N, 0.0, -1))
    assert take_steps(sampling, 0, 6) == first


@pytest.mark.parametrize("name", SAMPLINGS)
def test_more_tasks_in_a_step_than_there_are(name: str):
    sampling = made(name, n=2)
    found = take_steps(sampling, 0, 30)
    assert {task for tasks in found for task in tasks} == {0, 1}


def test_a_state_of_another_rule_or_of_other_tasks_is_refused():
    with pytest.raises(MetaPeftError, match="chosen by Rounds, these options choose by ByDifficulty: resume with"):
        made("by_difficulty").restore(made("uniform").state())
    for name in ("by_difficulty", "by_gradient_similarity", "curriculum"):
        with pytest.raises(MetaPeftError, match="among other tasks than these 7: resume with the same tasks"):
            made(name).restore(made(name, n=5).state())


def test_names_and_numbers_that_cannot_be():
    with pytest.raises(MetaPeftError, match=r"got 'by_sizes'\. Did you mean 'by_size'"):
        made("by_sizes")
    for options in ({"temperature": 0.0}, {"exploration": 0.0}, {"exploration": 1.5}):
        with pytest.raises(MetaPeftError, match=f"sampling_{next(iter(options))} must be"):
            made("by_size", **options)


# ---- by size


@pytest.mark.parametrize("temperature", [1.0, 2.0, 1000.0])
def test_large_tasks_come_more_often(temperature: float):
    sampling = made("by_size", temperature=temperature)
    draws = 20_000
    counts = Counter(sampling.task(i) for i in range(draws))
    weights = np.array(SIZES) ** (1 / temperature)
    for task, p in enumerate(weights / weights.sum()):
        assert abs(counts[task] - draws * p) < 4.5 * np.sqrt(draws * p * (1 - p))


def test_a_low_temperature_does_not_overflow():
    sampling = task_sampling("by_size", [10, 10**6], seed=0, tasks_per_step=1, temperature=0.002)
    assert {sampling.task(i) for i in range(100)} == {1}


# ---- adaptive


ADAPTIVE = ["by_difficulty", "by_gradient_diversity", "by_gradient_similarity"]


@pytest.mark.parametrize("name", ADAPTIVE)
def test_every_task_first_and_none_twice_in_a_step(name: str):
    found = take_steps(made(name), 0, 40)
    uniform = made("uniform")
    assert [task for tasks in found for task in tasks][:N] == [uniform.task(i) for i in range(N)]
    assert all(len(set(tasks)) == T for tasks in found)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_later_steps_cannot_be_told(name: str):
    sampling = made(name)
    take_steps(sampling, 0, 2)
    with pytest.raises(MetaPeftError, match=r"Episode 9 is of outer step 4, and the tasks of step 3 come next"):
        sampling.task(3 * T)


def test_hard_tasks_come_in_proportion_to_their_loss():
    sampling = made("by_difficulty", per_step=1, exploration=0.3)
    steps = 6_000
    tasks = []
    for step in range(steps):
        tasks.append(sampling.task(step))
        sampling.update(sampling.note(gradient(tasks[-1], 1.0 + tasks[-1])))
    counts, losses = Counter(tasks[N:]), 1.0 + np.arange(N)
    for task, p in enumerate(0.3 / N + 0.7 * losses / losses.sum()):
        assert abs(counts[task] - steps * p) < 4.5 * np.sqrt(steps * p * (1 - p))


def test_the_running_mean_follows_and_leaves_out_what_is_no_number():
    sampling = made("by_difficulty", per_step=1)
    seen = []
    for step, loss in enumerate([4.0] * N + [float("nan")] * 20):
        seen.append(sampling.task(step))
        sampling.update(sampling.note(gradient(seen[-1], loss)))
    assert sampling.losses.tolist() == [4.0] * N
    again = sampling.task(len(seen))
    sampling.update(sampling.note(gradient(again, 2.0)))
    assert sampling.losses[again] == 3.0


def test_a_task_without_a_finite_loss_is_still_drawn():
    sampling = made("by_difficulty")
    found = take_steps(sampling, 0, 60, loss=lambda task: float("inf") if task == 2 else 1.0)
    assert sum(2 in tasks for tasks in found[3:]) > 0


@pytest.mark.parametrize("similar", [True, False])
def test_tasks_by_how_their_gradients_lie(monkeypatch: pytest.MonkeyPatch, similar: bool):
    """Five tasks pull in one direction, one across and one against."""
    directions = np.tile(np.eye(40)[0], (N, 1)) + 0.01 * DIRECTIONS
    directions[5], directions[6] = np.eye(40)[1], -np.eye(40)[0]
    monkeypatch.setitem(globals(), "DIRECTIONS", directions)
    sampling = made("by_gradient_similarity" if similar else "by_gradient_diversity")
    take_steps(sampling, 0, 3)
    along, across, against = sampling.weights()[[0, 5, 6]]
    assert (along > across > against) if similar else (along < across < against)
    mean = (directions / np.linalg.norm(directions, axis=1, keepdims=True)).mean(0)
    cosine = directions @ mean / np.linalg.norm(mean) / np.linalg.norm(directions, axis=1)
    expected = (1 + cosine if similar else 1 - cosine) / 2
    assert sampling.weights() == pytest.approx(expected, abs=0.15)  # sketches


def test_a_gradient_of_several_tasks_is_no_gradient_of_each():
    both = MetaGradient(Meta({"w": torch.zeros(40)}, {}), 2, {"loss": torch.zeros(2)})
    with pytest.raises(MetaPeftError, match="A gradient of 2 tasks does not say what each of them gave"):
        made("by_gradient_diversity").note(both)


# ---- curriculum


def test_easy_tasks_first_then_all():
    n = 100
    curriculum = task_sampling("curriculum", [8] * n, seed=0, tasks_per_step=4, curriculum_steps=50)
    losses = np.random.default_rng(0).permutation(n).astype(float)
    losses[3] = np.nan  # a task whose loss is not finite is the hardest
    curriculum.begin(lambda: losses)
    shares = [curriculum.available(step) for step in range(60)]
    assert shares[0] == 10
    assert shares == sorted(shares)
    assert shares[25] == int(np.ceil(n * np.sqrt(25 * (1 - 0.01) / 50 + 0.01)))
    assert shares[50:] == [n] * 10
    rank = np.argsort(np.argsort(np.nan_to_num(losses, nan=np.inf)))
    for step in range(60):
        drawn = [curriculum.task(4 * step + place) for place in range(4)]
        assert max(rank[drawn]) < shares[step]
        assert len(set(drawn)) == 4
    late = {curriculum.task(i) for i in range(200, 2000)}
    assert late == set(range(n))


def test_a_curriculum_has_to_be_told_losses():
    sampling = task_sampling("curriculum", SIZES, seed=0, tasks_per_step=2)
    with pytest.raises(MetaPeftError, match=r"call begin\(\) with them"):
        sampling.task(0)


# ---- in a dataset


def test_a_dataset_without_a_rule_goes_by_rounds():
    tasks = TaskSet.from_mapping(
        {f"task {t}": [{"input": f"{t}.{i}", "target": "x"} for i in range(4)] for t in range(N)}
    )
    plain = EpisodeDataset(tasks, shots=1, query_size=1, seed=3, length=20)
    ruled = EpisodeDataset(tasks, shots=1, query_size=1, seed=3, length=20, sampling=made("uniform"))
    assert list(plain) == list(ruled)
    expected = [int(t) for r in range(3) for t in np.random.default_rng([3, 0, r]).permutation(N)][:20]
    assert [episode.task for episode in plain] == [f"task {t}" for t in expected]
