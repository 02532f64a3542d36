from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from surface import ROOT

from meta_peft import MetaLoraConfig, MetaPeftError, ModelArguments, TaskArguments
from meta_peft.comparison.compare import CompareArguments
from meta_peft.config.config_file import parse

GROUPS = (ModelArguments, TaskArguments, MetaLoraConfig, CompareArguments)


@dataclass
class Small:
    """A group that is quick to make."""

    count: int = field(default=1, metadata={"help": "A number."})
    rate: float = field(default=0.5, metadata={"help": "A rate."})
    flag: bool = field(default=False, metadata={"help": "A switch."})
    shown: bool = field(default=True, metadata={"help": "Another switch."})
    text: str = field(default="a", metadata={"help": "A text."})
    maybe: str | None = field(default=None, metadata={"help": "A text or nothing."})
    numbers: list[int] = field(default_factory=lambda: [1], metadata={"help": "Some numbers."})
    layers: list[int] | None = field(default=None, metadata={"help": "Some numbers or nothing."})
    names: list[str] | None = field(default=None, metadata={"help": "Some texts or nothing."})


def small(tmp_path: Path, text: str, *argv: str) -> Small:
    return parse((Small,), ["--config", str(write(tmp_path, text)), *argv])[0]


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "options.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# ---- values


def test_without_a_file():
    assert parse((Small,), []) == (Small(),)
    assert parse((Small,), ["--count", "3", "--flag", "true"]) == (Small(count=3, flag=True),)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("count: 7", Small(count=7)),
        ("rate: 1e-3", Small(rate=1e-3)),  # which YAML 1.1 takes for a text
        ("rate: 1.0e-3", Small(rate=1e-3)),
        ("rate: 2", Small(rate=2.0)),
        ("flag: true\nshown: false", Small(flag=True, shown=False)),
        ("flag: yes\nshown: 'no'", Small(flag=True, shown=False)),
        ("numbers: [3, 4]", Small(numbers=[3, 4])),
        ("numbers: 3", Small(numbers=[3])),
        ("layers: [3]", Small(layers=[3])),
        ("layers: null\nmaybe:", Small()),
        ("maybe: x", Small(maybe="x")),
        ("text: '->{target}'", Small(text="->{target}")),
        ("text: --flag", Small(text="--flag")),
        ("text: ''", Small(text="")),
        ('text: " a b\\n c"', Small(text=" a b\n c")),
        ("text: größer", Small(text="größer")),
        ("text: 5", Small(text="5")),
        ("text: no\nmaybe: on", Small(text="no", maybe="on")),  # which YAML 1.1 takes for false and true
        ("text: 1.10\nmaybe: 010", Small(text="1.10", maybe="010")),
        ("text: 12:30:45\nmaybe: 2024-13-45", Small(text="12:30:45", maybe="2024-13-45")),
        ("maybe: ~\nnames: [no, 1_0, 'null']", Small(names=["no", "1_0", "null"])),
        ("", Small()),
        ("# nothing but a comment", Small()),
    ],
)
def test_yaml_values(tmp_path: Path, text: str, expected: Small):
    assert small(tmp_path, text) == expected


def test_the_command_line_goes_first(tmp_path: Path):
    text = "count: 7\nflag: true\nnumbers: [3, 4]\ntext: file\nlayers: [1]"
    argv = ["--count", "8", "--flag=false", "--numbers", "5", "6", "7", "--layers", "2", "3"]
    assert small(tmp_path, text, *argv) == Small(count=8, numbers=[5, 6, 7], text="file", layers=[2, 3])


@pytest.mark.parametrize("null", [["--count", "null"], ["--count=null"]])
def test_the_command_line_takes_back_what_the_file_says(tmp_path: Path, null: list[str]):
    text = "count: 7\nlayers: [1]\ntext: file"
    assert small(tmp_path, text, *null, "--layers", "null", "--rate", "3") == Small(rate=3.0, text="file")
    assert small(tmp_path, text, "--text=->=null", *null) == Small(text="->=null", layers=[1])


