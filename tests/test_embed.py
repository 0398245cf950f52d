"""Embedding: batches, halves, the single row."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inline_snapshot import snapshot

from reembed.transforms.embed import Embedded, embed_rows, embed_texts, find_problems
from reembed.transforms.embedders import Batch, Embedder
from reembed.transforms.embedders.fake import NOT_A_NUMBER, POISON, FakeEmbedder
from reembed.transforms.errors import EmbedderError, TextRejected
from reembed.transforms.known import KnownTexts
from reembed.transforms.rows import (
    Cause,
    KeyRange,
    RangeRows,
    Row,
    Skipped,
    StagedRow,
    Vectors,
    text_digest,
)

KEYS = KeyRange(0, None, None)


class Recorder(Embedder):
    """Embeds as another embedder does, and remembers each call."""

    def __init__(self, inner: Callable[[Sequence[str]], Vectors]) -> None:
        self.inner = inner
        self.calls: list[list[str]] = []

    def embed(self, texts: Sequence[str]) -> Vectors:
        self.calls.append(list(texts))
        return self.inner(texts)


def part(*texts: str, skipped: Skipped | None = None) -> RangeRows:
    rows = [Row(str(i), i, text, text_digest(text.encode())) for i, text in enumerate(texts)]
    if skipped is not None:
        rows.append(Row(skipped.key, len(rows), "", b"rule", skipped))
    return RangeRows(KEYS, 0, tuple(rows))


def plain_loop(rows: Sequence[Row], dimension: int) -> tuple[StagedRow, ...]:
    """The obvious way: one row at a time."""
    embedder = FakeEmbedder(dimension)
    result = []
    for row in rows:
        if row.skipped is not None:
            result.append(StagedRow(row.key, row.digest, None, row.skipped))
            continue
        try:
            vector = embedder.embed([row.text])[0]
        except TextRejected as error:
            skipped = Skipped(row.key, Cause.REJECTED, str(error))
            result.append(StagedRow(row.key, row.digest, None, skipped))
            continue
        if np.isnan(vector).any():
            skipped = Skipped(row.key, Cause.BAD_VECTOR, "the model gave a vector with NaN or inf")
            result.append(StagedRow(row.key, row.digest, None, skipped))
        else:
            result.append(StagedRow(row.key, row.digest, vector.tobytes()))
    return tuple(result)


some_texts = st.lists(
    st.one_of(
        st.text("ab", max_size=4), st.sampled_from([f"x {POISON}", f"{NOT_A_NUMBER} y", "same"])
    ),
    max_size=24,
)


@given(some_texts, st.integers(1, 9))
def test_batches_and_halves_give_what_a_plain_loop_gives(texts: list[str], batch: int) -> None:
    rows = part(*texts, skipped=Skipped("rule", Cause.ENCRYPTED, "its content is encrypted"))

    embedded = embed_rows(rows, FakeEmbedder(4), dimension=4, batch=batch)

    assert embedded.rows == plain_loop(rows.rows, 4)


@given(some_texts, st.integers(1, 9))
def test_no_call_holds_more_texts_than_the_batch(texts: list[str], batch: int) -> None:
    embedder = Recorder(FakeEmbedder(4).embed)

    embed_rows(part(*texts), embedder, dimension=4, batch=batch)

    assert all(len(call) <= batch for call in embedder.calls)
    assert {text for call in embedder.calls for text in call} == set(texts)


def test_equal_texts_are_embedded_once_and_like_lengths_together() -> None:
    embedder = Recorder(FakeEmbedder(4).embed)

    embed_rows(part("ccc", "a", "bb", "a", "ccc"), embedder, dimension=4, batch=2)

    assert embedder.calls == [["a", "bb"], ["ccc"]]


def test_rows_with_the_vector_of_an_equal_text_and_the_tokens_of_each_batch_are_counted() -> None:
    class Counting(FakeEmbedder):
        def embed_batch(self, texts: Sequence[str]) -> Batch:
            return Batch(self.embed(texts), sizes=(sum(map(len, texts)),))

    known = KnownTexts[Embedded](100)
    call = partial(embed_rows, embedder=Counting(4), dimension=4, batch=2, known=known)

    first = call(part("ccc", "a", "bb", "a", POISON))
    second = call(part("ccc", POISON, "dddd"))

    assert (first.sizes, first.cached) == ((3, 3), 1)
    assert (second.sizes, second.cached) == ((4,), 1)


def test_a_poisoned_text_costs_the_others_nothing() -> None:
    texts = [f"text {i}" for i in range(7)] + [POISON]

    results = embed_texts(texts, FakeEmbedder(4), 4).results

    assert [result.failed for result in results[:7]] == [None] * 7
    assert results[7] == Embedded(None, (Cause.REJECTED, f"the text holds {POISON}"))


def test_a_text_with_an_unusable_vector_is_tried_once_more_alone_and_no_other_is() -> None:
    embedder = Recorder(FakeEmbedder(4).embed)
    texts = ["a", NOT_A_NUMBER, "b", "c"]

    results = embed_texts(texts, embedder, 4).results

    assert embedder.calls == [texts, [NOT_A_NUMBER]]
    nan = (Cause.BAD_VECTOR, "the model gave a vector with NaN or inf")
    assert [result.failed for result in results] == [None, nan, None, None]


def test_a_text_whose_vector_is_sound_at_the_second_try_keeps_it() -> None:
    answers = [np.array([[np.nan, 0], [1, 0]], np.float32), np.array([[0, 1]], np.float32)]

    work = embed_texts(["a", "b"], Recorder(lambda texts: answers.pop(0)), 2)

    vectors = [np.frombuffer(result.vector or b"", dtype="<f4") for result in work.results]
    assert [vector.tolist() for vector in vectors] == [[0, 1], [1, 0]]


class Server(Embedder):
    """Takes so many texts at a time, and says so; counts a token a letter, and looks at three."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.calls: list[list[str]] = []
        self.learnt: list[int] = []

    def embed(self, texts: Sequence[str]) -> Vectors:
        return self.embed_batch(texts).vectors

    def embed_batch(self, texts: Sequence[str]) -> Batch:
        self.calls.append(list(texts))
        if len(texts) > self.most or POISON in texts:
            raise TextRejected("no", most=self.most if len(texts) > self.most else None)
        wrong = {at: "the server gave nothing" for at, text in enumerate(texts) if text == "odd"}
        vectors = np.ones((len(texts), 2), np.float32)
        vectors[list(wrong)] = np.nan
        cut = frozenset(at for at, text in enumerate(texts) if len(text) > 3)
        return Batch(vectors, tokens=sum(map(len, texts)), cut=cut, wrong=wrong)

    def fitting(self, texts: Sequence[str]) -> int:
        return min([len(texts), *self.learnt])

    def learn_limit(self, texts: int) -> None:
        self.learnt.append(texts)


