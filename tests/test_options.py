"""The command line as one value, refused on construction if unsound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from pipeline.options import RUNNERS, Options
from transforms.errors import UsageError

BATCH = "--batch must be from 0 (use the settings) to 10000: {}"
DIM = "--dim must be a positive number of floats: {}"
RUNNER = (
    "--runner {} is not one of DirectRunner, BundleBasedDirectRunner, FlinkRunner, FnApiRunner, "
    "PortableRunner; runners whose workers can't reach the database file are not supported yet"
)


def test_no_flag_at_all_is_sound_and_leaves_everything_to_the_settings() -> None:
    assert {field.name: getattr(Options(), field.name) for field in fields(Options)} == {
        "db": None,
        "namespace": None,
        "dry_run": False,
        "batch": 0,
        "json": False,
        "model": None,
        "backend": None,
        "dim": None,
        "runner": "DirectRunner",
        "beam_options": (),
    }


@pytest.mark.parametrize(
    "given",
    [
        {"db": "ai-memory.db"},
        {"namespace": " "},  # A namespace is compared exactly, so a space may be one.
        {"model": "BAAI/bge-m3"},
        {"backend": "local"},
        {"batch": 0},
        {"batch": 1},
        {"batch": 10_000},
        {"dim": 1},
        {"dim": 4096},
        {"dry_run": True, "json": True},
        {"beam_options": ("--parallelism=4",)},
        *({"runner": runner} for runner in RUNNERS),
    ],
    ids=str,
)
def test_a_sound_value_is_kept_as_it_was_given(given: Mapping[str, Any]) -> None:
    options = Options(**given)

    assert {name: getattr(options, name) for name in given} == given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"db": ""}, "--db is empty; give a value, or leave it out"),
        ({"namespace": ""}, "--namespace is empty; give a value, or leave it out"),
        ({"model": ""}, "--model is empty; give a value, or leave it out"),
        pytest.param(
            {"backend": ""},
            "--backend is empty; give a value, or leave it out",
        ),
        ({"batch": -1}, BATCH.format(-1)),
        ({"batch": 10_001}, BATCH.format(10_001)),
        ({"dim": 0}, DIM.format(0)),
        ({"dim": -384}, DIM.format(-384)),
        ({"runner": "DataflowRunner"}, RUNNER.format("DataflowRunner")),
        ({"runner": "directrunner"}, RUNNER.format("directrunner")),
        ({"runner": ""}, RUNNER.format("")),
    ],
    ids=str,
)
def test_an_unsound_value_is_refused_with_the_flag_and_the_value(
    given: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as refused:
        Options(**given)

    assert str(refused.value) == message
    assert refused.value.exit_code == 2


def test_options_are_a_value() -> None:
    options = Options(db="a.db", beam_options=("--parallelism=4",))

    assert options == Options(db="a.db", beam_options=("--parallelism=4",))
    assert len({options, Options(db="a.db", beam_options=("--parallelism=4",))}) == 1
    with pytest.raises(FrozenInstanceError):
        options.db = "b.db"  # type: ignore[misc]
