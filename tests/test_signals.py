"""Interrupted, a run stops at once and goes on later; a second one is kept off meanwhile."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import pytest
from inline_snapshot import snapshot

from reembed.pipeline import cli
from reembed.transforms.embedders import PROBE_TEXTS, fake
from reembed.transforms.embedders.fake import FakeEmbedder
from reembed.transforms.stores.codec import encode
from tests import fake_program, kills
from tests.conftest import Call, clean_environment, make_store, memory, select
from tests.wording import line_with, wording

pytestmark = pytest.mark.system

ROWS, RANGE_ROWS = 320, 64
BOUND_SECONDS = 3.0
INTERRUPTED = snapshot(
    "reembed: interrupted; what is staged stays and the same command goes on from there "
    "(reembed status says how far it has come)"
)
SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.fixture(scope="module", autouse=True)
def fork_server() -> None:
    kills.start_fork_server(__name__)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    old: dict[str, Any] = {"embedding": b"\1" + bytes(16), "embedding_dim": 4}
    memories = [memory(f"{at:03d}", **old) for at in range(ROWS)]
    (tmp_path / "store").mkdir()
    return make_store(tmp_path / "store" / "m.db", memories, "wal")


class Running:
    """The program at work in another process; the texts that it embeds are in a file."""

    def __init__(self, path: Path, process: Any) -> None:
        self.path = path
        self.process = process

    def said(self, stream: str) -> str:
        """What it has printed."""
        return (self.path.parent.parent / stream).read_text()

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
            assert self.process.is_alive(), self.said("err")
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def interrupt(self, number: signal.Signals, times: int = 1) -> tuple[int, str, float]:
        """Send a signal; return the exit code, what was printed and the seconds it took."""
        started = time.monotonic()
        for _ in range(times):
            with suppress(ProcessLookupError):  # It has ended at an earlier one.
                os.kill(self.process.pid, number)
            time.sleep(0.05 if times > 1 else 0)
        self.process.join(60)
        seconds = time.monotonic() - started
        assert self.said("out") == ""
        return self.process.exitcode, self.said("err"), seconds


@contextmanager
def running(path: Path, **variables: object) -> Iterator[Running]:
    """The program is at work on a database, with variables of `tests/fake_program.py`."""
    home = path.parent.parent
    environment = clean_environment(home) | {"FAKE_RANGE_ROWS": str(RANGE_ROWS)}
    environment |= {f"FAKE_{name.upper()}": str(value) for name, value in variables.items()}
    process = kills.FORKS.Process(target=run_program, args=(home, path, environment))
    process.start()
    try:
        yield Running(path, process)
    finally:
        process.kill()
        process.join()


def run_program(home: Path, path: Path, environment: Mapping[str, str]) -> NoReturn:
    """The program, which notes each row's text before it is embedded."""
    os.environ.clear()
    os.environ.update(environment)
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(home / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), stream)

    class Noting(fake_program.Slow):
        def embed(self, texts: list[str]) -> object:  # type: ignore[override]
            with (home / "texts").open("a") as file:
                file.writelines(f"{text}\n" for text in texts if text not in PROBE_TEXTS)
            return super().embed(texts)

    fake_program.install()
    fake.FakeEmbedder = Noting  # type: ignore[misc]
    sys.exit(cli.main(["--db", str(path)]))


def go_on(reembed: Call, path: Path, *, through_beam: bool = False) -> tuple[str, list[str]]:
    """Run it to its end; return what it said and the texts that it embedded, as often as it did."""
    done = reembed("--db", path, range_rows=RANGE_ROWS, through_beam=through_beam)
    assert done.code == 0, done.err
    return done.err, [text for text in fake_program.embedded if text not in PROBE_TEXTS]


def vectors(path: Path) -> dict[str, bytes]:
    return dict(select(path, "SELECT id, embedding FROM memories"))


