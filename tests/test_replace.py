"""Replacing staged vectors in the store."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.plan import Plan
from tests.conftest import FAKE, change, fake_plan, make_store, memory, select
from transforms.embed import embed_rows
from transforms.embedders.fake import POISON, FakeEmbedder
from transforms.errors import StoreError, TooManySkippedError
from transforms.read import read_rows
from transforms.replace import check_failures, match_rows, replace_vectors
from transforms.rows import Cause, Row, Skipped, StagedRow, Summary
from transforms.staging import begin_run
from transforms.stores.codec import decode, encode


def stage(plan: Plan, pass_number: int = 1) -> None:
    """Stage all ranges, as the pipeline does, without Beam."""
    for keys in plan.ranges:
        for part in read_rows(plan.store, keys, plan.run, pass_number=pass_number):
            vectors = embed_rows(part, FakeEmbedder(8), dimension=8, batch=3)
            plan.run.write_shard(vectors, pass_number=pass_number)


def replace(plan: Plan, *, last: bool) -> Summary:
    return replace_vectors(plan.store, plan.run, plan.ranges, target=FAKE, last=last)


def stored(plan: Plan) -> dict[object, list[float] | None]:
    query = "SELECT id, embedding FROM memories ORDER BY id"
    return {
        key: decode(blob).tolist() if isinstance(blob, bytes) else None
        for key, blob in select(plan.store.path, query)
    }


def expected(*texts: str) -> list[list[float]]:
    vectors: list[list[float]] = FakeEmbedder(8).embed(texts).tolist()
    return vectors


@pytest.fixture(params=["delete", "wal"])
def plan(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Plan]:
    rows = [memory(f"{i:02d}") for i in range(10)]
    plan = fake_plan(make_store(tmp_path / "m.db", rows, request.param), rows=4)
    with begin_run(plan.run):
        stage(plan)
        yield plan


def test_every_row_gets_the_vector_of_its_own_text(plan: Plan) -> None:
    summary = replace(plan, last=False)

    assert summary == Summary(replaced=10)
    assert list(stored(plan).values()) == expected(
        *(f"title {i:02d} content {i:02d}" for i in range(10))
    )


def test_replacing_twice_gives_what_once_gives(plan: Plan) -> None:
    replace(plan, last=False)
    once = plan.store.path.read_bytes()

    assert replace(plan, last=False) == Summary(replaced=10)
    assert [row[1:] for row in select(plan.store.path, "SELECT * FROM memories")] != []
    assert len(plan.store.path.read_bytes()) == len(once)
    assert list(stored(plan).values()) == expected(
        *(f"title {i:02d} content {i:02d}" for i in range(10))
    )


def edit(plan: Plan) -> None:
    change(
        plan.store.path,
        "UPDATE memories SET content = 'edited' WHERE id = '01'",
        "DELETE FROM memories WHERE id = '02'",
        "INSERT INTO memories (id, tier, namespace, title, content, created_at, updated_at) "
        "VALUES ('99', 'mid', 'global', 'new', 'row', '', '')",
    )


def test_rows_that_changed_hold_the_replacement_back_and_are_named(plan: Plan) -> None:
    edit(plan)

    assert replace(plan, last=False) == Summary(changed=frozenset({0, 2}))
    assert set(stored(plan).values()) == {None}


def test_after_a_catch_up_pass_every_row_has_the_vector_of_its_present_text(plan: Plan) -> None:
    edit(plan)
    stage(plan, pass_number=2)

    assert replace(plan, last=False) == Summary(replaced=10)
    after = stored(plan)
    assert [after["01"], after["99"]] == expected("title 01 edited", "new row")
    assert "02" not in after


def test_in_the_last_pass_changed_rows_are_left_and_counted(plan: Plan) -> None:
    edit(plan)

    summary = replace(plan, last=True)

    assert summary == Summary(replaced=8, remaining=2, changed=frozenset({0, 2}))
    after = stored(plan)
    assert [key for key in after if after[key] is None] == ["01", "99"]


def test_a_text_that_changes_back_gets_its_vector(plan: Plan) -> None:
    change(plan.store.path, "UPDATE memories SET content = 'x' WHERE id = '01'")
    stage(plan, pass_number=2)
    change(plan.store.path, "UPDATE memories SET content = 'content 01' WHERE id = '01'")

    assert replace(plan, last=False) == Summary(replaced=10)
    assert [stored(plan)["01"]] == expected("title 01 content 01")


def test_an_edit_between_the_look_and_the_lock_is_seen(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    replacing = type(plan.store).replacing

    def late(store: object) -> object:
        edit(plan)
        return replacing(plan.store)

    monkeypatch.setattr(type(plan.store), "replacing", late)

    summary = replace(plan, last=False)

    assert summary == Summary(replaced=8, remaining=2, changed=frozenset({0, 2}))
    assert stored(plan)["01"] is None


def test_many_vectors_are_written_in_several_portions_of_one_transaction(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transforms.replace._FLUSH_BYTES", 100)

    assert replace(plan, last=False) == Summary(replaced=10)
    assert None not in stored(plan).values()


def test_an_error_in_the_last_portion_undoes_the_first(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transforms.replace._FLUSH_BYTES", 100)
    change(
        plan.store.path,
        "CREATE TRIGGER full BEFORE UPDATE OF embedding ON memories WHEN new.id = '09' "
        "BEGIN SELECT RAISE(ABORT, 'no'); END",
    )

    with pytest.raises(StoreError):
        replace(plan, last=False)
    assert set(stored(plan).values()) == {None}


def test_a_skipped_row_keeps_its_previous_vector(tmp_path: Path) -> None:
    old = encode(np.array([1.0], dtype=np.float32))
    rows = [memory("a"), memory("b", POISON, embedding=old, embedding_dim=1), memory("c")]
    plan = fake_plan(make_store(tmp_path / "m.db", rows))
    with begin_run(plan.run):
        stage(plan)
        summary = replace(plan, last=False)

    assert summary == Summary(replaced=2, kept={Cause.REJECTED: 1})
    assert select(plan.store.path, "SELECT embedding, embedding_dim FROM memories") == [
        (encode(np.array(expected("title a content a")[0], dtype=np.float32)), 8),
        (old, 1),
        (encode(np.array(expected("title c content c")[0], dtype=np.float32)), 8),
    ]


def test_a_row_sealed_since_it_was_embedded_does_not_get_its_vector(plan: Plan) -> None:
    change(
        plan.store.path,
        "UPDATE memories SET content = '', encrypted_envelope = x'00' WHERE id = '03'",
    )

    assert replace(plan, last=True).remaining == 1
    assert stored(plan)["03"] is None


@pytest.mark.parametrize(
    ("replaced", "kept", "refused"),
    [
        (2, {Cause.REJECTED: 1}, False),
        (1, {Cause.REJECTED: 1}, False),
        (1, {Cause.REJECTED: 1, Cause.BAD_VECTOR: 1}, True),
        (0, {Cause.REJECTED: 1}, True),
        (0, {Cause.ENCRYPTED: 9, Cause.OVER_CAP: 9, Cause.NOT_TEXT: 9}, False),
        (1, {Cause.ENCRYPTED: 9, Cause.REJECTED: 2}, True),
        (0, {}, False),
    ],
)
def test_a_run_in_which_over_half_of_the_tried_rows_failed_is_refused(
    replaced: int, kept: dict[Cause, int], refused: bool
) -> None:
    found = Summary(replaced=replaced, kept=kept)

    if refused:
        with pytest.raises(TooManySkippedError, match="nothing was replaced"):
            check_failures(found)
    else:
        check_failures(found)


def test_too_many_failures_replace_nothing(tmp_path: Path) -> None:
    rows = [memory("a"), memory("b", POISON), memory("c", POISON + "!")]
    plan = fake_plan(make_store(tmp_path / "m.db", rows))
    with begin_run(plan.run):
        stage(plan)
        with pytest.raises(TooManySkippedError, match="2 of 3 rows could not be embedded"):
            replace(plan, last=True)

    assert set(stored(plan).values()) == {None}


digests = st.sampled_from([b"old", b"new"])
present = st.dictionaries(st.sampled_from("abcdef"), digests)
entries = st.lists(st.tuples(st.sampled_from("abcdef"), digests, st.booleans()), max_size=12)


@given(present, entries)
def test_matching_equals_looking_each_row_up(
    now: dict[str, bytes], written: list[tuple[str, bytes, bool]]
) -> None:
    rows = [Row(key, at, "", digest) for at, (key, digest) in enumerate(now.items())]
    staged = [
        StagedRow(
            key,
            digest,
            None if fails else bytes([at]),
            Skipped(key, Cause.REJECTED, "") if fails else None,
        )
        for at, (key, digest, fails) in enumerate(written)
    ]

    match = match_rows(5, rows, staged)

    vectors, kept, remaining = [], 0, 0
    for row in rows:
        found = [entry for entry in staged if (entry.key, entry.digest) == (row.key, row.digest)]
        if not found:
            remaining += 1
        elif found[-1].vector is None:
            kept += 1
        else:
            vectors.append((row.rowid, found[-1].vector))
    assert match.vectors == vectors
    assert match.summary == Summary(
        replaced=len(vectors),
        kept={Cause.REJECTED: kept} if kept else {},
        remaining=remaining,
        changed=frozenset({5} if remaining else {}),
    )


def test_a_writer_that_holds_the_lock_is_waited_for(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transforms.stores.sqlite.COMMIT_BUSY_SECONDS", 0.1)
    connection = sqlite3.connect(plan.store.path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="locked by another process"):
        replace(plan, last=False)
    connection.execute("COMMIT")
    connection.close()

    assert replace(plan, last=False) == Summary(replaced=10)
