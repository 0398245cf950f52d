"""The values that flow."""

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inline_snapshot import snapshot

from reembed.transforms.rows import (
    Cause,
    KeyRange,
    Row,
    Saved,
    Skipped,
    Stored,
    Summary,
    contents_digest,
    former_skipped_digest,
    skipped_digest,
    text_digest,
    vector_digest,
)

counts = st.dictionaries(st.sampled_from(Cause), st.integers(1, 9), max_size=3)
numbers = st.integers(0, 1000)
summaries = st.builds(
    Summary,
    embedded=numbers,
    skipped=counts,
    replaced=numbers,
    kept=counts,
    remaining=numbers,
    in_old_space=numbers,
    changed=st.frozensets(st.integers(0, 5)),
)


@given(summaries, summaries, summaries)
def test_summaries_add_up_in_any_grouping_and_order(a: Summary, b: Summary, c: Summary) -> None:
    assert (a + b) + c == a + (b + c)
    assert a + b == b + a
    assert a + Summary() == a
    assert list((a + b).kept) == list((b + a).kept)


@given(summaries)
def test_a_summary_survives_json(summary: Summary) -> None:
    assert Summary.from_json(json.loads(json.dumps(summary.to_json()))) == summary


@given(summaries)
def test_the_total_is_every_row_once(summary: Summary) -> None:
    assert summary.total == summary.replaced + sum(summary.kept.values()) + summary.remaining


@pytest.mark.parametrize(
    ("after", "until", "says"),
    [
        ("b", "a", snapshot("a range must end above its start: 'b' >= 'a'")),
        ("a", "a", snapshot("a range must end above its start: 'a' >= 'a'")),
    ],
    ids=["backwards", "without room"],
)
def test_a_range_that_holds_no_key_is_refused(after: str, until: str, says: str) -> None:
    with pytest.raises(ValueError, match=">=") as refused:
        KeyRange(0, after, until)
    assert str(refused.value) == says


def test_a_negative_index_is_refused() -> None:
    with pytest.raises(ValueError, match="-1") as refused:
        KeyRange(-1, None, None)
    assert str(refused.value) == snapshot("a range's index can't be negative: -1")


@given(st.text(), st.text())
def test_keys_compare_as_their_bytes_do(a: str, b: str) -> None:
    # SQLite's BINARY collation compares UTF-8; Python compares code points. They agree.
    assert (a < b) == (a.encode() < b.encode())


def test_rows_skipped_by_rule_have_digests_apart_from_texts() -> None:
    skipped = Skipped("k", Cause.ENCRYPTED, "its content is encrypted")

    digest = skipped_digest(skipped, b"")
    assert digest != text_digest(skipped.reason.encode())
    assert digest != former_skipped_digest(skipped)
    assert len(digest) == len(text_digest(b"")) == 16


@given(st.lists(st.none() | st.binary(max_size=3)), st.lists(st.none() | st.binary(max_size=3)))
def test_contents_have_one_digest_if_they_are_the_same(
    one: list[bytes | None], other: list[bytes | None]
) -> None:
    assert (contents_digest(*one) == contents_digest(*other)) == (one == other)


stored = st.builds(
    Stored,
    st.one_of(st.none(), st.binary(max_size=3)),
    st.sampled_from(["", "dim=integer:31", "dim=integer:3132"]),
)


@given(stored, stored)
def test_rows_that_hold_the_same_have_one_digest_and_others_another(
    one: Stored, other: Stored
) -> None:
    assert (one.digest == other.digest) == (one == other)
    assert len(one.digest) == 16


def test_no_vector_an_empty_one_and_a_text_have_digests_apart() -> None:
    digests = [
        vector_digest(None),
        vector_digest(b""),
        text_digest(b""),
        skipped_digest(Skipped("k", Cause.ENCRYPTED, ""), b""),
        Stored(None, "").digest,
        Stored(b"", "").digest,
    ]

    assert len(set(digests)) == len(digests)


@given(st.binary(max_size=3), st.binary(max_size=3))
def test_vectors_have_one_digest_if_they_are_the_same(one: bytes, other: bytes) -> None:
    assert (vector_digest(one) == vector_digest(other)) == (one == other)


@pytest.mark.parametrize(
    "value",
    [
        KeyRange(3, "a", None, 7, 5),
        Skipped("k", Cause.REJECTED, "why", "notes"),
        Row("k", 1, "text", b"d" * 16, None, "notes", False, Stored(None, "")),
        Saved("k", b"d" * 16, b"w" * 16, b"o" * 16, True, Stored(b"v", "")),
        Summary(embedded=3, kept={Cause.REJECTED: 1}, changed=frozenset({2})),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_survive_pickling(value: object) -> None:
    assert pickle.loads(pickle.dumps(value)) == value


@pytest.mark.parametrize("cause", Cause)
def test_only_what_was_offered_to_the_model_can_fail(cause: Cause) -> None:
    assert cause.by_rule == (cause not in (Cause.REJECTED, Cause.BAD_VECTOR))
