"""How far two computations of the same tensors agree."""

from __future__ import annotations

import math
from typing import Any

from meta_peft.types import Params


def agreement(actual: Params, expected: Params) -> dict[str, Any]:
    """Relative error of all tensors together and of the worst one, and how many digits agree in that one.

    Errors are norms of differences over norms of what is expected, in float64.
    """
    if set(actual) != set(expected):
        missing = sorted(set(actual) ^ set(expected))
        raise ValueError(f"The results have different names, {missing[:2]} among {len(missing)}.")
    differences = {n: float((actual[n].double() - reference.double()).norm()) for n, reference in expected.items()}
    norms = {n: float(reference.double().norm()) for n, reference in expected.items()}
    errors = {n: _ratio(differences[n], norms[n]) for n in expected}
    worst = max(errors, key=lambda n: errors[n])
    return {
        "relative_error": _ratio(math.hypot(*differences.values()), math.hypot(*norms.values())),
        "worst_tensor_error": errors[worst],
        "worst_tensor": worst,
        "digits": digits(errors[worst]),
    }


def digits(relative_error: float) -> float:
    """Decimal digits that agree; 16 for no difference at all."""
    return round(min(16.0, max(0.0, -math.log10(relative_error))), 1) if relative_error > 0 else 16.0


def _ratio(difference: float, norm: float) -> float:
    if math.isnan(difference):
        return math.inf
    if norm == 0:
        return math.inf if difference else 0.0
    return difference / norm
