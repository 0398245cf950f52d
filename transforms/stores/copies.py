"""Columns of a database, other than a store's own, that hold vectors as long as the stored ones.

A run does not write to them: mirrors, caches, archives. They are found by a sample of each column,
and counted.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from reembed.transforms.rows import vector_digest
from reembed.transforms.stores.base import Store
from reembed.transforms.stores.formats import NUMBERS, decode, fitting_formats
from reembed.transforms.stores.sqlite import folded, quoted
from reembed.transforms.stores.vec import vec_tables, vector_columns

_POINTS = 16
_ROWS_AT_A_POINT = 4
"""Rows are sampled at this many points of a table, evenly by their numbers."""

_SEARCHED_ROWS = 10_000
"""Rows at the start of a table that are searched for a vector where the sample holds none."""

_PARSED_VALUES = 5_000
"""Above this, JSON is not parsed to count it: its number is estimated from the sample."""

_BYTES_A_NUMBER = 40
"""More than a number takes in any format; what is longer than a vector could be is not read."""

_NUMBER_BYTES = {"f32le": 4, "f32be": 4, "f64le": 8, "f16le": 2}
_NPY = b"\x93NUMPY"

# What vec0, fts5, fts4 and rtree keep the contents of a virtual table in.
_SHADOWS = re.compile(
    r"_(chunks|rowids|info|auxiliary|vector_chunks\d+|metadatachunks\d+|metadatatext\d+|data|idx|"
    r"content|docsize|config|segments|segdir|stat|node|rowid|parent)",
    re.IGNORECASE,
)
_TABLES = (
    "SELECT name, type, wr FROM pragma_table_list WHERE schema = 'main' "
    "AND name NOT LIKE 'sqlite!_%' ESCAPE '!' ORDER BY name"
)


@dataclass(frozen=True)
class Copy:
    """A column with vectors as long as a store's: how many, or (if not `counted`) about how many.

    `sample` are digests of some of them, which tell whether they were written since.
    """

    table: str
    column: str
    dimension: int
    rows: int
    counted: bool = True
    sample: frozenset[bytes] = frozenset()

    @property
    def place(self) -> tuple[str, str, int]:
        """The place that tells it from other copies."""
        return self.table, self.column, self.dimension


def find_copies(store: Store, dimensions: Collection[int]) -> tuple[Copy, ...]:
    """Find the other columns with vectors of these dimensions; a virtual table's by its schema."""
    wanted = frozenset(dimensions) - {0}
    if not wanted:
        return ()
    return store.read_only(lambda db: tuple(_find(db, store, wanted)))


def unchanged_copies(store: Store, before: Sequence[Copy], *, dimension: int) -> tuple[Copy, ...]:
    """Find again those that still hold such vectors, after a run to a dimension.

    Those as long as the new vectors are left out if a trigger has written to them.
    """
    known = {copy.place: copy for copy in before}
    found = find_copies(store, {copy.dimension for copy in before})
    return tuple(
        copy
        for copy in found
        if copy.place in known
        and (copy.dimension != dimension or copy.sample & known[copy.place].sample)
    )


def _find(db: sqlite3.Connection, store: Store, wanted: frozenset[int]) -> Iterator[Copy]:
    tables = db.execute(_TABLES).fetchall()
    virtual = [name for name, kind, _ in tables if kind == "virtual"]
    vec = vec_tables(db)
    for name, kind, without_rowid in tables:
        if name in vec:
            yield from _in_vec(db, store, name, vec[name], wanted)
        elif kind == "table" and not _is_shadow(name, virtual):
            yield from _in_table(db, store, name, wanted, rowids=not without_rowid)


def _is_shadow(name: str, virtual: Sequence[str]) -> bool:
    return any(
        name.startswith(f"{table}_") and _SHADOWS.fullmatch(name[len(table) :]) for table in virtual
    )


def _is_own(store: Store, table: str, column: str) -> bool:
    return _names(store.table, table) and _names(store.vector_column, column)


