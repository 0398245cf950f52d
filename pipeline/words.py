"""How numbers, names and tables are put into words."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

NOTHING_WRITTEN = "this command wrote nothing to the store"
"""Ends the message of a failure that changed nothing."""

_SHOWN = 10
_LONG = 80


def one_line(text: str) -> str:
    """Escape what would break a line, as the name of a row or of a file may.

    >>> one_line("a\\nb 日本")
    'a\\\\nb 日本'
    """
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def json_line(values: Mapping[str, Any]) -> str:
    """Give values as one line of JSON; a terminal gets no control characters.

    >>> json_line({"name": "日\\x1b\\x9b"})
    '{"name": "日\\\\u001b\\\\u009b"}'
    """
    text = json.dumps(values, ensure_ascii=False)
    return "".join(sign if sign.isprintable() else json.dumps(sign)[1:-1] for sign in text)


def duration(seconds: float) -> str:
    """Give a time as a person would.

    >>> duration(12.34), duration(185)
    ('12.3 s', '3 min 5 s')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"


def size(count: int) -> str:
    """Give a number of bytes as a person would.

    >>> size(12), size(3_456_789)
    ('12 bytes', '3.5 MB')
    """
    return f"{count} bytes" if count < 1_000 else f"{count / 1e6:,.1f} MB"


def counts(numbers: Mapping[Any, int]) -> str:
    """List counts, the rarest left out if there are many.

    >>> counts({"notes": 1200, "global": 3})
    'notes 1,200, global 3'
    """
    shown = [f"{name} {count:,}" for name, count in list(numbers.items())[:_SHOWN]]
    left = len(numbers) - len(shown)
    return ", ".join(shown + ([f"and {left} more"] if left else [])) or "none"


def table(lines: Mapping[str, str]) -> str:
    """Lay out names and values in two columns."""
    rows = [(one_line(name), one_line(value)) for name, value in lines.items()]
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in rows)


def nearest(name: str, names: Sequence[str]) -> str:
    """List the names that are like one, else the first ones; at most ten, none of them long.

    >>> nearest("note", ["global", "notes"]), nearest("x", ["global", "notes"])
    ("like it: 'notes'", "there are: 'global', 'notes'")
    """
    if found := get_close_matches(name, names, _SHOWN):
        return f"like it: {listed(found)}"
    return f"there are: {listed(names, shown=_SHOWN)}"


def listed(names: Sequence[str], *, shown: int = _SHOWN) -> str:
    """List names, the last ones left out if there are many, and long ones cut short.

    >>> listed(["a", "b", "c"], shown=2), listed([])
    ("'a', 'b' and 1 more", 'none')
    """
    left = len(names) - shown
    short = (one if len(one) <= _LONG else f"{one[:_LONG]}..." for one in names[:shown])
    return (", ".join(map(repr, short)) + (f" and {left:,} more" if left > 0 else "")) or "none"


def places(spans: Iterable[tuple[int, int]]) -> str:
    """Name whole numbers by their runs.

    >>> places([(0, 4), (9, 9)]), places([])
    ('0-4, 9', 'none')
    """
    return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in spans) or "none"
