"""The functions of the package: what they give, raise and log, and what they leave alone."""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import os
import pickle
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from inline_snapshot import snapshot

import reembed
from reembed.pipeline import cli
from reembed.pipeline import run as running
from reembed.pipeline.options import Options
from reembed.transforms import embedders
from reembed.transforms.embedders.fake import POISON
from tests import fake_program
from tests.conftest import (
    ROOT,
    Call,
    change,
    clean_environment,
    jam,
    make_store,
    memory,
    plain_pass,
    select,
)
from tests.conftest import reembed as program  # noqa: F401 - a fixture
from tests.wording import wording

OURS = {"help", "version", "json", "dry_run"}
"""Flags of the command line that are no settings of a function."""


@pytest.fixture(autouse=True)
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Embed with the fake embedder, in an environment without ai-memory."""
    for name in os.environ.keys() - clean_environment(tmp_path).keys():
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for module, name in fake_program.PLACES:
        monkeypatch.setattr(module, name, getattr(module, name))
    fake_program.install()
    embedders._load.cache_clear()
    yield
    embedders._load.cache_clear()


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do what a pass does in a plain loop, without Beam."""
    monkeypatch.setattr(running, "_run_pass", plain_pass)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    rows = [memory(f"{at}", f"{POISON} 9" if at == 9 else None) for at in range(10)]
    return make_store(tmp_path / "m.db", rows)


# What they take.


def flags(parser: argparse.ArgumentParser) -> dict[str, Any]:
    return {one.dest: one.default for one in parser._actions if one.dest not in OURS}


@pytest.mark.parametrize("function", [reembed.plan, reembed.run])
def test_a_run_takes_what_the_flags_take(function: Any) -> None:
    parameters = dict(inspect.signature(function).parameters)
    parameters.pop("progress", None)
    settings = {name for name in parameters if name not in ("db", "beam_options")}

    assert settings == flags(cli._parser()).keys() - {"db"}
    assert reembed.RunSettings.__annotations__.keys() == parameters.keys() - {"db"}
    assert {one.name: one.default for one in fields(Options)}.items() >= {
        (name, one.default) for name, one in parameters.items() if name != "db"
    }


def test_the_defaults_are_those_of_the_command_line() -> None:
    assert cli.parse_options(["--db", "m.db"]) == Options(db="m.db")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_command_takes_what_its_flags_take(command: str) -> None:
    parameters = inspect.signature(getattr(reembed, command)).parameters
    taken = {name: one.default for name, one in parameters.items() if name != "db"}
    given = flags(cli._command_parser(command))

    assert taken == {name: value for name, value in given.items() if name != "db"}


@pytest.mark.parametrize("name", ["json", "dry_run", "modell"])
def test_a_name_that_is_no_setting_is_a_type_error(name: str, path: Path) -> None:
    more: Any = {name: True}
    with pytest.raises(TypeError, match=f"no setting {name}"):
        reembed.run(path, **more)


@pytest.mark.parametrize("db", [None, b"m.db", 3])
def test_a_database_is_a_text_or_a_path(db: Any) -> None:
    with pytest.raises(TypeError):
        reembed.plan(db)


def test_numbers_of_numpy_are_numbers(path: Path) -> None:
    settings: dict[str, Any] = {"max_rows": np.int64(3), "max_skipped": np.float32(0.5)}

    plan = reembed.plan(path, **settings)

    assert (type(plan.most_rows), plan.most_rows) == (int, 3)
    assert (type(plan.rules.most_skipped), plan.rules.most_skipped) == (float, 0.5)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("one_transaction", 1, "bool, not int"),
        ("missing_only", "false", "bool, not str"),
        ("max_skipped", True, "float | None, not bool"),
        ("max_rows", 2.5, "int | None, not float"),
        ("dim", True, "int | None, not bool"),
        ("batch", "7", "int, not str"),
        ("where", 0, "str | None, not int"),
        ("text", [7], "tuple[str, ...], not tuple"),
    ],
)
def test_a_value_of_another_type_is_a_type_error_that_names_the_setting(
    name: str, value: Any, kind: str, path: Path
) -> None:
    before = path.read_bytes()
    for function in (reembed.plan, reembed.run):
        with pytest.raises(TypeError) as refused:
            function(path, **{name: value})
        assert str(refused.value) == f"{name} must be {kind}"
    assert path.read_bytes() == before
    assert not path.with_name("m.db.reembed").exists()


