"""Verify: the table against what a run says it wrote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from reembed.transforms.embedders import have_direction
from reembed.transforms.match import holds_written, is_ours
from reembed.transforms.rollback import require_numbers
from reembed.transforms.rows import KeyRange, Row
from reembed.transforms.sampling import Sample
from reembed.transforms.staging import Ledger, RunDirectory, read_ledger, saved_columns
from reembed.transforms.stores import Store, contradicts

Decode = Callable[[bytes], NDArray[np.float32]]
"""Turns what is stored into a vector; raises ValueError for what is none."""

UNIT_TOLERANCE = 1e-3
"""How far from 1 the length of a vector may be that its model normalises."""

_SHOWN_KEYS = 1_000
"""Rows that are named for each finding; all are counted."""

WRONG = {
    "undecodable": "a vector that can't be decoded",
    "wrong length": "a vector of another length than the target's",
    "not finite": "a vector with NaN or infinity",
    "zeros": "a vector of zeros",
    "not of length 1": "a vector that is not of length 1, though the model normalises",
    "other columns": "a stamp or a length beside its vector that the run did not write",
    "overwritten": "a vector that the run did not write, over the text that it embedded",
    "stale": "the run's vector, over a text that was edited since",
    "former": "the vector that it held before the run, over a text that was edited since",
    "other vector": "a sampled row's vector that is not what the model gives for its text",
}
"""What can be wrong with a row."""


@dataclass
class Findings:
    """What was found: rows that the run wrote, and what is wrong with them.

    `changed` counts rows that other programs have given a new text and vector since, `deleted`
    those that are not there any more, `put_back` those that a rollback has restored, and
    `unwritten` rows that the run is about and did not write: skipped or newer. `lost` rows were
    written, but their files of the backup are lost, so they can't be told from those. `sample` are
    rows that hold the vector which the run wrote for their text, from all over the table.
    """

    checked: int = 0
    changed: int = 0
    deleted: int = 0
    put_back: int = 0
    unwritten: int = 0
    lost: int = 0
    wrong: Counter[str] = field(default_factory=Counter)
    keys: dict[str, list[str]] = field(default_factory=dict)
    sample: list[Row] = field(default_factory=list)

    @property
    def written(self) -> int:
        """Rows that the run wrote, by its backup."""
        # Each other kind of finding is about a row that is counted as checked.
        stale = self.wrong["stale"]
        return self.checked + stale + self.changed + self.deleted + self.put_back + self.lost

    def fault(self, kind: str, key: str) -> None:
        """Note a row that is wrong."""
        self.wrong[kind] += 1
        named = self.keys.setdefault(kind, [])
        if len(named) < _SHOWN_KEYS:
            named.append(key)


def verify_rows(
    store: Store,
    run: RunDirectory,
    ranges: Sequence[KeyRange],
    *,
    dimension: int,
    normalized: bool,
    columns: str = "",
    rolled_back: bool = False,
    held_back: Container[str] = (),
    lost: Mapping[str, int | None] | None = None,
    samples: int = 0,
) -> Findings:
    """Check every row that a run wrote: its vector's length, finiteness, norm and digest.

    They are those of its backup, wherever they are now, and whatever else has changed of them.
    `columns` are what it wrote beside the vectors. With `rolled_back` a row that holds what it
    held before the run was put back, but for those of the namespaces that are `held_back`. The
    files of the backup that are `lost`, with their numbers of rows, are not read. About
    `samples` rows, and never more, are also returned as a sample. Raises StoreError if it can't be
    told any more which row is which.
    """
    but = frozenset(lost or ())
    store.check_backup(saved_columns(run.backup, but=but))
    require_numbers(store, run, ranges, but=but)
    findings = Findings(lost=sum(count or 0 for count in (lost or {}).values()))
    sample = Sample(samples)
    check = partial(
        _verify_row,
        findings=findings,
        sample=sample,
        fault=partial(find_fault, decode=store.decode, dimension=dimension, normalized=normalized),
        columns=columns,
        put_back=lambda row: rolled_back and row.namespace not in held_back,
    )
    everywhere = store.everywhere()
    missing = Ledger()
    for keys in ranges:
        ledger = read_ledger(run.backup, keys.index, with_vectors=False, but=but)
        absent = set(ledger.keys)
        for row in everywhere.read_range(keys, with_stored=True):
            absent.discard(row.key)
            if ledger.of(row.key):
                check(row, ledger)
            else:
                findings.unwritten += _is_in_scope(row, store)
        for key in absent:
            missing.add(reversed(ledger.of(key)))
    gone = set(missing.keys)
    for keys in ranges if gone and not store.ordered_by_key else ():
        # VACUUM may have moved them, or another program has stored them again.
        known = read_ledger(run.backup, keys.index, with_vectors=False, but=but)
        for row in everywhere.read_range(keys, with_stored=True):
            if row.key not in gone:
                continue
            gone.remove(row.key)
            if not known.of(row.key):
                findings.unwritten -= _is_in_scope(row, store)
                check(row, missing)
    findings.deleted = len(gone)
    findings.unwritten = max(0, findings.unwritten - findings.lost)
    findings.sample = sample.rows
    return findings


def _is_in_scope(row: Row, store: Store) -> bool:
    return row.meant and store.namespace in (None, row.namespace)


def _verify_row(
    row: Row,
    ledger: Ledger,
    *,
    findings: Findings,
    sample: Sample,
    fault: Callable[[bytes | None], str | None],
    columns: str,
    put_back: Callable[[Row], bool],
) -> None:
    saved = ledger.of(row.key)
    stored = row.stored
    if stored and put_back(row) and stored.digest in [old.was for old in saved if old.restorable]:
        findings.put_back += 1
        return
    if stored is None or (stored.vector is None and is_ours(row, ledger)):
        findings.checked += 1  # The run took a skipped row's vector away.
        return
    if row.digest not in [written.digest for written in saved]:
        if is_ours(row, ledger):
            findings.fault("stale", row.key)
            return
        former = stored.digest in [old.was for old in saved if old.restorable]
        kind = "former" if former and stored.vector is not None else fault(stored.vector)
        if kind is None or kind == "not of length 1":  # That is another program's own concern.
            findings.changed += 1
        else:
            findings.checked += 1
            findings.fault(kind, row.key)
        return
    findings.checked += 1
    held = holds_written(row, ledger)
    if not held:
        findings.fault("overwritten", row.key)
    kind = fault(stored.vector)
    if kind:
        findings.fault(kind, row.key)
    elif held and contradicts(stored.others, columns):
        findings.fault("other columns", row.key)
    elif held and row.skipped is None:
        sample.add(row)


def find_fault(
    vector: bytes | None, *, decode: Decode, dimension: int, normalized: bool
) -> str | None:
    """What is wrong with a stored vector, as a key of `WRONG`.

    >>> vector, decode = np.float32([3, 4]).tobytes(), lambda raw: np.frombuffer(raw, "<f4")
    >>> find_fault(vector, decode=decode, dimension=2, normalized=True)
    'not of length 1'
    """
    try:
        numbers = decode(vector or b"")
    except ValueError:
        return "undecodable"
    if len(numbers) != dimension:
        return "wrong length"
    if not np.all(np.isfinite(numbers)):
        return "not finite"
    if not have_direction(numbers[None])[0]:
        return "zeros"
    if normalized and abs(np.linalg.norm(numbers.astype(np.float64)) - 1) > UNIT_TOLERANCE:
        return "not of length 1"
    return None
