"""vec0 tables of sqlite-vec (https://alexgarcia.xyz/sqlite-vec/features/vec0.html).

The length of the vectors is a part of such a table's schema. Where it changes, the table is
recreated under its name, with all else that its schema says, in the replacement's transaction.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reembed.transforms.errors import StoreError, UndoneError
from reembed.transforms.rows import Stored
from reembed.transforms.stores import sqlite
from reembed.transforms.stores.base import describe_value
from reembed.transforms.stores.columns import SHOWN_CHARACTERS
from reembed.transforms.stores.sqlite import quoted
from reembed.transforms.stores.table import TableStore
from reembed.transforms.stores.vec0 import connect

_IS_VEC0 = re.compile(r"^\s*CREATE\s+VIRTUAL\s+TABLE\b.*?\bUSING\s+vec0\s*\(", re.I | re.S)

VECTOR = re.compile(r"^\s*(\w+)\s+(float|f32|int8|i8|bit)\s*\[\s*(\d+)\s*\]", re.I)
"""A vector's definition in a vec0 table's schema: its column, what it is made of, its length."""

_SAMPLED_PAIRS = 8
_ROWID = '"reembed rowid"'
_SCHEMA = "(SELECT sql FROM sqlite_schema WHERE name = {})"


@dataclass(frozen=True)
class VecStore(TableStore):
    """A vec0 table, its texts in auxiliary columns or in another table.

    `sql` is its schema, `primary` its key, as SQL names it, `dimension` what its vectors have
    now. `text_table` has the texts, joined by its column `text_key` to the rows' numbers;
    `join_notes` say what to know of that.
    """

    sql: str = ""
    primary: str = "rowid"
    dimension: int = 0
    text_table: str | None = None
    text_key: str = "rowid"
    join_notes: tuple[str, ...] = ()

    kind = "sqlite-vec"
    no_stamps = "a vec0 table has no place for them"
    whole = True
    fires = False

    @property
    def described(self) -> str:
        """What it is, for a person."""
        named = self.settings
        texts = f" of {self.text_table} by {self.text_key}" if self.text_table else ""
        text = " ".join(named.text)
        return f"the vec0 table {named.table}: text {text}{texts}, vector {named.vector}"

    @property
    def config(self) -> Mapping[str, Any]:
        """What is needed besides the path to open it again."""
        config = {
            "kind": self.kind,
            "table": self.settings.table,
            "text": list(self.settings.text),
            "vector": self.settings.vector,
        }
        if self.text_table is None:
            return config
        return config | {"text_table": self.text_table, "text_key": self.text_key}

    @property
    def _opens(self) -> sqlite.Connect:
        return connect

    @property
    def not_clearable(self) -> str:
        """Why a row may not be without a vector."""
        return "a row of a vec0 table always has one"

    @property
    def rowid(self) -> str:
        """A row's number, in `source`."""
        return _ROWID

    @property
    def source(self) -> str:
        """The rows with their texts; a range of them is looked up by the table of their numbers."""
        table = quoted(self.settings.table)
        places = quoted(f"{self.settings.table}_rowids")
        texts = "vec" if self.text_table is None else "texts"
        columns = [f"vec.{quoted(self.settings.vector)}"]
        columns += [f"{texts}.{quoted(name)}" for name in self.settings.text_columns]
        join = ""
        if self.text_table is not None:
            join = f" LEFT JOIN {quoted(self.text_table)} AS texts ON {self.joins}"
        return (
            f"(SELECT place.rowid AS {_ROWID}, {', '.join(columns)} FROM {places} AS place "
            f"CROSS JOIN {table} AS vec ON vec.{self.primary} = place.rowid{join})"
        )

    @property
    def joins(self) -> str:
        """The SQL condition that a row of the text table has a row's text.

        The plus keeps SQLite from taking a key that is a text for a number ('007' for 7), for
        which it could use no index (https://sqlite.org/datatype3.html#comparison_expressions).
        """
        return f"texts.{quoted(self.text_key)} = +place.rowid"

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on how texts and vectors are joined."""
        return self.join_notes

    def sample_pairs(self, places: Sequence[str]) -> tuple[tuple[str, str], ...]:
        """Two rows' keys and the beginnings of the texts that are joined to them."""
        if self.text_table is None:
            return ()
        rows = self.read_rows(places[:: max(1, len(places) // _SAMPLED_PAIRS)])
        pairs = [(row.key, row.text[:SHOWN_CHARACTERS]) for row in rows if row.skipped is None]
        return (*pairs[:1], *pairs[1:][-1:])

    @property
    def replaced_columns(self) -> dict[str, str]:
        """The table's schema, by name; each of its rows has it."""
        return {"schema": _SCHEMA.format(_literal(self.settings.table))}

    @property
    def shared_columns(self) -> frozenset[str]:
        """Those that are written once for many rows."""
        return frozenset(["schema"])

    def space(self, model: str) -> None:
        """There are no stamps."""

    def describe(self, vector: bytes | None, *, model: str, dimension: int) -> Stored:
        """What a row holds once it has a vector of a model (little-endian float32)."""
        sql = with_dimension(self.sql, self.settings.vector, dimension)
        return self.stored(vector, describe_value("schema", sql))

    def check_skipped(self, rows: int, dimension: int) -> None:
        """Raise StoreError if rows without a text would keep vectors of another length."""
        if rows and dimension != self.dimension:
            raise StoreError(
                f"{rows} rows of the vec0 table {self.settings.table} have no text that could be "
                f"embedded, and a table of vectors of {dimension} numbers can't keep theirs of "
                f"{self.dimension}; give them texts, or delete them first"
            )

    def update(
        self, db: sqlite3.Connection, settings: str, changes: Iterable[tuple[Any, ...]]
    ) -> int:
        """Take note of the rows that are written at the end of the transaction."""
        db.execute(
            "CREATE TEMP TABLE IF NOT EXISTS reembed_new (vector, place INTEGER PRIMARY KEY)"
        )
        return db.executemany("INSERT INTO temp.reembed_new VALUES (?, ?)", changes).rowcount

    def write_shared(
        self, db: sqlite3.Connection, shared: Mapping[tuple[str, Any], Sequence[int]]
    ) -> None:
        """Write the rows; if they have another schema, into the table as it then is.

        Raises StoreError if the table would be left with rows of another length.
        """
        if not shared:
            return
        if len(shared) > 1:
            raise StoreError(
                f"rows of the vec0 table {self.settings.table} were added when its vectors had "
                "another length already, and can't be put back beside the others; nothing was "
                "written"
            )
        ((_, raw),) = shared
        sql, table = raw.decode(), self.table
        now = db.execute(f"SELECT {self.replaced_columns['schema']}").fetchone()[0]
        if sql == now:
            # Row by row: vec0 takes UPDATE ... FROM for a change of its partition keys, and fails.
            written = db.executemany(
                f"UPDATE {table} SET {self.vector_column} = ? WHERE {self.primary} = ?",
                db.execute("SELECT vector, place FROM temp.reembed_new ORDER BY place"),
            ).rowcount
        else:
            written = self._recreate(db, sql)
        wanted = db.execute("SELECT count(*) FROM temp.reembed_new").fetchone()[0]
        if written != wanted:
            raise UndoneError(
                f"SQLite wrote {written} of {wanted} rows of the vec0 table {self.settings.table}; "
                "that transaction was undone"
            )
        db.execute("DROP TABLE temp.reembed_new")

    def _recreate(self, db: sqlite3.Connection, sql: str) -> int:
        """Make the table by another schema, with the new vectors; return how many rows it has."""
        table, primary = self.table, self.primary
        left = db.execute(
            f"SELECT count(*) FROM {quoted(self.settings.table + '_rowids')} "
            "WHERE rowid NOT IN (SELECT place FROM temp.reembed_new)"
        ).fetchone()[0]
        if left:
            raise StoreError(
                f"{left} rows of the vec0 table {self.settings.table} have no vector of the new "
                "length, and the others can't be stored beside theirs; nothing was replaced"
            )
        shown = "SELECT name FROM pragma_table_xinfo(?) WHERE hidden = 0"
        names = [name for (name,) in db.execute(shown, [self.settings.table])]
        others = [quoted(name) for name in names if name not in (self.settings.vector, primary)]
        columns = [primary, *(name for name in others if name != primary)]
        # By ordinary rows: a vec0 table can't be renamed.
        db.execute(f"CREATE TEMP TABLE reembed_old AS SELECT {', '.join(columns)} FROM {table}")
        db.execute(f"DROP TABLE {table}")
        db.execute(sql)
        written = db.execute(
            f"INSERT INTO {table} ({', '.join(columns)}, {self.vector_column}) "
            f"SELECT {', '.join(f'old.{name}' for name in columns)}, new.vector "
            f"FROM temp.reembed_old AS old JOIN temp.reembed_new AS new "
            f"ON new.place = old.{primary} ORDER BY new.place"
        ).rowcount
        db.execute("DROP TABLE temp.reembed_old")
        return written


def with_dimension(sql: str, vector: str, dimension: int) -> str:
    """A vec0 table's schema with another length of the vectors in a column.

    >>> with_dimension("CREATE VIRTUAL TABLE v USING vec0(a float[4], b float[4])", "b", 8)
    'CREATE VIRTUAL TABLE v USING vec0(a float[4], b float[8])'
    """
    column = re.compile(rf"(\b{re.escape(vector)}\s+(?:float|f32)\s*\[\s*)\d+", re.I)
    return column.sub(rf"\g<1>{dimension}", sql, count=1)


def vec_tables(db: sqlite3.Connection) -> dict[str, str]:
    """The vec0 tables of a database, with their schemas."""
    found = db.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'table' AND sql NOT NULL")
    return {name: sql for name, sql in found if _IS_VEC0.match(sql)}


def vector_columns(sql: str) -> dict[str, int]:
    """The columns of vectors of a vec0 table, of whatever numbers, with their lengths.

    >>> vector_columns("CREATE VIRTUAL TABLE v USING vec0(a float[4], b bit[8], +c text)")
    {'a': 4, 'b': 8}
    """
    found = map(VECTOR.match, definitions(sql))
    return {one[1]: int(one[3]) for one in found if one}


def definitions(sql: str) -> list[str]:
    """What stands between the commas of a vec0 table's schema.

    >>> definitions("CREATE VIRTUAL TABLE v USING vec0(a float[4], +b text)")
    ['a float[4]', '+b text']
    """
    inner = sql[sql.index("(") + 1 : sql.rindex(")")]
    return [part.strip() for part in inner.split(",")]


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