def _names(sql: str, name: str) -> bool:
    return folded(sql) in (folded(name), folded(quoted(name)))


def _in_vec(
    db: sqlite3.Connection, store: Store, table: str, sql: str, wanted: frozenset[int]
) -> Iterator[Copy]:
    """The columns of a vec0 table, by its schema and the tables that it keeps its contents in."""
    for at, (column, dimension) in enumerate(vector_columns(sql).items()):
        if dimension not in wanted or _is_own(store, table, column):
            continue
        count = f"SELECT count(*) FROM {quoted(f'{table}_rowids')}"
        chunks = f"SELECT vectors FROM {quoted(f'{table}_vector_chunks{at:02}')} LIMIT 1"
        rows = db.execute(count).fetchone()[0]
        if rows:
            sample = _digests([bytes(raw) for (raw,) in db.execute(chunks)])
            yield Copy(table, column, dimension, rows, sample=sample)


def _in_table(
    db: sqlite3.Connection, store: Store, table: str, wanted: frozenset[int], *, rowids: bool
) -> Iterator[Copy]:
    info = db.execute("SELECT name, type, hidden FROM pragma_table_xinfo(?)", [table]).fetchall()
    kinds = {name: str(kind).upper() for name, kind, hidden in info if not hidden}
    columns = [name for name in kinds if not _is_own(store, table, name)]
    rowid = next((n for n in ("rowid", "_rowid_", "oid") if n not in map(folded, kinds)), None)
    sampled = _sample(db, table, columns, rowid if rowids else None, _BYTES_A_NUMBER * max(wanted))
    for column, values in sampled.items():
        if not values and _may_hold_vectors(column, kinds[column]):
            values = _search(db, table, column, _BYTES_A_NUMBER * max(wanted))
        found: dict[int, Copy] = {}
        for copy in _copies(db, table, column, values, wanted):
            # One of the store's own has a first byte before its numbers, or none.
            other = found.get(copy.dimension)
            rows = copy.rows + (other.rows if other else 0)
            sample = copy.sample | (other.sample if other else frozenset())
            found[copy.dimension] = Copy(*copy.place, rows, copy.counted, sample)
        yield from (copy for copy in found.values() if copy.rows)


def _may_hold_vectors(column: str, kind: str) -> bool:
    return not kind or "BLOB" in kind or bool(re.search("embed|vec", column, re.IGNORECASE))


def _value(column: str) -> str:
    """The SQL expression for what may be a vector: a BLOB, or a text that may be a JSON array."""
    name = quoted(column)
    return (
        f"CASE WHEN typeof({name}) = 'blob' AND length({name}) <= :most THEN {name} "
        f"WHEN typeof({name}) = 'text' AND substr({name}, 1, 1) = '[' AND length({name}) <= :most "
        f"THEN CAST({name} AS BLOB) END"
    )


