"""What is printed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from inline_snapshot import snapshot

from reembed.pipeline import report
from reembed.pipeline.options import Options
from reembed.pipeline.outcome import Outcome, outcome_values
from reembed.pipeline.plan import Plan, TokenEstimate
from reembed.pipeline.settings import read_settings
from reembed.transforms.embedders import Access, Target
from reembed.transforms.rows import Cause, Summary
from reembed.transforms.staging import RunDirectory, State
from tests.conftest import FAKE, begin, change, fake_plan, make_store, memory
from tests.test_figures import missing
from tests.wording import wording

DONE = Outcome(
    Summary(embedded=4, replaced=3, kept={Cause.ENCRYPTED: 1}, remaining=1, in_old_space=1), 1.5
)
STAGED = Outcome(Summary(embedded=2, skipped={Cause.REJECTED: 1}), 1.5, staged=3)
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


@pytest.fixture
def served(plan: Plan) -> Plan:
    """The same by a server, at 2 for a million tokens."""
    options = Options(backend="openai", base_url="https://server:8000/v1")
    settings = read_settings(options, {"OPENAI_API_KEY": "sk-secret"}, Path("/"))
    access = Access(settings.server, settings.key_variable)
    target = Target("openai", "a-model", 8, window=512, access=access)
    return dataclasses.replace(plan, target=target, settings=settings, price=2.0)


def told(plan: Plan) -> list[str]:
    """What is said of a plan before its run."""
    return [wording(line, plan.store.path.parent) for line in report.preflight_lines(plan)]


def test_the_dimensions_are_disclosed_up_front(plan: Plan) -> None:
    assert told(plan) == snapshot(
        [
            "reembed: PRE-FLIGHT — stored embedding dims: [3, 8]; target: 8-dim "
            "(all-MiniLM-L6-v2 (8-dim, fake)); every scanned row's vector will be "
            "REPLACED",
            "reembed: NOTE — stored vectors of dimension 3 can't be compared with the "
            "target's 8; they are replaced all at once, and until then the store stays "
            "as it is",
        ]
    )


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
        "store": {"kind": "ai-memory"},
        "namespace": None,
        "rows_by_namespace": {"global": 3, "notes": 2},
        "rows_by_stored_dim": {"3": 2, "8": 1},
        "rows_skipped_by_rule": {"encrypted": 1},
        "rows_hidden": {},
        "tokens_estimated": 1234,
        "texts_cut_estimated": 2,
        "rows_sampled": 4,
        "window": 256,
        "requests_estimated": None,
        "cost_estimated": None,
        "server": None,
        "settings": {
            "db": [str(plan.store.path), "default"],
            "tier": ["semantic", "default"],
            "backend": ["local", "--backend"],
            "model": ["all-MiniLM-L6-v2", "default"],
            "batch": ["100", "default"],
            "egress": ["allow", "default"],
        },
        "run_directory": str(plan.run.path),
        "work_directory": None,
        "mode": "all",
        "rows_meant": 5,
        "rows_to_embed": 4,
        "rows_staged": 0,
        "readers_out_seconds": None,
        "sample_pairs": [],
        "warnings": [],
        "rows_held": None,
        "outside_in_old_space": None,
        "copies": [],
    }


def test_the_plan_as_text(plan: Plan) -> None:
    assert wording(report.plan_text(plan), plan.store.path.parent) == snapshot("""\
reembed plan: total_rows=5 rows_with_embeddings=3 rows_missing_embeddings=2 target_model='all-MiniLM-L6-v2 (8-dim, fake)' target_dim=8 backend=local (dry-run: nothing written)

database         TMP/m.db
store            an ai-memory database
rows             5 (4 to embed)
namespaces       global 3, notes 2
stored vectors   3-dim 2, 8-dim 1, no vector 2
skipped by rule  encrypted 1
target           all-MiniLM-L6-v2 (8-dim, fake)
tokens           about 1,234 (from a sample of 4 rows); about 2 texts are longer than the model's 256 tokens and are cut
staged in        TMP/m.db.reembed/RUN

