"""Vectors that can't be stored are refused before anything is embedded."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from inline_snapshot import snapshot

from reembed.transforms.errors import UndoneError
from reembed.transforms.stores import Replacement, check_update, open_store, trial, try_update
from reembed.transforms.stores.vec0 import connect
from tests.conftest import Call, change, files, kept_files, make_store, memory, select
from tests.store_kinds import KINDS, NEW_DIMENSION, OLD_DIMENSION, Kind, Vec, old_vector
from tests.wording import line_with, wording

TABLE = "CREATE TABLE t (id INTEGER PRIMARY KEY, body TEXT, model TEXT, v BLOB)"
COLUMNS = ("--table", "t", "--text", "body", "--vector", "v", "--space-column", "model")
FLAGS = (*COLUMNS, "--model", "m")
DOCS = TABLE.replace("v BLOB", "v BLOB, doc INTEGER, UNIQUE (doc, model)")
SPACES = "CREATE TABLE models (name TEXT PRIMARY KEY)"


def make(path: Path, *statements: str) -> Path:
    """Write a table of six texts with old vectors, and then what the statements add."""
    with open_with_functions(path) as db:
        tables = [statement for statement in statements if statement.startswith("CREATE TABLE")]
        for statement in tables or [TABLE]:
            db.execute(statement)
        for at in range(6):
            row = (at, f"text {at}", old_vector(at).tobytes())
            db.execute("INSERT INTO t (id, body, model, v) VALUES (?, ?, 'old', ?)", row)
        for statement in statements:
            if statement not in tables:
                db.execute(statement)
    return path


@contextmanager
def open_with_functions(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection with sqlite-vec and a function that other programs don't have."""
    with closing(connect(path)) as db, db:
        db.create_function("their_function", 1, lambda value: 7, deterministic=True)
        yield db


