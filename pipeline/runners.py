"""Runners and their options: what Beam would do with them that nobody wants is refused."""

from __future__ import annotations

import argparse
import contextlib
import io
import socket
from collections.abc import Sequence

from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.direct.direct_runner import BundleBasedDirectRunner
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from apache_beam.runners.runner import PipelineRunner

from transforms.errors import RunError, UsageError

_CONNECT_SECONDS = 10.0


def make_runner(name: str) -> PipelineRunner | str:
    """Choose a runner. Beam's own DirectRunner would download and start a Go program."""
    match name:
        case "DirectRunner" | "FnApiRunner":
            return FnApiRunner()
        case "BundleBasedDirectRunner":
            return BundleBasedDirectRunner()
        case _:
            return name


def check_runner(runner: str, options: PipelineOptions, *, workdir: str | None = None) -> None:
    """Refuse a runner that would wait for ever, or fetch a program from the network.

    Raises UsageError for a missing option, RunError for a job server that doesn't answer.
    """
    given = options.get_all_options()
    if runner == "FlinkRunner" and not given["flink_job_server_jar"]:
        raise UsageError(
            "FlinkRunner needs a job server: give --flink_job_server_jar after --, or use "
            "--runner PortableRunner -- --job_endpoint=HOST:PORT"
        )
    if runner == "PortableRunner":
        _check_endpoint(given["job_endpoint"])
    containers = given["environment_type"] in (None, "DOCKER") and given["job_endpoint"] != "embed"
    if runner in ("FlinkRunner", "PortableRunner") and containers and workdir is None:
        raise UsageError(
            f"{runner}'s workers run in containers, which can't reach the database file: name a "
            "place that they can write with --workdir URI, or give --environment_type=LOOPBACK "
            "after -- for workers in this process"
        )


def _check_endpoint(endpoint: str | None) -> None:
    if endpoint == "embed":  # A job server of Beam's own, in this process.
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
