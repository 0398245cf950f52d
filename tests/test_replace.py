"""The sink of the graph: it stages vectors, and leaves the store to the launcher."""

from __future__ import annotations

from pathlib import Path

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.direct.direct_runner import BundleBasedDirectRunner
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from apache_beam.testing.util import assert_that, equal_to

from reembed.pipeline.plan import Plan
from reembed.transforms.embed import embed_rows
from reembed.transforms.embedders.fake import FakeEmbedder
from reembed.transforms.read import StoreRows
from reembed.transforms.replace import ReplaceVectors
from reembed.transforms.rows import RangeVectors
from reembed.transforms.staging import State
from tests.conftest import begin, fake_plan, make_store, memory


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    rows = [memory(f"{i:02d}") for i in range(10)]
    return begin(fake_plan(make_store(tmp_path / "m.db", rows), rows=4))


def vectors_of(plan: Plan) -> list[RangeVectors]:
    """What comes out of embedding."""
    return [
        embed_rows(part, FakeEmbedder(8), dimension=8, batch=3)
        for keys in plan.ranges
        for part in StoreRows(plan.store, plan.run, 1).read_parts(keys)
    ]


@pytest.mark.system
@pytest.mark.parametrize(
    ("runner", "flags"),
    [
        (FnApiRunner, []),
        (FnApiRunner, ["--direct_runner_bundle_repeat=1"]),
        (BundleBasedDirectRunner, []),
    ],
    ids=["FnApiRunner", "each bundle twice", "BundleBasedDirectRunner"],
)
def test_every_range_is_staged_once_and_the_store_is_left_to_the_launcher(
    plan: Plan, runner: type[FnApiRunner], flags: list[str]
) -> None:
    vectors, before = vectors_of(plan), plan.store.path.read_bytes()
    with beam.Pipeline(runner=runner(), options=PipelineOptions(flags)) as root:
        staged = root | beam.Create(vectors) | ReplaceVectors(plan.run, 1)
        counted = staged | beam.Map(lambda one: (one.range.index, one.embedded, one.skipped))
        assert_that(counted, equal_to([(0, 4, 0), (1, 4, 0), (2, 2, 0)]))

    assert {index: len(some) for index, some in plan.run.list_shards().items()} == {
        0: 1,
        1: 1,
        2: 1,
    }
    assert plan.store.path.read_bytes() == before
    assert plan.run.read_manifest().state is State.STAGING
