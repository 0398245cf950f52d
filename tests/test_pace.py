"""How fast a server is asked."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reembed.transforms.embedders.pace import MOST_WAIT_SECONDS, Budget, Outage, Pace, backoff


def test_it_widens_with_each_answer_until_the_first_sign_of_too_much() -> None:
    pace = Pace(most=32)
    assert pace.width == 4
    for _ in range(6):
        pace.answered(0.1)
    assert pace.width == 10

    pace.answered(0.3)
    assert pace.width == 9
    for _ in range(12):
        pace.answered(0.1)
    # From then on it takes as many answers as are in flight for one more.
    assert pace.width == 11


def test_it_widens_to_the_most_and_no_further() -> None:
    pace = Pace(most=6)
    for _ in range(30):
        pace.answered(0.1)
    assert pace.width == 6


def test_it_narrows_where_answers_take_longer_than_twice_the_best() -> None:
    pace = Pace(most=8)
    pace.answered(0.1)
    for _ in range(50):
        pace.answered(0.3)

    assert pace.width == 1


def test_a_refusal_takes_a_quarter_and_a_crowd_of_them_counts_as_one() -> None:
    pace = Pace(most=32)
    for _ in range(100):
        pace.answered(0.1)
    assert pace.width == 32

    for _ in range(10):
        pace.refused(0.1)
    assert pace.width == 24
    time.sleep(0.12)
    pace.refused(0.1)
    assert pace.width == 18


def test_it_never_falls_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reembed.transforms.embedders.pace._CROWD_SECONDS", 0.01)
    pace = Pace(most=1)
    for _ in range(3):
        pace.refused(0.0)
        time.sleep(0.02)
    assert pace.width == 1


def test_no_more_turns_are_given_at_a_time_than_its_width() -> None:
    pace, now, most = Pace(most=3), 0, 0
    lock = threading.Lock()

    def work(_: int) -> None:
        nonlocal now, most
        with pace.turn():
            with lock:
                now += 1
                most = max(most, now)
            time.sleep(0.002)
            with lock:
                now -= 1

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(work, range(60)))

    assert (now, most) == (0, 3)


def test_a_turn_is_given_back_where_it_ends_in_an_error() -> None:
    pace = Pace(most=1)
    for _ in range(3):
        with pytest.raises(ValueError, match="no"), pace.turn():
            raise ValueError("no")
    with pace.turn():
        pass


def test_an_outage_is_as_long_as_the_time_without_any_answer() -> None:
    outage = Outage()
    before = time.monotonic()
    assert outage.failed(before - 1) >= 1
    assert outage.failed(before) >= 1
    assert not outage.answered_since(before)
    outage.answered()
    assert outage.answered_since(before)
    assert outage.failed(time.monotonic()) < 1


def reserve(budget: Budget, tokens: int, *, alone: bool = False) -> int | None:
    return budget.reserve(lambda: tokens, alone=lambda: alone)


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 60))), st.integers(1, 300))
def test_what_is_spent_and_reserved_stays_within_the_budget(
    requests: list[tuple[int, int]], most: int
) -> None:
    budget = Budget(most)
    for reserved, spent in requests:
        before = budget.spent
        if reserve(budget, reserved) is not None:
            assert before + reserved <= most
            budget.settle(reserved, spent)
            assert budget.spent == before + spent
        else:
            assert before + reserved > most


def test_requests_that_are_not_answered_yet_count_against_the_budget() -> None:
    budget = Budget(100)

    assert reserve(budget, 60) == 60
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(reserve, budget, 60)
        time.sleep(0.05)
        assert not other.done()
        budget.settle(60, 50)
        assert other.result() is None
    assert reserve(budget, 50) == 50


def test_a_request_that_is_to_be_alone_waits_for_the_others() -> None:
    budget = Budget(100)
    assert reserve(budget, 10, alone=True) == 10
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(reserve, budget, 10, alone=True)
        time.sleep(0.05)
        assert not other.done()
        budget.settle(10, 10)
        assert other.result() == 10


@given(st.integers(0, 10**6))
def test_waits_grow_to_a_bound(attempt: int) -> None:
    longest = min(MOST_WAIT_SECONDS, 0.5 * 2 ** min(attempt, 30))

    assert longest / 2 <= backoff(attempt) <= longest
