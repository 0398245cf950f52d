"""Reading ranges."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inline_snapshot import snapshot

from reembed.pipeline.plan import Plan
from reembed.transforms.errors import StagingError
from reembed.transforms.passes import Phase
from reembed.transforms.read import StoreRows, split_rows
from reembed.transforms.replacing import replace_vectors
from reembed.transforms.rows import Cause, RangeVectors, Row, Skipped, StagedRow
from tests.conftest import begin, change, fake_plan, make_store, memory, only_pass
from tests.wording import wording

texts = st.lists(st.text(max_size=6), max_size=20)


@given(texts, st.integers(1, 20))
def test_parts_hold_every_row_in_order_and_no_more_text_than_allowed(
    some: list[str], most: int
) -> None:
    rows = [Row(str(at), at, text, b"") for at, text in enumerate(some)]

    parts = list(split_rows(rows, most))

    assert [row for part in parts for row in part] == rows
    sizes = [[len(row.text.encode()) for row in part] for part in parts]
    assert all(sum(size) <= most or len(size) == 1 for size in sizes)
    # Greedy: no part's first row would have fitted into the part before it.
    assert all(sum(a) + b[0] > most for a, b in pairwise(sizes))


def write(plan: Plan, *rows: StagedRow, pass_number: int = 1) -> None:
    (keys,) = plan.ranges
    plan.run.write_shard(RangeVectors(keys, 0, 8, rows), pass_number=pass_number)


def read(
    plan: Plan,
    *,
    pass_number: int,
    most: int | None = None,
    begun: bool = False,
    retry_skipped: bool = False,
) -> list[Row]:
    keys = replace(plan.ranges[0], most=most)
    source = StoreRows(plan.store, plan.run, pass_number, begun, retry_skipped)
    return [row for part in source.read_parts(keys) for row in part.rows]


def embedded(row: Row) -> StagedRow:
    return StagedRow(row.key, row.digest, b"12345678" * 4)


def failed(row: Row, cause: Cause) -> StagedRow:
    return StagedRow(row.key, row.digest, None, Skipped(row.key, cause, "why"))


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return begin(fake_plan(make_store(tmp_path / "m.db", [memory(key) for key in "abcd"])))


def test_a_pass_reads_only_what_earlier_ones_have_not_staged(plan: Plan) -> None:
    first = read(plan, pass_number=1)
    write(plan, *map(embedded, first))
    # A bundle that is run again must read what it read before.
    assert read(plan, pass_number=1) == first
    assert read(plan, pass_number=2) == []

    change(
        plan.store.path,
        "UPDATE memories SET content = 'edited' WHERE id = 'b'",
        "DELETE FROM memories WHERE id = 'c'",
        "INSERT INTO memories (id, tier, namespace, title, content, created_at, updated_at) "
        "VALUES ('e', 'mid', 'global', 'new', 'row', '', '')",
    )

    assert [(row.key, row.text) for row in read(plan, pass_number=2)] == [
        ("b", "title b edited"),
        ("e", "new row"),
    ]


def test_a_range_of_long_texts_is_several_parts(tmp_path: Path) -> None:
    rows = [memory(f"{at:02d}", "x" * 60_000) for at in range(40)]
    plan = begin(fake_plan(make_store(tmp_path / "m.db", rows)))
    (keys,) = plan.ranges

    parts = list(StoreRows(plan.store, plan.run, 1).read_parts(keys))

    assert [part.part for part in parts] == list(range(10))
    assert [row.key for part in parts for row in part.rows] == [row.id for row in rows]


def test_rows_that_the_model_would_not_take_are_tried_again_where_that_is_wanted(
    plan: Plan,
) -> None:
    a, b, c, d = read(plan, pass_number=1)
    write(
        plan,
        embedded(a),
        failed(b, Cause.REJECTED),
        failed(c, Cause.BAD_VECTOR),
        failed(d, Cause.OVER_CAP),
    )
    assert read(plan, pass_number=2) == []
    assert [row.key for row in read(plan, pass_number=2, retry_skipped=True)] == ["b", "c"]

    # What came of the last try counts.
    write(plan, embedded(b), failed(c, Cause.REJECTED), pass_number=2)

    assert [row.key for row in read(plan, pass_number=3, retry_skipped=True)] == ["c"]


@pytest.mark.parametrize(("most", "keys"), [(1, "a"), (3, "abc"), (9, "abcd"), (None, "abcd")])
def test_no_more_rows_are_read_than_are_wanted(plan: Plan, most: int | None, keys: str) -> None:
    assert [row.key for row in read(plan, pass_number=1, most=most)] == list(keys)


def test_rows_that_are_staged_do_not_count_towards_what_is_wanted(plan: Plan) -> None:
    write(plan, *map(embedded, read(plan, pass_number=1)[:2]))

    assert [row.key for row in read(plan, pass_number=2, most=1)] == ["c"]


def test_a_pass_after_the_replacement_began_sees_the_runs_own_rows_though_they_are_missing_no_more(
    tmp_path: Path,
) -> None:
    rows = [memory("a", embedding=b"\x01" + bytes(8)), memory("b"), memory("c")]
    path = make_store(tmp_path / "m.db", rows)
    plan = begin(fake_plan(path, missing_only=True))
    found = read(plan, pass_number=1)
    assert [row.key for row in found] == ["b", "c"]
    write(plan, *map(embedded, found))
    replace_vectors(plan.job, only_pass(plan, phase=Phase.FORCE))
    assert read(plan, pass_number=2, begun=True) == []

    change(path, "UPDATE memories SET content = 'edited' WHERE id IN ('a', 'b')")

    # The vector of b is the run's own, of another text; that of a was never its business.
    assert [row.key for row in read(plan, pass_number=2, begun=False)] == []
    assert [row.key for row in read(plan, pass_number=2, begun=True)] == ["b"]


def test_a_damaged_shard_is_not_taken_for_one_that_lacks_rows(plan: Plan, tmp_path: Path) -> None:
    write(plan, *map(embedded, read(plan, pass_number=1)))
    (shard,) = plan.run.shards.iterdir()
    shard.write_bytes(shard.read_bytes()[:-1])

    with pytest.raises(StagingError) as refused:
        read(plan, pass_number=2)
    assert wording(refused, tmp_path).replace(shard.name, "SHARD") == snapshot(
        "TMP/m.db.reembed/RUN/shards/SHARD is damaged: its bytes are not those that were "
        "written; run reembed again, which looks through all files of the run first"
    )


def test_texts_of_like_length_are_in_one_part_and_the_longest_come_first(tmp_path: Path) -> None:
    lengths = {"a": 2, "b": 30, "c": 1, "d": 40, "e": 3}
    rows = [memory(key, content="ü" * length) for key, length in lengths.items()]
    plan = begin(fake_plan(make_store(tmp_path / "m.db", rows)))
    (keys,) = plan.ranges

    parts = StoreRows(plan.store, plan.run, 1, part_rows=2, by_length=True).read_parts(keys)

    assert ["".join(row.key for row in part.rows) for part in parts] == ["db", "ea", "c"]
