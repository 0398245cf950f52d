"""Trying what a replacement will write, before anything is embedded.

A constraint, a trigger or an index may keep a new vector out of a table. `check_update` finds out
what it can without a write: SQLite prepares the statement, and a copy of one row is written in
memory. `try_update` writes one row of the store itself, and rolls it back.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress

import numpy as np

from reembed.transforms.errors import StoreError
from reembed.transforms.rows import KeyRange, Row, Stored
from reembed.transforms.stores import sqlite
from reembed.transforms.stores.base import Replacement, Store, same_columns
from reembed.transforms.stores.sqlite import folded, quoted
from reembed.transforms.stores.table import TableStore
from reembed.transforms.stores.vec import VecStore, vec_tables, with_dimension

_REFUSALS = (
    sqlite3.SQLITE_ERROR,
    sqlite3.SQLITE_TOOBIG,
    sqlite3.SQLITE_CONSTRAINT,
    sqlite3.SQLITE_MISMATCH,
)
"""Errors about a statement or its values, not about the file or other processes."""

_WRITES = (sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE)
_FULL_TEXT = re.compile(r"\bUSING\s+fts[345]\b", re.I)
_MISSING_FUNCTION = re.compile(r"(?:no such|unknown) function: (\w+)")
_OTHER_LENGTH = "Dimension mismatch"  # What vec0 says of a vector that is not as long as declared.
_TARGETS = {"dim": ":dimension", "space": ":stamp"}
_TABLE_SQL = "SELECT sql FROM sqlite_schema WHERE type = 'table' AND name = ? COLLATE NOCASE"


def check_update(
    store: Store, ranges: Sequence[KeyRange], *, model: str, dimension: int
) -> tuple[str, ...]:
    """Check, without a write, that vectors of a model can be stored; say what else is written.

    The first row of the ranges that gets a vector is tried in memory. Raises StoreError.
    """
    found = _first_row(store, ranges)

    def query(db: sqlite3.Connection) -> tuple[str, ...]:
        if isinstance(store, VecStore):
            if found is not None and dimension != store.dimension:
                _try_vec0_copy(db, store, found[1].rowid, dimension)
            return ()
        with _refusing(db, store):
            fired = _triggers(db, store)
        if isinstance(store, TableStore):
            _check_unique(db, store)
        if found is not None:
            new = store.describe(_vector(dimension), model=model, dimension=dimension)
            _try_copy(db, store, found[1].rowid, new, fired)
        return _notes(db, fired)

    return store.read_only(query)


def try_update(store: Store, ranges: Sequence[KeyRange], *, model: str, dimension: int) -> None:
    """Write the first row that gets a vector, read it, and roll it back.

    A vec0 table whose vectors get another length is all written or not, and was tried in memory.
    Raises StoreError if SQLite refuses the vector, or if the row holds something else then.
    """
    found = _first_row(store, ranges)
    if found is None or (isinstance(store, VecStore) and store.dimension != dimension):
        return
    new = store.describe(_vector(dimension), model=model, dimension=dimension)
    with _trial(store) as (db, table):
        rows = table.read_range(found[0])  # Others may have written meanwhile, but no longer do.
        before = next((row for row in rows if row.meant and row.skipped is None), None)
        if before is not None:
            _try_row(db, table, store, found[0], before, new)


def try_restore(store: Store, keys: KeyRange, rowid: int, former: Stored) -> None:
    """Write what a row of a range is to hold again, read it, and roll it back; see `try_update`."""
    with _trial(store) as (db, table):
        before = {row.rowid: row for row in table.read_range(keys)}.get(rowid)
        if before is None or before.stored is None:
            return
        if not isinstance(store, VecStore) or before.stored.others == former.others:
            _try_row(db, table, store, keys, before, former)


@contextmanager
def _trial(store: Store) -> Iterator[tuple[sqlite3.Connection, Replacement]]:
    with (
        sqlite.write_connection(store.path, connect=store.connect) as db,
        sqlite.trial_transaction(db),
    ):
        yield db, Replacement(store, db)


def _try_row(
    db: sqlite3.Connection,
    table: Replacement,
    store: Store,
    keys: KeyRange,
    before: Row,
    new: Stored,
) -> None:
    broken = _broken_references(db, store, before.rowid)
    # A row that isn't written, as with a trigger's RAISE(IGNORE), is found by reading it.
    with _refusing(db, store), suppress(StoreError):
        table.try_row(before.rowid, new)
    after = {row.rowid: row for row in table.read_range(keys)}.get(before.rowid)
    _check_row(db, store, before, new, after)
    for parent in _broken_references(db, store, before.rowid) - broken:
        raise StoreError(
            f"{_named(store)} has a foreign key to the table {parent}, which has no row for the "
            "new value; add it there first, or choose another name with --space; nothing was "
            "embedded or changed"
        )


def _first_row(store: Store, ranges: Sequence[KeyRange]) -> tuple[KeyRange, Row] | None:
    """The first row that gets a vector, and its range."""
    for keys in ranges:
        for row in store.read_range(keys):
            if row.skipped is None:
                return keys, row
    return None


def _vector(dimension: int) -> bytes:
    """A vector of length 1, as little-endian float32."""
    return np.full(dimension, dimension**-0.5, "<f4").tobytes()


@contextmanager
def _refusing(db: sqlite3.Connection, store: Store) -> Iterator[None]:
    """Turn what SQLite says of a statement or its values into a sentence that says what to do."""
    try:
        yield
    except sqlite.errors() as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF not in _REFUSALS:
            raise
        raise StoreError(
            f"{_named(store)} takes no such vectors: {error}{_advice(db, store, str(error))}; "
            "nothing was embedded or changed"
        ) from error


def _advice(db: sqlite3.Connection, store: Store, error: str) -> str:
    """Say where an error comes from, as far as that can be told, and what to do about it."""
    name = _name(store)
    if function := _MISSING_FUNCTION.search(error):
        select = (
            "SELECT type || ' ' || name FROM sqlite_schema WHERE tbl_name = ? COLLATE NOCASE "
            "AND instr(lower(sql), lower(?)) ORDER BY type, name"
        )
        users = [user for (user,) in db.execute(select, (name, function[1]))]
        return (
            f" (in the {' and the '.join(users) or 'schema'}); only the program that made it has "
            "this function: drop it, run again, and make it again with that program"
        )
    try:
        fired = _triggers(db, store)
    except sqlite.errors():
        select = (
            "SELECT name FROM sqlite_schema WHERE type = 'trigger' AND tbl_name = ? COLLATE NOCASE"
        )
        fired = {trigger: [] for (trigger,) in db.execute(select, (name,))}
    triggers = ", ".join(fired)
    if _OTHER_LENGTH in error:
        tables = vec_tables(db).keys() & {table for tables in fired.values() for table in tables}
        return (
            f" (the trigger {triggers} writes to {', '.join(sorted(tables))}); recreate that table "
            "for vectors of this length, or drop the trigger, and run again"
        )
    if "CHECK constraint" in error:
        return "; change the CHECK of the table, or choose a model whose vectors it allows"
    if triggers:
        return f" (triggers that fire: {triggers}); drop the trigger that is in the way"
    return "; change what forbids it, or choose a model whose vectors it allows"


def _named(store: Store) -> str:
    return f"the table {_name(store)} of {store.path}"


def _name(store: Store) -> str:
    """The table's name, as the schema has it but for the case of its letters."""
    return _bare(store.table)


