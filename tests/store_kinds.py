"""Stores of each kind, for the tests that every store passes: `tests/test_stores.py`."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from llm.embeddings import Collection
from llm.models import EmbeddingModel
from sqlite_utils import Database

from reembed.transforms.embedders.fake import FakeEmbedder
from reembed.transforms.stores.codec import decode as decode_ai_memory
from reembed.transforms.stores.codec import encode as encode_ai_memory
from reembed.transforms.stores.formats import decode, encode
from reembed.transforms.stores.vec0 import connect
from tests.conftest import all_columns, make_store, memory

OLD_DIMENSION = 5
NEW_DIMENSION = 8

Held = tuple[list[float] | None, int | None, str | None]
"""What a row holds: its vector, and the dimension and model that are noted for it."""


@dataclass(frozen=True)
class Kind:
    """A kind of store: how one is made, and what the program is told of it."""

    name: str
    flags: tuple[str, ...] = ()
    space: str | None = "old"
    whole: bool = False

    def make(self, path: Path, texts: Sequence[str | None]) -> Path:
        """Make a store of such rows, with vectors of another model."""
        raise NotImplementedError

    def key(self, at: int) -> str:
        """What the program calls a row."""
        raise NotImplementedError

    def edit(self, at: int, text: str) -> str:
        """The statement that gives a row another text."""
        raise NotImplementedError

    def held(self, path: Path) -> list[Held]:
        """What the rows hold, in their order."""
        raise NotImplementedError

    def contents(self, path: Path) -> object:
        """All that is in the database, as far as it is the user's."""
        return all_columns(path)

    def text(self, text: str) -> str:
        """What is embedded of a row with such a text."""
        raise NotImplementedError

    def new(self, text: str, *, dimension: int = NEW_DIMENSION, prompt: str = "") -> Held:
        """What a row holds once it is moved to the fake embedder."""
        vector = FakeEmbedder(dimension).embed([prompt + self.text(text)])[0].tolist()
        return vector, dimension, self.space and "m"

    def old(self, at: int) -> Held:
        """What a row holds to begin with."""
        return old_vector(at).tolist(), OLD_DIMENSION, self.space


def old_vector(at: int) -> np.ndarray:
    """The vector of a row to begin with."""
    return np.random.default_rng(at).standard_normal(OLD_DIMENSION).astype(np.float32)


class AiMemory(Kind):
    """The default store."""

    def make(self, path: Path, texts: Sequence[str | None]) -> Path:
        rows = [
            memory(
                self.key(at),
                text,
                title="t",
                namespace=f"n{at}",  # In one, titles must differ.
                embedding=encode_ai_memory(old_vector(at)),
                embedding_dim=OLD_DIMENSION,
            )
            for at, text in enumerate(texts)
        ]
        return make_store(path, rows)

    def key(self, at: int) -> str:
        return f"{at:03d}"

    def edit(self, at: int, text: str) -> str:
        return f"UPDATE memories SET content = '{text}' WHERE id = '{self.key(at)}'"

    def text(self, text: str) -> str:
        return f"t {text}"

    def held(self, path: Path) -> list[Held]:
        query = "SELECT embedding, embedding_dim FROM memories ORDER BY id"
        return [
            (decode_ai_memory(vector).tolist(), dimension, self.space)
            for vector, dimension in rows_of(path, query)
        ]


@dataclass(frozen=True)
class Table(Kind):
    """A table with odd names, a key of two columns and a template; the rowid is nobody's key."""

    format: str = "f32le"

    def make(self, path: Path, texts: Sequence[str | None]) -> Path:
        with closing(sqlite3.connect(path)) as db, db:
            db.execute(
                'CREATE TABLE "play list" (artist INTEGER NOT NULL, "al""bum" TEXT NOT NULL, '
                'title TEXT, "body text" TEXT, "select" BLOB, größe INT, model TEXT, '
                'PRIMARY KEY (artist, "al""bum"))'
            )
            db.execute("CREATE TABLE other (a TEXT, b BLOB)")
            db.execute("INSERT INTO other VALUES ('a', x'00ff')")
            vectors = [encode(self.format, old_vector(at).tobytes()) for at in range(len(texts))]
            value = "CAST(? AS TEXT)" if self.format == "json" else "?"
            db.executemany(
                f'INSERT INTO "play list" VALUES (?, ?, ?, ?, {value}, {OLD_DIMENSION}, ?)',
                [
                    (at % 3, f"album {at}", "t", text, vectors[at], "old")
                    for at, text in enumerate(texts)
                ],
            )
        return path

    def key(self, at: int) -> str:
        return f'[{at % 3}, "album {at}"]'

    def edit(self, at: int, text: str) -> str:
        return f"""UPDATE "play list" SET "body text" = '{text}' WHERE "al""bum" = 'album {at}'"""

    def text(self, text: str) -> str:
        return f"t: {text}"

    def held(self, path: Path) -> list[Held]:
        query = 'SELECT CAST("select" AS BLOB), größe, model FROM "play list" ORDER BY rowid'
        return [
            (decode(self.format, vector).tolist(), dimension, model)
            for vector, dimension, model in rows_of(path, query)
        ]


