"""Any table: what is handled, and what is refused by name."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inline_snapshot import snapshot

from reembed.pipeline.options import Options
from reembed.pipeline.store_options import store_config
from reembed.transforms.embedders.fake import FakeEmbedder
from reembed.transforms.errors import ReembedError, StoreError, UsageError
from reembed.transforms.modes import Mode
from reembed.transforms.rows import KeyRange
from reembed.transforms.stores import Store, open_store
from reembed.transforms.stores.formats import encode
from reembed.transforms.stores.table import TableConfig
from reembed.transforms.stores.vec0 import connect
from tests.conftest import Call, change, files, make_store, memory, select
from tests.wording import line_with, wording

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

    with pytest.raises((UsageError, StoreError)) as refused:
        rows(path, text=[text])
    assert (
        wording(refused, tmp_path)
        == snapshot(
            {
                "{}": (
                    "--text '{}' may hold only names of columns in braces, such as {title}, "
                    "and no format"
                ),
                "{body!r}": (
                    "--text '{body!r}' may hold only names of columns in braces, such as "
                    "{title}, and no format"
                ),
                "{body:>9}": (
                    "--text '{body:>9}' may hold only names of columns in braces, such as "
                    "{title}, and no format"
                ),
                "{body": "--text '{body' is no template (expected '}' before end of string)",
                "{0[a]}": "the table docs has no column 0[a] (it has id, body, v); correct --text",
                "{body.a}": "the table docs has no column body.a (it has id, body, v); correct "
                "--text",
            }
        )[text]
    )


@pytest.mark.parametrize(
    ("statements", "settings", "says"),
    [
        (
            [DOCS],
            {"table": "nope"},
            snapshot("TMP/m.db has no table nope (it has docs); correct --table"),
        ),
        (
            [DOCS],
            {"vector": "w"},
            snapshot("the table docs has no column w (it has id, body, v); correct --vector"),
        ),
        (
            [DOCS],
            {"text": ["w"]},
            snapshot("the table docs has no column w (it has id, body, v); correct --text"),
        ),
        (
            [DOCS],
            {"key": ["w"]},
            snapshot("the table docs has no column w (it has id, body, v); correct --key"),
        ),
        (
            [DOCS],
            {"dim_column": "w"},
            snapshot("the table docs has no column w (it has id, body, v); correct --dim-column"),
        ),
        (
            [DOCS],
            {"space_column": "w"},
            snapshot("the table docs has no column w (it has id, body, v); correct --space-column"),
        ),
        (
            [DOCS],
            {"namespace_column": "w"},
            snapshot(
                "the table docs has no column w (it has id, body, v); correct --namespace-column"
            ),
        ),
        (
            [DOCS],
            {"vector": "body"},
            snapshot(
                "the column body is named for two things, of which one is replaced; name another"
            ),
        ),
        (
            [DOCS],
            {"dim_column": "v"},
            snapshot(
                "the column v is named for two things, of which one is replaced; name another"
            ),
        ),
        (
            [DOCS],
            {"vector": "BODY"},
            snapshot(
                "the column BODY is named for two things, of which one is replaced; name another"
            ),
        ),
        (
            [DOCS],
            {"key": ["V"]},
            snapshot(
                "the column v is named for two things, of which one is replaced; name another"
            ),
        ),
        (
            [DOCS],
            {"format": "f8"},
            snapshot("--format f8 is not one of f32le, f32be, f64le, f16le, json, npy"),
        ),
        (
            [DOCS],
            {"namespace": "a"},
            snapshot("--namespace needs --namespace-column, which says where a row's is"),
        ),
        (
            [DOCS],
            {"where": "nope = 1"},
            snapshot("--where 'nope = 1' is no condition on the table docs: no such column: nope"),
        ),
        (
            [DOCS],
            {"where": "1); DELETE FROM docs; --"},
            snapshot(
                "--where '1); DELETE FROM docs; --' is no condition on the table docs: "
                "You can only execute one statement at a time."
            ),
        ),
        (
            [DOCS],
            {"where": "random() > 0"},
            snapshot(
                "--where 'random() > 0' is no condition on the table docs: not "
                "authorized to use function: random"
            ),
        ),
        (
            ["CREATE TABLE docs (id PRIMARY KEY, body, v) WITHOUT ROWID"],
            {},
            snapshot(
                "docs is a WITHOUT ROWID table, whose rows have no number of their own "
                "to be found by; only ordinary tables can be re-embedded"
            ),
        ),
        (
            ["CREATE VIEW docs AS SELECT 1 AS id, 2 AS body, 3 AS v"],
            {},
            snapshot(
                "docs is a view, whose rows have no number of their own to be found by; "
                "only ordinary tables can be re-embedded"
            ),
        ),
        (
            ["CREATE VIRTUAL TABLE docs USING fts5(body, v)"],
            {},
            snapshot(
                "docs is a virtual table, whose rows have no number of their own to be "
                "found by; only ordinary tables can be re-embedded"
            ),
        ),
        (
            ["CREATE TABLE docs (id INT, body, a BLOB, v BLOB AS (a))"],
            {},
            snapshot("the column v is generated, so nothing can be stored in it; correct --vector"),
        ),
        (
            ["CREATE TABLE docs (rowid, oid, _rowid_, body, v)"],
            {},
            snapshot(
                "the table docs has columns named rowid, oid and _rowid_, which hide the "
                "number of a row; rename one of them"
            ),
        ),
        (
            [
                "CREATE TABLE docs (id, body, v)",
                "INSERT INTO docs VALUES (1, 'a', NULL), (1, 'b', NULL)",
            ],
            {"key": ["id"]},
            snapshot(
                "two rows of the table docs have the key 1, so id does not name a row; "
                "name columns that do with --key"
            ),
        ),
        (
            ["PRAGMA encoding = 'UTF-16'", DOCS],
            {},
            snapshot(
                "TMP/m.db stores its texts as UTF-16; copy it into a UTF-8 database "
                "first (VACUUM INTO keeps the encoding, so dump and read it)"
            ),
        ),
    ],
)
def test_what_can_not_be_done_is_refused_by_name(
    statements: list[str], settings: dict[str, Any], says: str, tmp_path: Path
) -> None:
    path = make(tmp_path / "m.db", *statements)
    before = files(tmp_path)

    with pytest.raises(ReembedError) as refused:
        rows(path, **settings)
    assert wording(refused, tmp_path) == says

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
    assert (
        wording(ran.error, tmp_path)
        == snapshot(
            {
                "f32be": (
                    "the vectors in column v of the table docs are not f32le (row 1 holds a "
                    "blob of 48 bytes that begins with 3e00bf6cbe07467f); they look like "
                    "f32be: correct --format or --vector"
                ),
                "f64le": (
                    "the vectors in column v of the table docs are not f32le (row 1 holds a "
                    "blob of 96 bytes that begins with 00000080ed17c03f); they look like "
                    "f64le: correct --format or --vector"
                ),
                "json": (
                    "the vectors in column v of the table docs are not f32le (row 1 holds a "
                    "text of 132 bytes that begins with 5b302e3132353733); they look like "
                    "json: correct --format or --vector"
                ),
                "npy": (
                    "the vectors in column v of the table docs are not f32le (row 1 holds a "
                    "blob of 176 bytes that begins with 934e554d50590100); they look like "
                    "npy: correct --format or --vector"
                ),
            }
        )[stored]
    )
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
    assert (none.code, none.out) == (2, "")
    assert wording(none.error, tmp_path) == snapshot(
        "TMP/m.db has no namespace '2' (there are: '0', '1'); correct --namespace"
    )
    rest = ("--db", path, *FLAGS, "--namespace-column", "kind", "--where", "id > 99")
    for more, said in (
        ([], snapshot("reembed: no row meets --where; the table has 10; nothing to do\n")),
        (
            ["--namespace", "1"],
            snapshot(
                "reembed: no row of the namespace '1' meets --where; the table has 10; "
                "nothing to do\n"
            ),
        ),
    ):
        for dry in ([], ["--dry-run"]):
            nothing = reembed(*rest, *more, *dry)
            assert (nothing.code, nothing.err) == (0, said)


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

    assert wording(refused.error, tmp_path) == snapshot(
        "TMP/m.db keeps no stamps (no --space-column is named), so it can't be told "
        "which model made a vector; run without --skip-current-space"
    )
    assert (ran.code, ran.values["reembedded"]) == (0, 5)
    assert select(path, "SELECT DISTINCT model, n, length(v) FROM docs") == [("m", 8, 32)]


def test_a_column_that_may_not_be_null_is_never_cleared(reembed: Call, tmp_path: Path) -> None:
    path = make(tmp_path / "m.db", DOCS.replace("v BLOB", "v BLOB NOT NULL"), rows=3)

    assert wording(reembed("--db", path, *FLAGS, "--skipped", "clear").error, tmp_path) == snapshot(
        "--skipped clear can't be done in TMP/m.db: a column of its vectors is NOT NULL"
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
    assert wording(refused.error, tmp_path) == snapshot(
        "rows of TMP/m.db have other numbers now than when the run RUN began to replace "
        "(VACUUM and INSERT OR REPLACE do that), so it can't be finished; undo it with "
        "reembed rollback"
    )
    assert reembed("rollback", "--db", path).code == 0
    assert select(path, "SELECT id, v FROM docs ORDER BY id") == before


def test_runs_on_two_tables_of_a_file_know_of_each_other(reembed: Call, tmp_path: Path) -> None:
    path = make(tmp_path / "m.db", DOCS, DOCS.replace("docs", "notes"), rows=9)
    change(path, "INSERT INTO notes SELECT * FROM docs")
    notes = ("--db", path, "--table", "notes", *FLAGS[2:])

    reembed("--db", path, *FLAGS, "--max-rows", "3", range_rows=3)
    other = reembed(*notes)

    assert other.code == 0
    assert wording(line_with("other rows", other.err), tmp_path) == snapshot(
        "reembed: NOTE — run RUN about other rows is not finished; its own command goes on with it"
    )
    assert other.texts == {f"text {at}" for at in range(9)}
    done = reembed("--db", path, *FLAGS, range_rows=3)
    assert (done.code, len(done.texts)) == (0, 6)
    first, second = reembed("status", "--db", path, "--json").values["runs"]
    # The order in which they replaced.
    assert (first["store"]["table"], second["store"]["table"]) == ("notes", "docs")
    assert reembed("rollback", "--db", path, "--run", second["run_id"]).code == 0
    assert select(path, "SELECT DISTINCT length(v) FROM docs") == [(24,)]
    assert select(path, "SELECT DISTINCT length(v) FROM notes") == [(32,)]


def test_a_file_that_is_no_known_store_is_told_with_the_flags_that_would_choose_its_tables(
    reembed: Call, tmp_path: Path
) -> None:
    path = make(tmp_path / "m.db", DOCS, DOCS.replace("docs", '"my notes"'), rows=9)
    change(path, 'INSERT INTO "my notes" SELECT * FROM docs')

    refused = reembed("--db", path)
    half = reembed("--db", path, "--table", "DOCS", "--text", "body")
    wrong = reembed("--db", path, *FLAGS, "--store", "ai-memory")
    unknown = reembed("--db", path, "--store", "nope")

    docs = ["  --table docs --text body --vector v", '      "text 0"']
    notes = ["  --table 'my notes' --text body --vector v", '      "text 0"']
    assert wording(refused.error, tmp_path) == snapshot(
        "TMP/m.db is not an ai-memory database: it has no table 'memories' with id, "
        "namespace, title and content (its tables are docs, my notes); name the right "
        "file with --db, or select a table of it with the flags on a line below"
    )
    assert refused.err.splitlines()[1:-1] == [*docs, *notes]
    assert wording(half.error, tmp_path) == snapshot(
        "a table's rows are found by --table, --text and --vector; give --vector, or the "
        "flags on a line below"
    )
    assert half.err.splitlines()[1:] == docs
    assert wording(wrong.error, tmp_path) == snapshot(
        "--text, --table, --vector do not go with --store ai-memory, whose columns are "
        "known; leave them out"
    )
    assert wording(unknown.error, tmp_path) == snapshot(
        "--store nope is not one of ai-memory, llm, sqlite-vec, table"
    )


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
        (
            None,
            snapshot(
                "--config TMP/store.toml can't be read as TOML (No such file or "
                "directory); correct it"
            ),
        ),
        (
            "table = ",
            snapshot(
                "--config TMP/store.toml can't be read as TOML (it is no TOML, at end of "
                "document); correct it"
            ),
        ),
        (
            "tabel = 'a'",
            snapshot(
                "--config TMP/store.toml sets tabel, which is not one of key, text, "
                "store, table, vector, text_table, text_key, dim_column, space_column, "
                "namespace_column, where, format, space"
            ),
        ),
        ("table = 3", snapshot("--config TMP/store.toml sets table to 3, which is no text")),
        (
            "text = ['a', 3]",
            snapshot("--config TMP/store.toml sets text to ['a', 3], which is no text"),
        ),
        (
            "text-key = 'a'\ntext_key = 'b'",
            snapshot("--config TMP/store.toml sets text_key twice, with a hyphen and without one"),
        ),
        (
            "text = [['a']]",
            snapshot("--config TMP/store.toml sets text to [['a']], which is no text"),
        ),
        ("key = ''", snapshot("--config TMP/store.toml sets key, which is no text")),
        (
            "table = { a = 1 }",
            snapshot("--config TMP/store.toml sets table to {'a': 1}, which is no text"),
        ),
        (
            "where = [1" + ", 23" * 99 + "]",
            snapshot(
                "--config TMP/store.toml sets where to [1, 23, 23, 23, 23, 23, 23, 23, "
                "23, 23, 23, 23, 23, 23, 23, 23, 23, 23, 23, 23, 23, 23, 23, 23, 23, , "
                "which is no text"
            ),
        ),
        (
            "a = " + "[" * 20_000,
            snapshot(
                "--config TMP/store.toml can't be read as TOML (it is nested too "
                "deeply); correct it"
            ),
        ),
        (
            "# " + "long" * 250_000,
            snapshot(
                "--config TMP/store.toml can't be read as TOML (it is longer than "
                "1,000,000 bytes); correct it"
            ),
        ),
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

    assert wording(refused, tmp_path) == says


@pytest.mark.parametrize("path", ["/dev/zero", "/", "~nobody-has-this-name/store.toml"])
def test_what_is_no_file_of_settings_is_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        store_config(Options(config=path))
    assert (
        wording(refused, tmp_path)
        == snapshot(
            {
                "/dev/zero": (
                    "--config /dev/zero can't be read as TOML (it is not a regular file); "
                    "correct it"
                ),
                "/": "--config / can't be read as TOML (Is a directory); correct it",
                "~nobody-has-this-name/store.toml": (
                    "there is no such home as in ~nobody-has-this-name/store.toml; correct the path"
                ),
            }
        )[path]
    )


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ("--text-table", "docs"),
            snapshot(
                "--text-table does not go with an ordinary table, whose texts must be in "
                "columns of its own; leave it out"
            ),
        ),
        (
            ("--text-key", "id", "--text-table", "docs"),
            snapshot(
                "--text-table, --text-key do not go with an ordinary table, whose texts "
                "must be in columns of its own; leave them out"
            ),
        ),
        (
            ("--space", "m"),
            snapshot("--space needs --space-column, which says where a model's name is stored"),
        ),
        (("--text", ""), snapshot("--text is empty; name a column, or leave it out")),
    ],
)
def test_a_flag_that_a_table_has_no_use_for_is_refused(
    flags: tuple[str, ...], says: str, reembed: Call, tmp_path: Path
) -> None:
    path = make(tmp_path / "m.db", DOCS, rows=4)
    before = files(tmp_path)

    ran = reembed("--db", path, *FLAGS, *flags)

    assert ran.code == 2
    assert wording(ran.error, tmp_path) == says
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("store", "flags", "says"),
    [
        (
            "ai-memory",
            ("--space", "m"),
            "--space does not go with --store ai-memory, whose",
        ),
        (
            "llm",
            ("--key", "id"),
            "--key does not go with --store llm, whose columns are",
        ),
        ("sqlite-vec", ("--dim-column", "d"), "--dim-column does not go with a vec0 table, which"),
    ],
)
def test_so_is_one_that_another_kind_of_store_has_no_use_for(
    store: str, flags: tuple[str, ...], says: str, reembed: Call, tmp_path: Path
) -> None:
    path = make_store(tmp_path / "m.db", [memory("a")])
    more = () if store == "ai-memory" else ("--store", store)

    ran = reembed("--db", path, *more, *flags)

    assert (ran.code, ran.error.startswith(says)) == (2, True), ran.error


def test_where_a_virtual_table_keeps_its_data_nothing_is_replaced(
    reembed: Call, tmp_path: Path
) -> None:
    path = tmp_path / "m.db"
    with closing(connect(path)) as db, db:
        db.execute("CREATE VIRTUAL TABLE v USING vec0(embedding float[4])")
        db.execute("INSERT INTO v (embedding) VALUES (zeroblob(16))")
        db.execute("CREATE VIRTUAL TABLE f USING fts5(body)")

    of_vec = ("--table", "v_vector_chunks00", "--text", "rowid", "--vector", "vectors")
    of_fts = ("--table", "f_content", "--text", "c0", "--vector", "id")
    for flags in (of_vec, of_fts):
        ran = reembed("--db", path, *flags)

        assert ran.code == 1
        assert (
            wording(ran.error, tmp_path)
            == snapshot(
                {
                    "v_vector_chunks00": (
                        "v_vector_chunks00 is where a virtual table keeps its data, which "
                        "only that may write; name an ordinary table with --table"
                    ),
                    "f_content": (
                        "f_content is where a virtual table keeps its data, which only that "
                        "may write; name an ordinary table with --table"
                    ),
                }
            )[flags[1]]
        )


def test_settings_are_the_same_when_they_are_read_again() -> None:
    settings = TableConfig("t", ("a", "b"), "v", ("k",), where="x > 1", format="json")

    assert TableConfig.from_json(settings.to_json()) == settings


STAMPED = (
    "CREATE TABLE docs (id TEXT PRIMARY KEY, body TEXT, kind TEXT, model TEXT, dim INT, v BLOB)"
)
ON_THE_STAMP = ("--space-column", "model", "--dim-column", "dim", "--where", "model = 'former'")


def stamped(path: Path, count: int = 40) -> Path:
    """A table of which every other row is stamped as a former model's; VACUUM renumbers it."""
    make(path, STAMPED)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("INSERT INTO docs (id) VALUES ('gone')")
        db.executemany(
            "INSERT INTO docs VALUES (?, ?, 'a', ?, 6, ?)",
            [
                (f"k{at:02d}", f"text {at}", "former" if at % 2 else "other", VECTOR)
                for at in range(count)
            ],
        )
        db.execute("DELETE FROM docs WHERE id = 'gone'")
    return path


