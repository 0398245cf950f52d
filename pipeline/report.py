"""A plan and an outcome as text for people and as JSON for programs.

The keys and the first lines are those of the original `reembed` command; more may be added,
these may not go. JSON is one line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reembed.pipeline.outcome import Outcome, copies_values, cost, outcome_values, outside_values
from reembed.pipeline.outside import Outside, by_dimension
from reembed.pipeline.plan import Plan
from reembed.pipeline.resume import describe
from reembed.pipeline.settings import LOCAL
from reembed.pipeline.words import (
    NOTHING_WRITTEN,
    counts,
    duration,
    json_line,
    nearest,
    one_line,
    table,
)
from reembed.transforms.embedders.endpoint import host
from reembed.transforms.hiding import origin
from reembed.transforms.modes import Mode
from reembed.transforms.rows import Summary
from reembed.transforms.staging.runs import REMAINING, SUMMARY
from reembed.transforms.stores import Copy


def preflight_lines(plan: Plan) -> list[str]:
    """What is disclosed before any work: dimensions, model, and that vectors are replaced."""
    stored, target = sorted(plan.survey.dimensions), plan.target
    lines = [
        f"reembed: PRE-FLIGHT — stored embedding dims: {stored}; target: {target.dimension}-dim "
        f"({target}); {_AFFECTED[plan.mode]}"
    ]
    if (access := target.access) is not None:
        key = (
            f"with the key in {plan.settings.key_source}" if plan.settings.key_source else "no key"
        )
        lines.append(
            f"reembed: the texts of {plan.survey.to_embed:,} rows go to {host(access.url)} ({key})"
        )
    if plan.workdir is not None:
        lines.append(
            f"reembed: the texts of {plan.survey.to_embed:,} rows are copied to {plan.workdir} for "
            "the workers, and deleted when all is replaced"
        )
    other = [dimension for dimension in stored if dimension != target.dimension]
    if other and plan.mode is Mode.ALL and not plan.partial:
        those = "they" if plan.outside is None else "those of this run"
        lines.append(
            f"reembed: NOTE — stored vectors of dimension {', '.join(map(str, other))} can't be "
            f"compared with the target's {target.dimension}; {those} are replaced all at once, and "
            "until then the store stays as it is"
        )
    elif other and plan.partial:
        lines.append(
            f"reembed: NOTE — stored vectors of dimension {', '.join(map(str, other))} can't be "
            f"compared with the target's {target.dimension}; those of rows that this run is not "
            "about stay in the store beside the new ones"
        )
    if plan.outside is not None and plan.outside.old:
        lines.append(
            f"reembed: NOTE — {plan.outside.old:,} rows that this run is not about keep vectors of "
            "other runs or models, which can't be compared with the new ones"
        )
    if plan.copies:
        lines.append(f"reembed: NOTE — {_left_copies(plan, plan.copies)}")
    lines += [f"reembed: NOTE — {one_line(note)}" for note in plan.warnings]
    whole = plan.mode in (Mode.ALL, Mode.SKIP_CURRENT_SPACE) and plan.store.namespace is None
    if plan.former and (plan.partial or not whole):
        lines.append(
            f"reembed: NOTE — the last run had another target: {'; '.join(plan.former)}; rows that "
            "this run is not about keep the vectors that it made, which can't be compared"
        )
    if plan.earlier and plan.begun:
        lines.append(f"reembed: {describe(plan.run, plan.earlier.manifest)}; finishing it")
    elif plan.earlier:
        lines.append(
            f"reembed: {plan.staged_rows:,} of {plan.survey.meant:,} rows are staged; going on "
            f"(run {plan.run.run_id})"
        )
    if plan.readers_out is not None:
        lines.append(
            f"reembed: NOTE — all rows are replaced in one transaction, which keeps readers of "
            f"{plan.store.path} out for about {plan.readers_out} s"
        )
    for run in plan.discarded:
        lines.append(f"reembed: starting over; what run {run.run_id} has staged is discarded")
    for run in plan.others:
        lines.append(
            f"reembed: NOTE — run {run.run_id} about other rows is not finished; its own command "
            "goes on with it"
        )
    return lines


_NEXT = {"ai-memory": "restart the ai-memory daemon with this model; it keeps its index in memory"}

_HIDDEN = {False: "--no-hidden leaves them out", True: "they are left out"}

_AFFECTED = {
    Mode.ALL: "every scanned row's vector will be REPLACED",
    Mode.MISSING_ONLY: "only rows without a vector get one",
    Mode.SKIP_CURRENT_SPACE: "every vector that is not stamped as the target's will be REPLACED",
    Mode.STAMP_ONLY: "no vector is replaced; those without the target's stamp get it",
    Mode.RETRY_SKIPPED: "only the rows that were skipped are tried again",
}


def empty_line(plan: Plan) -> str:
    """Say that there is nothing to do, and what there is instead."""
    survey, name = plan.survey, plan.store.namespace
    named = "" if name is None else f"the {plan.store.namespace_word} {name!r}"
    of = named and f" of {named}"
    if plan.mode is Mode.RETRY_SKIPPED:
        return "reembed: the last run skipped no rows; nothing to try again"
    if survey.rows:
        return f"reembed: {_DONE[plan.mode].format(rows=survey.rows, of=of)}; nothing to do"
    if survey.elsewhere and plan.scope.store.get("where"):
        return (
            f"reembed: no row{of} meets --where; the table has {survey.elsewhere:,}; nothing to do"
        )
    if name is None or name in survey.existing:
        return f"reembed: {named or 'the store'} has no rows; nothing to do"
    return f"WARN {named} has no rows; nothing to do ({nearest(name, survey.existing)})"


_DONE = {
    Mode.ALL: "no row{of} can be moved",
    Mode.MISSING_ONLY: "each of the {rows:,} rows{of} has a vector",
    Mode.SKIP_CURRENT_SPACE: "each of the {rows:,} rows{of} has the target's stamp and length",
    Mode.STAMP_ONLY: "no row{of} has a vector of the target's length without its stamp",
}


def plan_json(plan: Plan) -> str:
    """The plan as one line of JSON."""
    return _line(plan_values(plan))


def plan_values(plan: Plan) -> dict[str, Any]:
    """The plan as JSON has it; its text is made of these values."""
    survey, tokens, target = plan.survey, plan.tokens, plan.target
    return {
        "total_rows": survey.rows,
        "rows_with_embeddings": survey.with_vector,
        "rows_missing_embeddings": survey.rows - survey.with_vector,
        "target_model": str(plan.target),
        "target_dim": plan.target.dimension,
        "backend": plan.backend,
        **plan.run.stamp,
        "database": str(plan.store.path),
        "store": plan.store.config,
        "namespace": plan.store.namespace,
        "rows_by_namespace": survey.namespaces,
        "rows_by_stored_dim": survey.dimensions,
        "rows_skipped_by_rule": survey.by_rule,
        "rows_hidden": survey.hidden,
        "tokens_estimated": tokens and tokens.tokens,
        "texts_cut_estimated": tokens and tokens.texts_cut,
        "rows_sampled": tokens and tokens.sampled_rows,
        "window": tokens and tokens.window,
        "requests_estimated": plan.requests if target.access else None,
        "cost_estimated": cost(plan, tokens.tokens if tokens else None),
        "server": target.access and origin(target.access.url),
        "settings": setting_values(plan),
        "run_directory": str(plan.run.path),
        "work_directory": plan.work,
        "mode": str(plan.mode),
        "rows_meant": survey.meant,
        "rows_to_embed": survey.to_embed,
        "rows_staged": plan.staged_rows,
        "readers_out_seconds": plan.readers_out,
        "sample_pairs": plan.sample_pairs,
        "warnings": plan.warnings,
        **outside_values(plan.outside),
        "copies": copies_values(plan.copies),
    }


def plan_text(plan: Plan) -> str:
    """The plan for a person."""
    values, target = plan_values(plan), plan.target
    missing = values["rows_missing_embeddings"]
    stored = {_dimension(dim): rows for dim, rows in values["rows_by_stored_dim"].items()}
    left_out = plan.store.config.get("no_hidden", False)
    pairs = enumerate(values["sample_pairs"], start=1)
    lines = {
        "database": values["database"],
        "store": plan.store.described,
        "rows": f"{values['total_rows']:,} ({values['rows_to_embed']:,} to embed)",
        "staged": f"{values['rows_staged']:,} of them, by an earlier try",
        "namespaces": counts(values["rows_by_namespace"]),
        "stored vectors": counts(stored | ({"no vector": missing} if missing else {})),
        "the others": _others(plan.outside),
        "copies": _copies(plan.copies),
        "skipped by rule": counts(values["rows_skipped_by_rule"]),
        "hidden": f"{counts(values['rows_hidden'])} (ai-memory does not show them; "
        f"{_HIDDEN[left_out]})",
        "target": values["target_model"],
        **{f"sample pair {at}": one_line(f"{key}: {text}") for at, (key, text) in pairs},
        "tokens": _tokens(values, served=target.access is not None),
        "requests": f"about {values['requests_estimated'] or 0:,}",
        "cost": _money(values["cost_estimated"]),
        "server": values["server"],
        "staged in": values["run_directory"],
        "readers": f"kept out for about {values['readers_out_seconds']} s by one transaction",
        "workers": f"read texts and leave vectors in {values['work_directory']}",
    }
    if values["readers_out_seconds"] is None:
        del lines["readers"]
    if plan.work is None:
        del lines["workers"]
    if not any(values["rows_by_namespace"]):
        del lines["namespaces"]
    if not plan.staged_rows:
        del lines["staged"]
    if not values["rows_hidden"]:
        del lines["hidden"]
    if not lines["the others"]:
        del lines["the others"]
    if not plan.copies:
        del lines["copies"]
    if target.access is None:
        del lines["requests"], lines["server"]
    if plan.price is None or target.access is None:
        del lines["cost"]
    head = (
        f"reembed plan: total_rows={values['total_rows']} "
        f"rows_with_embeddings={values['rows_with_embeddings']} "
        f"rows_missing_embeddings={missing} target_model='{target}' "
        f"target_dim={values['target_dim']} backend={plan.backend} (dry-run: nothing written)"
    )
    settings = {n: f"{value} ({source})" for n, (value, source) in values["settings"].items()}
    return f"{head}\n\n{table(lines)}\n\nsettings, and where each came from:\n{table(settings)}"


def outcome_json(plan: Plan, outcome: Outcome) -> str:
    """What was done, as one line of JSON."""
    return _line(outcome_values(plan, outcome))


def outcome_text(plan: Plan, outcome: Outcome) -> str:
    """What was done, for a person."""
    values = outcome_values(plan, outcome)
    if values["staged"] is not None:
        return _staged_text(values)
    kept, before = values["skipped"], values["previous_dims"]
    head = (
        f"reembed: {values['reembedded']}/{values['total']} re-embedded, {kept} skipped "
        f"(model {values['model']}, {values['dim']}-dim, {values['duration_ms']} ms)"
    )
    rate = f" ({values['rows_per_second']:,} rows/s)" if values["embedded"] else ""
    vectors = "cleared" if plan.rules.clear_skipped else "kept"
    lines = {
        "rows": f"{values['total']:,}",
        "re-embedded": f"{values['reembedded']:,}",
        "skipped": counts(values["skipped_by_cause"])
        + (f" (previous vectors {vectors})" if kept else ""),
        "old vectors": f"{values['in_old_space']:,} rows still hold a vector that this run did not "
        "make; searches can't compare it with the new ones",
        "the store": _held(outcome.outside),
        "outside": f"{values['outside_in_old_space'] or 0:,} rows that this run is not about hold "
        "vectors of other runs or models; searches can't compare them with the new ones",
        "copies": _left_copies(plan, outcome.copies),
        "texts cut": _texts_cut(values),
        "tokens": f"{values['tokens'] or 0:,} by the server's count",
        "cost": _money(values["cost"]),
        "remaining": f"{values['remaining']:,} rows are not done "
        f"(named in {plan.run.path / REMAINING})",
        "not written": f"{values['unwritten']:,} of them don't hold what was written to them",
        "time": f"{duration(values['duration_ms'] / 1000)}{rate}",
        "model": values["model"],
        "dimension": f"{values['dim']}"
        + (f" (was {', '.join(map(str, before))})" if before else ""),
        "way back": "reembed rollback puts the previous vectors back",
        "next": _next(plan, values),
    }
    if not values["texts_cut"]:
        del lines["texts cut"]
    if plan.target.access is None:
        del lines["tokens"]
    if plan.price is None or plan.target.access is None:
        del lines["cost"]
    if not values["in_old_space"]:
        del lines["old vectors"]
    if not outcome.copies:
        del lines["copies"]
    if values["rows_held"] is None:
        del lines["the store"]
    if not values["outside_in_old_space"]:
        del lines["outside"]
    if not values["remaining"]:
        del lines["remaining"]
    if not values["unwritten"]:
        del lines["not written"]
    if not values["reembedded"]:
        del lines["next"]
    if not (values["reembedded"] and outcome.wrote):
        del lines["way back"]
    return head + "\n\n" + table(lines)


def incomplete_line(summary: Summary) -> str:
    """Say what keeps a replacement from being complete, and what helps."""
    if summary.unwritten:
        return (
            f"{summary.unwritten} rows don't hold their new vectors, although these were written: "
            "a trigger of the database or another program puts others back; drop or stop it and "
            "run again, or undo the replacement with reembed rollback"
        )
    return (
        f"{summary.remaining} rows remain, so the replacement is incomplete; run again to finish "
        "it, or undo it with reembed rollback"
    )


def _held(outside: Outside | None) -> str:
    """Count the store's vectors, in the namespace or condition of the run and outside of it."""
    if outside is None:
        return ""
    selected = tuple(held for held in outside.holdings if held.selected)
    others = _others(outside)
    return counts(by_dimension(selected)) + (f"; outside the selection {others}" if others else "")


