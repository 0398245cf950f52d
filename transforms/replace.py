"""Replace: vectors are staged as shards and then, all at once, put into the store."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import apache_beam as beam
from apache_beam.pvalue import PCollection

from transforms.embedders import Target
from transforms.errors import TooManySkippedError
from transforms.rows import Cause, KeyRange, RangeVectors, Row, StagedRange, StagedRow, Summary
from transforms.staging import RunDirectory, read_shards
from transforms.stores import AiMemoryStore

MOST_FAILED = 0.5
"""Above this share of the tried rows, a run is taken for broken and replaces nothing."""

_FLUSH_BYTES = 64 * 1_048_576
"""Vectors held in memory while they are sorted into the order of the file."""


def replace_vectors(
    store: AiMemoryStore,
    run: RunDirectory,
    ranges: Sequence[KeyRange],
    *,
    target: Target,
    last: bool,
    only: Sequence[KeyRange] | None = None,
) -> Summary:
    """Put the staged vectors of all ranges into the store, in one transaction.

    A row gets its vector only if its text, read inside the transaction, still has the digest
    that the vector was made from. If rows are new or edited, and this is not the `last` pass,
    nothing is written, and the summary names their ranges. Once a pass has replaced all
    ranges, `only` names those of which rows had changed: the others are looked at, not
    written again. Safe to run twice: the same rows get the same vectors.

    Raises TooManySkippedError if over half of the tried rows failed, or all of them.
    """
    shards = run.list_shards()
    found: dict[int, Summary] = {}
    for keys in ranges:
        staged = read_shards(shards.get(keys.index, ()), with_vectors=False)
        found[keys.index] = match_rows(keys.index, store.read_range(keys), staged).summary
    all_found = sum(found.values(), start=Summary())
    check_failures(all_found)
    if all_found.changed and not last:
        return Summary(changed=all_found.changed)
    written = ranges if only is None else only
    waiting: list[tuple[int, bytes]] = []
    with store.replacing() as table:
        for keys in written:
            staged = read_shards(shards.get(keys.index, ()), with_vectors=True)
            match = match_rows(keys.index, table.read_range(keys), staged)
            found[keys.index] = match.summary
            waiting += match.vectors
            if len(waiting) * target.dimension * 4 > _FLUSH_BYTES:
                table.put(waiting, dimension=target.dimension, model=target.model)
                waiting.clear()
        table.put(waiting, dimension=target.dimension, model=target.model)
    return sum(found.values(), start=Summary())


class Match(NamedTuple):
    """The vectors to write (rowid, little-endian float32), and what becomes of each row."""

    vectors: list[tuple[int, bytes]]
    summary: Summary


def match_rows(index: int, rows: Iterable[Row], staged: Iterable[StagedRow]) -> Match:
    """Match the rows of a range, as they are now, with what is staged for it."""
    by_text = {(row.key, row.digest): row for row in staged}
    vectors: list[tuple[int, bytes]] = []
    kept: Counter[Cause] = Counter()
    replaced = remaining = 0
    for row in rows:
        match by_text.get((row.key, row.digest)):
            case None:
                remaining += 1
            case StagedRow(skipped=None, vector=vector):
                replaced += 1
                vectors += [] if vector is None else [(row.rowid, vector)]
            case StagedRow(skipped=skipped) if skipped is not None:
                kept[skipped.cause] += 1
    changed = frozenset([index] if remaining else [])
    return Match(
        vectors, Summary(replaced=replaced, kept=kept, remaining=remaining, changed=changed)
    )


def check_failures(found: Summary) -> None:
    """Refuse to replace anything if more than half of the tried rows failed, or all did.

    Rows that were skipped by rule were not tried and don't count.
    """
    failures: Mapping[Cause, int] = {
        cause: count for cause, count in found.kept.items() if not cause.by_rule
    }
    failed = sum(failures.values())
    tried = failed + found.replaced
    if failed > MOST_FAILED * tried:
        causes = ", ".join(f"{count} {cause}" for cause, count in failures.items())
        raise TooManySkippedError(
            f"{failed} of {tried} rows could not be embedded ({causes}), which points at the "
            "model rather than at the rows; nothing was replaced: check the model and run again"
        )


class ReplaceOutputs(NamedTuple):
    """The shards that were staged, and what the replacement did: one Summary, or none."""

    staged: PCollection[StagedRange]
    replaced: PCollection[Summary]


@dataclass
class ReplaceVectors(beam.PTransform[PCollection[RangeVectors], ReplaceOutputs]):
    """Stage each range's vectors as a shard; when all are staged, replace them in the store.

    `ranges` are those of the whole table, of which earlier passes may have staged some, and
    `only` those that are to be written, if not all. Without `replace`, it ends at the shards.
    """

    store: AiMemoryStore
    target: Target
    run: RunDirectory
    ranges: tuple[KeyRange, ...]
    only: tuple[KeyRange, ...] | None
    pass_number: int
    last: bool
    replace: bool

    def expand(self, vectors: PCollection[RangeVectors]) -> ReplaceOutputs:
        staged = vectors | "Stage" >> beam.Map(_stage, self.run, self.pass_number)
        replaced = (
            vectors.pipeline
            | "Once" >> beam.Create([self.run] if self.replace else [])
            # The side input is the barrier: it is there when every shard is.
            | "Replace" >> beam.ParDo(_Replace(self), beam.pvalue.AsList(staged))
        )
        return ReplaceOutputs(staged, replaced)


def _stage(vectors: RangeVectors, run: RunDirectory, pass_number: int) -> StagedRange:
    return run.write_shard(vectors, pass_number=pass_number)


class _Replace(beam.DoFn):
    def __init__(self, config: ReplaceVectors) -> None:
        self._config = config

    def process(self, run: RunDirectory, staged: list[StagedRange]) -> Iterator[Summary]:
        config = self._config
        yield replace_vectors(
            config.store,
            run,
            config.ranges,
            target=config.target,
            last=config.last,
            only=config.only,
        )
