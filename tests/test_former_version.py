"""Runs that version 0.1.0 has left, staged, half replaced and replaced, in the hands of this one.

`fixtures/run-0.1.0-*.tar.gz` were made by it: 20 rows with vectors of two numbers, of which the
last is not taken by the model, in ranges of four.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pytest
from inline_snapshot import snapshot

from reembed.transforms.staging import find_runs
from tests.conftest import FIXTURES, Call, select
from tests.wording import wording

FORMER = {f"{i:02d}": bytes([i if i < 19 else 7]) * 8 for i in range(20)}


def unpack_run(state: str, directory: Path) -> Path:
    """A database with the run that was left in this state, as it would be after a move."""
    with tarfile.open(FIXTURES / f"run-0.1.0-{state}.tar.gz") as archive:
        archive.extractall(directory, filter="data")
    path = directory / "m.db"
    root = directory / "m.db.reembed"
    for one in (root, *root.rglob("*")):  # The filter has taken none of it away, nor the umask.
        one.chmod(0o700 if one.is_dir() else 0o600)
    return path


def vectors(path: Path) -> dict[str, bytes]:
    return {str(key): bytes(v) for key, v in select(path, "SELECT id, embedding FROM memories")}


def new_rows(path: Path) -> set[str]:
    return {key for key, vector in vectors(path).items() if len(vector) > 8}


ALL_NEW = set(FORMER) - {"19"}


@pytest.mark.parametrize("state", ["staged", "half-replaced"])
def test_a_run_that_was_begun_is_finished_verified_and_rolled_back(
    state: str, reembed: Call, tmp_path: Path
) -> None:
    path = unpack_run(state, tmp_path)

    ran = reembed("--db", path, "--json", range_rows=4)

    assert (ran.code, ran.values["reembedded"], ran.values["skipped"]) == (0, 19, 1)
    assert len(ran.texts) == {"staged": 12, "half-replaced": 0}[state]
    assert new_rows(path) == ALL_NEW
    checked = reembed("verify", "--db", path, "--json")
    assert (checked.code, checked.values["checked"]) == (0, 19)
    undone = reembed("rollback", "--db", path, "--json")
    assert (undone.code, undone.values["restored"], undone.values["left"]) == (0, 19, 0)
    assert vectors(path) == FORMER


@pytest.mark.parametrize("state", ["half-replaced", "replaced"])
def test_a_run_that_has_replaced_is_rolled_back(state: str, reembed: Call, tmp_path: Path) -> None:
    path = unpack_run(state, tmp_path)
    new = new_rows(path)
    assert (new == ALL_NEW) is (state == "replaced")

    undone = reembed("rollback", "--db", path, "--json")

    assert (undone.code, undone.values["restored"]) == (0, len(new))
    assert vectors(path) == FORMER


def test_status_says_that_nothing_tells_whether_the_backup_is_complete(
    reembed: Call, tmp_path: Path
) -> None:
    path = unpack_run("replaced", tmp_path)

    shown = wording(reembed("status", "--db", path).out, tmp_path)
    assert shown == snapshot("""\
run RUN, begun 2026-12-01T00:04:08Z
state        replaced
target       all-MiniLM-L6-v2 (8-dim)
about        all, all namespaces
rows         20
re-embedded  19
skipped      1
on disk      0.0 MB, of which the backup 0.0 MB
backup       by version 0.1.0, which kept no list of its files: that all are there can't be checked
directory    TMP/m.db.reembed/RUN
next         reembed verify checks it; reembed rollback undoes it
""")
    [run] = reembed("status", "--db", path, "--json").values["runs"]
    assert (run["backup_listed"], run["backup_lost"]) == (False, [])
    # What is there when it is first worked on is known from then on.
    [(found, _)] = find_runs(path)
    first, *_ = sorted(found.backup.iterdir())
    first.write_bytes(first.read_bytes()[:-1])
    undone = reembed("rollback", "--db", path, "--json")
    assert (undone.code, undone.values["restored"]) == (6, 15)
    assert undone.values["lost_files"] == {first.name: None}


def test_a_run_that_replaces_now_comes_after_those_of_the_former_version(
    reembed: Call, tmp_path: Path
) -> None:
    path = unpack_run("replaced", tmp_path)
    [(former, _)] = find_runs(path)
    # Whatever the clock said then.
    later = former.path.with_name("29991231T235959Z-ffff")
    manifest = json.loads((former.path / "manifest.json").read_text())
    (former.path / "manifest.json").write_text(json.dumps(manifest | {"run_id": later.name}))
    shutil.move(former.path, later)

    assert reembed("--db", path, "--model", "other", range_rows=4, behaviour=0.5).code == 0

    runs = reembed("status", "--db", path, "--json").values["runs"]
    assert runs[0]["run_id"] == later.name
    for restored in (19, 19):
        undone = reembed("rollback", "--db", path, "--json")
        assert undone.code == 0, undone.err
        assert undone.values["restored"] == restored
    assert vectors(path) == FORMER


@pytest.mark.parametrize("state", ["half-replaced", "replaced"])
def test_a_backup_file_that_must_have_been_there_is_missed_without_a_list(
    state: str, reembed: Call, tmp_path: Path
) -> None:
    path = unpack_run(state, tmp_path)
    [(found, _)] = find_runs(path)
    first, *_ = sorted(found.backup.iterdir())
    content = first.read_bytes()
    first.unlink()

    undone = reembed("rollback", "--db", path, "--json")

    assert undone.code == 6
    assert wording(undone.error, tmp_path) == snapshot(
        "the file 0000000.0000.*.parquet (how many rows is not known) of the backup in "
        "TMP/m.db.reembed/RUN/backup is missing or damaged, so rows of TMP/m.db keep the "
        "vectors that run RUN gave them; put the file back from a copy of it and roll back "
        "again, or re-embed these rows with the former model"
    )
    assert new_rows(path) == {"00", "01", "02", "03"}
    first.write_bytes(content)
    first.chmod(0o600)
    assert reembed("rollback", "--db", path).code == 0
    assert vectors(path) == FORMER
