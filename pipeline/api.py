"""The functions of the package `reembed`: the command line's work, without what it prints.

The command line calls the same functions; it adds the demo store, what it prints, and signals.
None of them prints, ends the process or handles a signal; all may be called in any thread.
"""

from __future__ import annotations

import inspect
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypedDict, TypeVar, Unpack

from reembed.pipeline import report
from reembed.pipeline.options import CommandOptions, Options
from reembed.pipeline.outcome import Outcome, outcome_values
from reembed.pipeline.paths import absolute_directory, check_database, working_directory
from reembed.pipeline.plan import Plan, make_plan
from reembed.pipeline.results import CleanedUp, Progress, Result, RolledBack, Status, Verified
from reembed.pipeline.resume import describe, naming_incomplete
from reembed.pipeline.selection import Report
from reembed.pipeline.settings import Settings, read_settings
from reembed.pipeline.upkeep import run_command
from reembed.transforms.errors import IncompleteError, StagingError, UsageError
from reembed.transforms.interpreter import unconfigured, undisturbed
from reembed.transforms.rows import Skipped
from reembed.transforms.staging import lock_holder
from reembed.transforms.stores import recover_store

StrPath = str | os.PathLike[str]

_PATHS = ("db", "model", "run_dir", "workdir", "config")

_POLL_SECONDS = 0.5

_logger = logging.getLogger("reembed")


class RunSettings(TypedDict, total=False):
    """Settings of `plan` and `run`: the flags of the command line, with the same defaults.

    What is None or left out is decided by ai-memory's environment variables and configuration, as
    on the command line. `give_up_after` and `timeout` are seconds, `sleep_ms` milliseconds,
    `max_skipped` is a share from 0 to 1, `price_per_million` is per million tokens. `key` and
    `text` are a column or several. `beam_options` are Beam's own, as after "--".
    """

    namespace: str | None
    batch: int
    model: StrPath | None
    backend: str | None
    dim: int | None
    runner: str
    run_dir: StrPath | None
    workdir: StrPath | None
    fresh: bool
    missing_only: bool
    skip_current_space: bool
    stamp_only: bool
    retry_skipped: bool
    max_rows: int | None
    partial: bool
    no_hidden: bool
    sleep_ms: int
    max_skipped: float | None
    skipped: str | None
    one_transaction: bool
    base_url: str | None
    document_prefix: str | None
    in_flight: int | None
    give_up_after: float
    timeout: float
    max_tokens: int | None
    price_per_million: float | None
    key_secret: str | None
    insecure_key: bool
    device: str | None
    precision: str
    store: str | None
    config: StrPath | None
    table: str | None
    key: str | Sequence[str]
    text: str | Sequence[str]
    vector: str | None
    text_table: str | None
    text_key: str | None
    dim_column: str | None
    space_column: str | None
    namespace_column: str | None
    where: str | None
    format: str | None
    space: str | None
    beam_options: Sequence[str]


def plan(db: StrPath, **settings: Unpack[RunSettings]) -> Plan:
    """Look at a database, at the model's files and at earlier runs; change nothing.

    No text is sent anywhere. `plan(...).values` is what `--dry-run --json` prints.

    Raises UsageError for settings that can't be used, NoEmbedderError if these say that nothing is
    to be embedded, EmbedderError for a model that can't be had, StoreError for a database that is
    no store, StagingError for runs beside it that can't be read, RunError if what is staged is for
    another target, and IncompleteError if a replacement was begun and is not finished; where this
    call would finish it, `result` is the plan.
    """
    options = _options(db, settings, dry_run=True)
    if options.beam_options:
        _parse_beam_options(options)
    found = prepare(*_database_of(options), options)
    _log_notes(found)
    if found.begun and found.earlier is not None:
        error = IncompleteError(
            f"{describe(found.run, found.earlier.manifest)}; run again to finish it, or undo it "
            "with reembed rollback"
        )
        error.result = found
        raise error
    return found


