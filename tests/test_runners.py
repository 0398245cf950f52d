"""Runners and their options."""

from __future__ import annotations

import socket

import pytest

from pipeline.runners import check_runner, parse_beam_options
from transforms.errors import RunError, UsageError


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
