"""Run a plan: passes of the pipeline until no row is new or edited, then the outcome."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.runner import PipelineState
from apache_beam.runners.worker import statesampler

from reembed.pipeline.build import build, work_directory
from reembed.pipeline.outcome import Outcome, outcome_values
from reembed.pipeline.outside import find_moved, look_outside
from reembed.pipeline.plan import Plan
from reembed.pipeline.remote import serving, take_over
from reembed.pipeline.resume import describe
from reembed.pipeline.runners import check_runner, make_pipeline
from reembed.pipeline.selection import job_of
from reembed.pipeline.words import one_line
from reembed.transforms.embedders import load_embedder, probe_embedder, require_same, same_vectors
from reembed.transforms.errors import (
    IncompleteError,
    ReembedError,
    RunError,
    StagingError,
    StoreError,
    UndoneError,
    unwrap,
)
from reembed.transforms.hiding import shown
from reembed.transforms.modes import Mode
from reembed.transforms.passes import Pass, PassDirectory, Phase
from reembed.transforms.replacing import replace_vectors
from reembed.transforms.rollback import moved_keys
from reembed.transforms.rows import KeyRange, Skipped, StagedRow, Summary, Vectors
from reembed.transforms.staging import (
    Manifest,
    State,
    discard_run_if_empty,
    find_runs,
    link_run,
    lock_database,
    make_run,
    read_shards,
    read_tokens,
    remove_run,
    require_room,
)
from reembed.transforms.staging.runs import REMAINING, SKIPPED, SUMMARY
from reembed.transforms.staging.schema import MAX_ORDER
from reembed.transforms.stamp import check_witnesses, stage_stored
from reembed.transforms.stores import try_update, unchanged_copies

MOST_STALE_PASSES = 3
"""Passes in a row that leave no fewer new and edited rows than before, until it goes on without."""

ADDED_OR_EDITED = "it was added or edited too late"
NOT_WRITTEN = "it does not hold its new vector, although that was written"
"""Why a row remains."""

_NAMED_ROWS = 20
"""Remaining rows that are named on stderr; all are in the run directory."""

_UNIT_TOLERANCE = 0.01

_logger = logging.getLogger("reembed")


def run_plan(
    plan: Plan,
    *,
    runner: str,
    options: PipelineOptions,
    progress: Callable[[Plan], AbstractContextManager[None]],
    warn: Callable[[Skipped], None],
) -> Outcome:
    """Run a plan; `progress` is entered while rows are embedded, `warn` told each skipped row.

    Raises ReembedError for trouble that has a name: a store that is locked, an embedder that
    can't be built, a full disk, too many rows that failed. The store is then unchanged, unless
    it is an IncompleteError. What is staged stays, and the next run goes on from there.
    """
    started = time.monotonic()
    if not plan.ranges:
        return Outcome(Summary(), 0.0)
    check_runner(runner, options, workdir=plan.workdir)
    FileSystems.set_options(options)  # The work directory is used before there is a pipeline.
    plan.store.check_access()
    with lock_database(plan.store.path):
        plan.store.check_writable()
        _confirm(plan)
        _try_update(plan)
        probe = probe_embedder(load_embedder(plan.target), plan.target.dimension)
        _warn_of_lengths(plan, probe)
        _begin(plan, probe)
        try:
            take_over(plan)
            outcome = _run_begun(plan, runner, options, progress, warn, started)
            _finish(plan, outcome)
        except BaseException as error:
            _note_failure(plan, error)
            raise
    return outcome


def _run_begun(
    plan: Plan,
    runner: str,
    options: PipelineOptions,
    progress: Callable[[Plan], AbstractContextManager[None]],
    warn: Callable[[Skipped], None],
    started: float,
) -> Outcome:
    try:
        if not plan.begun:
            plan.store.check_sound()
            rows = plan.survey.to_embed
            require_room(plan.job.room(rows, staged=max(0, rows - plan.run.staged_rows())))
        first, complete = first_pass(plan)

        def run_pass(current: Pass) -> Summary:
            if plan.mode is Mode.STAMP_ONLY:
                staged = _stamp(plan, current)
            else:
                staged = _run_pass(plan, current, runner, options)
            return staged if current.phase is Phase.STAGE else staged + _replace(plan, current)

        with progress(plan):
            summary = _run_passes(plan, first, run_pass) if complete else run_pass(first)
    except BaseException:
        with contextlib.suppress(StagingError):
            _name_skipped(plan, warn)
        raise
    cut = _name_skipped(plan, warn)
    only_staged = first.phase is Phase.STAGE
    staged = _staged_rows(plan) if only_staged else None
    tokens = sum(read_tokens(shards) for shards in plan.run.list_shards().values())
    outcome = Outcome(summary, 0.0, staged, cut, tokens, copies=plan.copies, wrote=_wrote(plan))
    if not only_staged:
        outcome = _look_beside(plan, outcome)
    return replace(outcome, seconds=time.monotonic() - started)


def _wrote(plan: Plan) -> bool:
    """Whether the run has written to the store; if its manifest can't be read now, it may have."""
    with contextlib.suppress(StagingError):
        return plan.run.read_manifest().wrote
    return True


