"""What an operator does with runs afterwards: status, verify, rollback and cleanup.

Each gives a `Report`: the result as text and as JSON, and the exit code. None imports Beam.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.options import CommandOptions
from pipeline.resume import Runs, describe, list_runs
from pipeline.words import counts, one_line, places, size, table
from transforms.embedders import (
    WITNESS_COSINE,
    Target,
    cosines,
    embed_each,
    load_embedder,
    probe_embedder,
    same_vectors,
)
from transforms.errors import (
    EmbedderError,
    IncompleteError,
    ReembedError,
    StagingError,
    StoreError,
    UsageError,
    VerifyError,
)
from transforms.modes import Mode
from transforms.replacing import ReplaceJob, Rules
from transforms.rollback import RolledBack, roll_back
from transforms.staging import (
    Manifest,
    RunDirectory,
    State,
    lock_database,
    lock_holder,
    new_token,
    remove_run,
    spans,
    tree_bytes,
)
from transforms.staging.runs import LEFT, ROLLBACK
from transforms.stores import open_store, real_path
from transforms.verify import WRONG, sample_rows, verify_rows

SAMPLED_ROWS = 64
"""Rows that `verify` embeds again."""

_NAMED_ROWS = 20
"""Rows that are named on stderr; all are in the run directory."""

_logger = logging.getLogger("reembed")

_NEXT = {
    State.STAGING: "the same command goes on; --fresh starts over",
    State.REPLACING: "the same command finishes it; reembed rollback undoes it",
    State.REPLACED: "reembed verify checks it; reembed rollback undoes it",
    State.ROLLING_BACK: "reembed rollback finishes it",
    State.ROLLED_BACK: "reembed cleanup removes it",
}


_AFTER_UNDOING = {"ai-memory": "set the ai-memory daemon back to the former model and restart it"}

_BEGUN = (State.REPLACED, State.REPLACING, State.ROLLING_BACK)
"""The states of a run that has, or may have, written to the store."""


@dataclass(frozen=True)
class Report:
    """A result as text and as JSON; `trouble` is what the exit code comes from, if not 0.

    `kept` says where the result of a command that wrote to the store is, besides.
    """

    text: str
    values: Mapping[str, Any]
    trouble: ReembedError | None = None
    kept: str = ""

    @property
    def json(self) -> str:
        """The result as one line of JSON."""
        return json.dumps({"schema_version": 1, **self.values}, ensure_ascii=False)


def run_command(options: CommandOptions, database: Path, *, egress: str) -> Report:
    """Do what the command says; raise ReembedError for what keeps it from it.

    `egress` says where texts may be sent now, whatever was allowed when a run was begun.
    """
    path = real_path(database)
    runs = list_runs(path, options.run_dir)
    if not runs:
        open_store(path)  # Which says what is wrong with a file that can't have any.
    match options.command:
        case "status":
            return show_status(path, runs)
        case "verify":
            chosen = _choose(runs, options.run, *_BEGUN)
            _require_complete(runs, but=chosen[0], of=State.REPLACING)
            return verify(path, chosen, egress=egress)
        case "rollback":
            chosen = _choose(runs, options.run, *_BEGUN)
            _require_complete(runs, but=chosen[0])
            _require_newest(runs, *chosen)
            return undo(path, chosen)
        case _:
            return clean_up(path, runs, named=options.run, yes=options.yes)


def show_status(path: Path, runs: Runs) -> Report:
    """Say of each run its state, rows, skips, size on disk and next step."""
    values = [_status_values(path, run, manifest) for run, manifest in runs]
    texts = [_status_text(value) for value in values]
    text = "\n\n".join(texts) or f"no runs on {path}; nothing is staged, nothing to undo"
    holder = lock_holder(path)
    if holder:
        text = f"at work on {path}: {holder}\n\n{text}"
    unfinished = [(run, manifest) for run, manifest in runs if manifest.state.incomplete]
    trouble = IncompleteError(f"{describe(*unfinished[0])}") if unfinished else None
    found = {"database": str(path), "at_work": holder, "runs": values}
    return Report(text, found, trouble)


def _status_values(path: Path, run: RunDirectory, manifest: Manifest) -> dict[str, Any]:
    outcome = manifest.outcome
    new = _new_ranges(path, run, manifest) if manifest.state is State.REPLACING else frozenset()
    return {
        "run_id": run.run_id,
        "state": str(manifest.state),
        "started": manifest.started,
        "stopped": manifest.stopped,
        "model": manifest.target["model"],
        "dim": manifest.target["dimension"],
        "store": manifest.scope.store,
        "namespace": manifest.scope.namespace,
        "mode": manifest.scope.mode,
        "rows": manifest.rows,
        "staged": run.staged_rows() if run.shards.is_dir() else None,
        "reembedded": outcome.get("reembedded"),
        "skipped": outcome.get("skipped"),
        "remaining": outcome.get("remaining"),
        "ranges": len(manifest.ranges),
        "ranges_replaced": spans(new),
        "rows_in_ranges_replaced": sum(k.rows for k in manifest.ranges if k.index in new),
        "bytes": tree_bytes(run.path),
        "backup_bytes": tree_bytes(run.backup),
        "run_directory": str(run.path),
        "next": _NEXT[manifest.state],
    }


def _new_ranges(path: Path, run: RunDirectory, manifest: Manifest) -> frozenset[int]:
    """The ranges that hold new vectors; of the transaction begun last, the table tells."""
    job = _job(path, run, manifest)
    writing = [keys for keys in manifest.ranges if keys.index in manifest.writing]
    matches = [job.match(keys, with_stored=True) for keys in writing]
    return manifest.done | {match.index for match in matches if match.done and not match.changes}


def _status_text(values: Mapping[str, Any]) -> str:
    new = places(values["ranges_replaced"])
    lines = {
        "state": values["state"] + (f" ({values['stopped']})" if values["stopped"] else ""),
        "target": f"{values['model']} ({values['dim']}-dim)",
        "about": f"{values['mode']}, "
        + ("all namespaces" if values["namespace"] is None else f"namespace {values['namespace']}")
        + (f", table {values['store']['table']}" if "table" in values["store"] else ""),
        "rows": f"{values['rows']:,}",
        "staged": f"{values['staged'] or 0:,}",
        "re-embedded": f"{values['reembedded'] or 0:,}",
        "skipped": f"{values['skipped'] or 0:,}",
        "remaining": f"{values['remaining'] or 0:,}",
        "new vectors": f"in ranges {new} of {values['ranges']} (counted from 0): "
        f"{values['rows_in_ranges_replaced']:,} rows; the others hold the previous ones",
        "on disk": f"{size(values['bytes'])}, of which the backup {size(values['backup_bytes'])}",
        "directory": values["run_directory"],
        "next": values["next"],
    }
    unless = {
        "staged": values["staged"] is None,
        "re-embedded": values["reembedded"] is None,
        "skipped": values["skipped"] is None,
        "remaining": not values["remaining"],
        "new vectors": values["state"] != State.REPLACING or values["remaining"],
    }
    shown = {name: line for name, line in lines.items() if not unless.get(name)}
    return f"run {values['run_id']}, begun {values['started']}\n" + table(shown)


def verify(path: Path, chosen: tuple[RunDirectory, Manifest], *, egress: str) -> Report:
    """Check the table against a run, and a sample of its rows against the model."""
    run, manifest = chosen
    target = Target.from_json(manifest.target)
    if target.access is not None:
        target = replace(target, access=replace(target.access, egress=egress))
    job = _job(path, run, manifest)
    findings = verify_rows(
        job.store,
        run,
        manifest.ranges,
        dimension=target.dimension,
        normalized=target.normalized,
    )
    embedder = load_embedder(target)
    probe = probe_embedder(embedder, target.dimension)
    if not same_vectors(np.array(manifest.probe, dtype=np.float32), probe, least=target.noise):
        raise EmbedderError(
            f"{target} does not behave as it did when the run {run.run_id} began, so its rows "
            "can't be checked with it; bring the former model back"
        )
    sample = sample_rows(job.store, run, manifest.ranges, count=SAMPLED_ROWS)
    lowest = None
    if sample:
        stored = np.vstack(
            [job.store.decode(row.stored.vector or b"") for row in sample if row.stored]
        )
        texts = [row.text for row in sample]
        found = cosines(embed_each(embedder, texts, target.dimension), stored)
        lowest = float(found.min())
        for row, cosine in zip(sample, found, strict=True):
            if not cosine >= WITNESS_COSINE:
                findings.fault("other vector", row.key)
    for kind, keys in findings.keys.items():
        for key in keys[:_NAMED_ROWS]:
            _logger.warning("[%s] row %s holds %s", run.run_id, one_line(key), WRONG[kind])
    wrong = sum(findings.wrong.values())
    trouble: ReembedError | None = None
    if manifest.state.incomplete:
        trouble = IncompleteError(f"{describe(run, manifest)}; finish it or roll back")
    elif wrong:
        trouble = VerifyError(
            f"{wrong} findings in {path}; run again to re-embed the rows that are wrong"
        )
    lines = {
        "run": run.run_id,
        "rows checked": f"{findings.checked:,}",
        "changed since": f"{findings.changed:,} (a new text and vector by another program)",
        "not of the run": f"{findings.unwritten:,} (skipped, or added since)",
        "sample": f"{len(sample)} rows embedded again, lowest cosine "
        + ("-" if lowest is None else f"{lowest:.6f}"),
        "wrong": counts({WRONG[kind]: count for kind, count in findings.wrong.items()}),
    }
    values = {
        "run_id": run.run_id,
        "checked": findings.checked,
        "changed": findings.changed,
        "findings": wrong,
        "unwritten": findings.unwritten,
        "sampled": len(sample),
        "lowest_cosine": lowest,
        "wrong": dict(findings.wrong),
        "wrong_ids": findings.keys,
    }
    head = "all is as the run left it" if not wrong else f"{wrong} findings"
    return Report(f"reembed verify: {head}\n\n{table(lines)}", values, trouble)


def undo(path: Path, chosen: tuple[RunDirectory, Manifest]) -> Report:
    """Put the previous vectors back where rows still hold what a run wrote."""
    run, manifest = chosen
    job = _job(path, run, manifest)
    job.store.check_access()
    with lock_database(path):
        job.store.check_writable()
        if run.read_manifest() != manifest:
            raise StoreError(f"another process has worked on the run {run.run_id}; try again")
        attempt = new_token()
        run.set_reserve()
        run.remove_damaged()
        for name in run.lost_backup():
            _logger.warning("[%s] the backup file %s is damaged and can't help", run.run_id, name)
        run.write_manifest(replace(manifest, attempt=attempt))
        try:
            result = roll_back(job.store.everywhere(), run, manifest.ranges, attempt=attempt)
            values = _undo_values(run, result)
            run.write_lines(LEFT, ({"id": key, "reason": why} for key, why in result.left.items()))
            run.write_json(ROLLBACK, values)
            run.advance(attempt, state=State.ROLLED_BACK, writing=frozenset(), stopped=None)
        except ReembedError as error:
            state = _known_state(run)
            if state is State.REPLACED:
                raise
            if state is not State.ROLLED_BACK:
                raise IncompleteError(
                    f"{error}; the rollback of run {run.run_id} is incomplete: try it again"
                ) from error
            # All is put back and noted, only not yet flushed.
            _logger.warning("[%s] %s", run.run_id, error)
        run.remove_shards()
    for key, why in list(result.left.items())[:_NAMED_ROWS]:
        _logger.warning("[%s] row %s is left as it is: %s", run.run_id, one_line(key), why)
    lines = {
        "restored": f"{result.restored:,} rows hold their previous vectors again",
        "as before": f"{result.unchanged:,} rows",
        "left": f"{len(result.left):,} rows"
        + (f" (named in {run.path / LEFT})" if result.left else ""),
        "next": _AFTER_UNDOING.get(job.store.kind, "search with the former model again"),
    }
    text = f"reembed: run {run.run_id} is rolled back\n\n{table(lines)}"
    return Report(text, values, kept=f"it is kept in {run.path / ROLLBACK}")


def _known_state(run: RunDirectory) -> State | None:
    try:
        return run.read_manifest().state
    except StagingError:
        return None


def _undo_values(run: RunDirectory, result: RolledBack) -> dict[str, Any]:
    return {
        "run_id": run.run_id,
        "restored": result.restored,
        "unchanged": result.unchanged,
        "left": len(result.left),
        "left_by_reason": dict(Counter(result.left.values())),
        "run_directory": str(run.path),
    }


def clean_up(path: Path, runs: Runs, *, named: str | None, yes: bool) -> Report:
    """Remove runs that have ended; a backup that is the only way back only if `yes`.

    Without a name: all that have ended. By its name also one that is not finished.
    """
    _require_complete(runs)
    if named is not None and named not in [run.run_id for run, _ in runs]:
        raise UsageError(f"there is no run {named}; reembed status names those that there are")
    removed, kept = [], {}
    freed = 0
    with lock_database(path):
        for at, (run, manifest) in enumerate(runs):
            if named not in (None, run.run_id):
                continue
            if named is None and not manifest.state.ended:
                kept[run.run_id] = "it is not finished; --run names it to remove it all the same"
            elif _is_only_way_back(manifest, runs[at + 1 :]) and not yes:
                kept[run.run_id] = (
                    "it is the only way back to the previous vectors; --yes removes it"
                )
            elif run.read_manifest() != manifest:
                raise StoreError(f"another process has worked on the run {run.run_id}; try again")
            else:
                freed += tree_bytes(run.path)
                remove_run(run, path)
                removed.append(run.run_id)
    lines = dict.fromkeys(removed, "removed") | {k: f"kept: {why}" for k, why in kept.items()}
    text = f"reembed: {len(removed)} runs removed, {size(freed)} freed"
    values = {"removed": removed, "kept": kept, "freed_bytes": freed}
    return Report(text + (f"\n\n{table(lines)}" if lines else ""), values)


def _is_only_way_back(manifest: Manifest, newer: Runs) -> bool:
    """Whether no newer run has moved all of a run's rows to yet another model."""
    if manifest.state is not State.REPLACED:
        return False
    target = Target.from_json(manifest.target)
    return not any(
        later.state is State.REPLACED
        and later.scope.mode == Mode.ALL
        and later.scope.store == manifest.scope.store
        and later.scope.namespace in (None, manifest.scope.namespace)
        and target.differences(later.target)
        for _, later in newer
    )