def dimensions(path: Path) -> list[tuple[Any, ...]]:
    return select(path, "SELECT dim, count(*) FROM docs GROUP BY 1 ORDER BY 1")


def test_rows_of_a_run_that_made_its_own_condition_untrue_are_verified(
    reembed: Call, tmp_path: Path
) -> None:
    path = stamped(tmp_path / "m.db")
    ran = reembed("--db", path, *FLAGS, *ON_THE_STAMP, "--json", range_rows=4)
    assert (ran.code, ran.values["total"], ran.values["reembedded"]) == (0, 20, 20)

    checked = reembed("verify", "--db", path, "--json")
    assert (checked.code, checked.values["checked"], checked.values["sampled"]) == (0, 20, 20)
    # SQL that a manifest holds is not run, so these are all rows that the run has not written.
    assert (checked.values["unwritten"], checked.values["deleted"]) == (20, 0)

    change(
        path,
        "UPDATE docs SET v = zeroblob(32) WHERE id = 'k07'",
        "DELETE FROM docs WHERE id = 'k09'",
        "UPDATE docs SET body = 'edited' WHERE id = 'k11'",
        "INSERT INTO docs VALUES ('new', 'text', 'a', 'former', 6, NULL)",
        "INSERT INTO docs VALUES ('newer', 'text', 'a', 'other', 6, NULL)",
    )
    found = reembed("verify", "--db", path, "--json")

    assert found.code == 1
    assert found.values["wrong_ids"] == {"overwritten": ["k07"], "zeros": ["k07"], "stale": ["k11"]}
    assert (found.values["checked"], found.values["deleted"]) == (18, 1)
    assert found.values["unwritten"] == 22
    assert wording(found.error, tmp_path) == snapshot(
        "3 findings in TMP/m.db; run again with a --where that is true of them to "
        "re-embed the rows that are wrong"
    )
    undone = reembed("rollback", "--db", path, "--json")
    assert (undone.values["restored"], undone.values["left"]) == (17, 3)


