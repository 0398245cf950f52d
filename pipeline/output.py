"""Print: a result to stdout, all else to stderr. Neither can end a run."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TextIO


def tell(line: str) -> None:
    """Print a line to stderr; if that can't be written, the line is lost and no more."""
    stream = sys.stderr
    if stream is None:  # It was closed before the start, and print would take stdout instead.
        return
    try:
        print(line, file=stream, flush=True)
    except (OSError, ValueError):
        sys.stderr = _silenced(stream)


def print_result(text: str) -> str:
    """Print to stdout; return why it could not be written, or nothing.

    A reader that has gone is no failure: it has what it wanted, as `head` and `grep -q` do.
    """
    stream = sys.stdout
    if stream is None:
        return "stdout is closed"
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        sys.stdout = _silenced(stream)
    except (OSError, ValueError) as error:
        sys.stdout = _silenced(stream)
        return getattr(error, "strerror", None) or str(error)
    return ""


def open_closed_streams() -> None:
    """Give descriptors 0 to 2 to the null device if they are closed.

    The next file that is opened would get such a number, and whatever is printed there.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _silenced(stream: TextIO) -> TextIO:
    """A stream to nowhere in place of one that fails.

    What the latter has buffered would fail again when Python ends, and change the exit code.
    """
    nowhere = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - open to the end
    with suppress(OSError, ValueError):  # No file of the system's, or closed.
        os.dup2(nowhere.fileno(), stream.fileno())
    return nowhere
