"""Files of a run: written whole or not at all, and known by their contents.

A Parquet file carries the checksum of its bytes in its name, `STEM.CHECKSUM.parquet`, so that
one that was cut short or altered is noticed whenever it is read. Its metadata say what run it
belongs to, in which directory of that, and its stem, so that another run's, or one that was
renamed, is noticed as well. Version 0.1.0 did not write these three.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from reembed.transforms.errors import StagingError
from reembed.transforms.staging import trust
from reembed.transforms.staging.names import Layout

PARQUET = ".parquet"
TEMPORARY = ".tmp"

_CHECKSUM_BYTES = 8
_SUFFIX = len(".") + 2 * _CHECKSUM_BYTES + len(PARQUET)
_RUN, _KIND, _STEM = b"run", b"kind", b"stem"
_REPEATED = ("cause", "reason", "namespace", "others")


def publish(path: Path, content: bytes, *, flush: bool = True) -> None:
    """Write a file: to a temporary name, flushed, renamed, and the rename flushed.

    It is for its owner only, who is, as root makes it, the owner of the directory. Safe to run
    twice: the file appears whole or not at all, and a second one takes its place. Raises
    StagingError for one that is so large that it could not be read again, before it is written.
    """
    if len(content) > trust.max_bytes(path) * 3 // 4:  # A manifest grows when states are noted.
        raise StagingError(
            f"{path} would be larger than reembed reads again ({len(content):,} bytes); do the "
            "work in parts, such as by --namespace"
        )
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    with failing_clearly(path.parent):
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            descriptor = os.open(temporary, flags, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                trust.make_private(descriptor, 0o600, like=path.parent)
                file.write(content)
                file.flush()
                if flush:
                    os.fsync(descriptor)
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        if flush:
            sync_directory(path.parent)


def make_directory(path: Path, *, like: Path | None = None, new: bool = False) -> None:
    """Make a directory for its owner only, and those above it that are not there.

    As root makes it, it gets the owner of `like`, or of the directory that it is in. One that is
    there stays as it is, unless it must be `new`. Raises StagingError then, and where others could
    write it all the same.
    """
    with failing_clearly(path):
        if path.is_dir() and not new:
            return
        make_directory(path.parent, like=like)
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:  # By another worker, at the same time.
            if new:
                raise
            return
        descriptor = _open_made(path)
        try:
            trust.make_private(descriptor, 0o700, like=like or path.parent)
            if os.fstat(descriptor).st_mode & 0o022:
                path.rmdir()
                raise StagingError(f"{path} could be written by other users, {trust.WITHOUT_MODES}")
        finally:
            os.close(descriptor)


def _open_made(path: Path) -> int:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, flags)
    except PermissionError:  # The umask kept even its owner off.
        path.chmod(0o700)
        return os.open(path, flags)


def sync_directory(path: Path) -> None:
    """Flush a directory: what was made, renamed or removed in it is on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Place(NamedTuple):
    """The run, and the directory in it, that a Parquet file belongs to."""

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
        return decode_table(str(path), trust.read_file(path), columns)


def require_columns(path: Path, table: pa.Table, types: pa.Schema) -> None:
    """Raise StagingError if a table lacks a column, or one is of another type or lacks values.

    `types` also say which columns may lack some. Anybody can make a file and give it the name that
    goes with its bytes.
    """
    for field in types:
        alone = table.column_names.count(field.name) == 1
        if not alone or table.schema.field(field.name).type != field.type:
            raise not_ours(path, f"it has no column {field.name} of type {field.type}")
        if table.column(field.name).null_count and not field.nullable:
            raise not_ours(path, f"its column {field.name} lacks values")


def not_ours(path: Path, why: str) -> StagingError:
    """Build the error for a file with a valid checksum that reembed did not write."""
    return StagingError(
        f"{path} was not written by reembed, so it is not used: {why}; restore it from a copy, or "
        "move it away"
    )