def run(
    db: StrPath,
    *,
    progress: Callable[[Progress], None] | None = None,
    **settings: Unpack[RunSettings],
) -> Outcome:
    """Embed the selected rows and replace their vectors all at once; return what was done.

    A run that was interrupted or has failed is resumed by the same call. `progress` is called every
    half second while rows are embedded and replaced, and once at the end, by a thread of its own;
    the run goes on without it if it raises an exception, which is logged. `run(...).values` is what
    `--json` prints.

    Raises what `plan` raises, before anything is done, also for texts or a key that may not be
    sent; StampError if `stamp_only` is refused, TooManySkippedError if more than `max_skipped` of
    the tried rows failed, RunError or EmbedderError if the runner or the model fails: the store is
    then unchanged. StagingError for a full disk, or if another process works on the database.
    IncompleteError if a part of the rows is replaced: the same call finishes it, `rollback` undoes
    it, and `result` is the outcome if the run came to its end with rows that remain.
    """
    options = _options(db, settings, dry_run=False)
    if options.runner == "FlinkRunner" and not _in_main_thread():
        raise UsageError(
            "FlinkRunner starts a job server, which it can only do in the main thread; call it "
            "there, or use PortableRunner with a job server of your own"
        )
    beam_options = _parse_beam_options(options)
    with unconfigured():
        database, read = _database_of(options)
        found = prepare(database, read, options)
        notes = (*_log_notes(found), *warn_of_surroundings(found, database))
        reports = _reporting(progress) if progress else lambda plan: nullcontext()
        outcome = carry_out(found, options, database, beam_options, reports)
    outcome = replace(outcome, notes=notes)
    if outcome.summary.remaining:
        error = IncompleteError(report.incomplete_line(outcome.summary))
        error.result = outcome
        raise error
    return outcome


def status(db: StrPath, *, run_dir: StrPath | None = None) -> Status:
    """List the runs on a database, how far they have come and what to do next.

    Raises IncompleteError if a replacement is incomplete, with the Status as its `result`;
    StoreError for a database that can't be read, StagingError for runs that can't be.
    """
    return _look_after(Status, "status", db, run_dir=run_dir)


def verify(
    db: StrPath,
    *,
    run_dir: StrPath | None = None,
    run: str | None = None,
    model: StrPath | None = None,
    backend: str | None = None,
    base_url: str | None = None,
    key_secret: str | None = None,
    insecure_key: bool = False,
) -> Verified:
    """Check the table against a run (default: the newest), and a sample against the model.

    Raises VerifyError if something is wrong or no row can be checked, EmbedderError if the model
    gives other vectors now, IncompleteError if the replacement is incomplete, each with the
    Verified as its `result`; UsageError if there is no such run, or it wrote nothing; StoreError
    and StagingError for what can't be read.
    """
    return _look_after(
        Verified,
        "verify",
        db,
        run_dir=run_dir,
        run=run,
        model=model,
        backend=backend,
        base_url=base_url,
        key_secret=key_secret,
        insecure_key=insecure_key,
    )


def rollback(db: StrPath, *, run_dir: StrPath | None = None, run: str | None = None) -> RolledBack:
    """Put the vectors back that a run (default: the newest) has replaced.

    A row whose text or vector has changed since is left as it is.

    Raises StoreError if nothing could be put back, IncompleteError if some rows could not, or a
    file of the backup is lost, each with the RolledBack as its `result`; UsageError if there is no
    such run, or a newer one must go back first; StagingError if another process works on the
    database.
    """
    return _look_after(RolledBack, "rollback", db, run_dir=run_dir, run=run)


def cleanup(
    db: StrPath, *, run_dir: StrPath | None = None, run: str | None = None, yes: bool = False
) -> CleanedUp:
    """Remove runs that have ended; a backup that is the only way back only if `yes`.

    Raises UsageError if there is no such run, IncompleteError if a replacement is incomplete,
    StagingError if another process works on the database or a run holds files of others.
    """
    return _look_after(CleanedUp, "cleanup", db, run_dir=run_dir, run=run, yes=yes)


