"""Every flag that says which store is meant, given to every kind of store, on the command line
and in a file of settings: a plan, or one sentence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reembed.pipeline.options import STORE_FLAGS, STORE_LISTS
from tests.conftest import Call, files
from tests.store_kinds import KINDS, Kind

pytestmark = pytest.mark.system

FLAGS = (*STORE_LISTS, *STORE_FLAGS)
TEXTS = [f"some text or other, number {at}" for at in range(6)]
NAMES = (
    *("play list", 'al"bum', "artist", "title", "body text", "select", "größe", "model", "other"),
    *("items", "item_id", "genre", "embedding", "year", "body", "extra", "notes", "item"),
    *("items_rowids", "items_vector_chunks00", "items_auxiliary", "sqlite_schema", "rowid"),
    *("embeddings", "collections", "collection_id", "content", "memories", "id", "memories_fts"),
    *("ai-memory", "llm", "sqlite-vec", "table", "f32le", "json", "npy", "TRUE", "id = 1"),
    *("", " ", "nope", "{", "{}", "{body}", "'", '"', "1; DROP TABLE notes", "?", ":namespace"),
    *("\0", "日本", "x" * 500, "random() > 0", "1) OR (1", "rowid IN (SELECT rowid FROM notes)"),
)
VALUES: tuple[Any, ...] = (
    *NAMES,
    3,
    -1.5,
    True,
    [],
    [[]],
    ["body", 3],
    ["title", "body"],
    [""],
    {},
    {"a": "b"},
)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    return found


@pytest.fixture(scope="module")
def path(kind: Kind, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kind.make(tmp_path_factory.mktemp("stores") / "m.db", TEXTS)


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {toml(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    return json.dumps(value)


def check(reembed: Call, path: Path, flags: tuple[str, ...], said: Mapping[str, Any]) -> None:
    """Give the same on the command line and in a file; each is a plan, or one sentence."""
    config = Path("store.toml")
    config.write_text("".join(f"{name} = {toml(value)}\n" for name, value in said.items()))
    given = [
        argument
        for name, value in said.items()
        for one in (value if isinstance(value, list) else [value])
        for argument in (f"--{name.replace('_', '-')}={one}",)
    ]
    before = files(path.parent)
    for more in (given, ["--config", config]):
        ran = reembed("--db", path, *flags, *more, "--dry-run")

        assert ran.code in (0, 1, 2), ran.err
        errors = [line for line in ran.err.splitlines() if line.startswith("reembed: error: ")]
        assert len(errors) == (ran.code != 0), ran.err
        assert ran.out.startswith("reembed plan: ") == (ran.code == 0)
        assert "Traceback" not in ran.err
        assert len(ran.err) < 10_000
        assert files(path.parent) == before


@pytest.mark.parametrize("name", FLAGS)
def test_each_flag_is_used_or_refused_by_each_store(
    name: str, kind: Kind, path: Path, reembed: Call
) -> None:
    for value in ("nope", "notes"):
        check(reembed, path, kind.flags, {name: value})


@given(st.data())
@settings(
    max_examples=10,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_flags_of_whatever_values_give_a_plan_or_one_sentence(
    kind: Kind, path: Path, reembed: Call, data: st.DataObject
) -> None:
    names = st.sampled_from(FLAGS)
    said = data.draw(st.dictionaries(names, st.sampled_from(VALUES), min_size=1, max_size=4))
    check(reembed, path, kind.flags if data.draw(st.booleans()) else (), said)
