"""Whose a README is, and that somebody's own is left alone."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from surface import letter_rows, trained_folder, trainer

from meta_peft import adapt_many, load, save
from meta_peft.adapters.card import adapted_card, model_card
from meta_peft.adapters.card_file import CARD, is_own_card, may_replace
from meta_peft.adapters.sidecar import Sidecar

MINE = "# My project\n\nNotes that nobody else has.\n"


def own() -> str:
    return adapted_card("some/base", "causal_lm", {"steps": 3})


def test_cards_that_meta_peft_makes_are_known():
    for card in (own(), model_card(Sidecar.read(trained_folder()), None)):
        assert is_own_card(card)
        assert is_own_card(card.replace("\n", "\r\n"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        MINE,
        "---\nlibrary_name: peft\ntags:\n- lora\n---\n# Mine\n",
        "---\ntags: meta_peft\n---\n",
        "---\n- meta_peft\n---\n",
        "---\ntags: [meta_peft\n---\n",
        "---\ntags: [meta_peft]\n",
        "---\ntags: [meta_peft]\ndate: 2024-13-45\n---\n",
        "# Mine\n\n---\ntags: [meta_peft]\n---\n",
    ],
)
def test_what_is_somebody_s_own(text: str):
    assert not is_own_card(text)


def test_what_may_be_replaced(tmp_path: Path):
    assert may_replace(tmp_path, own())
    (tmp_path / CARD).write_text(own())
    assert may_replace(tmp_path, own())
    (tmp_path / CARD).write_bytes(b"\xff" + MINE.encode())
    assert not may_replace(tmp_path, own())
    assert may_replace(tmp_path, "# Another of mine"), "which the caller wrote and asks for"


def test_saving_leaves_a_readme_of_the_user_s_own(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Once it was gone, without a word."""
    caplog.set_level(logging.WARNING, "meta_peft")
    folders = [tmp_path / name for name in ("learned", "adapted")]
    for folder in folders:
        folder.mkdir()
        (folder / CARD).write_text(MINE)
    trainer(folders[0]).save_model()
    model = load(None, folders[0])
    adapt_many(model, {"p": letter_rows("p")[:2]})["p"].save(folders[1])
    for folder in folders:
        assert (folder / "adapter_model.safetensors").is_file()
        assert (folder / CARD).read_text() == MINE
        assert f"{folder / CARD} is no card that meta_peft made" in caplog.text
    save(model, model.meta_peft.sidecar, folders[0], card="# As I say")
    assert (folders[0] / CARD).read_text() == "# As I say"
