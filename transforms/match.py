"""Match: the rows of a range as they are now, with what a run has staged and written for them."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from reembed.transforms.rows import Cause, Row, Saved, StagedRow, Stored, Summary, vector_digest
from reembed.transforms.staging import Ledger

Describe = Callable[[bytes | None], Stored]
"""What a row holds once it has this vector (little-endian float32), or none."""

Same = Callable[[str, str], bool]
"""Whether other columns than the vector hold what they were given."""


@dataclass(frozen=True, slots=True)
class Change:
    """A row that is to be written: what it holds, and what it is to hold."""

    row: Row
    new: Stored
    skipped: Cause | None = None


@dataclass
class Match:
    """What becomes of the rows of a range.

    `done` hold their new vector, of which `equal` held it before the run; `kept` are skipped
    rows, `changes` are to be written, of which the rows with keys in `unwritten` were saved to be
    given just that, and `unstaged` are the keys of rows that are new or edited. `foreign` counts
    the vectors which this run has not made of rows that get none now, and `old` those of rows
    that are to be written. Of `unknown` rows it can't be told, without
    the vectors that are staged for them, whether they hold those. `vectors` are the keys and
    digests of all vectors that are staged and were read, in their order.
    """

    index: int
    done: int = 0
    equal: list[Change] = field(default_factory=list)
    kept: Counter[Cause] = field(default_factory=Counter)
    changes: list[Change] = field(default_factory=list)
    unwritten: list[str] = field(default_factory=list)
    unstaged: list[str] = field(default_factory=list)
    foreign: int = 0
    old: int = 0
    unknown: int = 0
    vectors: tuple[tuple[str, bytes], ...] = ()

    @property
    def before(self) -> Summary:
        """The summary as it will be once the changes are written."""
        kept = self.kept + Counter(c.skipped for c in self.changes if c.skipped is not None)
        return Summary(
            replaced=self.done + sum(change.skipped is None for change in self.changes),
            kept=kept,
            remaining=len(self.unstaged),
            in_old_space=self.foreign,
            changed=frozenset([self.index] if self.unstaged else []),
        )

    @property
    def after(self) -> Summary:
        """The summary as it is: what would still have to be written remains."""
        left = len(self.remaining)
        return Summary(
            replaced=self.done,
            kept=self.kept,
            remaining=left,
            unwritten=len(self.unwritten),
            in_old_space=self.foreign + self.old,
            changed=frozenset([self.index] if left else []),
        )

    @property
    def remaining(self) -> list[str]:
        """The keys of the rows that remain."""
        return self.unstaged + [change.row.key for change in self.changes]


def match_rows(
    index: int,
    rows: Iterable[Row],
    staged: Iterable[StagedRow],
    *,
    ledger: Ledger,
    describe: Describe,
    same: Same = operator.eq,
    clear_skipped: bool = False,
) -> Match:
    """Match rows with what is staged for them; the last that is staged for a text counts.

    Rows that were read without what they hold are counted as done: they say only whether their
    texts are staged. Where what is staged was read without its vectors, the ledger tells most
    often what they are. With `clear_skipped`, a skipped row is to hold no vector.
    """
    by_text = {(row.key, row.digest): row for row in staged}
    vectors = tuple(text for text, found in by_text.items() if found.vector is not None)
    match = Match(index, vectors=vectors)
    described = describe(b"").others
    for row in rows:
        if not concerns(row, ledger):
            continue
        found = by_text.get((row.key, row.digest))
        if found is None:
            match.unstaged.append(row.key)
            match.foreign += _is_foreign(row, ledger)
        elif row.stored is None:
            _count(match, found)
        elif found.skipped is not None and not clear_skipped:
            match.kept[found.skipped.cause] += 1
            match.foreign += _is_foreign(row, ledger)
        elif found.skipped is None and found.vector is None:
            held = holds_written(row, ledger) or has_written(row, ledger)
            held = held and same(row.stored.others, described)
            match.done += held
            match.unknown += not held
        else:
            cause = None if found.skipped is None else found.skipped.cause
            change = Change(row, describe(found.vector), cause)
            held = has_written(row, ledger) and same(row.stored.others, change.new.others)
            if change.new == row.stored or held:
                _count(match, found)
                match.equal += [change] if change.new == row.stored else []
                continue
            match.changes.append(change)
            if was_given(row, change.new, ledger):
                match.unwritten.append(row.key)
            match.old += _is_foreign(row, ledger)
    return match


def concerns(row: Row, ledger: Ledger) -> bool:
    """Whether a run is about a row: it is meant, was when it was saved, or holds what was written.

    The first may end with the writing itself; then a row that loses its new vector must not be
    lost from the count. One that another program has given a text and a vector of its own may be.
    """
    saved = row.digest in [saved.digest for saved in ledger.of(row.key)]
    return row.meant or saved or is_ours(row, ledger)


def is_ours(row: Row, ledger: Ledger) -> bool:
    """Whether a row holds a vector that the run wrote, be it for another text."""
    saved = ledger.of(row.key)
    if row.stored is None or not saved:
        return False
    # What is not restorable was the run's own vector, of another text.
    if row.stored.digest in [old.was for old in saved if old.restorable]:
        return False
    return vector_digest(row.stored.vector) in [old.written for old in saved]


def holds_former(row: Row, ledger: Ledger) -> bool:
    """Whether a row holds what was saved of it, or another program has given it another text."""
    saved = ledger.of(row.key)
    if row.stored is None or row.stored.digest in [old.was for old in saved]:
        return True
    return row.digest not in [old.digest for old in saved] and not is_ours(row, ledger)


def has_written(row: Row, ledger: Ledger) -> bool:
    """Whether a row holds a vector that the run wrote for its present text."""
    return is_ours(row, ledger) and any(
        saved.digest == row.digest and saved.written == vector_digest(row.stored.vector)
        for saved in ledger.of(row.key)
        if row.stored is not None
    )


def was_given(row: Row, new: Stored, ledger: Ledger) -> bool:
    """Whether a run has given a row this for its present text, or was about to."""
    given = row.digest, vector_digest(new.vector)
    return given in [(saved.digest, saved.written) for saved in ledger.of(row.key)]


def holds_written(row: Row, ledger: Ledger) -> bool:
    """Whether a row holds what the run gave its present text, be it what it held before."""
    held = vector_digest(row.stored.vector if row.stored else None)
    return any(saved.written == held and saved.digest == row.digest for saved in ledger.of(row.key))


def save_rows(changes: Iterable[Change], ledger: Ledger) -> list[Saved]:
    """What must be in the backup before the changes are written, and is not there yet.

    A vector that the run itself wrote, for another text, is never saved as a previous one.
    """
    saved: list[Saved] = []
    for row, new in ((change.row, change.new) for change in changes):
        if row.stored is None:
            raise ValueError(f"the row {row.key} was read without what it holds")
        written, was = vector_digest(new.vector), row.stored.digest
        # Only what was saved last: the row may have held this, then another vector, and this again.
        given = [
            old for old in ledger.of(row.key) if (old.digest, old.written) == (row.digest, written)
        ]
        if given and given[0].was == was:
            continue
        ours = is_ours(row, ledger)
        saved.append(Saved(row.key, row.digest, written, was, not ours, row.stored))
    return saved


def _count(match: Match, found: StagedRow) -> None:
    if found.skipped is None:
        match.done += 1
    else:
        match.kept[found.skipped.cause] += 1


def _is_foreign(row: Row, ledger: Ledger) -> bool:
    return row.stored is not None and row.stored.vector is not None and not is_ours(row, ledger)
