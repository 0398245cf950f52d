"""Locks: how long reembed keeps others out, and how long it waits for them."""

from __future__ import annotations

import importlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from inline_snapshot import snapshot

from reembed.transforms.errors import StoreError
from reembed.transforms.rows import KeyRange, Stored
from reembed.transforms.stores import base, open_store
from reembed.transforms.stores import sqlite as sqlite_files
from reembed.transforms.stores.codec import encode
from tests.conftest import Call, all_columns, make_store, memory, select
from tests.store_kinds import KINDS, Kind
from tests.wording import line_with, wording

pytestmark = pytest.mark.system

EVERYTHING = KeyRange(0, None, None)
OLD = encode(np.array([1.0, 2.0], dtype=np.float32))
SCALE = 10
"""Times are a tenth of what they are in use: a commit waits 0.2 s, a reader has 0.5 s."""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_files, "COMMIT_SECONDS", 2.0 / SCALE)
    monkeypatch.setattr(sqlite_files, "_TURN_SECONDS", 0.5 / SCALE)
    monkeypatch.setattr(sqlite_files, "BUSY_SECONDS", 60.0 / SCALE)


def store_of(path: Path, mode: str = "delete", rows: int = 4) -> Path:
    memories = [memory(f"{at:02d}", embedding=OLD, embedding_dim=2) for at in range(rows)]
    return make_store(path, memories, mode)


def new(byte: bytes = b"\1") -> Stored:
    return Stored(byte * 9, "embedding_dim=integer:32")


@contextmanager
def reading(path: Path, seconds: float) -> Iterator[None]:
    """Another program that reads in one transaction for so long."""
    begun = threading.Event()

    def read() -> None:
        with closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.execute("BEGIN")
            db.execute("SELECT count(*) FROM memories").fetchone()
            begun.set()
            time.sleep(seconds)

    thread = threading.Thread(target=read)
    thread.start()
    begun.wait()
    yield
    thread.join()


@contextmanager
def impatient(path: Path, failed: list[str]) -> Iterator[None]:
    """Another program that reads again and again, and waits half a second for a lock."""
    ends = threading.Event()

    def read() -> None:
        while not ends.wait(0.02):
            try:
                with closing(sqlite3.connect(path, timeout=5.0 / SCALE)) as db:
                    db.execute("SELECT count(*) FROM memories").fetchone()
            except sqlite3.OperationalError as error:
                failed.append(str(error))

    thread = threading.Thread(target=read)
    thread.start()
    yield
    ends.set()
    thread.join()


def test_a_reader_with_5_s_of_patience_gets_in_beside_one_that_keeps_the_commit_off(
    tmp_path: Path, quick: None
) -> None:
    store = open_store(store_of(tmp_path / "m.db"))
    bodies: list[float] = []
    failed: list[str] = []

    with store.replacing() as table:

        def body() -> int:
            bodies.append(time.monotonic())
            table.put([(1, new()), (2, new())])
            return len(bodies)

        with reading(store.path, 1.0), impatient(store.path, failed):
            times = table.transact(body)

        assert len(table.written) == 2
    assert failed == []
    assert times == len(bodies) > 1
    between = [later - earlier for earlier, later in pairwise(bodies)]
    assert all(seconds >= 2 * 2.0 / SCALE for seconds in between)
    held = select(store.path, "SELECT embedding FROM memories ORDER BY id")
    assert held == [(new().vector,), (new().vector,), (OLD,), (OLD,)]


def test_a_run_and_its_rollback_beside_long_readers_keep_nobody_out(
    tmp_path: Path, quick: None, reembed: Call
) -> None:
    path = store_of(tmp_path / "m.db", rows=30)
    before = all_columns(path)
    failed: list[str] = []

    with impatient(path, failed):
        with reading(path, 0.6):
            assert reembed("--db", path, range_rows=8).code == 0
        assert select(path, "SELECT DISTINCT embedding_dim FROM memories") == [(8,)]
        with reading(path, 0.6):
            undone = reembed("rollback", "--db", path, "--json")

    assert (undone.code, undone.values["restored"], failed) == (0, 30, [])
    assert all_columns(path) == before


