"""Where runs may lie, whose they are, and what of them is deleted."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from inline_snapshot import snapshot

from reembed.transforms.errors import StagingError, UsageError
from reembed.transforms.staging import (
    find_runs,
    lock_database,
    lock_holder,
    remove_run,
    staging_root,
    trust,
)
from reembed.transforms.staging.files import tree_bytes
from tests.conftest import Call, begin, fake_plan, files, make_store, memory, select
from tests.wording import wording

VECTORS = "SELECT id, hex(embedding) FROM memories ORDER BY id"
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="other owners can only be made by root")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return store(tmp_path / "m.db")


def store(path: Path) -> Path:
    return make_store(path, [memory(f"{at:03d}") for at in range(6)])


def run_of(path: Path) -> Path:
    """The one run on a database."""
    (run,) = (one for one in staging_root(path).iterdir() if one.name != "lock")
    return run


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_run_is_not_made_in_a_run(
    path: Path, reembed: Call, tmp_path: Path, elsewhere: bool
) -> None:
    reembed("--db", path, *(("--run-dir", tmp_path / "runs") if elsewhere else ()))
    run = run_of(path)
    before = files(run)

    for inside in (".", "shards", "backup", "new"):
        refused = reembed("--db", path, "--model", "b", "--run-dir", run / inside)

        assert (refused.code, files(run)) == (2, before)
        said = refused.error.replace(f"{run.resolve()}", "THE RUN")
        assert (
            said
            == snapshot(
                {
                    ".": (
                        "THE RUN is a run or lies in one, THE RUN, and would be deleted "
                        "with it; name another directory with --run-dir"
                    ),
                    "shards": (
                        "THE RUN/shards is a run or lies in one, THE RUN, and would be "
                        "deleted with it; name another directory with --run-dir"
                    ),
                    "backup": (
                        "THE RUN/backup is a run or lies in one, THE RUN, and would be "
                        "deleted with it; name another directory with --run-dir"
                    ),
                    "new": (
                        "THE RUN/new is a run or lies in one, THE RUN, and would be "
                        "deleted with it; name another directory with --run-dir"
                    ),
                }
            )[inside]
        )


@pytest.mark.parametrize("inside", [".", "new"])
def test_a_run_is_not_made_where_another_database_has_its_own(
    path: Path, reembed: Call, tmp_path: Path, inside: str
) -> None:
    other = store(tmp_path / "other.db")

    for command in ((), ("status",), ("cleanup",)):
        refused = reembed(*command, "--db", path, "--run-dir", staging_root(other) / inside)

        assert (refused.code, staging_root(other).exists()) == (2, False)
        assert (
            wording(refused.error, tmp_path)
            == snapshot(
                {
                    ".": (
                        "TMP/other.db.reembed is where the runs on another database are kept, "
                        "TMP/other.db; name another directory with --run-dir"
                    ),
                    "new": (
                        "TMP/other.db.reembed/new is where the runs on another database are kept, "
                        "TMP/other.db; name another directory with --run-dir"
                    ),
                }
            )[inside]
        )
    # Its own is where they are anyway.
    assert reembed("--db", path, "--run-dir", staging_root(path)).code == 0
    assert run_of(path).is_dir()


@pytest.mark.parametrize("command", ["run", "status", "verify", "rollback", "cleanup"])
def test_runs_of_another_database_that_lie_in_this_ones_place_are_not_its_own(
    path: Path, reembed: Call, tmp_path: Path, command: str
) -> None:
    reembed("--db", path)
    other = store(tmp_path / "other.db")
    shutil.copytree(staging_root(path), staging_root(other))
    before = files(tmp_path)

    refused = reembed(*(() if command == "run" else (command,)), "--db", other)

    assert refused.code == 1
    assert wording(refused.error, tmp_path) == snapshot(
        "the run RUN belongs to TMP/m.db, which is another file than TMP/other.db, so "
        "neither can use it here; move TMP/other.db.reembed/RUN elsewhere; if TMP/other.db "
        'is the file that the run replaced vectors in, moved here, set "database" to '
        '"TMP/other.db" in TMP/other.db.reembed/RUN/manifest.json instead'
    )
    assert files(tmp_path) == before


def test_a_database_that_has_two_names_or_was_moved_has_its_runs(
    path: Path, reembed: Call, tmp_path: Path
) -> None:
    reembed("--db", path)
    os.link(path, tmp_path / "same.db")
    staging_root(path).rename(staging_root(tmp_path / "same.db"))

    assert reembed("verify", "--db", tmp_path / "same.db").code == 0
    path.unlink()
    assert reembed("rollback", "--db", tmp_path / "same.db").code == 0


def test_a_run_directory_that_was_moved_is_found_as_the_message_says(
    path: Path, reembed: Call, tmp_path: Path
) -> None:
    reembed("--db", path, "--run-dir", tmp_path / "runs")
    link = run_of(path)
    (tmp_path / "runs").rename(tmp_path / "moved")

    refused = reembed("rollback", "--db", path, "--run-dir", tmp_path / "moved")
    assert refused.code == 1
    assert wording(refused.error, tmp_path) == snapshot(
        "the run RUN lies at TMP/runs/RUN, which isn't there; mount it, or remove the link "
        "TMP/m.db.reembed/RUN if it is gone for good; if it was moved, remove the link and "
        "name the directory that it is in now with --run-dir"
    )
    link.unlink()
    assert reembed("rollback", "--db", path, "--run-dir", tmp_path / "moved").code == 0


def test_a_link_is_followed_only_to_a_run_of_its_name(
    path: Path, reembed: Call, tmp_path: Path
) -> None:
    reembed("--db", path, "--run-dir", tmp_path / "runs")
    link = run_of(path)
    (tmp_path / "runs" / link.name).rename(tmp_path / "runs" / "another")
    link.unlink()
    link.symlink_to(tmp_path / "runs" / "another")

    refused = reembed("status", "--db", path)

    assert refused.code == 1
    assert wording(refused.error, tmp_path) == snapshot(
        "TMP/m.db.reembed/RUN is a symbolic link to TMP/runs/another, and not one that "
        "reembed made, which leads to a directory named RUN; remove it, and run again"
    )


def test_a_link_in_the_place_that_run_dir_names_is_not_followed(
    path: Path, reembed: Call, tmp_path: Path
) -> None:
    reembed("--db", path)
    run = run_of(path)
    (tmp_path / "runs").mkdir()
    shutil.move(run, tmp_path / run.name)
    (tmp_path / "runs" / run.name).symlink_to(tmp_path / run.name)

    refused = reembed("status", "--db", path, "--run-dir", tmp_path / "runs")

    assert refused.code == 1
    assert wording(refused.error, tmp_path) == snapshot(
        "TMP/runs/RUN is a symbolic link, where reembed keeps a directory; reembed leaves it "
        "alone: move it away, and run again"
    )


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_place_where_others_can_exchange_a_run_is_refused(
    path: Path, reembed: Call, tmp_path: Path, mode: int
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(mode)

    refused = reembed("--db", path, "--run-dir", shared / "new")
    assert (refused.code, list(shared.iterdir())) == (2, [])
    said = wording(refused.error, tmp_path)
    assert said.replace(f"{mode:04o}", "MODE") == snapshot(
        "other users can write TMP/shared (mode MODE), so they could put something else in "
        "the place of a run there; name a directory of your own with --run-dir, or take the "
        "right from them: chmod go-w TMP/shared"
    )
    shared.chmod(0o1777)
    assert reembed("--db", path, "--run-dir", shared).code == 0


@AS_ROOT
def test_the_sticky_bit_of_another_users_directory_is_no_help(
    path: Path, reembed: Call, tmp_path: Path
) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs").chmod(0o1777)
    os.chown(tmp_path / "theirs", 4321, 4321)

    assert reembed("--db", path, "--run-dir", tmp_path / "theirs").code == 2


def test_a_run_is_not_made_in_what_another_has_made_for_it(path: Path, tmp_path: Path) -> None:
    plan = fake_plan(path, run_dir=str(tmp_path / "runs"))
    made = tmp_path / "runs" / f".{plan.run.run_id}.made"
    made.mkdir(parents=True)

    with pytest.raises(StagingError) as refused:
        begin(plan)
    assert wording(refused, tmp_path) == snapshot(
        "the run directory TMP/runs/.RUN.made can't be used (File exists); move what lies "
        "there away, and run again"
    )
    assert list(made.iterdir()) == []


@pytest.mark.parametrize("place", [".", "shards", "backup"])
def test_a_run_that_holds_a_file_of_somebody_elses_stays(
    path: Path, reembed: Call, tmp_path: Path, place: str
) -> None:
    reembed("--db", path, "--max-rows", "4", "--run-dir", tmp_path / "runs")
    link = run_of(path)
    (link / place / "foo (conflicted copy).parquet").write_bytes(b"theirs")
    before = files(tmp_path)

    for arguments in (("cleanup", "--run", link.name, "--yes"), ("--fresh",)):
        refused = reembed(*arguments, "--db", path)

        assert refused.code == 1
        assert (
            wording(refused.error, tmp_path)
            == snapshot(
                {
                    ".": (
                        "TMP/runs/RUN/foo (conflicted copy).parquet is not reembed's, so "
                        "nothing is deleted; move it elsewhere, and try again"
                    ),
                    "shards": (
                        "TMP/runs/RUN/shards/foo (conflicted copy).parquet is not "
                        "reembed's, so nothing is deleted; move it elsewhere, and try "
                        "again"
                    ),
                    "backup": (
                        "TMP/runs/RUN/backup/foo (conflicted copy).parquet is not "
                        "reembed's, so nothing is deleted; move it elsewhere, and try "
                        "again"
                    ),
                }
            )[place]
        )
        assert {**files(tmp_path), "m.db.reembed/lock": b""} == {**before, "m.db.reembed/lock": b""}


def test_files_of_somebody_elses_are_no_shards_and_no_backup(path: Path, reembed: Call) -> None:
    before = select(path, VECTORS)
    reembed("--db", path, "--max-rows", "4")
    run = run_of(path)
    names = ("foo.parquet", "my.data.parquet", "0000000.0000 (conflicted copy).parquet")
    for name in names:
        (run / "shards" / name).write_bytes(b"theirs")
        (run / "backup" / name).write_bytes(b"theirs")

    for arguments in ((), ("status",), ("verify",), ("rollback",)):
        assert reembed(*arguments, "--db", path).code == 0
    assert select(path, VECTORS) == before
    assert {(run / "shards" / name).read_bytes() for name in names} == {b"theirs"}


def test_a_run_that_can_not_be_deleted_keeps_its_link(
    path: Path, reembed: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reembed("--db", path, "--run-dir", tmp_path / "runs")
    link = run_of(path)
    before = files(link)
    rename = Path.replace

    def fail(one: Path, target: Path) -> Path:
        if target.name.endswith(".removed"):
            raise OSError(30, os.strerror(30))
        return rename(one, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        refused = reembed("cleanup", "--db", path, "--yes")

    assert refused.code == 1
    assert wording(refused.error, tmp_path) == snapshot(
        "the run directory TMP/runs/RUN can't be used (Read-only file system); make it "
        "writable, and run again"
    )
    assert files(link) == before
    assert reembed("cleanup", "--db", path, "--yes").code == 0
    assert list((tmp_path / "runs").iterdir()) == []
    assert not staging_root(path).exists()


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory that every user can reach, and make files in."""
    with TemporaryDirectory() as name:
        Path(name).chmod(0o1777)
        yield Path(name)