def test_what_is_known_of_a_batch_is_kept_with_its_rows() -> None:
    embedded = embed_rows(part("a", "bbbb", "odd"), Server(9), dimension=2, batch=9)

    assert [row.cut for row in embedded.rows] == [False, True, False]
    assert embedded.rows[2].skipped == Skipped("2", Cause.BAD_VECTOR, "the server gave nothing")
    assert embedded.tokens == 8 + 3  # The odd one was asked for twice.


def test_as_many_texts_as_a_server_names_are_asked_for_from_then_on() -> None:
    server = Server(2)

    embedded = embed_rows(part(*"abcdefg"), server, dimension=2, batch=5)

    assert [len(call) for call in server.calls] == [5, 2, 2, 1, 2]
    assert server.learnt == [2]
    assert [row.skipped for row in embedded.rows] == [None] * 7


def test_no_limit_is_learnt_where_a_text_was_at_fault() -> None:
    server = Server(2)

    results = embed_texts(["a", POISON, "b"], server, 2).results

    assert [result.failed is None for result in results] == [True, False, True]
    assert server.learnt == []


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (
            lambda texts: np.zeros((len(texts) - 1, 2)),
            snapshot("the model gave vectors of shape (0, 2), not (1, 2)"),
        ),
        (
            lambda texts: np.ones((len(texts), 3)),
            snapshot("the model gave vectors of shape (1, 3), not (1, 2)"),
        ),
        (
            lambda texts: np.full((len(texts), 2), np.inf),
            snapshot("the model gave a vector with NaN or inf"),
        ),
        (lambda texts: np.zeros((len(texts), 2)), snapshot("the model gave a vector of zeros")),
    ],
    ids=["too few", "wrong length", "infinite", "zeros"],
)
def test_vectors_that_are_no_use_are_never_stored(
    wrong: Callable[[Sequence[str]], Vectors], reason: str
) -> None:
    rows = embed_rows(part("a", "bb"), Recorder(wrong), dimension=2, batch=9).rows

    assert [row.vector for row in rows] == [None, None]
    assert [row.skipped and row.skipped.cause for row in rows] == [Cause.BAD_VECTOR] * 2
    for row in rows:
        assert row.skipped and row.skipped.reason == reason


