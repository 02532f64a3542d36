"""What makes rows of a known form of those of a run: new names of columns, and pairs of what was translations.

The options of a run say it, and the sidecar of its adapter keeps it, so that `adapt` and `evaluate` take rows in the
form that `train` took them in.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from meta_peft.errors import MetaPeftError
from meta_peft.tasks import translation
from meta_peft.utils.checked import flag, shown, text

LONGEST, MOST = 1000, 10_000  # characters of a name, columns that are renamed


@dataclass(frozen=True)
class RowForm:
    """By default rows have a known form already.

    Args:
        new_names: of columns, by their old names.
        translation: whether rows are translations (see `tasks.translation`).
        source_lang, target_lang: of translations, only from or into this language; each by default.
    """

    new_names: Mapping[str, str] = field(default_factory=dict)
    translation: bool = False
    source_lang: str | None = None
    target_lang: str | None = None

    def __post_init__(self) -> None:
        names = self.new_names
        if not isinstance(names, dict) or len(names) > MOST or len(set(map(str, names.values()))) < len(names):
            raise MetaPeftError(f"rename_columns must give each column another name; got {shown(names)}.")
        for name in (*names, *names.values()):
            text("rename_columns", name, LONGEST)
        flag("translation", self.translation)
        for option in ("source_lang", "target_lang"):
            if getattr(self, option) is not None:
                text(option, getattr(self, option), LONGEST)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> RowForm:
        """From what a file says; what it does not say is as ever."""
        return cls(
            values.get("new_names", {}),
            values.get("translation", False),
            values.get("source_lang"),
            values.get("target_lang"),
        )

    def __str__(self) -> str:
        renamed = ["columns renamed " + " ".join(f"{old}={new}" for old, new in self.new_names.items())]
        ends = ((word, lang) for word, lang in (("from", self.source_lang), ("into", self.target_lang)) if lang)
        languages = ["translations" + "".join(f" {word} {lang}" for word, lang in ends)]
        return ", ".join(renamed * bool(self.new_names) + languages * self.translation)

    def of_table(self, table: Dataset, task_columns: Sequence[str]) -> tuple[Dataset, list[str]]:
        """A table in a known form, as far as it is in that of the run, and what its task columns are called then."""
        table = with_new_names(table, self._renamed(table.column_names))
        columns = [c if c in table.column_names else self.new_names.get(c, c) for c in task_columns]
        if self.translation and translation.COLUMN in table.column_names:
            table = translation.as_pairs(table, self.source_lang, self.target_lang, task_column=columns[0])
        return table, columns

    def of_rows(self, rows: Iterable[Mapping[str, Any]], task_column: str = "task") -> list[dict[str, Any]]:
        """The same of the rows of one task.

        Raises:
            MetaPeftError: they are translations in several directions, and nothing says that these are one task.
        """
        renamed = self.renamed_rows(rows)
        if not self.translation:
            return renamed
        return translation.pairs_of_task(renamed, self.source_lang, self.target_lang, task_column=task_column)

    def renamed_rows(self, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """As many rows, with the new names of their columns."""
        rows = list(rows)
        names = self._renamed({column for row in rows for column in row})
        given_up = set(names.values()) - set(names)
        return [{names.get(c, c): value for c, value in row.items() if c not in given_up} for row in rows]

    def _renamed(self, columns: Collection[str]) -> dict[str, str]:
        """New names by old ones: all of them, as in the run, if the old ones are all there; else those that are missing.

        So rows that have the new names already are left alone.
        """
        there = {old: new for old, new in self.new_names.items() if old in columns}
        return there if len(there) == len(self.new_names) else {o: n for o, n in there.items() if n not in columns}


def with_new_names(table: Dataset, names: Mapping[str, str]) -> Dataset:
    """`table` with columns called as `names` says, by old names; a column that has a new name by itself is left out."""
    given_up = [column for column in table.column_names if column in names.values() and column not in names]
    return table.remove_columns(given_up).rename_columns(dict(names)) if names else table
