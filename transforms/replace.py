"""The sink of the pipeline: it writes the vectors, as shards.

Making them live is the launcher's last step, once all are there: `reembed.transforms.replacing`.
"""

from dataclasses import dataclass

import apache_beam as beam
from apache_beam.pvalue import PCollection

from reembed.transforms.rows import RangeVectors, StagedRange
from reembed.transforms.staging import RunDirectory
from reembed.transforms.workdir import WorkDirectory


@dataclass
class ReplaceVectors(beam.PTransform[PCollection[RangeVectors], PCollection[StagedRange]]):
    """Write each part's vectors, as a shard in the run directory.

    For workers that don't reach that, in the work directory. The launcher puts them into the store
    when the job has ended: only then are all of them there, and only it holds the lock.
    """

    place: RunDirectory | WorkDirectory
    pass_number: int

    def expand(self, vectors: PCollection[RangeVectors]) -> PCollection[StagedRange]:
        staged: PCollection[StagedRange] = vectors | "Stage" >> beam.Map(
            _stage, self.place, self.pass_number
        )
        return staged


def _stage(
    vectors: RangeVectors, place: RunDirectory | WorkDirectory, pass_number: int
) -> StagedRange:
    return place.write_shard(vectors, pass_number=pass_number)
