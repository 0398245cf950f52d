"""The run that a command is about, and the result that the command gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from reembed.pipeline.results import Result
from reembed.pipeline.resume import Runs, describe
from reembed.pipeline.words import json_line
from reembed.transforms.embedders import Target
from reembed.transforms.errors import IncompleteError, ReembedError, UsageError
from reembed.transforms.modes import Mode
from reembed.transforms.replacing import ReplaceJob
from reembed.transforms.rollback import holds_newer
from reembed.transforms.staging import Manifest, Rules, RunDirectory, State
from reembed.transforms.stores import reopen_store

Chosen = tuple[RunDirectory, Manifest]
"""A run and its manifest as it was read."""


@dataclass(frozen=True)
class Report:
    """A result, as text and as JSON has it; `trouble` is what the exit code comes from, if not 0.

    `kept` says where the result of a command that wrote to the store is, besides.
    """

    text: str
    values: Mapping[str, Any]
    trouble: ReembedError | None = None
    kept: str = ""
    result: Result = field(kw_only=True)

    @property
    def json(self) -> str:
        """The result as one line of JSON."""
        return json_line(self.values)


def report_of(
    result: Result, text: str, trouble: ReembedError | None = None, *, kept: str = ""
) -> Report:
    """Report a result; its trouble carries it."""
    if trouble is not None:
        trouble.result = result
    return Report(text, result.values, trouble, kept, result=result)


def can_be_undone(manifest: Manifest) -> bool:
    """Whether a run has, or may have, written to the store, so that a rollback is about it."""
    return manifest.state.undoable or manifest.state.incomplete


def can_be_verified(manifest: Manifest) -> bool:
    """Whether the store can be checked against a run."""
    return can_be_undone(manifest) or manifest.is_confirmation


def choose_run(
    path: Path, runs: Runs, named: str | None, fits: Callable[[Manifest], bool]
) -> Chosen:
    """The newest run that fits, an unfinished one first, or the one that is named.

    Raises UsageError if there is none.
    """
    fitting = [(run, m) for run, m in runs if named in (None, run.run_id) and fits(m)]
    unfinished = [(run, m) for run, m in fitting if m.state.incomplete]
    if fitting:
        return (unfinished or fitting)[-1]
    if named is None:
        what = f"there is no run that has replaced anything on {path}"
    elif others := [m for run, m in runs if named == run.run_id]:
        if others[0].state is State.EMPTY:
            raise UsageError(
                f"the run {named} wrote nothing, so there is nothing to do with it; reembed status "
                "shows the runs"
            )
        raise UsageError(f"the run {named} is {others[0].state}, so there is nothing to do with it")
    else:
        what = f"no run is {named}"
    raise UsageError(f"{what}; reembed status shows what there is")


def require_complete(
    runs: Runs, *, but: RunDirectory | None = None, of: State | None = None
) -> None:
    """Raise IncompleteError if a run is incomplete, but for one (if it is in the state `of`)."""
    for run, manifest in runs:
        excepted = run == but and of in (None, manifest.state)
        if manifest.state.incomplete and not excepted:
            raise IncompleteError(f"{describe(run, manifest)}; finish it or roll it back first")


def newer_run(runs: Runs, manifest: Manifest) -> RunDirectory | None:
    """A run that has replaced vectors of the same rows since, so that it goes back first."""
    for run, newer in runs:
        shared = newer.scope.shares_rows(manifest.scope)
        if newer.state.undoable and newer.age > manifest.age and shared:
            return run
    return None


def require_newest(runs: Runs, chosen: RunDirectory, manifest: Manifest) -> None:
    """Raise UsageError if a newer run has replaced vectors of the same rows.

    What the older one wrote is no longer there, so undoing it would do nothing, once for all.
    """
    if newer := newer_run(runs, manifest):
        raise _not_newest(newer, chosen)


def require_unchanged(path: Path, runs: Runs, chosen: RunDirectory, manifest: Manifest) -> None:
    """Raise UsageError if rows hold what a newer run wrote that was about other rows then.

    As where a row has gone from one namespace to another between the two.
    """
    scope = replace(manifest.scope, namespace=None)
    for run, newer in runs:
        same_table = scope.shares_rows(replace(newer.scope, namespace=None))
        if not (newer.state.undoable and newer.age > manifest.age and same_table):
            continue
        store = job_of(path, chosen, manifest).store
        if holds_newer(store, chosen, manifest.ranges, run, newer.ranges):
            raise _not_newest(run, chosen)


def _not_newest(newer: RunDirectory, chosen: RunDirectory) -> UsageError:
    return UsageError(
        f"run {newer.run_id} has replaced vectors since run {chosen.run_id} did; undo the "
        "newer one first (reembed rollback)"
    )


def job_of(path: Path, run: RunDirectory, manifest: Manifest) -> ReplaceJob:
    """The replacement of a run, as far as it can be told from its manifest."""
    target = Target.from_json(manifest.target)
    scope = manifest.scope
    keys = None if scope.keys is None else frozenset(scope.keys)
    store = reopen_store(path, scope.namespace, scope.store)
    selected = store.select(
        Mode(scope.mode), model=target.model, dimension=target.dimension, keys=keys
    )
    return ReplaceJob(selected, run, manifest.ranges, target, Rules(), manifest.attempt)
