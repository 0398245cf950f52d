"""Texts of a vec0 table that are in another one: by which key, and what joins the wrong rows."""

from __future__ import annotations

import shlex
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from inline_snapshot import snapshot

from reembed.transforms.embedders.fake import FakeEmbedder
from reembed.transforms.stores.formats import decode
from reembed.transforms.stores.vec0 import connect
from tests.conftest import Call, Ran, change, files, select
from tests.wording import line_with, wording

TEXTS = [f"The archivist has painted {at} lamps of the old bridge." for at in range(10)]
BODY = ("--text", "body", "--text-table", "chunks")


def make(
    path: Path, chunks: str, rows: Sequence[Sequence[object]], columns: str = "", *links: object
) -> Path:
    """A text table with rows, and a vec0 table of keys 1 to 10 whose rows have such links."""
    with closing(connect(path)) as db, db:
        db.execute(f"CREATE TABLE chunks {chunks}")
        places = ", ".join("?" * len(rows[0])) if rows else "NULL"
        db.executemany(f"INSERT INTO chunks VALUES ({places})", rows)
        db.execute(f"CREATE VIRTUAL TABLE v USING vec0(embedding float[4]{columns})")
        vectors = FakeEmbedder(4).embed([f"old {text}" for text in TEXTS])
        names = [part.split()[0].lstrip("+") for part in columns.split(", ")[1:]]
        values = ", ".join("?" * (2 + len(names)))
        for at, vector in enumerate(vectors):
            link = links[at : at + 1] if names else ()
            db.execute(
                f"INSERT INTO v ({', '.join(['rowid', 'embedding', *names])}) VALUES ({values})",
                (at + 1, vector.tobytes(), *link),
            )
    return path


def below(ran: Ran) -> list[str]:
    """The lines below the error."""
    return [line.strip() for line in ran.err.splitlines() if line.startswith("  ")]


def text_of_each(path: Path, flags: Sequence[str]) -> dict[int, str]:
    """The text whose vector each row has, by its key."""
    known = {tuple(FakeEmbedder(8).embed([text])[0].tolist()): text for text in TEXTS}
    with closing(connect(path)) as db:
        rows = db.execute("SELECT rowid, embedding FROM v").fetchall()
    return {rowid: known[tuple(decode("f32le", raw).tolist())] for rowid, raw in rows}


KEYS = [f"c{at:03}" for at in range(10)]
IN_ORDER = {at + 1: text for at, text in enumerate(TEXTS)}
REVERSED = {at + 1: text for at, text in enumerate(reversed(TEXTS))}


def test_the_integer_primary_key_is_the_key_if_it_has_all_keys_and_pairs_are_shown(
    reembed: Call, tmp_path: Path
) -> None:
    more = ["Line\none \x1b[2J" + " and more" * 20, *TEXTS[1:], "of no vector"]
    path = make(
        tmp_path / "m.db",
        "(body TEXT, n INTEGER PRIMARY KEY)",
        [(text, at + 1) for at, text in enumerate(more)],
    )

    shown = reembed("--db", path, *BODY, "--dry-run")
    values = reembed("--db", path, *BODY, "--dry-run", "--json").values

    assert (shown.code, values["store"]["text_key"]) == (0, "n")
    first, second = values["sample_pairs"]
    assert first == ["1", more[0][:60]]
    assert (second[0] in "2345678910", second[1]) == (True, more[int(second[0]) - 1])
    escaped = more[0][:60].replace("\n", "\\n").replace("\x1b", "\\x1b")
    assert f"\nsample pair 1    1: {escaped}\n" in shown.out
    assert f"\nsample pair 2    {': '.join(second)}\n" in shown.out


def test_a_table_of_its_own_texts_has_no_pairs(reembed: Call, tmp_path: Path) -> None:
    path = make(tmp_path / "m.db", "(body)", [], ", +body TEXT", *TEXTS)

    ran = reembed("--db", path, "--text", "body", "--dry-run", "--json")

    assert (ran.code, ran.values["sample_pairs"]) == (0, [])


