"""How fast a server is asked: requests at a time, waiting, giving up, and what may be spent."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from reembed.transforms.embedders.target import FIRST_IN_FLIGHT

FIRST_WAIT_SECONDS = 0.5
MOST_WAIT_SECONDS = 30.0

_SLOWER = 2.0
"""A server that takes so many times as long as at its best has more requests than it can do."""

_NOISE_SECONDS = 0.05
"""So much longer says nothing: this machine may have been busy."""

_LESS = 0.75
"""What is left of the requests in flight after a refusal."""

_CROWD_SECONDS = 0.1


class Pace:
    """How many requests are in flight: more while the server keeps up, fewer where it refuses.

    Additive increase, multiplicative decrease, after Chiu and Jain, Computer Networks and ISDN
    Systems 17 (1989); before the first sign of too much, one more for each answer.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._wanted = float(min(most, FIRST_IN_FLIGHT))
        self._steady = False
        self._active = 0
        self._best = float("inf")
        self._refused = 0.0
        self._changed = threading.Condition()

    @property
    def width(self) -> int:
        """Requests that may be in flight now."""
        return int(self._wanted)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until one more request may be sent."""
        with self._changed:
            self._changed.wait_for(lambda: self._active < self.width)
            self._active += 1
        try:
            yield
        finally:
            with self._changed:
                self._active -= 1
                self._changed.notify_all()

    def answered(self, seconds: float) -> None:
        """Take note of an answer and how long it took."""
        with self._changed:
            self._best = min(self._best, seconds)
            slow = seconds > _SLOWER * self._best + _NOISE_SECONDS
            self._steady = self._steady or slow
            # As many answers as are in flight make one more, or one fewer.
            step = 1 / self._wanted if self._steady else 1.0
            self._want(self._wanted + (-step if slow else step))

    def refused(self, seconds: float) -> None:
        """Take note of a refusal; those that come at once, of one crowd, count as one."""
        with self._changed:
            self._steady = True
            now = time.monotonic()
            if now - self._refused > max(seconds, _CROWD_SECONDS):
                self._refused = now
                self._want(_LESS * self._wanted)

    def _want(self, requests: float) -> None:
        self._wanted = min(float(self._most), max(1.0, requests))
        self._changed.notify_all()


class Outage:
    """For how long a server has given no right answer, though it was asked."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._answered = 0.0
        self._lock = threading.Lock()

    def answered(self) -> None:
        """Take note of a right answer."""
        with self._lock:
            self._since = None
            self._answered = time.monotonic()

    def failed(self, asked: float) -> float:
        """Take note that what was asked at a moment of the monotonic clock has failed.

        Gives the seconds since the first such moment without a right answer after it.
        """
        with self._lock:
            if self._since is None:
                self._since = asked
            return time.monotonic() - self._since

    def answered_since(self, moment: float) -> bool:
        """Whether there was a right answer after a moment of the monotonic clock."""
        with self._lock:
            return self._answered > moment


class Budget:
    """The tokens that may be spent, and those that were.

    A request is reserved before it is sent by an estimate, and settled by what the server says.
    """

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._spent = 0
        self._reserved = 0
        self._changed = threading.Condition()

    @property
    def spent(self) -> int:
        """Tokens of the requests that were answered."""
        return self._spent

    def reserve(self, estimate: Callable[[], int], *, alone: Callable[[], bool]) -> int | None:
        """Reserve the tokens of a request; None if it would pass what may be spent.

        It waits for what other requests come to where they leave too little, or where it is to
        be `alone`, since an estimate that was never tried may be far off.
        """
        with self._changed:
            while self._most is not None:
                tokens = estimate()
                fits = self._spent + self._reserved + tokens <= self._most
                if not self._reserved and not fits:
                    return None
                if not self._reserved or (fits and not alone()):
                    break
                self._changed.wait()
            tokens = estimate()
            self._reserved += tokens
            return tokens

    def settle(self, reserved: int, spent: int) -> None:
        """Put what a request came to in the place of what was reserved for it."""
        with self._changed:
            self._reserved -= reserved
            self._spent += spent
            self._changed.notify_all()


def backoff(attempt: int) -> float:
    """Seconds to wait before the next attempt: doubled each time, capped, and spread by chance.

    "Full jitter" over the upper half, so that many who were refused don't all come back at once:
    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/

    >>> 0.25 <= backoff(0) <= 0.5, 15 <= backoff(99) <= 30
    (True, True)
    """
    longest = min(MOST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** min(attempt, 30))
    wait: float = longest * random.uniform(0.5, 1.0)
    return wait
