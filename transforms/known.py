"""Known texts: what became of a text, so that an equal one is not embedded again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class KnownTexts(Generic[T]):
    """The latest texts of a process by their digests, at most so many, and what became of each.

    A text that another thread is embedding is waited for.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: OrderedDict[bytes, Future[T]] = OrderedDict()
        self._lock = threading.Lock()

    def find(
        self, digests: Iterable[bytes], embed: Callable[[Sequence[bytes]], Sequence[T]]
    ) -> dict[bytes, T]:
        """Give what became of each text; `embed` is called for those that nobody has embedded.

        If it fails, so do those who wait for it, and the texts are not known.
        """
        found: dict[bytes, Future[T]] = {}
        mine: list[bytes] = []
        with self._lock:
            for digest in dict.fromkeys(digests):
                if digest not in self._known:
                    self._known[digest] = Future()
                    mine.append(digest)
                self._known.move_to_end(digest)
                found[digest] = self._known[digest]
            while len(self._known) > self._most:
                self._known.popitem(last=False)
        # First one's own, then the others': so nobody waits for one who waits for him.
        try:
            for digest, result in zip(mine, embed(mine) if mine else [], strict=True):
                found[digest].set_result(result)
        except BaseException as error:
            with self._lock:
                for digest in mine:
                    self._known.pop(digest, None)
            for digest in mine:
                if not found[digest].done():
                    found[digest].set_exception(error)
            raise
        return {digest: future.result() for digest, future in found.items()}
