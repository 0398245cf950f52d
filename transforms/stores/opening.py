"""Which store a database is: as it was said, or found out from its schema."""

from __future__ import annotations

import shlex
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transforms.errors import StoreError, UsageError
from transforms.stores import sqlite
from transforms.stores.ai_memory import AiMemoryStore, is_ai_memory, open_ai_memory
from transforms.stores.base import Store
from transforms.stores.formats import NUMBERS, fitting_formats
from transforms.stores.llm import LlmStore, is_llm, open_llm
from transforms.stores.sqlite import quoted
from transforms.stores.table import TableConfig, TableStore
from transforms.stores.table_checks import open_table
from transforms.stores.vec import VecStore, open_vec, vec_tables

KINDS = (AiMemoryStore.kind, LlmStore.kind, VecStore.kind, TableStore.kind)
"""What --store may say."""

_OF_VEC = {"table", "text", "vector", "text_table", "text_key"}
_SAMPLED_VALUES = 8
_LEAST_DIMENSION = 2


def open_store(
    path: Path, namespace: str | None = None, config: Mapping[str, Any] | None = None
) -> Store:
    """Look at a database and describe it as the store that it is.

    `config` is what a store's own `config` gives, or a part of it; without a kind it is found
    out. Raises StoreError if it is no such store, UsageError for settings that can't be meant.
    """
    path = real_path(path)  # SQLite's side files lie beside the real file, not beside a link.
    wal = sqlite.check_file(path)
    settings = dict(config or {})
    no_hidden = settings.pop("no_hidden", False)
    kind = settings.pop("kind", None) or sqlite.read_only(
        path, wal=wal, query=lambda db: _kind(db, settings)
    )
    if kind not in (None, *KINDS):
        raise UsageError(f"--store {kind} is not one of {', '.join(KINDS)}")
    if no_hidden and kind not in (None, AiMemoryStore.kind):
        raise UsageError(
            "--no-hidden is for an ai-memory database, which has rows that are not shown; leave "
            "rows of this store out with --where"
        )
    if kind == VecStore.kind:
        if namespace is not None or settings.keys() - _OF_VEC:
            flags = ", ".join(f"--{name}" for name in sorted(settings.keys() - _OF_VEC))
            raise UsageError(
                f"{flags or '--namespace'} does not go with a vec0 table, which is moved as a whole"
            )
        return open_vec(path, settings, wal=wal)
    if kind == TableStore.kind:
        missing = [name for name in ("table", "text", "vector") if not settings.get(name)]
        if missing:
            flags = ", ".join(f"--{name}" for name in missing)
            found = sqlite.read_only(path, wal=wal, query=_candidates)
            raise UsageError(
                f"a table's rows are found by --table, --text and --vector; give {flags}"
                f"{_hint(found)}"
            )
        return open_table(path, namespace, TableConfig.from_json(settings), wal=wal)
    if kind == LlmStore.kind and not settings.keys() - {"space"}:
        return open_llm(path, namespace, space=settings.get("space"), wal=wal)
    if settings:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in settings)
        raise UsageError(f"{flags} does not go with --store {kind}; it is for --store table")
    try:
        return open_ai_memory(path, namespace, wal=wal, no_hidden=no_hidden)
    except StoreError as error:
        if kind is not None:
            raise
        found = sqlite.read_only(path, wal=wal, query=_candidates)
        if not found:
            raise
        raise StoreError(f"{error}{_hint(found)}") from None


def recover_store(path: Path) -> None:
    """Let SQLite roll back a write that another process left half done, if there is one.

    A read-only connection can't do it. Raises StoreError if the file can't be written.
    """
    path = real_path(path)
    if Path(f"{path}-journal").exists():
        sqlite.check_file(path)
        sqlite.check_writable(path)


def _kind(db: sqlite3.Connection, settings: Mapping[str, Any]) -> str | None:
    """The kind that is meant; None for what may be the default one, which goes first."""
    if not settings and is_ai_memory(db):
        return None
    tables = vec_tables(db)
    if settings.get("table", next(iter(tables), None)) in tables:
        return VecStore.kind
    if settings.keys() - {"space"}:
        return TableStore.kind
    return LlmStore.kind if is_llm(db) else None


def real_path(path: Path) -> Path:
    """The path of the file itself, without symbolic links."""
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise StoreError(f"{path} can't be read ({error}); check its name") from None


def _candidates(db: sqlite3.Connection) -> list[str]:
    """The tables that could be meant, each as the flags that choose it."""
    names = db.execute(
        "SELECT name FROM sqlite_schema WHERE type = 'table' "
        "AND name NOT LIKE 'sqlite!_%' ESCAPE '!' ORDER BY name"
    ).fetchall()
    return [flags for (name,) in names for flags in _flags(db, name)]


def _flags(db: sqlite3.Connection, table: str) -> Iterator[str]:
    try:
        columns = [name for (name,) in db.execute("SELECT name FROM pragma_table_info(?)", [table])]
        kinds = {column: _kinds(db, table, column) for column in columns}
    except sqlite3.Error:
        return  # A virtual table whose module is not there.
    texts = [column for column, (kind, formats) in kinds.items() if kind == "text" and not formats]
    for column, (_, formats) in kinds.items():
        if formats and [text for text in texts if text != column]:
            text = next(text for text in texts if text != column)
            flags = ["--table", table, "--text", text, "--vector", column]
            flags += ["--format", formats[0]] if formats[0] != TableConfig.format else []
            yield shlex.join(flags)


def _kinds(db: sqlite3.Connection, table: str, column: str) -> tuple[str | None, list[str]]:
    """What a column holds, and the formats of vectors that it could be in."""
    found = db.execute(
        f"SELECT typeof({quoted(column)}), CAST({quoted(column)} AS BLOB) FROM {quoted(table)} "
        f"WHERE {quoted(column)} IS NOT NULL LIMIT {_SAMPLED_VALUES}"
    ).fetchall()
    kinds = {kind for kind, _ in found}
    if len(kinds) != 1:
        return None, []
    (kind,) = kinds
    formats = {"text": ["json"], "blob": [*NUMBERS, "npy"]}.get(kind, [])
    return kind, fitting_formats([raw for _, raw in found], formats)


def _hint(candidates: list[str]) -> str:
    if not candidates:
        return ""
    return f"; what could be meant: {' or '.join(candidates)}"
