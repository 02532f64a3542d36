"""Each recipe for a decoder takes two steps on a tiny model, on what its data program makes of a small archive."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import bigbench
import data_wrangling
import lemmatisation
import machine_translation
import pytest
import question_answering
import sentiment
import text_classification
import yaml
from family import Tasks, write
from programs import bigbench_archive, catalogue, django_wheel, simplemma_wheel, vader_archive, wordnet_archive, words
from safetensors.torch import load_file
from surface import ROOT, tiny_folder
from two_steps import take_two_steps

from meta_peft.adapters.sidecar import Sidecar

WORDS = words(60)
PARTS = ("train", "validation", "test")


def lemmas(folder: Path) -> Mapping[str, Tasks]:
    languages = {"train": "ca es fr", "validation": "lt", "test": "de"}
    lists = {
        name: {word + "s": word for word in words(30, seed)} for seed, name in enumerate(("ca", "es", "fr", "lt", "de"))
    }
    return lemmatisation.tasks_of(simplemma_wheel(folder, lists), 0, languages)


def translations(folder: Path) -> Mapping[str, Tasks]:
    languages = ("da", "de", "es", "fi", "fr", "it", "nb")
    made = {name: catalogue((word, name + word) for word in WORDS) for name in languages}
    return machine_translation.tasks_of(django_wheel(folder, made), 0)


def sentiments(folder: Path) -> Mapping[str, Tasks]:
    names = [name for domains in sentiment.DOMAINS.values() for name in domains.values()]
    lines = {
        name: [f"{i}\t{(-1) ** i * 2}\tit is {word}, and {word}" for i, word in enumerate(WORDS)] for name in names
    }
    return sentiment.tasks_of(vader_archive(folder, {name: "\n".join(found) for name, found in lines.items()}), 0)


def definitions(folder: Path) -> Mapping[str, Tasks]:
    glosses = {number: [f"a kind of {word} {number}" for word in WORDS] for number in text_classification.KINDS}
    splits = text_classification.tasks_of(wordnet_archive(folder, glosses), 0)
    return {part: dict(list(tasks.items())[:4]) for part, tasks in splits.items()}


def facts(folder: Path) -> Mapping[str, Tasks]:
    sentences = ("The capital of {} is", "The country of {} is", "The sport played by {} is", "The genre of {} is")
    examples: list[tuple[str, str | list[str]]] = [
        (text.format(word), word[:3]) for text in sentences for word in WORDS
    ]
    bigbench.unpack(bigbench_archive(folder, {"qa_wikidata": examples}), folder)
    return question_answering.tasks_of(bigbench.examples(folder / "qa_wikidata" / "task.json"), 0)


def functions(folder: Path) -> Mapping[str, Tasks]:
    tasks = {
        f"mult_data_wrangling/{letter}_1_names_1": [(f"'{word}'", f"'{letter} {word}'") for word in WORDS[:30]]
        for letter in "abcdefg"
    }
    bigbench.unpack(bigbench_archive(folder, tasks), folder)
    return data_wrangling.tasks_of(folder / "mult_data_wrangling", 0)


RECIPES: dict[str, Callable[[Path], Mapping[str, Tasks]]] = {
    "data_wrangling": functions,
    "lemmatisation": lemmas,
    "machine_translation": translations,
    "question_answering": facts,
    "sentiment": sentiments,
    "text_classification": definitions,
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_steps(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    archives = tmp_path / "archives"
    archives.mkdir()
    write(Path("data") / recipe, RECIPES[recipe](archives), "# Source")
    decoder = ["--load_in_4bit", "false", "--lora_layers", "0", "1"]
    assert all(0 < loss < 20 for loss in take_two_steps(recipe, tiny_folder(), monkeypatch, *decoder))
    weights = load_file("out/adapter_model.safetensors")
    assert all(weights[name].any() for name in weights if "lora_B" in name)
    config = yaml.safe_load((ROOT / "recipes" / "configs" / f"{recipe}.yaml").read_text(encoding="utf-8"))
    assert Sidecar.read(Path("out")).prompt_format.prompt_template == config["prompt_template"]
    tasks = json.loads(Path("out/results.json").read_text())["run"]["tasks"]
    assert {f"{part}_tasks": tasks[f"{part}_tasks"] for part in PARTS} == {
        f"{part}_tasks": f"data/{recipe}/{part}.jsonl" for part in PARTS
    }


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.py")), ids=lambda path: path.stem)
def test_recipes_are_thin(path: Path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= (95 if path.stem == "serve_mixed_batch" else 45)  # a server has more to do
    if path.stem in RECIPES:
        assert len(lines) <= 20
        assert (path.parent / "data" / f"{path.stem}.py").is_file()
        assert any(f"recipes/data/{path.stem}.py" in line for line in lines)
