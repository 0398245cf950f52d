"""Where the runs on a database lie: copies of them, databases that moved, what is missing there."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from inline_snapshot import snapshot

from reembed.transforms.errors import StagingError
from reembed.transforms.staging import RunDirectory, find_runs, lock_database, staging_root
from reembed.transforms.staging.backup import read_ledger, saved_columns
from reembed.transforms.staging.files import failing_clearly, write_table
from reembed.transforms.stores.demo import hashed_vector
from tests.conftest import Call, all_columns, change, files, kept_files, make_store, memory
from tests.wording import wording


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store of four rows with vectors."""
    vectors = ((f"{at}", hashed_vector(f"{at}", 8)) for at in range(4))
    return make_store(
        tmp_path / "m.db",
        [memory(key, embedding=vector, embedding_dim=8) for key, vector in vectors],
    )


@pytest.mark.parametrize(
    ("linked", "says"),
    [
        (
            True,
            snapshot(
                "the run RUN lies in two places, TMP/runs/RUN and TMP/copy/RUN, of which "
                "one must be a copy, so it can't be told which of them says what was "
                "done; name another directory with --run-dir (or none), or, if "
                "TMP/copy/RUN is the one to use, remove the link TMP/m.db.reembed/RUN"
            ),
        ),
        (
            False,
            snapshot(
                "the run RUN lies in two places, TMP/m.db.reembed/RUN and TMP/copy/RUN, "
                "of which one must be a copy, so it can't be told which of them says "
                "what was done; name another directory with --run-dir (or none), or, if "
                "TMP/copy/RUN is the one to use, move TMP/m.db.reembed/RUN away"
            ),
        ),
    ],
)
def test_a_copy_of_a_run_does_not_take_its_place(
    reembed: Call, path: Path, tmp_path: Path, linked: bool, says: str
) -> None:
    before = all_columns(path)
    original = tmp_path / "runs" if linked else staging_root(path)
    flags = ("--run-dir", original) if linked else ()
    assert reembed("--db", path, *flags, "--max-rows", "2").code == 0
    [run] = original.glob("2*")
    shutil.copytree(run, tmp_path / "copy" / run.name)
    kept = files(tmp_path)

    for command in (["status"], ["verify"], ["rollback"], ["cleanup", "--yes"], []):
        refused = reembed(*command, "--db", path, "--run-dir", tmp_path / "copy")
        assert refused.code == 1, command
        assert wording(refused.error, tmp_path) == says
    assert files(tmp_path) == kept

    assert reembed("--db", path, *flags).code == 0
    assert reembed("status", "--db", path).out.count("replaced") == 1
    assert reembed("rollback", "--db", path, *flags).code == 0
    assert all_columns(path) == before


