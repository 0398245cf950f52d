"""SQLite files: opened without leaving a trace, or for one short transaction.

Sources: https://sqlite.org/uri.html, https://sqlite.org/wal.html (read-only databases),
https://sqlite.org/fileformat.html (the header).
"""

from __future__ import annotations

import os
import re
import sqlite3
import stat
import string
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar
from urllib.parse import quote

from reembed.transforms.errors import StoreError
from reembed.transforms.stores.side_files import check_side_files

T = TypeVar("T")

Connect = Callable[..., sqlite3.Connection]
"""What opens a connection, as `sqlite3.connect` does."""

BUSY_SECONDS = 60.0
"""How long reembed waits for another process's lock, to read or to write, in seconds."""

COMMIT_SECONDS = 2.0
"""How long a commit may wait for readers, since new ones are kept out meanwhile; then it is rolled
back, they get as long, and it is tried again. ai-memory's own connections wait 5 s."""

MAX_HELD_BYTES = 256 * 1_048_576
"""Changed pages that a transaction keeps in memory. SQLite writes those of a larger one to the file
before its commit, which keeps readers out from then on."""

_TURN_SECONDS = 0.5
"""How long SQLite itself waits for a lock, before Python looks whether a signal has come."""

_BREATH_SECONDS = 0.01
"""Between two tries, as SQLite does not wait for every kind of lock."""

_LOG_INDEX_BYTES = 32_768
"""What the index of a log (`-shm`) takes at least: https://sqlite.org/walformat.html."""

_UNLOCKED_TRIES = 3
_MAGIC = b"SQLite format 3\x00"
_HEADER_BYTES = 100
_WAL_VERSION = 2


def check_file(path: Path) -> bool:
    """Refuse what is no SQLite file, or has others' files in the place of SQLite's side files.

    Returns whether its journal mode is WAL. `path` is without links.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise StoreError(f"{path} is not a file, so it can't be a database; name one with --db")
        header = _read_header(path)
    except FileNotFoundError:
        raise StoreError(
            f"there is no database at {path}; name an existing one with --db"
        ) from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise StoreError(f"{path} can't be read ({why}); check its name, owner and mode") from None
    if not header:
        raise StoreError(f"{path} is empty: it holds no store; name the right file with --db")
    if not header.startswith(_MAGIC) or len(header) < _HEADER_BYTES:
        raise StoreError(
            f"{path} is not a readable SQLite database: it is another kind of file, or encrypted "
            "(SQLCipher); reembed needs a plain one, so decrypt a copy first if it is encrypted"
        )
    check_side_files(path)
    return header[18] == _WAL_VERSION


_kept: dict[tuple[int, int], IO[bytes]] = {}
"""Open files by device and inode, of which the process had another descriptor as they were read."""

_kept_lock = threading.Lock()


def _read_header(path: Path) -> bytes:
    """Read the first bytes of a file, whatever the process has open.

    Closing any descriptor of a file drops all POSIX locks that the process holds on it, SQLite's
    among them. So where a connection is open, of another thread or of the program that imports
    reembed, the file stays open to the end of the process.
    """
    with _kept_lock:
        found = path.stat()
        if (file := _kept.get((found.st_dev, found.st_ino))) is None:
            file = path.open("rb")
        try:
            return os.pread(file.fileno(), _HEADER_BYTES, 0)
        finally:
            opened = os.fstat(file.fileno())
            if _is_open_besides(file):
                _kept.setdefault((opened.st_dev, opened.st_ino), file)
            elif file not in _kept.values():
                file.close()


def _is_open_besides(file: IO[bytes]) -> bool:
    """Whether the process has another descriptor of a file; no where that can't be told."""
    opened = os.fstat(file.fileno())
    with suppress(OSError):
        for name in os.listdir("/dev/fd"):  # noqa: PTH208 - names alone
            with suppress(OSError):  # That of the listing itself.
                same = os.path.samestat(os.fstat(int(name)), opened)
                if same and int(name) != file.fileno():
                    return True
    return False


def read_only(
    path: Path,
    *,
    wal: bool,
    query: Callable[[sqlite3.Connection], T],
    connect: Connect = sqlite3.connect,
) -> T:
    """Run `query` on a read-only connection that leaves no file behind; it may run twice.

    A plain read-only connection to a WAL database makes `-wal` and `-shm` and leaves them
    there. While no process has the database open (there is no `-shm`) it is therefore read
    without locks, and read again, at last with them, if anything moved meanwhile.
    """
    for _ in range(_UNLOCKED_TRIES if wal else 0):
        before = _traces(path)
        if before[f"{path}-shm"] is not None:
            break
        try:
            with translated(path), closing(_open_unlocked(path, before, connect)) as connection:
                result = query(connection)
        except StoreError:
            if _traces(path) == before:
                raise
        else:
            if _traces(path) == before:
                return result
    with translated(path), closing(_open(path, "mode=ro", connect)) as connection:
        return _patiently(lambda: query(connection), BUSY_SECONDS)


