"""Whether a vec0 table is as its settings say, and whether its texts are those of its vectors."""

from __future__ import annotations

import re
import shlex
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reembed.transforms.errors import StoreError, UsageError
from reembed.transforms.stores import sqlite
from reembed.transforms.stores.candidates import (
    Candidate,
    listed,
    ordinary_tables,
    table_candidates,
    text_columns,
    unique_columns,
)
from reembed.transforms.stores.columns import read_columns, spread_rowids
from reembed.transforms.stores.sqlite import folded, quoted
from reembed.transforms.stores.table import TableConfig
from reembed.transforms.stores.vec import VECTOR, VecStore, definitions, vec_tables
from reembed.transforms.stores.vec0 import connect

_KEY = re.compile(r"^\s*(\w+)\s+(\w+)\s+primary\s+key\s*$", re.I)

_ROWID_NAMES = ("rowid", "oid", "_rowid_")
_COLUMNS = "SELECT name, type, pk FROM pragma_table_xinfo(?) WHERE hidden <> 1"
_KIND = "SELECT type, wr FROM pragma_table_list WHERE schema = 'main' AND name = ? COLLATE NOCASE"
_IS_LINK = re.compile(r"(?:(.*)[_ ])?(?:id|key|rowid|ref)|(.*)(?:Id|Key)")
_MIN_LINKED = 3
"""Of fewer rows it can't be said that a column names rows of another table."""


@dataclass(frozen=True)
class _Definition:
    """The parsed SQL of a vec0 table: its key, as SQL names it, and its vectors by name."""

    table: str
    sql: str
    primary: str
    vectors: Mapping[str, tuple[str, int]]

    @property
    def rows(self) -> str:
        """The table that has the numbers of its rows, as SQL names it."""
        return quoted(f"{self.table}_rowids")


def open_vec(path: Path, config: Mapping[str, Any], *, wal: bool) -> VecStore:
    """Look at a vec0 table and describe it.

    Raises StoreError if it can't be moved, UsageError if it isn't said where its texts are.
    """
    tables = sqlite.read_only(path, wal=wal, query=vec_tables)
    table = str(config.get("table") or next(iter(tables), None))
    if table not in tables or (len(tables) > 1 and "table" not in config):
        raise UsageError(
            f"{path} has the vec0 tables {', '.join(tables)}; choose one of them with --table"
            if tables
            else f"{path} has no vec0 table; name the right file with --db",
            *_hint(path, list(tables), wal=wal),
        )
    definition = _parsed(table, tables[table])
    vectors = definition.vectors
    vector = str(config.get("vector") or (next(iter(vectors)) if len(vectors) == 1 else None))
    if vector not in vectors:
        raise UsageError(
            f"the vec0 table {table} has the vectors {', '.join(vectors) or 'none'}; choose one "
            "with --vector"
        )
    kind, dimension = vectors[vector]
    if kind not in ("float", "f32"):
        raise StoreError(
            f"the vectors in column {vector} of the vec0 table {table} are {kind}[{dimension}]; "
            "only float ones can be re-embedded"
        )
    if not config.get("text"):
        found = _hint(path, [table], wal=wal)
        advice = "give the flags on a line below" if found else "give --text"
        raise UsageError(
            f"the texts of the vec0 table {table} are found by --text, which names auxiliary "
            f"columns of it, or with --text-table those of another table; {advice}",
            *found,
        )
    text_table, text_key = config.get("text_table"), config.get("text_key")
    if text_key is not None and text_table is None:
        raise UsageError(
            "--text-key is a column of the table that --text-table names; give both, or neither if "
            f"the texts are in the vec0 table {table} itself"
        )
    if text_table is not None and folded(text_table) == folded(table):
        raise UsageError(
            f"--text-table {text_table} is the vec0 table itself; leave it out, and its own "
            "columns are read"
        )
    store = VecStore(
        path,
        None,
        wal,
        settings=TableConfig(table, tuple(config["text"]), vector),
        sql=definition.sql,
        primary=definition.primary,
        dimension=dimension,
        text_table=text_table,
        text_key=text_key or "",
    )
    return store.read_only(lambda db: _checked(db, store, definition))


def check_joined(store: VecStore) -> VecStore:
    """Return the store with notes on how its texts and vectors are joined.

    Raises UsageError if they hardly are, or a column of the vec0 table joins them otherwise.
    """
    if store.text_table is None:
        return store
    definition = _parsed(store.settings.table, store.sql)
    return store.read_only(lambda db: _check_joined(db, store, definition))