def _require_complete(
    runs: Runs, *, but: RunDirectory | None = None, of: State | None = None
) -> None:
    """Raise IncompleteError if a run is incomplete, but for one (if it is in the state `of`)."""
    for run, manifest in runs:
        excepted = run == but and of in (None, manifest.state)
        if manifest.state.incomplete and not excepted:
            raise IncompleteError(f"{describe(run, manifest)}; finish it or roll it back first")


def _require_newest(runs: Runs, chosen: RunDirectory, manifest: Manifest) -> None:
    """Raise UsageError if a newer run has replaced vectors of the same rows.

    What the older one wrote is no longer there, so undoing it would do nothing, once for all.
    """
    for run, newer in runs:
        shared = newer.scope.shares_rows(manifest.scope)
        if newer.state is State.REPLACED and run.run_id > chosen.run_id and shared:
            raise UsageError(
                f"run {run.run_id} has replaced vectors since run {chosen.run_id} did; undo the "
                "newer one first (reembed rollback)"
            )


def _choose(runs: Runs, named: str | None, *states: State) -> tuple[RunDirectory, Manifest]:
    """The newest run in one of these states, or the one that is named."""
    fitting = [(run, m) for run, m in runs if named in (None, run.run_id) and m.state in states]
    unfinished = [(run, m) for run, m in fitting if m.state.incomplete]
    if fitting:
        return (unfinished or fitting)[-1]
    others = [m for run, m in runs if named == run.run_id]
    if others:
        raise UsageError(f"the run {named} is {others[0].state}, so there is nothing to do with it")
    what = "there is no run that has replaced anything" if named is None else f"no run is {named}"
    raise UsageError(f"{what}; reembed status shows what there is")


def _job(path: Path, run: RunDirectory, manifest: Manifest) -> ReplaceJob:
    """The replacement of a run, as far as it can be told from its manifest."""
    target = Target.from_json(manifest.target)
    scope = manifest.scope
    keys = None if scope.keys is None else frozenset(scope.keys)
    store = open_store(path, scope.namespace, scope.store)
    selected = store.select(
        Mode(scope.mode), model=target.model, dimension=target.dimension, keys=keys
    )
    return ReplaceJob(selected, run, manifest.ranges, target, Rules(), manifest.attempt)
