"""Files of a run: whole or not at all, private, and known by their contents."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections import namedtuple
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inline_snapshot import snapshot

from reembed.transforms.errors import StagingError
from reembed.transforms.staging.files import (
    is_sound,
    publish,
    read_table,
    remove_tree,
    require_room,
    tables,
    tree_bytes,
    write_table,
)
from reembed.transforms.staging.names import BACKUP, OF_A_RUN, SHARD
from tests.wording import wording

SUM = "0123456789abcdef"
TABLE = pa.table({"key": ["a", "b"], "vector": [b"1234", None]})
Usage = namedtuple("Usage", ["total", "used", "free"])


def test_a_file_appears_whole_and_for_its_owner_only(tmp_path: Path) -> None:
    publish(tmp_path / "f", b"one")
    publish(tmp_path / "f", b"two")

    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_bytes() == b"two"
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o600


def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, Path.replace

    def flush(descriptor: int) -> None:
        kind = "directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        events.append(f"flush {kind}")
        fsync(descriptor)

    def move(path: Path, target: Path) -> Path:
        events.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "replace", move)
    publish(tmp_path / "f", b"content")

    assert events == ["flush file", "rename", "flush directory"]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            errno.ENOSPC,
            snapshot(
                "the run directory TMP can't be used (No space left on device); make room, "
                "and run again"
            ),
        ),
        (
            errno.EIO,
            snapshot(
                "the run directory TMP can't be used (Input/output error); check the disk, "
                "and run again"
            ),
        ),
        (
            errno.EACCES,
            snapshot(
                "the run directory TMP can't be used (Permission denied); make it "
                "writable, and run again"
            ),
        ),
        (
            errno.EDQUOT,
            snapshot(
                "the run directory TMP can't be used (Disk quota exceeded); make room, and "
                "run again"
            ),
        ),
        (
            errno.EROFS,
            snapshot(
                "the run directory TMP can't be used (Read-only file system); make it "
                "writable, and run again"
            ),
        ),
    ],
)
@pytest.mark.parametrize("moment", ["open", "fsync", "rename"])
def test_trouble_with_the_disk_leaves_the_former_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, code: int, said: str
) -> None:
    publish(tmp_path / "f", b"former")

    def fail(*_: Any) -> Any:
        raise OSError(code, os.strerror(code))

    places = {"open": (os, "open"), "fsync": (os, "fsync"), "rename": (Path, "replace")}
    with monkeypatch.context() as patch:
        patch.setattr(*places[moment], fail)
        with pytest.raises(StagingError) as refused:
            publish(tmp_path / "f", b"new")
    assert wording(refused, tmp_path) == said

    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_bytes() == b"former"


def test_an_interrupted_write_leaves_the_former_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path / "f", b"former")

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path / "f", b"new")

    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_bytes() == b"former"


def test_a_table_is_read_as_it_was_written_and_only_the_columns_that_are_wanted(
    tmp_path: Path,
) -> None:
    path = write_table(tmp_path, "0000001.x", TABLE)

    assert read_table(path, ["vector", "key"]).to_pydict() == {
        "vector": [b"1234", None],
        "key": ["a", "b"],
    }
    assert read_table(path, ["key"]).to_pydict() == {"key": ["a", "b"]}
    assert path.name.startswith("0000001.x.")
    assert len(path.name.split(".")[2]) == 16


def test_the_same_table_has_the_same_name_and_another_has_another(tmp_path: Path) -> None:
    names = {write_table(tmp_path, "t", TABLE).name for _ in range(3)}
    other = write_table(tmp_path, "t", TABLE.slice(1)).name

    assert len(names) == 1
    assert other not in names


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_file_that_was_cut_short_or_altered_anywhere_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = write_table(_directory(tmp_path_factory), "t", TABLE)
    content = path.read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    bit = data.draw(st.integers(0, 7))
    altered = content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]
    assert is_sound(path)

    for damaged in (content[:at], altered, content + b"\0"):
        path.write_bytes(damaged)

        assert not is_sound(path)
        with pytest.raises(StagingError) as refused:
            read_table(path, ["key"])
        assert str(refused.value).replace(str(path), "FILE") == snapshot(
            "FILE is damaged: its bytes are not those that were written; run reembed "
            "again, which looks through all files of the run first"
        )


def _directory(factory: pytest.TempPathFactory) -> Path:
    """One of the same name each time: it is in the file."""
    directory = factory.mktemp("t") / "run" / "shards"
    directory.mkdir(parents=True)
    return directory


def test_a_file_under_another_files_name_is_noticed(tmp_path: Path) -> None:
    one, other = (write_table(tmp_path, "t", table) for table in (TABLE, TABLE.slice(1)))
    shutil.copy(other, one)

    assert (is_sound(one), is_sound(other)) == (False, True)


@pytest.mark.parametrize("name", ["x.parquet", ".parquet", "0000001.1.000.parquet"])
def test_a_file_without_a_checksum_in_its_name_is_not_sound(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(write_table(tmp_path, "t", TABLE).read_bytes())

    assert not is_sound(tmp_path / name)


def test_only_the_tables_of_a_kind_or_range_are_listed_by_name(tmp_path: Path) -> None:
    ours = [f"{index}.0000.{SUM}.parquet" for index in ("0000001", "0000002", "00000010")]
    ours.insert(1, f"0000001.0001.{SUM}.parquet")
    others = [
        f".{ours[0]}",
        f"{ours[0]}.0a0b0c0d.tmp",
        ours[0].replace(".parquet", " (conflicted copy).parquet"),
        f"0000001.0000.000.00002.{SUM}.parquet",
        f"0000001.{SUM}.parquet",
        "0000001.0002.parquet",
        f"\u0661000001.0000.{SUM}.parquet",
        "foo.parquet",
        "my.data.parquet",
        "notes",
    ]
    for name in ours + others:
        (tmp_path / name).touch()

    assert [path.name for path in tables(tmp_path, BACKUP, index=1)] == ours[:2]
    assert [path.name for path in tables(tmp_path, BACKUP)] == sorted(ours)
    assert [path.name for path in tables(tmp_path, SHARD)] == [others[3]]


def test_a_run_that_is_gone_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    assert tables(tmp_path / "backup", BACKUP) == []
    with pytest.raises(StagingError) as refused:
        tables(tmp_path / "gone" / "backup", BACKUP)
    assert wording(refused, tmp_path) == snapshot(
        "the run directory TMP/gone/backup can't be used (No such file or directory: "
        "TMP/gone); restore it from a copy; if another command has just removed it, run "
        "again"
    )


def test_a_tree_is_removed_and_one_that_is_not_there_is_no_trouble(tmp_path: Path) -> None:
    (tmp_path / "run" / "shards").mkdir(parents=True)
    for name in ("manifest.json", ".summary.json.0a0b0c0d.tmp"):
        (tmp_path / "run" / name).touch()
    (tmp_path / "run" / "shards" / f"0000001.0000.000.00002.{SUM}.parquet").touch()

    for _ in range(2):
        remove_tree(tmp_path / "run", OF_A_RUN)

        assert list(tmp_path.iterdir()) == []


def test_the_size_of_a_tree_is_that_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a").write_bytes(bytes(100))
    (tmp_path / "deep" / "b").write_bytes(bytes(23))

    assert tree_bytes(tmp_path) == 123


@pytest.mark.parametrize(("free", "refused"), [(300, False), (299, True)])
def test_what_is_needed_on_one_file_system_is_added_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, refused: bool
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1000, 1000 - free, free))
    # One of the places is not made yet: the nearest that is there counts.
    needed = {tmp_path / "not" / "there": 100, tmp_path: 200}

    if refused:
        with pytest.raises(StagingError) as error:
            require_room(needed)
        assert wording(error, tmp_path) == snapshot(
            "about 300 bytes are needed for the new vectors, the backup and SQLite's log, "
            "and 299 bytes are free at TMP; make room, or name another place for the run "
            "directory with --run-dir"
        )
    else:
        require_room(needed)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="two file systems are needed")
def test_each_file_system_is_asked_for_what_lies_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> Usage:
        asked.append(path)
        return Usage(1000, 0, 1000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    require_room({Path("/proc/none"): 800, Path("/dev/none"): 800})

    assert asked == [Path("/proc"), Path("/dev")]