BEFORE_THE_PLAN = {
    "a check of the length": (
        [TABLE.replace("v BLOB", f"v BLOB CHECK (length(v) = {4 * OLD_DIMENSION})")],
        snapshot(
            "the table t of TMP/t.db takes no such vectors: CHECK constraint failed: "
            "length(v) = 20; change the CHECK of the table, or choose a model whose vectors "
            "it allows; nothing was embedded or changed"
        ),
    ),
    "a check of the table": (
        [TABLE.replace("v BLOB", "v BLOB, CHECK (model <> 'm')")],
        snapshot(
            "the table t of TMP/t.db takes no such vectors: CHECK constraint failed: model "
            "<> 'm'; change the CHECK of the table, or choose a model whose vectors it "
            "allows; nothing was embedded or changed"
        ),
    ),
    "a generated column": (
        [TABLE.replace("v BLOB", "v BLOB, n INTEGER AS (their_function(v)) STORED")],
        snapshot(
            "the table t of TMP/t.db takes no such vectors: unknown function: "
            "their_function() (in the table t); only the program that made it has this "
            "function: drop it, run again, and make it again with that program; nothing was "
            "embedded or changed"
        ),
    ),
    "an index with their function": (
        ["CREATE INDEX their_index ON t (their_function(v))"],
        snapshot(
            "the table t of TMP/t.db takes no such vectors: unknown function: "
            "their_function() (in the index their_index); only the program that made it has "
            "this function: drop it, run again, and make it again with that program; nothing "
            "was embedded or changed"
        ),
    ),
    "a trigger with their function": (
        ["CREATE TRIGGER theirs AFTER UPDATE ON t BEGIN SELECT their_function(new.v); END"],
        snapshot(
            "the table t of TMP/t.db takes no such vectors: no such function: their_function "
            "(in the trigger theirs); only the program that made it has this function: drop "
            "it, run again, and make it again with that program; nothing was embedded or "
            "changed"
        ),
    ),
    "a trigger for a module that is not there": (
        [
            "PRAGMA writable_schema = ON",
            "INSERT INTO sqlite_schema VALUES ('table', 'theirs', 'theirs', 0, "
            "'CREATE VIRTUAL TABLE theirs USING their_module(v)')",
            "INSERT INTO sqlite_schema VALUES ('trigger', 'copies', 't', 0, "
            "'CREATE TRIGGER copies AFTER UPDATE OF v ON t BEGIN DELETE FROM theirs; END')",
        ],
        snapshot(
            "the table t of TMP/t.db takes no such vectors: no such module: their_module "
            "(triggers that fire: copies); drop the trigger that is in the way; nothing was "
            "embedded or changed"
        ),
    ),
    "a trigger for a vec0 table of another length": (
        [
            "CREATE VIRTUAL TABLE mirror USING vec0(embedding float[5])",
            "CREATE TRIGGER copies AFTER UPDATE OF v ON t BEGIN "
            "DELETE FROM mirror WHERE rowid = old.id; "
            "INSERT INTO mirror (rowid, embedding) VALUES (new.id, new.v); END",
        ],
        snapshot(
            "the table t of TMP/t.db takes no such vectors: Dimension mismatch for inserted "
            'vector for the "embedding" column. Expected 5 dimensions but received 8. (the '
            "trigger copies writes to mirror); recreate that table for vectors of this "
            "length, or drop the trigger, and run again; nothing was embedded or changed"
        ),
    ),
    "a unique index, and equal texts": (
        ["UPDATE t SET body = 'text 0' WHERE id = 1", "CREATE UNIQUE INDEX once ON t (v)"],
        snapshot(
            "the index once of the table t of TMP/t.db allows no value of v twice, and rows "
            "with the same text get the same; drop the index, or leave out such rows, and "
            "run again; nothing was embedded or changed"
        ),
    ),
    "a unique index on the model": (
        ["UPDATE t SET model = id", "CREATE UNIQUE INDEX once ON t (model)"],
        snapshot(
            "the index once of the table t of TMP/t.db allows no value of model twice, and "
            "all rows get the same; drop the index, or leave out such rows, and run again; "
            "nothing was embedded or changed"
        ),
    ),
    "a unique index on the model and a column that stays": (
        [DOCS, "UPDATE t SET doc = id / 2, model = id"],
        snapshot(
            "the index sqlite_autoindex_t_1 of the table t of TMP/t.db allows no value of "
            "doc, model twice, and all rows with one doc get the same; drop the index, or "
            "leave out such rows, and run again; nothing was embedded or changed"
        ),
    ),
}
BEFORE_THE_RUN = {
    "a trigger that forbids it": (
        ["CREATE TRIGGER no BEFORE UPDATE OF v ON t BEGIN SELECT RAISE(ABORT, 'never'); END"],
        snapshot(
            "the table t of TMP/t.db takes no such vectors: never (triggers that fire: no); "
            "drop the trigger that is in the way; nothing was embedded or changed"
        ),
    ),
    "a trigger that takes the transaction with it": (
        ["CREATE TRIGGER no BEFORE UPDATE OF v ON t BEGIN SELECT RAISE(ROLLBACK, 'never'); END"],
        snapshot(
            "the table t of TMP/t.db takes no such vectors: never (triggers that fire: no); "
            "drop the trigger that is in the way; nothing was embedded or changed"
        ),
    ),
    "a trigger that ignores it": (
        ["CREATE TRIGGER no BEFORE UPDATE OF v ON t BEGIN SELECT RAISE(IGNORE); END"],
        snapshot(
            "a vector that is written does not stay in the table t of TMP/t.db (triggers "
            "that fire: no), so its rows could never be done; drop the trigger that does it, "
            "and run again; nothing was embedded or changed"
        ),
    ),
    "a trigger that puts the former vector back": (
        [
            "CREATE TRIGGER back AFTER UPDATE OF v ON t BEGIN "
            "UPDATE t SET v = old.v WHERE id = old.id; END"
        ],
        snapshot(
            "a vector that is written does not stay in the table t of TMP/t.db (triggers "
            "that fire: back), so its rows could never be done; drop the trigger that does "
            "it, and run again; nothing was embedded or changed"
        ),
    ),
    "a trigger that changes the stamp": (
        [
            "CREATE TRIGGER stamps AFTER UPDATE OF v ON t BEGIN "
            "UPDATE t SET model = 'mine' WHERE id = old.id; END"
        ],
        snapshot(
            "a stamp or a length that is written beside a vector does not stay in the table "
            "t of TMP/t.db (triggers that fire: stamps), so its rows could never be done; "
            "drop the trigger that does it, and run again; nothing was embedded or changed"
        ),
    ),
    "a trigger that deletes the row": (
        ["CREATE TRIGGER gone AFTER UPDATE OF v ON t BEGIN DELETE FROM t WHERE id = old.id; END"],
        snapshot(
            "a vector that is written does not stay in the table t of TMP/t.db (triggers "
            "that fire: gone), so its rows could never be done; drop the trigger that does "
            "it, and run again; nothing was embedded or changed"
        ),
    ),
    "a trigger that edits the text": (
        [
            "CREATE TRIGGER edits AFTER UPDATE OF v ON t BEGIN "
            "UPDATE t SET body = body || '!' WHERE id = old.id; END"
        ],
        snapshot(
            "a row's text does not stay when its vector is written in the table t of "
            "TMP/t.db (triggers that fire: edits), so its rows could never be done; drop the "
            "trigger that does it, and run again; nothing was embedded or changed"
        ),
    ),
    "a trigger that changes the key": (
        [
            TABLE.replace("id INTEGER PRIMARY KEY", "id INTEGER UNIQUE"),
            "CREATE TRIGGER renames AFTER UPDATE OF v ON t BEGIN "
            "UPDATE t SET id = id + 100 WHERE rowid = old.rowid; END",
        ],
        snapshot(
            "a row's key does not stay when its vector is written in the table t of TMP/t.db "
            "(triggers that fire: renames), so its rows could never be done; drop the "
            "trigger that does it, and run again; nothing was embedded or changed"
        ),
    ),
    "a foreign key": (
        [
            SPACES,
            TABLE.replace("model TEXT", "model TEXT REFERENCES models(name)"),
            "INSERT INTO models VALUES ('old')",
        ],
        snapshot(
            "the table t of TMP/t.db has a foreign key to the table models, which has no row "
            "for the new value; add it there first, or choose another name with --space; "
            "nothing was embedded or changed"
        ),
    ),
    "a foreign key to the primary key": (
        [
            SPACES,
            TABLE.replace("model TEXT", "model TEXT REFERENCES models"),
            "INSERT INTO models VALUES ('old')",
        ],
        snapshot(
            "the table t of TMP/t.db has a foreign key to the table models, which has no row "
            "for the new value; add it there first, or choose another name with --space; "
            "nothing was embedded or changed"
        ),
    ),
}
ALLOWED = {
    "a foreign key that has its row": [
        SPACES,
        TABLE.replace("model TEXT", "model TEXT REFERENCES models(name)"),
        "INSERT INTO models VALUES ('old'), ('m')",
    ],
    "a foreign key that never held": [
        TABLE.replace("model TEXT", "model TEXT REFERENCES models(name)")
    ],
    "a unique index, and other texts": ["CREATE UNIQUE INDEX once ON t (v)"],
    "a unique index on the model, and other values in the column that stays": [
        DOCS,
        "UPDATE t SET doc = id WHERE id > 2",
    ],
    "a check that old rows break": [
        TABLE,
        "PRAGMA writable_schema = ON",
        f"UPDATE sqlite_schema SET sql = '{TABLE[:-1]}, CHECK (length(v) = 32))' WHERE name = 't'",
    ],
    "a check of their function on another column": [
        TABLE.replace("body TEXT", "body TEXT CHECK (their_function(body) = 7)")
    ],
    "a trigger that says when": [
        "CREATE TRIGGER stamps AFTER UPDATE OF v ON t BEGIN "
        "UPDATE t SET body = body WHERE id = old.id; END"
    ],
}


