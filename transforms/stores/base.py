"""What every store has in common: a table of a SQLite file, whose rows are read and replaced.

A store says what its rows are; how files are opened, locked and written is the same for all.
"""

from __future__ import annotations

import json
import re
import sqlite3
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from reembed.transforms.errors import StagingError, StampError, StoreError, UndoneError
from reembed.transforms.modes import Mode
from reembed.transforms.rows import KeyRange, Row, Stored, contents_digest
from reembed.transforms.stores import sqlite, vec0

T = TypeVar("T")


@dataclass(frozen=True)
class Selection:
    """The rows that are meant, beyond their namespace.

    `stamp` and `dimension` are those of the target, for the modes that look at what a row has;
    `keys` are the rows of the mode that names them.
    """

    mode: Mode = Mode.ALL
    stamp: str = ""
    dimension: int = 0
    keys: frozenset[str] | None = None


Surveyed = tuple[bytes | None, int | None, str | None, bool, int]
"""What counts of a row: its namespace; its vector's dimension (0: it can't be decoded, None: there
is none); the cause for which it will be skipped without being offered to the model; whether it
is meant; the bytes that its vector takes. A plain tuple: SQLite makes it, and there are many.
"""


Held = tuple[bool, bytes | None, int | None, bytes | None]
"""Whether a row is in the scope of a run, its namespace, its vector's dimension as in `Surveyed`,
and its stamp.
"""