def test_readers_that_never_go_end_it_with_the_table_as_it_was(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_files, "BUSY_SECONDS", 0.3)
    store = open_store(store_of(tmp_path / "m.db"))

    with (
        reading(store.path, 0.7),
        pytest.raises(StoreError) as refused,
        store.replacing() as table,
    ):
        table.transact(lambda: table.put([(1, new())]))
    assert wording(refused, tmp_path) == snapshot(
        "TMP/m.db is locked by another process; wait for it to finish, or stop it, and run again"
    )

    assert len(table.written) == 0
    assert select(store.path, "SELECT DISTINCT embedding FROM memories") == [(OLD,)]


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_a_transaction_keeps_readers_out_only_while_it_is_committed(
    tmp_path: Path, mode: str
) -> None:
    """SQLite would write changed pages to the file before, once its cache of 2 MB is full."""
    path = store_of(tmp_path / "m.db", mode, rows=40)
    store = open_store(path)
    large = Stored(b"\2" * 200_000, "embedding_dim=integer:32")

    with store.replacing() as table:

        def body() -> None:
            table.put([(rowid, large) for rowid in range(1, 41)])
            with closing(sqlite3.connect(path, timeout=0)) as other:
                assert other.execute("SELECT count(embedding) FROM memories").fetchone() == (40,)

        table.transact(body)

    assert select(path, "SELECT DISTINCT length(embedding) FROM memories") == [(200_000,)]


def test_one_that_is_too_large_for_memory_has_the_file_to_itself_from_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_files, "MAX_HELD_BYTES", 1_000_000)
    path = store_of(tmp_path / "m.db", rows=1_200)
    store = open_store(path)
    larger = Stored(b"\2" * 4_000, "embedding_dim=integer:32")
    alone: list[bool] = []

    with store.replacing() as table:

        def body() -> None:
            with closing(sqlite3.connect(path, timeout=0)) as other:
                try:
                    other.execute("SELECT count(*) FROM memories").fetchone()
                    alone.append(False)
                except sqlite3.OperationalError:
                    alone.append(True)
            table.put([(rowid, larger) for rowid in range(1, 1_201)])

        table.transact(body)
        assert len(table.written) == 1_200
        table.transact(lambda: table.put([(1, new())]))

    assert alone == [False, True]
    assert select(path, "SELECT count(*) FROM memories WHERE length(embedding) = 4000") == [(1199,)]


def test_the_exclusive_start_lets_readers_in_between_its_tries(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_files, "MAX_HELD_BYTES", -1)
    store = open_store(store_of(tmp_path / "m.db"))
    failed: list[str] = []

    with store.replacing() as table, reading(store.path, 0.6), impatient(store.path, failed):
        table.transact(lambda: table.put([(1, new())]))

    assert failed == []
    assert select(store.path, "SELECT embedding FROM memories")[:2] == [(new().vector,), (OLD,)]


def test_other_errors_undo_a_transaction_at_once(tmp_path: Path) -> None:
    store = open_store(store_of(tmp_path / "m.db"))

    with store.replacing() as table:

        def body() -> None:
            table.put([(1, new())])
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            table.transact(body)
        assert len(table.written) == 0

    assert select(store.path, "SELECT DISTINCT embedding FROM memories") == [(OLD,)]


def held_for(path: Path, seconds: float) -> threading.Thread:
    """Hold the file exclusively for so long, from now on."""
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5)
    db.execute("BEGIN EXCLUSIVE")

    def release() -> None:
        time.sleep(seconds)
        db.execute("ROLLBACK")
        db.close()

    thread = threading.Thread(target=release)
    thread.start()
    return thread


PHASES: dict[str, tuple[str, str]] = {
    "plan": ("reembed.pipeline.plan", "choose_store"),
    "reading rows": ("reembed.transforms.read", "read_shards"),
    "the trial": ("reembed.pipeline.run", "try_update"),
    "the replacement": ("reembed.pipeline.run", "replace_vectors"),
    "reading back": ("reembed.transforms.replacing", "reads_back"),
    "status": ("reembed.pipeline.upkeep", "show_status"),
    "verify": ("reembed.pipeline.upkeep", "verify"),
    "rollback": ("reembed.pipeline.upkeep", "undo"),
}
"""What does each phase: a lock is held as it begins."""


