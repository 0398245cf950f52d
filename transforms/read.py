"""Read: a key range becomes its rows."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import apache_beam as beam
from apache_beam.pvalue import PCollection

from reembed.transforms.match import concerns
from reembed.transforms.rows import KeyRange, RangeRows, Row
from reembed.transforms.staging import RunDirectory, read_ledger, read_shards
from reembed.transforms.stores import Store
from reembed.transforms.workdir import WorkDirectory

PART_TEXT_BYTES = 262_144
"""Most text that is embedded, staged and counted as one."""


@runtime_checkable  # Beam compares the types of what it is given.
class RowSource(Protocol):
    """Where the rows of a pass come from. A value: workers get it."""

    def read_parts(self, keys: KeyRange) -> Iterator[RangeRows]:
        """Read the rows of a range, in parts that are each embedded and staged as one."""


@dataclass(frozen=True)
class StoreRows:
    """The rows of a store that earlier passes of a run have not staged.

    In a first pass these are all rows; in a later one the new and the edited ones and, with
    `retry_skipped`, those that the model would not take. A pass that `begun` says comes after the
    replacement began also sees rows that are meant no more since they have a vector: the run's
    own, of another text.

    Each part is staged by itself, so with `part_rows`, as many as go in one request of a
    server, nothing that was paid for is lost where the next request fails. With `by_length` the
    longest texts come first, and those that are together are alike.
    """

    store: Store
    run: RunDirectory
    pass_number: int
    begun: bool = False
    retry_skipped: bool = False
    part_rows: int | None = None
    by_length: bool = False

    def read_parts(self, keys: KeyRange) -> Iterator[RangeRows]:
        """Read at most `keys.most` rows of a range over a connection of its own.

        A part holds at most 256 KiB of text. The connection is closed before the first is given.
        """
        fresh = self._read_fresh(keys)
        if self.by_length:
            fresh.sort(key=text_bytes, reverse=True)
        for part, some in enumerate(split_rows(fresh, PART_TEXT_BYTES, self.part_rows)):
            yield RangeRows(keys, part, some)

    def _read_fresh(self, keys: KeyRange) -> list[Row]:
        shards = self.run.shards_of(keys.index, before_pass=self.pass_number)
        known = read_shards(shards, with_vectors=False)
        latest = {(row.key, row.digest): row.skipped for row in known}
        if self.retry_skipped:
            latest = {
                row: skip for row, skip in latest.items() if skip is None or skip.cause.by_rule
            }
        rows = self.store.read_range(keys, with_stored=self.begun)
        if self.begun:
            ledger = read_ledger(self.run.backup, keys.index, with_vectors=False)
            rows = [row for row in rows if concerns(row, ledger)]
        fresh = [row for row in rows if (row.key, row.digest) not in latest]
        return fresh[: keys.most]


@dataclass(frozen=True)
class LeftRows:
    """The rows that the launcher has left in a work directory for a pass."""

    work: WorkDirectory
    pass_number: int

    def read_parts(self, keys: KeyRange) -> Iterator[RangeRows]:
        """Read the parts of a range that were left."""
        return self.work.read_inputs(keys, pass_number=self.pass_number)


def text_bytes(row: Row) -> int:
    """The length of a row's text in UTF-8, which says more of its tokens than its characters do."""
    return len(row.text.encode())


def split_rows(
    rows: Iterable[Row], most_bytes: int, most_rows: int | None = None
) -> Iterator[tuple[Row, ...]]:
    """Split rows into runs of at most so many rows and bytes of text each, or of one row.

    >>> rows = [Row(key, 0, text, b"") for key, text in [("a", "xx"), ("b", "x"), ("c", "xxx")]]
    >>> ["".join(row.key for row in part) for part in split_rows(rows, 3)]
    ['ab', 'c']
    """
    part: list[Row] = []
    size = 0
    for row in rows:
        length = text_bytes(row)
        if part and (size + length > most_bytes or len(part) == most_rows):
            yield tuple(part)
            part, size = [], 0
        part.append(row)
        size += length
    if part:
        yield tuple(part)


@dataclass
class ReadRows(beam.PTransform[PCollection[KeyRange], PCollection[RangeRows]]):
    """Read the rows of each key range from a source."""

    source: RowSource

    def expand(self, ranges: PCollection[KeyRange]) -> PCollection[RangeRows]:
        rows: PCollection[RangeRows] = ranges | beam.FlatMap(self.source.read_parts)
        return rows
