"""An adapted adapter in what others make of PEFT adapters: stock PEFT, pipelines, vLLM's and llama.cpp's formats."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from surface import ROOT, base_model, letter_rows, stock_logits, tiny_folder, trained_folder
from transformers import AutoTokenizer, pipeline

from meta_peft import adapt_many, load

NAMES = ("p", "m", "n")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters for three tasks."""
    output = tmp_path_factory.mktemp("adapted")
    adapted = adapt_many(load(None, trained_folder()), {name: letter_rows(name)[:2] for name in NAMES}, steps=5)
    for name, result in adapted.items():
        result.save(output / name)
    return {name: output / name for name in NAMES}


@pytest.fixture
def served(folders: dict[str, Path]) -> PeftModel:
    """All three on one base."""
    model = PeftModel.from_pretrained(base_model(), str(folders["p"]), adapter_name="p")
    for name in NAMES[1:]:
        model.load_adapter(str(folders[name]), adapter_name=name)
    return model.eval()


def test_merged_into_the_base(folders: dict[str, Path], served: PeftModel):
    served.set_adapter("p")
    expected = stock_logits(served)
    merged = PeftModel.from_pretrained(base_model(), str(folders["p"])).merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(stock_logits(merged), expected, atol=1e-5, rtol=1e-5)


def test_weighted(served: PeftModel):
    served.add_weighted_adapter(["p", "m"], [1.0, 0.0], "only_p", combination_type="cat")
    served.set_adapter("p")
    expected = stock_logits(served)
    served.set_adapter("only_p")
    torch.testing.assert_close(stock_logits(served), expected, atol=1e-5, rtol=1e-5)


def test_hot_swapped(folders: dict[str, Path], served: PeftModel):
    served.set_adapter("m")
    expected = stock_logits(served)
    model = PeftModel.from_pretrained(base_model(), str(folders["p"]), adapter_name="default")
    hotswap_adapter(model, str(folders["m"]), adapter_name="default")
    assert torch.equal(stock_logits(model.eval()), expected)


def test_in_a_pipeline(served: PeftModel):
    """What `transformers` writes with it is what the model writes by itself."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder())
    served.set_adapter("m")
    write = pipeline("text-generation", model=served, tokenizer=tokenizer)
    found = write("abc ->", max_new_tokens=3, do_sample=False, return_full_text=False)[0]["generated_text"]
    inputs = tokenizer("abc ->", return_tensors="pt")
    ids = served.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert found == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_batch_with_another_adapter_for_each_row(served: PeftModel):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder())
    inputs = tokenizer(["abc ->", "abc ->", "bcd ->", "abc ->"], return_tensors="pt")
    names = ["p", "m", "__base__", "n"]
    with torch.no_grad():
        mixed = served(**inputs, adapter_names=names).logits
        for row, name in enumerate(names):
            own = {key: value[row : row + 1] for key, value in inputs.items()}
            if name == "__base__":
                with served.disable_adapter():
                    alone = served(**own).logits
            else:
                served.set_adapter(name)
                alone = served(**own).logits
            torch.testing.assert_close(mixed[row : row + 1], alone, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "recipes" / "serve_mixed_batch.py"))


def written_alone(recipe: dict[str, Any], folder: Path, prompt: str, n: int = 32) -> str:
    """What the adapter of `folder` writes by itself."""
    model = PeftModel.from_pretrained(base_model(), str(folder)).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder())
    inputs = recipe["padded"](tokenizer, [prompt])
    ids = model.generate(**inputs, max_new_tokens=n, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_folder_of_adapters_is_served_in_mixed_batches(folders: dict[str, Path], recipe: dict[str, Any]):
    served = recipe["load"](str(tiny_folder()), str(folders["p"].parent))
    requests = [{"task": name, "prompt": prompt} for name in NAMES for prompt in ("abc ->", "a ->")]
    found = list(recipe["answered"](served, [json.dumps(request) for request in requests]))
    assert [{key: done[key] for key in ("task", "prompt")} for done in found] == requests
    for done in found:
        assert done["answer"] == written_alone(recipe, folders[done["task"]], done["prompt"])
    assert len({done["answer"] for done in found}) > 1


def test_more_adapters_than_slots(folders: dict[str, Path], tmp_path: Path, recipe: dict[str, Any]):
    """Adapters make room for others and come back; a folder's name may have a dot."""
    letters = "opqrstuvwxyzabcdefgh"
    adapted = adapt_many(load(None, trained_folder()), {name: letter_rows(name)[:2] for name in letters}, steps=5)
    for name, result in adapted.items():
        result.save(tmp_path / f"say.{name}")
    served = recipe["load"](str(tiny_folder()), str(tmp_path))
    assert len(served.weights) == 20 > len(served.model.peft_config) == recipe["BATCH"]
    order = [*letters, *letters[::-1], "o", "h"]
    requests = [{"task": f"say.{name}", "prompt": "abc ->"} for name in order]
    found = list(recipe["answered"](served, [json.dumps(request) for request in requests]))
    alone = {name: written_alone(recipe, tmp_path / f"say.{name}", "abc ->") for name in letters}
    assert [done["answer"] for done in found] == [alone[name] for name in order]
    assert len(set(alone.values())) > 1


