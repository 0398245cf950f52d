"""The vector codec against a second decoder, made of `struct`."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inline_snapshot import snapshot

from reembed.transforms.stores.codec import decode, encode

floats = st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50)


@given(floats)
def test_a_second_decoder_reads_what_was_encoded(numbers: list[float]) -> None:
    blob = encode(np.array(numbers, dtype=np.float32))

    assert blob[0] == 1
    assert list(struct.unpack(f"<{len(numbers)}f", blob[1:])) == numbers


@given(floats)
def test_a_vector_survives_encoding(numbers: list[float]) -> None:
    vector = np.array(numbers, dtype=np.float32)

    assert decode(encode(vector)).tobytes() == vector.tobytes()


@given(floats)
def test_a_bare_vector_of_older_rows_is_read(numbers: list[float]) -> None:
    assert decode(struct.pack(f"<{len(numbers)}f", *numbers)).tolist() == numbers


@given(floats)
def test_a_big_endian_array_is_encoded_little_endian(numbers: list[float]) -> None:
    vector = np.array(numbers, dtype=">f4")

    assert encode(vector) == b"\x01" + struct.pack(f"<{len(numbers)}f", *numbers)


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"", snapshot("a vector can't be 0 bytes long: not 4n, nor 1 + 4n")),
        (b"\x01\x00\x00", snapshot("a vector can't be 3 bytes long: not 4n, nor 1 + 4n")),
        (b"\x02\x00\x00\x00\x00", snapshot("a big-endian vector (first byte 0x02) can't be read")),
        (b"\x07\x00\x00\x00\x00", snapshot("a vector can't start with the byte 0x07")),
    ],
)
def test_what_is_no_vector_is_named(blob: bytes, message: str) -> None:
    with pytest.raises(ValueError) as refused:
        decode(blob)
    assert str(refused.value) == message