def _open_unlocked(
    path: Path, traces: dict[str, tuple[int, int] | None], connect: Connect
) -> sqlite3.Connection:
    if traces[f"{path}-wal"] is None:
        return _open(path, "mode=ro&immutable=1", connect)
    # The log of a process that died: its index is built in memory instead of in a -shm.
    connection = _open(path, "mode=ro&vfs=unix-none", connect)
    connection.execute("PRAGMA locking_mode=EXCLUSIVE")
    return connection


def _traces(path: Path) -> dict[str, tuple[int, int] | None]:
    """Size and modification time of the database and its side files; None for no file."""
    traces: dict[str, tuple[int, int] | None] = {}
    for name in (str(path), f"{path}-wal", f"{path}-shm"):
        try:
            found = Path(name).stat()
            traces[name] = (found.st_size, found.st_mtime_ns)
        except OSError:  # Most often there is none; the name of a side file may be too long.
            traces[name] = None
    return traces


@contextmanager
def write_connection(
    path: Path, *, connect: Connect = sqlite3.connect
) -> Iterator[sqlite3.Connection]:
    """A connection that may write.

    It never creates a file nor changes the journal mode, and a commit is on the disk when
    it returns (`synchronous=FULL`).
    """
    with translated(path), closing(_open(path, "mode=rw", connect)) as connection:
        _patiently(lambda: connection.execute("PRAGMA synchronous=FULL"), BUSY_SECONDS)
        yield connection


class HeldUpError(Exception):
    """Readers kept a transaction from its commit, or from its start; it was rolled back."""


