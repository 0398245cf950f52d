"""The store of the public project ai-memory: table `memories` of its SQLite database.

Columns are probed, never assumed from the schema version, since they came one by one:
`embedding` (v3), `embedding_dim` (v18), `encrypted_envelope` (v44), `lifecycle_state` (v64),
`embedding_space` (v84).
A row's text is its title, one space and its content, with nothing trimmed.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reembed.transforms.errors import StoreError
from reembed.transforms.rows import (
    Cause,
    KeyRange,
    Row,
    Skipped,
    Stored,
    contents_digest,
    skipped_digest,
    text_digest,
)
from reembed.transforms.stores import sqlite
from reembed.transforms.stores.base import (
    Store,
    Surveyed,
    describe_value,
    stored_values,
    utf8,
)
from reembed.transforms.stores.codec import decode, with_header
from reembed.transforms.stores.vec0 import needs_vec0

COLUMNS = frozenset(["id", "namespace", "title", "content"])
"""What tells the table `memories`."""

TEXT_CAP_BYTES = 65_536
"""The longest text that is embedded, in bytes of UTF-8; exactly this many pass."""

VISIBLE_STATES = ("open", "active", "blocked", "done", "abandoned")
"""The states of a row (`lifecycle_state`) that ai-memory shows; it hides all others.

