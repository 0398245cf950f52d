"""Hints for files of no known store, warnings of odd columns, files that others must move."""

from __future__ import annotations

import json
import shlex
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inline_snapshot import snapshot

from reembed.transforms.stores.columns import Column, looks_like, spread_rowids
from reembed.transforms.stores.vec0 import connect
from tests.conftest import Call, Ran, change, files
from tests.wording import wording

SENTENCES = [f"A glazier has sold some {at} lamps to an owl." for at in range(40)]
TITLES = [f"The lamps of {'xyz'[at % 3]} {at}" for at in range(40)]
VECTORS = [np.random.default_rng(at).standard_normal(12).astype("<f4") for at in range(40)]


def make(path: Path, columns: dict[str, list[Any]], name: str = "notes", end: str = "") -> Path:
    """A table with columns as they are declared."""
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(f"CREATE TABLE {name} ({', '.join(columns)}{end})")
        db.executemany(
            f"INSERT INTO {name} VALUES ({', '.join('?' * len(columns))})",
            zip(*columns.values(), strict=True),
        )
    return path


def proposed(ran: Ran) -> list[str]:
    """The flags that were proposed."""
    return [line.strip() for line in ran.err.splitlines() if line.startswith("  --")]


BLOBS = [one.tobytes() for one in VECTORS]
NO_TEXTS: dict[str, list[Any]] = {
    "id TEXT PRIMARY KEY": [f"{at:08x}-0000-4000-8000-000000000000" for at in range(40)],
    "created_at TEXT": [f"2026-01-{1 + at % 28:02}T00:00:00Z" for at in range(40)],
    "day TEXT": [f"{1 + at % 28} January 2026" for at in range(40)],
    "url TEXT": [f"https://example.org/{at}" for at in range(40)],
    "path TEXT": [f"Daily notes/2026 {at}.md" for at in range(40)],
    "hash TEXT": [f"{at:040x}" for at in range(40)],
    "model TEXT": ["all-MiniLM-L6-v2 (384-dim, local)"] * 40,
    "provider TEXT": ["somebody", "nobody"] * 20,
    "meta TEXT": [json.dumps({"tags": ["a", "b"], "at": at}) for at in range(40)],
    "long_meta TEXT": [json.dumps({"tags": ["a word"] * 99, "at": at}) for at in range(40)],
    "size TEXT": [str(at * 1000) for at in range(40)],
    "chunk TEXT": [f"c{at:03}" for at in range(40)],
    "n INTEGER": list(range(40)),
}


@pytest.mark.parametrize("format", ["f32le", "json", "f64le"])
def test_the_texts_of_a_table_are_proposed_the_longest_first_and_nothing_else(
    format: str, reembed: Call, tmp_path: Path
) -> None:
    stored: dict[str, list[Any]] = {
        "f32le": BLOBS,
        "json": [json.dumps(one.tolist()) for one in VECTORS],
        "f64le": [one.astype("<f8").tobytes() for one in VECTORS],
    }
    texts: dict[str, list[Any]] = {"title TEXT": TITLES, "body TEXT": SENTENCES}
    path = make(tmp_path / "m.db", NO_TEXTS | texts | {"embedding": stored[format]})
    before = files(tmp_path)

    ran = reembed("--db", path)

    more = f" --format {format}" if format != "f32le" else ""
    found = [f"--table notes --text {text} --vector embedding{more}" for text in ("body", "title")]
    assert ran.code == 1
    assert proposed(ran) == found
    assert '      "A glazier has sold some 0 lamps to an owl."' in ran.err.splitlines()
    assert files(tmp_path) == before
    for flags in proposed(ran):
        assert reembed("--db", path, *shlex.split(flags), "--dry-run").code == 0


def test_a_table_whose_texts_lie_elsewhere_is_not_proposed(reembed: Call, tmp_path: Path) -> None:
    path = make(tmp_path / "m.db", NO_TEXTS | {"embedding BLOB": BLOBS})
    make(path, {"id TEXT": NO_TEXTS["chunk TEXT"], "body TEXT": SENTENCES}, "chunks")
    make(path, {"body TEXT": SENTENCES, "v BLOB": BLOBS, "k PRIMARY KEY": TITLES}, "cache")
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE odd (k PRIMARY KEY, body TEXT, v BLOB) WITHOUT ROWID")
        db.execute("INSERT INTO odd SELECT k, body, v FROM cache")
        db.execute("CREATE VIEW shown AS SELECT * FROM cache")
        db.commit()

    assert proposed(reembed("--db", path)) == ["--table cache --text body --vector v"]


