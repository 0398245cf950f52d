"""Vectors that a run leaves as they are: other rows of its table, other columns of the file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pipeline.resume import Runs
from transforms.embedders import Target
from transforms.modes import Mode
from transforms.staging import Scope
from transforms.stores import Copy, Holding, Store, Survey, find_copies, take_stock

Moved = Mapping[str | None, bool]
"""Whether earlier runs have given a namespace the target's vectors; None stands for the others."""


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


def find_moved(runs: Runs, scope: Scope, target: Target) -> Moved:
    """Which namespaces hold the target's vectors, by the earlier runs on the same table."""
    moved: dict[str | None, bool] = {None: False}
    for _, manifest in runs:
        other = manifest.scope
        same_table = Scope(store=other.store).shares_rows(Scope(store=scope.store))
        if not manifest.holds or not same_table:
            continue
        whole = other.mode in (Mode.ALL, Mode.SKIP_CURRENT_SPACE) and not other.store.get("where")
        is_targets = not target.differences(manifest.target)
        if is_targets and not whole:
            continue
        if other.namespace is None:
            moved.clear()
        moved[other.namespace] = is_targets
    return moved


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
        known = moved.get(held.namespace, moved[None]) if stamp is None else held.stamp == stamp
        return known and held.dimension == target.dimension

    vectors: Counter[bool] = Counter()
    targets: Counter[bool] = Counter()
    for held in holdings:
        if held.dimension is not None:
            vectors[held.selected] += held.rows
            targets[held.selected] += held.rows if is_targets(held) else 0
    outside = vectors[False] - targets[False]
    inside = vectors[True] - max(targets[True], replaced) - left
    return Outside(holdings, outside + max(0, inside))


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