def _others(outside: Outside | None) -> str:
    others = () if outside is None else outside.holdings
    others = tuple(held for held in others if not held.selected)
    return counts(by_dimension(others)) if others else ""


def _copies(copies: Sequence[Copy]) -> str:
    """Name the columns that hold vectors of the stored lengths."""
    return ", ".join(
        f"{one_line(f'{copy.table}.{copy.column}')} "
        f"({'' if copy.counted else 'about '}{copy.rows:,}, {copy.dimension}-dim)"
        for copy in copies
    )


def _left_copies(plan: Plan, copies: Sequence[Copy]) -> str:
    """Say which columns a run leaves as they are, and what follows."""
    said = (
        f"this run does not itself write to {_copies(copies)}: these vectors stay in their former "
        "space"
    )
    if any(copy.dimension == plan.target.dimension for copy in copies):
        said += " (the former model's, though as long as the new ones)"
    said += ", and can't be compared with the new ones"
    archive = [copy for copy in copies if copy.table == "archived_memories"]
    if plan.store.kind != "ai-memory" or len(archive) < len(copies):
        said += "; move a column with flags of its own, or empty or rebuild it if it is a cache"
    if plan.store.kind == "ai-memory" and archive:
        again = "with --skip-current-space" if plan.store.space("") is not None else "again"
        said += (
            "; ai-memory's restore brings an archived memory back with its old vector, so run "
            f"reembed {again} after a restore"
        )
    return said


