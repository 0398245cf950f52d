"""Any table of a SQLite database that has texts and vectors in columns.

A row's place, by which the table is cut into ranges, is its rowid; its key is what the user
calls it: the values of the key's columns.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from string import Formatter
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from reembed.transforms.errors import UsageError
from reembed.transforms.rows import (
    Cause,
    KeyRange,
    Row,
    Skipped,
    Stored,
    contents_digest,
    skipped_digest,
    text_digest,
)
from reembed.transforms.stores import sqlite
from reembed.transforms.stores.base import Store, Surveyed, describe_value, stored_values, utf8
from reembed.transforms.stores.columns import read_columns
from reembed.transforms.stores.formats import FORMATS, NUMBERS, decode, encode
from reembed.transforms.stores.sqlite import folded, quoted

MOST_TEXT_BYTES = 1_000_000
"""The longest text that is embedded, in bytes; the rest is far beyond what a model looks at."""

_LEAST_ROWID = -(2**63)


@dataclass(frozen=True)
class TableConfig:
    """Which columns of which table are meant.

    `key` are the columns that name a row, none for its rowid. `text` are columns that are joined
    by a space, or one template such as "{title}: {body}". `where` is a condition in SQL, `space`
    what the store calls the target's model.
    """

    table: str
    text: tuple[str, ...]
    vector: str
    key: tuple[str, ...] = ()
    dim_column: str | None = None
    space_column: str | None = None
    namespace_column: str | None = None
    where: str | None = None
    format: str = "f32le"
    space: str | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UsageError(f"--format {self.format} is not one of {', '.join(FORMATS)}")
        replaced = [name for name in (self.vector, self.dim_column, self.space_column) if name]
        read = [*self.key, *self.text_columns, self.namespace_column or ""]
        named = Counter(map(folded, replaced)) + Counter(set(map(folded, read)))
        for name in replaced:
            if named[folded(name)] > 1:
                raise UsageError(
                    f"the column {name} is named for two things, of which one is replaced; name "
                    "another"
                )

    def to_json(self) -> dict[str, Any]:
        """The settings in types that JSON has; `from_json` is its inverse."""
        return asdict(self) | {"key": list(self.key), "text": list(self.text)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TableConfig:
        """Read what `to_json` gave."""
        lists = {name: tuple(values[name]) for name in ("key", "text") if name in values}
        return cls(**{**values, **lists})

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The columns that a row's text is made of, each once."""
        return tuple(dict.fromkeys(name for _, name in self.text_parts if name is not None))

    @cached_property
    def text_parts(self) -> tuple[tuple[str, str | None], ...]:
        """The template's pieces: what stands before a column, and the column.

        Raises UsageError for a template with anything but names of columns.
        """
        if len(self.text) > 1 or "{" not in self.text[0]:
            # Not through the template: a column may have braces in its name.
            return tuple((" " if at else "", name) for at, name in enumerate(self.text))
        try:
            parts = list(Formatter().parse(self.text[0]))
        except ValueError as error:
            raise UsageError(f"--text {self.text[0]!r} is no template ({error})") from None
        for _, name, format, conversion in parts:
            if name is not None and (not name or format or conversion):
                raise UsageError(
                    f"--text {self.text[0]!r} may hold only names of columns in braces, such as "
                    "{title}, and no format"
                )
        return tuple((before, name) for before, name, _, _ in parts)


