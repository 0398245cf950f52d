"""Whether a table is as its settings say, and what else must be known of it."""

from __future__ import annotations

import re
import shlex
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from reembed.transforms.errors import StoreError, UsageError
from reembed.transforms.stores import sqlite
from reembed.transforms.stores.candidates import shadow_tables
from reembed.transforms.stores.formats import NUMBERS, fitting_formats
from reembed.transforms.stores.sqlite import folded, quoted
from reembed.transforms.stores.table import TableConfig, TableStore
from reembed.transforms.stores.vec0 import needs_vec0

SAMPLED_VECTORS = 256

_ROWID_NAMES = ("rowid", "_rowid_", "oid")
_WRITTEN = ("--vector", "--dim-column", "--space-column")
_FICKLE = ("random", "randomblob", "changes", "last_insert_rowid", "total_changes")
_READS = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION)
_TOKEN = re.compile(
    r"--[^\n]*|/\*.*?\*/|'(?:[^']|'')*'"  # Comments and strings, which name nothing.
    r'|"(?P<double>(?:[^"]|"")*)"|`(?P<grave>(?:[^`]|``)*)`|\[(?P<square>[^\]]*)\]'
    r"|(?P<word>[\w$]+)|(?P<sign>\S)",
    re.S,
)
_NAMED = ("double", "grave", "square", "word")
_TABLES = "SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name"
_PRIMARY_INDEX = "SELECT 1 FROM pragma_index_list(?) WHERE origin = 'pk'"
_COLUMNS = 'SELECT name, type, "notnull", pk, hidden FROM pragma_table_xinfo(?)'


def open_table(
    path: Path, namespace: str | None, settings: TableConfig, *, wal: bool
) -> TableStore:
    """Look at a table and describe it.

    Raises StoreError if it, one of its columns, or its vectors are not as the settings say.
    """
    if namespace is not None and settings.namespace_column is None:
        raise UsageError("--namespace needs --namespace-column, which says where a row's is")
    store = TableStore(path, namespace, wal, settings=settings)
    return sqlite.read_only(path, wal=wal, query=lambda db: _checked(db, store))


def _checked(db: sqlite3.Connection, store: TableStore) -> TableStore:
    settings, path = store.settings, store.path
    found = db.execute(
        "SELECT type, wr FROM pragma_table_list WHERE schema = 'main' AND name = ? COLLATE NOCASE",
        (settings.table,),
    ).fetchone()
    if found is None:
        names = [name for (name,) in db.execute(_TABLES)]
        raise StoreError(
            f"{path} has no table {settings.table} (it has {', '.join(names) or 'none'}); correct "
            "--table"
        )
    kind, without_rowid = found
    if folded(settings.table) in map(folded, shadow_tables(db)):
        raise StoreError(
            f"{settings.table} is where a virtual table keeps its data, which only that may write; "
            "name an ordinary table with --table"
        )
    if kind != "table" or without_rowid:
        what = {"view": "a view", "virtual": "a virtual table"}.get(kind, "a WITHOUT ROWID table")
        raise StoreError(
            f"{settings.table} is {what}, whose rows have no number of their own to be found by; "
            "only ordinary tables can be re-embedded"
        )
    columns = db.execute(_COLUMNS, (settings.table,)).fetchall()
    by_name = {folded(name): rest for name, *rest in columns}
    generated = {name for name, rest in by_name.items() if rest[3] in (2, 3)}
    for flag, wanted in _named_columns(settings):
        if flag == "--key" and folded(wanted) in _ROWID_NAMES:
            continue
        if folded(wanted) not in by_name:
            raise StoreError(
                f"the table {settings.table} has no column {wanted} (it has "
                f"{', '.join(name for name, *_ in columns)}); correct {flag}"
            )
        if folded(wanted) in generated and flag in _WRITTEN:
            raise StoreError(
                f"the column {wanted} is generated, so nothing can be stored in it; correct {flag}"
            )
        if folded(wanted) in generated and (source := _replaced_source(db, store, wanted)):
            raise StoreError(
                f"the column {wanted} is generated from the column {source}, which is replaced, so "
                f"it would change with a row's vector; name another with {flag}"
            )
    free = [name for name in _ROWID_NAMES if name not in by_name]
    primary = [name for name, rest in by_name.items() if rest[2]]
    # Such a column is the rowid, and VACUUM keeps it (https://sqlite.org/lang_createtable.html).
    indexed = db.execute(_PRIMARY_INDEX, [settings.table])
    stable = len(primary) == 1 and by_name[primary[0]][0].upper() == "INTEGER"
    stable = stable and indexed.fetchone() is None
    if not free and not stable:
        raise StoreError(sqlite.hidden_rowid(settings.table))
    if db.execute("PRAGMA encoding").fetchone()[0] != "UTF-8":
        raise StoreError(
            f"{path} stores its texts as UTF-16; copy it into a UTF-8 database first (VACUUM INTO "
            "keeps the encoding, so dump and read it)"
        )
    key = settings.key or tuple(
        name for name, *rest in sorted(columns, key=lambda column: column[3]) if rest[2]
    )
    _check_default_key(store, key)
    if stable and [folded(name) for name in key] == primary:
        key = ()  # The rowid by its own name.
    store = replace(
        store,
        settings=replace(settings, key=key),
        rowid_name=free[0] if free else quoted(primary[0]),
        moves=not stable,
        nullable=not any(
            by_name[folded(name)][1]
            for name in (settings.vector, settings.dim_column, settings.space_column)
            if name is not None
        ),
    )
    _check_where(db, store)
    _check_keys(db, store)
    _check_format(db, store)
    return replace(store, vec0_triggers=needs_vec0(db, store.update_statement))


