"""Stores and programs that the tests share."""

from __future__ import annotations

import gzip
import json
import logging
import os
import secrets
import socket
import sqlite3
import ssl
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from hypothesis import settings

from reembed.pipeline import plan as planning
from reembed.pipeline.options import Options
from reembed.pipeline.plan import Plan, make_plan
from reembed.pipeline.runners import check_runner, parse_beam_options
from reembed.pipeline.settings import read_settings
from reembed.transforms import embedders, hiding
from reembed.transforms.embedders import Embedder, Target
from reembed.transforms.embedders.models import MINILM, ModelFiles
from reembed.transforms.passes import Pass, Phase
from reembed.transforms.rows import Stored, Summary
from reembed.transforms.staging import Manifest, make_run, staging_root
from reembed.transforms.stores import Replacement
from reembed.transforms.stores.demo import Memory, create_store
from reembed.transforms.stores.sqlite import quoted
from tests.forks import Forks
from tests.launches import Launches

if TYPE_CHECKING:
    from reembed.transforms.embedders.local import LocalEmbedder

# The same examples every time; HYPOTHESIS_PROFILE=wide looks for others.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("wide", max_examples=2_000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

# The tests run side by side, and torch's threads in each of them would fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

FIXTURES = Path(__file__).parent / "fixtures"
ROOT = Path(__file__).parent.parent
DIMENSION = 8
FAKE = Target("fake", "all-MiniLM-L6-v2", DIMENSION)
NO_FILES = ModelFiles(Path("nowhere"), DIMENSION, None)
SETTINGS = read_settings(Options(backend="local"), {}, Path("/"))

LAUNCHES = Launches()
FSYNC = os.fsync


def pytest_configure(config: pytest.Config) -> None:
    """Count the processes that tests start."""
    config.pluginmanager.register(LAUNCHES)


Program = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(autouse=True)
def no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the keys of other tests, which nothing may show."""
    monkeypatch.setattr(hiding, "_noted", set())


@cache
def _context(file: str | None, directory: str | None) -> ssl.SSLContext:
    return _create_context()


_create_context = httpx2.create_ssl_context


@pytest.fixture(autouse=True)
def certificates_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read the authorities' certificates once, not for each server: that takes 50 ms."""

    def context() -> ssl.SSLContext:
        return _context(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))

    monkeypatch.setattr(httpx2, "create_ssl_context", context)


@pytest.fixture(params=["v57", "v80"])
def original(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """A database made by the original program: v57 in DELETE mode, v80 in WAL mode."""
    return request.param, unpack(request.param, tmp_path / "ai-memory.db")


def unpack(version: str, path: Path) -> Path:
    """Write a copy of one of the original program's databases."""
    path.write_bytes(gzip.decompress((FIXTURES / f"ai-memory-{version}.db.gz").read_bytes()))
    return path


def memory(key: str, content: str | None = None, **more: Any) -> Memory:
    """A memory that needs no more than a key."""
    values: dict[str, Any] = {
        "id": key,
        "namespace": "global",
        "title": f"title {key}",
        "content": f"content {key}" if content is None else content,
        "embedding": None,
        "embedding_dim": None,
        **more,
    }
    return Memory(**values)


def make_store(path: Path, memories: Sequence[Memory], journal_mode: str = "delete") -> Path:
    """Write an ai-memory database with these memories."""
    create_store(str(path), memories, journal_mode=journal_mode)
    return path


def fake_plan(
    path: Path, *, rows: int | None = None, namespace: str | None = None, **flags: Any
) -> Plan:
    """A plan that embeds with the fake embedder, in ranges of so many rows."""
    options = Options(namespace=namespace, **flags)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "_find_target", lambda settings, options: (FAKE, NO_FILES))
        patch.setattr(planning, "RANGE_ROWS", rows or planning.RANGE_ROWS)
        plan = make_plan(path, SETTINGS, options)
    return replace(plan, batch=4)


