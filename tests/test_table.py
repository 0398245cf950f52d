"""Any table: what is handled, and what is refused by name."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.options import Options
from pipeline.store_options import store_config
from tests.conftest import Call, change, files, select
from transforms.embedders.fake import FakeEmbedder
from transforms.errors import ReembedError, StoreError, UsageError
from transforms.rows import KeyRange
from transforms.stores import open_store
from transforms.stores.formats import encode
from transforms.stores.table import TableConfig

EVERYTHING = KeyRange(0, None, None)
VECTOR = np.linspace(-1, 1, 6).astype("<f4").tobytes()
FLAGS = ("--table", "docs", "--text", "body", "--vector", "v")


def make(path: Path, *statements: str, rows: int = 0) -> Path:
    with closing(sqlite3.connect(path)) as db, db:
        for statement in statements:
            db.execute(statement)
        for at in range(rows):
            db.execute(
                "INSERT INTO docs (id, body, v) VALUES (?, ?, ?)", (at, f"text {at}", VECTOR)
            )
    return path


DOCS = "CREATE TABLE docs (id INTEGER PRIMARY KEY, body TEXT, v BLOB)"


def rows(path: Path, **settings: Any) -> list[tuple[str, str, str | None]]:
    """Each row's key, its text, and why it is skipped."""
    config = {"table": "docs", "text": ["body"], "vector": "v", **settings}
    namespace = config.pop("namespace", None)
    found = open_store(path, namespace, config).read_range(EVERYTHING)
    return [(row.key, row.text, row.skipped.reason if row.skipped else None) for row in found]


@pytest.mark.parametrize(
    ("columns", "key", "expected"),
    [
        ("id INTEGER PRIMARY KEY", [], ["7"]),
        ("id INTEGER PRIMARY KEY", ["id"], ["7"]),
        ("id TEXT PRIMARY KEY", [], ['"7"']),
        ("id", ["id"], ["7"]),
        ("id", ["rowid"], ["1"]),
        ("id", [], ["1"]),
        ("id BLOB", ["id"], ["7"]),
        ("id REAL", ["id"], ["7.0"]),
        ("id, PRIMARY KEY (id, body)", [], ['[7, "a"]']),
        ("id INT, PRIMARY KEY (body, id)", [], ['["a", 7]']),
    ],
)
def test_a_rows_key_is_that_of_its_columns(
    columns: str, key: list[str], expected: list[str], tmp_path: Path
) -> None:
    column, _, constraint = columns.partition(",")
    end = f", {constraint}" if constraint else ""
    path = make(
        tmp_path / "m.db",
        f"CREATE TABLE docs ({column}, body TEXT, v BLOB{end})",
        "INSERT INTO docs VALUES (7, 'a', NULL)",
    )

    assert [found for found, _, _ in rows(path, key=key)] == expected


@pytest.mark.parametrize(
    ("value", "skipped"),
    [
        ("'a'", None),
        ("5", None),
        ("x'c3a4'", None),
        ("''", None),
        ("NULL", "it has no text (NULL)"),
        ("CAST(x'ff' AS TEXT)", "its text is not valid UTF-8"),
        ("x'ff'", "its text is not valid UTF-8"),
        ("zeroblob(1000001)", "text 1000001 bytes exceeds embed cap 1000000 bytes"),
    ],
)
def test_what_is_no_text_is_skipped_and_named(
    value: str, skipped: str | None, tmp_path: Path
) -> None:
    path = make(tmp_path / "m.db", DOCS, f"INSERT INTO docs VALUES (1, {value}, NULL)")

    assert [why for _, _, why in rows(path)] == [skipped]


@pytest.mark.parametrize("key", ["NULL", "CAST(x'ff' AS TEXT)"])
def test_a_row_without_a_key_is_skipped_and_named_by_its_number(key: str, tmp_path: Path) -> None:
    path = make(
        tmp_path / "m.db",
        "CREATE TABLE docs (id, body TEXT, v BLOB)",
        f"INSERT INTO docs VALUES ({key}, 'a', NULL)",
    )

    assert rows(path, key=["id"]) == [("rowid 1", "", "its key is NULL or not text")]


