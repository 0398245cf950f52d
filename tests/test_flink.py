"""Runs on a real Flink cluster, whose script REEMBED_FLINK_CLUSTER names."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from reembed.transforms.embedders import cosines
from reembed.transforms.errors import StagingError
from reembed.transforms.staging import RunDirectory, find_runs
from reembed.transforms.staging.files import read_metadata
from tests.conftest import (
    ROOT,
    Program,
    clean_environment,
    files,
    make_store,
    memory,
    select,
    unpack,
    worker_pool,
)

CLUSTER = os.environ.get("REEMBED_FLINK_CLUSTER")
VECTORS = "SELECT id, hex(embedding) FROM memories ORDER BY id"
ROWS = 300

pytestmark = [
    pytest.mark.flink,
    pytest.mark.system,
    pytest.mark.timeout(500),  # A cluster starts, and does several jobs.
    pytest.mark.skipif(not CLUSTER, reason="REEMBED_FLINK_CLUSTER names no script of a cluster"),
    pytest.mark.xdist_group("flink"),
]


class Cluster:
    """A Flink of its own, with a job server in front of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def do(self, command: str) -> None:
        """Have the script do something."""
        assert CLUSTER
        # Not a pipe: what it starts would keep that open.
        with (self.directory.parent / "script.log").open("a") as log:
            subprocess.run(
                [CLUSTER, command, str(self.directory)], stdout=log, stderr=log, check=True
            )

    def process(self, name: str) -> int:
        """The id of one of its processes."""
        return int((self.directory / f"{name}.pid").read_text())

    @property
    def loopback(self) -> list[str]:
        """Beam's options for workers in the launcher."""
        return [*self.portable, "--environment_type=LOOPBACK"]

    @property
    def portable(self) -> list[str]:
        """Beam's options for its job server."""
        endpoint = (self.directory / "endpoint").read_text().strip()
        return ["--", f"--job_endpoint={endpoint}", "--parallelism=2"]

    def jobs(self) -> list[dict[str, Any]]:
        """Its jobs, with their states."""
        found: list[dict[str, Any]] = httpx2.get(f"{self._rest}/jobs").json()["jobs"]
        return found

    def cancel(self, job: str) -> None:
        """Cancel a job, as its own page does."""
        httpx2.patch(f"{self._rest}/jobs/{job}?mode=cancel").raise_for_status()

    @property
    def _rest(self) -> str:
        return f"http://{(self.directory / 'rest').read_text().strip()}"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    found = Cluster(tmp_path_factory.mktemp("flink") / "cluster")
    found.directory.mkdir()
    try:
        found.do("start")
        yield found
    finally:
        found.do("stop")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(tmp_path / "m.db", [memory(f"{at:03d}") for at in range(ROWS)])


@pytest.fixture
def expected(store: Path, tmp_path: Path, fake_program: Program) -> list[tuple[Any, ...]]:
    """What a run on this machine makes of the store."""
    other = Path(shutil.copy(store, tmp_path / "other.db"))
    assert fake_program("--db", other).returncode == 0
    return select(other, VECTORS)


@contextmanager
def running(store: Path, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """A run with the fake embedder, slowed down, once it has staged something."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.fake_program", "--db", str(store), *flags],
        env=clean_environment(store.parent) | {"FAKE_SECONDS": "0.4", "FAKE_RANGE_ROWS": "20"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        ends = time.monotonic() + 240
        while not list(store.parent.glob("*.reembed/*/shards/*.parquet")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < ends
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def noting_workers(store: Path) -> Iterator[set[str]]:
    """The workers whose shards are seen in the store's run, which deletes them at its end."""
    workers: set[str] = set()
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.05):
            for run, _ in find_runs(store):
                with suppress(StagingError):
                    shards = [shard for some in run.list_shards().values() for shard in some]
                    workers.update(
                        read_metadata(shard.path)[b"worker"].decode() for shard in shards
                    )

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield workers
    finally:
        ended.set()
        thread.join()


def vectors(path: Path) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    found = select(path, "SELECT id, embedding FROM memories WHERE embedding_dim = 384")
    return {key: np.frombuffer(blob, "<f4", offset=len(blob) % 4) for key, blob in found}