def as_user(user: int, do: Callable[[], object]) -> str:
    """Do something as another user; what is raised, or nothing."""
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
            do()
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(write)
    os.wait()
    with os.fdopen(read) as raised:
        return raised.read()


@pytest.mark.system
@AS_ROOT
@pytest.mark.system
def test_who_may_not_delete_a_run_is_told_why_and_its_link_stays(
    shared: Path, reembed: Call
) -> None:
    path = store(shared / "m.db")
    os.chown(path, 4321, 4321)
    reembed("--db", path, "--run-dir", shared / "runs")
    link = run_of(path)
    # As on a disk that is mounted to be read only.
    os.chown(shared / "runs", 0, 0)
    (shared / "runs").chmod(0o755)
    before = files(shared)

    def clean_up() -> None:
        ((run, _),) = find_runs(path)
        remove_run(run, path)

    refused = as_user(4321, clean_up)

    assert wording(refused, shared) == snapshot(
        "StagingError: the run directory TMP/runs/RUN can't be used (Permission denied: "
        "TMP/runs); TMP/runs belongs to root: run reembed as root, or have it given to you"
    )
    assert files(shared) == before
    assert link.is_symlink()


@pytest.mark.system
@AS_ROOT
@pytest.mark.system
def test_what_root_has_left_is_named_with_its_owner(shared: Path, reembed: Call) -> None:
    path = store(shared / "m.db")
    reembed("--db", path)  # Its own, as root has made everything with the first versions.
    os.chown(path, 4321, 4321)
    run = run_of(path)

    refused = as_user(4321, lambda: find_runs(path))
    assert wording(refused, shared) == snapshot(
        "StagingError: the run directory TMP/m.db.reembed can't be used (Permission denied: "
        "TMP/m.db.reembed/lock); TMP/m.db.reembed belongs to root: run reembed as root, or "
        "have it given to you"
    )
    os.chown(run.parent, 4321, 4321)
    assert wording(as_user(4321, lambda: find_runs(path)), shared) == snapshot(
        "StagingError: the run directory TMP/m.db.reembed/RUN can't be used (Permission "
        "denied: TMP/m.db.reembed/RUN/shards); TMP/m.db.reembed/RUN belongs to root: run "
        "reembed as root, or have it given to you"
    )
    for place in run.rglob("*"):
        os.chown(place, 4321, 4321)
    os.chown(run, 4321, 4321)
    assert as_user(4321, lambda: find_runs(path)) == ""