settings, and where each came from:
db       TMP/m.db (default)
tier     semantic (default)
backend  local (--backend)
model    all-MiniLM-L6-v2 (default)
batch    100 (default)
egress   allow (default)\
""")  # noqa: E501


def test_the_outcome_as_json_has_the_originals_keys_and_more_on_one_line(plan: Plan) -> None:
    line = report.outcome_json(plan, DONE)

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
        "embedded": 4,
        "rows_per_second": 3,
        "remaining": 1,
        "unwritten": 0,
        "in_old_space": 1,
        "rows_held": None,
        "outside_in_old_space": None,
        "copies": [],
        "staged": None,
        "forecast": None,
        "texts_cut": 0,
        "texts_cut_counted": True,
        "tokens": None,
        "cost": None,
        "previous_dims": [3],
        "mode": "all",
        "run_directory": str(plan.run.path),
    }


def test_the_outcome_as_text(plan: Plan) -> None:
    text = report.outcome_text(plan, DONE)
    assert "1500 ms)" in text
    assert "1.5 s (3 rows/s)" in text
    assert wording(text, plan.store.path.parent) == snapshot("""\
reembed: 3/5 re-embedded, 1 skipped (model all-MiniLM-L6-v2 (8-dim, fake), 8-dim, N ms)

rows         5
re-embedded  3
skipped      encrypted 1 (previous vectors kept)
old vectors  1 rows still hold a vector that this run did not make; searches can't compare it with the new ones
remaining    1 rows are not done (named in TMP/m.db.reembed/RUN/remaining.jsonl)
time         N s (N rows/s)
model        all-MiniLM-L6-v2 (8-dim, fake)
dimension    8 (was 3)
way back     reembed rollback puts the previous vectors back
next         run again to finish; until then the store holds vectors of more than one model\
""")  # noqa: E501
    done = dataclasses.replace(DONE, summary=Summary(replaced=3))
    assert report.outcome_text(plan, done).splitlines()[-1] == snapshot(
        "next         restart the ai-memory daemon with this model; it keeps its index in memory"
    )


def test_nothing_to_do_is_said_with_what_there_is(tmp_path: Path) -> None:
    rows = [memory("a"), memory("b", namespace="notes")]
    path = make_store(tmp_path / "m.db", rows)

    assert report.empty_line(fake_plan(path, namespace="note")) == snapshot(
        "WARN the namespace 'note' has no rows; nothing to do (like it: 'notes')"
    )
    empty = fake_plan(make_store(tmp_path / "empty.db", []))
    assert report.empty_line(empty) == snapshot("reembed: the store has no rows; nothing to do")


def test_a_message_names_at_most_ten_namespaces_and_none_at_length(tmp_path: Path) -> None:
    rows = [memory(f"{i:04}", namespace=f"project {i:04} {'x' * 200}") for i in range(1_020)]
    path = make_store(tmp_path / "m.db", rows)

    for name in ("project 0007 " + "x" * 199, "absent"):
        line = report.empty_line(fake_plan(path, namespace=name))
        assert line.count("'project ") == (11 if name != "absent" else 10)
        assert len(line) < 1_500
    assert line.endswith(" and 1,010 more)")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            {"missing_only": True},
            snapshot("reembed: each of the 2 rows has a vector; nothing to do"),
        ),
        (
            {"missing_only": True, "namespace": "notes"},
            snapshot(
                "reembed: each of the 1 rows of the namespace 'notes' has a vector; nothing to do"
            ),
        ),
        (
            {"skip_current_space": True},
            snapshot(
                "reembed: each of the 2 rows has the target's stamp and length; nothing to do"
            ),
        ),
        (
            {"stamp_only": True},
            snapshot(
                "reembed: no row has a vector of the target's length without its stamp; "
                "nothing to do"
            ),
        ),
    ],
    ids=["missing only", "missing in a namespace", "current space", "stamp only"],
)
def test_nothing_to_do_is_told_by_what_was_asked_for(
    flags: dict[str, Any], says: str, tmp_path: Path
) -> None:
    new: dict[str, Any] = {"embedding": b"\1" + bytes(32), "embedding_dim": 8}
    path = make_store(
        tmp_path / "m.db", [memory("a", **new), memory("b", namespace="notes", **new)]
    )
    change(path, "ALTER TABLE memories ADD COLUMN embedding_space TEXT")
    stamp = fake_plan(path).store.space(FAKE.model)
    change(path, f"UPDATE memories SET embedding_space = '{stamp}'")

    plan = fake_plan(path, **flags)

    assert report.empty_line(plan) == says
    assert plan.ranges == ()


def test_many_namespaces_are_cut_short_for_people_only(tmp_path: Path) -> None:
    rows = [memory(f"{i:02d}", namespace=f"n{i:02d}") for i in range(13)]
    plan = fake_plan(make_store(tmp_path / "m.db", rows))

    (line,) = [row for row in report.plan_text(plan).splitlines() if row.startswith("namesp")]
    assert line.endswith("and 3 more")
    assert len(json.loads(report.plan_json(plan))["rows_by_namespace"]) == 13


def test_an_outcome_in_which_nothing_was_replaced_names_no_next_step(plan: Plan) -> None:
    kept = Summary(skipped={Cause.ENCRYPTED: 5}, kept={Cause.ENCRYPTED: 5})
    cleared = dataclasses.replace(plan, rules=dataclasses.replace(plan.rules, clear_skipped=True))

    assert report.outcome_text(plan, Outcome(kept, 61)) == snapshot("""\