@dataclass(frozen=True)
class Store(ABC):
    """A table of a SQLite database, and the one namespace of it that is meant (None: all of them).

    A value: it is sent to workers, and each of its methods opens a connection of its own.
    `vec0_triggers` says that its triggers need sqlite-vec in each connection, and
    `trigger_notes` what they write besides.
    """

    path: Path
    namespace: str | None
    wal: bool

    kind: ClassVar[str]
    """What --store calls it."""

    ordered_by_key: ClassVar[bool]
    """Whether a row's key says which range it is in; else its place in the table does."""

    space_name: ClassVar[str] = "space"
    """What `replaced_columns` calls the column of stamps, if there is one."""

    namespace_word: ClassVar[str] = "namespace"
    """The store's own word for a namespace."""

    no_stamps: ClassVar[str]
    """Why it keeps no stamps, if it keeps none."""

    fires: ClassVar[bool] = True
    """Whether triggers may fire when a row is written."""

    whole: ClassVar[bool] = False
    """Whether all of it is replaced in one transaction, and every row that is meant or none."""

    selection: Selection = Selection()
    vec0_triggers: bool = field(default=False, kw_only=True)
    trigger_notes: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    @abstractmethod
    def described(self) -> str:
        """What it is, for a person."""

    @property
    @abstractmethod
    def config(self) -> Mapping[str, Any]:
        """What is needed besides the path to open it again, in types that JSON has."""

    @property
    @abstractmethod
    def table(self) -> str:
        """The table as SQL names it."""

    @property
    def source(self) -> str:
        """The table, or the join, that rows are read from, as SQL names it."""
        return self.table

    @property
    @abstractmethod
    def replaced_columns(self) -> Mapping[str, str]:
        """The columns that a replacement sets besides the vector, as SQL names them, by name."""

    @property
    @abstractmethod
    def vector_column(self) -> str:
        """The vector's column as SQL names it."""

    @property
    @abstractmethod
    def rowid(self) -> str:
        """A row's number as SQL names it."""

    @property
    @abstractmethod
    def fits(self) -> str:
        """The SQL condition for a vector of the target's length."""

    @abstractmethod
    def space(self, model: str) -> str | None:
        """The stamp of a model's vectors; None for a store that keeps none."""

    @abstractmethod
    def rows_in(self, db: sqlite3.Connection, keys: KeyRange, *, with_stored: bool) -> list[Row]:
        """Read the rows of a range over a connection; see `read_range`."""

    @abstractmethod
    def read_texts(self, places: Sequence[str]) -> list[str]:
        """Read the texts of a few rows that `cut_ranges` has sampled, but of those skipped by rule.

        Where a place is in a range, so is its row.
        """

    @abstractmethod
    def describe(self, vector: bytes | None, *, model: str, dimension: int) -> Stored:
        """What a row holds once it has a vector of a model (little-endian float32), or none."""

    @abstractmethod
    def decode(self, vector: bytes) -> NDArray[np.float32]:
        """Turn what is stored into a vector of shape (dimension,).

        Raises ValueError for what is none.
        """

    @abstractmethod
    def survey(self, db: sqlite3.Connection) -> Iterator[Surveyed]:
        """Look at each row of the namespace."""

    @abstractmethod
    def dimension_of(self, db: sqlite3.Connection) -> str:
        """The SQL expression for the dimension of a vector that is there (0: can't be decoded)."""

    @abstractmethod
    def in_scope(self, db: sqlite3.Connection) -> str:
        """The SQL condition for a row of the namespace, which a run does not change."""

    @abstractmethod
    def namespace_of(self) -> str:
        """The SQL expression for a row's namespace, as bytes."""

    def holdings(self, db: sqlite3.Connection) -> Iterator[Held]:
        """Look at what each row of the table holds, wherever it is."""
        stamp = self.replaced_columns.get(self.space_name, "NULL")
        dimension = f"CASE WHEN {self.vector_column} IS NOT NULL THEN {self.dimension_of(db)} END"
        return db.execute(
            f"SELECT {self.in_scope(db)}, {self.namespace_of()}, {dimension}, "
            f"CAST({stamp} AS BLOB) FROM {self.table}",
            self.values,
        )

    @abstractmethod
    def namespaces(self, db: sqlite3.Connection) -> tuple[str, ...]:
        """All namespaces that there are."""

    def count_hidden(self, db: sqlite3.Connection) -> dict[str, int]:
        """Count the rows that the store's own program does not show, by why."""
        return {}

    @abstractmethod
    def places(self, db: sqlite3.Connection) -> tuple[int, Iterator[str | None]]:
        """The number of rows, and the place of each in order; None for one that has no name."""

    @property
    def stable(self) -> bool:
        """Whether a row stays in its range as long as it is there."""
        return True

    @property
    def not_clearable(self) -> str:
        """Why a row may not be without a vector; nothing if it may."""
        return ""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of it before it is moved."""
        return self.trigger_notes

    def sample_pairs(self, places: Sequence[str]) -> tuple[tuple[str, str], ...]:
        """Two rows' keys and the beginnings of their texts, if texts and vectors are joined."""
        return ()

    def text_warnings(self, places: Sequence[str]) -> tuple[str, ...]:
        """Which text columns may not hold what was embedded, by a few rows."""
        return ()

    @property
    def connect(self) -> sqlite.Connect:
        """A function that opens a connection to it, with the functions that its SQL uses.

        Of the two SQLite libraries that a process may have, all connections to a store are of one:
        closing a file in one of them would drop the locks that the other holds on it.
        """
        return partial(self._connect, self._opens)

    @property
    def _opens(self) -> sqlite.Connect:
        return vec0.connect if self.vec0_triggers else sqlite3.connect

    def _connect(
        self, opens: sqlite.Connect, *arguments: Any, **keywords: Any
    ) -> sqlite3.Connection:
        db = opens(*arguments, **keywords)
        db.create_function("contents_digest", -1, contents_digest, deterministic=True)
        return db

    @property
    def update_statement(self) -> str:
        """The statement that replaces a row's vector, for SQLite to prepare, not to run."""
        own = [name for name in self.replaced_columns if name not in self.shared_columns]
        columns = [self.vector_column, *(self.replaced_columns[name] for name in own)]
        settings = ", ".join(f"{column} = NULL" for column in columns)
        return f"UPDATE {self.table} SET {settings} WHERE {self.rowid} = 1"

    @property
    def update_statements(self) -> tuple[str, ...]:
        """All statements that a replacement has, those that write for many rows, too."""
        return (self.update_statement,)

    def check_namespace(self) -> None:  # noqa: B027 - most move any
        """Raise TooManySkippedError if the one namespace that is meant can't be moved."""

    def check_skipped(self, rows: int, dimension: int) -> None:  # noqa: B027 - most take any
        """Raise StoreError if rows can't be skipped where the others get such vectors."""

    def update(
        self, db: sqlite3.Connection, settings: str, changes: Iterable[tuple[Any, ...]]
    ) -> int:
        """Write rows: what is set, and for each its values and its rowid; return how many."""
        return db.executemany(
            f"UPDATE {self.table} SET {settings} WHERE {self.rowid} = ?", changes
        ).rowcount

    @property
    def shared_columns(self) -> frozenset[str]:
        """Those of the replaced columns that are written once for many rows."""
        return frozenset()

    def write_shared(  # noqa: B027 - most have none
        self, db: sqlite3.Connection, shared: Mapping[tuple[str, Any], Sequence[int]]
    ) -> None:
        """Write these, by name and value, for the rows (by rowid) that are to have it."""

    def try_shared(
        self, db: sqlite3.Connection, shared: Mapping[tuple[str, Any], Sequence[int]]
    ) -> None:
        """Write these in a trial of one row, as far as that goes without the others."""
        self.write_shared(db, shared)

    def late_columns(self, db: sqlite3.Connection) -> Sequence[str]:
        """Columns that a replacement would set, and that were added since the store was opened."""
        return ()

    def check_recording(self, db: sqlite3.Connection) -> None:  # noqa: B027 - most have no such rule
        """Raise StoreError if the store says that nothing may be written now."""

    def select(
        self, mode: Mode, *, model: str, dimension: int, keys: frozenset[str] | None = None
    ) -> Self:
        """The same store, with only the rows meant that a mode is about.

        Raises StampError if the mode looks at stamps and the store has none.
        """
        stamp = self.space(model)
        if mode in (Mode.SKIP_CURRENT_SPACE, Mode.STAMP_ONLY) and stamp is None:
            raise StampError(
                f"{self.path} keeps no stamps ({self.no_stamps}), so it can't be told which model "
                f"made a vector; run without --{mode.replace(' ', '-')}"
            )
        return replace(self, selection=Selection(mode, stamp or "", dimension, keys))

    @property
    def meant(self) -> str:
        """The SQL condition for a row that the run is about."""
        vector, stamp = self.vector_column, self.replaced_columns.get(self.space_name)
        match self.selection.mode:
            case Mode.MISSING_ONLY:
                return f"{vector} IS NULL"
            case Mode.SKIP_CURRENT_SPACE:
                current = f"ifnull({stamp}, '') = :stamp AND {vector} IS NOT NULL"
                return f"NOT ({current} AND {self.fits})"
            case Mode.STAMP_ONLY:
                other = f"ifnull({stamp}, '') <> :stamp AND {vector} IS NOT NULL"
                return f"{other} AND {self.fits}"
            case _:
                return "TRUE"

    @property
    def values(self) -> dict[str, Any]:
        """What is bound to the names in the conditions."""
        selection = self.selection
        return {
            "namespace": self.namespace,
            "stamp": selection.stamp,
            "dimension": selection.dimension,
        }

    def everywhere(self) -> Self:
        """The same store with all of its rows, wherever those of a run may have gone since."""
        return replace(self, namespace=None)

    def selected(self) -> Self:
        """The store without rows that a run is not about, for one that has written nothing."""
        return self

    def cut_ranges(self, rows: int, samples: int) -> tuple[tuple[KeyRange, ...], tuple[str, ...]]:
        """Cut the table, in its order, into ranges of `rows` rows; also sample some places.

        The first and the last range are open, so that every row there is or will be falls
        in exactly one. No ranges for no rows. `samples` is about how many places are sampled.
        """
        return self.read_only(lambda db: _cut(*self.places(db), rows, samples))

    def read_range(self, keys: KeyRange, *, with_stored: bool = False) -> list[Row]:
        """Read the rows of a range that are meant, in its order.

        With what is stored: all rows of the namespace, and whether they are meant.
        """
        return sqlite.read_only(
            self.path,
            wal=self.wal,
            query=lambda db: self.rows_in(db, keys, with_stored=with_stored),
            connect=self.connect,
        )

    def read_only(self, query: Callable[[sqlite3.Connection], T]) -> T:
        """Do something over a connection that only reads; it may be done twice."""
        return sqlite.read_only(self.path, wal=self.wal, query=query, connect=self.connect)

    def check_access(self) -> None:
        """Raise StoreError if this user may not write the database."""
        sqlite.check_access(self.path)

    def check_writable(self) -> None:
        """Raise StoreError if the database is read-only, stopped, or locked for over 60 s."""
        self.read_only(self.check_recording)
        sqlite.check_writable(self.path, connect=self.connect)

    def check_sound(self) -> None:
        """Raise StoreError if SQLite finds damage in the file."""
        found = self.read_only(sqlite.find_damage)
        if found:
            raise StoreError(
                f"{self.path} is damaged ({found[0]}); its vectors are not replaced, lest the "
                "damage spread: restore or repair it, and run again (PRAGMA integrity_check says "
                "more)"
            )

    @property
    def vector_type(self) -> str:
        """The type, in SQLite, of a vector that is stored: blob or text."""
        return "blob"

    @property
    def stored_columns(self) -> str:
        """What a replacement touches, for `stored_values`: the vector, the rest, the floats.

        hex() shows a text's or a BLOB's bytes and an integer's digits, but not all of a float.
        """
        columns, vector = self.replaced_columns, self.vector_column
        others = [
            f"'{name}=' || typeof({sql}) || ':' || hex({sql})" for name, sql in columns.items()
        ]
        odd = f"' {VECTOR}=' || typeof({vector}) || ':' || hex({vector})"
        if self.vector_type == "text":
            kinds = f"WHEN 'text' THEN '{self.only_vector}' WHEN 'blob' THEN ''"
            content = (
                f"CASE WHEN typeof({vector}) IN ('text', 'blob') THEN CAST({vector} AS BLOB) END"
            )
        else:
            kinds = "WHEN 'blob' THEN ''"
            content = f"CASE typeof({vector}) WHEN 'blob' THEN {vector} END"
        kinds = f"CASE typeof({vector}) WHEN 'null' THEN '' {kinds} ELSE {odd} END"
        described = " || ' ' || ".join(others) or "''"
        floats = [
            f", CASE typeof({column}) WHEN 'real' THEN {column} END"
            for column in (*columns.values(), vector)
        ]
        return f"{content}, {described} || {kinds}{''.join(floats)}"

    @property
    def only_vector(self) -> str:
        """How a vector alone is described, of which nothing but its bytes is not known."""
        return "" if self.vector_type == "blob" else f" {VECTOR}={self.vector_type}:"

    def stored(self, vector: bytes | None, others: str) -> Stored:
        """What a row holds with a vector, as it is stored, or none; `others` are described."""
        return Stored(vector, others if vector is None else others + self.only_vector)

    def check_backup(self, others: Iterable[str]) -> None:
        """Raise StoreError if a column that a run has replaced is not in the table any more.

        `others` are those of the rows of its backup.
        """
        saved = {name for one in others for name, *_ in _parsed(one)}
        gone = sorted(saved - {VECTOR, *self.replaced_columns})
        if gone:
            raise StoreError(
                f"the table {self.table} of {self.path} has no column {gone[0]} any more, which "
                "the run replaced, so it can't be put back or checked; nothing was changed: give "
                "the column its name again, or add it by the line below, and run this again",
                f"ALTER TABLE {self.table} ADD COLUMN {sqlite.quoted(gone[0])};",
            )

    def lockout(self, rows: int, dimension: int) -> Lockout | None:
        """Estimate how long readers are kept out if so many rows are replaced in one transaction.

        None where nobody with 5 s of patience notices: in WAL mode, or if it is short.
        """
        if self.wal:
            return None
        size = 4 * dimension * rows
        # While it fits into memory, only the commit keeps them out, of new pages and former ones.
        seconds = 2 * size / _COMMITTED_BYTES
        if 2 * size > sqlite.MAX_HELD_BYTES:
            seconds += rows / _WRITTEN_ROWS
        return Lockout(rows, size, seconds) if seconds >= PATIENCE_SECONDS else None

    @contextmanager
    def replacing(self, written: Written | None = None) -> Iterator[Replacement]:
        """A connection over which rows are read and their vectors replaced.

        What is written is noted in `written`.
        """
        with sqlite.write_connection(self.path, connect=self.connect) as connection:
            yield Replacement(self, connection, written)

    def differing(self, digests: Mapping[int, int]) -> list[int]:
        """Find the rows, given by rowid, that are gone or don't hold what has this digest.

        The digests are those of `Written`.
        """
        select = (
            f"SELECT {self.rowid}, {self.stored_columns} FROM {self.source} "
            f"WHERE {self.rowid} IN (SELECT value FROM json_each(?))"
        )

        def query(db: sqlite3.Connection) -> list[int]:
            left = dict(digests)
            held = db.execute(select, (json.dumps(list(left)),))
            found = [
                row[0] for row in held if left.pop(row[0], None) != hash(stored_values(*row[1:]))
            ]
            return found + list(left)

        return self.read_only(query)

    def named_only(self, rows: list[Row], *, with_stored: bool) -> list[Row]:
        """Of rows that were read, those that the run names, if it names any."""
        named = self.selection.keys
        if named is None:
            return rows
        if with_stored:
            return [row._replace(meant=row.key in named) for row in rows]
        return [row for row in rows if row.key in named]