def test_a_setting_that_can_not_be_used_is_a_usage_error(path: Path, tmp_path: Path) -> None:
    for more in ({"batch": -1}, {"partial": True}, {"runner": "NoRunner"}, {"table": ""}):
        settings: Any = more
        with pytest.raises(reembed.UsageError):
            reembed.run(path, **settings)
    with pytest.raises(reembed.UsageError) as unknown:
        reembed.plan(path, beam_options=["--frobnicate=1"])
    assert wording(unknown, tmp_path) == snapshot(
        "Beam has no option --frobnicate; correct what stands after --"
    )
    with pytest.raises(reembed.UsageError) as unsound:
        reembed.run(path, beam_options=["--direct_num_workers=many"])
    assert wording(unsound, tmp_path) == snapshot(
        "Beam refuses its options after --: argument --direct_num_workers: invalid int value: "
        "'many'"
    )
    with pytest.raises(reembed.UsageError) as empty:
        reembed.status("")
    assert wording(empty, tmp_path) == snapshot("--db is empty; give a value, or leave it out")


def test_no_other_database_takes_the_place_of_the_named_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_store(Path("ai-memory.db"), [memory("a")])
    monkeypatch.setenv("REEMBED_DEMO_STORE", str(tmp_path / "demo.db"))
    for function in (reembed.plan, reembed.run, reembed.status, reembed.rollback):
        with pytest.raises(reembed.StoreError) as refused:
            function(tmp_path / "missing.db")
        assert wording(refused, tmp_path) == snapshot(
            "there is no database at TMP/missing.db; name an existing one with --db"
        )

    assert not (tmp_path / "demo.db").exists()
    assert [one.name for one in Path().iterdir()] == ["ai-memory.db"]


