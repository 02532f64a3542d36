"""The documentation runs: Python blocks are executed, commands parsed, links followed, options compared with the code.

A tiny random model with its tokenizer stands in for the base model that the pages name.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import ModuleType

import kinds
import loopback_hub
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from surface import environment, temporary_folder
from test_architecture import FLOORS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import meta_peft
from meta_peft import cli, main_job
from meta_peft.adapters.base_identity import BaseIdentity
from meta_peft.adapters.sidecar import Sidecar
from meta_peft.base.locate import SMOLLM2
from meta_peft.commands import estimate, evaluate, tasks
from meta_peft.config import MetaLoraConfig, ModelArguments, TaskArguments
from meta_peft.config.config_file import parse
from meta_peft.protocol import ProtocolArguments
from meta_peft.tasks.prompt import example_columns

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
GROUPS = (ModelArguments, TaskArguments, MetaLoraConfig, main_job.CompareArguments)
LOOP = ROOT / "recipes" / "accelerate_loop.py"
STAND_INS = {
    "google-t5/t5-small": "seq2seq_lm",
    "openai/whisper-tiny": "speech_seq2seq",
    "FacebookAI/roberta-base": "masked_lm",
    "google-bert/bert-base-uncased": kinds.HEAD,
}


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """Line numbers and texts of the page's fenced blocks in `language`."""
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        if match[1] == language:
            yield text.count("\n", 0, match.start(2)), match[2]


def with_blocks(language: str) -> list[Path]:
    return [page for page in PAGES if any(True for _ in blocks(page, language))]


def page_name(page: Path) -> str:
    return page.name


def save_base(folder: Path, layers: int) -> Path:
    """A narrow random Llama with a tokenizer of single bytes, as `from_pretrained` reads it."""
    words = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": layers, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "vocab_size": len(words)}
    config = AutoConfig.for_model("llama", num_key_value_heads=1, initializer_range=0.1, **sizes, **ids)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@cache
def saved_base(layers: int) -> Path:
    """What stands in for SmolLM2."""
    return save_base(temporary_folder() / "base", layers)


@cache
def saved_adapter(layers: int) -> Path:
    """An adapter of that base with its sidecar, as training saves it."""
    folder = temporary_folder() / "adapter"
    base = AutoModelForCausalLM.from_pretrained(saved_base(layers))
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    rule, weights = meta_peft.InnerRule(meta_peft.Adam(), steps=3), meta_peft.AdapterLoss(model).weights.parameters()
    rates = meta_peft.LearnedRates(rule, weights).log_rates
    identity, prompt_format = BaseIdentity.of(base), meta_peft.PromptFormat()
    meta_peft.save(model, Sidecar("maml", rule, tuple(weights), rates, prompt_format, 256, identity, 4), folder)
    return folder


@pytest.fixture
def layers(request: pytest.FixtureRequest) -> int:
    """As many as SmolLM2 has for a page whose code names them by number, and two for the others."""
    page = getattr(request.node, "callspec", None) and request.node.callspec.params.get("page")
    numbers = re.compile(r"layers(_to_transform)?\W+\d")
    return 30 if page is not None and any(numbers.search(code) for _, code in blocks(page, "python")) else 2


