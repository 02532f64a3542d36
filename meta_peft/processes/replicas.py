"""Every process has weights of its own, which stay the same only as long as all make the same updates."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from meta_peft.errors import MetaPeftError
from meta_peft.processes import group

logger = logging.getLogger("meta_peft")


@torch.no_grad()
def same_everywhere(parameters: Sequence[Tensor]) -> None:
    """Give every process the values of process 0. They differ if LoRA did not start from the same seed."""
    if group.count() == 1:
        return
    if len(set(_digests(parameters))) > 1:
        logger.warning("The processes start with different weights; all go on with those of process 0.")
    for parameter in parameters:
        parameter.copy_(group.from_first(parameter))


def check_replicas(parameters: Sequence[Tensor]) -> None:
    """Raise `MetaPeftError` unless all processes have the same weights, to the last bit."""
    digests = _digests(parameters)
    if len(set(digests)) > 1:
        others = [i for i, digest in enumerate(digests) if digest != digests[0]]
        raise MetaPeftError(
            f"The processes no longer have the same weights: {others} differ from 0. Something changes the adapter or its"
            " gradients in one process alone, such as a callback."
        )


def _digests(parameters: Sequence[Tensor]) -> list[str]:
    digest = hashlib.sha256()
    for parameter in parameters:
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return group.gathered_objects(digest.hexdigest())
