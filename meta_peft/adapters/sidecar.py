"""What `adapt` needs to know beside the adapter itself: the inner rule, its rates, the prompt format, the base model.

Two small files beside an ordinary PEFT adapter, ``meta_peft.json`` and ``meta_peft.safetensors``. Stock PEFT does not
look at them.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from meta_peft.adapters.base_identity import BaseIdentity
from meta_peft.adapters.tokenizer_identity import TokenizerIdentity
from meta_peft.config import ALGORITHMS
from meta_peft.errors import MetaPeftError
from meta_peft.evaluation.metrics import METRICS
from meta_peft.inner_optimizers import InnerRule
from meta_peft.inner_optimizers.rule import RATES
from meta_peft.lora.fast_weights import HEADS
from meta_peft.objectives import CLASSIFYING, OBJECTIVES
from meta_peft.tasks.encoding import Encoding, Facts
from meta_peft.tasks.encoding.facts import UNKNOWN
from meta_peft.tasks.labelling import Labelling
from meta_peft.tasks.prompt import PromptFormat
from meta_peft.tasks.row_form import RowForm
from meta_peft.utils.checked import is_number, one_of, read_object, shown, text, whole

JSON, TENSORS = "meta_peft.json", "meta_peft.safetensors"
FORMAT, OLDEST = 2, 1  # before 2, all models were causal language models
LARGEST = 10**8  # of tokens, shots, steps and factors
# What a LoRA matrix is called in adapter_model.safetensors; a weight of the base model is never called so.
LORA_NAME = re.compile(r"[\w.-]+\.(lora_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector(\.weight)?)")
# And what the weights of a classification head are called. A base has weights of the same names, which PEFT leaves alone
# only if they are its copies that are loaded: `adapter_files` sees to that.
HEAD_NAME = re.compile(rf"base_model\.model\.[\w.]*({'|'.join(HEADS)})(\.\w+)*\.(weight|bias)")


@dataclass(frozen=True)
class Judged:
    """How training drew its tasks and judged answers, which is what an evaluation does if nothing else is said.

    Args:
        metric: its name; None is the default of the model's objective.
        task_column: the columns that name a row's task.
        labelling: how classes are drawn and called, if episodes are of classes.
        seed: of the episodes of held-out tasks.
    """

    metric: str | None = None
    task_column: tuple[str, ...] = ("task",)
    labelling: Labelling | None = None
    seed: int = 0

    @classmethod
    def of(cls, values: dict[str, Any]) -> Judged:
        """From what a file says; what it does not say is as ever."""
        metric, labelling = values.get("metric"), values.get("labelling")
        if metric is not None:
            one_of("metric", metric, METRICS)
        columns = tuple(text("task_column", name, 1000) for name in values.get("task_column", ("task",)))
        if labelling is not None:
            labelling = Labelling(
                whole("ways", labelling["ways"], 2, LARGEST),
                labelling["words"],
                text("label_column", labelling["column"], 1000),
            )
        return cls(metric, columns, labelling, whole("seed", values.get("seed", 0), 0, 2**63))


@dataclass(frozen=True)
class Sidecar:
    """How an adapter was meta-learned, and how it is to be adapted.

    `names` are all LoRA matrices, and behind them the weights of a classification head; those of them that are fast
    weights have the columns of `log_rates` ``[S, n]``, one each or one for each entry. `rate_factors` holds, for numbers of
    adaptation steps, what the rates are best multiplied by, as found on validation tasks. `judged` is how tasks were drawn
    and judged in training. `tokenizer` is which one it was, where that is known. `row_form` is what training did to rows so
    that they were of a known form, which is done to others like them too.
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
    objective: str = "causal_lm"
    facts: Facts = field(default_factory=Facts)
    judged: Judged = field(default_factory=Judged)
    tokenizer: TokenizerIdentity | None = None
    row_form: RowForm = field(default_factory=RowForm)

    def encoding(self, processor: Any) -> Encoding:
        """How rows are encoded, with the base's tokenizer, or its processor for speech."""
        return Encoding(self.objective, self.prompt_format, processor, self.max_length, self.facts)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raise unless it is the one of the training, as far as that is known (see `TokenizerIdentity.check`)."""
        if self.tokenizer is not None:
            self.tokenizer.check(TokenizerIdentity.of(tokenizer))

    def rate_factor(self, steps: int) -> float:
        """The factor found for the largest number of steps up to `steps`, but not for none at all; 1 if none was found."""
        known = [k for k in self.rate_factors if 0 < k <= steps]
        return self.rate_factors[max(known)] if known else 1.0

    def write(self, folder: Path) -> None:
        """Write both files into `folder`."""
        values: dict[str, Any] = {
            "format": OLDEST if self.objective == "causal_lm" else FORMAT,
            "algorithm": self.algorithm,
            "inner": self.inner.to_dict(),
            "names": list(self.names),
            "prompt_format": self.prompt_format.to_dict(),
            "max_length": self.max_length,
            "base": asdict(self.base),
            "shots": self.shots,
            "rate_factors": {str(steps): factor for steps, factor in self.rate_factors.items()},
            "judged": asdict(self.judged),
        }
        if self.tokenizer is not None:
            values["tokenizer"] = asdict(self.tokenizer)
        if self.row_form != RowForm():
            values["row_form"] = asdict(self.row_form)
        if self.objective != "causal_lm":
            values |= {"objective": self.objective, "facts": asdict(self.facts)}
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
        values = read_object(folder / JSON, "a sidecar of meta_peft")
        if values.get("format") not in (OLDEST, FORMAT) or type(values["format"]) is not int:
            if "format" not in values:
                raise MetaPeftError(f"{folder / JSON} is damaged or not a sidecar of meta_peft (it has no format).")
            raise MetaPeftError(
                f"{folder / JSON} has format {shown(values['format'])}; this version of meta_peft reads formats"
                f" {OLDEST} and {FORMAT}."
            )
        try:
            base = values["base"]
            sidecar = cls(
                algorithm=values["algorithm"],
                inner=InnerRule.from_dict(values["inner"]),
                names=tuple(values["names"]),
                log_rates=_log_rates(folder / TENSORS),
                prompt_format=PromptFormat(**values["prompt_format"]),
                max_length=values["max_length"],
                base=BaseIdentity(base["name"], base["sizes"], tuple(base["embedding"])),
                shots=values["shots"],
                rate_factors={int(steps): factor for steps, factor in values["rate_factors"].items()},
                objective=values["objective"] if values["format"] == FORMAT else "causal_lm",
                facts=_facts(values["facts"]) if values["format"] == FORMAT else Facts(),
                judged=Judged.of(values.get("judged") or {}),
                tokenizer=_tokenizer(values.get("tokenizer")),
                row_form=RowForm.of(values.get("row_form") or {}),
            )
            sidecar._check_values()
        except (KeyError, TypeError, AttributeError, ValueError, SafetensorError, OSError) as error:
            raise MetaPeftError(
                f"{folder / JSON} is damaged or not a sidecar of meta_peft"
                f" ({error if isinstance(error, MetaPeftError) else shown(error)})."
            ) from error
        n_fast, shape = len(sidecar.inner.fast_names(sidecar.names)), sidecar.log_rates.shape
        steps = max(sidecar.inner.steps, 1) if sidecar.inner.rates_per_step else 1
        right = len(shape) == 2 and 1 <= shape[0] <= steps and (sidecar.inner.rates_per_entry or shape[1] == n_fast)
        if not right or not sidecar.log_rates.exp().isfinite().all():
            raise MetaPeftError(
                f"{folder / TENSORS} should hold finite rates for {n_fast} matrices; it has shape {list(shape)},"
                f" for up to {steps} steps."
            )
        return sidecar

    def _check_values(self) -> None:
        """Raise unless each value is one that training can have written."""
        if self.algorithm not in ALGORITHMS:
            raise MetaPeftError(f"algorithm must be one of {', '.join(ALGORITHMS)}; got {shown(self.algorithm)}")
        if not isinstance(self.objective, str) or self.objective not in OBJECTIVES:
            raise MetaPeftError(f"objective must be one of {', '.join(OBJECTIVES)}; got {shown(self.objective)}")
        if not self.names or len(set(self.names)) < len(self.names):
            raise MetaPeftError(f"names must be those of some LoRA matrices, each once; got {shown(self.names)}")
        for name in self.names:
            known = isinstance(name, str) and len(name) <= 1000 and LORA_NAME.fullmatch(name)
            of_head = self.objective in CLASSIFYING and isinstance(name, str) and HEAD_NAME.fullmatch(name)
            if not known and not (of_head and len(name) <= 1000):
                raise MetaPeftError(f"names must be those of LoRA matrices; got {shown(name)}")
        whole("max_length", self.max_length, 1, LARGEST)
        whole("shots", self.shots, 1, LARGEST)
        for steps, factor in self.rate_factors.items():
            whole("rate_factors", steps, 0, LARGEST)
            if not (is_number(factor) and 0 < factor <= LARGEST):
                raise MetaPeftError(f"rate_factors must be positive numbers; got {shown(factor)} for {steps} steps.")


def _tokenizer(values: dict[str, Any] | None) -> TokenizerIdentity | None:
    return None if values is None else TokenizerIdentity(**{**values, "tokens": tuple(values["tokens"])})


def _facts(values: dict[str, Any]) -> Facts:
    lists = {name: tuple(values[name]) for name in ("decoder_prefix", "label_names")}
    return Facts(**{"labels": UNKNOWN, **values, **lists})


def _log_rates(path: Path) -> Tensor:
    """The rates in `path`, read only if its header says that they are numbers, as many as there can be."""
    with safe_open(path, framework="pt") as tensors:
        header = tensors.get_slice(RATES)
        shape, dtype = header.get_shape(), header.get_dtype()
        if dtype not in ("F32", "F64") or len(shape) > 4:
            raise MetaPeftError(f"{RATES} must be float32 or float64; it is {shown(dtype)} of shape {shown(shape)}")
        return tensors.get_tensor(RATES)
