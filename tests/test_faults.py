"""Faults under SQLite and the file system: nothing is lost, nothing is mixed unannounced.

The whole program runs with a library under it (tests/faults.c) that makes one call fail, or all
of a kind from one on. A first run without faults gives the calls that there are, by the file and
by the phase of the run; from some of these cells one is chosen to fail, the same ones every
time (FAULTS_EACH=20 takes 20 from each cell). Started as a module, this is the server of
`Laboratory`: a process that has imported everything and forks a child for each run, which saves
seconds.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import count
from pathlib import Path
from queue import Queue
from typing import Any, NamedTuple, NoReturn

import pytest
from inline_snapshot import snapshot

from reembed.transforms import replacing
from reembed.transforms.rows import Summary
from tests.conftest import (
    ROOT,
    Call,
    Program,
    change,
    clean_environment,
    files,
    make_store,
    memory,
    other_contents,
    plain_pass,
    select,
)
from tests.wording import wording

SEED = 57
EACH = int(os.environ.get("FAULTS_EACH", "0"))
CASES = 3
SERVERS = 2
ALWAYS = 2**62

ROWS, RANGE_ROWS = 32, 8
SEALED = 13
RANGES = range(ROWS // RANGE_ROWS)

PLACES = {
    "directory": "*/store",
    "database": "*/m.db",
    "log": "*/m.db-wal",
    "index of the log": "*/m.db-shm",
    "journal": "*/m.db-journal",
    "root": "*/m.db.reembed",
    "lock": "*/lock",
    "run directory": "*Z-????",
    "reserve": "*/*reserve*",
    "manifest": "*manifest.json*",
    "lock of the manifest": "*/manifest.lock",
    "shards": "*/shards*",
    "backup": "*/backup*",
    "pass": "*pass-1.json*",
    "skipped": "*skipped.jsonl*",
    "summary": "*summary.json*",
    "result of a rollback": "*rollback.json*",
}
"""The files of a run, as patterns of their paths."""

ERRORS = {
    "read": [errno.EIO],
    "write": [errno.ENOSPC, errno.EIO],
    "sync": [errno.EIO, errno.ENOSPC],
    "truncate": [errno.EIO, errno.ENOSPC],
    "open": [errno.EACCES, errno.EIO, errno.ENOSPC],
    "rename": [errno.ENOSPC, errno.EIO, errno.EACCES],
    "unlink": [errno.EACCES, errno.EIO],
    "mkdir": [errno.ENOSPC, errno.EACCES],
    "rmdir": [errno.EACCES, errno.EIO],
    "link": [errno.ENOSPC, errno.EACCES],
}
ALL_CALLS = " ".join(ERRORS)


class Fault(NamedTuple):
    """Calls on paths of a pattern that fail, from the first to the last of them."""

    pattern: str
    calls: str
    error: int
    first: int
    last: int


class Done(NamedTuple):
    """What a run of the program gave; `seen` counts the calls that might have failed."""

    code: int
    out: str
    err: str
    seen: int


class Laboratory:
    """Runs of the program in children of processes that have imported everything."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._numbers = count()
        self._idle: Queue[subprocess.Popen[str]] = Queue()
        self.library = build_library(directory)
        self._settings: dict[tuple[str, str], Setting] = {}
        environment = clean_environment(directory)
        command = [sys.executable, "-m", "tests.test_faults", str(self.library)]
        self._servers = [
            subprocess.Popen(
                command,
                env=environment | {"LD_PRELOAD": str(self.library)},
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(SERVERS)
        ]
        for server in self._servers:
            self._idle.put(server)

    def run(
        self,
        *arguments: str | Path,
        fault: Fault | None = None,
        trace: Path | None = None,
        environment: Mapping[str, str] | None = None,
        plain: bool = False,
    ) -> Done:
        """Run the program, with a fault or without; `plain` saves the time that Beam takes."""
        number = next(self._numbers)
        out, err = self.directory / f"{number}.out", self.directory / f"{number}.err"
        request = {
            "arguments": [str(argument) for argument in arguments],
            "environment": {"FAKE_RANGE_ROWS": str(RANGE_ROWS), **(environment or {})},
            "fault": fault,
            "plain": plain,
            "trace": trace and str(trace),
            "out": str(out),
            "err": str(err),
        }
        server = self._idle.get()
        assert server.stdin is not None and server.stdout is not None
        try:
            server.stdin.write(json.dumps(request) + "\n")
            server.stdin.flush()
            code, seen = json.loads(server.stdout.readline())
        finally:
            self._idle.put(server)
        texts = [path.read_text(encoding="utf-8") for path in (out, err)]
        out.unlink()
        err.unlink()
        return Done(code, texts[0], texts[1], seen)

    def observe(self, mode: str, portions: str) -> Setting:
        """A store of this kind, observed once; nobody changes it."""
        if (mode, portions) not in self._settings:
            place = self.directory / f"{mode}-{portions}"
            self._settings[mode, portions] = observe(self, place, mode, portions)
        return self._settings[mode, portions]

    def close(self) -> None:
        for server in self._servers:
            assert server.stdin is not None
            server.stdin.close()
            server.wait()


def build_library(directory: Path) -> Path:
    """Compile the library that makes calls fail; skip the test where that can't be done."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("there is no C compiler (cc, gcc), so no call can be made to fail")
    library = directory / "faults.so"
    source = Path(__file__).with_name("faults.c")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True
    )
    return library


def serve(library: str) -> None:
    """Run the program as each line of stdin says, in a child; answer with exit code and count."""
    from reembed.pipeline import cli

    cli._quieten()
    import pyarrow.dataset

    from reembed.pipeline import progress, report, run, surroundings, upkeep
    from tests import fake_program

    assert all((pyarrow.dataset, progress, report, run, surroundings, upkeep))
    faults = ctypes.CDLL(library)
    faults.faults_seen.restype = ctypes.c_long
    for line in sys.stdin:
        request = json.loads(line)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            os.environ |= request["environment"]
            fake_program.install()
            _run_child(faults, request, writing)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            said = pipe.read()
        os.waitpid(child, 0)
        print(said or "[-9, 0]", flush=True)


def _run_child(faults: ctypes.CDLL, request: Mapping[str, Any], answer: int) -> NoReturn:
    from reembed.pipeline import run
    from reembed.pipeline.cli import main
    from reembed.transforms.stores import sqlite

    if request["plain"]:
        run._run_pass = plain_pass
    seconds = os.environ.get("FAULTS_BUSY_SECONDS")
    sqlite.BUSY_SECONDS = float(seconds) if seconds else sqlite.BUSY_SECONDS
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT), stream)
    if request["trace"]:
        faults.faults_trace(os.open(request["trace"], os.O_WRONLY | os.O_CREAT))
    if request["fault"]:
        pattern, calls, error, first, last = request["fault"]
        limits = ctypes.c_long(first), ctypes.c_long(last)
        faults.faults_arm(pattern.encode(), calls.encode(), error, *limits)
    try:
        code = main(request["arguments"])
    except BaseException:  # As Python ends a program that does not take its errors.
        traceback.print_exc()
        code = 1
    faults.faults_disarm()
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(answer, json.dumps([code, faults.faults_seen()]).encode())
    os._exit(0)


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    laboratory = Laboratory(tmp_path_factory.mktemp("laboratory"))
    yield laboratory
    laboratory.close()


Table = dict[str, tuple[Any, ...]]


def table(path: Path) -> Table:
    """All that a replacement may change, by key; it needs the database to be sound."""
    assert select(path, "PRAGMA integrity_check") == [("ok",)]
    columns = {
        str(name) for (name,) in select(path, "SELECT name FROM pragma_table_info('memories')")
    }
    names = [n for n in ("embedding", "embedding_dim", "embedding_space") if n in columns]
    rows = select(path, f"SELECT id, {', '.join(names)} FROM memories ORDER BY id")
    return {str(key): tuple(values) for key, *values in rows}


def new_store(path: Path, mode: str) -> Path:
    """A store of four ranges; one row has no vector, and one is sealed and so skipped."""
    path.parent.mkdir(parents=True)
    memories = [
        memory(
            f"{number:03d}",
            embedding=None if number == 7 else b"\x01" + bytes([number + 1, 0, 0, 63]) * 16,
            embedding_dim=None if number == 7 else 16,
            encrypted_envelope=b"sealed" if number == SEALED else None,
        )
        for number in range(ROWS)
    ]
    return make_store(path, memories, mode)


Calls = Sequence[tuple[str, str]]
"""Calls by name and path, in order."""


@dataclass(frozen=True)
class Setting:
    """A store as it is before and after a run, and the calls of one without faults, in order."""

    source: Path
    environment: Mapping[str, str]
    old: Table
    new: Table
    others: dict[str, Any]
    calls: Calls


PORTIONS = {
    "at once": {},
    "in portions": {"FAKE_ROWS_AT_ONCE": "8", "FAKE_FIRST_ROWS": "8"},
}


def observe(laboratory: Laboratory, directory: Path, mode: str, portions: str) -> Setting:
    """Run once without faults, and take down every call on the files of the run."""
    source = new_store(directory / "store" / "m.db", mode)
    path = copy_store(source, directory / "clean")
    old, others = table(path), other_contents(path)
    calls = traced(laboratory, "--db", path, environment=PORTIONS[portions])
    new = table(path)
    assert [key for key in old if old[key] == new[key]] == [f"{SEALED:03d}"]
    return Setting(source, PORTIONS[portions], old, new, others, calls)


def traced(laboratory: Laboratory, *arguments: str | Path, **more: Any) -> Calls:
    """Run without faults, and take down every call on the files of a store."""
    trace = laboratory.directory / "trace"
    nothing = Fault("*/store*", "", 0, 0, 0)
    done = laboratory.run(*arguments, fault=nothing, trace=trace, **more)
    assert done.code == 0, done.err
    lines = trace.read_text().splitlines()
    trace.unlink()
    return [(call, name) for call, _, name in (line.partition(" ") for line in lines)]


def phases_of_run(calls: Calls) -> Iterator[str]:
    """The phase of each call, by how often the manifest was written before it."""

    def is_noted(call: str, name: str) -> bool:
        return call == "rename" and name.endswith("manifest.json")

    written, saving, last = 0, False, sum(is_noted(*call) for call in calls)
    for call, name in calls:
        saving |= call == "write" and "/backup/" in name
        if written == 0:
            yield "beginning"
        elif written == 1:
            yield "backup" if saving else "staging"
        elif written >= last - 1:
            yield "finishing"
        else:
            yield "first transaction" if written == 2 else "later transaction"
        written += is_noted(call, name)


def copy_store(source: Path, directory: Path) -> Path:
    """The database in a directory that holds nothing else."""
    path = directory / "store" / source.name
    path.parent.mkdir(parents=True)
    shutil.copy(source, path)
    return path


class Case(NamedTuple):
    """A fault, and what it is about."""

    place: str
    phase: str
    fault: Fault

    def __str__(self) -> str:
        name = errno.errorcode[self.fault.error]
        until = "only" if self.fault.last == self.fault.first else "from then on"
        what = "all calls" if self.fault.calls == ALL_CALLS else self.fault.calls
        return f"{self.place}, {self.phase}: {what} {name}, {self.fault.first} {until}"


def choose_cases(
    calls_made: Calls, phases: Sequence[str], chance: random.Random, *, most: int
) -> list[Case]:
    """From places and phases some calls that are to fail, alone or with all after them."""
    cells: dict[tuple[str, str], list[int]] = {}
    fitting = {
        place: [at for at, (_, name) in enumerate(calls_made) if fnmatchcase(name, pattern)]
        for place, pattern in PLACES.items()
    }
    for place, indexes in fitting.items():
        for at in indexes:
            cells.setdefault((place, phases[at]), []).append(at)
    cases = []
    chosen = chance.sample(list(cells.items()), len(cells) if EACH else min(most, len(cells)))
    for (place, phase), indexes in chosen:
        for at in chance.sample(indexes, min(EACH or 1, len(indexes))):
            kind = calls_made[at][0]
            error = chance.choice(ERRORS[kind])
            calls = chance.choice([kind, kind, ALL_CALLS]) if error == errno.EIO else kind
            before = [one for one in fitting[place] if one <= at]
            first = sum(calls_made[one][0] in calls.split() for one in before)
            last = chance.choice([first, ALWAYS])
            cases.append(Case(place, phase, Fault(PLACES[place], calls, error, first, last)))
    return cases


def check_run(laboratory: Laboratory, setting: Setting, case: Case, directory: Path) -> str:
    """Run with a fault, look at everything, run again without it, and undo it all."""
    path = copy_store(setting.source, directory)
    run = laboratory.run("--db", path, "--json", fault=case.fault, environment=setting.environment)
    check_words(run)
    assert run.seen >= case.fault.first
    hot = Path(f"{path}-journal").exists()
    status = laboratory.run("status", "--db", path, "--json")
    found = table(path)  # It rolls back what SQLite left half done, as any program's look does.
    if hot and not status.out:
        assert status.code == 6
        assert f"a write to {path} was cut off" in error_of(status)
        status = laboratory.run("status", "--db", path, "--json")
    runs = json.loads(status.out)["runs"]
    state = runs[-1]["state"] if runs else "none"
    new = {at for at in RANGES if rows_of(found, at) == rows_of(setting.new, at)}
    old = {at for at in RANGES if rows_of(found, at) == rows_of(setting.old, at)}

    assert old | new == set(RANGES)
    if state == "replacing":
        spans = runs[-1]["ranges_replaced"]
        assert {at for first, last in spans for at in range(first, last + 1)} == new
        assert status.code == 6 and run.code in (0, 6)
    elif state == "replaced":
        assert run.code == 0 or "the result can't be printed" in run.err
        assert new == set(RANGES)
    else:
        assert (state in ("none", "staging"), new) == (True, set())
        # Without a manifest that can be read, it is not known that nothing was replaced.
        unknown = case.place == "manifest" and "can't be read now" in run.err
        assert run.code == (6 if unknown else 1)
    if run.code == 0:
        assert new == set(RANGES)
        assert f"skipped row {SEALED:03d}" in run.err
        assert json.loads(run.out)["reembedded"] == ROWS - 1
    if new:
        assert "store is unchanged" not in run.err and "was undone" not in run.err
    if not setting.environment:
        assert set(RANGES) in (old, new)

    if state != "replaced":
        again = laboratory.run("--db", path, "--json", plain=True, environment=setting.environment)
        assert again.code == 0, again.err
    assert table(path) == setting.new
    assert other_contents(path) == setting.others
    undone = laboratory.run("rollback", "--db", path)
    assert undone.code == 0, undone.err
    assert table(path) == setting.old
    assert other_contents(path) == setting.others
    assert list(path.parent.rglob(".*")) == []
    assert list(path.parent.glob("m.db-*")) == []
    return f"exit {run.code}, {state}, {len(new)} ranges new"


def check_rollback(laboratory: Laboratory, setting: Setting, case: Case, path: Path) -> str:
    """Roll back with a fault, look at everything, and roll back again without it."""
    failed = laboratory.run("rollback", "--db", path, fault=case.fault)
    check_words(failed)
    assert failed.seen >= case.fault.first
    found = table(path)
    status = laboratory.run("status", "--db", path, "--json")
    [run] = json.loads(status.out)["runs"]
    state = run["state"]

    match state:
        case "replaced":
            # Without a manifest that can be read, it is not known that nothing was put back.
            unknown = case.place == "manifest" and {"open", "read"} & {*case.fault.calls.split()}
            assert failed.code == 1 or (unknown and failed.code == 6)
            assert (status.code, found) == (0, setting.new)
        case "rolling back":
            assert (failed.code, status.code) == (6, 6)
            assert found in (setting.old, setting.new)
        case _:
            assert (failed.code, state, status.code) == (0, "rolled back", 0)
            assert found == setting.old
    if state != "rolled back":
        undone = laboratory.run("rollback", "--db", path)
        assert undone.code == 0, undone.err
    assert table(path) == setting.old
    assert other_contents(path) == setting.others
    assert list(path.parent.rglob(".*")) == []
    assert list(path.parent.glob("m.db-*")) == []
    return f"exit {failed.code}, {state}"


def check_half_back(laboratory: Laboratory, setting: Setting, case: Case, path: Path) -> str:
    """Roll back with a fault what was replaced in part, look, and roll back again without it."""
    before = table(path)
    failed = laboratory.run("rollback", "--db", path, fault=case.fault)
    check_words(failed)
    # How often SQLite looks at the index of its log is not the same each time.
    assert failed.seen >= case.fault.first or failed.code == 0
    found = table(path)
    status = laboratory.run("status", "--db", path, "--json")
    [run] = json.loads(status.out)["runs"]
    state = run["state"]
    assert (failed.code, status.code) in [(0, 0), (1, 6), (6, 6)]
    assert (failed.code == 0) == (state == "rolled back")
    if failed.code == 1:
        assert found == before
    for key, values in found.items():
        assert values in (setting.old[key], before[key])
    if failed.code != 0:
        undone = laboratory.run("rollback", "--db", path)
        assert undone.code == 0, undone.err
    assert table(path) == setting.old
    assert other_contents(path) == setting.others
    return f"exit {failed.code}, {state}"


def check_cleanup(laboratory: Laboratory, former: Table, case: Case, path: Path) -> str:
    """Clean up with a fault, look at everything, clean up without it, and roll back the rest."""
    before = table(path)
    failed = laboratory.run("cleanup", "--db", path, "--json", fault=case.fault)
    check_words(failed)
    assert failed.seen >= case.fault.first
    assert failed.code in (0, 1)
    assert table(path) == before
    status = laboratory.run("status", "--db", path, "--json")
    assert status.code == 0, status.err
    runs = [run["state"] for run in json.loads(status.out)["runs"]]
    assert runs in (["replaced"], ["replaced", "replaced"])
    if failed.code == 0:
        assert json.loads(failed.out)["kept"].keys()
        assert len(runs) == 1 or not json.loads(failed.out)["removed"]

    again = laboratory.run("cleanup", "--db", path)
    assert again.code == 0, again.err
    assert len(run_directories(path)) == 1
    undone = laboratory.run("rollback", "--db", path)
    assert undone.code == 0, undone.err
    assert table(path) == former
    last = laboratory.run("cleanup", "--db", path, "--yes")
    assert last.code == 0, last.err
    assert run_directories(path) == []
    assert list(path.parent.rglob(".*")) == []
    return f"exit {failed.code}, {len(runs)} runs left"


def run_directories(path: Path) -> list[Path]:
    """The directories of the runs on a database, and what is left of others."""
    places = path.with_name(f"{path.name}.reembed").glob("*")
    return [place for place in places if place.name != "lock"]


def rows_of(found: Table, index: int) -> list[tuple[Any, ...]]:
    """What the rows of a range hold."""
    return list(found.values())[index * RANGE_ROWS : (index + 1) * RANGE_ROWS]


def check_words(run: Done) -> None:
    """A failed run says why in exactly one line; none shows a traceback."""
    lines = [line for line in run.err.splitlines() if line.startswith("reembed: error: ")]
    assert "Traceback" not in run.err, run.err
    assert len(lines) == (run.code != 0), run.err
    allowed = r"(reembed: |WARN \[|$)"
    assert [line for line in run.err.splitlines() if not re.match(allowed, line)] == []


@pytest.mark.system
@pytest.mark.parametrize("portions", PORTIONS)
@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_a_fault_anywhere_leaves_whole_ranges_that_status_names_and_a_rerun_completes(
    mode: str, portions: str, laboratory: Laboratory, tmp_path: Path
) -> None:
    setting = laboratory.observe(mode, portions)
    chance = random.Random(f"{SEED} {mode} {portions}")
    phases = list(phases_of_run(setting.calls))
    cases = choose_cases(setting.calls, phases, chance, most=CASES)

    check_all(
        f"run, {mode}, {portions}",
        cases,
        lambda case, number: check_run(laboratory, setting, case, tmp_path / str(number)),
    )


def copy_with_runs(source: Path, target: Path) -> None:
    """Copy a store with its runs, which then belong to the copy."""
    shutil.copytree(source, target)
    for manifest in target.glob("m.db.reembed/2*/manifest.json"):
        text = manifest.read_text().replace(str(source / "m.db"), str(target / "m.db"))
        manifest.write_text(text)


@pytest.mark.system
@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_a_fault_anywhere_in_a_rollback_leaves_all_or_nothing_and_the_next_one_completes(
    mode: str, laboratory: Laboratory, tmp_path: Path
) -> None:
    setting = laboratory.observe(mode, "at once")
    replaced = setting.source.parents[1] / "clean" / "store"
    copy_with_runs(replaced, tmp_path / "traced" / "store")
    calls = traced(laboratory, "rollback", "--db", tmp_path / "traced" / "store" / "m.db")
    cases = choose_cases(
        calls, ["rollback"] * len(calls), random.Random(f"{SEED} {mode}"), most=CASES
    )

    def check(case: Case, number: int) -> str:
        copy_with_runs(replaced, tmp_path / str(number) / "store")
        return check_rollback(laboratory, setting, case, tmp_path / str(number) / "store" / "m.db")

    check_all(f"rollback, {mode}", cases, check)


@pytest.mark.system
def test_a_fault_anywhere_in_the_rollback_of_a_half_replaced_store_leaves_the_way_back(
    laboratory: Laboratory, tmp_path: Path
) -> None:
    setting = laboratory.observe("wal", "in portions")
    source = copy_store(setting.source, tmp_path / "half")
    broken = Fault("*/m.db-wal", "sync", errno.EIO, 3, ALWAYS)
    half = laboratory.run("--db", source, fault=broken, environment=setting.environment, plain=True)
    assert half.code == 6
    copy_with_runs(source.parent, tmp_path / "traced" / "store")
    calls = traced(laboratory, "rollback", "--db", tmp_path / "traced" / "store" / "m.db")
    chance = random.Random(f"{SEED} half")
    cases = choose_cases(calls, ["rollback"] * len(calls), chance, most=3)

    def check(case: Case, number: int) -> str:
        copy_with_runs(source.parent, tmp_path / str(number) / "store")
        path = tmp_path / str(number) / "store" / "m.db"
        return check_half_back(laboratory, setting, case, path)

    check_all("rollback of a half replaced store", cases, check)


@pytest.mark.system
def test_a_fault_anywhere_in_a_cleanup_leaves_what_was_to_be_kept_and_the_next_one_completes(
    laboratory: Laboratory, tmp_path: Path
) -> None:
    source = new_store(tmp_path / "replaced" / "store" / "m.db", "wal")
    # It would keep its oldest vector, for which the older run would have to stay.
    change(source, f"DELETE FROM memories WHERE id = '{SEALED:03d}'")
    tables = []
    for dimension in (8, 6):
        done = laboratory.run("--db", source, "--model", "m", "--dim", str(dimension), plain=True)
        assert done.code == 0, done.err
        tables.append(table(source))
    copy_with_runs(source.parent, tmp_path / "traced" / "store")
    calls = traced(laboratory, "cleanup", "--db", tmp_path / "traced" / "store" / "m.db")
    chance = random.Random(f"{SEED} cleanup")
    cases = choose_cases(calls, ["cleanup"] * len(calls), chance, most=4)

    def check(case: Case, number: int) -> str:
        copy_with_runs(source.parent, tmp_path / str(number) / "store")
        path = tmp_path / str(number) / "store" / "m.db"
        return check_cleanup(laboratory, tables[0], case, path)

    check_all("cleanup", cases, check)


@pytest.mark.system
def test_a_fault_at_any_call_on_the_manifest_leaves_a_state_that_is_true(
    laboratory: Laboratory, tmp_path: Path
) -> None:
    setting = laboratory.observe("delete", "in portions")
    phases = list(phases_of_run(setting.calls))
    chance = random.Random(f"{SEED} manifest")
    everywhere = len(PLACES) * len(set(phases))
    most = choose_cases(setting.calls, phases, chance, most=everywhere)
    cases = [case for case in most if "manifest" in case.place]
    cases = cases if EACH else chance.sample(cases, 3)

    check_all(
        "run, at its manifest",
        cases,
        lambda case, number: check_run(laboratory, setting, case, tmp_path / str(number)),
    )


def check_all(what: str, cases: Sequence[Case], check: Callable[[Case, int], str]) -> None:
    """Check all cases, as many at a time as there are servers; print what came of each."""

    def told(number: int) -> str:
        try:
            return check(cases[number], number)
        except Exception as error:
            return f"FAILED ({number}) {type(error).__name__}: {error}"

    with ThreadPoolExecutor(SERVERS) as pool:
        outcomes = list(pool.map(told, range(len(cases))))

    lines = [f"{case}: {outcome}" for case, outcome in zip(cases, outcomes, strict=True)]
    print(f"\n{len(cases)} faults in a {what}", *lines, sep="\n  ")
    assert [line for line in lines if "FAILED" in line] == []


SENTENCE = "reembed: error: "


def error_of(done: Done) -> str:
    """Why a run failed, in the one line that says it."""
    check_words(done)
    [line] = [line for line in done.err.splitlines() if line.startswith(SENTENCE)]
    return line.removeprefix(SENTENCE)


def test_a_disk_that_fails_for_good_in_a_later_transaction_leaves_a_part_that_a_rerun_finishes(
    laboratory: Laboratory, fake_program: Program, reembed: Call, tmp_path: Path
) -> None:
    """The program as a user starts it, not forked: the fault comes from the environment."""
    path = new_store(tmp_path / "store" / "m.db", "wal")
    old, portions = table(path), PORTIONS["in portions"] | {"FAKE_RANGE_ROWS": str(RANGE_ROWS)}
    fault = {
        "LD_PRELOAD": str(laboratory.library),
        "FAULT_PATTERN": "*/m.db-wal",
        "FAULT_CALLS": "sync",
        "FAULT_ERRNO": str(errno.EIO),
        "FAULT_FIRST": "3",
        "FAULT_LAST": str(ALWAYS),
    }

    failed = fake_program("--db", path, environment=portions | fault)

    [line] = [line for line in failed.stderr.splitlines() if line.startswith(SENTENCE)]
    assert failed.returncode == 6
    assert wording(line.removeprefix(SENTENCE), tmp_path) == snapshot(
        "reading or writing TMP/store/m.db failed (disk I/O error); check the disk and run "
        "again; the replacement by run RUN (to all-MiniLM-L6-v2 (8-dim)) is incomplete: of "
        "ranges 0-3, 0 hold new vectors, and 1-2 were being written: run again to finish "
        "it, or undo it with reembed rollback"
    )
    assert "Traceback" not in failed.stderr
    # A commit that could not be flushed is in the file all the same, until the power fails.
    assert [at for at in RANGES if rows_of(table(path), at) == rows_of(old, at)] == [3]
    done = reembed("--db", path, range_rows=RANGE_ROWS, rows_at_once=8, first_rows=8)
    assert done.code == 0
    [line] = [line for line in done.err.splitlines() if "the replacement by run" in line]
    assert wording(line, tmp_path) == snapshot(
        "reembed: the replacement by run RUN (to all-MiniLM-L6-v2 (8-dim)) is incomplete: "
        "of ranges 0-3, 0 hold new vectors, and 1-2 were being written; finishing it"
    )
    assert [at for at in RANGES if rows_of(table(path), at) == rows_of(old, at)] == []


def held(path: Path, until: Callable[[], bool]) -> bool:
    """Hold the database exclusively, as another program would, until something is so."""
    connection = sqlite3.connect(path, isolation_level=None, timeout=60)
    connection.execute("BEGIN EXCLUSIVE")
    reached = wait_for(until)
    connection.execute("ROLLBACK")
    connection.close()
    return reached


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> bool:
    """Wait until something is so; False if it never is."""
    ends = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > ends:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.system
@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_a_lock_that_another_program_holds_while_rows_are_read_or_written_is_waited_for(
    mode: str, laboratory: Laboratory, tmp_path: Path
) -> None:
    """In DELETE mode the lock keeps the rows from being read, in WAL mode from being written."""
    path = new_store(tmp_path / "store" / "m.db", mode)
    old = table(path)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_slowly, laboratory, path, busy_seconds=60)
        assert wait_for(lambda: staged_in(path))
        held(path, lambda: wait_for(running.done, 0.7) or True)
        assert not running.done()
        done = running.result()
    assert done.code == 0, done.err
    changed = [key for key, values in table(path).items() if values != old[key]]
    assert len(changed) == ROWS - 1


@pytest.mark.system
@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_a_lock_that_is_held_too_long_ends_the_run_and_the_next_one_goes_on(
    mode: str, laboratory: Laboratory, tmp_path: Path
) -> None:
    path = new_store(tmp_path / "store" / "m.db", mode)
    old = table(path)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_slowly, laboratory, path, busy_seconds=0.2)
        assert wait_for(lambda: staged_in(path))
        assert held(path, running.done)
        failed = running.result()
    # In WAL mode all was staged and saved, and the manifest says that the replacement was begun.
    said = {
        "delete": snapshot(
            "TMP/store/m.db is locked by another process; wait for it to finish, or stop "
            "it, and run again"
        ),
        "wal": snapshot(
            "TMP/store/m.db is locked by another process; wait for it to finish, or stop "
            "it, and run again; the replacement by run RUN (to all-MiniLM-L6-v2 (8-dim)) "
            "is incomplete: of ranges 0-3, none hold new vectors, and 0-3 were being "
            "written: run again to finish it, or undo it with reembed rollback"
        ),
    }
    assert wording(error_of(failed), tmp_path) == said[mode]
    assert failed.code == {"delete": 1, "wal": 6}[mode]
    assert table(path) == old

    done = laboratory.run("--db", path, "--json", plain=True)
    assert json.loads(done.out)["reembedded"] == ROWS - 1


def run_slowly(laboratory: Laboratory, path: Path, *, busy_seconds: float) -> Done:
    """Run with a slow model, waiting for no lock longer than so many seconds."""
    environment = {"FAKE_SECONDS": "0.2", "FAULTS_BUSY_SECONDS": str(busy_seconds)}
    return laboratory.run("--db", path, environment=environment)


def staged_in(path: Path) -> bool:
    """Whether a shard is staged."""
    return bool(list(path.parent.rglob("shards/0*.parquet")))


PAGES = {
    "the root of memories": "SELECT rootpage FROM sqlite_schema WHERE name = 'memories'",
    "an index of memories": (
        "SELECT rootpage FROM sqlite_schema WHERE name = 'idx_memories_updated_at'"
    ),
    "another table": "SELECT rootpage FROM sqlite_schema WHERE name = 'memories_fts_docsize'",
    "an empty table": "SELECT rootpage FROM sqlite_schema WHERE name = 'archived_memories'",
}


@pytest.mark.system
@pytest.mark.parametrize("mode", ["delete", "wal"])
@pytest.mark.parametrize("where", [*PAGES, "a leaf of memories"])
def test_a_damaged_page_is_reported_before_anything_is_replaced(
    where: str, mode: str, laboratory: Laboratory, tmp_path: Path
) -> None:
    path = new_store(tmp_path / "store" / "m.db", mode)
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[16:18], "big")
    ((root,),) = select(path, PAGES.get(where, PAGES["the root of memories"]))
    at = (int(root) - 1) * size
    if where not in PAGES:
        # https://sqlite.org/fileformat.html: an interior page names its last child in bytes 8-11.
        assert content[at] == 5
        at = (int.from_bytes(content[at + 8 : at + 12], "big") - 1) * size
    content[at + 3 : at + 200] = b"\xa5" * 197
    path.write_bytes(content)

    done = laboratory.run("--db", path)

    assert done.code == 1
    assert wording(error_of(done), tmp_path) == snapshot(
        "TMP/store/m.db is damaged (PRAGMA integrity_check says how); restore or repair it "
        "before its vectors are replaced"
    )
    assert files(path.parent) == {"m.db": bytes(content)}


@pytest.mark.system
def test_a_shard_that_is_altered_while_the_run_is_at_work_is_named_and_nothing_is_replaced(
    reembed: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = new_store(tmp_path / "store" / "m.db", "delete")
    old = table(path)
    look = replacing.replace_vectors

    def altered(*arguments: Any, **more: Any) -> Summary:
        shard = max(path.parent.rglob("shards/0*.parquet"))
        shard.write_bytes(shard.read_bytes()[:-100])
        return look(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr("reembed.pipeline.run.replace_vectors", altered)
        failed = reembed("--db", path, range_rows=RANGE_ROWS, through_beam=True)
    shard = max(path.parent.rglob("shards/0*.parquet"))

    assert failed.code == 1
    assert wording(failed.error, tmp_path).replace(shard.name, "SHARD") == snapshot(
        "TMP/store/m.db.reembed/RUN/shards/SHARD is damaged: its bytes are not those that "
        "were written; run reembed again, which looks through all files of the run first"
    )
    assert table(path) == old
    done = reembed("--db", path, range_rows=RANGE_ROWS)
    assert done.code == 0
    assert f"the shard {shard.name} was damaged; it is made again" in done.err
    assert done.texts == {f"title {number:03d} content {number:03d}" for number in range(24, 32)}
    assert [key for key, values in table(path).items() if values == old[key]] == [f"{SEALED:03d}"]


@pytest.mark.system
def test_backup_files_that_are_altered_are_named_and_the_run_still_finishes(
    laboratory: Laboratory, tmp_path: Path
) -> None:
    """One of a range that is replaced, and one of a range that is not: this is saved again."""
    setting = laboratory.observe("wal", "in portions")
    path = copy_store(setting.source, tmp_path / "altered")
    broken = Fault("*/m.db-wal", "sync", errno.EIO, 3, ALWAYS)
    assert laboratory.run("--db", path, fault=broken, environment=setting.environment).code == 6
    saved = sorted(path.parent.rglob("backup/0*.parquet"))
    assert [int(one.name[:7]) for one in saved] == [*RANGES]
    for one in saved[::3]:
        one.write_bytes(one.read_bytes()[:-1])

    done = laboratory.run("--db", path, environment=setting.environment)
    undone = laboratory.run("rollback", "--db", path)

    assert (done.code, undone.code) == (0, 6)
    for one in saved:
        said = f"the backup file {one.name} is missing or damaged: rollback can't put its rows"
        assert (said in done.err) == (one in saved[::3])
        assert (f"{one.name} is missing or damaged" in undone.err) == (one == saved[0])
    found = table(path)
    assert [at for at in RANGES if rows_of(found, at) == rows_of(setting.old, at)] == [1, 2, 3]
    assert rows_of(found, 0) == rows_of(setting.new, 0)


def full_when(monkeypatch: pytest.MonkeyPatch, full: Callable[[], bool]) -> None:
    """Have almost no room on any disk while something is so."""

    def usage(path: object) -> Any:
        free = 1_000 if full() else 10**12
        return shutil._ntuple_diskusage(10**12, 10**12 - free, free)

    monkeypatch.setattr(shutil, "disk_usage", usage)


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_without_room_for_the_run_it_is_not_begun(
    mode: str, reembed: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = new_store(tmp_path / "store" / "m.db", mode)
    before = files(path.parent)
    full_when(monkeypatch, lambda: True)

    done = reembed("--db", path)

    assert done.code == 1
    assert not done.texts
    said = re.sub(r"about \d+,\d+ bytes", "about SIZE", wording(done.error, tmp_path))
    assert said == snapshot(
        "about SIZE are needed for the new vectors, the backup and SQLite's log, and 1,000 "
        "bytes are free at TMP/store/m.db.reembed/RUN; make room, or name another place "
        "for the run directory with --run-dir"
    )
    assert files(path.parent) == before


def test_without_room_for_the_replacement_what_is_staged_waits_for_the_next_run(
    reembed: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = new_store(tmp_path / "store" / "m.db", "wal")
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        full_when(patch, lambda: staged_in(path))
        failed = reembed("--db", path, range_rows=RANGE_ROWS)

    assert failed.code == 1
    said = re.sub(r"about \d+,\d+ bytes", "about SIZE", wording(failed.error, tmp_path))
    assert said == snapshot(
        "about SIZE are needed for the new vectors, the backup and SQLite's log, and 1,000 "
        "bytes are free at TMP/store/m.db.reembed/RUN; make room, or name another place "
        "for the run directory with --run-dir"
    )
    assert path.read_bytes() == before
    done = reembed("--db", path, range_rows=RANGE_ROWS)
    assert done.code == 0
    assert not done.texts
    [line] = [line for line in done.err.splitlines() if "going on" in line]
    assert wording(line, tmp_path) == snapshot(
        "reembed: 32 of 32 rows are staged; going on (run RUN)"
    )


if __name__ == "__main__":
    serve(sys.argv[1])
