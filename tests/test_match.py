"""Matching rows with what is staged and saved, against looking at one row at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inline_snapshot import snapshot

from reembed.transforms.match import (
    Change,
    Match,
    concerns,
    has_written,
    is_ours,
    match_rows,
    save_rows,
)
from reembed.transforms.rows import (
    Cause,
    Row,
    Saved,
    Skipped,
    StagedRow,
    Stored,
    Summary,
    text_digest,
    vector_digest,
)
from reembed.transforms.staging import Ledger
from tests.wording import wording


def describe(vector: bytes | None) -> Stored:
    """A store that writes a vector as it is, with a dimension."""
    return Stored(vector, "dim=null:" if vector is None else "dim=text:6E6577")


keys = st.sampled_from("abcd")
digests = st.sampled_from([b"text 1", b"text 2"])
vectors = st.sampled_from([None, b"v1", b"v2", b"old"])
stored = st.builds(
    Stored, vectors, st.sampled_from(["dim=null:", "dim=text:6E6577", "dim=text:6F6C64"])
)
causes = st.sampled_from([Cause.REJECTED, Cause.ENCRYPTED])
staged_rows = st.builds(
    lambda key, digest, vector, cause: StagedRow(
        key, digest, vector, Skipped(key, cause, "why") if vector is None else None
    ),
    keys,
    digests,
    st.sampled_from([None, b"v1", b"v2"]),
    causes,
)
saved_rows = st.builds(
    lambda key, digest, written, old, restorable: Saved(
        key, digest, vector_digest(written), old.digest, restorable, None
    ),
    keys,
    digests,
    vectors,
    stored,
    st.booleans(),
)
rows_of_a_range = st.dictionaries(
    keys, st.tuples(digests, st.booleans(), st.one_of(st.none(), stored))
).map(
    lambda found: [
        Row(key, at, "", digest, meant=meant, stored=held)
        for at, (key, (digest, meant, held)) in enumerate(found.items())
    ]
)


def written_by_the_run(row: Row, saved: Sequence[Saved], *, for_its_text: bool = False) -> bool:
    if row.stored is None:
        return False
    mine = [old for old in saved if old.key == row.key]
    if any(old.restorable and old.was == row.stored.digest for old in mine):
        return False
    return any(
        old.written == vector_digest(row.stored.vector)
        and (not for_its_text or old.digest == row.digest)
        for old in mine
    )


@given(
    rows_of_a_range,
    st.lists(staged_rows, max_size=8),
    st.lists(saved_rows, max_size=6),
    st.booleans(),
)
def test_matching_equals_looking_at_one_row_at_a_time(
    rows: list[Row], staged: list[StagedRow], saved: list[Saved], clear_skipped: bool
) -> None:
    match = match_rows(
        5, rows, staged, ledger=Ledger(saved), describe=describe, clear_skipped=clear_skipped
    )

    done = foreign = old = 0
    kept: Counter[Cause] = Counter()
    equal, unstaged = [], []
    changes: list[tuple[str, Stored, Cause | None]] = []
    for row in rows:
        ours = written_by_the_run(row, saved)
        known = any((one.key, one.digest) == (row.key, row.digest) for one in saved)
        if not row.meant and not ours and not known:
            continue
        left = awaits = False
        entries = [one for one in staged if (one.key, one.digest) == (row.key, row.digest)]
        if not entries:
            unstaged.append(row.key)
            left = True
        else:
            last = entries[-1]
            to_hold = describe(last.vector)
            is_to_be_written = last.skipped is None or clear_skipped
            if row.stored is None or not is_to_be_written:
                left = not is_to_be_written
            elif row.stored == to_hold:
                equal.append(row.key)
                is_to_be_written = False
            elif written_by_the_run(row, saved, for_its_text=True):
                is_to_be_written = False
            else:
                cause = None if last.skipped is None else last.skipped.cause
                changes.append((row.key, to_hold, cause))
                left = awaits = True
            if row.stored is None or not is_to_be_written:
                if last.skipped is None:
                    done += 1
                else:
                    kept[last.skipped.cause] += 1
        if left and row.stored is not None and row.stored.vector is not None and not ours:
            old += awaits
            foreign += not awaits
    assert (match.index, match.done, match.kept) == (5, done, kept)
    assert (match.foreign, match.old) == (foreign, old)
    assert match.unstaged == unstaged
    assert [change.row.key for change in match.equal] == equal
    assert [(one.row.key, one.new, one.skipped) for one in match.changes] == changes
    assert match.remaining == unstaged + [key for key, *_ in changes]
    after = match.after
    assert (after.replaced, after.kept, after.remaining, after.in_old_space, after.changed) == (
        done,
        kept,
        len(unstaged) + len(changes),
        foreign + old,
        frozenset({5} if unstaged or changes else {}),
    )
    cleared = Counter(cause for *_, cause in changes if cause is not None)
    assert match.before == Summary(
        replaced=done + sum(cause is None for *_, cause in changes),
        kept=kept + cleared,
        remaining=len(unstaged),
        in_old_space=foreign,
        changed=frozenset({5} if unstaged else {}),
    )


@given(
    rows_of_a_range,
    st.lists(staged_rows, max_size=8),
    st.lists(saved_rows, max_size=6),
    st.booleans(),
)
def test_what_is_staged_needs_its_vectors_only_where_some_are_unknown(
    rows: list[Row], staged: list[StagedRow], saved: list[Saved], clear_skipped: bool
) -> None:
    # What was saved was staged, as it is in every run.
    vectors = {vector_digest(describe(row.vector).vector): row for row in staged if row.vector}
    saved = [one for one in saved if one.written in vectors]
    lean = [row._replace(vector=None) for row in staged]

    def matched(some: list[StagedRow]) -> Match:
        return match_rows(
            5, rows, some, ledger=Ledger(saved), describe=describe, clear_skipped=clear_skipped
        )

    if not matched(lean).unknown:
        assert matched(lean).after == matched(staged).after


@given(rows_of_a_range, st.lists(saved_rows, max_size=6))
def test_a_run_is_about_rows_that_are_meant_were_saved_or_hold_its_vector(
    rows: list[Row], saved: list[Saved]
) -> None:
    ledger = Ledger(saved)
    for row in rows:
        assert is_ours(row, ledger) == written_by_the_run(row, saved)
        assert has_written(row, ledger) == written_by_the_run(row, saved, for_its_text=True)
        known = any((one.key, one.digest) == (row.key, row.digest) for one in saved)
        assert concerns(row, ledger) == (row.meant or known or is_ours(row, ledger))


OLD = Stored(b"old", "dim=text:6F6C64")


def row(text: bytes = b"text", held: Stored | None = OLD, *, meant: bool = True) -> Row:
    return Row("a", 1, "", text_digest(text), meant=meant, stored=held)


def staged(text: bytes = b"text", vector: bytes | None = b"v1") -> StagedRow:
    skipped = None if vector is not None else Skipped("a", Cause.REJECTED, "why")
    return StagedRow("a", text_digest(text), vector, skipped)


def test_a_row_that_holds_the_old_vector_is_written() -> None:
    match = match_rows(0, [row()], [staged()], ledger=Ledger(), describe=describe)

    assert match.changes == [Change(row(), Stored(b"v1", "dim=text:6E6577"))]
    assert match.after == Summary(remaining=1, in_old_space=1, changed=frozenset({0}))
    assert match.before == Summary(replaced=1)


def test_a_deleted_row_is_not_written_again() -> None:
    match = match_rows(0, [], [staged()], ledger=Ledger(), describe=describe)

    assert (match.changes, match.unstaged, match.after) == ([], [], Summary())


def test_an_edited_row_remains_though_its_former_text_is_staged() -> None:
    match = match_rows(0, [row(b"edited")], [staged()], ledger=Ledger(), describe=describe)

    assert (match.changes, match.unstaged) == ([], ["a"])
    assert match.after == Summary(remaining=1, in_old_space=1, changed=frozenset({0}))


def test_a_row_whose_vector_another_program_overwrote_is_written_again() -> None:
    ledger = Ledger(save_rows([Change(row(), describe(b"v1"))], Ledger()))
    ours = row(held=describe(b"v1"))
    theirs = row(held=Stored(b"daemon", "dim=text:6F6C64"))

    assert match_rows(0, [ours], [staged()], ledger=ledger, describe=describe).after == Summary(
        replaced=1
    )
    again = match_rows(0, [theirs], [staged()], ledger=ledger, describe=describe)
    assert [change.new for change in again.changes] == [describe(b"v1")]
    assert again.after == Summary(remaining=1, unwritten=1, in_old_space=1, changed=frozenset({0}))


def test_a_row_whose_vector_another_program_cleared_is_written_again() -> None:
    ledger = Ledger(save_rows([Change(row(), describe(b"v1"))], Ledger()))

    match = match_rows(0, [row(held=describe(None))], [staged()], ledger=ledger, describe=describe)

    assert [change.new for change in match.changes] == [describe(b"v1")]
    assert match.after == Summary(remaining=1, unwritten=1, changed=frozenset({0}))


def test_a_skipped_row_keeps_its_vector_or_is_cleared_as_it_is_wanted() -> None:
    skipped = [staged(vector=None)]
    kept = match_rows(0, [row()], skipped, ledger=Ledger(), describe=describe)
    cleared = match_rows(
        0, [row()], skipped, ledger=Ledger(), describe=describe, clear_skipped=True
    )

    assert kept.changes == []
    assert kept.after == Summary(kept={Cause.REJECTED: 1}, in_old_space=1)
    assert cleared.changes == [Change(row(), describe(None), Cause.REJECTED)]
    assert cleared.before == Summary(kept={Cause.REJECTED: 1})


def test_a_row_that_is_not_meant_is_left_alone_unless_the_run_wrote_it() -> None:
    other = row(b"edited", meant=False)
    assert match_rows(0, [other], [], ledger=Ledger(), describe=describe).after == Summary()

    missing = row(held=describe(None))
    ledger = Ledger(save_rows([Change(missing, describe(b"v1"))], Ledger()))
    stale = row(b"edited", describe(b"v1"), meant=False)
    match = match_rows(0, [stale], [staged()], ledger=ledger, describe=describe)
    assert match.unstaged == ["a"]
    assert match.after == Summary(remaining=1, changed=frozenset({0}))


def test_what_a_row_holds_is_saved_once() -> None:
    change = Change(row(), describe(b"v1"))
    (saved,) = save_rows([change], Ledger())

    assert saved == Saved("a", text_digest(b"text"), vector_digest(b"v1"), OLD.digest, True, OLD)
    assert save_rows([change], Ledger([saved])) == []
    assert save_rows([change], Ledger([saved._replace(stored=None)])) == []


def test_a_row_that_changed_since_it_was_saved_is_saved_again() -> None:
    first = save_rows([Change(row(), describe(b"v1"))], Ledger())
    other = row(held=Stored(b"daemon", "dim=text:6F6C64"))

    (again,) = save_rows([Change(other, describe(b"v1"))], Ledger(first))

    assert (again.stored, again.restorable) == (other.stored, True)


def test_a_row_that_was_read_without_what_it_holds_can_not_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refused:
        save_rows([Change(row(held=None), describe(b"v1"))], Ledger())
    assert wording(refused, tmp_path) == snapshot("the row a was read without what it holds")


@dataclass
class World:
    """One row, the run that writes it, and other programs; it remembers who wrote what.

    `replaced` is what the run has found: the text, what the row held, whether the run itself
    had written that, and what it was to hold.
    """

    text: bytes = b"text 0"
    held: Stored = OLD
    others: set[Stored] = field(default_factory=lambda: {OLD})
    written: set[Stored] = field(default_factory=set)
    shards: list[StagedRow] = field(default_factory=list)
    backup: list[Saved] = field(default_factory=list)
    replaced: list[tuple[bytes, Stored, bool, Stored]] = field(default_factory=list)

    @property
    def row(self) -> Row:
        """The row as it is read now."""
        return Row("a", 1, "", text_digest(self.text), stored=self.held)

    @property
    def by_run(self) -> bool:
        """Whether the run wrote what the row holds, so far as this can be told.

        What the run wrote can't be told from the same by another program. What the row was found
        to hold before stays another program's, although the run may have written it since.
        """
        found = {was for _, was, by_run, _ in self.replaced if not by_run}
        return self.held in self.written - found

    def edit(self, number: int) -> None:
        self.text = b"text %d" % number

    def overwrite(self, held: Stored) -> None:
        self.held = held
        if not self.by_run:
            self.others.add(held)

    def run(self) -> None:
        """Stage the present text and replace, as a pass does."""
        vector = b"vector of " + self.text
        self.shards.append(StagedRow("a", text_digest(self.text), vector))
        ledger = Ledger(saved._replace(stored=None) for saved in self.backup)
        match = match_rows(0, [self.row], self.shards, ledger=ledger, describe=describe)
        saved = save_rows([*match.equal, *match.changes], ledger)
        for one in saved:
            if one.restorable:
                assert one.stored in self.others
            assert one.stored == self.held
        self.backup += saved
        for change in [*match.equal, *match.changes]:
            self.replaced.append((self.text, self.held, self.by_run, change.new))
        for change in match.changes:
            # Nothing is lost: what another program wrote is in the backup before it goes.
            assert self.by_run or self.held in {one.stored for one in self.backup if one.restorable}
            self.held = change.new
            self.written.add(change.new)
        assert self.held == describe(vector)


events = st.lists(
    st.one_of(
        st.tuples(st.just("edit"), st.integers(0, 2)),
        st.tuples(
            st.just("overwrite"),
            st.sampled_from(
                # The last is what the run itself writes: the daemon may have the new model.
                [
                    OLD,
                    Stored(b"daemon", "dim=text:6F6C64"),
                    describe(None),
                    describe(b"vector of text 1"),
                ]
            ),
        ),
        st.tuples(st.just("run"), st.none()),
    ),
    max_size=12,
)


def play(some: Sequence[tuple[str, object]]) -> World:
    world = World()
    for event, value in some:
        if event == "edit":
            assert isinstance(value, int)
            world.edit(value)
        elif event == "overwrite":
            assert isinstance(value, Stored)
            world.overwrite(value)
        else:
            world.run()
    return world


@given(events)
def test_the_runs_own_vectors_are_never_saved_as_previous_ones_and_all_others_are(
    some: list[tuple[str, object]],
) -> None:
    play(some).run()  # It asserts.


def test_a_text_that_changes_and_changes_back_leaves_the_runs_vector_its_own() -> None:
    world = play([("run", None), ("edit", 1), ("run", None), ("edit", 0), ("run", None)])

    ledger = Ledger(world.backup)
    assert [saved.restorable for saved in world.backup] == [True, False, False]
    assert is_ours(world.row, ledger)