def vec_candidates(db: sqlite3.Connection, tables: Sequence[str]) -> list[Candidate]:
    """The columns that could be the texts of vec0 tables: their own, or those of joined tables."""
    found: list[Candidate] = []
    for table in tables:
        try:
            definition = _parsed(table, vec_tables(db)[table])
        except StoreError:
            continue
        for vector, (kind, _) in definition.vectors.items():
            flags = ["--table", table]
            flags += ["--vector", vector] if len(definition.vectors) > 1 else []
            if kind in ("float", "f32"):
                found += _of_vec(db, definition, flags)
    return found


def _hint(path: Path, tables: Sequence[str], *, wal: bool) -> list[str]:
    def query(db: sqlite3.Connection) -> list[str]:
        return listed([*vec_candidates(db, tables), *table_candidates(db)])

    plain = sqlite3.connect
    return sqlite.read_only(path, wal=wal, query=query, connect=connect if tables else plain)


def _parsed(table: str, sql: str) -> _Definition:
    """Read a vec0 table's SQL; raise StoreError if its key is no whole number."""
    vectors, primary = {}, "rowid"
    for definition in definitions(sql):
        if found := VECTOR.match(definition):
            vectors[found[1]] = (found[2].lower(), int(found[3]))
        elif key := _KEY.match(definition):
            primary = quoted(key[1])
            if key[2].lower() not in ("integer", "int"):
                raise StoreError(
                    f"the key {key[1]} of the vec0 table {table} is a {key[2]}; only whole numbers "
                    "as keys are supported"
                )
    return _Definition(table, sql, primary, vectors)


def _checked(db: sqlite3.Connection, store: VecStore, definition: _Definition) -> VecStore:
    texts = store.text_table or store.settings.table
    columns = [name for name, *_ in db.execute(_COLUMNS, [texts])]
    if not columns:
        raise StoreError(f"{store.path} has no table {texts}; correct --text-table")
    known = {folded(name) for name in columns}
    wanted = [("--text", name) for name in store.settings.text_columns]
    if store.text_table is not None and store.text_key and not _is_rowid(db, texts, store.text_key):
        wanted.append(("--text-key", store.text_key))
    for flag, name in wanted:
        if folded(name) not in known:
            raise StoreError(
                f"the table {texts} has no column {name} (it has {', '.join(columns)}); correct "
                f"{flag}"
            )
    if store.text_table is None:
        return store
    if not store.text_key:
        store = _with_default_key(db, store, definition)
    twice = (
        f"SELECT place.rowid FROM {definition.rows} AS place JOIN {quoted(texts)} AS texts "
        f"ON {store.joins} GROUP BY 1 HAVING count(*) > 1 LIMIT 1"
    )
    if found := db.execute(twice).fetchone():
        raise StoreError(
            f"two rows of {texts} have the {store.text_key} {found[0]}, so it is not known "
            "which has a vector's text; correct --text-key"
        )
    return store


def _with_default_key(db: sqlite3.Connection, store: VecStore, definition: _Definition) -> VecStore:
    """Take the text table's INTEGER PRIMARY KEY for the vec0 table's, if all of its keys are there.

    Raises UsageError if they aren't: rows that only happen to have one number must not be joined.
    """
    texts = str(store.text_table)
    info = db.execute(_COLUMNS, [texts]).fetchall()
    primary = [(name, type.upper()) for name, type, pk in info if pk]
    if len(primary) == 1 and primary[0][1] == "INTEGER":
        store = replace(store, text_key=primary[0][0])
        rows, found = _joined(db, store, definition)
        links = _links(db, texts, definition)
        wrong = [link for link in links if link.wrong(db, texts, store.text_key)]
        if rows == found and not wrong:
            return store
        why = (
            f"its column {wrong[0].column} names other rows of {texts} than the INTEGER PRIMARY "
            f"KEY {store.text_key} does"
            if wrong
            else f"{found:,} of its {rows:,} keys are in the INTEGER PRIMARY KEY {store.text_key}"
        )
    else:
        why = "it has no INTEGER PRIMARY KEY"
    raise _not_joined(
        db,
        store,
        definition,
        f"--text-key must say which column of {texts} holds the keys of the vec0 table "
        f"{definition.table}: {why}",
    )


