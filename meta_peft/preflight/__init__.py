"""What would be silently wrong is refused here, or switched off with one line in the log that says so.

Every check names what was expected, what came and what to do. `tests/preflight` has a test for each.
"""

from meta_peft.preflight.base import check_autocast, check_differences, other_quantisation
from meta_peft.preflight.layers import check_in_use, check_still_there
from meta_peft.preflight.model import check_bare, check_learned_is_active, check_model

__all__ = [
    "check_autocast",
    "check_bare",
    "check_differences",
    "check_in_use",
    "check_learned_is_active",
    "check_model",
    "check_still_there",
    "other_quantisation",
]
