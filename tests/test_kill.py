"""A process that is killed at any moment leaves the store whole, and the next one goes on.

Each try is a process that is forked from one that has imported everything. It tells how far it
has come, and is killed (SIGKILL) at a random moment after that. Then the table is looked at row
by row, over a new connection to a copy, so that the next try meets what the dead one has left.
Nothing is put back before a run has come to its end. `pytest -rP` shows the figures.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import sqlite3
import sys
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reembed.pipeline import cli, progress, run, surroundings, upkeep  # noqa: F401 - for those forked
from reembed.transforms import replacing, rollback
from reembed.transforms.embedders import Target, fake
from reembed.transforms.passes import Pass, Phase
from reembed.transforms.rows import KeyRange, Stored, Vectors
from reembed.transforms.staging import (
    Rules,
    RunDirectory,
    State,
    find_runs,
    lock_database,
    new_token,
)
from reembed.transforms.stores import Replacement, open_store, recover_store
from reembed.transforms.stores.codec import encode
from reembed.transforms.stores.demo import SCHEMA, Memory, create_store, generated_memories
from tests import fake_program
from tests.conftest import (
    change,
    clean_environment,
    memory,
    other_contents,
    plain_pass,
    select,
)
from tests.kills import FORKS, KILLED, start_fork_server

pytestmark = pytest.mark.system

KILLS = int(os.environ.get("REEMBED_TEST_KILLS", "4"))
"""Kills of a run in each journal mode: twice as many of a large one, a third of a rollback."""

SMALL, LARGE = (2_000, 30_000) if KILLS > 4 else (1_000, 8_000)
"""Rows of a store that is replaced in one transaction, and in many."""

SQLITES = {"m.db", "m.db-wal", "m.db-shm", "m.db-journal"}
OURS = re.compile(
    r"lock|\.?\d{8}T\d{6}Z-[0-9a-f]{4}(\.made|\.removed)?/("
    r"reserve|manifest.lock|(manifest|summary|rollback|pass-\d+)\.json|((shards|backup)/)?\.[^/]+\.tmp|"
    r"shards/\d{7}\.\d{4}\.\d{3}\.\d{5}\.[0-9a-f]{16}\.parquet|"
    r"backup/\d{7}\.\d{4}\.[0-9a-f]{16}\.parquet)"
)
STAMP = "sentence-transformers/all-minilm-l6-v2#none"

STARTED, SAVING, LOCKED, WRITING, WRITTEN = range(5)
"""How far a process has come: to the backup, into a transaction, to its writes, out of it."""

Held = dict[str, tuple[bytes | None, int | None, str | None]]
"""What each row holds: its vector, the dimension and the stamp."""


@dataclass(frozen=True)
class Moment:
    """When to kill: so many seconds after a mark, or a later one, was passed so many times."""

    mark: int
    times: int = 1
    seconds: float = 0.0


@dataclass
class Trial:
    """A database under torture, what it may hold, and what is seen of it.

    With `several`, a replacement and a rollback take many short transactions. Through Beam
    (`beam`) rows are embedded as by a user, else in a plain loop, which takes a tenth of the time.
    """

    folder: Path
    dimension: int
    several: bool
    old: Held
    new: Held
    beam: bool = False
    kills: int = 0
    seen: Counter[str] = field(default_factory=Counter)

    @property
    def path(self) -> Path:
        return self.folder / "store" / "m.db"

    @property
    def root(self) -> Path:
        return self.path.with_name("m.db.reembed")

    @property
    def run(self) -> RunDirectory | None:
        """The run, where there is one."""
        found = find_runs(self.path)
        return found[-1][0] if found else None

    @property
    def state(self) -> State | None:
        return self.run.read_manifest().state if self.run else None

    @property
    def said(self) -> str:
        """What the last process has printed."""
        return (self.folder / "said").read_text()

    def put_aside(self, name: str) -> Path:
        """Copy the database and its run to a place from which they can be put back."""
        return Path(shutil.copytree(self.path.parent, self.folder / name))

    def put_back(self, place: Path, mode: str | None = None) -> None:
        """Put back what was put aside, perhaps in another journal mode."""
        shutil.rmtree(self.path.parent)
        shutil.copytree(place, self.path.parent)
        if mode is not None:
            with closing(sqlite3.connect(self.path)) as db:
                assert db.execute(f"PRAGMA journal_mode={mode}").fetchone() == (mode,)


# ---- What runs in the forked processes ----


def run_program(trial: Trial, tell: Connection, *arguments: str) -> None:
    """The program with the fake embedder."""
    _prepare(trial, tell)
    about = ["--db", str(trial.path)]
    if arguments[:1] not in [("rollback",), ("status",)]:
        about += ["--dim", str(trial.dimension), "--model", "all-MiniLM-L6-v2"]
    sys.exit(cli.main([*arguments, *about]))


def only_replace(trial: Trial, tell: Connection) -> None:
    """What a run does when all its rows are staged."""
    _prepare(trial, tell)
    recover_store(trial.path)
    store = open_store(trial.path)
    with lock_database(store.path):
        [(run, manifest)] = find_runs(store.path)
        attempt = new_token()
        run.set_reserve()
        run.take_over(manifest, attempt)
        target, rules = Target.from_json(manifest.target), Rules()
        job = replacing.ReplaceJob(store, run, manifest.ranges, target, rules, attempt)
        replacing.replace_vectors(job, Pass(1, (), Phase.HOLD))


class Hashed(fake.FakeEmbedder):
    """Vectors from a hash of each text: what many rows take no time to get."""

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Return vectors of shape (len(texts), dimension)."""
        size = self._dimension
        hashes = [blake2b(text.encode(), digest_size=size).digest() for text in texts]
        numbers = np.frombuffer(b"".join(hashes), np.uint8).reshape(len(texts), size)
        return numbers.astype(np.float32) + 1


