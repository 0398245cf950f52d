"""Which run goes on: an earlier one that did not come to its end, or a new one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reembed.pipeline.paths import expanded
from reembed.pipeline.words import places
from reembed.transforms.embedders import Target
from reembed.transforms.errors import (
    IncompleteError,
    ReembedError,
    RunError,
    StagingError,
    UsageError,
)
from reembed.transforms.modes import Mode
from reembed.transforms.staging import Manifest, Rules, RunDirectory, Scope, State, find_runs, spans

Runs = Sequence[tuple[RunDirectory, Manifest]]


@dataclass(frozen=True)
class Earlier:
    """An earlier run that did not come to its end."""

    run: RunDirectory
    manifest: Manifest


def find_earlier(runs: Runs, scope: Scope, target: Target, *, fresh: bool) -> Earlier | None:
    """Find the run that the same command would go on with; None if there is none.

    Raises IncompleteError if a replacement was begun and this command does not finish it, and
    RunError if the target is not the one that the run was begun with.
    """
    for run, manifest in runs:
        if not manifest.state.incomplete:
            continue
        if manifest.state is State.ROLLING_BACK:
            raise IncompleteError(f"{describe(run, manifest)}; finish it with reembed rollback")
        differences = target.differences(manifest.target)
        if differences or manifest.scope != scope or fresh:
            raise IncompleteError(
                f"{describe(run, manifest)}; finish it with its own command, or undo it with "
                "reembed rollback, before another one"
            )
        return Earlier(run, manifest)
    for run, manifest in reversed(runs):
        if manifest.state is not State.STAGING or manifest.scope != scope:
            continue
        differences = target.differences(manifest.target)
        if fresh:
            return None
        if differences:
            raise RunError(
                f"the run {run.run_id} has staged rows for another target: "
                f"{'; '.join(differences)}; mixing the two would be wrong: give the same target "
                "as before, or start over with --fresh"
            )
        return Earlier(run, manifest)
    return None


def choose_rules(
    earlier: Earlier | None,
    *,
    max_skipped: float | None,
    skipped: str | None,
    one_transaction: bool,
) -> Rules:
    """Choose the rules of the replacement: the given ones, or those that it began with.

    Raises UsageError for what can't be another way any more.
    """
    kept = earlier.manifest.rules if earlier else None
    if earlier is None or kept is None or earlier.manifest.state is State.STAGING:
        most = Rules.most_skipped if max_skipped is None else max_skipped
        return Rules(most, skipped == "clear", one_transaction)
    began = "clear" if kept.clear_skipped else "keep"
    if skipped not in (None, began):
        raise UsageError(
            f"the run {earlier.run.run_id} began to replace with --skipped {began}, and all of its "
            f"rows must be treated alike; leave out --skipped {skipped}, or undo the run with "
            "reembed rollback first"
        )
    if one_transaction and not kept.one_transaction and earlier.manifest.wrote:
        raise UsageError(
            f"the run {earlier.run.run_id} has begun to replace in several transactions, so "
            "--one-transaction comes too late; leave it out, or undo the run with reembed rollback "
            "first"
        )
    return Rules(
        kept.most_skipped if max_skipped is None else max_skipped,
        kept.clear_skipped,
        kept.one_transaction or one_transaction,
    )


def find_scope(runs: Runs, *, namespace: str | None, mode: Mode, store: Mapping[str, Any]) -> Scope:
    """Which rows the command is about.

    To retry skipped rows means those of the run that is not finished or, if all are, of the
    last one that embedded any and of those after it. Raises UsageError if there is none.
    """
    if mode is not Mode.RETRY_SKIPPED:
        return Scope(namespace, str(mode), store=store)
    keys: set[str] | None = None
    for run, manifest in reversed(runs):
        about = (manifest.scope.namespace, manifest.scope.store)
        if about != (namespace, store) or manifest.state is State.ROLLED_BACK:
            continue
        if not manifest.state.ended:
            return manifest.scope
        keys = (keys or set()) | {row["id"] for row in run.read_skipped(manifest)}
        if manifest.reembedded:
            break
    if keys is None:
        raise UsageError("there is no run whose skipped rows could be tried again; run without it")
    return Scope(namespace, str(mode), tuple(sorted(keys)), store)


def describe(run: RunDirectory, manifest: Manifest) -> str:
    """Say how far a run has come that may have written to the store."""
    target = f"{manifest.target['model']} ({manifest.target['dimension']}-dim)"
    if manifest.state is State.ROLLING_BACK:
        return f"run {run.run_id} (to {target}) is half rolled back"
    if len(manifest.done) == len(manifest.ranges):
        return (
            f"run {run.run_id} (to {target}) has replaced vectors but not come to its end: rows "
            "may be left that were added or edited meanwhile, or left for later"
        )
    return (
        f"the replacement by run {run.run_id} (to {target}) is incomplete: of ranges 0-"
        f"{len(manifest.ranges) - 1}, {places(spans(manifest.done))} hold new vectors, and "
        f"{places(spans(manifest.writing))} were being written"
    )


def fresh_runs(runs: Runs, scope: Scope) -> list[RunDirectory]:
    """The unfinished runs that --fresh does away with."""
    return [
        run for run, manifest in runs if manifest.state is State.STAGING and manifest.scope == scope
    ]


def former_target(runs: Runs, scope: Scope) -> Mapping[str, Any] | None:
    """The target of the newest run about such rows that came to its end; None if there is none."""
    ended = (m for _, m in reversed(runs) if m.holds)
    return next(
        (m.target for m in ended if m.scope.shares_vectors(replace(scope, namespace=None))), None
    )


def list_runs(database: Path, run_dir: str | None) -> Runs:
    """The runs on a database, the oldest first."""
    return find_runs(database, expanded(run_dir).absolute() if run_dir else None)


@contextmanager
def naming_incomplete(database: Path, run_dir: str | None) -> Iterator[None]:
    """Where a command fails while a replacement is incomplete, say both: that is what to know.

    It may be why, too: a write that a process left half done keeps readers off until it is
    rolled back.
    """
    try:
        yield
    except IncompleteError:
        raise
    except ReembedError as error:
        runs: Runs = ()
        with suppress(StagingError):
            runs = list_runs(database, run_dir)
        for run, manifest in runs:
            if manifest.state.incomplete:
                raise IncompleteError(
                    f"{error}; {describe(run, manifest)}", *error.details
                ) from error
        raise
