"""Print: a result to stdout, all else to stderr. Neither can end a run."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from reembed.pipeline.words import one_line

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


def tell(line: str) -> None:
    """Print a line to stderr, whatever is in it; if that can't be written, the line is lost."""
    stream = sys.stderr
    if stream is None:  # print would take stdout instead.
        return
    try:
        print(one_line(line), file=stream, flush=True)
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
        print("\n".join(map(one_line, text.split("\n"))), file=stream, flush=True)
    except BrokenPipeError:
        sys.stdout = _silenced(stream)
    except (OSError, ValueError) as error:
        sys.stdout = _silenced(stream)
        return getattr(error, "strerror", None) or str(error)
    return ""


def open_streams() -> None:
    """Make it safe to open files and to write to stderr, whatever the descriptors are.

    Descriptors 0 to 2 that are closed are given to the null device: the next file that is opened
    would get such a number, and whatever is printed there. What libraries write to stderr must
    not end a run either, so that one which fails takes everything.
    """
    with suppress(OSError):  # A machine without a null device.
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(descriptor, True)
        os.close(descriptor)
    with suppress(OSError):
        sys.stderr = io.TextIOWrapper(
            io.BufferedWriter(_Lenient(2, "wb", closefd=False)),
            encoding=getattr(sys.stderr, "encoding", "utf-8"),
            errors="backslashreplace",
            line_buffering=True,
        )


class _Lenient(io.FileIO):
    """A descriptor to which every write succeeds: what can't be written is lost."""

    def write(self, data: ReadableBuffer, /) -> int:
        size = memoryview(data).nbytes
        try:
            return super().write(data) or size  # None where it would have to wait.
        except OSError:
            return size


def _silenced(stream: TextIO) -> TextIO:
    """A stream to nowhere in place of one that fails.

    What the latter has buffered would fail again when Python ends, and change the exit code.
    """
    try:
        nowhere = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - open to the end
    except OSError:  # No descriptor is free, or there is no null device.
        return io.StringIO()
    with suppress(OSError, ValueError):  # No file of the system's, or closed.
        os.dup2(nowhere.fileno(), stream.fileno())
    return nowhere
