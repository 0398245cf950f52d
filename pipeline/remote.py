"""Passes whose workers can't reach the database: what they need is left for them, and fetched."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from reembed.pipeline.build import stored_rows, work_directory
from reembed.pipeline.plan import Plan
from reembed.transforms.errors import StagingError
from reembed.transforms.passes import Pass
from reembed.transforms.rows import RangeRows
from reembed.transforms.workdir import WorkDirectory

_FETCH_SECONDS = 2.0


def take_over(plan: Plan) -> None:
    """Fetch what the workers of an earlier try have staged.

    What a run that is discarded has left is deleted.

    Raises StagingError if the work directory can't be used.
    """
    work = work_directory(plan)
    if work is None:
        return
    work.make(like=plan.store.path)
    for run in plan.discarded:
        replace(work, path=plan.work_of(run) or "").remove()
    work.fetch_shards(plan.run)


@contextmanager
def serving(plan: Plan, current: Pass, work: WorkDirectory) -> Iterator[Callable[[], int]]:
    """Leave the rows of a pass in the work directory, and fetch its shards while it goes on.

    Gives what says how many rows were left there.
    The rows are read range by range, so no other process waits for the whole of it; an edit
    meanwhile is found, as always, when the vectors are put into the store.
    """
    source = stored_rows(plan, current)
    rows = 0

    def parts() -> Iterator[RangeRows]:
        nonlocal rows
        for keys in current.ranges:
            for part in source.read_parts(keys):
                rows += len(part.rows)
                yield part

    work.write_inputs(parts(), pass_number=current.number)
    done = threading.Event()
    thread = threading.Thread(target=_fetch, args=(plan, work, done), daemon=True)
    thread.start()
    try:
        yield lambda: rows
    except BaseException:
        done.set()
        thread.join()
        with suppress(StagingError):  # What ended the pass is what has to be told.
            work.fetch_shards(plan.run)
        raise
    done.set()
    thread.join()
    work.fetch_shards(plan.run)


def _fetch(plan: Plan, work: WorkDirectory, done: threading.Event) -> None:
    took = 0.0
    while not done.wait(max(took, _FETCH_SECONDS)):
        began = time.monotonic()
        with suppress(StagingError):
            work.fetch_shards(plan.run)
        took = time.monotonic() - began  # To list 100,000 files takes a while.