def _prepare(trial: Trial, tell: Connection) -> None:
    os.environ.clear()
    os.environ.update(clean_environment(trial.folder))
    os.environ["FAKE_RANGE_ROWS"] = "256" if trial.several else "64"
    fake_program.install()
    fake.FakeEmbedder = Hashed  # type: ignore[misc]
    if not trial.beam:
        run._run_pass = plain_pass
    if trial.several:
        for module in (replacing, rollback):
            module.MOST_ROWS_AT_ONCE = 500  # type: ignore[attr-defined]
            # One range each; of the first four that are begun there is time for no more, too.
            module.TRANSACTION_SECONDS = 0.0  # type: ignore[attr-defined]
        replacing._FIRST_ROWS = 1_024
        replacing._PAUSE_SECONDS = 0.01
    save, begin, put = replacing._save_all, Replacement.transaction, Replacement.put
    inside = [False]

    def saving(job: replacing.ReplaceJob, table: Replacement, *, force: bool) -> Any:
        tell.send(SAVING)
        return save(job, table, force=force)

    @contextmanager
    def locked(table: Replacement) -> Iterator[None]:
        # As with a table larger than the cache, what is not committed reaches the disk.
        table._db.execute("PRAGMA cache_size=16")
        with begin(table):
            tell.send(LOCKED)
            inside[0] = True
            yield
            inside[0] = False
        tell.send(WRITTEN)

    def putting(
        table: Replacement, changes: Sequence[tuple[int, Stored]], *, vector_only: bool = False
    ) -> None:
        if inside[0]:  # Not in the trial of a row, which is not written for good.
            tell.send(WRITING)
        put(table, changes, vector_only=vector_only)

    replacing._save_all = saving
    Replacement.transaction = locked  # type: ignore[method-assign,assignment]
    Replacement.put = putting  # type: ignore[method-assign,assignment]
    said = os.open(trial.folder / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(said, 1)
    os.dup2(said, 2)
    tell.send(STARTED)


# ---- What is done to them, and what is seen afterwards ----


@pytest.fixture(scope="module", autouse=True)
def fork_server() -> None:
    """Start the process from which the others are forked, and wait until it has everything."""
    start_fork_server(__name__)


def attempt(
    trial: Trial,
    moment: Moment | None,
    work: Callable[..., None] = run_program,
    *arguments: str,
) -> int:
    """Let a process work, to its end or until it is killed; return its exit code."""
    hear, tell = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=work, args=(trial, tell, *arguments))
    process.start()
    tell.close()
    with closing(hear):
        if moment is not None and _wait_for(moment, hear):
            time.sleep(moment.seconds)
            process.kill()
        process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def _wait_for(moment: Moment, hear: Connection) -> bool:
    """Wait until the mark was passed often enough; False if the process ends before that."""
    passed = 0
    with suppress(EOFError):
        while passed < moment.times:
            assert hear.poll(120)
            passed += hear.recv() >= moment.mark
    return passed == moment.times