def test_texts_are_joined_by_a_space_or_put_into_a_template(tmp_path: Path) -> None:
    path = make(
        tmp_path / "m.db",
        'CREATE TABLE docs (id INTEGER PRIMARY KEY, body TEXT, "a {b}" TEXT, v BLOB)',
        "INSERT INTO docs VALUES (1, 'body', 'odd', NULL), (2, NULL, 'odd', NULL)",
    )

    def texts(*text: str) -> list[str]:
        return [found for _, found, _ in rows(path, text=list(text))]

    assert texts("body", "a {b}") == ["body odd", " odd"]
    assert texts("{{{body}}}: {id}/{body}") == ["{body}: 1/body", "{}: 2/"]


@pytest.mark.parametrize("text", ["{}", "{body!r}", "{body:>9}", "{body", "{0[a]}", "{body.a}"])
def test_a_template_with_more_than_names_of_columns_is_refused(text: str, tmp_path: Path) -> None:
    path = make(tmp_path / "m.db", DOCS)

    with pytest.raises((UsageError, StoreError), match="--text"):
        rows(path, text=[text])


@pytest.mark.parametrize(
    ("statements", "settings", "says"),
    [
        ([DOCS], {"table": "nope"}, r"has no table nope \(it has docs\); correct --table$"),
        ([DOCS], {"vector": "w"}, r"no column w \(it has id, body, v\); correct --vector$"),
        ([DOCS], {"text": ["w"]}, r"no column w .*; correct --text$"),
        ([DOCS], {"key": ["w"]}, r"no column w .*; correct --key$"),
        ([DOCS], {"dim_column": "w"}, r"no column w .*; correct --dim-column$"),
        ([DOCS], {"space_column": "w"}, r"no column w .*; correct --space-column$"),
        ([DOCS], {"namespace_column": "w"}, r"no column w .*; correct --namespace-column$"),
        ([DOCS], {"vector": "body"}, r"^the column body is named for two things"),
        ([DOCS], {"dim_column": "v"}, r"^the column v is named for two things"),
        ([DOCS], {"vector": "BODY"}, r"^the column BODY is named for two things"),
        ([DOCS], {"key": ["V"]}, r"^the column v is named for two things"),
        ([DOCS], {"format": "f8"}, r"^--format f8 is not one of f32le, f32be, f64le, f16le, json"),
        ([DOCS], {"namespace": "a"}, r"^--namespace needs --namespace-column"),
        ([DOCS], {"where": "nope = 1"}, r"^--where 'nope = 1' is no condition .*no such column"),
        ([DOCS], {"where": "1); DELETE FROM docs; --"}, r"^--where .* is no condition"),
        ([DOCS], {"where": "random() > 0"}, r"^--where .* is no condition .*not authorized"),
        (
            ["CREATE TABLE docs (id PRIMARY KEY, body, v) WITHOUT ROWID"],
            {},
            r"^docs is a WITHOUT ROWID table",
        ),
        (["CREATE VIEW docs AS SELECT 1 AS id, 2 AS body, 3 AS v"], {}, r"^docs is a view"),
        (["CREATE VIRTUAL TABLE docs USING fts5(body, v)"], {}, r"^docs is a virtual table"),
        (
            ["CREATE TABLE docs (id INT, body, a BLOB, v BLOB AS (a))"],
            {},
            r"^the column v is generated, so nothing can be stored in it; correct --vector$",
        ),
        (
            ["CREATE TABLE docs (rowid, oid, _rowid_, body, v)"],
            {},
            r"^the table docs has columns named rowid, oid and _rowid_",
        ),
        (
            [
                "CREATE TABLE docs (id, body, v)",
                "INSERT INTO docs VALUES (1, 'a', NULL), (1, 'b', NULL)",
            ],
            {"key": ["id"]},
            r"^two rows of the table docs have the key 1, so id does not name a row",
        ),
        (
            ["PRAGMA encoding = 'UTF-16'", DOCS],
            {},
            r"stores its texts as UTF-16; copy it into a UTF-8 database first",
        ),
    ],
)
def test_what_can_not_be_done_is_refused_by_name(
    statements: list[str], settings: dict[str, Any], says: str, tmp_path: Path
) -> None:
    path = make(tmp_path / "m.db", *statements)
    before = files(tmp_path)

    with pytest.raises(ReembedError, match=says):
        rows(path, **settings)

    assert files(tmp_path) == before


