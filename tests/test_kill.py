"""A run that is killed leaves the store whole, and the next one completes."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import clean_environment, files, select
from transforms.stores.demo import create_store, generated_memories

ROWS = 3_000
KILLS = 8

RUN = """
import contextlib, sys
from pathlib import Path
from pipeline.run import parse_beam_options, run_plan
from tests.conftest import fake_plan

plan = fake_plan(Path(sys.argv[1]), rows=200)
run_plan(
    plan,
    runner="DirectRunner",
    options=parse_beam_options("DirectRunner", []),
    progress=lambda plan: contextlib.nullcontext(),
    warn=print,
)
"""


def start(path: Path, home: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", RUN, str(path)], env=clean_environment(home))


def sizes(path: Path) -> dict[object, int]:
    """How many rows have a vector of which size; it needs the database to be sound."""
    assert select(path, "PRAGMA integrity_check") == [("ok",)]
    return dict(select(path, "SELECT length(embedding), count(*) FROM memories GROUP BY 1"))


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_a_killed_run_leaves_all_old_or_all_new_and_the_next_completes(
    mode: str, tmp_path: Path
) -> None:
    old, new = {1 + 4 * 16: ROWS}, {1 + 4 * 8: ROWS}
    path, before = tmp_path / "m.db", tmp_path / "before"
    create_store(str(before), generated_memories(ROWS, dimension=16), journal_mode=mode)
    moments = random.Random(57)

    def shards() -> set[Path]:
        return set(tmp_path.rglob("0*.parquet"))

    seen = []
    for _ in range(KILLS):
        shutil.copy(before, path)
        earlier = shards()
        process = start(path, tmp_path)
        # Killed at a moment after the last shard: while it looks, replaces or tidies up.
        while process.poll() is None and len(shards() - earlier) < ROWS // 200:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.5))
        process.kill()
        process.wait()
        found = sizes(path)
        assert found in (old, new)
        seen.append(found == new)

    shutil.copy(before, path)
    assert start(path, tmp_path).wait() == 0
    assert sizes(path) == new
    left = {name.split("/")[-1] for name in files(tmp_path)}
    assert left == {"before", "m.db", "lock", "summary.json"}
    print(f"killed {KILLS} times in {mode} mode: the table was new {sum(seen)} times")
