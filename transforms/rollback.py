"""Roll back: what a run has replaced is put back from its backup."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from transforms.errors import StoreError
from transforms.match import is_ours
from transforms.replacing import MOST_ROWS_AT_ONCE, TRANSACTION_SECONDS
from transforms.rows import KeyRange, Row, Stored, vector_digest
from transforms.staging import Ledger, RunDirectory, State, read_ledger, saved_ranges
from transforms.stores import Store

EDITED = "its text was edited since"
OVERWRITTEN = "its vector was changed by another program since"
DELETED = "it was deleted since"


@dataclass
class RolledBack:
    """What a rollback did: rows put back, rows that were as before, rows left, with why."""

    restored: int = 0
    unchanged: int = 0
    left: dict[str, str] = field(default_factory=dict)

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
    `rolling back` meanwhile. Safe to run twice: what was put back is found unchanged.
    """
    before = run.read_manifest().state
    run.advance(attempt, state=State.ROLLING_BACK)
    try:
        return _roll_back(store, run, ranges, attempt=attempt)
    except StoreError:
        if store.whole:  # In one transaction, so the store is as it was.
            run.advance(attempt, state=before)
        raise


def _roll_back(
    store: Store, run: RunDirectory, ranges: Sequence[KeyRange], *, attempt: str
) -> RolledBack:
    saved = saved_ranges(run.backup)
    wanted = [keys for keys in ranges if keys.index in saved]
    at_once = store.whole or run.read_manifest().rows <= MOST_ROWS_AT_ONCE
    if not store.stable and rows_have_moved(store, run, wanted):
        return _roll_back_moved(store, run, wanted, attempt=attempt)
    total = RolledBack()
    while wanted:
        started = time.monotonic()
        done = 0
        with store.replacing() as table, table.transaction():
            run.advance(attempt)
            for keys in wanted:
                ledger = read_ledger(run.backup, keys.index, with_vectors=True)
                changes, outcome = restore_rows(table.read_range(keys), ledger)
                table.put(changes)
                total.add(outcome)
                done += 1
                if not at_once and time.monotonic() - started > TRANSACTION_SECONDS:
                    break
            _check_whole(store, total)
        del wanted[:done]
        if wanted:
            time.sleep(0.12)  # SQLite's own waiting looks every 0.1 s whether the lock is free.
    return total


def rows_have_moved(store: Store, run: RunDirectory, ranges: Sequence[KeyRange]) -> bool:
    """Whether rows that a run has written are in other ranges now than they were then.

    VACUUM does that to a table whose rowid no column has.
    """
    missing: set[str] = set()
    others: set[str] = set()
    for keys in ranges:
        known = set(read_ledger(run.backup, keys.index, with_vectors=False).keys)
        present = {row.key for row in store.read_range(keys, with_stored=True)}
        missing |= known - present
        others |= present - known
    return bool(missing & others)


def _roll_back_moved(
    store: Store, run: RunDirectory, ranges: Sequence[KeyRange], *, attempt: str
) -> RolledBack:
    """The same for rows that are in any range now: all at once, and held in memory."""
    everything = Ledger()
    for keys in ranges:
        ledger = read_ledger(run.backup, keys.index, with_vectors=True)
        for key in ledger.keys:
            everything.add(reversed(ledger.of(key)))
    with store.replacing() as table, table.transaction():
        run.advance(attempt)
        changes, outcome = restore_rows(table.read_range(KeyRange(0, None, None)), everything)
        table.put(changes)
        _check_whole(store, outcome)
    return outcome


def _check_whole(store: Store, outcome: RolledBack) -> None:
    """Refuse to put back a part of what has one model."""
    if store.whole and outcome.left:
        key, why = next(iter(outcome.left.items()))
        raise StoreError(
            f"{len(outcome.left)} rows of {store.path} can't be put back (the first, {key}: "
            f"{why}), and the others would be of another model than they; nothing was put back"
        )


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
        if row.stored.digest in [old.was for old in saved if old.restorable]:
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


def _previous(row: Row, ledger: Ledger) -> Stored | None:
    """What the row held before the run wrote what it holds now for its present text."""
    written = vector_digest(row.stored.vector if row.stored else None)
    for saved in ledger.of(row.key):
        if (saved.digest, saved.written) == (row.digest, written) and saved.restorable:
            return saved.stored
    return None