def choose(
    dice: random.Random, seconds: Mapping[int, float], weights: Sequence[int], most_times: int = 1
) -> Moment:
    """A random moment: a mark by its weight, and at most so long after it."""
    [mark] = dice.choices(list(seconds), weights)
    times = dice.randint(1, most_times) if mark >= LOCKED else 1
    return Moment(mark, times, dice.uniform(0, seconds[mark]))


def look(trial: Trial, code: int) -> set[str]:
    """Look at all that a process has left; return the rows that hold new vectors."""
    assert code in (0, KILLED), trial.said
    trial.kills += code == KILLED
    assert {place.name for place in trial.path.parent.iterdir()} <= SQLITES | {trial.root.name}
    assert [name for name in names(trial.root) if not OURS.fullmatch(name)] == []
    new = new_rows(trial)
    state = trial.state
    share = "all new" if len(new) == len(trial.new) else "part new" if new else "all old"
    trial.seen[f"{state or 'no run'}, {share}"] += code == KILLED
    if state in (None, State.STAGING, State.ROLLED_BACK):
        assert new == set()
    elif state is State.REPLACED:
        assert new == trial.new.keys()
    elif state is State.REPLACING:
        assert new == named_by_status(trial)
    return new


def names(directory: Path) -> list[str]:
    """The names of all files below a directory."""
    places = directory.rglob("*")
    return [str(place.relative_to(directory)) for place in places if not place.is_dir()]


def new_rows(trial: Trial) -> set[str]:
    """The rows that hold new vectors; the others hold their old ones, and nothing else is there."""
    copy = trial.folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for name in SQLITES - {"m.db-shm"}:
        with suppress(FileNotFoundError):
            shutil.copy(trial.path.with_name(name), copy)
    held = read_held(copy / "m.db")
    new = {key for key, row in held.items() if row == trial.new[key]}
    assert held == trial.old | {key: trial.new[key] for key in new}
    return new


def read_held(path: Path) -> Held:
    """What every row holds; the database must be sound."""
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        found = db.execute("SELECT id, embedding, embedding_dim, embedding_space FROM memories")
        return {key: (vector, dimension, stamp) for key, vector, dimension, stamp in found}


def named_by_status(trial: Trial) -> set[str]:
    """The rows of the ranges that `status` names as new, with exit code 6."""
    assert attempt(trial, None, run_program, "status", "--json") == 6
    assert trial.run
    manifest = trial.run.read_manifest()
    lines = [line for line in trial.said.splitlines() if line.startswith("{")]
    if lines:
        [found] = json.loads(lines[0])["runs"]
        named = {i for first, last in found["ranges_replaced"] for i in range(first, last + 1)}
    else:
        # Until the journal is rolled back nobody can read the table; what was begun is undone.
        assert re.search("its journal lies beside it.*the replacement.* is incomplete", trial.said)
        named = set(manifest.done)
        trial.seen["a journal to roll back"] += 1
    return {key for key, index in find_ranges(manifest.ranges, trial.new).items() if index in named}


def find_ranges(ranges: Sequence[KeyRange], keys: Mapping[str, Any]) -> dict[str, int]:
    """The range that each key falls in."""
    ends = [keys.until for keys in ranges if keys.until is not None]
    return {key: bisect_left(ends, key) for key in keys}


def everything(path: Path) -> tuple[list[tuple[Any, ...]], dict[str, list[tuple[Any, ...]]]]:
    """All columns of all rows, as they are stored, and what else there is."""
    return select(path, "SELECT rowid, * FROM memories ORDER BY rowid"), other_contents(path)


