"""The run directory, and the lock that keeps two runs off one database."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import stat
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
from inline_snapshot import snapshot

from reembed.transforms.embedders import Target
from reembed.transforms.errors import RunError, StagingError
from reembed.transforms.rows import KeyRange, RangeVectors, StagedRow
from reembed.transforms.staging import (
    Manifest,
    RunDirectory,
    Scope,
    State,
    discard_run_if_empty,
    find_runs,
    lock_database,
    make_run,
    new_run,
    new_token,
    remove_run,
    staging_root,
    write_backup,
)
from reembed.transforms.staging.runs import MANIFEST, SUMMARY
from tests.conftest import files
from tests.wording import wording

KEYS = KeyRange(7, "a", "b")
ROWS = (StagedRow("k1", b"d" * 16, bytes(8)), StagedRow("k2", b"e" * 16, bytes(8)))
Usage = namedtuple("Usage", ["total", "used", "free"])


def manifest_of(run: RunDirectory, database: Path) -> Manifest:
    return Manifest(
        run_id=run.run_id,
        database=str(database),
        started="2026-01-01T00:00:00Z",
        scope=Scope(),
        target=Target("local", "m", 2).to_json(),
        probe=[[0.6, 0.8]],
        ranges=(KeyRange(0, None, None, 2),),
        rows=2,
        attempt="mine",
    )


def made(database: Path, parent: Path | None = None, name: str | None = None) -> RunDirectory:
    """A run that was begun, beside the database or elsewhere."""
    run = new_run(parent or staging_root(database))
    run = RunDirectory(run.path.with_name(name)) if name else run
    with lock_database(database):
        make_run(run, database, manifest_of(run, database))
    return run


def write_shard(run: RunDirectory, *, pass_number: int = 1, index: int = 7) -> Path:
    vectors = RangeVectors(KeyRange(index, None, None), 0, 2, ROWS)
    return run.shards / run.write_shard(vectors, pass_number=pass_number).shard


@pytest.fixture
def database(tmp_path: Path) -> Path:
    (tmp_path / "m.db").touch()
    return tmp_path / "m.db"


@pytest.fixture
def run(database: Path) -> RunDirectory:
    return made(database)


def test_a_run_is_named_after_its_start_and_is_not_made_by_choosing_the_name(
    tmp_path: Path,
) -> None:
    runs = [new_run(tmp_path) for _ in range(20)]

    assert all(re.fullmatch(r"\d{8}T\d{6}Z-[0-9a-f]{4}", run.run_id) for run in runs)
    assert len({run.run_id for run in runs}) > 1
    assert list(tmp_path.iterdir()) == []
    assert not runs[0].exists


def test_tokens_differ() -> None:
    assert len({new_token() for _ in range(50)}) == 50
    assert len(new_token(2)) == 4


def test_a_run_has_its_manifest_from_the_start(run: RunDirectory, database: Path) -> None:
    assert run.read_manifest() == manifest_of(run, database)
    assert sorted(path.name for path in run.path.iterdir()) == [
        "backup",
        "manifest.json",
        "manifest.lock",
        "reserve",
        "shards",
    ]


def test_a_run_that_can_not_be_made_whole_is_not_there(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.replace

    def fail(path: Path, target: Path) -> Path:
        if target.name == MANIFEST:
            raise OSError(28, os.strerror(28))
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(StagingError) as failed:
            made(database)
    assert wording(failed, database.parent) == snapshot(
        "the run directory TMP/m.db.reembed/.RUN.made can't be used (No space left on "
        "device); make room, and run again"
    )

    assert find_runs(database) == []
    with lock_database(database):
        pass  # What was half made is cleared away by the next that has the lock.
    assert list(database.parent.iterdir()) == [database]


def test_nothing_is_readable_by_others(run: RunDirectory, database: Path) -> None:
    shard = write_shard(run)
    write_backup(run.backup, 0, [])
    run.write_json(SUMMARY, {})
    run.write_lines("skipped.jsonl", [{"id": "k"}])
    (saved,) = run.backup.iterdir()
    root = staging_root(database)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (root, *root.rglob("*"))}

    assert modes == {
        "m.db.reembed": 0o700,
        "lock": 0o600,
        run.run_id: 0o700,
        "shards": 0o700,
        "backup": 0o700,
        shard.name: 0o600,
        saved.name: 0o600,
        "manifest.json": 0o600,
        "manifest.lock": 0o600,
        "reserve": 0o600,
        "skipped.jsonl": 0o600,
        "summary.json": 0o600,
    }


def test_nothing_is_readable_by_others_whatever_the_umask(database: Path) -> None:
    former = os.umask(0)
    try:
        run = made(database)
        write_shard(run)
    finally:
        os.umask(former)

    for path in (staging_root(database), *staging_root(database).rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0


def test_the_run_directory_lies_beside_the_real_file(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "real.db").touch()
    (tmp_path / "link.db").symlink_to("data/real.db")

    assert staging_root(tmp_path / "link.db") == tmp_path / "data" / "real.db.reembed"


def test_what_is_staged_is_counted(run: RunDirectory) -> None:
    assert (run.staged_rows(), run.last_pass()) == (0, 0)
    for pass_number, index in ((1, 0), (1, 12), (3, 0)):
        write_shard(run, pass_number=pass_number, index=index)

    assert (run.staged_rows(), run.last_pass()) == (6, 3)
    assert set(run.list_shards()) == {0, 12}
    assert [shard.pass_number for shard in run.shards_of(0)] == [1, 3]
    assert [shard.pass_number for shard in run.shards_of(0, before_pass=3)] == [1]
    assert run.shards_of(1) == []


def test_how_far_a_run_has_come_is_noted(run: RunDirectory) -> None:
    before = run.read_manifest()

    noted = run.advance("mine", state=State.REPLACING, writing=frozenset({0}))

    assert noted == replace(before, state=State.REPLACING, writing=frozenset({0}), wrote=True)
    assert run.read_manifest() == noted


def test_an_attempt_that_was_taken_over_notes_nothing(run: RunDirectory) -> None:
    run.advance("mine")
    before = files(run.path)

    with pytest.raises(RunError) as refused:
        run.advance("another", state=State.REPLACING)
    assert wording(refused, run.path) == snapshot(
        "another process has taken over the run RUN; this one stops and writes nothing "
        "more, and reembed status says what the store holds"
    )
    assert run.run_id in str(refused.value)
    assert files(run.path) == before


def test_looking_at_the_manifest_does_not_write_it(run: RunDirectory) -> None:
    before = (run.path / MANIFEST).stat()

    run.advance("mine")

    after = (run.path / MANIFEST).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


NO_MANIFEST = (
    "the run TMP/m.db.reembed/RUN has no readable manifest.json (",
    "), so it can't be told what it did; restore the file, or move the directory away if you are "
    "sure that the run is of no use",
)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (
            None,
            snapshot("[Errno 2] No such file or directory: 'TMP/m.db.reembed/RUN/manifest.json'"),
        ),
        (b"", snapshot("Input data was truncated")),
        (b"{", snapshot("Input data was truncated")),
        (b"[]", snapshot("Expected `object`, got `array`")),
        (b"null", snapshot("Expected `object`, got `null`")),
        (b"{}", snapshot("Object missing required field `schema_version`")),
        (b'{"schema_version": 2}', snapshot("Invalid enum value 2 - at `$.schema_version`")),
        (b"\xff\xfe", snapshot("JSON is malformed: invalid character (byte 0)")),
    ],
    ids=["gone", "empty", "cut off", "a list", "null", "no keys", "another version", "not UTF-8"],
)
def test_a_manifest_that_can_not_be_understood_is_named(
    run: RunDirectory, database: Path, content: bytes | None, why: str
) -> None:
    path = run.path / MANIFEST
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)

    for look in (run.read_manifest, lambda: find_runs(database), lambda: run.advance("mine")):
        with pytest.raises(StagingError) as refused:
            look()
        said = wording(refused, database.parent)
        assert said.startswith(NO_MANIFEST[0])
        assert said.endswith(NO_MANIFEST[1])
        assert said.removeprefix(NO_MANIFEST[0]).removesuffix(NO_MANIFEST[1]) == why


def test_each_json_carries_the_run_and_the_version(run: RunDirectory) -> None:
    run.write_json("x.json", {"a": "é"})

    text = (run.path / "x.json").read_text(encoding="utf-8")
    assert text == f'{{"schema_version": 1, "run_id": "{run.run_id}", "a": "é"}}\n'
    assert run.read_json("x.json") == json.loads(text)


def test_lines_are_read_back_and_without_any_there_is_no_file(run: RunDirectory) -> None:
    lines = [{"id": "a\nb"}, {"id": "\x85é\x1c", "reason": "\u2028"}]

    assert run.write_lines("x.jsonl", lines) == 2
    assert run.read_lines("x.jsonl") == lines
    assert run.write_lines("x.jsonl", []) == 0
    assert not (run.path / "x.jsonl").exists()
    assert run.read_lines("x.jsonl") == []


def test_on_a_full_disk_room_that_was_set_aside_is_given_back(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve = run.path / "reserve"
    assert reserve.stat().st_size == 262_144
    run.advance("mine", stopped="early")
    assert reserve.exists()

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10, 10, 0))
    run.advance("mine", stopped="late")

    assert not reserve.exists()
    assert run.read_manifest().stopped == "late"
    run.set_reserve()
    assert reserve.stat().st_size == 262_144


def test_what_an_earlier_attempt_left_half_written_is_removed(run: RunDirectory) -> None:
    shard = write_shard(run)
    half = [
        run.path / ".skipped.jsonl.0011aabb.tmp",
        run.shards / f".{shard.name}.0011aabb.tmp",
        run.backup / f".0000007.0000.{'0a' * 8}.parquet.0011aabb.tmp",
    ]
    other = run.path / ".notes.0011aabb.tmp"
    other.write_bytes(b"not ours")
    for path in half:
        path.write_bytes(b"half")

    run.set_reserve()

    assert [path.exists() for path in [*half, other]] == [False, False, False, True]
    assert shard.exists()


def test_damaged_shards_are_removed_and_a_damaged_backup_is_put_aside(run: RunDirectory) -> None:
    sound, cut, altered = (write_shard(run, index=index) for index in range(3))
    cut.write_bytes(cut.read_bytes()[:-1])
    content = bytearray(altered.read_bytes())
    content[9] ^= 1
    altered.write_bytes(content)
    for index in (0, 1):
        write_backup(run.backup, index, [])
    whole, lost = sorted(run.backup.iterdir())
    lost.write_bytes(b"")

    assert run.remove_damaged() == ([cut.name, altered.name], [lost.name])

    assert list(run.shards.iterdir()) == [sound]
    assert sorted(path.name for path in run.backup.iterdir()) == [
        whole.name,
        lost.name.removesuffix("parquet") + "damaged",
    ]
    assert run.remove_damaged() == ([], [])


def test_the_shards_of_a_run_that_came_to_its_end_are_removed_and_nothing_else(
    run: RunDirectory,
) -> None:
    write_shard(run)
    write_backup(run.backup, 0, [])

    for _ in range(2):
        run.remove_shards()

        left = ["backup", "manifest.json", "manifest.lock"]
        assert sorted(path.name for path in run.path.iterdir()) == left
        assert len(list(run.backup.iterdir())) == 1
    assert run.remove_damaged() == ([], [])


def test_reading_a_directory_that_is_gone_is_an_error_not_an_empty_range(tmp_path: Path) -> None:
    with pytest.raises(StagingError) as failed:
        new_run(tmp_path).list_shards()
    assert wording(failed, tmp_path) == snapshot(
        "the run directory TMP/RUN/shards can't be used (No such file or directory: "
        "TMP/RUN); restore it from a copy; if another command has just removed it, run "
        "again"
    )


def test_runs_are_found_the_oldest_first_and_nothing_else_is(database: Path) -> None:
    later = made(database, name="20260102T000000Z-0000")
    earlier = made(database, name="20260101T000000Z-ffff")
    (staging_root(database) / "notes").mkdir()
    (staging_root(database) / ".20260103T000000Z-0000.made").mkdir()

    assert find_runs(database) == [(run, manifest_of(run, database)) for run in (earlier, later)]


def test_a_database_without_runs_has_none(database: Path) -> None:
    assert find_runs(database) == []


def test_a_run_elsewhere_is_found_by_its_link_and_in_its_place(
    database: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    run = made(database, elsewhere)
    link = staging_root(database) / run.run_id

    assert run.path.parent == elsewhere
    assert link.resolve() == run.path
    assert stat.S_IMODE(elsewhere.stat().st_mode) == 0o700
    assert [found for found, _ in find_runs(database)] == [run]
    link.unlink()
    assert find_runs(database) == []
    assert [found for found, _ in find_runs(database, elsewhere)] == [run]
    link.symlink_to(run.path)
    assert [found for found, _ in find_runs(database, elsewhere)] == [run]


def test_a_place_that_holds_runs_on_another_database_is_refused(
    database: Path, tmp_path: Path
) -> None:
    made(database, tmp_path / "elsewhere")
    other = tmp_path / "other.db"
    other.touch()

    with pytest.raises(StagingError) as refused:
        find_runs(other, tmp_path / "elsewhere")
    assert wording(refused, tmp_path) == snapshot(
        "TMP/elsewhere holds runs on another database, TMP/m.db; name another directory "
        "with --run-dir"
    )


def test_a_run_whose_place_is_not_there_is_named(database: Path, tmp_path: Path) -> None:
    run = made(database, tmp_path / "elsewhere")
    run.path.parent.rename(tmp_path / "unmounted")

    with pytest.raises(StagingError) as refused:
        find_runs(database)
    assert wording(refused, tmp_path) == snapshot(
        "the run RUN lies at TMP/elsewhere/RUN, which isn't there; mount it, or remove "
        "the link TMP/m.db.reembed/RUN if it is gone for good; if it was moved, remove "
        "the link and name the directory that it is in now with --run-dir"
    )


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_run_that_is_removed_leaves_nothing(
    database: Path, tmp_path: Path, elsewhere: bool
) -> None:
    run = made(database, tmp_path / "elsewhere" if elsewhere else None)
    write_shard(run)

    with lock_database(database):
        remove_run(run, database)

    assert sorted(tmp_path.iterdir()) == sorted(
        [database, *([tmp_path / "elsewhere"] if elsewhere else [])]
    )
    assert files(tmp_path) == {"m.db": b""}


@pytest.mark.parametrize(
    ("state", "staged", "kept"),
    [
        (State.STAGING, False, False),
        (State.STAGING, True, True),
        (State.REPLACING, False, True),
        (State.REPLACED, False, True),
        (State.ROLLING_BACK, False, True),
    ],
)
def test_only_a_run_that_has_come_to_nothing_is_discarded(
    run: RunDirectory, database: Path, state: State, staged: bool, kept: bool
) -> None:
    if staged:
        write_shard(run)
    run.write_manifest(replace(run.read_manifest(), state=state))

    discard_run_if_empty(run, database)

    assert run.exists == kept


def test_discarding_a_run_that_was_not_made_or_can_not_be_read_is_no_trouble(
    run: RunDirectory, database: Path
) -> None:
    discard_run_if_empty(new_run(staging_root(database)), database)
    (run.path / MANIFEST).write_text("{")
    discard_run_if_empty(run, database)

    assert run.exists


def test_where_there_is_no_run_the_lock_leaves_nothing(database: Path, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), lock_database(database):
        assert staging_root(database).is_dir()
        raise ZeroDivisionError

    assert list(tmp_path.iterdir()) == [database]


def test_a_run_that_failed_keeps_the_summaries_of_earlier_ones(
    run: RunDirectory, database: Path
) -> None:
    run.write_json(SUMMARY, {"total": 1})
    before = files(run.path)

    with pytest.raises(ZeroDivisionError), lock_database(database):
        raise ZeroDivisionError

    assert files(run.path) == before


def test_what_was_being_made_or_removed_when_its_process_died_is_cleared_away(
    run: RunDirectory, database: Path
) -> None:
    root = staging_root(database)
    for name in (".20200101T000000Z-dead.made", ".20200101T000000Z-dead.removed", "notes", ".x"):
        (root / name).mkdir()
        (root / name / MANIFEST).touch()
    write_shard(run)
    before = files(run.path)

    with lock_database(database):
        assert sorted(path.name for path in root.iterdir()) == [".x", run.run_id, "lock", "notes"]
        assert files(run.path) == before


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait less for the lock of another."""
    monkeypatch.setattr("reembed.transforms.staging.runs._LOCK_SECONDS", 0.05)