@pytest.mark.parametrize("phase", PHASES)
def test_a_lock_that_is_held_as_a_phase_begins_is_waited_for(
    phase: str, tmp_path: Path, reembed: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store_of(tmp_path / "m.db", rows=10)
    monkeypatch.setattr(sqlite_files, "_TURN_SECONDS", 0.05)
    if phase in ("status", "verify", "rollback"):
        assert reembed("--db", path).code == 0
    holders: list[threading.Thread] = []
    hold(monkeypatch, *PHASES[phase], path, holders)

    command = [phase] if phase in ("status", "verify", "rollback") else []
    ran = reembed(*command, "--db", path)

    assert (ran.code, len(holders)) == (0, 1), ran.err
    for holder in holders:
        holder.join()


def hold(
    patch: pytest.MonkeyPatch, module: str, name: str, path: Path, holders: list[threading.Thread]
) -> None:
    found = importlib.import_module(module)
    do: Callable[..., Any] = getattr(found, name)

    def held(*arguments: Any, **more: Any) -> Any:
        if not holders:
            holders.append(held_for(path, 0.1))
        return do(*arguments, **more)

    patch.setattr(found, name, held)


def test_readers_of_rows_wait_as_long_as_the_writer(tmp_path: Path) -> None:
    store = open_store(store_of(tmp_path / "m.db"))
    holder = held_for(store.path, 0.25)
    assert sqlite_files.BUSY_SECONDS == 60.0

    assert len(store.read_range(EVERYTHING)) == 4
    holder.join()


def test_the_lockout_is_estimated_where_readers_would_notice(tmp_path: Path) -> None:
    delete = open_store(store_of(tmp_path / "m.db"))
    wal = open_store(store_of(tmp_path / "w.db", "wal"))

    assert delete.lockout(10_000, 384) is None
    assert wal.lockout(1_000_000, 1_536) is None
    found = delete.lockout(1_000_000, 1_536)
    assert found is not None
    assert (found.rows, found.bytes) == (1_000_000, 6_144_000_000)
    assert 60 < found.seconds < 600


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        (0, snapshot("the disk of TMP/m.db is full; make room and run again")),
        (
            10**9,
            snapshot(
                "reading or writing TMP/m.db failed (disk I/O error); check the disk and run again"
            ),
        ),
    ],
)
def test_an_io_error_on_a_disk_without_room_is_a_full_disk(
    free: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite says no more where the index of a log can't be made."""
    found = SimpleNamespace(f_bavail=free, f_frsize=1)
    monkeypatch.setattr("reembed.transforms.stores.sqlite.os.statvfs", lambda _: found)
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorname = "SQLITE_IOERR_SHMSIZE"

    with (
        pytest.raises(StoreError) as refused,
        sqlite_files.translated(tmp_path / "m.db"),
    ):
        raise error
    assert wording(refused, tmp_path) == expected


@pytest.mark.parametrize("pieces", [{}, {"rows_at_once": 1, "first_rows": 2}], ids=str)
@pytest.mark.parametrize("kind", [KINDS[at] for at in (0, 1, 3, 4)], ids=lambda kind: kind.name)
def test_each_transaction_can_be_done_again(
    kind: Kind,
    pieces: dict[str, int],
    tmp_path: Path,
    reembed: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = kind.make(tmp_path / "m.db", [f"text {at}" for at in range(6)])
    before = kind.contents(path)
    held_up = refuse_commits(monkeypatch)
    flags = ("--db", path, "--model", "m", *kind.flags)

    ran = reembed(*flags, "--json", range_rows=2, **pieces)

    assert (ran.code, ran.values["reembedded"], ran.values["remaining"]) == (0, 6, 0), ran.err
    assert kind.held(path) == [kind.new(f"text {at}") for at in range(6)]
    assert len(held_up) >= 2
    undone = reembed("rollback", "--db", path, "--json", range_rows=2, **pieces)
    values = undone.values
    assert (undone.code, values["restored"], values["unchanged"], values["left"]) == (0, 6, 0, 0)
    assert kind.contents(path) == before
    assert reembed(*flags, "--json", range_rows=2).values["reembedded"] == 6


def refuse_commits(patch: pytest.MonkeyPatch) -> list[str]:
    """Hold every transaction up twice, as readers would; give those that were."""
    held_up: list[str] = []
    tries = [0]
    do = sqlite_files._unless_held_up

    def refuse(connection: sqlite3.Connection, statement: str) -> None:
        tries[0] += statement == "COMMIT"
        if statement == "COMMIT" and tries[0] % 3:
            held_up.append(statement)
            raise sqlite_files.HeldUpError
        do(connection, statement)

    patch.setattr(sqlite_files, "_unless_held_up", refuse)
    patch.setattr(sqlite_files, "COMMIT_SECONDS", 0.0)
    return held_up


def test_the_plan_says_how_long_one_transaction_keeps_readers_out(
    reembed: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_store(tmp_path / "m.db", [memory(f"{i}") for i in range(9)])
    monkeypatch.setattr(base, "_COMMITTED_BYTES", 100.0)

    planned = reembed("--db", path, "--dry-run", "--json")
    told = reembed("--db", path, "--dry-run")

    # 9 rows of 8 numbers of 4 bytes, and as many bytes of former pages.
    assert planned.values["readers_out_seconds"] == 6
    assert line_with("readers ", told.out) == snapshot(
        "readers          kept out for about 6 s by one transaction"
    )
    assert wording(line_with("which keeps readers", told.err), tmp_path) == snapshot(
        "reembed: NOTE — all rows are replaced in one transaction, which keeps readers of "
        "TMP/m.db out for about 6 s"
    )
    monkeypatch.setattr("reembed.pipeline.plan.MOST_ROWS_AT_ONCE", 5)
    several = reembed("--db", path, "--dry-run", "--json")
    assert several.values["readers_out_seconds"] is None
    one = reembed("--db", path, "--dry-run", "--json", "--one-transaction")
    assert one.values["readers_out_seconds"] == 6