PATIENCE_SECONDS = 5.0
"""The lock timeout of ai-memory and of Python's sqlite3, in seconds."""

_COMMITTED_BYTES = 100_000_000
_WRITTEN_ROWS = 10_000
"""Bytes committed per second by a slow disk, and rows written per second by a busy core."""


class Lockout(NamedTuple):
    """About how long one transaction keeps readers out: of so many rows, and bytes of vectors."""

    rows: int
    bytes: int
    seconds: float


class Written:
    """Digests of what rows were given, 16 bytes a row.

    Python's own hash (SipHash, 64 bits, with a key of this process) takes a quarter of BLAKE2b's
    time; that two values share one by chance is as unlikely as 1 in 2**64.
    """

    def __init__(self) -> None:
        self._rowids = array("q")
        self._digests = array("q")

    def __len__(self) -> int:
        """The number of notes."""
        return len(self._rowids)

    def forget(self, after: int) -> None:
        """Forget all notes but the first ones."""
        del self._rowids[after:], self._digests[after:]

    def add(self, changes: Sequence[tuple[int, Stored]]) -> None:
        """Note what rows, by rowid, hold from now on."""
        self._rowids.extend(rowid for rowid, _ in changes)
        self._digests.extend(hash(stored) for _, stored in changes)

    def digests(self, rows: int) -> Iterator[dict[int, int]]:
        """The digests by rowid, in order and at most `rows` at a time."""
        rowids, digests = np.asarray(self._rowids), np.asarray(self._digests)
        order = np.argsort(rowids, kind="stable")
        for start in range(0, len(order), rows):
            some = order[start : start + rows]
            yield dict(zip(rowids[some].tolist(), digests[some].tolist(), strict=True))