@pytest.mark.parametrize("flags", [(), ("--text-key", "rowid"), ("--text-key", "id")])
@pytest.mark.parametrize("columns", [", chunk TEXT", ", +chunk TEXT", ", chunk TEXT partition key"])
def test_rows_that_a_column_of_the_vec0_table_links_are_not_joined_by_their_numbers(
    flags: tuple[str, ...], columns: str, reembed: Call, tmp_path: Path
) -> None:
    rows = list(zip(KEYS, TEXTS, strict=True))
    path = make(tmp_path / "m.db", "(id TEXT PRIMARY KEY, body)", rows, columns, *reversed(KEYS))
    before = files(tmp_path)

    refused = reembed("--db", path, *BODY, *flags)

    assert refused.code == 2
    assert (
        wording(refused.error, tmp_path)
        == snapshot(
            {
                "": (
                    "--text-key must say which column of chunks holds the keys of the "
                    "vec0 table v: it has no INTEGER PRIMARY KEY; its column chunk names "
                    "rows of chunks by their id, but reembed joins by the vec0 table's "
                    "own key alone: make a view that has this key beside the texts, and "
                    "give the flags below"
                ),
                "--text-key rowid": (
                    "--text-key rowid joins 10 of 10 sampled vectors to other rows of "
                    "chunks than the vec0 table v does; its column chunk names rows of "
                    "chunks by their id, but reembed joins by the vec0 table's own key "
                    "alone: make a view that has this key beside the texts, and give the "
                    "flags below"
                ),
                "--text-key id": (
                    "0 of the 10 keys of the vec0 table v are in the column id of "
                    "chunks, so its texts are not those of the vectors; its column chunk "
                    "names rows of chunks by their id, but reembed joins by the vec0 "
                    "table's own key alone: make a view that has this key beside the "
                    "texts, and give the flags below"
                ),
            }
        )[" ".join(flags)]
    )
    assert files(tmp_path) == before
    view, command = below(refused)
    change(path, view)
    assert reembed("--db", path, *shlex.split(command)).code == 0
    assert text_of_each(path, flags) == REVERSED
    assert reembed("verify", "--db", path).code == 0
    assert reembed("rollback", "--db", path).code == 0


@pytest.mark.parametrize("flags", [(), ("--text-key", "id")])
def test_nor_are_those_that_a_number_links(
    flags: tuple[str, ...], reembed: Call, tmp_path: Path
) -> None:
    rows = [(at + 1, text) for at, text in enumerate(TEXTS)]
    swapped = [1, 2, 3, 4, 5, 6, 7, 8, 10, 9]
    schema = "(id INTEGER PRIMARY KEY, body)"
    path = make(tmp_path / "m.db", schema, rows, ", chunk_id INTEGER", *swapped)
    same = make(tmp_path / "n.db", schema, rows, ", chunk_id INTEGER", *range(1, 11))
    year = make(tmp_path / "o.db", schema, rows, ", year INTEGER", *swapped)

    refused = reembed("--db", path, *BODY, *flags)

    assert refused.code == 2
    assert (
        wording(refused.error, tmp_path)
        == snapshot(
            {
                "": (
                    "--text-key must say which column of chunks holds the keys of the vec0 "
                    "table v: its column chunk_id names other rows of chunks than the "
                    "INTEGER PRIMARY KEY id does; its column chunk_id names rows of chunks "
                    "by their id, but reembed joins by the vec0 table's own key alone: make "
                    "a view that has this key beside the texts, and give the flags below"
                ),
                "--text-key id": (
                    "--text-key id joins 2 of 10 sampled vectors to other rows of chunks "
                    "than the vec0 table v does; its column chunk_id names rows of chunks by "
                    "their id, but reembed joins by the vec0 table's own key alone: make a "
                    "view that has this key beside the texts, and give the flags below"
                ),
            }
        )[" ".join(flags)]
    )
    for other in (same, year):
        assert reembed("--db", other, *BODY, *flags).code == 0
        assert text_of_each(other, flags) == IN_ORDER


