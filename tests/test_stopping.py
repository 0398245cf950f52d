"""Stopped as the replacement begins, on each runner: the state is true and the way back is there.

The launcher takes its time over what it notes of a signal, so that whatever else is at work,
threads or processes, gets on meanwhile. What is then written down must still be what the table
holds: a run that says `staging` while new vectors are in the table would make its backup anew, of
those.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from reembed.pipeline import cli, run
from reembed.transforms import replacing
from reembed.transforms.staging import Manifest, RunDirectory
from tests import fake_program, kills
from tests.conftest import Call, clean_environment, make_store, memory, select

pytestmark = pytest.mark.system

ROWS, RANGE_ROWS = 80, 16

PAUSE_SECONDS = 0.5
"""After the first file of the backup, for the signal to arrive."""

NOTE_SECONDS = 0.8
"""How long the launcher takes to write what it notes: what was paused goes on meanwhile."""

IN_WORKERS = f"""
import sys, threading, time

def patch():
    while not hasattr(sys.modules.get("reembed.transforms.replacing"), "replace_vectors"):
        time.sleep(0.01)
    replacing = sys.modules["reembed.transforms.replacing"]
    write, pauses = replacing.write_backup, [{PAUSE_SECONDS}]
    def write_slowly(*arguments, **more):
        path = write(*arguments, **more)
        time.sleep(pauses.pop() if pauses else 0)
        return path
    replacing.write_backup = write_slowly

if "apache_beam.runners.worker.sdk_worker_main" in sys.orig_argv:
    threading.Thread(target=patch, daemon=True).start()
"""
"""What workers that are processes of their own do as they start, to pause as the others do."""

RUNNERS: Mapping[str, Sequence[str]] = {
    **{name: flags for name, flags in kills.RUNNERS.items() if name != kills.LOOP},
    "PortableRunner": (
        *("--runner", "PortableRunner", "--"),
        *("--job_endpoint=embed", "--environment_type=LOOPBACK"),
    ),
}


@pytest.fixture(scope="module", autouse=True)
def fork_server() -> None:
    kills.start_fork_server(__name__)


def run_program(folder: Path, arguments: Sequence[str]) -> None:
    """The program with the fake embedder; what it notes of its end is written late."""
    environment = clean_environment(folder) | {"FAKE_RANGE_ROWS": str(RANGE_ROWS)}
    os.environ.clear()
    os.environ.update(environment)
    (folder / "sitecustomize.py").write_text(IN_WORKERS)
    os.environ["PYTHONPATH"] += f"{os.pathsep}{folder}"
    fake_program.install()
    save = vars(replacing)["write_backup"]
    note, write = run._note_failure, RunDirectory.write_manifest
    noting, pauses = [False], [PAUSE_SECONDS]

    def saving_slowly(*arguments: Any, **more: Any) -> Any:
        saved = save(*arguments, **more)
        time.sleep(pauses.pop() if pauses else 0)
        return saved

    def noting_late(*arguments: Any) -> None:
        noting[0] = True
        note(*arguments)

    def writing_late(directory: RunDirectory, manifest: Manifest) -> None:
        if noting[0] and manifest.stopped is not None:
            time.sleep(NOTE_SECONDS)
        write(directory, manifest)

    vars(replacing)["write_backup"] = saving_slowly
    vars(run)["_note_failure"] = noting_late
    RunDirectory.write_manifest = writing_late  # type: ignore[method-assign,assignment]
    said = os.open(folder / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.exit(cli.main(arguments))


@pytest.mark.parametrize("runner", RUNNERS)
def test_a_signal_as_the_replacement_begins_leaves_a_true_state_and_the_way_back(
    runner: str, reembed: Call, tmp_path: Path
) -> None:
    old = {f"{at:03d}": b"\1" + bytes([at]) * 16 for at in range(ROWS)}
    memories = [memory(key, embedding=held, embedding_dim=4) for key, held in old.items()]
    path = make_store(tmp_path / "m.db", memories, "wal")
    arguments = [*_with_database(RUNNERS[runner], path)]
    process = kills.FORKS.Process(target=run_program, args=(tmp_path, arguments))

    process.start()
    _wait_for_backup(path, process)
    assert process.pid is not None
    workers = kills.descendants(process.pid)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    said = (tmp_path / "said").read_text()
    kills.end(workers, seconds=kills.ORPHAN_SECONDS)

    assert process.exitcode == 143, said
    assert "Traceback" not in said
    [manifest] = [json.loads(one.read_text()) for one in _manifests(path)]
    new = [key for key, held in vectors(path).items() if held != old[key]]
    print(f"{runner}: {manifest['state']}, {len(new)} of {ROWS} rows are new")
    assert (manifest["state"], bool(new)) in [
        ("staging", False),
        ("replacing", False),
        ("replacing", True),
        ("replaced", True),
    ]
    done = reembed("--db", path, range_rows=RANGE_ROWS)
    assert done.code == 0, done.err
    assert not [key for key, held in vectors(path).items() if held == old[key]]
    undone = reembed("rollback", "--db", path)
    assert undone.code == 0, undone.err
    assert vectors(path) == old


def _with_database(runner: Sequence[str], path: Path) -> Sequence[str]:
    at = runner.index("--") if "--" in runner else len(runner)
    return [*runner[:at], "--db", str(path), *runner[at:]]


def _wait_for_backup(path: Path, process: Any) -> None:
    ends = time.monotonic() + 60
    while not [*path.parent.glob("m.db.reembed/2*/backup/0*.parquet")]:
        assert process.is_alive(), (path.parent / "said").read_text()
        assert time.monotonic() < ends
        time.sleep(0.002)


def _manifests(path: Path) -> list[Path]:
    return [*path.parent.glob("m.db.reembed/2*/manifest.json")]


def vectors(path: Path) -> dict[str, bytes]:
    return dict(select(path, "SELECT id, embedding FROM memories"))
