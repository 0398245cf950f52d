"""Reading ranges."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import change, fake_plan, make_store, memory
from transforms.read import read_rows, split_rows
from transforms.rows import RangeVectors, Row, StagedRow
from transforms.staging import begin_run

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


def test_a_pass_reads_only_what_earlier_ones_have_not_staged(tmp_path: Path) -> None:
    path = make_store(tmp_path / "m.db", [memory(key) for key in "abcd"])
    plan = fake_plan(path)
    (keys,) = plan.ranges
    with begin_run(plan.run):
        (read,) = read_rows(plan.store, keys, plan.run, pass_number=1)
        staged = tuple(StagedRow(row.key, row.digest, b"12345678" * 4) for row in read.rows)
        plan.run.write_shard(RangeVectors(keys, 0, 8, staged), pass_number=1)
        assert list(read_rows(plan.store, keys, plan.run, pass_number=1)) == [read]
        assert list(read_rows(plan.store, keys, plan.run, pass_number=2)) == []

        change(
            path,
            "UPDATE memories SET content = 'edited' WHERE id = 'b'",
            "DELETE FROM memories WHERE id = 'c'",
            "INSERT INTO memories (id, tier, namespace, title, content, created_at, updated_at) "
            "VALUES ('e', 'mid', 'global', 'new', 'row', '', '')",
        )

        (again,) = read_rows(plan.store, keys, plan.run, pass_number=2)
        assert [(row.key, row.text) for row in again.rows] == [
            ("b", "title b edited"),
            ("e", "new row"),
        ]