def test_an_embedder_that_is_down_ends_the_run_and_skips_no_row() -> None:
    def down(texts: Sequence[str]) -> Vectors:
        raise EmbedderError("it is down")

    with pytest.raises(EmbedderError, match=r"^it is down$"):  # What the test itself raises.
        embed_rows(part("a"), Recorder(down), dimension=2, batch=1)


def test_vectors_of_another_float_are_stored_as_float32() -> None:
    embedder = Recorder(lambda texts: np.ones((len(texts), 2), dtype=np.float64))

    (row,) = embed_rows(part("a"), embedder, dimension=2, batch=1).rows

    assert row.vector == np.ones(2, dtype="<f4").tobytes()


def test_a_row_that_fails_carries_its_namespace_and_never_its_text() -> None:
    row = Row("a", 1, f"secret {POISON}", b"digest", namespace="ops/runbooks")

    (staged,) = embed_rows(RangeRows(KEYS, 0, (row,)), FakeEmbedder(2), dimension=2, batch=1).rows

    assert staged.skipped == Skipped(
        "a", Cause.REJECTED, f"the text holds {POISON}", "ops/runbooks"
    )
    assert "secret" not in repr(staged)


def test_it_pauses_after_each_batch_where_that_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = Recorder(FakeEmbedder(2).embed)
    pauses: list[tuple[float, int]] = []
    monkeypatch.setattr(time, "sleep", lambda s: pauses.append((s, len(embedder.calls))))

    embed_rows(part("a", "bb", "ccc"), embedder, dimension=2, batch=2, pause=0.25)

    assert pauses == [(0.25, 1), (0.25, 2)]


def test_a_part_without_text_calls_nothing() -> None:
    embedder = Recorder(FakeEmbedder(2).embed)
    skipped = Skipped("a", Cause.ENCRYPTED, "its content is encrypted")

    embedded = embed_rows(part(skipped=skipped), embedder, dimension=2, batch=1)

    assert embedder.calls == []
    assert embedded.rows == (StagedRow("a", b"rule", None, skipped),)


def test_good_vectors_have_no_problem() -> None:
    assert find_problems(np.eye(3, dtype=np.float32), 3, 3) == ["", "", ""]


def test_a_vector_that_verify_takes_for_zeros_is_no_vector() -> None:
    from reembed.transforms.embed import find_problems
    from reembed.transforms.verify import find_fault

    for size in (1e-30, 1e-22, 1e-19, 1.0, 1e30):
        vector = np.array([size, -size], np.float32)
        fault = find_fault(
            vector.tobytes(),
            decode=lambda raw: np.frombuffer(raw, "<f4"),
            dimension=2,
            normalized=False,
        )
        [problem] = find_problems(vector[None], 1, 2)
        assert bool(problem) == (fault == "zeros") == (size < 1e-22)
