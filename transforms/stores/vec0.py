"""The module vec0 of sqlite-vec: loaded for its own tables, and where triggers write to one."""

from __future__ import annotations

import importlib
import sqlite3
from typing import Any

from reembed.transforms.errors import StoreError


def connect(*arguments: Any, **keywords: Any) -> sqlite3.Connection:
    """Open a connection with sqlite-vec in it.

    Some builds of Python's own sqlite3 load no extensions; pysqlite3 then does. Raises StoreError
    if there is none that does.
    """
    modules = [sqlite3]
    try:
        vec = importlib.import_module("sqlite_vec")
        if not hasattr(sqlite3.Connection, "enable_load_extension"):
            modules = [importlib.import_module("pysqlite3")]
    except ImportError:
        raise StoreError(
            "vec0 tables need the packages of sqlite-vec, which are not installed: pip install "
            "'.[sqlite-vec]' in the checkout of reembed"
        ) from None
    db: Any = modules[0].connect(*arguments, **keywords)
    db.enable_load_extension(True)
    vec.load(db)
    db.enable_load_extension(False)
    opened: sqlite3.Connection = db
    return opened


def needs_vec0(db: sqlite3.Connection, statement: str) -> bool:
    """Whether a statement can't be prepared without vec0, as with a trigger that writes to one."""
    try:
        db.execute(f"EXPLAIN {statement}")
    except sqlite3.OperationalError as error:
        return str(error) == "no such module: vec0"
    return False