def test_what_is_not_given_comes_from_ai_memorys_settings(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AI_MEMORY_EMBED_DIM", "16")

    assert reembed.plan(path).target.dimension == 16
    assert reembed.plan(path, dim=4).target.dimension == 4


def test_a_table_of_ones_own_takes_paths_and_one_column_or_several(tmp_path: Path) -> None:
    table = tmp_path / "t.db"
    change(table, "CREATE TABLE docs(id INTEGER PRIMARY KEY, a TEXT, b TEXT, v BLOB)")
    change(table, "INSERT INTO docs(a, b) VALUES ('x', 'y')")

    for text in ("a", ["a", "b"]):
        found = reembed.plan(table, table="docs", text=text, vector="v", run_dir=tmp_path / "runs")
        assert found.survey.rows == 1
        assert found.run.path.is_relative_to(tmp_path / "runs")


# What they give.


def timeless(values: Any) -> Any:
    """The values without what differs from call to call."""
    changing = {"run_id", "run_directory", "duration_ms", "rows_per_second", "settings", "started"}
    changing |= {"bytes", "freed_bytes"}  # Of paths, too.
    if isinstance(values, dict):
        return {name: timeless(one) for name, one in values.items() if name not in changing}
    return [timeless(one) for one in values] if isinstance(values, (list, tuple)) else values


def test_values_are_what_the_command_line_prints_as_json(
    program: Call,  # noqa: F811
    path: Path,
    tmp_path: Path,
) -> None:
    copy = tmp_path / "copy" / path.name
    copy.parent.mkdir()
    shutil.copy(path, copy)

    def same(values: dict[str, Any], *arguments: str, **more: Any) -> None:
        printed = program(*arguments, "--db", copy, "--json").values | more
        ours = json.dumps(timeless(values)).replace(str(tmp_path), str(copy.parent))
        theirs = json.dumps(timeless(printed))
        assert ours == theirs.replace(f"{copy.parent}/copy", str(copy.parent))

    same(reembed.plan(path).values, "--dry-run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "_run_pass", plain_pass)
        same(dict(reembed.run(path).values))
    same(reembed.verify(path).values, "verify")
    same(reembed.rollback(path).values, "rollback")
    same(reembed.status(path).values, "status")
    same(reembed.cleanup(path).values | {"removed": 1}, "cleanup", removed=1)


@pytest.mark.usefixtures("plain")
def test_results_are_frozen_values_with_names(path: Path) -> None:
    outcome = reembed.run(path)
    [row] = outcome.skipped_rows
    assert (outcome.summary.replaced, row.key, outcome.values["reembedded"]) == (9, "9", 9)

    verified, found = reembed.verify(path), reembed.status(path)
    assert (verified.checked, verified.findings, verified.sampled) == (9, 0, 9)
    assert [(run.state, run.rows, run.skipped) for run in found.runs] == [("replaced", 10, 1)]
    undone = reembed.rollback(path, run=found.runs[0].run_id)
    assert (undone.restored, undone.left, undone.state) == (9, 0, "rolled back")
    cleaned = reembed.cleanup(path, yes=True)
    assert cleaned.removed == (undone.run_id,)
    for value in (outcome, verified, found, found.runs[0], undone, cleaned):
        with pytest.raises(FrozenInstanceError):
            value.run_id = "other"  # type: ignore[union-attr, misc]


# What they raise.


@pytest.mark.usefixtures("plain")
def test_a_run_with_rows_that_remain_raises_and_carries_its_outcome(
    path: Path, tmp_path: Path
) -> None:
    with pytest.raises(reembed.IncompleteError) as raised:
        reembed.run(path, max_rows=4, partial=True)
    assert wording(raised, tmp_path) == snapshot(
        "6 rows remain, so the replacement is incomplete; run again to finish it, or undo it with "
        "reembed rollback"
    )
    assert raised.value.result.summary.replaced == 4
    assert raised.value.exit_code == 6

    with pytest.raises(reembed.IncompleteError) as planned:
        reembed.plan(path)
    assert wording(planned, tmp_path) == snapshot(
        "run RUN (to all-MiniLM-L6-v2 (8-dim)) has replaced vectors but not come to its end: rows "
        "may be left that were added or edited meanwhile, or left for later; run again to finish "
        "it, or undo it with reembed rollback"
    )
    assert planned.value.result.values["total_rows"] == 10
    with pytest.raises(reembed.IncompleteError) as found:
        reembed.status(path)
    assert [run.state for run in found.value.result.runs] == ["replacing"]
    with pytest.raises(reembed.IncompleteError) as verified:
        reembed.verify(path)
    assert verified.value.result.checked == 4
    # It survives what a process pool, or a queue of tasks, does with an exception.
    again = pickle.loads(pickle.dumps(verified.value))
    assert (str(again), again.result) == (str(verified.value), verified.value.result)

    assert reembed.run(path).summary.replaced == 9


@pytest.mark.usefixtures("plain")
def test_what_ends_a_run_is_one_of_the_tree(path: Path) -> None:
    with pytest.raises(reembed.TooManySkippedError):
        reembed.run(path, max_skipped=0)
    jam(path, "5")
    with pytest.raises(reembed.ReembedError) as failed:
        reembed.run(path)
    assert failed.value.result is None


@pytest.mark.usefixtures("plain")
def test_findings_and_rows_in_the_way_are_errors_with_the_value(path: Path) -> None:
    reembed.run(path)
    change(path, "UPDATE memories SET embedding = zeroblob(33) WHERE id < '3'")

    with pytest.raises(reembed.VerifyError) as found:
        reembed.verify(path)
    assert (found.value.result.findings, set(found.value.result.wrong)) == (
        6,
        {"overwritten", "undecodable"},
    )

    change(path, "UPDATE memories SET embedding = zeroblob(33)")
    with pytest.raises(reembed.StoreError) as left:
        reembed.rollback(path)
    assert (left.value.result.left, left.value.result.restored) == (9, 0)


def test_every_error_is_public() -> None:
    kinds = {kind.__name__ for kind in reembed.ReembedError.__subclasses__()}
    ours = {name for name in kinds if not name.startswith("_")}

    assert ours <= set(reembed.__all__)
    assert all(hasattr(reembed, name) for name in reembed.__all__)
    assert set(reembed.__all__) <= set(dir(reembed))
    with pytest.raises(AttributeError):
        reembed.nothing  # type: ignore[attr-defined]  # noqa: B018


# What they tell.


@pytest.mark.usefixtures("plain")
def test_skipped_rows_and_notes_are_logged_and_nothing_is_printed(
    path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    change(path, "UPDATE memories SET embedding = x'01000000000000803f', embedding_dim = 2")
    caplog.set_level(logging.INFO, "reembed")
    outcome = reembed.run(path)

    assert capfd.readouterr() == ("", "")
    said = [one.getMessage() for one in caplog.records if one.name == "reembed"]
    warned = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    run_id = outcome.values["run_id"]
    [note] = outcome.notes
    assert note.startswith("stored vectors of dimension 2 can't be compared")
    assert warned == [
        f"[{run_id}] {note}",
        f"[{run_id}] skipped row 9: the text holds {POISON} (previous vector kept)",
    ]
    assert any("PRE-FLIGHT" in line for line in said)


@pytest.mark.usefixtures("plain")
def test_progress_is_told_by_a_thread_of_its_own(path: Path) -> None:
    told: list[tuple[str, reembed.Progress]] = []
    reembed.run(path, progress=lambda now: told.append((threading.current_thread().name, now)))

    thread, last = told[-1]
    assert (thread, last.rows_done, last.rows) == ("reembed-progress", 10, 10)
    assert last.seconds >= 0
    assert "reembed-progress" not in [one.name for one in threading.enumerate()]


@pytest.mark.usefixtures("plain")
def test_progress_that_fails_does_not_disturb_the_run(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[reembed.Progress] = []

    def fail(now: reembed.Progress) -> None:
        calls.append(now)
        raise ValueError("no more")

    assert reembed.run(path, progress=fail).summary.replaced == 9
    assert len(calls) == 1
    [record] = [one for one in caplog.records if "progress raised" in one.getMessage()]
    assert record.exc_info is not None


# Where they may be called.


def in_threads(*calls: Any) -> list[Any]:
    with ThreadPoolExecutor(len(calls)) as pool:
        started = [pool.submit(call) for call in calls]
        return [one.result() for one in started]


@pytest.mark.system
def test_a_run_through_beam_works_in_another_thread(path: Path) -> None:
    [outcome] = in_threads(lambda: reembed.run(path))

    assert (outcome.summary.replaced, len(outcome.skipped_rows)) == (9, 1)
    [verified] = in_threads(lambda: reembed.verify(path))
    assert verified.checked == 9
    [undone] = in_threads(lambda: reembed.rollback(path))
    assert undone.restored == 9


@pytest.mark.system
def test_two_runs_at_once_on_two_databases_do_not_disturb_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SECONDS", "0.05")
    stores = [
        make_store(tmp_path / f"{name}.db", [memory(f"{name}{at}") for at in range(200)])
        for name in ("one", "two")
    ]
    together = threading.Barrier(2)

    def move(path: Path, dim: int) -> reembed.Outcome:
        together.wait()
        return reembed.run(path, dim=dim, batch=10)

    one, two = in_threads(lambda: move(stores[0], 8), lambda: move(stores[1], 16))

    assert (one.summary.replaced, one.values["dim"]) == (200, 8)
    assert (two.summary.replaced, two.values["dim"]) == (200, 16)
    for path in stores:
        assert reembed.verify(path).checked == 200
    assert one.values["run_directory"].startswith(f"{stores[0]}.reembed")
    assert two.values["run_directory"].startswith(f"{stores[1]}.reembed")


def test_a_second_run_on_the_same_database_is_refused_in_the_same_process(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, leave = threading.Event(), threading.Event()

    def held(*arguments: Any) -> Any:
        inside.set()
        assert leave.wait(60)
        return plain_pass(*arguments)

    monkeypatch.setattr(running, "_run_pass", held)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(reembed.run, path)
        assert inside.wait(60)
        try:
            # The rest names the process and the second.
            with pytest.raises(
                reembed.StagingError, match=r"^another run is at work on .*\(process"
            ):
                reembed.run(path)
            assert reembed.status(path).at_work is not None
        finally:
            leave.set()
        assert first.result().summary.replaced == 9


def test_flinks_job_server_is_not_started_outside_the_main_thread(
    path: Path, tmp_path: Path
) -> None:
    with pytest.raises(reembed.UsageError) as refused:
        in_threads(lambda: reembed.run(path, runner="FlinkRunner"))
    assert wording(refused, tmp_path) == snapshot(
        "FlinkRunner starts a job server, which it can only do in the main thread; call it there, "
        "or use PortableRunner with a job server of your own"
    )


# What they leave alone.


@pytest.mark.system
def test_locks_of_the_calling_program_on_the_database_stay(path: Path) -> None:
    trying = "import sqlite3, sys; sqlite3.connect(sys.argv[1], 0.1).execute('BEGIN IMMEDIATE')"
    other = [sys.executable, "-c", trying, str(path)]
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        for _ in range(2):
            assert reembed.plan(path).survey.rows == 10
        failed = subprocess.run(other, capture_output=True, text=True, check=False)
        assert "database is locked" in failed.stderr
        connection.execute("ROLLBACK")
    subprocess.run(other, check=True)


@pytest.mark.usefixtures("plain")
def test_the_environment_and_the_settings_of_logging_stay(path: Path) -> None:
    logger = logging.getLogger("reembed")

    def state() -> Any:
        return (
            dict(os.environ),
            [*logging.getLogger().handlers],
            logging.getLogger().level,
            (logger.level, logger.propagate, [*logger.handlers], logging.getLevelName(30)),
            sys.excepthook,
            threading.excepthook,
            Path.cwd(),
        )

    before = state()
    reembed.plan(path)
    reembed.run(path)
    reembed.rollback(path)
    assert state() == before


# The examples.

DOCUMENT = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
EXAMPLES = {
    section.partition("\n")[0]: re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    for section in DOCUMENT.split("\n## ")[1:]
}


def stand_in_for_airflow(patch: pytest.MonkeyPatch, results: list[Any]) -> None:
    """Put modules in the place of Airflow's, whose tasks are called as they are made."""

    def task(**_: Any) -> Any:
        return lambda function: lambda *given: results.append(function(*given))

    def dag(**_: Any) -> Any:
        return lambda function: function

    sdk, exceptions = ModuleType("airflow.sdk"), ModuleType("airflow.exceptions")
    vars(sdk).update(task=task, dag=dag)
    vars(exceptions).update(AirflowFailException=RuntimeError)
    for module in (ModuleType("airflow"), sdk, exceptions):
        patch.setitem(sys.modules, module.__name__, module)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    "section", ["A script", "A notebook", "An Airflow task", "A cron task"], ids=str
)
def test_the_examples_work(section: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(Path("ai-memory.db"), [memory(f"{at}") for at in range(3)])
    results: list[Any] = []
    stand_in_for_airflow(monkeypatch, results)
    names: dict[str, Any] = {"__name__": "__main__"}

    assert EXAMPLES[section]
    for block in EXAMPLES[section]:
        exec(compile(block, section, "exec"), names)

    new = 0 if section == "A notebook" else 3
    assert select(store, "SELECT count(embedding) FROM memories") == [(new,)]
    if section == "An Airflow task":
        assert [json.loads(json.dumps(values))["reembedded"] for values in results] == [3]


def test_all_examples_are_in_the_sections_that_are_run() -> None:
    assert sum(map(len, EXAMPLES.values())) == DOCUMENT.count("```python") == 8


def test_the_document_names_all_that_is_public() -> None:
    missing = {name for name in reembed.__all__ if f"`{name}" not in DOCUMENT}
    assert missing == {"__version__"}
    for name, code in re.findall(r"^\| `(\w+Error)` \| (\d) \|", DOCUMENT, re.MULTILINE):
        assert getattr(reembed, name).exit_code == int(code), name


@pytest.mark.parametrize("name", ["plan", "run", *cli.COMMANDS])
def test_each_function_says_what_it_raises(name: str) -> None:
    assert "\nRaises " in (inspect.getdoc(getattr(reembed, name)) or "")
