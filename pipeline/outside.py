"""Vectors that a run leaves as they are: other rows of its table, other columns of the file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from reembed.pipeline.resume import Runs
from reembed.transforms.embedders import Target, same_vectors
from reembed.transforms.modes import Mode
from reembed.transforms.staging import Scope
from reembed.transforms.staging.runs import SKIPPED
from reembed.transforms.stores import Copy, Holding, Store, Survey, find_copies, take_stock

_ROWS_AT_ONCE = 4_096
"""Rows that are read at a time."""


@dataclass(frozen=True)
class Moved:
    """The rows that earlier runs have moved to the target.

    `namespaces` says it of each, None standing for the others, and `skipped` are the keys of rows
    there that were skipped, and kept what they had.
    """

    namespaces: Mapping[str | None, bool] = field(default_factory=lambda: {None: False})
    skipped: frozenset[str] = frozenset()

    def holds(self, namespace: str) -> bool:
        """Whether a namespace holds the target's vectors."""
        return self.namespaces.get(namespace, self.namespaces[None])


@dataclass(frozen=True)
class Outside:
    """Vectors of all rows of a store, and how many of the rows outside a run hold old ones.

    `old` counts vectors that neither the run nor, by their stamps or by earlier runs, another one
    to the same target has made.
    """

    holdings: tuple[Holding, ...]
    old: int


def is_part(store: Store, scope: Scope) -> bool:
    """Whether a run is about a part of a store whose vectors are searched together."""
    whole = scope.namespace is None and scope.mode == Mode.ALL and not scope.store.get("where")
    return not store.whole and not whole


def find_moved(
    runs: Runs, scope: Scope, target: Target, probe: Sequence[Sequence[float]] | None = None
) -> Moved:
    """Which namespaces hold the target's vectors, by the earlier runs on the same table.

    `probe` says how the model behaves now; without it, the newest run to the target does.
    """
    moved: dict[str | None, bool] = {None: False}
    skipped: set[tuple[str, str]] = set()
    everywhere = Scope(store=scope.store)
    found = [
        (run, manifest)
        for run, manifest in runs
        if manifest.holds and Scope(store=manifest.scope.store).shares_vectors(everywhere)
    ]
    for _, manifest in reversed(found):
        if probe is None and not target.differences(manifest.target):
            probe = manifest.probe
    for run, manifest in found:
        other = manifest.scope
        whole = other.mode in (Mode.ALL, Mode.SKIP_CURRENT_SPACE) and not other.store.get("where")
        is_targets = not target.differences(manifest.target) and _alike(
            manifest.probe, probe, target
        )
        left = {(row.get("namespace", ""), row["id"]) for row in run.read_lines(SKIPPED)}
        if is_targets and not whole:
            tried = set(other.keys or ())
            skipped = {row for row in skipped if row[1] not in tried} | (left & skipped)
            continue
        if other.namespace is None:
            moved.clear()
        moved[other.namespace] = is_targets
        skipped = {row for row in skipped if other.namespace not in (None, row[0])}
        skipped |= left if is_targets else set()
    return Moved(moved, frozenset(key for _, key in skipped))


def _alike(
    one: Sequence[Sequence[float]], other: Sequence[Sequence[float]] | None, target: Target
) -> bool:
    if other is None or one == other:
        return True
    return same_vectors(np.array(one, np.float32), np.array(other, np.float32), least=target.noise)


def look_outside(
    store: Store, target: Target, moved: Moved, *, replaced: int = 0, left: int = 0
) -> Outside:
    """Count what the whole table holds.

    Of the rows that a run is about, `replaced` hold what it wrote, and `left` the vectors that
    they had before.
    """
    holdings = take_stock(store)
    stamp = store.space(target.model)

    def is_targets(held: Holding) -> bool:
        known = moved.holds(held.namespace) if stamp is None else held.stamp == stamp
        return known and held.dimension == target.dimension

    vectors: Counter[bool] = Counter()
    targets: Counter[bool] = Counter()
    for held in holdings:
        if held.dimension is not None:
            vectors[held.selected] += held.rows
            targets[held.selected] += held.rows if is_targets(held) else 0
    outside = vectors[False] - targets[False]
    inside = vectors[True] - max(targets[True], replaced) - left
    skipped = _count_skipped(store, target, moved) if stamp is None else 0
    return Outside(holdings, outside + max(0, inside) + skipped)


def _count_skipped(store: Store, target: Target, moved: Moved) -> int:
    """Count the rows that the run is not about and earlier runs skipped, where they moved others.

    Vectors of another length are counted as old as it is.
    """
    if not moved.skipped:
        return 0
    count = 0
    everywhere = store.everywhere()
    ranges, _ = everywhere.cut_ranges(_ROWS_AT_ONCE, 1)
    for keys in ranges:
        for row in everywhere.read_range(keys, with_stored=True):
            selected = row.meant and store.namespace in (None, row.namespace)
            if row.key not in moved.skipped or selected or not moved.holds(row.namespace):
                continue
            vector = row.stored.vector if row.stored else None
            count += vector is not None and _length(store, vector) == target.dimension
    return count


def _length(store: Store, vector: bytes) -> int:
    try:
        return len(store.decode(vector))
    except ValueError:
        return 0


def other_columns(
    store: Store, survey: Survey, target: Target, runs: Runs, mode: Mode
) -> tuple[Copy, ...]:
    """Find the columns that a run leaves, with vectors as long as those that it replaces.

    Or as long as those that earlier runs have replaced. What one has moved to the same target is
    none of them.
    """
    if not survey.meant_with_vector or mode is Mode.STAMP_ONLY:
        return ()
    done = [manifest for _, manifest in runs if manifest.holds]
    moved = [m.scope.store for m in done if not target.differences(m.target)]
    former = {int(dim) for m in done for dim in m.outcome.get("previous_dims", ())}
    return tuple(
        copy
        for copy in find_copies(store, former | survey.dimensions.keys())
        if copy.dimension != target.dimension
        or (copy.table, copy.column)
        not in [(config.get("table"), config.get("vector")) for config in moved]
    )


def by_dimension(holdings: Iterator[Holding] | tuple[Holding, ...]) -> dict[str, int]:
    """Rows by what they hold, in words: the length of their vectors, and the stamp if there is one.

    >>> by_dimension((Holding(True, "", 8, "a", 2), Holding(True, "", None, None, 1)))
    {"8-dim 'a'": 2, 'no vector': 1}
    """
    found: Counter[str] = Counter()
    for held in holdings:
        name = f"{held.dimension}-dim" if held.dimension else "can't be decoded"
        name += "" if held.stamp is None else f" {held.stamp!r}"
        found["no vector" if held.dimension is None else name] += held.rows
    return dict(found.most_common())
