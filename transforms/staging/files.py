"""Files of a run: written whole or not at all, and known by their contents.

A Parquet file carries the checksum of its bytes in its name, `STEM.CHECKSUM.parquet`, so that
one that was cut short or altered is noticed whenever it is read. Its metadata say what run it
belongs to, in which directory of that, and its stem, so that another run's, or one that was
renamed, is noticed as well. Version 0.1.0 did not write these three.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from transforms.errors import StagingError

PARQUET = ".parquet"
TEMPORARY = ".tmp"

_CHECKSUM_BYTES = 8
_SUFFIX = len(".") + 2 * _CHECKSUM_BYTES + len(PARQUET)
_RUN, _KIND, _STEM = b"run", b"kind", b"stem"
_REPEATED = ("cause", "reason", "namespace", "others")


def publish(path: Path, content: bytes) -> None:
    """Write a file: to a temporary name, flushed, renamed, and the rename flushed.

    Safe to run twice: the file appears whole or not at all, and a second one takes its place.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    with failing_clearly(path.parent):
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Flush a directory: what was made, renamed or removed in it is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Place(NamedTuple):
    """Where a Parquet file belongs: a run, by its name, and a directory of that."""

    run: str
    kind: str

    @classmethod
    def of(cls, directory: str | Path) -> Place:
        """The place that a directory is; of the inputs of all passes it is the same.

        >>> Place.of("gs://bucket/RUN/inputs-0af1-0001/"), Place.of(Path("RUN/backup"))
        (Place(run='RUN', kind='inputs'), Place(run='RUN', kind='backup'))
        """
        parent, _, kind = str(directory).rstrip("/").rpartition("/")
        return cls(parent.rpartition("/")[2], kind.partition("-")[0])


def encode_table(place: Place, stem: str, table: pa.Table) -> tuple[str, bytes]:
    """A table as the name, from its stem and its checksum, and the content of a Parquet file."""
    marks = {_RUN: place.run, _KIND: place.kind, _STEM: stem}
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), **marks})
    sink = pa.BufferOutputStream()
    # Vectors don't compress; a dictionary serves columns that repeat themselves.
    repeated = [name for name in _REPEATED if name in table.column_names]
    pq.write_table(table, sink, compression="none", use_dictionary=repeated)
    content = sink.getvalue().to_pybytes()
    return f"{stem}.{_checksum(content)}{PARQUET}", content


def write_table(directory: Path, stem: str, table: pa.Table) -> Path:
    """Write a Parquet file that is named by its stem and its checksum."""
    with failing_clearly(directory):
        name, content = encode_table(Place.of(directory), stem, table)
    publish(directory / name, content)
    return directory / name


def read_table(path: Path, columns: Sequence[str]) -> pa.Table:
    """Read those of the columns that a Parquet file has, in its own order.

    Raises StagingError if its bytes are not as written.
    """
    with failing_clearly(path):
        return decode_table(str(path), path.read_bytes(), columns)


def decode_table(path: str, content: bytes, columns: Sequence[str]) -> pa.Table:
    """The same from its content. Raises StagingError if that is not what was written there."""
    if not _has_checksum(path, content):
        raise StagingError(
            f"{path} is damaged: its bytes are not those that were written; run reembed again, "
            "which looks through all files of the run first"
        )
    file = pq.ParquetFile(pa.BufferReader(content))
    if not _belongs(path, file.schema_arrow.metadata):
        raise StagingError(
            f"{path} belongs to another run or has been renamed, so it is not used; run reembed "
            "again, which looks through all files of the run first"
        )
    return file.read([name for name in file.schema_arrow.names if name in columns])


def read_metadata(path: Path) -> Mapping[bytes, bytes]:
    """Read what was written besides the rows of a Parquet file."""
    with failing_clearly(path):
        return pq.read_schema(path).metadata or {}


def is_sound(path: Path) -> bool:
    """Whether a Parquet file's bytes are those that were written, and in this place."""
    with failing_clearly(path):
        return is_whole(str(path), path.read_bytes())


def count_rows(path: Path) -> int:
    """How many rows a Parquet file has."""
    with failing_clearly(path):
        rows: int = pq.read_metadata(path).num_rows
        return rows


def tables(directory: Path, *, index: int | None = None) -> list[Path]:
    """The Parquet files of a directory, or those of one range, by name.

    Raises StagingError if the directory is not there: an empty one would be another thing.
    """
    start = "" if index is None else f"{index:07d}."
    with failing_clearly(directory):
        names = sorted(os.listdir(directory))  # noqa: PTH208 - a Path for each name costs too much
    return [
        directory / name
        for name in names
        if name.endswith(PARQUET) and name.startswith(start) and name[0] != "."
    ]


def remove_tree(path: Path) -> None:
    """Delete a directory; it vanishes at once, so that nothing reads half of it."""
    condemned = path.with_name(f".{path.name}.removed")
    with failing_clearly(path.parent):
        if path.exists():
            path.replace(condemned)
            sync_directory(path.parent)
    shutil.rmtree(condemned, ignore_errors=True)


def tree_bytes(path: Path) -> int:
    """The size of all files below a directory; those that vanish meanwhile count nothing."""
    total = 0
    for file in path.rglob("*"):
        with suppress(OSError):
            total += file.lstat().st_size
    return total


def require_room(needed: Mapping[Path, int]) -> None:
    """Raise StagingError if a file system lacks the bytes that are needed below these paths."""
    places: dict[int, tuple[Path, int]] = {}
    for path, size in needed.items():
        existing = next(place for place in (path, *path.parents) if place.exists())
        with failing_clearly(existing):
            device = existing.stat().st_dev
        first, total = places.get(device, (existing, 0))
        places[device] = first, total + size
    for place, size in places.values():
        free = shutil.disk_usage(place).free
        if free < size:
            raise StagingError(
                f"about {_amount(size)} are needed for the new vectors, the backup and "
                f"SQLite's log, and {_amount(free)} are free at {place}; make room, or name "
                "another place for the run directory with --run-dir"
            )


@contextmanager
def failing_clearly(path: Path) -> Iterator[None]:
    """Turn trouble with files into a StagingError that says what to do."""
    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise StagingError(
            f"the run directory {path} can't be used ({why}); make room, or make it writable, and "
            "run again"
        ) from error


def _amount(size: int) -> str:
    return f"{size:,} bytes" if size < 1_000_000 else f"{size / 1e6:,.0f} MB"


def is_whole(path: str, content: bytes) -> bool:
    """Whether this is what a Parquet file held when it got its name, and in this place."""
    if not _has_checksum(path, content):
        return False
    return _belongs(path, pq.read_schema(pa.BufferReader(content)).metadata)


def _has_checksum(path: str, content: bytes) -> bool:
    return path.split(".")[-2] == _checksum(content)


def _belongs(path: str, metadata: Mapping[bytes, bytes] | None) -> bool:
    """Whether a file was written in this place and under this stem, or by version 0.1.0."""
    marks = metadata or {}
    if _RUN not in marks:
        return True
    directory, _, name = path.rpartition("/")
    run, kind = Place.of(directory)
    expected = {_RUN: run, _KIND: kind, _STEM: name[:-_SUFFIX]}
    return all(marks.get(mark) == value.encode() for mark, value in expected.items())


def _checksum(content: bytes) -> str:
    return blake2b(content, digest_size=_CHECKSUM_BYTES).hexdigest()
