"""Rolling back: what a run replaced is put back, byte for byte, and nothing else is touched."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import replace as replaced
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inline_snapshot import snapshot

from reembed.pipeline.plan import Plan
from reembed.transforms import replacing, rollback
from reembed.transforms.embedders.fake import POISON
from reembed.transforms.errors import RunError, StagingError, StoreError
from reembed.transforms.match import Change, save_rows
from reembed.transforms.passes import Phase
from reembed.transforms.replacing import replace_vectors
from reembed.transforms.rollback import (
    DELETED,
    EDITED,
    OVERWRITTEN,
    RolledBack,
    restore_rows,
    roll_back,
)
from reembed.transforms.rows import Row, Stored, Summary, text_digest, vector_digest
from reembed.transforms.staging import Ledger, Manifest, State
from reembed.transforms.staging.files import tables
from reembed.transforms.staging.names import BACKUP
from reembed.transforms.stores import Replacement
from reembed.transforms.stores.codec import encode
from tests.conftest import (
    begin,
    change,
    fake_plan,
    make_store,
    memory,
    only_pass,
    other_contents,
    select,
)
from tests.test_match import World, describe, events, play
from tests.test_replacing import Killed, kill_after_commit, stage
from tests.wording import wording

OLD = encode(np.array([1.0, 2.0], dtype=np.float32))
OTHER = encode(np.array([5.0, 6.0, 7.0], dtype=np.float32))


def run(plan: Plan) -> Summary:
    """Stage and replace."""
    stage(plan)
    return replace_vectors(plan.job, only_pass(plan, phase=Phase.FORCE))


def undo(plan: Plan) -> RolledBack:
    return roll_back(plan.store, plan.run, plan.ranges, attempt=plan.attempt)


def columns(path: Path) -> list[tuple[object, ...]]:
    """What the rows hold in the columns that a run replaces: types and bytes, numbers exactly."""
    names = [name for (name,) in select(path, "SELECT name FROM pragma_table_info('memories')")]
    shown = ", ".join(
        f"typeof({name}), CASE typeof({name}) WHEN 'real' THEN {name} ELSE hex({name}) END"
        for name in names
        if str(name).startswith("embedding")
    )
    return select(path, f"SELECT rowid, {shown} FROM memories ORDER BY rowid")


@pytest.fixture(params=["delete", "wal"])
def plan(request: pytest.FixtureRequest, tmp_path: Path) -> Plan:
    """Ten rows in ranges of four, four and two; not staged yet."""
    rows = [memory(f"{i:02d}", embedding=OLD, embedding_dim=2) for i in range(10)]
    return begin(fake_plan(make_store(tmp_path / "m.db", rows, request.param), rows=4))


def add_row(plan: Plan, key: str) -> None:
    change(
        plan.store.path,
        "INSERT INTO memories (id, tier, namespace, title, content, created_at, updated_at) "
        f"VALUES ('{key}', 'mid', 'global', 'new {key}', 'row', '', '')",
    )


def test_after_a_rollback_all_is_as_before_the_run(plan: Plan) -> None:
    before, others = columns(plan.store.path), other_contents(plan.store.path)
    run(plan)
    assert columns(plan.store.path) != before

    assert undo(plan) == RolledBack(restored=10)

    assert columns(plan.store.path) == before
    assert other_contents(plan.store.path) == others


# What SQL may put into the three columns, whatever they are declared as.
ODD_VECTORS = {
    "none": "NULL",
    "empty": "x''",
    "no header": f"x'{OLD[1:].hex()}'",
    "big-endian": f"x'02{OLD[1:].hex()}'",
    "cut off": f"x'{OLD[:-1].hex()}'",
    "text": "'[0.1, 0.2]'",
    "empty text": "''",
    "text with a NUL": "CAST(x'610062' AS TEXT)",
    "text that is not UTF-8": "CAST(x'fffe00' AS TEXT)",
    "integer": "-42",
    "real": "0.1 + 0.2",
    "tiny": "4.94065645841247e-324",
    "infinity": "9e999",
}
ODD_DIMENSIONS = ["NULL", "2", "-9223372036854775808", "'two'", "0.1 + 0.2", "x'02'", "''"]
ODD_STAMPS = ["NULL", "'old#none'", "''", "CAST(x'ff6100' AS TEXT)", "x'ff00'", "'é ='", "12"]


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_what_is_oddly_stored_comes_back_byte_for_byte(tmp_path: Path, mode: str) -> None:
    path = make_store(tmp_path / "m.db", [], mode)
    cases = [
        *((vector, "2", "'old#none'") for vector in ODD_VECTORS.values()),
        *((f"x'{OLD.hex()}'", dimension, "NULL") for dimension in ODD_DIMENSIONS),
        *(("NULL", "NULL", stamp) for stamp in ODD_STAMPS),
    ]
    rows = [
        f"('{at:02d}', 'mid', 'global', 'title {at}', '', '', '', {', '.join(case)})"
        for at, case in enumerate(cases)
    ]
    change(
        path,
        "ALTER TABLE memories ADD COLUMN embedding_space TEXT",
        "INSERT INTO memories (id, tier, namespace, title, content, created_at, updated_at, "
        f"embedding, embedding_dim, embedding_space) VALUES {', '.join(rows)}",
    )
    before, others = columns(path), other_contents(path)
    plan = begin(fake_plan(path, rows=5))
    assert run(plan) == Summary(replaced=len(cases))
    assert len({row[1:3] for row in columns(path)}) == len(cases)

    assert undo(plan) == RolledBack(restored=len(cases))

    assert columns(path) == before
    assert other_contents(path) == others
    assert undo(plan) == RolledBack(unchanged=len(cases))


@pytest.mark.parametrize("vector", ODD_VECTORS.values(), ids=ODD_VECTORS)
def test_a_vector_that_was_taken_from_a_skipped_row_comes_back_byte_for_byte(
    tmp_path: Path, vector: str
) -> None:
    rows = [memory("a", POISON), memory("b"), memory("c", "", encrypted_envelope=b"sealed")]
    path = make_store(tmp_path / "m.db", rows)
    change(
        path,
        "ALTER TABLE memories ADD COLUMN embedding_space TEXT",
        f"UPDATE memories SET embedding = {vector} WHERE id <> 'b'",
    )
    before = columns(path)
    plan = begin(fake_plan(path, skipped="clear"))
    run(plan)
    assert [row[1] for row in columns(path)] == ["null", "blob", "null"]

    undo(plan)

    assert columns(path) == before


def test_in_a_store_without_dimensions_or_stamps_the_vectors_come_back(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    change(
        path,
        "CREATE TABLE memories (id TEXT PRIMARY KEY, namespace TEXT NOT NULL, title TEXT NOT NULL, "
        "content TEXT NOT NULL, embedding BLOB)",
        f"INSERT INTO memories VALUES ('a', 'n', 't', 'c', x'{OLD.hex()}')",
        "INSERT INTO memories VALUES ('b', 'n', 't', 'd', 'text'), ('c', 'n', 't', 'e', NULL)",
    )
    before = columns(path)
    plan = begin(fake_plan(path))
    run(plan)

    assert undo(plan) == RolledBack(restored=3)
    assert columns(path) == before


def test_rows_that_changed_since_are_left_and_named(plan: Plan) -> None:
    before = columns(plan.store.path)
    run(plan)
    change(
        plan.store.path,
        "UPDATE memories SET content = 'edited' WHERE id IN ('00', '03')",
        "UPDATE memories SET title = 'another' WHERE id = '04'",
        f"UPDATE memories SET embedding = x'{OTHER.hex()}', embedding_dim = 3 WHERE id = '05'",
        "UPDATE memories SET embedding = NULL, embedding_dim = NULL WHERE id = '06'",
        f"UPDATE memories SET content = 'new', embedding = x'{OTHER.hex()}' WHERE id = '07'",
        "DELETE FROM memories WHERE id IN ('08', '09')",
    )
    add_row(plan, "99")
    now, others = columns(plan.store.path), other_contents(plan.store.path)

    result = undo(plan)

    assert result == RolledBack(
        restored=2,
        left={
            "00": EDITED,
            "03": EDITED,
            "04": EDITED,
            "05": OVERWRITTEN,
            "06": OVERWRITTEN,
            "07": OVERWRITTEN,
            "08": DELETED,
            "09": DELETED,
        },
    )
    after = columns(plan.store.path)
    assert after[1:3] == before[1:3]
    assert [after[0], *after[3:]] == [now[0], *now[3:]]
    assert other_contents(plan.store.path) == others


def test_a_row_that_another_program_put_back_itself_is_as_before(plan: Plan) -> None:
    run(plan)
    change(
        plan.store.path,
        f"UPDATE memories SET embedding = x'{OLD.hex()}', embedding_dim = 2 WHERE id = '05'",
    )

    assert undo(plan) == RolledBack(restored=9, unchanged=1)


def test_rows_that_the_run_skipped_or_never_saw_are_left_alone(tmp_path: Path) -> None:
    rows = [
        memory("a", embedding=OLD, embedding_dim=2),
        memory("b", POISON, embedding=OLD, embedding_dim=2),
    ]
    plan = begin(fake_plan(make_store(tmp_path / "m.db", rows)))
    before = columns(plan.store.path)
    run(plan)
    add_row(plan, "z")

    assert undo(plan) == RolledBack(restored=1)
    assert columns(plan.store.path)[:2] == before


def test_vectors_that_were_missing_are_missing_again(tmp_path: Path) -> None:
    rows = [memory("a", embedding=OLD, embedding_dim=2), memory("b")]
    plan = begin(fake_plan(make_store(tmp_path / "m.db", rows), missing_only=True))
    before = columns(plan.store.path)
    run(plan)
    assert columns(plan.store.path) != before

    assert undo(plan) == RolledBack(restored=1)
    assert columns(plan.store.path) == before


def test_a_run_that_gave_rows_what_they_held_already_is_rolled_back_without_a_change(
    plan: Plan,
) -> None:
    run(plan)
    plan.run.advance(plan.attempt, state=State.REPLACED)
    again = begin(fake_plan(plan.store.path, rows=4))
    before = columns(plan.store.path)
    assert run(again) == Summary(replaced=10)

    assert undo(again) == RolledBack(unchanged=10)
    assert columns(plan.store.path) == before


def test_a_vector_that_came_between_the_backup_and_the_write_is_what_comes_back(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    transaction = Replacement.transaction

    def late(table: Replacement) -> AbstractContextManager[None]:
        change(plan.store.path, f"UPDATE memories SET embedding = x'{OTHER.hex()}' WHERE id = '05'")
        return transaction(table)

    with monkeypatch.context() as patch:
        patch.setattr(Replacement, "transaction", late)
        run(plan)

    assert undo(plan) == RolledBack(restored=10)
    assert columns(plan.store.path)[5][2] == OTHER.hex().upper()


def test_a_text_that_the_run_embedded_twice_is_not_given_the_vector_of_the_former(
    plan: Plan,
) -> None:
    run(plan)
    change(plan.store.path, "UPDATE memories SET content = 'edited' WHERE id = '05'")
    stage(plan, pass_number=2, begun=True)
    replace_vectors(plan.job, only_pass(plan, phase=Phase.PART))
    now = columns(plan.store.path)

    assert undo(plan) == RolledBack(restored=9, left={"05": EDITED})
    assert columns(plan.store.path)[5] == now[5]


def test_a_text_that_changed_and_changed_back_gets_its_previous_vector(plan: Plan) -> None:
    before = columns(plan.store.path)
    run(plan)
    for number, content in ((2, "edited"), (3, "content 05")):
        change(plan.store.path, f"UPDATE memories SET content = '{content}' WHERE id = '05'")
        stage(plan, pass_number=number, begun=True)
        replace_vectors(plan.job, only_pass(plan, phase=Phase.PART))

    assert undo(plan) == RolledBack(restored=10)
    assert columns(plan.store.path) == before


def test_a_replacement_that_was_cut_off_is_undone(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = columns(plan.store.path)
    monkeypatch.setattr(replacing, "MOST_ROWS_AT_ONCE", 3)
    monkeypatch.setattr(replacing, "TRANSACTION_SECONDS", 0.0)
    kill_after_commit(monkeypatch, 2)
    with pytest.raises(Killed):
        run(plan)
    assert columns(plan.store.path) != before

    assert undo(plan) == RolledBack(restored=8, unchanged=2)
    assert columns(plan.store.path) == before


def look(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Manifest, int]]:
    """The manifest, and how many rows hold what the run wrote, whenever the lock is taken."""
    found: list[tuple[Manifest, int]] = []
    transaction = Replacement.transaction

    def watched(table: Replacement) -> AbstractContextManager[None]:
        new = select(plan.store.path, "SELECT count(*) FROM memories WHERE embedding_dim = 8")
        found.append((plan.run.read_manifest(), int(new[0][0])))
        return transaction(table)

    monkeypatch.setattr(Replacement, "transaction", watched)
    return found


def test_the_manifest_says_rolling_back_before_the_first_write(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(plan)
    found = look(plan, monkeypatch)

    undo(plan)

    assert [(manifest.state, new) for manifest, new in found] == [(State.ROLLING_BACK, 10)]
    # Only the caller, who keeps the result, says that it is done.
    assert plan.run.read_manifest().state is State.ROLLING_BACK


@pytest.mark.parametrize(("most", "new"), [(10, [10]), (9, [10, 6, 2])])
def test_up_to_a_bound_rows_are_put_back_in_one_transaction_and_above_it_in_several(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, most: int, new: list[int]
) -> None:
    before = columns(plan.store.path)
    run(plan)
    monkeypatch.setattr(rollback, "MOST_ROWS_AT_ONCE", most)
    monkeypatch.setattr(rollback, "TRANSACTION_SECONDS", 0.0)
    found = look(plan, monkeypatch)

    assert undo(plan) == RolledBack(restored=10)

    assert [left for _, left in found] == new
    assert columns(plan.store.path) == before


def test_a_rollback_that_is_killed_is_finished_by_the_next(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = columns(plan.store.path)
    run(plan)
    monkeypatch.setattr(rollback, "MOST_ROWS_AT_ONCE", 9)
    monkeypatch.setattr(rollback, "TRANSACTION_SECONDS", 0.0)

    def die(seconds: float) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", die)
        with pytest.raises(Killed):
            undo(plan)
    assert columns(plan.store.path)[:4] == before[:4]
    assert columns(plan.store.path)[4:] != before[4:]

    assert undo(plan) == RolledBack(restored=6, unchanged=4)
    assert columns(plan.store.path) == before


@pytest.mark.parametrize("late", [False, True], ids=["before", "inside the transaction"])
def test_an_attempt_that_was_taken_over_puts_nothing_back(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, late: bool, tmp_path: Path
) -> None:
    run(plan)
    now = columns(plan.store.path)
    transaction = Replacement.transaction

    def take_over() -> None:
        plan.run.write_manifest(replaced(plan.run.read_manifest(), attempt="another"))

    def watched(table: Replacement) -> AbstractContextManager[None]:
        take_over()
        return transaction(table)

    if late:
        monkeypatch.setattr(Replacement, "transaction", watched)
    else:
        take_over()

    with pytest.raises(RunError) as refused:
        undo(plan)
    assert wording(refused, tmp_path) == snapshot(
        "another process has taken over the run RUN; this one stops and writes nothing "
        "more, and reembed status says what the store holds"
    )
    assert columns(plan.store.path) == now


def test_a_rollback_that_fails_half_way_changes_nothing(plan: Plan, tmp_path: Path) -> None:
    run(plan)
    now = columns(plan.store.path)
    change(
        plan.store.path,
        "CREATE TRIGGER full BEFORE UPDATE OF embedding ON memories WHEN new.id = '09' "
        "BEGIN SELECT RAISE(ABORT, 'no'); END",
    )

    with pytest.raises(StoreError) as failed:
        undo(plan)
    assert wording(failed, tmp_path) == snapshot(
        "SQLite can't work with TMP/m.db: no; look into it and run again"
    )
    assert columns(plan.store.path) == now


def test_a_damaged_backup_puts_nothing_back(plan: Plan, tmp_path: Path) -> None:
    run(plan)
    now = columns(plan.store.path)
    last = tables(plan.run.backup, BACKUP)[-1]
    last.write_bytes(last.read_bytes()[:-1])

    with pytest.raises(StagingError) as refused:
        undo(plan)
    assert wording(refused, tmp_path).replace(last.name, "FILE") == snapshot(
        "TMP/m.db.reembed/RUN/backup/FILE is damaged: its bytes are not those that were "
        "written; run reembed again, which looks through all files of the run first"
    )
    assert columns(plan.store.path) == now


def expected(world: World) -> tuple[set[Stored], RolledBack]:
    """What may become of the one row, from what is known of who wrote what."""
    found = [(text, was, new) for text, was, by_run, new in world.replaced if not by_run]
    fitting = {was for text, was, new in found if (text, new) == (world.text, world.held)}
    if not world.replaced:
        return {world.held}, RolledBack()
    if world.held in [was for _, was, _ in found]:
        return {world.held}, RolledBack(unchanged=1)
    if not world.by_run:
        return {world.held}, RolledBack(left={"a": OVERWRITTEN})
    if not fitting:
        return {world.held}, RolledBack(left={"a": EDITED})
    return fitting, RolledBack(restored=1)


@given(events)
def test_putting_rows_back_equals_what_is_known_of_who_wrote_what(
    some: list[tuple[str, object]],
) -> None:
    world = play(some)
    held, outcome = expected(world)
    ledger = Ledger(world.backup)

    changes, found = restore_rows([world.row], ledger)

    assert found == outcome
    for rowid, stored in changes:
        assert rowid == world.row.rowid
        world.held = stored
    assert world.held in held
    # Safe to run twice.
    if outcome.restored:
        assert restore_rows([world.row], ledger) == ([], RolledBack(unchanged=1))


keys = st.sampled_from("abcdefgh")


@given(st.dictionaries(keys, st.booleans()), st.sets(keys), st.sets(keys), st.sets(keys))
def test_of_many_rows_each_is_put_back_or_left_for_itself(
    present: dict[str, bool], written: set[str], edited: set[str], gone: set[str]
) -> None:
    ledger, rows = Ledger(), []
    for at, (key, has_vector) in enumerate(sorted(present.items())):
        old = Stored(b"old", "dim=text:6F6C64") if has_vector else describe(None)
        row = Row(key, at, "", text_digest(b"text"), stored=old)
        if key in written:
            (saved,) = save_rows([Change(row, describe(b"new"))], ledger)
            ledger.add([saved])
            row = row._replace(stored=describe(b"new"))
        if key in edited:
            row = row._replace(digest=text_digest(b"edited"))
        if key not in gone:
            rows.append(row)

    changes, outcome = restore_rows(rows, ledger)

    ours = written & present.keys()
    back = sorted(ours - edited - gone)
    order = sorted(present)
    assert changes == [
        (order.index(key), Stored(b"old", "dim=text:6F6C64") if present[key] else describe(None))
        for key in back
    ]
    assert outcome == RolledBack(
        restored=len(back),
        left=dict.fromkeys(ours & edited - gone, EDITED) | dict.fromkeys(ours & gone, DELETED),
    )


def test_a_vector_that_is_found_changed_twice_is_put_back_as_it_was_last() -> None:
    daemon = Stored(b"daemon", "dim=text:6F6C64")
    world = play([("run", None), ("overwrite", daemon), ("run", None)])

    changes, _ = restore_rows([world.row], Ledger(world.backup))

    assert changes == [(1, daemon)]
    assert {saved.written for saved in world.backup} == {vector_digest(world.held.vector)}
