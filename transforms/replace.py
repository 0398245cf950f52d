"""Replace: vectors are staged as shards and then, all at once, put into the store."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import apache_beam as beam
from apache_beam.pvalue import PCollection

from transforms.embedders import require_same
from transforms.replacing import ReplaceJob, replace_vectors
from transforms.rows import KeyRange, RangeVectors, StagedRange, Summary
from transforms.staging import RunDirectory
from transforms.workdir import WorkDirectory


class ReplaceOutputs(NamedTuple):
    """The shards that were staged, and what the replacement did: one Summary, or none."""

    staged: PCollection[StagedRange]
    replaced: PCollection[Summary]


@dataclass
class ReplaceVectors(beam.PTransform[PCollection[RangeVectors], ReplaceOutputs]):
    """Stage each range's vectors as a shard; when all are staged, replace them in the store.

    Without `replace`, it ends at the shards, which are left in the run directory, or in the work
    directory of workers that don't reach that.
    """

    job: ReplaceJob
    place: RunDirectory | WorkDirectory
    pending: tuple[KeyRange, ...]
    pass_number: int
    last: bool
    replace: bool

    def expand(self, vectors: PCollection[RangeVectors]) -> ReplaceOutputs:
        staged = vectors | "Stage" >> beam.Map(_stage, self.place, self.pass_number)
        replaced = (
            vectors.pipeline
            | "Once" >> beam.Create([self.job] if self.replace else [])
            # The side input is the barrier: it is there when every shard is.
            | "Replace" >> beam.ParDo(_Replace(self), beam.pvalue.AsList(staged))
        )
        return ReplaceOutputs(staged, replaced)


def _stage(
    vectors: RangeVectors, place: RunDirectory | WorkDirectory, pass_number: int
) -> StagedRange:
    return place.write_shard(vectors, pass_number=pass_number)


class _Replace(beam.DoFn):
    def __init__(self, config: ReplaceVectors) -> None:
        self._pending = config.pending
        self._last = config.last

    def process(self, job: ReplaceJob, staged: list[StagedRange]) -> Iterator[Summary]:
        yield replace_staged(job, pending=self._pending, last=self._last)


def replace_staged(job: ReplaceJob, *, pending: Sequence[KeyRange], last: bool) -> Summary:
    """Put what is staged into the store, if a server still has the model that it had before."""
    if job.target.access is not None:
        require_same(job.target, job.run.read_manifest().probe)
    return replace_vectors(job, pending=pending, last=last)