def decode_table(path: str, content: bytes, columns: Sequence[str]) -> pa.Table:
    """Decode a Parquet file; raise StagingError if it is not what was written in this place."""
    if not _has_checksum(path, content):
        raise _damaged(path)
    file = pq.ParquetFile(pa.BufferReader(content))
    if not _belongs(path, file.schema_arrow.metadata):
        raise StagingError(
            f"{path} belongs to another run or has been renamed, so it is not used; run reembed "
            "again, which looks through all files of the run first"
        )
    return file.read([name for name in file.schema_arrow.names if name in columns])


def read_column(path: Path, name: str) -> pa.ChunkedArray:
    """Read one column of a Parquet file, whose checksum is not looked at.

    Raises StagingError if that is not possible.
    """
    with failing_clearly(path), trust.open_file(path) as file:
        try:
            return pq.ParquetFile(file).read([name]).column(name)
        except KeyError:
            raise not_ours(path, f"it has no column {name}") from None
        except pa.ArrowException:
            raise _damaged(path) from None


def _damaged(path: Path | str) -> StagingError:
    return StagingError(
        f"{path} is damaged: its bytes are not those that were written; run reembed again, "
        "which looks through all files of the run first"
    )


def read_metadata(path: Path) -> Mapping[bytes, bytes]:
    """Read what was written besides the rows of a Parquet file."""
    with failing_clearly(path), trust.open_file(path) as file:
        return pq.read_schema(file).metadata or {}


def is_sound(path: Path, *, marked: bool = False) -> bool:
    """Whether a Parquet file's bytes are those that were written, and in this place.

    With `marked`, one that does not say where it was written is not.
    """
    with failing_clearly(path):
        return is_whole(str(path), trust.read_file(path), marked=marked)


def count_rows(path: Path) -> int:
    """Count the rows of a Parquet file."""
    with failing_clearly(path):
        rows: int = pq.read_metadata(path).num_rows
        return rows


def tables(directory: Path, named: re.Pattern[str], *, index: int | None = None) -> list[Path]:
    """The files of a directory that have such names, or those of one range, by name.

    Many a program that copies leaves out directories that are empty, so one that is not there has
    none. Raises StagingError if that which it would lie in isn't there either.
    """
    start = "" if index is None else f"{index:07d}."
    with failing_clearly(directory):
        try:
            names = sorted(os.listdir(directory))  # noqa: PTH208 - a Path for each costs too much
        except FileNotFoundError:
            directory.parent.stat()
            names = []
    return [directory / name for name in names if name.startswith(start) and named.fullmatch(name)]


def remove_tree(path: Path, layout: Layout) -> None:
    """Delete a directory of ours; it vanishes at once, so that nothing reads half of it.

    Raises StagingError, and deletes nothing, if it holds what reembed has not made, or if it
    can't be deleted.
    """
    check_removable(path, layout)
    with failing_clearly(path):
        if os.path.lexists(path):
            condemned = path.with_name(f".{path.name}.removed")
            remove_own(condemned, layout)
            path.replace(condemned)
            sync_directory(path.parent)
            remove_own(condemned, layout)
            if os.path.lexists(condemned):
                raise StagingError(f"{condemned} could not be deleted; delete what is left of it")


def remove_own(path: Path, layout: Layout) -> None:
    """Delete the files of ours in a directory and, if nothing is left, the directory.

    Nothing is deleted through a link, and what can't be deleted stays.
    """
    with suppress(OSError):
        _remove_own(path, layout, within=None)
        path.rmdir()


def remove_temporaries(path: Path, layout: Layout) -> None:
    """Delete the files that were being written in a directory of ours when a process died."""
    with suppress(OSError):
        _remove_own(path, layout, within=None, halves=True)


