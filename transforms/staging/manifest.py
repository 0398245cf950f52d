"""The manifest of a run: what it is about, and how far it has come.

It is written before the first shard, and says `replacing` before the first write to the
store. From then on the run is incomplete until it says `replaced`, or `rolled back`.

It says what was. It is no code, and it never says where anything is sent to or loaded from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from reembed.transforms.rows import KeyRange
from reembed.transforms.staging import schema


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

    def check_next(self, state: State) -> None:
        """Raise ValueError for a state that can't follow: none leads back but those named here."""
        if state is not self and state not in _NEXT[self]:
            raise ValueError(f"a run that is {self} can't become {state}")


_NEXT = {
    State.STAGING: {State.REPLACING},
    # Back to staging only if no row holds what the run wrote: SQLite undid its first transaction.
    State.REPLACING: {State.STAGING, State.REPLACED, State.EMPTY, State.ROLLING_BACK},
    State.REPLACED: {State.ROLLING_BACK},
    State.EMPTY: {State.ROLLING_BACK},
    State.PARTLY_BACK: {State.ROLLING_BACK},
    # To what it was before, if nothing could be put back.
    State.ROLLING_BACK: {
        State.REPLACING,
        State.REPLACED,
        State.EMPTY,
        State.PARTLY_BACK,
        State.ROLLED_BACK,
    },
    State.ROLLED_BACK: set[State](),
}


@dataclass(frozen=True)
class Rules:
    """The rules of a replacement.

    `most_skipped` is the share of the tried rows above which nothing is replaced. With
    `clear_skipped` a skipped row loses its previous vector. With `one_transaction` any number
    of rows is replaced in one.
    """

    most_skipped: float = 0.5
    clear_skipped: bool = False
    one_transaction: bool = False


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
        """Whether there may be rows of which both write the same columns.

        A table can be reached as two kinds of store, whose namespaces are not each other's.
        """
        ours, theirs = self._written, other._written
        alike = self._namespaces == other._namespaces
        apart = None not in (self.namespace, other.namespace) and self.namespace != other.namespace
        return (
            self._table == other._table
            and (not ours or not theirs or bool(ours & theirs))
            and not (alike and apart)
        )

    def shares_vectors(self, other: Scope) -> bool:
        """Whether there may be rows of which both write the same vector."""
        return self.shares_rows(other) and self._column("vector") == other._column("vector")

    @property
    def _table(self) -> str:
        return self._column("table") or _TABLES.get(self._column("kind"), "")

    @property
    def _namespaces(self) -> tuple[str, str]:
        return self._column("kind"), self._column("namespace_column")

    @property
    def _written(self) -> set[str]:
        names = map(self._column, ("vector", "dim_column", "space_column"))
        return {name for name in names if name}

    def _column(self, setting: str) -> str:
        """A name that the store was given, as SQLite compares it; nothing if there is none."""
        return str(self.store.get(setting) or "").lower()


_TABLES = {"ai-memory": "memories", "llm": "embeddings"}
"""The one table of a kind of store."""


@dataclass(frozen=True)
class Manifest:
    """What a run is about, and how far it has come.

    `database` is where the file was when a command last wrote to it; that it was moved since
    makes no other manifest. `target` and `probe` (vectors of fixed texts) say which model it is, so
    that no other one goes on with it. `attempt` names the process that is at work: a worker of an
    earlier one must not write any more. `done` are the ranges that are replaced, `writing` those
    of the transaction that was begun last; `wrote` says that there was one. `order` is a number
    above those of all runs on the database that began to replace before this one; 0 until it does.
    `rules` are those by which it replaces, from then on. `saved` are the files of the backup, each
    with its number of rows, noted before the rows are written. It is None for a run of version
    0.1.0 or, if `listed_late`, was taken from the files that were there when a newer version
    first worked on it. With `marked`, each of its Parquet files says in itself whose it is.
    `stopped` is why the last attempt failed, and `stopped_code` the exit code
    that stands for it.
    """

    run_id: str
    database: str = field(compare=False)
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
    order: int = 0
    rules: Rules | None = None
    saved: Mapping[str, int] | None = field(default_factory=dict)
    listed_late: bool = False
    marked: bool = True
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

    @property
    def age(self) -> tuple[bool, int, str]:
        """The sort key of runs: by when they began to replace; runs still staging come last.

        A run of version 0.1.0 has no number, and then its name says when it was begun.
        """
        return self.state is State.STAGING, self.order, self.run_id

    def changed(self, **changes: Any) -> Manifest:
        """The manifest as it goes on; raise ValueError for a state that can't follow.

        To the files of the backup, those given as `saved` are added; as long as nothing is
        replaced, they take the place of those that an earlier attempt has noted. Those that are
        `needless` are left out.
        """
        self.state.check_next(changes.get("state", self.state))
        if "saved" in changes:
            before = {} if self.state is State.STAGING else self.saved or {}
            needless = changes.pop("needless", ())
            saved = {**before, **changes["saved"]}
            changes["saved"] = {name: rows for name, rows in saved.items() if name not in needless}
        changed = replace(self, **changes)
        return replace(changed, wrote=True) if changed.writing else changed

    def to_json(self) -> dict[str, Any]:
        """The manifest in types that JSON has; `from_json` is its inverse."""
        return {
            "schema_version": schema.SCHEMA_VERSION,
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
            "order": self.order,
            "rules": None if self.rules is None else vars(self.rules),
            "saved": None if self.saved is None else dict(self.saved),
            "listed_late": self.listed_late,
            "marked": self.marked,
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
    def from_json(cls, content: bytes) -> Manifest:
        """Read the JSON text of what `to_json` gave; raise ValueError for anything else."""
        found = schema.decode(content)
        count = len(found.ranges)
        if any(len(vector) != found.target.dimension for vector in found.probe):
            raise ValueError("its probe holds vectors of another length than its target's")
        return cls(
            run_id=found.run_id,
            database=found.database,
            started=found.started,
            scope=Scope(
                found.scope.namespace,
                found.scope.mode,
                None if found.scope.keys is None else tuple(found.scope.keys),
                found.scope.store,
            ),
            target=schema.to_values(found.target),
            probe=found.probe,
            ranges=tuple(KeyRange(index, *keys) for index, keys in enumerate(found.ranges)),
            rows=found.rows,
            attempt=found.attempt,
            state=State(found.state),
            done=frozenset(_indexes(found.done, count)),
            writing=frozenset(_indexes(found.writing, count)),
            wrote=State(found.state) is not State.STAGING if found.wrote is None else found.wrote,
            order=found.order,
            rules=None if found.rules is None else Rules(**schema.to_values(found.rules)),
            saved=found.saved,
            listed_late=found.listed_late,
            marked=found.marked,
            stopped=found.stopped,
            stopped_code=found.stopped_code,
            outcome=found.outcome,
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


def _indexes(values: Iterable[Sequence[int]], count: int) -> Iterator[int]:
    for first, last in values:
        if not 0 <= first <= last < count:
            raise ValueError(f"it has no ranges {first} to {last}, only {count}")
        yield from range(first, last + 1)
