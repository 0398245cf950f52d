"""Replacing: the staged vectors of a run are put into the store, all of them or none."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transforms.embedders import Target
from transforms.errors import TooManySkippedError
from transforms.match import Change, Match, match_rows, save_rows
from transforms.rows import KeyRange, StagedRow, Summary
from transforms.staging import (
    Ledger,
    RunDirectory,
    State,
    read_ledger,
    read_shards,
    require_room,
    write_backup,
)
from transforms.stores import AiMemoryStore, Replacement

ROW_BYTES = 128
"""What a row takes in a shard or in the backup besides its vector: a key and digests."""

MOST_ROWS_AT_ONCE = 50_000
"""Rows that are replaced in one transaction; more take several, unless one is asked for."""

TRANSACTION_SECONDS = 1.0
"""How long each of several transactions is meant to hold the write lock; ai-memory waits 5 s."""

_FIRST_ROWS = 2_048
"""Rows of the first of several transactions; the next are as large as the first was fast."""

_PAUSE_SECONDS = 0.12
"""Between two transactions: SQLite's own waiting looks every 0.1 s whether the lock is free."""

_FLUSH_BYTES = 64 * 1_048_576
"""Vectors held in memory while they are sorted into the order of the file."""

_FLUSH_ROWS = 4_096
"""The same where time is short: the clock is read when so many rows are written."""


@dataclass(frozen=True)
class Rules:
    """How a replacement is to be done.

    `most_skipped` is the share of the tried rows above which nothing is replaced. With
    `clear_skipped` a skipped row loses its previous vector. With `one_transaction` any number
    of rows is replaced in one.
    """

    most_skipped: float = 0.5
    clear_skipped: bool = False
    one_transaction: bool = False


@dataclass(frozen=True)
class ReplaceJob:
    """The replacement of a run's vectors, by one attempt. A value: workers get it.

    `ranges` are those of the whole table, in which vectors take `vector_bytes` now.
    """

    store: AiMemoryStore
    run: RunDirectory
    ranges: tuple[KeyRange, ...]
    target: Target
    rules: Rules
    attempt: str
    vector_bytes: int = 0

    def match(self, keys: KeyRange, *, with_stored: bool) -> Match:
        """Match the rows of a range, as they are now, with what is staged and saved."""
        ledger = read_ledger(self.run.backup, keys.index, with_vectors=False)
        staged = read_shards(self.run.shards_of(keys.index), with_vectors=with_stored)
        rows = self.store.read_range(keys, with_stored=with_stored)
        return match_rows(
            keys.index,
            rows,
            staged,
            ledger=ledger,
            describe=self.describe,
            clear_skipped=self.rules.clear_skipped,
        )

    def room(self, rows: int, *, staged: int = 0) -> dict[Path, int]:
        """The bytes that it takes to save and replace so many rows, and to stage some, by where.

        SQLite's log was measured at up to 1.75 times the new vectors, and 1.5 times what they
        are larger than the old ones goes to the log and the file besides.
        """
        row = 4 * self.target.dimension + ROW_BYTES
        new = rows * row
        log = 7 * new // 4 + 3 * max(0, new - self.vector_bytes) // 2
        return {
            self.run.path: staged * row + self.vector_bytes + rows * ROW_BYTES,
            self.store.path: max(log, self.vector_bytes),
        }

    @property
    def describe(self) -> partial:  # type: ignore[type-arg]
        """What a row holds once it has a vector of the target."""
        return partial(
            self.store.describe, model=self.target.model, dimension=self.target.dimension
        )


def replace_vectors(job: ReplaceJob, *, pending: Sequence[KeyRange], last: bool) -> Summary:
    """Put the staged vectors into the store, and say what the table then holds.

    A row gets its vector only if its text, read inside the transaction, still has the digest
    that the vector was made from. Before the first write all that will be replaced is saved
    and read back, and the manifest says `replacing`. If before that rows are new or edited,
    and this is not the `last` pass, nothing is written, and the summary names their ranges.
    Once a replacement was begun, the ranges not yet done and the `pending` ones are written; a
    `last` pass is then a part of it that was asked for. Safe to run twice: a row that holds its
    vector is not written again.

    Raises TooManySkippedError if too many of the tried rows failed, RunError if another
    attempt has taken over.
    """
    manifest = job.run.advance(job.attempt)
    if manifest.state is State.STAGING:
        found = sum((job.match(keys, with_stored=False).before for keys in job.ranges), Summary())
        check_failures(found, most=job.rules.most_skipped)
        if found.changed and not last:
            return Summary(remaining=found.remaining, changed=found.changed)
        require_room(job.room(found.replaced))
        wanted = list(_save_all(job))
    else:
        if last:  # Another part, of rows that the first look could not know.
            found = sum((job.match(k, with_stored=True).before for k in job.ranges), Summary())
            check_failures(found, most=job.rules.most_skipped)
        late = {keys.index for keys in pending}
        indexes = [k for k in job.ranges if k.index not in manifest.done or k.index in late]
        wanted = list(_changed(job, indexes))
    _write_all(job, wanted)
    return sum((job.match(keys, with_stored=True).after for keys in job.ranges), Summary())