def prepare(database: Path, settings: Settings, options: Options) -> Plan:
    """Plan a run. Unless it is a dry run, recover the database first; no other run may use it."""
    with naming_incomplete(database, options.run_dir):
        if not options.dry_run:
            _require_idle(database)
            recover_store(database)
        return make_plan(database, settings, options)


def warn_of_surroundings(plan: Plan, database: Path) -> tuple[str, ...]:
    """Log what else goes on around a database that is to be changed, and return it."""
    from reembed.pipeline import surroundings

    found = tuple(surroundings.warnings(database)) if plan.ranges else ()
    for line in found:
        _logger.warning("%s", line)
    return found


def carry_out(
    plan: Plan,
    options: Options,
    database: Path,
    beam_options: Any,
    progress: Callable[[Plan], AbstractContextManager[None]],
) -> Outcome:
    """Run a plan and log the rows that it skips; `progress` is entered while it does.

    `beam_options` are Beam's PipelineOptions.
    """
    with undisturbed():
        from reembed.pipeline.run import run_plan

    skipped: list[Skipped] = []
    vectors = "cleared" if plan.rules.clear_skipped else "kept"

    def warn(row: Skipped) -> None:
        skipped.append(row)
        _logger.warning(
            "[%s] skipped row %s: %s (previous vector %s)",
            plan.run.run_id,
            row.key,
            row.reason,
            vectors,
        )

    with naming_incomplete(database, options.run_dir):
        outcome = run_plan(
            plan, runner=options.runner, options=beam_options, progress=progress, warn=warn
        )
    return replace(outcome, values=outcome_values(plan, outcome), skipped_rows=tuple(skipped))


def perform(options: CommandOptions, database: Path) -> Report:
    """Do what a command after a run does; a rollback recovers the database first."""
    with naming_incomplete(database, options.run_dir):
        if options.command == "rollback":
            recover_store(database)
        return run_command(
            options,
            database,
            settings_of=lambda: read_settings(
                Options(
                    db=options.db,
                    backend=options.backend,
                    base_url=options.base_url,
                    key_secret=options.key_secret,
                    insecure_key=options.insecure_key,
                ),
                os.environ,
                working_directory(),
            ),
        )


def settings_without_model(db: str | None) -> Settings:
    """Read the settings for a command after a run.

    A model that can't be used now must not keep anyone from looking or going back.
    """
    return read_settings(Options(db=db, backend="local"), os.environ, working_directory())


R = TypeVar("R", bound=Result)


def _look_after(kind: type[R], command: str, db: StrPath, **given: Any) -> R:
    found = _texts({"db": db, **given})
    options = CommandOptions(command, **found | {"run_dir": absolute_directory(found["run_dir"])})
    database = check_database(_named(settings_without_model(options.db)))
    with unconfigured():
        done = perform(options, database)
    if done.trouble is not None:
        raise done.trouble
    assert isinstance(done.result, kind)
    return done.result


def _options(db: StrPath, settings: RunSettings, *, dry_run: bool) -> Options:
    """Check the settings; raise UsageError for a value that can't be used, TypeError for a name."""
    unknown = settings.keys() - RunSettings.__annotations__.keys()
    if unknown:
        raise TypeError(f"there is no setting {', '.join(sorted(unknown))}; see help(reembed.run)")
    given = _texts({"db": db, **settings})
    for name in ("key", "text"):
        value = given.get(name, ())
        given[name] = (value,) if isinstance(value, str) else tuple(value)
    if isinstance(given.get("beam_options"), str):
        raise TypeError("beam_options must be a list of texts, not one text")
    given["beam_options"] = tuple(given.get("beam_options", ()))
    given["run_dir"] = absolute_directory(given.get("run_dir"))
    _check_types(given)
    return Options(**given, dry_run=dry_run)