def test_a_run_that_is_disturbed_counts_the_rows_that_its_condition_has_lost(
    reembed: Call, tmp_path: Path
) -> None:
    path = stamped(tmp_path / "m.db")
    change(
        path,  # So that the table is looked at after the replacement, as after another's commit.
        "CREATE TABLE log (id)",
        "CREATE TRIGGER noted AFTER UPDATE OF v ON docs BEGIN INSERT INTO log VALUES (new.id); END",
    )

    ran = reembed("--db", path, *FLAGS, *ON_THE_STAMP, "--json", range_rows=4)

    assert (ran.code, ran.values["total"], ran.values["reembedded"]) == (0, 20, 20)
    assert dimensions(path) == [(6, 20), (8, 20)]


def test_a_row_that_is_edited_late_is_embedded_again_though_its_condition_is_lost(
    reembed: Call, tmp_path: Path
) -> None:
    path = stamped(tmp_path / "m.db")
    change(
        path,
        "CREATE TRIGGER edited AFTER UPDATE OF v ON docs WHEN new.id = 'k07' AND old.dim = 6 "
        "BEGIN UPDATE docs SET body = 'late' WHERE id = 'k07'; END",
    )

    ran = reembed("--db", path, *FLAGS, *ON_THE_STAMP, "--json", range_rows=4)

    assert (ran.code, ran.values["reembedded"]) == (0, 20)
    assert "late" in ran.texts
    expected = FakeEmbedder(8).embed(["late"])[0].tobytes()
    assert select(path, "SELECT v FROM docs WHERE id = 'k07'") == [(expected,)]
    assert reembed("verify", "--db", path).code == 0