def begin(plan: Plan, *, probe: Sequence[Sequence[float]] = ()) -> Plan:
    """Make the directory of a plan's run, as a run does before it embeds anything."""
    manifest = Manifest(
        run_id=plan.run.run_id,
        database=str(plan.store.path),
        started="2026-01-01T00:00:00Z",
        scope=plan.scope,
        target=plan.target.to_json(),
        probe=probe,
        ranges=plan.ranges,
        rows=plan.survey.meant,
        attempt=plan.attempt,
    )
    staging_root(plan.store.path).mkdir(exist_ok=True)
    make_run(plan.run, plan.store.path, manifest)
    return plan


def select(path: Path, query: str) -> list[tuple[Any, ...]]:
    """Run a query over a connection of its own."""
    connection = sqlite3.connect(path)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def change(path: Path, *statements: str) -> None:
    """Change a database as another program would."""
    connection = sqlite3.connect(path)
    try:
        with connection:
            for statement in statements:
                connection.execute(statement)
    finally:
        connection.close()


def other_contents(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    """All tables without what a replacement may change: the vectors, dimensions and stamps."""
    ours = {"embedding", "embedding_dim", "embedding_space"}
    contents = {}
    tables = select(path, "SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY 1")
    for (table,) in tables:
        columns = [
            str(name)
            for (name,) in select(path, f"SELECT name FROM pragma_table_xinfo('{table}')")
            if table != "memories" or name not in ours
        ]
        names = ", ".join(f'"{name}"' for name in columns if name != table)
        if not str(table).endswith("_fts"):
            contents[str(table)] = sorted(select(path, f'SELECT {names} FROM "{table}"'), key=repr)
    return contents


def files(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, with its contents."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def kept_files(directory: Path) -> dict[str, bytes]:
    """The same without the lock, which says who held it last."""
    return {
        name: content for name, content in files(directory).items() if Path(name).name != "lock"
    }


@dataclass(frozen=True)
class Scenario:
    """A way in which the server of the tests behaves; see `tests/server.py`."""

    url: str
    control: str

    def log(self) -> dict[str, Any]:
        """What has happened since it was made."""
        found: dict[str, Any] = _control().get(self.control).json()
        return found


@cache
def _control() -> httpx2.Client:
    """What asks the server of the tests; it needs no certificates."""
    return httpx2.Client(trust_env=False, verify=False)


Serve = Callable[..., Scenario]


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """A server that embeds, as a process of its own; its URL."""
    environment = {name: value for name, value in os.environ.items() if "PROXY" not in name.upper()}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.server"],
        cwd=ROOT,
        env=environment | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def serve(server: str) -> Serve:
    """Have the server behave in a way: its keys are those of a scenario."""

    def make(**values: Any) -> Scenario:
        name = secrets.token_hex(4)
        control = f"{server}/scenarios/{name}"
        _control().put(control, json=values).raise_for_status()
        return Scenario(f"{server}/{name}", control)

    return make


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Start programs as forks of a process that has imported them already."""
    directory = tmp_path_factory.mktemp("forks")
    started = Forks(directory, clean_environment(directory))
    yield started
    started.close()


@pytest.fixture
def program(tmp_path: Path, forks: Forks) -> Program:
    """Run the program as a user does, in an environment without ai-memory settings."""
    return _program(tmp_path, "reembed", forks)


@pytest.fixture
def fake_program(tmp_path: Path, forks: Forks) -> Program:
    """Run the program with the fake embedder in place of the model; see `tests/fake_program.py`."""
    return _program(tmp_path, "tests.fake_program", forks)


READ_AT_THE_START = ("PYTHON", "HF_", "LD_")
"""Variables that a process that has imported everything would not heed."""


def _program(tmp_path: Path, module: str, forks: Forks) -> Program:
    """A process of its own for each call, which is a fork where that shows the same.

    With `anew`, through another program or with variables that Python or a library reads once,
    it starts as a user starts it.
    """

    def run(
        *arguments: str | Path,
        environment: Mapping[str, str] | None = None,
        directory: Path = tmp_path,
        wrapper: Sequence[str] = (),
        timeout: float = 120,
        anew: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        more = dict(environment or {})
        given = list(map(str, arguments))
        anew = anew or bool(wrapper) or any(name.startswith(READ_AT_THE_START) for name in more)
        if not anew and sys.platform == "linux":
            LAUNCHES.count += 1
            return forks.run(
                module,
                given,
                environment=clean_environment(tmp_path) | more,
                directory=directory,
                timeout=timeout,
            )
        return subprocess.run(
            [*wrapper, sys.executable, "-m", module, *given],
            env=clean_environment(tmp_path) | more,
            cwd=directory,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


def clean_environment(home: Path) -> dict[str, str]:
    """This environment without settings of ai-memory, of ours or of a model hub."""
    ours = ("AI_MEMORY", "REEMBED", "HF_", "XDG_", "OPENAI_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return kept | {"HOME": str(home), "PYTHONPATH": str(ROOT)}


@dataclass(frozen=True)
class Ran:
    """What a call of the program gave: its exit code, what it printed, what it embedded."""

    code: int
    out: str
    err: str
    texts: set[str]

    @property
    def values(self) -> dict[str, Any]:
        """The result as JSON."""
        found: dict[str, Any] = json.loads(self.out)
        return found

    @property
    def error(self) -> str:
        """Why it failed."""
        [line] = [line for line in self.err.splitlines() if line.startswith("reembed: error: ")]
        return line.removeprefix("reembed: error: ")


Call = Callable[..., Ran]


def plain_pass(plan: Plan, current: Pass, runner: str, options: object) -> Summary:
    """What the graph does, as the obvious loop."""
    from reembed.pipeline.build import stored_rows
    from reembed.transforms.embed import embed_rows

    embedder = embedders.load_embedder(plan.target)
    source = stored_rows(plan, current)
    summary = Summary()
    for keys in current.ranges:
        for part in source.read_parts(keys):
            vectors = embed_rows(
                part,
                embedder,
                dimension=plan.target.dimension,
                batch=plan.batch,
                pause=plan.pause,
            )
            staged = plan.run.write_shard(vectors, pass_number=current.number)
            skipped = Counter(row.skipped.cause for row in vectors.rows if row.skipped)
            summary += Summary(embedded=staged.embedded, skipped=skipped)
    return summary


def only_pass(plan: Plan, *, number: int = 1, phase: Phase = Phase.HOLD, **more: Any) -> Pass:
    """A pass over all ranges of a plan."""
    return Pass(number, **{"ranges": plan.ranges, "phase": phase, **more})


@cache
def _known_beam_options(runner: str, flags: tuple[str, ...]) -> PipelineOptions:
    return parse_beam_options(runner, flags)


def _parse_beam_options(runner: str, flags: Sequence[str]) -> PipelineOptions:
    return _known_beam_options(runner, tuple(flags))


def _check_runner(runner: str, options: PipelineOptions, *, workdir: str | None = None) -> None:
    if runner != "DirectRunner" or workdir is not None:
        check_runner(runner, options, workdir=workdir)


@pytest.fixture
def reembed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Call]:
    """Call the program with the fake embedder in this process, which saves the start of another.

    Keywords are the variables of `tests/fake_program.py`, without FAKE_; with `real` it is the
    program as it is. What a pass does is done in a plain loop, unless `through_beam`, which
    takes much longer; tests of the graph show that the two are the same.
    """
    from reembed.pipeline import run, runners, surroundings
    from reembed.pipeline.cli import main
    from tests import fake_program

    for name in os.environ.keys() - clean_environment(tmp_path).keys():
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    logger = logging.getLogger("reembed")
    before = logger.handlers, logger.level, logger.propagate
    loaded = embedders._load

    def call(
        *arguments: str | Path, real: bool = False, through_beam: bool = False, **variables: object
    ) -> Ran:
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(f"FAKE_{name.upper()}", str(value))
            # What `install` sets is set back.
            for module, name in fake_program.PLACES:
                patch.setattr(module, name, getattr(module, name))
            # Each would take a fifth of the time; tests/test_surroundings.py and
            # tests/test_files.py are about them.
            patch.setattr(surroundings, "holders", lambda real: iter(()))
            if os.fsync is FSYNC:
                patch.setattr(os, "fsync", lambda descriptor: None)
            if not real:
                fake_program.install()
            if not real and not through_beam:
                patch.setattr(run, "_run_pass", plain_pass)
                # Beam takes 15 ms each time to say what its options are.
                patch.setattr(runners, "parse_beam_options", _parse_beam_options)
                patch.setattr(run, "check_runner", _check_runner)
            fake_program.embedded.clear()
            loaded.cache_clear()
            code = main(list(map(str, arguments)))
            loaded.cache_clear()
        texts = set(fake_program.embedded) - {*embedders.PROBE_TEXTS}
        return Ran(code, *capsys.readouterr(), texts)

    yield call
    logger.handlers, level, logger.propagate = before
    logger.setLevel(level)


@cache
def real_embedder() -> LocalEmbedder:
    """The real model, loaded once for all tests of a process: it takes 5 s each time."""
    from reembed.transforms.embedders.local import LocalEmbedder

    return LocalEmbedder(MINILM, 384, prompt="")


@pytest.fixture
def real_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have runs in this process share the real model; see also `tests/launches.py`."""
    build = embedders._build

    def build_once(target: Target) -> Embedder:
        plain = Target("local", MINILM, 384, MINILM, window=target.window, normalized=True)
        return real_embedder() if target == plain else build(target)

    monkeypatch.setattr(embedders, "_build", build_once)


@contextmanager
def worker_pool(
    home: Path,
    *,
    hidden: Path | None = None,
    python: str | Path = sys.executable,
    directory: Path = ROOT,
    environment: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """A pool of workers that others start work in, which finds a directory empty; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [str(python), "-m", "apache_beam.runners.worker.worker_pool_main"]
    program += [f"--service_port={port}"]
    if hidden is not None:
        hide = f'mount -t tmpfs none "{hidden}" && exec "$@"'
        program = [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            hide,
            "-",
            *program,
        ]
    path = f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}"
    variables = clean_environment(home) | {"PATH": path} | dict(environment or {})
    process = subprocess.Popen(program, env=variables, cwd=directory)
    try:
        ends = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert process.poll() is None
            assert time.monotonic() < ends
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def all_columns(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    """All columns of all rows of all tables: their types, and their bytes where they have any."""
    connection = sqlite3.connect(path)
    connection.text_factory = bytes
    try:
        found = connection.execute("SELECT name, type FROM sqlite_schema WHERE type = 'table'")
        tables = [name.decode() for name, _ in found]
        contents = {}
        for table in tables:
            info = connection.execute("SELECT name FROM pragma_table_xinfo(?)", (table,))
            columns = [quoted(name.decode()) for (name,) in info]
            wanted = ", ".join(f"typeof({column}), {column}" for column in columns)
            contents[table] = sorted(
                connection.execute(f"SELECT {wanted} FROM {quoted(table)}").fetchall(), key=repr
            )
        return contents
    finally:
        connection.close()


def jam(path: Path, key: str) -> None:
    """Let every write of a row's vector fail, and with it the transaction."""
    change(
        path,
        f"CREATE TRIGGER jam BEFORE UPDATE OF embedding ON memories WHEN new.id = '{key}' "
        "BEGIN SELECT RAISE(ABORT, 'jammed'); END",
    )


def unjam(path: Path) -> None:
    """Let rows be written again."""
    change(path, "DROP TRIGGER jam")


def half_replace(call: Call, path: Path, *flags: str) -> Ran:
    """Replace rows 0 to 9 in several transactions, of which the second fails: 0 and 1 are new."""
    jam(path, "5")
    done = call("--db", path, *flags, range_rows=2, rows_at_once=1, first_rows=2)
    unjam(path)
    return done


@contextmanager
def losing_writes(monkeypatch: pytest.MonkeyPatch, *, times: int) -> Iterator[None]:
    """Lose the last row of each of the next `times` writes, as a faulty store would.

    The trial of one row, which isn't written for good, goes on as it should.
    """
    put, try_row, left = Replacement.put, Replacement.try_row, [times]

    def lose(table: Replacement, changes: Sequence[tuple[int, Stored]], **how: bool) -> None:
        if changes and left[0] > 0:
            left[0] -= 1
            table.written.add(changes[-1:])
            changes = changes[:-1]
        put(table, changes, **how)

    def keep(table: Replacement, rowid: int, new: Stored) -> None:
        kept, left[0] = left[0], 0
        try_row(table, rowid, new)
        left[0] = kept

    with monkeypatch.context() as patch:
        patch.setattr(Replacement, "put", lose)
        patch.setattr(Replacement, "try_row", keep)
        yield
