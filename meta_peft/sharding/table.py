"""What works where: back end x quantisation x algorithm. `docs/scaling.md` shows this table, and a test compares them.

Every cell without a reason is computed in `tests/test_sharding.py` and compared with a base that is whole.
"""

from __future__ import annotations

from typing import Any

from meta_peft.errors import MetaPeftError

QUANTISATIONS = ("float32", "bfloat16", "4-bit", "8-bit")
ALGORITHMS = ("first order", "second order", "finite differences", "implicit")
BACK_ENDS = {
    "fsdp2": "FSDP2",
    "zero3": "DeepSpeed ZeRO-3",
    "device_map": "device map with main memory or disk",
}
_COARSE = "it subtracts gradients that are nearly equal: use memory='replay'"
_WHOLE = {
    ("fsdp2", "8-bit"): "integer codes do not shard: use 4 bits",
    ("zero3", "8-bit"): "bitsandbytes keeps a full copy of the codes: use 4 bits",
    ("device_map", "4-bit"): "bitsandbytes leaves layers that are offloaded dense: use FSDP2",
    ("device_map", "8-bit"): "bitsandbytes leaves layers that are offloaded dense: use FSDP2 and 4 bits",
}


def refusal(back_end: str, quantisation: str, algorithm: str) -> str | None:
    """Why a combination cannot work, with what can; None if it works."""
    whole = _WHOLE.get((back_end, quantisation))
    return whole or (_COARSE if (quantisation, algorithm) == ("bfloat16", "finite differences") else None)


def check_sharding(back_end: str, quantisation: str, algorithm: Any) -> None:
    """Raise `MetaPeftError` unless `algorithm` works on a base stored so and kept so. It needs no model.

    Args:
        back_end: a key of `BACK_ENDS`.
        quantisation: one of `QUANTISATIONS`.
        algorithm: an algorithm object, such as `MAML(...)`.
    """
    reason = refusal(back_end, quantisation, kind_of(algorithm))
    if reason:
        raise MetaPeftError(
            f"{BACK_ENDS[back_end]} with a base in {quantisation} and {kind_of(algorithm)} is refused: {reason}."
        )


def kind_of(algorithm: Any) -> str:
    """Which of `ALGORITHMS` an algorithm object is."""
    if getattr(algorithm, "memory", None) == "finite_differences" and getattr(algorithm, "differentiated_steps", 1):
        return "finite differences"
    if hasattr(algorithm, "solver"):
        return "implicit"
    return "second order" if algorithm.second_order else "first order"


def markdown() -> str:
    """The table as the documentation shows it."""
    lines = [f"| back end | base | {' | '.join(ALGORITHMS)} |", f"| --- | --- |{' --- |' * len(ALGORITHMS)}"]
    for back_end, title in BACK_ENDS.items():
        for quantisation in QUANTISATIONS:
            reasons = [refusal(back_end, quantisation, algorithm) for algorithm in ALGORITHMS]
            cells = [f"refused ({reason})" if reason else "works (tested)" for reason in reasons]
            lines.append(f"| {title} | {quantisation} | {' | '.join(cells)} |")
    return "\n".join(lines)
