"""The graph."""

from __future__ import annotations

import apache_beam as beam
from apache_beam.pvalue import PCollection

from reembed.pipeline.plan import Plan
from reembed.transforms.embed import EmbedRows
from reembed.transforms.read import ReadInputs, ReadRows
from reembed.transforms.replace import ReplaceVectors
from reembed.transforms.rows import Summary
from reembed.transforms.summarize import SummarizeRun
from reembed.transforms.workdir import WorkDirectory


def reading(plan: Plan) -> ReadRows:
    """How the ranges of a pass are read."""
    return ReadRows(
        plan.store,
        plan.run,
        plan.pass_number,
        late=plan.late,
        retry_skipped=plan.retry_skipped,
        part_rows=plan.part_rows,
        by_length=plan.target.access is None,
    )


def work_directory(plan: Plan) -> WorkDirectory | None:
    """Where a plan's workers read and write, if they don't reach the database."""
    return WorkDirectory(plan.work, plan.attempt) if plan.work else None


def build(root: beam.Pipeline, plan: Plan) -> PCollection[Summary]:
    """Add one pass over the pending ranges to a pipeline; the result is exactly one Summary.

    The pass embeds and stages. Its sink writes the vectors as shards; the launcher makes them live.

    A key range is the unit: ranges are shuffled, rows and vectors never are. All that is done
    to a row runs in one fused stage.
    """
    ranges = root | "Ranges" >> beam.Create(plan.pending) | "Spread" >> beam.Reshuffle()
    work = work_directory(plan)
    rows = ranges | "Read" >> (ReadInputs(work, plan.pass_number) if work else reading(plan))
    embedded = rows | "Embed" >> EmbedRows(plan.target, plan.call_rows, plan.attempt, plan.pause)
    staged = embedded.vectors | "Replace" >> ReplaceVectors(work or plan.run, plan.pass_number)
    summary: PCollection[Summary] = (staged, embedded.skipped) | "Summarize" >> SummarizeRun()
    return summary