@pytest.fixture
def two_copies(reembed: Call, path: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two copies of a database that is gone, whose run lies elsewhere."""
    assert reembed("--db", path, "--run-dir", tmp_path / "runs").code == 0
    copies = tmp_path / "one.db", tmp_path / "two.db"
    for copy in copies:
        shutil.copy2(path, copy)
        shutil.copytree(staging_root(path), staging_root(copy), symlinks=True)
    path.unlink()
    shutil.rmtree(staging_root(path))
    return copies


@pytest.mark.parametrize("command", [["rollback"], ["cleanup"], ["--missing-only"], []])
def test_the_first_of_two_copies_that_is_written_has_the_run(
    reembed: Call, two_copies: tuple[Path, Path], command: list[str], tmp_path: Path
) -> None:
    one, two = two_copies
    for copy in two_copies:  # Who only looks settles nothing.
        assert reembed("status", "--db", copy).code == reembed("verify", "--db", copy).code == 0
    change(one, "UPDATE memories SET embedding = NULL, embedding_dim = NULL WHERE id = '3'")
    change(two, "UPDATE memories SET content = 'of two'")

    assert reembed(*command, "--db", one).code == 0
    contents = all_columns(two)
    run = next((tmp_path / "runs").glob("2*"))
    kept = kept_files(run)

    for other in (["status"], ["verify"], ["rollback"], ["cleanup", "--yes"], []):
        refused = reembed(*other, "--db", two)
        assert refused.code == 1, other
        assert wording(refused.error, tmp_path) == snapshot(
            "the run RUN belongs to TMP/one.db, of which TMP/two.db is a copy; remove "
            "the link TMP/two.db.reembed/RUN, which leads to it; if TMP/two.db is the "
            "file that the run replaced vectors in, and the other one the copy, set "
            '"database" to "TMP/two.db" in TMP/two.db.reembed/RUN/manifest.json instead'
        )
    assert (all_columns(two), kept_files(run)) == (contents, kept)
    assert reembed("status", "--db", one).code == 0


def test_a_copy_that_was_looked_at_before_the_other_was_written_writes_nothing(
    reembed: Call, two_copies: tuple[Path, Path]
) -> None:
    one, two = two_copies
    find_runs(two)
    assert reembed("rollback", "--db", one).code == 0
    with pytest.raises(StagingError) as refused, lock_database(two):
        pass
    assert wording(refused, one.parent) == snapshot(
        "the run RUN belongs to TMP/one.db, of which TMP/two.db is a copy; remove the "
        "link TMP/two.db.reembed/RUN, which leads to it; if TMP/two.db is the file that "
        'the run replaced vectors in, and the other one the copy, set "database" to '
        '"TMP/two.db" in TMP/two.db.reembed/RUN/manifest.json instead'
    )


def test_a_moved_database_keeps_its_runs_when_another_takes_its_place(
    reembed: Call, path: Path, tmp_path: Path
) -> None:
    before = all_columns(path)
    assert reembed("--db", path).code == 0
    moved = tmp_path / "old.db"
    path.rename(moved)
    staging_root(path).rename(staging_root(moved))
    assert reembed("cleanup", "--db", moved).code == 0  # The first command that could write.

    make_store(path, [memory("new")])

    assert reembed("status", "--db", path).out.startswith("no runs")
    assert reembed("rollback", "--db", moved).code == 0
    assert all_columns(moved) == before


def test_a_moved_database_that_was_not_used_before_says_what_to_set(
    reembed: Call, path: Path, tmp_path: Path
) -> None:
    before = all_columns(path)
    assert reembed("--db", path).code == 0
    moved = tmp_path / "old.db"
    path.rename(moved)
    staging_root(path).rename(staging_root(moved))
    make_store(path, [memory("new")])
    [run] = staging_root(moved).glob("2*")

    refused = reembed("rollback", "--db", moved)

    assert refused.code == 1
    assert wording(refused.error, tmp_path) == snapshot(
        "the run RUN belongs to TMP/m.db, which is another file than TMP/old.db, so "
        "neither can use it here; move TMP/old.db.reembed/RUN elsewhere; if TMP/old.db "
        'is the file that the run replaced vectors in, moved here, set "database" to '
        '"TMP/old.db" in TMP/old.db.reembed/RUN/manifest.json instead'
    )
    manifest = run / "manifest.json"
    manifest.write_text(manifest.read_text().replace(f'"{path}"', f'"{moved}"'))
    assert reembed("rollback", "--db", moved).code == 0
    assert all_columns(moved) == before


@pytest.mark.parametrize("name", ["shards", "backup"])
def test_a_staged_run_whose_copy_has_no_empty_directories_goes_on(
    reembed: Call, path: Path, name: str
) -> None:
    before = all_columns(path)
    assert reembed("--db", path, "--max-rows", "2").code == 0
    [run] = staging_root(path).glob("2*")
    shutil.rmtree(run / name)

    status = reembed("status", "--db", path, "--json")
    assert (status.code, status.values["runs"][0]["staged"]) == (0, 2 if name == "backup" else 0)
    done = reembed("--db", path)
    assert (done.code, len(done.texts)) == (0, 2 if name == "backup" else 4)
    assert reembed("verify", "--db", path).code == 0
    assert reembed("rollback", "--db", path).code == 0
    assert all_columns(path) == before


def named(said: str, tmp_path: Path) -> str:
    """What is said, with the digest in a file's name left out."""
    return re.sub(r"\b[0-9a-f]{16}(?=\.parquet)", "DIGEST", wording(said, tmp_path))


def test_without_its_directory_all_files_of_a_backup_are_lost(
    reembed: Call, path: Path, tmp_path: Path
) -> None:
    before = all_columns(path)
    assert reembed("--db", path, range_rows=2).code == 0
    after = all_columns(path)
    [run] = staging_root(path).glob("2*")
    kept = files(run / "backup")
    shutil.rmtree(run / "backup")

    status = reembed("status", "--db", path, "--json")
    assert (status.code, status.values["runs"][0]["backup_lost"]) == (0, sorted(kept))
    verified = reembed("verify", "--db", path)
    assert verified.code == 1
    assert named(verified.error, tmp_path) == snapshot(
        "2 files (4 rows), the first of them 0000000.0000.DIGEST.parquet, of the backup "
        "in TMP/m.db.reembed/RUN/backup is missing or damaged, so its rows can't be "
        "checked, nor put back; put the file back from a copy of it"
    )
    refused = reembed("rollback", "--db", path)
    assert refused.code == 6
    assert named(refused.error, tmp_path) == snapshot(
        "2 files (4 rows), the first of them 0000000.0000.DIGEST.parquet, of the backup "
        "in TMP/m.db.reembed/RUN/backup is missing or damaged, so rows of TMP/m.db keep "
        "the vectors that run RUN gave them; put the file back from a copy of it and "
        "roll back again, or re-embed these rows with the former model"
    )
    assert all_columns(path) == after
    assert reembed("cleanup", "--db", path, "--json").values["kept"].keys() == {run.name}

    for name, content in kept.items():  # The directory is there again.
        (run / "backup" / name).write_bytes(content)
    assert reembed("rollback", "--db", path).code == 0
    assert all_columns(path) == before


def test_status_of_a_run_that_ends_meanwhile(
    reembed: Call, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reembed("--db", path, "--max-rows", "2").code == 0
    [run] = staging_root(path).glob("2*")
    with monkeypatch.context() as patch:
        # As if the run had replaced them all just before they are listed.
        patch.setattr(RunDirectory, "list_shards", _after_removing(run / "shards"))
        status = reembed("status", "--db", path)
    assert (status.code, status.err) == (0, "")


def test_status_passes_over_a_run_that_is_deleted_meanwhile(
    reembed: Call, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reembed("--db", path, "--max-rows", "2").code == 0
    [run] = staging_root(path).glob("2*")
    for vanishing in ("read_manifest", "list_shards"):
        with monkeypatch.context() as patch:
            patch.setattr(RunDirectory, vanishing, _after_removing(run, vanishing))
            shutil.copytree(run, tmp_path / "kept")
            status = reembed("status", "--db", path)
        assert (status.code, status.err) == (0, ""), vanishing
        assert status.out.startswith("no runs"), vanishing
        shutil.move(tmp_path / "kept", run)


def _after_removing(directory: Path, name: str = "list_shards") -> Callable[..., object]:
    """A method of a run that comes just after a directory has been deleted."""
    method = getattr(RunDirectory, name)

    def late(run: RunDirectory) -> object:
        shutil.rmtree(directory)
        return method(run)

    return late


NAMES = ["reserve", "skipped.jsonl", "remaining.jsonl", "summary.json", "pass-1.json"]


@pytest.mark.parametrize("name", NAMES)
def test_a_directory_in_place_of_a_file_is_named_before_anything_is_written(
    reembed: Call, path: Path, name: str, tmp_path: Path
) -> None:
    before = all_columns(path)
    assert reembed("--db", path, "--max-rows", "2").code == 0
    [run] = staging_root(path).glob("2*")
    (run / name).unlink(missing_ok=True)
    (run / name).mkdir()

    refused = reembed("--db", path)

    assert refused.code == 1
    assert wording(refused.error, tmp_path).replace(name, "NAME") == snapshot(
        "TMP/m.db.reembed/RUN/NAME is a directory, where reembed keeps a file; reembed "
        "leaves it alone: move it away, and run again"
    )
    assert all_columns(path) == before
    (run / name).rmdir()
    assert reembed("--db", path).code == 0


@pytest.mark.parametrize("name", ["left.jsonl", "rollback.json"])
def test_a_directory_in_place_of_what_a_rollback_writes_is_named_first(
    reembed: Call, path: Path, name: str, tmp_path: Path
) -> None:
    assert reembed("--db", path).code == 0
    after = all_columns(path)
    [run] = staging_root(path).glob("2*")
    (run / name).mkdir()

    refused = reembed("rollback", "--db", path)

    assert (refused.code, all_columns(path)) == (1, after)
    assert wording(refused.error, tmp_path).replace(name, "NAME") == snapshot(
        "TMP/m.db.reembed/RUN/NAME is a directory, where reembed keeps a file; reembed "
        "leaves it alone: move it away, and run again"
    )
    (run / name).rmdir()
    assert reembed("rollback", "--db", path).code == 0


WAYS = {
    errno.ENOENT: snapshot(
        "the run directory TMP can't be used (Said by the system: TMP/x); restore it "
        "from a copy; if another command has just removed it, run again"
    ),
    errno.EISDIR: snapshot(
        "the run directory TMP can't be used (Said by the system: TMP/x); move what lies "
        "there away, and run again"
    ),
    errno.ENOSPC: snapshot(
        "the run directory TMP can't be used (Said by the system: TMP/x); make room, and run again"
    ),
    errno.EROFS: snapshot(
        "the run directory TMP can't be used (Said by the system: TMP/x); make it "
        "writable, and run again"
    ),
    errno.EMFILE: snapshot(
        "the run directory TMP can't be used (Said by the system: TMP/x); make room, or "
        "make it writable, and run again"
    ),
}


@pytest.mark.parametrize("number", WAYS)
def test_trouble_with_a_file_names_it_and_says_what_helps(number: int, tmp_path: Path) -> None:
    named = OSError(
        number, "Said by the system", str(tmp_path / ".x.tmp"), None, str(tmp_path / "x")
    )
    with pytest.raises(StagingError) as raised, failing_clearly(tmp_path):
        raise named
    assert wording(raised, tmp_path) == WAYS[number]


def test_a_run_below_a_newer_one_is_not_to_be_rolled_back_first(
    reembed: Call, path: Path, tmp_path: Path
) -> None:
    before = all_columns(path)
    assert reembed("--db", path, range_rows=2).code == 0
    [older] = staging_root(path).glob("2*")
    lost = min((older / "backup").iterdir())
    shutil.move(lost, tmp_path / lost.name)
    assert reembed("rollback", "--db", path).code == 6  # In part.
    assert reembed("--db", path, range_rows=2).code == 0
    newer = max(staging_root(path).glob("2*"))

    def next_of_older() -> str:
        runs = reembed("status", "--db", path, "--json").values["runs"]
        said = next(str(run["next"]) for run in runs if run["run_id"] == older.name)
        return wording(said.replace(older.name, "OLDER").replace(newer.name, "NEWER"), tmp_path)

    assert next_of_older() == snapshot(
        "put the lost files of the backup back in TMP/m.db.reembed/OLDER/backup; then "
        "once run NEWER is rolled back, reembed rollback --run OLDER"
    )
    shutil.move(tmp_path / lost.name, lost)
    assert next_of_older() == snapshot(
        "reembed verify --run OLDER checks it; run NEWER must be rolled back before it can be"
    )
    assert reembed("rollback", "--db", path, "--run", older.name).code == 2
    assert reembed("rollback", "--db", path).code == 0
    assert reembed("rollback", "--db", path, "--run", older.name).code == 0
    assert all_columns(path) == before


def test_a_backup_that_is_not_listed_is_not_said_to_be_gone(
    reembed: Call, path: Path, tmp_path: Path
) -> None:
    before = all_columns(path)
    assert reembed("--db", path).code == 0
    [run] = staging_root(path).glob("2*")
    manifest = json.loads((run / "manifest.json").read_bytes())
    (run / "manifest.json").write_text(json.dumps(manifest | {"saved": {}}))

    verified = reembed("verify", "--db", path)

    assert verified.code == 1
    assert wording(verified.error, tmp_path) == snapshot(
        "none of the 4 rows that the run RUN wrote in TMP/m.db can be checked: its "
        "manifest lists none of the files in TMP/m.db.reembed/RUN/backup (1), so it "
        "can't be told whether these are all; restore the manifest from a copy (reembed "
        "rollback puts back what they hold)"
    )
    assert reembed("rollback", "--db", path).code == 0
    assert all_columns(path) == before


DIGEST = pa.array([bytes(16)], pa.binary(16))
GIVEN: dict[str, pa.Array] = {
    "key": pa.array(["0"]),
    "digest": DIGEST,
    "written": DIGEST,
    "was": DIGEST,
    "restorable": pa.array([True]),
    "vector": pa.array([None], pa.binary()),
    "others": pa.array(["embedding_dim=integer:38"]),
}
ODD: dict[str, tuple[dict[str, pa.Array | None], str]] = {
    "no key": (
        {"key": None},
        snapshot(
            "TMP/FILE was not written by reembed, so it is not used: it has no column "
            "key of type string; restore it from a copy, or move it away"
        ),
    ),
    "no others": (
        {"others": None},
        snapshot(
            "TMP/FILE was not written by reembed, so it is not used: it has no column "
            "others of type string; restore it from a copy, or move it away"
        ),
    ),
    "others is null": (
        {"others": pa.array([None], pa.string())},
        snapshot(
            "TMP/FILE was not written by reembed, so it is not used: its column others "
            "lacks values; restore it from a copy, or move it away"
        ),
    ),
    "key is a number": (
        {"key": pa.array([0])},
        snapshot(
            "TMP/FILE was not written by reembed, so it is not used: it has no column "
            "key of type string; restore it from a copy, or move it away"
        ),
    ),
    "a digest is too short": (
        {"digest": pa.array([b"1"], pa.binary(1))},
        snapshot(
            "TMP/FILE was not written by reembed, so it is not used: it has no column "
            "digest of type fixed_size_binary[16]; restore it from a copy, or move it "
            "away"
        ),
    ),
}


@pytest.mark.parametrize("odd", ODD)
def test_a_backup_made_by_hand_is_refused_by_its_columns(tmp_path: Path, odd: str) -> None:
    changed, says = ODD[odd]
    columns = {name: column for name, column in (GIVEN | changed).items() if column is not None}
    path = write_table(tmp_path, "0000000.0000", pa.table(columns))

    with pytest.raises(StagingError) as refused:
        read_ledger(tmp_path, 0, with_vectors=True)
    assert wording(refused, tmp_path).replace(path.name, "FILE") == says
    if "others" in odd:
        with pytest.raises(StagingError, match=f"^{path} was not written by reembed, so"):
            saved_columns(tmp_path)


OTHERS = ["zzz:XY", "integer:", "integer:" + "39" * 400, "integer:3A", "real:", "zzz:31", ""]


@pytest.mark.parametrize("value", OTHERS)
def test_a_backup_made_by_hand_is_refused_by_its_other_columns(
    reembed: Call, path: Path, value: str, tmp_path: Path
) -> None:
    assert reembed("--db", path).code == 0
    after = all_columns(path)
    [run] = staging_root(path).glob("2*")
    [file] = (run / "backup").iterdir()
    table = pq.read_table(file)
    odd = pa.array([f"embedding_dim={value}"] * table.num_rows)
    table = table.set_column(table.column_names.index("others"), "others", odd)
    file.unlink()
    made = write_table(run / "backup", "0000000.0000", table)
    manifest = json.loads((run / "manifest.json").read_bytes())
    saved = {made.name: table.num_rows}
    (run / "manifest.json").write_text(json.dumps(manifest | {"saved": saved}))

    for command in ("verify", "rollback"):
        refused = reembed(command, "--db", path)
        assert refused.code in (1, 6), command
        said = re.sub(r"columns as '.*?'", "columns as WHAT", refused.error)
        assert wording(said, tmp_path) == snapshot(
            "a backup describes columns as WHAT, which is not what reembed wrote, so it is not "
            "used; restore the backup from a copy"
        )
    assert all_columns(path) == after


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        (
            "key",
            snapshot(
                "TMP/m.db.reembed/RUN/shards/SHARD was not written by reembed, so it is "
                "not used: it has no column key of type string; restore it from a copy, "
                "or move it away"
            ),
        ),
        (
            "digest",
            snapshot(
                "TMP/m.db.reembed/RUN/shards/SHARD was not written by reembed, so it is "
                "not used: it has no column digest of type fixed_size_binary[16]; "
                "restore it from a copy, or move it away"
            ),
        ),
        (
            "cause",
            snapshot(
                "TMP/m.db.reembed/RUN/shards/SHARD was not written by reembed, so it is "
                "not used: it names no known cause: 'none that is known'; restore it "
                "from a copy, or move it away"
            ),
        ),
        (
            "vector",
            snapshot(
                "TMP/m.db.reembed/RUN/shards/SHARD was not written by reembed, so it is "
                "not used: it has no column vector of type fixed_size_binary[4]; restore "
                "it from a copy, or move it away"
            ),
        ),
    ],
)
def test_a_shard_made_by_hand_is_refused(
    reembed: Call, path: Path, odd: str, says: str, tmp_path: Path
) -> None:
    before = all_columns(path)
    assert reembed("--db", path, "--max-rows", "2").code == 0
    [run] = staging_root(path).glob("2*")
    [file] = (run / "shards").iterdir()
    table = pq.read_table(file)
    column = pa.array([{"a": 1}] * table.num_rows)
    if odd == "cause":
        column = pa.array(["none that is known"] * table.num_rows)
    table = table.set_column(table.column_names.index(odd), odd, column)
    file.unlink()
    made = write_table(run / "shards", file.name.rsplit(".", 2)[0], table)

    refused = reembed("--db", path)

    assert refused.code == 1
    assert wording(refused.error, tmp_path).replace(made.name, "SHARD") == says
    assert all_columns(path) == before