class _OutgrownError(Exception):
    """A transaction has changed more than it may keep in memory."""


_COUNTED_ROWS = 512
"""Rows that are written between two looks at what a transaction keeps in memory."""


class Replacement:
    """A connection that replaces vectors, in one transaction or several.

    `written` is what it was given to write.
    """

    def __init__(
        self, store: Store, db: sqlite3.Connection, written: Written | None = None
    ) -> None:
        self.written = Written() if written is None else written
        self._store = store
        self._db = db
        self._shared: dict[tuple[str, Any], list[int]] = {}
        self._late: Sequence[str] = ()
        self._exclusive = False
        self._held: sqlite.HeldBytes | None = None
        self._vector_bytes = 0

    def transact(self, body: Callable[[], T]) -> T:
        """Do `body` in one transaction, which keeps other writers off from its start.

        It is done again, after a pause, if readers keep it from being committed: so it must change
        nothing but the table and what is the same when it is said twice. What it has put counts
        once. One that changes more than fits into memory is begun again, and keeps readers out
        from its start. Raises StoreError if readers hold it up for a minute.
        """
        noted = len(self.written)

        def attempt() -> T:
            self.written.forget(noted)
            with self.transaction():
                return body()

        try:
            try:
                return sqlite.repeat_held_up(attempt)
            except _OutgrownError:
                self._exclusive = True
                return sqlite.repeat_held_up(attempt)
        except BaseException:
            self.written.forget(noted)
            raise
        finally:
            self._exclusive = False

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """One try of a transaction; see `transact`."""
        with sqlite.write_transaction(self._db, exclusive=self._exclusive):
            self._store.check_recording(self._db)
            self._shared.clear()
            self._vector_bytes = 0
            self._late = self._store.late_columns(self._db)
            self._held = sqlite.HeldBytes(self._store.path, self._db)
            yield
            # Last, so that whoever reads rows in this transaction reads what they had before it.
            self._store.write_shared(self._db, self._shared)

    @property
    def version(self) -> int:
        """A number that stays while nothing but this connection changes the database."""
        return sqlite.data_version(self._db)

    @property
    def fires_triggers(self) -> bool:
        """Whether a trigger of the database runs when a vector is replaced."""
        if not self._store.fires:
            return False
        statements = self._store.update_statements
        return any(sqlite.fires_triggers(self._db, statement) for statement in statements)

    def read_range(self, keys: KeyRange) -> list[Row]:
        """Read the rows of a range as this transaction sees them, with what they hold."""
        return self._store.rows_in(self._db, keys, with_stored=True)

    def put(self, changes: Sequence[tuple[int, Stored]], *, vector_only: bool = False) -> None:
        """Store what rows (by rowid) are to hold; nothing else of a row changes.

        Of the columns that are replaced, those of which nothing is said lose what they hold, which
        was said of another vector. With `vector_only` the other columns hold it already and are not
        written, which spares their indexes. Written in the order of rowids, the file's own: twice
        as fast as in that of keys.
        """
        store, written = self._store, 0
        known = tuple(store.replaced_columns)
        if any(_completed(row.others, known) != row.others for _, row in changes):
            changes = [
                (rowid, row._replace(others=_completed(row.others, known)))
                for rowid, row in changes
            ]
        self.written.add(changes)
        names = {VECTOR: store.vector_column, **store.replaced_columns}
        ordered = sorted(changes, key=lambda change: change[0])
        for others, group in groupby(ordered, key=lambda change: change[1].others):
            described = _parsed(others)
            changed = list(group)
            for name, _, value in described:
                if name in store.shared_columns:
                    rowids = self._shared.setdefault((name, value), [])
                    rowids += [rowid for rowid, _ in changed]
            described = tuple(
                one
                for one in described
                if one[0] not in store.shared_columns and not (vector_only and one[0] != VECTOR)
            )
            # The vector is bytes unless it is described; then it is of another type, or is odd.
            kind = next((one for one in described if one[0] == VECTOR), (VECTOR, "?", None))
            columns = [kind, *(one for one in described if one[0] != VECTOR)]
            settings = ", ".join(f"{names[name]} = {place}" for name, place, _ in columns)
            settings += "".join(f", {column} = NULL" for column in self._late)
            values = [value for _, _, value in columns[1:]]
            written += store.update(
                self._db,
                settings,
                (
                    (kind[2] if row.vector is None else row.vector, *values, rowid)
                    for rowid, row in self._counted(changed)
                ),
            )
        if written != len(changes):
            raise UndoneError(
                f"SQLite wrote {written} of {len(changes)} rows of {self._store.path}, as it does "
                "if a trigger ignores some; that transaction was undone"
            )

    def _counted(self, changes: Sequence[tuple[int, Stored]]) -> Iterator[tuple[int, Stored]]:
        """The changes, as long as a transaction is not too large for memory."""
        for at, (rowid, row) in enumerate(changes):
            self._vector_bytes += len(row.vector or b"")
            if at % _COUNTED_ROWS == 0 and self._held is not None and not self._exclusive:
                # The vectors of a vec0 table wait for the end of the transaction.
                held = self._held.count(waiting=0 if self._store.fires else self._vector_bytes)
                if held > sqlite.MAX_HELD_BYTES:
                    raise _OutgrownError
            yield rowid, row

    def try_row(self, rowid: int, new: Stored) -> None:
        """Store what one row is to hold, in a transaction that is rolled back."""
        self._shared.clear()
        self.put([(rowid, new)])
        self._store.try_shared(self._db, self._shared)


