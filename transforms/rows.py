"""The values that flow through the pipeline. All are frozen; none knows Beam.

What there is one of for each row is a tuple, which takes a third of the time to make.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
"""Float32 vectors, shape (rows, dimension)."""

DIGEST_BYTES = 16
"""Length of a text's digest. At 128 bits two texts of one store don't share one by chance."""


class Cause(StrEnum):
    """Why a row was skipped."""

    ENCRYPTED = "encrypted"
    OVER_CAP = "over the byte cap"
    NOT_TEXT = "not valid text"
    REJECTED = "rejected by the model"
    BAD_VECTOR = "unusable vector"

    @property
    def by_rule(self) -> bool:
        """Whether the row was never offered to the model; such a skip is not a failure."""
        return self in (Cause.ENCRYPTED, Cause.OVER_CAP, Cause.NOT_TEXT)


@dataclass(frozen=True, slots=True)
class KeyRange:
    """The rows whose key is above `after` and at most `until`; None leaves that end open.

    Keys compare as their UTF-8 bytes, as SQLite's BINARY collation does. `rows` is the
    number of rows when the range was cut: an estimate, used for progress only. `most` is how
    many rows are staged of it at most, None for all.
    """

    index: int
    after: str | None
    until: str | None
    rows: int = 0
    most: int | None = None

    def __post_init__(self) -> None:
        if self.index < 0:
            raise ValueError(f"a range's index can't be negative: {self.index}")
        if self.after is not None and self.until is not None and self.after >= self.until:
            raise ValueError(f"a range must end above its start: {self.after!r} >= {self.until!r}")


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row that gets no vector, and why. Never holds the row's text."""

    key: str
    cause: Cause
    reason: str
    namespace: str = ""


class Stored(NamedTuple):
    """The columns of one row that a replacement touches, exactly as they are stored.

    `vector` is the vector's bytes; None if there is none. `others` are the other columns, in
    a form that only the store reads.
    """

    vector: bytes | None
    others: str

    @property
    def digest(self) -> bytes:
        """The digest of all of it."""
        vector = b"" if self.vector is None else b"\0" + self.vector
        return _digest(self.others.encode() + vector, b"stored")


class Row(NamedTuple):
    """One row of the store as it was read.

    `digest` stands for the exact text: a vector may be stored only while the row still has
    the digest that the vector was made from. A row skipped by rule has no text to embed.
    `meant` says whether the run is about this row: not, for one that has a vector where only
    missing ones are wanted. `stored` is there where it was asked for.
    """

    key: str
    rowid: int
    text: str
    digest: bytes
    skipped: Skipped | None = None
    namespace: str = ""
    meant: bool = True
    stored: Stored | None = None


@dataclass(frozen=True, slots=True)
class RangeRows:
    """A part of a range as it was read: at most 256 KiB of text, or one row."""

    range: KeyRange
    part: int
    rows: tuple[Row, ...]


class StagedRow(NamedTuple):
    """What became of a row: its vector, as little-endian float32, or why it has none.

    `cut` says that its text is longer than the model looks at.
    """

    key: str
    digest: bytes
    vector: bytes | None
    skipped: Skipped | None = None
    cut: bool = False


@dataclass(frozen=True, slots=True)
class RangeVectors:
    """What became of a `RangeRows`, row by row and in the same order.

    `dimension` is the length of its vectors, also where there is none; `tokens` are those that
    a server counted for them. `sizes` are the tokens of each batch that it took, and `cached` the
    rows whose vector was that of an equal text.
    """

    range: KeyRange
    part: int
    dimension: int
    rows: tuple[StagedRow, ...]
    tokens: int = 0
    sizes: tuple[int, ...] = ()
    cached: int = 0


@dataclass(frozen=True, slots=True)
class StagedRange:
    """A shard that was written: the range it belongs to and what it holds."""

    range: KeyRange
    shard: str
    embedded: int
    skipped: int


class Saved(NamedTuple):
    """What a row held before a run wrote to it, and what the run wrote: a row of the backup.

    `digest` is that of the text that the row then had, `written` that of the new vector, `was`
    that of `stored`, which is None where it was not read. What can't be put back, since the
    previous vector belonged to another text, is not `restorable`.
    """

    key: str
    digest: bytes
    written: bytes
    was: bytes
    restorable: bool
    stored: Stored | None


