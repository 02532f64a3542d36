"""A prompt that all rows stand behind, read once: the same scores as from rows written out whole."""

from __future__ import annotations

import pytest
import torch
from prefixes import PROMPT, loss_on_upper_layers, with_prompt
from surface import letter_tasks, peft_model, tiny_tokenizer
from tiny_models import assert_equal, random_rows

from meta_peft import EpisodeCollator, EpisodeDataset, PromptFormat, TaskSet
from meta_peft.evaluation.in_context import in_context_scores
from meta_peft.evaluation.scoring import scorer_for
from meta_peft.frozen.cache import FrozenCache
from meta_peft.frozen.prefix import DECODERS, MIXTURES_OF_EXPERTS
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.types import Rows


def both_ways(loss_fn: AdapterLoss, rows: Rows) -> tuple[list, list]:
    """What is known of the rows when they are whole, and behind the prompt; of the latter twice."""
    adapter = loss_fn.own()
    expected = [*loss_fn.scores(adapter, with_prompt(rows))[:3], *loss_fn.log_likelihoods(adapter, with_prompt(rows))]
    with loss_fn.behind(PROMPT, adapter):
        for _ in range(2):
            found = [*loss_fn.scores(adapter, rows)[:3], *loss_fn.log_likelihoods(adapter, rows)]
    return found, expected


@pytest.mark.parametrize("kind", sorted({*DECODERS, *MIXTURES_OF_EXPERTS}))
@pytest.mark.parametrize("kept", [False, True])
def test_scores_are_those_of_whole_rows(kind: str, kept: bool):
    """Windows of attention shorter than the prompt included; with rows in the frozen cache that had no prompt."""
    loss_fn, rows = loss_on_upper_layers(kind), random_rows(2)
    if kept:
        loss_fn.keep_frozen(FrozenCache(1e9))
    alone = loss_fn.scores(loss_fn.own(), rows)
    for found, expected in zip(*both_ways(loss_fn, rows), strict=True):
        assert_equal({"": found}, {"": expected}, 1e-10)
    again = loss_fn.scores(loss_fn.own(), rows)
    assert torch.equal(again.loss_T, alone.loss_T), "outside, rows stand for themselves"


def test_the_prompt_is_read_once_and_rows_from_its_end():
    loss_fn, seen = AdapterLoss(peft_model(), second_order=False), []
    model = loss_fn.model.get_base_model()
    layer = model.model.layers[-1].self_attn.q_proj
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    encoded = TaskSet.from_mapping(letter_tasks("a")).encoded(PromptFormat(), tiny_tokenizer(), 64)
    episode = EpisodeDataset(encoded, shots=3, query_size=3, shuffle=False)[0]
    scorer = scorer_for("exact_match", loss_fn, tiny_tokenizer())
    in_context_scores(scorer, loss_fn.own(), [episode], EpisodeCollator(2), tiny_tokenizer())
    hook.remove()
    prompt, rows = seen
    assert prompt[0] == 1
    assert rows[0] == 3
    assert prompt[1] > sum(len(row["input_ids"]) - 1 for row in episode.support) - 1
    assert rows[1] <= max(len(row["input_ids"]) for row in episode.query)


def test_without_gradients_alone():
    loss_fn = loss_on_upper_layers("llama")
    with (
        loss_fn.behind(PROMPT, loss_fn.own()),
        pytest.raises(AssertionError, match="keys and values of the prompt are constants"),
    ):
        loss_fn(loss_fn.own(), random_rows(2))


def test_other_models_read_whole_rows():
    """Of which it is not known whether keys and values are all that they remember."""
    loss_fn = loss_on_upper_layers("llama")
    assert loss_fn.reads_on
    loss_fn.model.get_base_model().config.model_type = "mamba"
    assert not loss_fn.reads_on
