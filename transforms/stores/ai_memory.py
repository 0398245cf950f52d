"""The store of the public project ai-memory: table `memories` of its SQLite database.

Columns are probed, never assumed from the schema version, since they came one by one:
`embedding` (v3), `embedding_dim` (v18), `encrypted_envelope` (v44), `embedding_space` (v84).
A row's text is its title, one space and its content, with nothing trimmed.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

from transforms.errors import StampError, StoreError
from transforms.modes import Mode
from transforms.rows import (
    Cause,
    KeyRange,
    Row,
    Skipped,
    Stored,
    skipped_digest,
    text_digest,
)
from transforms.stores import sqlite
from transforms.stores.codec import with_header

TEXT_CAP_BYTES = 65_536
"""The longest text that is embedded, in bytes of UTF-8; exactly this many pass."""

# Titles and contents are taken as bytes: `length(text)` stops at a NUL, and one text that is
# not UTF-8 would fail the fetch of a whole range.
TEXT_BYTES = "ifnull(length(CAST(title AS BLOB)),0) + 1 + ifnull(length(CAST(content AS BLOB)),0)"


@dataclass(frozen=True)
class Selection:
    """The rows that are meant, beyond their namespace.

    `stamp` and `dimension` are those of the target, for the modes that look at what a row has;
    `keys` are the rows of the mode that names them.
    """

    mode: Mode = Mode.ALL
    stamp: str = ""
    dimension: int = 0
    keys: frozenset[str] | None = None


@dataclass(frozen=True)
class AiMemoryStore:
    """An ai-memory database, and the one namespace of it that is meant (None: all of them).

    A value: it is sent to workers, and each of its methods opens a connection of its own.
    """

    path: Path
    namespace: str | None
    wal: bool
    columns: frozenset[str]
    selection: Selection = Selection()

    def select(
        self, mode: Mode, *, model: str, dimension: int, keys: frozenset[str] | None = None
    ) -> AiMemoryStore:
        """The same store, with only the rows meant that a mode is about.

        Raises StampError if the mode looks at stamps and the store has none.
        """
        if mode in (Mode.SKIP_CURRENT_SPACE, Mode.STAMP_ONLY) and "embedding_space" not in (
            self.columns
        ):
            raise StampError(
                f"{self.path} keeps no stamps (it has no column embedding_space), so it can't be "
                f"told which model made a vector; run without --{mode.replace(' ', '-')}"
            )
        return replace(self, selection=Selection(mode, space_stamp(model), dimension, keys))

    def cut_ranges(self, rows: int, samples: int) -> tuple[tuple[KeyRange, ...], tuple[str, ...]]:
        """Cut the table, in key order, into ranges of `rows` rows; also sample some keys.

        The first and the last range are open, so that every row there is or will be falls
        in exactly one. No ranges for no rows. `samples` is about how many keys are sampled.
        """
        return sqlite.read_only(
            self.path, wal=self.wal, query=lambda db: self._cut(db, rows, samples)
        )

    def read_range(self, keys: KeyRange, *, with_stored: bool = False) -> list[Row]:
        """Read the rows of a range that are meant, in key order.

        With what is stored: all rows of the namespace, and whether they are meant.
        """
        return sqlite.read_only(
            self.path,
            wal=self.wal,
            query=lambda db: self.rows_in(db, keys, with_stored=with_stored),
            busy_seconds=sqlite.COMMIT_BUSY_SECONDS,
        )

    def read_texts(self, keys: Sequence[str]) -> list[str]:
        """Read the texts of a few rows; of encrypted rows and those over the cap, none."""

        select = f"SELECT {self._row_columns} FROM memories WHERE id = :key"

        def query(db: sqlite3.Connection) -> list[str]:
            rows = [
                _row(values)
                for key in keys
                for values in db.execute(select, self.values | {"key": key})
            ]
            return [row.text for row in rows if row.skipped is None]

        return sqlite.read_only(self.path, wal=self.wal, query=query)

    def check_access(self) -> None:
        """Raise StoreError if this user may not write the database."""
        sqlite.check_access(self.path)

    def check_writable(self) -> None:
        """Raise StoreError if the database is read-only, stopped, or locked for over 5 s."""
        sqlite.read_only(self.path, wal=self.wal, query=self.check_recording)
        sqlite.check_writable(self.path)

    def check_sound(self) -> None:
        """Raise StoreError if SQLite finds damage in the file."""
        found = sqlite.read_only(self.path, wal=self.wal, query=sqlite.find_damage)
        if found:
            raise StoreError(
                f"{self.path} is damaged ({found[0]}); its vectors are not replaced, lest the "
                "damage spread: restore or repair it, and run again (PRAGMA integrity_check says "
                "more)"
            )

    def describe(self, vector: bytes | None, *, model: str, dimension: int) -> Stored:
        """What a row holds once it has a vector of a model (little-endian float32), or none."""
        if vector is None:
            return Stored(None, _described_all(self.columns, None, None))
        return Stored(with_header(vector), _described_all(self.columns, dimension, model))

    @contextmanager
    def replacing(self) -> Iterator[Replacement]:
        """A connection over which rows are read and their vectors replaced."""
        with sqlite.write_connection(self.path) as connection:
            yield Replacement(self, connection)

    def check_recording(self, db: sqlite3.Connection) -> None:
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

    def rows_in(self, db: sqlite3.Connection, keys: KeyRange, *, with_stored: bool) -> list[Row]:
        """Read the rows of a range over a connection, in key order; see `read_range`."""
        conditions = []
        if keys.after is not None:
            conditions.append("id > :after")
        if keys.until is not None:
            # A TEXT PRIMARY KEY may be NULL; such rows sort first, so the first range has them.
            conditions.append("id <= :until")
        if self.namespace is not None:
            # The plus keeps SQLite on the key's index; the namespace's would cost a scan a range.
            conditions.append("+namespace = :namespace")
        if not with_stored:
            conditions.append(self.meant)
        where = " AND ".join(conditions) or "TRUE"
        columns = self._row_columns + (f", {self._stored_columns}" if with_stored else "")
        select = f"SELECT {columns} FROM memories WHERE "
        values = self.values | {"after": keys.after, "until": keys.until}
        found = db.execute(f"{select} {where} ORDER BY id", values).fetchall()
        if keys.after is None and keys.until is not None:
            where = where.replace("id <= :until", "id IS NULL")
            found = db.execute(f"{select} {where}", values).fetchall() + found
        rows = [_row(row) for row in found]
        named = self.selection.keys
        if named is None:
            return rows
        if with_stored:
            return [row._replace(meant=row.key in named) for row in rows]
        return [row for row in rows if row.key in named]

    @property
    def meant(self) -> str:
        """The SQL condition for a row that the run is about."""
        lengths = "length(embedding) IN (4 * :dimension, 1 + 4 * :dimension)"
        match self.selection.mode:
            case Mode.MISSING_ONLY:
                return "embedding IS NULL"
            case Mode.SKIP_CURRENT_SPACE:
                return f"NOT (ifnull(embedding_space, '') = :stamp AND ifnull({lengths}, FALSE))"
            case Mode.STAMP_ONLY:
                return f"ifnull(embedding_space, '') <> :stamp AND ifnull({lengths}, FALSE)"
            case _:
                return "TRUE"

    @property
    def values(self) -> dict[str, Any]:
        """What is bound to the names in the conditions."""
        selection = self.selection
        return {
            "namespace": self.namespace,
            "stamp": selection.stamp,
            "dimension": selection.dimension,
        }

    @property
    def _row_columns(self) -> str:
        encrypted = self.encrypted
        fits = f"{TEXT_BYTES} <= {TEXT_CAP_BYTES} AND NOT {encrypted}"
        return (
            f"rowid, CASE typeof(id) WHEN 'text' THEN CAST(id AS BLOB) END, {encrypted}, "
            f"{TEXT_BYTES}, CASE WHEN {fits} THEN ifnull(CAST(title AS BLOB), x'') END, "
            f"CASE WHEN {fits} THEN ifnull(CAST(content AS BLOB), x'') END, "
            f"CAST(namespace AS BLOB), {self.meant}"
        )

    @property
    def _stored_columns(self) -> str:
        """What a replacement touches, for `_stored`: the vector's bytes, the rest, the floats.

        hex() shows a text's or a BLOB's bytes and an integer's digits, but not all of a float.
        """
        columns = [column for column in REPLACED_COLUMNS if column in self.columns]
        others = [f"'{column}=' || typeof({column}) || ':' || hex({column})" for column in columns]
        odd = (
            "CASE WHEN typeof(embedding) IN ('null', 'blob') THEN '' "
            "ELSE ' embedding=' || typeof(embedding) || ':' || hex(embedding) END"
        )
        described = " || ' ' || ".join(others) or "''"
        floats = [
            f", CASE typeof({column}) WHEN 'real' THEN {column} END"
            for column in (*columns, "embedding")
        ]
        vector = "CASE typeof(embedding) WHEN 'blob' THEN embedding END"
        return f"{vector}, {described} || {odd}{''.join(floats)}"

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
    """A connection that replaces vectors, in one transaction or several."""

    def __init__(self, store: AiMemoryStore, db: sqlite3.Connection) -> None:
        self._store = store
        self._db = db

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """One transaction, which keeps other writers off from its start."""
        with sqlite.write_transaction(self._db, busy_seconds=sqlite.COMMIT_BUSY_SECONDS):
            self._store.check_recording(self._db)
            yield

    @property
    def version(self) -> int:
        """A number that stays while nothing but this connection changes the database."""
        return sqlite.data_version(self._db)

    @property
    def fires_triggers(self) -> bool:
        """Whether a trigger of the database runs when a vector is replaced."""
        columns = ["embedding", *(c for c in REPLACED_COLUMNS if c in self._store.columns)]
        settings = ", ".join(f"{column} = NULL" for column in columns)
        return sqlite.fires_triggers(self._db, f"UPDATE memories SET {settings} WHERE rowid = 1")

    def read_range(self, keys: KeyRange) -> list[Row]:
        """Read the rows of a range as this transaction sees them, with what they hold."""
        return self._store.rows_in(self._db, keys, with_stored=True)

    def put(self, changes: Sequence[tuple[int, Stored]]) -> None:
        """Store what rows (by rowid) are to hold; nothing else of a row changes.

        Written in the order of rowids, the file's own: twice as fast as in that of keys.
        """
        written = 0
        ordered = sorted(changes, key=lambda change: change[0])
        for others, group in groupby(ordered, key=lambda change: change[1].others):
            columns = _parsed(others)
            settings = ", ".join(f"{column} = {place}" for column, place, _ in columns)
            values = [value for _, _, value in columns]
            odd = any(column == "embedding" for column, _, _ in columns)
            first = "" if odd else "embedding = ?" + (", " if settings else "")
            written += self._db.executemany(
                f"UPDATE memories SET {first}{settings} WHERE rowid = ?",
                ((*([] if odd else [row.vector]), *values, rowid) for rowid, row in group),
            ).rowcount
        if written != len(changes):
            raise StoreError(
                f"SQLite wrote {written} of {len(changes)} rows of {self._store.path}; "
                "the transaction was undone and the store is as it was"
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


REPLACED_COLUMNS = ("embedding_dim", "embedding_space")
"""The columns that a replacement sets besides the vector, where they exist."""


@lru_cache(maxsize=8)
def _described_all(columns: frozenset[str], dimension: int | None, model: str | None) -> str:
    """Describe what is replaced besides the vector, for a store that has these columns."""
    values: dict[str, int | str | None] = {
        "embedding_dim": dimension,
        "embedding_space": None if model is None else space_stamp(model),
    }
    return " ".join(
        _described(column, value) for column, value in values.items() if column in columns
    )


def _described(column: str, value: int | str | None) -> str:
    """Describe what a column holds: its name, its type in SQLite and its bytes.

    >>> _described("embedding_dim", 384), _described("embedding_space", None)
    ('embedding_dim=integer:333834', 'embedding_space=null:')
    """
    kind = {int: "integer", str: "text", type(None): "null"}[type(value)]
    content = "" if value is None else str(value)
    return f"{column}={kind}:{content.encode().hex().upper()}"


@lru_cache(maxsize=64)
def _parsed(others: str) -> tuple[tuple[str, str, Any], ...]:
    """Read what `_described` gave: (column, placeholder, value) for each.

    >>> _parsed("embedding_dim=integer:333834 embedding_space=text:61")
    (('embedding_dim', '?', 384), ('embedding_space', 'CAST(? AS TEXT)', b'a'))
    """
    return tuple(_parsed_column(described) for described in others.split())


def _parsed_column(described: str) -> tuple[str, str, Any]:
    column, _, value = described.partition("=")
    kind, _, digits = value.partition(":")
    content = bytes.fromhex(digits)
    match kind:
        case "null":
            return column, "?", None
        case "integer":
            return column, "?", int(content)
        case "real":
            return column, "?", float.fromhex(content.decode())
        case "text":  # As bytes, which need not be UTF-8.
            return column, "CAST(? AS TEXT)", content
        case _:
            return column, "?", content


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


def _row(values: Sequence[Any]) -> Row:
    rowid, raw_key, encrypted, size, title, content, raw_namespace, meant, *rest = values
    raw_text = None if title is None or content is None else title + b" " + content
    key, text = _utf8(raw_key), _utf8(raw_text)
    namespace = (raw_namespace or b"").decode(errors="replace")
    stored = _stored(*rest) if rest else None
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
        digest = text_digest(raw_text)
        return Row(key, rowid, text, digest, None, namespace, bool(meant), stored)
    skipped = Skipped(key, cause, reason, namespace)
    return Row(key, rowid, "", skipped_digest(skipped), skipped, namespace, bool(meant), stored)


def _stored(vector: bytes | None, others: str, *floats: float | None) -> Stored:
    """What a row holds; floats are described to their last bit.

    >>> _stored(None, "embedding_dim=real:302E33", 0.1 + 0.2, None).others
    'embedding_dim=real:3078312E33333333333333333333333334702D32'
    """
    if "=real:" not in others:
        return Stored(vector, others)
    exact = (value.hex().encode().hex().upper() for value in floats if value is not None)
    # They stand in the order of the columns.
    return Stored(vector, re.sub(r"(?<==real:)[0-9A-F]+", lambda _: next(exact), others))


def _utf8(raw: bytes | None) -> str | None:
    try:
        return None if raw is None else raw.decode()
    except UnicodeDecodeError:
        return None
