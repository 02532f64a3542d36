"""The binary format that CTranslate2 keeps a model's variables in, read without the library."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meta_peft.errors import MetaPeftError

DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
VERSION = 6


def read_variables(path: Path) -> dict[str, NDArray[np.generic]]:
    """Arrays by name.

    The file is: version, name of the architecture, its revision, number of variables; for each its name, number of
    dimensions (a byte), dimensions, type (a byte), number of bytes and values. Numbers have 32 bits and names end with a
    zero byte that their length, of 16 bits, counts; all is little-endian. Other names of variables follow, which are
    left out here.
    """
    data, at = path.read_bytes(), 0

    def number(kind: str) -> int:
        nonlocal at
        value: int = struct.unpack_from(f"<{kind}", data, at)[0]
        at += struct.calcsize(kind)
        return value

    def name() -> str:
        nonlocal at
        length = number("H")
        at += length
        return data[at - length : at - 1].decode()

    if (version := number("I")) != VERSION:
        raise MetaPeftError(f"{path} has version {version} of CTranslate2's format, expected {VERSION}.")
    name()
    number("I")
    variables = {}
    for _ in range(number("I")):
        key = name()
        shape = [number("I") for _ in range(number("B"))]
        dtype = np.dtype(DTYPES[number("B")])
        size = number("I")
        variables[key] = np.frombuffer(data, dtype, size // dtype.itemsize, at).reshape(shape)
        at += size
    return variables
