"""What an operator does with runs afterwards: status, verify, rollback and cleanup.

Each gives a `Report`: the result, as text and as JSON, and the trouble. None imports Beam.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from reembed.pipeline import results
from reembed.pipeline.options import CommandOptions
from reembed.pipeline.results import CleanedUp
from reembed.pipeline.resume import Runs, list_runs
from reembed.pipeline.selection import (
    Chosen,
    Report,
    can_be_undone,
    can_be_verified,
    choose_run,
    job_of,
    report_of,
    require_complete,
    require_newest,
    require_unchanged,
)
from reembed.pipeline.status import show_status
from reembed.pipeline.verifying import ServerSettings, verify
from reembed.pipeline.words import counts, one_line, size, table
from reembed.transforms.embedders import Target
from reembed.transforms.errors import (
    IncompleteError,
    ReembedError,
    StagingError,
    StoreError,
    UsageError,
)
from reembed.transforms.modes import Mode
from reembed.transforms.rollback import (
    HELD_BACK,
    LOST,
    NOT_KEPT,
    RolledBack,
    describe_lost,
    roll_back,
    would_restore,
)
from reembed.transforms.staging import (
    Manifest,
    RunDirectory,
    State,
    lock_database,
    new_token,
    read_ledger,
    remove_run,
    tree_bytes,
)
from reembed.transforms.staging.runs import LEFT, ROLLBACK, SKIPPED
from reembed.transforms.stores import Store, check_database, real_path

_NAMED_ROWS = 20
"""Rows that are named on stderr; all are in the run directory."""

_logger = logging.getLogger("reembed")

_AFTER_UNDOING = {"ai-memory": "set the ai-memory daemon back to the former model and restart it"}

_IF_IN_THE_WAY = {
    "llm": "delete these items and roll back again, or re-embed the collection with its former "
    "model (--namespace)",
    "sqlite-vec": "delete these rows and roll back again, or re-embed the table with its former "
    "model",
}


def run_command(options: CommandOptions, database: Path, *, settings_of: ServerSettings) -> Report:
    """Do what the command says; raise ReembedError for what keeps it from it.

    `settings_of` says how a server is reached now, whatever was the case when a run was begun.
    """
    path = real_path(database)
    runs = list_runs(path, options.run_dir)
    if not runs:
        check_database(path)  # What the file holds is the runs' to know, if there are any.
    match options.command:
        case "status":
            return show_status(path, runs)
        case "verify":
            chosen = choose_run(path, runs, options.run, can_be_verified)
            require_complete(runs, but=chosen[0], of=State.REPLACING)
            return verify(path, chosen, options, settings_of=settings_of)
        case "rollback":
            chosen = choose_run(path, runs, options.run, can_be_undone)
            require_complete(runs, but=chosen[0])
            require_newest(runs, *chosen)
            require_unchanged(path, runs, *chosen)
            return undo(path, chosen, runs)
        case _:
            return clean_up(path, runs, named=options.run, yes=options.yes)


class _Ending(NamedTuple):
    """The state that a rollback leaves a run in, what it is called, and what is not as wished."""

    state: State
    head: str
    trouble: ReembedError | None = None


def undo(path: Path, chosen: Chosen, runs: Runs = ()) -> Report:
    """Put the previous vectors back where rows still hold what a run wrote."""
    run, manifest = chosen
    store = job_of(path, run, manifest).store
    store.check_access()
    with lock_database(path):
        store.check_writable()
        if run.read_manifest() != manifest:
            raise StoreError(f"another process has worked on the run {run.run_id}; try again")
        attempt = new_token()
        run.set_reserve()
        run.remove_damaged(marked=manifest.marked)
        before = run.list_backup(run.take_over(manifest, attempt), attempt)
        if before.state.incomplete and not before.order:  # Begun by version 0.1.0.
            order = 1 + max((other.order for _, other in runs), default=0)
            before = run.advance(attempt, order=order)
        for name in run.lost_backup(before, checked=True):
            _logger.warning(
                "[%s] the backup file %s is missing or damaged, so its rows can't be put back",
                run.run_id,
                name,
            )
        try:
            result = roll_back(store.everywhere(), run, manifest.ranges, attempt=attempt)
            ending = _end(store, run, manifest, result)
            undone = _rolled_back(run, result, ending.state)
            run.write_lines(LEFT, _left_lines(result))
            run.write_json(ROLLBACK, undone.values)
            if ending.state is manifest.state:
                run.advance(attempt, state=ending.state)
            else:
                ended: dict[str, Any] = {"stopped": None, "stopped_code": None}
                run.advance(attempt, state=ending.state, writing=frozenset(), **ended)
        except ReembedError as error:
            state = _known_state(run)
            if state is not None and state.undoable:
                raise
            if state is not State.ROLLED_BACK:
                raise IncompleteError(
                    f"{error}; the rollback of run {run.run_id} is incomplete: try it again"
                ) from error
            # All is put back and noted, only not yet flushed.
            _logger.warning("[%s] %s", run.run_id, error)
        if ending.state in (State.ROLLED_BACK, State.EMPTY):
            run.remove_shards()
    _name_rows(run, result)
    lines = {
        "restored": f"{result.restored:,} rows hold their previous vectors again",
        "as before": f"{result.unchanged:,} rows",
        "left": f"{_count_left(result):,} rows"
        + (f" (named in {run.path / LEFT})" if result.left else ""),
        "lost": f"{describe_lost(result.lost)}" if result.lost else "",
        "next": _after_undoing(store, chosen, runs, result),
    }
    if ending.trouble is not None:
        del lines["next"]
    if not result.lost:
        del lines["lost"]
    return report_of(
        undone,
        f"reembed: {ending.head}\n\n{table(lines)}",
        ending.trouble,
        kept=f"it is kept in {run.path / ROLLBACK}",
    )


def _end(store: Store, run: RunDirectory, manifest: Manifest, result: RolledBack) -> _Ending:
    """Decide what a run is after a rollback: nothing is closed of which nothing went back."""
    before, done = manifest.state, result.restored or result.unchanged
    written = max(len(result.left), manifest.reembedded)
    if result.lost:
        trouble = IncompleteError(
            f"{describe_lost(result.lost)} of the backup in {run.backup} is missing or damaged, so "
            f"rows of {store.path} keep the vectors that run {run.run_id} gave them; put the file "
            "back from a copy of it and roll back again, or re-embed these rows with the former "
            "model"
        )
        if done or before is State.ROLLING_BACK:
            return _Ending(State.PARTLY_BACK, f"run {run.run_id} is partly rolled back", trouble)
        return _Ending(before, f"nothing of run {run.run_id} was put back", trouble)
    if lost := [key for key, why in result.left.items() if why == NOT_KEPT]:
        trouble = IncompleteError(
            f"{len(lost)} rows of {store.path} were put back and hold something else by now (the "
            f"first: {lost[0]}): a trigger of the database or another program has changed them "
            "since; drop or stop it, and re-embed these rows with the former model"
        )
        return _Ending(State.ROLLED_BACK, f"run {run.run_id} is rolled back", trouble)
    # What is as before the run may have been put back by another program; an attempt that was cut
    # off may have put it back as well.
    partly = result.restored or (result.unchanged and before is not State.REPLACED)
    if result.in_the_way and partly:
        trouble = IncompleteError(f"{_obstacles(store, result)}; the others are put back")
        return _Ending(State.PARTLY_BACK, f"run {run.run_id} is partly rolled back", trouble)
    if done and not result.in_the_way:
        return _Ending(State.ROLLED_BACK, f"run {run.run_id} is rolled back")
    head = f"nothing of run {run.run_id} was put back"
    if not written:
        empty = UsageError(
            f"the run {run.run_id} wrote nothing, so there was nothing to put back; it is ended, "
            "and reembed status shows the others"
        )
        return _Ending(State.EMPTY, head, None if before.incomplete else empty)
    if before is State.ROLLING_BACK and store.whole:
        before = State.REPLACED  # All at once: an attempt that was cut off has changed nothing.
    if result.in_the_way:
        return _Ending(
            before, head, StoreError(f"{_obstacles(store, result)}; nothing was put back")
        )
    if before is State.ROLLING_BACK:
        # What an earlier attempt has put back was changed since.
        return _Ending(State.ROLLED_BACK, f"run {run.run_id} is rolled back")
    reasons = counts(Counter(result.left.values())) if result.left else "its backup is gone"
    why = StoreError(
        f"none of the {written:,} rows that the run {run.run_id} wrote in {store.path} could be "
        f"put back ({reasons}), so it stays as it is; if nothing of it is wanted back, reembed "
        f"cleanup --run {run.run_id} --yes removes it"
    )
    return _Ending(before, head, why)


def _obstacles(store: Store, result: RolledBack) -> str:
    """Name the rows for which others can't be put back, and what gets further."""
    rows = [pair for keys in result.in_the_way.values() for pair in keys.items()]
    key, why = rows[0]
    held = sum(reason == HELD_BACK for reason in result.left.values())
    names = ", ".join(repr(name) for name in result.in_the_way if name)
    what = f"{names} in {store.path}" if names else str(store.path)
    return (
        f"{len(rows)} rows are in the way (the first, {key}: {why}) of putting back {what}, where "
        f"all rows must have one model, so {held} others keep their new vectors; "
        f"{_IF_IN_THE_WAY[store.kind]}"
    )


