"""Which store a database is: as it was said, or found out from its schema."""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from reembed.transforms.errors import StoreError, UsageError
from reembed.transforms.stores import sqlite
from reembed.transforms.stores.ai_memory import AiMemoryStore, is_ai_memory, open_ai_memory
from reembed.transforms.stores.base import Store
from reembed.transforms.stores.candidates import listed, table_candidates
from reembed.transforms.stores.llm import LlmStore, is_llm, open_llm
from reembed.transforms.stores.programs import check_programs
from reembed.transforms.stores.table import TableConfig, TableStore
from reembed.transforms.stores.table_checks import open_table
from reembed.transforms.stores.vec import VecStore, vec_tables
from reembed.transforms.stores.vec_checks import check_joined, open_vec

KINDS = (AiMemoryStore.kind, LlmStore.kind, VecStore.kind, TableStore.kind)
"""What --store may say."""

_SETTINGS = {
    AiMemoryStore.kind: frozenset[str](),
    LlmStore.kind: frozenset({"space"}),
    VecStore.kind: frozenset({"table", "text", "vector", "text_table", "text_key"}),
    TableStore.kind: frozenset(field.name for field in fields(TableConfig)),
}
"""The settings that each kind of store takes."""

_ELSE = {
    AiMemoryStore.kind: "--store ai-memory, whose columns are known",
    LlmStore.kind: "--store llm, whose columns are known",
    VecStore.kind: "a vec0 table, which is moved as a whole",
    TableStore.kind: "an ordinary table, whose texts must be in columns of its own",
}


def choose_store(
    path: Path, namespace: str | None = None, config: Mapping[str, Any] | None = None
) -> Store:
    """Open the store that is to be moved, as `open_store` does.

    Also raises StoreError for a file that another program must move, UsageError for texts and
    vectors that don't belong together or a setting without effect.
    """
    path = real_path(path)
    wal = sqlite.check_file(path)
    settings = dict(config or {})
    sqlite.read_only(path, wal=wal, query=lambda db: check_programs(db, path))
    store = open_store(path, namespace, settings)
    if isinstance(store, VecStore):
        return check_joined(store)
    if store.kind == TableStore.kind and "space" in settings and "space_column" not in settings:
        raise UsageError("--space needs --space-column, which says where a model's name is stored")
    return store


def reopen_store(path: Path, namespace: str | None, config: Mapping[str, Any]) -> Store:
    """Open the store that an earlier run was about, as `open_store` does, with all of its rows.

    Its --where is SQL that somebody else may have written, and is not run: which rows the run has
    written is known from its backup. Raises StoreError if the store is not any more as that run
    found it.
    """
    try:
        known = {name: value for name, value in config.items() if name != "where"}
        return open_store(path, namespace, known)
    except (StoreError, UsageError) as error:
        what, *more = error.args
        found = _ADVICE.sub("", str(what))
        if found == what:
            raise
        raise StoreError(
            f"{found}, and the run found it otherwise; give the table or the column back its name "
            "(ALTER TABLE), and run this command again",
            *more,
        ) from None


# What to do about flags, which commands on earlier runs don't have.
_ADVICE = re.compile(r"[;:,] (correct|choose|name|give)\b[^;]* ?--.*$", re.S)


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
    if kind is not None:
        _check_settings(kind, namespace, settings)
    if kind == VecStore.kind:
        return open_vec(path, settings, wal=wal)
    if kind == TableStore.kind:
        missing = [name for name in ("table", "text", "vector") if not settings.get(name)]
        if missing:
            found = _hint(path, settings.get("table"), wal=wal)
            below = ", or the flags on a line below" if found else ""
            raise UsageError(
                f"a table's rows are found by --table, --text and --vector; give {_flags(missing)}"
                f"{below}",
                *found,
            )
        return open_table(path, namespace, TableConfig.from_json(settings), wal=wal)
    if kind == LlmStore.kind:
        return open_llm(path, namespace, space=settings.get("space"), wal=wal)
    try:
        store = open_ai_memory(path, namespace, wal=wal, no_hidden=no_hidden)
    except StoreError as error:
        found = [] if kind is not None else _hint(path, None, wal=wal)
        if not found:
            raise
        raise StoreError(
            f"{error}, or select a table of it with the flags on a line below", *found
        ) from None
    _check_settings(store.kind, namespace, settings)
    return store


def check_database(path: Path) -> None:
    """Raise StoreError for a file that is no SQLite database, whatever store it may be."""
    path = real_path(path)
    sqlite.read_only(path, wal=sqlite.check_file(path), query=_count_tables)


def recover_store(path: Path) -> None:
    """Let SQLite roll back a write that another process left half done, if there is one.

    A read-only connection can't do it. Raises StoreError if the file can't be written, or if the
    journal is not one that SQLite made for it.
    """
    path = real_path(path)
    if os.path.lexists(f"{path}-journal"):
        sqlite.check_file(path)
        sqlite.check_writable(path)


def _count_tables(db: sqlite3.Connection) -> int:
    count: int = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
    return count


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


def _check_settings(kind: str, namespace: str | None, settings: Mapping[str, Any]) -> None:
    """Raise UsageError for what a kind of store has no use for: it would be ignored."""
    others = [name for name in settings if name not in _SETTINGS[kind]]
    if kind == VecStore.kind and namespace is not None:
        others.append("namespace")
    if others:
        verb, they = ("does", "it") if len(others) == 1 else ("do", "them")
        raise UsageError(f"{_flags(others)} {verb} not go with {_ELSE[kind]}; leave {they} out")


def _flags(names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def _hint(path: Path, table: str | None, *, wal: bool) -> list[str]:
    return sqlite.read_only(path, wal=wal, query=lambda db: listed(table_candidates(db, table)))
