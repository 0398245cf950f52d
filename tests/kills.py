"""Random SIGKILLs of launchers and workers: `python -m tests.kills --seed N --kills K`.

Each trial makes a store, starts a run in a mode drawn at random, kills its launcher or a worker
(SIGKILL) at random moments, lets other programs edit rows, finishes the run with the same command
or rolls back, kills that as well, and compares every row with what it must hold by the rules of
`tests/kill_stores.py`. A trial is drawn from the seed and its number, so that it can be repeated
(`--trial`); the moments themselves are the machine's.

The exit code is 1 if any row was wrong, a table was mixed while all seemed well, or a previous
vector was neither in the table nor in the backup.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from reembed.pipeline import cli, progress, run, surroundings, upkeep  # noqa: F401 - for those forked
from reembed.transforms import replacing, rollback
from reembed.transforms.staging import files
from reembed.transforms.stores import Replacement
from tests import fake_program
from tests.conftest import clean_environment, plain_pass
from tests.kill_stores import (
    AI_MEMORY,
    SHOPS,
    Entries,
    Entry,
    Shop,
    Vector,
    Wish,
    differences,
    edited,
    is_skipped,
    statement_text,
)

FORKS = multiprocessing.get_context("forkserver")
KILLED = -signal.SIGKILL
LONGEST_SECONDS = 120.0
ORPHAN_SECONDS = 15.0
"""How long workers may go on without their launcher."""

RANGE_ROWS = 32
MOST_KILLS = 5
"""Of a run, and as many of its rollback."""

LOOP = "a plain loop"
RUNNERS: Mapping[str, Sequence[str]] = {
    LOOP: (),
    "DirectRunner": (),
    "BundleBasedDirectRunner": ("--runner", "BundleBasedDirectRunner"),
    "threads": ("--", "--direct_running_mode=multi_threading", "--direct_num_workers=2"),
    "processes": ("--", "--direct_running_mode=multi_processing", "--direct_num_workers=2"),
}
"""Command lines by what runs the graph. The workers of `processes` are processes of their own; a
plain loop does what the graph does, in a tenth of the time."""

MIXED, LOST, WRONG, OTHER = "mixed tables", "lost backups", "rows wrong", "other"


class Broken(Exception):
    """A promise that was not kept, of one of four kinds."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(kind, what)
        self.kind, self.what = kind, what


@dataclass
class Figures:
    """What was done and seen in all trials."""

    trials: int = 0
    kills: int = 0
    where: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    hung: int = 0

    def lines(self) -> Iterator[str]:
        """The figures, a line each."""
        yield f"trials: {self.trials}, rows looked at: {self.rows:,}"
        yield f"kills: {self.kills}, {self.hung} of them of what waited for a worker that was gone"
        for what, count in sorted(self.where.items(), key=lambda pair: -pair[1]):
            yield f"  {what}: {count}"
        for kind in (MIXED, LOST, WRONG, OTHER):
            yield f"{kind}: {self.broken[kind]}"


# ---- What runs in the forked processes ----