@pytest.mark.usefixtures("impatient")
def test_a_second_run_is_refused_while_the_first_lives(database: Path) -> None:
    with (
        lock_database(database),
        pytest.raises(StagingError) as refused,
        lock_database(database),
    ):
        pass
    said = re.sub(r"since \d{4}-\d\d-\d\d [\d:]+ UTC", "since THEN", str(refused.value))
    assert wording(said, database.parent) == snapshot(
        "another run is at work on TMP/m.db (process N, since THEN); wait for it to end"
    )
    assert f"(process {os.getpid()}, since" in said


@pytest.mark.usefixtures("impatient")
def test_a_second_run_leaves_the_first_ones_lock_and_half_made_run_alone(database: Path) -> None:
    with lock_database(database):
        half = staging_root(database) / ".20200101T000000Z-dead.made"
        half.mkdir()
        with pytest.raises(StagingError), lock_database(database):
            pass
        with pytest.raises(StagingError), lock_database(database):
            pass
        assert half.exists()


@pytest.mark.system
def test_the_lock_dies_with_its_holder(database: Path) -> None:
    child = os.fork()
    if child == 0:
        held = lock_database(database)
        held.__enter__()
        os._exit(0)
    os.waitpid(child, 0)
    assert (staging_root(database) / "lock").exists()

    with lock_database(database):
        descriptor = os.open(staging_root(database) / "lock", os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)


def test_a_lock_file_that_was_removed_meanwhile_is_no_lock(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        # The former holder removes the file after it was opened here and before it is locked.
        (staging_root(database) / "lock").unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(StagingError) as refused, lock_database(database):
        pass
    assert wording(refused, database.parent) == snapshot(
        "another run is at work on TMP/m.db (a process that has just begun); wait for it to end"
    )


def test_a_directory_that_can_not_be_made_is_named(database: Path) -> None:
    staging_root(database).write_text("a file is in the way")

    with pytest.raises(StagingError) as refused, lock_database(database):
        pass
    assert wording(refused, database.parent) == snapshot(
        "TMP/m.db.reembed is a file, where reembed keeps a directory; reembed leaves it "
        "alone: move it away, and run again"
    )
