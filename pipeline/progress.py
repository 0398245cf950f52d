"""What a person sees while a run goes on: counted from the shards that appear."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from reembed.pipeline.output import tell
from reembed.pipeline.plan import Plan
from reembed.transforms.errors import StagingError

_POLL_SECONDS = 0.25
_LINE_SECONDS = 5.0


@contextmanager
def showing_progress(plan: Plan) -> Iterator[None]:
    """Show how far a run is, on stderr: a bar on a terminal, else a line every 5 s.

    The pipeline keeps the main thread; a daemon thread counts what is staged, which works the
    same on every runner.
    """
    stop = threading.Event()
    show = _show_bar if sys.stderr is not None and sys.stderr.isatty() else _show_lines
    thread = threading.Thread(target=show, args=(plan, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def staged_rows(plan: Plan) -> int:
    """How many of the plan's rows are staged."""
    try:
        return min(plan.run.staged_rows(), plan.survey.meant)
    except StagingError:
        return 0  # The run that has the directory will say what is wrong with it.


def _show_bar(plan: Plan, stop: threading.Event) -> None:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows  {task.fields[rate]:.0f} rows/s"),
        TimeRemainingColumn(),
    )
    total = plan.survey.meant
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as progress:
        task = progress.add_task("embedding", total=total, rate=0.0)
        for done, rate in _watch(plan, stop, _POLL_SECONDS):
            doing = "replacing" if done >= total else "embedding"
            progress.update(task, completed=done, rate=rate, description=doing)


def _show_lines(plan: Plan, stop: threading.Event) -> None:
    total = plan.survey.meant
    for done, rate in _watch(plan, stop, _LINE_SECONDS):
        left = f", about {(total - done) / rate:.0f} s left" if rate and done < total else ""
        if not stop.is_set():
            tell(f"reembed: {done:,} of {total:,} rows embedded, {rate:.0f} rows/s{left}")


def _watch(plan: Plan, stop: threading.Event, seconds: float) -> Iterator[tuple[int, float]]:
    """Give (rows done, rows a second) at every poll."""
    started, before = time.monotonic(), staged_rows(plan)
    while not stop.wait(seconds):
        done = staged_rows(plan)
        yield done, (done - before) / (time.monotonic() - started)