def test_no_vector_yet_a_few_values_and_text_keys_do_not_hide_a_table(
    reembed: Call, tmp_path: Path
) -> None:
    some = [json.dumps(one.tolist()) if at % 5 == 0 else "[]" for at, one in enumerate(VECTORS)]
    path = make(tmp_path / "m.db", {"text TEXT PRIMARY KEY": SENTENCES, "v": some})
    make(path, {"body": ["One text alone."], "v": BLOBS[:1]}, "one")
    words = ["猫は窓から外を見ている", "犬は走る", "鳥が鳴く"]
    make(path, {"body": words, "v": BLOBS[:3]}, "words")

    assert proposed(reembed("--db", path)) == [
        "--table notes --text text --vector v --format json",
        "--table one --text body --vector v",
        "--table words --text body --vector v",
    ]


def test_a_value_that_is_shown_is_short_and_on_one_line(reembed: Call, tmp_path: Path) -> None:
    odd = [f"A\nreembed: error: no\x1b[2J {'long ' * 99}{at}" for at in range(9)]
    path = make(tmp_path / "m.db", {"body": odd, "v": BLOBS[:9]})

    ran = reembed("--db", path)

    assert wording(ran.error, tmp_path) == snapshot(
        "TMP/m.db is not an ai-memory database: it has no table 'memories' with id, "
        "namespace, title and content (its tables are notes); name the right file with "
        "--db, or select a table of it with the flags on a line below"
    )
    shown = "A reembed: error: no\\x1b[2J" + " long" * 7
    assert ran.err.splitlines()[2].startswith(f'      "{shown}')
    assert len(ran.err.splitlines()[2]) < 75


def test_at_most_ten_are_listed(reembed: Call, tmp_path: Path) -> None:
    path = tmp_path / "m.db"
    for at in range(12):
        make(path, {"body": SENTENCES, "v": BLOBS}, f"t{at}")

    ran = reembed("--db", path)

    assert len(proposed(ran)) == 10
    assert ran.err.splitlines()[-2] == snapshot("  and 2 more")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (
            NO_TEXTS["id TEXT PRIMARY KEY"],
            snapshot(
                [
                    "most values of the text column t look like UUIDs (of 40 sampled "
                    "rows); correct --text if that is not what was embedded"
                ]
            ),
        ),
        (
            NO_TEXTS["hash TEXT"],
            snapshot(
                [
                    "most values of the text column t look like hashes (of 40 sampled "
                    "rows); correct --text if that is not what was embedded"
                ]
            ),
        ),
        (
            NO_TEXTS["url TEXT"],
            snapshot(
                [
                    "most values of the text column t look like URLs (of 40 sampled rows); "
                    "correct --text if that is not what was embedded"
                ]
            ),
        ),
        (
            NO_TEXTS["path TEXT"],
            snapshot(
                [
                    "most values of the text column t look like paths (of 40 sampled "
                    "rows); correct --text if that is not what was embedded"
                ]
            ),
        ),
        (
            NO_TEXTS["created_at TEXT"],
            snapshot(
                [
                    "most values of the text column t look like dates (of 40 sampled "
                    "rows); correct --text if that is not what was embedded"
                ]
            ),
        ),
        (
            NO_TEXTS["n INTEGER"],
            snapshot(
                [
                    "most values of the text column t look like numbers and are shorter "
                    "than 12 characters (of 40 sampled rows); correct --text if that is "
                    "not what was embedded"
                ]
            ),
        ),
        (
            NO_TEXTS["model TEXT"],
            snapshot(
                [
                    "most values of the text column t are equal (of 40 sampled rows); "
                    "correct --text if that is not what was embedded"
                ]
            ),
        ),
        (
            [f"text {at}" for at in range(40)],
            snapshot(
                [
                    "most values of the text column t are shorter than 12 characters (of "
                    "40 sampled rows); correct --text if that is not what was embedded"
                ]
            ),
        ),
        (SENTENCES, snapshot([])),
        (NO_TEXTS["meta TEXT"], snapshot([])),
        (["A few."] * 3, snapshot([])),
    ],
)
def test_the_plan_warns_of_a_column_that_may_not_be_the_text(
    values: list[Any], says: list[str], reembed: Call, tmp_path: Path
) -> None:
    path = make(tmp_path / "m.db", {"t": values, "v": BLOBS[: len(values)]})
    flags = ("--db", path, "--table", "notes", "--text", "t", "--vector", "v", "--dry-run")

    shown, values_shown = reembed(*flags), reembed(*flags, "--json").values

    notes = [line for line in shown.err.splitlines() if "text column" in line]
    assert values_shown["warnings"] == says
    assert notes == [f"reembed: NOTE — {said}" for said in values_shown["warnings"]]


