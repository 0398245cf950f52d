"""Run a plan: passes of the pipeline until no row is new or edited, then the outcome."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.direct.direct_runner import BundleBasedDirectRunner
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from apache_beam.runners.runner import PipelineRunner

from pipeline.build import build
from pipeline.plan import Plan
from pipeline.report import outcome_values
from transforms.embedders import load_embedder
from transforms.errors import RunError, StagingError, UsageError, unwrap
from transforms.rows import Skipped, Summary
from transforms.staging import RunDirectory, begin_run, read_shards

MOST_PASSES = 3
"""Passes until the replacement goes ahead without the rows that are new or edited even then."""

MOST_LATE_PASSES = 3
"""Passes over such rows afterwards."""

_CONNECT_SECONDS = 10.0

_logger = logging.getLogger("reembed")


@dataclass(frozen=True)
class Outcome:
    """What a run did, and for how long."""

    summary: Summary
    seconds: float


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
    can't be built, a full disk, too many rows that failed. The store is then unchanged.
    """
    started = time.monotonic()
    if not plan.ranges:
        return Outcome(Summary(), 0.0)
    check_runner(runner, options)
    plan.store.check_writable()
    with begin_run(plan.run):
        try:
            load_embedder(plan.target)
            with progress(plan):
                summary = _run_passes(plan, runner, options)
        finally:
            with contextlib.suppress(StagingError):
                for row in skipped_rows(plan):
                    warn(row)
        outcome = Outcome(summary, time.monotonic() - started)
        try:
            plan.run.finish(outcome_values(plan, summary, outcome.seconds))
        except StagingError as error:
            # All is replaced, so the run has not failed; its result is printed all the same.
            _logger.warning("[%s] no summary is kept: %s", plan.run.run_id, error.__cause__)
    return outcome


def _run_passes(plan: Plan, runner: str, options: PipelineOptions) -> Summary:
    """Run passes until no row is new or edited, or they no longer help.

    The first ones hold the replacement back, so that it comes all at once; the last of them
    replaces, and a few more follow for the rows that changed even then.
    """
    while True:
        summary = _run_pass(plan, runner, options)
        if not summary.changed or plan.pass_number == MOST_PASSES + MOST_LATE_PASSES:
            return summary
        # Also in an early pass, if rows changed between the look and the write lock.
        replaced = plan.replaced or summary.replaced > 0
        plan = replace(
            plan,
            pending=tuple(keys for keys in plan.ranges if keys.index in summary.changed),
            pass_number=plan.pass_number + 1,
            last=replaced or plan.pass_number + 1 >= MOST_PASSES,
            replaced=replaced,
        )


def _run_pass(plan: Plan, runner: str, options: PipelineOptions) -> Summary:
    pipeline = beam.Pipeline(runner=_make_runner(runner), options=options)
    name = f"shards/pass-{plan.pass_number}.json"
    summary = build(pipeline, plan, replace=True)
    summary | "Record" >> beam.Map(_record, plan.run, name)
    try:
        pipeline.run().wait_until_finish()
    except Exception as error:
        if os.environ.get("REEMBED_TRACEBACK"):
            raise
        last = ([line for line in str(error).splitlines() if line.strip()] or [""])[-1]
        raise unwrap(error) or RunError(
            f"{runner} failed: {type(error).__name__}: {last.strip()} (REEMBED_TRACEBACK=1 shows "
            "all of it)"
        ) from error
    return Summary.from_json(plan.run.read_json(name))


def _record(summary: Summary, run: RunDirectory, name: str) -> None:
    try:
        run.write_json(name, summary.to_json())
    except StagingError as error:
        if not summary.replaced:
            raise
        raise RunError(
            f"{summary.replaced} vectors are replaced, but the summary of the run could not be "
            f"kept: {error}"
        ) from error


def _make_runner(name: str) -> PipelineRunner | str:
    """Choose a runner. Beam's own DirectRunner would download and start a Go program."""
    match name:
        case "DirectRunner" | "FnApiRunner":
            return FnApiRunner()
        case "BundleBasedDirectRunner":
            return BundleBasedDirectRunner()
        case _:
            return name


def check_runner(runner: str, options: PipelineOptions) -> None:
    """Refuse a runner that would wait for ever, or fetch a program from the network.

    Raises UsageError for a missing option, RunError for a job server that doesn't answer.
    """
    given = options.get_all_options()
    if runner == "FlinkRunner" and not given["flink_job_server_jar"]:
        raise UsageError(
            "FlinkRunner needs a job server: give --flink_job_server_jar after --, or use "
            "--runner PortableRunner -- --job_endpoint=HOST:PORT"
        )
    endpoint = given["job_endpoint"]
    if runner != "PortableRunner" or endpoint == "embed":
        return
    host, _, port = (endpoint or "").rpartition(":")
    if not port.isdigit():
        raise UsageError(
            f"PortableRunner needs a job server: give --job_endpoint=HOST:PORT after --, not "
            f"{endpoint!r}"
        )
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise RunError(
            f"no job server answers at {endpoint} ({error}); start it, or correct --job_endpoint"
        ) from None


def parse_beam_options(runner: str, flags: Sequence[str]) -> PipelineOptions:
    """Parse Beam's own options; what Beam would drop with a warning is refused.

    Raises UsageError for an option that Beam doesn't know, or a value that it refuses.
    """
    for flag in flags:
        if flag.partition("=")[0] in ("--runner", "--help", "-h"):
            raise UsageError(f"{flag} is not for Beam; give it before the --")
    refused: list[str] = []
    complaint = io.StringIO()

    def check(parser: argparse.ArgumentParser) -> None:
        refused.extend(parser.parse_known_args(list(flags))[1])

    options = PipelineOptions(list(flags), runner=runner)
    try:
        with contextlib.redirect_stderr(complaint):
            PipelineOptions(list(flags)).get_all_options(add_extra_args_fn=check)
    except SystemExit:
        last = complaint.getvalue().strip().splitlines()[-1:]
        raise UsageError(f"Beam refuses its options after --: {' '.join(last)}") from None
    if refused:
        raise UsageError(f"Beam has no option {' '.join(refused)}; correct what stands after --")
    return options


def skipped_rows(plan: Plan) -> Iterator[Skipped]:
    """The rows that were skipped, by what the last shard says of each."""
    for shards in plan.run.list_shards().values():
        last = {row.key: row for row in read_shards(shards, with_vectors=False)}
        yield from (row.skipped for row in last.values() if row.skipped is not None)
