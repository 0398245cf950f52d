"""The graph."""

from __future__ import annotations

import apache_beam as beam
from apache_beam.pvalue import PCollection

from pipeline.plan import Plan
from transforms.embed import EmbedRows
from transforms.read import ReadRows
from transforms.replace import ReplaceVectors
from transforms.rows import Summary
from transforms.summarize import SummarizeRun


def build(root: beam.Pipeline, plan: Plan, replace: bool) -> PCollection[Summary]:
    """Add one pass over the pending ranges to a pipeline; the result is exactly one Summary.

    The pass embeds and stages. With `replace` it also puts all that is staged into the store;
    without, it ends at the shards.

    A key range is the unit: ranges are shuffled, rows and vectors never are. All that is done
    to a row runs in one fused stage.
    """
    ranges = root | "Ranges" >> beam.Create(plan.pending) | "Spread" >> beam.Reshuffle()
    rows = ranges | "Read" >> ReadRows(
        plan.store,
        plan.run,
        plan.pass_number,
        late=plan.late,
        retry_skipped=plan.retry_skipped,
        part_rows=plan.part_rows,
        by_length=plan.target.access is None,
    )
    embedded = rows | "Embed" >> EmbedRows(plan.target, plan.part_rows, plan.attempt, plan.pause)
    outcome = embedded.vectors | "Replace" >> ReplaceVectors(
        plan.job,
        pending=plan.pending,
        pass_number=plan.pass_number,
        last=plan.last,
        replace=replace,
    )
    summary: PCollection[Summary] = (
        outcome.staged,
        embedded.skipped,
        outcome.replaced,
    ) | "Summarize" >> SummarizeRun()
    return summary
