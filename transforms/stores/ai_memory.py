"""The store of the public project ai-memory: table `memories` of its SQLite database.

Columns are probed, never assumed from the schema version, since they came one by one:
`embedding` (v3), `embedding_dim` (v18), `encrypted_envelope` (v44), `embedding_space` (v84).
A row's text is its title, one space and its content, with nothing trimmed.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from transforms.errors import StoreError
from transforms.rows import Cause, KeyRange, Row, Skipped, skipped_digest, text_digest
from transforms.stores import sqlite
from transforms.stores.codec import encode

TEXT_CAP_BYTES = 65_536
"""The longest text that is embedded, in bytes of UTF-8; exactly this many pass."""

# Titles and contents are taken as bytes: `length(text)` stops at a NUL, and one text that is
# not UTF-8 would fail the fetch of a whole range.
TEXT_BYTES = "ifnull(length(CAST(title AS BLOB)),0) + 1 + ifnull(length(CAST(content AS BLOB)),0)"


@dataclass(frozen=True)
class AiMemoryStore:
    """An ai-memory database, and the one namespace of it that is meant (None: all of them).

    A value: it is sent to workers, and each of its methods opens a connection of its own.
    """

    path: Path
    namespace: str | None
    wal: bool
    columns: frozenset[str]

    def cut_ranges(self, rows: int, samples: int) -> tuple[tuple[KeyRange, ...], tuple[str, ...]]:
        """Cut the table, in key order, into ranges of `rows` rows; also sample some keys.

        The first and the last range are open, so that every row there is or will be falls
        in exactly one. No ranges for no rows. `samples` is about how many keys are sampled.
        """
        return sqlite.read_only(
            self.path, wal=self.wal, query=lambda db: self._cut(db, rows, samples)
        )

    def read_range(self, keys: KeyRange) -> list[Row]:
        """Read the rows of a range, in key order."""
        return sqlite.read_only(self.path, wal=self.wal, query=lambda db: self.rows_in(db, keys))

    def read_texts(self, keys: Sequence[str]) -> list[str]:
        """Read the texts of a few rows; of encrypted rows and those over the cap, none."""

        select = f"SELECT {self._row_columns} FROM memories WHERE id = ?"

        def query(db: sqlite3.Connection) -> list[str]:
            rows = [_row(values) for key in keys for values in db.execute(select, (key,))]
            return [row.text for row in rows if row.skipped is None]

        return sqlite.read_only(self.path, wal=self.wal, query=query)

    def check_writable(self) -> None:
        """Raise StoreError if the database is read-only, stopped, or locked for over 5 s."""
        sqlite.read_only(self.path, wal=self.wal, query=self._check_recording)
        sqlite.check_writable(self.path)

    @contextmanager
    def replacing(self) -> Iterator[Replacement]:
        """One transaction in which rows are read and their vectors replaced."""
        with sqlite.write_transaction(
            self.path, busy_seconds=sqlite.COMMIT_BUSY_SECONDS
        ) as connection:
            self._check_recording(connection)
            yield Replacement(self, connection)

    def _check_recording(self, db: sqlite3.Connection) -> None:
        """Obey a record-stop: the newest of the events that stop and resume all writing."""
        if db.execute("SELECT 1 FROM sqlite_schema WHERE name = 'signed_events'").fetchone():
            newest = db.execute(
                "SELECT event_type FROM signed_events WHERE event_type IN "
                "('substrate.record_stop', 'substrate.record_resume') "
                "ORDER BY sequence DESC, rowid DESC LIMIT 1"
            ).fetchone()
            if newest == ("substrate.record_stop",):
                raise StoreError(
                    f"a record-stop is in force in {self.path}, and no program may write to it; "
                    "resume recording with ai-memory and run again"
                )

    def rows_in(self, db: sqlite3.Connection, keys: KeyRange) -> list[Row]:
        """Read the rows of a range over a connection, in key order."""
        conditions, values = [], []
        if keys.after is not None:
            conditions.append("id > ?")
            values.append(keys.after)
        if keys.until is not None:
            # A TEXT PRIMARY KEY may be NULL; such rows sort first, so the first range has them.
            conditions.append("id <= ?")
            values.append(keys.until)
        if self.namespace is not None:
            # The plus keeps SQLite on the key's index; the namespace's would cost a scan a range.
            conditions.append("+namespace = ?")
            values.append(self.namespace)
        where = " AND ".join(conditions) or "TRUE"
        select = f"SELECT {self._row_columns} FROM memories WHERE "
        rows = db.execute(f"{select} {where} ORDER BY id", values).fetchall()
        if keys.after is None and keys.until is not None:
            where = where.replace("id <= ?", "id IS NULL")
            rows = db.execute(f"{select} {where}", values[1:]).fetchall() + rows
        return [_row(row) for row in rows]

    @property
    def _row_columns(self) -> str:
        encrypted = self.encrypted
        fits = f"{TEXT_BYTES} <= {TEXT_CAP_BYTES} AND NOT {encrypted}"
        return (
            f"rowid, CASE typeof(id) WHEN 'text' THEN CAST(id AS BLOB) END, {encrypted}, "
            f"{TEXT_BYTES}, CASE WHEN {fits} THEN ifnull(CAST(title AS BLOB), x'') END, "
            f"CASE WHEN {fits} THEN ifnull(CAST(content AS BLOB), x'') END"
        )

    @property
    def encrypted(self) -> str:
        """The SQL condition for a row whose content is only the placeholder of a sealed one."""
        return "encrypted_envelope IS NOT NULL" if "encrypted_envelope" in self.columns else "FALSE"

    def _cut(
        self, db: sqlite3.Connection, rows: int, samples: int
    ) -> tuple[tuple[KeyRange, ...], tuple[str, ...]]:
        where, values = (
            ("TRUE", ()) if self.namespace is None else ("namespace = ?", (self.namespace,))
        )
        total = db.execute(f"SELECT count(*) FROM memories WHERE {where}", values).fetchone()[0]
        keys = db.execute(
            f"SELECT CAST(id AS BLOB) FROM memories WHERE {where} AND typeof(id) = 'text' "
            "ORDER BY id",
            values,
        )
        borders: list[str] = []
        sampled: list[str] = []
        every = max(1, -(-total // samples))
        since_border = 0
        for position, (raw,) in enumerate(keys):
            since_border += 1
            if since_border < rows and position % every:
                continue
            key = _utf8(raw)
            if key is None:
                continue
            if position % every == 0:
                sampled.append(key)
            if since_border >= rows:
                borders.append(key)
                since_border = 0
        return _ranges(borders, total, rows), tuple(sampled)


class Replacement:
    """The inside of a replacing transaction."""

    def __init__(self, store: AiMemoryStore, db: sqlite3.Connection) -> None:
        self._store = store
        self._db = db

    def read_range(self, keys: KeyRange) -> list[Row]:
        """Read the rows of a range as this transaction sees them, in key order."""
        return self._store.rows_in(self._db, keys)

    def put(self, vectors: Sequence[tuple[int, bytes]], *, dimension: int, model: str) -> None:
        """Store vectors (rowid, little-endian float32); nothing else of a row changes.

        Written in the order of rowids, the file's own: twice as fast as in that of keys.
        """
        described = {"embedding_dim": dimension, "embedding_space": space_stamp(model)}
        columns = [column for column in described if column in self._store.columns]
        values = [described[column] for column in columns]
        changes = ", ".join(f"{column} = ?" for column in ["embedding", *columns])
        written = self._db.executemany(
            f"UPDATE memories SET {changes} WHERE rowid = ?",
            ((encode(np.frombuffer(raw, "<f4")), *values, rowid) for rowid, raw in sorted(vectors)),
        ).rowcount
        if written != len(vectors):
            raise StoreError(
                f"SQLite replaced {written} of {len(vectors)} vectors of {self._store.path}; "
                "the transaction was undone and the store is unchanged"
            )


def open_store(path: Path, namespace: str | None = None) -> AiMemoryStore:
    """Look at a database and describe it; raise StoreError if it is no ai-memory store."""
    path = real_path(path)  # SQLite's side files lie beside the real file, not beside a link.
    wal = sqlite.check_file(path)
    kind, tables, columns, encoding = sqlite.read_only(path, wal=wal, query=_schema)
    if kind != "table" or not {"id", "namespace", "title", "content"} <= columns:
        found = f"its tables are {', '.join(tables)}" if tables else "it has no tables"
        raise StoreError(
            f"{path} is not an ai-memory database: it has no table 'memories' with id, namespace, "
            f"title and content ({found}); name the right file with --db"
        )
    if "embedding" not in columns:
        raise StoreError(
            f"{path} is an ai-memory database from before it kept vectors (no column 'embedding'); "
            "let a newer ai-memory open it once"
        )
    if encoding != "UTF-8":
        raise StoreError(
            f"{path} stores its texts as {encoding}, which ai-memory never does; "
            "copy it into a UTF-8 database first"
        )
    return AiMemoryStore(path=path, namespace=namespace, wal=wal, columns=columns)


def recover_store(path: Path) -> None:
    """Let SQLite roll back a write that another process left half done, if there is one.

    A read-only connection can't do it. Raises StoreError if the file can't be written.
    """
    path = real_path(path)
    if Path(f"{path}-journal").exists():
        sqlite.check_file(path)
        sqlite.check_writable(path)


def real_path(path: Path) -> Path:
    """The path of the file itself, without symbolic links."""
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise StoreError(f"{path} can't be read ({error}); check its name") from None


def space_stamp(model: str) -> str:
    """The name ai-memory gives to a model's vector space: its column `embedding_space`.

    >>> space_stamp("all-MiniLM-L6-v2 (384-dim, local)")
    'sentence-transformers/all-minilm-l6-v2#none'
    """
    name = model.partition(" (")[0].strip().lower()
    name = _FAMILIES.get(name, name.removesuffix(":latest"))
    return f"{name}#{'nomic-task-v1' if 'nomic-embed' in name else 'none'}"


_MINILM = "sentence-transformers/all-minilm-l6-v2"
_NOMIC = "nomic-ai/nomic-embed-text-v1.5"
_FAMILIES = {
    "mini_lm_l6_v2": _MINILM,
    "all-minilm-l6-v2": _MINILM,
    "all-minilm": _MINILM,
    "nomic_embed_v15": _NOMIC,
    "nomic-embed-text": _NOMIC,
    "nomic-embed-text-v1.5": _NOMIC,
}


def _schema(db: sqlite3.Connection) -> tuple[str | None, list[str], frozenset[str], str]:
    kind = db.execute("SELECT type FROM sqlite_schema WHERE name = 'memories'").fetchone()
    tables = db.execute("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name LIMIT 8")
    columns = db.execute("SELECT name FROM pragma_table_info('memories')")
    return (
        kind[0] if kind else None,
        [name for (name,) in tables],
        frozenset(name for (name,) in columns),
        db.execute("PRAGMA encoding").fetchone()[0],
    )


def _ranges(borders: Sequence[str], total: int, rows: int) -> tuple[KeyRange, ...]:
    """Make ranges that end at the borders, the last one open.

    >>> [(r.after, r.until, r.rows) for r in _ranges(["b", "d"], total=5, rows=2)]
    [(None, 'b', 2), ('b', 'd', 2), ('d', None, 1)]
    """
    if total == 0:
        return ()
    if total == rows * len(borders):
        borders = borders[:-1]  # The last range takes its rows and stays open.
    starts = [None, *borders]
    ends = [*borders, None]
    left = total - rows * len(borders)
    counts = [rows] * len(borders) + [left]
    return tuple(
        KeyRange(index, after, until, count)
        for index, (after, until, count) in enumerate(zip(starts, ends, counts, strict=True))
    )


def _row(values: tuple[int, bytes | None, int, int, bytes | None, bytes | None]) -> Row:
    rowid, raw_key, encrypted, size, title, content = values
    raw_text = None if title is None or content is None else title + b" " + content
    key, text = _utf8(raw_key), _utf8(raw_text)
    cause, reason = Cause.NOT_TEXT, ""
    if key is None:
        key, reason = f"rowid {rowid}", "its id is not text"
    elif encrypted:
        cause, reason = Cause.ENCRYPTED, "its content is encrypted"
    elif size > TEXT_CAP_BYTES:
        cause = Cause.OVER_CAP
        reason = f"content {size} bytes exceeds embed cap {TEXT_CAP_BYTES} bytes"
    elif text is None or raw_text is None:
        reason = "its text is not valid UTF-8"
    else:
        return Row(key, rowid, text, text_digest(raw_text))
    skipped = Skipped(key, cause, reason)
    return Row(key, rowid, "", skipped_digest(skipped), skipped)


def _utf8(raw: bytes | None) -> str | None:
    try:
        return None if raw is None else raw.decode()
    except UnicodeDecodeError:
        return None
