"""The image of a worker, as far as it can be checked without building it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import ROOT

DOCKERFILE = ROOT / "docker" / "Dockerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text()


@pytest.mark.system
def test_the_dockerfile_has_no_fault_that_its_linter_finds() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")

    ran = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)

    assert (ran.returncode, ran.stdout) == (0, "")


def test_all_that_is_copied_is_there_and_not_ignored() -> None:
    copied = re.findall(r"^COPY ([^-].*) \S+$", DOCKERFILE.read_text(), re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"}

    assert names == allowed
    assert all((ROOT / name).exists() for name in names)


def test_its_beam_is_the_one_that_the_tests_run_with() -> None:
    (beam,) = re.findall(r"^ARG BEAM=(.+)$", DOCKERFILE.read_text(), re.MULTILINE)

    assert f"apache-beam=={beam}\n" in CONSTRAINTS


def test_its_extras_exist() -> None:
    (extras,) = re.findall(r"^ARG EXTRAS=(.+)$", DOCKERFILE.read_text(), re.MULTILINE)
    known = set(PROJECT["optional-dependencies"])

    assert set(extras.split(",")) <= known
