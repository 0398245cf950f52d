"""The run directory."""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import files
from transforms.errors import StagingError
from transforms.rows import Cause, KeyRange, RangeVectors, Skipped, StagedRange, StagedRow
from transforms.staging import RunDirectory, begin_run, plan_run, read_shards, staging_root

KEYS = KeyRange(7, "a", "b")
VECTOR = np.array([1.5, -2.0], dtype="<f4").tobytes()
ROWS = (
    StagedRow("k1", b"d" * 16, VECTOR),
    StagedRow("k2", b"e" * 16, None, Skipped("k2", Cause.REJECTED, "why")),
)

entries = st.lists(
    st.builds(
        lambda key, digest, numbers, cause: StagedRow(
            key,
            digest,
            None if cause else np.array(numbers, dtype="<f4").tobytes(),
            Skipped(key, cause, f"reason {key}") if cause else None,
        ),
        st.text(st.characters(exclude_categories=["Cs"])),
        st.binary(min_size=16, max_size=16),
        st.tuples(st.floats(width=32), st.floats(width=32)),
        st.one_of(st.none(), st.sampled_from(Cause)),
    ),
    max_size=12,
)


@given(entries)
def test_a_shard_gives_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[StagedRow]
) -> None:
    run = RunDirectory(tmp_path_factory.mktemp("run"))
    run.shards.mkdir()

    staged = run.write_shard(RangeVectors(KEYS, 2, 2, tuple(rows)), pass_number=1)

    skipped = sum(row.skipped is not None for row in rows)
    assert staged == StagedRange(KEYS, "0000007.1.002.parquet", len(rows) - skipped, skipped)
    assert read(run, 7) == rows
    without = [StagedRow(row.key, row.digest, None, row.skipped) for row in rows]
    assert read(run, 7, with_vectors=False) == without


def read(run: RunDirectory, index: int, *, with_vectors: bool = True) -> list[StagedRow]:
    return list(read_shards(run.list_shards()[index], with_vectors=with_vectors))


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return plan_run(tmp_path / "m.db")


def test_a_shard_is_parquet_that_others_can_read(run: RunDirectory) -> None:
    with begin_run(run):
        staged = run.write_shard(RangeVectors(KEYS, 0, 2, ROWS), pass_number=1)
        table = pq.read_table(run.shards / staged.shard)

    assert table.schema.names == ["key", "digest", "vector", "cause", "reason"]
    first, second = table.to_pylist()
    assert np.frombuffer(first["vector"], "<f4").tolist() == [1.5, -2.0]
    assert (second["vector"], second["cause"], second["reason"]) == (
        None,
        "rejected by the model",
        "why",
    )


def test_a_shard_that_is_written_twice_is_there_once(run: RunDirectory) -> None:
    with begin_run(run):
        for _ in range(2):
            run.write_shard(RangeVectors(KEYS, 0, 2, ROWS), pass_number=1)
        assert [path.name for path in run.shards.glob("*7.*")] == ["0000007.1.000.parquet"]


def test_later_passes_are_read_after_earlier_ones(run: RunDirectory) -> None:
    with begin_run(run):
        for pass_number, part in ((2, 0), (1, 1), (1, 0)):
            row = StagedRow(f"{pass_number}.{part}", b"d" * 16, VECTOR)
            run.write_shard(RangeVectors(KEYS, part, 2, (row,)), pass_number=pass_number)
        keys = [row.key for row in read(run, 7)]

    assert keys == ["1.0", "1.1", "2.0"]


def test_nothing_is_readable_by_others(run: RunDirectory) -> None:
    with begin_run(run):
        run.write_shard(RangeVectors(KEYS, 0, 2, ROWS), pass_number=1)
        run.finish({})
        modes = {
            path.name: stat.S_IMODE(path.stat().st_mode)
            for path in (run.path.parent, *run.path.parent.rglob("*"))
        }

    assert modes == {
        "m.db.reembed": 0o700,
        "lock": 0o600,
        run.run_id: 0o700,
        "summary.json": 0o600,
    }


def test_the_run_directory_lies_beside_the_real_file(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "real.db").touch()
    (tmp_path / "link.db").symlink_to("data/real.db")

    assert staging_root(tmp_path / "link.db") == tmp_path / "data" / "real.db.reembed"


def test_a_run_that_fails_leaves_nothing(run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), begin_run(run):
        run.write_shard(RangeVectors(KEYS, 0, 2, ROWS), pass_number=1)
        raise ZeroDivisionError

    assert list(tmp_path.iterdir()) == []


def test_a_run_that_failed_keeps_the_summaries_of_earlier_ones(tmp_path: Path) -> None:
    first, second = plan_run(tmp_path / "m.db"), plan_run(tmp_path / "m.db")
    with begin_run(first):
        first.finish({"total": 1})
    with pytest.raises(ZeroDivisionError), begin_run(second):
        raise ZeroDivisionError

    assert sorted(files(tmp_path / "m.db.reembed")) == [f"{first.run_id}/summary.json", "lock"]


def test_what_a_killed_run_left_is_removed_by_the_next(run: RunDirectory, tmp_path: Path) -> None:
    killed = RunDirectory(tmp_path / "m.db.reembed" / "20200101T000000Z-dead")
    killed.shards.mkdir(parents=True)
    (killed.shards / "0000000.1.000.parquet").write_bytes(b"half")
    ended = RunDirectory(tmp_path / "m.db.reembed" / "20200102T000000Z-dead")
    ended.shards.mkdir(parents=True)
    ended.write_json("summary.json", {})
    other = tmp_path / "m.db.reembed" / "notes"
    other.mkdir()

    with begin_run(run):
        assert not killed.path.exists()
        assert [path.name for path in ended.path.iterdir()] == ["summary.json"]
    assert other.exists()


def test_a_second_run_is_refused_while_the_first_lives(run: RunDirectory, tmp_path: Path) -> None:
    second = plan_run(tmp_path / "m.db")
    with begin_run(run):
        with pytest.raises(StagingError, match=rf"m\.db \(process {os.getpid()}\)"):
            begin_run(second).__enter__()
        assert run.shards.exists()
        assert not second.path.exists()


def test_the_lock_dies_with_its_holder(run: RunDirectory, tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        begin_run(run).__enter__()
        os._exit(0)
    os.waitpid(child, 0)

    with begin_run(plan_run(tmp_path / "m.db")):
        descriptor = os.open(tmp_path / "m.db.reembed" / "lock", os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)


def test_reading_a_directory_that_is_gone_is_an_error_not_an_empty_range(
    run: RunDirectory,
) -> None:
    with pytest.raises(StagingError, match="No such file"):
        run.list_shards()


def test_a_damaged_shard_is_named(run: RunDirectory) -> None:
    with begin_run(run):
        staged = run.write_shard(RangeVectors(KEYS, 0, 2, ROWS), pass_number=1)
        path = run.shards / staged.shard
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(StagingError, match="can't be used"):
            read(run, 7)


def test_a_directory_that_can_not_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.db.reembed").write_text("a file is in the way")

    with pytest.raises(StagingError, match=r"m\.db\.reembed can't be used"):
        begin_run(plan_run(tmp_path / "m.db")).__enter__()


def test_what_is_staged_is_counted_by_range(run: RunDirectory) -> None:
    with begin_run(run):
        for index in (0, 12):
            rows = RangeVectors(KeyRange(index, None, None), 0, 2, ROWS)
            run.write_shard(rows, pass_number=1)
        assert set(run.list_shards()) == {0, 12}
        (shard,) = run.shards.glob("0000012*")
        assert list(read_shards([shard], with_vectors=True)) == list(ROWS)