def _after_undoing(store: Store, chosen: Chosen, runs: Runs, result: RolledBack) -> str:
    _, manifest = chosen
    if result.restored or manifest.state is State.ROLLING_BACK:
        return _AFTER_UNDOING.get(store.kind, "search with the former model again")
    older = [
        other.run_id
        for other, m in runs
        if m.age < manifest.age and m.state.undoable and m.scope.shares_rows(manifest.scope)
    ]
    if older:
        return f"no row was changed; reembed rollback --run {older[-1]} undoes the run before"
    return "no row was changed: all were as before the run already"


def _left_lines(result: RolledBack) -> Iterator[dict[str, str]]:
    named = {key: why for keys in result.in_the_way.values() for key, why in keys.items()}
    for key, why in (result.left | named).items():
        yield {"id": key, "reason": why}


def _name_rows(run: RunDirectory, result: RolledBack) -> None:
    """Name the rows that are left and those that are in the way, not those that these hold back."""
    named = {key for keys in result.in_the_way.values() for key in keys}
    left = [(key, why) for key, why in result.left.items() if why != HELD_BACK and key not in named]
    for key, why in left[:_NAMED_ROWS]:
        _logger.warning("[%s] row %s is left as it is: %s", run.run_id, one_line(key), why)
    obstacles = [pair for keys in result.in_the_way.values() for pair in keys.items()]
    for key, why in obstacles[:_NAMED_ROWS]:
        _logger.warning("[%s] row %s is in the way: %s", run.run_id, one_line(key), why)