def run_program(
    folder: Path, tell: Connection, environment: Mapping[str, str], arguments: Sequence[str]
) -> None:
    """The program with the fake embedder; each step that it takes is told as a byte."""
    whole = {**clean_environment(folder), **environment}
    os.environ.clear()
    os.environ.update(whole)
    os.chdir(folder)
    fake_program.install()
    if "KILLS_LOOP" in environment:
        run._run_pass = plain_pass
    if "FAKE_ROWS_AT_ONCE" in environment:
        rollback.MOST_ROWS_AT_ONCE = int(environment["FAKE_ROWS_AT_ONCE"])  # type: ignore[attr-defined]
        for module in (replacing, rollback):
            module.TRANSACTION_SECONDS = 0.0  # type: ignore[attr-defined]
        replacing._PAUSE_SECONDS = 0.01
    tell_steps(tell)
    said = os.open(folder / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.exit(cli.main(arguments))


def tell_steps(tell: Connection) -> None:
    """Tell of each file that is published, and of the steps of each transaction."""
    publish, begin, put = files.publish, Replacement.transaction, Replacement.put

    def step() -> None:
        with suppress(OSError):
            os.write(tell.fileno(), b".")

    def publishing(*arguments: Any, **more: Any) -> Any:
        step()
        return publish(*arguments, **more)

    @contextmanager
    def locked(table: Replacement) -> Iterator[None]:
        # As with a table larger than the cache, what is not committed reaches the disk.
        table._db.execute("PRAGMA cache_size=16")
        with begin(table):
            step()
            yield
            step()
        step()

    def putting(table: Replacement, *arguments: Any, **more: Any) -> None:
        step()
        put(table, *arguments, **more)

    files.publish = publishing
    Replacement.transaction = locked  # type: ignore[method-assign,assignment]
    Replacement.put = putting  # type: ignore[method-assign,assignment]


# ---- Processes, and how they are killed ----


def start_fork_server(*modules: str) -> None:
    """Start the process from which the others are forked, and wait until it has everything.

    There is one for all tests of a process, and the first to ask says what it has.
    """
    before = dict(os.environ)
    os.environ["PYTHONPATH"] = clean_environment(Path.home())["PYTHONPATH"]
    os.environ["PYTHONWARNINGS"] = "ignore"  # That this module is imported and run.
    try:
        FORKS.set_forkserver_preload(["tests.kills", "pytest.__main__", *modules])
        first = FORKS.Process(target=time.time)
        first.start()
        first.join()
    finally:
        os.environ.clear()
        os.environ.update(before)


def descendants(process: int) -> list[int]:
    """The processes that a process has started, and those that these have started."""
    parents: dict[int, list[int]] = {}
    for place in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(place.read_text().rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(place.parent.name))
    found: list[int] = []
    waiting = [process]
    while waiting:
        waiting += (children := parents.get(waiting.pop(), []))
        found += children
    return found


def is_worker(process: int) -> bool:
    """Whether a process is one of Beam's workers, and no shell that has started one."""
    with suppress(OSError):
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
        return b"apache_beam.runners.worker.sdk_worker_main" in words
    return False


def end(processes: Sequence[int], *, seconds: float) -> None:
    """Wait so long until processes have ended, then kill them."""
    ends = time.monotonic() + seconds
    left = [one for one in processes if is_worker(one)]
    while left and time.monotonic() < ends:
        time.sleep(0.05)
        left = [one for one in left if is_worker(one)]
    for one in left:
        with suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)
    while any(map(is_worker, left)):
        time.sleep(0.01)


@dataclass(frozen=True)
class Moment:
    """When to kill what: so many seconds after so many steps."""

    steps: int
    seconds: float
    worker: bool = False


@dataclass(frozen=True)
class Ended:
    """How a process has ended: its exit code, what it printed, and the workers that it left."""

    code: int
    said: str
    orphans: Sequence[int] = ()
    worker_killed: bool = False
    hung: bool = False


def attempt(
    folder: Path, environment: Mapping[str, str], arguments: Sequence[str], moment: Moment | None
) -> Ended:
    """Let the program work to its end, or until it is killed."""
    hear, tell = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=run_program, args=(folder, tell, environment, arguments))
    process.start()
    tell.close()
    assert process.pid is not None
    workers: list[int] = []
    worker_killed = hung = False
    if moment is not None and _wait_for(moment, hear):
        time.sleep(moment.seconds)
        workers = [one for one in descendants(process.pid) if is_worker(one)]
        if moment.worker and workers:
            with suppress(ProcessLookupError):
                os.kill(workers[0], signal.SIGKILL)
            worker_killed = True
        else:
            process.kill()
    process.join(ORPHAN_SECONDS if worker_killed else LONGEST_SECONDS)
    if process.exitcode is None:
        # Beam waits for ever for a worker that dies while it works, as a user would see.
        workers = [one for one in descendants(process.pid) if is_worker(one)]
        hung = worker_killed
        process.kill()
        process.join()
    hear.close()
    assert process.exitcode is not None
    said = (folder / "said").read_text(errors="replace") if (folder / "said").exists() else ""
    if process.exitcode == KILLED and not hung and moment is None:
        raise Broken(OTHER, f"{' '.join(arguments)} has not ended in {LONGEST_SECONDS:.0f} s")
    return Ended(process.exitcode, said, workers, worker_killed, hung)


def _wait_for(moment: Moment, hear: Connection) -> bool:
    """Wait for so many steps; False if the process ends before that."""
    heard = 0
    while heard < moment.steps:
        ready, _, _ = select.select([hear], [], [], LONGEST_SECONDS)
        found = len(os.read(hear.fileno(), moment.steps - heard)) if ready else 0
        heard += found
        if not found:
            return False
    return True


# ---- A trial ----