def _replaced(store: Store) -> list[str]:
    """The table's own columns that are replaced besides the vector, as SQL names them."""
    columns = store.replaced_columns.items()
    return [column for name, column in columns if name not in store.shared_columns]


def _bare(name: str) -> str:
    """A name without the quotes that SQL needs.

    >>> _bare('"a b"'), _bare("rowid")
    ('a b', 'rowid')
    """
    return name[1:-1].replace('""', '"') if name.startswith('"') else name


def _triggers(db: sqlite3.Connection, store: Store) -> dict[str, list[str]]:
    """The triggers that fire when a vector is replaced, and what each writes to besides.

    That is other tables, and the same one if rows are added to it or deleted.
    """
    written: dict[str, list[str]] = {}
    if isinstance(store, VecStore):  # A virtual table has none.
        return written
    for statement in store.update_statements:
        actions = sqlite.actions_of(db, statement)
        own = {action.first for action in actions if action.trigger is None}
        for code, table, *_, trigger in actions:
            if trigger is None:
                continue
            tables = written.setdefault(trigger, [])
            besides = code in _WRITES and (code != sqlite3.SQLITE_UPDATE or table not in own)
            if besides and table and table not in tables:
                tables.append(table)
    return written


def _notes(db: sqlite3.Connection, fired: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Describe what triggers write besides, but for full-text indexes."""
    schemas = db.execute("SELECT name, sql FROM sqlite_schema WHERE sql NOT NULL").fetchall()
    full_text = {name for name, sql in schemas if _FULL_TEXT.search(sql)}
    kept = {trigger: [t for t in tables if t not in full_text] for trigger, tables in fired.items()}
    return tuple(
        f"replacing a vector fires the trigger {trigger}, which also writes to "
        f"{' and '.join(tables)}; a rollback fires it as well"
        for trigger, tables in kept.items()
        if tables
    )


def _check_unique(db: sqlite3.Connection, store: TableStore) -> None:
    """Raise StoreError if an index wants values to differ that will be equal: for equal texts."""
    replaced = {folded(_bare(name)) for name in (store.vector_column, *_replaced(store))}
    texts = ", ".join(map(quoted, store.settings.text_columns))
    some = " OR ".join(f"{quoted(name)} NOT NULL" for name in store.settings.text_columns)
    moved = f"({store.where} AND {store.meant} AND ({some or 'TRUE'}))"
    for _, index, unique, _, partial in db.execute(f"PRAGMA index_list({store.table})").fetchall():
        columns = [column for *_, column in db.execute(f"PRAGMA index_info({quoted(index)})")]
        if not unique or partial or None in columns or replaced.isdisjoint(map(folded, columns)):
            continue
        vectors = folded(_bare(store.vector_column)) in map(folded, columns)
        kept = [name for name in columns if folded(name) not in replaced]
        group = ", ".join([*map(quoted, kept), *([texts] if vectors and texts else [])])
        # Of NULLs an index takes any number.
        known = " AND ".join(["TRUE", *(f"{quoted(name)} NOT NULL" for name in kept)])
        held = " AND ".join(
            f"{column} = {_TARGETS[name]}"
            for name, column in store.replaced_columns.items()
            if folded(_bare(column)) in map(folded, columns)
        )
        # Rows that are left alone may hold already what the others get.
        held = "FALSE" if vectors else held
        twice = (
            f"SELECT 1 FROM {store.source} WHERE ({moved} OR {held}) AND {known} "
            f"GROUP BY {group or '1'} HAVING count(*) > 1 AND max({moved}) LIMIT 1"
        )
        if db.execute(twice, store.values).fetchone():
            alike = "rows with the same text" if vectors and texts else "all rows"
            if kept:
                alike += f" with one {', '.join(kept)}"
            raise StoreError(
                f"the index {index} of {_named(store)} allows no value of {', '.join(columns)} "
                f"twice, and {alike} get the same; drop the index, or leave out such rows, and "
                "run again; nothing was embedded or changed"
            )


def _try_copy(
    db: sqlite3.Connection,
    store: Store,
    rowid: int,
    new: Stored,
    fired: Mapping[str, Sequence[str]],
) -> None:
    """Write to a copy of a row in memory, in a table without indexes.

    What can't be copied, and what a trigger says that may depend on other rows, is left to the
    trial on the store itself.
    """
    with closing(store.connect(":memory:", isolation_level=None)) as memory:
        try:
            memory.execute(db.execute(_TABLE_SQL, (_name(store),)).fetchone()[0])
            memory.execute("PRAGMA ignore_check_constraints = ON")
            copied = _copy_row(db, memory, store, rowid)
            memory.execute("PRAGMA ignore_check_constraints = OFF")
        except sqlite.errors():
            return
        if copied is None:
            return
        with _refusing(db, store):
            Replacement(store, memory).put([(copied, new)])
            if store.vec0_triggers:
                _try_vec0_triggers(db, memory, store, (copied, new), fired)


def _try_vec0_triggers(
    db: sqlite3.Connection,
    memory: sqlite3.Connection,
    store: Store,
    change: tuple[int, Stored],
    fired: Mapping[str, Sequence[str]],
) -> None:
    """Write to the copy of a row with triggers and the empty tables that they write to."""
    names = {*fired, *(table for tables in fired.values() for table in tables)}
    for name, sql in db.execute("SELECT name, sql FROM sqlite_schema ORDER BY type").fetchall():
        if name in names:
            with suppress(*sqlite.errors()):
                memory.execute(sql)
    try:
        Replacement(store, memory).put([change])
    except sqlite.errors() as error:
        if _OTHER_LENGTH in str(error):
            raise


def _try_vec0_copy(db: sqlite3.Connection, store: VecStore, rowid: int, dimension: int) -> None:
    """Make a vec0 table for the new length in memory, and insert a row with such a vector."""
    with (
        closing(store.connect(":memory:", isolation_level=None)) as memory,
        _refusing(db, store),
    ):
        memory.execute(with_dimension(store.sql, store.settings.vector, dimension))
        _copy_row(db, memory, store, rowid, vector=_vector(dimension))


def _copy_row(
    db: sqlite3.Connection,
    memory: sqlite3.Connection,
    store: Store,
    rowid: int,
    *,
    vector: bytes | None = None,
) -> int | None:
    """Copy a row, if it is still there, into an empty table of the same name; give its rowid.

    It may get another vector.
    """
    shown = db.execute(f"PRAGMA table_xinfo({store.table})")
    columns = [quoted(name) for _, name, *_, hidden in shown if not hidden]
    number = store.primary if isinstance(store, VecStore) else store.rowid
    select = f"SELECT {', '.join(columns)} FROM {store.table} WHERE {number} = ?"
    row = db.execute(select, (rowid,)).fetchone()
    if row is None:
        return None
    values = list(row)
    if vector is not None:
        values[columns.index(store.vector_column)] = vector
    places = ", ".join("?" * len(columns))
    insert = f"INSERT INTO {store.table} ({', '.join(columns)}) VALUES ({places})"
    return memory.execute(insert, values).lastrowid


def _check_row(
    db: sqlite3.Connection, store: Store, before: Row, new: Stored, after: Row | None
) -> None:
    """Raise StoreError if a row does not hold what was written, and the text and key it had."""
    held = after.stored if after else None
    if held is None or held.vector != new.vector:
        what = "a vector that is written does not stay in"
    elif not (store.shared_columns or same_columns(held.others, new.others)):
        what = "a stamp or a length that is written beside a vector does not stay in"
    elif after is not None and after.digest != before.digest:
        what = "a row's text does not stay when its vector is written in"
    elif after is not None and after.key != before.key:
        what = "a row's key does not stay when its vector is written in"
    else:
        return
    triggers = ", ".join(_triggers(db, store)) or "none"
    raise StoreError(
        f"{what} {_named(store)} (triggers that fire: {triggers}), so its rows could never be "
        "done; drop the trigger that does it, and run again; nothing was embedded or changed"
    )


def _broken_references(db: sqlite3.Connection, store: Store, rowid: int) -> set[str]:
    """The tables that a row refers to by a column that is replaced, and that lack its value.

    Python's SQLite does not enforce foreign keys, but the store's own program may.
    """
    replaced = {folded(_bare(name)) for name in _replaced(store)}
    broken = set()
    for _, _, parent, child, column, *_ in db.execute(
        f"PRAGMA foreign_key_list({store.table})"
    ).fetchall():
        if folded(child) not in replaced:
            continue
        primary = "SELECT name FROM pragma_table_info(?) WHERE pk = 1"
        column = column or next((name for (name,) in db.execute(primary, (parent,))), "")
        lacks = (
            f"SELECT 1 FROM {store.table} AS child WHERE child.{store.rowid} = ? "
            f"AND child.{quoted(child)} NOT NULL AND NOT EXISTS (SELECT 1 FROM {quoted(parent)} "
            f"AS parent WHERE parent.{quoted(column)} = child.{quoted(child)})"
        )
        try:
            broken |= {parent for _ in db.execute(lacks, (rowid,))}
        except sqlite.errors():  # There is no such table or column: it never held.
            broken.add(parent)
    return broken