def _known_state(run: RunDirectory) -> State | None:
    try:
        return run.read_manifest().state
    except StagingError:
        return None


def _rolled_back(run: RunDirectory, result: RolledBack, state: State) -> results.RolledBack:
    return results.RolledBack(
        run_id=run.run_id,
        state=str(state),
        restored=result.restored,
        unchanged=result.unchanged,
        left=_count_left(result),
        left_by_reason=dict(Counter(result.left.values()))
        | ({LOST: sum(count or 0 for count in result.lost.values())} if result.lost else {}),
        lost_files=result.lost,
        in_the_way=result.in_the_way,
        run_directory=str(run.path),
    )


def _count_left(result: RolledBack) -> int:
    return len(result.left) + sum(count or 0 for count in result.lost.values())


def clean_up(path: Path, runs: Runs, *, named: str | None, yes: bool) -> Report:
    """Remove runs that have ended; a backup that is the only way back only if `yes`.

    Without a name: all that have ended. By its name also one that is not finished, and if `yes`
    one that is half done and of which nothing can go back.
    """
    half = [(run, m) for run, m in runs if yes and named == run.run_id and m.state.incomplete]
    lost_cause = [run for run, manifest in half if not _has_way_back(path, run, manifest)]
    require_complete(runs, but=lost_cause[0] if lost_cause else None)
    if named is not None and named not in [run.run_id for run, _ in runs]:
        raise UsageError(f"there is no run {named}; reembed status names those that there are")
    removed: list[str] = []
    kept: dict[str, str] = {}
    freed = 0
    if not runs:
        return report_of(CleanedUp((), {}, 0), f"no runs on {path}; nothing to remove")
    with lock_database(path):
        for at, (run, manifest) in enumerate(runs):
            if named not in (None, run.run_id):
                continue
            if named is None and not manifest.state.ended:
                kept[run.run_id] = "it is not finished; --run names it to remove it all the same"
            elif not yes and (
                _is_only_way_back(run, manifest, runs[at + 1 :])
                or _has_way_back(path, run, manifest, runs[at + 1 :])
            ):
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
    text += f"\n\n{table(lines)}" if lines else ""
    return report_of(CleanedUp(tuple(removed), kept, freed), text)


def _is_only_way_back(run: RunDirectory, manifest: Manifest, newer: Runs) -> bool:
    """Whether no newer run has moved all of a run's rows to yet another model."""
    if not manifest.state.undoable:
        return False
    target = Target.from_json(manifest.target)
    return not any(
        later.state is State.REPLACED
        and later.scope.mode == Mode.ALL
        and later.scope.store == manifest.scope.store
        and later.scope.namespace in (None, manifest.scope.namespace)
        and target.differences(later.target)
        and not _has_skipped(other, run, manifest)
        for other, later in newer
    )


def _has_way_back(path: Path, run: RunDirectory, manifest: Manifest, newer: Runs = ()) -> bool:
    """Whether a row would go back by a run's backup, whatever the manifests say.

    It may have left the scope of the newer runs, or been skipped by them. What a run that is
    undone has written may be in the table again if a newer one has given rows the same vectors.
    """
    if manifest.state in (State.ROLLED_BACK, State.EMPTY) and any(
        later.state.undoable and later.scope.shares_rows(manifest.scope) for _, later in newer
    ):
        return False
    try:
        return would_restore(job_of(path, run, manifest).store, run, manifest.ranges)
    except ReembedError:  # The table is gone, or the backup damaged, so it can't be told.
        return manifest.state.undoable


def _has_skipped(newer: RunDirectory, run: RunDirectory, manifest: Manifest) -> bool:
    """Whether a newer run skipped rows that an older one wrote, so that it did not save them."""
    skipped = {row["id"] for row in newer.read_lines(SKIPPED)}
    try:
        return bool(skipped) and any(
            not skipped.isdisjoint(read_ledger(run.backup, keys.index, with_vectors=False).keys)
            for keys in manifest.ranges
        )
    except StagingError:  # The backup is damaged, so it can't be told.
        return True
