"""Rows that are left for workers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inline_snapshot import snapshot

from reembed.transforms.errors import StagingError
from reembed.transforms.rows import Cause, KeyRange, RangeRows, Row, Skipped, text_digest
from reembed.transforms.staging import decode_input, encode_input
from tests.wording import wording

KEYS = KeyRange(7, None, None)

texts = st.builds(
    lambda key, text, space: Row(key, 0, text, text_digest(text.encode()), None, space),
    st.text(),
    st.text(),
    st.text(),
)
skips = st.builds(
    lambda key, cause, reason, space: Row(
        key, 0, "", b"\1" * 16, Skipped(key, cause, reason, space), space
    ),
    st.text(),
    st.sampled_from(Cause),
    st.text(),
    st.text(),
)


@given(st.lists(texts | skips, max_size=8), st.integers(0, 2_000))
def test_what_is_left_is_what_is_read(rows: list[Row], part: int) -> None:
    left = RangeRows(KEYS, part, tuple(rows))

    directory = "gs://a.bucket/x.y/inputs-0af1-0001"
    name, content = encode_input(directory, left)

    assert name.startswith(f"0000007.{part:03d}.{len(rows):05d}.")
    assert decode_input(f"{directory}/{name}", content, KEYS) == left


def said(error: pytest.ExceptionInfo[BaseException], tmp_path: Path) -> str:
    """The words of an error, without the digest in the name of a file."""
    return re.sub(r"\.[0-9a-f]{16}\.parquet", ".DIGEST.parquet", wording(error, tmp_path))


def test_a_file_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    row = Row("a", 0, "a text", text_digest(b"a text"))
    name, content = encode_input("run/inputs-1-1", RangeRows(KEYS, 0, (row,)))

    with pytest.raises(StagingError) as refused:
        decode_input(f"run/inputs-1-1/{name}", content[:-1], KEYS)
    assert said(refused, tmp_path) == snapshot(
        "run/inputs-1-1/0000007.000.00001.DIGEST.parquet is damaged: its bytes are not those that "
        "were written; run reembed again, which looks through all files of the run first"
    )


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (
            "other/inputs-1-1",
            snapshot(
                "other/inputs-1-1/0000007.000.00001.DIGEST.parquet belongs to another run or has "
                "been renamed, so it is not used; run reembed again, which looks through all "
                "files of the run first"
            ),
        ),
        (
            "run/shards",
            snapshot(
                "run/shards/0000007.000.00001.DIGEST.parquet belongs to another run or has been "
                "renamed, so it is not used; run reembed again, which looks through all files of "
                "the run first"
            ),
        ),
        (
            "run/inputs-1-1/0000008",
            snapshot(
                "run/inputs-1-1/0000008.000.00001.DIGEST.parquet belongs to another run or has "
                "been renamed, so it is not used; run reembed again, which looks through all "
                "files of the run first"
            ),
        ),
    ],
)
def test_a_file_of_another_run_directory_or_range_is_refused(
    place: str, expected: str, tmp_path: Path
) -> None:
    row = Row("a", 0, "a text", text_digest(b"a text"))
    name, content = encode_input("run/inputs-1-1", RangeRows(KEYS, 0, (row,)))
    moved = f"{place}{name.removeprefix('0000007')}" if "0000008" in place else f"{place}/{name}"

    with pytest.raises(StagingError) as refused:
        decode_input(moved, content, KEYS)
    assert said(refused, tmp_path) == expected
