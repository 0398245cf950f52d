"""Rows that go elsewhere after a run, or hold a vector again: what goes back, and what is said."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from inline_snapshot import snapshot

from reembed.transforms import replacing
from reembed.transforms.replacing import ReplaceJob
from reembed.transforms.rows import RangeVectors
from reembed.transforms.staging import find_runs, read_shards
from reembed.transforms.stores import Replacement
from tests.conftest import Call, change, make_store, memory, select
from tests.wording import wording

FLAGS = ("--store", "table", "--table", "docs", "--text", "body", "--vector", "vec")
ROWS = "SELECT id, body, vec FROM docs ORDER BY id"
VECTORS = "SELECT id, embedding, embedding_dim FROM memories ORDER BY id"
SCHEMAS = ["n INTEGER PRIMARY KEY, id TEXT UNIQUE", "id TEXT PRIMARY KEY"]


def vector(at: int) -> bytes:
    return np.full(2, at + 1.5, "<f4").tobytes()


def table(path: Path, columns: str, rows: int = 12) -> Path:
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(f"CREATE TABLE docs ({columns}, body TEXT, vec BLOB)")
        values = ((f"k{at:02d}", f"text {at}", vector(at)) for at in range(rows))
        db.executemany("INSERT INTO docs (id, body, vec) VALUES (?, ?, ?)", values)
    return path


def memories(path: Path, rows: int = 8) -> Path:
    found = [
        memory(f"{i}", namespace="a", embedding=bytes([i + 1]) * 8, embedding_dim=2)
        for i in range(rows)
    ]
    return make_store(path, found)


@pytest.mark.parametrize("columns", SCHEMAS)
@pytest.mark.parametrize("text", ["text 1", "edited"])
def test_a_row_that_another_program_has_replaced_is_not_taken_for_deleted(
    reembed: Call, tmp_path: Path, columns: str, text: str
) -> None:
    path = table(tmp_path / "t.db", columns)
    before = {key: (body, vec) for key, body, vec in select(path, ROWS)}
    assert reembed("--db", path, *FLAGS, "--key", "id", range_rows=3).code == 0
    change(
        path,
        "INSERT OR REPLACE INTO docs (id, body, vec) "
        f"SELECT id, '{text}', vec FROM docs WHERE id = 'k01'",
    )
    held = {key: (body, vec) for key, body, vec in select(path, ROWS)}["k01"]

    undone = reembed("rollback", "--db", path, "--json")

    edited = text == "edited"
    assert (undone.code, undone.values["restored"]) == (0, 11 if edited else 12)
    reasons = {"its text was edited since": 1} if edited else {}
    assert undone.values["left_by_reason"] == reasons
    after = {key: (body, vec) for key, body, vec in select(path, ROWS)}
    assert after == before | ({"k01": held} if edited else {})


def test_the_runs_own_vector_is_never_put_back_where_a_row_went_on_during_the_run(
    reembed: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = table(tmp_path / "t.db", "id TEXT PRIMARY KEY")
    before = {key: vec for key, _, vec in select(path, ROWS)}
    transact, count = Replacement.transact, iter(range(99))

    def edited(self: Replacement, body: object) -> object:
        done: object = transact(self, body)  # type: ignore[arg-type]
        if next(count) == 0:  # Between the first two transactions.
            change(
                path,
                "INSERT OR REPLACE INTO docs (id, body, vec) "
                "SELECT id, 'edited', vec FROM docs WHERE id = 'k01'",
            )
        return done

    with monkeypatch.context() as patch:
        patch.setattr(Replacement, "transact", edited)
        flags = ("--db", path, *FLAGS, "--key", "id")
        assert reembed(*flags, range_rows=3, rows_at_once=1, first_rows=3).code == 0

    undone = reembed("rollback", "--db", path, "--json")

    assert (undone.code, undone.values["restored"]) == (0, 11)
    assert undone.values["left_by_reason"] == {"its text was edited since": 1}
    after = {key: vec for key, _, vec in select(path, ROWS)}
    assert {key: vec for key, vec in after.items() if key != "k01"} == {
        key: vec for key, vec in before.items() if key != "k01"
    }
    assert len(bytes(after["k01"])) == 32


@pytest.mark.parametrize("same_from", [6, 10])
def test_rows_without_a_key_that_got_numbers_which_none_had_are_left_alone(
    reembed: Call, tmp_path: Path, same_from: int
) -> None:
    path = tmp_path / "t.db"
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("CREATE TABLE docs (body TEXT, vec BLOB)")
        texts = (f"text {at}" if at < same_from else "same" for at in range(10))
        rows = ((text, vector(at)) for at, text in enumerate(texts))
        db.executemany("INSERT INTO docs VALUES (?, ?)", rows)
        db.execute("DELETE FROM docs WHERE rowid = 8")
    assert reembed("--db", path, *FLAGS, range_rows=3).code == 0
    change(path, "VACUUM")
    before = select(path, "SELECT rowid, * FROM docs")

    undone = reembed("rollback", "--db", path)

    assert undone.code == 1
    assert wording(undone.error, tmp_path) == snapshot(
        "the rows of TMP/t.db have other numbers now than when the run RUN wrote them (VACUUM "
        "does that to a table without a key), so it can't be told which row is which; restore a "
        "copy of the file from before, or re-embed the table with the former model"
    )
    assert select(path, "SELECT rowid, * FROM docs") == before


def test_the_vector_that_a_row_held_last_is_what_goes_back(reembed: Call, tmp_path: Path) -> None:
    path = memories(tmp_path / "m.db")
    before = select(path, VECTORS)
    several = {"range_rows": 2, "rows_at_once": 1, "first_rows": 2}
    change(
        path,
        "CREATE TRIGGER jam BEFORE UPDATE OF embedding ON memories WHEN new.id IN ('6', '7') "
        "AND new.embedding IS NOT NULL BEGIN SELECT RAISE(ABORT, 'jam'); END",
    )
    assert reembed("--db", path, **several).code == 6
    change(path, "UPDATE memories SET embedding = NULL, embedding_dim = NULL WHERE id = '6'")
    assert reembed("--db", path, **several).code == 6
    change(path, "DROP TRIGGER jam")
    held = f"x'{(bytes([7]) * 8).hex()}'"
    change(path, f"UPDATE memories SET embedding = {held}, embedding_dim = 2 WHERE id = '6'")
    assert reembed("--db", path, **several).code == 0

    assert reembed("rollback", "--db", path).code == 0

    assert select(path, VECTORS) == before


def test_rows_that_left_the_scope_of_newer_runs_keep_their_way_back(
    reembed: Call, tmp_path: Path
) -> None:
    path = memories(tmp_path / "m.db")
    before = select(path, VECTORS)
    assert reembed("--db", path, "--namespace", "a", "--model", "A").code == 0
    change(path, "UPDATE memories SET namespace = 'b' WHERE id = '3'")
    assert reembed("--db", path, "--namespace", "a", "--model", "B", behaviour=0.5).code == 0

    assert reembed("cleanup", "--db", path, "--json").values["removed"] == []
    for _ in range(2):
        assert reembed("rollback", "--db", path).code == 0
    assert select(path, VECTORS) == before


def test_a_run_whose_row_a_newer_one_has_moved_elsewhere_goes_back_after_it(
    reembed: Call, tmp_path: Path
) -> None:
    path = memories(tmp_path / "m.db")
    before = select(path, VECTORS)
    assert reembed("--db", path, "--namespace", "a", "--model", "A").code == 0
    change(path, "UPDATE memories SET namespace = 'b' WHERE id = '3'")
    assert reembed("--db", path, "--namespace", "b", "--model", "B", behaviour=0.5).code == 0
    older, newer = (run.run_id for run, _ in find_runs(path))

    refused = reembed("rollback", "--db", path, "--run", older)

    assert refused.code == 2
    said = refused.error.replace(older, "OLDER").replace(newer, "NEWER")
    assert said == snapshot(
        "run NEWER has replaced vectors since run OLDER did; undo the newer one first (reembed "
        "rollback)"
    )
    for _ in range(2):
        assert reembed("rollback", "--db", path).code == 0
    assert select(path, VECTORS) == before


def test_a_shard_that_comes_after_all_was_saved_is_not_used(
    reembed: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = memories(tmp_path / "m.db")
    before = select(path, VECTORS)
    write = replacing._write_all

    def late(job: ReplaceJob, table: Replacement, *more: object) -> None:
        """A worker that should be gone stages the first range again, a little otherwise."""
        rows = read_shards(job.run.shards_of(0), with_vectors=True)
        other = tuple(
            row._replace(vector=(np.frombuffer(row.vector or b"", "<f4") + 1e-6).tobytes())
            for row in rows
        )
        job.run.write_shard(RangeVectors(job.ranges[0], 0, 8, other), pass_number=2)
        write(job, table, *more)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(replacing, "_write_all", late)
        assert reembed("--db", path, range_rows=4).code == 0

    checked = reembed("verify", "--db", path, "--json")
    assert (checked.code, checked.values["findings"]) == (0, 0)
    assert reembed("rollback", "--db", path).code == 0
    assert select(path, VECTORS) == before


def test_a_part_of_a_run_of_which_nothing_can_go_back_can_be_removed_as_the_message_says(
    reembed: Call, tmp_path: Path
) -> None:
    path = memories(tmp_path / "m.db")
    assert reembed("--db", path, "--max-rows", "1", "--partial").code == 6
    change(path, "UPDATE memories SET content = 'edited' WHERE id = '0'")
    [(run, _)] = find_runs(path)

    undone = reembed("rollback", "--db", path)

    assert undone.code == 1
    said = undone.error.replace(run.run_id, "THIS")
    assert wording(said, tmp_path) == snapshot(
        "none of the 1 rows that the run THIS wrote in TMP/m.db could be put back (its text was "
        "edited since 1), so it stays as it is; if nothing of it is wanted back, reembed cleanup "
        "--run THIS --yes removes it"
    )
    cleaned = reembed("cleanup", "--db", path, "--run", run.run_id, "--yes", "--json")
    assert (cleaned.code, cleaned.values["removed"]) == (0, [run.run_id])