def _look_beside(plan: Plan, outcome: Outcome) -> Outcome:
    """Count what the run has left as it was: other rows of the table, other columns of the file."""
    summary, store, target = outcome.summary, plan.store, plan.target
    counts = {"replaced": summary.replaced, "left": summary.in_old_space}
    try:
        if plan.outside is not None:
            # Only now is it known how the model behaves that the earlier runs name, too.
            earlier = [pair for pair in find_runs(store.path) if pair[0] != plan.run]
            probe = plan.run.read_manifest().probe
            moved = find_moved(earlier, plan.scope, target, probe)
            found = look_outside(store, target, moved, **counts)
            outcome = replace(outcome, outside=found)
        if plan.copies:
            copies = unchanged_copies(store, plan.copies, dimension=target.dimension)
            outcome = replace(outcome, copies=copies)
    except (StoreError, StagingError) as error:  # All is replaced, so the run has not failed.
        _logger.warning("[%s] what it leaves was not counted: %s", plan.run.run_id, error)
    return outcome


def _staged_rows(plan: Plan) -> int:
    """How many rows are staged as they are now; an edited one waits, and counts when it is."""
    found = [plan.job.match(keys, with_stored=False).before for keys in plan.ranges]
    return sum(summary.total - summary.remaining for summary in found)


def _confirm(plan: Plan) -> None:
    """Look once more, now that no other process can begin anything."""
    if plan.earlier and plan.earlier.run.read_manifest() != plan.earlier.manifest:
        raise RunError(f"another process has worked on the run {plan.run.run_id}; run again")
    for run in plan.discarded:
        if not run.exists or (manifest := run.read_manifest()).state is not State.STAGING:
            raise RunError(f"another process has worked on the run {run.run_id}; run again")
        if job_of(plan.store.path, run, manifest).is_in_table():
            raise RunError(
                f"the manifest of the run {run.run_id} says that it is staging, but rows of "
                f"{plan.store.path} hold vectors that it wrote, so its backup is the way back; "
                "finish it with the same command without --fresh"
            )
    if plan.begun and not plan.store.stable and moved_keys(plan.store, plan.run, plan.ranges):
        raise IncompleteError(
            f"rows of {plan.store.path} have other numbers now than when the run "
            f"{plan.run.run_id} began to replace (VACUUM and INSERT OR REPLACE do that), so it "
            "can't be finished; undo it with reembed rollback"
        )
    for run, manifest in find_runs(plan.store.path):
        if manifest.state.incomplete and run != plan.run:
            raise IncompleteError(f"{describe(run, manifest)}; run again")


def _try_update(plan: Plan) -> None:
    """Write one row and roll it back, before anything is embedded for what could not be stored."""
    if plan.survey.to_embed and not plan.begun:
        model, dimension = plan.target.model, plan.target.dimension
        try_update(plan.store, plan.ranges, model=model, dimension=dimension)