def _next(plan: Plan, values: Mapping[str, Any]) -> str:
    """The next step after a run: all vectors that are searched together must be comparable."""
    if values["unwritten"]:
        return "drop the trigger or stop the program that changes these back, and run again"
    if values["remaining"]:
        return "run again to finish; until then the store holds vectors of more than one model"
    if values["outside_in_old_space"]:
        scope = plan.scope
        flags = [
            *(["--namespace"] if scope.namespace is not None else []),
            *(["--where"] if scope.store.get("where") else []),
            *([f"--{scope.mode.replace(' ', '-')}"] if scope.mode != Mode.ALL else []),
        ]
        return (
            "the store holds vectors of more than one model: run without "
            f"{' and '.join(flags)} to move the rest, or go back with reembed rollback"
        )
    return _NEXT.get(plan.store.kind, "embed queries with this model, too, from now on")


def _staged_text(values: Mapping[str, Any]) -> str:
    """Summarize a run that was only to stage some rows, for a person."""
    head = (
        f"reembed: {values['staged']:,} of {values['total']:,} rows staged, nothing is replaced yet"
    )
    skipped = f"{values['skipped']:,} skipped"
    if values["skipped"]:
        skipped += f" ({counts(values['skipped_by_cause'])})"
    lines = {
        "staged now": f"{values['embedded']:,} embedded, {skipped}",
        "time": duration(values["duration_ms"] / 1000),
        "texts cut": _texts_cut(values),
        "forecast": _forecast(values["forecast"]),
        "staged in": values["run_directory"],
        "next": "the same command goes on; without --max-rows it stages the rest and replaces",
    }
    if not values["texts_cut"]:
        del lines["texts cut"]
    return head + "\n\n" + table(lines)


