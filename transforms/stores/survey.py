"""What is in a store before anything is done to it, counted in one read-only pass."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from reembed.transforms.rows import Cause
from reembed.transforms.stores.base import Store


@dataclass(frozen=True)
class Survey:
    """Counts of the rows of a store, or of one namespace of it.

    `meant` of them are those that the run is about, `meant_with_vector` (of a mode that names rows:
    at most) have a vector. `dimensions` counts the stored vectors by
    length; 0 stands for one that can't be decoded. `vector_bytes` is the size of all of them.
    `by_rule` counts the rows, of those that are meant, that will be skipped without being
    offered to the model. Where there is no row, `existing` names the namespaces that there are,
    and `elsewhere` counts the rows of the whole table. `hidden` counts, by why, the rows that the
    store's own program does not show.
    """

    rows: int
    meant: int
    with_vector: int
    vector_bytes: int
    namespaces: Mapping[str, int]
    dimensions: Mapping[int, int]
    by_rule: Mapping[Cause, int]
    existing: tuple[str, ...]
    hidden: Mapping[str, int] = field(default_factory=dict)
    elsewhere: int = 0
    meant_with_vector: int = 0

    @property
    def to_embed(self) -> int:
        """Rows that will be offered to the model."""
        return self.meant - sum(self.by_rule.values())


@dataclass(frozen=True)
class Holding:
    """Rows that hold the same: vectors of a dimension (None: no vector) with a stamp.

    `selected` rows are in the namespace, and meet the condition, that a run is about.
    """

    selected: bool
    namespace: str
    dimension: int | None
    stamp: str | None
    rows: int


def take_stock(store: Store) -> tuple[Holding, ...]:
    """Count what all rows of a store's table hold, in one pass."""
    groups = store.read_only(lambda db: Counter(store.holdings(db)))
    return tuple(
        Holding(bool(selected), _text(namespace) or "", dimension, _text(stamp), rows)
        for (selected, namespace, dimension, stamp), rows in groups.items()
    )


def _text(raw: bytes | None) -> str | None:
    return None if raw is None else raw.decode(errors="replace")


def take_survey(store: Store) -> Survey:
    """Count a store's rows by namespace, stored dimension and rule, in one pass."""
    return store.read_only(lambda db: _survey(db, store))


def _survey(db: sqlite3.Connection, store: Store) -> Survey:
    groups = Counter(store.survey(db))
    namespaces: Counter[str] = Counter()
    dimensions: Counter[int] = Counter()
    rules: Counter[Cause] = Counter()
    meant = with_vector = vector_bytes = 0
    for (raw_namespace, stored_dimension, rule, is_meant, size), rows in groups.items():
        namespaces[(raw_namespace or b"").decode(errors="replace")] += rows
        if stored_dimension is not None:
            dimensions[stored_dimension] += rows
        vector_bytes += rows * size
        if is_meant:
            meant += rows
            with_vector += rows if stored_dimension is not None else 0
            if rule is not None:
                rules[Cause(rule)] += rows
    named = store.selection.keys
    if named is not None:
        meant, rules = len(named), Counter()
        with_vector = min(meant, dimensions.total())
    return Survey(
        rows=namespaces.total(),
        meant=meant,
        with_vector=dimensions.total(),
        vector_bytes=vector_bytes,
        namespaces=dict(namespaces.most_common()),
        dimensions=dict(sorted(dimensions.items())),
        by_rule={cause: rules[cause] for cause in Cause if rules[cause]},
        existing=() if namespaces else store.namespaces(db),
        hidden=store.count_hidden(db),
        elsewhere=0 if namespaces else store.everywhere().places(db)[0],
        meant_with_vector=with_vector,
    )
