"""Runners and their options: what Beam would do with them that nobody wants is refused."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import socket
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import apache_beam as beam
from apache_beam.options.pipeline_options import DebugOptions, GoogleCloudOptions, PipelineOptions
from apache_beam.runners.direct.direct_runner import BundleBasedDirectRunner
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from apache_beam.runners.runner import PipelineRunner

from reembed.transforms.errors import RunError, UsageError
from reembed.transforms.hiding import shown, shown_complaint, shown_flags

_CONNECT_SECONDS = 10.0

_DATAFLOW_NEEDS = ("project", "region", "temp_location")

_ONE_PROCESS = "no_use_multiple_sdk_containers"


def make_pipeline(
    runner: str, options: PipelineOptions, *, job: str, one_process: bool
) -> beam.Pipeline:
    """Make an empty pipeline with options of its own, since runners write into them.

    `job` is its name on a cluster's own page, unless --job_name gives another. With
    `one_process` each of Dataflow's machines gets one process for all its processors, which
    loads the model once, unless an experiment after -- says otherwise.

    Raises UsageError for options that the runner refuses.
    """
    own = copy.deepcopy(options)
    cloud, debug = own.view_as(GoogleCloudOptions), own.view_as(DebugOptions)
    cloud.job_name = cloud.job_name or job
    said = any("use_multiple_sdk_containers" in given for given in debug.experiments or ())
    if one_process and runner == "DataflowRunner" and not said:
        debug.add_experiment(_ONE_PROCESS)
    try:
        return beam.Pipeline(runner=_make_runner(runner), options=own)
    except ValueError as error:
        raise UsageError(f"{runner} refuses its options after --: {shown(error)}") from None


def _make_runner(name: str) -> PipelineRunner | str:
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
    if runner == "DataflowRunner":
        _check_dataflow(given, workdir)
    containers = given["environment_type"] in (None, "DOCKER") and given["job_endpoint"] != "embed"
    if runner in ("FlinkRunner", "PortableRunner") and containers and workdir is None:
        raise UsageError(
            f"{runner}'s workers run in containers, which can't reach the database file: name a "
            "place that they can write with --workdir URI, or give --environment_type=LOOPBACK "
            "after -- for workers in this process"
        )


def _check_dataflow(given: Mapping[str, Any], workdir: str | None) -> None:
    """Refuse what would fail only when Google's machines have started, or not at all."""
    try:
        found = importlib.util.find_spec("google.cloud.dataflow")
    except ImportError:
        found = None
    if found is None:
        raise UsageError(
            "DataflowRunner needs Google's packages, which are not installed: pip install "
            "'.[gcp]' in the checkout of reembed"
        )
    missing = [f"--{name}" for name in _DATAFLOW_NEEDS if not given[name]]
    if missing:
        raise UsageError(f"DataflowRunner needs {', '.join(missing)}; give them after --")
    if workdir is None or "://" not in workdir:
        raise UsageError(
            "Dataflow's workers can't reach a file of this machine: name a place that they can "
            "write with --workdir gs://BUCKET/PATH"
        )
    if not given["setup_file"] and not given["sdk_container_image"]:
        raise UsageError(
            "Dataflow's workers need reembed itself: give --setup_file=./setup.py from its "
            "checkout, or --sdk_container_image=IMAGE that has it, after --"
        )
    if not given["no_auth"]:
        _check_credentials()


def _check_credentials() -> None:
    """Raise RunError if nobody is logged in; Beam would try for a minute, then go on as nobody."""
    import google.auth
    from google.auth.exceptions import GoogleAuthError

    try:
        google.auth.default()
    except GoogleAuthError:
        raise RunError(
            "no credentials for Google Cloud were found here: log in with gcloud auth "
            "application-default login, or name a service account's file in "
            "GOOGLE_APPLICATION_CREDENTIALS"
        ) from None


def _check_endpoint(endpoint: str | None) -> None:
    if endpoint == "embed":  # A job server of Beam's own, in this process.
        return
    host, _, port = (endpoint or "").rpartition(":")
    if not port.isdigit():
        raise UsageError(
            f"PortableRunner needs a job server: give --job_endpoint=HOST:PORT after --, not "
            f"{shown(repr(endpoint))}"
        )
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise RunError(
            f"no job server answers at {shown(endpoint)} ({shown(error)}); start it, or correct "
            "--job_endpoint"
        ) from None


def _refuse(complaint: str) -> NoReturn:
    raise UsageError(f"Beam refuses its options after --: {shown_complaint(complaint)}")


def parse_beam_options(runner: str, flags: Sequence[str]) -> PipelineOptions:
    """Parse Beam's own options; what Beam would drop with a warning is refused.

    Raises UsageError for an option that Beam doesn't know, or a value that it refuses.
    """
    for flag in flags:
        if flag.partition("=")[0] in ("--runner", "--help", "-h"):
            raise UsageError(f"{flag.partition('=')[0]} is not for Beam; give it before the --")
    refused: list[str] = []

    def check(parser: argparse.ArgumentParser) -> None:
        # It would print the complaint, and end the process.
        parser.error = _refuse  # type: ignore[assignment, method-assign]
        refused.extend(parser.parse_known_args(list(flags))[1])

    options = PipelineOptions(list(flags), runner=runner)
    PipelineOptions(list(flags)).get_all_options(add_extra_args_fn=check)
    if refused:
        raise UsageError(f"Beam has no option {shown_flags(refused)}; correct what stands after --")
    return options
