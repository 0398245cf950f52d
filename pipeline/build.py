"""The graph."""

from __future__ import annotations

import apache_beam as beam
from apache_beam.pvalue import PCollection

from reembed.pipeline.plan import Plan
from reembed.transforms.embed import EmbedRows
from reembed.transforms.passes import Pass
from reembed.transforms.read import LeftRows, ReadRows, StoreRows
from reembed.transforms.replace import ReplaceVectors
from reembed.transforms.rows import Summary
from reembed.transforms.summarize import SummarizeRun
from reembed.transforms.workdir import WorkDirectory


def stored_rows(plan: Plan, current: Pass) -> StoreRows:
    """Say which rows of the store a pass is about, and in what parts they are read."""
    return StoreRows(
        plan.store,
        plan.run,
        current.number,
        begun=current.phase.begun,
        retry_skipped=current.retry_skipped,
        part_rows=plan.part_rows,
        by_length=plan.target.access is None,
    )


def work_directory(plan: Plan) -> WorkDirectory | None:
    """Where a plan's workers read and write, if they don't reach the database."""
    return WorkDirectory(plan.work, plan.attempt) if plan.work else None


def build(root: beam.Pipeline, plan: Plan, current: Pass) -> PCollection[Summary]:
    """Add one pass over its ranges to a pipeline; the result is exactly one Summary.

    The pass embeds and stages. Its sink writes the vectors as shards; the launcher makes them live.

    A key range is the unit: ranges are shuffled, rows and vectors never are. All that is done
    to a row runs in one fused stage.
    """
    work = work_directory(plan)
    source = LeftRows(work, current.number) if work else stored_rows(plan, current)
    ranges = root | "Ranges" >> beam.Create(current.ranges) | "Spread" >> beam.Reshuffle()
    rows = ranges | "Read" >> ReadRows(source)
    embedded = rows | "Embed" >> EmbedRows(plan.target, plan.call_rows, plan.attempt, plan.pause)
    staged = embedded.vectors | "Replace" >> ReplaceVectors(work or plan.run, current.number)
    summary: PCollection[Summary] = (staged, embedded.skipped) | "Summarize" >> SummarizeRun()
    return summary
