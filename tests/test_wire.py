"""What is said to servers and what they answer, read strictly."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stnp
from inline_snapshot import snapshot

from reembed.transforms.embedders.wire import (
    BadAnswer,
    path_of,
    read_answer,
    read_code,
    read_complaint,
    read_window,
    request_body,
)

matrices = stnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 6)),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)


def openai(vectors: Any, *, packed: bool = False, order: list[int] | None = None) -> bytes:
    data = [
        {
            "index": at,
            "embedding": base64.b64encode(vector.astype("<f4").tobytes()).decode()
            if packed
            else vector.tolist(),
        }
        for at, vector in enumerate(vectors)
    ]
    data = [data[at] for at in order] if order else data
    return json.dumps({"model": "m", "data": data, "usage": {"prompt_tokens": 7}}).encode()


@given(st.data(), matrices, st.booleans())
def test_vectors_come_back_bit_for_bit_and_in_the_order_of_their_index(
    data: st.DataObject, vectors: Any, packed: bool
) -> None:
    order = data.draw(st.permutations(range(len(vectors))))

    answer = read_answer("openai", openai(vectors, packed=packed, order=order), len(vectors))

    assert [v.tobytes() for v in answer.vectors] == [v.tobytes() for v in vectors]
    assert (answer.model, answer.tokens) == ("m", 7)


@given(matrices)
def test_ollamas_vectors_come_back_bit_for_bit(vectors: Any) -> None:
    body = {"model": "m", "embeddings": vectors.tolist(), "prompt_eval_count": 3}

    answer = read_answer("ollama", json.dumps(body).encode(), len(vectors))

    assert [v.tobytes() for v in answer.vectors] == [v.tobytes() for v in vectors]
    assert (answer.model, answer.tokens) == ("m", 3)


@given(
    st.binary()
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(["data", "embeddings", "index", "embedding", "usage", "model"]),
                inner,
            )
        ),
    ).map(lambda value: json.dumps(value).encode()),
    st.sampled_from(["ollama", "openai"]),
)
def test_no_answer_brings_it_down_and_none_gives_another_number_of_vectors(
    content: bytes, backend: str
) -> None:
    try:
        answer = read_answer(backend, content, 2)
    except BadAnswer:
        return
    assert len(answer.vectors) == 2
    assert all(vector.ndim == 1 and vector.dtype == np.float32 for vector in answer.vectors)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ([], snapshot("it answered with 0 vectors for 2 texts")),
        ([{"index": 0, "embedding": [1]}], snapshot("it answered with 1 vectors for 2 texts")),
        (None, snapshot("it answered without a list of embeddings")),
        ([1, 2], snapshot("it answered without a list of embeddings")),
        (
            [{"index": 0, "embedding": [1]}, {"index": 0, "embedding": [1]}],
            snapshot("it answered with embeddings whose indexes don't fit the texts"),
        ),
        (
            [{"index": 1, "embedding": [1]}, {"index": 2, "embedding": [1]}],
            snapshot("it answered with embeddings whose indexes don't fit the texts"),
        ),
        (
            [{"index": True, "embedding": [1]}, {"index": 0, "embedding": [1]}],
            snapshot("it answered with embeddings of which some have no index"),
        ),
        (
            [{"index": 0, "embedding": "?"}, {"index": 1, "embedding": [1]}],
            snapshot("it answered with vectors that are no lists of numbers"),
        ),
        (
            [{"index": 0, "embedding": 5}, {"index": 1, "embedding": [1]}],
            snapshot("it answered with vectors that are no lists of numbers"),
        ),
    ],
)
def test_an_answer_that_is_not_for_just_these_texts_is_refused(data: Any, complaint: str) -> None:
    with pytest.raises(BadAnswer) as refused:
        read_answer("openai", json.dumps({"data": data}).encode(), 2)
    assert str(refused.value) == complaint


@pytest.mark.parametrize("number", [1e39, 10**400, float("nan"), float("-inf")])
def test_a_number_that_is_no_float32_is_found_by_its_place(number: float) -> None:
    body = {"embeddings": [[1.0, number], [1.0, 2.0]]}

    answer = read_answer("ollama", json.dumps(body).encode(), 2)

    assert not np.isfinite(answer.vectors[0]).all()
    assert answer.vectors[1].tolist() == [1.0, 2.0]


def test_a_count_of_tokens_that_is_none_is_left_out() -> None:
    none: list[Any] = [
        {},
        {"prompt_tokens": None},
        {"prompt_tokens": "3"},
        {"prompt_tokens": 0},
        [],
    ]
    for usage in none:
        body = {"data": [{"index": 0, "embedding": [1.0]}], "usage": usage}
        assert read_answer("openai", json.dumps(body).encode(), 1).tokens is None


def test_texts_are_sent_as_they_are() -> None:
    body = request_body("openai", "m", ['"quote"\n日本'], dimension=3, packed=True)

    assert json.loads(body) == {
        "model": "m",
        "input": ['"quote"\n日本'],
        "encoding_format": "base64",
        "dimensions": 3,
    }
    assert path_of("openai") == "/embeddings"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"error": "too long"}', "too long"),
        (b'{"error": {"message": "too long", "code": 1}}', "too long"),
        (b'[{"error": {"message": "too long"}}]', "too long"),
        (b'{"detail": "too long"}', "too long"),
        (b'{"message": "too long", "type": "x"}', "too long"),
        (b'{"error": {"type": "too_long"}}', "too_long"),
        (b'{"detail": [{"msg": "x"}]}', ""),
        (b"<html>", ""),
        (b"", ""),
        (b"[]", ""),
        (b"7", ""),
    ],
)
def test_a_complaint_is_found_in_the_shapes_that_servers_give_it(content: bytes, said: str) -> None:
    assert read_complaint(content) == said


@pytest.mark.parametrize(
    ("shown", "window"),
    [
        ({"model_info": {"bert.context_length": 512}}, 512),
        ({"model_info": {"bert.context_length": 512}, "parameters": "num_ctx   256"}, 256),
        ({"model_info": {"x.context_length": 2048}, "parameters": "num_ctx 8192\nstop x"}, 2048),
        ({"parameters": "num_ctx many"}, None),
        ({"model_info": {"general.name": "x"}}, None),
        ({}, None),
        ([], None),
    ],
)
def test_the_window_is_the_least_that_ollama_says(shown: Any, window: int | None) -> None:
    assert read_window(json.dumps(shown).encode()) == window


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b'{"error": {"code": 429, "message": "slow down"}}', 429),
        (b'{"error": {"code": "429"}}', None),
        (b'{"error": {"code": 200}}', None),
        (b'{"error": {"code": true}}', None),
        (b'{"error": "no"}', None),
        (b"[1]", None),
        (b"<html>", None),
    ],
)
def test_a_status_in_the_body_is_found(content: bytes, code: int | None) -> None:
    assert read_code(content) == code
