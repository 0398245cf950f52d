"""What is seen while a run goes on."""

from __future__ import annotations

import os
import pty
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from reembed.pipeline import progress
from reembed.pipeline.plan import Plan
from reembed.transforms.embed import embed_rows
from reembed.transforms.embedders.fake import FakeEmbedder
from reembed.transforms.read import StoreRows
from tests.conftest import begin, change, fake_plan, make_store, memory


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    rows = [memory(f"{i:02d}") for i in range(10)]
    return fake_plan(make_store(tmp_path / "m.db", rows), rows=4)


def stage(plan: Plan, ranges: int, *, pass_number: int = 1) -> None:
    for keys in plan.ranges[:ranges]:
        for part in StoreRows(plan.store, plan.run, pass_number).read_parts(keys):
            vectors = embed_rows(part, FakeEmbedder(8), dimension=8, batch=9)
            plan.run.write_shard(vectors, pass_number=pass_number)


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until something is true; a test that waits in vain fails."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)


def test_rows_are_counted_by_the_ranges_that_are_staged(plan: Plan) -> None:
    assert progress.staged_rows(plan) == 0
    begin(plan)
    assert progress.staged_rows(plan) == 0
    stage(plan, 2)
    assert progress.staged_rows(plan) == 8
    stage(plan, 3)
    assert progress.staged_rows(plan) == 10


def test_a_row_that_is_staged_again_does_not_make_more_rows_than_there_are(plan: Plan) -> None:
    stage(begin(plan), 3)
    change(plan.store.path, "UPDATE memories SET content = 'edited' WHERE id = '03'")
    stage(plan, 3, pass_number=2)

    assert plan.run.staged_rows() == 11
    assert progress.staged_rows(plan) == 10


def test_the_rate_counts_only_what_this_run_has_done(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.05)
    stage(begin(plan), 2)
    seen: list[str] = []

    def printed(words: str) -> bool:
        seen.append(capsys.readouterr().err)
        return words in "".join(seen)

    with progress.showing_progress(plan):
        # What an earlier try has staged is no speed, so there is no guess when it will end.
        wait_for(lambda: printed("reembed: 8 of 10 rows embedded, 0 rows/s\n"))


def test_without_a_terminal_plain_lines_are_printed(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.05)
    seen: list[str] = []

    def printed(words: str) -> bool:
        seen.append(capsys.readouterr().err)
        return words in "".join(seen)

    begin(plan)
    with progress.showing_progress(plan):
        stage(plan, 2)
        wait_for(lambda: printed("reembed: 8 of 10 rows embedded, "))
        stage(plan, 3)
        wait_for(lambda: printed("reembed: 10 of 10 rows embedded, "))
    assert " rows/s, about " in "".join(seen)


def test_on_a_terminal_a_bar_is_drawn(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    drawn: list[bytes] = []

    def read(words: bytes) -> bool:
        drawn.append(os.read(ours, 10_000))
        return words in b"".join(drawn)

    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        begin(plan)
        with progress.showing_progress(plan):
            stage(plan, 2)
            wait_for(lambda: read(b"8/10"))
            stage(plan, 3)
            wait_for(lambda: read(b"replacing"))
    os.close(ours)
