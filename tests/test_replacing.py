"""Replacing staged vectors in the store: in one transaction or several, recorded and saved."""

from __future__ import annotations

import re
import shutil
import sqlite3
import threading
from collections import namedtuple
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import replace as replaced
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from inline_snapshot import snapshot

from reembed.pipeline.plan import Plan
from reembed.transforms import replacing
from reembed.transforms.embed import embed_rows
from reembed.transforms.embedders.fake import NOT_A_NUMBER, POISON, FakeEmbedder
from reembed.transforms.errors import RunError, StagingError, StoreError, TooManySkippedError
from reembed.transforms.match import is_ours
from reembed.transforms.modes import Mode
from reembed.transforms.passes import Pass, Phase
from reembed.transforms.read import StoreRows
from reembed.transforms.replacing import check_failures, replace_vectors
from reembed.transforms.rows import Cause, KeyRange, Stored, Summary
from reembed.transforms.staging import Ledger, Manifest, Rules, State, read_ledger, saved_ranges
from reembed.transforms.stores import Replacement, sqlite
from reembed.transforms.stores.codec import decode, encode
from tests.conftest import begin, change, fake_plan, files, make_store, memory, select
from tests.wording import wording

Usage = namedtuple("Usage", ["total", "used", "free"])
OLD = encode(np.array([1.0, 2.0], dtype=np.float32))
OTHER = encode(np.array([5.0, 6.0, 7.0], dtype=np.float32))
EVERYTHING = KeyRange(0, None, None)


def stage(plan: Plan, pass_number: int = 1, *, begun: bool = False) -> None:
    """Stage all ranges, as the pipeline does, without Beam."""
    for keys in plan.ranges:
        for part in StoreRows(plan.store, plan.run, pass_number, begun).read_parts(keys):
            vectors = embed_rows(part, FakeEmbedder(8), dimension=8, batch=3)
            plan.run.write_shard(vectors, pass_number=pass_number)


def replace(
    plan: Plan, phase: Phase = Phase.HOLD, *, ranges: Sequence[KeyRange] | None = None
) -> Summary:
    after = Pass(1, plan.ranges if ranges is None else tuple(ranges), phase)
    return replace_vectors(plan.job, after)


def stored(plan: Plan) -> dict[object, list[float] | None]:
    query = "SELECT id, embedding FROM memories ORDER BY id"
    return {
        key: decode(blob).tolist() if isinstance(blob, bytes) else None
        for key, blob in select(plan.store.path, query)
    }


def expected(*texts: str) -> list[list[float]]:
    vectors: list[list[float]] = FakeEmbedder(8).embed(texts).tolist()
    return vectors


ALL_NEW = expected(*(f"title {i:02d} content {i:02d}" for i in range(10)))


def held(plan: Plan, key: str) -> bytes | None:
    ((blob,),) = select(plan.store.path, f"SELECT embedding FROM memories WHERE id = '{key}'")
    assert blob is None or isinstance(blob, bytes)
    return blob


def ledger(plan: Plan, index: int) -> Ledger:
    return read_ledger(plan.run.backup, index, with_vectors=True)


def saved(plan: Plan) -> dict[str, list[bytes | None]]:
    """The previous vectors in the backup, the latest first."""
    found: dict[str, list[bytes | None]] = {}
    for index in saved_ranges(plan.run.backup):
        some = ledger(plan, index)
        for key in some.keys:
            found[key] = [one.stored.vector for one in some.of(key) if one.stored]
    return found


@pytest.fixture(params=["delete", "wal"])
def plan(request: pytest.FixtureRequest, tmp_path: Path) -> Plan:
    """Ten rows in ranges of four, four and two, staged."""
    rows = [memory(f"{i:02d}", embedding=OLD, embedding_dim=2) for i in range(10)]
    plan = begin(fake_plan(make_store(tmp_path / "m.db", rows, request.param), rows=4))
    stage(plan)
    return plan


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than three rows take several transactions, and each holds one range."""
    monkeypatch.setattr(replacing, "MOST_ROWS_AT_ONCE", 3)
    monkeypatch.setattr(replacing, "TRANSACTION_SECONDS", 0.0)
    monkeypatch.setattr(replacing, "_PAUSE_SECONDS", 0.0)


@pytest.fixture
def seen(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> list[Manifest]:
    """The manifest as it is at each transaction's first write."""
    manifests: list[Manifest] = []
    transaction, put = Replacement.transaction, Replacement.put
    fresh: list[bool] = []

    @contextmanager
    def open_transaction(table: Replacement) -> Iterator[None]:
        with transaction(table):
            fresh[:] = [True]
            yield

    def look(table: Replacement, changes: Sequence[tuple[int, Stored]], **how: bool) -> None:
        if changes and fresh:
            manifests.append(plan.run.read_manifest())
            fresh.clear()
        put(table, changes, **how)

    monkeypatch.setattr(Replacement, "transaction", open_transaction)
    monkeypatch.setattr(Replacement, "put", look)
    return manifests


