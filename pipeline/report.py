"""A plan and an outcome as text for people and as JSON for programs.

The keys and the first lines are those of the original `reembed` command; more may be added,
these may not go. JSON is one line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.plan import Plan
from pipeline.resume import describe
from pipeline.words import counts, duration, table
from transforms.modes import Mode
from transforms.rows import Summary
from transforms.staging.runs import REMAINING


@dataclass(frozen=True)
class Outcome:
    """What a run did, and for how long; `staged` rows wait where it was only to stage some."""

    summary: Summary
    seconds: float
    staged: int | None = None


def preflight_lines(plan: Plan) -> list[str]:
    """What is disclosed before any work: dimensions, model, and that vectors are replaced."""
    stored, target = sorted(plan.survey.dimensions), plan.target
    lines = [
        f"reembed: PRE-FLIGHT — stored embedding dims: {stored}; target: {target.dimension}-dim "
        f"({target}); {_AFFECTED[plan.mode]}"
    ]
    other = [dimension for dimension in stored if dimension != target.dimension]
    if other and plan.mode is Mode.ALL and not plan.partial:
        lines.append(
            f"reembed: NOTE — stored vectors of dimension {', '.join(map(str, other))} can't be "
            f"compared with the target's {target.dimension}; they are replaced all at once, and "
            "until then the store stays as it is"
        )
    elif other:
        lines.append(
            f"reembed: NOTE — stored vectors of dimension {', '.join(map(str, other))} can't be "
            f"compared with the target's {target.dimension}; those of rows that this run is not "
            "about stay in the store beside the new ones"
        )
    whole = plan.mode in (Mode.ALL, Mode.SKIP_CURRENT_SPACE) and plan.store.namespace is None
    if plan.former and (plan.partial or not whole):
        lines.append(
            f"reembed: NOTE — the last run had another target: {'; '.join(plan.former)}; rows that "
            "this run is not about keep the vectors that it made, which can't be compared"
        )
    if plan.earlier and plan.late:
        lines.append(f"reembed: {describe(plan.run, plan.earlier.manifest)}; finishing it")
    elif plan.earlier:
        lines.append(
            f"reembed: {plan.staged_rows:,} of {plan.survey.meant:,} rows are staged; going on "
            f"(run {plan.run.run_id})"
        )
    for run in plan.discarded:
        lines.append(f"reembed: starting over; what run {run.run_id} has staged is discarded")
    for run in plan.others:
        lines.append(
            f"reembed: NOTE — run {run.run_id} about other rows is not finished; its own command "
            "goes on with it"
        )
    return lines


_AFFECTED = {
    Mode.ALL: "every scanned row's vector will be REPLACED",
    Mode.MISSING_ONLY: "only rows without a vector get one",
    Mode.SKIP_CURRENT_SPACE: "every vector that is not stamped as the target's will be REPLACED",
    Mode.STAMP_ONLY: "no vector is replaced; those without the target's stamp get it",
    Mode.RETRY_SKIPPED: "only the rows that were skipped are tried again",
}


def empty_line(plan: Plan) -> str:
    """Say that there is nothing to do, and what there is instead."""
    if plan.mode is Mode.RETRY_SKIPPED:
        return "reembed: the last run skipped no rows; nothing to try again"
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
            "mode": str(plan.mode),
            "rows_meant": survey.meant,
            "rows_staged": plan.staged_rows,
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
    lines = {
        "database": str(plan.store.path),
        "rows": f"{survey.rows:,} ({survey.to_embed:,} to embed)",
        "staged": f"{plan.staged_rows:,} of them, by an earlier try",
        "namespaces": counts(survey.namespaces),
        "stored vectors": counts(stored | ({"no vector": missing} if missing else {})),
        "skipped by rule": counts(survey.by_rule),
        "target": str(target),
        "tokens": _tokens(plan),
        "staged in": str(plan.run.path),
    }
    if not plan.staged_rows:
        del lines["staged"]
    head = (
        f"reembed plan: total_rows={survey.rows} rows_with_embeddings={survey.with_vector} "
        f"rows_missing_embeddings={missing} target_model='{target}' "
        f"target_dim={target.dimension} backend={plan.backend} (dry-run: nothing written)"
    )
    return head + "\n\n" + table(lines)


def outcome_json(plan: Plan, outcome: Outcome) -> str:
    """What was done, as one line of JSON."""
    return _line(outcome_values(plan, outcome))


def outcome_values(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    """What was done, as JSON has it; also kept in the run directory."""
    summary = outcome.summary
    return {
        "total": plan.survey.meant if outcome.staged is not None else summary.total,
        "reembedded": summary.replaced,
        "skipped": sum(summary.kept.values()),
        "model": str(plan.target),
        "dim": plan.target.dimension,
        "duration_ms": round(outcome.seconds * 1000),
        **plan.run.stamp,
        "skipped_by_cause": dict(summary.kept),
        "remaining": summary.remaining,
        "in_old_space": summary.in_old_space,
        "staged": outcome.staged,
        "mode": str(plan.mode),
        "run_directory": str(plan.run.path),
    }


def outcome_text(plan: Plan, outcome: Outcome) -> str:
    """What was done, for a person."""
    summary, seconds = outcome.summary, outcome.seconds
    target, kept = plan.target, sum(summary.kept.values())
    if outcome.staged is not None:
        return _staged_text(plan, outcome)
    head = (
        f"reembed: {summary.replaced}/{summary.total} re-embedded, {kept} skipped "
        f"(model {target}, {target.dimension}-dim, {round(seconds * 1000)} ms)"
    )
    before = [dimension for dimension in plan.survey.dimensions if dimension != target.dimension]
    rate = f" ({summary.embedded / seconds:,.0f} rows/s)" if summary.embedded and seconds else ""
    vectors = "cleared" if plan.rules.clear_skipped else "kept"
    lines = {
        "rows": f"{summary.total:,}",
        "re-embedded": f"{summary.replaced:,}",
        "skipped": counts(summary.kept) + (f" (previous vectors {vectors})" if kept else ""),
        "old vectors": f"{summary.in_old_space:,} rows still hold a vector that this run did not "
        "make; searches can't compare it with the new ones",
        "remaining": f"{summary.remaining:,} rows are not done "
        f"(named in {plan.run.path / REMAINING}); run again to finish",
        "time": f"{duration(seconds)}{rate}",
        "model": str(target),
        "dimension": f"{target.dimension}"
        + (f" (was {', '.join(map(str, before))})" if before else ""),
        "way back": "reembed rollback puts the previous vectors back",
        "next": "restart the ai-memory daemon with this model; it keeps its index in memory",
    }
    if not summary.in_old_space:
        del lines["old vectors"]
    if not summary.remaining:
        del lines["remaining"]
    if not summary.replaced:
        del lines["next"], lines["way back"]
    return head + "\n\n" + table(lines)


def _staged_text(plan: Plan, outcome: Outcome) -> str:
    """What a run did that was only to stage some rows."""
    skipped = sum(outcome.summary.skipped.values())
    head = (
        f"reembed: {outcome.staged:,} of {plan.survey.meant:,} rows staged, nothing is replaced yet"
    )
    lines = {
        "staged now": f"{outcome.summary.embedded:,} embedded, {skipped:,} skipped",
        "time": duration(outcome.seconds),
        "staged in": str(plan.run.path),
        "next": "the same command goes on; without --max-rows it stages the rest and replaces",
    }
    return head + "\n\n" + table(lines)


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


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False)
