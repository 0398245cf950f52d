"""Two SQLite libraries may be in a process; a file is never open in both at once.

POSIX drops all locks of a process on a file when the process closes any descriptor of it, so one
library would drop the other's: https://sqlite.org/howtocorrupt.html ("Posix advisory locks").
"""

from __future__ import annotations

import importlib
import os
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import IO, Any

import pytest

from reembed.pipeline import surroundings
from reembed.transforms.rows import KeyRange
from reembed.transforms.stores import open_store, recover_store
from reembed.transforms.stores import sqlite as sqlite_files
from reembed.transforms.stores.vec0 import connect as connect_vec
from tests.conftest import Call, make_store, memory, select
from tests.store_kinds import KINDS, old_vector

pysqlite3: Any = importlib.import_module("pysqlite3")
SAME_LIBRARY = hasattr(sqlite3.Connection, "enable_load_extension")
"""Whether Python's own library loads extensions, so that there is no need for the other."""


class Libraries:
    """Counts the connections to a file that each library has open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.open: Counter[str] = Counter()
        self.opened: Counter[str] = Counter()
        self.both: list[str] = []

    def connection(self, base: type[Any], library: str) -> type[Any]:
        counts = self

        class Counting(base):  # type: ignore[misc]
            def __init__(self, name: str | Path, *arguments: Any, **more: Any) -> None:
                self.of_file = str(name) != ":memory:"
                if self.of_file:
                    counts.open[library] += 1
                    counts.opened[library] += 1
                    if len(+counts.open) > 1:
                        counts.both.append(f"{library} beside {dict(counts.open)}")
                super().__init__(name, *arguments, **more)

            def close(self) -> None:
                super().close()
                if self.of_file:
                    counts.open[library] -= 1
                    self.of_file = False

        return Counting


@pytest.fixture
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Libraries:
    """Count the connections to m.db, and files that are opened beside them."""
    counts = Libraries(tmp_path / "m.db")
    own = counts.connection(sqlite3.Connection, "sqlite3")
    other = counts.connection(pysqlite3.Connection, "pysqlite3")
    plain, extended, opened = sqlite3.connect, pysqlite3.connect, sqlite_files._open
    path_open = Path.open

    def connect_own(*arguments: Any, **more: Any) -> Any:
        return plain(*arguments, **{"factory": own, **more})

    def connect_other(*arguments: Any, **more: Any) -> Any:
        return extended(*arguments, **{"factory": other, **more})

    def open_file(path: Path, mode: str, connect: sqlite_files.Connect) -> sqlite3.Connection:
        return opened(path, mode, connect_own if connect is plain else connect)

    def open_path(path: Path, *arguments: Any, **more: Any) -> IO[Any]:
        if path == counts.path and +counts.open:
            counts.both.append(f"a descriptor beside {dict(counts.open)}")
        file: IO[Any] = path_open(path, *arguments, **more)
        return file

    monkeypatch.setattr(sqlite3, "connect", connect_own)
    monkeypatch.setattr(pysqlite3, "connect", connect_other)
    monkeypatch.setattr(sqlite_files, "_open", open_file)
    monkeypatch.setattr(Path, "open", open_path)
    return counts


def vec0(path: Path) -> Sequence[str]:
    kind = next(kind for kind in KINDS if kind.name == "sqlite-vec")
    kind.make(path, [f"text {at}" for at in range(6)])
    return ("--model", "m", *kind.flags)


def table(path: Path, *, triggers: bool) -> Sequence[str]:
    """An ordinary table beside a vec0 table, maybe with triggers that write to that."""
    with closing(connect_vec(path)) as db, db:
        db.execute("CREATE TABLE docs (id INTEGER PRIMARY KEY, body TEXT, v BLOB)")
        db.execute("CREATE VIRTUAL TABLE mirror USING vec0(v float[5])")
        if triggers:
            db.execute(
                "CREATE TRIGGER mirrored AFTER UPDATE OF v ON docs BEGIN "
                "DELETE FROM mirror WHERE rowid = new.id; "
                "INSERT INTO mirror (rowid, v) VALUES (new.id, new.v); END"
            )
        for at in range(6):
            vector = old_vector(at).tobytes()
            db.execute("INSERT INTO docs VALUES (?, ?, ?)", (at, f"text {at}", vector))
            db.execute("INSERT INTO mirror (rowid, v) VALUES (?, ?)", (at, vector))
    flags = ["--table", "docs", "--text", "body", "--vector", "v"]
    return ("--store", "table", "--model", "m", "--dim", "5", *flags)


def ai_memory(path: Path) -> Sequence[str]:
    make_store(path, [memory(f"{at:02d}") for at in range(6)])
    return ()


STORES: dict[str, tuple[Callable[[Path], Sequence[str]], bool]] = {
    "a vec0 table": (vec0, True),
    "a table with triggers to one": (lambda path: table(path, triggers=True), True),
    "a table beside one": (lambda path: table(path, triggers=False), False),
    "no vec0 table": (ai_memory, False),
}
"""How a file is made, and whether its vec0 tables are read or written."""


@pytest.mark.parametrize("store", STORES)
def test_a_file_is_never_open_in_two_sqlite_libraries_at_once(
    store: str, libraries: Libraries, reembed: Call
) -> None:
    path = libraries.path
    make, touches_vec0 = STORES[store]
    flags = make(path)
    libraries.opened.clear()

    assert reembed("--db", path, *flags, "--dry-run").code == 0
    ran = reembed("--db", path, *flags, range_rows=2)
    assert ran.code == 0, ran.err
    for command in ("status", "verify", "rollback", "cleanup"):
        assert reembed(command, "--db", path).code == 0

    assert libraries.both == []
    assert not +libraries.open
    assert libraries.opened["sqlite3"] > 0
    if not SAME_LIBRARY:
        assert (libraries.opened["pysqlite3"] > 0) == touches_vec0


@pytest.mark.parametrize("store", ["a vec0 table", "a table with triggers to one"])
def test_what_is_written_is_written_by_one_library(
    store: str, libraries: Libraries, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, _ = STORES[store]
    flags = list(make(libraries.path))
    config: dict[str, Any] = {"text": [flags[flags.index("--text") + 1]]}
    if "--table" in flags:
        config |= {"kind": "table", "table": "docs", "vector": "v"}
    opened = open_store(libraries.path, config=config)
    libraries.opened.clear()

    opened.check_writable()
    with opened.replacing() as replacement:
        replacement.transact(lambda: None)

    assert libraries.opened.keys() == ({"sqlite3"} if SAME_LIBRARY else {"pysqlite3"})


def test_flags_that_are_missing_are_hinted_at_by_one_library_at_a_time(
    libraries: Libraries, reembed: Call
) -> None:
    vec0(libraries.path)

    assert reembed("--db", libraries.path, "--model", "m").code == 2
    assert libraries.both == []


def test_a_write_that_another_process_left_is_rolled_back_by_one_library(
    libraries: Libraries,
) -> None:
    vec0(libraries.path)
    Path(f"{libraries.path}-journal").write_bytes(b"")

    recover_store(libraries.path)

    assert (libraries.both, +libraries.open) == ([], Counter())


@pytest.mark.system
def test_looking_for_other_processes_drops_no_lock_of_this_one(tmp_path: Path) -> None:
    path = make_store(tmp_path / "m.db", [memory("a")])
    script = (
        "import sqlite3, sys\n"
        "try: sqlite3.connect(sys.argv[1], timeout=0).execute('BEGIN IMMEDIATE')\n"
        "except sqlite3.OperationalError: print('locked')\n"
    )
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN EXCLUSIVE")
        surroundings.warnings(path)

        asked = subprocess.run(
            [sys.executable, "-c", script, path], capture_output=True, text=True, check=True
        )

    assert asked.stdout == "locked\n"


def test_a_name_that_is_not_utf_8_is_opened_read_and_written(tmp_path: Path) -> None:
    path = Path(os.fsdecode(bytes(tmp_path) + b"/m\xff%23 ?#\x1b.db"))
    make_store(tmp_path / "plain.db", [memory("a")]).rename(path)
    store = open_store(path)

    with store.replacing() as replacement:
        (row,) = store.read_range(KeyRange(0, None, None), with_stored=True)
        new = store.describe(b"\0" * 8, model="m", dimension=2)
        replacement.transact(lambda: replacement.put([(row.rowid, new)]))

    plain = path.rename(tmp_path / "plain.db")
    assert select(plain, "SELECT embedding_dim FROM memories") == [(2,)]
