"""Stores for `tests/kills.py`, and what their rows must hold: rules of its own, not reembed's."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from reembed.transforms.embedders.fake import NOT_A_NUMBER, POISON, FakeEmbedder
from reembed.transforms.stores.vec0 import connect
from tests.conftest import all_columns, make_store, memory

OLD_DIMENSION = 5
MOST_BYTES = 65_536
"""ai-memory embeds no longer text."""


class Vector(NamedTuple):
    """A row's vector as stored bytes, with the length and the model recorded for it."""

    raw: bytes | None
    dimension: int | None = None
    stamp: str | None = None


class Entry(NamedTuple):
    """A row as another program sees it; `chosen` says whether the store's condition is true."""

    key: str
    text: str
    namespace: str
    sealed: bool
    chosen: bool
    vector: Vector


Entries = dict[str, Entry]


@dataclass(frozen=True)
class Shop:
    """A kind of store. The statements take :key, :text, :namespace, :vector, :dim and :stamp.

    In one that is `whole` all rows are replaced or none, and in one that is not `keyed` none
    are added or deleted.
    """

    name: str
    query: str
    schema: str = ""
    insert: str = ""
    edit: str = ""
    delete: str = ""
    flags: tuple[str, ...] = ()
    whole: bool = False
    keyed: bool = True
    stamps: str | None = "{}"
    notes_dimension: bool = True
    header: bytes = b""
    first: str = ""
    keys: str = "{}"
    spaces: tuple[str, ...] = ("a", "b")

    def make(self, path: Path, rows: int, dice: random.Random, journal: str) -> None:
        """Create a store of `rows` rows, most of them with vectors of another model."""
        entries = [self._entry(at, dice) for at in range(rows)]
        with closing(connect(path)) as db, db:
            db.execute(f"PRAGMA journal_mode={journal}")
            db.executescript(self.schema)
            for entry in entries:
                db.execute(self.insert, self.values(entry))

    def _entry(self, at: int, dice: random.Random) -> Entry:
        text = f"text {at} {dice.random()}"
        sealed = False
        raw = np.random.default_rng(at).standard_normal(OLD_DIMENSION).astype("<f4").tobytes()
        vector = Vector(
            self.header + raw,
            OLD_DIMENSION if self.notes_dimension else None,
            self.stamps and self.stamps.format("old"),
        )
        if not self.whole:
            what = dice.random()
            if what < 0.02:
                text += f" {POISON}"
            elif what < 0.04:
                text += f" {NOT_A_NUMBER}"
            elif what < 0.05 and self.header:
                sealed = True
            elif what < 0.055 and self.header:
                text += "x" * MOST_BYTES
            elif what < 0.15:
                vector = Vector(None)
            elif what < 0.2 and self.stamps:
                vector = self.right(self.whole_text(str(at), text), "m", 8)
        chosen = dice.random() < 0.9
        return Entry(self.keys.format(at), text, dice.choice(self.spaces), sealed, chosen, vector)

    def values(self, entry: Entry) -> dict[str, Any]:
        """The parameters of the statements."""
        return {
            "key": entry.key,
            "text": entry.text,
            "namespace": entry.namespace,
            "sealed": b"sealed" if entry.sealed else None,
            "chosen": entry.chosen,
            "vector": entry.vector.raw,
            "dim": entry.vector.dimension,
            "stamp": entry.vector.stamp,
        }

    def whole_text(self, key: str, text: str) -> str:
        """What is embedded of a row with such a text."""
        return self.first.format(key) + text

    def read(self, path: Path) -> Entries:
        """All rows; the database must be sound. A key is what the program calls the row."""
        with closing(connect(path)) as db:
            sound = db.execute("PRAGMA integrity_check").fetchall()
            if sound != [("ok",)]:
                raise AssertionError(f"{path} is damaged: {sound[0][0]}")
            found = db.execute(self.query).fetchall()
        return {
            str(key): Entry(str(key), text, space, bool(sealed), bool(chosen), Vector(*vector))
            for key, text, space, sealed, chosen, *vector in found
        }

    def right(self, text: str, model: str, dimension: int) -> Vector:
        """What a row must hold that has the model's vector of its text."""
        [vector] = FakeEmbedder(dimension).embed([text])
        return Vector(
            self.header + vector.astype("<f4").tobytes(),
            dimension if self.notes_dimension else None,
            self.stamps and self.stamps.format(model),
        )

    def change(self, path: Path, statement: str, entry: Entry) -> None:
        """Change a row as another program would."""
        with closing(connect(path, timeout=60)) as db, db:
            db.execute(statement, self.values(entry))

    def contents(self, path: Path) -> object:
        """All that is in the database, byte for byte."""
        if self.name != "vec0":
            return all_columns(path)
        with closing(connect(path)) as db:
            return db.execute(self.query).fetchall()


