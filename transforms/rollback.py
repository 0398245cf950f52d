"""Roll back: what a run has replaced is put back from its backup."""

from __future__ import annotations

import time
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from reembed.transforms.errors import IncompleteError, StoreError
from reembed.transforms.match import is_ours
from reembed.transforms.replacing import MOST_ROWS_AT_ONCE, TRANSACTION_SECONDS, reads_back
from reembed.transforms.rows import (
    KeyRange,
    Row,
    Saved,
    Stored,
    former_skipped_digest,
    vector_digest,
)
from reembed.transforms.staging import (
    Ledger,
    RunDirectory,
    State,
    read_ledger,
    saved_columns,
    saved_ranges,
)
from reembed.transforms.staging.runs import SKIPPED
from reembed.transforms.stores import Replacement, Store, Written, known_part, try_restore

EDITED = "its text was edited since"
OVERWRITTEN = "its vector was changed by another program since"
DELETED = "it was deleted since"
ADDED = "it was added since"
NOT_KEPT = "its vector was changed again after it was put back"
LOST = "its file of the backup is missing or damaged"
HELD_BACK = "other rows that must have the same model can't be put back"


@dataclass
class RolledBack:
    """Result of a rollback: rows put back, rows that were as before, rows left, with why.

    `in_the_way` names, by namespace, the rows for which others could not be put back, with why.
    `lost` are the files of the backup that are missing or damaged, with the number of their rows
    (None: not known): these are left, too, and nothing but their file could name them.
    """

    restored: int = 0
    unchanged: int = 0
    left: dict[str, str] = field(default_factory=dict)
    in_the_way: dict[str, dict[str, str]] = field(default_factory=dict)
    lost: dict[str, int | None] = field(default_factory=dict)

    def add(self, other: RolledBack) -> None:
        """Take in what was done to more rows."""
        self.restored += other.restored
        self.unchanged += other.unchanged
        self.left |= other.left


def roll_back(
    store: Store, run: RunDirectory, ranges: Sequence[KeyRange], *, attempt: str
) -> RolledBack:
    """Put back what rows held before a run, where they still hold what the run wrote.

    A row is left as it is, and named, if its text or its vector has changed since. Up to
    50,000 rows are put back in one transaction, more in several short ones; the manifest says
    `rolling back` meanwhile. Of a store that is replaced as a whole, each namespace is put back
    with all of its rows or left as it is. Safe to run twice: what was put back is found unchanged.

    What was put back is read again, over a new connection; a row that holds something else by then
    is named. Raises IncompleteError if a row still holds what the run wrote, or if, of a store
    that is replaced as a whole, a part of the backup is lost; and StoreError, before anything is
    changed, if it can't be told any more which row is which.
    """
    manifest = run.read_manifest()
    before = manifest.state
    lost = run.lost_backup(manifest, checked=True)
    if lost and store.whole:
        raise IncompleteError(
            f"{describe_lost(lost)} of the backup in {run.backup} is missing or damaged, and in "
            f"{store.path} all rows of one model go back together or not at all, so nothing was "
            "put back; put the file back from a copy of it, and roll back again"
        )
    store.check_backup(saved_columns(run.backup))
    require_numbers(store, run, ranges)
    if before is not State.ROLLING_BACK:
        _try_one(store, run, ranges)
    run.advance(attempt, state=State.ROLLING_BACK)
    written = Written()
    try:
        total = _roll_back(store, run, ranges, written, attempt=attempt)
    except StoreError:
        if store.whole:  # In one transaction, so the store is as it was.
            run.advance(attempt, state=before)
        raise
    if not reads_back(store, written):
        _read_again(store, run, ranges, written, total)
    total.lost = lost
    return total


