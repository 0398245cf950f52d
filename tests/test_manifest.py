"""The manifest: what a run is about, and how far it has come."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transforms.embedders import Target
from transforms.rows import KeyRange
from transforms.staging import Manifest, Scope, State, spans

MANIFEST = Manifest(
    run_id="20260101T000000Z-abcd",
    database="/data/m.db",
    started="2026-01-01T00:00:00Z",
    scope=Scope(),
    target=Target("local", "m", 2).to_json(),
    probe=[[0.6, 0.8]],
    ranges=(KeyRange(0, None, "b", 3), KeyRange(1, "b", None, 2)),
    rows=5,
    attempt="abcd0123",
)

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
indexes = st.frozensets(st.integers(0, 40))
borders = st.lists(words, unique=True, max_size=6).map(sorted)
manifests = st.builds(
    Manifest,
    run_id=words,
    database=words,
    started=words,
    scope=st.builds(
        Scope,
        st.one_of(st.none(), words),
        words,
        st.one_of(st.none(), st.lists(words, max_size=4).map(tuple)),
    ),
    target=st.builds(
        Target,
        words,
        words,
        st.integers(1, 4096),
        words,
        words,
        st.one_of(st.none(), st.integers(1, 512)),
        st.booleans(),
    ).map(vars),
    probe=st.lists(st.lists(st.floats(width=32, allow_nan=False), max_size=3), max_size=3),
    ranges=borders.map(
        lambda some: tuple(
            KeyRange(index, after, until, 7 * index)
            for index, (after, until) in enumerate(pairwise([None, *some, None]))
        )
    ),
    rows=st.integers(0, 10**9),
    attempt=words,
    state=st.sampled_from(State),
    done=indexes,
    writing=indexes,
    wrote=st.booleans(),
    stopped=st.one_of(st.none(), words),
    stopped_code=st.one_of(st.none(), st.integers(1, 6)),
    outcome=st.dictionaries(words, st.one_of(st.none(), st.integers(), words), max_size=3),
)


@given(manifests)
def test_a_manifest_survives_json(manifest: Manifest) -> None:
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest


def test_a_new_run_is_staging_and_has_done_nothing() -> None:
    assert (MANIFEST.state, MANIFEST.done, MANIFEST.writing, MANIFEST.stopped) == (
        State.STAGING,
        frozenset(),
        frozenset(),
        None,
    )


def test_a_probe_is_kept_to_the_last_bit() -> None:
    probe = [[0.1, 1e-45, 3.4028234663852886e38]]
    values = json.loads(json.dumps(replace(MANIFEST, probe=probe).to_json()))

    assert Manifest.from_json(values).probe == probe


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version_is_refused(version: object) -> None:
    values = MANIFEST.to_json() | {"schema_version": version}

    with pytest.raises(ValueError, match=f"schema_version {version} is not 1"):
        Manifest.from_json(values)


LATER = {"wrote", "stopped_code"}
"""Manifests of the first versions."""


@pytest.mark.parametrize("name", sorted(set(MANIFEST.to_json()) - LATER))
def test_a_manifest_that_lacks_anything_is_refused(name: str) -> None:
    values = MANIFEST.to_json()
    del values[name]

    with pytest.raises(KeyError, match=name):
        Manifest.from_json(values)


@pytest.mark.parametrize("state", State)
def test_a_manifest_of_the_first_versions_is_read(state: State) -> None:
    manifest = replace(MANIFEST, state=state, wrote=state is not State.STAGING)
    values = {name: value for name, value in manifest.to_json().items() if name not in LATER}

    assert Manifest.from_json(values) == manifest


def test_a_state_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="half done"):
        Manifest.from_json(MANIFEST.to_json() | {"state": "half done"})


@pytest.mark.parametrize(
    ("state", "incomplete", "ended"),
    [
        (State.STAGING, False, False),
        (State.REPLACING, True, False),
        (State.REPLACED, False, True),
        (State.EMPTY, False, True),
        (State.ROLLING_BACK, True, False),
        (State.PARTLY_BACK, False, True),
        (State.ROLLED_BACK, False, True),
    ],
)
def test_a_state_says_whether_the_table_may_be_half_written_and_whether_all_is_done(
    state: State, incomplete: bool, ended: bool
) -> None:
    assert (state.incomplete, state.ended) == (incomplete, ended)


@given(indexes)
def test_spans_hold_each_number_once_and_do_not_touch(some: frozenset[int]) -> None:
    found = spans(some)

    assert [n for first, last in found for n in range(first, last + 1)] == sorted(some)
    assert all(before + 1 < after for (_, before), (after, _) in pairwise(found))