class AiMemory(Shop):
    """ai-memory's own."""

    def make(self, path: Path, rows: int, dice: random.Random, journal: str) -> None:
        made = [self._entry(at, dice) for at in range(rows)]
        memories = [
            memory(
                one.key,
                one.text,
                namespace=one.namespace,
                embedding=one.vector.raw,
                embedding_dim=one.vector.dimension,
                encrypted_envelope=b"sealed" if one.sealed else None,
            )
            for one in made
        ]
        make_store(path, memories, journal)
        with closing(sqlite3.connect(path)) as db, db:
            db.execute("ALTER TABLE memories ADD COLUMN embedding_space TEXT")
            db.executemany(
                "UPDATE memories SET embedding_space = ? WHERE id = ?",
                [(one.vector.stamp, one.key) for one in made],
            )


def is_skipped(entry: Entry) -> bool:
    """Whether no vector can be had for a row."""
    bad = POISON in entry.text or NOT_A_NUMBER in entry.text
    return entry.sealed or bad or len(entry.text.encode()) > MOST_BYTES


AI_MEMORY = AiMemory(
    "ai-memory",
    "SELECT id, title || ' ' || content, namespace, encrypted_envelope IS NOT NULL, 1, embedding, "
    "embedding_dim, embedding_space FROM memories",
    insert="INSERT INTO memories (id, namespace, title, content, tier, priority, confidence, tags, "
    "source, created_at, updated_at, access_count, metadata) VALUES (:key, :namespace, "
    "'title ' || :key, :text, 'mid', 5, 1.0, '[]', 's', '', '', 0, '{}')",
    edit="UPDATE memories SET content = :text WHERE id = :key",
    delete="DELETE FROM memories WHERE id = :key",
    stamps="{}#none",
    header=b"\x01",
    first="title {} ",
)
_COLUMNS = "body TEXT, place TEXT, vec BLOB, dim INT, model TEXT, live INT"
_NAMES = ("--table", "docs", "--text", "body", "--vector", "vec")
_DOCS = (*_NAMES, "--dim-column", "dim", "--space-column", "model", "--namespace-column", "place")
KEYED = Shop(
    "table with a key",
    "SELECT id, body, place, 0, live, vec, dim, model FROM docs",
    schema=f"CREATE TABLE docs (id TEXT PRIMARY KEY, {_COLUMNS})",
    insert="INSERT INTO docs VALUES (:key, :text, :namespace, :vector, :dim, :stamp, :chosen)",
    keys="row {}",
    edit="UPDATE docs SET body = :text WHERE id = :key",
    delete="DELETE FROM docs WHERE id = :key",
    flags=(*_DOCS, "--where", "live = 1"),
)
KEYLESS = Shop(
    "table without a key",
    "SELECT rowid, body, place, 0, 1, vec, dim, model FROM docs",
    schema=f"CREATE TABLE docs ({_COLUMNS})",
    insert="INSERT INTO docs VALUES (:text, :namespace, :vector, :dim, :stamp, :chosen)",
    edit="UPDATE docs SET body = :text WHERE rowid = :key",
    flags=_DOCS,
    keyed=False,
)
VEC = Shop(
    "vec0",
    "SELECT id, body, '', 0, 1, embedding, NULL, NULL FROM items",
    schema="CREATE VIRTUAL TABLE items USING vec0(id INTEGER PRIMARY KEY, "
    f"embedding float[{OLD_DIMENSION}], +body TEXT)",
    insert="INSERT INTO items (id, embedding, body) VALUES (CAST(:key AS INT), :vector, :text)",
    edit="UPDATE items_auxiliary SET value00 = :text WHERE rowid = :key",
    flags=("--text", "body"),
    whole=True,
    keyed=False,
    stamps=None,
    notes_dimension=False,
    spaces=("",),
)
LLM = Shop(
    "llm",
    "SELECT '[' || collection_id || ', \"' || e.id || '\"]', content, name, 0, 1, embedding, "
    "NULL, model FROM embeddings e JOIN collections c ON c.id = collection_id",
    schema="""
        CREATE TABLE collections (id INTEGER PRIMARY KEY, name TEXT, model TEXT);
        CREATE UNIQUE INDEX idx_collections_name ON collections (name);
        CREATE TABLE embeddings (
            collection_id INTEGER REFERENCES collections (id), id TEXT, embedding BLOB,
            content TEXT, content_blob BLOB, content_hash BLOB, metadata TEXT, updated INTEGER,
            PRIMARY KEY (collection_id, id)
        );
        CREATE INDEX idx_embeddings_content_hash ON embeddings (content_hash);
        INSERT INTO collections VALUES (1, 'a', 'old'), (2, 'b', 'old');
    """,
    insert="INSERT INTO embeddings SELECT id, 'item ' || :key, :vector, :text, NULL, "
    "randomblob(16), NULL, 1700000000 FROM collections WHERE name = :namespace",
    edit="UPDATE embeddings SET content = :text "
    "WHERE '[' || collection_id || ', \"' || id || '\"]' = :key",
    whole=True,
    keyed=False,
    notes_dimension=False,
)
SHOPS = (AI_MEMORY, KEYED, KEYLESS, VEC, LLM)
"""All kinds of stores."""


