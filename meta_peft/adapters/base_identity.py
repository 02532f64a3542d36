"""Which base model an adapter belongs to."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from meta_peft.errors import MetaPeftError
from meta_peft.frozen.whole_weights import whole_weight
from meta_peft.utils.checked import is_number, shown, text, whole

logger = logging.getLogger("meta_peft")


@dataclass(frozen=True)
class BaseIdentity:
    """Which base model an adapter was learned on, well enough to refuse another one.

    `embedding` is a sample of the input embeddings, which no quantisation touches: two models of one architecture
    differ in it, while copies of one model in another precision agree.
    """

    name: str
    sizes: dict[str, int]
    embedding: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.name != "":  # as that of a model which was made from a config
            text("base.name", self.name, 4096)
        if not isinstance(self.sizes, dict) or not 0 < len(self.sizes) <= 100:
            raise MetaPeftError(f"base.sizes must be an object with some numbers; got {shown(self.sizes)}.")
        for size, value in self.sizes.items():
            whole(f"base.sizes[{shown(size)}]", value, 0, 2**40)
        if not (0 < len(self.embedding) <= 4096 and all(map(is_number, self.embedding))):
            raise MetaPeftError(f"base.embedding must be a list of finite numbers; got {shown(self.embedding)}.")

    @classmethod
    def of(cls, base: Any) -> BaseIdentity:
        config = base.config.get_text_config()  # of a model that sees or hears as well, the part that writes
        sizes = {k: int(getattr(config, k)) for k in ("hidden_size", "num_hidden_layers", "vocab_size")}
        weight = whole_weight(base.get_input_embeddings())
        rows = torch.linspace(0, weight.shape[0] - 1, 64).long()
        sample = weight.detach()[rows, torch.arange(64) % weight.shape[1]].float().cpu()
        return cls(str(base.name_or_path), sizes, tuple(round(float(x), 5) for x in sample))

    def check(self, other: BaseIdentity) -> None:
        """Raise unless `other` is the same base model; warn if it was trained on since."""
        mine, its = torch.tensor(self.embedding), torch.tensor(other.embedding)
        alike = (
            self.sizes == other.sizes and mine.shape == its.shape and torch.cosine_similarity(mine, its, dim=0) > 0.95
        )
        if not alike:
            raise MetaPeftError(
                f"The adapter was learned on {self.name} ({self.sizes}), the base model is {other.name}"
                f" ({other.sizes}) with other weights: load the base model the adapter belongs to."
            )
        if not torch.allclose(mine, its, rtol=2**-7, atol=2e-5):  # bfloat16 moves a weight by 2^-9 of it, at most
            logger.warning(
                "The embeddings of %s are near those of %s, which the adapter was learned on, and not the same. If it was"
                " fine-tuned since, the adapter may be worse on it, or of no use: evaluate it there first.",
                other.name or "the base model",
                self.name or "the one",
            )
