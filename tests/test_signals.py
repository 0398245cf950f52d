"""Interrupted, a run stops at once and goes on later; a second one is kept off meanwhile."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from reembed.pipeline import interrupts
from reembed.transforms.embedders import PROBE_TEXTS, fake
from reembed.transforms.embedders.fake import FakeEmbedder
from reembed.transforms.stores.codec import encode
from tests import fake_program
from tests.conftest import Program, clean_environment, make_store, memory, select

ROWS, RANGE_ROWS = 320, 64
BOUND_SECONDS = 3.0
INTERRUPTED = (
    "reembed: interrupted; what is staged stays and the same command goes on from there "
    "(reembed status says how far it has come)"
)
NOTHING_STAGED = f"reembed: {interrupts.NOTHING_STAGED}"
UNCHANGED = "reembed: this command wrote nothing to the store"
SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    old: dict[str, Any] = {"embedding": b"\1" + bytes(16), "embedding_dim": 4}
    memories = [memory(f"{at:03d}", **old) for at in range(ROWS)]
    (tmp_path / "store").mkdir()
    return make_store(tmp_path / "store" / "m.db", memories, "wal")


class Running:
    """The program at work in another process; the texts that it embeds are in a file."""

    def __init__(self, path: Path, process: subprocess.Popen[str]) -> None:
        self.path = path
        self.process = process

    @property
    def run(self) -> Path | None:
        """Its run directory, once it is there."""
        return next(iter(self.path.parent.glob("m.db.reembed/2*")), None)

    @property
    def state(self) -> str:
        return str(self.manifest["state"]) if self.run else ""

    @property
    def manifest(self) -> dict[str, Any]:
        place = (self.run or self.path) / "manifest.json"
        values: dict[str, Any] = json.loads(place.read_text())
        return values

    @property
    def staged(self) -> int:
        """How many ranges are staged."""
        return len([*self.run.glob("shards/0*.parquet")]) if self.run else 0

    def wait_until(self, happens: Callable[[], object]) -> None:
        deadline = time.monotonic() + 120
        while not happens():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def interrupt(self, number: signal.Signals, times: int = 1) -> tuple[int, str, float]:
        """Send a signal; return the exit code, what was printed and the seconds it took."""
        started = time.monotonic()
        for _ in range(times):
            self.process.send_signal(number)
            time.sleep(0.05 if times > 1 else 0)
        stdout, stderr = self.process.communicate(timeout=60)
        assert stdout == ""
        return self.process.returncode, stderr, time.monotonic() - started


@contextmanager
def running(path: Path, **variables: object) -> Iterator[Running]:
    """The program is at work on a database, with variables of `tests/fake_program.py`."""
    home = path.parent.parent
    environment = clean_environment(home) | {"FAKE_RANGE_ROWS": str(RANGE_ROWS)}
    environment |= {f"FAKE_{name.upper()}": str(value) for name, value in variables.items()}
    command = [sys.executable, "-m", "tests.test_signals", str(home / "texts"), "--db", str(path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, text=True, stdout=pipe, stderr=pipe) as process:
        try:
            yield Running(path, process)
        finally:
            process.kill()


def go_on(path: Path) -> tuple[str, list[str]]:
    """Run it to its end; return what it said and which rows' texts it embedded."""
    before = embedded(path)
    with running(path) as again:
        _, stderr = again.process.communicate(timeout=120)
    assert again.process.returncode == 0, stderr
    return stderr, embedded(path)[len(before) :]


def embedded(path: Path) -> list[str]:
    """The keys of the rows of which a text was embedded, as often as it was."""
    texts = (path.parent.parent / "texts").read_text().splitlines()
    return [text.removeprefix("title ").partition(" ")[0] for text in texts]


def vectors(path: Path) -> dict[str, bytes]:
    return dict(select(path, "SELECT id, embedding FROM memories"))


def new_vectors(path: Path) -> dict[str, bytes]:
    texts = dict(select(path, "SELECT id, title || ' ' || content FROM memories"))
    found = FakeEmbedder(8).embed(list(texts.values()))
    return {key: encode(vector) for key, vector in zip(texts, found, strict=True)}


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_run_that_is_interrupted_while_it_embeds_goes_on_with_the_rest(
    number: signal.Signals, code: int, path: Path
) -> None:
    before = vectors(path)
    with running(path, seconds=0.4) as first:
        first.wait_until(lambda: first.staged >= 2)
        found, stderr, seconds = first.interrupt(number)
    print(f"stopped {seconds:.2f} s after {number.name}")

    assert (found, stderr.splitlines()[-1]) == (code, INTERRUPTED)
    assert "Traceback" not in stderr
    assert seconds < BOUND_SECONDS
    assert vectors(path) == before
    staged = first.staged * RANGE_ROWS
    assert 2 * RANGE_ROWS <= staged < ROWS
    assert first.state == "staging"

    said, texts = go_on(path)

    assert f"reembed: {staged} of {ROWS} rows are staged; going on (run " in said
    assert len(texts) == len(set(texts)) == ROWS - staged
    assert vectors(path) == new_vectors(path)