@dataclass(frozen=True)
class Wish:
    """What a run is to do: the rows that it is about, and the vectors that they get."""

    shop: Shop
    before: Entries
    mode: str = "all"
    namespace: str | None = None
    clears: bool = False
    model: str = "m"
    dimension: int = 8
    retried: frozenset[str] = frozenset()
    _right: dict[str, Vector] = field(default_factory=dict, compare=False, repr=False)

    def meant(self, entry: Entry) -> bool:
        """Whether the run is about a row, by what it held before the run or was added with."""
        held = self.before[entry.key].vector if entry.key in self.before else entry.vector
        stamp = self.shop.stamps and self.shop.stamps.format(self.model)
        match self.mode:
            case "missing-only":
                chosen = held.raw is None
            case "skip-current-space":
                chosen = (held.stamp, held.dimension) != (stamp, self.dimension)
            case "retry-skipped":
                chosen = entry.key in self.retried
            case _:
                chosen = True
        return chosen and entry.chosen and self.namespace in (None, entry.namespace)

    def new(self, text: str) -> Vector:
        """The vector of a text, as a row is to hold it."""
        if text not in self._right:
            self._right[text] = self.shop.right(text, self.model, self.dimension)
        return self._right[text]

    def after(self, entry: Entry) -> Vector:
        """What a row must hold when the run has come to its end."""
        before = self.before[entry.key].vector
        if not self.meant(entry):
            return before
        if is_skipped(entry):
            return Vector(None) if self.clears else before
        return self.new(entry.text)


def edited(entry: Entry, dice: random.Random, shop: Shop) -> Entry:
    """The row with another text."""
    words = f"edited {dice.random()}"
    return entry._replace(text=shop.whole_text(entry.key, words))


def statement_text(entry: Entry, shop: Shop) -> Entry:
    """The row as a statement takes it, without what is set before its text."""
    return entry._replace(text=entry.text.removeprefix(shop.first.format(entry.key)))


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> Sequence[str]:
    """The keys of which two mappings hold different things."""
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