def describe_lost(lost: Mapping[str, int | None]) -> str:
    """Name files of a backup, the first of many, and how many rows they have.

    >>> describe_lost({"0000001.0000.0123456789abcdef.parquet": 64})
    'the file 0000001.0000.0123456789abcdef.parquet (64 rows)'
    """
    rows = sum(count or 0 for count in lost.values())
    count = f"{rows:,} rows"
    if None in lost.values():
        count = f"{count} or more" if rows else "how many rows is not known"
    first, *others = lost
    if not others:
        return f"the file {first} ({count})"
    return f"{len(lost)} files ({count}), the first of them {first},"


def _read_again(
    store: Store,
    run: RunDirectory,
    ranges: Sequence[KeyRange],
    written: Written,
    total: RolledBack,
) -> None:
    """Count as left, with why, the rows that don't hold what was put back.

    Raises IncompleteError if there are rows again that could be put back.
    """
    pieces = written.digests(MOST_ROWS_AT_ONCE)
    lost = {rowid for digests in pieces for rowid in store.differing(digests)}
    rows = store.read_range(KeyRange(0, None, None), with_stored=True)
    changes, now = restore_rows(rows, _ledger_of(run, ranges))
    names = {row.rowid: row.key for row in rows}
    again = [names[rowid] for rowid, _ in changes if names[rowid] not in total.left]
    if again:
        raise IncompleteError(
            f"{len(again)} rows of {store.path} hold what the run wrote again (the first: "
            f"{again[0]}), although their previous vectors were put back: a trigger of the "
            "database or another program undoes it; drop or stop it"
        )
    held = {names[rowid] for rowid in lost if rowid in names}
    left = {
        key: NOT_KEPT if why == OVERWRITTEN else why
        for key, why in now.left.items()
        if key not in total.left and (key in held or why == DELETED)
    }
    total.left |= left
    total.restored -= len(lost)
    total.unchanged += len(lost) - len(left)  # A row may hold another of its previous vectors.


def _try_one(store: Store, run: RunDirectory, ranges: Sequence[KeyRange]) -> None:
    """Put one row back and undo it, before the run is said to be rolled back."""
    saved = saved_ranges(run.backup)
    for keys in ranges:
        if keys.index in saved:
            ledger = read_ledger(run.backup, keys.index, with_vectors=True)
            changes, _ = restore_rows(store.read_range(keys, with_stored=True), ledger)
            if changes:
                try_restore(store, keys, *changes[0])
                return


def _roll_back(
    store: Store,
    run: RunDirectory,
    ranges: Sequence[KeyRange],
    written: Written,
    *,
    attempt: str,
) -> RolledBack:
    saved = saved_ranges(run.backup)
    wanted = [keys for keys in ranges if keys.index in saved]
    at_once = run.read_manifest().rows <= MOST_ROWS_AT_ONCE
    moved = set() if store.ordered_by_key else moved_keys(store, run, ranges)
    if store.whole:
        return _roll_back_whole(store, run, ranges, written, attempt=attempt, moved=bool(moved))
    total = RolledBack()

    def restore(table: Replacement) -> tuple[RolledBack, int]:
        run.advance(attempt)
        started = time.monotonic()
        restored = RolledBack()
        for done, keys in enumerate(wanted, start=1):
            ledger = read_ledger(run.backup, keys.index, with_vectors=True).without(moved)
            changes, outcome = restore_rows(table.read_range(keys), ledger)
            table.put(changes)
            restored.add(outcome)
            if not at_once and time.monotonic() - started > TRANSACTION_SECONDS:
                return restored, done
        return restored, len(wanted)

    while wanted:
        with store.replacing(written) as table:
            restored, done = table.transact(partial(restore, table))
        total.add(restored)
        del wanted[:done]
        if wanted:
            time.sleep(0.12)  # SQLite's own waiting looks every 0.1 s whether the lock is free.
    _roll_back_elsewhere(store, run, ranges, written, total, attempt=attempt, moved=moved)
    return total


