"""A table's columns, judged by a sample of rows spread over it."""

from __future__ import annotations

import json
import re
import sqlite3
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from reembed.transforms.stores.sqlite import quoted

SAMPLED_ROWS = 256

SHOWN_CHARACTERS = 60
"""The characters of a text that are shown of it."""

_READ_CHARACTERS = 300
_MIN_SAMPLE = 4
"""Of fewer values it can't be said that most are equal, short or alike."""

_MIN_TEXT = 12
_LONG_TEXT = 40
"""Texts of this many characters are hardly ever labels or keys."""

_MONTHS = "Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec"
_ENDINGS = "md|txt|pdf|html?|docx?|csv|json|xml|ya?ml|toml|py|js|ts|rs|go|java|png|jpe?g|mp3|mp4"
_KINDS = {
    "dates": rf"\d{{4}}-\d\d-\d\d([T ][\d:.,]+ ?(Z|UTC|[+-]\d\d:?\d\d)?)?"
    r"|\d{1,2}[./-]\d{1,2}[./-]\d{2,4}( [\d:]+)?"
    rf"|([A-Z][a-z]+,? )?(\d{{1,2}}\.? )?({_MONTHS})[a-z]*\.?,? [\d ,:.]+"
    r"(at [\d:]+)?( ?[AP]M)?( ?(GMT|UTC|Z|[+-]\d{4}))?",
    "UUIDs": r"\{?[0-9a-fA-F]{8}-([0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}\}?",
    "hashes": r"(\w{2,10}[:-])?(?=.*\d)[0-9a-fA-F]{16,}",
    "numbers": r"(?=.*\d)[\d\s.,:/+()%$€£#-]*",
    "URLs": r"([a-zA-Z][\w+.-]*://|www\.|mailto:|data:)\S*|[^\s@]+@[^\s@]+\.\w+",
    "paths": r"(?=.{2,250}$)((~|\.{1,2})?/\S*|[a-zA-Z]:[\\/].*|.*[/\\][^/\\]*\.[a-zA-Z0-9]{1,8}"
    rf"|.*\.({_ENDINGS}))",
    # One word of ASCII with a sign in it that no word has, or too long for one.
    "ids": r"(?=.*[^a-zA-Z'])[!-~]*[\w/]|[a-zA-Z]{30,}",
}
_PATTERNS = {name: re.compile(pattern) for name, pattern in _KINDS.items()}
_BEGINS_JSON = re.compile(r'\{\s*["}]|\[\s*(["\[{\]]|-?\d[\d.e+-]*\s*[,\]])')


@dataclass(frozen=True)
class Column:
    """A sample of a column: its values' beginnings and ends as text, their lengths in characters.

    NULL is left out. `texts` of the values are of SQLite's type text.
    """

    name: str
    values: tuple[str, ...]
    ends: tuple[str, ...]
    lengths: tuple[int, ...]
    texts: int

    @property
    def filled(self) -> list[str]:
        """The values that are not empty."""
        return [value for value in self.values if value.strip()]

    @property
    def mean_length(self) -> float:
        """The mean length of the values that are not empty, in characters."""
        filled = [size for size, value in zip(self.lengths, self.values, strict=True) if value]
        return sum(filled) / len(filled) if filled else 0.0

    @property
    def example(self) -> str:
        """The beginning of a value on one line; the longest of a few, as it says the most."""
        return shortened(max(self.filled[:8], key=len, default=""))

    @property
    def _most_equal(self) -> bool:
        values = Counter(zip(self.values, self.ends, self.lengths, strict=True))
        count = max(values.values(), default=0)
        return len(self.values) >= _MIN_SAMPLE and count * 2 > len(self.values)

    def could_be_text(self, *, is_key: bool) -> bool:
        """Whether most values are texts that one would embed, and no keys, dates, paths and such.

        A column that is (a part of) a key must look the more like prose.
        """
        filled = self.filled
        if not filled or self.texts * 2 <= len(self.values) or self._most_equal:
            return False
        if sum(looks_like(value) is not None for value in filled) * 2 >= len(filled):
            return False
        if self.mean_length >= _LONG_TEXT:
            return True
        repeated = len(filled) >= 2 * _MIN_SAMPLE and len(set(filled)) * 4 <= len(filled)
        spaced = sum(" " in value for value in filled) * 2 > len(filled)
        prose = self.mean_length >= 2 * _MIN_TEXT and spaced
        return not repeated and (prose or not is_key)

    @property
    def doubts(self) -> list[str]:
        """Why the values may not be the texts that were embedded, said of most of them."""
        count = len(self.values)
        if count < _MIN_SAMPLE:
            return []
        kinds = Counter(map(looks_like, self.values))
        del kinds[None], kinds["JSON"]
        found = []
        if kinds.total() * 2 > count:
            found.append(f"look like {kinds.most_common(1)[0][0]}")
        if self._most_equal:
            found.append("are equal")
        if sum(size < _MIN_TEXT for size in self.lengths) * 2 > count:
            found.append(f"are shorter than {_MIN_TEXT} characters")
        return found


