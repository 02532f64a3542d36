"""Bootstrap intervals: how far a mean would move with other tasks of the same kind, and with other training seeds."""

from __future__ import annotations

import numpy as np


def interval(values: np.ndarray, *, seed: int = 0, resamples: int = 10_000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean (percentile method).

    Args:
        values: ``[T]``, one for each task; or ``[N, T]``, of N training seeds on the same tasks. Seeds and tasks are then
            both drawn anew, independently of each other (the pigeonhole bootstrap of Owen 2007, doi
            10.1214/07-AOAS122), which makes an interval rather too wide than too narrow (Owen and Eckles 2012, arXiv
            1106.2125).
        seed: of the draws.
        resamples: how many there are.
    """
    generator = np.random.default_rng(seed)
    if values.ndim == 2 and len(values) > 1:
        times = [generator.multinomial(n, np.full(n, 1 / n), resamples) / n for n in values.shape]
        means = np.einsum("rn,nt,rt->r", times[0], values, times[1], optimize=True)
    else:
        means = generator.choice(values.reshape(-1), (resamples, values.size)).mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