@pytest.mark.parametrize(
    ("column", "links", "noted"),
    [
        (", parent TEXT", [KEYS[at // 3] for at in range(10)], True),
        (", chunk_id INTEGER", [1 + at // 3 for at in range(10)], True),
        (", user_id INTEGER partition key", [1 + at // 3 for at in range(10)], False),
        (", language TEXT", ["en", "de"] * 5, False),
    ],
)
def test_what_may_be_a_rows_parent_needs_the_key_to_be_given_and_is_noted(
    column: str, links: list[object], noted: bool, reembed: Call, tmp_path: Path
) -> None:
    rows = [(at + 1, KEYS[at], text) for at, text in enumerate(TEXTS)]
    schema = "(n INTEGER PRIMARY KEY, id TEXT UNIQUE, body)"
    path = make(tmp_path / "m.db", schema, rows, column, *links)

    ran = reembed("--db", path, *BODY, "--dry-run")
    given = reembed("--db", path, *BODY, "--text-key", "n")

    assert ran.code == (2 if noted else 0)
    assert below(ran) == ["--table v --text body --text-table chunks --text-key n"] * noted
    assert given.code == 0
    name = column.split()[1]
    notes = [line for line in given.err.splitlines() if "the column" in line]
    assert notes == (
        [
            snapshot(
                {
                    "parent": (
                        "reembed: NOTE — the column parent of the vec0 table v names other "
                        "rows of chunks than --text-key n for 9 of 10 sampled vectors; "
                        "compare the sample pairs of --dry-run"
                    ),
                    "chunk_id": (
                        "reembed: NOTE — the column chunk_id of the vec0 table v names other "
                        "rows of chunks than --text-key n for 9 of 10 sampled vectors; "
                        "compare the sample pairs of --dry-run"
                    ),
                }
            )[name]
        ]
        if noted
        else []
    )
    assert text_of_each(path, ()) == IN_ORDER


def test_of_two_keys_the_one_that_the_link_agrees_with_is_proposed(
    reembed: Call, tmp_path: Path
) -> None:
    rows = [(KEYS[at], 10 - at, at + 1, text) for at, text in enumerate(TEXTS)]
    schema = "(id TEXT PRIMARY KEY, n INTEGER UNIQUE, place INTEGER UNIQUE, body TEXT)"
    path = make(tmp_path / "m.db", schema, rows, ", chunk TEXT", *reversed(KEYS))

    refused = reembed("--db", path, *BODY)

    assert refused.code == 2
    assert wording(refused.error, tmp_path) == snapshot(
        "--text-key must say which column of chunks holds the keys of the vec0 table v: "
        "it has no INTEGER PRIMARY KEY; give the flags on a line below"
    )
    [command] = below(refused)
    assert command == "--table v --text body --text-table chunks --text-key n"
    assert reembed("--db", path, *shlex.split(command)).code == 0
    assert text_of_each(path, ()) == REVERSED


@pytest.mark.parametrize(
    ("schema", "keys", "proposed", "says"),
    [
        (
            "(n INTEGER UNIQUE, body)",
            range(1, 11),
            "n",
            snapshot(
                "--text-key must say which column of chunks holds the keys of the vec0 "
                "table v: it has no INTEGER PRIMARY KEY; give the flags on a line below"
            ),
        ),
        (
            "(n TEXT UNIQUE, body)",
            map(str, range(1, 11)),
            "n",
            snapshot(
                "--text-key must say which column of chunks holds the keys of the vec0 "
                "table v: it has no INTEGER PRIMARY KEY; give the flags on a line below"
            ),
        ),
        (
            "(n INTEGER, body)",
            range(1, 11),
            "n",
            snapshot(
                "--text-key must say which column of chunks holds the keys of the vec0 "
                "table v: it has no INTEGER PRIMARY KEY; give the flags on a line below"
            ),
        ),
        (
            "(n INTEGER, body)",
            [None, *range(2, 11)],
            "n",
            snapshot(
                "--text-key must say which column of chunks holds the keys of the vec0 "
                "table v: it has no INTEGER PRIMARY KEY; give the flags on a line below"
            ),
        ),
        (
            "(n INTEGER, body)",
            [0, 0, *range(3, 11)],
            "n",
            snapshot(
                "--text-key must say which column of chunks holds the keys of the vec0 "
                "table v: it has no INTEGER PRIMARY KEY; give the flags on a line below"
            ),
        ),
        (
            "(n INTEGER, body)",
            [1, *range(1, 10)],
            None,
            snapshot(
                "--text-key must say which column of chunks holds the keys of the vec0 "
                "table v: it has no INTEGER PRIMARY KEY; none of its columns has them, "
                "so correct --text-table, or name the rows' own number by --text-key "
                "rowid if you know that it is the vec0 table's key"
            ),
        ),
        (
            "(n TEXT UNIQUE, body)",
            [f"{at:03}" for at in range(1, 11)],
            None,
            snapshot(
                "--text-key must say which column of chunks holds the keys of the vec0 "
                "table v: it has no INTEGER PRIMARY KEY; none of its columns has them, "
                "so correct --text-table, or name the rows' own number by --text-key "
                "rowid if you know that it is the vec0 table's key"
            ),
        ),
        (
            "(n TEXT UNIQUE, body)",
            [f"{at}.0" for at in range(1, 11)],
            None,
            snapshot(
                "--text-key must say which column of chunks holds the keys of the vec0 "
                "table v: it has no INTEGER PRIMARY KEY; none of its columns has them, "
                "so correct --text-table, or name the rows' own number by --text-key "
                "rowid if you know that it is the vec0 table's key"
            ),
        ),
        (
            "(n TEXT UNIQUE, body)",
            KEYS,
            None,
            snapshot(
                "--text-key must say which column of chunks holds the keys of the vec0 "
                "table v: it has no INTEGER PRIMARY KEY; none of its columns has them, "
                "so correct --text-table, or name the rows' own number by --text-key "
                "rowid if you know that it is the vec0 table's key"
            ),
        ),
        (
            "(n INTEGER UNIQUE, body)",
            range(100, 110),
            None,
            snapshot(
                "--text-key must say which column of chunks holds the keys of the vec0 "
                "table v: it has no INTEGER PRIMARY KEY; none of its columns has them, "
                "so correct --text-table, or name the rows' own number by --text-key "
                "rowid if you know that it is the vec0 table's key"
            ),
        ),
        (
            "(n INTEGER PRIMARY KEY, body)",
            range(2, 12),
            "n",
            snapshot(
                "--text-key must say which column of chunks holds the keys of the vec0 "
                "table v: 9 of its 10 keys are in the INTEGER PRIMARY KEY n; give the "
                "flags on a line below"
            ),
        ),
        (
            "(n INTEGER PRIMARY KEY, body)",
            range(8, 18),
            None,
            snapshot(
                "--text-key must say which column of chunks holds the keys of the vec0 "
                "table v: 3 of its 10 keys are in the INTEGER PRIMARY KEY n; none of its "
                "columns has them, so correct --text-table, or name the rows' own number "
                "by --text-key rowid if you know that it is the vec0 table's key"
            ),
        ),
        (
            "(n INTEGER, body, PRIMARY KEY (n, body))",
            range(1, 11),
            "n",
            snapshot(
                "--text-key must say which column of chunks holds the keys of the vec0 "
                "table v: it has no INTEGER PRIMARY KEY; give the flags on a line below"
            ),
        ),
    ],
)
def test_without_a_key_the_columns_that_have_the_keys_are_proposed(
    schema: str,
    keys: Sequence[object],
    proposed: str | None,
    says: str,
    reembed: Call,
    tmp_path: Path,
) -> None:
    path = make(tmp_path / "m.db", schema, list(zip(keys, TEXTS, strict=True)))
    before = files(tmp_path)

    refused = reembed("--db", path, *BODY)

    assert refused.code == 2
    assert wording(refused.error, tmp_path) == says
    line = f"--table v --text body --text-table chunks --text-key {proposed}"
    assert below(refused) == ([] if proposed is None else [line])
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("schema", "keys", "says"),
    [
        (
            "(n TEXT, body)",
            [f"{at:03}" for at in range(1, 11)],
            snapshot(
                "0 of the 10 keys of the vec0 table v are in the column n of chunks, so "
                "its texts are not those of the vectors; none of its columns has them, "
                "so correct --text-table, or name the rows' own number by --text-key "
                "rowid if you know that it is the vec0 table's key"
            ),
        ),
        (
            "(n TEXT, body)",
            ["1", "2", *(f"0{at}" for at in range(3, 11))],
            snapshot(
                "2 of the 10 keys of the vec0 table v are in the column n of chunks, so "
                "its texts are not those of the vectors; none of its columns has them, "
                "so correct --text-table, or name the rows' own number by --text-key "
                "rowid if you know that it is the vec0 table's key"
            ),
        ),
        (
            "(n INTEGER, body)",
            [*range(1, 5), *[None] * 6],
            snapshot(
                "4 of the 10 keys of the vec0 table v are in the column n of chunks, so "
                "its texts are not those of the vectors; none of its columns has them, "
                "so correct --text-table, or name the rows' own number by --text-key "
                "rowid if you know that it is the vec0 table's key"
            ),
        ),
        (
            "(n REAL, body)",
            [at + 0.5 for at in range(10)],
            snapshot(
                "0 of the 10 keys of the vec0 table v are in the column n of chunks, so "
                "its texts are not those of the vectors; none of its columns has them, "
                "so correct --text-table, or name the rows' own number by --text-key "
                "rowid if you know that it is the vec0 table's key"
            ),
        ),
    ],
)
def test_a_key_that_hardly_joins_is_refused_with_the_counts(
    schema: str, keys: Sequence[object], says: str, reembed: Call, tmp_path: Path
) -> None:
    path = make(tmp_path / "m.db", schema, list(zip(keys, TEXTS, strict=True)))
    before = files(tmp_path)

    refused = reembed("--db", path, *BODY, "--text-key", "n")

    assert refused.code == 2
    assert wording(refused.error, tmp_path) == says
    assert files(tmp_path) == before


def test_a_few_keys_without_a_text_are_noted(reembed: Call, tmp_path: Path) -> None:
    rows = [(str(at + 1), text) for at, text in enumerate(TEXTS[:-1])]
    path = make(tmp_path / "m.db", "(n TEXT, body)", [*rows, ("0010", "a"), (None, "b")])

    ran = reembed("--db", path, *BODY, "--text-key", "n", "--dim", "4", "--dry-run", "--json")

    assert (ran.code, ran.values["rows_skipped_by_rule"]) == (0, {"not valid text": 1})
    [note] = ran.values["warnings"]
    assert note == snapshot(
        "1 of the 10 keys of the vec0 table v are not in the column n of chunks; these "
        "rows have no text"
    )
    assert f"reembed: NOTE — {note}" in ran.err.splitlines()


def test_the_rowid_is_a_key_if_it_is_named(reembed: Call, tmp_path: Path) -> None:
    path = make(tmp_path / "m.db", "(id TEXT UNIQUE, body)", list(zip(KEYS, TEXTS, strict=True)))

    ran = reembed("--db", path, *BODY, "--text-key", "rowid")

    assert ran.code == 0
    assert line_with("rowids", ran.err) == snapshot(
        "reembed: NOTE — the rowids of chunks, by which texts and vectors are joined, "
        "are not kept by VACUUM if no INTEGER PRIMARY KEY has them; compare the sample "
        "pairs of --dry-run"
    )
    assert text_of_each(path, ()) == IN_ORDER


def test_a_search_index_has_texts_by_its_rowid(reembed: Call, tmp_path: Path) -> None:
    path = make(tmp_path / "m.db", "(body)", [])
    with closing(connect(path)) as db, db:
        db.execute("CREATE VIRTUAL TABLE found USING fts5(body)")
        db.executemany("INSERT INTO found (rowid, body) VALUES (?, ?)", IN_ORDER.items())

    refused = reembed("--db", path, "--text", "body", "--text-table", "found")

    [command] = below(refused)
    assert command == "--table v --text body --text-table found --text-key rowid"
    assert reembed("--db", path, *shlex.split(command)).code == 0
    assert text_of_each(path, ()) == IN_ORDER


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ("--text", "body", "--text-key", "id"),
            snapshot(
                "--text-key is a column of the table that --text-table names; give both, "
                "or neither if the texts are in the vec0 table v itself"
            ),
        ),
        (
            ("--text", "body", "--text-table", "V"),
            snapshot(
                "--text-table V is the vec0 table itself; leave it out, and its own "
                "columns are read"
            ),
        ),
        (
            (*BODY, "--text-key", "nope"),
            snapshot("the table chunks has no column nope (it has id, body); correct --text-key"),
        ),
        (
            ("--text", "body", "--text-table", "bare", "--text-key", "rowid"),
            snapshot("the table bare has no column rowid (it has id, body); correct --text-key"),
        ),
        (
            ("--text", "body", "--text-table", "shown", "--text-key", "rowid"),
            snapshot("the table shown has no column rowid (it has id, body); correct --text-key"),
        ),
        (
            ("--text", "distance"),
            snapshot(
                "the table v has no column distance (it has rowid, embedding); correct --text"
            ),
        ),
    ],
)
def test_what_can_not_be_a_key_or_a_text_is_refused(
    flags: tuple[str, ...], says: str, reembed: Call, tmp_path: Path
) -> None:
    rows = [(at + 1, text) for at, text in enumerate(TEXTS)]
    path = make(tmp_path / "m.db", "(id INTEGER PRIMARY KEY, body)", rows)
    change(
        path,
        "CREATE TABLE bare (id INTEGER PRIMARY KEY, body) WITHOUT ROWID",
        "CREATE VIEW shown AS SELECT * FROM chunks",
    )
    before = files(tmp_path)

    ran = reembed("--db", path, *flags)

    assert ran.code in (1, 2)
    assert wording(ran.error, tmp_path) == says
    assert files(tmp_path) == before


def test_the_names_of_columns_are_the_same_in_any_case(reembed: Call, tmp_path: Path) -> None:
    rows = [(at + 1, text) for at, text in enumerate(TEXTS)]
    path = make(tmp_path / "m.db", "(id INTEGER PRIMARY KEY, body)", rows)

    flags = ("--text", "BODY", "--text-table", "Chunks", "--text-key", "ID")
    assert reembed("--db", path, *flags).code == 0
    assert text_of_each(path, ()) == IN_ORDER


def test_without_text_the_columns_that_could_be_it_are_listed(
    reembed: Call, tmp_path: Path
) -> None:
    path = make(
        tmp_path / "m.db",
        "(id INTEGER PRIMARY KEY, url TEXT, body TEXT)",
        [(at + 1, f"https://example.org/{at}", text) for at, text in enumerate(TEXTS)],
        ", +summary TEXT",
        *(f"Of lamps and of number {at}" for at in range(10)),
    )
    vectors = [np.full(4, at + 0.5, "<f4").tobytes() for at in range(10)]
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("CREATE TABLE people (id INTEGER PRIMARY KEY, name TEXT, photo TEXT)")
        db.execute("CREATE TABLE others (id INTEGER PRIMARY KEY, body TEXT)")
        db.execute("CREATE TABLE notes (body TEXT, vector BLOB)")
        db.executemany("INSERT INTO notes VALUES ('A note of ' || ?, ?)", enumerate(vectors))
        db.execute("INSERT INTO people VALUES (1, 'a', 'b')")
        db.execute("INSERT INTO others SELECT id + 100, body FROM chunks")
    before = files(tmp_path)

    ran = reembed("--db", path)

    assert ran.code == 2
    assert wording(ran.error, tmp_path) == snapshot(
        "the texts of the vec0 table v are found by --text, which names auxiliary "
        "columns of it, or with --text-table those of another table; give the flags on a "
        "line below"
    )
    assert below(ran) == [
        "--table v --text body --text-table chunks --text-key id",
        f'"{TEXTS[0]}"',
        "--table v --text summary",
        '"Of lamps and of number 0"',
        "--table notes --text body --vector vector",
        '"A note of 0"',
    ]
    assert files(tmp_path) == before
    change(path, "DROP TABLE notes")
    for command in below(ran)[:3:2]:
        assert reembed("--db", path, *shlex.split(command), "--dry-run").code == 0


def test_of_several_vec0_tables_the_texts_of_each_are_listed(reembed: Call, tmp_path: Path) -> None:
    path = make(tmp_path / "m.db", "(body)", [], ", +body TEXT", *TEXTS)
    with closing(connect(path)) as db, db:
        db.execute("CREATE VIRTUAL TABLE w USING vec0(a float[4], b float[4], c int8[4], +t TEXT)")
        db.execute("CREATE VIRTUAL TABLE x USING vec0(id TEXT PRIMARY KEY, a float[4], +t TEXT)")
        for rowid, text in IN_ORDER.items():
            insert = "INSERT INTO w (rowid, a, b, c, t) VALUES (?, zeroblob(16), zeroblob(16), "
            db.execute(f"{insert} vec_int8(zeroblob(4)), ?)", (rowid, text))

    ran = reembed("--db", path)

    assert wording(ran.error, tmp_path) == snapshot(
        "TMP/m.db has the vec0 tables v, w, x; choose one of them with --table"
    )
    assert below(ran)[::2] == [
        "--table v --text body",
        "--table w --vector a --text t",
        "--table w --vector b --text t",
    ]


def test_a_run_is_rolled_back_whatever_has_become_of_the_texts(
    reembed: Call, tmp_path: Path
) -> None:
    rows = [(at + 1, text) for at, text in enumerate(TEXTS)]
    path = make(tmp_path / "m.db", "(id INTEGER PRIMARY KEY, body)", rows)
    assert reembed("--db", path, *BODY).code == 0
    change(path, "UPDATE chunks SET id = id + 100 WHERE id < 7")

    for command in ("status", "verify", "rollback"):
        assert reembed(command, "--db", path).code in (0, 1)
    assert "keys of the vec0 table" not in reembed("rollback", "--db", path).err
    assert select(path, "SELECT count(*) FROM chunks") == [(10,)]
