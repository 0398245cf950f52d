"""Shards: the staged vectors of one part of a range, in Parquet.

    0000007.0001.000.00512.CHECKSUM.parquet    range 7, pass 1, part 0, 512 rows

A shard has one row for each row of the store that was read, in the order of the part:

    key        string              the row's key
    digest     16 bytes            of the exact text (see `rows.text_digest`)
    vector     4 x dimension bytes little-endian float32; null for a skipped row
    cause      string              why the row was skipped; null for a vector
    reason     string              the same for the operator
    namespace  string              of a skipped row, for the list of them
    cut        bool                whether the text is longer than the model looks at

Its metadata hold `tokens`, what a server counted for it, and `worker`, the machine, process and
thread that staged it, as MACHINE:PROCESS:THREAD.
"""

from __future__ import annotations

import os
import platform
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from reembed.transforms.rows import (
    DIGEST_BYTES,
    Cause,
    RangeVectors,
    Skipped,
    StagedRange,
    StagedRow,
)
from reembed.transforms.staging.files import (
    Place,
    encode_table,
    not_ours,
    read_metadata,
    read_table,
    require_columns,
    tables,
    write_table,
)
from reembed.transforms.staging.names import SHARD

_TOKENS = b"tokens"
_WORKER = b"worker"
_READ = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("digest", pa.binary(DIGEST_BYTES), nullable=False),
        pa.field("cause", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("namespace", pa.string()),
        pa.field("cut", pa.bool_(), nullable=False),
    ]
)
"""The columns that are read, but the vector, whose width is the target's."""


@dataclass(frozen=True)
class Shard:
    """A shard by its name: which part of which range, staged in which pass, of how many rows."""

    path: Path
    range: int
    pass_number: int
    part: int
    rows: int


def write_shard(directory: Path, vectors: RangeVectors, *, pass_number: int) -> StagedRange:
    """Write one shard.

    Safe to run twice: the name says what it is and what is in it. Should a second try give
    other vectors, or be another worker's, both are there, and either serves.
    """
    path = write_table(directory, _stem(vectors, pass_number), _table(vectors))
    return _staged(vectors, path.name)


def encode_shard(
    directory: str, vectors: RangeVectors, *, pass_number: int
) -> tuple[StagedRange, bytes]:
    """A shard and its content, for another place than a directory of this machine."""
    place = Place.of(directory)
    name, content = encode_table(place, _stem(vectors, pass_number), _table(vectors))
    return _staged(vectors, name), content


def list_shards(directory: Path, *, index: int | None = None) -> dict[int, list[Shard]]:
    """List the shards, or those of one range, by the index of their range, oldest pass first."""
    shards: dict[int, list[Shard]] = {}
    for path in tables(directory, SHARD, index=index):
        shard = Shard(path, *map(int, path.name.split(".")[:4]))
        shards.setdefault(shard.range, []).append(shard)
    return shards


def read_shards(shards: Iterable[Shard], *, with_vectors: bool) -> Iterator[StagedRow]:
    """Read the rows of shards; without their vectors, only whether a row was skipped is known.

    Raises StagingError for a shard that is not as it was written.
    """
    names = ["key", "digest", "cause", "reason", "namespace", "cut"]
    names += ["vector"] if with_vectors else []
    for shard in shards:
        table = read_table(shard.path, names)
        if "cut" not in table.column_names:  # Staged before this was noted.
            table = table.append_column("cut", pa.array([False] * table.num_rows))
        _check(shard, table, names)
        columns = [table.column(name).to_pylist() for name in names]
        if not with_vectors:
            columns.append([None] * table.num_rows)
        for key, digest, cause, reason, namespace, cut, vector in zip(*columns, strict=True):
            skipped = None if cause is None else Skipped(key, Cause(cause), reason, namespace)
            yield StagedRow(key, digest, vector, skipped, cut)


def read_vectors(shards: Iterable[Shard]) -> dict[tuple[str, bytes], bytes | None]:
    """Read the vectors of shards, by key and digest; None for a skipped row.

    Several times as fast as row by row.
    """
    vectors: dict[tuple[str, bytes], bytes | None] = {}
    for shard in shards:
        names = ["key", "digest", "vector"]
        table = read_table(shard.path, names)
        _check(shard, table, names)
        keys, digests, made = (table.column(n).to_pylist() for n in ("key", "digest", "vector"))
        vectors.update(zip(zip(keys, digests, strict=True), made, strict=True))
    return vectors


def _check(shard: Shard, table: pa.Table, names: Sequence[str]) -> None:
    """Raise StagingError if a table is not what a shard holds."""
    types = [_READ.field(name) for name in names if name != "vector"]
    if "vector" in names:
        width = table.schema.field("vector").type if "vector" in table.column_names else None
        fixed = width is not None and pa.types.is_fixed_size_binary(width)
        types.append(pa.field("vector", width if fixed else pa.binary(4)))
    require_columns(shard.path, table, pa.schema(types))
    if "cause" in names:
        unknown = set(table.column("cause").unique().to_pylist()) - {None, *map(str, Cause)}
        if unknown:
            raise not_ours(shard.path, f"it names no known cause: {min(unknown)[:80]!r}")


def read_tokens(shards: Iterable[Shard]) -> int:
    """The tokens that a server counted for shards."""
    return sum(map(_tokens, shards))


def _tokens(shard: Shard) -> int:
    counted = read_metadata(shard.path).get(_TOKENS, b"0")
    if not re.fullmatch(rb"[0-9]{1,18}", counted):
        raise not_ours(shard.path, f"it counts {counted[:80]!r} tokens")
    return int(counted)


def _this_worker() -> str:
    return f"{platform.node()}:{os.getpid()}:{threading.get_native_id()}"


def _stem(vectors: RangeVectors, pass_number: int) -> str:
    rows = len(vectors.rows)
    return f"{vectors.range.index:07d}.{pass_number:04d}.{vectors.part:03d}.{rows:05d}"


def _staged(vectors: RangeVectors, name: str) -> StagedRange:
    skipped = sum(row.skipped is not None for row in vectors.rows)
    return StagedRange(vectors.range, name, len(vectors.rows) - skipped, skipped)


def _table(vectors: RangeVectors) -> pa.Table:
    rows, skips = vectors.rows, [row.skipped for row in vectors.rows]
    return pa.table(
        {
            "key": pa.array([row.key for row in rows], pa.string()),
            "digest": pa.array([row.digest for row in rows], pa.binary(DIGEST_BYTES)),
            "vector": pa.array([row.vector for row in rows], pa.binary(vectors.dimension * 4)),
            "cause": pa.array([skip and str(skip.cause) for skip in skips], pa.string()),
            "reason": pa.array([skip and skip.reason for skip in skips], pa.string()),
            "namespace": pa.array([skip and skip.namespace for skip in skips], pa.string()),
            "cut": pa.array([row.cut for row in rows], pa.bool_()),
        },
        metadata={_TOKENS: str(vectors.tokens), _WORKER: _this_worker()},
    )