@dataclass
class Layer:
    """A run: what it was to do, what it is called, and what its backup held when it had ended."""

    wish: Wish
    flags: Sequence[str]
    stale: set[str] = field(default_factory=set)
    name: str | None = None
    files: dict[str, bytes] = field(default_factory=dict)


class Trial:
    """A store under torture, with all that was done to it."""

    def __init__(
        self, folder: Path, seed: str, figures: Figures, runner: str | None = None
    ) -> None:
        self.folder = folder
        self.figures = figures
        self.dice = dice = random.Random(seed)
        self.shop: Shop = dice.choice((AI_MEMORY, *SHOPS))
        self.journal = dice.choice(("delete", "wal"))
        self.rows = int(100 * 20 ** dice.random())
        if self.shop.whole:
            self.rows = min(self.rows, 600)
        self.runner = runner or dice.choices(list(RUNNERS), (50, 25, 8, 12, 5))[0]
        self.path = folder / "store" / "m.db"
        self.mirror = folder / "mirror.db"
        self.environment = {"FAKE_RANGE_ROWS": str(RANGE_ROWS if self.rows < 600 else 128)}
        if self.runner == LOOP:
            self.environment["KILLS_LOOP"] = "1"
        self.several = not self.shop.whole and dice.random() < 0.5
        if self.several:
            self.environment |= {"FAKE_ROWS_AT_ONCE": "60", "FAKE_FIRST_ROWS": "40"}
        self.workdir = self.runner != LOOP and dice.random() < 0.25
        self.edits: dict[str, list[str]] = {}
        self.added: set[str] = set()
        self.deleted: set[str] = set()
        self.texts: dict[str, set[str]] = {}
        self.layers: list[Layer] = []
        self.killed: list[str] = []
        self.closed: list[str] = []

    # ---- what is told

    def __str__(self) -> str:
        modes = ", ".join(" ".join(layer.flags) or "all" for layer in self.layers)
        how = "several transactions" if self.several else "one transaction"
        where = ", --workdir" if self.workdir else ""
        return (
            f"{self.shop.name}, {self.journal}, {self.rows} rows, {how}, {self.runner}{where}; "
            f"{modes}; killed {len(self.killed)} times: {', '.join(self.killed) or '-'}; "
            f"{len(self.edits)} edited"
        )

    def run(self) -> None:
        """Do all of it; raise Broken for a promise that is not kept."""
        self.path.parent.mkdir(parents=True)
        self.shop.make(self.path, self.rows, self.dice, self.journal)
        shutil.copy(self.path, self.mirror)
        for entry in self.shop.read(self.path).values():
            self.texts[entry.key] = {entry.text}
        mode = self._choose_mode()
        if mode == "retry-skipped":
            self._forward("all", most_kills=0)
        finished = self._forward(mode, most_kills=self.dice.randint(1, MOST_KILLS))
        if finished and self.dice.random() < 0.25:
            finished = self._forward("all", model="n", dimension=6, most_kills=2)
        self._way_back()

    def _choose_mode(self) -> str:
        modes = ["all", "all", "all"]
        if len(self.shop.spaces) > 1:
            modes.append("namespace")
        if not self.shop.whole:
            modes += ["missing-only", "max-rows", "partial", "retry-skipped"]
            modes += ["skip-current-space"] if self.shop.stamps else []
        return self.dice.choice(modes)

    # ---- forward

    def _forward(self, mode: str, *, most_kills: int, model: str = "m", dimension: int = 8) -> bool:
        """Run, with kills, to the end; False if it is to be rolled back half way."""
        layer = self._new_layer(mode, model, dimension)
        self.layers.append(layer)
        for _ in range(most_kills):
            layer.stale.clear()
            moment = self._choose_moment()
            ended = self._attempt(layer.flags, moment, edits=layer)
            if ended.orphans and self.dice.random() < 0.5 and ended.code == KILLED:
                continue  # The next attempt meets the workers of this one.
            end(ended.orphans, seconds=self.dice.choice((0, ORPHAN_SECONDS)))
            self._check_end(ended)
            state = self._look(ended)
            if state in ("replaced", "wrote nothing"):
                break
            if self.dice.random() < 0.3:
                self._edit(layer)
        state = self._state()
        if state == "replacing" and self.dice.random() < 0.3:
            return False
        self._finish(layer)
        return True

    def _new_layer(self, mode: str, model: str, dimension: int) -> Layer:
        before = self.shop.read(self.path)
        flags = ["--model", model, "--dim", str(dimension), "--max-skipped", "0.95"]
        namespace, clears = None, False
        retried: frozenset[str] = frozenset()
        match mode:
            case "namespace":
                namespace = "a"
                flags += ["--namespace", "a"]
            case "max-rows" | "partial":
                flags += ["--max-rows", str(max(20, self.rows // self.dice.randint(2, 4)))]
                flags += ["--partial"] if mode == "partial" else []
            case "missing-only" | "skip-current-space":
                flags.append(f"--{mode}")
            case "retry-skipped":
                flags.append("--retry-skipped")
                wish = self.layers[-1].wish
                meant = [entry for entry in before.values() if wish.meant(entry)]
                retried = frozenset(entry.key for entry in meant if is_skipped(entry))
                # So that there is something to do.
                for key in [k for k in sorted(retried) if not before[k].sealed][:3]:
                    self._edit_row(before[key])
                before = self.shop.read(self.path)
        if not self.shop.whole and self.dice.random() < 0.25:
            clears = True
            flags += ["--skipped", "clear"]
        if not self.shop.whole and self.several and self.dice.random() < 0.2:
            flags.append("--one-transaction")
        if mode == "retry-skipped":
            mode_of_wish = mode
        else:
            mode_of_wish = {"max-rows": "all", "partial": "all", "namespace": "all"}.get(mode, mode)
        wish = Wish(self.shop, before, mode_of_wish, namespace, clears, model, dimension, retried)
        return Layer(wish, flags)

    def _choose_moment(self) -> Moment:
        dice = self.dice
        worker = self.runner == "processes" and dice.random() < 0.5
        if worker or dice.random() < 0.1:
            return Moment(0, dice.uniform(0, 10 if self.runner == "processes" else 2), worker)
        ranges = self.rows // int(self.environment["FAKE_RANGE_ROWS"]) + 1
        late = self._state() == "replacing"
        steps = dice.randint(1, 16 if late else 3 * ranges + 8)
        return Moment(steps, dice.choice((dice.uniform(0, 0.003), dice.uniform(0, 0.05))))

    def _attempt(
        self, flags: Sequence[str], moment: Moment | None, *, edits: Layer | None = None
    ) -> Ended:
        """A run of the program; with `edits`, rows are edited now and then while it works."""
        runner = list(RUNNERS[self.runner])
        at = runner.index("--") if "--" in runner else len(runner)
        arguments = [*runner[:at], "--db", str(self.path), *self.shop.flags, *flags]
        if self.workdir:
            arguments += ["--workdir", str(self.folder / "work")]
        arguments += runner[at:]
        editing = None
        if edits is not None and not self.shop.whole and self.dice.random() < 0.15:
            editing = threading.Timer(self.dice.uniform(0.1, 1), self._edit, (edits,))
            editing.start()
        try:
            ended = attempt(self.folder, self.environment, arguments, moment)
        finally:
            if editing is not None:
                editing.join()
        self._note(ended, "run")
        return ended

    def _note(self, ended: Ended, what: str) -> None:
        if ended.code == KILLED or ended.worker_killed:
            whom = "worker" if ended.worker_killed else what
            state = self._state() or "no run yet"
            self.killed.append(f"{whom} at {state}")
            self.figures.kills += 1 + ended.hung
            self.figures.hung += ended.hung
            self.figures.where[f"{whom}, {state}"] += 1

    def _finish(self, layer: Layer) -> None:
        """Repeat the command until all is done."""
        for _ in range(12):
            if self._state(layer) in ("replaced", "wrote nothing"):
                break
            layer.stale.clear()
            ended = self._attempt(layer.flags, None)
            end(ended.orphans, seconds=ORPHAN_SECONDS)
            self._check_end(ended)
            if ended.code not in (0, 6):
                raise Broken(OTHER, f"finishing gave exit code {ended.code}: {last(ended.said)}")
            self._look(ended)
        else:
            raise Broken(OTHER, f"12 reruns did not finish it: {last(ended.said)}")
        self._check_finished(layer)
        layer.files = self._files_of(layer)

    def _check_finished(self, layer: Layer) -> None:
        now = self.shop.read(self.path)
        self.figures.rows += len(now)
        wrong = [
            key
            for key, entry in now.items()
            if key not in layer.stale and entry.vector != layer.wish.after(entry)
        ]
        if wrong:
            raise Broken(WRONG, self._rows(wrong, "wrong after the run was finished"))

    # ---- edits by others

    def _may_edit(self) -> bool:
        """Whether rows may be edited; a store that goes back as a whole would not, then."""
        return not self.shop.whole or self._state() in (None, "staging")

    def _edit(self, layer: Layer | None) -> None:
        """Edit some rows, add one, delete one, in the store and in its mirror."""
        if not self._may_edit():
            return
        now = self.shop.read(self.path)
        meant = [entry for entry in now.values() if layer is None or layer.wish.meant(entry)]
        plain = [entry for entry in meant if not entry.sealed and len(entry.text) < 10_000]
        for entry in self.dice.sample(plain, min(len(plain), self.dice.randint(1, 3))):
            self._edit_row(entry, layer)
        if not self.shop.keyed or layer is None:
            return
        if self.dice.random() < 0.4:
            key = f"new {self.dice.randrange(10**9)}"
            text = self.shop.whole_text(key, f"added {self.dice.random()}")
            entry = Entry(key, text, self.dice.choice(self.shop.spaces), False, True, Vector(None))
            self.added.add(key)
            self.texts[key] = {text}
            layer.stale.add(key)
            layer.wish.before[key] = entry
            self._change(self.shop.insert, statement_text(entry, self.shop))
        if self.dice.random() < 0.3 and len(plain) > 50:
            entry = plain[0]
            self.deleted.add(entry.key)
            self._change(self.shop.delete, entry)

    def _edit_row(self, entry: Entry, layer: Layer | None = None) -> None:
        changed = edited(entry, self.dice, self.shop)
        self.edits.setdefault(entry.key, []).append(changed.text)
        self.texts[entry.key].add(changed.text)
        if layer is not None:
            layer.stale.add(entry.key)
        self._change(self.shop.edit, statement_text(changed, self.shop))

    def _change(self, statement: str, entry: Entry) -> None:
        for path in (self.path, self.mirror):
            self.shop.change(path, statement, entry)

    # ---- looks

    def _manifests(self) -> list[dict[str, Any]]:
        found = []
        for place in sorted(self.path.parent.glob("m.db.reembed/2*/manifest.json")):
            try:
                found.append(json.loads(place.read_text()))
            except (OSError, ValueError) as error:
                raise Broken(LOST, f"the manifest {place} can't be read: {error}") from None
        return found

    def _state(self, layer: Layer | None = None) -> str | None:
        """The state of a run, or of the last one that is about the present wish."""
        layer = layer or self.layers[-1]
        known = {one.name for one in self.layers if one is not layer}
        for manifest in self._manifests():
            if manifest["run_id"] not in known:
                layer.name = manifest["run_id"]
                return str(manifest["state"])
        return None

    def _read_copy(self) -> Entries:
        """The table as it is, read from a copy, so that the next process meets the real one."""
        copy = self.folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        for name in ("m.db", "m.db-wal", "m.db-journal"):
            with suppress(FileNotFoundError):
                shutil.copy(self.path.with_name(name), copy)
        try:
            return self.shop.read(copy / "m.db")
        except AssertionError as error:
            raise Broken(WRONG, str(error)) from None

    def _look(self, ended: Ended) -> str | None:
        """Look at all rows, at the state and at the backup of the last run."""
        layer = self.layers[-1]
        state = self._state(layer)
        now = self._read_copy()
        self.figures.rows += len(now)
        held = {key: entry.vector for key, entry in now.items()}
        before = {key: entry.vector for key, entry in layer.wish.before.items() if key in now}
        changed = [key for key in differences(held, before) if key in held]
        for key in changed:
            texts = [now[key]._replace(text=text) for text in self.texts[key]]
            allowed = [layer.wish.new(one.text) for one in texts if not is_skipped(one)]
            allowed += [Vector(None)] if layer.wish.clears else []
            if held[key] not in allowed or not layer.wish.meant(now[key]):
                raise Broken(WRONG, self._rows([key], f"neither old nor new (state {state})"))
        if changed and state in (None, "staging", "wrote nothing"):
            raise Broken(MIXED, self._rows(changed, f"new, and the state is {state}"))
        if state == "replaced":
            due = {key: layer.wish.after(entry) for key, entry in now.items()}
            wrong = [key for key in differences(held, due) if key not in layer.stale]
            if wrong:
                raise Broken(MIXED, self._rows(wrong, "not as they should be in state replaced"))
        self._check_backup(layer, {key: before[key] for key in changed})
        self._check_status(state)
        if ended.code == 0 and state == "replacing" and not self._is_partial(layer):
            raise Broken(MIXED, "exit code 0, and the state is replacing")
        return state

    def _is_partial(self, layer: Layer) -> bool:
        return "--partial" in layer.flags

    def _check_backup(self, layer: Layer, changed: Mapping[str, Vector]) -> None:
        """Each vector that is gone from the table is in the backup; those of older runs stay."""
        if changed:
            saved = self._saved(layer)
            lost = [key for key, vector in changed.items() if vector.raw not in saved.get(key, ())]
            if lost:
                raise Broken(LOST, self._rows(lost, "in neither the table nor the backup"))
        for older in self.layers[:-1]:
            if older.name not in self.closed and self._files_of(older) != older.files:
                raise Broken(LOST, f"the backup of the run {older.name} is not what it was")

    def _saved(self, layer: Layer) -> dict[str, list[bytes | None]]:
        saved: dict[str, list[bytes | None]] = {}
        for place in self._backup(layer).glob("*.parquet"):
            table = pq.read_table(place, columns=["key", "vector", "restorable"])
            for row in table.to_pylist():
                if row["restorable"]:
                    saved.setdefault(row["key"], []).append(row["vector"])
        return saved

    def _backup(self, layer: Layer) -> Path:
        return self.path.parent / "m.db.reembed" / (layer.name or "none") / "backup"

    def _files_of(self, layer: Layer) -> dict[str, bytes]:
        places = self._backup(layer).glob("*.parquet") if layer.name else ()
        return {place.name: blake2b(place.read_bytes()).digest() for place in places}

    def _check_status(self, state: str | None) -> None:
        """`status` ends with 6 as long as a replacement or a rollback is not complete."""
        if self.dice.random() > 0.4:
            return
        status = attempt(
            self.folder, self.environment, ["status", "--db", str(self.path), "--json"], None
        )
        self._check_end(status)
        incomplete = state in ("replacing", "rolling back")
        hot = "a write to" in status.said
        if (status.code == 6) != incomplete and not (hot and status.code == 6):
            raise Broken(MIXED, f"status ends with {status.code} in state {state}")

    def _check_end(self, ended: Ended) -> None:
        """One sentence for what went wrong, and no traceback of ours."""
        if "Traceback" in ended.said and not ended.worker_killed and ended.code != KILLED:
            raise Broken(OTHER, f"a traceback: {ended.said[-1500:]}")

    def _rows(self, keys: Sequence[str], what: str) -> str:
        return f"{len(keys)} rows {what} (the first: {keys[0]})"

    # ---- back

    def _way_back(self) -> None:
        """Roll back all runs, the newest first, with kills; compare with the mirror."""
        if self.dice.random() < 0.3 and not self.shop.whole:
            self._edit(None)
        left: dict[str, str] = {}
        while True:
            manifests = {one["run_id"]: one["state"] for one in self._manifests()}
            open_ones = [
                layer
                for layer in self.layers
                if layer.name not in self.closed
                and manifests.get(layer.name or "")
                in ("replacing", "replaced", "rolling back", "partly rolled back")
            ]
            if not open_ones:
                break
            left |= self._roll_back(open_ones[-1])
        self._compare(left)

    def _roll_back(self, layer: Layer) -> dict[str, str]:
        arguments = ["rollback", "--db", str(self.path)]
        environment = self.environment
        for _ in range(self.dice.choice((0, 0, 1, 2, 3))):
            moment = Moment(self.dice.randint(1, 12), self.dice.uniform(0, 0.01))
            ended = attempt(self.folder, environment, arguments, moment)
            self._note(ended, "rollback")
            self._check_end(ended)
            if ended.code != KILLED:
                break
            self._look_back(layer)
            if self._state(layer) == "rolled back":
                return self._close(layer, self._named_in_file(layer))
        else:
            ended = attempt(self.folder, environment, arguments, None)
        self._check_end(ended)
        named = dict(re.findall(r"row (.+) is left as it is: (.+)", ended.said))
        state = self._state(layer)
        edited_all = ended.code == 1 and "could be put back" in ended.said and bool(self.edits)
        if (ended.code, state) != (0, "rolled back") and not edited_all:
            what = f"rollback gave exit code {ended.code}, and the state is {state}"
            raise Broken(OTHER, f"{what}: {last(ended.said)}")
        return self._close(layer, named)

    def _named_in_file(self, layer: Layer) -> dict[str, str]:
        """The rows that a rollback has left, of which it was killed before it could tell."""
        place = self._backup(layer).with_name("left.jsonl")
        lines = place.read_text().splitlines() if place.exists() else []
        return {row["id"]: row["reason"] for row in map(json.loads, lines)}

    def _close(self, layer: Layer, named: dict[str, str]) -> dict[str, str]:
        """Take note that a run is undone; only what was edited may be left."""
        if extra := named.keys() - self.edits.keys() - self.deleted:
            raise Broken(WRONG, self._rows(sorted(extra), "left by rollback, and not edited"))
        self.closed.append(layer.name or "")
        return named

    def _look_back(self, layer: Layer) -> None:
        """After a killed rollback: each row is old or new, and what is new can go back."""
        now = self._read_copy()
        self.figures.rows += len(now)
        wish = layer.wish
        changed = {}
        for key, entry in now.items():
            before = wish.before[key].vector if key in wish.before else Vector(None)
            if entry.vector == before:
                continue
            if entry.vector != wish.after(entry) and key not in self.edits.keys() | self.added:
                raise Broken(WRONG, self._rows([key], "neither old nor new in a rollback"))
            changed[key] = before
        state = self._state(layer)
        if state == "rolled back" and (wrong := changed.keys() - self.edits.keys()):
            raise Broken(MIXED, self._rows(sorted(wrong), "new, and the state is rolled back"))
        self._check_backup(layer, {k: v for k, v in changed.items() if k not in self.edits})
        self._check_status(state)

    def _compare(self, left: Mapping[str, str]) -> None:
        """All is byte for byte as in the mirror, which had only the edits; or it is named."""
        now, was = self.shop.read(self.path), self.shop.read(self.mirror)
        self.figures.rows += len(now)
        wrong = [key for key in differences(now, was) if key not in self.edits or key not in left]
        if wrong:
            raise Broken(WRONG, self._rows(wrong, "not as before the run after the rollback"))
        if not left and self.shop.contents(self.path) != self.shop.contents(self.mirror):
            raise Broken(WRONG, "after the rollback another table is not as before the run")


def last(said: str) -> str:
    """The last line that a process has printed, if any."""
    lines = [line for line in said.splitlines() if "error" in line] or said.splitlines()
    return lines[-1] if lines else "nothing was said"


def torture(
    folder: Path, seed: int, number: int, figures: Figures, runner: str | None
) -> str | None:
    """One trial; print a line, and return what was broken."""
    place = folder / str(number)
    trial = Trial(place, f"{seed} {number}", figures, runner)
    figures.trials += 1
    began = time.monotonic()
    broken = None
    try:
        trial.run()
    except Broken as error:
        figures.broken[error.kind] += 1
        broken = f"{error.kind}: {error.what}"
    took = time.monotonic() - began
    print(f"{number}: {trial}; {took:.1f} s; {broken or 'all right'}", flush=True)
    if broken is None:
        shutil.rmtree(place)
    return broken


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill so many times; print the figures; 1 if a promise was not kept."""
    parser = argparse.ArgumentParser(prog="python -m tests.kills", description=__doc__)
    parser.add_argument("--seed", type=int, default=57)
    parser.add_argument("--kills", type=int, default=15)
    parser.add_argument("--runner", choices=RUNNERS, help="only with this, not one at random")
    parser.add_argument("--trial", type=int, help="only the trial of this number")
    parser.add_argument("--keep", type=Path, help="where the stores of broken trials stay")
    asked = parser.parse_args(arguments)
    start_fork_server()
    figures = Figures()
    folder = Path(tempfile.mkdtemp(prefix="kills-", dir=asked.keep))
    broken: dict[int, str] = {}
    number = asked.trial or 0
    while figures.kills < asked.kills and (asked.trial is None or not figures.trials):
        if found := torture(folder, asked.seed, number, figures, asked.runner):
            broken[number] = found
        number += 1
    print("", *figures.lines(), sep="\n")
    for at, what in broken.items():
        print(f"broken: --seed {asked.seed} --trial {at}: {what}")
    if asked.keep is None:
        shutil.rmtree(folder)
    return 1 if broken else 0


if __name__ == "__main__":
    from tests import kills

    sys.exit(kills.main())
