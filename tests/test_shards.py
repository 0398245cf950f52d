"""Shards: the staged vectors of a part of a range."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inline_snapshot import snapshot

from reembed.transforms.errors import StagingError
from reembed.transforms.rows import Cause, KeyRange, RangeVectors, Skipped, StagedRange, StagedRow
from reembed.transforms.staging.shards import list_shards, read_shards, read_tokens, write_shard
from tests.wording import wording

KEYS = KeyRange(7, "a", "b")
VECTOR = np.array([1.5, -2.0], dtype="<f4").tobytes()
ROWS = (
    StagedRow("k1", b"d" * 16, VECTOR),
    StagedRow("k2", b"e" * 16, None, Skipped("k2", Cause.REJECTED, "why", "notes")),
)

entries = st.lists(
    st.builds(
        lambda key, digest, numbers, cause, namespace, cut: StagedRow(
            key,
            digest,
            None if cause else np.array(numbers, dtype="<f4").tobytes(),
            Skipped(key, cause, f"reason {key}", namespace) if cause else None,
            cut,
        ),
        st.text(st.characters(exclude_categories=["Cs"])),
        st.binary(min_size=16, max_size=16),
        st.tuples(st.floats(width=32), st.floats(width=32)),
        st.one_of(st.none(), st.sampled_from(Cause)),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
        st.booleans(),
    ),
    max_size=12,
)


def read(directory: Path, index: int, *, with_vectors: bool = True) -> list[StagedRow]:
    return list(read_shards(list_shards(directory)[index], with_vectors=with_vectors))


@settings(max_examples=20)
@given(entries)
def test_a_shard_gives_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[StagedRow]
) -> None:
    directory = tmp_path_factory.mktemp("shards")

    staged = write_shard(directory, RangeVectors(KEYS, 2, 2, tuple(rows)), pass_number=1)

    skipped = sum(row.skipped is not None for row in rows)
    stem = f"0000007.0001.002.{len(rows):05d}."
    assert staged == StagedRange(KEYS, staged.shard, len(rows) - skipped, skipped)
    assert staged.shard.startswith(stem)
    assert read(directory, 7) == rows
    without = [StagedRow(row.key, row.digest, None, row.skipped, row.cut) for row in rows]
    assert read(directory, 7, with_vectors=False) == without


def test_a_shard_is_parquet_that_others_can_read(tmp_path: Path) -> None:
    staged = write_shard(tmp_path, RangeVectors(KEYS, 0, 2, ROWS), pass_number=1)
    table = pq.read_table(tmp_path / staged.shard)

    assert table.schema.names == [
        "key",
        "digest",
        "vector",
        "cause",
        "reason",
        "namespace",
        "cut",
    ]
    first, second = table.to_pylist()
    assert np.frombuffer(first["vector"], "<f4").tolist() == [1.5, -2.0]
    assert first["cause"] is None
    assert (second["vector"], second["cause"], second["reason"], second["namespace"]) == (
        None,
        "rejected by the model",
        "why",
        "notes",
    )


def test_a_shards_name_says_what_it_is(tmp_path: Path) -> None:
    keys = KeyRange(1_234_567, None, None)
    staged = write_shard(tmp_path, RangeVectors(keys, 3, 2, ROWS), pass_number=12)

    (shard,) = list_shards(tmp_path)[1_234_567]

    assert (shard.path, shard.range, shard.pass_number, shard.part, shard.rows) == (
        tmp_path / staged.shard,
        1_234_567,
        12,
        3,
        2,
    )


def test_shards_know_the_tokens_that_they_took(tmp_path: Path) -> None:
    for part, tokens in ((0, 12), (1, 0), (2, 3)):
        vectors = RangeVectors(KEYS, part, 2, ROWS, tokens)
        write_shard(tmp_path, vectors, pass_number=1)

    assert read_tokens(list_shards(tmp_path)[7]) == 15


def test_a_shard_that_is_written_twice_is_there_once(tmp_path: Path) -> None:
    staged = {
        write_shard(tmp_path, RangeVectors(KEYS, 0, 2, ROWS), pass_number=1) for _ in range(2)
    }

    assert [path.name for path in tmp_path.iterdir()] == [one.shard for one in staged]


def test_other_vectors_of_a_second_try_stand_beside_the_first_ones(tmp_path: Path) -> None:
    for number in (1.0, 2.0):
        row = StagedRow("k", b"d" * 16, np.array([number, 0], dtype="<f4").tobytes())
        write_shard(tmp_path, RangeVectors(KEYS, 0, 2, (row,)), pass_number=1)

    vectors = [row.vector for row in read(tmp_path, 7)]
    assert sorted(np.frombuffer(v or b"", "<f4")[0] for v in vectors) == [1.0, 2.0]


def test_later_passes_are_read_after_earlier_ones(tmp_path: Path) -> None:
    for pass_number, part in ((10, 0), (2, 0), (1, 1), (1, 0)):
        row = StagedRow(f"{pass_number}.{part}", b"d" * 16, VECTOR)
        write_shard(tmp_path, RangeVectors(KEYS, part, 2, (row,)), pass_number=pass_number)

    assert [row.key for row in read(tmp_path, 7)] == ["1.0", "1.1", "2.0", "10.0"]


def test_shards_are_listed_by_range(tmp_path: Path) -> None:
    for index in (0, 12):
        write_shard(tmp_path, RangeVectors(KeyRange(index, None, None), 0, 2, ROWS), pass_number=1)

    assert set(list_shards(tmp_path)) == {0, 12}
    assert set(list_shards(tmp_path, index=12)) == {12}
    assert list_shards(tmp_path, index=3) == {}
    assert read(tmp_path, 12) == list(ROWS)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    staged = write_shard(tmp_path, RangeVectors(KEYS, 0, 2, ROWS), pass_number=1)
    path = tmp_path / staged.shard
    path.write_bytes(path.read_bytes()[:-9])

    with pytest.raises(StagingError) as refused:
        read(tmp_path, 7)
    assert wording(refused, tmp_path).replace(staged.shard, "SHARD") == snapshot(
        "TMP/SHARD is damaged: its bytes are not those that were written; run reembed again, "
        "which looks through all files of the run first"
    )