def before_the_lock(monkeypatch: pytest.MonkeyPatch, *actions: Any) -> None:
    """Do things, one before each transaction, as another process might."""
    waiting = list(actions)
    transaction = Replacement.transaction

    def late(table: Replacement) -> AbstractContextManager[None]:
        if waiting:
            waiting.pop(0)()
        return transaction(table)

    monkeypatch.setattr(Replacement, "transaction", late)


def edit(plan: Plan) -> None:
    change(
        plan.store.path,
        "UPDATE memories SET content = 'edited' WHERE id = '01'",
        "DELETE FROM memories WHERE id = '02'",
        "INSERT INTO memories (id, tier, namespace, title, content, created_at, updated_at) "
        "VALUES ('99', 'mid', 'global', 'new', 'row', '', '')",
    )


# What a row gets, and when.


def test_every_row_gets_the_vector_of_its_own_text(plan: Plan) -> None:
    summary = replace(plan)

    assert summary == Summary(replaced=10)
    assert list(stored(plan).values()) == ALL_NEW
    assert select(plan.store.path, "SELECT DISTINCT embedding_dim FROM memories") == [(8,)]


def test_replacing_twice_gives_what_once_gives(plan: Plan) -> None:
    replace(plan)
    once = select(plan.store.path, "SELECT * FROM memories")
    backup, content = files(plan.run.backup), plan.store.path.read_bytes()

    assert replace(plan) == Summary(replaced=10)
    assert select(plan.store.path, "SELECT * FROM memories") == once
    assert files(plan.run.backup) == backup
    assert plan.store.path.read_bytes() == content


def test_rows_that_changed_hold_the_replacement_back_and_are_named(plan: Plan) -> None:
    edit(plan)
    before = files(plan.run.path)

    assert replace(plan) == Summary(remaining=2, changed=frozenset({0, 2}))
    assert {held(plan, f"{i:02d}") for i in range(10) if i != 2} == {OLD}
    assert files(plan.run.path) == before
    assert plan.run.read_manifest().state is State.STAGING


def test_after_a_catch_up_pass_every_row_has_the_vector_of_its_present_text(plan: Plan) -> None:
    edit(plan)
    stage(plan, pass_number=2)

    assert replace(plan) == Summary(replaced=10)
    after = stored(plan)
    assert [after["01"], after["99"]] == expected("title 01 edited", "new row")
    assert "02" not in after


def test_in_the_last_pass_changed_rows_are_left_and_counted(plan: Plan) -> None:
    edit(plan)

    summary = replace(plan, Phase.FORCE)

    # The new row has no vector at all, so only the edited one is in the old space.
    assert summary == Summary(replaced=8, remaining=2, in_old_space=1, changed=frozenset({0, 2}))
    assert [key for key in stored(plan) if held(plan, str(key)) in (OLD, None)] == ["01", "99"]


def test_what_remained_is_written_by_a_late_pass(plan: Plan) -> None:
    edit(plan)
    replace(plan, Phase.FORCE)
    stage(plan, pass_number=2, begun=True)

    assert replace(plan, ranges=[plan.ranges[0], plan.ranges[2]]) == Summary(replaced=10)
    after = stored(plan)
    assert [after["01"], after["99"]] == expected("title 01 edited", "new row")
    assert saved(plan)["99"] == [None]


def test_a_pass_after_the_replacement_began_writes_only_its_ranges(plan: Plan) -> None:
    edit(plan)
    replace(plan, Phase.FORCE)
    stage(plan, pass_number=2, begun=True)

    summary = replace(plan, ranges=[plan.ranges[2]])

    assert summary == Summary(replaced=9, remaining=1, in_old_space=1, changed=frozenset({0}))


def test_a_text_that_changes_back_gets_its_vector(plan: Plan) -> None:
    change(plan.store.path, "UPDATE memories SET content = 'x' WHERE id = '01'")
    stage(plan, pass_number=2)
    change(plan.store.path, "UPDATE memories SET content = 'content 01' WHERE id = '01'")

    assert replace(plan) == Summary(replaced=10)
    assert list(stored(plan).values()) == ALL_NEW