def _named_columns(settings: TableConfig) -> Iterator[tuple[str, str]]:
    """Each column that is named, and by which flag."""
    yield "--vector", settings.vector
    yield from (("--key", name) for name in settings.key)
    yield from (("--text", name) for name in settings.text_columns)
    for flag in ("dim_column", "space_column", "namespace_column"):
        name = getattr(settings, flag)
        if name is not None:
            yield f"--{flag.replace('_', '-')}", name


def _check_default_key(store: TableStore, key: tuple[str, ...]) -> None:
    """Raise UsageError if a table's primary key holds a column that is replaced."""
    settings = store.settings
    replaced = _replaced(settings)
    found = next((name for name in key if folded(name) in replaced), None)
    if settings.key or found is None:
        return
    left = " ".join(f"--key {shlex.quote(name)}" for name in key if folded(name) not in replaced)
    raise UsageError(
        f"the primary key of the table {settings.table} ({', '.join(key)}) holds the column "
        f"{found}, which is replaced; say what names a row with "
        f"{f'{left}, or ' if left else ''}--key rowid"
    )


def _replaced(settings: TableConfig) -> set[str]:
    names = (settings.vector, settings.dim_column, settings.space_column)
    return {folded(name) for name in names if name is not None}


def _replaced_source(db: sqlite3.Connection, store: TableStore, column: str) -> str | None:
    """The replaced column that a generated one is made of, maybe by way of others; or None.

    SQLite does not tell, so the names in the definitions are looked at.
    """
    select = "SELECT sql FROM sqlite_schema WHERE type = 'table' AND name = ? COLLATE NOCASE"
    defined = _definitions(db.execute(select, (store.settings.table,)).fetchone()[0])
    replaced, seen, waiting = _replaced(store.settings), set[str](), [folded(column)]
    while waiting:
        name = waiting.pop()
        if name in replaced:
            return name
        if name not in seen:
            seen.add(name)
            waiting += defined.get(name, [])
    return None


def _definitions(sql: str) -> dict[str, list[str]]:
    """The names in the definition of each generated column of a table, folded.

    >>> _definitions("CREATE TABLE t (a, B TEXT AS (a || 'c') STORED, [d e] AS (b))")
    {'b': ['text', 'as', 'a', 'stored'], 'd e': ['as', 'b']}
    """
    parts: list[list[str]] = [[]]
    depth = 0
    for token in _TOKEN.finditer(sql):
        sign = token["sign"]
        depth += (sign == "(") - (sign == ")")
        if sign == "," and depth == 1:
            parts.append([])
        name = next((token[kind] for kind in _NAMED if token[kind] is not None), None)
        if name is not None and depth:
            parts[-1].append(folded(name))
    return {part[0]: part[1:] for part in parts if "as" in part}


def _check_where(db: sqlite3.Connection, store: TableStore) -> None:
    """Raise UsageError for a condition that is none, or does more than read."""
    where = store.settings.where
    if where is None:
        return

    def allow(action: int, one: str | None, other: str | None, *_: str | None) -> int:
        fickle = action == sqlite3.SQLITE_FUNCTION and other in _FICKLE
        return sqlite3.SQLITE_OK if action in _READS and not fickle else sqlite3.SQLITE_DENY

    db.set_authorizer(allow)
    try:
        db.execute(f"SELECT 1 FROM {store.table} WHERE ({where}\n) LIMIT 0").fetchall()
    except (sqlite3.Error, sqlite3.Warning) as error:
        raise UsageError(
            f"--where {where!r} is no condition on the table {store.settings.table}: {error}"
        ) from None
    finally:
        db.set_authorizer(None)


def _check_keys(db: sqlite3.Connection, store: TableStore) -> None:
    """Raise StoreError if two rows have one key.

    Also of rows that the run is not about: a backup tells rows by their keys alone.
    """
    if not store.settings.key:
        return
    if twice := sqlite.find_twice(db, store.settings.table, store.settings.key):
        raise StoreError(
            f"two rows of the table {store.settings.table} have the key {twice}, so "
            f"{', '.join(store.settings.key)} does not name a row; name columns that do with --key"
        )


def _check_format(db: sqlite3.Connection, store: TableStore) -> None:
    """Raise StoreError if vectors that are there are not in the format that was named."""
    vector = store.vector_column
    found = db.execute(
        f"SELECT {store.rowid}, typeof({vector}), CAST({vector} AS BLOB) FROM {store.table} "
        f"WHERE {store.where} AND {vector} IS NOT NULL LIMIT {SAMPLED_VECTORS}",
        store.values,
    ).fetchall()
    named, column = store.settings.format, store.settings.vector
    fitting = [
        name
        for kind, names in (("text", ["json"]), ("blob", [*NUMBERS, "npy"]))
        for name in fitting_formats([raw for _, one, raw in found if one == kind], names)
    ]
    if found and named not in fitting:
        rowid, kind, raw = found[0]
        hint = "they look like " + " or ".join(fitting) if fitting else "they are like no vectors"
        raise StoreError(
            f"the vectors in column {column} of the table {store.settings.table} are not {named} "
            f"(row {rowid} holds a {kind} of {len(raw)} bytes that begins with {raw[:8].hex()}); "
            f"{hint}: correct --format or --vector"
        )
