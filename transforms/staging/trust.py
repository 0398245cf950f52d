"""What may be trusted in a run directory: it is looked at before anything in it is used.

Whoever can write beside a database, or hands one over, can put anything under the names that
reembed uses: a link to somebody's files, a pipe that never ends, a directory of their own. So a
directory must be a real one and a file a regular one, of this user or of root (for root, also of
whoever owns the database), and nobody else may be able to write it. Files are opened in a way
that follows no link and waits for nobody, and it is the open file that is looked at.
"""

from __future__ import annotations

import errno
import os
import pwd
import stat
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from transforms.errors import StagingError

MAX_JSON_BYTES = 64 * 1024 * 1024
"""Of a JSON file; a manifest of ten million rows takes about 2 MB."""

MAX_FILE_BYTES = 1024 * 1024 * 1024
"""Of any other file that is read; a shard or a backup file usually takes a few MB."""

_SAFELY = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def read_file(path: Path, *, most: int | None = None) -> bytes:
    """Read a file of a run, of up to `most` bytes (by its name: see `max_bytes`).

    Raises StagingError for one that can't be trusted or is larger, OSError as `open` does.
    """
    limit = max_bytes(path) if most is None else most
    with os.fdopen(_open(path, os.O_RDONLY), "rb") as file:
        found = os.fstat(file.fileno())
        _check(path, found, "a file", owners_within(path.parent))
        content = file.read(limit + 1) if found.st_size <= limit else b""
        if max(found.st_size, len(content)) > limit:
            raise StagingError(
                f"{path} is larger than {limit:,} bytes, which no file of its kind is; restore it "
                "from a copy, or move it away"
            )
        return content


def open_lock(path: Path) -> int:
    """Open a file that is locked and written in place, making it if need be: the descriptor.

    Raises StagingError for one that can't be trusted, or that has another name besides: what is
    written would be written there, too. Raises OSError as `open` does.
    """
    descriptor = _open(path, os.O_RDWR | os.O_CREAT)
    try:
        found = os.fstat(descriptor)
        _check(path, found, "a file", owners_within(path.parent))
        if found.st_nlink > 1:
            raise StagingError(
                f"{path} is a hard link: what reembed notes in it would be written into another "
                "file; reembed leaves it alone: remove it, and run again"
            )
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def check_directory(path: Path, owners: Collection[int]) -> None:
    """Raise StagingError unless this is a real directory of these owners, and theirs alone.

    Raises OSError as `lstat` does.
    """
    _check(path, path.lstat(), "a directory", owners)


def max_bytes(path: Path) -> int:
    """How large a file of a run may be, by its name."""
    return MAX_JSON_BYTES if path.suffix == ".json" else MAX_FILE_BYTES


def owners_within(directory: Path) -> frozenset[int]:
    """Whose files in a directory, which was found to be trusted, are trusted as well."""
    user = os.geteuid()
    if user != 0:
        return frozenset({user, 0})
    with suppress(OSError):
        return frozenset({0, directory.lstat().st_uid})
    return frozenset({0})


def user_name(user: int) -> str:
    """A user's name, or the number of one who has none."""
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"user {user}"


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | _SAFELY, 0o600)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            _check_kind(path, path.lstat(), "a file")
        raise


def _check(path: Path, found: os.stat_result, kind: str, owners: Collection[int]) -> None:
    """Raise StagingError unless something is of a kind, of these owners, and theirs alone."""
    _check_kind(path, found, kind)
    if found.st_uid not in owners:
        name = user_name(found.st_uid)
        raise StagingError(
            f"{path} belongs to {name}, not to {_names(owners)}, so what is in it can't be "
            f"trusted; reembed leaves it alone: move it away, or run reembed as {name} if they "
            "made it"
        )
    if found.st_mode & _WRITABLE_BY_OTHERS:
        raise StagingError(
            f"{path} can be written by other users (mode {stat.S_IMODE(found.st_mode):04o}), so "
            "what is in it can't be trusted; reembed leaves it alone: move it away, or, if you "
            f"know that all in it is yours, chmod go-w {path}"
        )


def _check_kind(path: Path, found: os.stat_result, kind: str) -> None:
    actual = next((name for is_one, name in _KINDS if is_one(found.st_mode)), "a device")
    if actual != kind:
        raise StagingError(
            f"{path} is {actual}, where reembed keeps {kind}; reembed leaves it alone: move it "
            "away, and run again"
        )


def _names(owners: Collection[int]) -> str:
    return " or ".join(user_name(user) for user in sorted(owners, reverse=True))


_KINDS = (
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISREG, "a file"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
)