def check_failures(found: Summary, *, most: float) -> None:
    """Refuse to replace anything if more than a share of the tried rows failed, or all did.

    Rows that were skipped by rule were not tried and don't count.
    """
    failures = {cause: count for cause, count in found.kept.items() if not cause.by_rule}
    failed = sum(failures.values())
    tried = failed + found.replaced
    if failed > most * tried or (failed and failed == tried):
        causes = ", ".join(f"{count} {cause}" for cause, count in failures.items())
        raise TooManySkippedError(
            f"{failed} of {tried} rows could not be embedded ({causes}), and --max-skipped allows "
            f"{most:.4g} of them and never all; nothing is replaced now, and what is staged stays: "
            "check the model, then run again with --retry-skipped, or with a higher --max-skipped"
        )


Portion = tuple[KeyRange, int]
"""A range of which rows are to be written, and how many."""


def _save_all(job: ReplaceJob) -> Iterator[Portion]:
    """Save what all rows hold that get a vector; give the ranges of those that are written."""
    for path in sorted(job.run.backup.iterdir()):
        path.unlink()  # Of an attempt that came to its end before it wrote anything.
    for keys in job.ranges:
        match = job.match(keys, with_stored=True)
        saved = save_rows([*match.equal, *match.changes], Ledger())
        if saved:
            write_backup(job.run.backup, keys.index, saved)
        if match.changes:
            yield keys, len(match.changes)


def _changed(job: ReplaceJob, ranges: Iterable[KeyRange]) -> Iterator[Portion]:
    for keys in ranges:
        changes = job.match(keys, with_stored=True).changes
        if changes:
            yield keys, len(changes)


def _write_all(job: ReplaceJob, wanted: Sequence[Portion]) -> None:
    """Write ranges in one transaction, or in several that are short and recorded."""
    manifest = job.run.advance(job.attempt)
    # What a process was writing when it died, and is found written, is done.
    done = manifest.done | manifest.writing - {keys.index for keys, _ in wanted}
    at_once = job.rules.one_transaction or sum(rows for _, rows in wanted) <= MOST_ROWS_AT_ONCE
    waiting = list(wanted)
    rows = math.inf if at_once else _FIRST_ROWS
    while waiting:
        portion = _take(waiting, rows)
        job.run.advance(
            job.attempt,
            state=State.REPLACING,
            done=done,
            writing=frozenset(keys.index for keys in portion),
        )
        started = time.monotonic()
        written = _write(job, portion, seconds=math.inf if at_once else 1.5 * TRANSACTION_SECONDS)
        seconds = time.monotonic() - started
        done |= {keys.index for keys in portion[:written]}
        waiting[: len(portion)] = waiting[written : len(portion)]
        if waiting:
            rows = max(1, rows * min(2.0, TRANSACTION_SECONDS / seconds))
            time.sleep(_PAUSE_SECONDS)
    everything = frozenset(keys.index for keys in job.ranges)
    job.run.advance(job.attempt, state=State.REPLACING, done=everything, writing=frozenset())


def _take(waiting: Sequence[Portion], rows: float) -> list[KeyRange]:
    """The first ranges that hold about so many rows, at least one range."""
    portion: list[KeyRange] = []
    taken = 0
    for keys, count in waiting:
        if portion and taken + count > rows:
            break
        portion.append(keys)
        taken += count
    return portion


def _write(job: ReplaceJob, portion: Sequence[KeyRange], *, seconds: float) -> int:
    """Write ranges in one transaction, as many as there is time for; return how many."""
    loads: Iterable[_Loaded] = (_load(job, keys) for keys in portion)
    if seconds < math.inf:
        loads = list(loads)  # Read before the lock is taken, so that it is held briefly.
    written = 0
    with job.store.replacing() as table:
        job.run.advance(job.attempt)  # A worker of an attempt that is gone must not write.
        ends = time.monotonic() + seconds
        most_rows = _FLUSH_BYTES // (4 * job.target.dimension)
        flush = _Flush(job, table, most_rows if seconds == math.inf else _FLUSH_ROWS)
        for keys, staged, ledger in loads:
            match = match_rows(
                keys.index,
                table.read_range(keys),
                staged,
                ledger=ledger,
                describe=job.describe,
                clear_skipped=job.rules.clear_skipped,
            )
            flush.add(keys, match.changes, ledger)
            written += 1
            if time.monotonic() > ends:
                break
        flush.all()
    return written


_Loaded = tuple[KeyRange, list[StagedRow], Ledger]


def _load(job: ReplaceJob, keys: KeyRange) -> _Loaded:
    staged = list(read_shards(job.run.shards_of(keys.index), with_vectors=True))
    return keys, staged, read_ledger(job.run.backup, keys.index, with_vectors=False)


class _Flush:
    """Collects changes and writes them in the order of the file, a portion at a time.

    What a row holds that is not in the backup as it is now is saved first.
    """

    def __init__(self, job: ReplaceJob, table: Replacement, most_rows: int) -> None:
        self._job = job
        self._table = table
        self._most_rows = most_rows
        self._changes: list[Change] = []

    def add(self, keys: KeyRange, changes: Sequence[Change], ledger: Ledger) -> None:
        saved = save_rows(changes, ledger)
        if saved:
            write_backup(self._job.run.backup, keys.index, saved)
        self._changes += changes
        if len(self._changes) > self._most_rows:
            self.all()

    def all(self) -> None:
        self._table.put([(change.row.rowid, change.new) for change in self._changes])
        self._changes.clear()