def test_parts_of_rows_that_their_condition_loses_are_replaced_one_after_the_other(
    reembed: Call, tmp_path: Path
) -> None:
    path = stamped(tmp_path / "m.db")
    flags = ("--db", path, *FLAGS, *ON_THE_STAMP, "--max-rows", "8", "--partial", "--json")

    codes = [(ran.code, ran.values["reembedded"]) for ran in (reembed(*flags) for _ in range(3))]

    assert codes == [(6, 8), (6, 16), (0, 20)]
    checked = reembed("verify", "--db", path, "--json")
    assert (checked.code, checked.values["checked"]) == (0, 20)
    assert reembed("rollback", "--db", path, "--json").values["restored"] == 20
    assert dimensions(path) == [(6, 40)]


def test_a_replacement_that_was_cut_off_is_finished_though_its_condition_is_lost(
    reembed: Call, tmp_path: Path
) -> None:
    path = stamped(tmp_path / "m.db")
    change(
        path,
        "CREATE TRIGGER jam BEFORE UPDATE OF v ON docs WHEN new.id = 'k31' "
        "BEGIN SELECT RAISE(ABORT, 'jammed'); END",
    )
    flags = ("--db", path, *FLAGS, *ON_THE_STAMP, "--json")
    cut = reembed(*flags, range_rows=4, rows_at_once=1, first_rows=2)
    change(path, "DROP TRIGGER jam")
    [status] = reembed("status", "--db", path, "--json").values["runs"]
    assert (cut.code, dimensions(path)[1][0], status["rows_in_ranges_replaced"] > 0) == (6, 8, True)

    ran = reembed(*flags)

    assert (ran.code, ran.values["total"], ran.values["reembedded"]) == (0, 20, 20)
    assert ran.texts == set()


