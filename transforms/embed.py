"""Embed: rows become vectors, one batch at a time; a text that fails becomes a skipped row."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import apache_beam as beam
import numpy as np
from apache_beam.metrics.metric import Metrics
from apache_beam.pvalue import PCollection, TaggedOutput
from apache_beam.transforms.window import GlobalWindows
from apache_beam.typehints.decorators import no_annotations
from apache_beam.utils.windowed_value import WindowedValue
from numpy.typing import NDArray

from reembed.transforms.embedders import Embedder, Target, have_direction, load_embedder
from reembed.transforms.embedders.target import MOST_IN_FLIGHT
from reembed.transforms.errors import TextRejected
from reembed.transforms.known import KnownTexts
from reembed.transforms.rows import Cause, RangeRows, RangeVectors, Row, Skipped, StagedRow, Vectors

SKIPPED: Literal["skipped"] = "skipped"

MOST_KNOWN_BYTES = 64 * 1_048_576
"""What the vectors of known texts take at most; equal texts are often near, or many."""

_KNOWN_BYTES = 1_000
"""What a known text takes besides its vector."""


class Embedded(NamedTuple):
    """What became of a text: its vector, as little-endian float32, or why it has none."""

    vector: bytes | None
    failed: tuple[Cause, str] | None = None
    cut: bool = False


@dataclass
class Work:
    """What became of some texts, in their order, and the tokens that it took, and each batch."""

    results: list[Embedded] = field(default_factory=list)
    tokens: int = 0
    sizes: tuple[int, ...] = ()

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.results + other.results, self.tokens + other.tokens, self.sizes + other.sizes
        )


Known = KnownTexts[Embedded]
"""What became of texts in this process."""


def embed_rows(
    part: RangeRows,
    embedder: Embedder,
    *,
    dimension: int,
    batch: int,
    pause: float = 0.0,
    known: Known | None = None,
) -> RangeVectors:
    """Embed the rows of a part: equal texts once, texts of like length together.

    `batch` is the most texts in one call of the embedder, and `pause` the seconds to wait
    after each. A text that is `known` from another part is not embedded again. Every row comes
    back, in order, with its vector or with why it has none.
    """
    texts = {row.digest: row.text for row in part.rows if row.skipped is None}
    work = Work()

    def embed(digests: Sequence[bytes]) -> list[Embedded]:
        nonlocal work
        while len(work.results) < len(digests):
            some = [texts[digest] for digest in digests[len(work.results) :][:batch]]
            work += embed_texts(some[: embedder.fitting(some)], embedder, dimension)
            time.sleep(pause)
        return work.results

    ordered = sorted(texts, key=lambda digest: (len(texts[digest].encode()), texts[digest]))
    results = (known or KnownTexts(len(ordered))).find(ordered, embed)
    rows = tuple(_staged(row, results.get(row.digest)) for row in part.rows)
    embedded = sum(row.vector is not None for row in rows)
    mine = sum(result.vector is not None for result in work.results)
    return RangeVectors(
        part.range, part.part, dimension, rows, work.tokens, work.sizes, embedded - mine
    )


@lru_cache(maxsize=1)
def known_texts(target: Target, attempt: str) -> Known:
    """The texts that this process has embedded with a target, in one attempt at a run.

    A worker may outlive a run, and a server have another model in the next.
    """
    return KnownTexts(MOST_KNOWN_BYTES // (4 * target.dimension + _KNOWN_BYTES))


def _staged(row: Row, result: Embedded | None) -> StagedRow:
    if row.skipped is not None or result is None:
        return StagedRow(row.key, row.digest, None, row.skipped)
    if result.failed is not None:
        return StagedRow(row.key, row.digest, None, Skipped(row.key, *result.failed, row.namespace))
    return StagedRow(row.key, row.digest, result.vector, None, result.cut)


def embed_texts(texts: Sequence[str], embedder: Embedder, dimension: int) -> Work:
    """Embed a batch; where it fails, parts of it, down to the single text that is at fault.

    A batch that is rejected is halved, or cut to what the embedder says that it takes. A vector
    that is no use fails its text: wrong shape, NaN, infinity, or all zeros, which have no
    direction. Such a text is tried once more, alone; the others have their vectors.
    """
    try:
        batch = embedder.embed_batch(texts)
    except TextRejected as error:
        if len(texts) == 1:
            return Work([Embedded(None, (Cause.REJECTED, str(error)))])
        most = min(error.most or len(texts) // 2, len(texts) - 1)
        work = _embed_pieces(texts, embedder, dimension, most=most)
        if error.most and not any(result.failed for result in work.results):
            embedder.learn_limit(most)  # No text was at fault, so they were too many.
        return work
    problems = find_problems(batch.vectors, len(texts), dimension)
    if len(problems) != len(texts):
        halves = _embed_pieces(texts, embedder, dimension, most=len(texts) // 2)
        return Work([], batch.tokens, batch.sizes) + halves
    work = Work([], batch.tokens, batch.sizes)
    numbers, size = batch.vectors.astype("<f4").tobytes(), 4 * dimension
    for at, (text, problem) in enumerate(zip(texts, problems, strict=True)):
        if not problem:
            vector = numbers[at * size : (at + 1) * size]
            work.results.append(Embedded(vector, None, at in batch.cut))
        elif len(texts) > 1:
            work += embed_texts([text], embedder, dimension)
        else:
            reason = batch.wrong.get(at, problem)
            work.results.append(Embedded(None, (Cause.BAD_VECTOR, reason)))
    return work


def _embed_pieces(texts: Sequence[str], embedder: Embedder, dimension: int, *, most: int) -> Work:
    """Embed a batch that failed as a whole in pieces of at most so many texts."""
    pieces = [texts[at : at + most] for at in range(0, len(texts), most)]
    return sum((embed_texts(some, embedder, dimension) for some in pieces), Work())


def find_problems(vectors: Vectors, count: int, dimension: int) -> list[str]:
    """What is wrong with each vector, "" for nothing; one problem if it is with all of them.

    >>> find_problems(np.array([[1, 0], [0, 0]], dtype=np.float32), 2, 2)
    ['', 'the model gave a vector of zeros']
    """
    if vectors.shape != (count, dimension):
        return [f"the model gave vectors of shape {vectors.shape}, not {(count, dimension)}"]
    finite: NDArray[np.bool_] = np.all(np.isfinite(vectors), axis=1)
    nonzero = have_direction(vectors)
    if finite.all() and nonzero.all():
        return [""] * count
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
    """Embed rows with the target model; skipped rows also leave by an output of their own.

    Equal texts of one `attempt` are embedded once in each process.
    """

    target: Target
    batch: int
    attempt: str
    pause: float = 0.0

    # Beam would warn that it makes nothing of the annotations.
    @no_annotations  # type: ignore[untyped-decorator]
    def expand(self, rows: PCollection[RangeRows]) -> EmbedOutputs:
        outputs = rows | beam.ParDo(_EmbedRows(self)).with_outputs(SKIPPED, main="vectors")
        return EmbedOutputs(outputs.vectors, outputs.skipped)


Output = RangeVectors | TaggedOutput[Literal["skipped"], Skipped]


class _EmbedRows(beam.DoFn):
    """Embeds parts; of a model that can do with several batches at a time, several parts.

    These wait in `_ahead`, in order, so what waits is bounded by what is in flight.
    """

    _embedder: Embedder
    _known: Known
    _pool: ThreadPoolExecutor

    def __init__(self, config: EmbedRows) -> None:
        self._config = config
        self._ahead: deque[Future[RangeVectors]] = deque()
        self._embedded = Metrics.counter("reembed", "embedded")
        self._skipped = Metrics.counter("reembed", "skipped")
        self._cached = Metrics.counter("reembed", "cached")
        self._batch_tokens = Metrics.distribution("reembed", "batch_tokens")

    def setup(self) -> None:
        self._embedder = load_embedder(self._config.target)
        self._known = known_texts(self._config.target, self._config.attempt)
        self._pool = ThreadPoolExecutor(MOST_IN_FLIGHT, thread_name_prefix="embed")

    def start_bundle(self) -> None:
        self._ahead.clear()  # Of a bundle that failed.

    def process(self, part: RangeRows) -> Iterator[Output]:
        self._ahead.append(self._pool.submit(self._embed, part))
        for vectors in self._embedded_parts(ahead=self._embedder.in_flight - 1):
            yield from self._outputs(vectors)

    def finish_bundle(self) -> Iterator[WindowedValue | TaggedOutput[Literal["skipped"], Any]]:
        for vectors in self._embedded_parts(ahead=0):
            for output in self._outputs(vectors):
                if isinstance(output, TaggedOutput):
                    yield TaggedOutput(SKIPPED, GlobalWindows.windowed_value(output.value))
                else:
                    yield GlobalWindows.windowed_value(output)

    def teardown(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _embed(self, part: RangeRows) -> RangeVectors:
        config = self._config
        return embed_rows(
            part,
            self._embedder,
            dimension=config.target.dimension,
            batch=config.batch,
            pause=config.pause,
            known=self._known,
        )

    def _embedded_parts(self, *, ahead: int) -> Iterator[RangeVectors]:
        """Give parts until no more than so many are ahead; if one fails, all that don't."""
        failed: Exception | None = None
        while self._ahead and (failed or len(self._ahead) > ahead):
            try:
                yield self._ahead.popleft().result()
            except Exception as error:
                failed = failed or error
        if failed:
            raise failed

    def _outputs(self, vectors: RangeVectors) -> Iterator[Output]:
        skipped = [row.skipped for row in vectors.rows if row.skipped is not None]
        self._embedded.inc(len(vectors.rows) - len(skipped))
        self._skipped.inc(len(skipped))
        self._cached.inc(vectors.cached)
        for size in vectors.sizes:
            self._batch_tokens.update(size)
        for skip in skipped:
            yield TaggedOutput(SKIPPED, skip)
        yield vectors
