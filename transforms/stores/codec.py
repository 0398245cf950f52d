"""Vectors as ai-memory stores them.

A vector of n numbers is the byte 0x01 followed by n little-endian IEEE 754 float32: 1 + 4n
bytes. Older rows lack the first byte: 4n bytes. 0x02 in front would mean big-endian.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_LITTLE_ENDIAN = b"\x01"
_BIG_ENDIAN = 0x02
_FLOAT_BYTES = 4


def encode(vector: NDArray[np.floating]) -> bytes:
    """Turn a vector of shape (dimension,) into a BLOB.

    >>> encode(np.array([1.0, -2.0], dtype=np.float32)).hex(" ", 4)
    '01 0000803f 000000c0'
    """
    return with_header(vector.astype("<f4").tobytes())


def with_header(numbers: bytes) -> bytes:
    """Turn the little-endian float32 of a vector into a BLOB."""
    return _LITTLE_ENDIAN + numbers


def decode(blob: bytes) -> NDArray[np.float32]:
    """Turn a BLOB into a vector of shape (dimension,).

    Raises ValueError for a big-endian vector, another first byte or any other length.
    """
    extra = len(blob) % _FLOAT_BYTES
    if not blob or extra > 1:
        raise ValueError(f"a vector can't be {len(blob)} bytes long: not 4n, nor 1 + 4n")
    if extra == 1 and blob[0] == _BIG_ENDIAN:
        raise ValueError("a big-endian vector (first byte 0x02) can't be read")
    if extra == 1 and blob[:1] != _LITTLE_ENDIAN:
        raise ValueError(f"a vector can't start with the byte 0x{blob[0]:02x}")
    return np.frombuffer(blob, dtype="<f4", offset=extra).astype(np.float32)