def test_rows_are_verified_wherever_they_have_gone(reembed: Call, tmp_path: Path) -> None:
    path = stamped(tmp_path / "m.db")
    change(path, "DELETE FROM docs WHERE id < 'k04'")
    spaces = ("--namespace-column", "kind", "--namespace", "a")
    ran = reembed("--db", path, *FLAGS, "--key", "id", *spaces, "--json", range_rows=4)
    assert (ran.code, ran.values["reembedded"]) == (0, 36)
    with closing(sqlite3.connect(path)) as db:
        db.execute("VACUUM")
    change(
        path,
        "UPDATE docs SET kind = 'b' WHERE id IN ('k08', 'k09')",
        "DELETE FROM docs WHERE id = 'k05'",
        "INSERT INTO docs VALUES ('x', 'text', 'a', 'm', 8, NULL), ('y', 't', 'b', 'm', 8, NULL)",
    )

    checked = reembed("verify", "--db", path, "--json")

    assert (checked.code, checked.values["checked"], checked.values["deleted"]) == (0, 35, 1)
    assert (checked.values["unwritten"], checked.values["sampled"]) == (1, 35)
    change(path, "UPDATE docs SET v = zeroblob(32) WHERE id = 'k08'")
    found = reembed("verify", "--db", path, "--json")
    assert found.values["wrong_ids"] == {"overwritten": ["k08"], "zeros": ["k08"]}


