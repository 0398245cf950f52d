"""Stamp: vectors that are the target model's already get its stamp, and stay."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reembed.transforms.embed import find_problems
from reembed.transforms.embedders import WITNESS_COSINE, Embedder, cosines, embed_each
from reembed.transforms.errors import StampError
from reembed.transforms.match import concerns
from reembed.transforms.rows import Cause, KeyRange, RangeVectors, Row, Skipped, StagedRow
from reembed.transforms.sampling import Sample
from reembed.transforms.staging import RunDirectory, read_ledger, read_shards
from reembed.transforms.stores import Store

WITNESSES = 64
"""Rows that are embedded to see whether the stored vectors are the target's."""


def check_witnesses(store: Store, ranges: Sequence[KeyRange], embedder: Embedder) -> None:
    """Embed a sample of rows; raise StampError if their stored vectors are not the target's."""
    dimension = store.selection.dimension
    rows = _sample(store, ranges)
    if not rows:
        return
    made = embed_each(embedder, [row.text for row in rows], dimension)
    stored = np.vstack([store.decode((row.stored and row.stored.vector) or b"") for row in rows])
    taken = made.any(axis=1)  # A text that the model will not take says nothing.
    found = cosines(made, stored)[taken]
    other = int(np.sum(~(found >= WITNESS_COSINE)))
    if other or not taken.any():
        lowest = f"lowest cosine {found.min():.3f}" if taken.any() else "it takes none of the texts"
        raise StampError(
            f"{other or len(rows)} of {len(rows)} sampled rows hold vectors that are not this "
            f"model's ({lowest}), so they may not be stamped as its; re-embed the rows, or name "
            "the model that made them; nothing was written"
        )


def stage_stored(
    store: Store,
    run: RunDirectory,
    keys: KeyRange,
    *,
    pass_number: int,
    dimension: int,
    begun: bool,
) -> None:
    """Stage the vectors that the rows of a range have; nothing is embedded.

    A vector is never put back over a newer one. What is new in a pass after the replacement has
    `begun` had no witness; such a row is left as it is, and named.
    """
    shards = run.shards_of(keys.index, before_pass=pass_number)
    staged = {(row.key, row.digest): row for row in read_shards(shards, with_vectors=True)}
    ledger = read_ledger(run.backup, keys.index, with_vectors=False)
    rows: list[StagedRow] = []
    for row in store.read_range(keys, with_stored=True):
        known, now = staged.get((row.key, row.digest)), _staged(store, row, dimension)
        settled = known is not None and (
            not row.meant or known.vector == now.vector or (begun and known.skipped is not None)
        )
        if settled or not concerns(row, ledger):
            continue
        if begun and now.skipped is None:
            now = _left(row, "it is newer than the check of the sample; stamp it with another run")
        rows.append(now)
    if rows:
        run.write_shard(RangeVectors(keys, 0, dimension, tuple(rows)), pass_number=pass_number)


def _sample(store: Store, ranges: Sequence[KeyRange]) -> list[Row]:
    """At most `WITNESSES` of the rows that are to be stamped, evenly from all over the table."""
    sample = Sample(WITNESSES)
    for keys in ranges:
        for row in store.read_range(keys, with_stored=True):
            if row.meant and _staged(store, row, store.selection.dimension).vector is not None:
                sample.add(row)
    return sample.rows


def _staged(store: Store, row: Row, dimension: int) -> StagedRow:
    if row.skipped is not None:
        return StagedRow(row.key, row.digest, None, row.skipped)
    try:
        vector = store.decode((row.stored and row.stored.vector) or b"")
        problem = find_problems(vector.reshape(1, -1), 1, dimension)[0]
    except ValueError as error:
        problem = str(error)
    if problem:
        return _left(row, problem)
    return StagedRow(row.key, row.digest, vector.astype("<f4").tobytes())


def _left(row: Row, why: str) -> StagedRow:
    skipped = Skipped(row.key, Cause.BAD_VECTOR, why, row.namespace)
    return StagedRow(row.key, row.digest, None, skipped)
