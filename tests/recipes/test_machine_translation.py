from __future__ import annotations

from pathlib import Path

from machine_translation import tasks_of, translations
from programs import catalogue, django_wheel, words

MESSAGES = words(60)


def test_what_is_not_short_plain_text_is_left_out():
    messages = {
        "Yes": "Ja",
        "now": "jetzt",
        "%(n)s hours": "%(n)s Stunden",
        "a <b>": "ein <b>",
        "two\nlines": "zwei\nZeilen",
    }
    messages |= {"{name}": "{name}!", "Email": "Email", "long " * 13: "lang", " space": "Platz", "empty": ""}
    assert translations(catalogue(messages.items(), May="Mai")) == {"Yes": "Ja", "now": "jetzt"}


def translated(prefix: str, n: int = 60) -> bytes:
    return catalogue((message, prefix + message) for message in MESSAGES[:n])


def test_one_task_a_language(tmp_path: Path):
    languages = {name: translated(name) for name in ("da", "de", "es", "fi", "fr", "it", "nb", "nl", "pt", "sv")}
    others = {
        "es_MX": translated("es"),
        "ru": translated("да"),
        "sr_Latn": translated("sr"),
        "ga": translated("ga", 40),
    }
    wheel = django_wheel(
        tmp_path, languages | others, admin={"de": catalogue([("Log in", "Anmelden"), (MESSAGES[0], "?")])}
    )
    splits = tasks_of(wheel, 0)
    assert [len(tasks) for tasks in splits.values()] == [7, 2, 2]
    tasks = {name: rows for found in splits.values() for name, rows in found.items()}
    assert set(tasks) == {*languages, "sr_Latn"}  # no variant, no other script, nothing too small
    german = {row["input"]: row["target"] for row in tasks["de"]}
    assert len(german) == 61
    assert german["Log in"] == "Anmelden"
    assert german[MESSAGES[0]] in ("?", "de" + MESSAGES[0])
    assert "ru" in {name for found in tasks_of(wheel, 0, all_scripts=True).values() for name in found}