def _sample(
    db: sqlite3.Connection, table: str, columns: Sequence[str], rowid: str | None, most: int
) -> dict[str, list[bytes]]:
    """Sample the values of each column that may be vectors."""
    if not columns:
        return {}
    select = f"SELECT {', '.join(map(_value, columns))} FROM {quoted(table)}"
    values = {"most": most, "rows": _ROWS_AT_A_POINT}
    rows: list[tuple[bytes | None, ...]] = []
    ends = None if rowid is None else _ends(db, table, rowid)
    if ends is None:
        rows = db.execute(f"{select} LIMIT {_POINTS * _ROWS_AT_A_POINT}", values).fetchall()
    else:
        first, last = ends
        points = sorted({first + (last - first) * at // _POINTS for at in range(_POINTS)})
        at_point = f"{select} WHERE {rowid} BETWEEN :point AND :end ORDER BY {rowid} LIMIT :rows"
        for point, following in zip(points, [*points[1:], last + 1], strict=True):
            rows += db.execute(at_point, values | {"point": point, "end": following - 1}).fetchall()
    return {
        column: [raw for row in rows if (raw := row[at]) is not None]
        for at, column in enumerate(columns)
    }


def _ends(db: sqlite3.Connection, table: str, rowid: str) -> tuple[int, int] | None:
    """The first and the last number of a table's rows; None if it has none."""
    ends: list[int] = []
    for which in ("min", "max"):  # One by one, SQLite looks only at the ends.
        (end,) = db.execute(f"SELECT {which}({rowid}) FROM {quoted(table)}").fetchone()
        ends += [] if end is None else [end]
    return (ends[0], ends[1]) if ends else None


def _search(db: sqlite3.Connection, table: str, column: str, most: int) -> list[bytes]:
    """The first values that may be vectors, near the start of a table."""
    found = db.execute(
        f"SELECT value FROM (SELECT {_value(column)} AS value FROM {quoted(table)} "
        f"LIMIT {_SEARCHED_ROWS}) WHERE value IS NOT NULL LIMIT {_POINTS}",
        {"most": most},
    )
    return [raw for (raw,) in found]


def _copies(
    db: sqlite3.Connection,
    table: str,
    column: str,
    values: Sequence[bytes],
    wanted: frozenset[int],
) -> Iterator[Copy]:
    """Count the vectors of a column, by the lengths and formats that its sample shows."""
    name = quoted(column)
    arrays: dict[int, list[bytes]] = {}
    blobs: dict[int, list[bytes]] = {}
    for raw in values:
        length = _json_length(raw)
        kind, size = (arrays, length) if length else (blobs, len(raw))
        kind.setdefault(size, []).append(raw)
    for size, some in blobs.items():
        dimension = _dimension(size, some, wanted)
        if dimension:
            count = f"typeof({name}) = 'blob' AND length({name}) = {size}"
            rows = db.execute(f"SELECT count(*) FROM {quoted(table)} WHERE {count}").fetchone()[0]
            yield Copy(table, column, dimension, rows, sample=_digests(some))
    for length in arrays.keys() & wanted:
        share = len(arrays[length]) / len(values)
        rows, counted = _count_json(db, table, column, length, share)
        yield Copy(table, column, length, rows, counted, _digests(arrays[length]))


def _digests(values: Sequence[bytes]) -> frozenset[bytes]:
    return frozenset(map(vector_digest, values))


def _dimension(size: int, values: Sequence[bytes], wanted: frozenset[int]) -> int:
    """The dimension of BLOBs of a size; 0 if they are no vectors of a wanted length."""
    if values[0].startswith(_NPY) and fitting_formats(values, ["npy"]):
        length = len(decode("npy", values[0]))
        return length if length in wanted else 0
    for dimension in sorted(wanted):
        for format in NUMBERS:
            if size == dimension * _NUMBER_BYTES[format] and fitting_formats(values, [format]):
                return dimension
        headed = [raw[1:] for raw in values if raw[:1] == b"\1"]  # As ai-memory has them.
        if size == 4 * dimension + 1 and fitting_formats(headed, ["f32le"]):
            return dimension
    return 0


def _json_length(raw: bytes) -> int:
    """The length of a JSON array of numbers; 0 for anything else."""
    if not raw.startswith(b"["):
        return 0
    try:
        values = json.loads(raw)
    except ValueError:
        return 0
    return len(values) if all(type(one) in (int, float) for one in values) else 0


def _count_json(
    db: sqlite3.Connection, table: str, column: str, length: int, share: float
) -> tuple[int, bool]:
    """Count the arrays of a length; also say whether they were counted or estimated."""
    name, source = quoted(column), quoted(table)
    (present,) = db.execute(f"SELECT count(*) FROM {source} WHERE {name} IS NOT NULL").fetchone()
    if present > _PARSED_VALUES:
        return round(present * share), False
    text = f"CAST({name} AS TEXT)"
    exact: int = db.execute(
        f"SELECT count(*) FROM {source} WHERE CASE WHEN json_valid({text}) "
        f"THEN json_array_length({text}) END = ?",
        [length],
    ).fetchone()[0]
    return exact, True