reembed: 0/5 re-embedded, 5 skipped (model all-MiniLM-L6-v2 (8-dim, fake), 8-dim, 61000 ms)

rows         5
re-embedded  0
skipped      encrypted 5 (previous vectors kept)
time         1 min 1 s
model        all-MiniLM-L6-v2 (8-dim, fake)
dimension    8 (was 3)\
""")
    assert "encrypted 5 (previous vectors cleared)" in report.outcome_text(
        cleared, Outcome(kept, 1)
    )


def test_rows_that_are_only_staged_are_not_called_re_embedded(plan: Plan) -> None:
    values = json.loads(report.outcome_json(plan, STAGED))

    assert (values["total"], values["reembedded"], values["staged"]) == (5, 0, 3)
    assert values["forecast"] == {"rows": 1, "seconds": 1, "tokens": None, "cost": None}
    assert wording(report.outcome_text(plan, STAGED), plan.store.path.parent) == snapshot("""\
reembed: 3 of 5 rows staged, nothing is replaced yet

staged now  2 embedded, 1 skipped (rejected by the model 1)
time        1.5 s
forecast    1 rows are left, about 1.0 s at this pace
staged in   TMP/m.db.reembed/RUN
next        the same command goes on; without --max-rows it stages the rest and replaces\
""")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            {},
            snapshot(
                [
                    "reembed: PRE-FLIGHT — stored embedding dims: []; target: 8-dim "
                    "(all-MiniLM-L6-v2 (8-dim, fake)); every scanned row's vector will "
                    "be REPLACED"
                ]
            ),
        ),
        (
            {"missing_only": True},
            snapshot(
                [
                    "reembed: PRE-FLIGHT — stored embedding dims: []; target: 8-dim "
                    "(all-MiniLM-L6-v2 (8-dim, fake)); only rows without a vector get one"
                ]
            ),
        ),
        (
            {"skip_current_space": True},
            snapshot(
                [
                    "reembed: PRE-FLIGHT — stored embedding dims: []; target: 8-dim "
                    "(all-MiniLM-L6-v2 (8-dim, fake)); every vector that is not stamped "
                    "as the target's will be REPLACED"
                ]
            ),
        ),
        (
            {"stamp_only": True},
            snapshot(
                [
                    "reembed: PRE-FLIGHT — stored embedding dims: []; target: 8-dim "
                    "(all-MiniLM-L6-v2 (8-dim, fake)); no vector is replaced; those "
                    "without the target's stamp get it"
                ]
            ),
        ),
    ],
    ids=["all", "missing only", "current space", "stamp only"],
)
def test_each_mode_says_up_front_what_becomes_of_the_vectors(
    flags: dict[str, Any], says: list[str], tmp_path: Path
) -> None:
    path = make_store(tmp_path / "m.db", [memory("a")])
    change(path, "ALTER TABLE memories ADD COLUMN embedding_space TEXT")

    assert told(fake_plan(path, **flags)) == says


def test_what_leaves_old_vectors_in_the_store_says_so_up_front(plan: Plan) -> None:
    path = plan.store.path

    assert told(fake_plan(path, max_rows=1, partial=True))[1:] == snapshot(
        [
            "reembed: NOTE — stored vectors of dimension 3 can't be compared with the "
            "target's 8; those of rows that this run is not about stay in the store "
            "beside the new ones"
        ]
    )
    assert told(fake_plan(path, missing_only=True))[1:] == snapshot(
        [
            "reembed: NOTE — 3 rows that this run is not about keep vectors of other "
            "runs or models, which can't be compared with the new ones"
        ]
    )
    assert told(fake_plan(path, namespace="notes"))[1:] == snapshot(
        [
            "reembed: NOTE — stored vectors of dimension 3 can't be compared with the "
            "target's 8; those of this run are replaced all at once, and until then the "
            "store stays as it is",
            "reembed: NOTE — 2 rows that this run is not about keep vectors of other "
            "runs or models, which can't be compared with the new ones",
        ]
    )


def stopped(run: RunDirectory, **changes: Any) -> None:
    """Have a run stop where its manifest says so."""
    run.write_manifest(dataclasses.replace(run.read_manifest(), **changes))


def test_a_run_that_goes_on_says_what_it_found(plan: Plan) -> None:
    first = begin(plan).run
    again = dataclasses.replace(fake_plan(plan.store.path), staged_rows=2)

    assert told(again)[2:] == snapshot(["reembed: 2 of 5 rows are staged; going on (run RUN)"])
    assert first.run_id in report.preflight_lines(again)[2]
    assert json.loads(report.plan_json(again))["rows_staged"] == 2
    assert "staged           2 of them, by an earlier try" in report.plan_text(again).splitlines()


def test_a_run_that_was_replacing_says_how_far_it_came(plan: Plan) -> None:
    first = begin(plan).run
    stopped(first, state=State.REPLACING, writing=frozenset({0}))

    assert told(fake_plan(plan.store.path))[2:] == snapshot(
        [
            "reembed: the replacement by run RUN (to all-MiniLM-L6-v2 (8-dim)) is "
            "incomplete: of ranges 0-0, none hold new vectors, and 0 were being written; "
            "finishing it"
        ]
    )
    stopped(first, done=frozenset({0}), writing=frozenset())
    assert told(fake_plan(plan.store.path))[2:] == snapshot(
        [
            "reembed: run RUN (to all-MiniLM-L6-v2 (8-dim)) has replaced vectors but not "
            "come to its end: rows may be left that were added or edited meanwhile, or "
            "left for later; finishing it"
        ]
    )


def test_runs_that_are_discarded_or_left_waiting_are_named(plan: Plan) -> None:
    first = begin(plan).run

    fresh, other = (
        fake_plan(plan.store.path, **flags) for flags in ({"fresh": True}, {"namespace": "notes"})
    )

    assert told(fresh)[2:] == snapshot(
        ["reembed: starting over; what run RUN has staged is discarded"]
    )
    assert told(other)[3:] == snapshot(
        [
            "reembed: NOTE — run RUN about other rows is not finished; its own command "
            "goes on with it"
        ]
    )
    for line in (report.preflight_lines(fresh)[2], report.preflight_lines(other)[3]):
        assert first.run_id in line


def test_texts_that_leave_this_machine_are_disclosed_up_front(served: Plan) -> None:
    without = read_settings(Options(backend="ollama"), {}, Path("/"))

    assert told(served)[1] == snapshot(
        "reembed: the texts of 4 rows go to server:8000 (with the key in OPENAI_API_KEY)"
    )
    assert told(dataclasses.replace(served, settings=without))[1] == snapshot(
        "reembed: the texts of 4 rows go to server:8000 (no key)"
    )


def test_a_plan_for_a_server_says_what_it_costs_and_where_settings_are_from(served: Plan) -> None:
    line = report.plan_json(served)

    values = json.loads(line)
    assert (values["requests_estimated"], values["cost_estimated"]) == (2, 0.002468)
    assert values["server"] == "https://server:8000"
    assert values["settings"]["backend"] == ["openai", "--backend"]
    assert values["settings"]["base_url"] == ["https://server:8000", "--base-url"]
    assert values["settings"]["key"][0] == "in OPENAI_API_KEY"
    assert "sk-secret" not in line + report.plan_text(served)
    lines = report.plan_text(served).splitlines()
    assert "\n".join(lines[9:13]) == snapshot("""\
