"""Summarize: all that a pass did becomes one Summary."""

from collections.abc import Iterable
from dataclasses import dataclass

import apache_beam as beam
from apache_beam.pvalue import PCollection
from apache_beam.typehints.decorators import no_annotations

from reembed.transforms.rows import Skipped, StagedRange, Summary


def summarize_run(parts: Iterable[Summary]) -> Summary:
    """Add summaries up; none of them give `Summary()`.

    >>> summarize_run([Summary(embedded=2), Summary(embedded=1, replaced=3)]).embedded
    3
    """
    return sum(parts, start=Summary())


def summarize_staged(staged: StagedRange) -> Summary:
    """A shard's share of the summary; its skipped rows are counted from their own output."""
    return Summary(embedded=staged.embedded)


def summarize_skipped(skipped: Skipped) -> Summary:
    """A skipped row's share of the summary."""
    return Summary(skipped={skipped.cause: 1})


Outcomes = tuple[PCollection[StagedRange], PCollection[Skipped]]
"""The shards and the skipped rows."""


@dataclass
class SummarizeRun(beam.PTransform[Outcomes, PCollection[Summary]]):
    """Combine shards and skipped rows into exactly one Summary."""

    # Beam would warn that it makes nothing of the annotations.
    @no_annotations  # type: ignore[untyped-decorator]
    def expand(self, outcomes: Outcomes) -> PCollection[Summary]:
        staged, skipped = outcomes
        # Each is combined by itself first: a Flatten of single rows would end the fused stage
        # and keep them all in memory.
        parts = (
            staged
            | "Staged" >> beam.Map(summarize_staged)
            | "CombineStaged" >> beam.CombineGlobally(summarize_run),
            skipped
            | "Skipped" >> beam.Map(summarize_skipped)
            | "CombineSkipped" >> beam.CombineGlobally(summarize_run),
        )
        summary: PCollection[Summary] = (
            parts | beam.Flatten() | "Combine" >> beam.CombineGlobally(summarize_run)
        )
        return summary