@pytest.mark.parametrize("name", BEFORE_THE_PLAN)
def test_the_plan_refuses_what_can_t_be_stored(name: str, reembed: Call, tmp_path: Path) -> None:
    statements, says = BEFORE_THE_PLAN[name]
    path = make(tmp_path / "t.db", *statements)
    before = files(tmp_path)

    plan = reembed("--db", path, *FLAGS, "--dry-run")
    ran = reembed("--db", path, *FLAGS)

    assert (plan.code, ran.code) == (1, 1)
    assert wording(plan.error, tmp_path) == wording(ran.error, tmp_path) == says
    assert not ran.texts
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", BEFORE_THE_RUN)
def test_a_run_refuses_what_can_t_be_stored(name: str, reembed: Call, tmp_path: Path) -> None:
    statements, says = BEFORE_THE_RUN[name]
    path = make(tmp_path / "t.db", *statements)
    before = kept_files(tmp_path)

    key = ("--key", "id")
    assert reembed("--db", path, *FLAGS, *key, "--dry-run").code == 0
    ran = reembed("--db", path, *FLAGS, *key)

    assert ran.code == 1
    assert wording(ran.error, tmp_path) == says
    assert not ran.texts
    assert kept_files(tmp_path) == before


@pytest.mark.parametrize("name", ALLOWED)
def test_what_can_be_stored_is_not_refused(name: str, reembed: Call, tmp_path: Path) -> None:
    path = make(tmp_path / "t.db", *ALLOWED[name])

    ran = reembed("--db", path, *FLAGS)

    assert ran.code == 0
    assert select(path, "SELECT DISTINCT length(v), model FROM t") == [(32, "m")]