@pytest.mark.parametrize("name", ['a "b"', "select", "größe", "a'b", "a;b", "x{y}", "--db"])
def test_a_name_is_taken_as_it_is(name: str, reembed: Call, tmp_path: Path) -> None:
    sql = '"' + name.replace('"', '""') + '"'
    path = tmp_path / "m.db"
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(f"CREATE TABLE {sql} ({sql} INTEGER PRIMARY KEY, body TEXT, v BLOB)")
        db.execute(f"INSERT INTO {sql} VALUES (3, 'text', NULL)")

    ran = reembed("--db", path, f"--table={name}", f"--key={name}", *FLAGS[2:], "--json")

    assert (ran.code, ran.values["reembedded"]) == (0, 1)
    expected = FakeEmbedder(8).embed(["text"])[0].tobytes()
    assert select(path, f"SELECT v FROM {sql}") == [(expected,)]


@pytest.mark.parametrize("stored", ["f32be", "f64le", "json", "npy"])
def test_vectors_in_another_format_are_refused_with_what_was_seen(
    stored: str, reembed: Call, tmp_path: Path
) -> None:
    path = make(tmp_path / "m.db", DOCS)
    value = "CAST(? AS TEXT)" if stored == "json" else "?"
    vectors = np.random.default_rng(0).standard_normal((30, 12)).astype("<f4")
    with closing(sqlite3.connect(path)) as db, db:
        db.executemany(
            f"INSERT INTO docs (body, v) VALUES ('text', {value})",
            [(encode(stored, vector.tobytes()),) for vector in vectors],
        )
    before = files(tmp_path)

    ran = reembed("--db", path, *FLAGS)

    assert ran.code == 1
    assert "the vectors in column v of the table docs are not f32le (row 1 holds a" in ran.error
    assert f"they look like {stored}: correct --format" in ran.error
    assert files(tmp_path) == before
    assert reembed("--db", path, *FLAGS, "--format", stored).code == 0


@pytest.mark.parametrize("kind", ["TEXT", "INTEGER", ""])
def test_rows_are_chosen_by_a_condition_and_by_namespace(
    kind: str, reembed: Call, tmp_path: Path
) -> None:
    path = make(tmp_path / "m.db", DOCS, rows=10)
    change(path, f"ALTER TABLE docs ADD COLUMN kind {kind}", "UPDATE docs SET kind = id % 2")
    flags = ("--db", path, *FLAGS, "--where", "id < 6 -- not all", "--namespace-column", "kind")

    ran = reembed(*flags, "--namespace", "1", "--json")

    assert (ran.code, ran.values["reembedded"]) == (0, 3)
    assert select(path, "SELECT id FROM docs WHERE length(v) = 32") == [(1,), (3,), (5,)]
    none = reembed(*flags, "--namespace", "2")
    said = f"{path} has no namespace '2' (there are: '0', '1'); correct --namespace"
    assert (none.code, none.out, none.error) == (2, "", said)
    rest = ("--db", path, *FLAGS, "--namespace-column", "kind", "--where", "id > 99")
    for more, of in (([], ""), (["--namespace", "1"], " of the namespace '1'")):
        for dry in ([], ["--dry-run"]):
            nothing = reembed(*rest, *more, *dry)
            assert nothing.code == 0
            said = f"reembed: no row{of} meets --where; the table has 10; nothing to do\n"
            assert nothing.err == said