def _roll_back_elsewhere(
    store: Store,
    run: RunDirectory,
    ranges: Sequence[KeyRange],
    written: Written,
    total: RolledBack,
    *,
    attempt: str,
    moved: Collection[str],
) -> None:
    """Put back rows that have `moved`, and rows that were taken for deleted and are still there.

    All in one transaction, and in memory.
    """
    gone = {key for key, why in total.left.items() if why == DELETED}.union(moved)
    everywhere = store.everywhere()
    found = {
        row.key
        for keys in (ranges if gone else ())
        for row in everywhere.read_range(keys, with_stored=False)
        if row.key in gone
    }
    total.left |= dict.fromkeys(gone - found, DELETED)
    if not found:
        return
    ledger = _ledger_of(run, ranges, found)

    def restore(table: Replacement) -> RolledBack:
        run.advance(attempt)
        rows = [row for keys in ranges for row in table.read_range(keys) if row.key in found]
        changes, outcome = restore_rows(rows, ledger)
        table.put(changes)
        return outcome

    with everywhere.replacing(written) as table:
        outcome = table.transact(partial(restore, table))
    total.left = {key: why for key, why in total.left.items() if key not in found}
    total.add(outcome)


def _ledger_of(
    run: RunDirectory, ranges: Sequence[KeyRange], wanted: Collection[str] | None = None
) -> Ledger:
    """Read what was saved of the `wanted` rows, or of all, from the backups of all ranges.

    A row that moved during the run may have been saved a second time with the run's own vector,
    which is not restorable.
    """
    everything = Ledger()
    for keys in ranges:
        saved = read_ledger(run.backup, keys.index, with_vectors=True)
        for key in saved.keys if wanted is None else set(wanted).intersection(saved.keys):
            everything.add(reversed(saved.of(key)))
    ledger = Ledger()
    for key in everything.keys:
        rows = everything.of(key)
        written = {row.written for row in rows}
        ledger.add(
            row._replace(restorable=row.restorable and not _holds_one(row, written))
            for row in reversed(rows)
        )
    return ledger


def _holds_one(saved: Saved, written: Container[bytes]) -> bool:
    """Whether the vector saved as the previous one was written by the run itself."""
    vector = saved.stored.vector if saved.stored else None
    held = vector_digest(vector)
    return vector is not None and held in written and held != saved.written


def moved_keys(store: Store, run: RunDirectory, ranges: Sequence[KeyRange]) -> set[str]:
    """Find the keys of rows that are in other ranges now than when the run saved them.

    INSERT OR REPLACE gives a row another rowid, and VACUUM may.
    """
    everywhere = store.everywhere()
    missing: set[str] = set()
    for keys in ranges:
        saved = set(read_ledger(run.backup, keys.index, with_vectors=False).keys)
        if saved:
            missing |= saved - {r.key for r in everywhere.read_range(keys, with_stored=False)}
    return {
        row.key
        for keys in (ranges if missing else ())
        for row in everywhere.read_range(keys, with_stored=False)
        if row.key in missing
    }


def saved_rows(
    store: Store, run: RunDirectory, ranges: Sequence[KeyRange]
) -> Iterator[tuple[Row, Ledger]]:
    """Yield the rows that a run saved, wherever they are now, each with what was saved of it."""
    everywhere = store.everywhere()
    absent = Ledger()
    for keys in ranges:
        ledger = read_ledger(run.backup, keys.index, with_vectors=False)
        if not ledger.keys:
            continue
        missing = set(ledger.keys)
        for row in everywhere.read_range(keys, with_stored=True):
            missing.discard(row.key)
            if ledger.of(row.key):
                yield row, ledger
        for key in missing:
            absent.add(reversed(ledger.of(key)))
    for keys in ranges if absent.keys else ():
        for row in everywhere.read_range(keys, with_stored=True):
            if absent.of(row.key):
                yield row, absent


