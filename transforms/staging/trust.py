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
import secrets
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from reembed.transforms.errors import StagingError, UsageError

MAX_JSON_BYTES = 64 * 1024 * 1024
"""Of a JSON file; a manifest of ten million rows takes about 2 MB."""

MAX_FILE_BYTES = 1024 * 1024 * 1024
"""Of any other file that is read; a shard or a backup file usually takes a few MB."""

WITHOUT_MODES = (
    "since its file system keeps no owners and modes, so what is in it can't be trusted; name a "
    "directory on another file system with --run-dir, or mount this one for you alone "
    "(umask=077)"
)

SAFELY = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def read_file(path: Path, *, most: int | None = None) -> bytes:
    """Read a file of a run, of up to `most` bytes (by its name: see `max_bytes`).

    Raises StagingError for one that can't be trusted or is larger, OSError as `open` does.
    """
    limit = max_bytes(path) if most is None else most
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(limit + 1) if size <= limit else b""
        if max(size, len(content)) > limit:
            raise StagingError(
                f"{path} is larger than {limit:,} bytes, which no file of its kind is; restore it "
                "from a copy, or move it away"
            )
        return content


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file of a run to read it; raise StagingError for one that can't be trusted.

    Raises OSError as `open` does.
    """
    with os.fdopen(_open(path, os.O_RDONLY), "rb") as file:
        _check(path, os.fstat(file.fileno()), "a file", owners_within(path.parent))
        yield file


def open_lock(path: Path) -> int:
    """Open a file that is locked and written in place, making it if need be: the descriptor.

    Raises StagingError for one that can't be trusted, or that has another name besides: what is
    written would be written there, too. Raises OSError as `open` does.
    """
    descriptor = _open(path, os.O_RDWR | os.O_CREAT)
    try:
        _check_lock(path, os.fstat(descriptor))
        make_private(descriptor, 0o600, like=path.parent)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def check_lock(path: Path) -> None:
    """Raise StagingError if a lock is there that can't be trusted, without opening it."""
    with suppress(FileNotFoundError):
        _check_lock(path, path.lstat())


def _check_lock(path: Path, found: os.stat_result) -> None:
    _check(path, found, "a file", owners_within(path.parent), in_a_root=True)
    if found.st_nlink > 1:
        raise StagingError(
            f"{path} is a hard link: what reembed notes in it would be written into another "
            "file; reembed leaves it alone: remove it, and run again"
        )


def check_no_directories(directory: Path, is_file: Callable[[str], bool]) -> None:
    """Raise StagingError for a directory that has the name of a file, which could not be written.

    Raises OSError if the directory can't be listed.
    """
    with os.scandir(directory) as entries:
        for entry in entries:
            if is_file(entry.name) and entry.is_dir(follow_symlinks=False):
                _check_kind(Path(entry.path), entry.stat(follow_symlinks=False), "a file")


def make_private(descriptor: int, mode: int, *, like: Path) -> None:
    """Give what was just made a mode, whatever the umask, and, as root, the owner of `like`."""
    found, user = os.fstat(descriptor), os.geteuid()
    if found.st_uid == user and stat.S_IMODE(found.st_mode) != mode:
        with suppress(PermissionError):  # A file system that has no modes.
            os.fchmod(descriptor, mode)
    if user == 0 and found.st_uid == 0:
        wanted = like.stat()
        if wanted.st_uid != 0:
            os.fchown(descriptor, wanted.st_uid, wanted.st_gid)


def check_directory(path: Path, owners: Collection[int]) -> None:
    """Raise StagingError unless this is a real directory of these owners, and theirs alone.

    Raises OSError as `lstat` does.
    """
    _check(path, path.lstat(), "a directory", owners)


def check_root(path: Path, owners: Collection[int]) -> None:
    """Raise StagingError unless the directory beside a database can be trusted.

    Where the file system has no modes, all may write it: it then holds but a lock and links, and
    what these lead to is checked. Raises OSError as `lstat` does.
    """
    _check(path, path.lstat(), "a directory", owners, in_a_root=True)


def check_parent(path: Path, flag: str, owners: Collection[int]) -> None:
    """Raise UsageError for a directory in which others can put another in the place of ours.

    Of one that is not there yet, the nearest that is there counts. All above it do, too: who can
    rename one of them can exchange all that is in it. `flag` has named it. Raises OSError as
    `stat` does.
    """
    absolute = path.absolute()
    existing = next(one for one in (absolute, *absolute.parents) if os.path.lexists(one))
    real = Path(os.path.realpath(existing))
    for place in dict.fromkeys((existing, *existing.parents, real, *real.parents)):
        _check_place(place, flag, owners)