def test_a_rollback_finds_rows_that_the_condition_has_left_since(
    reembed: Call, tmp_path: Path
) -> None:
    path = make(tmp_path / "m.db", DOCS, rows=6)
    reembed("--db", path, *FLAGS, "--where", "body LIKE 'text%'")
    change(path, "ALTER TABLE docs ADD COLUMN seen INT", "UPDATE docs SET seen = id > 2")
    reembed("--db", path, *FLAGS, "--model", "n", "--dim", "9", "--where", "seen")
    change(path, "UPDATE docs SET seen = 0")

    undone = reembed("rollback", "--db", path, "--json")

    assert (undone.values["restored"], undone.values["left"]) == (3, 0)


def test_the_modes_that_look_at_stamps_do_so_in_the_columns_that_are_named(
    reembed: Call, tmp_path: Path
) -> None:
    path = make(tmp_path / "m.db", DOCS, rows=6)
    change(path, "ALTER TABLE docs ADD COLUMN model TEXT", "ALTER TABLE docs ADD COLUMN n INT")
    stamped = FakeEmbedder(8).embed(["text 1"])[0].tobytes().hex()
    change(path, f"UPDATE docs SET model = 'm', n = 8, v = x'{stamped}' WHERE id = 1")
    flags = ("--db", path, *FLAGS, "--model", "m", "--space-column", "model", "--dim-column", "n")

    refused = reembed(*flags[:-4], "--skip-current-space")
    ran = reembed(*flags, "--skip-current-space", "--json")

    assert "(no --space-column is named), so it can't be told which model" in refused.error
    assert (ran.code, ran.values["reembedded"]) == (0, 5)
    assert select(path, "SELECT DISTINCT model, n, length(v) FROM docs") == [("m", 8, 32)]


def test_a_column_that_may_not_be_null_is_never_cleared(reembed: Call, tmp_path: Path) -> None:
    path = make(tmp_path / "m.db", DOCS.replace("v BLOB", "v BLOB NOT NULL"), rows=3)

    assert "a column of its vectors is NOT NULL" in (
        reembed("--db", path, *FLAGS, "--skipped", "clear").error
    )
    assert reembed("--db", path, *FLAGS).code == 0


def test_what_a_vacuum_has_renumbered_is_put_back_all_the_same(
    reembed: Call, tmp_path: Path
) -> None:
    path = make(tmp_path / "m.db", DOCS.replace("id INTEGER PRIMARY KEY", "id TEXT"), rows=30)
    change(path, "DELETE FROM docs WHERE id IN ('0', '1', '2')")
    before = select(path, "SELECT id, v FROM docs ORDER BY id")
    reembed("--db", path, *FLAGS, "--key", "id", range_rows=4)
    with closing(sqlite3.connect(path)) as db:
        db.execute("VACUUM")
    change(path, "DELETE FROM docs WHERE id = '9'")

    undone = reembed("rollback", "--db", path, "--json")

    assert (undone.code, undone.values["restored"]) == (0, 26)
    assert undone.values["left_by_reason"] == {"it was deleted since": 1}
    assert select(path, "SELECT id, v FROM docs ORDER BY id") == [r for r in before if r[0] != "9"]


def test_a_replacement_is_not_finished_once_a_vacuum_has_renumbered_its_rows(
    reembed: Call, tmp_path: Path
) -> None:
    path = make(tmp_path / "m.db", DOCS.replace("id INTEGER PRIMARY KEY", "id TEXT"), rows=30)
    change(path, "DELETE FROM docs WHERE id IN ('0', '1', '2')")
    before = select(path, "SELECT id, v FROM docs ORDER BY id")
    change(
        path,
        "CREATE TRIGGER jam BEFORE UPDATE OF v ON docs WHEN new.id = '20' "
        "BEGIN SELECT RAISE(ABORT, 'jammed'); END",
    )
    flags = ("--db", path, *FLAGS, "--key", "id")
    assert reembed(*flags, range_rows=4, rows_at_once=1, first_rows=2).code == 6
    change(path, "DROP TRIGGER jam")
    with closing(sqlite3.connect(path)) as db:
        db.execute("VACUUM")

    refused = reembed(*flags, range_rows=4)

    assert refused.code == 6
    assert "have other numbers now than when the run" in refused.error
    assert reembed("rollback", "--db", path).code == 0
    assert select(path, "SELECT id, v FROM docs ORDER BY id") == before