def looks_like(value: str) -> str | None:
    """Name what a value is, in the plural, if it is no text that one would embed.

    >>> [looks_like(value) for value in ("2026-01-01", "notes/a.md", "former-model", '{"a": 1}')]
    ['dates', 'paths', 'ids', 'JSON']
    >>> looks_like("An owl sold seven lamps."), looks_like("日本語の文章"), looks_like("rock")
    (None, None, None)
    """
    truncated = len(value) >= _READ_CHARACTERS
    value = value.strip()
    if _BEGINS_JSON.match(value) and (truncated or _is_json(value)):
        return "JSON"
    return next((name for name, kind in _PATTERNS.items() if kind.fullmatch(value)), None)


def _is_json(value: str) -> bool:
    try:
        json.loads(value)
    except (ValueError, RecursionError):
        return False
    return True


def shortened(text: str) -> str:
    """The first characters of a text, on one line.

    >>> shortened("a\\n b")
    'a b'
    """
    words = " ".join(text.split())
    return words if len(words) <= SHOWN_CHARACTERS else words[: SHOWN_CHARACTERS - 1] + "…"


def spread_rowids(db: sqlite3.Connection, table: str, rowid: str = "rowid") -> list[int]:
    """The rowids of up to 256 rows spread over a table (as SQL names it), found by seeks."""
    select = f"SELECT {rowid} FROM {table}"
    first = [found for (found,) in db.execute(f"{select} ORDER BY 1 LIMIT {SAMPLED_ROWS + 1}")]
    if len(first) <= SAMPLED_ROWS:
        return first
    (end,) = db.execute(f"{select} ORDER BY 1 DESC LIMIT 1").fetchone()
    points = (first[0] + (end - first[0]) * at // (SAMPLED_ROWS - 1) for at in range(SAMPLED_ROWS))
    seek = f"{select} WHERE {rowid} >= ? ORDER BY 1 LIMIT 1"
    spread = dict.fromkeys(db.execute(seek, (point,)).fetchone()[0] for point in points)
    # Where the rowids have large gaps, few of the points lead to rows of their own.
    return [*spread, *(found for found in first if found not in spread)][:SAMPLED_ROWS]


def read_columns(
    db: sqlite3.Connection,
    source: str,
    names: Sequence[str],
    rowids: Iterable[int],
    rowid: str = "rowid",
) -> list[Column]:
    """Read some columns of some rows; `source` and `rowid` as SQL has them."""
    if not names:
        return []
    parts = ", ".join(
        f"typeof({name}), length(CAST({name} AS TEXT)), "
        f"CAST(substr(CAST({name} AS TEXT), 1, {_READ_CHARACTERS}) AS BLOB), "
        f"CAST(substr(CAST({name} AS TEXT), -{SHOWN_CHARACTERS}) AS BLOB)"
        for name in map(quoted, names)
    )
    select = f"SELECT {parts} FROM {source} WHERE {rowid} = ?"
    rows = [row for number in rowids for row in db.execute(select, (number,))]
    columns = []
    for at, name in enumerate(names):
        held = [row[4 * at : 4 * at + 4] for row in rows if row[4 * at] != "null"]
        columns.append(
            Column(
                name,
                tuple(raw.decode(errors="replace") for _, _, raw, _ in held),
                tuple(raw.decode(errors="replace") for _, _, _, raw in held),
                tuple(size for _, size, _, _ in held),
                sum(kind == "text" for kind, *_ in held),
            )
        )
    return columns