def _check_joined(db: sqlite3.Connection, store: VecStore, definition: _Definition) -> VecStore:
    texts, key = str(store.text_table), store.text_key
    rows, found = _joined(db, store, definition)
    if rows and found * 2 < rows:
        raise _not_joined(
            db,
            store,
            definition,
            f"{found:,} of the {rows:,} keys of the vec0 table {definition.table} are in the "
            f"column {key} of {texts}, so its texts are not those of the vectors",
        )
    notes = []
    if found < rows:
        notes.append(
            f"{rows - found:,} of the {rows:,} keys of the vec0 table {definition.table} are not "
            f"in the column {key} of {texts}; these rows have no text"
        )
    for link in _links(db, texts, definition):
        wrong = link.wrong(db, texts, key)
        if wrong and not link.sure:
            notes.append(
                f"the column {link.column} of the vec0 table {definition.table} names other rows "
                f"of {texts} than --text-key {key} for {wrong} of {len(link.values)} sampled "
                "vectors; compare the sample pairs of --dry-run"
            )
        elif wrong:
            raise _not_joined(
                db,
                store,
                definition,
                f"--text-key {key} joins {wrong} of {len(link.values)} sampled vectors to other "
                f"rows of {texts} than the vec0 table {definition.table} does",
            )
    if _is_rowid(db, texts, key):
        notes.append(
            f"the rowids of {texts}, by which texts and vectors are joined, are not kept by VACUUM "
            "if no INTEGER PRIMARY KEY has them; compare the sample pairs of --dry-run"
        )
    return replace(store, join_notes=tuple(notes))


def _not_joined(
    db: sqlite3.Connection, store: VecStore, definition: _Definition, why: str
) -> UsageError:
    """The error, with the keys that would join, and what else does."""
    texts, table = str(store.text_table), definition.table
    links = sorted(_links(db, texts, definition), key=lambda link: not link.sure)
    keys = [
        name
        for name in _matching_keys(db, texts, _sampled(db, definition))
        if not any(link.sure and link.wrong(db, texts, name) for link in links)
    ]
    flags = ["--table", table]
    flags += ["--vector", store.settings.vector] if len(definition.vectors) > 1 else []
    flags += [flag for text in store.settings.text for flag in ("--text", text)]
    lines = [shlex.join([*flags, "--text-table", texts, "--text-key", key]) for key in keys]
    if lines:
        return UsageError(f"{why}; give the flags on a line below", *lines)
    if links:
        link = links[0]
        view = quoted(f"{table}_texts")
        return UsageError(
            f"{why}; its column {link.column} names rows of {texts} by their {link.target}, but "
            "reembed joins by the vec0 table's own key alone: make a view that has this key beside "
            "the texts, and give the flags below",
            f"CREATE VIEW {view} AS SELECT vec.{definition.primary} AS vec_key, texts.* "
            f"FROM {quoted(table)} AS vec JOIN {quoted(texts)} AS texts "
            f"ON texts.{quoted(link.target)} = vec.{quoted(link.column)};",
            shlex.join([*flags, "--text-table", f"{table}_texts", "--text-key", "vec_key"]),
        )
    return UsageError(
        f"{why}; none of its columns has them, so correct --text-table, or name the rows' own "
        "number by --text-key rowid if you know that it is the vec0 table's key"
    )


@dataclass(frozen=True)
class _Link:
    """A column of a vec0 table that names rows of a text table by a unique column of it.

    `values` are what it holds in sampled rows, by their numbers. It is `sure` if each names a row
    of its own: else it may be the row's parent, or its group.
    """

    column: str
    target: str
    values: Mapping[int, Any]
    sure: bool

    def wrong(self, db: sqlite3.Connection, texts: str, key: str) -> int:
        """Count the sampled rows that a key of the text table joins to other rows of it."""
        select = f"SELECT {quoted(self.target)} FROM {quoted(texts)} WHERE {quoted(key)} = ?"
        found = ((value, db.execute(select, [n]).fetchone()) for n, value in self.values.items())
        return sum(row is not None and str(row[0]) != str(value) for value, row in found)


def _links(db: sqlite3.Connection, texts: str, definition: _Definition) -> list[_Link]:
    """The columns of a vec0 table that seem to name rows of a text table."""
    targets = unique_columns(db, texts)
    names = _own_columns(db, definition)
    if not targets or not names:
        return []
    select = ", ".join(map(quoted, names))
    select = f"SELECT {select} FROM {quoted(definition.table)} WHERE {definition.primary} = ?"
    rows = {n: db.execute(select, [n]).fetchone() for n in _sampled(db, definition)}
    links = []
    for at, name in enumerate(names):
        values = {n: row[at] for n, row in rows.items() if row and row[at] not in (None, "")}
        kinds = {type(value) for value in values.values()}
        sure = len(set(values.values())) == len(values)
        # Small numbers are found in any table: its name must say so, or even of which it is one.
        named = kinds == {int} and (stem := _link_stem(name)) is not None
        named = named and (sure or folded(texts).startswith(stem or "?"))
        if len(values) < _MIN_LINKED or not (named or kinds == {str}):
            continue
        for target in targets:
            known = set(_found(db, texts, target, list(values.values())))
            there = {n: value for n, value in values.items() if value in known}
            if len(there) * 2 > len(values):
                links.append(_Link(name, target, there, sure))
    return links