def new_vectors(path: Path) -> dict[str, bytes]:
    texts = dict(select(path, "SELECT id, title || ' ' || content FROM memories"))
    found = FakeEmbedder(8).embed(list(texts.values()))
    return {key: encode(vector) for key, vector in zip(texts, found, strict=True)}


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_run_that_is_interrupted_while_it_embeds_goes_on_with_the_rest(
    number: signal.Signals, code: int, path: Path, reembed: Call
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

    said, texts = go_on(reembed, path, through_beam=True)

    going_on = wording(line_with("rows are staged", said), path.parent)
    assert going_on.replace(f" {staged} ", " STAGED ") == snapshot(
        "reembed: STAGED of 320 rows are staged; going on (run RUN)"
    )
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

    assert (found, stderr.splitlines()[-1]) == (
        130,
        snapshot(
            "reembed: interrupted; nothing was staged, and this command wrote nothing to the "
            "store: the same command starts from the beginning"
        ),
    )
    assert "Traceback" not in stderr
    assert seconds < BOUND_SECONDS


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_run_stops_at_once_while_it_waits_for_another_program_to_release_the_database(
    number: signal.Signals, code: int, path: Path, reembed: Call
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
    said, texts = go_on(reembed, path)
    assert wording(line_with("is incomplete", said), path.parent) == snapshot(
        "reembed: the replacement by run RUN (to all-MiniLM-L6-v2 (8-dim)) is incomplete: of "
        "ranges 0-4, none hold new vectors, and 0-4 were being written; finishing it"
    )
    assert texts == []
    assert vectors(path) == new_vectors(path)


def test_a_run_that_is_interrupted_between_transactions_says_so_and_is_finished(
    path: Path, reembed: Call
) -> None:
    with running(path, rows_at_once=64, first_rows=64) as first:
        first.wait_until(lambda: first.state == "replacing" and first.manifest["done"])
        found, stderr, seconds = first.interrupt(signal.SIGINT)

    assert (found, stderr.splitlines()[-1]) == (130, INTERRUPTED)
    assert seconds < BOUND_SECONDS
    done = reembed("status", "--db", path, "--json")
    assert done.code == 6
    [status] = done.values["runs"]
    assert (status["state"], status["stopped"]) == ("replacing", "interrupted")
    new = new_vectors(path)
    held = vectors(path)
    assert sum(held[key] == new[key] for key in new) == status["rows_in_ranges_replaced"]
    _, texts = go_on(reembed, path)
    assert texts == []
    assert vectors(path) == new


def test_a_second_run_is_refused_while_the_first_is_at_work_and_goes_on_once_it_is_killed(
    path: Path, reembed: Call
) -> None:
    with running(path, seconds=1, range_rows=16) as first:
        first.wait_until(lambda: first.staged >= 1)
        lock = (path.parent / "m.db.reembed" / "lock").read_text()

        second = reembed("--db", path)
        cleanup = reembed("cleanup", "--db", path)
        status = reembed("status", "--db", path, "--json")
        dry = reembed("--db", path, "--dry-run", "--json")

        assert first.process.is_alive()
        first.process.kill()
        first.process.join()
    since = re.fullmatch(rf"{first.process.pid} (\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d UTC)\n", lock)
    assert since
    for refused in (second, cleanup):
        assert (refused.code, refused.out) == (1, "")
        assert f"(process {first.process.pid}, since {since[1]})" in refused.error
        last = "\n".join(refused.err.splitlines()[-2:]).replace(since[1], "SINCE")
        assert wording(last, path.parent) == snapshot("""\
reembed: error: another run is at work on TMP/m.db (process N, since SINCE); wait for it to end
reembed: this command wrote nothing to the store\
""")
    assert status.code == dry.code == 0
    [run] = status.values["runs"]
    assert run["state"] == "staging"
    assert 16 <= run["staged"] <= ROWS
    assert run["staged"] <= dry.values["rows_staged"] <= ROWS

    # Its lock has died with it.
    staged = first.staged * 16
    _, texts = go_on(reembed, path)
    assert len(texts) == ROWS - staged
    assert vectors(path) == new_vectors(path)
