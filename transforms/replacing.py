"""Replacing: the staged vectors of a run are put into the store, all of them or none."""

from __future__ import annotations

import math
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from reembed.transforms.embedders import Target
from reembed.transforms.errors import TooManySkippedError
from reembed.transforms.match import Match, holds_former, is_ours, match_rows, save_rows
from reembed.transforms.passes import Pass
from reembed.transforms.rows import KeyRange, Row, StagedRow, Stored, Summary, vector_digest
from reembed.transforms.staging import (
    Ledger,
    Rules,
    RunDirectory,
    Shard,
    State,
    count_rows,
    read_ledger,
    read_shards,
    read_vectors,
    require_room,
    saved_ranges,
    write_backup,
)
from reembed.transforms.stores import Replacement, Store, Written, same_columns

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

_SAVES_AHEAD = 2
"""Ranges that wait to be saved, while the next one is read."""

_FLUSH_BYTES = 64 * 1_048_576
"""Vectors held in memory while they are sorted into the order of the file."""

_FLUSH_ROWS = 4_096
"""The same where time is short: the clock is read when so many rows are written."""

_READ_BACK_ROWS = 16_384
"""Rows that are read back at a time."""


@dataclass(frozen=True)
class ReplaceJob:
    """The replacement of a run's vectors, by one attempt.

    `ranges` are those of the whole table, in which vectors take `vector_bytes` now. `order` is
    the run's number among those that have replaced, should this be its first replacement. Of the
    shards only those are used that were `listed`, if any: what a worker adds that should be gone
    must not be taken for what was saved.
    """

    store: Store
    run: RunDirectory
    ranges: tuple[KeyRange, ...]
    target: Target
    rules: Rules
    attempt: str
    vector_bytes: int = 0
    order: int = 1
    listed: Mapping[int, Sequence[Shard]] | None = None

    def match(
        self, keys: KeyRange, *, with_stored: bool, with_vectors: bool | None = None
    ) -> Match:
        """Match the rows of a range, as they are now, with what is staged and saved."""
        with_vectors = with_stored if with_vectors is None else with_vectors
        staged = read_shards(self.shards_of(keys.index), with_vectors=with_vectors)
        ledger = read_ledger(self.run.backup, keys.index, with_vectors=False)
        store = self.store if ledger.keys else self.store.selected()
        rows = store.read_range(keys, with_stored=with_stored)
        return self.match_with(keys, rows, staged, ledger)

    def match_with(
        self, keys: KeyRange, rows: Iterable[Row], staged: Iterable[StagedRow], ledger: Ledger
    ) -> Match:
        """Match rows with what was read for them."""
        return match_rows(
            keys.index,
            rows,
            staged,
            ledger=ledger,
            describe=self.describe,
            same=same_columns,
            clear_skipped=self.rules.clear_skipped,
        )

    def shards_of(self, index: int) -> Sequence[Shard]:
        """The shards of a range, oldest pass first."""
        return self.run.shards_of(index) if self.listed is None else self.listed.get(index, ())

    def look(self, keys: KeyRange) -> Summary:
        """Say what a range holds; the staged vectors are read only where it takes them."""
        match = self.match(keys, with_stored=True, with_vectors=False)
        return (self.match(keys, with_stored=True) if match.unknown else match).after

    def is_in_table(self) -> bool:
        """Whether any row, wherever it is now, holds a vector that the run wrote."""
        store = self.store.everywhere()
        written: set[bytes] = set()
        for keys in self.ranges:
            ledger = read_ledger(self.run.backup, keys.index, with_vectors=False)
            rows = store.read_range(keys, with_stored=True) if ledger.keys else []
            if any(is_ours(row, ledger) for row in rows):
                return True
            written |= {saved.written for key in ledger.keys for saved in ledger.of(key)}
        if store.stable or not written:
            return False
        # Rows that have nothing but numbers to go by may have others now.
        return any(
            row.stored.vector is not None and vector_digest(row.stored.vector) in written
            for keys in self.ranges
            for row in store.read_range(keys, with_stored=True)
            if row.stored is not None
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


def replace_vectors(job: ReplaceJob, after: Pass) -> Summary:
    """Put the vectors into the store that are staged after a pass; say what the table then holds.

    A row gets its vector only if its text still has, inside the transaction, the digest that the
    vector was made from: it is read there, unless no other process has committed anything since it
    was read before. Before the first write all that will be replaced is saved and read back, and
    the manifest says `replacing`. If before that rows are new or edited, and the pass does not
    force the replacement, nothing is written, and the summary names their ranges.
    Once a replacement has begun, the ranges not yet done and those of the pass are written. Safe
    to run twice: a row that holds its vector is not written again.

    Raises TooManySkippedError if too many of the tried rows failed, RunError if another
    attempt has taken over.
    """
    manifest = job.run.advance(job.attempt)
    job = replace(job, listed=job.run.list_shards())
    note: dict[str, Any] = {"state": State.REPLACING}
    with job.store.replacing() as table:
        version = None
        if manifest.state is State.STAGING:
            require_room(job.room(job.run.staged_rows()))
            version = table.version
            found, wanted, saved = _save_all(job, table, force=after.phase.forces)
            if wanted is None:
                return Summary(remaining=found.remaining, changed=found.changed)
            note |= {"order": job.order, "rules": job.rules, "saved": saved.files}
            # A backup that was there before, and could not be let go, is of rows that were written.
            note |= {"wrote": True} if saved.kept else {}
        else:
            if after.phase.forces:  # Another part, of rows that the first look could not know.
                found = sum((job.match(k, with_stored=True).before for k in job.ranges), Summary())
                check_failures(found, most=job.rules.most_skipped, whole=job.store.whole)
            changed = {keys.index for keys in after.ranges}
            left = [k for k in job.ranges if k.index not in manifest.done or k.index in changed]
            wanted = list(_changed(job, left))
        _write_all(job, table, wanted, version, note)
        # Whether no other process has written anything since all that was found.
        undisturbed = version == table.version and not table.fires_triggers
    # SQLite's log is gone by now, so there is room for this on a disk that is almost full.
    everything = frozenset(keys.index for keys in job.ranges)
    job.run.advance(job.attempt, **note, done=everything, writing=frozenset())
    if undisturbed and reads_back(job.store, table.written):
        return found
    return sum((job.look(keys) for keys in job.ranges), Summary())


def reads_back(store: Store, written: Written) -> bool:
    """Whether all rows hold what was written, over a new connection.

    Read in pieces, so that in DELETE mode no writer waits for the whole of it.
    """
    return not any(store.differing(digests) for digests in written.digests(_READ_BACK_ROWS))


def check_failures(found: Summary, *, most: float, whole: bool = False) -> None:
    """Refuse to replace anything if more than a share of the tried rows failed, or all did.

    Rows that were skipped by rule were not tried and don't count.
    """
    failures = {cause: count for cause, count in found.kept.items() if not cause.by_rule}
    failed = sum(failures.values())
    tried = failed + found.replaced
    if failed > most * tried or (failed and failed == tried):
        causes = ", ".join(f"{count} {cause}" for cause, count in failures.items())
        why, more = (
            f"--max-skipped allows {most:.4g} of them and never all",
            "a higher --max-skipped",
        )
        if whole:
            why, more = "all rows are replaced here or none", "these rows edited or deleted"
        raise TooManySkippedError(
            f"{failed} of {tried} rows could not be embedded ({causes}), and {why}; nothing is "
            "replaced now, and what is staged stays: check the model, then run again with "
            f"--retry-skipped, or with {more}"
        )


class Portion(NamedTuple):
    """A range of which rows are to be written, and how many.

    Where these are all that vectors are staged for, `rowids` are theirs, in the order of the
    shards. `columns` says whether anything but their vectors changes.
    """

    keys: KeyRange
    rows: int
    rowids: array[int] | None = None
    columns: bool = True


@dataclass
class _SavedFiles:
    """The files of a backup with their rows; `kept` says that some were there before."""

    files: dict[str, int] = field(default_factory=dict)
    kept: bool = False


def _save_all(
    job: ReplaceJob, table: Replacement, *, force: bool
) -> tuple[Summary, list[Portion] | None, _SavedFiles]:
    """Save what all rows hold that get a vector; give what will be and what is to be written.

    Rows that hold their vector already are noted as written, to be read back with the others.
    If rows are new or edited and nothing is to `force` it, nothing is saved, and None given for
    the latter. Raises TooManySkippedError.
    """
    found = Summary()
    wanted: list[Portion] = []
    kept = _drop_backup(job)  # Of an attempt that came to its end before it wrote anything.
    files = _SavedFiles(kept, bool(kept))
    with ThreadPoolExecutor(1, thread_name_prefix="save") as pool:
        saving: deque[tuple[Future[str], int]] = deque()

        def finish_one() -> None:
            writing, rows = saving.popleft()
            files.files[writing.result()] = rows

        for keys in job.ranges:
            matched = job.match(keys, with_stored=force or not found.changed)
            found += matched.before
            if found.changed and not force:
                continue
            ledger = Ledger()
            if kept:
                ledger = read_ledger(job.run.backup, keys.index, with_vectors=False)
            equal = [change for change in matched.equal if not is_ours(change.row, ledger)]
            saved = save_rows([*equal, *matched.changes], ledger)
            table.written.add([(change.row.rowid, change.new) for change in matched.equal])
            if saved:
                writing = pool.submit(write_backup, job.run.backup, keys.index, saved)
                saving.append((writing, len(saved)))
            if matched.changes:
                wanted.append(_portion(keys, matched))
            while len(saving) > _SAVES_AHEAD:
                finish_one()
        while saving:
            finish_one()
    if found.changed and not force:
        _drop_backup(job)
        return found, None, files
    try:
        check_failures(found, most=job.rules.most_skipped, whole=job.store.whole)
    except TooManySkippedError:
        _drop_backup(job)
        raise
    return found, wanted, files


def _portion(keys: KeyRange, match: Match) -> Portion:
    rows = {(change.row.key, change.row.digest): change.row.rowid for change in match.changes}
    whole = len(rows) == len(match.changes) and rows.keys() == set(match.vectors)
    columns = any(
        change.row.stored is None or change.row.stored.others != change.new.others
        for change in match.changes
    )
    rowids = array("q", map(rows.__getitem__, match.vectors)) if whole else None
    return Portion(keys, len(match.changes), rowids, columns)


def _drop_backup(job: ReplaceJob) -> dict[str, int]:
    """Delete the files of the backup whose rows hold what these hold; give the others.

    A run that is staging has no use for a backup, unless its manifest is wrong about that.
    """
    job.run.advance(job.attempt)  # The backup of another attempt is not this one's.
    kept: dict[str, int] = {}
    saved = saved_ranges(job.run.backup)
    # A row that is missed in its range may be in another one now.
    moved = bool(saved) and not job.store.stable and job.is_in_table()
    for index, paths in saved.items():
        needed = moved or index >= len(job.ranges) or not _hold_former(job, job.ranges[index])
        for path in paths:
            if needed:
                kept[path.name] = count_rows(path)
            else:
                path.unlink()
    return kept


def _hold_former(job: ReplaceJob, keys: KeyRange) -> bool:
    """Whether no row of a range can have lost to the run what the backup says that it held."""
    ledger = read_ledger(job.run.backup, keys.index, with_vectors=False)
    rows = job.store.everywhere().read_range(keys, with_stored=True)
    return all(holds_former(row, ledger) for row in rows if ledger.of(row.key))


def _changed(job: ReplaceJob, ranges: Iterable[KeyRange]) -> Iterator[Portion]:
    for keys in ranges:
        changes = job.match(keys, with_stored=True).changes
        if changes:
            yield Portion(keys, len(changes))


def _write_all(
    job: ReplaceJob,
    table: Replacement,
    wanted: Sequence[Portion],
    version: int | None,
    note: Mapping[str, Any],
) -> None:
    """Write ranges in one transaction, or in several that are short and recorded.

    `version` is that of the database when all that is wanted was found and saved; `note` is what
    the manifest must say before the first transaction.
    """
    manifest = job.run.advance(job.attempt)
    # What a process was writing when it died, and is found written, is done.
    done = manifest.done | manifest.writing - {portion.keys.index for portion in wanted}
    at_once = job.rules.one_transaction or sum(p.rows for p in wanted) <= MOST_ROWS_AT_ONCE
    waiting = list(wanted)
    rows = math.inf if at_once else _FIRST_ROWS
    whole, free = 2.0, -math.inf  # The time of a transaction by that without its commit.
    with ThreadPoolExecutor(1, thread_name_prefix="load") as pool:

        def load(waiting: Sequence[Portion], rows: float) -> tuple[list[Portion], _Loads]:
            """Begin to read what the next transaction writes, so that it is brief.

            What a single one writes may be too much to hold, and is read when it is its turn.
            """
            portions = _take(waiting, rows)
            one = partial(_load, job, undisturbed=version == table.version)
            if at_once:
                return portions, lambda: map(one, portions)
            return portions, pool.submit(lambda: list(map(one, portions))).result

        portions, loads = load(waiting, rows)
        while portions:
            job.run.advance(
                job.attempt,
                **note,
                done=done,
                writing=frozenset(portion.keys.index for portion in portions),
            )
            loads()
            time.sleep(max(0.0, free + _PAUSE_SECONDS - time.monotonic()))

            def write(
                loads: _Loads = loads, rows: float = rows, whole: float = whole
            ) -> tuple[float, float, int, float, list[Portion], _Loads]:
                """Write as much as there is time for; it may be done again."""
                job.run.advance(job.attempt)  # A worker of an attempt that is gone must not write.
                started = time.monotonic()
                seconds = math.inf if at_once else 1.5 * TRANSACTION_SECONDS
                written = _write(job, table, loads(), version, seconds=seconds)
                put = time.monotonic() - started
                rows = max(1, rows * min(2.0, TRANSACTION_SECONDS / (put * whole)))
                return started, put, written, rows, *load(waiting[written:], rows)

            started, put, written, rows, following, loads = table.transact(write)
            free = time.monotonic()
            whole = (free - started) / put
            del waiting[:written]
            done |= {portion.keys.index for portion in portions[:written]}
            portions = following


def _take(waiting: Sequence[Portion], rows: float) -> list[Portion]:
    """The first ranges of which about so many rows are to be written, at least one range."""
    taken: list[Portion] = []
    count = 0
    for portion in waiting:
        if taken and count + portion.rows > rows:
            break
        taken.append(portion)
        count += portion.rows
    return taken


Changes = Sequence[tuple[int, Stored]]
"""What rows are to hold, by rowid."""


class _Loaded(NamedTuple):
    """What was read to write a range.

    Either `changes`, which hold while no other process writes, or what they are found by. With
    `vector_only`, they change nothing but vectors.
    """

    keys: KeyRange
    changes: Changes | None = None
    vector_only: bool = False
    staged: Sequence[StagedRow] = ()
    ledger: Ledger = Ledger()


_Loads = Callable[[], Iterable[_Loaded]]
"""Gives what was read, each time that it is called."""


def _load(job: ReplaceJob, portion: Portion, *, undisturbed: bool) -> _Loaded:
    keys = portion.keys
    shards = job.shards_of(keys.index)
    if undisturbed and portion.rowids is not None:
        vectors = [vector for vector in read_vectors(shards).values() if vector is not None]
        if len(vectors) == len(portion.rowids):  # A worker that should be gone may stage more.
            changes = list(zip(portion.rowids, map(job.describe, vectors), strict=True))
            return _Loaded(keys, changes, vector_only=not portion.columns)
    staged = list(read_shards(shards, with_vectors=True))
    ledger = read_ledger(job.run.backup, keys.index, with_vectors=False)
    return _Loaded(keys, staged=staged, ledger=ledger)


def _write(
    job: ReplaceJob,
    table: Replacement,
    loads: Iterable[_Loaded],
    version: int | None,
    *,
    seconds: float,
) -> int:
    """Write ranges, as many as there is time for, inside a transaction; return how many.

    Rows are matched by the digests of their texts as they are now, unless they were matched before
    and no other process has written to the database since.
    """
    written = 0
    ends = time.monotonic() + seconds
    most_rows = _FLUSH_BYTES // (4 * job.target.dimension)
    flush = _Flush(table, most_rows if seconds == math.inf else _FLUSH_ROWS)
    undisturbed = version == table.version
    for loaded in loads:
        if loaded.changes is not None and not undisturbed:
            loaded = _load(job, Portion(loaded.keys, 0), undisturbed=False)
        if loaded.changes is None:
            flush.add(_match_again(job, table, loaded))
        else:
            flush.add(loaded.changes, vector_only=loaded.vector_only)
        written += 1
        if time.monotonic() > ends:
            break
    flush.all()
    return written


def _match_again(job: ReplaceJob, table: Replacement, loaded: _Loaded) -> Changes:
    """Match the rows of a range inside the transaction; save what is not in the backup as it is."""
    keys = loaded.keys
    match = job.match_with(keys, table.read_range(keys), loaded.staged, loaded.ledger)
    saved = save_rows(match.changes, loaded.ledger)
    if saved:
        name = write_backup(job.run.backup, keys.index, saved)
        job.run.advance(job.attempt, saved={name: len(saved)})
        loaded.ledger.add(saved)  # If the transaction is repeated, it is there already.
    return [(change.row.rowid, change.new) for change in match.changes]


class _Flush:
    """Collects changes and writes them in the order of the file, many at a time."""

    def __init__(self, table: Replacement, most_rows: int) -> None:
        self._table = table
        self._most_rows = most_rows
        self._vector_only = False
        self._changes: list[tuple[int, Stored]] = []

    def add(self, changes: Changes, *, vector_only: bool = False) -> None:
        if vector_only != self._vector_only:
            self.all()
        self._vector_only = vector_only
        self._changes += changes
        if len(self._changes) > self._most_rows:
            self.all()

    def all(self) -> None:
        self._table.put(self._changes, vector_only=self._vector_only)
        self._changes.clear()
