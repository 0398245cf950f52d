"""The outcome of a run, and its values as JSON, the summary and the run directory have them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reembed.pipeline.outside import Outside
from reembed.pipeline.plan import Plan
from reembed.transforms.rows import Skipped, Summary
from reembed.transforms.stores import Copy


@dataclass(frozen=True)
class Outcome:
    """Result of a run that took `seconds`; `staged` rows wait if it was only to stage some.

    Of the rows that are staged, earlier tries' too, `cut` have a text that is longer than the
    model looks at, and a server has counted `tokens` for them. For a run about a part of the
    store, `outside` says what the whole holds afterwards; `copies` are the columns that hold
    vectors as long as the former ones. What `wrote` nothing can't be undone.

    `values` is what `--json` prints. `skipped_rows` got no vector, earlier tries' too; `notes` are
    what was noted of the store and its surroundings before the run.
    """

    summary: Summary
    seconds: float
    staged: int | None = None
    cut: int = 0
    tokens: int = 0
    outside: Outside | None = None
    copies: tuple[Copy, ...] = ()
    wrote: bool = True
    values: Mapping[str, Any] = field(default_factory=dict)
    skipped_rows: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()


def outcome_values(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    """The outcome as JSON has it; also kept in the run directory, and the source of the text."""
    summary, seconds, target = outcome.summary, outcome.seconds, plan.target
    only_staged = outcome.staged is not None
    # What was skipped is kept in the table only once rows are replaced.
    skipped = summary.skipped if only_staged else summary.kept
    return {
        "total": plan.survey.meant if only_staged else summary.total,
        "reembedded": summary.replaced,
        "skipped": sum(skipped.values()),
        "model": str(target),
        "dim": target.dimension,
        "duration_ms": round(seconds * 1000),
        **plan.run.stamp,
        "skipped_by_cause": dict(skipped),
        "embedded": summary.embedded,
        "rows_per_second": round(summary.embedded / seconds) if seconds else None,
        "remaining": summary.remaining,
        "unwritten": summary.unwritten,
        "in_old_space": summary.in_old_space,
        **outside_values(None if only_staged else outcome.outside),
        "copies": copies_values(outcome.copies),
        "staged": outcome.staged,
        "forecast": forecast(plan, outcome) if only_staged else None,
        "texts_cut": outcome.cut if target.window or not target.access else None,
        "texts_cut_counted": target.access is None,
        "tokens": outcome.tokens if target.access else None,
        "cost": cost(plan, outcome.tokens),
        "previous_dims": [dim for dim in plan.survey.dimensions if dim != target.dimension],
        "mode": str(plan.mode),
        "run_directory": str(plan.run.path),
    }


def forecast(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    """Estimate what the remaining rows will take, from the rows that this command embedded.

    `seconds` are None if nothing was embedded now, `tokens` and `cost` where no server counts.
    """
    left = max(0, plan.survey.to_embed - (outcome.staged or 0))
    done = outcome.summary.embedded
    tokens = round(outcome.tokens * left / outcome.staged) if outcome.staged else None
    tokens = tokens if plan.target.access else None
    return {
        "rows": left,
        "seconds": round(outcome.seconds * left / done) if done else None,
        "tokens": tokens,
        "cost": cost(plan, tokens),
    }


def cost(plan: Plan, tokens: int | None) -> float | None:
    """Calculate the cost of tokens, in the currency of the price; None without a price."""
    if plan.price is None or tokens is None or plan.target.access is None:
        return None
    return round(tokens * plan.price / 1e6, 6)


def outside_values(outside: Outside | None) -> dict[str, Any]:
    """Count the vectors of a store, inside and outside a run's selection, for the JSON."""
    if outside is None:
        return {"rows_held": None, "outside_in_old_space": None}
    groups: Counter[tuple[bool, int | None, str | None]] = Counter()
    for held in outside.holdings:
        groups[held.selected, held.dimension, held.stamp] += held.rows
    names = ("selected", "dim", "stamp", "rows")
    held_rows = [dict(zip(names, (*group, rows), strict=True)) for group, rows in groups.items()]
    return {"rows_held": held_rows, "outside_in_old_space": outside.old}


def copies_values(copies: Sequence[Copy]) -> list[dict[str, Any]]:
    """Describe the columns that hold copies of vectors, for the JSON."""
    return [
        {
            "table": copy.table,
            "column": copy.column,
            "dim": copy.dimension,
            "rows": copy.rows,
            "counted": copy.counted,
        }
        for copy in copies
    ]