VECTOR = "embedding"
"""What the vector's own column is called among those that are described."""


def describe_value(column: str, value: int | str | None) -> str:
    """Describe what a column holds: its name, its type in SQLite and its bytes.

    >>> describe_value("embedding_dim", 384), describe_value("embedding_space", None)
    ('embedding_dim=integer:333834', 'embedding_space=null:')
    """
    kind = {int: "integer", str: "text", type(None): "null"}[type(value)]
    content = "" if value is None else str(value)
    return f"{column}={kind}:{content.encode().hex().upper()}"


@lru_cache(maxsize=64)
def _parsed(others: str) -> tuple[tuple[str, str, Any], ...]:
    """Read what `describe_value` gave: (column, placeholder, value) for each.

    >>> _parsed("embedding_dim=integer:333834 embedding_space=text:61")
    (('embedding_dim', '?', 384), ('embedding_space', 'CAST(? AS TEXT)', b'a'))
    """
    try:
        return tuple(_parsed_column(described) for described in others.split())
    except (ValueError, OverflowError):
        raise StagingError(
            f"a backup describes columns as {others[:80]!r}, which is not what reembed wrote, so "
            "it is not used; restore the backup from a copy"
        ) from None


@lru_cache(maxsize=64)
def _completed(others: str, columns: tuple[str, ...]) -> str:
    """Describe all of these columns: NULL for those of which nothing was said.

    >>> _completed("dim=integer:31 embedding=text:", ("dim", "space"))
    'dim=integer:31 space=null: embedding=text:'
    """
    said = {part.partition("=")[0]: part for part in others.split()}
    if said.keys() >= set(columns):
        return others
    vector = f" {said[VECTOR]}" if VECTOR in said else ""
    return " ".join(said.get(name, f"{name}=null:") for name in columns) + vector