tokens           about 1,234 (from a sample of 4 rows, by their length); about 2 texts are longer than the model's 256 tokens and are cut
requests         about 2
cost             0.0025
server           https://server:8000\
""")  # noqa: E501


def test_what_a_server_counted_is_told_with_what_it_cost(served: Plan) -> None:
    outcome = dataclasses.replace(DONE, cut=2, tokens=1_500_000)
    unknown = dataclasses.replace(served.target, window=None)

    values = outcome_values(served, outcome)
    assert (values["tokens"], values["cost"]) == (1_500_000, 3.0)
    assert (values["texts_cut"], values["texts_cut_counted"]) == (2, False)
    values = outcome_values(
        dataclasses.replace(served, target=unknown, price=None), dataclasses.replace(outcome, cut=0)
    )
    assert (values["texts_cut"], values["cost"]) == (None, None)
    lines = report.outcome_text(served, outcome).splitlines()
    some = [line for line in lines if line.startswith(("texts cut", "tokens", "cost"))]
    assert some == snapshot(
        [
            "texts cut    about 2 texts are longer than the model looks at; their ends "
            "don't count (estimated from the server's count)",
            "tokens       1,500,000 by the server's count",
            "cost         3.00",
        ]
    )


def test_what_is_left_is_forecast_from_what_was_staged(served: Plan) -> None:
    outcome = dataclasses.replace(STAGED, tokens=3_000_000)

    assert outcome_values(served, outcome)["forecast"] == {
        "rows": 1,
        "seconds": 1,
        "tokens": 1_000_000,
        "cost": 2.0,
    }
    text = report.outcome_text(served, outcome)
    assert [line for line in text.splitlines() if line.startswith("forecast")] == snapshot(
        ["forecast    1 rows are left, about 1.0 s at this pace, about 1,000,000 tokens, 2.00"]
    )
    nothing = dataclasses.replace(outcome, summary=Summary(), staged=0, tokens=0)
    assert outcome_values(served, nothing)["forecast"] == {
        "rows": 4,
        "seconds": None,
        "tokens": None,
        "cost": None,
    }


def test_texts_that_a_model_of_this_machine_cuts_are_counted(plan: Plan) -> None:
    outcome = dataclasses.replace(DONE, cut=2)

    values = outcome_values(plan, outcome)
    assert (values["texts_cut"], values["texts_cut_counted"]) == (2, True)
    text = report.outcome_text(plan, outcome)
    assert [line for line in text.splitlines() if line.startswith("texts cut")] == snapshot(
        ["texts cut    2 texts are longer than the model looks at; their ends don't count"]
    )


def test_all_figures_of_a_server_are_in_the_json(served: Plan) -> None:
    for outcome in (DONE, STAGED):
        outcome = dataclasses.replace(outcome, cut=17, tokens=6_543_210)
        values = json.loads(report.outcome_json(served, outcome))
        assert missing(report.outcome_text(served, outcome), values) == set()
    assert missing(report.plan_text(served), json.loads(report.plan_json(served))) == set()
