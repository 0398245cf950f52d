"""The manifest of a run: what it is about, and how far it has come.

It is written before the first shard, and says `replacing` before the first write to the
store. From then on the run is incomplete until it says `replaced`, or `rolled back`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from transforms.rows import KeyRange

SCHEMA_VERSION = 1
"""Version of the files in a run directory and of the JSON that is printed."""


class State(StrEnum):
    """How far a run has come."""

    STAGING = "staging"
    REPLACING = "replacing"
    REPLACED = "replaced"
    EMPTY = "wrote nothing"
    ROLLING_BACK = "rolling back"
    PARTLY_BACK = "partly rolled back"
    ROLLED_BACK = "rolled back"

    @property
    def incomplete(self) -> bool:
        """Whether the store may hold a part of what was to be written."""
        return self in (State.REPLACING, State.ROLLING_BACK)

    @property
    def ended(self) -> bool:
        """Whether nothing is left to do."""
        return self not in (State.STAGING, State.REPLACING, State.ROLLING_BACK)

    @property
    def undoable(self) -> bool:
        """Whether the run has ended and the store holds vectors that it wrote."""
        return self in (State.REPLACED, State.PARTLY_BACK)


@dataclass(frozen=True)
class Scope:
    """Which rows a run is about: of one namespace or all, all of them or by a rule.

    `mode` is "all" or the name of a rule; `keys` are those of a rule that names rows. `store` is
    what the store needs to be opened again.
    """

    namespace: str | None = None
    mode: str = "all"
    keys: tuple[str, ...] | None = None
    store: Mapping[str, Any] = field(default_factory=lambda: {"kind": "ai-memory"})

    def shares_rows(self, other: Scope) -> bool:
        """Whether there may be rows of which both write the same columns."""
        ours, theirs = self._written, other._written
        return (
            self._table == other._table
            and (not ours or not theirs or bool(ours & theirs))
            and (None in (self.namespace, other.namespace) or self.namespace == other.namespace)
        )

    def shares_vectors(self, other: Scope) -> bool:
        """Whether there may be rows of which both write the same vector."""
        return self.shares_rows(other) and self._column("vector") == other._column("vector")

    @property
    def _table(self) -> tuple[str, str]:
        return self._column("kind"), self._column("table")

    @property
    def _written(self) -> set[str]:
        names = map(self._column, ("vector", "dim_column", "space_column"))
        return {name for name in names if name}

    def _column(self, setting: str) -> str:
        """A name that the store was given, as SQLite compares it; nothing if there is none."""
        return str(self.store.get(setting) or "").lower()


@dataclass(frozen=True)
class Manifest:
    """What a run is about, and how far it has come.

    `target` and `probe` (vectors of fixed texts) say which model it is, so that no other one
    goes on with it. `attempt` names the process that is at work: a worker of an earlier one
    must not write any more. `done` are the ranges that are replaced, `writing` those of the
    transaction that was begun last; `wrote` says that there was one. `stopped` is why the last
    attempt failed, and `stopped_code` the exit code that stands for it.
    """

    run_id: str
    database: str
    started: str
    scope: Scope
    target: Mapping[str, Any]
    probe: Sequence[Sequence[float]]
    ranges: tuple[KeyRange, ...]
    rows: int
    attempt: str
    state: State = State.STAGING
    done: frozenset[int] = frozenset()
    writing: frozenset[int] = frozenset()
    wrote: bool = False
    stopped: str | None = None
    stopped_code: int | None = None
    outcome: Mapping[str, Any] = field(default_factory=dict)

    @property
    def reembedded(self) -> int:
        """Rows that held the run's vector when it ended."""
        rows: int = self.outcome.get("reembedded") or 0
        return rows

    @property
    def is_confirmation(self) -> bool:
        """Whether the run wrote nothing since all rows held their vectors already."""
        return self.state is State.EMPTY and self.reembedded > 0

    @property
    def holds(self) -> bool:
        """Whether the run ended, and its rows held the target's vectors then."""
        return self.state.undoable or self.is_confirmation

    def to_json(self) -> dict[str, Any]:
        """The manifest in types that JSON has; `from_json` is its inverse."""
        return {
            "schema_version": SCHEMA_VERSION,
            "run_id": self.run_id,
            "database": self.database,
            "started": self.started,
            "state": str(self.state),
            "attempt": self.attempt,
            "stopped": self.stopped,
            "stopped_code": self.stopped_code,
            "rows": self.rows,
            "done": spans(self.done),
            "writing": spans(self.writing),
            "wrote": self.wrote,
            "outcome": dict(self.outcome),
            "scope": {
                "namespace": self.scope.namespace,
                "mode": self.scope.mode,
                "keys": self.scope.keys,
                "store": dict(self.scope.store),
            },
            "target": dict(self.target),
            "probe": self.probe,
            "ranges": [[keys.after, keys.until, keys.rows] for keys in self.ranges],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Manifest:
        """Read what `to_json` gave; raise ValueError for another version of it."""
        if values["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema_version {values['schema_version']} is not {SCHEMA_VERSION}")
        scope = values["scope"]
        keys = scope["keys"]
        return cls(
            run_id=values["run_id"],
            database=values["database"],
            started=values["started"],
            scope=Scope(
                scope["namespace"],
                scope["mode"],
                None if keys is None else tuple(keys),
                scope["store"],
            ),
            target=values["target"],
            probe=values["probe"],
            ranges=tuple(KeyRange(index, *keys) for index, keys in enumerate(values["ranges"])),
            rows=values["rows"],
            attempt=values["attempt"],
            state=State(values["state"]),
            done=frozenset(_indexes(values["done"])),
            writing=frozenset(_indexes(values["writing"])),
            # Not noted by the first versions.
            wrote=values.get("wrote", values["state"] != State.STAGING),
            stopped=values["stopped"],
            stopped_code=values.get("stopped_code"),
            outcome=values["outcome"],
        )


def spans(indexes: Iterable[int]) -> list[tuple[int, int]]:
    """Whole numbers as runs of them, first and last.

    >>> spans({4, 1, 2, 3, 9})
    [(1, 4), (9, 9)]
    """
    found: list[tuple[int, int]] = []
    for index in sorted(indexes):
        if found and found[-1][1] == index - 1:
            found[-1] = (found[-1][0], index)
        else:
            found.append((index, index))
    return found


def _indexes(values: Iterable[Sequence[int]]) -> Iterator[int]:
    for first, last in values:
        yield from range(first, last + 1)
