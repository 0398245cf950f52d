"""End on Ctrl-C or SIGTERM with 130 or 143 and one line, whatever the program is doing."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from contextlib import suppress
from types import FrameType
from typing import NoReturn

NUMBERS = (signal.SIGINT, signal.SIGTERM)

NOTHING_WRITTEN = "interrupted; this command wrote nothing to the store"
NOTHING_STAGED = (
    "interrupted; nothing was staged, and this command wrote nothing to the store: the same "
    "command starts from the beginning"
)
GOES_ON = (
    "interrupted; what is staged stays and the same command goes on from there (reembed status "
    "says how far it has come)"
)
SEE_STATUS = "interrupted; reembed status says how far it has come"
DONE = "interrupted when all was done, as the result was printed; reembed status shows it"

_AGAIN_SECONDS = 1.0
"""A second signal within this time (in seconds) is ignored: several senders may mean the same.

A later one ends the program at once.
"""

_UNWIND_SECONDS = 5.0
"""Time between a signal and a forced end of the process, in seconds."""

_LINE_SECONDS = 1.0
"""Time that the last line may wait for a blocked stderr, in seconds."""


class Interrupts:
    """The signal handlers of the program, and the line that it prints when it is interrupted.

    Until `unwind`, a signal ends the process at once, since nothing has begun. After that, the
    first signal raises KeyboardInterrupt in the main thread, so that files can be closed and the
    state recorded. `line` is what the user is told. Once there is an exit code (`finish`), a
    signal no longer changes it.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.line = NOTHING_WRITTEN
        self._since = 0.0
        self._unwinds = False
        self._code: int | None = None

    def take(self) -> None:
        """Handle both signals from now on. Call it in the main thread."""
        for number in NUMBERS:
            signal.signal(number, self._interrupt)

    def unwind(self) -> None:
        """Raise KeyboardInterrupt for a signal from now on."""
        self._unwinds = True

    def finish(self, code: int) -> None:
        """Keep to an exit code: the result is printed, and it says what has happened."""
        self._code = code

    def watch(self) -> None:
        """End the program also where the main thread does not come to it.

        It may be in a long call of a library, or a library may have swallowed the exception.
        """
        import threading

        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        # A child's signals are its own.
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        threading.Thread(target=self._wait, args=(reader,), daemon=True).start()

    def end(self, number: int) -> NoReturn:
        """Print the line and end the process, whatever its other threads do."""
        # Past sys.stderr, which may be in the middle of a line, or a pipe that nobody reads.
        line = f"reembed: {self.line}\n"
        with suppress(OSError, ValueError):
            if os.isatty(2) and os.environ.get("TERM", "dumb") != "dumb":
                line = f"\r\x1b[K\x1b[?25h{line}"  # The bar may have hidden the cursor.
            if select.select([], [2], [], _LINE_SECONDS)[1]:
                os.write(2, line.encode())
        os._exit(128 + number)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._code is not None:
            os._exit(self._code)
        if self.received is not None:
            if time.monotonic() - self._since > _AGAIN_SECONDS:
                self.end(self.received)
            return
        self.received, self._since = number, time.monotonic()
        if not self._unwinds:
            self.end(number)
        from io import StringIO

        sys.stderr = StringIO()  # Runners print the traceback of what ends them.
        raise KeyboardInterrupt

    def _wait(self, reader: int) -> None:
        while (number := os.read(reader, 1)[0]) not in NUMBERS:
            pass
        time.sleep(_UNWIND_SECONDS)
        if self._code is None:
            self.end(number)
