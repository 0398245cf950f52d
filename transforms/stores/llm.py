"""The `embeddings.db` of llm (https://llm.datasette.io/en/stable/embeddings/storage.html).

Table `embeddings` has the items of all collections, a vector as little-endian float32; table
`collections` has the one model of each. A collection is moved as a whole: its model changes
with its vectors, in one transaction, since llm embeds a query with that model.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reembed.transforms.errors import StoreError, TooManySkippedError
from reembed.transforms.rows import Stored
from reembed.transforms.stores import sqlite
from reembed.transforms.stores.base import describe_value
from reembed.transforms.stores.table import MOST_TEXT_BYTES, TableConfig, TableStore, not_utf8
from reembed.transforms.stores.vec0 import needs_vec0

COLUMNS = {
    "collections": {"id", "name", "model"},
    "embeddings": {"collection_id", "id", "embedding", "content"},
}
"""What tells such a database."""

_KEYS = {"collections": ("id",), "embeddings": ("collection_id", "id")}
"""The columns that name a row of these tables."""

_NAMES = {"all-MiniLM-L6-v2": "sentence-transformers/all-MiniLM-L6-v2"}
"""Models that llm's plugins call otherwise."""

_MODEL = "(SELECT model FROM collections WHERE collections.id = collection_id)"
_COLLECTION = "SELECT name, model FROM collections WHERE id = ?"
_WITH_VECTOR = "SELECT count(*) FROM embeddings WHERE collection_id = ? AND embedding IS NOT NULL"
# Neither a key nor a text that is not UTF-8 is one.
_UNUSABLE = (
    f"(content IS NULL OR length(CAST(content AS BLOB)) > {MOST_TEXT_BYTES} "
    f"OR NOT is_utf8(CAST(content AS BLOB)) OR id IS NULL OR {not_utf8('id')})"
)
_HELD = (
    "SELECT collection_id, (SELECT name FROM collections WHERE collections.id = collection_id), "
    "count(*), count(*) FILTER (WHERE content IS NULL) FROM embeddings "
    f"WHERE {_UNUSABLE} GROUP BY 1"
)
_ITEMS = (
    f"SELECT CAST(id AS BLOB) FROM embeddings WHERE {_UNUSABLE} AND "
    "collection_id = (SELECT id FROM collections WHERE name = ?) ORDER BY id"
)
_NAMED_ITEMS = 20
"""Items that are named where a collection can't be moved."""
_LONG_ID = 80
_NAME = "(SELECT CAST(name AS BLOB) FROM collections WHERE collections.id = collection_id)"


