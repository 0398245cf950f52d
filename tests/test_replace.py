"""The transform that stages vectors and, behind a barrier, replaces them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.direct.direct_runner import BundleBasedDirectRunner
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from apache_beam.testing.util import assert_that, equal_to

from pipeline.plan import Plan
from tests.conftest import begin, change, fake_plan, make_store, memory, select
from transforms.embed import embed_rows
from transforms.embedders.fake import POISON, FakeEmbedder
from transforms.errors import RunError, TooManySkippedError
from transforms.read import read_rows
from transforms.replace import ReplaceVectors
from transforms.replacing import Rules
from transforms.rows import RangeVectors, Summary
from transforms.staging import State


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    rows = [memory(f"{i:02d}") for i in range(10)]
    return begin(fake_plan(make_store(tmp_path / "m.db", rows), rows=4))


def vectors_of(plan: Plan) -> list[RangeVectors]:
    """What comes out of embedding."""
    return [
        embed_rows(part, FakeEmbedder(8), dimension=8, batch=3)
        for keys in plan.ranges
        for part in read_rows(plan.store, keys, plan.run, pass_number=1)
    ]


def transform(plan: Plan, *, replace: bool = True, last: bool = False) -> ReplaceVectors:
    return ReplaceVectors(
        plan.job, place=plan.run, pending=plan.pending, pass_number=1, last=last, replace=replace
    )


def with_vector(plan: Plan) -> list[str]:
    query = "SELECT id FROM memories WHERE embedding IS NOT NULL ORDER BY id"
    return [str(key) for (key,) in select(plan.store.path, query)]


@pytest.mark.parametrize(
    ("runner", "flags"),
    [
        (FnApiRunner, []),
        (FnApiRunner, ["--direct_runner_bundle_repeat=1"]),
        (BundleBasedDirectRunner, []),
    ],
    ids=["FnApiRunner", "each bundle twice", "BundleBasedDirectRunner"],
)
def test_every_range_is_staged_and_all_rows_are_replaced_once(
    plan: Plan, runner: type[FnApiRunner], flags: list[str]
) -> None:
    vectors = vectors_of(plan)
    with beam.Pipeline(runner=runner(), options=PipelineOptions(flags)) as root:
        staged, replaced = root | beam.Create(vectors) | transform(plan)
        counted = staged | beam.Map(lambda one: (one.range.index, one.embedded, one.skipped))
        assert_that(counted, equal_to([(0, 4, 0), (1, 4, 0), (2, 2, 0)]), "Staged")
        assert_that(replaced, equal_to([Summary(replaced=10)]), "Replaced")

    assert with_vector(plan) == [f"{i:02d}" for i in range(10)]
    assert {index: len(some) for index, some in plan.run.list_shards().items()} == {
        0: 1,
        1: 1,
        2: 1,
    }


def test_without_replace_it_ends_at_the_shards(plan: Plan) -> None:
    vectors, before = vectors_of(plan), plan.store.path.read_bytes()
    with beam.Pipeline(runner=FnApiRunner()) as root:
        _, replaced = root | beam.Create(vectors) | transform(plan, replace=False)
        assert_that(replaced, equal_to([]))

    assert plan.store.path.read_bytes() == before
    assert plan.run.staged_rows() == 10
    assert plan.run.read_manifest().state is State.STAGING


def test_a_pass_without_a_range_replaces_what_earlier_ones_have_staged(plan: Plan) -> None:
    for vectors in vectors_of(plan):
        plan.run.write_shard(vectors, pass_number=1)
    with beam.Pipeline(runner=FnApiRunner()) as root:
        outcome = root | beam.Create([]) | transform(plan)
        assert_that(outcome.replaced, equal_to([Summary(replaced=10)]))

    assert len(with_vector(plan)) == 10


@pytest.mark.parametrize(
    ("last", "summary", "written"),
    [
        (False, Summary(remaining=1, changed=frozenset({0})), 0),
        (True, Summary(replaced=9, remaining=1, changed=frozenset({0})), 9),
    ],
)
def test_an_edited_row_holds_it_back_except_in_the_last_pass(
    plan: Plan, last: bool, summary: Summary, written: int
) -> None:
    vectors = vectors_of(plan)
    change(plan.store.path, "UPDATE memories SET content = 'edited' WHERE id = '01'")
    with beam.Pipeline(runner=FnApiRunner()) as root:
        outcome = root | beam.Create(vectors) | transform(plan, last=last)
        assert_that(outcome.replaced, equal_to([summary]))

    assert len(with_vector(plan)) == written


def test_after_the_replacement_was_begun_the_pending_ranges_are_written(plan: Plan) -> None:
    for vectors in vectors_of(plan):
        plan.run.write_shard(vectors, pass_number=1)
    everything = frozenset(keys.index for keys in plan.ranges)
    plan.run.advance(plan.attempt, state=State.REPLACING, done=everything)
    late = ReplaceVectors(
        plan.job,
        place=plan.run,
        pending=plan.ranges[1:2],
        pass_number=2,
        last=True,
        replace=True,
    )
    with beam.Pipeline(runner=FnApiRunner()) as root:
        outcome = root | beam.Create([]) | late
        summary = Summary(replaced=4, remaining=6, changed=frozenset({0, 2}))
        assert_that(outcome.replaced, equal_to([summary]))

    assert with_vector(plan) == ["04", "05", "06", "07"]


def test_too_many_failures_reach_the_launcher_under_their_name(tmp_path: Path) -> None:
    rows = [memory("a", POISON), memory("b")]
    plan = begin(fake_plan(make_store(tmp_path / "m.db", rows)))
    strict = dataclasses.replace(plan, rules=Rules(most_skipped=0.0))

    with (
        pytest.raises(TooManySkippedError, match="1 of 2 rows could not be embedded"),
        beam.Pipeline(runner=FnApiRunner()) as root,
    ):
        root | beam.Create(vectors_of(plan)) | transform(strict)

    assert with_vector(plan) == []


def test_a_worker_of_an_attempt_that_is_gone_replaces_nothing(plan: Plan) -> None:
    gone = dataclasses.replace(plan, attempt="gone")

    with (
        pytest.raises(RunError, match="another process has taken over"),
        beam.Pipeline(runner=FnApiRunner()) as root,
    ):
        root | beam.Create(vectors_of(plan)) | transform(gone)

    assert with_vector(plan) == []
