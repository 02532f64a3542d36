"""Every entry of a config file on the page about tasks loads tasks, of files as the page describes them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from surface import tiny_tokenizer

from meta_peft import EpisodeDataset, MetaLoraConfig, TaskArguments
from meta_peft.config.config_file import parse
from meta_peft.run_tasks.task_loading import load_tasks, with_enough_rows

PAGE = Path(__file__).parents[1] / "docs" / "your_tasks.md"
BLOCKS = re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
LETTERS = "abcdefghijklmnopqrstuvwxyzäöüß"


def rows(**columns: str) -> list[dict]:
    """Thirty tasks or classes of sixteen rows; {t} is the name of one, {i} the number of a row."""
    return [
        {name: value.format(t=t, i=i, c="xy"[i % 2]) for name, value in columns.items()}
        for t in LETTERS
        for i in range(16)
    ]


def pair_rows(letters: str) -> list[dict]:
    return [row for row in rows(task="{t}", input="{i}", target="{t}") if row["task"] in letters]


def conversation(row: dict) -> dict:
    turns = [{"role": role, "content": row["text"]} for role in ("user", "assistant")]
    return {"customer": row["customer"], "messages": turns * 2}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = [f"Here we speak of word{t} for the {i}th time." for t in LETTERS for i in range(16)]
    contents = {
        "tickets.jsonl": rows(customer="{t}", language="{c}", input="{i}", target="{t}"),
        "tasks/german/dates.jsonl": rows(input="{t}{i}", target="x"),
        "tasks/names.csv": "input,target\n" + "".join(f"{i},x\n" for i in range(16)),
        "held_out/a.jsonl": rows(input="{t}{i}", target="x"),
        "held_out/b.csv": "input,target\n" + "".join(f"{i},x\n" for i in range(16)),
        "intents.csv": "text,label\n" + "".join(f"say {t}{i},intent {t}\n" for t in LETTERS for i in range(16)),
        "reviews.jsonl": rows(domain="{t}", text="{i}", label="{c}"),
        "chats.jsonl": [conversation(row) for row in rows(customer="{t}", text="{t}{i}")],
        "questions.jsonl": rows(relation="{t}", question="{i}", context="{t}", answer="{t}{i}"),
        "translations.jsonl": [{"translation": {t: f"{t}{i}", "en": str(i)}} for t in ("de", "fr") for i in range(16)],
        "corpus.txt": "\n".join(text),
        "articles.jsonl": [{"text": " ".join(text[16 * i : 16 * (i + 1)])} for i in range(20)],
        "train.jsonl": pair_rows("abc"),
        "validation.jsonl": pair_rows("de"),
        "test.jsonl": pair_rows("fg"),
    }
    for name, content in contents.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        written = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
        Path(name).write_text(written, encoding="utf-8")


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("block", BLOCKS, ids=[block.splitlines()[0] for block in BLOCKS])
def test_entries_load_tasks(block: str):
    Path("config.yaml").write_text(block + "\nuse_cpu: true\nreport_to: none\n", encoding="utf-8")
    task_args, args = parse([TaskArguments, MetaLoraConfig], ["--config", "config.yaml"])
    if task_args.dataset_name is not None:
        return  # of the hub, which tests have none of
    tasks = with_enough_rows(load_tasks(task_args, args.task_column), task_args, args)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    for of_split in tasks.values():
        encoded = of_split.encoded(args.prompt_format(), tokenizer, args.max_length)
        episode = EpisodeDataset(encoded, shots=args.shots, query_size=1, labels=args.labelling())[0]
        assert len(episode.support) == args.shots * (args.ways or 1)


def test_there_are_entries():
    assert len(BLOCKS) >= 10