@pytest.fixture
def base_folder(layers: int) -> Path:
    return saved_base(layers)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int) -> Iterator[Path]:
    """A current folder with the files that the pages name, and a hub on this machine."""
    monkeypatch.chdir(tmp_path)
    for split, letters in {"train": "abcd", "validation": "ef", "test": "gh"}.items():
        rows = [{"task": task, "input": str(i), "target": task * 2} for task in letters for i in range(8)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(saved_adapter(layers), tmp_path / "outputs" / "my_tasks")
    with loopback_hub.running() as hub:
        loopback_hub.connect(monkeypatch, hub, tmp_path / "home")
        yield tmp_path


@pytest.mark.parametrize("page", with_blocks("python"), ids=page_name)
def test_python_blocks_run(page: Path, workplace: Path, base_folder: Path):
    namespace: dict[str, object] = {"__name__": page.stem}
    for line, code in blocks(page, "python"):
        code = code.replace(SMOLLM2, base_folder.as_posix())
        for name, kind in STAND_INS.items():
            if name in code:
                code = code.replace(name, kinds.folder(kind).as_posix())
        code = re.sub(r"\bmax_steps=\d+", "max_steps=1", code)
        exec(compile("\n" * line + code, str(page), "exec"), namespace)


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command in the page's shell blocks."""
    for _, block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            for command in line.split("&&"):
                yield shlex.split(command)


@pytest.mark.parametrize("page", with_blocks("bash"), ids=page_name)
def test_commands_name_what_exists(page: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[object] = []
    monkeypatch.setattr(main_job, "run", lambda *groups: asked.append(groups))
    for module in (*cli.WITH_FEW_OPTIONS.values(), estimate, tasks):
        monkeypatch.setattr(module, "run", lambda options: asked.append(options) or 0)
    groups = (*GROUPS, ProtocolArguments)
    monkeypatch.setattr(evaluate, "compare", lambda words: asked.append(parse(groups, words)) or 0)
    for name, config in yaml_files(page):
        (workplace / name).write_text(config, encoding="utf-8")
    for folder in ("recipes", "constraints.txt"):
        os.symlink(ROOT / folder, workplace / folder)
    for words in commands(page):
        if words[:2] == ["accelerate", "launch"]:
            if words[2] == "--num_cpu_threads_per_process":
                del words[2:4]
            if words[2] == "--config_file":
                assert (ROOT / words[3]).is_file(), words
                del words[2:4]
            if words[2:4] == ["--multi_gpu", "--num_processes"]:
                del words[2:5]
            script, *options = words[2:]
            assert Path(script).is_file(), script
            config = Path("recipes/configs") / f"{Path(script).stem}.yaml"
            if script == "recipes/meta_lora.py":
                words = ["meta-peft", "train", *options]
            elif config.is_file():  # a recipe
                words = ["meta-peft", "train", "--config", str(config), *options]
        if words[0] == "meta-peft":
            before = len(asked)
            cli._main(words[1:])  # a wrong option raises
            assert len(asked) == before + 1
        elif words[0] == "pytest":
            assert all((ROOT / word).exists() for word in words if word.startswith("tests/")), words
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), words
        elif words[:2] == ["pip", "install"]:
            assert words[2:4] == ["-c", "constraints.txt"]
            assert Path(words[3]).is_file()
        else:
            assert words in (["python3", "-m", "venv", ".venv"], [".", ".venv/bin/activate"]) or (
                words[:2] == ["accelerate", "launch"]
            ), f"{words} is not checked by this test"


def yaml_files(page: Path) -> Iterator[tuple[str, str]]:
    """Blocks whose first line is a comment with the name of a file."""
    for _, block in blocks(page, "yaml"):
        if match := re.match(r"# (\S+\.yaml)\n", block):
            yield match[1], block


@pytest.mark.parametrize("page", with_blocks("yaml"), ids=page_name)
def test_yaml_blocks_have_known_keys(page: Path):
    known = {f.name for group in GROUPS for f in fields(group)}
    for _, block in blocks(page, "yaml"):
        assert set(yaml.safe_load(block)) <= known


@pytest.mark.parametrize("page", with_blocks("json"), ids=page_name)
def test_json_blocks_are_rows(page: Path):
    for _, block in blocks(page, "json"):
        for line in block.splitlines():
            example_columns(json.loads(line).keys())


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_resolve(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.is_file(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {heading_anchor(h) for h in headings}, f"{page.name} links to {target}"


def test_every_page_is_in_the_list_of_the_readme():
    listed = re.findall(r"^\| \[[^\]]+\]\(docs/(\w+\.md)\) \|", PAGES[0].read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in PAGES if page.parent.name == "docs")


def test_the_rooms_of_the_architecture_page_are_those_that_imports_are_checked_by():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| `(\w+)/?` \| [^|]+ \|([^|]*)\|$", page, re.MULTILINE)
    floors = [{room for number, room, _ in rows if int(number) == n} for n in range(1, len(FLOORS))]
    assert [int(number) for number, *_ in rows] == sorted(int(number) for number, *_ in rows)
    assert [*floors, {"__init__"}] == [set(floor) for floor in FLOORS]
    for _, room, files in rows:
        if files.strip():  # where some files are named all are
            there = {path.stem for path in (ROOT / "meta_peft" / room).iterdir() if path.stem.strip("_") == path.stem}
            assert there <= set(re.findall(r"`(\w+)/?`", files)), room


def heading_anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.fixture
def make_options(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    monkeypatch.delitem(sys.modules, "make_options", raising=False)
    import make_options

    return make_options


def test_every_option_is_documented(make_options: ModuleType):
    page = make_options.PAGE.read_text(encoding="utf-8")
    for group in GROUPS:
        own = [f.name for f in make_options.own_fields(group)]
        assert own
        for option in own:
            assert f"| `{option}` |" in page, f"{option}: run python docs/make_options.py"
    for command in make_options.COMMANDS:
        section = page.split(f"## meta-peft {command}\n")[1].split("\n## ")[0]
        for names, _, text in make_options.command_options(command):
            assert f"| `{names}` |" in section, f"meta-peft {command} {names}: run python docs/make_options.py"
            assert text != "None", f"meta-peft {command} {names} has no help"


def test_options_page_is_up_to_date(make_options: ModuleType):
    assert make_options.PAGE.read_text(encoding="utf-8") == make_options.page(), "run python docs/make_options.py"


def test_versions_agree():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest = re.search(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert str(cited["version"]) == newest[1] == meta_peft.__version__


@pytest.fixture
def _fresh_accelerator() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_fresh_accelerator")
def test_accelerate_loop(workplace: Path, base_folder: Path, capsys: pytest.CaptureFixture[str]):
    assert len(LOOP.read_text(encoding="utf-8").splitlines()) <= 45
    runpy.run_path(str(LOOP))["main"]("train.jsonl", "loop", 2, str(base_folder))
    assert len(re.findall(r"^loss \d+\.\d+$", capsys.readouterr().out, re.MULTILINE)) == 2
    model = meta_peft.load(str(base_folder), "loop", load_in_4bit=True)
    weights = model.state_dict()
    assert all(weights[name].any() for name in weights if "lora_B" in name)
    _, metrics = meta_peft.adapt(model, [{"input": "1", "target": "gg"}])
    assert metrics["support_loss_after"] < metrics["support_loss_before"]
    plain = AutoModelForCausalLM.from_pretrained(base_folder)
    assert PeftModel.from_pretrained(plain, "loop").active_adapters == ["default"]


@pytest.mark.launch
@pytest.mark.usefixtures("_fresh_accelerator")
def test_accelerate_loop_in_two_processes(workplace: Path, base_folder: Path):
    """Two processes take the steps that one takes."""
    launch = "launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    words = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *launch.split(), "--main_process_port", "0"]
    arguments = [str(LOOP), "train.jsonl", "two", "2", str(base_folder)]
    subprocess.run([*words, *arguments], env=environment(ACCELERATE_USE_CPU="true"), check=True, timeout=300)
    runpy.run_path(str(LOOP))["main"]("train.jsonl", "one", 2, str(base_folder))

    for file in ("adapter_model.safetensors", "meta_peft.safetensors"):
        one, two = load_file(Path("one") / file), load_file(Path("two") / file)
        for name in one:
            torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=2e-5)


def test_the_api_page_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^::: meta_peft\.(\w+)$", page, re.MULTILINE))
    assert shown >= set(meta_peft.__all__)


def test_every_page_has_a_place_on_the_site():
    """mkdocs itself, strict, says the rest."""
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f"- {page.name}\n" in site, page.name