class Old(EmbeddingModel):
    """A model of llm's, which gives the vectors of rows as they come."""

    model_id = "old"

    def embed_batch(
        self, items: Iterable[str | bytes], *, key: str | None = None
    ) -> Iterator[list[float]]:
        for at, _ in enumerate(items):
            yield old_vector(at).tolist()


class Llm(Kind):
    """A database that llm itself has made, of one collection."""

    def make(self, path: Path, texts: Sequence[str | None]) -> Path:
        with closing(sqlite3.connect(path)) as db:
            collection = Collection("notes", Database(db), model=Old())
            collection.embed_multi(
                ((f"item {at}", str(text)) for at, text in enumerate(texts)), store=True
            )
        return path

    def key(self, at: int) -> str:
        return f'[1, "item {at}"]'

    def edit(self, at: int, text: str) -> str:
        return f"UPDATE embeddings SET content = '{text}' WHERE id = 'item {at}'"

    def text(self, text: str) -> str:
        return text

    def held(self, path: Path) -> list[Held]:
        ((model,),) = rows_of(path, "SELECT model FROM collections")
        vectors = rows_of(path, "SELECT embedding FROM embeddings ORDER BY rowid")
        return [(decode("f32le", raw).tolist(), len(raw) // 4, model) for (raw,) in vectors]


@dataclass(frozen=True)
class Vec(Kind):
    """A vec0 table with all that one can have; the texts are its own, or another table's."""

    texts_apart: bool = False

    def make(self, path: Path, texts: Sequence[str | None]) -> Path:
        with closing(connect(path)) as db, db:
            db.execute(
                "CREATE VIRTUAL TABLE items USING vec0(item_id INTEGER PRIMARY KEY, "
                f"genre TEXT partition key, embedding float[{OLD_DIMENSION}] "
                "distance_metric=cosine, year INTEGER, +body TEXT, +extra BLOB)"
            )
            db.execute("CREATE TABLE notes (title TEXT, item INTEGER UNIQUE)")
            for at, text in enumerate(texts):
                vector = old_vector(at).tobytes()
                body = None if self.texts_apart else text
                row = (2 * at, "ab"[at % 2], vector, 2000 + at, body, b"\xff")
                db.execute("INSERT INTO items VALUES (?, ?, ?, ?, ?, ?)", row)
                db.execute("INSERT INTO notes VALUES (?, ?)", (text, 2 * at))
        return path

    def key(self, at: int) -> str:
        return str(2 * at)

    def edit(self, at: int, text: str) -> str:
        if self.texts_apart:
            return f"UPDATE notes SET title = '{text}' WHERE item = {2 * at}"
        return f"UPDATE items_auxiliary SET value00 = '{text}' WHERE rowid = {2 * at}"

    def text(self, text: str) -> str:
        return text

    def held(self, path: Path) -> list[Held]:
        with closing(connect(path)) as db:
            rows = db.execute("SELECT embedding FROM items ORDER BY item_id").fetchall()
        return [(decode("f32le", raw).tolist(), len(raw) // 4, None) for (raw,) in rows]

    def contents(self, path: Path) -> object:
        schema = "SELECT type, name, sql FROM sqlite_schema ORDER BY type, name"
        queries = (schema, "SELECT * FROM items ORDER BY item_id", "SELECT * FROM notes")
        with closing(connect(path)) as db:
            return [db.execute(query).fetchall() for query in queries]


def rows_of(path: Path, query: str) -> list[Any]:
    """The rows of a query over a connection of its own."""
    with closing(sqlite3.connect(path)) as db:
        return db.execute(query).fetchall()


def table(format: str) -> Table:
    """A table with vectors in a format."""
    flags = ["--table", "play list", "--text", "{title}: {body text}", "--vector", "select"]
    flags += ["--dim-column", "größe", "--space-column", "model", "--format", format]
    return Table(f"table {format}", tuple(flags), format=format)


APART = ("--text", "title", "--text-table", "notes", "--text-key", "item")
KINDS = [
    AiMemory("ai-memory", space=None),
    Vec("sqlite-vec", ("--text", "body"), None, whole=True),
    Vec("sqlite-vec with texts apart", APART, None, whole=True, texts_apart=True),
    Llm("llm", whole=True),
    *(table(name) for name in ("f32le", "f64le", "json")),
]
"""Stores of each kind."""
