"""Arguments in, exit code out. Results go to stdout, all else to stderr."""

from __future__ import annotations

import argparse
import atexit
import gc
import io
import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from reembed import __version__
from reembed.pipeline.interrupts import (
    DONE,
    GOES_ON,
    NOTHING_STAGED,
    NUMBERS,
    SEE_STATUS,
    Interrupts,
)
from reembed.pipeline.options import RUNNERS, CommandOptions, Options
from reembed.pipeline.output import open_streams, print_result, tell
from reembed.pipeline.paths import absolute_directory, check_database, working_directory
from reembed.pipeline.words import NOTHING_WRITTEN, one_line
from reembed.transforms.errors import (
    IncompleteError,
    ReembedError,
    RunError,
    StoreError,
    UsageError,
)
from reembed.transforms.hiding import shown_complaint

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

    from reembed.pipeline.plan import Plan
    from reembed.pipeline.settings import Settings

_EPILOG = """\
commands that look after runs (reembed COMMAND --help):
  status    the runs on a database, how far they have come, what to do next
  verify    check the table against a run, and a sample against the model
  rollback  put the previous vectors back
  cleanup   remove runs that have ended

exit codes:
  0  done, or the plan printed (skipped rows are named on stderr)
  1  failed; the message says whether the store is unchanged
  2  wrong usage or settings, or no embedder configured
  3  the embedder could not be built
  4  a stamp was refused; the store is unchanged
  5  too many rows failed; the store is unchanged
  6  the replacement is incomplete: run again to finish it, or roll back
  130, 143  interrupted (Ctrl-C, SIGTERM); the same command goes on

Flags that are not given are taken from ai-memory's environment variables and
its configuration file; with none, the model is all-MiniLM-L6-v2, run here.
Beam's own options stand after "--":
  reembed --runner PortableRunner -- --job_endpoint=localhost:8099
"""


_GARBAGE_AFTER = 100_000
"""Objects made, beyond those freed, after which garbage is looked for; Python's own is 700."""

