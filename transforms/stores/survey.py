"""What is in a store before anything is done to it, counted in one read-only pass."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from transforms.rows import Cause
from transforms.stores.base import Store


@dataclass(frozen=True)
class Survey:
    """Counts of the rows of a store, or of one namespace of it.

    `meant` of them are those that the run is about. `dimensions` counts the stored vectors by
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

    @property
    def to_embed(self) -> int:
        """Rows that will be offered to the model."""
        return self.meant - sum(self.by_rule.values())


def take_survey(store: Store) -> Survey:
    """Count a store's rows by namespace, stored dimension and rule, in one pass."""
    return store.read_only(lambda db: _survey(db, store))


def _survey(db: sqlite3.Connection, store: Store) -> Survey:
    groups = Counter(store.survey(db))
    namespaces: Counter[str] = Counter()
    dimensions: Counter[int] = Counter()
    rules: Counter[Cause] = Counter()
    meant = vector_bytes = 0
    for (raw_namespace, stored_dimension, rule, is_meant, size), rows in groups.items():
        namespaces[(raw_namespace or b"").decode(errors="replace")] += rows
        if stored_dimension is not None:
            dimensions[stored_dimension] += rows
        vector_bytes += rows * size
        if is_meant:
            meant += rows
            if rule is not None:
                rules[Cause(rule)] += rows
    named = store.selection.keys
    if named is not None:
        meant, rules = len(named), Counter()
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
    )