def _check_types(given: dict[str, Any]) -> None:
    """Raise TypeError for a value of another type than the setting's; make numbers Python's own."""
    for field in fields(Options):
        value: Any = given.get(field.name)
        kind = str(field.type)
        if field.name not in given or (value is None and kind.endswith("| None")):
            continue
        match kind.removesuffix(" | None"):
            case "bool":
                fits = isinstance(value, bool)
            case "str":
                fits = isinstance(value, str)
            case "int":
                fits = isinstance(value, Integral) and not isinstance(value, bool)
                given[field.name] = int(value) if fits else value
            case "float":
                fits = isinstance(value, Real) and not isinstance(value, bool)
                given[field.name] = float(value) if fits else value
            case _:
                fits = all(isinstance(one, str) for one in value or ())
        if not fits:
            raise TypeError(f"{field.name} must be {kind}, not {type(value).__name__}")


def _texts(given: dict[str, Any]) -> dict[str, Any]:
    """Turn paths into texts; raise TypeError for what is neither."""
    if given["db"] is None:
        raise TypeError("db is the path of a database, not None")
    for name in _PATHS:
        if given.get(name) is not None:
            given[name] = os.fspath(given[name])
            if not isinstance(given[name], str):
                raise TypeError(f"{name} must be a text or a path, not bytes")
    return given


def _database_of(options: Options) -> tuple[Path, Settings]:
    settings = read_settings(options, os.environ, working_directory())
    return check_database(_named(settings)), settings


def _parse_beam_options(options: Options) -> Any:
    with undisturbed():
        from reembed.pipeline.runners import parse_beam_options

        return parse_beam_options(options.runner, options.beam_options)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _named(settings: Settings) -> Path:
    assert settings.database is not None  # It was named.
    return settings.database


def _require_idle(database: Path) -> None:
    """Raise StagingError if another process is at work: what it has staged is not to be judged."""
    if holder := lock_holder(database):
        raise StagingError(
            f"another run is at work on {database.resolve()} ({holder}); wait for it to end"
        )


_NOTE = "NOTE — "
_WARN = "WARN "


def _log_notes(plan: Plan) -> tuple[str, ...]:
    """Log what the command line prints before a run, and return what of it is a note."""
    lines = report.preflight_lines(plan) if plan.ranges else [report.empty_line(plan)]
    notes = []
    for line in lines:
        said = line.removeprefix("reembed: ")
        note = said.removeprefix(_NOTE).removeprefix(_WARN)
        _logger.log(
            logging.INFO if note == said else logging.WARNING, "[%s] %s", plan.run.run_id, note
        )
        notes += [] if note == said else [note]
    return tuple(notes)


def _reporting(tell: Callable[[Progress], None]) -> Callable[[Plan], AbstractContextManager[None]]:
    """Call `tell` from a thread of its own while a plan is run, and once more at the end."""

    @contextmanager
    def reporting(plan: Plan) -> Iterator[None]:
        from reembed.pipeline.progress import staged_rows

        stop = threading.Event()
        began = time.monotonic()

        def poll() -> None:
            ended = False
            while not ended:
                ended = stop.wait(_POLL_SECONDS)
                done = staged_rows(plan)
                try:
                    tell(Progress(done, plan.survey.meant, time.monotonic() - began))
                except BaseException:  # Also what would end a thread that nobody waits for.
                    _logger.warning(
                        "[%s] progress raised an exception; the run goes on without it",
                        plan.run.run_id,
                        exc_info=True,
                    )
                    return

        thread = threading.Thread(target=poll, name="reembed-progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    return reporting


def _show_settings(function: Callable[..., Any]) -> None:
    """Show the settings in the function's signature, for help() and for notebooks."""
    defaults = {field.name: field.default for field in fields(Options)}
    own = inspect.signature(function)
    named = [one for one in own.parameters.values() if one.kind is not one.VAR_KEYWORD]
    named += [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=annotation
        )
        for name, annotation in inspect.get_annotations(RunSettings).items()
    ]
    function.__dict__["__signature__"] = own.replace(parameters=named)


_show_settings(plan)
_show_settings(run)
