"""What a row costs where the model costs nothing: `python -m benchmarks.rows --rows 100000`.

The real schema, texts of 340 bytes, 384 floats. The vectors come from a table, picked by the
text, so that what is measured is reading, staging, saving, replacing and looking once more.
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from pipeline import plan as planning
from pipeline.options import Options
from pipeline.plan import make_plan
from pipeline.resume import list_runs
from pipeline.run import run_plan
from pipeline.runners import parse_beam_options
from pipeline.settings import read_settings
from pipeline.upkeep import show_status
from transforms import replacing
from transforms.embedders import Embedder, Target, fake
from transforms.embedders.families import ServedModel
from transforms.rows import Vectors
from transforms.stores.demo import Memory, create_store

DIMENSION = 384
TEXT_BYTES = 340

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
    """Measure one size of store and print a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    options = parser.parse_args()
    logging.basicConfig(level=logging.CRITICAL)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "m.db"
        create_store(str(path), _memories(options.rows), journal_mode="wal")
        os.sync()
        print(_measure(path, options.rows))


def _measure(path: Path, rows: int) -> str:
    settings = read_settings(Options(backend="local"), {}, path.parent)
    target = Target("fake", "all-MiniLM-L6-v2", DIMENSION), ServedModel(None)
    times: dict[str, float] = {}

    def timed(name: str) -> Any:
        act = getattr(replacing, name)

        def watched(*arguments: Any, **keywords: Any) -> Any:
            started = time.monotonic()
            times.setdefault("staged", started)
            done = act(*arguments, **keywords)
            times[name] = time.monotonic() - started
            return done

        return patch.object(replacing, name, watched)

    with (
        patch.object(planning, "_find_target", lambda settings, options: target),
        patch.object(fake, "FakeEmbedder", FreeEmbedder),
        timed("_save_all"),
        timed("_write_all"),
    ):
        began = time.monotonic()
        plan = make_plan(path, settings, Options(db=str(path)))
        planned = time.monotonic()
        outcome = run_plan(
            plan,
            runner="DirectRunner",
            options=parse_beam_options("DirectRunner", []),
            progress=lambda plan: nullcontext(),
            warn=lambda row: None,
        )
        ended = time.monotonic()
        show_status(plan.store, list_runs(path, None))
        shown = time.monotonic()
    assert outcome.summary.replaced == rows
    staging = times["staged"] - planned
    saving, replacement = times["_save_all"], times["_write_all"]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return (
        f"{rows:,} rows: plan {planned - began:.2f} s, staging {staging:.1f} s "
        f"({rows / staging:,.0f} rows/s), saving {saving:.1f} s ({rows / saving:,.0f} rows/s), "
        f"replacement {replacement:.1f} s ({rows / replacement:,.0f} rows/s), "
        f"run {ended - planned:.1f} s ({rows / (ended - planned):,.0f} rows/s), "
        f"status {shown - ended:.2f} s, resident at most {memory:,.0f} MB"
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
