"""Formats of a stored vector, and how one is told from another.

Little- and big-endian IEEE 754 numbers one after the other, a JSON array of numbers, or NumPy's
own file format (https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html).
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUMBERS = {"f32le": "<f4", "f32be": ">f4", "f64le": "<f8", "f16le": "<f2"}
"""Formats that are numbers one after the other, by their NumPy type."""

FORMATS = (*NUMBERS, "json", "npy")

_LARGEST = 1e4
_SMALLEST = 1e-8


def encode(format: str, numbers: bytes) -> bytes:
    """Turn the little-endian float32 of a vector into what is stored, JSON as UTF-8.

    >>> encode("json", np.array([1, -0.5], "<f4").tobytes())
    b'[1.0,-0.5]'
    """
    vector: NDArray[np.float32] = np.frombuffer(numbers, "<f4")
    if format == "json":  # NumPy writes the shortest decimals that are read as the same float32.
        return f"[{','.join(vector.astype(str))}]".encode()
    if format == "npy":
        file = io.BytesIO()
        np.save(file, vector, allow_pickle=False)
        return file.getvalue()
    with np.errstate(over="ignore"):
        return vector.astype(NUMBERS[format]).tobytes()


def decode(format: str, stored: bytes) -> NDArray[np.float32]:
    """Turn what is stored into a vector of shape (dimension,).

    Raises ValueError for what is no vector in this format.
    """
    numbers = _numbers(format, stored)
    if not len(numbers):
        raise ValueError("it has no numbers")
    with np.errstate(over="ignore", invalid="ignore"):
        vector: NDArray[np.float32] = numbers.astype(np.float32)
    return vector


def _numbers(format: str, stored: bytes) -> NDArray[Any]:
    if format == "json":
        values = json.loads(stored)
        if not isinstance(values, list) or not all(type(one) in (int, float) for one in values):
            raise ValueError("it is no JSON array of numbers")
        return np.array(values, np.float64)
    if format == "npy":
        try:
            array = np.load(io.BytesIO(stored), allow_pickle=False)
        except (EOFError, OSError) as error:
            raise ValueError(f"it is no NumPy file ({error})") from None
        if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "fiu":
            raise ValueError("it is no NumPy array of numbers in one dimension")
        return array
    kind = np.dtype(NUMBERS[format])
    if len(stored) % kind.itemsize:
        raise ValueError(f"{len(stored)} bytes are not a multiple of {kind.itemsize}")
    return np.frombuffer(stored, kind)


def fitting_formats(sample: Sequence[bytes], formats: Sequence[str] = FORMATS) -> list[str]:
    """The formats in which most of some stored vectors make sense; none without any vector.

    A model's numbers are finite, not huge, and few of them as tiny as those that bytes in
    another order or width would be.

    >>> fitting_formats([np.array([0.1, -0.2], ">f4").tobytes()], ["f32le", "f32be"])
    ['f32be']
    """
    least = len(sample) / 2
    return [name for name in formats if sum(_makes_sense(name, one) for one in sample) > least]


def _makes_sense(format: str, stored: bytes) -> bool:
    try:
        sizes = np.abs(_numbers(format, stored))
    except ValueError:
        return False
    nonzero = sizes[sizes > 0]
    if not len(sizes) or not np.all(np.isfinite(sizes)) or np.any(sizes > _LARGEST):
        return False
    return not len(nonzero) or bool(np.mean(nonzero > _SMALLEST) > 0.5)
