"""The files that SQLite keeps beside a database, looked at before it uses them.

SQLite writes what it finds in `-journal` or `-wal` into the database, and deletes the file that a
journal names as the one that it belongs to. Where others can make files beside a database, or have
handed it over, each may be theirs.

Sources: https://sqlite.org/fileformat.html (rollback journal), https://sqlite.org/atomiccommit.html
(super-journal), https://sqlite.org/tempfiles.html.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import re
import stat
from pathlib import Path

from reembed.transforms.errors import StoreError

SUFFIXES = ("-journal", "-wal", "-shm")

_SAFELY = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_MAGIC = bytes.fromhex("d9d505f920a163d7")
_TAIL_BYTES = 16
"""Length of the name, its checksum and the magic bytes, at the end of a journal that has one."""

_MAX_NAME_BYTES = 65_536
_MAX_LIST_BYTES = 1_048_576
_SUPER_NAME = re.compile(r".+-mj[0-9A-F]{6}9[0-9A-F]{2}")


def check_side_files(path: Path) -> None:
    """Raise StoreError for a file beside a database that SQLite must not use.

    `path` is without links. Neither the database nor `-shm` is opened: SQLite holds locks on
    them, which closing any descriptor of this process would drop, whichever of two SQLite
    libraries has them. On a journal or a log it holds none.
    """
    try:
        database = path.stat()
    except (OSError, ValueError):
        return  # There is no database to use them with.
    for suffix in SUFFIXES:
        _check(Path(f"{path}{suffix}"), path, database)
    _check_journal(Path(f"{path}-journal"), path, database)


def _check(side: Path, path: Path, database: os.stat_result) -> bool:
    """Raise StoreError for a file that is not SQLite's; return whether there is one."""
    try:
        found = side.lstat()
    except (OSError, ValueError):  # Most often there is none; its name may be too long.
        return False
    leave = "reembed leaves it alone: move it away, and run again"
    if not stat.S_ISREG(found.st_mode):
        raise StoreError(
            f"{side} is not a regular file, so SQLite did not make it for {path}; {leave}"
        )
    if found.st_nlink > 1:
        raise StoreError(
            f"{side} is a hard link, so SQLite did not make it for {path}, and would write into "
            f"another file, too; {leave}, or, if you know that all in it is yours, put a copy in "
            "its place"
        )
    if not _may_write(found.st_uid, database):
        raise StoreError(
            f"{side} belongs to {_user_name(found.st_uid)}, who may not write {path}, and SQLite "
            f"would take over what is in it; {leave}"
        )
    if (who := _more_writers(found, database)) is not None:
        raise StoreError(
            f"{who} can write {side} (mode {stat.S_IMODE(found.st_mode):04o}) but not {path}, and "
            f"SQLite would take over what is in it; {leave}, or, if you know that all in it is "
            f"yours, chmod go-w {side}"
        )
    return True


def _may_write(user: int, database: os.stat_result) -> bool:
    """Whether the owner of a side file may have made it, as one who may write the database."""
    if user in (0, os.geteuid(), database.st_uid) or database.st_mode & stat.S_IWOTH:
        return True
    return bool(database.st_mode & stat.S_IWGRP) and _is_member(user, database.st_gid)


def _more_writers(found: os.stat_result, database: os.stat_result) -> str | None:
    """Who can write a side file, but not the database; None for nobody.

    SQLite makes it with the mode of the database. Its group is that of the user, if the directory
    does not pass on its own: it may then be one in which nobody else is.
    """
    more = found.st_mode & ~database.st_mode
    if database.st_mode & stat.S_IWOTH:
        return None
    if more & stat.S_IWOTH:
        return "all users"
    if not found.st_mode & stat.S_IWGRP or _is_private(found.st_gid, found.st_uid):
        return None
    if more & stat.S_IWGRP or found.st_gid != database.st_gid:
        return "other users"
    return None


def _is_member(user: int, group: int) -> bool:
    try:
        known = pwd.getpwuid(user)
        return group in os.getgrouplist(known.pw_name, known.pw_gid)
    except (KeyError, OSError):
        return False


def _is_private(group: int, user: int) -> bool:
    """Whether a group is that of one user alone, as most systems make for each."""
    try:
        known, owner = grp.getgrgid(group), pwd.getpwuid(user)
    except KeyError:
        return False
    return (known.gr_name, group) == (owner.pw_name, owner.pw_gid) and not (
        {*known.gr_mem} - {owner.pw_name}
    )


def _user_name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"user {user}"


def _check_journal(journal: Path, path: Path, database: os.stat_result) -> None:
    """Raise StoreError if SQLite would delete a file that is not its own, or wait for a pipe.

    A write to several databases has a super-journal, which lists their journals; each of them
    names it at its end. SQLite deletes it with the last of them.
    """
    named = _super_journal(journal)
    if not named:
        return
    place = Path(os.fsdecode(named))
    if not _SUPER_NAME.fullmatch(place.name) or place.parent.resolve() != path.parent:
        raise StoreError(
            f"{journal} would have SQLite delete {place}, which is no journal of its own beside "
            f"{path}; if a program was cut off that wrote to several databases, let it open {path} "
            "again; else somebody may have made the journal to have that file deleted: move it "
            "away, and run again"
        )
    if not _check(place, path, database):
        return
    for name in _read(place, _MAX_LIST_BYTES, from_end=False).split(b"\0"):
        if os.path.lexists(name) and not stat.S_ISREG(os.lstat(name).st_mode):
            raise StoreError(
                f"{place} names {os.fsdecode(name)} as a journal, which is not a regular file, so "
                f"SQLite did not make it; reembed leaves it alone: move {journal} away, and "
                "run again"
            )


def _super_journal(journal: Path) -> bytes:
    """The name that a journal has at its end, as SQLite reads it; empty for none.

    Nor has one whose first byte is 0: it was used before, and SQLite would overwrite it.
    The checksum of the name doesn't count here, since what its bytes add up to depends on the
    machine.
    """
    end = _read(journal, _MAX_NAME_BYTES + _TAIL_BYTES, from_end=True)
    if not end.endswith(_MAGIC) or _read(journal, 1, from_end=False) == b"\0":
        return b""
    length = int.from_bytes(end[-_TAIL_BYTES:-12])
    return end[:-_TAIL_BYTES][-length:].partition(b"\0")[0] if length else b""


def _read(file: Path, most: int, *, from_end: bool) -> bytes:
    """The first or last bytes of a file; none if it is not there."""
    try:
        descriptor = os.open(file, _SAFELY)
    except FileNotFoundError:
        return b""
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        if (
            getattr(error, "errno", None) == errno.ENAMETOOLONG
        ):  # The name is too long for SQLite, too.
            return b""
        raise StoreError(f"{file} can't be read ({why}); check its owner and mode") from None
    try:
        size = os.fstat(descriptor).st_size
        return os.pread(descriptor, most, max(0, size - most) if from_end else 0)
    except OSError as error:
        raise StoreError(f"{file} can't be read ({error.strerror}); check the disk") from None
    finally:
        os.close(descriptor)