def test_prompts_are_those_that_the_adapter_learned(recipe: dict[str, Any], tmp_path: Path):
    """They stand behind the token that rows begin with."""
    asked = recipe["padded"](AutoTokenizer.from_pretrained(tiny_folder()), ["abc ->", "a"])
    learned = load(None, trained_folder()).meta_peft
    row = learned.encoding.of_task([{"input": "abc", "target": "pp"}])({"input": "abc", "target": "pp"})
    prompt = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
    assert asked["input_ids"][0].tolist() == prompt
    assert asked["attention_mask"].sum(1).tolist() == [7, 2]


def test_adapters_that_cannot_be_served(folders: dict[str, Path], tmp_path: Path, recipe: dict[str, Any]):
    with pytest.raises(SystemExit, match="has 0 adapters"):
        recipe["load"](str(tiny_folder()), str(tmp_path / "nowhere"))
    for name in ("p", "m"):
        shutil.copytree(folders[name], tmp_path / name)
    config = tmp_path / "m" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": ', '"lora_alpha": 1'))
    with pytest.raises(SystemExit, match="has 2 adapters; expected one or more, all with the same config"):
        recipe["load"](str(tiny_folder()), str(tmp_path))


def test_as_vllm_wants_it(folders: dict[str, Path]):
    """What its `PEFTHelper` and `parse_fine_tuned_lora_name` (vllm/lora) read, and what they refuse."""
    config = json.loads((folders["p"] / "adapter_config.json").read_text())
    assert {"r", "lora_alpha", "target_modules"} <= config.keys()
    assert (config["bias"], config["modules_to_save"], config["use_dora"]) == ("none", None, False)
    assert config["r"] <= 512
    weights = load_file(folders["p"] / "adapter_model.safetensors")
    modules: dict[str, set[str]] = {}
    for name, weight in weights.items():
        prefix, _, rest = name.partition("base_model.model.")
        assert prefix == ""
        module, matrix, end = rest.rsplit(".", 2)
        assert (matrix, end) in (("lora_A", "weight"), ("lora_B", "weight"))
        assert module.rsplit(".", 1)[-1] in config["target_modules"]
        assert weight.shape[0 if matrix == "lora_A" else 1] == config["r"]
        modules.setdefault(module, set()).add(matrix)
    layers = dict(base_model().named_modules())
    for module, matrices in modules.items():
        assert matrices == {"lora_A", "lora_B"}
        out, given = layers[module].weight.shape
        assert weights[f"base_model.model.{module}.lora_A.weight"].shape[1] == given
        assert weights[f"base_model.model.{module}.lora_B.weight"].shape[0] == out


def test_as_llama_cpp_wants_it(folders: dict[str, Path]):
    """Its `convert_lora_to_gguf.py` takes names apart like this, and has to know the tensor that is left."""
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    pairs: dict[str, int] = {}
    for name in load_file(folders["p"] / "adapter_model.safetensors"):
        base = (
            name.replace("base_model.model.", "")
            .replace(".lora_A.weight", ".weight")
            .replace(".lora_B.weight", ".weight")
        )
        assert known.get_name(base, try_suffixes=(".weight", ".bias")), base
        pairs[base] = pairs.get(base, 0) + 1
    assert set(pairs.values()) == {2}
    assert "lora_alpha" in json.loads((folders["p"] / "adapter_config.json").read_text())
