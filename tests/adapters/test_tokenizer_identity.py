from __future__ import annotations

import copy
import json
import logging
import shutil
from pathlib import Path

import pytest
from surface import TRAIN, base_model, config, letter_tasks, peft_model, tiny_tokenizer, trained_folder, trainer
from transformers import AutoTokenizer

from meta_peft import MetaPeftError, MetaTrainer, load
from meta_peft.adapters.sidecar import JSON, Sidecar
from meta_peft.adapters.tokenizer_identity import TokenizerIdentity


def other_end():
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(7)
    return tokenizer


def with_template():
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    return tokenizer


def test_what_it_does_is_kept_over_a_round_trip(tmp_path: Path):
    mine = TokenizerIdentity.of(tiny_tokenizer())
    tiny_tokenizer().save_pretrained(tmp_path)
    mine.check(TokenizerIdentity.of(AutoTokenizer.from_pretrained(tmp_path)))
    assert Sidecar.read(trained_folder()).tokenizer == mine
    assert mine.end == tiny_tokenizer().eos_token_id
    assert mine.chat_template is None


def test_another_tokenizer_is_refused_where_it_is_loaded():
    """Once answers were ended with a token that training never saw."""
    with pytest.raises(
        MetaPeftError, match=r"another tokenizer: .* ends an answer with another token \(7, in training"
    ):
        load(base_model(), trained_folder(), tokenizer=other_end())
    load(base_model(), trained_folder(), tokenizer=tiny_tokenizer())


def test_other_tokens_of_the_same_text():
    mine = TokenizerIdentity.of(tiny_tokenizer())
    with pytest.raises(MetaPeftError, match="splits texts otherwise"):
        mine.check(TokenizerIdentity((*mine.tokens[1:], mine.tokens[0] + 1), mine.end, None))


def test_another_chat_template_is_said(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, logger="meta_peft"):
        load(base_model(), trained_folder(), tokenizer=with_template())
    assert "another chat template than this tokenizer's" in caplog.text


def test_a_checkpoint_of_another_tokenizer_is_refused(tmp_path: Path):
    trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    args, tasks = config(tmp_path, max_steps=2), letter_tasks(TRAIN)
    other = MetaTrainer(peft_model(), args, tasks, processing_class=other_end())
    with pytest.raises(MetaPeftError, match="learned with another tokenizer"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_adapters_from_before_it_was_kept_load(tmp_path: Path):
    folder = Path(shutil.copytree(trained_folder(), tmp_path / "old"))
    values = json.loads((folder / JSON).read_text())
    del values["tokenizer"]
    (folder / JSON).write_text(json.dumps(values))
    assert load(base_model(), folder).meta_peft.sidecar.tokenizer is None


@pytest.mark.parametrize(
    "written",
    [
        {"tokens": [1, -1], "end": 1, "chat_template": None},
        {"tokens": [1] * 2000, "end": 1, "chat_template": None},
        {"tokens": [1], "end": "x", "chat_template": None},
        {"tokens": [1], "end": 1, "chat_template": "\x00"},
        {"tokens": [1], "end": 1},
        {"tokens": 3, "end": 1, "chat_template": None},
        [1],
    ],
)
def test_what_a_file_says_is_checked(tmp_path: Path, written):
    folder = Path(shutil.copytree(trained_folder(), tmp_path / "damaged"))
    values = json.loads((folder / JSON).read_text()) | {"tokenizer": written}
    (folder / JSON).write_text(json.dumps(values))
    with pytest.raises(MetaPeftError, match="is damaged or not a sidecar of meta_peft"):
        Sidecar.read(folder)
