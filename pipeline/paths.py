"""Paths and files that the user names: made sense of, or refused in one sentence."""

from __future__ import annotations

import os
import re
import stat
import tomllib
from pathlib import Path
from typing import Any

from reembed.pipeline.words import one_line
from reembed.transforms.errors import StoreError, UsageError

MAX_BYTES = 1_000_000
"""The longest file of settings."""

_MAX_DEPTH = 20
_MAX_DOTS = 200
_MAX_NUMBER = 2**63
_QUOTED = re.compile(r"""("[^"]*"|'[^']*')""")


def expanded(path: str) -> Path:
    """A path without a leading ~ or ~USER; raise UsageError if nobody has that home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UsageError(f"there is no such home as in {path}; correct the path") from None


def working_directory() -> Path:
    """The working directory; raise UsageError if it is gone."""
    try:
        return Path.cwd()
    except OSError as error:
        raise UsageError(
            f"the working directory can't be told ({error.strerror}), as if it was deleted; cd to "
            "one that is there, and run again"
        ) from None


def absolute_directory(named: str | None) -> str | None:
    """Make a directory that may be named absolute, with the home that ~ stands for."""
    return named and str(working_directory() / expanded(named))


def require_utf8(path: str | Path, what: str) -> None:
    """Raise UsageError for a path that can't stand in JSON; `what` says whose it is."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"{what}, {one_line(str(path))}, is not UTF-8, as the files must be in which reembed "
            "notes it; rename the file or the directory"
        ) from None


def check_database(database: Path) -> Path:
    """Refuse a path that can't be one of a database; it need not be there.

    Raises StoreError for one that can't be followed, UsageError for one that is not UTF-8.
    """
    require_utf8(database, "the path of the database")
    try:
        real = database.resolve()
        require_utf8(real, "the path of the database")
        database.stat()
        real.with_name(f"{real.name}.reembed").lstat()  # A name may be too long for that.
    except FileNotFoundError:
        pass
    except (OSError, RuntimeError, ValueError) as error:
        why = getattr(error, "strerror", None) or "a link leads back to itself"
        raise StoreError(
            f"{database} can't be read ({why}); check its name, owner and mode"
        ) from None
    return database


def find_dead_link(path: Path) -> Path | None:
    """The first symbolic link of a path, from its end, that leads nowhere."""
    return next((p for p in (path, *path.parents) if p.is_symlink() and not p.exists()), None)


def read_file(path: Path) -> bytes:
    """Read a file of settings; raise OSError or ValueError if it can't be one."""
    # Non-blocking: a FIFO would be waited for.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is not a regular file")
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"it is longer than {MAX_BYTES:,} bytes")
    return content


def read_toml(path: Path) -> dict[str, Any]:
    """Read a file of TOML; raise OSError or ValueError for one that is none, or is not sane."""
    text = read_file(path).decode()
    # tomllib takes a time by the square of the dots of a key.
    if any(_QUOTED.sub("", line).count(".") > _MAX_DOTS for line in text.split("\n")):
        raise ValueError("it is nested too deeply")
    try:
        values = tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    # By a list, not by recursion: headers of one line each make a depth, too.
    left: list[tuple[Any, int]] = [(values, 0)]
    while left:
        value, depth = left.pop()
        if isinstance(value, int) and abs(value) > _MAX_NUMBER:
            raise ValueError("it holds a number of more than 64 bits")
        if depth > _MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        inner = value.values() if isinstance(value, dict) else value
        if isinstance(value, (dict, list)):
            left += [(one, depth + 1) for one in inner]
    return values