def finish(trial: Trial, *arguments: str) -> None:
    """Let a last run come to its end; nothing is left but the lock, and what a run keeps."""
    assert attempt(trial, None, run_program, *arguments) == 0, trial.said
    look(trial, 0)
    assert trial.run
    left = {name.removeprefix(f"{trial.run.run_id}/") for name in names(trial.root)}
    left = {name for name in left if not re.match(r"backup/.*\.parquet|pass-\d+\.json", name)}
    assert left <= {"lock", "manifest.json", "manifest.lock", "summary.json", "rollback.json"}
    print(
        f"{trial.folder.name}: killed {trial.kills} times; then seen: "
        + "; ".join(f"{what}: {count}" for what, count in sorted(trial.seen.items()) if count)
    )


# ---- The stores ----


def make_trial(folder: Path, mode: str, memories: Sequence[Memory], *, several: bool) -> Trial:
    """Make a store and work out what its rows hold before and after."""
    path = folder / "store" / "m.db"
    path.parent.mkdir(parents=True)
    if several:
        make_bare_store(path, memories)
        change(path, f"PRAGMA journal_mode={mode}")
    else:
        create_store(str(path), memories, journal_mode=mode)
    change(
        path,
        "ALTER TABLE memories ADD COLUMN embedding_space TEXT",
        "UPDATE memories SET embedding_space = 'former#none' WHERE embedding_dim IS NOT NULL",
    )
    dimension = 8 if several else 64
    texts = {memory.id: f"{memory.title} {memory.content}" for memory in memories}
    vectors = Hashed(dimension).embed(list(texts.values()))
    new: Held = {
        key: (encode(vector), dimension, STAMP) for key, vector in zip(texts, vectors, strict=True)
    }
    return Trial(folder, dimension, several, read_held(path), new)


def make_bare_store(path: Path, memories: Sequence[Memory]) -> None:
    """A store without a search index, and only the two indexes that a replacement changes.

    The others make one of many rows slow to write and to check.
    """
    with closing(sqlite3.connect(path)) as db, db:
        db.executescript(SCHEMA)
        for kind, name in db.execute("SELECT type, name FROM sqlite_schema").fetchall():
            kept = ("idx_memories_embedding_dim", "idx_memories_ns_dim")
            if name not in kept and (kind == "trigger" or name.startswith("idx_")):
                db.execute(f"DROP {kind} {name}")
        columns = list(vars(memories[0]))
        named, places = ", ".join(columns), ", ".join(f":{column}" for column in columns)
        db.executemany(f"INSERT INTO memories ({named}) VALUES ({places})", map(vars, memories))


def small_trial(folder: Path, mode: str) -> Trial:
    # One row in seven has no vector yet.
    rows = [
        replace(row, embedding=None, embedding_dim=None) if at % 7 == 0 else row
        for at, row in enumerate(generated_memories(SMALL, dimension=32))
    ]
    return make_trial(folder, mode, rows, several=False)


def large_trial(folder: Path, mode: str) -> Trial:
    dice = random.Random(60)
    old = [encode(np.array([at] * 8)) for at in range(64)]
    rows = [
        memory(dice.randbytes(16).hex(), "", embedding=old[at % 64], embedding_dim=8)
        for at in range(LARGE)
    ]
    return make_trial(folder, mode, rows, several=True)