@dataclass(frozen=True)
class LlmStore(TableStore):
    """A database of llm's, and the one collection of it that is meant (None: all of them).

    `held` are the collections that stay as they are, since items of theirs have no content that
    could be embedded; `held_items` are these of the one that is meant.
    """

    held: tuple[int, ...] = ()
    held_notes: tuple[str, ...] = ()
    held_items: tuple[str, ...] = ()

    kind = "llm"
    namespace_word = "collection"
    no_stamps = "llm keeps one model for a collection"
    whole = True

    @property
    def described(self) -> str:
        """What it is, for a person."""
        return "the collections of llm"

    @property
    def config(self) -> Mapping[str, Any]:
        """What is needed besides the path to open it again."""
        space = {} if self.settings.space is None else {"space": self.settings.space}
        return {"kind": self.kind, **space}

    @property
    def notes(self) -> tuple[str, ...]:
        """Which collections stay as they are."""
        return self.held_notes + self.trigger_notes

    def check_namespace(self) -> None:
        """Raise TooManySkippedError if the one collection that is meant stays as it is."""
        if not self.held_items:
            return
        named = ", ".join(repr(key[:_LONG_ID]) for key in self.held_items[:_NAMED_ITEMS])
        left = len(self.held_items) - _NAMED_ITEMS
        named += f" and {left:,} more" if left > 0 else ""
        raise TooManySkippedError(
            f"{self.held_notes[0]} ({named}), so nothing is replaced; store their content (llm "
            "embed-multi --store) or delete them, and run again"
        )

    def namespaces(self, db: sqlite3.Connection) -> tuple[str, ...]:
        """All collections that there are, those without items, too."""
        names = db.execute("SELECT CAST(name AS BLOB) FROM collections ORDER BY name")
        return tuple((raw or b"").decode(errors="replace") for (raw,) in names)

    @property
    def not_clearable(self) -> str:
        """Why a row may not be without a vector."""
        return "llm can't search a collection with an item that has no vector"

    def text_warnings(self, places: Sequence[str]) -> tuple[str, ...]:
        """None: llm itself says which column it embeds."""
        return ()

    @property
    def replaced_columns(self) -> dict[str, str]:
        """The collection's model, by name; each of its items has it."""
        return {"model": _MODEL}

    @property
    def update_statements(self) -> tuple[str, ...]:
        """All statements that a replacement has: that of an item, and that of its collection."""
        return self.update_statement, "UPDATE collections SET model = NULL WHERE id = 1"

    @property
    def shared_columns(self) -> frozenset[str]:
        """Those that are written once for many rows."""
        return frozenset(["model"])

    def space(self, model: str) -> str:
        """What llm calls a model: by its name, unless --space says otherwise."""
        name = model.partition(" (")[0].strip()
        return self.settings.space or _NAMES.get(name, name)

    def describe(self, vector: bytes | None, *, model: str, dimension: int) -> Stored:
        """What an item holds once it has a vector of a model (little-endian float32)."""
        return self.stored(vector, describe_value("model", self.space(model)))

    def write_shared(
        self, db: sqlite3.Connection, shared: Mapping[tuple[str, Any], Sequence[int]]
    ) -> None:
        """Give the collections of some items their model.

        Raises StoreError if a collection would get another one without all of its vectors.
        """
        for (_, raw), rowids in shared.items():
            model = raw.decode()
            for collection, written in self._collections(db, rowids).items():
                name, former = db.execute(_COLLECTION, (collection,)).fetchone()
                if former == model:
                    continue
                others = db.execute(_WITH_VECTOR, (collection,)).fetchone()[0] - written
                if others:
                    raise StoreError(
                        f"{others} items of the collection {name!r} were added or changed "
                        f"meanwhile and have vectors of another model than {model}, so nothing was "
                        "written; stop what adds them if it happens again"
                    )
                db.execute("UPDATE collections SET model = ? WHERE id = ?", (model, collection))

    def try_shared(
        self, db: sqlite3.Connection, shared: Mapping[tuple[str, Any], Sequence[int]]
    ) -> None:
        """Give the collection of one item its model, whatever the others hold."""
        for (_, raw), rowids in shared.items():
            for collection in self._collections(db, rowids):
                update = "UPDATE collections SET model = ? WHERE id = ?"
                db.execute(update, (raw.decode(), collection))

    def _collections(self, db: sqlite3.Connection, rowids: Iterable[int]) -> Counter[int]:
        """How many of some items each collection has."""
        select = f"SELECT collection_id FROM embeddings WHERE {self.rowid} = ?"
        return Counter(db.execute(select, (rowid,)).fetchone()[0] for rowid in rowids)

    @property
    def _namespace(self) -> str:
        return _NAME

    @property
    def _in_namespace(self) -> str:
        return f"{_NAME} = CAST(:namespace AS BLOB)"

    @property
    def meant(self) -> str:
        """The SQL condition for an item that can be moved, or must be named."""
        held = ", ".join(map(str, self.held))
        return f"(collection_id NOT IN ({held}) OR {_UNUSABLE})"


def is_llm(db: sqlite3.Connection) -> bool:
    """Whether a database is llm's, by its tables and columns."""
    found = {
        table: {name for (name,) in db.execute("SELECT name FROM pragma_table_info(?)", [table])}
        for table in COLUMNS
    }
    return all(wanted <= found[table] for table, wanted in COLUMNS.items())


def open_llm(path: Path, namespace: str | None, *, space: str | None, wal: bool) -> LlmStore:
    """Look at a database of llm's and describe it; raise StoreError if it is none."""
    settings = TableConfig(
        "embeddings", ("content",), "embedding", ("collection_id", "id"), space=space
    )
    store = LlmStore(path, namespace, wal, settings=settings, moves=True)

    def query(db: sqlite3.Connection) -> LlmStore:
        if not is_llm(db):
            raise StoreError(
                f"{path} is no database of llm's: it has no tables collections and embeddings with "
                "the columns of llm 0.12 or later; name the right file with --db"
            )
        rowid = sqlite.free_rowid(db, "embeddings")
        if rowid is None:
            raise StoreError(sqlite.hidden_rowid("embeddings"))
        for table, key in _KEYS.items():
            if twice := sqlite.find_twice(db, table, key):
                raise StoreError(
                    f"two rows of the table {table} of {path} have the key {twice} "
                    f"({', '.join(key)}), so it does not name a row; delete one of them, and make "
                    "it the primary key again, as llm does"
                )
        held = db.execute(_HELD).fetchall()
        notes = [
            f"the collection {name!r} keeps its model and its vectors: {_why(count, empty)}"
            for _, name, count, empty in held
            if namespace in (None, name)
        ]
        items = db.execute(_ITEMS, [namespace]).fetchall()
        return replace(
            store,
            rowid_name=rowid,
            held=tuple(number for number, *_ in held if number is not None),
            held_notes=tuple(notes),
            vec0_triggers=any(needs_vec0(db, one) for one in store.update_statements),
            held_items=tuple((raw or b"").decode(errors="replace") for (raw,) in items),
        )

    return sqlite.read_only(path, wal=wal, query=query, connect=store.connect)


def _why(count: int, empty: int) -> str:
    if count == empty:
        return f"{count} of its items have no stored content to embed"
    return (
        f"{count} of its items have no content that could be embedded ({empty} have none stored; "
        f"of the others, it or the id is not UTF-8, or it is over {MOST_TEXT_BYTES:,} bytes)"
    )