_logger = logging.getLogger("reembed")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return the exit code."""
    interrupts = Interrupts()
    before = {number: signal.getsignal(number) for number in NUMBERS}
    interrupts.take()
    try:
        return _main(list(sys.argv[1:] if arguments is None else arguments), interrupts)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def entry(interrupts: Interrupts | None = None) -> NoReturn:
    """Run the program and end the process, at a signal as `interrupts` says."""
    gc.disable()  # Until the imports are done, a tenth of whose time it takes.
    if interrupts is None:
        interrupts = Interrupts()
        interrupts.take()
    open_streams()
    interrupts.watch()
    try:
        code = _code_of(interrupts)
        interrupts.finish(code)
    except KeyboardInterrupt:
        interrupts.end(interrupts.received or signal.SIGINT)
    atexit._run_exitfuncs()
    # Threads of libraries and what C++ tears down at the end of a process could abort it, and
    # all is done.
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            if stream is not None:
                stream.flush()
    os._exit(code)


def _code_of(interrupts: Interrupts) -> int:
    """Run the program; return the exit code, also where nothing has foreseen what went wrong."""
    try:
        return _main(sys.argv[1:], interrupts)
    except SystemExit as end:  # After --help.
        return end.code if isinstance(end.code, int) else 0
    except Exception as error:
        if os.environ.get("REEMBED_TRACEBACK"):
            raise
        tell(f"reembed: error: {_unforeseen(error)}")
        return ReembedError.exit_code


def _main(arguments: list[str], interrupts: Interrupts) -> int:
    _quieten()
    try:
        try:
            code = _dispatch(arguments, interrupts)
        except ReembedError as error:
            if interrupts.received:
                raise
            code = _fail(error)
        interrupts.finish(code)
    except BaseException:
        # Runners turn an interruption into an error of their own.
        if not interrupts.received:
            raise
    if interrupts.received:  # Perhaps a library has swallowed it.
        interrupts.end(interrupts.received)
    return code


def _unforeseen(error: Exception) -> str:
    """Describe an error that nothing has foreseen, without its words: they may hold anything."""
    if isinstance(error, MemoryError):
        return "there is too little memory; reembed status says what the store holds"
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    place = f" at {Path(at.tb_frame.f_code.co_filename).name}:{at.tb_lineno}" if at else ""
    said = f": {error}" if isinstance(error, ImportError) else ""
    return (
        f"reembed met an error that it does not know ({type(error).__name__}{place}"
        f"{said}); reembed status says what the store holds, and REEMBED_TRACEBACK=1 shows more"
    )


def _fail(error: ReembedError) -> int:
    """Say what kept the program from its work, and that the store is as it was; the exit code."""
    tell(f"reembed: error: {one_line(str(error))}")
    for line in error.details:
        tell(f"  {one_line(line)}")
    if error.exit_code == ReembedError.exit_code and not _SAYS_SO.search(str(error)):
        tell(f"reembed: {NOTHING_WRITTEN}")
    return error.exit_code


_SAYS_SO = re.compile(
    r"(wrote nothing|nothing (was|is) (written|replaced|put back|embedded or changed))"
    r"|store is (as it was|unchanged)"
    r"|reembed status says"
)


def _deliver(text: str, code: int, *, otherwise: str) -> int:
    """Print a result; return the exit code, that of what happened to the store.

    A result that can't be written turns 0 into 1; `otherwise` says where it is, or what the
    store holds.
    """
    why = print_result(text)
    if why:
        tell(
            f"reembed: error: done, but the result could not be written ({one_line(why)}); "
            f"{one_line(otherwise)}"
        )
    return code or (ReembedError.exit_code if why else 0)


def parse_options(arguments: Sequence[str]) -> Options:
    """Parse the command line; raise UsageError for what is wrong with it."""
    ours, beam_options = list(arguments), []
    if "--" in ours:
        at = ours.index("--")
        ours, beam_options = ours[:at], ours[at + 1 :]
    given = vars(_parser().parse_args(ours))
    given |= {name: tuple(given[name]) for name in ("key", "text")}
    given["run_dir"] = absolute_directory(given["run_dir"])
    return Options(**given, beam_options=tuple(beam_options))


def parse_command(arguments: Sequence[str]) -> CommandOptions:
    """Parse the command line of a command; raise UsageError for what is wrong with it."""
    command, *rest = arguments
    given = vars(_command_parser(command).parse_args(rest))
    given["run_dir"] = absolute_directory(given["run_dir"])
    return CommandOptions(command, **given)


def _dispatch(arguments: list[str], interrupts: Interrupts) -> int:
    if arguments and arguments[0] in COMMANDS:
        return _run_command(parse_command(arguments), interrupts)
    return _run(parse_options(arguments), interrupts)


def _run_command(options: CommandOptions, interrupts: Interrupts) -> int:
    from reembed.pipeline.api import perform, settings_without_model

    gc.enable()
    interrupts.unwind()
    if options.command in ("rollback", "cleanup"):
        interrupts.line = SEE_STATUS
    report = perform(options, _choose_database(settings_without_model(options.db)))
    code = 0 if report.trouble is None else report.trouble.exit_code
    shown = report.json if options.json else report.text
    code = _deliver(shown, code, otherwise=report.kept or NOTHING_WRITTEN)
    return code if report.trouble is None else _fail(report.trouble)


def _run(options: Options, interrupts: Interrupts) -> int:
    from reembed.pipeline import report
    from reembed.pipeline.api import carry_out, prepare, warn_of_surroundings
    from reembed.pipeline.settings import read_settings

    if options.beam_options or not options.dry_run:
        from reembed.pipeline import run, surroundings  # noqa: F401 - before signals unwind
        from reembed.pipeline.progress import showing_progress
        from reembed.pipeline.runners import parse_beam_options

        beam_options = parse_beam_options(options.runner, options.beam_options)
    interrupts.unwind()
    settings = read_settings(options, os.environ, working_directory())
    database = _choose_database(settings)
    plan = prepare(database, settings, options)
    for line in report.preflight_lines(plan) if plan.ranges else [report.empty_line(plan)]:
        tell(line)
    if options.dry_run:
        return _deliver(
            report.plan_json(plan) if options.json else report.plan_text(plan),
            IncompleteError.exit_code if plan.begun else 0,
            otherwise=NOTHING_WRITTEN,
        )
    if plan.ranges:
        warn_of_surroundings(plan, database)
        doing = "loading" if plan.target.access is None else "asking the server for"
        tell(f"reembed: {doing} {plan.target}")
    interrupts.line = NOTHING_STAGED if plan.earlier is None else GOES_ON

    @contextmanager
    def progress(plan: Plan) -> Iterator[None]:
        interrupts.line = GOES_ON
        # What is here stays to the end, and rows make no cycles: less to look for, less often.
        gc.freeze()
        gc.set_threshold(_GARBAGE_AFTER)
        gc.enable()
        with showing_progress(plan):
            yield

    try:
        outcome = carry_out(plan, options, database, beam_options, progress)
    except BaseException:
        if interrupts.received:
            interrupts.line = _stopped_at(plan)
        raise
    interrupts.line = DONE
    show = report.outcome_json if options.json else report.outcome_text
    remaining = outcome.summary.remaining
    code = _deliver(
        show(plan, outcome),
        IncompleteError.exit_code if remaining else 0,
        otherwise=report.kept_in(plan, outcome),
    )
    if remaining:
        tell(f"reembed: error: {report.incomplete_line(outcome.summary)}")
    return code


def _stopped_at(plan: Plan) -> str:
    """Say what an interrupted run leaves."""
    from reembed.transforms.errors import StagingError
    from reembed.transforms.staging import State

    if not plan.run.exists:
        return NOTHING_STAGED
    try:
        state = plan.run.read_manifest().state
    except StagingError:
        return SEE_STATUS
    return GOES_ON if state in (State.STAGING, State.REPLACING) else DONE


def _choose_database(settings: Settings) -> Path:
    if settings.database is not None:
        return check_database(settings.database)
    if settings.demo is None:
        raise UsageError(
            "no database was named, and there is no ai-memory.db here; name one with --db or "
            "AI_MEMORY_DB"
        )
    if not settings.demo.exists():
        from reembed.transforms.stores.demo import create_store, demo_memories

        try:
            settings.demo.parent.mkdir(parents=True, exist_ok=True)
            create_store(str(settings.demo), demo_memories())
        except FileExistsError:
            pass  # Another run was faster.
        except OSError as error:
            raise StoreError(
                f"the demo store {settings.demo} can't be made ({error.strerror}); name a database "
                "with --db"
            ) from None
    tell(
        f"reembed: no database was named, so this is the demo store {settings.demo}; delete it to "
        "have it made anew"
    )
    return settings.demo


_LONGEST_COMPLAINT = 300
"""Characters of argparse's complaint, which quotes values."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        said = shown_complaint(message)
        if len(said) > _LONGEST_COMPLAINT:
            said = f"{said[:_LONGEST_COMPLAINT]}..."
        raise UsageError(f"{said}; see reembed --help")

    def print_help(self, file: SupportsWrite[str] | None = None) -> None:
        _print_all("help", self.format_help().rstrip("\n"))