def test_rows_that_are_left_alone_may_hold_what_an_index_allows_once(
    reembed: Call, tmp_path: Path
) -> None:
    path = make(tmp_path / "t.db", DOCS, "UPDATE t SET doc = id, v = zeroblob(32)")
    change(path, "UPDATE t SET doc = 1, model = 'm' WHERE id = 2")

    refused = reembed("--db", path, *FLAGS, "--skip-current-space")
    change(path, "UPDATE t SET doc = 2 WHERE id = 2")
    ran = reembed("--db", path, *FLAGS, "--skip-current-space", "--json")

    assert refused.code == 1
    assert wording(refused.error, tmp_path) == snapshot(
        "the index sqlite_autoindex_t_1 of the table t of TMP/t.db allows no value of doc, "
        "model twice, and all rows with one doc get the same; drop the index, or leave out "
        "such rows, and run again; nothing was embedded or changed"
    )
    assert (ran.code, ran.values["reembedded"]) == (0, 5)


def test_a_strict_table_refuses_another_type(reembed: Call, tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, body TEXT, v TEXT) STRICT")
        db.execute("INSERT INTO t (body) VALUES ('a'), ('b')")
    before = files(tmp_path)
    flags = ("--table", "t", "--text", "body", "--vector", "v")

    ran = reembed("--db", path, *flags)

    assert ran.code == 1
    assert wording(ran.error, tmp_path) == snapshot(
        "the table t of TMP/t.db takes no such vectors: cannot store BLOB value in TEXT "
        "column t.v; change what forbids it, or choose a model whose vectors it allows; "
        "nothing was embedded or changed"
    )
    assert files(tmp_path) == before
    assert reembed("--db", path, *flags, "--format", "json").code == 0


def test_the_trial_is_of_a_row_that_gets_a_vector(reembed: Call, tmp_path: Path) -> None:
    path = make(
        tmp_path / "t.db",
        "UPDATE t SET v = NULL WHERE id = 5",
        "CREATE TRIGGER jam BEFORE UPDATE OF v ON t WHEN old.id < 3 "
        "BEGIN SELECT RAISE(ABORT, 'no'); END",
    )

    assert reembed("--db", path, *FLAGS, "--missing-only").code == 0
    assert reembed("--db", path, *FLAGS, "--where", "id > 3").code == 0
    assert reembed("--db", path, *FLAGS).code == 1


def test_a_copy_that_a_trigger_writes_moves_along_and_back(reembed: Call, tmp_path: Path) -> None:
    path = make(
        tmp_path / "t.db",
        "CREATE VIRTUAL TABLE mirror USING vec0(embedding float[5])",
        "INSERT INTO mirror (rowid, embedding) SELECT id, v FROM t",
        "CREATE TRIGGER copies AFTER UPDATE OF v ON t BEGIN "
        "DELETE FROM mirror WHERE rowid = old.id; "
        "INSERT INTO mirror (rowid, embedding) VALUES (new.id, new.v); END",
        "CREATE VIRTUAL TABLE words USING fts5(body, content='t', content_rowid='id')",
        "CREATE TRIGGER indexes AFTER UPDATE ON t BEGIN "
        "INSERT INTO words (rowid, body) VALUES (new.id, new.body); END",
    )

    def held() -> list[tuple[bytes, bytes]]:
        with closing(connect(path)) as db:
            both = "SELECT v, embedding FROM t JOIN mirror ON mirror.rowid = id ORDER BY id"
            return db.execute(both).fetchall()

    before = held()
    plan = reembed("--db", path, *FLAGS, "--dim", "5", "--dry-run")
    ran = reembed("--db", path, *FLAGS, "--dim", "5")
    after = held()

    assert (plan.code, ran.code) == (0, 0)
    for said in (plan.err, ran.err):
        assert line_with("trigger", said) == snapshot(
            "reembed: NOTE — replacing a vector fires the trigger copies, which also writes "
            "to mirror; a rollback fires it as well"
        )
    assert all(vector == copy for vector, copy in after)
    assert not {vector for vector, _ in before} & {vector for vector, _ in after}
    assert reembed("verify", "--db", path).code == 0
    assert reembed("rollback", "--db", path).code == 0
    assert held() == before


