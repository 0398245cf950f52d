"""Where the runs on a database lie: copies of them, databases that moved, what is missing there."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reembed.transforms.errors import StagingError
from reembed.transforms.staging import RunDirectory, find_runs, lock_database, staging_root
from reembed.transforms.staging.backup import read_ledger, saved_columns
from reembed.transforms.staging.files import failing_clearly, write_table
from reembed.transforms.stores.demo import hashed_vector
from tests.conftest import Call, all_columns, change, files, kept_files, make_store, memory


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store of four rows with vectors."""
    vectors = ((f"{at}", hashed_vector(f"{at}", 8)) for at in range(4))
    return make_store(
        tmp_path / "m.db",
        [memory(key, embedding=vector, embedding_dim=8) for key, vector in vectors],
    )


@pytest.mark.parametrize("linked", [True, False])
def test_a_copy_of_a_run_does_not_take_its_place(
    reembed: Call, path: Path, tmp_path: Path, linked: bool
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
        assert f"lies in two places, {run} and {tmp_path / 'copy' / run.name}" in refused.error
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
        assert f"belongs to {one}, of which {two} is a copy; remove the link" in refused.error
        assert f'set "database" to "{two}" in {staging_root(two)}' in refused.error
    assert (all_columns(two), kept_files(run)) == (contents, kept)
    assert reembed("status", "--db", one).code == 0


def test_a_copy_that_was_looked_at_before_the_other_was_written_writes_nothing(
    reembed: Call, two_copies: tuple[Path, Path]
) -> None:
    one, two = two_copies
    find_runs(two)
    assert reembed("rollback", "--db", one).code == 0
    with (
        pytest.raises(StagingError, match=f"belongs to {one}, of which {two} is a copy"),
        lock_database(two),
    ):
        pass


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
    assert f"belongs to {path}, which is another file than {moved}" in refused.error
    way = f'moved here, set "database" to "{moved}" in {run / "manifest.json"} instead'
    assert way in refused.error
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


def test_without_its_directory_all_files_of_a_backup_are_lost(reembed: Call, path: Path) -> None:
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
    assert f"of the backup in {run / 'backup'} is missing" in verified.error
    refused = reembed("rollback", "--db", path)
    assert refused.code == 6
    assert f"of the backup in {run / 'backup'} is missing" in refused.error
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
    reembed: Call, path: Path, name: str
) -> None:
    before = all_columns(path)
    assert reembed("--db", path, "--max-rows", "2").code == 0
    [run] = staging_root(path).glob("2*")
    (run / name).unlink(missing_ok=True)
    (run / name).mkdir()

    refused = reembed("--db", path)

    assert refused.code == 1
    expected = f"{run / name} is a directory, where reembed keeps a file; reembed leaves it alone"
    assert refused.error.startswith(expected)
    assert all_columns(path) == before
    (run / name).rmdir()
    assert reembed("--db", path).code == 0


@pytest.mark.parametrize("name", ["left.jsonl", "rollback.json"])
def test_a_directory_in_place_of_what_a_rollback_writes_is_named_first(
    reembed: Call, path: Path, name: str
) -> None:
    assert reembed("--db", path).code == 0
    after = all_columns(path)
    [run] = staging_root(path).glob("2*")
    (run / name).mkdir()

    refused = reembed("rollback", "--db", path)

    assert (refused.code, all_columns(path)) == (1, after)
    assert f"{run / name} is a directory, where reembed keeps a file" in refused.error
    (run / name).rmdir()
    assert reembed("rollback", "--db", path).code == 0


WAYS = {
    errno.ENOENT: "restore it from a copy; if another",
    errno.EISDIR: "move what lies there away",
    errno.ENOSPC: "make room, and",
    errno.EROFS: "make it writable, and",
    errno.EMFILE: "make room, or make it writable",
}


@pytest.mark.parametrize("number", WAYS)
def test_trouble_with_a_file_names_it_and_says_what_helps(number: int, tmp_path: Path) -> None:
    named = OSError(
        number, "Said by the system", str(tmp_path / ".x.tmp"), None, str(tmp_path / "x")
    )
    with pytest.raises(StagingError) as raised, failing_clearly(tmp_path):
        raise named
    said = f"the run directory {tmp_path} can't be used (Said by the system: {tmp_path / 'x'}); "
    assert str(raised.value).startswith(said + WAYS[number])


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
        return next(str(run["next"]) for run in runs if run["run_id"] == older.name)

    assert next_of_older() == (
        f"put the lost files of the backup back in {older / 'backup'}; then once run {newer.name} "
        f"is rolled back, reembed rollback --run {older.name}"
    )
    shutil.move(tmp_path / lost.name, lost)
    assert next_of_older() == (
        f"reembed verify --run {older.name} checks it; run {newer.name} must be rolled back before "
        "it can be"
    )
    assert reembed("rollback", "--db", path, "--run", older.name).code == 2
    assert reembed("rollback", "--db", path).code == 0
    assert reembed("rollback", "--db", path, "--run", older.name).code == 0
    assert all_columns(path) == before


def test_a_backup_that_is_not_listed_is_not_said_to_be_gone(reembed: Call, path: Path) -> None:
    before = all_columns(path)
    assert reembed("--db", path).code == 0
    [run] = staging_root(path).glob("2*")
    manifest = json.loads((run / "manifest.json").read_bytes())
    (run / "manifest.json").write_text(json.dumps(manifest | {"saved": {}}))

    verified = reembed("verify", "--db", path)

    assert verified.code == 1
    assert f"its manifest lists none of the files in {run / 'backup'} (1)" in verified.error
    assert "gone" not in verified.error
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
ODD: dict[str, dict[str, pa.Array | None]] = {
    "no key": {"key": None},
    "no others": {"others": None},
    "others is null": {"others": pa.array([None], pa.string())},
    "key is a number": {"key": pa.array([0])},
    "a digest is too short": {"digest": pa.array([b"1"], pa.binary(1))},
}


@pytest.mark.parametrize("odd", ODD)
def test_a_backup_made_by_hand_is_refused_by_its_columns(tmp_path: Path, odd: str) -> None:
    columns = {name: column for name, column in (GIVEN | ODD[odd]).items() if column is not None}
    path = write_table(tmp_path, "0000000.0000", pa.table(columns))

    with pytest.raises(StagingError, match=f"^{path} was not written by reembed, so"):
        read_ledger(tmp_path, 0, with_vectors=True)
    if "others" in odd:
        with pytest.raises(StagingError, match=f"^{path} was not written by reembed, so"):
            saved_columns(tmp_path)


OTHERS = ["zzz:XY", "integer:", "integer:" + "39" * 400, "integer:3A", "real:", "zzz:31", ""]


@pytest.mark.parametrize("value", OTHERS)
def test_a_backup_made_by_hand_is_refused_by_its_other_columns(
    reembed: Call, path: Path, value: str
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
        assert "is not what reembed wrote, so it is not used; restore the backup" in refused.error
    assert all_columns(path) == after


@pytest.mark.parametrize("odd", ["key", "digest", "cause", "vector"])
def test_a_shard_made_by_hand_is_refused(reembed: Call, path: Path, odd: str) -> None:
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
    assert refused.error.startswith(f"{made} was not written by reembed, so it is not used: it ")
    assert all_columns(path) == before
