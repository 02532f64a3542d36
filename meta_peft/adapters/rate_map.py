"""The inner rates of an adapter as a map: a row for each layer, a column for each kind of LoRA matrix in it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from meta_peft.errors import MetaPeftError
from meta_peft.lora.fast_weights import LAYER_NUMBER
from meta_peft.utils.figures import NO_MATPLOTLIB, new_figure

SHADES = " ░▒▓█"
MATRICES = {
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_A": "A",
    "lora_B": "B",
    "lora_magnitude_vector": "m",
}


def check_picture(path: str) -> None:
    """Raise `MetaPeftError` if matplotlib is not installed, or writes no pictures of this ending."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise MetaPeftError(NO_MATPLOTLIB.format("picture")) from error
    ending = Path(path).suffix.removeprefix(".")
    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if ending and ending.lower() not in known:
        raise MetaPeftError(
            f"A picture cannot be written as {path}, by its ending: give one that matplotlib knows, such as rates.png; it"
            f" knows {', '.join(known)}."
        )


@dataclass(frozen=True)
class RateMap:
    """Rates ``[rows, columns]``, nan where there is no matrix; rows are called by the numbers of layers."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    rates: np.ndarray

    @classmethod
    def of(cls, names: Sequence[str], log_rates: Tensor) -> RateMap:
        """Of matrices with these names and their log rates ``[S, n]`` for S steps: the mean over steps of the logarithm."""
        mean = log_rates.double().mean(0).exp().tolist()
        places = [_place(name) for name in names]
        rows = sorted({row for row, _ in places}, key=lambda row: (not row.isdigit(), int(row) if row.isdigit() else 0))
        columns = list(dict.fromkeys(column for _, column in places))
        titles = _short({path for path, matrix in columns if matrix})
        rates = np.full((len(rows), len(columns)), np.nan)
        for (row, column), rate in zip(places, mean, strict=True):
            rates[rows.index(row), columns.index(column)] = rate
        shown = tuple(f"{titles[path]} {matrix}" if matrix else path for path, matrix in columns)
        return cls(tuple(rows), shown, rates)

    def as_text(self, width: int) -> str:
        """A table of at most `width` characters a line: shades, dark for high rates, and the rates if there is room."""
        shades = self._shades()
        cells = [
            [f"{2 * shade} {rate:.1e}" if np.isfinite(rate) else "" for shade, rate in zip(*line, strict=True)]
            for line in zip(shades, self.rates, strict=True)
        ]
        lines = _aligned(["layer", *self.columns], [[row, *line] for row, line in zip(self.rows, cells, strict=True)])
        if max(map(len, lines)) > width:
            key = [f"{i + 1:2d}  {column}" for i, column in enumerate(self.columns)]
            numbers = [f"{i + 1:2d}" for i in range(len(self.columns))]
            dark = [[row, *(2 * shade for shade in line)] for row, line in zip(self.rows, shades, strict=True)]
            lines = [*_aligned(["layer", *numbers], dark), "", *key]
        return "\n".join(line[:width] for line in lines)

    def figure(self) -> Any:
        """A matplotlib figure of the logarithms.

        Raises:
            MetaPeftError: matplotlib is not installed.
        """
        n_rows, n_columns = self.rates.shape
        figure = new_figure(2.5 + 0.6 * n_columns, 1.8 + 0.3 * n_rows)
        panel = figure.subplots()
        image = panel.imshow(np.log10(self.rates), aspect="auto", cmap="viridis")
        panel.set_xticks(range(n_columns), self.columns, rotation=60, ha="right")
        panel.set_yticks(range(n_rows), self.rows)
        panel.set(ylabel="layer")
        figure.colorbar(image, label="log10 of the inner rate")
        return figure

    def _shades(self) -> list[list[str]]:
        logs = np.log(self.rates)
        low, high = np.nanmin(logs), np.nanmax(logs)
        share = np.full_like(logs, 0.5) if high == low else (logs - low) / (high - low)
        last = len(SHADES) - 1
        return [[SHADES[round(last * s)] if np.isfinite(s) else " " for s in line] for line in share]


def _place(name: str) -> tuple[str, tuple[str, str]]:
    """The layer that a matrix is in; and its module, by a path without numbers, and which matrix it is there.

    What is in no layer has a row of its own.
    """
    layer = LAYER_NUMBER.search(name)
    kind = next((k for k in MATRICES if f".{k}" in name), None)
    path = name.removeprefix("base_model.model.") if kind is None else name[: name.index(f".{kind}")]
    without_numbers = ".".join(part for part in path.split(".") if not part.isdigit())
    return layer[1] if layer else "-", (without_numbers, MATRICES[kind] if kind else "")


def _short(paths: Collection[str]) -> dict[str, str]:
    """As much of the end of each path as tells it from the others."""
    found = {}
    for path in paths:
        parts = path.split(".")
        ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        found[path] = next((end for end in ends if sum(f".{p}".endswith(f".{end}") for p in paths) == 1), path)
    return found


def _aligned(head: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]
    return ["  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in (head, *rows)]
