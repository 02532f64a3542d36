"""What goes wrong in one process ends all of them, with the reason, and soon."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from processes.launching import launch
from processes.trouble import TIMEOUT

pytestmark = pytest.mark.launch
SCRIPT = Path(__file__).with_name("trouble.py")
FROZEN, KILLED, STOPPED = None, -9, 128 + 15
# How process 0 and process 1 end, what they say, and the checkpoints that are there.
EXPECTED: dict[str, tuple[int, int | None, str, str, list[int]]] = {
    "unreadable": (2, 1, "another one failed: process 1: TypeError", "TypeError: 'NoneType' object", []),
    "out_of_memory": (2, 2, "process 1: MetaPeftError: Memory ran out", "Memory ran out with a single task", []),
    "frozen": (1, FROZEN, "Timed out waiting", "", [1]),
    "dead": (1, KILLED, "RuntimeError", "", [1]),
    "callback": (1, 1, "RuntimeError", "RuntimeError: a callback broke", [1]),
    "drifting": (2, 2, "no longer have the same weights: [1] differ", "no longer have the same weights", [1]),
    "alone_not_finite": (2, 2, "Outer step 1 changes nothing", "of 2 outer steps in a row were not finite", [1, 2]),
    "asked_to_stop": (STOPPED, STOPPED, "", "", [1, 2, 3]),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return json.loads(launch(SCRIPT, tmp_path_factory.mktemp("trouble")))


@pytest.mark.parametrize("trouble", EXPECTED)
def test_both_end(found: dict[str, dict[str, Any]], trouble: str):
    first, second, said, said_by_1, checkpoints = EXPECTED[trouble]
    outcome = found[trouble]
    assert outcome["codes"].get("0") == first, outcome["said"]
    assert outcome["codes"].get("1") == second, outcome["said"]
    assert said in outcome["said"][0]
    assert said_by_1 in outcome["said"][1]
    assert outcome["checkpoints"] == checkpoints
    assert outcome["seconds"] < TIMEOUT + 25, "on a busy machine; most of it is the start"


def test_the_task_that_is_not_finite_is_named_for_all(found: dict[str, dict[str, Any]]):
    said = found["alone_not_finite"]["said"][0]
    assert "its gradient is not finite: task 'say " in said
    assert "its loss at inner step 1 (nan)" in said