# ---- The tests ----


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_a_killed_run_leaves_all_old_or_all_new_and_the_next_one_goes_on(
    mode: str, tmp_path: Path
) -> None:
    trial = small_trial(tmp_path / f"{SMALL:,} rows in one transaction, {mode}", mode)
    trial.beam = mode == "wal"
    untouched = trial.put_aside("untouched")
    dice = random.Random(f"{mode} 57")
    seconds = {STARTED: 1.0, SAVING: 0.2, LOCKED: 0.1, WRITING: 0.05, WRITTEN: 0.2}
    if not trial.beam:
        seconds[STARTED] = 0.3
    staged = None
    while trial.kills < KILLS:
        whole = staged is None or trial.state is None or dice.random() < 0.15
        moment = choose(dice, seconds, [4, 4, 4, 9, 6] if whole else [1, 4, 4, 9, 4])
        code = attempt(trial, moment, run_program if whole else only_replace)
        new = look(trial, code)
        assert len(new) in (0, len(trial.new))
        if staged is None and trial.run and trial.state is State.STAGING:
            all_are = trial.run.staged_rows() == len(trial.new)
            staged = trial.put_aside("staged") if all_are else None
        if new and (code == 0 or trial.state is State.REPLACED):
            trial.put_back(staged if staged and dice.random() < 0.8 else untouched)
    finish(trial)
    assert other_contents(trial.path) == other_contents(untouched / "m.db")


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_a_killed_rollback_leaves_all_new_or_all_old_and_the_next_one_goes_on(
    mode: str, tmp_path: Path
) -> None:
    trial = small_trial(tmp_path / f"rollback of {SMALL:,} rows, {mode}", mode)
    before = everything(trial.path)
    assert attempt(trial, None) == 0
    replaced = trial.put_aside("replaced")
    ranges = len(trial.run.read_manifest().ranges) if trial.run else 0
    dice = random.Random(f"{mode} 58")
    while trial.kills < KILLS // 3:
        moment = choose(dice, {STARTED: 0.1, LOCKED: 0.15, WRITTEN: 0.1}, [1, 3, 3])
        if dice.random() < 0.5:  # In or just before the commit, after the last of the ranges.
            moment = Moment(WRITING, ranges, dice.uniform(0, 0.02))
        code = attempt(trial, moment, run_program, "rollback")
        assert len(look(trial, code)) in (0, len(trial.new))
        if trial.state is State.ROLLED_BACK:
            assert everything(trial.path) == before
            trial.put_back(replaced)
    finish(trial, "rollback")
    assert everything(trial.path) == before


def test_a_run_killed_between_transactions_leaves_whole_ranges_that_status_names(
    tmp_path: Path,
) -> None:
    trial = large_trial(tmp_path / f"{LARGE:,} rows in many transactions", "wal")
    others = other_contents(trial.path)
    dice = random.Random(59)
    assert attempt(trial, Moment(SAVING)) == KILLED
    look(trial, KILLED)
    new: set[str] = set()
    many = Moment(WRITTEN, LARGE // 256 - 18)
    for moment in (Moment(SAVING, 1, LARGE / 30_000 * dice.random()), Moment(WRITING, 1), many):
        new = look(trial, attempt(trial, moment, only_replace))
    while ranges_left(trial, new) > 9:
        moment = Moment(WRITTEN, max(1, ranges_left(trial, new) - 9), dice.uniform(0, 0.01))
        new = look(trial, attempt(trial, moment, only_replace))
    # The few transactions that are left take little time, and so are done again and again.
    assert 0 < ranges_left(trial, new) <= 9
    late = trial.put_aside("late")
    seconds = {STARTED: 0.4, LOCKED: 0.02, WRITING: 0.01, WRITTEN: 0.02}
    while trial.kills < 2 * KILLS:
        if len(new) == len(trial.new):
            trial.put_back(late, "wal" if trial.kills < KILLS else "delete")
            new = new_rows(trial)
        most_times = max(1, ranges_left(trial, new) // 2)
        moment = choose(dice, seconds, [1, 5, 8, 5], most_times)
        new = look(trial, attempt(trial, moment, only_replace))
    assert trial.seen["replacing, part new"] > KILLS // 2
    if len(new) < len(trial.new):
        assert attempt(trial, None, run_program, "--dry-run") == 6
    finish(trial)
    assert other_contents(trial.path) == others

    # The way back from a replacement that was never finished; there is a sixth of it at most
    # each time, so that it is not at its end before it is killed.
    trial.put_back(late, "delete")
    for seconds_later in (0.0, 0.03, 0.06):
        moment = Moment(WRITTEN, dice.randint(1, LARGE // 256 // 6), seconds_later)
        assert attempt(trial, moment, run_program, "rollback") == KILLED
        new = look(trial, KILLED)
        ranges = find_ranges(trial.run.read_manifest().ranges, trial.new) if trial.run else {}
        assert {ranges[key] for key in new}.isdisjoint(ranges[key] for key in ranges.keys() - new)
    trial.several = False  # In several it would wait for other writers after each.
    finish(trial, "rollback")
    assert new_rows(trial) == set()
    assert other_contents(trial.path) == others


def ranges_left(trial: Trial, new: set[str]) -> int:
    """How many ranges of 256 rows hold their old vectors."""
    return (len(trial.new) - len(new)) // 256
