"""Whole processes, from start to end: a run of reembed, and peers that do the same.

Each works on a fresh copy of the same database, which is in the file cache, in turns.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.corpus import make_store
from benchmarks.peers import find_directory
from reembed.transforms.embedders import cosines
from reembed.transforms.embedders.models import MINILM
from reembed.transforms.rows import Vectors
from reembed.transforms.stores import decode

ROOT = Path(__file__).parents[1]
CONTENDERS = ("reembed", "plain", "beam")


@dataclass(frozen=True)
class Ended:
    """A process that did well: what it printed last, seconds, and the most memory (MB)."""

    printed: dict[str, Any]
    seconds: float
    peak_mb: float


def measure(rows: int, rounds: int) -> dict[str, Any]:
    """Measure one size of store, each round from another contender on.

    `min_cosine` is the least of a contender's vectors with those of plain.
    """
    names = list(CONTENDERS)
    found: dict[str, dict[str, Any]] = {
        name: {"rows": 0, "seconds": [], "peak_mb": [], "min_cosine": 1.0} for name in names
    }
    with tempfile.TemporaryDirectory() as directory:
        store = Path(directory) / "corpus.db"
        make_store(store, rows)
        for at in range(rounds):
            vectors: dict[str, Vectors] = {}
            for name in turned(names, at):
                db = Path(directory) / f"{name}-{at}.db"
                _copy(store, db)
                ended = run(_command(name, db))
                one = found[name]
                one["rows"] = ended.printed["reembedded" if name == "reembed" else "rows"]
                one["seconds"].append(ended.seconds)
                one["peak_mb"].append(ended.peak_mb)
                if name != "reembed":
                    one.setdefault("steps", []).append(ended.printed["seconds"])
                vectors[name] = _vectors(db)
            for name in names:
                least = float(cosines(vectors[name], vectors["plain"]).min())
                found[name]["min_cosine"] = min(found[name]["min_cosine"], least)
    return {"texts": rows, "contenders": found}


def run(command: Sequence[str]) -> Ended:
    """Run a module of this project to its end; stop with what it said if it fails."""
    with tempfile.TemporaryFile() as errors:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env=os.environ | {"AI_MEMORY_NO_CONFIG": "1"},
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        assert process.stdout is not None
        with process.stdout:
            printed = process.stdout.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            said = errors.read().decode()
            raise SystemExit(f"{command[0]} ended with {process.returncode}:\n{said[-2_000:]}")
    return Ended(json.loads(printed.splitlines()[-1]), seconds, usage.ru_maxrss / 1024)


def turned(names: list[str], by: int) -> list[str]:
    """The names from another one on in each round.

    >>> turned(["a", "b", "c"], 4)
    ['b', 'c', 'a']
    """
    by %= len(names)
    return names[by:] + names[:by]


def _command(name: str, db: Path) -> list[str]:
    if name == "reembed":
        return ["reembed", "--db", str(db), "--json", "--backend", "local", "--model", MINILM]
    return ["benchmarks.peers", name, str(db), "--model", find_directory()]


def _copy(store: Path, db: Path) -> None:
    """Copy a database and have it on the disk, so that nobody waits for that later."""
    shutil.copyfile(store, db)
    with db.open("rb") as file:
        os.fsync(file.fileno())


def _vectors(db: Path) -> Vectors:
    with closing(sqlite3.connect(db)) as connection:
        blobs = connection.execute("SELECT embedding FROM memories ORDER BY id").fetchall()
    return np.stack([decode(blob) for (blob,) in blobs])