@pytest.mark.parametrize("times", [1, 3])
def test_a_run_stops_at_once_also_where_the_model_is_slow_and_the_user_impatient(
    times: int, path: Path
) -> None:
    texts = path.parent.parent / "texts"
    with running(path, seconds=20) as first:
        # It says so before each text of the probes, too.
        first.wait_until(texts.exists)
        found, stderr, seconds = first.interrupt(signal.SIGINT, times)

    assert (found, stderr.splitlines()[-1]) == (130, NOTHING_STAGED)
    assert "Traceback" not in stderr
    assert seconds < BOUND_SECONDS


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_run_stops_at_once_while_it_waits_for_another_program_to_release_the_database(
    number: signal.Signals, code: int, path: Path
) -> None:
    before = vectors(path)
    with running(path, seconds=0.1) as first, closing(sqlite3.connect(path)) as other:
        first.wait_until(lambda: first.staged >= 1)
        other.execute("BEGIN IMMEDIATE")
        first.wait_until(lambda: first.state == "replacing")
        time.sleep(0.3)  # It waits for the lock by now.
        found, stderr, seconds = first.interrupt(number)
        other.rollback()

    assert (found, stderr.splitlines()[-1]) == (code, INTERRUPTED)
    assert "Traceback" not in stderr
    assert seconds < BOUND_SECONDS
    assert vectors(path) == before
    said, texts = go_on(path)
    assert "is incomplete" in said
    assert texts == []
    assert vectors(path) == new_vectors(path)


def test_a_run_that_is_interrupted_between_transactions_says_so_and_is_finished(
    path: Path, fake_program: Program
) -> None:
    with running(path, rows_at_once=64, first_rows=64) as first:
        first.wait_until(lambda: first.state == "replacing" and first.manifest["done"])
        found, stderr, seconds = first.interrupt(signal.SIGINT)

    assert (found, stderr.splitlines()[-1]) == (130, INTERRUPTED)
    assert seconds < BOUND_SECONDS
    done = fake_program("status", "--db", path, "--json")
    assert done.returncode == 6
    [status] = json.loads(done.stdout)["runs"]
    assert (status["state"], status["stopped"]) == ("replacing", "interrupted")
    new = new_vectors(path)
    held = vectors(path)
    assert sum(held[key] == new[key] for key in new) == status["rows_in_ranges_replaced"]
    _, texts = go_on(path)
    assert texts == []
    assert vectors(path) == new


def test_a_second_run_is_refused_while_status_and_a_dry_run_work_beside_the_first(
    path: Path, fake_program: Program
) -> None:
    with running(path, seconds=1, range_rows=16) as first:
        first.wait_until(lambda: first.staged >= 1)
        lock = (path.parent / "m.db.reembed" / "lock").read_text()

        second = fake_program("--db", path)
        cleanup = fake_program("cleanup", "--db", path)
        status = fake_program("status", "--db", path, "--json")
        dry = fake_program("--db", path, "--dry-run", "--json")

        assert first.process.poll() is None
        first.interrupt(signal.SIGTERM)
    since = re.fullmatch(rf"{first.process.pid} (\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d UTC)\n", lock)
    assert since
    refusal = (
        f"reembed: error: another run is at work on {path} (process {first.process.pid}, since "
        f"{since[1]}); wait for it to end"
    )
    for refused in (second, cleanup):
        assert (refused.returncode, refused.stdout) == (1, "")
        assert refused.stderr.splitlines()[-2:] == [refusal, UNCHANGED]
    assert status.returncode == dry.returncode == 0
    [run] = json.loads(status.stdout)["runs"]
    assert run["state"] == "staging"
    assert 16 <= run["staged"] <= ROWS
    assert run["staged"] <= json.loads(dry.stdout)["rows_staged"] <= ROWS


def test_a_lock_dies_with_its_process(path: Path) -> None:
    with running(path, seconds=0.4) as first:
        first.wait_until(lambda: first.staged >= 1)
        first.process.kill()
        first.process.wait()
        staged = first.staged * RANGE_ROWS

    said, texts = go_on(path)

    assert f"reembed: {staged} of {ROWS} rows are staged; going on (run " in said
    assert len(texts) == ROWS - staged
    assert vectors(path) == new_vectors(path)


class Noting(fake_program.Slow):
    """Notes each row's text before it is embedded."""

    def embed(self, texts: list[str]) -> object:  # type: ignore[override]
        with Path(sys.argv[1]).open("a") as file:
            file.writelines(f"{text}\n" for text in texts if text not in PROBE_TEXTS)
        return super().embed(texts)


if __name__ == "__main__":
    from reembed.pipeline.cli import main

    fake_program.install()
    fake.FakeEmbedder = Noting  # type: ignore[misc]
    sys.exit(main(sys.argv[2:]))
