"""Runners and their options."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from apache_beam.options.pipeline_options import PipelineOptions

from reembed.pipeline.runners import check_runner, make_pipeline, parse_beam_options
from reembed.transforms.errors import RunError, UsageError


@pytest.mark.parametrize(
    ("runner", "flags", "says"),
    [
        ("FlinkRunner", [], "FlinkRunner needs a job server"),
        ("PortableRunner", [], "PortableRunner needs a job server"),
        ("PortableRunner", ["--job_endpoint=nowhere"], "not 'nowhere'"),
        ("PortableRunner", ["--job_endpoint=127.0.0.1:1"], "no job server answers at 127.0.0.1:1"),
    ],
)
def test_a_runner_without_its_job_server_is_refused(
    runner: str, flags: list[str], says: str
) -> None:
    with pytest.raises((UsageError, RunError), match=says):
        check_runner(runner, parse_beam_options(runner, flags))


GOOGLE = ["--project=p", "--region=r", "--temp_location=gs://b/t"]
PACKED = [*GOOGLE, "--setup_file=./setup.py"]


@pytest.mark.parametrize(
    ("flags", "workdir", "says"),
    [
        ([], "gs://b/w", r"needs --project, --region, --temp_location; give them after --$"),
        (GOOGLE[:1], "gs://b/w", r"needs --region, --temp_location; give them after --$"),
        (PACKED, None, r"can't reach a file of this machine: .* --workdir gs://BUCKET/PATH$"),
        (PACKED, "/a/path", r"can't reach a file of this machine: .* --workdir gs://BUCKET/PATH$"),
        (GOOGLE, "gs://b/w", r"workers need reembed itself: give --setup_file=./setup.py"),
        (PACKED, "gs://b/w", r"^no credentials for Google Cloud were found here: log in with"),
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

    with pytest.raises((UsageError, RunError), match=says):
        check_runner("DataflowRunner", parse_beam_options("DataflowRunner", flags), workdir=workdir)


def test_dataflow_without_googles_packages_says_which_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(UsageError, match=r"not installed: pip install '.\[gcp\]' in the checkout"):
        check_runner(
            "DataflowRunner", parse_beam_options("DataflowRunner", PACKED), workdir="gs://"
        )


def test_options_that_do_not_go_together_are_told_in_one_sentence() -> None:
    flags = ["--environment_type=LOOPBACK", "--environment_options=external_service_address=a"]
    options = parse_beam_options("PortableRunner", flags)

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

        with pytest.raises(UsageError, match=r"can't reach the database file: .* --workdir URI"):
            check_runner("PortableRunner", options)
        check_runner("PortableRunner", options, workdir="/a")


@pytest.mark.parametrize("flags", [["--nope=1"], ["--direct_num_workers=x"], ["word"]])
def test_what_beam_does_not_know_is_refused(flags: list[str]) -> None:
    with pytest.raises(UsageError, match="Beam"):
        parse_beam_options("DirectRunner", flags)


def test_beams_own_options_reach_it() -> None:
    options = parse_beam_options("DirectRunner", ["--direct_runner_bundle_repeat=1"])

    assert options.get_all_options()["direct_runner_bundle_repeat"] == 1