def test_rows_are_sampled_all_over_a_table_whatever_its_rowids() -> None:
    with closing(sqlite3.connect(":memory:")) as db:
        db.execute("CREATE TABLE t (a)")
        assert spread_rowids(db, "t") == []
        db.executemany("INSERT INTO t (rowid) VALUES (?)", [(at,) for at in range(-500, 5_000)])
        spread = spread_rowids(db, "t")
        assert (spread[0], spread[-1], len(spread)) == (-500, 4_999, 256)
        db.execute("INSERT INTO t (rowid) VALUES (?)", (2**63 - 1,))
        uneven = spread_rowids(db, "t")
        assert (len(uneven), len(set(uneven))) == (256, 256)


@given(st.text(max_size=400))
def test_any_value_is_looked_at(value: str) -> None:
    looks_like(value)
    column = Column("a", (value,) * 8, (value,) * 8, (len(value),) * 8, 8)
    assert column.could_be_text(is_key=False) is False
    assert len(column.example) <= 60


@pytest.mark.parametrize("value", ["a/" * 150, "1." * 150, "a@" * 150, "A" * 300, "{[" * 150])
def test_no_value_takes_long(value: str) -> None:
    for _ in range(200):
        looks_like(value)


CHROMA = (
    "CREATE TABLE embeddings_queue (seq_id INTEGER PRIMARY KEY, operation INTEGER, topic TEXT, "
    "id TEXT, vector BLOB, encoding TEXT, metadata TEXT)",
    "CREATE TABLE segments (id TEXT PRIMARY KEY, type TEXT, scope TEXT, collection TEXT)",
)
QMD = (
    "CREATE TABLE content_vectors (hash TEXT, seq INTEGER, pos INTEGER, model TEXT)",
    "CREATE VIRTUAL TABLE vectors_vec USING vec0(hash_seq TEXT PRIMARY KEY, embedding float[4])",
)
TXTAI = (
    "CREATE TABLE documents (id TEXT PRIMARY KEY, data JSON, tags TEXT)",
    "CREATE TABLE sections (indexid INTEGER PRIMARY KEY, id TEXT, text TEXT, tags TEXT)",
)
MNEMOSYNE = (
    "CREATE TABLE working_memory (id TEXT PRIMARY KEY, content TEXT)",
    "CREATE TABLE episodic_memory (id TEXT, content TEXT, binary_vector BLOB)",
)
MORE_MNEMOSYNE = (
    *MNEMOSYNE[:1],
    "CREATE TABLE old (content TEXT, binary_vector BLOB)",
    "CREATE VIRTUAL TABLE vec_episodes USING vec0(embedding int8[4])",
)