def _begin(plan: Plan, probe: Vectors) -> None:
    """Make the run's directory, or take over that of an earlier attempt."""
    for run in plan.discarded:
        remove_run(run, plan.store.path)
    if plan.earlier is None:
        manifest = Manifest(
            run_id=plan.run.run_id,
            database=str(plan.store.path),
            started=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            scope=plan.scope,
            target=plan.target.to_json(),
            probe=probe.tolist(),
            ranges=plan.ranges,
            rows=plan.survey.meant,
            attempt=plan.attempt,
        )
        try:
            make_run(plan.run, plan.store.path, manifest)
        except StagingError:
            discard_run_if_empty(plan.run, plan.store.path)  # Made, but without its reserve.
            raise
        return
    manifest = plan.earlier.manifest
    known = np.array(manifest.probe, dtype=np.float32)
    if not same_vectors(known, probe, least=plan.target.noise):
        kind = IncompleteError if manifest.state.incomplete else RunError
        raise kind(
            f"{plan.target} does not behave as it did when the run {plan.run.run_id} began: it "
            "gives other vectors for the same texts, and mixing the two would be wrong; bring the "
            "former model back, or "
            + ("undo with reembed rollback" if plan.begun else "start over with --fresh")
        )
    link_run(plan.run, plan.store.path)
    plan.run.set_reserve()
    manifest = plan.run.take_over(manifest, plan.attempt)
    damaged, gone = plan.run.remove_damaged(marked=manifest.marked)
    if plan.begun:
        manifest = _adopt(plan, manifest)
    lost = [*gone, *(name for name in plan.run.lost_backup(manifest, checked=True))]
    for name in damaged:
        _logger.warning("[%s] the shard %s was damaged; it is made again", plan.run.run_id, name)
    for name in dict.fromkeys(lost) if plan.begun else gone:
        _logger.warning(
            "[%s] the backup file %s is missing or damaged: rollback can't put its rows back",
            plan.run.run_id,
            name,
        )


def _adopt(plan: Plan, manifest: Manifest) -> Manifest:
    """Note what version 0.1.0 did not, of a run that it has begun to replace."""
    manifest = plan.run.list_backup(manifest, plan.attempt)
    if not manifest.order:  # While it was half done, no other could begin.
        manifest = plan.run.advance(plan.attempt, order=_next_order(plan))
    if manifest.rules is None:
        manifest = plan.run.advance(plan.attempt, rules=plan.rules)
    return manifest


def first_pass(plan: Plan) -> tuple[Pass, bool]:
    """Choose the first pass, and say whether it stages all that is left.

    With --max-rows it stages no more. It replaces these rows only if that was asked for, or if
    the replacement has begun.
    """
    number = plan.run.last_pass() + 1
    phase = Phase.FOLLOW_UP if plan.begun else Phase.HOLD
    if plan.most_rows is None:
        return Pass(number, plan.ranges, phase, plan.retry_skipped), True
    left = plan.most_rows
    ranges: list[KeyRange] = []
    for keys in plan.ranges:
        rows = len(plan.job.match(keys, with_stored=plan.begun).unstaged)
        if rows and left > 0:
            ranges.append(replace(keys, most=left))
        left -= rows
    complete = left >= 0
    if plan.partial:
        phase = Phase.PART if plan.begun else Phase.FORCE
    elif not complete and not plan.begun:
        phase = Phase.STAGE
    return Pass(number, tuple(ranges), phase), complete


def _run_passes(plan: Plan, first: Pass, run_pass: Callable[[Pass], Summary]) -> Summary:
    """Run passes until no row is new or edited, or they no longer help.

    The first ones hold the replacement back, so that it comes all at once; the last of them
    forces it, and more follow for the rows that changed even then.
    """
    least, stale = math.inf, 0
    work = Summary()
    current = first
    while True:
        summary = run_pass(current)
        work += Summary(embedded=summary.embedded, skipped=summary.skipped)
        found = replace(summary, embedded=work.embedded, skipped=work.skipped)
        if not summary.changed:
            return found
        begun = plan.run.read_manifest().state is State.REPLACING
        # What is left before the replacement and after it are counted apart.
        comparable = begun == current.phase.begun
        stale = stale + 1 if summary.remaining >= least and comparable else 0
        least = summary.remaining if stale == 0 else least
        if begun and stale == MOST_STALE_PASSES:
            return found
        changed = tuple(keys for keys in plan.ranges if keys.index in summary.changed)
        phase = Phase.FORCE if stale == MOST_STALE_PASSES else Phase.HOLD
        current = Pass(current.number + 1, changed, Phase.FOLLOW_UP if begun else phase)