def same_columns(held: str, given: str) -> bool:
    """Whether columns hold what they were given, whichever way SQLite stores it.

    By a column's affinity a number may become a text, or the other way round. One that was given
    nothing, as it was not known, holds nothing.

    >>> same_columns("dim=text:333834", "dim=integer:333834")
    True
    >>> same_columns("dim=null: space=null:", "dim=null:"), same_columns("dim=null:", "")
    (True, True)
    """
    if held == given:
        return True
    there = {name: value for name, _, value in _parsed(held)}
    wanted = {name: value for name, _, value in _parsed(given)}
    return wanted.keys() <= there.keys() and all(
        _same(value, wanted.get(name)) for name, value in there.items()
    )


def known_part(held: Stored, saved: Stored | None) -> Stored:
    """Drop the columns that were added since the row was saved.

    >>> known_part(Stored(None, "dim=null: space=text:61"), Stored(b"v", "dim=integer:31")).others
    'dim=null:'
    """
    if saved is None:
        return held
    known = {VECTOR, *(name for name, *_ in _parsed(saved.others))}
    parts = held.others.split()
    if all(part.partition("=")[0] in known for part in parts):
        return held
    columns = [part for part in parts if part.partition("=")[0] in known - {VECTOR}]
    vector = [f" {part}" for part in parts if part.startswith(f"{VECTOR}=")]
    return Stored(held.vector, " ".join(columns) + "".join(vector))


