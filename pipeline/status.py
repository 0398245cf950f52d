"""The state of the runs on a database, and the next step of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from reembed.pipeline.results import RunStatus, Status
from reembed.pipeline.resume import Runs, describe
from reembed.pipeline.selection import (
    Report,
    can_be_undone,
    can_be_verified,
    job_of,
    newer_run,
    report_of,
)
from reembed.pipeline.words import places, size, table
from reembed.transforms.errors import IncompleteError, StagingError, TooManySkippedError
from reembed.transforms.modes import Mode
from reembed.transforms.staging import Manifest, RunDirectory, State, lock_holder, spans, tree_bytes
from reembed.transforms.staging.runs import LEFT, SKIPPED
from reembed.transforms.stores.llm import LlmStore
from reembed.transforms.stores.vec import VecStore

_WHOLE = frozenset(store.kind for store in (LlmStore, VecStore) if store.whole)
"""The kinds of stores of which all rows are replaced or none."""


def show_status(path: Path, runs: Runs) -> Report:
    """Say of each run its state, rows, skips, size on disk and next step."""
    found = tuple(_runs_of(path, runs))
    texts = [_text(run) for run in found]
    text = "\n\n".join(texts) or f"no runs on {path}; nothing is staged, nothing to undo"
    holder = lock_holder(path)
    if holder:
        text = f"at work on {path}: {holder}\n\n{text}"
    unfinished = [(run, manifest) for run, manifest in runs if manifest.state.incomplete]
    trouble = IncompleteError(f"{describe(*unfinished[0])}") if unfinished else None
    return report_of(Status(str(path), holder, found), text, trouble)


def next_step(runs: Runs, run: RunDirectory, manifest: Manifest) -> str:
    """The next step of a run in each state."""
    for other, state in ((other, m.state) for other, m in runs):
        if state.incomplete and other != run:
            what = "rolled back" if state is State.ROLLING_BACK else "finished or rolled back"
            return f"run {other.run_id} must be {what} first"
    match manifest.state:
        case State.STAGING:
            if manifest.stopped_code == TooManySkippedError.exit_code:
                return _retry(run, manifest)
            return "rerun the same command to resume; --fresh starts over"
        case State.REPLACING:
            finish = "rerun the same command to finish it"
            if manifest.stopped_code == TooManySkippedError.exit_code:
                finish = _retry(run, manifest)
            return f"{finish}; reembed rollback undoes it"
        case State.ROLLING_BACK:
            return "reembed rollback finishes it"
        case State.REPLACED | State.PARTLY_BACK:
            rollback = f"reembed rollback{_named(runs, run, can_be_undone)}"
            verify = f"reembed verify{_named(runs, run, can_be_verified)} checks it"
            newer = newer_run(runs, manifest)
            if run.lost_backup(manifest, checked=True):
                last = f"once run {newer.run_id} is rolled back, {rollback}" if newer else rollback
                return f"put the lost files of the backup back in {run.backup}; then {last}"
            if newer:
                return f"{verify}; run {newer.run_id} must be rolled back before it can be"
            if manifest.state is State.REPLACED:
                return f"{verify}; {rollback} undoes it"
            return f"{rollback} undoes the rest, once the rows named in {run.path / LEFT} allow it"
        case State.EMPTY if manifest.is_confirmation:
            named = _named(runs, run, can_be_verified)
            return f"reembed verify{named} checks it; reembed cleanup removes it"
        case _:
            return "reembed cleanup removes it"


def _retry(run: RunDirectory, manifest: Manifest) -> str:
    """The next step after too many failed rows: the same command would fail again."""
    mode = manifest.scope.mode
    chosen = ["--max-rows"]
    if mode not in (Mode.ALL, Mode.RETRY_SKIPPED):
        chosen.append(f"--{mode.replace(' ', '-')}")
    more = "or allow more of them with --max-skipped (never all)"
    if manifest.scope.store["kind"] in _WHOLE:
        more = "or once they are edited or deleted"
    return (
        f"rerun the command with --retry-skipped, without {' and '.join(chosen)}, once the model "
        f"takes the rows in {run.path / SKIPPED}, {more}"
    )


def _named(runs: Runs, run: RunDirectory, fits: Callable[[Manifest], bool]) -> str:
    """The flag that chooses a run, if the command would not choose it by itself."""
    fitting = [other for other, manifest in runs if fits(manifest)]
    return "" if fitting and fitting[-1] == run else f" --run {run.run_id}"


def _runs_of(path: Path, runs: Runs) -> Iterator[RunStatus]:
    for run, manifest in runs:
        try:
            yield _run_status(path, runs, run, manifest)
        except StagingError:
            if run.exists:  # Else another command has just deleted it.
                raise


def _run_status(path: Path, runs: Runs, run: RunDirectory, manifest: Manifest) -> RunStatus:
    outcome = manifest.outcome
    new = _new_ranges(path, run, manifest) if manifest.state is State.REPLACING else frozenset()
    partial = bool(outcome.get("remaining"))  # Ranges then hold rows of both kinds.
    staged = run.staged_rows()  # Before it is looked whether the run has just deleted them.
    return RunStatus(
        run_id=run.run_id,
        state=str(manifest.state),
        started=manifest.started,
        stopped=manifest.stopped,
        stopped_code=manifest.stopped_code,
        model=manifest.target["model"],
        dim=manifest.target["dimension"],
        store=manifest.scope.store,
        namespace=manifest.scope.namespace,
        mode=manifest.scope.mode,
        rows=manifest.rows,
        staged=staged if run.shards.is_dir() or manifest.state is State.STAGING else None,
        reembedded=outcome.get("reembedded"),
        skipped=outcome.get("skipped"),
        remaining=outcome.get("remaining"),
        ranges=len(manifest.ranges),
        ranges_replaced=None if partial else spans(new),
        rows_in_ranges_replaced=None
        if partial
        else sum(k.rows for k in manifest.ranges if k.index in new),
        bytes=tree_bytes(run.path),
        backup_bytes=tree_bytes(run.backup),
        backup_lost=sorted(run.lost_backup(manifest, checked=True)),
        backup_listed=manifest.saved is not None and not manifest.listed_late,
        run_directory=str(run.path),
        next=next_step(runs, run, manifest),
    )


def _new_ranges(path: Path, run: RunDirectory, manifest: Manifest) -> frozenset[int]:
    """The ranges that hold new vectors; of the transaction begun last, the table tells."""
    job = job_of(path, run, manifest)
    writing = [keys for keys in manifest.ranges if keys.index in manifest.writing]
    matches = [job.match(keys, with_stored=True) for keys in writing]
    return manifest.done | {match.index for match in matches if match.done and not match.changes}


def _text(run: RunStatus) -> str:
    new = places(run.ranges_replaced or ())
    lines = {
        "state": run.state + (f" ({run.stopped})" if run.stopped else ""),
        "target": f"{run.model} ({run.dim}-dim)",
        "about": f"{run.mode}, "
        + ("all namespaces" if run.namespace is None else f"namespace {run.namespace}")
        + (f", table {run.store['table']}" if "table" in run.store else ""),
        "rows": f"{run.rows:,}",
        "staged": f"{run.staged or 0:,}",
        "re-embedded": f"{run.reembedded or 0:,}",
        "skipped": f"{run.skipped or 0:,}",
        "remaining": f"{run.remaining or 0:,}",
        "new vectors": f"in ranges {new} of {run.ranges} (counted from 0): "
        f"{run.rows_in_ranges_replaced or 0:,} rows; the others hold the previous ones",
        "on disk": f"{size(run.bytes)}, of which the backup {size(run.backup_bytes)}",
        "backup": "by version 0.1.0, which kept no list of its files: that all are there can't be "
        "checked",
        "lost": ", ".join(run.backup_lost),
        "directory": run.run_directory,
        "next": run.next,
    }
    unless = {
        "staged": run.staged is None,
        "re-embedded": run.reembedded is None,
        "skipped": run.skipped is None,
        "remaining": not run.remaining,
        "backup": run.backup_listed or not run.backup_bytes,
        "lost": not run.backup_lost,
        "new vectors": run.state != State.REPLACING or run.remaining,
    }
    shown = {name: line for name, line in lines.items() if not unless.get(name)}
    return f"run {run.run_id}, begun {run.started}\n" + table(shown)
