"""A pass over the table: what differs from pass to pass of one run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

from reembed.transforms.rows import KeyRange, RangeVectors, StagedRange


class Phase(StrEnum):
    """What a pass may do to the store, once its rows are staged."""

    STAGE = "stage"
    """Nothing: more rows are to be staged by another command."""

    HOLD = "hold"
    """Replace everything, unless rows were added or edited meanwhile."""

    FORCE = "force"
    """Replace everything that is staged, whatever was added or edited meanwhile."""

    FOLLOW_UP = "follow up"
    """The replacement has begun: replace the rows that were added or edited since."""

    PART = "part"
    """The replacement has begun: replace another part that was asked for."""

    @property
    def begun(self) -> bool:
        """Whether the run had begun to replace before this pass."""
        return self in (Phase.FOLLOW_UP, Phase.PART)

    @property
    def forces(self) -> bool:
        """Whether rows that were added or edited meanwhile don't hold the replacement back."""
        return self in (Phase.FORCE, Phase.PART)


@dataclass(frozen=True)
class Pass:
    """One pass of a run: over which ranges, and what comes after.

    Passes are numbered over all attempts at a run, from 1. Of a range no more than its `most`
    rows are embedded. With `retry_skipped` the rows that the model would not take are tried again.
    """

    number: int
    ranges: tuple[KeyRange, ...]
    phase: Phase
    retry_skipped: bool = False


@runtime_checkable  # Beam compares the types of what it is given.
class PassDirectory(Protocol):
    """Where a pass leaves what it makes: a run directory or, for workers far away, a work one."""

    def write_shard(self, vectors: RangeVectors, *, pass_number: int) -> StagedRange:
        """Write what became of a part of a range. Safe to run twice."""

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Write a JSON file. Safe to run twice: the last one stays."""

    def read_json(self, name: str) -> dict[str, Any]:
        """Read what `write_json` wrote."""
