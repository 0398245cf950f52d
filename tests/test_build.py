"""The graph, on every runner that works on one machine, against the obvious loop."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.pipeline import PipelineVisitor
from apache_beam.runners.direct.direct_runner import BundleBasedDirectRunner
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from apache_beam.testing.util import assert_that, equal_to

from reembed.pipeline.build import build
from reembed.pipeline.plan import Plan
from reembed.transforms.embed import EmbedRows
from reembed.transforms.embedders.fake import POISON, FakeEmbedder
from reembed.transforms.read import ReadRows, StoreRows
from reembed.transforms.replacing import replace_vectors
from reembed.transforms.rows import Cause, KeyRange, RangeVectors, Skipped, Summary
from reembed.transforms.staging import RunDirectory, State
from reembed.transforms.stores.codec import decode
from tests.conftest import begin, change, fake_plan, make_store, memory, only_pass, select

LOOPBACK = ["--job_endpoint=embed", "--environment_type=LOOPBACK"]
RUNNERS: dict[str, tuple[Any, list[str]]] = {
    "FnApiRunner": (FnApiRunner, []),
    "each bundle twice": (FnApiRunner, ["--direct_runner_bundle_repeat=1"]),
    "BundleBasedDirectRunner": (BundleBasedDirectRunner, []),
    "portable": (lambda: "PortableRunner", LOOPBACK),
}


@pytest.fixture(params=RUNNERS)
def pipeline(request: pytest.FixtureRequest) -> beam.Pipeline:
    runner, flags = RUNNERS[request.param]
    return beam.Pipeline(runner=runner(), options=PipelineOptions(flags))


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    rows = [memory(f"{i:03d}", f"text {i % 7}", title="t") for i in range(60)]
    rows[10] = memory("010", POISON)
    rows[20] = memory("020", "x" * 70_000)
    rows[30] = memory("030", "", encrypted_envelope=b"sealed")
    rows = [dataclasses.replace(row, namespace=f"n{i}") for i, row in enumerate(rows)]
    return begin(fake_plan(make_store(tmp_path / "m.db", rows), rows=9))


def plain_loop(path: Path) -> dict[object, list[float] | None]:
    """Re-embed every row the obvious way: what the pipeline must come to."""
    embedder = FakeEmbedder(8)
    vectors: dict[object, list[float] | None] = {}
    query = "SELECT id, title || ' ' || content, encrypted_envelope FROM memories"
    for key, text, sealed in select(path, query):
        assert isinstance(text, str)
        if sealed is not None or POISON in text or len(text.encode()) > 65_536:
            vectors[key] = None
        else:
            vectors[key] = embedder.embed([text])[0].tolist()
    return vectors


def stored(path: Path) -> dict[object, list[float] | None]:
    return {
        key: decode(blob).tolist() if isinstance(blob, bytes) else None
        for key, blob in select(path, "SELECT id, embedding FROM memories")
    }


def replaced(plan: Plan) -> Summary:
    """What the launcher does when a pass has ended."""
    return replace_vectors(plan.job, only_pass(plan))


@pytest.mark.system
def test_every_runner_gives_what_a_plain_loop_gives(pipeline: beam.Pipeline, plan: Plan) -> None:
    skipped = {Cause.REJECTED: 1, Cause.OVER_CAP: 1, Cause.ENCRYPTED: 1}
    with pipeline:
        summary = build(pipeline, plan, only_pass(plan))
        assert_that(summary, equal_to([Summary(embedded=57, skipped=skipped)]))

    assert replaced(plan) == Summary(replaced=57, kept=skipped)
    assert stored(plan.store.path) == plain_loop(plan.store.path)


@pytest.mark.system
def test_what_is_done_is_counted_for_the_jobs_own_page(plan: Plan) -> None:
    pipeline = beam.Pipeline(runner=FnApiRunner())
    build(pipeline, plan, only_pass(plan))

    found = pipeline.run().metrics().query()

    counters = {one.key.metric.name: one.committed for one in found["counters"]}
    assert counters == {"embedded": 57, "skipped": 3, "cached": 50}


@pytest.mark.system
def test_it_ends_at_the_shards(plan: Plan) -> None:
    before = plan.store.path.read_bytes()
    skipped = {Cause.REJECTED: 1, Cause.OVER_CAP: 1, Cause.ENCRYPTED: 1}
    with beam.Pipeline(runner=FnApiRunner()) as root:
        summary = build(root, plan, only_pass(plan))
        assert_that(summary, equal_to([Summary(embedded=57, skipped=skipped)]))

    assert plan.store.path.read_bytes() == before
    assert set(plan.run.list_shards()) == {keys.index for keys in plan.ranges}


@pytest.mark.system
def test_a_pass_to_retry_offers_the_model_only_what_it_rejected(plan: Plan) -> None:
    with beam.Pipeline(runner=FnApiRunner()) as root:
        build(root, plan, only_pass(plan))
    change(plan.store.path, "UPDATE memories SET content = 'x' WHERE id = '020'")
    second = only_pass(plan, number=2, retry_skipped=True)
    with beam.Pipeline(runner=FnApiRunner()) as root:
        summary = build(root, plan, second)
        assert_that(summary, equal_to([Summary(embedded=1, skipped={Cause.REJECTED: 1})]))


@pytest.mark.system
def test_a_replacement_says_what_was_done_and_what_is_still_in_the_old_space(plan: Plan) -> None:
    old = "x'01" + "00" * 32 + "'"
    change(plan.store.path, f"UPDATE memories SET embedding = {old} WHERE id IN ('010', '011')")
    with beam.Pipeline(runner=FnApiRunner()) as root:
        build(root, plan, only_pass(plan))

    assert replaced(plan).in_old_space == 1
    manifest = plan.run.read_manifest()
    # Only the run itself knows whether another pass must follow.
    assert (manifest.state, manifest.writing) == (State.REPLACING, frozenset())
    assert manifest.done == {keys.index for keys in plan.ranges}


@pytest.mark.system
def test_one_summary_comes_out_of_an_empty_table(pipeline: beam.Pipeline, tmp_path: Path) -> None:
    plan = begin(fake_plan(make_store(tmp_path / "m.db", [])))
    with pipeline:
        assert_that(build(pipeline, plan, only_pass(plan)), equal_to([Summary()]))


@pytest.mark.system
def test_a_catch_up_pass_embeds_only_what_changed(plan: Plan) -> None:
    with beam.Pipeline(runner=FnApiRunner()) as root:
        build(root, plan, only_pass(plan))
    change(plan.store.path, "UPDATE memories SET content = 'edited' WHERE id = '001'")
    second = only_pass(plan, number=2)
    with beam.Pipeline(runner=FnApiRunner()) as root:
        assert_that(build(root, plan, second), equal_to([Summary(embedded=1)]))

    assert replaced(plan).replaced == 57
    assert stored(plan.store.path) == plain_loop(plan.store.path)


@pytest.mark.system
def test_the_original_commands_own_case(tmp_path: Path) -> None:
    rows = [memory("a"), memory("b", POISON), memory("c")]
    plan = begin(fake_plan(make_store(tmp_path / "m.db", rows)))
    skipped = {Cause.REJECTED: 1}
    with beam.Pipeline(runner=FnApiRunner()) as root:
        assert_that(
            build(root, plan, only_pass(plan)), equal_to([Summary(embedded=2, skipped=skipped)])
        )

    assert replaced(plan) == Summary(replaced=2, kept=skipped)


@pytest.mark.system
def test_all_that_is_done_to_a_row_runs_in_one_stage(plan: Plan) -> None:
    root = beam.Pipeline(runner=FnApiRunner())
    build(root, plan, only_pass(plan))
    _, stages = FnApiRunner().create_stages(root.to_runner_api())

    per_row = [
        stage
        for stage in stages
        if any("read_parts" in step.unique_name for step in stage.transforms)
    ]

    assert len(per_row) == 1
    names = " ".join(step.unique_name for step in per_row[0].transforms)
    for step in ("Read/", "Embed/", "Replace/Stage", "Summarize/Staged", "Summarize/Skipped"):
        assert step in names


@pytest.mark.system
def test_both_outputs_of_embed_rows_are_typed(plan: Plan) -> None:
    root = beam.Pipeline(runner=FnApiRunner())
    rows = root | beam.Create(plan.ranges) | ReadRows(StoreRows(plan.store, plan.run, 1))
    outputs = rows | EmbedRows(plan.target, plan.batch, plan.attempt)

    assert outputs.vectors.element_type == RangeVectors
    assert outputs.skipped.element_type == Skipped


@pytest.mark.system
def test_no_row_and_no_vector_is_shuffled(plan: Plan) -> None:
    root = beam.Pipeline(runner=FnApiRunner())
    build(root, plan, only_pass(plan))
    shuffled: list[Any] = []

    class Visitor(PipelineVisitor):
        def visit_transform(self, node: Any) -> None:
            if isinstance(node.transform, beam.GroupByKey):
                shuffled.extend(side.element_type for side in node.inputs)

    root.visit(Visitor())

    assert shuffled
    assert [kind for kind in shuffled if "Row" in str(kind) or "Vectors" in str(kind)] == []


@pytest.mark.system
def test_values_travel_as_they_are() -> None:
    values = [KeyRange(0, None, "a"), Skipped("k", Cause.REJECTED, ""), RunDirectory(Path("/r"))]
    with beam.Pipeline(runner=FnApiRunner()) as root:
        for value in (*values, Summary(changed=frozenset({1}))):
            name = type(value).__name__
            travelled = root | name >> beam.Create([value]) | f"{name}s" >> beam.Reshuffle()
            assert travelled.element_type is type(value)
            assert_that(travelled, equal_to([value]), label=f"equal {name}")
