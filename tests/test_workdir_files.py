"""What a work directory on a path of this machine shows to others, and what is deleted of it."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from apache_beam.io.filesystem import FileMetadata, MatchResult
from inline_snapshot import snapshot

from reembed.transforms import workdir
from reembed.transforms.errors import StagingError, UsageError
from reembed.transforms.rows import KeyRange, RangeRows, RangeVectors, Row, StagedRow, text_digest
from reembed.transforms.staging.names import SHARD
from reembed.transforms.workdir import WorkDirectory
from tests.conftest import Call, begin, fake_plan, files, make_store, memory
from tests.wording import wording

KEYS = KeyRange(3, None, None)
PART = RangeRows(KEYS, 0, (Row("a", 0, "text", text_digest(b"text")),))
VECTORS = RangeVectors(KEYS, 0, 2, (StagedRow("a", text_digest(b"text"), b"12345678"),))
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="other owners can only be made by root")


def filled(work: WorkDirectory, **how: Any) -> WorkDirectory:
    """All that a run leaves there."""
    work.make(**how)
    work.write_inputs([PART], pass_number=1)
    work.write_shard(VECTORS, pass_number=1)
    work.write_json("pass-1.json", {})
    return work


@pytest.mark.parametrize("umask", [0, 0o022, 0o777])
def test_texts_and_vectors_are_for_their_owner_only_whatever_the_umask(
    tmp_path: Path, umask: int
) -> None:
    former = os.umask(umask)
    try:
        filled(WorkDirectory(str(tmp_path / "work" / "run"), "one"))
    finally:
        os.umask(former)

    found = [tmp_path / "work", *(tmp_path / "work").rglob("*")]
    assert len(found) == 8
    for path in found:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert (path, mode) == (path, 0o700 if path.is_dir() else 0o600)


@AS_ROOT
def test_what_root_makes_belongs_to_the_owner_of_the_database(tmp_path: Path) -> None:
    database = tmp_path / "m.db"
    database.touch()
    os.chown(database, 4321, 4322)

    filled(WorkDirectory(str(tmp_path / "work" / "run"), "one"), like=database)

    for path in (tmp_path / "work", *(tmp_path / "work").rglob("*")):
        assert (path.stat().st_uid, path.stat().st_gid) == (4321, 4322)


@pytest.mark.system
def test_a_path_may_hold_what_other_programs_take_for_patterns(
    reembed: Call, tmp_path: Path
) -> None:
    path = make_store(tmp_path / "m.db", [memory(f"{at:03d}") for at in range(60)])
    place = tmp_path / "w[1]*?{}"
    (tmp_path / "w1xyz{}").mkdir()  # What such a pattern would find.

    done = reembed("--db", path, "--json", "--workdir", place, through_beam=True)

    assert (done.code, done.values["reembedded"]) == (0, 60)
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("name", ["w[1]*?{}", "[", "[!a]", "a?b", "{x}", "**"])
def test_what_was_left_is_found_under_such_a_path(name: str, tmp_path: Path) -> None:
    run = begin(fake_plan(make_store(tmp_path / "m.db", [memory("a")]))).run
    work = filled(WorkDirectory(str(tmp_path / name / "run"), "one"))

    assert list(work.read_inputs(KEYS, pass_number=1)) == [PART]
    assert work.fetch_shards(run) == 1


def test_a_file_of_somebody_elses_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    work = filled(WorkDirectory(str(tmp_path / "work" / "run"), "one"))
    theirs = ["letter.txt", "shards/foo.parquet", "inputs-one-0001/x", "mine/letter.txt"]
    (Path(work.path) / "mine").mkdir()
    for name in theirs:
        (Path(work.path) / name).write_text("theirs")

    with caplog.at_level("WARNING", "reembed"):
        work.remove()

    assert sorted(files(Path(work.path))) == sorted(theirs)
    [warned] = caplog.messages
    assert wording(warned, tmp_path) == snapshot(
        "TMP/work/run stays, since reembed did not make all that is in it"
    )


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (
            ".",
            snapshot(
                "TMP/work/run is a symbolic link, where reembed keeps a directory; reembed "
                "leaves it alone: move it away, and run again"
            ),
        ),
        (
            "shards",
            snapshot(
                "TMP/work/run/shards is a symbolic link, where reembed keeps a directory; "
                "reembed leaves it alone: move it away, and run again"
            ),
        ),
        (
            "inputs-one-0001",
            snapshot(
                "TMP/work/run/inputs-one-0001 is a symbolic link, where reembed keeps a "
                "directory; reembed leaves it alone: move it away, and run again"
            ),
        ),
    ],
)
def test_nothing_is_written_or_deleted_through_a_link(tmp_path: Path, part: str, says: str) -> None:
    work = filled(WorkDirectory(str(tmp_path / "work" / "run"), "one"))
    place = Path(os.path.normpath(Path(work.path) / part))
    place.rename(tmp_path / "moved")
    place.symlink_to(tmp_path / "moved")
    before = files(tmp_path / "moved")

    with pytest.raises(StagingError) as refused:
        filled(work)
    assert wording(refused, tmp_path) == says
    with suppress(StagingError):
        work.remove()

    assert files(tmp_path / "moved") == before


def test_a_shard_that_is_no_file_is_told(tmp_path: Path) -> None:
    run = begin(fake_plan(make_store(tmp_path / "m.db", [memory("a")]))).run
    work = filled(WorkDirectory(str(tmp_path / "work" / "run"), "one"))
    (shard,) = (Path(work.path) / "shards").iterdir()
    shard.unlink()
    os.mkfifo(shard)

    with pytest.raises(StagingError) as refused:
        work.fetch_shards(run)
    assert wording(refused, tmp_path).replace(shard.name, "SHARD") == snapshot(
        "TMP/work/run/shards/SHARD is a pipe, where reembed keeps a file; reembed leaves it "
        "alone: move it away, and run again"
    )


def test_a_worker_that_does_not_see_the_place_says_so(tmp_path: Path) -> None:
    elsewhere = WorkDirectory(str(tmp_path / "not" / "mounted"), "one")

    with pytest.raises(StagingError) as refused:
        list(elsewhere.read_inputs(KEYS, pass_number=1))
    assert wording(refused, tmp_path) == snapshot(
        "the work directory TMP/not/mounted can't be used (FileNotFoundError: [Errno 2] No such "
        "file or directory: 'TMP/not/mounted'); name one with --workdir that this machine and "
        "all workers can write"
    )


def test_a_place_where_others_can_exchange_it_is_refused(reembed: Call, tmp_path: Path) -> None:
    path = make_store(tmp_path / "m.db", [memory("a")])
    place = tmp_path / "shared"
    place.mkdir()
    place.chmod(0o777)

    refused = reembed("--db", path, "--workdir", place)
    assert (refused.code, list(place.iterdir())) == (2, [])
    assert wording(refused.error, tmp_path) == snapshot(
        "other users can write TMP/shared (mode 0777), so they could put something else in the "
        "place of a run there; name a directory of your own with --workdir, or take the right "
        "from them: chmod go-w TMP/shared"
    )
    place.chmod(0o770)
    with pytest.raises(UsageError) as group:
        WorkDirectory(str(place / "run"), "one").make()
    assert wording(group, tmp_path) == snapshot(
        "other users can write TMP/shared (mode 0770), so they could put something else in the "
        "place of a run there; name a directory of your own with --workdir, or take the right "
        "from them: chmod go-w TMP/shared"
    )
    place.chmod(0o1777)
    WorkDirectory(str(place / "run"), "one").make()


def test_elsewhere_only_names_of_ours_are_listed_and_deleted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where Beam's pattern finds too much."""
    sums = "0123456789abcdef"
    ours = ["shards/0000003.0001.000.00001." + sums + ".parquet", "pass-1-one.json"]
    theirs = ["shards/foo.parquet", "letter.txt", "a/b/letter.txt"]
    there = {f"xyz://a/w[1]/run/{name}" for name in ours + theirs} | {f"xyz://a/w11/run/{ours[1]}"}
    asked: list[str] = []

    class Elsewhere:
        @staticmethod
        def join(*names: str) -> str:
            return "/".join(names)

        @staticmethod
        def match(patterns: list[str]) -> list[MatchResult]:
            asked.extend(patterns)
            return [MatchResult("", [FileMetadata(name, 1) for name in sorted(there)])]

        @staticmethod
        def delete(paths: list[str]) -> None:
            there.difference_update(paths)

    monkeypatch.setattr(workdir, "FileSystems", Elsewhere)
    work = WorkDirectory("xyz://a/w[1]/run", "one")

    assert work._list("xyz://a/w[1]/run/shards", SHARD) == [f"{work.path}/{ours[0]}"]
    assert asked == ["xyz://a/w?1]/run/shards/*"]
    work.remove()
    assert there == {f"{work.path}/{name}" for name in theirs} | {f"xyz://a/w11/run/{ours[1]}"}