class _Version(argparse.Action):
    """Prints the version and stops."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        _print_all("version", f"reembed {__version__}")
        parser.exit()


def _print_all(what: str, text: str) -> None:
    """Print a text; raise RunError if it could not be written."""
    if why := print_result(text):
        raise RunError(f"the {what} could not be written ({why}); send stdout elsewhere")


def _parser() -> _Parser:
    parser = _Parser(
        prog="reembed",
        description="Re-embed every memory of an ai-memory database with another model: each\n"
        "row's text is embedded, and at the end all stored vectors are replaced at once.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--db", metavar="FILE", help="the database")
    add("--namespace", metavar="NAME", help="only the rows of exactly this namespace")
    add("--dry-run", action="store_true", help="print the plan and stop; not a byte is changed")
    add(
        "--batch",
        type=int,
        default=0,
        metavar="N",
        help="most texts in a request (0: as set, or 100); a local model gets 256, or N if more",
    )
    add("--json", action="store_true", help="print the result as one line of JSON")
    add(
        "--version",
        action=_Version,
        nargs=0,
        default=argparse.SUPPRESS,
        help="print the version and stop",
    )
    add("--model", metavar="NAME", help="a model: by name or directory here, by name at a server")
    add("--backend", metavar="NAME", help="what embeds: local, or the kind of server")
    add("--dim", type=int, metavar="N", help="refuse a model of another dimension")
    add("--runner", default="DirectRunner", metavar="NAME", help=f"one of {', '.join(RUNNERS)}")
    add = parser.add_argument_group("which rows").add_argument
    add("--missing-only", action="store_true", help="only rows that have no vector")
    add(
        "--skip-current-space",
        action="store_true",
        help="not rows whose stamp and length are the target's",
    )
    add("--retry-skipped", action="store_true", help="only rows that the last run skipped")
    add("--stamp-only", action="store_true", help="stamp the model's own vectors, embed a sample")
    add(
        "--no-hidden",
        action="store_true",
        help="leave out rows that ai-memory hides (tombstoned, quarantined)",
    )
    add("--max-rows", type=int, metavar="N", help="stage N rows now, the rest the next time")
    add("--partial", action="store_true", help="with --max-rows: replace those rows at once")
    add = parser.add_argument_group("which store, if not an ai-memory database").add_argument
    add(
        "--store",
        metavar="KIND",
        help="ai-memory, llm, sqlite-vec or table (found out from the file)",
    )
    add("--table", metavar="NAME", help="the table that has the rows")
    add(
        "--key", action="append", default=[], metavar="COLUMN", help="names a row (its primary key)"
    )
    add(
        "--text",
        action="append",
        default=[],
        metavar="COLUMN",
        help="what is embedded; several are joined by a space; or a template, '{title}: {body}'",
    )
    add("--vector", metavar="COLUMN", help="where the vector is")
    add("--text-table", metavar="NAME", help="the table that has the texts of a vec0 table")
    add(
        "--text-key",
        metavar="COLUMN",
        help="its column with the vec0 table's key (its INTEGER PRIMARY KEY)",
    )
    add("--format", metavar="NAME", help="f32le (if not given), f32be, f64le, f16le, json, npy")
    add("--dim-column", metavar="COLUMN", help="where a vector's length is")
    add("--space-column", metavar="COLUMN", help="where the name of its model is")
    add("--space", metavar="NAME", help="what the store calls the model (its own name)")
    add("--namespace-column", metavar="COLUMN", help="what --namespace is about")
    add("--where", metavar="SQL", help="only the rows for which this condition is true")
    add(
        "--config",
        metavar="FILE",
        help="the same as TOML: table = 'docs', text = ['title', 'body']",
    )
    add = parser.add_argument_group("how").add_argument
    add("--fresh", action="store_true", help="start over; discard what an earlier try staged")
    add("--run-dir", metavar="DIR", help="where to stage and keep the backup (beside FILE)")
    add("--skipped", metavar="WHAT", help="keep (if not given) or clear a skipped row's vector")
    add(
        "--max-skipped",
        type=_share,
        metavar="SHARE",
        help="replace nothing if more of the tried rows failed (50%%)",
    )
    add("--one-transaction", action="store_true", help="replace all at once above 50,000 rows too")
    add("--document-prefix", metavar="TEXT", help="what stands before each text")
    add(
        "--workdir",
        metavar="URI",
        help="a place for texts and vectors on any file system of Beam (a path, gs://, s3://, "
        "hdfs://), for workers that can't reach FILE",
    )
    add("--sleep-ms", type=int, default=0, metavar="N", help="wait after each batch")
    add("--device", metavar="NAME", help="cpu, cuda, mps (the fastest that is there)")
    add(
        "--precision", default="float32", metavar="NAME", help="or float16, bfloat16: other vectors"
    )
    add = parser.add_argument_group("a server that embeds").add_argument
    add("--base-url", metavar="URL", help="where it is (as set, or the backend's own)")
    add(
        "--in-flight",
        type=int,
        metavar="N",
        help="most requests at a time (as many as it can do with, up to 32)",
    )
    add(
        "--give-up-after",
        type=_seconds,
        default=600.0,
        metavar="TIME",
        help="end the run if it is down for so long (10m)",
    )
    add("--timeout", type=_seconds, default=120.0, metavar="TIME", help="for one answer (2m)")
    add("--max-tokens", type=int, metavar="N", help="stop before more are spent")
    add("--price-per-million", type=float, metavar="X", help="what a million tokens cost")
    add(
        "--key-secret",
        metavar="NAME",
        help="read the key from Google's Secret Manager: projects/P/secrets/S/versions/V",
    )
    add("--insecure-key", action="store_true", help="send the key over http to another machine")
    return parser


def _seconds(text: str) -> float:
    """A time in seconds, as 90, 90s, 10m or 2h; the message of what is none says so.

    >>> _seconds("90"), _seconds("10m")
    (90.0, 600.0)
    """
    units = {"s": 1, "m": 60, "h": 3600}
    number = text[:-1] if text[-1:] in units else text
    try:
        return float(number) * units.get(text[-1:], 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 90s, 10m or 2h") from None


def _share(text: str) -> float:
    """A share, as 0.25 or 25%; the message of what is none says what it should be.

    >>> _share("25%"), _share("0.25")
    (0.25, 0.25)
    """
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no share such as 10% or 0.1") from None


COMMANDS = {
    "status": "Show the runs on a database: state, rows, skips, size on disk and next step.",
    "verify": "Check each vector of the table against the run that wrote it: length, numbers,\n"
    "norm and digest, and a sample of rows against the model.",
    "rollback": "Put the vectors back that a run replaced. Rows whose text or vector changed\n"
    "since are left as they are, and named.",
    "cleanup": "Remove runs that have ended. A backup that is the only way back to a former\n"
    "model's vectors is kept unless --yes is given.",
}


def _command_parser(command: str) -> _Parser:
    parser = _Parser(
        prog=f"reembed {command}",
        description=COMMANDS[command],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--db", metavar="FILE", help="the database")
    add("--run-dir", metavar="DIR", help="where the run was staged, if not beside FILE")
    if command != "status":
        which = "only this run" if command == "cleanup" else "the run (the newest that fits)"
        add("--run", metavar="ID", help=which)
    if command == "verify":
        add("--model", metavar="DIR", help="where the run's model is now, if not at a server")
        add("--backend", metavar="NAME", help="the kind of the run's server, as the run had it")
        add("--base-url", metavar="URL", help="where the run's server is now")
        add(
            "--key-secret",
            metavar="NAME",
            help="read the key from Google's Secret Manager: projects/P/secrets/S/versions/V",
        )
        add("--insecure-key", action="store_true", help="send the key over http elsewhere")
    if command == "cleanup":
        add("--yes", action="store_true", help="also remove the only way back")
    add("--json", action="store_true", help="print the result as one line of JSON")
    return parser


def _quieten() -> None:
    """Keep the libraries' own warnings off stderr, and their statistics on this machine."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Before anything forks; the tokenizer otherwise warns and stops using threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.CRITICAL)
    handler = _Warnings()
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logging.addLevelName(logging.WARNING, "WARN")
    _logger.handlers = [handler]
    _logger.setLevel(logging.WARNING)
    _logger.propagate = False
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    threading.excepthook = _tell_of_thread


class _Warnings(logging.Handler):
    """Log records as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        tell(self.format(record))


def _tell_of_thread(trouble: threading.ExceptHookArgs) -> None:
    """Print what ended a thread, but for Beam's own that lose a connection when a job ends."""
    lost = trouble.exc_type.__module__.startswith("grpc")
    if not lost or os.environ.get("REEMBED_TRACEBACK"):
        threading.__excepthook__(trouble)