def test_switches_in_all_spellings(tmp_path: Path):
    for argv in (["--shown", "false"], ["--shown=False"], ["--no_shown"], ["--no-shown"]):
        assert small(tmp_path, "shown: true", *argv) == Small(shown=False), argv
    assert small(tmp_path, "", "--flag") == Small(flag=True)


def test_config_anywhere_on_the_line(tmp_path: Path):
    path = write(tmp_path, "count: 7\nrate: 2")
    for argv in (["--rate", "3", "--config", str(path)], [f"--config={path}", "--rate=3"]):
        assert parse((Small,), argv) == (Small(count=7, rate=3.0),)


def test_all_groups_together(tmp_path: Path):
    path = write(
        tmp_path,
        "model_name_or_path: some/base\nlora_layers: [3, 4]\ntrain_tasks: tasks.jsonl\nshots: 3\nlearning_rate: 1e-3\n"
        "inner_lr: 2\ncompare: none\nreport_to: none\nlr_scheduler_kwargs: {min_lr: 0.1}\nrate_factors: [1, 3]\n",
    )
    output = str(tmp_path / "out")
    argv = [
        "--config",
        str(path),
        "--output-dir",
        output,
        "--max_steps",
        "7",
        "--lora-target-modules",
        "q_proj",
        "k_proj",
    ]
    model, tasks, training, comparison = parse(GROUPS, [*argv, "--use_cpu"])
    assert isinstance(training, MetaLoraConfig)
    assert (model.model_name_or_path, model.lora_layers) == ("some/base", [3, 4])
    assert model.lora_target_modules == ["q_proj", "k_proj"]
    assert tasks == TaskArguments("tasks.jsonl")
    assert (training.shots, training.learning_rate, training.inner_lr, training.max_steps) == (3, 1e-3, 2.0, 7)
    assert (training.output_dir, training.use_cpu, training.lr_scheduler_kwargs) == (output, True, {"min_lr": 0.1})
    assert comparison == CompareArguments("none", rate_factors=[1.0, 3.0])


def test_words_that_yaml_takes_for_something_else(tmp_path: Path):
    """Once `save_strategy: no` was no choice, and Norwegian the language False."""
    text = "save_strategy: no\nreport_to: [tensorboard, wandb]\nsource_lang: no\nresume_from_checkpoint: true\n"
    _, tasks, training, _ = parse(GROUPS, ["--config", str(write(tmp_path, text)), "--use_cpu"])
    assert (training.save_strategy, tasks.source_lang, training.resume_from_checkpoint) == ("no", "no", "true")
    assert training.report_to == ["tensorboard", "wandb"]
    assert parse(GROUPS, ["--report_to", "none", "--use_cpu"])[2].report_to == []


def test_the_recipe_s_configs_are_good():
    configs = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))
    assert configs
    for path in configs:
        parse(GROUPS, ["--config", str(path)])