@pytest.mark.parametrize(
    ("statement", "says", "left"),
    [
        (
            "DELETE FROM docs",
            snapshot(
                "none of the 20 rows that the run RUN wrote in TMP/m.db can be checked: "
                "20 were deleted since"
            ),
            snapshot(
                "none of the 20 rows that the run RUN wrote in TMP/m.db could be put "
                "back (it was deleted since 20), so it stays as it is; if nothing of it "
                "is wanted back, reembed cleanup --run RUN --yes removes it"
            ),
        ),
        (
            f"UPDATE docs SET body = 'new', v = x'{'3f' * 32}'",
            snapshot(
                "none of the 20 rows that the run RUN wrote in TMP/m.db can be checked: "
                "20 were given another text and vector since"
            ),
            snapshot(
                "none of the 20 rows that the run RUN wrote in TMP/m.db could be put "
                "back (its vector was changed by another program since 20), so it stays "
                "as it is; if nothing of it is wanted back, reembed cleanup --run RUN "
                "--yes removes it"
            ),
        ),
    ],
)
def test_if_no_row_of_a_run_can_be_checked_it_is_said(
    statement: str, says: str, left: str, reembed: Call, tmp_path: Path
) -> None:
    path = stamped(tmp_path / "m.db")
    run_id = reembed("--db", path, *FLAGS, *ON_THE_STAMP, "--json").values["run_id"]
    change(path, statement)

    checked = reembed("verify", "--db", path)
    undone = reembed("rollback", "--db", path, "--json")

    assert checked.code == 1
    assert wording(checked.error, tmp_path) == says
    assert "all is as" not in checked.out
    assert run_id in checked.error
    assert (undone.code, undone.values["state"]) == (1, "replaced")
    assert wording(undone.error, tmp_path) == left


