from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import kinds
import pytest
from surface import TRAIN, base_model, config, letter_rows, letter_tasks, tiny_tokenizer, trained_folder, trainer

from meta_peft import Encoding, MetaPeftError, PromptFormat, adapt, load, select_support
from meta_peft.lora.fast_weights import is_lora
from meta_peft.run_tasks.support import _with_placeholder, episode_selection
from meta_peft.tasks.encoding import Facts
from meta_peft.tasks.row_form import RowForm


@pytest.fixture(scope="module")
def model():
    return load(base_model(), trained_folder())


def pool() -> list[dict[str, str]]:
    """Nine rows of one answer, three of another."""
    return letter_rows("p", 9) + letter_rows("m", 3)


def inputs(rows) -> list[str]:
    return [row["input"] for row in rows]


@pytest.mark.parametrize("how", ["random", "balanced", "diverse", "uncertain"])
def test_rows_of_the_pool_each_once(model, how: str):
    found = select_support(model, pool(), 6, how)
    assert len(found) == 6
    assert len(set(inputs(found))) == 6
    assert all(row in pool() for row in found)
    assert select_support(model, pool(), 6, how) == found
    _, metrics = adapt(model, found, steps=1)
    assert metrics["steps"] == 1
    model.set_adapter("default")


def test_balanced_takes_as_many_of_each_answer(model):
    found = select_support(model, pool(), 6, "balanced")
    assert sorted(row["target"] for row in found) == ["mm"] * 3 + ["pp"] * 3


def test_the_choice_is_the_bases_and_not_the_adapters(model, tmp_path: Path):
    """Of an untrained adapter and of a trained one the same rows."""
    untrained = trainer(tmp_path, tasks=letter_tasks(TRAIN))
    untrained.attach()
    for how in ("diverse", "uncertain"):
        assert select_support(model, pool(), 4, how) == select_support(untrained.model, pool(), 4, how)


@pytest.mark.parametrize("how", ["balanced", "diverse", "uncertain"])
def test_rows_may_have_the_names_that_training_changed(how: str):
    learned = load(base_model(), trained_folder())
    form = RowForm({"word": "input", "answer": "target"})
    kept = learned.meta_peft
    learned.meta_peft = replace(kept, sidecar=replace(kept.sidecar, row_form=form))
    old = [{"word": row["input"], "answer": row["target"]} for row in pool()]
    assert form.of_rows(select_support(learned, old, 4, how)) == select_support(learned, pool(), 4, how)


@pytest.mark.parametrize("how", ["diverse", "uncertain"])
def test_prompts_without_answers(model, how: str):
    prompts = [{"input": row["input"]} for row in pool()]
    found = select_support(model, prompts, 4, how)
    assert all(row in prompts for row in found)
    if how == "diverse":  # it looks at prompts alone
        assert inputs(found) == inputs(select_support(model, pool(), 4, how))
    with pytest.raises(MetaPeftError, match="balanced goes over the answers, and the rows of this pool have none"):
        select_support(model, prompts, 4, "balanced")
    with pytest.raises(MetaPeftError, match="3 of 12 rows of the pool have no answer"):
        select_support(model, [*pool()[:9], *prompts[:3]], 4, how)


@pytest.mark.parametrize("kind", sorted(kinds.KINDS))
def test_prompts_of_every_kind_without_answers(tmp_path: Path, kind: str):
    """What is diverse is told by the prompt alone, in models that read it elsewhere than they answer too."""
    run = kinds.trainer(kind, tmp_path)
    run.attach()
    rows = [
        row
        for letter in "abc"
        for row in kinds.rows(kind, letter)[:: 2 if kinds.KINDS[kind].objective == "masked_lm" else 1]
    ]  # of which those have answers of one length, for as many masks
    column = list(rows[0])[-1]
    prompts = [{name: value for name, value in row.items() if name != column} for row in rows]
    found = select_support(run.model, rows, 4)
    assert select_support(run.model, prompts, 4) == [prompts[rows.index(row)] for row in found]
    assert all(row in prompts for row in select_support(run.model, prompts, 4, "uncertain"))


def test_prompts_for_a_head_whose_classes_are_called_by_numbers():
    """Whose first one is not called 0, so that 0 would be refused."""
    facts = Facts(num_labels=3, label_names=("-1", "0", "1"))
    of_row = Encoding("sequence_classification", PromptFormat(), kinds.tokenizer(), 32, facts)
    assert of_row(_with_placeholder({"text": "a"}, of_row))["labels"] == [0]
    of_words = Encoding("token_classification", PromptFormat(), kinds.tokenizer(), 32, facts)
    assert of_words(_with_placeholder({"tokens": ["a"]}, of_words))["labels"].count(0) == 1


def test_a_new_head_is_uncertain_of_nothing(tmp_path: Path):
    run = kinds.trainer("sequence_classification", tmp_path)
    for name, weight in run.loss_fn.weights.parameters().items():
        if not is_lora(name):
            weight.data.zero_()
    heads = [m for m in run.model.modules() if hasattr(m, "modules_to_save") and hasattr(m, "original_module")]
    for head in heads:
        for weight in head.original_module.parameters():
            weight.data.zero_()
    run.attach()
    with pytest.raises(MetaPeftError, match="equally uncertain of all rows"):
        select_support(run.model, kinds.rows("sequence_classification", "a"), 2, "uncertain")


def test_what_cannot_be_chosen(model):
    with pytest.raises(MetaPeftError, match="The pool has 12 rows, and 13 are to be chosen"):
        select_support(model, pool(), 13)
    with pytest.raises(MetaPeftError, match="Did you mean 'diverse'"):
        select_support(model, pool(), 3, "divers")
    with pytest.raises(MetaPeftError, match="Expected columns"):
        select_support(model, [{"sentence": "a"}] * 3, 2)


@pytest.mark.parametrize("how", ["balanced", "diverse", "uncertain"])
def test_a_run_chooses_in_training_and_in_evaluation(tmp_path: Path, how: str):
    """Support of other rows than at random, and the same query rows."""
    tasks = {
        name: rows + letter_rows(other, 4)
        for (name, rows), other in zip(letter_tasks("abc").items(), "def", strict=True)
    }
    random, chosen = (
        trainer(tmp_path, tasks=tasks, eval_tasks=letter_tasks("xyz"), support_selection=each)
        for each in ("random", how)
    )
    for of_random, of_chosen in (
        (random.train_dataset, chosen.train_dataset),
        (random.eval_dataset, chosen.eval_dataset),
    ):
        drawn, selected = list(of_random), list(of_chosen)
        assert [e.query for e in drawn] == [e.query for e in selected]
    assert [e.support for e in random.train_dataset] != [e.support for e in chosen.train_dataset]
    chosen.train()
    chosen.evaluate()


def test_workers_cannot_ask_the_base(tmp_path: Path):
    with pytest.raises(MetaPeftError, match="support_selection=diverse with dataloader_num_workers is refused"):
        trainer(tmp_path, support_selection="diverse", dataloader_num_workers=1)


def test_a_base_in_shards_cannot_be_asked(tmp_path: Path, model):
    encoding = Encoding("causal_lm", PromptFormat(), tiny_tokenizer(), 32)
    for how in ("diverse", "uncertain"):
        args = config(tmp_path, support_selection=how)
        with pytest.raises(MetaPeftError, match="a base in shards answers to all processes together"):
            episode_selection(model, encoding, args, sharded=True)
    balanced = episode_selection(model, encoding, config(tmp_path, support_selection="balanced"), sharded=True)
    assert balanced.how == "balanced"
