"""The interpreter that reembed is imported into stays as it was.

Libraries change more than their own state: while they are imported or load a model, they add
filters of warnings, set environment variables and configure loggers; while a pipeline runs, Beam
gives the root logger a handler if it has none. Embedded in another program, reembed takes all of
that back.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_window = threading.RLock()
_inside = False

_users_lock = threading.Lock()
_users = 0


@contextmanager
def undisturbed() -> Iterator[None]:
    """Take back what changes in the process meanwhile: one thread at a time, for seconds at most.

    That is warning filters, environment variables, and the level, handlers and propagation of the
    root logger and of all loggers that were there before. What another thread changes in that time
    is lost, too, so this is for imports and for loading a model, not for a run. Inside of another
    one it does nothing.
    """
    global _inside
    with _window:
        if _inside:
            yield
            return
        _inside = True
        try:
            with _restored():
                yield
        finally:
            _inside = False


@contextmanager
def _restored() -> Iterator[None]:
    with warnings.catch_warnings():
        environment = dict(os.environ)
        loggers = [(logger, _state(logger), [*logger.handlers]) for logger in _loggers()]
        try:
            yield
        finally:
            for logger, state, handlers in loggers:
                if (_state(logger), logger.handlers) != (state, handlers):
                    logger.propagate, logger.disabled = state[1:]
                    logger.handlers[:] = handlers
                    logger.setLevel(state[0])
            for name in os.environ.keys() - environment.keys():
                del os.environ[name]
            for name, value in environment.items():
                if os.environ.get(name) != value:
                    os.environ[name] = value


@contextmanager
def unconfigured() -> Iterator[None]:
    """Keep libraries from configuring the root logger and from keeping a handler of Ctrl-C.

    In any thread, for as long as a run takes, also several at once. Signal handlers are only put
    back in the main thread, which alone can change them.
    """
    global _users
    root = logging.getLogger()
    main = threading.current_thread() is threading.main_thread()
    interrupt = signal.getsignal(signal.SIGINT)
    with _users_lock:
        _users += 1
        if not root.handlers:  # Then logging.basicConfig() would add one.
            root.addHandler(_IN_PLACE_OF_NONE)
    try:
        yield
    finally:
        with _users_lock:
            _users -= 1
            if not _users:
                root.removeHandler(_IN_PLACE_OF_NONE)
        if main and interrupt is not None and signal.getsignal(signal.SIGINT) != interrupt:
            signal.signal(signal.SIGINT, interrupt)


class _InPlaceOfNone(logging.Handler):
    """Does with a record what `logging` does with one for which there is no handler."""

    def emit(self, record: logging.LogRecord) -> None:
        at: logging.Logger | None = logging.getLogger(record.name)
        while at is not None:
            if any(handler is not self for handler in at.handlers):
                return
            at = at.parent if at.propagate else None
        last = logging.lastResort
        if last is not None and record.levelno >= last.level:
            last.handle(record)


_IN_PLACE_OF_NONE = _InPlaceOfNone()


def _loggers() -> list[logging.Logger]:
    named = [*logging.Logger.manager.loggerDict.values()]
    return [logging.getLogger(), *(one for one in named if isinstance(one, logging.Logger))]


def _state(logger: logging.Logger) -> tuple[int, bool, bool]:
    return logger.level, logger.propagate, logger.disabled
