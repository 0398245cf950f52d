"""vec0 tables of sqlite-vec (https://alexgarcia.xyz/sqlite-vec/features/vec0.html).

The length of the vectors is a part of such a table's schema. Where it changes, the table is made
anew under its name, with all else that its schema says, in the replacement's transaction.
"""

from __future__ import annotations

import importlib
import re
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transforms.errors import StoreError, UsageError
from transforms.rows import Stored
from transforms.stores import sqlite
from transforms.stores.base import describe_value
from transforms.stores.sqlite import quoted
from transforms.stores.table import TableConfig, TableStore

_IS_VEC0 = re.compile(r"^\s*CREATE\s+VIRTUAL\s+TABLE\b.*?\bUSING\s+vec0\s*\(", re.I | re.S)
_VECTOR = re.compile(r"^\s*(\w+)\s+(float|f32|int8|i8|bit)\s*\[\s*(\d+)\s*\]", re.I)
_KEY = re.compile(r"^\s*(\w+)\s+(\w+)\s+primary\s+key\s*$", re.I)

_ROWID = '"reembed rowid"'
_SCHEMA = "(SELECT sql FROM sqlite_schema WHERE name = {})"


@dataclass(frozen=True)
class VecStore(TableStore):
    """A vec0 table, its texts in auxiliary columns or in another table.

    `sql` is its schema, `primary` its key, as SQL names it, `dimension` what its vectors have
    now. `text_table` has the texts, joined by its column `text_key` to the rows' numbers.
    """

    sql: str = ""
    primary: str = "rowid"
    dimension: int = 0
    text_table: str | None = None
    text_key: str = "rowid"

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
    def connect(self) -> sqlite.Connect:
        """What opens a connection to it, with sqlite-vec in it."""
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
            join = (
                f" LEFT JOIN {quoted(self.text_table)} AS texts "
                f"ON texts.{quoted(self.text_key)} = place.rowid"
            )
        return (
            f"(SELECT place.rowid AS {_ROWID}, {', '.join(columns)} FROM {places} AS place "
            f"CROSS JOIN {table} AS vec ON vec.{self.primary} = place.rowid{join})"
        )

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
            db.execute(
                f"UPDATE {table} SET {self.vector_column} = new.vector "
                f"FROM temp.reembed_new AS new WHERE {self.primary} = new.place"
            )
        else:
            self._make_anew(db, sql)
        db.execute("DROP TABLE temp.reembed_new")

    def _make_anew(self, db: sqlite3.Connection, sql: str) -> None:
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
        db.execute(
            f"INSERT INTO {table} ({', '.join(columns)}, {self.vector_column}) "
            f"SELECT {', '.join(f'old.{name}' for name in columns)}, new.vector "
            f"FROM temp.reembed_old AS old JOIN temp.reembed_new AS new "
            f"ON new.place = old.{primary} ORDER BY new.place"
        )
        db.execute("DROP TABLE temp.reembed_old")


def connect(*arguments: Any, **keywords: Any) -> sqlite3.Connection:
    """Open a connection with sqlite-vec in it.

    Some builds of Python's own sqlite3 load no extensions; pysqlite3 then does. Raises StoreError
    if there is none that does.
    """
    modules = [sqlite3]
    try:
        vec = importlib.import_module("sqlite_vec")
        if not hasattr(sqlite3.Connection, "enable_load_extension"):
            modules = [importlib.import_module("pysqlite3")]
    except ImportError:
        raise StoreError(
            "vec0 tables need the packages of sqlite-vec, which are not installed: pip install "
            "'.[sqlite-vec]' in the checkout of reembed"
        ) from None
    db: Any = modules[0].connect(*arguments, **keywords)
    db.enable_load_extension(True)
    vec.load(db)
    db.enable_load_extension(False)
    opened: sqlite3.Connection = db
    return opened


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
    found = map(_VECTOR.match, _definitions(sql))
    return {one[1]: int(one[3]) for one in found if one}


def open_vec(path: Path, config: Mapping[str, Any], *, wal: bool) -> VecStore:
    """Look at a vec0 table and describe it.

    Raises StoreError if it can't be moved, UsageError if it isn't said where its texts are.
    """
    tables = sqlite.read_only(path, wal=wal, query=vec_tables)
    table = config.get("table") or next(iter(tables), None)
    if table not in tables or (len(tables) > 1 and "table" not in config):
        raise UsageError(
            f"{path} has the vec0 tables {', '.join(tables)}; choose one of them with --table"
            if tables
            else f"{path} has no vec0 table; name the right file with --db"
        )
    sql = tables[table]
    vectors = {}
    primary = "rowid"
    for definition in _definitions(sql):
        if found := _VECTOR.match(definition):
            vectors[found[1]] = (found[2].lower(), int(found[3]))
        elif key := _KEY.match(definition):
            primary = quoted(key[1])
            if key[2].lower() not in ("integer", "int"):
                raise StoreError(
                    f"the key {key[1]} of the vec0 table {table} is a {key[2]}; only whole numbers "
                    "as keys are supported"
                )
    vector = config.get("vector") or (next(iter(vectors)) if len(vectors) == 1 else None)
    if vector not in vectors:
        raise UsageError(
            f"the vec0 table {table} has the vectors {', '.join(vectors) or 'none'}; choose one "
            "with --vector"
        )
    kind, dimension = vectors[vector]
    if kind not in ("float", "f32"):
        raise StoreError(
            f"the vectors in column {vector} of the vec0 table {table} are {kind}[{dimension}]; "
            "only float ones can be re-embedded"
        )
    if not config.get("text"):
        raise UsageError(
            f"the texts of the vec0 table {table} are found by --text, which names auxiliary "
            "columns of it, or with --text-table those of another table; give --text"
        )
    settings = TableConfig(table, tuple(config["text"]), vector)
    store = VecStore(
        path,
        None,
        wal,
        settings=settings,
        sql=sql,
        primary=primary,
        dimension=dimension,
        text_table=config.get("text_table"),
        text_key=config.get("text_key") or "rowid",
    )
    return store.read_only(lambda db: _checked(db, store))


def _checked(db: sqlite3.Connection, store: VecStore) -> VecStore:
    texts = store.text_table or store.settings.table
    known = [name for (name,) in db.execute("SELECT name FROM pragma_table_xinfo(?)", [texts])]
    if not known:
        raise StoreError(f"{store.path} has no table {texts}; correct --text-table")
    wanted = [("--text", name) for name in store.settings.text_columns]
    if store.text_table is not None and store.text_key.lower() != "rowid":
        wanted.append(("--text-key", store.text_key))
    for flag, name in wanted:
        if name not in known:
            raise StoreError(
                f"the table {texts} has no column {name} (it has {', '.join(known)}); correct "
                f"{flag}"
            )
    if store.text_table is not None:
        key = quoted(store.text_key)
        twice = (
            f"SELECT {key} FROM {quoted(texts)} GROUP BY 1 HAVING count(*) > 1 AND {key} NOT NULL"
        )
        if found := db.execute(f"{twice} LIMIT 1").fetchone():
            raise StoreError(
                f"two rows of {texts} have the {store.text_key} {found[0]}, so it is not known "
                "which has a vector's text; correct --text-key"
            )
    return store


def _definitions(sql: str) -> list[str]:
    """What stands between the commas of a vec0 table's schema.

    >>> _definitions("CREATE VIRTUAL TABLE v USING vec0(a float[4], +b text)")
    ['a float[4]', '+b text']
    """
    inner = sql[sql.index("(") + 1 : sql.rindex(")")]
    return [part.strip() for part in inner.split(",")]


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