def holds_newer(
    store: Store,
    run: RunDirectory,
    ranges: Sequence[KeyRange],
    newer: RunDirectory,
    newer_ranges: Sequence[KeyRange],
) -> bool:
    """Whether rows that a run saved hold vectors that a newer run wrote."""
    written: dict[str, set[bytes]] = {}
    for keys in newer_ranges:
        saved = read_ledger(newer.backup, keys.index, with_vectors=False)
        for key in saved.keys:
            written.setdefault(key, set()).update(one.written for one in saved.of(key))
    return any(
        not is_ours(row, ledger) and vector_digest(row.stored.vector) in written.get(row.key, ())
        for row, ledger in saved_rows(store, run, ranges)
        if row.stored is not None
    )


def would_restore(store: Store, run: RunDirectory, ranges: Sequence[KeyRange]) -> bool:
    """Whether a rollback would put back any row.

    Raises StagingError if the backup can't be read.
    """
    return any(_goes_back(row, ledger) for row, ledger in saved_rows(store, run, ranges))


def _goes_back(row: Row, ledger: Ledger) -> bool:
    return is_ours(row, ledger) and any(
        saved.restorable
        and (saved.digest, saved.written) == (row.digest, vector_digest(row.stored.vector))
        for saved in ledger.of(row.key)
        if row.stored is not None
    )


def require_numbers(
    store: Store, run: RunDirectory, ranges: Sequence[KeyRange], *, but: Container[str] = ()
) -> None:
    """Raise StoreError if rows have nothing but numbers to go by, and these are other rows' now.

    The files of the backup `but` are not read.
    """
    if not store.stable and _are_renumbered(store, run, ranges, but):
        raise StoreError(
            f"the rows of {store.path} have other numbers now than when the run {run.run_id} wrote "
            "them (VACUUM does that to a table without a key), so it can't be told which row is "
            "which; restore a copy of the file from before, or re-embed the table with the former "
            "model"
        )


def _are_renumbered(
    store: Store, run: RunDirectory, ranges: Sequence[KeyRange], but: Container[str]
) -> bool:
    """Whether a row with a rowid for its key holds the text and the vector of another's."""
    strange: set[tuple[bytes, bytes]] = set()
    unknown: set[tuple[bytes, bytes]] = set()
    missing = False
    everywhere = store.everywhere()
    for keys in ranges:
        ledger = read_ledger(run.backup, keys.index, with_vectors=False, but=but)
        rows = everywhere.read_range(keys, with_stored=True)
        missing |= not {row.key for row in rows}.issuperset(ledger.keys)
        for row in rows:
            saved = ledger.of(row.key)
            if row.stored is not None and row.key == str(row.rowid):
                held = row.digest, vector_digest(row.stored.vector)
                if not saved:
                    unknown.add(held)
                elif row.digest not in [old.digest for old in saved]:
                    strange.add(held)
    if missing:  # A row may have got a number that none had.
        strange |= unknown
    ledgers = (read_ledger(run.backup, keys.index, with_vectors=False, but=but) for keys in ranges)
    return bool(strange) and any(
        (old.digest, old.written) in strange
        for ledger in ledgers
        for key in ledger.keys
        for old in ledger.of(key)
    )


def _roll_back_whole(
    store: Store,
    run: RunDirectory,
    ranges: Sequence[KeyRange],
    written: Written,
    *,
    attempt: str,
    moved: bool,
) -> RolledBack:
    """Roll back a store of which each namespace has one model: all at once.

    What keeps a namespace from going back as a whole is found before anything is written.
    """
    everything = _ledger_of(run, ranges) if moved else None
    ranges = [KeyRange(0, None, None)] if moved else ranges
    skipped = {str(row["id"]) for row in run.read_lines(SKIPPED)}

    def restore(table: Replacement) -> RolledBack:
        run.advance(attempt)
        total = RolledBack()

        def read() -> Iterator[tuple[list[Row], Ledger]]:
            for keys in ranges:
                if everything is None:
                    ledger = read_ledger(run.backup, keys.index, with_vectors=True)
                    yield table.read_range(keys), ledger
                else:
                    yield table.read_range(keys), everything

        total.in_the_way = _find_in_the_way(read(), skipped)
        for rows, ledger in read():
            changes, outcome = restore_rows(rows, ledger)
            held = {row.rowid: row.key for row in rows if row.namespace in total.in_the_way}
            outcome.restored -= sum(rowid in held for rowid, _ in changes)
            outcome.left |= {held[rowid]: HELD_BACK for rowid, _ in changes if rowid in held}
            table.put([change for change in changes if change[0] not in held])
            total.add(outcome)
        return total

    with store.replacing(written) as table:
        return table.transact(partial(restore, table))


