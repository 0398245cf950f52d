"""Columns, other than the store's own, that hold vectors as long as those that a run replaces."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inline_snapshot import snapshot

from reembed.transforms.stores import Store, copies, find_copies, open_store
from reembed.transforms.stores.codec import encode as encode_ai_memory
from reembed.transforms.stores.formats import encode
from reembed.transforms.stores.vec0 import connect
from tests.conftest import Call, change, make_store, memory, select

DIM = 64
TABLE = {"kind": "table", "table": "docs", "text": ["body"], "vector": "v"}
FLAGS = ("--table", "docs", "--text", "body", "--vector", "v")
ROWS = 20


def vector(at: int, dimension: int = DIM) -> np.ndarray:
    found = np.random.default_rng(at).standard_normal(dimension).astype("<f4")
    unit: np.ndarray = found / np.linalg.norm(found)
    return unit


def blob(format: str, at: int, dimension: int = DIM) -> bytes:
    return encode(format, vector(at, dimension).tobytes())


def make(path: Path, *statements: str, dimension: int = DIM) -> Path:
    """A table of texts and vectors, and what else is to be in the file."""
    with closing(connect(path)) as db, db:
        db.execute("CREATE TABLE docs (id INTEGER PRIMARY KEY, body TEXT, note TEXT, v BLOB)")
        for at in range(ROWS):
            row = (at, f"text {at}", "[1, 2]", blob("f32le", at, dimension))
            db.execute("INSERT INTO docs VALUES (?, ?, ?, ?)", row)
        for statement in statements:
            db.execute(statement)
    return path


def fill(path: Path, statement: str, value: Callable[[int], Any], rows: int = 9) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        for at in range(rows):
            db.execute(statement, [value(at)])


def opened(path: Path) -> Store:
    return open_store(path, None, TABLE)


def found(path: Path, dimension: int = DIM) -> list[tuple[str, str, int, int, bool]]:
    copies = find_copies(opened(path), {dimension})
    return [(one.table, one.column, one.dimension, one.rows, one.counted) for one in copies]


AS_STORED: dict[str, Callable[[int], Any]] = {
    "f32le": lambda at: blob("f32le", at),
    "f32be": lambda at: blob("f32be", at),
    "f64le": lambda at: blob("f64le", at),
    "f16le": lambda at: blob("f16le", at),
    "npy": lambda at: blob("npy", at),
    "json": lambda at: blob("json", at).decode(),
    "json in a BLOB": lambda at: blob("json", at),
    "ai-memory": lambda at: encode_ai_memory(vector(at)),
    "two ways of ai-memory": lambda at: [encode_ai_memory(vector(at)), blob("f32le", at)][at % 2],
}


@pytest.mark.parametrize("format", AS_STORED)
@pytest.mark.parametrize("rowid", ["", "WITHOUT ROWID"])
def test_a_copy_is_found_in_whatever_format(format: str, rowid: str, tmp_path: Path) -> None:
    path = make(
        tmp_path / "m.db",
        f'CREATE TABLE "a copy" (key TEXT PRIMARY KEY, "the vector" BLOB, seen INT) {rowid}',
    )
    fill(
        path,
        'INSERT INTO "a copy" (key, "the vector") VALUES (hex(randomblob(16)), ?)',
        AS_STORED[format],
    )

    assert found(path) == [("a copy", "the vector", DIM, 9, True)]
    assert found(path, DIM + 1) == []


def test_what_is_no_vector_of_the_length_is_none(tmp_path: Path) -> None:
    path = make(
        tmp_path / "m.db",
        "CREATE TABLE hashes (a BLOB, b TEXT, c, d TEXT, e TEXT, f TEXT)",
        "CREATE TABLE empty (v BLOB)",
        f"CREATE VIEW seen AS SELECT v FROM docs WHERE {DIM}",
        "CREATE TABLE derived (id INT, w AS (zeroblob(256)))",
    )
    numbers = [0.5] * DIM
    for at in range(50):
        random = np.random.default_rng(at).bytes(4 * DIM)
        texts = json.dumps(["0.5"] * DIM), json.dumps([*numbers, 1]), "x" * 4 * DIM
        change(path, f"INSERT INTO derived VALUES ({at})")
        with closing(sqlite3.connect(path)) as db, db:
            db.execute("INSERT INTO hashes VALUES (?, ?, ?, ?, ?, ?)", [random, "[]", at, *texts])

    assert found(path) == []


def test_a_vec0_table_is_told_by_its_schema_and_what_keeps_it_is_none(tmp_path: Path) -> None:
    path = make(
        tmp_path / "m.db",
        f"CREATE VIRTUAL TABLE mirror USING vec0(other float[8], v float[{DIM}], b bit[{DIM}])",
        "CREATE VIRTUAL TABLE search USING fts5(body)",
        "INSERT INTO search SELECT body FROM docs",
        "CREATE TABLE mirror_backup (v BLOB)",
        "INSERT INTO mirror_backup SELECT v FROM docs WHERE id < 3",
    )
    with closing(connect(path)) as db, db:
        for at in range(5):
            row = (blob("f32le", at, 8), blob("f32le", at), bytes(DIM // 8))
            db.execute("INSERT INTO mirror (other, v, b) VALUES (?, ?, vec_bit(?))", row)

    assert found(path) == [
        ("mirror", "v", DIM, 5, True),
        ("mirror", "b", DIM, 5, True),
        ("mirror_backup", "v", DIM, 3, True),
    ]


def test_a_column_that_most_rows_leave_empty_is_found(tmp_path: Path) -> None:
    path = make(tmp_path / "m.db", "CREATE TABLE cache (key TEXT, v BLOB)")
    fill(path, "INSERT INTO cache (v) VALUES (?)", lambda _: None, rows=900)
    fill(path, "INSERT INTO cache (v) VALUES (?)", lambda at: blob("f32le", at), rows=1)
    fill(path, "INSERT INTO cache (v) VALUES (?)", lambda _: None, rows=900)

    assert found(path) == [("cache", "v", DIM, 1, True)]


def test_much_json_is_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "m.db", "CREATE TABLE cache (v TEXT)")
    fill(
        path,
        "INSERT INTO cache VALUES (?)",
        lambda at: blob("json", at, [8, DIM][at % 2]).decode(),
        64,
    )

    assert found(path) == [("cache", "v", DIM, 32, True)]
    monkeypatch.setattr(copies, "_PARSED_VALUES", 10)
    [(*place, rows, counted)] = found(path)
    assert (place, counted) == (["cache", "v", DIM], False)
    assert 24 <= rows <= 40


MIRRORS = (
    f"CREATE VIRTUAL TABLE chunks USING vec0(v float[{DIM}])",
    "INSERT INTO chunks (rowid, v) SELECT id + 1, v FROM docs",
    "CREATE TABLE cache (hash TEXT, v BLOB)",
    "INSERT INTO cache SELECT id, v FROM docs WHERE id % 2",
)
MIRRORED = "SELECT hash, v FROM cache UNION ALL SELECT rowid, vectors FROM chunks_vector_chunks00"


def copies_line(text: str, head: str) -> str:
    """What stands after the head of the one line about copies."""
    [line] = [line for line in text.splitlines() if head in line and ".v (" in line]
    return line.partition(head)[2]


def test_plan_and_result_name_the_copies_and_what_follows(reembed: Call, tmp_path: Path) -> None:
    path = make(tmp_path / "m.db", *MIRRORS)
    before = select(path, MIRRORED)

    dry = reembed("--db", path, *FLAGS, "--dry-run")
    plan = reembed("--db", path, *FLAGS, "--dry-run", "--json")
    ran = reembed("--db", path, *FLAGS)
    again = reembed("--db", path, *FLAGS, "--json")

    note = snapshot(
        "this run does not itself write to cache.v (10, 64-dim), chunks.v (20, 64-dim): "
        "these vectors stay in their former space, and can't be compared with the new "
        "ones; move a column with flags of its own, or empty or rebuild it if it is a cache"
    )
    assert copies_line(dry.err, " NOTE — ") == note
    assert copies_line(ran.out, "copies       ") == note
    assert copies_line(dry.out, "copies           ") == snapshot(
        "cache.v (10, 64-dim), chunks.v (20, 64-dim)"
    )
    values = [
        {"table": "cache", "column": "v", "dim": DIM, "rows": 10, "counted": True},
        {"table": "chunks", "column": "v", "dim": DIM, "rows": 20, "counted": True},
    ]
    assert plan.values["copies"] == values
    # Another run, to which the store's own vectors no longer say the length.
    assert (again.code, again.values["copies"]) == (0, values)
    assert select(path, MIRRORED) == before


def test_copies_as_long_as_the_new_vectors_are_the_former_models(
    reembed: Call, tmp_path: Path
) -> None:
    path = make(tmp_path / "m.db", *MIRRORS)
    moved = ("--db", path, "--text", "body", "--text-table", "docs", "--text-key", "id")

    ran = reembed("--db", path, *FLAGS, "--dim", str(DIM))

    assert copies_line(ran.out, "copies       ") == snapshot(
        "this run does not itself write to cache.v (10, 64-dim), chunks.v (20, 64-dim): "
        "these vectors stay in their former space (the former model's, though as long as "
        "the new ones), and can't be compared with the new ones; move a column with flags "
        "of its own, or empty or rebuild it if it is a cache"
    )
    # A column that was moved to the same target with flags of its own is no copy any more.
    change(path, "UPDATE docs SET id = id + 100", "UPDATE docs SET id = id - 99")
    assert reembed(*moved, "--table", "chunks", "--dim", str(DIM)).code == 0
    last = reembed("--db", path, *FLAGS, "--dim", str(DIM), "--json")
    assert [copy["table"] for copy in last.values["copies"]] == ["cache"]


@pytest.mark.parametrize("dimension", [DIM, 8])
def test_a_copy_that_a_trigger_has_written_is_none(
    dimension: int, reembed: Call, tmp_path: Path
) -> None:
    path = make(
        tmp_path / "m.db",
        "CREATE TABLE mirror (id INTEGER PRIMARY KEY, v BLOB)",
        "INSERT INTO mirror SELECT id, v FROM docs",
        "CREATE TABLE cache (v BLOB)",
        "INSERT INTO cache SELECT v FROM docs",
        "CREATE TRIGGER mirrored AFTER UPDATE OF v ON docs "
        "BEGIN UPDATE mirror SET v = new.v WHERE id = new.id; END",
    )

    ran = reembed("--db", path, *FLAGS, "--dim", str(dimension), "--json")

    assert ran.code == 0
    assert [copy["table"] for copy in ran.values["copies"]] == ["cache"]


@pytest.mark.parametrize("stamps", [False, True])
def test_the_archive_of_ai_memory_comes_back_by_a_restore(
    stamps: bool, reembed: Call, tmp_path: Path
) -> None:
    old: dict[str, Any] = {"embedding": encode_ai_memory(vector(0)), "embedding_dim": DIM}
    path = make_store(tmp_path / "m.db", [memory(f"{at}", **old) for at in range(4)])
    change(
        path,
        "INSERT INTO archived_memories (id, tier, namespace, title, content, created_at, "
        "updated_at, archived_at, embedding, embedding_dim) SELECT 'a' || id, tier, namespace, "
        "title, content, created_at, updated_at, updated_at, embedding, embedding_dim "
        "FROM memories WHERE id < '3'",
        *(["ALTER TABLE memories ADD COLUMN embedding_space TEXT"] if stamps else []),
    )

    ran = reembed("--db", path)

    assert ran.code == 0
    [line] = [line for line in ran.out.splitlines() if line.startswith("copies       ")]
    if stamps:
        assert line == snapshot(
            "copies       this run does not itself write to archived_memories.embedding "
            "(3, 64-dim): these vectors stay in their former space, and can't be compared "
            "with the new ones; ai-memory's restore brings an archived memory back with "
            "its old vector, so run reembed with --skip-current-space after a restore"
        )
    else:
        assert line == snapshot(
            "copies       this run does not itself write to archived_memories.embedding "
            "(3, 64-dim): these vectors stay in their former space, and can't be compared "
            "with the new ones; ai-memory's restore brings an archived memory back with "
            "its old vector, so run reembed again after a restore"
        )


def test_what_replaces_no_vector_names_no_copies(reembed: Call, tmp_path: Path) -> None:
    path = make(tmp_path / "m.db", *MIRRORS, "INSERT INTO docs (body) VALUES ('new')")

    ran = reembed("--db", path, *FLAGS, "--missing-only", "--dim", str(DIM), "--json")

    assert (ran.code, ran.values["reembedded"], ran.values["copies"]) == (0, 1, [])