def test_an_edit_between_the_look_and_the_lock_is_seen(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_the_lock(monkeypatch, lambda: edit(plan))

    summary = replace(plan)

    assert summary == Summary(replaced=8, remaining=2, in_old_space=1, changed=frozenset({0, 2}))
    assert held(plan, "01") == OLD


def test_an_id_that_is_not_utf8_never_takes_the_vector_of_one_that_looks_alike(
    tmp_path: Path,
) -> None:
    rows = [memory("a\ufffd", embedding=OLD, embedding_dim=2), memory("b", embedding=OLD)]
    plan = begin(fake_plan(make_store(tmp_path / "m.db", rows)))
    change(plan.store.path, "UPDATE memories SET id = CAST(x'61ff' AS TEXT) WHERE id = 'b'")
    stage(plan)

    assert replace(plan) == Summary(replaced=1, kept={Cause.NOT_TEXT: 1}, in_old_space=1)
    assert select(plan.store.path, "SELECT embedding FROM memories WHERE title = 'title b'") == [
        (OLD,)
    ]


@pytest.mark.parametrize(
    "does",
    [
        "UPDATE memories SET content = 'edited' WHERE id = '02'",
        "UPDATE memories SET embedding = NULL WHERE id = '02'",
        "DELETE FROM memories WHERE id = '02'",
    ],
)
def test_what_a_trigger_does_at_a_replacement_is_seen(plan: Plan, does: str) -> None:
    change(
        plan.store.path,
        f"CREATE TRIGGER t AFTER UPDATE ON memories WHEN new.id = '07' BEGIN {does}; END",
    )

    summary = replace(plan)

    look = sum((plan.job.match(k, with_stored=True).after for k in plan.ranges), Summary())
    assert summary == look
    assert summary.replaced == 9


def test_a_trigger_that_runs_at_edits_alone_costs_no_second_look(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(plan.job), "look", None)  # The schema has such triggers.

    assert replace(plan) == Summary(replaced=10)


@pytest.mark.parametrize("most", [3, 10])
def test_inside_a_transaction_no_other_connection_is_opened(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, short: None, most: int
) -> None:
    """It would find the table locked where SQLite's cache is too small for what is written."""
    monkeypatch.setattr(replacing, "MOST_ROWS_AT_ONCE", most)
    transaction, read_only = Replacement.transaction, sqlite.read_only
    inside: list[bool] = []

    @contextmanager
    def watched(table: Replacement) -> Iterator[None]:
        with transaction(table):
            inside.append(True)
            yield
            inside.clear()

    def read(*arguments: Any, **more: Any) -> Any:
        assert not inside
        return read_only(*arguments, **more)

    monkeypatch.setattr(Replacement, "transaction", watched)
    monkeypatch.setattr(sqlite, "read_only", read)

    assert replace(plan) == Summary(replaced=10)


def test_a_lock_at_the_begin_is_waited_for(plan: Plan) -> None:
    with closing(sqlite3.connect(plan.store.path, check_same_thread=False)) as other:
        other.isolation_level = None
        other.execute("BEGIN EXCLUSIVE")
        timer = threading.Timer(0.2, lambda: other.execute("ROLLBACK"))
        timer.start()

        assert replace(plan) == Summary(replaced=10)
        timer.join()


def test_rows_that_lose_their_vectors_count_for_the_size_of_a_transaction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: None
) -> None:
    rows = [memory(f"{i:02d}", POISON, embedding=OLD, embedding_dim=2) for i in range(8)]
    rows += [memory(f"{i:02d}") for i in range(8, 20)]
    path = make_store(tmp_path / "m.db", rows)
    plan = begin(fake_plan(path, rows=4, skipped="clear"))
    stage(plan)
    opened: list[int] = []
    before_the_lock(monkeypatch, *[lambda: opened.append(1)] * 9)
    monkeypatch.setattr(replacing, "_FIRST_ROWS", 4)

    assert replace(plan) == Summary(replaced=12, kept={Cause.REJECTED: 8})
    assert len(opened) == 5