def test_loopback_and_external_workers_give_the_vectors_of_a_run_on_this_machine(
    cluster: Cluster, program: Program, tmp_path: Path
) -> None:
    for name in ("local", "loopback", "external"):
        (tmp_path / name).mkdir()
        unpack("v57", tmp_path / name / "ai-memory.db")
    paths = {name: tmp_path / name / "ai-memory.db" for name in ("local", "loopback", "external")}
    portable = ("--runner", "PortableRunner", "--json")
    hidden = paths["external"].parent if os.geteuid() == 0 else None

    done = {"local": program("--db", paths["local"], "--json")}
    done["loopback"] = program("--db", paths["loopback"], *portable, *cluster.loopback, timeout=300)
    with worker_pool(tmp_path, hidden=hidden) as address:
        external = ["--environment_type=EXTERNAL", f"--environment_config={address}"]
        flags = ("--db", paths["external"], *portable, "--workdir", tmp_path / "work")
        with noting_workers(paths["external"]) as workers:
            done["external"] = program(
                *flags, *cluster.portable, *external, "--sdk_worker_parallelism=2", timeout=300
            )

    assert [ran.returncode for ran in done.values()] == [0] * 3, done["external"].stderr
    keys = ("total", "reembedded", "skipped", "skipped_by_cause", "remaining")
    counts = {name: json.loads(ran.stdout) for name, ran in done.items()}
    assert [[one[key] for key in keys] for one in counts.values()] == [
        [counts["local"][key] for key in keys]
    ] * 3
    local = vectors(paths["local"])
    for name in ("loopback", "external"):
        found = vectors(paths[name])
        assert found.keys() == local.keys()
        one, other = (np.stack([some[key] for key in local]) for some in (found, local))
        assert cosines(one, other).min() >= 0.999999
    assert len(workers) == 2
    assert list((tmp_path / "work").iterdir()) == []


def test_a_run_goes_on_when_the_task_manager_is_killed(
    cluster: Cluster, store: Path, expected: list[tuple[Any, ...]]
) -> None:
    with running(store, "--runner", "PortableRunner", *cluster.loopback) as process:
        cluster.do("kill-taskmanager")
        cluster.do("start-taskmanager")
        out, err = process.communicate(timeout=300)

    assert (process.returncode, f"{ROWS}/{ROWS} re-embedded" in out) == (0, True), err
    assert "Traceback" not in err
    assert select(store, VECTORS) == expected


def test_a_job_that_is_cancelled_leaves_the_store_and_is_resumed(
    cluster: Cluster, store: Path, expected: list[tuple[Any, ...]], fake_program: Program
) -> None:
    before = store.read_bytes()
    with running(store, "--runner", "PortableRunner", *cluster.loopback) as process:
        [job] = [job["id"] for job in cluster.jobs() if job["status"] == "RUNNING"]
        cluster.cancel(job)
        out, err = process.communicate(timeout=300)
    [(run, _manifest)] = find_runs(store)

    assert (process.returncode, out) == (1, ""), err
    assert "Job was cancelled" in err
    assert store.read_bytes() == before
    assert_resumed(store, run, expected, fake_program)


def test_a_run_whose_job_server_is_killed_leaves_the_store_and_is_resumed(
    cluster: Cluster, store: Path, expected: list[tuple[Any, ...]], fake_program: Program
) -> None:
    before = store.read_bytes()
    with running(store, "--runner", "PortableRunner", *cluster.loopback) as process:
        os.kill(cluster.process("jobserver"), signal.SIGKILL)
        out, err = process.communicate(timeout=300)
    [(run, _manifest)] = find_runs(store)

    assert (process.returncode, out) == (1, ""), err
    assert store.read_bytes() == before
    assert_resumed(store, run, expected, fake_program)


def assert_resumed(
    store: Path, run: RunDirectory, expected: list[tuple[Any, ...]], fake_program: Program
) -> None:
    # What a worker was writing when it was cut off has a hidden name.
    staged = {name for name in files(run.shards) if not name.startswith(".")}
    done = fake_program("--db", store, "--max-rows", "1")
    assert done.returncode == 0
    assert set(files(run.shards)) > staged > set()
    assert fake_program("--db", store).returncode == 0
    assert select(store, VECTORS) == expected