def kept_in(plan: Plan, outcome: Outcome) -> str:
    """Say where the result of a run is kept, or that the run wrote nothing to the store."""
    if not plan.ranges or outcome.staged is not None:
        return NOTHING_WRITTEN
    kept = plan.run.path / SUMMARY
    return f"it is kept in {kept}" if kept.exists() else "reembed status says what the store holds"


def _forecast(values: Mapping[str, Any]) -> str:
    parts = [f"{values['rows']:,} rows are left"]
    if values["seconds"] is not None:
        parts.append(f"about {duration(values['seconds'])} at this pace")
    if values["tokens"] is not None:
        parts.append(f"about {values['tokens']:,} tokens")
    if values["cost"] is not None:
        parts.append(_money(values["cost"]))
    return ", ".join(parts)


def setting_values(plan: Plan) -> dict[str, tuple[str, str]]:
    """The settings that decide, by name: the value, never a key, and where it came from."""
    settings = plan.settings
    values = {
        "db": one_line(str(settings.database or plan.store.path)),
        "tier": settings.tier,
        "backend": LOCAL if settings.local else settings.backend,
        "base_url": settings.base_url and origin(settings.base_url),
        "model": settings.model,
        "key": settings.key_source and f"in {settings.key_source}",
        "dim": str(settings.dimension) if settings.dimension else None,
        "batch": str(settings.batch),
        "egress": settings.egress,
    }
    if settings.local:
        del values["base_url"], values["key"]
    return {
        name: (value, settings.sources.get(name, "default"))
        for name, value in values.items()
        if value is not None
    }


