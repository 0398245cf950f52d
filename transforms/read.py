"""Read: a key range becomes its rows."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import apache_beam as beam
from apache_beam.pvalue import PCollection

from reembed.transforms.match import concerns
from reembed.transforms.rows import KeyRange, RangeRows, Row
from reembed.transforms.staging import RunDirectory, read_ledger, read_shards
from reembed.transforms.stores import Store
from reembed.transforms.workdir import WorkDirectory

PART_TEXT_BYTES = 262_144
"""Most text that is embedded, staged and counted as one."""


def read_rows(
    store: Store,
    keys: KeyRange,
    run: RunDirectory,
    *,
    pass_number: int,
    late: bool = False,
    retry_skipped: bool = False,
    part_rows: int | None = None,
    by_length: bool = False,
) -> Iterator[RangeRows]:
    """Read the rows of a range that earlier passes have not staged, at most 256 KiB at a time.

    Each part is staged by itself, so with `part_rows`, as many as go in one request of a
    server, nothing that was paid for is lost where the next request fails. With `by_length` the
    longest texts come first, and those that are together are alike.

    In a first pass these are all rows; in a later one the new and the edited ones and, with
    `retry_skipped`, those that the model would not take. No more than `keys.most` of them.
    A `late` pass, one after the replacement was begun, also sees rows that are meant no more
    since they have a vector: the run's own, of another text.
    """
    known = read_shards(run.shards_of(keys.index, before_pass=pass_number), with_vectors=False)
    latest = {(row.key, row.digest): row.skipped for row in known}
    if retry_skipped:
        latest = {row: skip for row, skip in latest.items() if skip is None or skip.cause.by_rule}
    rows = store.read_range(keys, with_stored=late)
    if late:
        ledger = read_ledger(run.backup, keys.index, with_vectors=False)
        rows = [row for row in rows if concerns(row, ledger)]
    fresh = [row for row in rows if (row.key, row.digest) not in latest]
    fresh = fresh[: keys.most]
    if by_length:
        fresh.sort(key=text_bytes, reverse=True)
    for part, some in enumerate(split_rows(fresh, PART_TEXT_BYTES, part_rows)):
        yield RangeRows(keys, part, some)


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
    """Read each key range over a connection of its own, closed before anything is embedded."""

    store: Store
    run: RunDirectory
    pass_number: int
    late: bool = False
    retry_skipped: bool = False
    part_rows: int | None = None
    by_length: bool = False

    def expand(self, ranges: PCollection[KeyRange]) -> PCollection[RangeRows]:
        rows: PCollection[RangeRows] = ranges | beam.ParDo(_ReadRows(self))
        return rows

    def parts(self, keys: KeyRange) -> Iterator[RangeRows]:
        """Read one range."""
        return read_rows(
            self.store,
            keys,
            self.run,
            pass_number=self.pass_number,
            late=self.late,
            retry_skipped=self.retry_skipped,
            part_rows=self.part_rows,
            by_length=self.by_length,
        )


@dataclass
class ReadInputs(beam.PTransform[PCollection[KeyRange], PCollection[RangeRows]]):
    """Read what was left of each range to embed, where the store is out of reach."""

    work: WorkDirectory
    pass_number: int

    def expand(self, ranges: PCollection[KeyRange]) -> PCollection[RangeRows]:
        rows: PCollection[RangeRows] = ranges | beam.ParDo(_ReadRows(self))
        return rows

    def parts(self, keys: KeyRange) -> Iterator[RangeRows]:
        """Read one range."""
        return self.work.read_inputs(keys, pass_number=self.pass_number)


class _ReadRows(beam.DoFn):
    def __init__(self, config: ReadRows | ReadInputs) -> None:
        self._config = config

    def process(self, keys: KeyRange) -> Iterator[RangeRows]:
        return self._config.parts(keys)
