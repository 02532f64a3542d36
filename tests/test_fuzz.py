"""Whatever a config, a file of rows or an adapter holds: it works, or a `MetaPeftError` says why not.

``META_PEFT_FUZZ=2000 pytest tests/test_fuzz.py`` draws that many examples of each kind, at random.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import kinds
import pytest
import torch
from heads import learned
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from surface import base_model, letter_rows, letter_tasks, temporary_folder, tiny_tokenizer, trained_folder
from tiny_models import fingerprint

import meta_peft
from meta_peft import MetaLoraConfig, MetaPeftError, ModelArguments, PromptFormat, TaskArguments, TaskSet
from meta_peft.base import load_base
from meta_peft.comparison.compare import CompareArguments
from meta_peft.config.config_file import parse
from meta_peft.lora.fast_weights import FastWeights

GROUPS = (ModelArguments, TaskArguments, MetaLoraConfig, CompareArguments)
MORE = int(os.environ.get("META_PEFT_FUZZ", 0))
LIMIT = 20  # seconds for one example


def fuzz(examples: int) -> Callable[[Callable], Callable]:
    return settings(
        max_examples=MORE or examples,
        derandomize=not MORE,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


class HangError(BaseException):
    """No error that any code catches."""


@contextmanager
def the_law() -> Iterator[None]:
    """What runs inside ends in time, with or without a `MetaPeftError` that has a message."""

    def alarm(*_: object) -> None:
        raise HangError(f"it ran for more than {LIMIT} s")

    said = "nothing"
    before = signal.signal(signal.SIGALRM, alarm)
    signal.alarm(LIMIT)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PEFT, on fields that it does not know
            yield
    except MetaPeftError as error:
        said = str(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert 0 < len(said) < 20_000, "nobody could read that"


# ---- hostile values

NUMBERS = st.one_of(
    st.integers(-3, 12),
    st.floats(),
    st.sampled_from([-1, 0, 2**31, 2**63, 10**18, 10**400, float("nan"), float("inf"), 1e308, 1e-320, -0.0]),
)
TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            *("", "NaN", "1e999", "true", "null", "../../x", "/etc/passwd", "{input.__class__}", "{input}{input}"),
            *("(a+)+$", "(", "(.*)*x", "(.|.)*\\d\\d$", "\x00", "\ud800", "\x1b[2J", "a" * 5000, "(" * 900 + ")" * 900),
            *("pissa", "LORA", "IA3", "os", "all-linear", "maml", "lora_B", "{", "[1", "{input}", " {target}"),
        ]
    ),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6
)


def places(values: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths of everything inside an object."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


@st.composite
def mutated(draw: st.DrawFn, valid: dict[str, Any]) -> bytes:
    """JSON like `valid`, with other values, without some, with more, or with bytes of its text changed."""
    values = json.loads(json.dumps(valid))
    for _ in range(draw(st.integers(0, 3))):
        found = list(places(values))
        if not found:
            break
        *way, last = draw(st.sampled_from(found))
        inside = values
        for key in way:
            inside = inside[key]
        kind = draw(st.sampled_from(["replace", "replace", "replace", "delete", "add"]))
        if kind == "replace":
            inside[last] = draw(VALUES)
        elif kind == "delete":
            del inside[last]
        elif isinstance(inside, dict):
            inside[draw(TEXTS)] = draw(VALUES)
    return draw(damaged(json.dumps(values).encode()))


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes as they are, cut, or with some of them exchanged."""
    kind = draw(st.sampled_from(["whole", "whole", "whole", "cut", "exchange"]))
    if kind == "cut":
        return content[: draw(st.integers(0, len(content)))]
    if kind == "exchange" and content:
        start = draw(st.integers(0, min(len(content) - 1, 400)) | st.integers(0, len(content) - 1))
        new = draw(st.binary(min_size=1, max_size=8))
        return content[:start] + new + content[start + len(new) :]
    return content


# ---- configs

KEYS = st.sampled_from(
    sorted({name for group in GROUPS for name in group.__dataclass_fields__} - {"output_dir", "push_to_hub"})
)
OWN = st.sampled_from(
    sorted(
        {*ModelArguments.__annotations__, *MetaLoraConfig.__annotations__, *CompareArguments.__annotations__}
        - {"output_dir"}
    )
)


def parse_file(folder: Path, content: bytes) -> None:
    path = folder / "options.yaml"
    path.write_bytes(content)
    for group in parse(GROUPS, ["--config", str(path)]):
        if isinstance(group, MetaLoraConfig):
            assert group.inner_rule().to_dict()
            assert group.schedule() is not None


@fuzz(60)
@given(options=st.dictionaries(OWN | KEYS, VALUES, max_size=4))
def test_options(options: dict[str, Any]):
    """JSON is YAML, so that every value reaches the parser."""
    with the_law():
        parse_file(scratch(), json.dumps(options).encode())