@pytest.mark.system
@AS_ROOT
@pytest.mark.system
def test_what_another_user_has_made_beside_a_database_is_left_alone(shared: Path) -> None:
    path = store(shared / "m.db")
    os.chown(path, 4321, 4321)
    as_user(4322, lambda: staging_root(path).mkdir())

    def lock() -> None:
        with lock_database(path):
            pass

    for use in (lock, lambda: find_runs(path), lambda: lock_holder(path)):
        assert wording(as_user(4321, use), shared) == snapshot(
            "StagingError: TMP/m.db.reembed belongs to user 4322, not to user 4321 or root, "
            "so what is in it can't be trusted; reembed leaves it alone: move it away, or "
            "run reembed as user 4322 if they made it"
        )
    assert list(staging_root(path).iterdir()) == []


@AS_ROOT
def test_what_root_makes_belongs_to_the_owner_of_the_database(
    path: Path, reembed: Call, tmp_path: Path
) -> None:
    os.chown(path, 4321, 4322)
    flags = ("--run-dir", tmp_path / "new" / "runs")

    reembed("--db", path)
    reembed("rollback", "--db", path)
    reembed("--db", path, *flags, "--max-rows", "4")

    made = [staging_root(path), *staging_root(path).rglob("*"), tmp_path / "new"]
    made += (tmp_path / "new").rglob("*")
    assert len(made) > 12
    assert {(one.lstat().st_uid, one.lstat().st_gid) for one in made} == {(4321, 4322)}
    for one in made:
        if not one.is_symlink():
            assert stat.S_IMODE(one.stat().st_mode) == (0o700 if one.is_dir() else 0o600)