@contextmanager
def write_transaction(connection: sqlite3.Connection, *, exclusive: bool = False) -> Iterator[None]:
    """One transaction that holds the write lock from its start; rolled back on any error.

    Readers are kept out only while it is committed, if it changes no more than fits into
    `MAX_HELD_BYTES`; a larger one must be `exclusive`, and keeps them out from its start. In WAL
    mode neither does. Raises HeldUpError if readers hold it up for `COMMIT_SECONDS`.
    """
    # https://sqlite.org/pragma.html#pragma_cache_spill
    spills = exclusive or _keeps_log(connection)
    _rows(connection, f"PRAGMA cache_spill = {'ON' if spills else 'OFF'}")
    if exclusive:
        _unless_held_up(connection, "BEGIN EXCLUSIVE")
    else:
        _patiently(lambda: connection.execute("BEGIN IMMEDIATE"), BUSY_SECONDS)
    try:
        yield
        _check_beside(connection)
        _unless_held_up(connection, "COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _check_beside(connection: sqlite3.Connection) -> None:
    """Raise StoreError if the journal or the log of a transaction is another's.

    SQLite opens a journal that is there already, and would not get back what it saved in it.
    """
    path = _rows_in_bytes(connection, "PRAGMA database_list")[0][2]
    if path:  # Not if it is in memory.
        check_side_files(Path(os.fsdecode(path)))


def _unless_held_up(connection: sqlite3.Connection, statement: str) -> None:
    try:
        _patiently(lambda: connection.execute(statement), COMMIT_SECONDS)
    except errors() as error:
        if _is_busy(error):
            raise HeldUpError from error
        raise


def repeat_held_up(transaction: Callable[[], T]) -> T:
    """Do a transaction, again and again while readers hold it up, who get in between.

    Gives up after `BUSY_SECONDS` with SQLite's own error.
    """
    ends: float | None = None
    while True:
        try:
            return transaction()
        except HeldUpError as error:
            now = time.monotonic()
            ends = now + BUSY_SECONDS - COMMIT_SECONDS if ends is None else ends
            if now >= ends and error.__cause__ is not None:
                raise error.__cause__ from None
        time.sleep(COMMIT_SECONDS)


def _keeps_log(connection: sqlite3.Connection) -> bool:
    return bool(_rows(connection, "PRAGMA journal_mode")[0][0] == "wal")


class HeldBytes:
    """The bytes of the pages that a transaction has changed and not yet written to the file.

    None of them in WAL mode, where they are written to the log.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self._journal = Path(f"{path}-journal")
        self._connection = connection
        self._keeps_log = _keeps_log(connection)
        self._page_bytes = int(self._one("PRAGMA page_size"))
        self._before = self._new_pages()

    def count(self, *, waiting: int = 0) -> int:
        """Count them: the pages whose old content is in the journal, and those that had none.

        `waiting` bytes are still to be written.
        """
        if self._keeps_log:
            return 0
        try:
            saved = self._journal.stat().st_size
        except OSError:
            saved = 0
        return waiting + saved + (self._new_pages() - self._before) * self._page_bytes

    def _new_pages(self) -> int:
        return int(self._one("PRAGMA page_count")) - int(self._one("PRAGMA freelist_count"))

    def _one(self, pragma: str) -> Any:
        return _rows(self._connection, pragma)[0][0]


@contextmanager
def trial_transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """One transaction that holds the write lock from its start and is always rolled back."""
    _patiently(lambda: connection.execute("BEGIN IMMEDIATE"), BUSY_SECONDS)
    try:
        yield
    finally:
        if connection.in_transaction:  # Not after a trigger's RAISE(ROLLBACK).
            connection.execute("ROLLBACK")


def data_version(connection: sqlite3.Connection) -> int:
    """A number that is another one whenever another connection has committed a change.

    The connection's own commits leave it (https://sqlite.org/pragma.html#pragma_data_version).
    """
    version: int = _rows(connection, "PRAGMA data_version")[0][0]
    return version


def fires_triggers(connection: sqlite3.Connection, statement: str) -> bool:
    """Whether a statement would run a trigger: its program then has a part of that name.

    Source: https://sqlite.org/opcode.html#Program.
    """
    return any(row[1] == b"Program" for row in _explain(connection, statement))


class Action(NamedTuple):
    """A part of a statement as SQLite asks whether it may be done, by its code.

    What the two arguments are depends on the code: of a read, a table and its column. Source:
    https://sqlite.org/c3ref/c_alter_table.html.
    """

    code: int
    first: str | None
    second: str | None
    database: str | None
    trigger: str | None


def actions_of(connection: sqlite3.Connection, statement: str) -> list[Action]:
    """Prepare a statement, without a write, and list all that it would do."""
    found: list[Action] = []

    def note(*action: Any) -> int:
        found.append(Action(*action))
        return sqlite3.SQLITE_OK

    connection.set_authorizer(note)
    try:
        _explain(connection, statement)
    finally:
        connection.set_authorizer(None)
    return found


def _explain(connection: sqlite3.Connection, statement: str) -> list[tuple[Any, ...]]:
    """Prepare a statement; return its program, texts as bytes: a literal in it may be a BLOB."""
    return _rows_in_bytes(connection, f"EXPLAIN {statement}")


def _rows_in_bytes(connection: sqlite3.Connection, query: str) -> list[tuple[Any, ...]]:
    """The rows of a query, with texts as bytes, which need not be UTF-8."""
    factory = connection.text_factory
    connection.text_factory = bytes
    try:
        return _rows(connection, query)
    finally:
        connection.text_factory = factory


def columns_read(connection: sqlite3.Connection, statement: str) -> frozenset[str]:
    """The columns, of whatever table, that a statement reads."""
    actions = actions_of(connection, statement)
    reads = (action.second for action in actions if action.code == sqlite3.SQLITE_READ)
    return frozenset(column for column in reads if column)


def _rows(connection: sqlite3.Connection, query: str) -> list[tuple[Any, ...]]:
    return _patiently(lambda: connection.execute(query).fetchall(), BUSY_SECONDS)


def check_writable(path: Path, *, connect: Connect = sqlite3.connect) -> None:
    """Refuse a database that can't be written now: read-only, or locked by another process.

    A write that another process left half done is rolled back by this, as by any other use.
    """
    check_access(path)
    with write_connection(path, connect=connect) as connection, trial_transaction(connection):
        pass  # Taking the write lock is the test; nothing is written.


def check_access(path: Path) -> None:
    """Refuse a database that this user may not write."""
    # SQLite would open a read-only WAL database all the same, and leave files beside it.
    for place in (path, path.parent):
        if not os.access(place, os.W_OK):
            raise StoreError(_SENTENCES["SQLITE_READONLY"].format(path=path))


def quoted(name: str) -> str:
    """A name as SQL takes it, whatever is in it.

    >>> quoted("a b")
    '"a b"'
    """
    return '"' + name.replace('"', '""') + '"'


def folded(name: str) -> str:
    """A name as SQLite compares it: without the case of ASCII letters.

    >>> folded("Ä A")
    'Ä a'
    """
    return name.translate(_FOLD)


_FOLD = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


_ROWID_NAMES = ("rowid", "_rowid_", "oid")


def free_rowid(connection: sqlite3.Connection, table: str) -> str | None:
    """The name by which SQL knows the number of a table's row; None if columns hide all three."""
    found = connection.execute("SELECT name FROM pragma_table_xinfo(?)", (table,))
    hidden = {folded(name) for (name,) in found}
    return next((name for name in _ROWID_NAMES if name not in hidden), None)


def hidden_rowid(table: str) -> str:
    """The sentence for such a table."""
    return (
        f"the table {table} has columns named rowid, oid and _rowid_, which hide the number of a "
        "row; rename one of them"
    )


def find_twice(connection: sqlite3.Connection, table: str, key: Sequence[str]) -> str | None:
    """A key, as SQL writes it, that two rows of a table have; rows without one have none."""
    names = [quoted(name) for name in key]
    known = " AND ".join(f"{name} IS NOT NULL" for name in names)
    found = connection.execute(
        f"SELECT {', '.join(f'quote({name})' for name in names)} FROM {quoted(table)} "
        f"WHERE {known} GROUP BY {', '.join(names)} HAVING count(*) > 1 LIMIT 1"
    ).fetchone()
    return None if found is None else ", ".join(found)


def find_damage(connection: sqlite3.Connection) -> list[str]:
    """What SQLite's integrity check finds damaged in the file; nothing for a sound one.

    A value that its column's declaration forbids, or a search index that is out of step, is
    nothing that a write could spread.
    """
    found = [str(line) for (line,) in connection.execute("PRAGMA integrity_check(1000000)")]
    lines = [" ".join(line.split()) for line in found if line != "ok"]
    return [line for line in lines if not _HARMLESS.search(line)]


# https://sqlite.org/pragma.html#pragma_integrity_check: what it says beside damaged pages.
_HARMLESS = re.compile(
    r"^(NULL|TEXT|NUMERIC|non-\w+) value (in|missing)|^CHECK constraint|FTS[345]"
)


def _open(path: Path, mode: str, connect: Connect) -> sqlite3.Connection:
    check_side_files(path)  # They may have been made since the database was first looked at.
    return connect(
        f"file:{quote(os.fsencode(path))}?{mode}",
        uri=True,
        timeout=_TURN_SECONDS,
        isolation_level=None,
    )


def _patiently(act: Callable[[], T], busy_seconds: float) -> T:
    """Do what may find the database locked, again and again until it is free or time is up.

    SQLite's own waiting would keep Python from a signal until it ends.
    """
    ends = time.monotonic() + busy_seconds
    while True:
        try:
            return act()
        except errors() as error:
            if not _is_busy(error) or time.monotonic() >= ends:
                raise
            time.sleep(_BREATH_SECONDS)


def _is_busy(error: Exception) -> bool:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into a sentence that says what to do."""
    try:
        yield
    except errors() as error:
        raise StoreError(_sentence(path, error)) from error


_SENTENCES = {
    "SQLITE_READONLY_ROLLBACK": "a write to {path} was cut off and its journal lies beside it; "
    "start ai-memory or run reembed without --dry-run, and the write is rolled back",
    "SQLITE_BUSY": "{path} is locked by another process; wait for it to finish, or stop it, and "
    "run again",
    "SQLITE_LOCKED": "{path} is locked by another process; wait for it to finish, or stop it, and "
    "run again",
    "SQLITE_READONLY": "{path} can't be written; make the file and its directory writable and run "
    "again",
    "SQLITE_CANTOPEN": "{path} or the log beside it can't be opened; check the owner and mode of "
    "the file and its directory",
    "SQLITE_FULL": "the disk of {path} is full; make room and run again",
    "SQLITE_CORRUPT": "{path} is damaged (PRAGMA integrity_check says how); restore or repair it "
    "before its vectors are replaced",
    "SQLITE_NOTADB": "{path} is not a readable SQLite database: damaged, or encrypted (SQLCipher); "
    "reembed needs a plain one",
    "SQLITE_IOERR": "reading or writing {path} failed ({error}); check the disk and run again",
}


def errors() -> tuple[type[Exception], ...]:
    """The errors of SQLite, those of another build of it, too, where one is at work."""
    other = sys.modules.get("pysqlite3")
    return (sqlite3.Error,) if other is None else (sqlite3.Error, other.Error)


def _is_full(path: Path) -> bool:
    """Whether the disk has no room for the index of a log, which SQLite calls an I/O error."""
    try:
        found = os.statvfs(path.parent)
    except OSError:
        return False
    return found.f_bavail * found.f_frsize < _LOG_INDEX_BYTES


def _sentence(path: Path, error: Exception) -> str:
    name = getattr(error, "sqlite_errorname", "")
    if name.startswith("SQLITE_IOERR") and _is_full(path):
        name = "SQLITE_FULL"
    for prefix, sentence in _SENTENCES.items():
        if name.startswith(prefix):
            return sentence.format(path=path, error=error)
    return f"SQLite can't work with {path}: {error}; look into it and run again"