@fuzz(40)
@given(
    content=st.one_of(
        st.binary(max_size=60),
        st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.tuples(
            OWN | KEYS,
            st.sampled_from(
                [
                    "!!int x",
                    "!!timestamp x",
                    "2024-13-45",
                    "&a [*a]",
                    "!!binary x",
                    "[" * 3000,
                    "!!python/name:os.system",
                    "1_0",
                    ".nan",
                ]
            ),
        ).map(lambda pair: f"{pair[0]}: {pair[1]}".encode()),
    )
)
def test_config_files(content: bytes):
    with the_law():
        parse_file(scratch(), content)


# ---- rows

ROW = {"task": "say a", "input": "abc", "target": "aa"}
CHAT = {"task": "say a", "messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "aa"}]}
LINES = st.one_of(st.binary(max_size=40), mutated(ROW), mutated(ROW), mutated(CHAT), st.just(json.dumps(ROW).encode()))


@fuzz(80)
@given(lines=st.lists(LINES, max_size=5))
def test_rows(lines: list[bytes]):
    path = scratch() / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
    with the_law():
        tasks = TaskSet.from_jsonl(path)
        encoded = tasks.encoded(PromptFormat(), tokenizer, 64)
        for name in encoded.names:
            for row in encoded.rows(name):
                assert 0 < len(row["input_ids"]) == len(row["labels"]) <= 64


# ---- adapters


@cache
def valid_files() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in trained_folder().iterdir() if path.suffix != ".md"}


@cache
def files_with_head() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in learned().iterdir() if path.suffix != ".md"}


@cache
def base_with_head() -> torch.nn.Module:
    return load_base(kinds.arguments(kinds.HEAD))


@cache
def scratch() -> Path:
    return temporary_folder()


@cache
def base() -> torch.nn.Module:
    return base_model()


class Files(dict):
    """Contents by name; shown is only what differs from the valid ones."""

    def __repr__(self) -> str:
        return str(
            {
                n: c if n.endswith("json") else c[:2500]
                for n, c in self.items()
                if c not in (valid_files()[n], files_with_head()[n])
            }
        )


@pytest.fixture(autouse=True, scope="module")
def _made_before_anything_is_drawn() -> None:
    """What is made trains, and hypothesis refuses whatever draws from `random` beside it."""
    valid_files()
    base()
    files_with_head()
    base_with_head()


@st.composite
def adapters(draw: st.DrawFn, valid: Callable[[], dict[str, bytes]] = valid_files) -> Files:
    files = Files(valid())
    name = draw(st.sampled_from(sorted(files)))
    files[name] = draw(mutated(json.loads(files[name])) if name.endswith("json") else damaged(files[name]))
    return files


@fuzz(60)
@given(files=adapters())
def test_adapters(files: Files):
    loads_or_says_why(files, base(), tiny_tokenizer(), letter_rows("a", 2))


@fuzz(15)
@given(files=adapters(files_with_head))
def test_adapters_with_a_head(files: Files):
    loads_or_says_why(files, base_with_head(), kinds.processor(kinds.HEAD), kinds.rows(kinds.HEAD, "a", 2))


def loads_or_says_why(files: Files, base: torch.nn.Module, processor: Any, rows: list[dict[str, Any]]) -> None:
    folder, model, head = scratch() / "adapter", None, getattr(base, "classifier", None)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    clean, around = fingerprint(base), {path.name for path in folder.parent.iterdir()}
    with the_law():
        model = meta_peft.load(base, folder, tokenizer=processor)
        assert all(p.isfinite().all() for p in FastWeights(model).parameters().values())
        if model.meta_peft.sidecar.inner.steps <= 5:
            meta_peft.adapt_many(model, {"a": rows})
    if model is not None:
        model.unload()  # which leaves the adapter's copy of a head where the base's was
        if head is not None:
            base.classifier = head
        if hasattr(base, "peft_config"):
            del base.peft_config
    assert fingerprint(base) == clean
    assert {path.name for path in folder.parent.iterdir()} == around
    assert {path.name for path in folder.iterdir()} == set(files)


# ---- the law itself


@contextmanager
def the_law_in_vain() -> Iterator[None]:
    with pytest.raises(HangError), the_law():
        yield


def test_the_law_stops_what_hangs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(f"{__name__}.LIMIT", 1)
    with the_law_in_vain():
        re.search("(a+)+$", "a" * 40 + "b")


def test_what_is_mutated_is_valid_to_begin_with():
    model = meta_peft.load(base_model(), trained_folder(), tokenizer=tiny_tokenizer())
    assert len(FastWeights(model).parameters()) == 16
    assert len(TaskSet.from_mapping(letter_tasks("a"))) == 1
