"""What a row costs where the model costs nothing: `python -m benchmarks.rows --rows 10000 1000000`.

The real schema, texts of 340 bytes, vectors of 384 floats before and after. The new vectors come
from a table, picked by the text, so that what is measured is reading, staging, saving, replacing
and looking once more. Each size has a process of its own, and a table that is in the file cache.
With `--table` the same for an ordinary table, with a key of two columns and a template.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from reembed.pipeline import plan as planning
from reembed.pipeline.options import Options
from reembed.pipeline.plan import make_plan
from reembed.pipeline.resume import list_runs
from reembed.pipeline.run import run_plan
from reembed.pipeline.runners import parse_beam_options
from reembed.pipeline.settings import read_settings
from reembed.pipeline.status import show_status
from reembed.transforms import replacing
from reembed.transforms.embedders import Embedder, Target, fake
from reembed.transforms.embedders.families import ServedModel
from reembed.transforms.replacing import ReplaceJob
from reembed.transforms.rows import Vectors
from reembed.transforms.staging import tree_bytes
from reembed.transforms.stores import Replacement
from reembed.transforms.stores.demo import Memory, create_store

DIMENSION = 384
TEXT_BYTES = 340

TRACKS = {
    "table": "tracks",
    "text": ("{title}: {notes}",),
    "vector": "embedding",
    "dim_column": "dim",
}
"""How the program is told of the ordinary table."""

_table = np.random.default_rng(1).standard_normal((4096, DIMENSION)).astype(np.float32)


class FreeEmbedder(Embedder):
    """Vectors that cost nothing."""

    def __init__(self, dimension: int) -> None:
        pass

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Return vectors of shape (len(texts), dimension)."""
        places = [len(text) + sum(map(ord, text[:20])) & 4095 for text in texts]
        found: Vectors = _table[places]
        return found


def main() -> None:
    """Measure sizes of store; print a line for each, and draw them if that is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--json", type=Path, metavar="FILE", help="save all figures")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them")
    parser.add_argument("--table", action="store_true", help="an ordinary table")
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.store:
        print(json.dumps(measure(options.store, *options.rows, table=options.table)))
        return
    figures = []
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "m.db"
            command = [sys.executable, "-m", "benchmarks.rows", "--store", str(path)]
            if options.table:
                _make_tracks(path, rows)
                command.append("--table")
            else:
                create_store(str(path), _memories(rows), journal_mode="wal")
            os.sync()
            done = subprocess.run([*command, "--rows", str(rows)], stdout=subprocess.PIPE)
        if done.returncode:
            sys.exit(done.returncode)
        figures.append(json.loads(done.stdout))
        print(show(figures[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if options.plot:
        from benchmarks.plot import draw_rows

        draw_rows(figures, options.plot)


def measure(path: Path, rows: int, *, table: bool = False) -> dict[str, float]:
    """Move a store in this process; seconds, bytes and rows."""
    logging.basicConfig(level=logging.CRITICAL)
    settings = read_settings(Options(backend="local"), {}, path.parent)
    target = Target("fake", "all-MiniLM-L6-v2", DIMENSION), ServedModel(None)
    times: dict[str, float] = {"transaction": 0.0}
    transaction = Replacement.transaction

    def timed(name: str) -> Any:
        act = getattr(replacing, name)

        def watched(*arguments: Any, **keywords: Any) -> Any:
            started = time.monotonic()
            if isinstance(arguments[0], ReplaceJob):
                times.setdefault("staged", started)
                times.setdefault("bytes", tree_bytes(arguments[0].run.path))
            done = act(*arguments, **keywords)
            times[name] = time.monotonic() - started
            return done

        return patch.object(replacing, name, watched)

    @contextmanager
    def timed_transaction(table: Replacement) -> Iterator[None]:
        started = time.monotonic()
        with transaction(table):
            yield
        times["transaction"] = max(times["transaction"], time.monotonic() - started)

    with (
        patch.object(planning, "_find_target", lambda settings, options: target),
        patch.object(fake, "FakeEmbedder", FreeEmbedder),
        patch.object(Replacement, "transaction", timed_transaction),
        timed("_save_all"),
        timed("_write_all"),
        timed("reads_back"),
    ):
        began = time.monotonic()
        options: dict[str, Any] = TRACKS if table else {}
        plan = make_plan(path, settings, Options(db=str(path), **options))
        planned = time.monotonic()
        outcome = run_plan(
            plan,
            runner="DirectRunner",
            options=parse_beam_options("DirectRunner", []),
            progress=lambda plan: nullcontext(),
            warn=lambda row: None,
        )
        ended = time.monotonic()
        show_status(plan.store.path, list_runs(path, None))
        shown = time.monotonic()
    assert outcome.summary.replaced == rows
    return {
        "rows": rows,
        "plan": planned - began,
        "staging": times["staged"] - planned,
        "saving": times["_save_all"],
        "replacement": times["_write_all"],
        "read back": times["reads_back"],
        "run": ended - planned,
        "status": shown - ended,
        "transaction": times["transaction"],
        "peak_mb": _peak_mb(),
        "staged_share": times["bytes"] / (4 * DIMENSION * rows),
    }


def show(figures: Mapping[str, float]) -> str:
    """One line for one size."""
    rows = figures["rows"]
    rates = ", ".join(
        f"{name} {figures[name]:.1f} s ({rows / figures[name]:,.0f} rows/s)"
        for name in ("staging", "saving", "replacement", "read back", "run")
    )
    return (
        f"{rows:,} rows: plan {figures['plan']:.2f} s, {rates}, status {figures['status']:.2f} s; "
        f"read back in {figures['read back'] / figures['replacement']:.2f} of the replacement, "
        f"longest transaction {figures['transaction']:.2f} s, resident at most "
        f"{figures['peak_mb']:,.0f} MB, staged {figures['staged_share']:.3f} of the vectors' size"
    )


def _peak_mb() -> float:
    """The most memory that this process had resident; getrusage counts its parent's, too."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (peak,) = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(peak) * 1024 / 1e6


def _make_tracks(path: Path, rows: int) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(
            "CREATE TABLE tracks (album INTEGER, number INTEGER, title TEXT, notes TEXT, "
            "embedding BLOB, dim INTEGER, PRIMARY KEY (album, number))"
        )
        db.executemany(
            "INSERT INTO tracks VALUES (?, ?, ?, ?, ?, ?)",
            (
                (at // 12, at % 12, row.title, row.content, bytes(4 * DIMENSION), DIMENSION)
                for at, row in enumerate(_memories(rows))
            ),
        )


def _memories(rows: int) -> Iterator[Memory]:
    words = "what was to be kept of the thing that happened then and there, as it was said "
    for number in range(rows):
        title = f"memory {number}"
        content = (f"{number * 2654435761 % 2**32:08x} " + words * 5)[: TEXT_BYTES - len(title)]
        yield Memory(
            id=f"{number * 2654435761 % 2**32:08x}",
            namespace="global",
            title=title,
            content=content,
            embedding=b"\x01" + bytes(4 * DIMENSION),
            embedding_dim=DIMENSION,
        )


if __name__ == "__main__":
    main()
