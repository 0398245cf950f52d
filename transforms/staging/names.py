"""The names that reembed gives to what it makes in a run and in a work directory.

Nothing else is ever read as a shard or a backup, or deleted: a program that keeps copies, or a
person, may have put files of their own there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

_CHECKSUM = r"\.[0-9a-f]{16}"

RUN = re.compile(r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{4}")
HALF_MADE = re.compile(rf"\.({RUN.pattern})\.(made|removed)")
"""A run that was being made or removed when its process died."""

SHARD = re.compile(rf"[0-9]{{7,}}\.[0-9]{{4,}}\.[0-9]{{3,}}\.[0-9]{{5,}}{_CHECKSUM}\.parquet")
BACKUP = re.compile(rf"[0-9]{{7,}}\.[0-9]{{4,}}{_CHECKSUM}\.parquet")
DAMAGED = re.compile(BACKUP.pattern.removesuffix("parquet") + "damaged")
INPUT = re.compile(rf"[0-9]{{7,}}\.[0-9]{{3,}}\.[0-9]{{5,}}{_CHECKSUM}\.parquet")

_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}\.tmp")
_OF_A_RUN = re.compile(
    r"reserve|manifest\.lock|(manifest|summary|rollback|pass-[0-9]+)\.json"
    r"|(skipped|remaining|left)\.jsonl"
)
_OF_WORK = re.compile(r"(attempt|pass-[0-9]+)-[0-9a-z]+\.json")


@dataclass(frozen=True)
class Layout:
    """The names of the files in a directory, and those of directories in it with theirs."""

    files: re.Pattern[str]
    directories: Mapping[str, Layout] = field(default_factory=dict)

    def gives(self, name: str) -> bool:
        """Whether a file has one of the names, or that of one that was being written."""
        return bool(self.files.fullmatch(name)) or self.is_half(name)

    def is_half(self, name: str) -> bool:
        """Whether a name is that of a file that was being written."""
        half = _TEMPORARY.fullmatch(name)
        return half is not None and bool(self.files.fullmatch(half[1]))

    def within(self, name: str) -> Layout | None:
        """The names in a directory; None if it has none of the names itself."""
        return next((v for k, v in self.directories.items() if re.fullmatch(k, name)), None)


SHARDS = Layout(SHARD)
OF_A_RUN = Layout(
    _OF_A_RUN,
    {"shards": SHARDS, "backup": Layout(re.compile(f"{BACKUP.pattern}|{DAMAGED.pattern}"))},
)
OF_WORK = Layout(_OF_WORK, {"shards": SHARDS, r"inputs-[0-9a-z]+-[0-9]{4,}": Layout(INPUT)})
