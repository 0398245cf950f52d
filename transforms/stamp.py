"""Stamp: vectors that are the target model's already get its stamp, and stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from transforms.embed import find_problems
from transforms.embedders import WITNESS_COSINE, Embedder, Target, cosines
from transforms.errors import StampError
from transforms.match import concerns
from transforms.rows import Cause, KeyRange, RangeVectors, Row, Skipped, StagedRow
from transforms.staging import RunDirectory, read_ledger, read_shards
from transforms.stores import AiMemoryStore, decode

WITNESSES = 64
"""Rows that are embedded to see whether the stored vectors are the target's."""


def check_witnesses(store: AiMemoryStore, ranges: Sequence[KeyRange], embedder: Embedder) -> None:
    """Embed a sample of rows; raise StampError if their stored vectors are not the target's."""
    rows = list(_sample(store, ranges, store.selection.dimension))
    if not rows:
        return
    texts = [row.text for row in rows]
    stored = np.vstack([decode((row.stored and row.stored.vector) or b"") for row in rows])
    found = cosines(np.asarray(embedder.embed(texts)), stored)
    other = int(np.sum(found < WITNESS_COSINE))
    if other:
        raise StampError(
            f"{other} of {len(rows)} sampled rows hold vectors that are not this model's (lowest "
            f"cosine {found.min():.3f}), so they may not be stamped as its; re-embed the rows, or "
            "name the model that made them; nothing was written"
        )


def stage_stored(
    store: AiMemoryStore, run: RunDirectory, keys: KeyRange, *, pass_number: int, target: Target
) -> None:
    """Stage the vectors that the rows of a range have; nothing is embedded."""
    shards = run.shards_of(keys.index, before_pass=pass_number)
    staged = {(row.key, row.digest) for row in read_shards(shards, with_vectors=False)}
    ledger = read_ledger(run.backup, keys.index, with_vectors=False)
    rows = tuple(
        _staged(row, target.dimension)
        for row in store.read_range(keys, with_stored=True)
        if concerns(row, ledger) and (row.key, row.digest) not in staged
    )
    if rows:
        vectors = RangeVectors(keys, 0, target.dimension, rows)
        run.write_shard(vectors, pass_number=pass_number)


def _sample(store: AiMemoryStore, ranges: Sequence[KeyRange], dimension: int) -> Iterator[Row]:
    every = -(-len(ranges) // WITNESSES)
    most = -(-WITNESSES // max(1, len(ranges) // every))
    for keys in ranges[::every]:
        rows = [
            row
            for row in store.read_range(keys, with_stored=True)
            if row.meant and _staged(row, dimension).vector is not None
        ]
        yield from rows[:: max(1, len(rows) // most)][:most]


def _staged(row: Row, dimension: int) -> StagedRow:
    if row.skipped is not None:
        return StagedRow(row.key, row.digest, None, row.skipped)
    try:
        vector = decode((row.stored and row.stored.vector) or b"")
        problem = find_problems(vector.reshape(1, -1), 1, dimension)[0]
    except ValueError as error:
        problem = str(error)
    if problem:
        skipped = Skipped(row.key, Cause.BAD_VECTOR, problem, row.namespace)
        return StagedRow(row.key, row.digest, None, skipped)
    return StagedRow(row.key, row.digest, vector.astype("<f4").tobytes())