def test_a_key_that_names_two_rows_is_refused_also_outside_the_condition(
    reembed: Call, tmp_path: Path
) -> None:
    """A backup tells rows by their keys: the other one would get the first one's vector."""
    path = make(tmp_path / "m.db", DOCS.replace("id INTEGER PRIMARY KEY", "id, model"))
    change(
        path,
        f"INSERT INTO docs VALUES (1, 'former', 'text', x'{VECTOR.hex()}')",
        "INSERT INTO docs VALUES (1, 'new', 'text', NULL)",
    )
    flags = ("--db", path, *FLAGS, "--where", "model = 'former'")

    refused = reembed(*flags, "--key", "id")

    assert refused.code == 1
    assert wording(refused.error, tmp_path) == snapshot(
        "two rows of the table docs have the key 1, so id does not name a row; name "
        "columns that do with --key"
    )
    assert reembed(*flags).code == 0
    assert reembed("rollback", "--db", path).code == 0
    assert select(path, "SELECT v FROM docs ORDER BY rowid") == [(VECTOR,), (None,)]


def test_stamps_of_rows_that_the_condition_loses_are_counted_and_verified(
    reembed: Call, tmp_path: Path
) -> None:
    path = stamped(tmp_path / "m.db", 8)
    vectors = FakeEmbedder(8).embed([f"text {at}" for at in range(8)])
    change(
        path,
        *(
            f"UPDATE docs SET v = x'{v.tobytes().hex()}' WHERE id = 'k{i:02d}'"
            for i, v in enumerate(vectors)
        ),
        "CREATE TABLE log (id)",
        "CREATE TRIGGER noted AFTER UPDATE ON docs BEGIN INSERT INTO log VALUES (new.id); END",
    )

    ran = reembed("--db", path, *FLAGS, *ON_THE_STAMP, "--model", "m", "--stamp-only", "--json")

    assert (ran.code, ran.values["total"], ran.values["reembedded"]) == (0, 4, 4)
    assert select(path, "SELECT model, count(*) FROM docs GROUP BY 1") == [("m", 4), ("other", 4)]
    checked = reembed("verify", "--db", path, "--json")
    assert (checked.code, checked.values["checked"]) == (0, 4)
    assert reembed("rollback", "--db", path, "--json").values["restored"] == 4
    assert select(path, "SELECT count(*) FROM docs WHERE model = 'former'") == [(4,)]


def test_rows_beside_the_condition_are_read_only_where_they_may_be_the_runs(tmp_path: Path) -> None:
    """A narrow condition makes wide ranges; before anything is written, only its rows matter."""
    path = stamped(tmp_path / "m.db", 8)
    change(path, "UPDATE docs SET v = zeroblob(32) WHERE id = 'k02'")
    config = {"table": "docs", "text": ["body"], "vector": "v", "where": "model = 'former'"}
    store = open_store(path, None, config).select(Mode.ALL, model="m", dimension=8)

    def keys(some: Store, *, with_stored: bool = True) -> dict[str, bool]:
        rows = some.read_range(EVERYTHING, with_stored=with_stored)
        return {row.key: row.meant for row in rows}

    chosen = {"k01": True, "k03": True, "k05": True, "k07": True}
    assert keys(store, with_stored=False) == keys(store.selected()) == chosen
    assert keys(store) == chosen | dict.fromkeys(("k00", "k02", "k04", "k06"), False)
    others = {"k00": False, "k04": False, "k06": False}
    assert keys(store.everywhere()) == chosen | {"k02": False} | others