def test_runs_on_two_tables_of_a_file_know_of_each_other(reembed: Call, tmp_path: Path) -> None:
    path = make(tmp_path / "m.db", DOCS, DOCS.replace("docs", "notes"), rows=9)
    change(path, "INSERT INTO notes SELECT * FROM docs")
    notes = ("--db", path, "--table", "notes", *FLAGS[2:])

    reembed("--db", path, *FLAGS, "--max-rows", "3", range_rows=3)
    other = reembed(*notes)

    assert other.code == 0
    assert "about other rows is not finished" in other.err
    assert other.texts == {f"text {at}" for at in range(9)}
    done = reembed("--db", path, *FLAGS, range_rows=3)
    assert (done.code, len(done.texts)) == (0, 6)
    first, second = reembed("status", "--db", path, "--json").values["runs"]
    assert (first["store"]["table"], second["store"]["table"]) == ("docs", "notes")
    assert reembed("rollback", "--db", path, "--run", first["run_id"]).code == 0
    assert select(path, "SELECT DISTINCT length(v) FROM docs") == [(24,)]
    assert select(path, "SELECT DISTINCT length(v) FROM notes") == [(32,)]


def test_a_file_that_is_no_known_store_is_told_with_the_flags_that_would_choose_its_tables(
    reembed: Call, tmp_path: Path
) -> None:
    path = make(tmp_path / "m.db", DOCS, DOCS.replace("docs", '"my notes"'), rows=9)
    change(path, 'INSERT INTO "my notes" SELECT * FROM docs')

    refused = reembed("--db", path)
    half = reembed("--db", path, "--table", "docs")
    wrong = reembed("--db", path, *FLAGS, "--store", "ai-memory")
    unknown = reembed("--db", path, "--store", "nope")

    hint = (
        "what could be meant: --table docs --text body --vector v or "
        "--table 'my notes' --text body --vector v"
    )
    assert refused.error.endswith(hint)
    assert half.error.endswith(f"give --text, --vector; {hint}")
    assert "does not go with --store ai-memory" in wrong.error
    assert unknown.error == "--store nope is not one of ai-memory, llm, sqlite-vec, table"


def test_a_file_of_settings_says_the_same_as_flags_and_these_go_first(
    reembed: Call, tmp_path: Path
) -> None:
    path = make(tmp_path / "m.db", DOCS, rows=4)
    config = tmp_path / "store.toml"
    config.write_text('store = "table"\ntable = "docs"\ntext = "body"\nvector = "w"\n')

    ran = reembed("--db", path, "--config", config, "--vector", "v", "--json")

    assert (ran.code, ran.values["reembedded"]) == (0, 4)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "can't be read as TOML (No such file"),
        ("table = ", "can't be read as TOML ("),
        ("tabel = 'a'", "sets tabel, which is not one of key, text, store, table"),
        ("table = 3", "sets table to 3, which is no text"),
        ("text = ['a', 3]", "sets text to ['a', 3], which is no text"),
    ],
)
def test_a_file_of_settings_that_can_not_be_used_is_refused(
    content: str | None, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "store.toml"
    if content is not None:
        path.write_text(content)

    with pytest.raises(UsageError) as refused:
        store_config(Options(config=str(path)))

    assert says in str(refused.value)


def test_settings_are_the_same_when_they_are_read_again() -> None:
    settings = TableConfig("t", ("a", "b"), "v", ("k",), where="x > 1", format="json")

    assert TableConfig.from_json(settings.to_json()) == settings
