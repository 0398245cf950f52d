"""Runners and their options."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from inline_snapshot import snapshot

from reembed.pipeline.runners import check_runner, make_pipeline, parse_beam_options
from reembed.transforms.errors import RunError, UsageError
from tests.wording import wording


@pytest.mark.parametrize(
    ("runner", "flags", "says"),
    [
        (
            "FlinkRunner",
            [],
            snapshot(
                "FlinkRunner needs a job server: give --flink_job_server_jar after --, "
                "or use --runner PortableRunner -- --job_endpoint=HOST:PORT"
            ),
        ),
        (
            "PortableRunner",
            [],
            snapshot(
                "PortableRunner needs a job server: give --job_endpoint=HOST:PORT after "
                "--, not None"
            ),
        ),
        (
            "PortableRunner",
            ["--job_endpoint=nowhere"],
            snapshot(
                "PortableRunner needs a job server: give --job_endpoint=HOST:PORT after "
                "--, not 'nowhere'"
            ),
        ),
        (
            "PortableRunner",
            ["--job_endpoint=127.0.0.1:1"],
            snapshot(
                "no job server answers at 127.0.0.1:PORT ([Errno N] Connection refused); "
                "start it, or correct --job_endpoint"
            ),
        ),
    ],
)
def test_a_runner_without_its_job_server_is_refused(
    runner: str, flags: list[str], says: str, tmp_path: Path
) -> None:
    with pytest.raises((UsageError, RunError)) as refused:
        check_runner(runner, parse_beam_options(runner, flags))
    said = re.sub(r"Errno \d+", "Errno N", wording(refused, tmp_path))
    assert said == says


GOOGLE = ["--project=p", "--region=r", "--temp_location=gs://b/t"]
PACKED = [*GOOGLE, "--setup_file=./setup.py"]


@pytest.mark.parametrize(
    ("flags", "workdir", "says"),
    [
        (
            [],
            "gs://b/w",
            snapshot(
                "DataflowRunner needs --project, --region, --temp_location; give them after --"
            ),
        ),
        (
            GOOGLE[:1],
            "gs://b/w",
            snapshot("DataflowRunner needs --region, --temp_location; give them after --"),
        ),
        (
            PACKED,
            None,
            snapshot(
                "Dataflow's workers can't reach a file of this machine: name a place "
                "that they can write with --workdir gs://BUCKET/PATH"
            ),
        ),
        (
            PACKED,
            "/a/path",
            snapshot(
                "Dataflow's workers can't reach a file of this machine: name a place "
                "that they can write with --workdir gs://BUCKET/PATH"
            ),
        ),
        (
            GOOGLE,
            "gs://b/w",
            snapshot(
                "Dataflow's workers need reembed itself: give --setup_file=./setup.py "
                "from its checkout, or --sdk_container_image=IMAGE that has it, after --"
            ),
        ),
        (
            PACKED,
            "gs://b/w",
            snapshot(
                "no credentials for Google Cloud were found here: log in with gcloud "
                "auth application-default login, or name a service account's file in "
                "GOOGLE_APPLICATION_CREDENTIALS"
            ),
        ),
    ],
)
def test_what_dataflow_would_miss_is_told_in_one_sentence(
    flags: list[str],
    workdir: str | None,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for name, value in (("HOME", str(tmp_path)), ("NO_GCE_CHECK", "true")):
        monkeypatch.setenv(name, value)

    with pytest.raises((UsageError, RunError)) as refused:
        check_runner("DataflowRunner", parse_beam_options("DataflowRunner", flags), workdir=workdir)
    assert wording(refused, tmp_path) == says


def test_dataflow_without_googles_packages_says_which_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(UsageError) as refused:
        check_runner(
            "DataflowRunner", parse_beam_options("DataflowRunner", PACKED), workdir="gs://"
        )
    assert str(refused.value) == snapshot(
        "DataflowRunner needs Google's packages, which are not installed: pip install "
        "'.[gcp]' in the checkout of reembed"
    )


def test_options_that_do_not_go_together_are_told_in_one_sentence() -> None:
    flags = ["--environment_type=LOOPBACK", "--environment_options=external_service_address=a"]
    options = parse_beam_options("PortableRunner", flags)

    # Why they don't go together is said by Beam.
    with pytest.raises(UsageError, match=r"^PortableRunner refuses .* not compatible .* LOOPBACK"):
        make_pipeline("PortableRunner", options, job="j", one_process=True)


def test_a_pipeline_has_options_of_its_own_and_the_jobs_name_unless_another_is_given() -> None:
    options = parse_beam_options("DirectRunner", [])
    named = parse_beam_options("DirectRunner", ["--job_name=mine"])

    def name(given: PipelineOptions) -> object:
        pipeline = make_pipeline("DirectRunner", given, job="ours", one_process=True)
        return pipeline._options.get_all_options()["job_name"]

    assert (name(options), name(named)) == ("ours", "mine")
    assert options.get_all_options()["job_name"] is None


def test_a_job_server_that_answers_is_enough() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        flags = [f"--job_endpoint=127.0.0.1:{server.getsockname()[1]}"]
        options = parse_beam_options("PortableRunner", [*flags, "--environment_type=LOOPBACK"])
        check_runner("PortableRunner", options)


@pytest.mark.parametrize("environment", [[], ["--environment_type=DOCKER"]])
def test_workers_in_containers_need_a_work_directory(environment: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        flags = [f"--job_endpoint=127.0.0.1:{server.getsockname()[1]}", *environment]
        options = parse_beam_options("PortableRunner", flags)

        with pytest.raises(UsageError) as refused:
            check_runner("PortableRunner", options)
        assert str(refused.value) == snapshot(
            "PortableRunner's workers run in containers, which can't reach the database "
            "file: name a place that they can write with --workdir URI, or give "
            "--environment_type=LOOPBACK after -- for workers in this process"
        )
        check_runner("PortableRunner", options, workdir="/a")


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--nope=1", snapshot("Beam has no option --nope; correct what stands after --")),
        (
            "--direct_num_workers=x",
            snapshot(
                "Beam refuses its options after --: argument --direct_num_workers: "
                "invalid int value: 'x'"
            ),
        ),
        ("word", snapshot("Beam has no option word; correct what stands after --")),
    ],
)
def test_what_beam_does_not_know_is_refused(flag: str, says: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_beam_options("DirectRunner", [flag])
    assert str(refused.value) == says


def test_beams_own_options_reach_it() -> None:
    options = parse_beam_options("DirectRunner", ["--direct_runner_bundle_repeat=1"])

    assert options.get_all_options()["direct_runner_bundle_repeat"] == 1