Those are tombstoned and quarantined ones, of which newer versions may know more.
"""

# Titles and contents are taken as bytes: `length(text)` stops at a NUL, and one text that is
# not UTF-8 would fail the fetch of a whole range.
TEXT_BYTES = "ifnull(length(CAST(title AS BLOB)),0) + 1 + ifnull(length(CAST(content AS BLOB)),0)"

# 4n bytes are n floats; one byte more is the header. Any other length can't be decoded.
_BLOB_DIMENSION = (
    "CASE WHEN length(embedding) % 4 <= 1 AND length(embedding) >= 4 "
    "THEN length(embedding) / 4 ELSE 0 END"
)


@dataclass(frozen=True)
class AiMemoryStore(Store):
    """An ai-memory database, and the one namespace of it that is meant (None: all of them).

    With `no_hidden`, rows in a state that ai-memory does not show are not selected.
    """

    columns: frozenset[str] = field(kw_only=True)
    no_hidden: bool = field(default=False, kw_only=True)
    rowid_name: str = field(default="rowid", kw_only=True)

    kind = "ai-memory"
    described = "an ai-memory database"
    ordered_by_key = True
    space_name = "embedding_space"
    table = "memories"
    vector_column = "embedding"
    no_stamps = "it has no column embedding_space"

    @property
    def config(self) -> Mapping[str, Any]:
        """What is needed besides the path to open it again."""
        return {"kind": self.kind} | ({"no_hidden": True} if self.no_hidden else {})

    @property
    def rowid(self) -> str:
        """A row's number as SQL names it."""
        return self.rowid_name

    def late_columns(self, db: sqlite3.Connection) -> Sequence[str]:
        """Columns that a replacement would set, and that were added since the store was opened."""
        names = {name for (name,) in db.execute("SELECT name FROM pragma_table_info('memories')")}
        return [name for name in REPLACED_COLUMNS if name in names - self.columns]

    @property
    def replaced_columns(self) -> dict[str, str]:
        """The columns that a replacement sets besides the vector, those that there are."""
        return {column: column for column in REPLACED_COLUMNS if column in self.columns}

    def space(self, model: str) -> str | None:
        """The name ai-memory gives to a model's vector space, if it keeps one."""
        return space_stamp(model) if "embedding_space" in self.columns else None

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

        return self.read_only(query)

    def describe(self, vector: bytes | None, *, model: str, dimension: int) -> Stored:
        """What a row holds once it has a vector of a model (little-endian float32), or none."""
        if vector is None:
            return Stored(None, _described_all(self.columns, None, None))
        return Stored(with_header(vector), _described_all(self.columns, dimension, model))

    def decode(self, vector: bytes) -> NDArray[np.float32]:
        """Turn a BLOB into a vector of shape (dimension,); raise ValueError if it is none."""
        return decode(vector)

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
        columns = self._row_columns + (f", {self.stored_columns}" if with_stored else "")
        select = f"SELECT {columns} FROM memories WHERE "
        values = self.values | {"after": keys.after, "until": keys.until}
        found = db.execute(f"{select} {where} ORDER BY id", values).fetchall()
        if keys.after is None and keys.until is not None:
            where = where.replace("id <= :until", "id IS NULL")
            found = db.execute(f"{select} {where}", values).fetchall() + found
        return self.named_only([_row(row) for row in found], with_stored=with_stored)

    @property
    def meant(self) -> str:
        """The SQL condition for a row that the run is about."""
        selected = super().meant
        return f"({selected}) AND NOT {self._hidden}" if self.no_hidden else selected

    @property
    def _hidden(self) -> str:
        """The SQL condition for a row that ai-memory does not show."""
        if "lifecycle_state" not in self.columns:
            return "FALSE"
        shown = ", ".join(f"'{state}'" for state in VISIBLE_STATES)
        return f"ifnull(lifecycle_state NOT IN ({shown}), FALSE)"

    def count_hidden(self, db: sqlite3.Connection) -> dict[str, int]:
        """Count the rows that ai-memory does not show, by state."""
        if "lifecycle_state" not in self.columns:
            return {}
        counted = db.execute(
            "SELECT CAST(lifecycle_state AS BLOB), count(*) FROM memories "
            f"WHERE {self._hidden} AND (:namespace IS NULL OR namespace = :namespace) "
            "GROUP BY 1 ORDER BY 2 DESC, 1",
            self.values,
        )
        return {state.decode(errors="replace"): count for state, count in counted}

    @property
    def fits(self) -> str:
        """The SQL condition for a vector of the target's length, with its first byte or without."""
        return "ifnull(length(embedding) IN (4 * :dimension, 1 + 4 * :dimension), FALSE)"

    @property
    def _row_columns(self) -> str:
        encrypted = self.encrypted
        fits = f"{TEXT_BYTES} <= {TEXT_CAP_BYTES} AND NOT {encrypted}"
        sealed = "encrypted_envelope" if "encrypted_envelope" in self.columns else "NULL"
        all_of_it = ", ".join(
            f"CAST({column} AS BLOB)" for column in ("id", "title", "content", sealed)
        )
        return (
            f"{self.rowid}, CASE WHEN NOT ({fits}) OR typeof(id) <> 'text' "
            f"THEN contents_digest({all_of_it}) END, "
            f"CASE typeof(id) WHEN 'text' THEN CAST(id AS BLOB) END, {encrypted}, "
            f"{TEXT_BYTES}, CASE WHEN {fits} THEN ifnull(CAST(title AS BLOB), x'') END, "
            f"CASE WHEN {fits} THEN ifnull(CAST(content AS BLOB), x'') END, "
            f"CAST(namespace AS BLOB), {self.meant}"
        )

    @property
    def encrypted(self) -> str:
        """The SQL condition for a row whose content is only the placeholder of a sealed one."""
        return "encrypted_envelope IS NOT NULL" if "encrypted_envelope" in self.columns else "FALSE"

    def survey(self, db: sqlite3.Connection) -> Iterator[Surveyed]:
        """Look at each row of the namespace.

        Counting them takes half the time of SQLite's GROUP BY, which sorts the whole table.
        """
        return db.execute(
            f"SELECT {self.namespace_of()}, "
            f"CASE WHEN embedding IS NOT NULL THEN {self.dimension_of(db)} END, "
            f"CASE WHEN {self.encrypted} THEN '{Cause.ENCRYPTED}' "
            f"WHEN {TEXT_BYTES} > {TEXT_CAP_BYTES} THEN '{Cause.OVER_CAP}' "
            f"WHEN typeof(id) <> 'text' THEN '{Cause.NOT_TEXT}' END, {self.meant}, "
            # Of a BLOB, SQLite says the length without reading it.
            "CASE typeof(embedding) WHEN 'blob' THEN length(embedding) "
            "ELSE ifnull(length(CAST(embedding AS BLOB)), 0) END "
            f"FROM memories WHERE {self.in_scope(db)}",
            self.values,
        )

    def dimension_of(self, db: sqlite3.Connection) -> str:
        """The SQL expression for the dimension of a vector: as it is noted, else by its length."""
        if "embedding_dim" not in self.columns:
            return _BLOB_DIMENSION
        sound = "typeof(embedding_dim) = 'integer' AND embedding_dim > 0"
        return f"CASE WHEN {sound} THEN embedding_dim ELSE {_BLOB_DIMENSION} END"

    def in_scope(self, db: sqlite3.Connection) -> str:
        """The SQL condition for a row of the namespace."""
        return "(:namespace IS NULL OR namespace = :namespace)"

    def namespace_of(self) -> str:
        """The SQL expression for a row's namespace, as bytes."""
        return "CAST(namespace AS BLOB)"

    def namespaces(self, db: sqlite3.Connection) -> tuple[str, ...]:
        """All namespaces that there are."""
        names = db.execute("SELECT DISTINCT CAST(namespace AS BLOB) FROM memories ORDER BY 1")
        return tuple((raw or b"").decode(errors="replace") for (raw,) in names)

    def places(self, db: sqlite3.Connection) -> tuple[int, Iterator[str | None]]:
        """The number of rows, and the key of each in order; None for one that is not text."""
        where = "TRUE" if self.namespace is None else "namespace = :namespace"
        counted = db.execute(f"SELECT count(*) FROM memories WHERE {where}", self.values)
        keys = db.execute(
            f"SELECT CAST(id AS BLOB) FROM memories WHERE {where} AND typeof(id) = 'text' "
            "ORDER BY id",
            self.values,
        )
        return counted.fetchone()[0], (utf8(raw) for (raw,) in keys)


