"""Inputs: the rows of one part of a range, in Parquet, for workers that can't reach the store.

0000007.000.00200.CHECKSUM.parquet    range 7, part 0, 200 rows

key, digest, namespace    as in a shard
text                      string; null for a row that is skipped by rule
cause, reason             why it is; null for a text
"""

from __future__ import annotations

import pyarrow as pa

from reembed.transforms.rows import DIGEST_BYTES, Cause, KeyRange, RangeRows, Row, Skipped
from reembed.transforms.staging.files import Place, decode_table, encode_table

_COLUMNS = ("key", "digest", "namespace", "text", "cause", "reason")


def encode_input(directory: str, part: RangeRows) -> tuple[str, bytes]:
    """The name and the content of the file for a part, in a directory of the work directory."""
    rows, skips = part.rows, [row.skipped for row in part.rows]
    table = pa.table(
        {
            "key": pa.array([row.key for row in rows], pa.string()),
            "digest": pa.array([row.digest for row in rows], pa.binary(DIGEST_BYTES)),
            "namespace": pa.array([row.namespace for row in rows], pa.string()),
            "text": pa.array([None if row.skipped else row.text for row in rows], pa.string()),
            "cause": pa.array([skip and str(skip.cause) for skip in skips], pa.string()),
            "reason": pa.array([skip and skip.reason for skip in skips], pa.string()),
        }
    )
    place = Place.of(directory)
    return encode_table(place, f"{part.range.index:07d}.{part.part:03d}.{len(rows):05d}", table)


def decode_input(path: str, content: bytes, keys: KeyRange) -> RangeRows:
    """Read what `encode_input` wrote of a range; no row knows where it is in the store.

    Raises StagingError if the content is not what was written.
    """
    table = decode_table(path, content, _COLUMNS)
    columns = (table.column(name).to_pylist() for name in _COLUMNS)
    rows = [
        Row(
            key,
            0,
            text or "",
            digest,
            None if cause is None else Skipped(key, Cause(cause), reason, namespace),
            namespace,
        )
        for key, digest, namespace, text, cause, reason in zip(*columns, strict=True)
    ]
    return RangeRows(keys, int(path.split(".")[-4]), tuple(rows))
