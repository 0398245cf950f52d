"""Runs are ordered by when they began to replace, never by a clock or by when they were begun."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from inline_snapshot import snapshot

from reembed.pipeline import plan as planning
from reembed.transforms.staging import RunDirectory, Scope
from tests.conftest import Call, make_store, memory, select
from tests.wording import wording

pytestmark = pytest.mark.system

VECTORS = "SELECT id, embedding, embedding_dim FROM memories ORDER BY id"
YEARS = re.compile(r"\b\d{4}0101T000000Z-0000\b")
MODELS = {"first": 0.0, "second": 0.5, "third": -0.5}


@pytest.fixture(autouse=True)
def a_clock_that_jumps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each run begin at a time before that of all others, or far after it."""
    numbers = itertools.count()

    def new_run(parent: Path) -> RunDirectory:
        number = next(numbers)
        year = 5_000 + number if number % 3 == 2 else 5_000 - number
        return RunDirectory(parent.absolute() / f"{year}0101T000000Z-0000")

    monkeypatch.setattr(planning, "new_run", new_run)


def new_store(directory: Path) -> Path:
    directory.mkdir()
    rows = [
        memory(f"{space}{i}", namespace=space, embedding=bytes([i + 1]) * 8, embedding_dim=2)
        for space in ("a", "b")
        for i in range(4)
    ]
    return make_store(directory / "m.db", rows)


def command(path: Path, model: str, space: str | None) -> list[str | Path]:
    return ["--db", path, "--model", model, *(["--namespace", space] if space else [])]


def states(reembed: Call, path: Path) -> list[tuple[str, str]]:
    """Model and state of each run, in the order in which they replaced."""
    runs = reembed("status", "--db", path, "--json").values["runs"]
    return [(run["model"], run["state"]) for run in runs]


def call(reembed: Call, arguments: list[str | Path], model: str, *more: str) -> Any:
    return reembed(*arguments, *more, range_rows=2, behaviour=MODELS[model])


@pytest.mark.parametrize("pilot", ["first", "second"])
def test_a_run_that_was_begun_first_and_replaces_last_is_undone_first(
    reembed: Call, tmp_path: Path, pilot: str
) -> None:
    path = new_store(tmp_path / "store")
    start = select(path, VECTORS)
    other = "second" if pilot == "first" else "first"
    small, whole = command(path, pilot, "a"), command(path, other, None)
    assert call(reembed, small, pilot, "--max-rows", "2").code == 0
    assert call(reembed, whole, other).code == 0
    between = select(path, VECTORS)
    assert call(reembed, small, pilot).code == 0

    assert states(reembed, path) == [(other, "replaced"), (pilot, "replaced")]
    assert reembed("cleanup", "--db", path, "--json").values["removed"] == []
    whole_run, _ = reembed("status", "--db", path, "--json").values["runs"]
    refused = reembed("rollback", "--db", path, "--run", whole_run["run_id"])
    assert refused.code == 2
    assert YEARS.sub("RUN", wording(refused.error, tmp_path)) == snapshot(
        "run RUN has replaced vectors since run RUN did; undo the newer one first "
        "(reembed rollback)"
    )
    assert reembed("rollback", "--db", path).code == 0
    assert select(path, VECTORS) == between
    assert reembed("rollback", "--db", path).code == 0
    assert select(path, VECTORS) == start


STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.sampled_from(["stage", "replace"]),
            st.sampled_from(sorted(MODELS)),
            st.sampled_from([None, "a", "b"]),
        ),
        st.just(("roll back", "", None)),
    ),
    max_size=7,
)


@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(
    [
        ("stage", "first", "a"),
        ("replace", "second", None),
        ("replace", "first", "a"),
        ("stage", "third", "b"),
        ("roll back", "", None),
        ("replace", "third", "b"),
    ]
)
@given(STEPS)
def test_whatever_was_staged_replaced_and_rolled_back_the_newest_first_leads_to_the_start(
    reembed: Call,
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[tuple[str, str, str | None]],
) -> None:
    path = new_store(tmp_path_factory.mktemp("order") / "store")
    start = select(path, VECTORS)
    for step, model, space in steps:
        if step == "roll back":
            assert reembed("rollback", "--db", path).code in (0, 2)
            continue
        more = ["--max-rows", "1"] if step == "stage" else []
        # Refused where rows of the same scope are staged for another model.
        assert call(reembed, command(path, model, space), model, *more).code in (0, 1)

    for _ in range(len(steps) + 1):
        if reembed("rollback", "--db", path).code != 0:
            break
    assert select(path, VECTORS) == start
    assert {state for _, state in states(reembed, path)} <= {
        "staging",
        "rolled back",
        "wrote nothing",
    }


@pytest.mark.parametrize(
    ("kind", "table", "namespace"), [("ai-memory", "Memories", "a"), ("llm", "embeddings", None)]
)
def test_a_table_that_is_reached_as_another_kind_of_store_is_the_same(
    kind: str, table: str, namespace: str | None
) -> None:
    own = Scope(namespace, store={"kind": kind})
    other = Scope("b", store={"kind": "table", "table": table, "vector": "embedding"})

    assert own.shares_rows(other)
    assert other.shares_rows(own)
    assert not own.shares_rows(Scope(store={"kind": "table", "table": "docs", "vector": "v"}))
