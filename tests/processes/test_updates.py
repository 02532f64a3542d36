"""The update does not depend on how many processes make it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from processes.launching import launch
from processes.updates import CHOOSING, EACH, FLOAT32, FLOAT64, IN_ORDER, OF_FOUR
from safetensors.torch import load_file
from surface import bits

pytestmark = pytest.mark.launch
SCRIPT = Path(__file__).with_name("updates.py")
TOLERANCE = {FLOAT32: 1e-6, FLOAT64: 1e-12}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same runs in 1, 2 and 4 processes."""
    folder = tmp_path_factory.mktemp("processes")
    launch(SCRIPT, folder)
    return {processes: folder / str(processes) for processes in (1, 2, 4)}


def runs(names: Iterable[str]) -> list[tuple[int, str]]:
    return [(processes, name) for name in names for processes in (2, 4) if processes == 2 or name in OF_FOUR]


@pytest.mark.parametrize(("processes", "name"), runs(name for name in EACH if not name.startswith("in order")))
def test_the_update_is_that_of_one_process(folders: dict[int, Path], processes: int, name: str):
    alone, together = (load_file(folders[n] / f"{name}.safetensors") for n in (1, processes))
    assert alone.keys() == together.keys()
    for key, expected in alone.items():
        error = (together[key] - expected).abs().max() / expected.abs().max().clamp_min(1e-3)
        bound = 1e-4 if key == "losses" else TOLERANCE[name.partition(" ")[0]]  # the log has four digits
        assert error <= bound, (key, float(error))


@pytest.mark.parametrize(("processes", "name"), runs(f"in order {name}" for name in IN_ORDER))
def test_in_order_it_is_the_same_to_the_last_bit(folders: dict[int, Path], processes: int, name: str):
    alone, together = (load_file(folders[n] / f"{name}.safetensors") for n in (1, processes))
    assert bits(together) == bits(alone)
    plain = load_file(folders[1] / f"{name.replace('in order', FLOAT32)}.safetensors")
    for key, expected in plain.items():
        torch.testing.assert_close(alone[key], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("processes", "name"), runs(f"in order {name}" for name in CHOOSING))
def test_tasks_are_chosen_alike_in_any_number_of_processes(folders: dict[int, Path], processes: int, name: str):
    alone, together = (load_file(folders[n] / f"{name}.safetensors") for n in (1, processes))
    assert bits(together) == bits(alone)
    assert bits(alone) != bits(load_file(folders[1] / "in order maml.safetensors"))