def _texts_cut(values: Mapping[str, Any]) -> str:
    about, end = "", ""
    if not values["texts_cut_counted"]:
        about, end = "about ", " (estimated from the server's count)"
    cut = values["texts_cut"] or 0
    return f"{about}{cut:,} texts are longer than the model looks at; their ends don't count{end}"


def _dimension(dimension: int) -> str:
    return f"{dimension}-dim" if dimension else "can't be decoded"


def _money(amount: float | None) -> str:
    """An amount of whatever the price is in.

    >>> _money(0.0000123), _money(12.5), _money(None)
    ('0.000012', '12.50', 'not known')
    """
    if amount is None:
        return "not known"
    return f"{amount:,.2f}" if amount >= 1 else f"{float(f'{amount:.2g}'):.9f}".rstrip("0")


def _tokens(values: Mapping[str, Any], *, served: bool) -> str:
    if values["tokens_estimated"] is None:
        return "not estimated (no text to sample, or no fast tokenizer)"
    how = ", by their length" if served else ""
    text = f"about {values['tokens_estimated']:,} (from a sample of {values['rows_sampled']} rows"
    text += f"{how})"
    if cut := values["texts_cut_estimated"]:
        text += (
            f"; about {cut:,} texts are longer than the model's {values['window']} tokens and are "
            "cut"
        )
    return text


def _line(values: Mapping[str, Any]) -> str:
    return json_line(values)
