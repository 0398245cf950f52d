"""What is printed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import report
from pipeline.plan import Plan, TokenEstimate
from tests.conftest import fake_plan, make_store, memory
from transforms.rows import Cause, Summary

DONE = Summary(embedded=4, replaced=3, kept={Cause.ENCRYPTED: 1}, remaining=1)
MODEL = "all-MiniLM-L6-v2 (8-dim, fake)"


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    old: dict[str, Any] = {"embedding": b"\x01" + bytes(12), "embedding_dim": 3}
    rows = [
        memory("a", **old),
        memory("b"),
        memory("c", namespace="notes", **old),
        memory("d", "", namespace="notes", encrypted_envelope=b"e"),
        memory("e", embedding=b"\x01" + bytes(32), embedding_dim=8),
    ]
    plan = fake_plan(make_store(tmp_path / "m.db", rows))
    return dataclasses.replace(plan, tokens=TokenEstimate(1234, 2, 4, 256))


def test_the_dimensions_are_disclosed_up_front(plan: Plan) -> None:
    assert report.preflight_lines(plan) == [
        "reembed: PRE-FLIGHT — stored embedding dims: [3, 8]; target: 8-dim "
        f"({MODEL}); every scanned row's vector will be REPLACED",
        "reembed: NOTE — stored vectors of dimension 3 can't be compared with the target's 8; "
        "they are replaced all at once, and until then the store stays as it is",
    ]


def test_equal_dimensions_need_no_note(tmp_path: Path) -> None:
    plan = fake_plan(make_store(tmp_path / "m.db", [memory("a")]))

    assert len(report.preflight_lines(plan)) == 1


def test_the_plan_as_json_has_the_originals_keys_and_more_on_one_line(plan: Plan) -> None:
    line = report.plan_json(plan)

    assert "\n" not in line
    assert json.loads(line) == {
        "total_rows": 5,
        "rows_with_embeddings": 3,
        "rows_missing_embeddings": 2,
        "target_model": MODEL,
        "target_dim": 8,
        "backend": "local",
        "schema_version": 1,
        "run_id": plan.run.run_id,
        "database": str(plan.store.path),
        "namespace": None,
        "rows_by_namespace": {"global": 3, "notes": 2},
        "rows_by_stored_dim": {"3": 2, "8": 1},
        "rows_skipped_by_rule": {"encrypted": 1},
        "tokens_estimated": 1234,
        "texts_cut_estimated": 2,
        "rows_sampled": 4,
        "run_directory": str(plan.run.path),
    }


def test_the_plan_as_text(plan: Plan) -> None:
    assert report.plan_text(plan).splitlines() == [
        "reembed plan: total_rows=5 rows_with_embeddings=3 rows_missing_embeddings=2 "
        f"target_model='{MODEL}' target_dim=8 backend=local (dry-run: nothing written)",
        "",
        f"database         {plan.store.path}",
        "rows             5 (4 to embed)",
        "namespaces       global 3, notes 2",
        "stored vectors   3-dim 2, 8-dim 1, no vector 2",
        "skipped by rule  encrypted 1",
        f"target           {MODEL}",
        "tokens           about 1,234 (from a sample of 4 rows); about 2 texts are longer than "
        "the model's 256 tokens and are cut",
        f"staged in        {plan.run.path}",
    ]


def test_the_outcome_as_json_has_the_originals_keys_and_more_on_one_line(plan: Plan) -> None:
    line = report.outcome_json(plan, DONE, 1.5)

    assert "\n" not in line
    assert json.loads(line) == {
        "total": 5,
        "reembedded": 3,
        "skipped": 1,
        "model": MODEL,
        "dim": 8,
        "duration_ms": 1500,
        "schema_version": 1,
        "run_id": plan.run.run_id,
        "skipped_by_cause": {"encrypted": 1},
        "remaining": 1,
    }


def test_the_outcome_as_text(plan: Plan) -> None:
    assert report.outcome_text(plan, DONE, 1.5).splitlines() == [
        f"reembed: 3/5 re-embedded, 1 skipped (model {MODEL}, 8-dim, 1500 ms)",
        "",
        "rows         5",
        "re-embedded  3",
        "skipped      encrypted 1 (previous vectors kept)",
        "remaining    1 (edited while the run went on; run again)",
        "time         1.5 s (2 rows/s)",
        f"model        {MODEL}",
        "dimension    8 (was 3)",
        "next         restart the ai-memory daemon with this model; it keeps its index in memory",
    ]


def test_nothing_to_do_is_said_with_what_there_is(tmp_path: Path) -> None:
    rows = [memory("a"), memory("b", namespace="notes")]
    path = make_store(tmp_path / "m.db", rows)

    assert report.empty_line(fake_plan(path, namespace="note")) == (
        "reembed: the namespace 'note' has no rows; nothing to do "
        "(namespaces that have rows: global, notes)"
    )
    empty = fake_plan(make_store(tmp_path / "empty.db", []))
    assert report.empty_line(empty) == "reembed: the store has no rows; nothing to do"


def test_many_namespaces_are_cut_short_for_people_only(tmp_path: Path) -> None:
    rows = [memory(f"{i:02d}", namespace=f"n{i:02d}") for i in range(13)]
    plan = fake_plan(make_store(tmp_path / "m.db", rows))

    (line,) = [row for row in report.plan_text(plan).splitlines() if row.startswith("namesp")]
    assert line.endswith("and 3 more")
    assert len(json.loads(report.plan_json(plan))["rows_by_namespace"]) == 13