def _remove_own(
    path: Path | str, layout: Layout, *, within: int | None, halves: bool = False
) -> None:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, dir_fd=within)
    try:
        with os.scandir(descriptor) as entries:
            found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        for name, is_directory in found:
            inner = layout.within(name) if is_directory else None
            if inner is not None:
                _remove_own(name, inner, within=descriptor, halves=halves)
                if not halves:
                    with suppress(OSError):
                        os.rmdir(name, dir_fd=descriptor)
            elif not is_directory and (layout.is_half if halves else layout.gives)(name):
                os.unlink(name, dir_fd=descriptor)
    finally:
        os.close(descriptor)


def check_removable(path: Path, layout: Layout) -> None:
    """Raise StagingError if a directory holds what reembed has not made, or can't be deleted."""
    with failing_clearly(path), suppress(FileNotFoundError):
        _check_ours(path, layout)
        for place in (
            path.parent,
            path,
            *(one for one in path.iterdir() if layout.within(one.name)),
        ):
            if not os.access(place, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))


def _check_ours(path: Path, layout: Layout) -> None:
    with os.scandir(path) as entries:
        for entry in entries:
            is_directory = entry.is_dir(follow_symlinks=False)
            inner = layout.within(entry.name) if is_directory else None
            if inner is not None:
                _check_ours(path / entry.name, inner)
            elif is_directory or not layout.gives(entry.name):
                raise StagingError(
                    f"{path / entry.name} is not reembed's, so nothing is deleted; move it "
                    "elsewhere, and try again"
                )


def tree_bytes(path: Path) -> int:
    """The size of all files below a directory; those that vanish meanwhile count nothing.

    Links are not followed.
    """
    total = 0
    with suppress(OSError):
        if path.is_symlink():
            return 0
        with os.scandir(path) as entries:
            for entry in entries:
                with suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        total += tree_bytes(path / entry.name)
                    else:
                        total += entry.stat(follow_symlinks=False).st_size
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
    """Turn trouble with files into a StagingError that names the file and says what to do."""
    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as error:
        raise StagingError(_trouble(path, error)) from error


def _trouble(path: Path, error: Exception) -> str:
    if not isinstance(error, OSError) or error.errno is None:
        return f"the run directory {path} can't be used ({error}); {_UNREADABLE}"
    # A file that is renamed has two names, of which the first is one that only reembed knows.
    named = (error.filename2, error.filename)
    places = [Path(os.fsdecode(name)) for name in named if isinstance(name, str | bytes)]
    place = next((one for one in places if one.suffix != TEMPORARY and one != path), None)
    where = f": {place}" if place else ""
    why = error.strerror or str(error)
    barred = isinstance(error, PermissionError) and trust.barred_by(error, path)
    what = barred or _WAYS.get(error.errno, "make room, or make it writable, and run again")
    return f"the run directory {path} can't be used ({why}{where}); {what}"


_UNREADABLE = "restore what is in it from a copy, or move it away if the run is of no use"

_IN_THE_WAY = "move what lies there away, and run again"
_READ_ONLY = "make it writable, and run again"
_FULL = "make room, and run again"
_WAYS = {
    errno.ENOENT: "restore it from a copy; if another command has just removed it, run again",
    errno.EISDIR: _IN_THE_WAY,
    errno.ENOTDIR: _IN_THE_WAY,
    errno.EEXIST: _IN_THE_WAY,
    errno.ENOTEMPTY: _IN_THE_WAY,
    errno.ELOOP: _IN_THE_WAY,
    errno.EACCES: _READ_ONLY,
    errno.EPERM: _READ_ONLY,
    errno.EROFS: _READ_ONLY,
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EIO: "check the disk, and run again",
}
"""Advice by errno."""


def _amount(size: int) -> str:
    return f"{size:,} bytes" if size < 1_000_000 else f"{size / 1e6:,.0f} MB"


def is_whole(path: str, content: bytes, *, marked: bool = False) -> bool:
    """Whether this is what a Parquet file held when it got its name, and in this place."""
    if not _has_checksum(path, content):
        return False
    metadata = pq.read_schema(pa.BufferReader(content)).metadata or {}
    return _belongs(path, metadata) and (_RUN in metadata or not marked)


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
