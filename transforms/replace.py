"""The sink of the pipeline: it writes the vectors, as shards.

Making them live is the launcher's last step, once all are there: `reembed.transforms.replacing`.
"""

from dataclasses import dataclass

import apache_beam as beam
from apache_beam.pvalue import PCollection

from reembed.transforms.passes import PassDirectory
from reembed.transforms.rows import RangeVectors, StagedRange


@dataclass
class ReplaceVectors(beam.PTransform[PCollection[RangeVectors], PCollection[StagedRange]]):
    """Write each part's vectors, as a shard in the directory of the pass.

    The launcher puts them into the store when the job has ended: only then are all of them there,
    and only it holds the lock.
    """

    place: PassDirectory
    pass_number: int

    def expand(self, vectors: PCollection[RangeVectors]) -> PCollection[StagedRange]:
        staged: PCollection[StagedRange] = vectors | "Stage" >> beam.Map(
            _stage, self.place, self.pass_number
        )
        return staged


def _stage(vectors: RangeVectors, place: PassDirectory, pass_number: int) -> StagedRange:
    return place.write_shard(vectors, pass_number=pass_number)
