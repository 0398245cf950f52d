"""The manifest: what a run is about, and how far it has come."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inline_snapshot import snapshot

from reembed.transforms.embedders import Target
from reembed.transforms.modes import Mode
from reembed.transforms.rows import KeyRange
from reembed.transforms.staging import Manifest, Rules, Scope, State, spans

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
borders = st.lists(words, unique=True, max_size=6).map(sorted)
manifests = st.builds(
    Manifest,
    run_id=words,
    database=words,
    started=words,
    scope=st.builds(
        Scope,
        st.one_of(st.none(), words),
        st.sampled_from(Mode).map(str),
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
    probe=st.just([]),
    ranges=borders.map(
        lambda some: tuple(
            KeyRange(index, after, until, 7 * index)
            for index, (after, until) in enumerate(pairwise([None, *some, None]))
        )
    ),
    rows=st.integers(0, 10**9),
    attempt=words,
    state=st.sampled_from(State),
    wrote=st.booleans(),
    stopped=st.one_of(st.none(), words),
    stopped_code=st.one_of(st.none(), st.integers(1, 6)),
    order=st.integers(0, 10**9),
    marked=st.booleans(),
    rules=st.one_of(
        st.none(), st.builds(Rules, st.floats(0, 1, width=32), st.booleans(), st.booleans())
    ),
    saved=st.one_of(st.none(), st.dictionaries(words, st.integers(0, 10**9), max_size=3)),
    listed_late=st.booleans(),
    outcome=st.dictionaries(words, st.one_of(st.none(), st.integers(), words), max_size=3),
)


def read(values: dict[str, Any]) -> Manifest:
    """A manifest from its values."""
    return Manifest.from_json(json.dumps(values).encode())


@given(manifests, st.data())
def test_a_manifest_survives_json(manifest: Manifest, data: st.DataObject) -> None:
    some = st.frozensets(st.sampled_from([keys.index for keys in manifest.ranges]))
    manifest = replace(manifest, done=data.draw(some), writing=data.draw(some))
    numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
    size = min(manifest.target["dimension"], 9)
    target = {**manifest.target, "dimension": size}
    probe = data.draw(st.lists(st.lists(numbers, min_size=size, max_size=size), max_size=3))
    manifest = replace(manifest, target=target, probe=probe)

    assert read(manifest.to_json()) == manifest


def test_a_new_run_is_staging_and_has_done_nothing() -> None:
    assert (MANIFEST.state, MANIFEST.done, MANIFEST.writing, MANIFEST.stopped) == (
        State.STAGING,
        frozenset(),
        frozenset(),
        None,
    )


def test_a_probe_is_kept_to_the_last_bit() -> None:
    probe = [[0.1, 1e-45], [3.4028234663852886e38, -0.1]]

    assert read(replace(MANIFEST, probe=probe).to_json()).probe == probe


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version_is_refused(version: object) -> None:
    values = MANIFEST.to_json() | {"schema_version": version}

    # What is wrong with a value is said by the library that reads it, in this and the next tests.
    with pytest.raises(ValueError, match=r"\$\.schema_version"):
        read(values)


LATER = {"wrote", "stopped_code", "order", "rules", "saved", "listed_late", "marked"}
"""Manifests of the first versions."""


@pytest.mark.parametrize("name", sorted(set(MANIFEST.to_json()) - LATER))
def test_a_manifest_that_lacks_anything_is_refused(name: str) -> None:
    values = MANIFEST.to_json()
    del values[name]

    with pytest.raises(ValueError, match=f"missing required field `{name}`"):
        read(values)


@pytest.mark.parametrize("state", State)
def test_a_manifest_of_the_first_versions_is_read(state: State) -> None:
    manifest = replace(MANIFEST, state=state, wrote=state is not State.STAGING)
    manifest = replace(manifest, saved=None, marked=False)
    values = {name: value for name, value in manifest.to_json().items() if name not in LATER}

    assert read(values) == manifest


def test_a_state_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="half done"):
        read(MANIFEST.to_json() | {"state": "half done"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rows", -1),
        ("rows", 1.5),
        ("rows", "many"),
        ("done", [[0, 10**17]]),
        ("writing", [[1, 0]]),
        ("writing", [[0, 10**9]]),
        ("ranges", [["b", "a", 1]]),
        ("ranges", {"a": 1}),
        ("probe", [[1, None]]),
        ("probe", [[1, 2], [1]]),
        ("target", None),
        ("target", {"backend": "local", "model": "m", "dimension": "8"}),
        ("target", {"backend": "local", "model": "m", "dimension": 8, "access": {"url": 7}}),
        ("scope", {"mode": "some", "store": {}}),
        ("scope", {"mode": "all", "store": {"kind": {"a": 1}}}),
        ("rules", {"most_skipped": 2, "clear_skipped": False, "one_transaction": False}),
        ("saved", {"a": -1}),
        ("saved", ["a"]),
        ("order", -1),
        ("order", 2**53),
        ("outcome", {"reembedded": "all"}),
        ("outcome", {"previous_dims": [None]}),
        ("state", 7),
    ],
    ids=repr,
)
def test_a_value_of_another_type_or_out_of_bounds_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError):
        read(MANIFEST.to_json() | {name: value})


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{", "[" * 100_000, '{"rows": NaN}', '{"rows": "\\ud800"}']
)
def test_what_is_no_manifest_at_all_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Manifest.from_json(text.encode())


def test_numbers_that_are_not_finite_are_refused() -> None:
    text = json.dumps(MANIFEST.to_json()).replace("0.6", "1e999")

    with pytest.raises(ValueError, match="out of range"):
        Manifest.from_json(text.encode())


def test_only_a_run_that_wrote_nothing_goes_back_to_staging() -> None:
    forward = {
        State.STAGING: "replacing",
        State.REPLACING: "staging, replaced, wrote nothing, rolling back",
        State.REPLACED: "rolling back",
        State.EMPTY: "rolling back",
        State.ROLLING_BACK: "replacing, replaced, wrote nothing, partly rolled back, rolled back",
        State.PARTLY_BACK: "rolling back",
        State.ROLLED_BACK: "",
    }
    for state, following in forward.items():
        manifest = replace(MANIFEST, state=state)
        for other in State:
            if other is state or other in following.split(", "):
                assert manifest.changed(state=other).state is other
            else:
                with pytest.raises(ValueError, match=f"that is {state} can't become {other}"):
                    manifest.changed(state=other)
    with pytest.raises(ValueError) as refused:
        replace(MANIFEST, state=State.REPLACED).changed(state=State.STAGING)
    assert str(refused.value) == snapshot("a run that is replaced can't become staging")


def test_files_of_the_backup_are_added_to_those_that_are_listed() -> None:
    once = MANIFEST.changed(state=State.REPLACING, saved={"a": 1})

    assert once.changed(saved={"b": 2}).saved == {"a": 1, "b": 2}
    assert replace(once, saved=None).changed(saved={"b": 2}).saved == {"b": 2}
    # What an attempt had noted that came to nothing is deleted.
    assert replace(once, state=State.STAGING).changed(saved={"b": 2}).saved == {"b": 2}


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


@given(st.frozensets(st.integers(0, 40)))
def test_spans_hold_each_number_once_and_do_not_touch(some: frozenset[int]) -> None:
    found = spans(some)

    assert [n for first, last in found for n in range(first, last + 1)] == sorted(some)
    assert all(before + 1 < after for (_, before), (after, _) in pairwise(found))
