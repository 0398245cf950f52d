"""A plan and an outcome as text for people and as JSON for programs.

The keys and the first lines are those of the original `reembed` command; more may be added,
these may not go. JSON is one line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pipeline.plan import Plan
from transforms.rows import Summary

_SHOWN_NAMESPACES = 10


def preflight_lines(plan: Plan) -> list[str]:
    """What is disclosed before any work: dimensions, model, and that vectors are replaced."""
    stored, target = sorted(plan.survey.dimensions), plan.target
    lines = [
        f"reembed: PRE-FLIGHT — stored embedding dims: {stored}; target: {target.dimension}-dim "
        f"({target}); every scanned row's vector will be REPLACED"
    ]
    other = [dimension for dimension in stored if dimension != target.dimension]
    if other:
        lines.append(
            f"reembed: NOTE — stored vectors of dimension {', '.join(map(str, other))} can't be "
            f"compared with the target's {target.dimension}; they are replaced all at once, and "
            "until then the store stays as it is"
        )
    return lines


def empty_line(plan: Plan) -> str:
    """Say that there is nothing to do, and what there is instead."""
    if plan.store.namespace is None:
        return "reembed: the store has no rows; nothing to do"
    existing = ", ".join(plan.survey.existing) or "none"
    return (
        f"reembed: the namespace {plan.store.namespace!r} has no rows; nothing to do "
        f"(namespaces that have rows: {existing})"
    )


def plan_json(plan: Plan) -> str:
    """The plan as one line of JSON."""
    survey, tokens = plan.survey, plan.tokens
    return _line(
        {
            "total_rows": survey.rows,
            "rows_with_embeddings": survey.with_vector,
            "rows_missing_embeddings": survey.rows - survey.with_vector,
            "target_model": str(plan.target),
            "target_dim": plan.target.dimension,
            "backend": plan.backend,
            **plan.run.stamp,
            "database": str(plan.store.path),
            "namespace": plan.store.namespace,
            "rows_by_namespace": survey.namespaces,
            "rows_by_stored_dim": survey.dimensions,
            "rows_skipped_by_rule": survey.by_rule,
            "tokens_estimated": tokens and tokens.tokens,
            "texts_cut_estimated": tokens and tokens.texts_cut,
            "rows_sampled": tokens and tokens.sampled_rows,
            "run_directory": str(plan.run.path),
        }
    )


def plan_text(plan: Plan) -> str:
    """The plan for a person."""
    survey, target = plan.survey, plan.target
    missing = survey.rows - survey.with_vector
    stored = {f"{dimension}-dim": rows for dimension, rows in survey.dimensions.items()}
    stored = {
        "can't be decoded" if name == "0-dim" else name: rows for name, rows in stored.items()
    }
    head = (
        f"reembed plan: total_rows={survey.rows} rows_with_embeddings={survey.with_vector} "
        f"rows_missing_embeddings={missing} target_model='{target}' "
        f"target_dim={target.dimension} backend={plan.backend} (dry-run: nothing written)"
    )
    return (
        head
        + "\n\n"
        + _table(
            {
                "database": str(plan.store.path),
                "rows": f"{survey.rows:,} ({survey.to_embed:,} to embed)",
                "namespaces": _counts(survey.namespaces),
                "stored vectors": _counts(stored | ({"no vector": missing} if missing else {})),
                "skipped by rule": _counts(survey.by_rule),
                "target": str(target),
                "tokens": _tokens(plan),
                "staged in": str(plan.run.path),
            }
        )
    )


def outcome_json(plan: Plan, summary: Summary, seconds: float) -> str:
    """What was done, as one line of JSON."""
    return _line(outcome_values(plan, summary, seconds))


def outcome_values(plan: Plan, summary: Summary, seconds: float) -> dict[str, Any]:
    """What was done, as JSON has it; also kept in the run directory."""
    return {
        "total": summary.total,
        "reembedded": summary.replaced,
        "skipped": sum(summary.kept.values()),
        "model": str(plan.target),
        "dim": plan.target.dimension,
        "duration_ms": round(seconds * 1000),
        **plan.run.stamp,
        "skipped_by_cause": dict(summary.kept),
        "remaining": summary.remaining,
    }


def outcome_text(plan: Plan, summary: Summary, seconds: float) -> str:
    """What was done, for a person."""
    target, kept = plan.target, sum(summary.kept.values())
    head = (
        f"reembed: {summary.replaced}/{summary.total} re-embedded, {kept} skipped "
        f"(model {target}, {target.dimension}-dim, {round(seconds * 1000)} ms)"
    )
    before = [dimension for dimension in plan.survey.dimensions if dimension != target.dimension]
    rate = f" ({summary.replaced / seconds:,.0f} rows/s)" if summary.replaced and seconds else ""
    lines = {
        "rows": f"{summary.total:,}",
        "re-embedded": f"{summary.replaced:,}",
        "skipped": _counts(summary.kept) + (" (previous vectors kept)" if kept else ""),
        "remaining": f"{summary.remaining:,} (edited while the run went on; run again)",
        "time": f"{_duration(seconds)}{rate}",
        "model": str(target),
        "dimension": f"{target.dimension}"
        + (f" (was {', '.join(map(str, before))})" if before else ""),
        "next": "restart the ai-memory daemon with this model; it keeps its index in memory",
    }
    if not summary.remaining:
        del lines["remaining"]
    if not summary.replaced:
        del lines["next"]
    return head + "\n\n" + _table(lines)


def _tokens(plan: Plan) -> str:
    tokens = plan.tokens
    if tokens is None:
        return "not estimated (no text to sample, or no fast tokenizer)"
    text = f"about {tokens.tokens:,} (from a sample of {tokens.sampled_rows} rows)"
    if tokens.texts_cut:
        text += (
            f"; about {tokens.texts_cut:,} texts are longer than the model's {tokens.window} "
            "tokens and are cut"
        )
    return text


def _duration(seconds: float) -> str:
    """Give a time as a person would.

    >>> _duration(12.34), _duration(185)
    ('12.3 s', '3 min 5 s')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"


def _counts(counts: Mapping[Any, int]) -> str:
    """List counts, the rarest left out if there are many.

    >>> _counts({"notes": 1200, "global": 3})
    'notes 1,200, global 3'
    """
    shown = [f"{name} {count:,}" for name, count in list(counts.items())[:_SHOWN_NAMESPACES]]
    left = len(counts) - len(shown)
    return ", ".join(shown + ([f"and {left} more"] if left else [])) or "none"


def _table(lines: Mapping[str, str]) -> str:
    width = max(map(len, lines)) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in lines.items())


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False)