# ---- errors


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cuont: 3", r"options.yaml has an unknown key 'cuont'. Did you mean 'count'\?"),
        ("xyzzy: 3", "options.yaml has an unknown key 'xyzzy'.$"),
        ("1: 3", "options.yaml has an unknown key 1"),
        ("count: many", "argument --count: invalid int value: 'many'"),
        ("count: 2.5", "argument --count: invalid int value: '2.5'"),
        ("count: true", "argument --count: invalid int value: 'True'"),
        ("rate: fast", "argument --rate: invalid float value: 'fast'"),
        ("flag: perhaps", "argument --flag: Truthy value expected: got perhaps"),
        ("numbers: [a]", "argument --numbers: invalid int value: 'a'"),
        ("layers: []", "argument --layers: expected at least one argument"),
        ("count: [1, 2]", r"not used by the HfArgumentParser: \['2'\]"),
        ("count: {a: 1}", "argument --count: invalid int value"),
        ("- count", "must hold keys with values, one a line; it holds list"),
        ("count", "must hold keys with values, one a line; it holds str"),
        ("count: [", r"options.yaml is not YAML: (?s:.*)line 1"),
        ("\tcount: 3", "is not YAML"),
        ("count: &a [*a]", r"aliases \(\*name\) are not read here"),
        ("count: 3\ntext: a\ncount: 4", "is not YAML: the key 'count' is there twice"),
        ("count: 2024-13-45", "is not YAML: month must be in 1..12"),
        ("count: !!int x", "is not YAML: invalid literal"),
        ("count: !!timestamp x", "is not YAML"),
        pytest.param("count: 0x" + "f" * 5000, "has a value that cannot be an option", id="long"),
        pytest.param("count: " + "[" * 3000, "is not YAML: maximum recursion depth", id="deep"),
        ("packing: true", "packing is refused: a packed row would mix the examples of several tasks"),
        ("use_unsloth: true", "use_unsloth is refused"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, text: str, message: str):
    with pytest.raises(MetaPeftError, match=message):
        small(tmp_path, text)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--cuont", "3"], r"There is no option --cuont. Did you mean 'count'\?"),
        (["--cuont=3"], r"There is no option --cuont. Did you mean 'count'\?"),
        (["--xyzzy"], "There is no option --xyzzy"),
        (["--coun", "3"], r"There is no option --coun. Did you mean 'count'\?"),  # no abbreviations
        (["--no_flag"], r"There is no option --no_flag. Did you mean 'flag'\?"),  # it is off already
        (["--packing", "true"], "packing is refused"),
        (["--count"], "argument --count: expected one argument"),
        (["--count", "x"], "argument --count: invalid int value: 'x'"),
        (["options.yaml"], r"not used by the HfArgumentParser: \['options.yaml'\]"),
        (["-c", "3"], r"not used by the HfArgumentParser: \['-c', '3'\]"),
        (["--config"], "--config needs the path of a YAML file"),
        (["--config=a.yaml", "--config", "b.yaml"], "--config is given twice: name one file"),
        (["--config", "nothing.yaml"], "There is no config file 'nothing.yaml'"),
        (["--config", "."], "There is no config file '.'"),
    ],
)
def test_lines_that_cannot_be_used(argv: list[str], message: str):
    with pytest.raises(MetaPeftError, match=message):
        parse((Small,), argv)


def test_a_file_that_is_not_text(tmp_path: Path):
    path = tmp_path / "options.yaml"
    path.write_bytes(b"count: \xff\xfe")
    with pytest.raises(MetaPeftError, match="is not YAML"):
        parse((Small,), ["--config", str(path)])


def test_what_a_group_refuses_comes_through(tmp_path: Path):
    path = str(write(tmp_path, "load_in_4bit: true\nload_in_8bit: true"))
    with pytest.raises(MetaPeftError, match=r"^load_in_4bit and load_in_8bit are both set: choose one\.$"):
        parse(GROUPS, ["--config", path])


def test_what_transformers_refuses_is_an_error_of_ours_too():
    with pytest.raises(MetaPeftError, match=r"save_strategy.*invalid choice: 'sometimes'"):
        parse(GROUPS, ["--save_strategy", "sometimes"])
    with pytest.raises(MetaPeftError, match=r"warmup_steps [^.]*\.$"):
        parse(GROUPS, ["--warmup_steps", "-1"])


def test_a_few_lines_that_stand_for_more_than_any_memory_holds(tmp_path: Path):
    lines = ["text: &a0 [x, x]"] + [f"numbers: &a{i + 1} [*a{i}, *a{i}]" for i in range(60)]
    with pytest.raises(MetaPeftError, match="aliases"):
        small(tmp_path, "\n".join(lines))


# ---- help


def test_help_lists_every_option_with_its_text(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as done:
        parse(GROUPS, ["--help"], prog="meta-peft train", about="What it does.")
    assert done.value.code == 0
    said = re.sub(r"-\n +", "-", capsys.readouterr().out)  # lines may end behind a hyphen
    shown = " ".join(said.split())
    assert shown.startswith("usage: meta-peft train")
    assert "What it does." in shown
    assert "--config CONFIG A flat YAML file" in shown
    for group in GROUPS:
        own = {f.name for f in dataclasses.fields(group)}
        if group is MetaLoraConfig:
            own &= set(group.__annotations__)
        for option in dataclasses.fields(group):
            assert f"--{option.name} " in shown, option.name
            if option.name in own:
                assert " ".join(option.metadata["help"].split()) in shown, option.name
