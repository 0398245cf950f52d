"""The flags that would select a table of a database, for a file that is no known store."""

from __future__ import annotations

import re
import shlex
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from reembed.transforms.stores.columns import Column, read_columns, spread_rowids
from reembed.transforms.stores.formats import NUMBERS, decode, fitting_formats
from reembed.transforms.stores.sqlite import folded, quoted
from reembed.transforms.stores.table import TableConfig
from reembed.transforms.stores.vec import vec_tables

MAX_LISTED = 10

_SAMPLED_VECTORS = 16
_MIN_DIMENSION = 2
_ROWID_NAMES = ("rowid", "_rowid_", "oid")
_TABLES = (
    "SELECT name FROM pragma_table_list WHERE schema = 'main' AND type = 'table' AND NOT wr "
    "AND name NOT LIKE 'sqlite!_%' ESCAPE '!' ORDER BY name"
)
_SHADOWS = "SELECT name FROM pragma_table_list WHERE schema = 'main' AND type = 'shadow'"
_OF_VEC0 = r"_(info|chunks|rowids|auxiliary|(vector_chunks|metadatachunks|metadatatext)\d\d)"
_COLUMNS = "SELECT name, hidden FROM pragma_table_xinfo(?) WHERE hidden <> 1"
_KEYS = (
    "SELECT name FROM pragma_table_xinfo(:table) WHERE pk > 0 "
    'UNION SELECT "from" FROM pragma_foreign_key_list(:table)'
)
_UNIQUE = (
    "SELECT name FROM pragma_index_info(:index) "
    "WHERE (SELECT count(*) FROM pragma_index_info(:index)) = 1 AND name NOT NULL"
)


@dataclass(frozen=True)
class Candidate:
    """Flags that select a column of texts and one of vectors, and how much is in the former."""

    flags: Sequence[str]
    text: Column


def listed(candidates: Iterable[Candidate]) -> list[str]:
    """The flags of each, the longest texts first, and below them the beginning of a text."""
    ordered = sorted(candidates, key=lambda one: -one.text.mean_length)
    lines = []
    for one in ordered[:MAX_LISTED]:
        lines += [shlex.join(one.flags), f'    "{one.text.example}"']
    left = len(ordered) - MAX_LISTED
    return [*lines, f"and {left} more"] if left > 0 else lines


def table_candidates(db: sqlite3.Connection, named: str | None = None) -> list[Candidate]:
    """The tables that have texts beside vectors; if the named one is there, only that."""
    tables = ordinary_tables(db)
    wanted = [table for table in tables if folded(table) == folded(named or "")] or tables
    return [one for table in wanted for one in _in_table(db, table)]


def ordinary_tables(db: sqlite3.Connection) -> list[str]:
    """The tables whose rows have rowids, without those in which virtual tables keep their data."""
    shadows = shadow_tables(db)
    return [name for (name,) in db.execute(_TABLES) if name not in shadows]


def shadow_tables(db: sqlite3.Connection) -> set[str]:
    """The tables in which virtual tables keep their data, those of vec0 without its module, too."""
    found = {name for (name,) in db.execute(_SHADOWS)}
    names = [name for (name,) in db.execute(_TABLES)]
    for table in vec_tables(db):
        own = re.compile(re.escape(table) + _OF_VEC0, re.I)
        found |= {name for name in names if own.fullmatch(name)}
    return found


def key_columns(db: sqlite3.Connection, table: str) -> set[str]:
    """The columns that are a part of a table's primary key or of a foreign one, folded."""
    return {folded(name) for (name,) in db.execute(_KEYS, {"table": table})}


def unique_columns(db: sqlite3.Connection, table: str) -> list[str]:
    """The columns that each alone tell a table's rows apart, by its declaration."""
    info = db.execute("SELECT name, pk FROM pragma_table_xinfo(?) WHERE pk > 0", [table]).fetchall()
    found = [name for name, _ in info] if len(info) == 1 else []
    indexes = 'SELECT name FROM pragma_index_list(?) WHERE "unique" AND NOT partial'
    for (index,) in db.execute(indexes, [table]).fetchall():
        found += [name for (name,) in db.execute(_UNIQUE, {"index": index})]
    return list(dict.fromkeys(found))


def text_columns(
    db: sqlite3.Connection,
    table: str,
    columns: Sequence[Column],
) -> list[Column]:
    """Those of some columns of a table that could be its texts."""
    keys = key_columns(db, table)
    return [one for one in columns if one.could_be_text(is_key=folded(one.name) in keys)]


def _in_table(db: sqlite3.Connection, table: str) -> Iterator[Candidate]:
    try:
        hidden = dict(db.execute(_COLUMNS, [table]).fetchall())
        names = {folded(name) for name in hidden}
        rowid = next((name for name in _ROWID_NAMES if name not in names), None)
        if rowid is None:
            return
        rowids = spread_rowids(db, quoted(table), rowid)
        columns = read_columns(db, quoted(table), list(hidden), rowids, rowid)
        formats = {
            column.name: format
            for column in columns
            if hidden[column.name] == 0
            and (format := _vector_format(db, table, column, rowids, rowid)) is not None
        }
    except sqlite3.Error:
        return  # As with more columns than a query can have: it can be selected without a hint.
    texts = text_columns(db, table, [one for one in columns if one.name not in formats])
    for vector, format in formats.items():
        for text in texts:
            flags = ["--table", table, "--text", text.name, "--vector", vector]
            flags += ["--format", format] if format != TableConfig.format else []
            yield Candidate(flags, text)


def _vector_format(
    db: sqlite3.Connection, table: str, column: Column, rowids: Sequence[int], rowid: str
) -> str | None:
    """The format of the vectors in a column; None if most values are none, or differ in length."""
    name = quoted(column.name)
    # What is shorter than a vector can be stands for none, as '[]' does.
    select = (
        f"SELECT typeof({name}), CAST({name} AS BLOB) FROM {quoted(table)} WHERE {rowid} = ? "
        f"AND typeof({name}) IN ('text', 'blob') AND length(CAST({name} AS BLOB)) > 2"
    )
    found: list[tuple[str, bytes]] = []
    for number in rowids:
        found += db.execute(select, [number])
        if len(found) >= _SAMPLED_VECTORS:
            break
    kinds = {kind for kind, _ in found}
    if len(kinds) != 1:
        return None
    sample = [raw for _, raw in found]
    for format in fitting_formats(sample, ["json"] if "text" in kinds else [*NUMBERS, "npy"]):
        lengths = Counter(_dimension(format, raw) for raw in sample)
        dimension, rows = lengths.most_common(1)[0]
        if dimension >= _MIN_DIMENSION and rows * 2 > len(sample):
            return format
    return None


def _dimension(format: str, raw: bytes) -> int:
    try:
        return len(decode(format, raw))
    except ValueError:
        return 0
