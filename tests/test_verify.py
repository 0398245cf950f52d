"""Verify: what is found wrong with a vector, and with a table against its run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from reembed.transforms.embedders.fake import FakeEmbedder
from reembed.transforms.passes import Phase
from reembed.transforms.replacing import replace_vectors
from reembed.transforms.rows import RangeVectors, StagedRow
from reembed.transforms.staging import RunDirectory
from reembed.transforms.stores import Store
from reembed.transforms.stores.codec import decode, encode
from reembed.transforms.verify import (
    UNIT_TOLERANCE,
    WRONG,
    Findings,
    find_fault,
    verify_rows,
)
from tests.conftest import begin, change, fake_plan, make_store, memory, only_pass

UNIT = FakeEmbedder(4).embed(["a text"])[0]


@pytest.mark.parametrize(
    ("vector", "fault"),
    [
        (encode(UNIT), None),
        (encode(UNIT)[1:], None),
        (None, "undecodable"),
        (b"", "undecodable"),
        (b"\x01a", "undecodable"),
        (b"\x03abcd", "undecodable"),
        (b"\x02" + encode(UNIT)[1:], "undecodable"),
        (encode(UNIT[:3]), "wrong length"),
        (encode(np.append(UNIT, UNIT)), "wrong length"),
        (encode(UNIT * np.float32("nan")), "not finite"),
        (encode(np.array([1, 0, 0, np.inf])), "not finite"),
        (encode(np.array([1, 0, 0, -np.inf])), "not finite"),
        (encode(np.zeros(4)), "zeros"),
        (encode(UNIT * 2), "not of length 1"),
        (encode(UNIT / 2), "not of length 1"),
    ],
)
def test_each_fault_of_a_vector_has_its_name(vector: bytes | None, fault: str | None) -> None:
    assert find_fault(vector, decode=decode, dimension=4, normalized=True) == fault
    assert fault is None or fault in WRONG


@given(st.floats(-0.1, 0.1))
def test_the_length_may_differ_from_1_by_rounding_only(difference: float) -> None:
    vector = encode((UNIT * (1 + difference)).astype(np.float32))
    sound = abs(difference) <= UNIT_TOLERANCE
    if abs(abs(difference) - UNIT_TOLERANCE) > 1e-5:
        fault = find_fault(vector, decode=decode, dimension=4, normalized=True)
        assert fault == (None if sound else "not of length 1")
    assert find_fault(vector, decode=decode, dimension=4, normalized=False) is None


@given(
    arrays(np.float32, st.integers(0, 6), elements=st.floats(width=32)),
    st.integers(1, 6),
    st.booleans(),
)
def test_a_vector_is_sound_only_if_it_can_be_compared(
    vector: np.ndarray[tuple[int], np.dtype[np.float32]], dimension: int, normalized: bool
) -> None:
    fault = find_fault(encode(vector), decode=decode, dimension=dimension, normalized=normalized)

    if fault is None:
        assert len(vector) == dimension
        assert np.isfinite(vector).all() and vector.any()
    if fault is None and normalized:
        assert np.linalg.norm(vector.astype(np.float64)) == pytest.approx(1, abs=2e-3)


def test_findings_count_all_and_name_a_thousand() -> None:
    findings = Findings()

    for i in range(1_500):
        findings.fault("stale", f"{i}")
    findings.fault("zeros", "x")

    assert findings.wrong == {"stale": 1_500, "zeros": 1}
    assert findings.keys == {"stale": [f"{i}" for i in range(1_000)], "zeros": ["x"]}


def replaced(path: Path, rows: int, range_rows: int) -> tuple[Store, RunDirectory]:
    """A store and the run that has replaced its vectors."""
    keys = [f"{i:03}" for i in range(rows)]
    make_store(path, [memory(key) for key in keys])
    plan = begin(fake_plan(path, rows=range_rows))
    embedder = FakeEmbedder(8)
    for some in plan.ranges:
        found = plan.store.read_range(some)
        vectors = embedder.embed([row.text for row in found])
        staged = tuple(
            StagedRow(row.key, row.digest, vector.tobytes())
            for row, vector in zip(found, vectors, strict=True)
        )
        plan.run.write_shard(RangeVectors(some, 0, 8, staged), pass_number=1)
    replace_vectors(plan.job, only_pass(plan, phase=Phase.FORCE))
    return plan.store, plan.run


def sampled(store: Store, run: RunDirectory, count: int) -> list[str]:
    """The keys of a sample."""
    ranges = run.read_manifest().ranges
    found = verify_rows(store, run, ranges, dimension=8, normalized=True, samples=count)
    return [row.key for row in found.sample]


def test_the_sample_is_taken_from_all_over_the_table(tmp_path: Path) -> None:
    store, run = replaced(tmp_path / "m.db", 200, range_rows=5)

    for count in (1, 7, 64, 500):
        found = sampled(store, run, count)

        assert len(found) <= count
        assert len(found) >= min(count, 200) // 2
        assert len(set(found)) == len(found)
        assert found[0] < "020"
        assert count == 1 or found[-1] >= "100"
        assert count < 64 or found[-1] >= "180"


def test_a_small_table_is_sampled_whole(tmp_path: Path) -> None:
    store, run = replaced(tmp_path / "m.db", 40, range_rows=64)

    assert sampled(store, run, 64) == [f"{i:03}" for i in range(40)]


def test_the_sample_holds_only_rows_that_are_as_the_run_left_them(tmp_path: Path) -> None:
    store, run = replaced(tmp_path / "m.db", 6, range_rows=3)
    change(
        store.path,
        "UPDATE memories SET content = 'edited' WHERE id = '001'",
        "UPDATE memories SET embedding = NULL WHERE id = '002'",
        "UPDATE memories SET embedding = zeroblob(32) WHERE id = '003'",
        "DELETE FROM memories WHERE id = '004'",
    )

    assert sampled(store, run, 64) == ["000", "005"]


def test_every_row_of_the_table_is_looked_at(tmp_path: Path) -> None:
    store, run = replaced(tmp_path / "m.db", 9, range_rows=2)
    ranges = run.read_manifest().ranges
    change(
        store.path,
        "UPDATE memories SET embedding = zeroblob(32) WHERE id = '004'",
        "UPDATE memories SET content = 'edited' WHERE id = '005'",
        "UPDATE memories SET content = 'edited', "
        f"embedding = x'{encode(np.full(8, 0.5)).hex()}' WHERE id = '006'",
        "DELETE FROM memories WHERE id = '007'",
        "INSERT INTO memories (id, tier, namespace, title, content, created_at, updated_at) "
        "VALUES ('9', 'mid', 'global', 'new', 'row', '', '')",
    )

    findings = verify_rows(store, run, ranges, dimension=8, normalized=True)

    assert findings == Findings(
        checked=6,
        changed=1,
        deleted=1,
        unwritten=1,
        wrong=findings.wrong,
        keys={"overwritten": ["004"], "zeros": ["004"], "stale": ["005"]},
    )
    assert findings.wrong == {"overwritten": 1, "zeros": 1, "stale": 1}


def test_a_vector_under_an_edited_text_must_be_one(tmp_path: Path) -> None:
    store, run = replaced(tmp_path / "m.db", 9, range_rows=2)
    sound = encode(FakeEmbedder(8).embed(["another"])[0] * np.float32(2))
    vectors = {
        "000": encode(np.zeros(8)),
        "001": None,
        "002": b"\x01\x02",
        "003": encode(np.full(7, 0.5)),
        "004": encode(np.full(8, np.nan)),
        "005": sound,
    }
    for key, vector in vectors.items():
        value = "NULL" if vector is None else f"x'{vector.hex()}'"
        change(
            store.path,
            f"UPDATE memories SET content = 'edited', embedding = {value} WHERE id = '{key}'",
        )

    findings = verify_rows(store, run, run.read_manifest().ranges, dimension=8, normalized=True)

    assert findings.keys == {
        "zeros": ["000"],
        "undecodable": ["001", "002"],
        "wrong length": ["003"],
        "not finite": ["004"],
    }
    assert (findings.checked, findings.changed, findings.written) == (8, 1, 9)