@dataclass(frozen=True)
class Summary:
    """What was done, in rows. A value with a zero, `Summary()`, and a plus.

    `embedded` and `skipped` (by cause) count the work of staging. The others say what the
    table holds: `replaced` rows have the new vector, `kept` (by cause) are the skipped ones,
    `remaining` are new, edited or overwritten since; to `unwritten` of these the new vector was
    written, and did not stay. `in_old_space` counts the kept and
    the remaining rows that still have a vector that is not this run's. `changed` names the
    ranges in which rows are remaining.
    """

    embedded: int = 0
    skipped: Mapping[Cause, int] = field(default_factory=dict)
    replaced: int = 0
    kept: Mapping[Cause, int] = field(default_factory=dict)
    remaining: int = 0
    unwritten: int = 0
    in_old_space: int = 0
    changed: frozenset[int] = frozenset()

    @property
    def total(self) -> int:
        """Rows of the table that the run is about."""
        return self.replaced + sum(self.kept.values()) + self.remaining

    def __add__(self, other: Summary) -> Summary:
        return Summary(
            embedded=self.embedded + other.embedded,
            skipped=_added(self.skipped, other.skipped),
            replaced=self.replaced + other.replaced,
            kept=_added(self.kept, other.kept),
            remaining=self.remaining + other.remaining,
            unwritten=self.unwritten + other.unwritten,
            in_old_space=self.in_old_space + other.in_old_space,
            changed=self.changed | other.changed,
        )

    def to_json(self) -> dict[str, Any]:
        """The summary in types that JSON has; `from_json` is its inverse."""
        # Not named as_dict: Beam takes a value with that method for a row of a schema.
        return {
            "embedded": self.embedded,
            "skipped": {str(cause): count for cause, count in sorted(self.skipped.items())},
            "replaced": self.replaced,
            "kept": {str(cause): count for cause, count in sorted(self.kept.items())},
            "remaining": self.remaining,
            "unwritten": self.unwritten,
            "in_old_space": self.in_old_space,
            "changed": sorted(self.changed),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Summary:
        """Read what `to_json` gave."""
        return cls(
            embedded=values["embedded"],
            skipped={Cause(cause): count for cause, count in values["skipped"].items()},
            replaced=values["replaced"],
            kept={Cause(cause): count for cause, count in values["kept"].items()},
            remaining=values["remaining"],
            unwritten=values["unwritten"],
            in_old_space=values["in_old_space"],
            changed=frozenset(values["changed"]),
        )


def text_digest(text: bytes) -> bytes:
    """The digest of a text: BLAKE2b (RFC 7693) of its UTF-8 bytes, 16 bytes long."""
    return _digest(text)


def contents_digest(*values: bytes | None) -> bytes:
    """The digest of what columns hold, as bytes; None for NULL."""
    parts = (b"\0" if one is None else b"\1%d:%b" % (len(one), one) for one in values)
    return _digest(b"".join(parts), b"contents")


def skipped_digest(skipped: Skipped, contents: bytes) -> bytes:
    """The digest of a row that was skipped by rule, apart from all texts'.

    It is that of the reason and of all that was there: `contents` is their digest.
    """
    return _digest(contents + skipped.reason.encode(), b"skipped row")


def former_skipped_digest(skipped: Skipped) -> bytes:
    """The digest of such a row in runs of reembed 0.1.0: of its reason alone."""
    return _digest(skipped.reason.encode(), b"skipped")


def vector_digest(vector: bytes | None) -> bytes:
    """The digest of a stored vector; that of no vector is apart from all others."""
    return _digest(b"", b"no vector") if vector is None else _digest(vector, b"vector")


def _digest(content: bytes, person: bytes = b"") -> bytes:
    return blake2b(content, digest_size=DIGEST_BYTES, person=person).digest()


def _added(one: Mapping[Cause, int], other: Mapping[Cause, int]) -> dict[Cause, int]:
    causes = [cause for cause in Cause if cause in one or cause in other]  # One order, always.
    return {cause: one.get(cause, 0) + other.get(cause, 0) for cause in causes}
