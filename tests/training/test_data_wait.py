from __future__ import annotations

import time

from meta_peft.training.data_wait import DataWait


def test_the_share_of_time_that_is_waited():
    """Against the clock around it; asked again, it begins anew."""
    began = time.perf_counter()
    wait = DataWait()
    for _ in range(2):
        with wait.waiting():
            time.sleep(0.02)
        time.sleep(0.02)
    share, whole = wait.share(), time.perf_counter() - began
    assert 0.04 / whole <= share < 1
    assert wait.share() == 0
    with wait.waiting():
        time.sleep(0.01)
    assert wait.share() > 0.9
