"""vec0 tables of sqlite-vec, queried by MATCH."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inline_snapshot import snapshot

from reembed.transforms.embedders.fake import FakeEmbedder
from reembed.transforms.stores.vec import with_dimension
from reembed.transforms.stores.vec0 import connect
from tests.conftest import Call, Program, files, make_store, memory
from tests.wording import line_with, wording

TEXTS = [f"note {at}" for at in range(40)]
FLAGS = ("--text", "body")


def make(path: Path, *, dimension: int = 384, columns: str = "", metric: str = "cosine") -> Path:
    with closing(connect(path)) as db, db:
        db.execute(
            f"CREATE VIRTUAL TABLE docs USING vec0(embedding float[{dimension}] "
            f"distance_metric={metric}{columns}, +body TEXT)"
        )
        vectors = FakeEmbedder(dimension).embed([f"old {text}" for text in TEXTS])
        db.executemany(
            "INSERT INTO docs (rowid, embedding, body) VALUES (?, ?, ?)",
            [(at + 1, vectors[at].tobytes(), text) for at, text in enumerate(TEXTS)],
        )
    return path


def query(path: Path, sql: str, *values: Any) -> list[tuple[Any, ...]]:
    with closing(connect(path)) as db, db:
        found: list[tuple[Any, ...]] = db.execute(sql, values).fetchall()
        return found


def nearest(path: Path, text: str, dimension: int) -> list[tuple[Any, ...]]:
    vector = FakeEmbedder(dimension).embed([text])[0].tobytes()
    match = "SELECT rowid, body FROM docs WHERE embedding MATCH ? AND k = 3 ORDER BY distance"
    return query(path, match, vector)


@pytest.mark.parametrize("metric", ["cosine", "L2", "L1"])
def test_a_table_is_moved_to_another_length_and_back_and_is_searched_after_each(
    metric: str, reembed: Call, tmp_path: Path
) -> None:
    path = make(tmp_path / "m.db", metric=metric)
    schema = "SELECT sql FROM sqlite_schema WHERE name = 'docs'"
    ((before,),) = query(path, schema)

    for model, dimension in (("m", 256), ("n", 384)):
        ran = reembed("--db", path, *FLAGS, "--model", model, "--dim", str(dimension), "--json")

        assert (ran.code, ran.values["reembedded"]) == (0, len(TEXTS))
        assert nearest(path, "note 7", dimension)[0] == (8, "note 7")
        assert query(path, schema) == [(before.replace("384", str(dimension)),)]
        assert reembed("verify", "--db", path).code == 0
    assert query(path, "SELECT count(*) FROM docs") == [(len(TEXTS),)]
    assert query(path, "PRAGMA integrity_check") == [("ok",)]


def test_partitions_metadata_and_other_vectors_stay(reembed: Call, tmp_path: Path) -> None:
    more = ", genre TEXT partition key, other float[3], year INTEGER, good BOOLEAN"
    path = tmp_path / "m.db"
    rows = [
        (at + 1, f"g{at % 3}", np.full(3, at, "<f4").tobytes(), 1990 + at, at % 2, text)
        for at, text in enumerate(TEXTS)
    ]
    with closing(connect(path)) as db, db:
        db.execute(f"CREATE VIRTUAL TABLE docs USING vec0(embedding float[4]{more}, +body TEXT)")
        for rowid, genre, other, year, good, body in rows:
            db.execute(
                "INSERT INTO docs (rowid, embedding, genre, other, year, good, body) "
                "VALUES (?, zeroblob(16), ?, ?, ?, ?, ?)",
                (rowid, genre, other, year, good, body),
            )

    ran = reembed("--db", path, *FLAGS, "--vector", "embedding", "--dim", "8")

    assert ran.code == 0
    held = "SELECT rowid, genre, other, year, good, body FROM docs ORDER BY rowid"
    assert query(path, held) == rows
    vector = FakeEmbedder(8).embed(["note 7"])[0].tobytes()
    found = query(
        path,
        "SELECT rowid FROM docs WHERE embedding MATCH ? AND k = 1 AND genre = 'g1' AND year > 1990",
        vector,
    )
    assert found == [(8,)]


def test_rows_without_a_text_are_refused_before_anything_is_embedded(
    reembed: Call, tmp_path: Path
) -> None:
    path = make(tmp_path / "m.db", dimension=6)
    query(path, "INSERT INTO docs (rowid, embedding) VALUES (99, zeroblob(24))")
    before = files(tmp_path)

    refused = reembed("--db", path, *FLAGS, "--dim", "8")

    assert refused.code == 1
    assert wording(refused.error, tmp_path) == snapshot(
        "1 rows of the vec0 table docs have no text that could be embedded, and a table of "
        "vectors of 8 numbers can't keep theirs of 6; give them texts, or delete them first"
    )
    assert files(tmp_path) == before
    same = reembed("--db", path, *FLAGS, "--dim", "6", "--json")
    assert (same.code, same.values["skipped"]) == (0, 1)
    assert query(path, "SELECT hex(embedding) FROM docs WHERE rowid = 99") == [("00" * 24,)]


def test_a_text_that_is_not_utf_8_is_refused_before_anything_is_embedded(
    reembed: Call, tmp_path: Path
) -> None:
    path = tmp_path / "v.db"
    with closing(connect(path)) as db, db:
        db.execute("CREATE VIRTUAL TABLE docs USING vec0(e float[5], +body text)")
        for at, text in enumerate((b"one", b"\xff", "zwölf".encode()), start=1):
            row = (at, bytes(20), text)
            db.execute("INSERT INTO docs (rowid, e, body) VALUES (?, ?, CAST(? AS TEXT))", row)
    flags = ("--db", path, "--text", "body", "--model", "m")

    for more in (["--dry-run"], []):
        refused = reembed(*flags, *more)
        assert (refused.code, refused.texts) == (1, set())
        assert wording(refused.error, tmp_path) == snapshot(
            "1 rows of the vec0 table docs have no text that could be embedded, and a table "
            "of vectors of 8 numbers can't keep theirs of 5; give them texts, or delete them "
            "first"
        )
    assert not path.with_name("v.db.reembed").exists()
    same = reembed(*flags, "--dim", "5", "--json")
    assert (same.code, same.values["reembedded"], same.values["skipped"]) == (0, 2, 1)


def test_a_row_that_is_added_in_the_middle_is_embedded_too(reembed: Call, tmp_path: Path) -> None:
    path = make(tmp_path / "m.db", dimension=6)

    assert reembed("--db", path, *FLAGS, "--max-rows", "20", range_rows=8).code == 0
    query(path, "INSERT INTO docs (rowid, embedding, body) VALUES (99, zeroblob(24), 'new')")
    ran = reembed("--db", path, *FLAGS, range_rows=8)

    assert (ran.code, ran.texts) == (0, {*TEXTS[20:], "new"})
    assert nearest(path, "new", 8)[0] == (99, "new")


@pytest.mark.parametrize(
    ("schema", "flags", "says"),
    [
        (
            "embedding int8[4], +body TEXT",
            FLAGS,
            snapshot(
                "the vectors in column embedding of the vec0 table docs are int8[4]; only float "
                "ones can be re-embedded"
            ),
        ),
        (
            "embedding bit[8], +body TEXT",
            FLAGS,
            snapshot(
                "the vectors in column embedding of the vec0 table docs are bit[8]; only float "
                "ones can be re-embedded"
            ),
        ),
        (
            "id TEXT PRIMARY KEY, embedding float[4], +body TEXT",
            FLAGS,
            snapshot(
                "the key id of the vec0 table docs is a TEXT; only whole numbers as keys are "
                "supported"
            ),
        ),
        (
            "a float[4], b float[4], +body TEXT",
            FLAGS,
            snapshot("the vec0 table docs has the vectors a, b; choose one with --vector"),
        ),
        (
            "embedding float[4]",
            (),
            snapshot(
                "the texts of the vec0 table docs are found by --text, which names auxiliary "
                "columns of it, or with --text-table those of another table; give --text"
            ),
        ),
        (
            "embedding float[4], +body TEXT",
            ("--text", "x"),
            snapshot(
                "the table docs has no column x (it has rowid, embedding, body); correct --text"
            ),
        ),
        (
            "embedding float[4], +body TEXT",
            ("--text", "x", "--text-table", "nope"),
            snapshot("TMP/m.db has no table nope; correct --text-table"),
        ),
        (
            "embedding float[4], +body TEXT",
            (*FLAGS, "--where", "1"),
            snapshot(
                "--where does not go with a vec0 table, which is moved as a whole; leave it out"
            ),
        ),
        (
            "embedding float[4], +body TEXT",
            (*FLAGS, "--namespace", "1"),
            snapshot(
                "--namespace does not go with a vec0 table, which is moved as a whole; leave it out"
            ),
        ),
        (
            "embedding float[4], +body TEXT",
            (*FLAGS, "--missing-only"),
            snapshot(
                "the vec0 table docs: text body, vector embedding are moved as wholes, so only "
                "--namespace chooses some of TMP/m.db; leave out what chooses rows"
            ),
        ),
        (
            "embedding float[4], +body TEXT",
            (*FLAGS, "--skipped", "clear"),
            snapshot(
                "--skipped clear can't be done in TMP/m.db: a row of a vec0 table always has one"
            ),
        ),
    ],
)
def test_what_can_not_be_done_is_refused_by_name(
    schema: str, flags: tuple[str, ...], says: str, reembed: Call, tmp_path: Path
) -> None:
    path = tmp_path / "m.db"
    query(path, f"CREATE VIRTUAL TABLE docs USING vec0({schema})")
    before = files(tmp_path)

    ran = reembed("--db", path, *flags)

    assert ran.code in (1, 2)
    assert wording(ran.error, tmp_path) == says
    assert files(tmp_path) == before


def test_a_rollback_is_refused_once_a_row_was_added_since(reembed: Call, tmp_path: Path) -> None:
    path = make(tmp_path / "m.db", dimension=6)
    reembed("--db", path, *FLAGS)
    query(path, "INSERT INTO docs (rowid, embedding, body) VALUES (99, zeroblob(32), 'new')")

    undone = reembed("rollback", "--db", path)

    assert undone.code == 1
    assert reembed("status", "--db", path).code == 0
    assert wording(undone.error, tmp_path) == snapshot(
        "1 rows are in the way (the first, 99: it was added since) of putting back TMP/m.db, "
        "where all rows must have one model, so 40 others keep their new vectors; delete "
        "these rows and roll back again, or re-embed the table with its former model; "
        "nothing was put back"
    )
    assert wording(line_with("WARN", undone.err), tmp_path) == snapshot(
        "WARN [RUN] row 99 is in the way: it was added since"
    )
    assert query(path, "SELECT DISTINCT length(embedding) FROM docs") == [(32,)]
    query(path, "DELETE FROM docs WHERE rowid = 99")
    assert reembed("rollback", "--db", path).code == 0
    assert query(path, "SELECT DISTINCT length(embedding) FROM docs") == [(24,)]


def test_several_tables_are_chosen_from(reembed: Call, tmp_path: Path) -> None:
    path = make(tmp_path / "m.db", dimension=6)
    query(path, "CREATE VIRTUAL TABLE more USING vec0(embedding float[4], +body TEXT)")

    assert wording(reembed("--db", path, *FLAGS).error, tmp_path) == snapshot(
        "TMP/m.db has the vec0 tables docs, more; choose one of them with --table"
    )
    assert reembed("--db", path, *FLAGS, "--table", "docs").code == 0


def test_an_ai_memory_database_is_one_whatever_else_is_in_it(reembed: Call, tmp_path: Path) -> None:
    path = make_store(tmp_path / "m.db", [memory("a")])
    query(path, "CREATE VIRTUAL TABLE docs USING vec0(embedding float[4], +body TEXT)")

    assert reembed("--db", path, "--dry-run", "--json").values["store"] == {"kind": "ai-memory"}
    chosen = reembed("--db", path, *FLAGS, "--dry-run", "--json").values["store"]
    assert chosen["kind"] == "sqlite-vec"


def test_texts_of_another_table_must_be_told_by_its_key(reembed: Call, tmp_path: Path) -> None:
    path = make(tmp_path / "m.db", dimension=6)
    query(path, "CREATE TABLE texts (body TEXT, doc INTEGER)")
    query(path, "INSERT INTO texts VALUES ('a', 1), ('b', 1)")

    ran = reembed("--db", path, *FLAGS, "--text-table", "texts", "--text-key", "doc")

    assert wording(ran.error, tmp_path) == snapshot(
        "two rows of texts have the doc 1, so it is not known which has a vector's text; "
        "correct --text-key"
    )


def test_without_the_packages_it_says_which_to_install(
    reembed: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path / "m.db", dimension=6)
    monkeypatch.setitem(sys.modules, "sqlite_vec", None)

    ran = reembed("--db", path, *FLAGS)

    assert ran.code == 1
    assert wording(ran.error, tmp_path) == snapshot(
        "vec0 tables need the packages of sqlite-vec, which are not installed: pip install "
        "'.[sqlite-vec]' in the checkout of reembed"
    )


def test_the_real_program_moves_a_table_with_the_real_model(
    program: Program, tmp_path: Path
) -> None:
    path = make(tmp_path / "m.db", dimension=6)

    assert program("--db", path, *FLAGS).returncode == 0
    assert query(path, "SELECT DISTINCT length(embedding) FROM docs") == [(4 * 384,)]
    assert program("rollback", "--db", path).returncode == 0
    assert query(path, "SELECT DISTINCT length(embedding) FROM docs") == [(4 * 6,)]


def test_only_the_length_of_the_named_vector_changes() -> None:
    sql = "CREATE VIRTUAL TABLE v USING vec0(a float[4], ab FLOAT [ 4 ] distance_metric=L1)"

    assert with_dimension(sql, "a", 8) == sql.replace("a float[4]", "a float[8]")
    assert with_dimension(sql, "ab", 8) == sql.replace("[ 4 ]", "[ 8 ]")


def test_rows_that_a_run_skipped_are_in_no_rollbacks_way(reembed: Call, tmp_path: Path) -> None:
    path = make(tmp_path / "m.db", dimension=6)
    query(path, "INSERT INTO docs (rowid, embedding) VALUES (99, zeroblob(24))")
    before = query(path, "SELECT rowid, embedding, body FROM docs ORDER BY rowid")
    assert reembed("--db", path, *FLAGS, "--dim", "6").code == 0

    undone = reembed("rollback", "--db", path, "--json")

    assert (undone.code, undone.values["in_the_way"]) == (0, {})
    assert query(path, "SELECT rowid, embedding, body FROM docs ORDER BY rowid") == before


def test_a_rollback_that_put_nothing_back_leaves_the_run_as_it_was(
    reembed: Call, tmp_path: Path
) -> None:
    """Though another program has given a row its previous vector."""
    path = make(tmp_path / "m.db", dimension=8)
    [(former,)] = query(path, "SELECT embedding FROM docs WHERE rowid = 3")
    reembed("--db", path, *FLAGS, "--dim", "8")
    query(path, "UPDATE docs SET embedding = ? WHERE rowid = 3", former)
    query(path, "INSERT INTO docs (rowid, embedding, body) VALUES (99, ?, 'new')", b"\x3f" * 32)

    undone = reembed("rollback", "--db", path, "--json")

    assert (undone.code, undone.values["state"], undone.values["restored"]) == (1, "replaced", 0)
    assert wording(undone.error, tmp_path) == snapshot(
        "1 rows are in the way (the first, 99: it was added since) of putting back TMP/m.db, "
        "where all rows must have one model, so 39 others keep their new vectors; delete "
        "these rows and roll back again, or re-embed the table with its former model; "
        "nothing was put back"
    )
    checked = reembed("verify", "--db", path, "--json")
    assert (checked.code, checked.values["put_back"]) == (1, 0)
    assert checked.values["wrong_ids"]["overwritten"] == ["3"]
