"""The values that the functions of `reembed` return; the JSON and the texts are made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Progress:
    """Progress of a run: after `seconds`, `rows_done` of `rows` are staged, earlier ones included.

    Skipped rows count as done. Once all are, they are replaced.
    """

    rows_done: int
    rows: int
    seconds: float


@dataclass(frozen=True)
class Result:
    """A result; its attributes are the keys of the JSON."""

    @property
    def values(self) -> dict[str, Any]:
        """The result as `--json` prints it."""
        return {"schema_version": 1, **asdict(self)}


@dataclass(frozen=True)
class RunStatus:
    """One run on a database: what it is about, how far it has come, what to do next.

    Counts are of rows, or of bytes; None stands for what is not known yet. `store` says which
    table and columns, `started` is a time in UTC (ISO 8601). `stopped` says why the last try
    failed, `stopped_code` with which exit code. `ranges_replaced` are pairs of the first and the
    last range that hold new vectors, counted from 0; of a run that is not half done there are none.
    """

    run_id: str
    state: str
    started: str
    stopped: str | None
    stopped_code: int | None
    model: str
    dim: int
    store: Mapping[str, Any]
    namespace: str | None
    mode: str
    rows: int
    staged: int | None
    reembedded: int | None
    skipped: int | None
    remaining: int | None
    ranges: int
    ranges_replaced: Sequence[tuple[int, int]] | None
    rows_in_ranges_replaced: int | None
    bytes: int
    backup_bytes: int
    backup_lost: Sequence[str]
    backup_listed: bool
    run_directory: str
    next: str


@dataclass(frozen=True)
class Status(Result):
    """The runs on a database, the oldest first; `at_work` is the process that works on it now."""

    database: str
    at_work: str | None
    runs: tuple[RunStatus, ...]


@dataclass(frozen=True)
class Verified(Result):
    """Comparison of a table with the run that wrote it, in rows.

    `checked` rows were compared, and `findings` things are wrong with them: `wrong` counts them by
    kind, `wrong_ids` names the first thousand rows of each. Not checked are the `changed` ones,
    which another program has given a new text and vector since, the `deleted`, the `put_back` (by a
    rollback), the `unwritten` (skipped, or added since) and the `lost`, whose files of the backup
    are missing. `sampled` rows were embedded again, `lowest_cosine` compares them with what is
    stored; `unchecked` is why none was.
    """

    run_id: str
    checked: int
    changed: int
    deleted: int
    put_back: int
    findings: int
    unwritten: int
    lost: int
    sampled: int
    lowest_cosine: float | None
    unchecked: str | None
    wrong: Mapping[str, int]
    wrong_ids: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class RolledBack(Result):
    """Rows that a rollback `restored`, found `unchanged` since before the run, or `left`.

    `left_by_reason` counts the rows that were left. `lost_files` are files of the backup that are
    missing or damaged, with the number of their rows (None: not known). `in_the_way` names, by
    collection, the rows for which others could not be put back, with why.
    """

    run_id: str
    state: str
    restored: int
    unchanged: int
    left: int
    left_by_reason: Mapping[str, int]
    lost_files: Mapping[str, int | None]
    in_the_way: Mapping[str, Mapping[str, str]]
    run_directory: str


@dataclass(frozen=True)
class CleanedUp(Result):
    """The runs that were removed; those that were kept, with why; the bytes that are free now."""

    removed: tuple[str, ...]
    kept: Mapping[str, str]
    freed_bytes: int
