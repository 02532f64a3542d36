"""What `adapt` needs to know beside the adapter itself: the inner rule, its rates, the prompt format, the base model.

Two small files beside an ordinary PEFT adapter, ``meta_peft.json`` and ``meta_peft.safetensors``. Stock PEFT does not
look at them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from meta_peft.base_model import BaseIdentity
from meta_peft.errors import MetaPeftError
from meta_peft.inner_optimizers import InnerRule
from meta_peft.inner_optimizers.rule import RATES
from meta_peft.tasks.prompt import PromptFormat

JSON, TENSORS = "meta_peft.json", "meta_peft.safetensors"
FORMAT = 1


@dataclass(frozen=True)
class Sidecar:
    """How an adapter was meta-learned, and how it is to be adapted.

    `names` are all LoRA matrices; those of them that are fast weights have the columns of `log_rates` ``[S, n]``, one
    each or one for each entry. `rate_factors` holds, for numbers of adaptation steps, what the rates are best multiplied
    by, as found on validation tasks.
    """

    algorithm: str
    inner: InnerRule
    names: tuple[str, ...]
    log_rates: Tensor
    prompt_format: PromptFormat
    max_length: int
    base: BaseIdentity
    shots: int
    rate_factors: dict[int, float] = field(default_factory=dict)

    def rate_factor(self, steps: int) -> float:
        """The factor found for the largest number of steps up to `steps`; 1 if none was."""
        known = [k for k in self.rate_factors if k <= steps]
        return self.rate_factors[max(known)] if known else 1.0

    def write(self, folder: Path) -> None:
        """Write both files into `folder`."""
        values: dict[str, Any] = {
            "format": FORMAT,
            "algorithm": self.algorithm,
            "inner": self.inner.to_dict(),
            "names": list(self.names),
            "prompt_format": self.prompt_format.to_dict(),
            "max_length": self.max_length,
            "base": asdict(self.base),
            "shots": self.shots,
            "rate_factors": {str(steps): factor for steps, factor in self.rate_factors.items()},
        }
        (folder / JSON).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        save_file({RATES: self.log_rates.detach().cpu().contiguous()}, folder / TENSORS)

    @classmethod
    def read(cls, folder: Path) -> Sidecar:
        """Read both files.

        Raises:
            MetaPeftError: the adapter has no sidecar, or one that cannot be right.
        """
        if not (folder / JSON).is_file() or not (folder / TENSORS).is_file():
            raise MetaPeftError(
                f"{folder} has no {JSON} with {TENSORS} beside the adapter: it is a plain PEFT adapter, or the files"
                " were not copied. Adapters that meta_peft has trained have both; for a plain one use PEFT itself."
            )
        try:
            values = json.loads((folder / JSON).read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                raise MetaPeftError(
                    f"{folder / JSON} has format {values['format']!r}; this version of meta_peft reads format {FORMAT}."
                )
            base = values["base"]
            sidecar = cls(
                algorithm=str(values["algorithm"]),
                inner=InnerRule.from_dict(values["inner"]),
                names=tuple(values["names"]),
                log_rates=load_file(folder / TENSORS)[RATES],
                prompt_format=PromptFormat(**values["prompt_format"]),
                max_length=int(values["max_length"]),
                base=BaseIdentity(base["name"], base["sizes"], tuple(base["embedding"])),
                shots=int(values["shots"]),
                rate_factors={int(steps): float(factor) for steps, factor in values["rate_factors"].items()},
            )
        except (KeyError, TypeError, AttributeError, ValueError, SafetensorError) as error:
            if isinstance(error, MetaPeftError):
                raise
            raise MetaPeftError(f"{folder / JSON} is damaged or not a sidecar of meta_peft ({error!r}).") from error
        n_fast, shape = len(sidecar.inner.fast_names(sidecar.names)), sidecar.log_rates.shape
        right = len(shape) == 2 and (sidecar.inner.rates_per_entry or shape[1] == n_fast)
        if not right or not sidecar.log_rates.exp().isfinite().all():
            raise MetaPeftError(
                f"{folder / TENSORS} should hold finite rates for {n_fast} matrices; it has shape {list(shape)}."
            )
        return sidecar