@dataclass
class _Group:
    """The rows of a namespace, as far as they matter to whether it can go back as a whole.

    `goes_back` says that there is anything to put back, `shared` that this includes what all of
    its rows share. A `late` row is to go back to what shares that with the new vectors.
    """

    goes_back: bool = False
    shared: bool = False
    in_the_way: dict[str, str] = field(default_factory=dict)
    late: dict[str, str] = field(default_factory=dict)


def _find_in_the_way(
    read: Iterable[tuple[Sequence[Row], Ledger]], skipped: Container[str]
) -> dict[str, dict[str, str]]:
    """The rows that keep others of their namespace from being put back, by it, with why.

    Rows that were `skipped` by the run have the vectors that they had before it.
    """
    groups: dict[str, _Group] = {}
    for rows, ledger in read:
        for row in rows:
            _judge(row, ledger, skipped, groups.setdefault(row.namespace, _Group()))
    found = {
        namespace: group.in_the_way | (group.late if group.shared else {})
        for namespace, group in groups.items()
        if group.goes_back
    }
    return {namespace: keys for namespace, keys in found.items() if keys}


def _judge(row: Row, ledger: Ledger, skipped: Container[str], group: _Group) -> None:
    if row.stored is None or row.stored.vector is None:
        return
    saved = ledger.of(row.key)
    before = [old.stored.others for old in saved if old.restorable and old.stored is not None]
    others = row.stored.others
    if not saved:
        if row.key not in skipped:
            group.in_the_way[row.key] = ADDED
    elif row.stored.digest in [old.was for old in saved if old.restorable]:
        return
    elif not is_ours(row, ledger):
        group.in_the_way[row.key] = OVERWRITTEN
        group.goes_back |= others not in before
    elif previous := _previous(row, ledger):
        group.goes_back = True
        if previous.others == others:
            group.late[row.key] = ADDED
        else:
            group.shared = True
    else:
        group.in_the_way[row.key] = EDITED
        group.goes_back = True


def restore_rows(
    rows: Sequence[Row], ledger: Ledger
) -> tuple[list[tuple[int, Stored]], RolledBack]:
    """What the rows of a range are to hold again (by rowid), and what becomes of each."""
    changes: list[tuple[int, Stored]] = []
    outcome = RolledBack()
    for row in rows:
        saved = ledger.of(row.key)
        if not saved or row.stored is None:
            continue
        if _is_as_before(row.stored, saved):
            outcome.unchanged += 1
        elif not is_ours(row, ledger):
            outcome.left[row.key] = OVERWRITTEN
        elif previous := _previous(row, ledger):
            changes.append((row.rowid, previous))
            outcome.restored += 1
        else:
            outcome.left[row.key] = EDITED
    present = {row.key for row in rows}
    outcome.left |= {key: DELETED for key in ledger.keys if key not in present}
    return changes, outcome


def _is_as_before(stored: Stored, saved: Sequence[Saved]) -> bool:
    """Whether a row holds what it held before the run, but for columns that were added since."""
    return any(old.restorable and known_part(stored, old.stored).digest == old.was for old in saved)


def _previous(row: Row, ledger: Ledger) -> Stored | None:
    """What the row held before the run wrote what it holds now for its present text."""
    written = vector_digest(row.stored.vector if row.stored else None)
    digests = [row.digest]
    if row.skipped is not None:
        digests.append(former_skipped_digest(row.skipped))
    for saved in ledger.of(row.key):
        if saved.digest in digests and saved.written == written and saved.restorable:
            return saved.stored
    return None