def is_ai_memory(db: sqlite3.Connection) -> bool:
    """Whether a database is ai-memory's, by its table and the columns of it."""
    names = db.execute("SELECT name FROM pragma_table_info('memories')")
    return {name for (name,) in names} >= COLUMNS


def open_ai_memory(
    path: Path, namespace: str | None, *, wal: bool, no_hidden: bool = False
) -> AiMemoryStore:
    """Look at a database and describe it; raise StoreError if it is no ai-memory store."""
    kind, tables, columns, encoding, rowid = sqlite.read_only(path, wal=wal, query=_schema)
    if kind != "table" or not columns >= COLUMNS:
        found = f"its tables are {', '.join(tables)}" if tables else "it has no tables"
        raise StoreError(
            f"{path} is not an ai-memory database: it has no table 'memories' with id, namespace, "
            f"title and content ({found}); name the right file with --db"
        )
    if "embedding" not in columns:
        raise StoreError(
            f"{path} is an ai-memory database from before it kept vectors (no column 'embedding'); "
            "let a newer ai-memory open it once, or give the column back its name if it had one"
        )
    if encoding != "UTF-8":
        raise StoreError(
            f"{path} stores its texts as {encoding}, which ai-memory never does; "
            "copy it into a UTF-8 database first"
        )
    if rowid is None:
        raise StoreError(sqlite.hidden_rowid("memories"))
    store = AiMemoryStore(
        path=path,
        namespace=namespace,
        wal=wal,
        columns=columns,
        no_hidden=no_hidden,
        rowid_name=rowid,
    )
    if twice := store.read_only(lambda db: sqlite.find_twice(db, "memories", ["id"])):
        raise StoreError(
            f"two rows of the table memories of {path} have the id {twice}, so it does not name a "
            "row, and neither could get back its own vector; delete one of them, and make id the "
            "primary key again"
        )
    needs = store.read_only(lambda db: needs_vec0(db, store.update_statement))
    return replace(store, vec0_triggers=needs)


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
        describe_value(column, value) for column, value in values.items() if column in columns
    )


def _schema(
    db: sqlite3.Connection,
) -> tuple[str | None, list[str], frozenset[str], str, str | None]:
    kind = db.execute("SELECT type FROM sqlite_schema WHERE name = 'memories'").fetchone()
    tables = db.execute("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name LIMIT 8")
    columns = db.execute("SELECT name FROM pragma_table_info('memories')")
    return (
        kind[0] if kind else None,
        [name for (name,) in tables],
        frozenset(name for (name,) in columns),
        db.execute("PRAGMA encoding").fetchone()[0],
        sqlite.free_rowid(db, "memories"),
    )


def _row(values: Sequence[Any]) -> Row:
    rowid, contents, raw_key, encrypted, size, title, content, raw_namespace, meant, *rest = values
    raw_text = None if title is None or content is None else title + b" " + content
    key, text = utf8(raw_key), utf8(raw_text)
    namespace = (raw_namespace or b"").decode(errors="replace")
    stored = stored_values(*rest) if rest else None
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
    digest = skipped_digest(skipped, contents or contents_digest(raw_key, title, content))
    return Row(key, rowid, "", digest, skipped, namespace, bool(meant), stored)