def contradicts(held: str, given: str) -> bool:
    """Whether a column holds something else than it was given; one that is empty says nothing.

    >>> contradicts("dim=integer:31", "dim=integer:32"), contradicts("dim=null:", "dim=integer:32")
    (True, False)
    """
    values = {name: value for name, _, value in _parsed(given)}
    return any(
        value is not None and name in values and not _same(value, values[name])
        for name, _, value in _parsed(held)
    )


def _same(one: Any, other: Any) -> bool:
    if one == other or None in (one, other):
        return bool(one == other)
    try:
        return float(one) == float(other)
    except ValueError:
        return False


_LEAST = -(2**63)
"""SQLite's least integer."""


def _parsed_column(described: str) -> tuple[str, str, Any]:
    column, _, value = described.partition("=")
    kind, _, digits = value.partition(":")
    content = bytes.fromhex(digits)
    match kind:
        case "null":
            return column, "?", None
        case "integer":
            if not _LEAST <= (number := int(content)) <= -_LEAST - 1:
                raise ValueError("SQLite has no such integer")
            return column, "?", number
        case "real":
            return column, "?", float.fromhex(content.decode())
        case "text":  # As bytes, which need not be UTF-8.
            return column, "CAST(? AS TEXT)", content
        case "blob":
            return column, "?", content
        case _:
            raise ValueError(f"there is no type {kind}")


