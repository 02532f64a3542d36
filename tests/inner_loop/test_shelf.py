from __future__ import annotations

import gc
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from derivatives import randn
from surface import run_python
from tiny_models import assert_equal

from meta_peft.inner_loop.shelf import Shelf

TENSORS = {
    "float64": torch.tensor([[1 / 3, -0.0], [float("inf"), 5e-324]], dtype=torch.float64),
    "float32": torch.tensor([1 / 3, -0.0, float("-inf")], dtype=torch.float32),
    "not a number": torch.tensor([float("nan")]),
    "transposed": randn(3, 2, grad=False).T,
    "expanded": randn(1, 2, grad=False).expand(4, 2),
    "a number": torch.tensor(2.5),
    "nothing": torch.zeros(0, 3),
    "with a graph": randn(2) * 2,
}


def open_files() -> set[str]:
    """What this process has open in the folder for temporary files."""
    folder, links = os.path.realpath(tempfile.gettempdir()), [f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd")]
    named = {os.readlink(link) for link in links if os.path.islink(link)}
    return {name for name in named if name.startswith(folder)}


def test_tensors_come_back_bit_for_bit():
    shelf = Shelf()
    found = shelf.put(TENSORS)()
    assert list(found) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert found[name].numpy().tobytes() == tensor.detach().contiguous().numpy().tobytes()
        assert not found[name].requires_grad


def test_many_in_any_order_and_more_than_once():
    shelf = Shelf()
    stored = [{"a": randn(5, seed=i, grad=False), "b": randn(i + 1, seed=i, grad=False)} for i in range(6)]
    places = [shelf.put(tensors) for tensors in stored]
    for i in (5, 0, 3, 3, 1, 5):
        assert_equal(places[i](), stored[i], 0)
    later = shelf.put({"a": torch.ones(2)})
    assert_equal(places[2](), stored[2], 0)
    assert_equal(later(), {"a": torch.ones(2)}, 0)


def test_nothing_is_stored_of_an_empty_dict():
    shelf = Shelf()
    assert shelf.put({})() == {}
    assert shelf._file is None


def test_what_is_changed_later_comes_back_as_it_was():
    shelf, tensor = Shelf(), torch.ones(3)
    get = shelf.put({"a": tensor})
    tensor.zero_()
    get()["a"].mul_(5)
    assert get()["a"].tolist() == [1, 1, 1]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system does not list open files")
def test_the_file_has_no_name_and_is_gone_with_the_shelf():
    gc.collect()
    before, files = set(os.listdir(tempfile.gettempdir())), open_files()
    shelf = Shelf()
    get = shelf.put({"a": torch.ones(1000)})
    assert len(open_files() - files) == 1
    assert set(os.listdir(tempfile.gettempdir())) - before == set()
    del shelf
    gc.collect()
    assert open_files() == files
    with pytest.raises(ValueError, match="closed file"):
        get()


NO_FOLDER_THEN_A_FULL_DISK = """
import resource
import tempfile

import torch

from meta_peft.inner_loop.shelf import Shelf

folder, tempfile.tempdir = tempfile.gettempdir(), "/nowhere/at/all"
shelf = Shelf()
assert shelf.put({"a": torch.ones(2)})()["a"].tolist() == [1, 1]
assert shelf._file is None

# The size of files is limited to 5000 bytes, which a write then finds out as it would on a full disk.
tempfile.tempdir = folder
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
for size in (300, 700, 70_000):  # four tensors fit, or one, or not even the whole of one
    shelf = Shelf()
    stored = [torch.full((size,), float(i)) for i in range(6)]
    places = [shelf.put({"a": tensor}) for tensor in stored]
    for tensor in stored:
        tensor.add_(100)  # what stayed in memory is a copy
    for i, get in enumerate(places):
        assert torch.equal(get()["a"], torch.full((size,), float(i))), (size, i)
    print(shelf._file.seek(0, 2))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of resources")
def test_what_finds_no_place_on_a_disk_stays_in_memory():
    assert run_python(NO_FOLDER_THEN_A_FULL_DISK).split() == ["5000"] * 3
