"""Columns that come and go beside the vectors, rows without a name, and rows that were skipped."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inline_snapshot import snapshot

from reembed.transforms.errors import StoreError
from reembed.transforms.rows import Cause, KeyRange, Row, former_skipped_digest
from reembed.transforms.stores import Replacement, ai_memory, open_store
from reembed.transforms.stores.codec import encode
from tests.conftest import Call, all_columns, change, kept_files, make_store, memory, select
from tests.store_kinds import KINDS, Kind
from tests.test_llm import NOTES, collect
from tests.wording import wording

OLD = encode(np.array([1.0, 2.0], dtype=np.float32))
EVERYTHING = KeyRange(0, None, None)
ADD_STAMPS = "ALTER TABLE memories ADD COLUMN embedding_space TEXT"
ADD_DIMENSIONS = "ALTER TABLE memories ADD COLUMN embedding_dim INTEGER"
LARGE = "x" * 70_000


def store_of(path: Path, rows: int = 6) -> Path:
    memories = [memory(f"{at:02d}", embedding=OLD, embedding_dim=2) for at in range(rows)]
    return make_store(path, memories)


def stamps(path: Path) -> list[object]:
    found = select(path, "SELECT embedding_space FROM memories ORDER BY id")
    return [stamp for (stamp,) in found]


def vectors(path: Path) -> list[object]:
    return [raw for (raw,) in select(path, "SELECT embedding FROM memories ORDER BY id")]


# Columns that are added.


@pytest.mark.parametrize("filled", [True, False])
def test_a_stamp_that_was_added_since_goes_with_the_vector_that_it_is_about(
    filled: bool, tmp_path: Path, reembed: Call
) -> None:
    path = store_of(tmp_path / "m.db")
    assert reembed("--db", path).code == 0
    change(path, ADD_STAMPS, "ALTER TABLE memories ADD COLUMN note TEXT DEFAULT 'kept'")
    if filled:
        change(path, "UPDATE memories SET embedding_space = 'm#none'")

    undone = reembed("rollback", "--db", path, "--json")

    assert (undone.code, undone.values["restored"]) == (0, 6)
    assert (vectors(path), stamps(path)) == ([OLD] * 6, [None] * 6)
    assert select(path, "SELECT DISTINCT note, embedding_dim FROM memories") == [("kept", 2)]


def test_a_row_that_has_its_former_vector_already_keeps_a_stamp_that_was_added(
    tmp_path: Path, reembed: Call
) -> None:
    path = store_of(tmp_path / "m.db")
    assert reembed("--db", path).code == 0
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(ADD_STAMPS)
        db.execute(
            "UPDATE memories SET embedding = ?, embedding_dim = 2, embedding_space = 'by another' "
            "WHERE id = '03'",
            (OLD,),
        )

    undone = reembed("rollback", "--db", path, "--json")

    values = undone.values
    assert (undone.code, values["restored"], values["unchanged"], values["left"]) == (0, 5, 1, 0)
    assert stamps(path) == [None, None, None, "by another", None, None]


def test_a_column_that_is_added_between_staging_and_replacing_holds_no_former_stamp(
    tmp_path: Path, reembed: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store_of(tmp_path / "m.db")
    before_transactions(
        monkeypatch,
        lambda: change(path, ADD_STAMPS, "UPDATE memories SET embedding_space = 'former#none'"),
    )

    assert reembed("--db", path).code == 0

    assert stamps(path) == [None] * 6
    assert reembed("verify", "--db", path).code == 0
    assert reembed("rollback", "--db", path).code == 0
    assert (vectors(path), stamps(path)) == ([OLD] * 6, [None] * 6)


def test_a_column_that_is_added_between_two_transactions_is_empty_beside_restored_vectors(
    tmp_path: Path, reembed: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store_of(tmp_path / "m.db")

    def add() -> None:
        change(path, ADD_STAMPS, "UPDATE memories SET embedding_space = 'm#none' WHERE id < '02'")

    before_transactions(monkeypatch, lambda: None, add)

    ran = reembed("--db", path, range_rows=2, rows_at_once=1, first_rows=2)

    assert ran.code == 0, ran.err
    assert OLD not in vectors(path)
    assert stamps(path)[2:] == [None] * 4
    assert reembed("rollback", "--db", path).code == 0
    assert (vectors(path), stamps(path)) == ([OLD] * 6, [None] * 6)


def before_transactions(patch: pytest.MonkeyPatch, *actions: Callable[[], None]) -> None:
    """Do things, one before each transaction, as another program might."""
    waiting = list(actions)
    transaction = Replacement.transaction

    def late(table: Replacement) -> Any:
        if waiting:
            waiting.pop(0)()
        return transaction(table)

    patch.setattr(Replacement, "transaction", late)


# Columns that are gone.


@pytest.mark.parametrize("how", ["dropped", "renamed"])
@pytest.mark.parametrize("command", ["rollback", "verify"])
def test_a_replaced_column_that_is_gone_is_named_before_anything_is_noted(
    how: str, command: str, tmp_path: Path, reembed: Call
) -> None:
    path = store_of(tmp_path / "m.db")
    change(path, ADD_STAMPS, "UPDATE memories SET embedding_space = 'former#none'")
    before = all_columns(path)
    assert reembed("--db", path).code == 0
    gone = {
        "dropped": "ALTER TABLE memories DROP COLUMN embedding_space",
        "renamed": "ALTER TABLE memories RENAME COLUMN embedding_space TO space",
    }
    change(path, gone[how])
    table = all_columns(path)

    failed = reembed(command, "--db", path)

    assert failed.code == 1
    assert wording(failed.error, tmp_path) == snapshot(
        "the table memories of TMP/m.db has no column embedding_space any more, which the "
        "run replaced, so it can't be put back or checked; nothing was changed: give the "
        "column its name again, or add it by the line below, and run this again"
    )
    assert all_columns(path) == table
    assert reembed("status", "--db", path, "--json").values["runs"][-1]["state"] == "replaced"
    if how == "renamed":
        change(path, "ALTER TABLE memories RENAME COLUMN space TO embedding_space")
        assert reembed("rollback", "--db", path).code == 0
        assert all_columns(path) == before
    else:
        change(path, ADD_STAMPS)
        assert reembed("rollback", "--db", path).code == 0
        assert stamps(path) == ["former#none"] * 6


@pytest.mark.parametrize("kind", KINDS[2:5], ids=lambda kind: kind.name)
def test_a_column_or_table_that_is_gone_is_named_without_flags_that_a_rollback_lacks(
    kind: Kind, tmp_path: Path, reembed: Call
) -> None:
    path = kind.make(tmp_path / "m.db", [f"text {at}" for at in range(4)])
    changes = {
        "sqlite-vec with texts apart": (
            "ALTER TABLE notes RENAME COLUMN title TO headline",
            snapshot(
                "the table notes has no column title (it has headline, item), and the run "
                "found it otherwise; give the table or the column back its name (ALTER "
                "TABLE), and run this command again"
            ),
        ),
        "llm": (
            "ALTER TABLE collections RENAME COLUMN model TO models",
            snapshot(
                "TMP/m.db is no database of llm's: it has no tables collections and "
                "embeddings with the columns of llm 0.12 or later, and the run found it "
                "otherwise; give the table or the column back its name (ALTER TABLE), and "
                "run this command again"
            ),
        ),
        "table f32le": (
            'ALTER TABLE "play list" RENAME COLUMN model TO models',
            snapshot(
                'the table play list has no column model (it has artist, al"bum, title, '
                "body text, select, größe, models), and the run found it otherwise; give "
                "the table or the column back its name (ALTER TABLE), and run this command "
                "again"
            ),
        ),
    }
    statement, expected = changes[kind.name]
    assert reembed("--db", path, "--model", "m", *kind.flags).code == 0
    change(path, statement)

    for command in ("rollback", "verify"):
        failed = reembed(command, "--db", path)
        assert (failed.code, wording(failed.error, tmp_path)) == (1, expected)
        assert not {"--space-column", "--text", "--table", "--text-table"} & set(
            failed.error.replace(",", " ").replace(";", " ").split()
        )
    assert reembed("status", "--db", path, "--json").values["runs"][-1]["state"] == "replaced"


# Rows that were skipped by rule.

SKIPS: dict[str, tuple[str, str]] = {
    "encrypted": ("encrypted_envelope = x'01'", "encrypted_envelope = x'02'"),
    "encrypted, its title": ("encrypted_envelope = x'01'", "title = 'other'"),
    "over the cap": (f"content = '{LARGE}'", f"content = 'y{LARGE[1:]}'"),
    "not UTF-8": ("content = CAST(x'ff' AS TEXT)", "content = CAST(x'fe' AS TEXT)"),
    "an id that is no text": ("id = CAST(id AS BLOB)", "content = 'other'"),
}
"""What makes a row one that is skipped, and an edit of it by which it stays one."""


@pytest.mark.parametrize("why", SKIPS)
def test_a_skipped_row_that_is_edited_is_left_by_a_rollback(
    why: str, tmp_path: Path, reembed: Call
) -> None:
    path = store_of(tmp_path / "m.db")
    skip, edit = SKIPS[why]
    if "encrypted_envelope" not in str(select(path, "SELECT sql FROM sqlite_schema")):
        change(path, "ALTER TABLE memories ADD COLUMN encrypted_envelope BLOB")
    change(path, *(f"UPDATE memories SET {skip} WHERE rowid = {at}" for at in (2, 4)))
    held = "SELECT rowid, embedding IS NULL FROM memories ORDER BY rowid"
    assert reembed("--db", path, "--skipped", "clear").code == 0
    assert [empty for _, empty in select(path, held)] == [0, 1, 0, 1, 0, 0]
    change(path, f"UPDATE memories SET {edit} WHERE rowid = 2")

    undone = reembed("rollback", "--db", path, "--json")

    assert (undone.code, undone.values["restored"], undone.values["left"]) == (0, 5, 1)
    if why == "an id that is no text":
        assert wording(undone.err, tmp_path) == snapshot(
            "WARN [RUN] row rowid 2 is left as it is: its text was edited since\n"
        )
    else:
        assert wording(undone.err, tmp_path) == snapshot(
            "WARN [RUN] row 01 is left as it is: its text was edited since\n"
        )
    assert [empty for _, empty in select(path, held)] == [0, 1, 0, 0, 0, 0]
    assert len(select(path, "SELECT rowid FROM memories WHERE length(embedding) = 9")) == 5


@pytest.mark.parametrize(
    ("skip", "edit"),
    [
        ("body = printf('%1000001c', 'x')", "body = printf('%1000001c', 'y')"),
        ("body = CAST(x'ff' AS TEXT)", "body = CAST(x'fe' AS TEXT)"),
        ("name = NULL", "body = 'other'"),
        ("name = CAST(x'ff' AS TEXT)", "name = CAST(x'fe' AS TEXT)"),
    ],
)
def test_a_skipped_row_of_any_table_has_a_digest_of_all_of_it(
    skip: str, edit: str, tmp_path: Path
) -> None:
    path = tmp_path / "m.db"
    change(
        path,
        "CREATE TABLE docs (name TEXT, body TEXT, v BLOB)",
        "INSERT INTO docs VALUES ('a', 'text', zeroblob(8))",
        f"UPDATE docs SET {skip}",
    )
    config = {"kind": "table", "table": "docs", "text": ["body"], "vector": "v", "key": ["name"]}

    def read() -> Row:
        (row,) = open_store(path, config=config).read_range(EVERYTHING, with_stored=True)
        assert row.skipped is not None
        assert row.digest != former_skipped_digest(row.skipped)
        return row

    first = read()
    change(path, "UPDATE docs SET v = zeroblob(12)")
    assert read().digest == first.digest
    change(path, f"UPDATE docs SET {edit}")
    assert read().digest != first.digest


def test_the_digest_of_a_skipped_row_is_not_what_0_1_0_made_of_it(tmp_path: Path) -> None:
    path = make_store(tmp_path / "m.db", [memory("a", LARGE), memory("b", "y" + LARGE[1:])])

    one, other = open_store(path).read_range(EVERYTHING)

    assert one.skipped is not None
    assert one.skipped.cause is Cause.OVER_CAP
    assert one.digest != other.digest
    assert one.digest != former_skipped_digest(one.skipped)


@pytest.mark.parametrize("until", ["staged", "replaced"])
def test_a_run_of_0_1_0_that_has_skipped_rows_is_finished_and_rolled_back(
    until: str, tmp_path: Path, reembed: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store_of(tmp_path / "m.db")
    change(path, f"UPDATE memories SET content = '{LARGE}' WHERE id = '03'")
    before = all_columns(path)
    with monkeypatch.context() as patch:
        patch.setattr(
            ai_memory, "skipped_digest", lambda skipped, _: former_skipped_digest(skipped)
        )
        partly = ("--max-rows", "5") if until == "staged" else ()
        assert reembed("--db", path, "--skipped", "clear", *partly, range_rows=2).code == 0

    if until == "staged":
        assert reembed("--db", path, "--skipped", "clear", range_rows=2).code == 0
    assert [raw is None for raw in vectors(path)] == [False] * 3 + [True] + [False] * 2
    assert reembed("rollback", "--db", path).code == 0
    assert all_columns(path) == before


# Rows that have no name of their own.


def test_an_ai_memory_table_whose_ids_name_no_row_is_refused(tmp_path: Path, reembed: Call) -> None:
    path = store_of(tmp_path / "m.db")
    change(
        path,
        "CREATE TABLE copied AS SELECT * FROM memories",
        "DROP TABLE memories",
        "ALTER TABLE copied RENAME TO memories",
    )
    assert reembed("--db", path, "--dry-run").code == 0
    change(path, "INSERT INTO memories SELECT * FROM memories WHERE id = '03'")
    before = kept_files(tmp_path)

    failed = reembed("--db", path)

    assert failed.code == 1
    assert wording(failed.error, tmp_path) == snapshot(
        "two rows of the table memories of TMP/m.db have the id '03', so it does not name "
        "a row, and neither could get back its own vector; delete one of them, and make id "
        "the primary key again"
    )
    assert kept_files(tmp_path) == before


def test_a_database_of_llm_whose_keys_name_no_row_is_refused(tmp_path: Path, reembed: Call) -> None:
    path = tmp_path / "embeddings.db"
    collect(path, "notes", NOTES)
    change(
        path,
        "CREATE TABLE copied AS SELECT * FROM embeddings",
        "DROP TABLE embeddings",
        "ALTER TABLE copied RENAME TO embeddings",
        "INSERT INTO embeddings SELECT * FROM embeddings LIMIT 1",
    )

    failed = reembed("--db", path, "--model", "m")

    assert failed.code == 1
    assert wording(failed.error, tmp_path) == snapshot(
        "two rows of the table embeddings of TMP/embeddings.db have the key 1, 'i0' "
        "(collection_id, id), so it does not name a row; delete one of them, and make it "
        "the primary key again, as llm does"
    )


@pytest.mark.parametrize("hidden", [["rowid"], ["rowid", "_rowid_"], ["rowid", "_rowid_", "oid"]])
def test_columns_that_hide_the_number_of_a_row_are_no_trouble_or_named_in_the_plan(
    hidden: list[str], tmp_path: Path, reembed: Call
) -> None:
    path = store_of(tmp_path / "m.db")
    change(path, *(f"ALTER TABLE memories ADD COLUMN {name} TEXT DEFAULT 'x'" for name in hidden))
    before = all_columns(path)

    ran = reembed("--db", path)

    if len(hidden) == 3:
        assert (ran.code, ran.texts) == (1, set())
        assert wording(ran.error, tmp_path) == snapshot(
            "the table memories has columns named rowid, oid and _rowid_, which hide the "
            "number of a row; rename one of them"
        )
        assert all_columns(path) == before
        return
    assert ran.code == 0, ran.err
    assert OLD not in vectors(path)
    assert reembed("rollback", "--db", path).code == 0
    assert all_columns(path) == before


def test_an_integer_key_is_the_number_of_a_row_whatever_columns_hide_it(
    tmp_path: Path, reembed: Call
) -> None:
    path = tmp_path / "m.db"
    change(
        path,
        "CREATE TABLE docs (Id INTEGER PRIMARY KEY, body, v BLOB, rowid, oid, _rowid_)",
        "INSERT INTO docs VALUES (7, 'text', zeroblob(8), 'a', 'b', 'c')",
    )
    before = all_columns(path)
    flags = ("--store", "table", "--table", "docs", "--text", "body", "--vector", "v")

    assert reembed("--db", path, "--model", "m", *flags).code == 0
    assert select(path, "SELECT length(v), rowid, oid, _rowid_ FROM docs") == [(32, "a", "b", "c")]
    assert reembed("verify", "--db", path).code == 0
    assert reembed("rollback", "--db", path).code == 0
    assert all_columns(path) == before


def test_a_backup_that_names_a_column_the_table_lacks_is_a_store_error(tmp_path: Path) -> None:
    store = open_store(store_of(tmp_path / "m.db"))

    store.check_backup({"embedding_dim=integer:32", "", "embedding_dim=null: embedding=text:"})
    with pytest.raises(StoreError) as refused:
        store.check_backup({"embedding_dim=null: embedding_space=null:"})
    assert wording(refused, tmp_path) == snapshot(
        "the table memories of TMP/m.db has no column embedding_space any more, which the "
        "run replaced, so it can't be put back or checked; nothing was changed: give the "
        "column its name again, or add it by the line below, and run this again"
    )