def test_a_worker_that_is_gone_leaves_the_backup_of_the_next_attempt(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    match = type(plan.job).match

    def overtaken(job: Any, keys: Any, **more: Any) -> Any:
        if keys == plan.ranges[-1] and job.attempt == plan.attempt:
            edit(plan)
            plan.run.write_manifest(replaced(plan.run.read_manifest(), attempt="another"))
        return match(job, keys, **more)

    monkeypatch.setattr(type(plan.job), "match", overtaken)

    with pytest.raises(RunError, match="has taken over"):
        replace(plan)
    assert len(files(plan.run.backup)) == 2


def test_a_row_whose_vector_was_overwritten_since_is_found_and_written_again(plan: Plan) -> None:
    replace(plan)
    change(
        plan.store.path,
        f"UPDATE memories SET embedding = x'{OTHER.hex()}', embedding_dim = 3 WHERE id = '03'",
        "UPDATE memories SET embedding = NULL, embedding_dim = NULL WHERE id = '09'",
    )
    look = sum((plan.job.match(k, with_stored=True).after for k in plan.ranges), Summary())
    assert look == Summary(
        replaced=8, remaining=2, unwritten=2, in_old_space=1, changed=frozenset({0, 2})
    )

    assert replace(plan) == Summary(replaced=10)

    assert list(stored(plan).values()) == ALL_NEW
    assert (saved(plan)["03"], saved(plan)["09"]) == ([OTHER, OLD], [None, OLD])


def test_a_skipped_row_keeps_its_previous_vector(tmp_path: Path) -> None:
    rows = [memory("a"), memory("b", POISON, embedding=OLD, embedding_dim=2), memory("c")]
    plan = begin(fake_plan(make_store(tmp_path / "m.db", rows)))
    stage(plan)

    summary = replace(plan)

    assert summary == Summary(replaced=2, kept={Cause.REJECTED: 1}, in_old_space=1)
    assert select(plan.store.path, "SELECT embedding, embedding_dim FROM memories") == [
        (encode(np.array(expected("title a content a")[0], dtype=np.float32)), 8),
        (OLD, 2),
        (encode(np.array(expected("title c content c")[0], dtype=np.float32)), 8),
    ]


def test_a_skipped_row_loses_its_previous_vector_where_that_is_wanted(tmp_path: Path) -> None:
    rows = [
        memory("a"),
        memory("b", f"{NOT_A_NUMBER}", embedding=OLD, embedding_dim=2),
        memory("c"),
        memory("d", "", encrypted_envelope=b"sealed", embedding=OLD, embedding_dim=2),
        memory("e", POISON),
    ]
    plan = begin(fake_plan(make_store(tmp_path / "m.db", rows), skipped="clear"))
    assert plan.job.rules.clear_skipped
    stage(plan)

    kept = {Cause.BAD_VECTOR: 1, Cause.ENCRYPTED: 1, Cause.REJECTED: 1}
    for _ in range(2):
        assert replace(plan) == Summary(replaced=2, kept=kept)
        assert select(
            plan.store.path,
            "SELECT id, embedding, embedding_dim FROM memories WHERE id IN ('b', 'd', 'e')",
        ) == [("b", None, None), ("d", None, None), ("e", None, None)]
    assert (saved(plan)["b"], saved(plan)["d"]) == ([OLD], [OLD])


def test_a_row_sealed_since_it_was_embedded_does_not_get_its_vector(plan: Plan) -> None:
    change(
        plan.store.path,
        "UPDATE memories SET content = '', encrypted_envelope = x'00' WHERE id = '03'",
    )

    assert replace(plan, Phase.FORCE).remaining == 1
    assert held(plan, "03") == OLD


# Modes.


def test_only_missing_vectors_are_filled_in_where_that_is_wanted(tmp_path: Path) -> None:
    rows = [memory("a", embedding=OLD, embedding_dim=2), memory("b"), memory("c")]
    plan = begin(fake_plan(make_store(tmp_path / "m.db", rows), missing_only=True))
    assert plan.mode is Mode.MISSING_ONLY
    stage(plan)
    assert plan.run.staged_rows() == 2

    assert replace(plan) == Summary(replaced=2)
    assert held(plan, "a") == OLD
    assert [stored(plan)["b"], stored(plan)["c"]] == expected(
        "title b content b", "title c content c"
    )
    # They are not missing any more, and yet the run is about them: also when they are edited.
    assert replace(plan) == Summary(replaced=2)
    change(plan.store.path, "UPDATE memories SET content = 'edited' WHERE id IN ('a', 'b')")
    assert replace(plan) == Summary(replaced=1, remaining=1, changed=frozenset({0}))
    stage(plan, pass_number=2, begun=True)
    assert replace(plan) == Summary(replaced=2)
    assert [stored(plan)["b"]] == expected("title b edited")
    assert held(plan, "a") == OLD


def test_a_missing_vector_that_another_program_filled_in_meanwhile_is_left(tmp_path: Path) -> None:
    rows = [memory("a"), memory("b")]
    plan = begin(fake_plan(make_store(tmp_path / "m.db", rows), missing_only=True))
    stage(plan)
    change(plan.store.path, f"UPDATE memories SET embedding = x'{OTHER.hex()}' WHERE id = 'a'")

    assert replace(plan) == Summary(replaced=1)
    assert held(plan, "a") == OTHER


def test_rows_of_the_current_space_are_left_where_that_is_wanted(tmp_path: Path) -> None:
    right = encode(np.arange(8, dtype=np.float32))
    rows = [memory(key, embedding=right, embedding_dim=8) for key in "abc"]
    path = make_store(tmp_path / "m.db", [*rows, memory("d", embedding=OLD, embedding_dim=2)])
    stamp = "sentence-transformers/all-minilm-l6-v2#none"
    change(
        path,
        "ALTER TABLE memories ADD COLUMN embedding_space TEXT",
        f"UPDATE memories SET embedding_space = '{stamp}' WHERE id IN ('a', 'd')",
        "UPDATE memories SET embedding_space = 'other#none' WHERE id = 'b'",
    )
    plan = begin(fake_plan(path, skip_current_space=True))
    stage(plan)

    assert replace(plan) == Summary(replaced=3)
    assert held(plan, "a") == right
    assert [stored(plan)[key] for key in "bcd"] == expected(
        *(f"title {key} content {key}" for key in "bcd")
    )
    assert select(path, "SELECT DISTINCT embedding_space FROM memories") == [(stamp,)]
    assert replace(plan) == Summary(replaced=3)


# One transaction, or several.


def test_many_vectors_are_written_in_several_portions_of_one_transaction(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, seen: list[Manifest]
) -> None:
    monkeypatch.setattr(replacing, "_FLUSH_BYTES", 100)

    assert replace(plan) == Summary(replaced=10)
    assert list(stored(plan).values()) == ALL_NEW
    assert len(seen) == 1


def test_an_error_in_the_last_portion_undoes_the_first(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(replacing, "_FLUSH_BYTES", 100)
    change(
        plan.store.path,
        "CREATE TRIGGER full BEFORE UPDATE OF embedding ON memories WHEN new.id = '09' "
        "BEGIN SELECT RAISE(ABORT, 'no'); END",
    )

    with pytest.raises(StoreError) as failed:
        replace(plan)
    assert wording(failed, tmp_path) == snapshot(
        "SQLite can't work with TMP/m.db: no; look into it and run again"
    )
    assert {held(plan, f"{i:02d}") for i in range(10)} == {OLD}
    assert plan.run.read_manifest().state is State.REPLACING


def test_the_manifest_says_replacing_before_the_first_write(
    plan: Plan, seen: list[Manifest]
) -> None:
    replace(plan)

    assert [(m.state, m.done, m.writing) for m in seen] == [
        (State.REPLACING, frozenset(), frozenset({0, 1, 2}))
    ]
    end = plan.run.read_manifest()
    assert (end.state, end.done, end.writing) == (
        State.REPLACING,
        frozenset({0, 1, 2}),
        frozenset(),
    )


def test_all_is_saved_before_the_manifest_says_replacing(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[dict[str, list[bytes | None]]] = []
    advance = type(plan.run).advance

    def note(run: Any, attempt: str, **changes: Any) -> Manifest:
        if changes.get("state") is State.REPLACING and not found:
            found.append(saved(plan))
        return advance(run, attempt, **changes)

    monkeypatch.setattr(type(plan.run), "advance", note)
    replace(plan)

    assert found == [{f"{i:02d}": [OLD] for i in range(10)}]


@pytest.mark.parametrize(("most", "transactions"), [(10, 1), (9, 3)])
def test_up_to_a_bound_it_is_one_transaction_and_above_it_several(
    plan: Plan,
    monkeypatch: pytest.MonkeyPatch,
    short: None,
    seen: list[Manifest],
    most: int,
    transactions: int,
) -> None:
    monkeypatch.setattr(replacing, "MOST_ROWS_AT_ONCE", most)

    assert replace(plan) == Summary(replaced=10)
    assert len(seen) == transactions


def test_one_transaction_is_taken_for_any_number_where_that_is_wanted(
    plan: Plan, short: None, seen: list[Manifest]
) -> None:
    plan = replaced(plan, rules=Rules(one_transaction=True))

    assert replace(plan) == Summary(replaced=10)
    assert [m.writing for m in seen] == [frozenset({0, 1, 2})]


def test_each_of_several_transactions_is_recorded_before_its_first_write(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, short: None, seen: list[Manifest]
) -> None:
    monkeypatch.setattr(replacing, "_FIRST_ROWS", 4)

    assert replace(plan) == Summary(replaced=10)
    assert [(m.state, m.done, m.writing) for m in seen] == [
        (State.REPLACING, frozenset(), frozenset({0})),
        (State.REPLACING, frozenset({0}), frozenset({1})),
        (State.REPLACING, frozenset({0, 1}), frozenset({2})),
    ]
    end = plan.run.read_manifest()
    assert (end.done, end.writing) == (frozenset({0, 1, 2}), frozenset())


def test_a_transaction_that_runs_out_of_time_ends_at_a_ranges_border(
    plan: Plan, short: None, seen: list[Manifest]
) -> None:
    # The first is meant to hold all of them, and has time for one.
    assert replace(plan) == Summary(replaced=10)
    assert [(m.done, m.writing) for m in seen] == [
        (frozenset(), frozenset({0, 1, 2})),
        (frozenset({0}), frozenset({1})),
        (frozenset({0, 1}), frozenset({2})),
    ]


def test_transactions_that_are_fast_grow(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, short: None, seen: list[Manifest]
) -> None:
    monkeypatch.setattr(replacing, "TRANSACTION_SECONDS", 1e9)
    monkeypatch.setattr(replacing, "_FIRST_ROWS", 4)

    assert replace(plan) == Summary(replaced=10)
    assert [m.writing for m in seen] == [frozenset({0}), frozenset({1, 2})]


def test_between_two_transactions_the_table_holds_whole_ranges(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, short: None
) -> None:
    found: list[list[bool]] = []
    before_the_lock(
        monkeypatch,
        *[lambda: found.append([held(plan, f"{i:02d}") != OLD for i in range(10)])] * 3,
    )

    replace(plan)

    assert found == [
        [False] * 10,
        [True] * 4 + [False] * 6,
        [True] * 8 + [False] * 2,
    ]


def test_ranges_without_a_change_take_no_transaction(
    tmp_path: Path, short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [memory(f"{i:02d}", embedding=OLD, embedding_dim=2) for i in range(3)]
    rows[1] = memory("01", "", encrypted_envelope=b"sealed")
    plan = begin(fake_plan(make_store(tmp_path / "m.db", rows), rows=1))
    stage(plan)
    opened: list[frozenset[int]] = []
    before_the_lock(monkeypatch, *[lambda: opened.append(plan.run.read_manifest().writing)] * 9)
    monkeypatch.setattr(replacing, "MOST_ROWS_AT_ONCE", 1)

    assert replace(plan) == Summary(replaced=2, kept={Cause.ENCRYPTED: 1})
    assert [len(writing) for writing in opened] == [2, 1]
    assert plan.run.read_manifest().done == frozenset({0, 1, 2})


def test_where_nothing_is_to_be_written_nothing_is(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace(plan)
    monkeypatch.setattr(Replacement, "transaction", None)

    assert replace(plan) == Summary(replaced=10)


# Killed, taken over, in trouble.


class Killed(BaseException):
    """Stands for the end of the process: nothing after it is done."""


def kill_after_commit(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the process end between the commit of a transaction and its record."""
    transaction = Replacement.transaction
    left = [number]

    @contextmanager
    def die(table: Replacement) -> Iterator[None]:
        with transaction(table):
            yield
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    monkeypatch.setattr(Replacement, "transaction", die)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_kill_between_the_commit_and_its_record_is_finished_forward(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, short: None, number: int
) -> None:
    with monkeypatch.context() as patch:
        kill_after_commit(patch, number)
        with pytest.raises(Killed):
            replace(plan)
    assert [held(plan, f"{i:02d}") != OLD for i in range(10)].count(True) == [4, 8, 10][number - 1]
    manifest = plan.run.read_manifest()
    assert (manifest.state, manifest.done) == (State.REPLACING, frozenset(range(number - 1)))
    backup = files(plan.run.backup)

    assert replace(plan, ranges=()) == Summary(replaced=10)

    assert list(stored(plan).values()) == ALL_NEW
    assert files(plan.run.backup) == backup
    assert saved(plan) == {f"{i:02d}": [OLD] for i in range(10)}
    assert plan.run.read_manifest().done == frozenset({0, 1, 2})


def test_what_was_being_written_at_a_kill_and_is_found_written_is_recorded_as_done(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, short: None, seen: list[Manifest]
) -> None:
    with monkeypatch.context() as patch:
        kill_after_commit(patch, 1)
        with pytest.raises(Killed):
            replace(plan)
    manifest = plan.run.read_manifest()
    assert (manifest.done, manifest.writing) == (frozenset(), frozenset({0, 1, 2}))
    seen.clear()

    replace(plan, ranges=())

    assert seen[0].done == frozenset({0})


def test_once_it_says_replacing_the_backup_is_never_made_again(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        kill_after_commit(patch, 1)
        with pytest.raises(Killed):
            replace(plan)
    # Were it made again now, it would hold the new vectors.
    monkeypatch.setattr(replacing, "_save_all", None)

    assert replace(plan, ranges=()) == Summary(replaced=10)
    assert saved(plan) == {f"{i:02d}": [OLD] for i in range(10)}


def test_a_backup_of_an_attempt_that_wrote_nothing_goes_only_where_all_rows_hold_it_still(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(replacing, "_write_all", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            replace(plan)
    assert plan.run.read_manifest().state is State.STAGING
    change(plan.store.path, f"UPDATE memories SET embedding = x'{OTHER.hex()}' WHERE id = '03'")

    replace(plan)

    assert saved(plan) == {f"{i:02d}": [OTHER, OLD] if i == 3 else [OLD] for i in range(10)}
    assert len(list(plan.run.backup.iterdir())) == len(plan.ranges) + 1
    # Until it is said to be replaced, nothing but the table itself tells that it is.
    behind = replaced(plan.run.read_manifest(), state=State.STAGING, wrote=False)
    plan.run.write_manifest(behind)

    assert replace(plan) == Summary(replaced=10)
    assert saved(plan) == {f"{i:02d}": [OTHER, OLD] if i == 3 else [OLD] for i in range(10)}
    assert plan.run.read_manifest().wrote


def test_a_backup_that_is_not_read_back_as_it_was_written_stops_it_before_the_first_write(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from reembed.transforms.staging import backup

    monkeypatch.setattr(backup, "read_table", lambda path, columns: pa.table({"key": ["a"]}))

    with pytest.raises(StagingError) as stopped:
        replace(plan)
    said = re.sub(r"[0-9a-f]+(?=\.parquet)", "DIGEST", wording(stopped, tmp_path))
    assert said == snapshot(
        "the backup TMP/m.db.reembed/RUN/backup/0000000.0000.DIGEST.parquet is not as it "
        "was written; check the disk"
    )
    assert {held(plan, f"{i:02d}") for i in range(10)} == {OLD}
    assert plan.run.read_manifest().state is State.STAGING


def test_a_row_whose_old_vector_changed_between_the_backup_and_the_write_is_saved_again(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_the_lock(
        monkeypatch,
        lambda: change(
            plan.store.path, f"UPDATE memories SET embedding = x'{OTHER.hex()}' WHERE id = '05'"
        ),
    )

    assert replace(plan) == Summary(replaced=10)

    assert list(stored(plan).values()) == ALL_NEW
    assert saved(plan) == {f"{i:02d}": [OTHER, OLD] if i == 5 else [OLD] for i in range(10)}
    (row,) = [r for r in plan.store.read_range(EVERYTHING, with_stored=True) if r.key == "05"]
    assert is_ours(row, ledger(plan, 1))


def test_a_row_added_and_staged_late_is_saved_as_it_was_before_it_is_written(plan: Plan) -> None:
    replace(plan)
    change(
        plan.store.path,
        "INSERT INTO memories (id, tier, namespace, title, content, created_at, updated_at, "
        f"embedding) VALUES ('99', 'mid', 'global', 'new', 'row', '', '', x'{OTHER.hex()}')",
    )
    stage(plan, pass_number=2, begun=True)

    assert replace(plan) == Summary(replaced=11)
    assert saved(plan)["99"] == [OTHER]


def test_the_runs_own_vector_of_a_former_text_is_never_a_way_back(plan: Plan) -> None:
    replace(plan)
    mine = held(plan, "05")
    change(plan.store.path, "UPDATE memories SET content = 'edited' WHERE id = '05'")
    stage(plan, pass_number=2, begun=True)

    assert replace(plan) == Summary(replaced=10)

    late, first = ledger(plan, 1).of("05")
    assert (late.stored and late.stored.vector, late.restorable) == (mine, False)
    assert (first.stored and first.stored.vector, first.restorable) == (OLD, True)


@pytest.mark.parametrize("moment", [0, 1])
def test_an_attempt_that_was_taken_over_writes_nothing_more(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, short: None, moment: int, tmp_path: Path
) -> None:
    def take_over() -> None:
        plan.run.write_manifest(replaced(plan.run.read_manifest(), attempt="another"))

    before_the_lock(monkeypatch, *[lambda: None] * moment, take_over)

    with pytest.raises(RunError) as refused:
        replace(plan)

    assert wording(refused, tmp_path) == snapshot(
        "another process has taken over the run RUN; this one stops and writes nothing "
        "more, and reembed status says what the store holds"
    )
    new = [held(plan, f"{i:02d}") != OLD for i in range(10)]
    assert new == [True] * 4 * moment + [False] * (10 - 4 * moment)
    manifest = plan.run.read_manifest()
    assert (manifest.attempt, manifest.done) == ("another", frozenset(range(moment)))


def test_an_attempt_that_was_taken_over_while_it_staged_touches_neither_backup_nor_table(
    plan: Plan, tmp_path: Path
) -> None:
    plan.run.write_manifest(replaced(plan.run.read_manifest(), attempt="another"))
    before = files(plan.run.path)

    with pytest.raises(RunError) as refused:
        replace(plan)
    assert wording(refused, tmp_path) == snapshot(
        "another process has taken over the run RUN; this one stops and writes nothing "
        "more, and reembed status says what the store holds"
    )
    assert files(plan.run.path) == before
    assert {held(plan, f"{i:02d}") for i in range(10)} == {OLD}


def test_without_room_for_it_nothing_is_written(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 1000, 1000))

    with pytest.raises(StagingError) as refused:
        replace(plan)
    assert wording(refused, tmp_path) == snapshot(
        "about 6,435 bytes are needed for the new vectors, the backup and SQLite's log, "
        "and 1,000 bytes are free at TMP/m.db.reembed/RUN; make room, or name another "
        "place for the run directory with --run-dir"
    )
    assert {held(plan, f"{i:02d}") for i in range(10)} == {OLD}
    assert plan.run.read_manifest().state is State.STAGING
    assert list(plan.run.backup.iterdir()) == []


def test_the_room_is_that_of_the_new_vectors_the_backup_and_the_log(plan: Plan) -> None:
    row = 4 * 8 + replacing.ROW_BYTES
    old = 10 * len(OLD)

    assert plan.survey.vector_bytes == old
    assert plan.job.room(1000, staged=7) == {
        plan.run.path: 7 * row + old + 1000 * replacing.ROW_BYTES,
        plan.store.path: 1750 * row + 3 * (1000 * row - old) // 2,
    }
    # Rolling back writes the old ones, which may be longer.
    assert replaced(plan.job, vector_bytes=10**6).room(1)[plan.store.path] == 10**6


def test_a_writer_that_holds_the_lock_is_waited_for(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("reembed.transforms.stores.sqlite._TURN_SECONDS", 0.05)
    monkeypatch.setattr("reembed.transforms.stores.sqlite.BUSY_SECONDS", 0.1)
    connection = sqlite3.connect(plan.store.path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError) as failed:
        replace(plan)
    assert wording(failed, tmp_path) == snapshot(
        "TMP/m.db is locked by another process; wait for it to finish, or stop it, and run again"
    )
    connection.execute("COMMIT")
    connection.close()

    assert replace(plan) == Summary(replaced=10)


def test_a_record_stop_that_comes_between_two_transactions_stops_it(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, short: None, tmp_path: Path
) -> None:
    def stop() -> None:
        change(
            plan.store.path,
            "INSERT INTO signed_events (id, agent_id, event_type, payload_hash, timestamp, "
            "sequence) VALUES ('1', 'a', 'substrate.record_stop', x'', '', 1)",
        )

    before_the_lock(monkeypatch, lambda: None, stop)

    with pytest.raises(StoreError) as stopped:
        replace(plan)
    assert wording(stopped, tmp_path) == snapshot(
        "a record-stop is in force in TMP/m.db, and no program may write to it; resume "
        "recording with ai-memory and run again"
    )
    assert [held(plan, f"{i:02d}") != OLD for i in range(10)] == [True] * 4 + [False] * 6


# Too many failures.


@pytest.mark.parametrize(
    ("replaced", "kept", "most", "refused"),
    [
        (2, {Cause.REJECTED: 1}, 0.5, None),
        (1, {Cause.REJECTED: 1}, 0.5, None),
        (
            1,
            {Cause.REJECTED: 1, Cause.BAD_VECTOR: 1},
            0.5,
            snapshot(
                "2 of 3 rows could not be embedded (1 rejected by the model, 1 unusable "
                "vector), and --max-skipped allows 0.5 of them and never all"
            ),
        ),
        (
            0,
            {Cause.REJECTED: 1},
            0.5,
            snapshot(
                "1 of 1 rows could not be embedded (1 rejected by the model), and "
                "--max-skipped allows 0.5 of them and never all"
            ),
        ),
        (0, {Cause.ENCRYPTED: 9, Cause.OVER_CAP: 9, Cause.NOT_TEXT: 9}, 0.5, None),
        (
            1,
            {Cause.ENCRYPTED: 9, Cause.REJECTED: 2},
            0.5,
            snapshot(
                "2 of 3 rows could not be embedded (2 rejected by the model), and "
                "--max-skipped allows 0.5 of them and never all"
            ),
        ),
        (0, {}, 0.5, None),
        (
            99,
            {Cause.REJECTED: 1},
            0.0,
            snapshot(
                "1 of 100 rows could not be embedded (1 rejected by the model), and "
                "--max-skipped allows 0 of them and never all"
            ),
        ),
        (99, {Cause.ENCRYPTED: 1}, 0.0, None),
        (99, {Cause.REJECTED: 1}, 0.01, None),
        (1, {Cause.REJECTED: 99}, 1.0, None),
        (
            0,
            {Cause.REJECTED: 99},
            1.0,
            snapshot(
                "99 of 99 rows could not be embedded (99 rejected by the model), and "
                "--max-skipped allows 1 of them and never all"
            ),
        ),
        (0, {}, 0.0, None),
    ],
)
def test_a_run_in_which_too_many_of_the_tried_rows_failed_or_all_is_refused(
    replaced: int, kept: dict[Cause, int], most: float, refused: str | None
) -> None:
    found = Summary(replaced=replaced, kept=kept)

    if refused is None:
        check_failures(found, most=most)
        return
    with pytest.raises(TooManySkippedError) as failed:
        check_failures(found, most=most)
    said = str(failed.value)
    assert re.sub("; nothing is replaced now, and .*", "", said) == refused
    assert "; nothing is replaced now, and what is staged stays: " in said


def test_too_many_failures_replace_nothing_and_what_is_staged_stays(tmp_path: Path) -> None:
    rows = [memory("a"), memory("b", POISON), memory("c", POISON + "!")]
    plan = begin(fake_plan(make_store(tmp_path / "m.db", rows)))
    stage(plan)
    before = files(plan.run.path)

    with pytest.raises(TooManySkippedError) as failed:
        replace(plan, Phase.FORCE)

    assert wording(failed, tmp_path) == snapshot(
        "2 of 3 rows could not be embedded (2 rejected by the model), and --max-skipped "
        "allows 0.5 of them and never all; nothing is replaced now, and what is staged "
        "stays: check the model, then run again with --retry-skipped, or with a higher "
        "--max-skipped"
    )
    assert set(stored(plan).values()) == {None}
    assert files(plan.run.path) == before
    assert replace(replaced(plan, rules=Rules(most_skipped=0.7))).replaced == 1


def test_failures_of_a_text_that_was_edited_since_do_not_count(tmp_path: Path) -> None:
    plan = begin(fake_plan(make_store(tmp_path / "m.db", [memory("a", POISON)])))
    stage(plan)
    change(plan.store.path, "UPDATE memories SET content = 'mended'")
    stage(plan, pass_number=2)

    assert replace(plan) == Summary(replaced=1)


def test_too_many_failures_of_a_later_part_replace_nothing_of_it(tmp_path: Path) -> None:
    rows = [memory("a"), *(memory(key, f"{POISON} {key}") for key in "bcd")]
    plan = begin(fake_plan(make_store(tmp_path / "m.db", rows), rows=1))
    first = replaced(plan, ranges=plan.ranges[:1])
    stage(first)
    assert replace(plan, Phase.FORCE).replaced == 1
    before = plan.store.path.read_bytes()
    stage(plan, pass_number=2, begun=True)

    with pytest.raises(TooManySkippedError) as failed:
        replace(plan, Phase.FORCE)
    assert wording(failed, tmp_path) == snapshot(
        "3 of 4 rows could not be embedded (3 rejected by the model), and --max-skipped "
        "allows 0.5 of them and never all; nothing is replaced now, and what is staged "
        "stays: check the model, then run again with --retry-skipped, or with a higher "
        "--max-skipped"
    )
    assert plan.store.path.read_bytes() == before