@pytest.mark.parametrize(
    ("statements", "said"),
    [
        (
            CHROMA,
            snapshot(
                [
                    "reembed: error: TMP/m.db is a database of Chroma: it is searched "
                    "through index files beside it, and the vectors in it are only a log; "
                    "embed the documents again through its own API, as into a new "
                    "collection",
                    "  new.add(ids=old['ids'], documents=old['documents'], "
                    "metadatas=old['metadatas'])",
                    "reembed: this command wrote nothing to the store",
                ]
            ),
        ),
        (
            QMD,
            snapshot(
                [
                    "reembed: error: TMP/m.db is a database of qmd: it keeps only the "
                    "places of the chunks that were embedded, not their texts; qmd cuts "
                    "and embeds them again itself",
                    "  qmd embed -f",
                    "reembed: this command wrote nothing to the store",
                ]
            ),
        ),
        (
            TXTAI,
            snapshot(
                [
                    "reembed: error: TMP/m.db is a database of txtai: its vectors are in "
                    "an index file beside it; txtai embeds the texts again itself",
                    "  embeddings.reindex(path='MODEL')",
                    "reembed: this command wrote nothing to the store",
                ]
            ),
        ),
        (
            MNEMOSYNE,
            snapshot(
                [
                    "reembed: error: TMP/m.db is a database of mnemosyne: its vectors are "
                    "quantized and kept in several tables; mnemosyne embeds them again "
                    "itself, and makes a backup first",
                    "  mnemosyne reindex --model MODEL",
                    "reembed: this command wrote nothing to the store",
                ]
            ),
        ),
        (
            MORE_MNEMOSYNE,
            snapshot(
                [
                    "reembed: error: TMP/m.db is a database of mnemosyne: its vectors are "
                    "quantized and kept in several tables; mnemosyne embeds them again "
                    "itself, and makes a backup first",
                    "  mnemosyne reindex --model MODEL",
                    "reembed: this command wrote nothing to the store",
                ]
            ),
        ),
    ],
)
def test_a_file_that_another_program_moves_is_refused_with_its_command(
    statements: tuple[str, ...], said: list[str], reembed: Call, tmp_path: Path
) -> None:
    path = make(tmp_path / "m.db", {"body": SENTENCES, "v": BLOBS})
    with closing(connect(path)) as db, db:
        for statement in statements:
            db.execute(statement)
    before = files(tmp_path)

    flags = ("--table", "notes", "--text", "body", "--vector", "v")
    for more in ((), flags, ("--store", "table", *flags), ("--text", "body"), ("--namespace", "a")):
        ran = reembed("--db", path, *more)

        assert ran.code == 1
        assert wording(ran.err, tmp_path).splitlines() == said
        assert files(tmp_path) == before


@pytest.mark.parametrize("statements", [CHROMA, QMD, TXTAI, MNEMOSYNE])
def test_one_table_of_such_a_name_is_no_sign(
    statements: tuple[str, ...], reembed: Call, tmp_path: Path
) -> None:
    path = make(tmp_path / "m.db", {"body": SENTENCES, "v": BLOBS})
    with closing(connect(path)) as db, db:
        db.execute(statements[0])

    flags = ("--table", "notes", "--text", "body", "--vector", "v")
    assert reembed("--db", path, *flags, "--dry-run").code == 0


def test_a_file_with_an_index_of_libsql_is_refused_with_what_drops_and_creates_it(
    reembed: Call, tmp_path: Path
) -> None:
    path = make(tmp_path / "m.db", {"body": SENTENCES, "v": BLOBS})
    make(path, {"body": SENTENCES, "v": BLOBS}, "own")
    index = 'CREATE INDEX "by v" ON notes (libsql_vector_idx(v))'
    with closing(sqlite3.connect(path)) as db, db:
        db.create_function("libsql_vector_idx", 1, lambda _: None, deterministic=True)
        db.execute(index)
    flags = ("--text", "body", "--vector", "v", "--table")

    for more in ((), (*flags, "notes"), (*flags, "own")):
        ran = reembed("--db", path, *more)

        assert ran.code == 1
        assert wording(ran.err, tmp_path).splitlines() == snapshot(
            [
                "reembed: error: TMP/m.db is a database of libSQL: the table notes has the "
                "index by v by libsql_vector_idx, without which SQLite can neither write "
                "its vectors nor check the file; re-embed it with the program that made "
                "it, or, if the new vectors are as long as the old ones, drop the index "
                "before the run and create it again with libSQL after it",
                '  DROP INDEX "by v";',
                '  CREATE INDEX "by v" ON notes (libsql_vector_idx(v));',
                "reembed: this command wrote nothing to the store",
            ]
        )
    change(path, 'DROP INDEX "by v"')
    assert reembed("--db", path, *flags, "notes").code == 0