def _link_stem(name: str) -> str | None:
    """The thing that a key column is named after; None for a column that is no key.

    >>> _link_stem("chunk_id"), _link_stem("docId"), _link_stem("id"), _link_stem("year")
    ('chunk', 'doc', '', None)
    """
    found = _IS_LINK.fullmatch(name)
    return None if found is None else folded(found[1] or found[2] or "")


def _of_vec(
    db: sqlite3.Connection, definition: _Definition, flags: Sequence[str]
) -> Iterator[Candidate]:
    table, rowids = definition.table, _sampled(db, definition)
    names = _own_columns(db, definition)
    columns = read_columns(db, quoted(table), names, rowids, definition.primary)
    for text in text_columns(db, table, columns):
        yield Candidate([*flags, "--text", text.name], text)
    for texts in ordinary_tables(db):
        keys = [
            name
            for name in unique_columns(db, texts)
            if rowids and len(_found(db, texts, name, rowids)) * 2 > len(rowids)
        ]
        links = _links(db, texts, definition) if keys else []
        for key in keys:
            if any(link.sure and link.wrong(db, texts, key) for link in links):
                continue
            names = [name for name, *_ in db.execute(_COLUMNS, [texts]).fetchall()]
            columns = read_columns(db, quoted(texts), names, rowids, quoted(key))
            for text in text_columns(db, texts, columns):
                more = ["--text", text.name, "--text-table", texts, "--text-key", key]
                yield Candidate([*flags, *more], text)


def _own_columns(db: sqlite3.Connection, definition: _Definition) -> list[str]:
    """A vec0 table's columns but its key and its vectors."""
    names = [name for name, *_ in db.execute(_COLUMNS, [definition.table])]
    return [
        name
        for name in names
        if name not in definition.vectors and quoted(name) != definition.primary and name != "rowid"
    ]


def _sampled(db: sqlite3.Connection, definition: _Definition) -> list[int]:
    return spread_rowids(db, definition.rows)


def _joined(db: sqlite3.Connection, store: VecStore, definition: _Definition) -> tuple[int, int]:
    """The rows of a vec0 table, and those of them that have a row of the text table."""
    key = quoted(store.text_key)
    counted: tuple[int, int] = db.execute(
        f"SELECT count(*), count(texts.{key}) FROM {definition.rows} AS place "
        f"LEFT JOIN {quoted(str(store.text_table))} AS texts "
        f"ON {store.joins}"
    ).fetchone()
    return counted


def _matching_keys(db: sqlite3.Connection, texts: str, rowids: Sequence[int]) -> list[str]:
    """The columns that hold most of a vec0 table's keys, once each; declared unique ones first."""
    unique = unique_columns(db, texts)
    if db.execute(_KIND, [texts]).fetchone()[0] == "virtual":
        unique = ["rowid"]  # As in a search index, whose rowid is the one key that it can have.
    others = [name for name, *_ in db.execute(_COLUMNS, [texts]) if name not in unique]
    for names in (unique, others):
        found = {name: _found(db, texts, name, rowids) for name in names}
        fitting = [
            name
            for name, values in found.items()
            if len(values) * 2 > len(rowids) and len(set(values)) == len(values)
        ]
        if fitting:
            return fitting
    return []


def _found(db: sqlite3.Connection, table: str, column: str, values: Sequence[Any]) -> list[Any]:
    """Those of some values that a column holds, as often as it does."""
    places = ", ".join("?" * len(values))
    select = f"SELECT {quoted(column)} FROM {quoted(table)} WHERE {quoted(column)} IN ({places})"
    return [value for (value,) in db.execute(select, values)]


def _is_rowid(db: sqlite3.Connection, table: str, name: str) -> bool:
    """Whether a name is that of a table's rowid, and of no column of it."""
    columns = {folded(column) for column, *_ in db.execute(_COLUMNS, [table])}
    kind, without_rowid = db.execute(_KIND, [table]).fetchone()
    has_one = kind in ("table", "virtual", "shadow") and not without_rowid
    return has_one and folded(name) in _ROWID_NAMES and folded(name) not in columns