def _check_place(place: Path, flag: str, owners: Collection[int]) -> None:
    """Raise UsageError for a directory in which others can rename what is ours.

    The sticky bit keeps all from that but the directory's owner.
    """
    found = place.stat()
    so = "so they could put something else in the place of a run there"
    if found.st_uid not in owners:
        name = user_name(found.st_uid)
        raise UsageError(
            f"{place} belongs to {name}, not to {_names(owners)}, {so}; name a directory of your "
            f"own with {flag}"
        )
    if not found.st_mode & _WRITABLE_BY_OTHERS or found.st_mode & stat.S_ISVTX:
        return
    why = f"other users can write {place} (mode {stat.S_IMODE(found.st_mode):04o})"
    if not has_modes(place):
        raise UsageError(
            f"{why}, and its file system keeps no modes, {so}; name a directory on another file "
            f"system with {flag}"
        )
    raise UsageError(
        f"{why}, {so}; name a directory of your own with {flag}, or take the right from them: "
        f"chmod go-w {place}"
    )


def has_modes(directory: Path) -> bool:
    """Whether a file that is made in a directory is its owner's alone, if it is made so.

    On FAT and the like, how the file system is mounted decides who can read and write it.
    """
    path = directory / f".reembed.{secrets.token_hex(4)}.tmp"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError:
        return True  # It can't be told.
    try:
        return not os.fstat(descriptor).st_mode & _WRITABLE_BY_OTHERS
    finally:
        os.close(descriptor)
        with suppress(OSError):
            path.unlink()


def max_bytes(path: Path) -> int:
    """The maximum size of a file of a run, by its name."""
    return MAX_JSON_BYTES if path.suffix == ".json" else MAX_FILE_BYTES


def owners_within(directory: Path) -> frozenset[int]:
    """The users whose files are trusted in a directory that was found to be trusted."""
    user = os.geteuid()
    if user != 0:
        return frozenset({user, 0})
    with suppress(OSError):
        return frozenset({0, directory.lstat().st_uid})
    return frozenset({0})


def owners_beside(database: Path) -> frozenset[int]:
    """The users whose run directories are trusted: this one, root; for root, the database's owner.

    A database that is not there has no owner.
    """
    user = os.geteuid()
    if user != 0:
        return frozenset({user, 0})
    with suppress(OSError):
        return frozenset({0, database.stat().st_uid})
    return frozenset({0})


def user_name(user: int) -> str:
    """A user's name, or the number of one who has none."""
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"user {user}"


def barred_by(error: OSError, path: Path) -> str:
    """Say whose directory or file keeps this user off, if it is another's; else nothing."""
    place = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else path
    known = next((one for one in (place, *place.parents) if os.path.lexists(one)), place)
    for one in (known, known.parent):
        with suppress(OSError):
            owner = one.lstat().st_uid
            if owner != os.geteuid() and not os.access(one, os.R_OK | os.W_OK):
                name = user_name(owner)
                return f"{one} belongs to {name}: run reembed as {name}, or have it given to you"
    return ""


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | SAFELY, 0o600)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            _check_kind(path, path.lstat(), "a file")
        raise


def _check(
    path: Path,
    found: os.stat_result,
    kind: str,
    owners: Collection[int],
    *,
    in_a_root: bool = False,
) -> None:
    """Raise StagingError unless something is of a kind, of these owners, and theirs alone."""
    _check_kind(path, found, kind)
    if found.st_uid not in owners:
        name = user_name(found.st_uid)
        raise StagingError(
            f"{path} belongs to {name}, not to {_names(owners)}, so what is in it can't be "
            f"trusted; reembed leaves it alone: move it away, or run reembed as {name} if they "
            "made it"
        )
    if not found.st_mode & _WRITABLE_BY_OTHERS:
        return
    what = f"{path} can be written by other users (mode {stat.S_IMODE(found.st_mode):04o})"
    if has_modes(path.parent):
        raise StagingError(
            f"{what}, so what is in it can't be trusted; reembed leaves it alone: move it away, "
            f"or, if you know that all in it is yours, chmod go-w {path}"
        )
    if not in_a_root:
        raise StagingError(f"{what}, {WITHOUT_MODES}")


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