def stored_values(vector: bytes | None, others: str, *floats: float | None) -> Stored:
    """What a row holds; floats are described to their last bit.

    >>> stored_values(None, "embedding_dim=real:302E33", 0.1 + 0.2, None).others
    'embedding_dim=real:3078312E33333333333333333333333334702D32'
    """
    if "=real:" not in others:
        return Stored(vector, others)
    exact = (value.hex().encode().hex().upper() for value in floats if value is not None)
    # They stand in the order of the columns.
    return Stored(vector, re.sub(r"(?<==real:)[0-9A-F]+", lambda _: next(exact), others))


def utf8(raw: bytes | None) -> str | None:
    """The text that bytes are in UTF-8; None if they are not, or there are none."""
    try:
        return None if raw is None else raw.decode()
    except UnicodeDecodeError:
        return None


def _cut(
    total: int, places: Iterable[str | None], rows: int, samples: int
) -> tuple[tuple[KeyRange, ...], tuple[str, ...]]:
    borders: list[str] = []
    sampled: list[str] = []
    every = max(1, -(-total // samples))
    since_border = 0
    for position, place in enumerate(places):
        since_border += 1
        if place is None:
            continue
        if position % every == 0:
            sampled.append(place)
        if since_border >= rows:
            borders.append(place)
            since_border = 0
    return _ranges(borders, total, rows), tuple(sampled)


def _ranges(borders: Sequence[str], total: int, rows: int) -> tuple[KeyRange, ...]:
    """Make ranges that end at the borders, the last one open.

    >>> [(r.after, r.until, r.rows) for r in _ranges(["b", "d"], total=5, rows=2)]
    [(None, 'b', 2), ('b', 'd', 2), ('d', None, 1)]
    """
    if total == 0:
        return ()
    if total == rows * len(borders):
        borders = borders[:-1]  # The last range takes its rows and stays open.
    starts = [None, *borders]
    ends = [*borders, None]
    left = total - rows * len(borders)
    counts = [rows] * len(borders) + [left]
    return tuple(
        KeyRange(index, after, until, count)
        for index, (after, until, count) in enumerate(zip(starts, ends, counts, strict=True))
    )
