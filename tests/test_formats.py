"""Formats of a stored vector."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from reembed.transforms.stores.formats import FORMATS, NUMBERS, decode, encode, fitting_formats

numbers = st.floats(-1e4, 1e4, width=32)
vectors = arrays(np.float32, st.integers(1, 20), elements=numbers)
EXACT = [name for name in FORMATS if name != "f16le"]


@pytest.mark.parametrize("format", EXACT)
@given(vector=vectors)
def test_what_is_encoded_is_decoded_to_the_last_bit(format: str, vector: np.ndarray) -> None:
    assert decode(format, encode(format, vector.tobytes())).tobytes() == vector.tobytes()


@given(vector=vectors)
def test_half_precision_keeps_three_digits(vector: np.ndarray) -> None:
    found = decode("f16le", encode("f16le", vector.tobytes()))

    assert np.allclose(found, vector, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("format", "stored"),
    [
        ("f32le", b""),
        ("f32le", b"12345"),
        ("f64le", b"1234"),
        ("f16le", b"123"),
        ("json", b"{}"),
        ("json", b"[1, true]"),
        ("json", b'["1"]'),
        ("json", b"[]"),
        ("json", b"[1"),
        ("json", b"\xff"),
        ("npy", b"no file"),
        ("npy", encode("npy", np.ones(3, np.float32).tobytes())[:-1]),
    ],
)
def test_what_is_no_vector_is_refused(format: str, stored: bytes) -> None:
    with pytest.raises(ValueError):  # Whatever a library says; nobody reads it.
        decode(format, stored)


@pytest.mark.parametrize("format", FORMATS)
def test_the_format_of_a_models_vectors_is_told_from_all_others(format: str) -> None:
    rows = np.random.default_rng(0).standard_normal((20, 96)).astype("<f4")
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    sample = [encode(format, row.tobytes()) for row in rows]

    assert fitting_formats(sample) == [format]
    assert fitting_formats([*sample, b"odd"]) == [format]
    assert fitting_formats([]) == []


def test_json_is_the_shortest_that_is_read_as_the_same() -> None:
    stored = encode("json", np.array([0.1, -2, 1e-9], "<f4").tobytes())

    assert stored == b"[0.1,-2.0,1e-09]"


def test_every_format_of_numbers_has_a_type() -> None:
    assert set(NUMBERS) <= set(FORMATS)
