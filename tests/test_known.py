"""Equal texts are embedded once, also where two threads have them at the same time."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reembed.transforms.known import KnownTexts


@given(st.lists(st.lists(st.binary(max_size=1), max_size=6), max_size=8), st.integers(0, 300))
def test_each_text_gets_what_became_of_it_and_what_is_known_is_not_asked_again(
    parts: list[list[bytes]], most: int
) -> None:
    known: KnownTexts[str] = KnownTexts(most)
    asked: Counter[bytes] = Counter()

    def embed(digests: Sequence[bytes]) -> list[str]:
        asked.update(digests)
        return [digest.hex() for digest in digests]

    for part in parts:
        assert known.find(part, embed) == {digest: digest.hex() for digest in part}
    if most >= 256:
        assert set(asked.values()) <= {1}


def test_no_more_texts_are_known_than_there_may_be() -> None:
    known: KnownTexts[int] = KnownTexts(2)
    asked: list[bytes] = []

    def embed(digests: Sequence[bytes]) -> list[int]:
        asked.extend(digests)
        return [0 for _ in digests]

    for digest in (b"a", b"b", b"a", b"c", b"a", b"b"):
        known.find([digest], embed)
    # Of two, the one that was wanted longer ago goes.
    assert asked == [b"a", b"b", b"c", b"b"]


def test_a_text_that_another_thread_embeds_is_waited_for() -> None:
    known: KnownTexts[int] = KnownTexts(100)
    asked: Counter[bytes] = Counter()
    lock = threading.Lock()

    def embed(digests: Sequence[bytes]) -> list[int]:
        time.sleep(0.01)
        with lock:
            asked.update(digests)
        return [digest[0] for digest in digests]

    # Each two parts share texts crosswise: whoever waited first would wait for ever.
    parts = [[b"a", b"b", b"c"], [b"c", b"d", b"a"], [b"d", b"b", b"e"]] * 20
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda part: known.find(part, embed), parts))

    assert found == [{digest: digest[0] for digest in part} for part in parts]
    assert set(asked.values()) == {1}


def test_what_failed_is_not_known_and_fails_those_who_wait() -> None:
    known: KnownTexts[int] = KnownTexts(100)
    begun = threading.Event()

    def fail(digests: Sequence[bytes]) -> list[int]:
        begun.set()
        time.sleep(0.05)
        raise ValueError("down")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(known.find, [b"a"], fail)
        begun.wait()
        second = pool.submit(known.find, [b"a"], lambda digests: [1 for _ in digests])
        for future in (first, second):
            with pytest.raises(ValueError, match="down"):
                future.result()

    assert known.find([b"a"], lambda digests: [2 for _ in digests]) == {b"a": 2}
