"""The backup: what each row held before a run wrote to it, in Parquet.

    0000007.0000.CHECKSUM.parquet    range 7, its first file; later ones are additions

A file has one row for each row of the store that was written:

    key         string     the row's key
    digest      16 bytes   of the text that the row had when it was written
    written     16 bytes   of the new vector as the store encodes it (see `rows.vector_digest`)
    was         16 bytes   of all that follows (see `rows.Stored`)
    restorable  bool       whether the previous vector belonged to the same text
    vector      bytes      the previous vector as it was stored; null for none
    others      string     the other columns that are replaced, as the store describes them
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Sequence
from pathlib import Path

import pyarrow as pa

from reembed.transforms.errors import StagingError
from reembed.transforms.rows import DIGEST_BYTES, Saved, Stored
from reembed.transforms.staging.files import (
    read_column,
    read_table,
    require_columns,
    tables,
    write_table,
)
from reembed.transforms.staging.names import BACKUP

_SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "digest": pa.binary(DIGEST_BYTES),
        "written": pa.binary(DIGEST_BYTES),
        "was": pa.binary(DIGEST_BYTES),
        "restorable": pa.bool_(),
        "vector": pa.binary(),
        "others": pa.string(),
    }
)
_READ = pa.schema([field.with_nullable(field.name == "vector") for field in _SCHEMA])
"""The columns and their types; only a vector may be null."""


class Ledger:
    """What a run has saved of the rows of one range, and so what it wrote there."""

    def __init__(self, saved: Iterable[Saved] = ()) -> None:
        self._by_key: dict[str, list[Saved]] = {}
        self.add(saved)

    def add(self, saved: Iterable[Saved]) -> None:
        """Take note of more rows; later ones go before earlier ones."""
        for row in saved:
            self._by_key.setdefault(row.key, []).insert(0, row)

    def of(self, key: str) -> Sequence[Saved]:
        """What was saved of a row, the latest first."""
        return self._by_key.get(key, ())

    def without(self, keys: Collection[str]) -> Ledger:
        """Return a ledger without these keys."""
        if not keys:
            return self
        left = (key for key in self._by_key if key not in keys)
        return Ledger(saved for key in left for saved in reversed(self._by_key[key]))

    @property
    def keys(self) -> Iterable[str]:
        """The keys of the rows of which anything was saved."""
        return self._by_key.keys()


def write_backup(directory: Path, index: int, saved: Sequence[Saved]) -> str:
    """Save rows of a range, and read them back; return the name of the file that has them.

    Safe to run twice: each call adds a file, of which what is said again changes nothing.
    Raises StagingError if what is read back is not what was written.
    """
    names = [path.name for path in tables(directory, BACKUP, index=index)]
    number = 1 + max((int(name.split(".")[1]) for name in names), default=-1)
    table = _table(saved)
    path = write_table(directory, f"{index:07d}.{number:04d}", table)
    if not read_table(path, table.column_names).equals(table):
        raise StagingError(f"the backup {path} is not as it was written; check the disk")
    return path.name


def read_ledger(
    directory: Path, index: int, *, with_vectors: bool, but: Container[str] = ()
) -> Ledger:
    """Read what was saved of a range, `but` not the files of these names."""
    paths = [path for path in tables(directory, BACKUP, index=index) if path.name not in but]
    return Ledger(row for path in paths for row in _read(path, with_vectors=with_vectors))


def saved_ranges(directory: Path) -> dict[int, list[Path]]:
    """The files of the backup by the index of their range."""
    found: dict[int, list[Path]] = {}
    for path in tables(directory, BACKUP):
        found.setdefault(int(path.name.split(".")[0]), []).append(path)
    return found


def _read(path: Path, *, with_vectors: bool) -> list[Saved]:
    names = ["key", "digest", "written", "was", "restorable"]
    names += ["vector", "others"] if with_vectors else []
    table = read_table(path, names)
    require_columns(path, table, pa.schema([_READ.field(name) for name in names]))
    columns = [table.column(name).to_pylist() for name in names]
    return [
        Saved(key, digest, written, was, restorable, Stored(*stored) if stored else None)
        for key, digest, written, was, restorable, *stored in zip(*columns, strict=True)
    ]


def _table(saved: Sequence[Saved]) -> pa.Table:
    stored = [row.stored for row in saved]
    columns = {
        "key": [row.key for row in saved],
        "digest": [row.digest for row in saved],
        "written": [row.written for row in saved],
        "was": [row.was for row in saved],
        "restorable": [row.restorable for row in saved],
        "vector": [old and old.vector for old in stored],
        "others": [old and old.others for old in stored],
    }
    return pa.table(columns, schema=_SCHEMA)


def saved_columns(directory: Path, *, but: Container[str] = ()) -> set[str]:
    """Collect the distinct column descriptions of all rows of the backup.

    The files of the names `but` are not read, of the others no more than this column.
    """
    paths = (path for path in tables(directory, BACKUP) if path.name not in but)
    found: set[str] = set()
    for path in paths:
        column = read_column(path, "others")
        table = pa.table({"others": column})
        require_columns(path, table, pa.schema([_READ.field("others")]))
        found.update(column.unique().to_pylist())
    return found
