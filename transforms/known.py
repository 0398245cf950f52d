"""Known texts: what became of a text, so that an equal one is not embedded again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")

_Working = Future[dict[bytes, T]]
"""What becomes of the texts that one thread is embedding."""


class KnownTexts(Generic[T]):
    """The latest texts of a process by their digests, at most so many, and what became of each.

    A text that another thread is embedding is waited for.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: OrderedDict[bytes, T] = OrderedDict()
        self._working: dict[bytes, _Working[T]] = {}
        self._lock = threading.Lock()

    def find(
        self, digests: Iterable[bytes], embed: Callable[[Sequence[bytes]], Sequence[T]]
    ) -> dict[bytes, T]:
        """Give what became of each text; `embed` is called for those that nobody has embedded.

        If it fails, so do those who wait for it, and the texts are not known.
        """
        found: dict[bytes, T] = {}
        others: dict[bytes, _Working[T]] = {}
        mine: list[bytes] = []
        working: _Working[T] = Future()
        with self._lock:
            for digest in dict.fromkeys(digests):
                if digest in self._known:
                    self._known.move_to_end(digest)
                    found[digest] = self._known[digest]
                elif digest in self._working:
                    others[digest] = self._working[digest]
                else:
                    mine.append(digest)
            self._working.update(dict.fromkeys(mine, working))
        # First one's own, then the others': so nobody waits for one who waits for him.
        try:
            made = dict(zip(mine, embed(mine) if mine else [], strict=True))
        except BaseException as error:
            self._forget(mine)
            working.set_exception(error)
            raise
        with self._lock:
            self._known.update(made)
            while len(self._known) > self._most:
                self._known.popitem(last=False)
        self._forget(mine)
        working.set_result(made)
        return found | made | {digest: work.result()[digest] for digest, work in others.items()}

    def _forget(self, digests: Iterable[bytes]) -> None:
        with self._lock:
            for digest in digests:
                del self._working[digest]