@pytest.mark.parametrize("stored", ["json", "npy"])
@pytest.mark.parametrize("dimension", [[], ["--dim-column", "dim"]])
def test_a_vector_of_another_length_is_not_current_in_any_format(
    stored: str, dimension: list[str], reembed: Call, tmp_path: Path
) -> None:
    value = "CAST(? AS TEXT)" if stored == "json" else "?"
    path = make(tmp_path / "t.db", DOCS.replace("v BLOB", f"v {stored}, model, dim DEFAULT 8"))
    with closing(sqlite3.connect(path)) as db, db:
        for length in (6, 8, 8):
            vector = encode(stored, np.ones(length, "<f4").tobytes())
            db.execute(f"INSERT INTO docs (body, v, model) VALUES ('a', {value}, 'm')", [vector])
        db.execute("UPDATE docs SET model = 'old' WHERE id = 3")
    flags = ("--db", path, *FLAGS, "--space-column", "model", "--format", stored, *dimension)

    config = {"table": "docs", "text": ["body"], "vector": "v", "space_column": "model"}
    store = open_store(path, None, config | {"format": stored})
    to_stamp = store.select(Mode.STAMP_ONLY, model="m", dimension=8).read_range(EVERYTHING)
    ran = reembed(*flags, "--model", "m", "--skip-current-space", "--json")
    again = reembed(*flags, "--model", "m", "--skip-current-space", "--json")

    assert [row.key for row in to_stamp] == ["3"]
    assert (ran.code, ran.values["reembedded"], again.values["total"]) == (0, 2, 0)


GENERATED = "CREATE TABLE docs (id INTEGER PRIMARY KEY, note, body TEXT, v BLOB, model TEXT, {})"


@pytest.mark.parametrize(
    ("column", "flags", "refused"),
    [
        (
            "made TEXT AS (coalesce(note, 'by ' || model))",
            ["--text", "made"],
            snapshot(
                "the column made is generated from the column model, which is replaced, "
                "so it would change with a row's vector; name another with --text"
            ),
        ),
        (
            '[made] AS ("model" || id) STORED',
            ["--text", "made"],
            snapshot(
                "the column made is generated from the column model, which is replaced, "
                "so it would change with a row's vector; name another with --text"
            ),
        ),
        (
            "later AS (V), made AS (length(later))",
            ["--text", "body", "--key", "made"],
            snapshot(
                "the column made is generated from the column v, which is replaced, so "
                "it would change with a row's vector; name another with --key"
            ),
        ),
        (
            "made AS (model)",
            ["--text", "body", "--namespace-column", "made"],
            snapshot(
                "the column made is generated from the column model, which is replaced, "
                "so it would change with a row's vector; name another with "
                "--namespace-column"
            ),
        ),
        ("made AS (note || 'model, v' /* model */)", ["--text", "made"], None),
        ("made AS (note), other AS (model)", ["--text", "made", "--key", "id"], None),
    ],
)
def test_a_column_that_is_generated_from_a_replaced_one_names_nothing(
    column: str, flags: list[str], refused: str | None, reembed: Call, tmp_path: Path
) -> None:
    path = make(tmp_path / "t.db", GENERATED.format(column), rows=3)
    change(path, "UPDATE docs SET note = 'note'")
    before = files(tmp_path)
    named = ("--db", path, "--table", "docs", "--vector", "v", "--space-column", "model", *flags)

    ran = reembed(*named, "--model", "m", "--dry-run")

    assert ran.code == (0 if refused is None else 1)
    if refused is not None:
        assert wording(ran.error, tmp_path) == refused
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("primary", "says"),
    [
        (
            "doc, model",
            snapshot(
                "the primary key of the table t (doc, model) holds the column model, "
                "which is replaced; say what names a row with --key doc, or --key rowid"
            ),
        ),
        (
            "model",
            snapshot(
                "the primary key of the table t (model) holds the column model, which is "
                "replaced; say what names a row with --key rowid"
            ),
        ),
    ],
)
def test_a_primary_key_with_a_replaced_column_is_no_default(
    primary: str, says: str, reembed: Call, tmp_path: Path
) -> None:
    path = tmp_path / "t.db"
    change(
        path,
        f"CREATE TABLE t (doc, body, v, model, PRIMARY KEY ({primary}))",
        "INSERT INTO t VALUES (1, 'a', zeroblob(24), 'old')",
    )
    flags = ("--db", path, "--table", "t", "--text", "body", "--vector", "v")

    refused = reembed(*flags, "--space-column", "model")

    assert refused.code == 2
    assert refused.error == says
    assert reembed(*flags, "--space-column", "model", "--key", "doc").code == 0