@AS_ROOT
def test_root_trusts_the_owner_of_the_database_and_nobody_else(
    path: Path, reembed: Call, tmp_path: Path
) -> None:
    os.chown(path, 4321, 4321)
    reembed("--db", path)
    root = staging_root(path)

    assert reembed("status", "--db", path).code == 0
    os.chown(root, 4322, 4322)
    refused = reembed("status", "--db", path)
    assert refused.code == 1
    assert wording(refused.error, tmp_path) == snapshot(
        "TMP/m.db.reembed belongs to user 4322, not to user 4321 or root, so what is in it "
        "can't be trusted; reembed leaves it alone: move it away, or run reembed as user "
        "4322 if they made it"
    )


def test_where_the_file_system_has_no_modes_the_sentence_says_so(
    path: Path, reembed: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on FAT, where all files have the modes that it was mounted with."""
    reembed("--db", path)
    run = run_of(path)
    for place in (run.parent, run):
        place.chmod(0o777)
    monkeypatch.setattr(trust, "has_modes", lambda directory: False)

    refused = reembed("status", "--db", path)

    assert refused.code == 1
    assert wording(refused.error, tmp_path) == snapshot(
        "TMP/m.db.reembed/RUN can be written by other users (mode 0777), since its file "
        "system keeps no owners and modes, so what is in it can't be trusted; name a "
        "directory on another file system with --run-dir, or mount this one for you alone "
        "(umask=077)"
    )
    # What lies elsewhere can be trusted, whoever made the link to it.
    shutil.move(run, tmp_path / run.name)
    (tmp_path / run.name).chmod(0o700)
    run.symlink_to(tmp_path / run.name)
    assert reembed("verify", "--db", path).code == 0
    assert reembed("rollback", "--db", path).code == 0


def test_a_file_system_has_modes_if_a_file_is_its_owners_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert trust.has_modes(tmp_path)
    monkeypatch.setattr(os, "fstat", lambda _: os.stat_result([0o100777, *range(9)]))
    assert not trust.has_modes(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_sizes_are_not_looked_up_behind_links(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "large").write_bytes(bytes(9_999))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a").symlink_to(tmp_path / "a")
    (tmp_path / "c").symlink_to(tmp_path / "a")

    assert tree_bytes(tmp_path / "b") < 9_999
    assert tree_bytes(tmp_path / "c") == 0


def test_a_half_made_run_that_is_a_link_is_left_alone(path: Path, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "manifest.json").write_text("somebody's")
    root = staging_root(path)
    root.mkdir(mode=0o700)
    (root / ".20200101T000000Z-dead.made").symlink_to(tmp_path / "docs")

    with lock_database(path):
        pass

    assert (tmp_path / "docs" / "manifest.json").read_text() == "somebody's"


def test_a_lock_that_is_a_pipe_keeps_nobody_waiting(path: Path, tmp_path: Path) -> None:
    root = staging_root(path)
    root.mkdir(mode=0o700)
    os.mkfifo(root / "lock", 0o600)

    with pytest.raises(StagingError) as first, lock_database(path):
        pass
    with pytest.raises(StagingError) as second:
        lock_holder(path)
    for refused in (first, second):
        assert wording(refused, tmp_path) == snapshot(
            "TMP/m.db.reembed/lock is a pipe, where reembed keeps a file; reembed leaves it "
            "alone: move it away, and run again"
        )


def test_a_run_dir_that_is_a_link_is_the_directory_it_leads_to(
    path: Path, reembed: Call, tmp_path: Path
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "real")

    assert reembed("--db", path, "--run-dir", tmp_path / "runs").code == 0
    assert run_of(path).readlink().parent == tmp_path / "real"
    with pytest.raises(UsageError):
        find_runs(path, tmp_path / "runs" / run_of(path).name)


@pytest.mark.parametrize("mode", [0o777, 0o770])
@pytest.mark.parametrize("by_a_link", [False, True])
def test_a_place_below_one_where_others_can_exchange_it_is_refused(
    path: Path, reembed: Call, tmp_path: Path, mode: int, by_a_link: bool
) -> None:
    shared, mine = tmp_path / "shared", tmp_path / "shared" / "mine"
    mine.mkdir(parents=True)
    shared.chmod(mode)
    named = mine
    if by_a_link:
        named = tmp_path / "link"
        named.symlink_to(mine)

    for place in (named, named / "new"):
        refused = reembed("--db", path, "--run-dir", place)
        assert (refused.code, list(mine.iterdir())) == (2, [])
        said = wording(refused.error, tmp_path)
        assert said.replace(f"{mode:04o}", "MODE") == snapshot(
            "other users can write TMP/shared (mode MODE), so they could put something else "
            "in the place of a run there; name a directory of your own with --run-dir, or "
            "take the right from them: chmod go-w TMP/shared"
        )
    shared.chmod(0o1777)
    assert reembed("--db", path, "--run-dir", named).code == 0


@AS_ROOT
@pytest.mark.parametrize("inside", [".", "mine"])
def test_a_place_in_a_third_users_directory_is_refused(
    path: Path, reembed: Call, tmp_path: Path, inside: str
) -> None:
    theirs = tmp_path / "theirs"
    (theirs / inside).mkdir(parents=True)
    os.chown(theirs, 4321, 4321)
    before = sorted(theirs.rglob("*"))

    refused = reembed("--db", path, "--run-dir", theirs / inside)

    assert (refused.code, sorted(theirs.rglob("*"))) == (2, before)
    assert wording(refused.error, tmp_path) == snapshot(
        "TMP/theirs belongs to user 4321, not to root, so they could put something else in "
        "the place of a run there; name a directory of your own with --run-dir"
    )
    # Root trusts the owner of the database.
    os.chown(path, 4321, 4321)
    assert reembed("--db", path, "--run-dir", theirs).code == 0