def _replace(plan: Plan, after: Pass) -> Summary:
    """Put what is staged into the store, if a server still has the model that it had before.

    Every replacement is done here: by the launcher, in its main thread, under the lock. So a
    signal ends it before the launcher notes what it leaves.
    """
    if plan.target.access is not None:
        require_same(plan.target, plan.run.read_manifest().probe)
    return replace_vectors(replace(plan.job, order=_next_order(plan)), after)


def _next_order(plan: Plan) -> int:
    """A number above those of all runs that have begun to replace; it knows no clock."""
    order = 1 + max((manifest.order for _, manifest in find_runs(plan.store.path)), default=0)
    if order > MAX_ORDER:
        raise StagingError(
            f"a run on {plan.store.path} has the number {order - 1:,}, which reembed gives to "
            "none; restore its manifest from a copy, or move the run away"
        )
    return order


def _run_pass(plan: Plan, current: Pass, runner: str, options: PipelineOptions) -> Summary:
    pipeline = make_pipeline(
        runner,
        options,
        job=f"reembed-{plan.run.run_id.lower()}-pass-{current.number}",
        one_process=plan.target.access is None,
    )
    name = f"pass-{current.number}.json"
    work = work_directory(plan)
    place: PassDirectory = work or plan.run
    build(pipeline, plan, current) | "Record" >> beam.Map(_record, place, name)
    if work is None:
        _wait(pipeline, runner)
        return Summary.from_json(place.read_json(name))
    with serving(plan, current, work) as count_left:
        _wait(pipeline, runner)
    summary = Summary.from_json(place.read_json(name))
    found = summary.embedded + sum(summary.skipped.values())
    if found < count_left():
        raise RunError(
            f"of {count_left():,} rows that were left for the workers in {work.path}, they have "
            f"found {found:,}; name a work directory with --workdir that all workers see as this "
            "machine does"
        )
    return summary


def _wait(pipeline: beam.Pipeline, runner: str) -> None:
    """Run a pipeline to its end; raise what ended a worker, or RunError."""
    try:
        state = pipeline.run().wait_until_finish()
    except Exception as error:
        if os.environ.get("REEMBED_TRACEBACK"):
            raise
        last = ([line for line in str(error).splitlines() if line.strip()] or [""])[-1]
        if last.startswith(KeyboardInterrupt.__name__):  # As the runner tells of a Ctrl-C.
            raise KeyboardInterrupt from error
        raise unwrap(error) or RunError(
            f"{runner} failed: {type(error).__name__}: {shown(last)} (REEMBED_TRACEBACK=1 shows "
            "all of it)"
        ) from error
    finally:
        # Interrupted as this thread starts, Beam does not end it, and Python would wait for it.
        sampler = statesampler.get_current_tracker()
        if sampler is not None and not sampler.finished:
            sampler.stop()
    if state != PipelineState.DONE:
        raise RunError(
            f"the job ended as {state}, as somebody or something has asked {runner} for; what is "
            "staged stays: run again to go on"
        )


def _record(summary: Summary, place: PassDirectory, name: str) -> None:
    place.write_json(name, summary.to_json())


def _stamp(plan: Plan, current: Pass) -> Summary:
    """Stage the vectors that there are, to get the stamp; nothing but a sample is embedded."""
    if not current.phase.begun:
        check_witnesses(plan.store, plan.ranges, load_embedder(plan.target))
    for keys in current.ranges:
        stage_stored(
            plan.store,
            plan.run,
            keys,
            pass_number=current.number,
            dimension=plan.target.dimension,
            begun=current.phase.begun,
        )
    return Summary()


def _finish(plan: Plan, outcome: Outcome) -> None:
    """Keep what was done; delete the shards if all their vectors are in the store."""
    if outcome.staged is not None:
        return
    values = outcome_values(plan, outcome)
    remaining: dict[str, str] = {}
    for keys in plan.ranges:
        if keys.index in outcome.summary.changed:
            match = plan.job.match(keys, with_stored=True)
            remaining |= dict.fromkeys(match.remaining, ADDED_OR_EDITED)
            remaining |= dict.fromkeys(match.unwritten, NOT_WRITTEN)
    for key, why in list(remaining.items())[:_NAMED_ROWS] if plan.most_rows is None else []:
        _logger.warning("[%s] row %s remains: %s", plan.run.run_id, one_line(key), why)
    try:
        lines = ({"id": key, "reason": why} for key, why in remaining.items())
        plan.run.write_lines(REMAINING, lines)
        if outcome.summary.remaining:
            plan.run.advance(plan.attempt, outcome=values)
            return
        plan.run.write_json(SUMMARY, values)
        wrote = plan.run.read_manifest().wrote
        plan.run.advance(
            plan.attempt, state=State.REPLACED if wrote else State.EMPTY, outcome=values
        )
    except StagingError as error:
        # All is replaced, so the run has not failed; its result is printed all the same.
        _logger.warning("[%s] no summary is kept: %s", plan.run.run_id, error)
        return
    plan.run.remove_shards()
    _remove_work(plan)