def test_a_rollback_that_a_trigger_would_stop_is_not_begun(reembed: Call, tmp_path: Path) -> None:
    path = make(
        tmp_path / "t.db",
        "CREATE VIRTUAL TABLE mirror USING vec0(embedding float[8])",
        "CREATE TRIGGER copies AFTER UPDATE OF v ON t BEGIN "
        "DELETE FROM mirror WHERE rowid = old.id; "
        "INSERT INTO mirror (rowid, embedding) VALUES (new.id, new.v); END",
    )
    vectors = "SELECT id, v, model FROM t"
    before = select(path, vectors)
    assert reembed("--db", path, *FLAGS).code == 0
    after = select(path, vectors)

    undone = reembed("rollback", "--db", path)

    assert undone.code == 1
    assert wording(undone.error, tmp_path) == snapshot(
        "the table t of TMP/t.db takes no such vectors: Dimension mismatch for inserted "
        'vector for the "embedding" column. Expected 8 dimensions but received 5. (the '
        "trigger copies writes to mirror); recreate that table for vectors of this length, "
        "or drop the trigger, and run again; nothing was embedded or changed"
    )
    assert select(path, vectors) == after
    assert reembed("status", "--db", path, "--json").values["runs"][0]["state"] == "replaced"
    with closing(connect(path)) as db, db:
        db.execute("DROP TABLE mirror")
        db.execute("CREATE VIRTUAL TABLE mirror USING vec0(embedding float[5])")
    assert reembed("rollback", "--db", path).code == 0
    assert select(path, vectors) == before


