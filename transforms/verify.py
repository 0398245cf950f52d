"""Verify: the table against what a run says it wrote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from transforms.match import holds_written, is_ours
from transforms.rows import KeyRange, Row
from transforms.staging import Ledger, RunDirectory, read_ledger, saved_ranges
from transforms.stores import Store

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
    "overwritten": "a vector that the run did not write, over the text that it embedded",
    "stale": "the run's vector, over a text that was edited since",
    "other vector": "a sampled row's vector that is not what the model gives for its text",
}
"""What can be wrong with a row."""


@dataclass
class Findings:
    """What was found: rows that the run wrote, and what is wrong with them.

    `changed` counts rows that other programs have given a new text and vector since, and
    `unwritten` those that the run did not write: skipped or newer.
    """

    checked: int = 0
    changed: int = 0
    unwritten: int = 0
    wrong: Counter[str] = field(default_factory=Counter)
    keys: dict[str, list[str]] = field(default_factory=dict)

    def fault(self, kind: str, key: str) -> None:
        """Note a row that is wrong."""
        self.wrong[kind] += 1
        named = self.keys.setdefault(kind, [])
        if len(named) < _SHOWN_KEYS:
            named.append(key)


def verify_rows(
    store: Store,
    run: RunDirectory,
    ranges: Iterable[KeyRange],
    *,
    dimension: int,
    normalized: bool,
) -> Findings:
    """Check every row that a run wrote: its vector's length, finiteness, norm and digest."""
    findings = Findings()
    fault = partial(find_fault, decode=store.decode, dimension=dimension, normalized=normalized)
    for keys in ranges:
        ledger = read_ledger(run.backup, keys.index, with_vectors=False)
        for row in store.read_range(keys, with_stored=True):
            _verify_row(row, ledger, findings, fault)
    return findings


def _verify_row(
    row: Row, ledger: Ledger, findings: Findings, fault: Callable[[bytes | None], str | None]
) -> None:
    saved = ledger.of(row.key)
    if not saved:
        findings.unwritten += 1
        return
    if row.stored is None or (row.stored.vector is None and is_ours(row, ledger)):
        findings.checked += 1  # The run took a skipped row's vector away.
        return
    if row.digest not in [written.digest for written in saved]:
        if is_ours(row, ledger):
            findings.fault("stale", row.key)
        else:
            findings.changed += 1
        return
    findings.checked += 1
    if not holds_written(row, ledger):
        findings.fault("overwritten", row.key)
    kind = fault(row.stored.vector)
    if kind:
        findings.fault(kind, row.key)


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
    length = float(np.linalg.norm(numbers))
    if length == 0:
        return "zeros"
    if normalized and abs(length - 1) > UNIT_TOLERANCE:
        return "not of length 1"
    return None


def sample_rows(
    store: Store, run: RunDirectory, ranges: Sequence[KeyRange], *, count: int
) -> list[Row]:
    """Some rows that hold the vector that the run wrote for their text, from all over the table."""
    saved = saved_ranges(run.backup)
    ranges = [keys for keys in ranges if keys.index in saved]
    step = max(1, -(-4 * len(ranges) // count))
    each = max(1, count // max(1, len(ranges[::step])))
    found: list[Row] = []
    for keys in ranges[::step]:
        ledger = read_ledger(run.backup, keys.index, with_vectors=False)
        rows = [
            row
            for row in store.read_range(keys, with_stored=True)
            if row.skipped is None
            and row.stored
            and row.stored.vector
            and holds_written(row, ledger)
        ]
        found += rows[:: max(1, len(rows) // each)][:each]
    return found[:count]