def _remove_work(plan: Plan) -> None:
    """Delete the texts and vectors that were left for workers and by them."""
    if work := work_directory(plan):
        try:
            work.remove()
        except StagingError as error:
            _logger.warning("[%s] what the workers needed stays: %s", plan.run.run_id, error)


def _note_failure(plan: Plan, error: BaseException) -> None:
    """Leave word of why the run stopped; raise IncompleteError if it has begun to replace."""
    code = error.exit_code if isinstance(error, ReembedError) else None
    manifest = None
    try:
        with contextlib.suppress(StagingError):  # A disk that is full must not hide what was done.
            manifest = plan.run.stop(plan.attempt, str(error) or "interrupted", code)
            if manifest is None:
                return
        manifest = manifest or plan.run.read_manifest()
    except StagingError as unreadable:
        if not isinstance(error, ReembedError):
            return
        raise IncompleteError(
            f"{error}; the manifest in {plan.run.path} can't be read now, so the store may hold a "
            "part of the new vectors: make it readable and run again"
        ) from unreadable
    # Before each transaction the manifest is told of those before it; the table has the last word
    # on whether the first one has written anything.
    first = manifest.state is State.REPLACING and not (plan.begun or manifest.done)
    if first and isinstance(error, UndoneError) and not plan.job.is_in_table():
        said = f"{error}, and the store is as it was; drop the trigger, and run again"
        again: dict[str, Any] = {"state": State.STAGING, "writing": frozenset(), "wrote": False}
        plan.run.advance(manifest.attempt, **again, stopped=said)
        raise StoreError(said) from error
    if manifest.state is State.REPLACING and isinstance(error, ReembedError):
        raise IncompleteError(
            f"{error}; {describe(plan.run, manifest)}: run again to finish it, or undo it with "
            "reembed rollback"
        ) from error
    discard_run_if_empty(plan.run, plan.store.path)
    if not plan.run.exists and not isinstance(error, StagingError):  # Else it can't be used.
        _remove_work(plan)


def staged_rows(plan: Plan) -> Iterator[StagedRow]:
    """What became of each row, by what the last shard says of it; without vectors."""
    for shards in plan.run.list_shards().values():
        yield from {row.key: row for row in read_shards(shards, with_vectors=False)}.values()


def _name_skipped(plan: Plan, warn: Callable[[Skipped], None]) -> int:
    """Name the skipped rows, and list them in the run directory; count those that were cut."""
    skipped: list[Skipped] = []
    cut = 0
    for row in staged_rows(plan):
        cut += row.cut
        skipped += [] if row.skipped is None else [row.skipped]
    for skip in skipped:
        warn(skip)
    plan.run.write_lines(SKIPPED, map(_skipped_line, skipped))
    return cut


def _warn_of_lengths(plan: Plan, probe: Vectors) -> None:
    """Warn of vectors that are not of length 1, for which ai-memory's index takes them."""
    lengths = np.linalg.norm(probe[probe.any(axis=1)], axis=1)
    if (
        plan.store.kind == "ai-memory"
        and lengths.size
        and np.abs(lengths - 1).max() > _UNIT_TOLERANCE
    ):
        _logger.warning(
            "the model's vectors have lengths of %.3g to %.3g, and ai-memory's search takes them "
            "to be 1; they are stored as the model gives them",
            lengths.min(),
            lengths.max(),
        )


def _skipped_line(row: Skipped) -> dict[str, str]:
    return {
        "id": row.key,
        "namespace": row.namespace,
        "cause": str(row.cause),
        "reason": row.reason,
    }