def test_a_trigger_for_vec0_says_what_to_install(
    reembed: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(
        tmp_path / "t.db",
        "CREATE VIRTUAL TABLE mirror USING vec0(embedding float[5])",
        "CREATE TRIGGER copies AFTER UPDATE OF v ON t BEGIN DELETE FROM mirror; END",
    )
    monkeypatch.setitem(sys.modules, "sqlite_vec", None)
    before = files(tmp_path)

    ran = reembed("--db", path, *FLAGS, "--dry-run")

    assert ran.code == 1
    assert wording(ran.error, tmp_path) == snapshot(
        "vec0 tables need the packages of sqlite-vec, which are not installed: pip install "
        "'.[sqlite-vec]' in the checkout of reembed"
    )
    assert files(tmp_path) == before


def test_a_trigger_of_ai_memory_may_write_to_vec0(reembed: Call, tmp_path: Path) -> None:
    path = make_store(tmp_path / "ai-memory.db", [memory("a"), memory("b")])
    with closing(connect(path)) as db, db:
        db.execute("CREATE VIRTUAL TABLE mirror USING vec0(memory TEXT PRIMARY KEY, v float[8])")
        db.execute(
            "CREATE TRIGGER copies AFTER UPDATE OF embedding ON memories BEGIN "
            "INSERT INTO mirror VALUES (new.id, substr(new.embedding, 2)); END"
        )

    assert reembed("--db", path).code == 0

    with closing(connect(path)) as db:
        assert db.execute("SELECT count(*) FROM mirror").fetchone() == (2,)


def test_a_vec0_table_that_can_t_be_as_long_is_refused(reembed: Call, tmp_path: Path) -> None:
    kind = next(kind for kind in KINDS if isinstance(kind, Vec))
    path = kind.make(tmp_path / "v.db", ["a", "b"])
    before = files(tmp_path)

    plan = reembed("--db", path, *kind.flags, "--model", "m", "--dim", "9000", "--dry-run")
    ran = reembed("--db", path, *kind.flags, "--model", "m", "--dim", "9000")

    assert (plan.code, ran.code, ran.texts) == (1, 1, set())
    assert wording(plan.error, tmp_path) == snapshot(
        "the table items of TMP/v.db takes no such vectors: vec0 constructor error: "
        "Dimension on vector column too large, provided 9000, maximum 8192; change what "
        "forbids it, or choose a model whose vectors it allows; nothing was embedded or "
        "changed"
    )
    assert files(tmp_path) == before


def test_a_vec0_table_with_bits_beside_is_refused_if_it_is_made_anew(
    reembed: Call, tmp_path: Path
) -> None:
    """The other vectors are read as BLOBs, which vec0 takes for floats."""
    path = tmp_path / "v.db"
    with closing(connect(path)) as db, db:
        db.execute("CREATE VIRTUAL TABLE v USING vec0(a float[8], b bit[8], +body TEXT)")
        db.execute("INSERT INTO v (a, b, body) VALUES (?, vec_bit(x'0f'), 'text')", (bytes(32),))
    before = files(tmp_path)

    longer = reembed("--db", path, "--text", "body", "--vector", "a", "--dim", "16")

    assert (longer.code, longer.texts) == (1, set())
    assert wording(longer.error, tmp_path) == snapshot(
        'the table v of TMP/v.db takes no such vectors: Inserted vector for the "b" column '
        "is invalid: invalid float32 vector BLOB length. Must be divisible by 4, found 1; "
        "change what forbids it, or choose a model whose vectors it allows; nothing was "
        "embedded or changed"
    )
    assert files(tmp_path) == before
    assert reembed("--db", path, "--text", "body", "--vector", "a", "--dim", "8").code == 0


@pytest.mark.parametrize(
    "write",
    ["DELETE FROM t WHERE id = 0", "UPDATE t SET body = 'new' WHERE id = 0", "DELETE FROM t"],
)
def test_a_row_that_is_changed_before_its_trial_is_no_reason_to_refuse(
    write: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path / "t.db")
    config = {"kind": "table", "table": "t", "text": ["body"], "vector": "v"}
    store = open_store(path, config=config)
    ranges, _ = store.cut_ranges(10, 1)
    found = trial._first_row(store, ranges)
    monkeypatch.setattr(trial, "_first_row", lambda *_: found)
    change(path, write)
    before = files(tmp_path)

    check_update(store, ranges, model="m", dimension=8)
    try_update(store, ranges, model="m", dimension=8)

    assert files(tmp_path) == before


@pytest.mark.parametrize(("mode", "dimension"), [("delete", OLD_DIMENSION), ("wal", NEW_DIMENSION)])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_trial_leaves_no_trace(
    kind: Kind, dimension: int, mode: str, reembed: Call, tmp_path: Path
) -> None:
    (tmp_path / "store").mkdir()
    path = kind.make(tmp_path / "store" / "store.db", ["a", "b", "c"])
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA journal_mode = {mode}")
    before = files(path.parent)
    flags = (*kind.flags, "--model", "m", "--dim", str(dimension), "--max-rows", "1")

    ran = reembed("--db", path, "--run-dir", tmp_path / "runs", *flags, "--json")

    assert (ran.code, ran.values["staged"]) == (0, 1)
    assert {
        name: held for name, held in files(path.parent).items() if "reembed" not in name
    } == before


def test_an_index_may_allow_once_what_rows_without_a_text_never_get(
    reembed: Call, tmp_path: Path
) -> None:
    path = make(tmp_path / "t.db", "CREATE UNIQUE INDEX once ON t (v)")
    change(path, "UPDATE t SET body = NULL WHERE id < 2")

    assert reembed("--db", path, *FLAGS).code == 0


@pytest.mark.parametrize(
    ("write", "named"),
    [
        ("INSERT INTO t (body, v) VALUES (old.body, old.v)", True),
        ("DELETE FROM t WHERE body = 'none'", True),
        ("UPDATE t SET id = id WHERE id = old.id", False),
    ],
)
def test_a_trigger_that_adds_rows_to_the_table_or_deletes_some_is_named(
    write: str, named: bool, reembed: Call, tmp_path: Path
) -> None:
    path = make(tmp_path / "t.db", f"CREATE TRIGGER own AFTER UPDATE OF v ON t BEGIN {write}; END")

    plan = reembed("--db", path, *FLAGS, "--dry-run")

    assert plan.code == 0
    notes = [line for line in plan.err.splitlines() if "trigger" in line]
    assert notes == (
        [
            snapshot(
                "reembed: NOTE — replacing a vector fires the trigger own, which also "
                "writes to t; a rollback fires it as well"
            )
        ]
        if named
        else []
    )


@pytest.mark.parametrize("rows_at_once", [None, 1])
def test_a_trigger_that_ignores_a_later_row_leaves_a_run_that_can_go_on(
    rows_at_once: int | None, reembed: Call, tmp_path: Path
) -> None:
    ignores = "CREATE TRIGGER no BEFORE UPDATE OF v ON t WHEN old.id = 1 BEGIN SELECT"
    path = make(tmp_path / "t.db", f"{ignores} RAISE(IGNORE); END")
    vectors = "SELECT id, v, model FROM t"
    before = select(path, vectors)
    at_once = {} if rows_at_once is None else {"rows_at_once": rows_at_once, "first_rows": 2}

    stopped = reembed("--db", path, *FLAGS, range_rows=2, **at_once)

    assert stopped.code == 1
    assert (
        wording(stopped.error, tmp_path)
        == snapshot(
            {
                None: (
                    "SQLite wrote 5 of 6 rows of TMP/t.db, as it does if a trigger "
                    "ignores some; that transaction was undone, and the store is as it "
                    "was; drop the trigger, and run again"
                ),
                1: (
                    "SQLite wrote 1 of 2 rows of TMP/t.db, as it does if a trigger "
                    "ignores some; that transaction was undone, and the store is as it "
                    "was; drop the trigger, and run again"
                ),
            }
        )[rows_at_once]
    )
    assert "incomplete" not in stopped.err
    assert select(path, vectors) == before
    status = reembed("status", "--db", path, "--json")
    assert (status.code, status.values["runs"][0]["state"]) == (0, "staging")
    change(path, "DROP TRIGGER no")
    done = reembed("--db", path, *FLAGS, "--json", range_rows=2)
    assert (done.code, done.values["reembedded"], done.texts) == (0, 6, set())
    assert reembed("rollback", "--db", path).code == 0
    assert select(path, vectors) == before


def test_a_trigger_that_ignores_a_row_of_a_later_transaction_leaves_an_incomplete_one(
    reembed: Call, tmp_path: Path
) -> None:
    ignores = "CREATE TRIGGER no BEFORE UPDATE OF v ON t WHEN old.id = 5 BEGIN SELECT"
    path = make(tmp_path / "t.db", f"{ignores} RAISE(IGNORE); END")

    stopped = reembed("--db", path, *FLAGS, range_rows=1, rows_at_once=1, first_rows=1)

    assert stopped.code == 6
    assert wording(stopped.error, tmp_path) == snapshot(
        "SQLite wrote 2 of 3 rows of TMP/t.db, as it does if a trigger ignores some; that "
        "transaction was undone; the replacement by run RUN (to m (8-dim)) is incomplete: of "
        "ranges 0-5, 0-2 hold new vectors, and 3-5 were being written: run again to finish "
        "it, or undo it with reembed rollback"
    )
    assert select(path, "SELECT count(*) FROM t WHERE model = 'm'")[0][0] in range(1, 6)
    assert reembed("rollback", "--db", path).code == 0


def test_a_run_whose_vectors_are_in_the_table_never_makes_its_backup_again(
    reembed: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path / "t.db")
    vectors = "SELECT id, v, model FROM t"
    before = select(path, vectors)
    transaction = Replacement.transaction

    @contextmanager
    def fail_after_the_commit(table: Replacement) -> Iterator[None]:
        with transaction(table):
            yield
        raise UndoneError("that transaction was undone")

    with monkeypatch.context() as patch:
        patch.setattr(Replacement, "transaction", fail_after_the_commit)
        failed = reembed("--db", path, *FLAGS)

    assert (failed.code, select(path, vectors) == before) == (6, False)
    assert reembed("--db", path, *FLAGS).code == 0
    assert reembed("rollback", "--db", path).code == 0
    assert select(path, vectors) == before
