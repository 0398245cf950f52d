"""The command line as one value, refused on construction if unsound."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest
from inline_snapshot import snapshot

from reembed.pipeline.options import RUNNERS, CommandOptions, Options
from reembed.transforms.errors import UsageError
from reembed.transforms.modes import Mode


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
        "run_dir": None,
        "workdir": None,
        "fresh": False,
        "missing_only": False,
        "skip_current_space": False,
        "stamp_only": False,
        "retry_skipped": False,
        "max_rows": None,
        "partial": False,
        "no_hidden": False,
        "sleep_ms": 0,
        "max_skipped": None,
        "skipped": None,
        "one_transaction": False,
        "base_url": None,
        "document_prefix": None,
        "in_flight": None,
        "give_up_after": 600.0,
        "timeout": 120.0,
        "max_tokens": None,
        "price_per_million": None,
        "insecure_key": False,
        "device": None,
        "precision": "float32",
        "key_secret": None,
        "store": None,
        "config": None,
        "table": None,
        "key": (),
        "text": (),
        "vector": None,
        "text_table": None,
        "text_key": None,
        "dim_column": None,
        "space_column": None,
        "namespace_column": None,
        "where": None,
        "format": None,
        "space": None,
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
        {"dim": 1_000_000},
        {"dry_run": True, "json": True},
        {"run_dir": "/elsewhere"},
        {"max_rows": 1},
        {"max_rows": 1, "partial": True},
        {"max_rows": 9, "missing_only": True, "fresh": True},
        {"sleep_ms": 0},
        {"sleep_ms": 60_000},
        {"max_skipped": 0},
        {"max_skipped": 1},
        {"skipped": "clear", "one_transaction": True},
        {"base_url": "http://127.0.0.1:9/v1", "insecure_key": True},
        {"document_prefix": ""},  # None at all, also where the model has one of its own.
        {"document_prefix": "passage: "},
        {"in_flight": 1},
        {"in_flight": 32},
        {"give_up_after": 0.1, "timeout": 86_400.0},
        {"max_tokens": 1},
        {"price_per_million": 0.0},
        {"price_per_million": 0.02},
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
        ({"db": ""}, snapshot("--db is empty; give a value, or leave it out")),
        ({"namespace": ""}, snapshot("--namespace is empty; give a value, or leave it out")),
        ({"model": ""}, snapshot("--model is empty; give a value, or leave it out")),
        pytest.param(
            {"backend": ""},
            snapshot("--backend is empty; give a value, or leave it out"),
        ),
        ({"batch": -1}, snapshot("--batch must be from 0 (use the settings) to 10000: -1")),
        ({"batch": 10_001}, snapshot("--batch must be from 0 (use the settings) to 10000: 10001")),
        ({"dim": 0}, snapshot("--dim must be from 1 to 1000000: 0")),
        ({"dim": -384}, snapshot("--dim must be from 1 to 1000000: -384")),
        ({"dim": 20_000_000_000}, snapshot("--dim must be from 1 to 1000000: 20000000000")),
        (
            {"runner": "SparkRunner"},
            snapshot(
                "--runner SparkRunner is not one of DirectRunner, BundleBasedDirectRunner, "
                "DataflowRunner, FlinkRunner, FnApiRunner, PortableRunner; others were not tried"
            ),
        ),
        (
            {"runner": "directrunner"},
            snapshot(
                "--runner directrunner is not one of DirectRunner, BundleBasedDirectRunner, "
                "DataflowRunner, FlinkRunner, FnApiRunner, PortableRunner; others were not tried"
            ),
        ),
        (
            {"runner": ""},
            snapshot(
                "--runner  is not one of DirectRunner, BundleBasedDirectRunner, DataflowRunner, "
                "FlinkRunner, FnApiRunner, PortableRunner; others were not tried"
            ),
        ),
        ({"run_dir": ""}, snapshot("--run-dir is empty; give a value, or leave it out")),
        ({"workdir": ""}, snapshot("--workdir is empty; give a value, or leave it out")),
        (
            {"workdir": "/a", "stamp_only": True},
            snapshot("--workdir does not go with --stamp-only, which runs on this machine"),
        ),
        (
            {"missing_only": True, "stamp_only": True},
            snapshot("--missing-only and --stamp-only exclude each other; give one of them"),
        ),
        (
            {"skip_current_space": True, "missing_only": True, "retry_skipped": True},
            snapshot(
                "--missing-only and --skip-current-space and --retry-skipped exclude each other; "
                "give one of them"
            ),
        ),
        ({"max_rows": 0}, snapshot("--max-rows must be a positive number of rows: 0")),
        ({"max_rows": -1}, snapshot("--max-rows must be a positive number of rows: -1")),
        (
            {"partial": True},
            snapshot("--partial goes with --max-rows, which says how many rows to take"),
        ),
        (
            {"stamp_only": True, "max_rows": 9},
            snapshot("--max-rows does not go with --stamp-only, which embeds only a sample"),
        ),
        (
            {"fresh": True, "retry_skipped": True},
            snapshot("--fresh and --retry-skipped exclude each other; give one of them"),
        ),
        ({"sleep_ms": -1}, snapshot("--sleep-ms must be 0 or more milliseconds: -1")),
        (
            {"max_skipped": -0.1},
            snapshot("--max-skipped must be a share from 0 to 1, or from 0% to 100%: -0.1"),
        ),
        (
            {"max_skipped": 1.01},
            snapshot("--max-skipped must be a share from 0 to 1, or from 0% to 100%: 1.01"),
        ),
        (
            {"max_skipped": float("nan")},
            snapshot("--max-skipped must be a share from 0 to 1, or from 0% to 100%: nan"),
        ),
        ({"skipped": "drop"}, snapshot("--skipped must be one of keep, clear: 'drop'")),
        ({"skipped": ""}, snapshot("--skipped must be one of keep, clear: ''")),
        ({"base_url": ""}, snapshot("--base-url is empty; give a value, or leave it out")),
        (
            {"base_url": "http://\udce9"},
            snapshot("--base-url holds bytes that are no text; give them as UTF-8"),
        ),
        (
            {"document_prefix": "\udce9"},
            snapshot("--document-prefix holds bytes that are no text; give them as UTF-8"),
        ),
        ({"in_flight": 0}, snapshot("--in-flight must be from 1 to 32 requests: 0")),
        ({"in_flight": 33}, snapshot("--in-flight must be from 1 to 32 requests: 33")),
        ({"give_up_after": 0.0}, snapshot("--give-up-after must be a time of up to 30 days: 0.0")),
        (
            {"give_up_after": math.inf},
            snapshot("--give-up-after must be a time of up to 30 days: inf"),
        ),
        ({"timeout": -1.0}, snapshot("--timeout must be a time of up to 30 days: -1.0")),
        ({"timeout": math.nan}, snapshot("--timeout must be a time of up to 30 days: nan")),
        ({"max_tokens": 0}, snapshot("--max-tokens must be a positive number: 0")),
        ({"price_per_million": -0.01}, snapshot("--price-per-million must be 0 or more: -0.01")),
        ({"price_per_million": math.inf}, snapshot("--price-per-million must be 0 or more: inf")),
        ({"price_per_million": math.nan}, snapshot("--price-per-million must be 0 or more: nan")),
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


@pytest.mark.parametrize("name", ["db", "namespace", "model", "backend", "run_dir", "base_url"])
def test_every_flag_that_takes_a_name_refuses_an_empty_one(name: str) -> None:
    given: dict[str, Any] = {name: ""}

    with pytest.raises(UsageError) as refused:
        Options(**given)
    said = str(refused.value).replace(name.replace("_", "-"), "NAME")
    assert said == snapshot("--NAME is empty; give a value, or leave it out")


@pytest.mark.parametrize(
    ("given", "mode"),
    [
        ({}, Mode.ALL),
        ({"missing_only": True}, Mode.MISSING_ONLY),
        ({"skip_current_space": True}, Mode.SKIP_CURRENT_SPACE),
        ({"stamp_only": True}, Mode.STAMP_ONLY),
        ({"retry_skipped": True}, Mode.RETRY_SKIPPED),
        ({"max_rows": 3, "partial": True, "fresh": True, "skipped": "clear"}, Mode.ALL),
    ],
    ids=str,
)
def test_the_flags_say_which_rows_are_meant(given: Mapping[str, Any], mode: Mode) -> None:
    assert Options(**given).mode is mode


def test_the_options_of_a_command_are_sound_without_any_flag() -> None:
    options = CommandOptions("status")

    assert {field.name: getattr(options, field.name) for field in fields(CommandOptions)} == {
        "command": "status",
        "db": None,
        "run_dir": None,
        "run": None,
        "yes": False,
        "json": False,
        "model": None,
        "backend": None,
        "base_url": None,
        "key_secret": None,
        "insecure_key": False,
    }


@pytest.mark.parametrize(
    "name", ["db", "run_dir", "run", "model", "backend", "base_url", "key_secret"]
)
def test_a_command_refuses_an_empty_name(name: str) -> None:
    given: dict[str, Any] = {name: ""}

    with pytest.raises(UsageError) as refused:
        CommandOptions("verify", **given)

    said = str(refused.value).replace(name.replace("_", "-"), "NAME")
    assert said == snapshot("--NAME is empty; give a value, or leave it out")
