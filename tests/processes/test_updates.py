"""The update does not depend on how many processes make it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes.launching import launch
from processes.updates import CHOOSING, IN_ORDER, RUNS
from safetensors.torch import load_file
from surface import bits

pytestmark = pytest.mark.launch
SCRIPT = Path(__file__).with_name("updates.py")
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same runs in 1, 2 and 4 processes."""
    found = {}
    for processes in (1, 2, 4):
        found[processes] = tmp_path_factory.mktemp(f"processes{processes}")
        done = launch(processes, SCRIPT, str(found[processes]))
        assert done.returncode == 0, done.stderr[-3000:]
    return found


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", RUNS)
def test_the_update_is_that_of_one_process(folders: dict[int, Path], processes: int, dtype: torch.dtype, name: str):
    alone, together = (load_file(folders[n] / f"{dtype} {name}.safetensors") for n in (1, processes))
    assert alone.keys() == together.keys()
    for key, expected in alone.items():
        error = (together[key] - expected).abs().max() / expected.abs().max().clamp_min(1e-3)
        bound = 1e-4 if key == "losses" else TOLERANCE[dtype]  # the log has four digits
        assert error <= bound, (key, float(error))


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name", IN_ORDER)
def test_in_order_it_is_the_same_to_the_last_bit(folders: dict[int, Path], processes: int, name: str):
    alone, together = (load_file(folders[n] / f"in order {name}.safetensors") for n in (1, processes))
    assert bits(together) == bits(alone)
    plain = load_file(folders[1] / f"{torch.float32} {name}.safetensors")
    for key, expected in plain.items():
        torch.testing.assert_close(alone[key], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name", CHOOSING)
def test_tasks_are_chosen_alike_in_any_number_of_processes(folders: dict[int, Path], processes: int, name: str):
    alone, together = (load_file(folders[n] / f"in order {name}.safetensors") for n in (1, processes))
    assert bits(together) == bits(alone)
    assert bits(alone) != bits(load_file(folders[1] / "in order maml.safetensors"))
