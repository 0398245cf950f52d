"""The plan."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.options import Options
from pipeline.plan import Plan, make_plan, range_rows
from pipeline.settings import read_settings
from tests.conftest import clean_environment, files, make_store, memory
from transforms.embedders import Target
from transforms.errors import EmbedderError, StoreError
from transforms.rows import KeyRange


def plan_for(path: Path, options: Options | None = None) -> Plan:
    settings = read_settings(options or Options(), {"HOME": str(path.parent)}, path.parent)
    return make_plan(path, settings, namespace=options.namespace if options else None)


@given(st.integers(0, 10_000_000))
def test_a_range_has_64_to_512_rows(rows: int) -> None:
    assert 64 <= range_rows(rows) <= 512


@given(st.integers(0, 10_000_000))
def test_a_larger_store_never_has_smaller_ranges(rows: int) -> None:
    assert range_rows(rows) <= range_rows(rows + 1)


def test_a_plan_says_what_is_there_and_what_it_becomes(tmp_path: Path) -> None:
    rows = [
        memory(f"{i:04d}", "two words " * (i + 1), title="t", namespace=f"n{i}") for i in range(200)
    ]
    path = make_store(tmp_path / "m.db", rows)
    before = files(tmp_path)

    plan = plan_for(path)

    assert plan.target == Target("local", "all-MiniLM-L6-v2", 384, "all-MiniLM-L6-v2")
    assert (plan.backend, plan.batch, plan.survey.rows) == ("ollama", 100, 200)
    assert plan.pending == plan.ranges
    assert plan.ranges[0] == KeyRange(0, None, "0063", 64)
    assert plan.ranges[-1] == KeyRange(3, "0191", None, 8)
    assert plan.run.path.parent == tmp_path / "m.db.reembed"
    assert plan.tokens is not None
    assert plan.tokens.window == 256
    assert plan.tokens.sampled_rows == 200
    # The title, two special tokens and two for each two words; 256 at the most.
    counts = [3 + 2 * (i + 1) for i in range(200)]
    assert plan.tokens.tokens == sum(min(count, 256) for count in counts)
    assert plan.tokens.texts_cut == sum(count > 256 for count in counts)
    assert files(tmp_path) == before


def test_the_batch_never_changes_the_ranges(tmp_path: Path) -> None:
    path = make_store(tmp_path / "m.db", [memory(f"{i:04d}") for i in range(150)])

    plans = [plan_for(path, Options(batch=batch)) for batch in (0, 1, 7, 10_000)]

    assert {plan.ranges for plan in plans} == {plans[0].ranges}
    assert [plan.batch for plan in plans] == [100, 1, 7, 10_000]


def test_no_rows_make_no_ranges_and_no_estimate(tmp_path: Path) -> None:
    plan = plan_for(make_store(tmp_path / "m.db", []))

    assert (plan.ranges, plan.pending, plan.tokens) == ((), (), None)


def test_another_dimension_than_the_models_is_refused(tmp_path: Path) -> None:
    path = make_store(tmp_path / "m.db", [memory("a")])

    with pytest.raises(EmbedderError, match="makes vectors of 384 numbers, but 768 were asked for"):
        plan_for(path, Options(dim=768))


def test_a_remote_embedder_is_refused_and_none_takes_its_place(tmp_path: Path) -> None:
    path = make_store(tmp_path / "m.db", [memory("a")])

    with pytest.raises(EmbedderError, match="not supported yet"):
        plan_for(path, Options(backend="openai", model="text-embedding-3-small"))


def test_a_missing_database_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"there is no database at .*m\.db"):
        plan_for(tmp_path / "m.db")


def test_planning_imports_neither_beam_nor_torch(tmp_path: Path) -> None:
    path = make_store(tmp_path / "m.db", [memory("a")])
    code = (
        "import sys; from pipeline.cli import main; main(['--db', sys.argv[1], '--dry-run']); "
        "print(sorted({'apache_beam', 'torch', 'transformers'} & sys.modules.keys()))"
    )

    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        check=True,
        env=clean_environment(tmp_path),
    )

    assert done.stdout.splitlines()[-1] == "[]"
