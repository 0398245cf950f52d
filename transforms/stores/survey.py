"""What is in a store before anything is done to it, counted in one read-only pass."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transforms.rows import Cause
from transforms.stores import sqlite
from transforms.stores.ai_memory import TEXT_BYTES, TEXT_CAP_BYTES, AiMemoryStore

# 4n bytes are n floats; one byte more is the header. Any other length can't be decoded.
_BLOB_DIMENSION = (
    "CASE WHEN length(embedding) % 4 <= 1 AND length(embedding) >= 4 "
    "THEN length(embedding) / 4 ELSE 0 END"
)


@dataclass(frozen=True)
class Survey:
    """Counts of the rows of a store, or of one namespace of it.

    `meant` of them are those that the run is about. `dimensions` counts the stored vectors by
    length; 0 stands for one that can't be decoded. `vector_bytes` is the size of all of them.
    `by_rule` counts the rows, of those that are meant, that will be skipped without being
    offered to the model. Where there is no row, `existing` names the namespaces that there are.
    """

    rows: int
    meant: int
    with_vector: int
    vector_bytes: int
    namespaces: Mapping[str, int]
    dimensions: Mapping[int, int]
    by_rule: Mapping[Cause, int]
    existing: tuple[str, ...]

    @property
    def to_embed(self) -> int:
        """Rows that will be offered to the model."""
        return self.meant - sum(self.by_rule.values())


def take_survey(store: AiMemoryStore) -> Survey:
    """Count a store's rows by namespace, stored dimension and rule, in one pass."""
    return sqlite.read_only(store.path, wal=store.wal, query=lambda db: _survey(db, store))


def _survey(db: sqlite3.Connection, store: AiMemoryStore) -> Survey:
    dimension = _BLOB_DIMENSION
    if "embedding_dim" in store.columns:
        sound = "typeof(embedding_dim) = 'integer' AND embedding_dim > 0"
        dimension = f"CASE WHEN {sound} THEN embedding_dim ELSE {dimension} END"
    groups = Counter(_rows(db, store, dimension))
    namespaces: Counter[str] = Counter()
    dimensions: Counter[int] = Counter()
    rules: Counter[int] = Counter()
    meant = vector_bytes = 0
    for (raw_namespace, stored_dimension, rule, is_meant, size), rows in groups.items():
        namespaces[(raw_namespace or b"").decode(errors="replace")] += rows
        if stored_dimension is not None:
            dimensions[stored_dimension] += rows
        vector_bytes += rows * size
        if is_meant:
            meant += rows
            rules[rule] += rows
    named = store.selection.keys
    if named is not None:
        meant, rules = len(named), Counter()
    causes = {1: Cause.ENCRYPTED, 2: Cause.OVER_CAP, 3: Cause.NOT_TEXT}
    return Survey(
        rows=namespaces.total(),
        meant=meant,
        with_vector=dimensions.total(),
        vector_bytes=vector_bytes,
        namespaces=dict(namespaces.most_common()),
        dimensions=dict(sorted(dimensions.items())),
        by_rule={cause: rules[rule] for rule, cause in causes.items() if rules[rule]},
        existing=() if namespaces else _all_namespaces(db),
    )


def _rows(db: sqlite3.Connection, store: AiMemoryStore, dimension: str) -> Iterator[Any]:
    """Each row's namespace, dimension, rule, whether it is meant, and its vector's bytes.

    Counting them takes half the time of SQLite's GROUP BY, which sorts the whole table.
    """
    return db.execute(
        f"SELECT CAST(namespace AS BLOB), CASE WHEN embedding IS NOT NULL THEN {dimension} END, "
        f"CASE WHEN {store.encrypted} THEN 1 WHEN {TEXT_BYTES} > {TEXT_CAP_BYTES} THEN 2 "
        f"WHEN typeof(id) <> 'text' THEN 3 ELSE 0 END, {store.meant}, "
        # Of a BLOB, SQLite says the length without reading it.
        "CASE typeof(embedding) WHEN 'blob' THEN length(embedding) "
        "ELSE ifnull(length(CAST(embedding AS BLOB)), 0) END "
        "FROM memories WHERE :namespace IS NULL OR namespace = :namespace",
        store.values,
    )


def _all_namespaces(db: sqlite3.Connection) -> tuple[str, ...]:
    names = db.execute("SELECT DISTINCT CAST(namespace AS BLOB) FROM memories ORDER BY 1")
    return tuple((raw or b"").decode(errors="replace") for (raw,) in names)