@dataclass(frozen=True)
class TableStore(Store):
    """A table with texts and vectors, and the one namespace of it that is meant.

    With `unfiltered`, all of its rows are read with what they hold, also those that no run can
    have been about; if `narrowed`, only those that the run is about now.
    """

    settings: TableConfig = field(kw_only=True)
    rowid_name: str = "rowid"
    moves: bool = False
    nullable: bool = True
    unfiltered: bool = False
    narrowed: bool = False

    kind = "table"
    ordered_by_key = False
    space_name = "space"
    no_stamps = "no --space-column is named"

    @property
    def described(self) -> str:
        """What it is, for a person."""
        named = self.settings
        key = ", ".join(named.key) or "rowid"
        return (
            f"the table {named.table}: key {key}, text {' '.join(named.text)}, vector "
            f"{named.vector} ({named.format})"
        )

    @property
    def config(self) -> Mapping[str, Any]:
        """What is needed besides the path to open it again."""
        return {"kind": self.kind, **self.settings.to_json()}

    @property
    def table(self) -> str:
        """The table as SQL names it."""
        return quoted(self.settings.table)

    @property
    def vector_column(self) -> str:
        """The vector's column as SQL names it."""
        return quoted(self.settings.vector)

    @property
    def rowid(self) -> str:
        """A row's number as SQL names it."""
        return self.rowid_name

    @property
    def stable(self) -> bool:
        """Whether a rowid stays: VACUUM may give others where no column has them as its key."""
        return not self.moves

    @property
    def not_clearable(self) -> str:
        """Why a row may not be without a vector."""
        return "" if self.nullable else "a column of its vectors is NOT NULL"

    @property
    def vector_type(self) -> str:
        """The type, in SQLite, of a vector that is stored: blob or text."""
        return "text" if self.settings.format == "json" else "blob"

    @property
    def replaced_columns(self) -> dict[str, str]:
        """The columns that a replacement sets besides the vector, by name."""
        named = {"dim": self.settings.dim_column, "space": self.settings.space_column}
        return {name: quoted(column) for name, column in named.items() if column is not None}

    def _connect(
        self, opens: sqlite.Connect, *arguments: Any, **keywords: Any
    ) -> sqlite3.Connection:
        db = super()._connect(opens, *arguments, **keywords)
        db.create_function("vector_dimension", 1, self._dimension, deterministic=True)
        db.create_function("is_utf8", 1, _is_utf8, deterministic=True)
        db.create_function("texts_are_utf8", -1, self._texts_are_utf8, deterministic=True)
        return db

    def everywhere(self) -> Self:
        """The table with all of its rows; the condition still says which are meant."""
        return replace(self, namespace=None, unfiltered=True)

    def selected(self) -> Self:
        """The table with only the rows that the run is about."""
        return replace(self, narrowed=True)

    def space(self, model: str) -> str | None:
        """The stamp of a model's vectors, its name; None without a column for it."""
        if self.settings.space_column is None:
            return None
        return self.settings.space or model.partition(" (")[0].strip()

    def describe(self, vector: bytes | None, *, model: str, dimension: int) -> Stored:
        """What a row holds once it has a vector of a model (little-endian float32), or none."""
        values: dict[str, int | str | None] = {"dim": dimension, "space": self.space(model)}
        if vector is None:
            values = dict.fromkeys(values)
        others = " ".join(describe_value(name, values[name]) for name in self.replaced_columns)
        return self.stored(vector and encode(self.settings.format, vector), others)

    def decode(self, vector: bytes) -> NDArray[np.float32]:
        """Turn what is stored into a vector of shape (dimension,); ValueError if it is none."""
        return decode(self.settings.format, vector)

    def rows_in(self, db: sqlite3.Connection, keys: KeyRange, *, with_stored: bool) -> list[Row]:
        """Read the rows of a range over a connection, in the order of the file.

        With what is stored, also rows of which the condition is not true: the run's own writing
        may be why.
        """
        conditions = [self._of_namespace]
        if keys.after is not None:
            conditions.append(f"{self.rowid} > :after")
        if keys.until is not None:
            conditions.append(f"{self.rowid} <= :until")
        if not with_stored or self.narrowed:
            conditions.append(self.meant)
        columns = self._row_columns + (f", {self.stored_columns}" if with_stored else "")
        values = self.values | {
            "after": keys.after and _number(keys.after),
            "until": keys.until and _number(keys.until),
        }
        found = db.execute(
            f"SELECT {columns} FROM {self.source} WHERE {' AND '.join(conditions)} "
            f"ORDER BY {self.rowid}",
            values,
        )
        return self.named_only([self._row(row) for row in found], with_stored=with_stored)

    def read_texts(self, places: Sequence[str]) -> list[str]:
        """Read the texts of a few rows, but of those that are skipped by rule."""
        return [row.text for row in self.read_rows(places) if row.skipped is None]

    def read_rows(self, places: Sequence[str]) -> list[Row]:
        """Read a few rows."""
        select = f"SELECT {self._row_columns} FROM {self.source} WHERE {self.rowid} = :place"
        return self.read_only(
            lambda db: [
                self._row(values)
                for place in places
                for values in db.execute(select, self.values | {"place": _number(place)})
            ]
        )

    def text_warnings(self, places: Sequence[str]) -> tuple[str, ...]:
        """Which text columns may not hold what was embedded, by a few rows."""
        names, rowids = self.settings.text_columns, list(map(_number, places))
        columns = self.read_only(
            lambda db: read_columns(db, self.source, names, rowids, self.rowid)
        )
        return tuple(
            f"most values of the text column {column.name} {' and '.join(column.doubts)} (of "
            f"{len(column.values)} sampled rows); correct --text if that is not what was embedded"
            for column in columns
            if column.doubts
        )

    def survey(self, db: sqlite3.Connection) -> Iterator[Surveyed]:
        """Look at each row of the namespace."""
        vector, settings = self.vector_column, self.settings
        keyless = " OR ".join(f"{quoted(name)} IS NULL" for name in settings.key) or "FALSE"
        no_text = " AND ".join(f"{quoted(name)} IS NULL" for name in settings.text_columns)
        no_text = no_text or "FALSE"
        if self.whole:  # In another store such texts are named when they are read.
            for name in settings.key:
                no_text += f" OR {not_utf8(quoted(name))}"
            no_text += f" OR {self._text_bytes} <= {MOST_TEXT_BYTES} AND NOT {self._has_utf8}"
        return db.execute(
            f"SELECT {self._namespace}, "
            f"CASE WHEN {vector} IS NOT NULL THEN {self.dimension_of(db)} END, "
            f"CASE WHEN {keyless} OR {no_text} THEN '{Cause.NOT_TEXT}' "
            f"WHEN {self._text_bytes} > {MOST_TEXT_BYTES} THEN '{Cause.OVER_CAP}' END, "
            f"{self.meant}, ifnull(length(CAST({vector} AS BLOB)), 0) "
            f"FROM {self.source} WHERE {self.where}",
            self.values,
        )

    def dimension_of(self, db: sqlite3.Connection) -> str:
        """The SQL expression for the dimension of a vector that is there."""
        length, format = f"length({self.vector_column})", self.settings.format
        if format in NUMBERS:
            size = np.dtype(NUMBERS[format]).itemsize
            return f"CASE WHEN {length} % {size} = 0 THEN {length} / {size} ELSE 0 END"
        return self._decoded_dimension

    def in_scope(self, db: sqlite3.Connection) -> str:
        """The SQL condition for a row of the namespace and of --where.

        The latter is left out if it reads what a run writes.
        """
        if self.settings.where is not None:
            statement = f"SELECT 1 FROM {self.table} WHERE ({self.settings.where}\n)"
            settings = self.settings
            written = (settings.vector, settings.dim_column, settings.space_column)
            read = {folded(name) for name in sqlite.columns_read(db, statement)}
            if read & {folded(name) for name in written if name is not None}:
                return replace(self, settings=replace(settings, where=None)).where
        return self.where

    def namespace_of(self) -> str:
        """The SQL expression for a row's namespace, as bytes."""
        return self._namespace

    def namespaces(self, db: sqlite3.Connection) -> tuple[str, ...]:
        """All namespaces that there are."""
        names = db.execute(f"SELECT DISTINCT {self._namespace} FROM {self.source} ORDER BY 1")
        return tuple((raw or b"").decode(errors="replace") for (raw,) in names)

    def places(self, db: sqlite3.Connection) -> tuple[int, Iterator[str | None]]:
        """The number of rows, and the place of each in order."""
        values = self.values
        count = db.execute(f"SELECT count(*) FROM {self.source} WHERE {self.where}", values)
        places = db.execute(
            f"SELECT {self.rowid} FROM {self.source} WHERE {self.where} ORDER BY {self.rowid}",
            values,
        )
        return count.fetchone()[0], (_place(rowid) for (rowid,) in places)

    @property
    def where(self) -> str:
        """The SQL condition for a row of the table that is looked at at all."""
        condition = "TRUE" if self.unfiltered else self._condition
        return f"{condition} AND {self._of_namespace}"

    @property
    def meant(self) -> str:
        """The SQL condition for a row that the run is about."""
        return f"{self._condition} AND {super().meant}"

    @property
    def _condition(self) -> str:
        return "TRUE" if self.settings.where is None else f"({self.settings.where}\n)"

    @property
    def _of_namespace(self) -> str:
        return "TRUE" if self.namespace is None else self._in_namespace

    @property
    def fits(self) -> str:
        """The SQL condition for a vector of the target's length."""
        if self.settings.format in NUMBERS:
            size = np.dtype(NUMBERS[self.settings.format]).itemsize
            return f"ifnull(length({self.vector_column}) = {size} * :dimension, FALSE)"
        return f"{self._decoded_dimension} = :dimension"

    @property
    def _decoded_dimension(self) -> str:
        return f"vector_dimension(CAST({self.vector_column} AS BLOB))"

    @property
    def _namespace(self) -> str:
        column = self.settings.namespace_column
        return "x''" if column is None else f"CAST({quoted(column)} AS BLOB)"

    @property
    def _in_namespace(self) -> str:
        # As it is shown, a number, too. It also keeps SQLite on the rowid: another index would
        # cost a scan a range.
        return f"CAST({quoted(self.settings.namespace_column or '')} AS TEXT) = :namespace"

    @property
    def _text_bytes(self) -> str:
        lengths = [
            f"ifnull(length(CAST({quoted(name)} AS BLOB)), 0)"
            for name in self.settings.text_columns
        ]
        return " + ".join(lengths) or "0"

    @property
    def _has_utf8(self) -> str:
        names = ", ".join(f"CAST({quoted(name)} AS BLOB)" for name in self.settings.text_columns)
        return f"texts_are_utf8({names})"

    @property
    def _row_columns(self) -> str:
        keys = [
            f"CASE typeof({name}) WHEN 'text' THEN CAST({name} AS BLOB) ELSE {name} END, "
            f"typeof({name})"
            for name in map(quoted, self.settings.key)
        ]
        fits = f"({self._text_bytes} <= {MOST_TEXT_BYTES})"
        texts = [
            f"CASE WHEN {fits} THEN CAST({quoted(name)} AS BLOB) END"
            for name in self.settings.text_columns
        ]
        pieces = ", ".join(f"CAST({quoted(name)} AS BLOB)" for name in self.settings.text_columns)
        digest = f"CASE WHEN NOT {fits} THEN contents_digest({pieces}) END"
        columns = [self.rowid, self._text_bytes, digest, *keys, *texts, self._namespace, self.meant]
        return ", ".join(columns)

    def _row(self, values: Sequence[Any]) -> Row:
        settings = self.settings
        first, last = 3, 3 + 2 * len(settings.key)
        end = last + len(settings.text_columns)
        rowid, size, contents = values[:first]
        key = _key(values[first:last]) if settings.key else str(rowid)
        pieces = dict(zip(settings.text_columns, values[last:end], strict=True))
        raw_namespace, meant, *rest = values[end:]
        namespace = (raw_namespace or b"").decode(errors="replace")
        stored = stored_values(*rest) if rest else None
        cause, reason = Cause.NOT_TEXT, ""
        raw_text = self._raw_text(pieces)
        text = utf8(raw_text)
        if key is None:
            key, reason = f"rowid {rowid}", "its key is NULL or not text"
        elif size > MOST_TEXT_BYTES:
            cause = Cause.OVER_CAP
            reason = f"text {size} bytes exceeds embed cap {MOST_TEXT_BYTES} bytes"
        elif pieces and all(piece is None for piece in pieces.values()):
            reason = "it has no text (NULL)"
        elif text is None:
            reason = "its text is not valid UTF-8"
        else:
            digest = text_digest(raw_text)
            return Row(key, rowid, text, digest, None, namespace, bool(meant), stored)
        skipped = Skipped(key, cause, reason, namespace)
        named = repr(list(values[first:last])).encode()
        digest = skipped_digest(skipped, contents or contents_digest(named, *pieces.values()))
        return Row(key, rowid, "", digest, skipped, namespace, bool(meant), stored)

    def _raw_text(self, pieces: Mapping[str, bytes | None]) -> bytes:
        return b"".join(
            before.encode() + (b"" if name is None else pieces[name] or b"")
            for before, name in self.settings.text_parts
        )

    def _texts_are_utf8(self, *pieces: bytes | None) -> bool:
        named = dict(zip(self.settings.text_columns, pieces, strict=True))
        return _is_utf8(self._raw_text(named))

    def _dimension(self, vector: bytes | None) -> int:
        try:
            return len(self.decode(vector or b""))
        except (ValueError, RecursionError):
            return 0


