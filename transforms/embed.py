"""Embed: rows become vectors, one batch at a time; a text that fails becomes a skipped row."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam.metrics.metric import Metrics
from apache_beam.pvalue import PCollection, TaggedOutput
from numpy.typing import NDArray

from transforms.embedders import Embedder, Target, load_embedder
from transforms.errors import TextRejected
from transforms.rows import Cause, RangeRows, RangeVectors, Row, Skipped, StagedRow, Vectors

SKIPPED: Literal["skipped"] = "skipped"

Embedded = NDArray[np.float32] | tuple[Cause, str]
"""A text's vector, shape (dimension,), or why there is none."""


def embed_rows(
    part: RangeRows, embedder: Embedder, *, dimension: int, batch: int, pause: float = 0.0
) -> RangeVectors:
    """Embed the rows of a part: equal texts once, texts of like length together.

    `batch` is the most texts in one call of the embedder, and `pause` the seconds to wait
    after each. Every row comes back, in order, with its vector or with why it has none.
    """
    texts = {row.text for row in part.rows if row.skipped is None}
    ordered = sorted(texts, key=lambda text: (len(text), text))
    results: dict[str, Embedded] = {}
    for at in range(0, len(ordered), batch):
        some = ordered[at : at + batch]
        results.update(zip(some, embed_texts(some, embedder, dimension), strict=True))
        time.sleep(pause)
    rows = tuple(_staged(row, results.get(row.text)) for row in part.rows)
    return RangeVectors(part.range, part.part, dimension, rows)


def _staged(row: Row, result: Embedded | None) -> StagedRow:
    if row.skipped is not None or result is None:
        return StagedRow(row.key, row.digest, None, row.skipped)
    if isinstance(result, tuple):
        return StagedRow(row.key, row.digest, None, Skipped(row.key, *result, row.namespace))
    return StagedRow(row.key, row.digest, result.astype("<f4").tobytes())


def embed_texts(texts: Sequence[str], embedder: Embedder, dimension: int) -> list[Embedded]:
    """Embed a batch; where it fails, its halves, down to the single text that is at fault.

    A vector that is no use fails its text like a rejection: wrong shape, NaN, infinity, or
    all zeros, which have no direction.
    """
    failed: tuple[Cause, str]
    try:
        vectors = embedder.embed(texts)
        problems = find_problems(vectors, len(texts), dimension)
        if not any(problems):
            return list(vectors)
        failed = Cause.BAD_VECTOR, next(filter(None, problems))
    except TextRejected as error:
        failed = Cause.REJECTED, str(error)
    if len(texts) == 1:
        return [failed]
    half = len(texts) // 2
    return [
        result
        for some in (texts[:half], texts[half:])
        for result in embed_texts(some, embedder, dimension)
    ]


def find_problems(vectors: Vectors, count: int, dimension: int) -> list[str]:
    """What is wrong with each vector, "" for nothing; one problem if it is with all of them.

    >>> find_problems(np.array([[1, 0], [0, 0]], dtype=np.float32), 2, 2)
    ['', 'the model gave a vector of zeros']
    """
    if vectors.shape != (count, dimension):
        return [f"the model gave vectors of shape {vectors.shape}, not {(count, dimension)}"]
    finite: NDArray[np.bool_] = np.all(np.isfinite(vectors), axis=1)
    nonzero: NDArray[np.bool_] = np.any(vectors, axis=1)
    return [
        "" if ok and some else f"the model gave a vector {'of zeros' if ok else 'with NaN or inf'}"
        for ok, some in zip(finite, nonzero, strict=True)
    ]


class EmbedOutputs(NamedTuple):
    """The two outputs of EmbedRows."""

    vectors: PCollection[RangeVectors]
    skipped: PCollection[Skipped]


@dataclass
class EmbedRows(beam.PTransform[PCollection[RangeRows], EmbedOutputs]):
    """Embed rows with the target model; skipped rows also leave by an output of their own."""

    target: Target
    batch: int
    pause: float = 0.0

    def expand(self, rows: PCollection[RangeRows]) -> EmbedOutputs:
        outputs = rows | beam.ParDo(_EmbedRows(self)).with_outputs(SKIPPED, main="vectors")
        return EmbedOutputs(outputs.vectors, outputs.skipped)


class _EmbedRows(beam.DoFn):
    _embedder: Embedder

    def __init__(self, config: EmbedRows) -> None:
        self._config = config
        self._embedded = Metrics.counter("reembed", "embedded")
        self._skipped = Metrics.counter("reembed", "skipped")

    def setup(self) -> None:
        self._embedder = load_embedder(self._config.target)

    def process(
        self, part: RangeRows
    ) -> Iterator[RangeVectors | TaggedOutput[Literal["skipped"], Skipped]]:
        config = self._config
        vectors = embed_rows(
            part,
            self._embedder,
            dimension=config.target.dimension,
            batch=config.batch,
            pause=config.pause,
        )
        for row in vectors.rows:
            if row.skipped is None:
                self._embedded.inc()
            else:
                self._skipped.inc()
                yield TaggedOutput(SKIPPED, row.skipped)
        yield vectors