def not_utf8(column: str) -> str:
    """The SQL condition that a column holds a text that is not UTF-8."""
    return f"(typeof({column}) = 'text' AND NOT is_utf8(CAST({column} AS BLOB)))"


def _is_utf8(raw: bytes | None) -> bool:
    return utf8(raw or b"") is not None


def _key(values: Sequence[Any]) -> str | None:
    """A row's key as a text: of one text its own, of anything else JSON; None if it has none.

    >>> _key([b"a", "text"]), _key([7, "integer"]), _key([b"a", "text", 7, "integer"])
    ('a', '7', '["a", 7]')
    >>> _key([b"7", "text"]), _key([None, "null"])
    ('"7"', None)
    """
    parts: list[Any] = []
    for value, kind in zip(values[::2], values[1::2], strict=True):
        part: Any = utf8(value) if kind == "text" else value
        if part is None:
            return None
        parts.append({"hex": value.hex()} if kind == "blob" else part)
    if len(parts) == 1 and isinstance(parts[0], str) and parts[0][:1] not in '"[{-0123456789':
        return parts[0]
    shown: str = json.dumps(parts[0] if len(parts) == 1 else parts, ensure_ascii=False)
    return shown


def _place(rowid: int) -> str:
    """A rowid as a text that sorts as rowids do.

    >>> _place(-1) < _place(0) < _place(10) < _place(2**63 - 1)
    True
    """
    return f"{rowid - _LEAST_ROWID:020d}"


def _number(place: str) -> int:
    return int(place) + _LEAST_ROWID
