"""Running a plan."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from apache_beam import Pipeline
from apache_beam.runners.runner import PipelineResult, PipelineRunner, PipelineState
from apache_beam.runners.worker import statesampler
from apache_beam.utils.counters import CounterFactory
from inline_snapshot import snapshot

from reembed.pipeline.outcome import Outcome
from reembed.pipeline.plan import Plan
from reembed.pipeline.run import (
    ADDED_OR_EDITED,
    MOST_STALE_PASSES,
    first_pass,
    run_plan,
    staged_rows,
)
from reembed.pipeline.runners import parse_beam_options
from reembed.transforms.embedders.fake import POISON, FakeEmbedder
from reembed.transforms.errors import (
    EmbedderError,
    IncompleteError,
    RunError,
    StagingError,
    StoreError,
    TooManySkippedError,
)
from reembed.transforms.passes import Phase
from reembed.transforms.replacing import replace_vectors
from reembed.transforms.rows import Cause, Skipped, Summary
from reembed.transforms.staging import RunDirectory, Scope, State, lock_database
from reembed.transforms.stores import Replacement
from reembed.transforms.stores.codec import decode
from tests.conftest import (
    FAKE,
    begin,
    change,
    fake_plan,
    files,
    jam,
    kept_files,
    make_store,
    memory,
    plain_pass,
    select,
    unjam,
)
from tests.wording import wording

MOMENT = re.compile(r"\bsince \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC")


@contextlib.contextmanager
def silent(plan: Plan) -> Iterator[None]:
    yield


def run(
    plan: Plan, warned: list[Skipped] | None = None, through_beam: str | None = None
) -> Outcome:
    """Run a plan: each pass as the obvious loop, or by a runner of Beam, which takes longer."""
    heard = [] if warned is None else warned
    runner = through_beam or "DirectRunner"
    with pytest.MonkeyPatch.context() as patch:
        if through_beam is None:
            patch.setattr("reembed.pipeline.run._run_pass", plain_pass)
        return run_plan(
            plan,
            runner=runner,
            options=parse_beam_options(runner, []),
            progress=silent,
            warn=heard.append,
        )


def warnings(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> list[str]:
    """What the program has warned of."""
    records = [record for record in caplog.records if record.name == "reembed"]
    return [wording(record.getMessage(), tmp_path) for record in records]


def stored(path: Path) -> dict[object, list[float] | None]:
    return {
        key: decode(blob).tolist() if isinstance(blob, bytes) else None
        for key, blob in select(path, "SELECT id, embedding FROM memories")
    }


def test_a_run_replaces_all_and_keeps_what_it_did_and_what_was_there_before(
    tmp_path: Path,
) -> None:
    plan = fake_plan(make_store(tmp_path / "m.db", [memory(f"{i}") for i in range(9)]), rows=5)

    outcome = run(plan, through_beam="DirectRunner")

    assert outcome.summary == Summary(embedded=9, replaced=9)
    kept = [name for name in files(plan.run.path) if not name.startswith("backup/")]
    assert kept == ["manifest.json", "manifest.lock", "pass-1.json", "summary.json"]
    assert [path.name[:13] for path in sorted(plan.run.backup.iterdir())] == [
        "0000000.0000.",
        "0000001.0000.",
    ]
    assert sorted(place.name for place in tmp_path.iterdir()) == ["m.db", "m.db.reembed"]
    assert sorted(place.name for place in plan.run.path.parent.iterdir()) == [
        plan.run.run_id,
        "lock",
    ]
    values = {
        "total": 9,
        "reembedded": 9,
        "skipped": 0,
        "model": "all-MiniLM-L6-v2 (8-dim, fake)",
        "dim": 8,
        "duration_ms": round(outcome.seconds * 1000),
        "schema_version": 1,
        "run_id": plan.run.run_id,
        "skipped_by_cause": {},
        "embedded": 9,
        "rows_per_second": round(9 / outcome.seconds),
        "remaining": 0,
        "unwritten": 0,
        "in_old_space": 0,
        "rows_held": None,
        "outside_in_old_space": None,
        "copies": [],
        "staged": None,
        "forecast": None,
        "texts_cut": 0,
        "texts_cut_counted": True,
        "tokens": None,
        "cost": None,
        "previous_dims": [],
        "mode": "all",
        "run_directory": str(plan.run.path),
    }
    assert json.loads((plan.run.path / "summary.json").read_text()) == values
    manifest = plan.run.read_manifest()
    assert (manifest.state, manifest.outcome) == (State.REPLACED, values)
    assert (manifest.scope, manifest.rows, manifest.stopped) == (Scope(), 9, None)
    assert (manifest.done, manifest.writing) == (frozenset({0, 1}), frozenset())


@pytest.mark.system
@pytest.mark.parametrize("runner", ["DirectRunner", "BundleBasedDirectRunner"])
def test_every_skipped_row_is_named_once(tmp_path: Path, runner: str) -> None:
    long = memory("c", "x" * 70_000, namespace="notes")
    path = make_store(tmp_path / "m.db", [memory("a"), memory("b", POISON), long, memory("d")])
    plan = fake_plan(path)
    warned: list[Skipped] = []

    outcome = run(plan, warned, through_beam=runner)

    assert outcome.summary.kept == {Cause.REJECTED: 1, Cause.OVER_CAP: 1}
    why = "content 70008 bytes exceeds embed cap 65536 bytes"
    assert warned == [
        Skipped("b", Cause.REJECTED, f"the text holds {POISON}", "global"),
        Skipped("c", Cause.OVER_CAP, why, "notes"),
    ]
    lines = (plan.run.path / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {
            "id": "b",
            "namespace": "global",
            "cause": "rejected by the model",
            "reason": f"the text holds {POISON}",
        },
        {"id": "c", "namespace": "notes", "cause": "over the byte cap", "reason": why},
    ]


def editing(
    monkeypatch: pytest.MonkeyPatch, path: Path, statements: Sequence[tuple[str, ...]]
) -> None:
    """Change the store each time that the replacement begins to look at it."""
    look = replace_vectors
    left = list(statements)

    def edited(*arguments: object, **more: object) -> Summary:
        if left:
            change(path, *left.pop(0))
        return look(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr("reembed.pipeline.run.replace_vectors", edited)


@pytest.mark.system
def test_rows_edited_and_added_meanwhile_get_the_vectors_of_their_present_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_store(tmp_path / "m.db", [memory(f"{i}") for i in range(9)])
    first = (
        "UPDATE memories SET content = 'edited' WHERE id = '3'",
        "DELETE FROM memories WHERE id = '4'",
    )
    second = (
        "INSERT INTO memories (id, tier, namespace, title, content, created_at, updated_at) "
        "VALUES ('99', 'mid', 'global', 'new', 'row', '', '')",
    )
    editing(monkeypatch, path, [first, second])

    outcome = run(fake_plan(path, rows=2), through_beam="DirectRunner")

    assert outcome.summary == Summary(embedded=11, replaced=9)
    texts = dict(select(path, "SELECT id, title || ' ' || content FROM memories"))
    embedder = FakeEmbedder(8)
    assert stored(path) == {
        key: embedder.embed([str(text)])[0].tolist() for key, text in texts.items()
    }
    assert texts["3"] == "title 3 edited"
    assert "4" not in texts
    assert texts["99"] == "new row"


HELD_PASSES = MOST_STALE_PASSES + 1
"""Passes that hold the replacement back for one row that is edited in each of them."""


def edits_of_one_row(count: int) -> list[tuple[str]]:
    return [(f"UPDATE memories SET content = 'v{i}' WHERE id = '3'",) for i in range(count)]


def vector_of(path: Path, key: str) -> list[float]:
    """The vector of a row's present text."""
    ((text,),) = select(path, f"SELECT title || ' ' || content FROM memories WHERE id = '{key}'")
    vector: list[float] = FakeEmbedder(8).embed([str(text)])[0].tolist()
    return vector


def test_a_row_that_is_edited_between_the_look_and_the_lock_gets_its_vector_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_store(tmp_path / "m.db", [memory(f"{i}") for i in range(5)])
    lock = Replacement.transaction
    edits = edits_of_one_row(1)

    def late(table: Replacement) -> AbstractContextManager[None]:
        if edits:
            change(path, *edits.pop())
        return lock(table)

    monkeypatch.setattr(Replacement, "transaction", late)

    summary = run(fake_plan(path, rows=2)).summary

    assert (summary.replaced, summary.remaining) == (5, 0)
    assert stored(path)["3"] == FakeEmbedder(8).embed(["title 3 v0"])[0].tolist()


def test_a_row_that_is_edited_until_the_replacement_gets_its_vector_alone_in_a_late_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_store(tmp_path / "m.db", [memory(f"{i}") for i in range(5)])
    change(
        path,
        "CREATE TABLE written (id TEXT)",
        "CREATE TRIGGER writing AFTER UPDATE OF embedding ON memories "
        "BEGIN INSERT INTO written VALUES (new.id); END",
    )
    editing(monkeypatch, path, edits_of_one_row(HELD_PASSES + 1))

    summary = run(fake_plan(path, rows=2)).summary

    assert (summary.replaced, summary.remaining, summary.total) == (5, 0, 5)
    expected = FakeEmbedder(8).embed([f"title 3 v{HELD_PASSES}"])[0].tolist()
    assert stored(path)["3"] == expected
    order = [str(key) for (key,) in select(path, "SELECT id FROM written ORDER BY rowid")]
    assert order == ["0", "1", "2", "4", "3"]


def test_a_row_that_is_edited_in_every_pass_is_left_counted_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_store(tmp_path / "m.db", [memory(f"{i}") for i in range(5)])
    plan = fake_plan(path, rows=2)
    with monkeypatch.context() as patch:
        editing(patch, path, edits_of_one_row(100))
        summary = run(plan).summary

    assert (summary.replaced, summary.remaining, summary.total) == (4, 1, 5)
    assert [key for key, vector in stored(path).items() if vector is None] == ["3"]
    # Held back, then replaced all the same, then tried as often again.
    passes = HELD_PASSES + 1 + MOST_STALE_PASSES
    assert select(path, "SELECT content FROM memories WHERE id = '3'") == [(f"v{passes - 1}",)]
    assert summary.embedded == 5 + passes - 1
    assert plan.run.read_lines("remaining.jsonl") == [{"id": "3", "reason": ADDED_OR_EDITED}]
    assert warnings(caplog, tmp_path) == snapshot(
        ["[RUN] row 3 remains: it was added or edited too late"]
    )
    manifest = plan.run.read_manifest()
    assert (manifest.state, manifest.outcome["remaining"]) == (State.REPLACING, 1)
    assert not (plan.run.path / "summary.json").exists()

    # The edits have come to their end, so the next run leaves no row.
    again = fake_plan(path, rows=2)
    summary = run(again).summary
    assert (again.run, again.begun) == (plan.run, True)
    assert (summary.embedded, summary.replaced, summary.remaining) == (1, 5, 0)
    assert stored(path)["3"] == vector_of(path, "3")
    assert plan.run.read_manifest().state is State.REPLACED
    assert not (plan.run.path / "remaining.jsonl").exists()


def test_fewer_rows_left_in_each_pass_hold_the_replacement_back_for_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_store(tmp_path / "m.db", [memory(f"{i}") for i in range(5)])
    edits = [
        tuple(f"UPDATE memories SET content = 'v{left}' WHERE id = '{i}'" for i in range(left))
        for left in range(5, 0, -1)
    ]
    editing(monkeypatch, path, edits)
    counts: list[object] = []
    wait = Replacement.transaction

    def counted(table: Replacement) -> AbstractContextManager[None]:
        counts.append(select(path, "SELECT count(embedding) FROM memories"))
        return wait(table)

    monkeypatch.setattr(Replacement, "transaction", counted)

    summary = run(fake_plan(path, rows=2)).summary

    # More passes than are waited for in vain, and still all at once.
    assert len(edits) > HELD_PASSES
    assert counts == [[(0,)]]
    assert (summary.replaced, summary.remaining) == (5, 0)
    assert summary.embedded == 5 + sum(range(1, 6))


def test_a_row_that_is_skipped_and_then_mended_is_not_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_store(tmp_path / "m.db", [memory("a"), memory("b", POISON)])
    editing(monkeypatch, path, [("UPDATE memories SET content = 'good' WHERE id = 'b'",)])
    warned: list[Skipped] = []

    summary = run(fake_plan(path), warned).summary

    assert (summary.replaced, dict(summary.kept), warned) == (2, {}, [])


def test_a_store_in_which_all_rows_are_skipped_by_rule_is_no_failure(tmp_path: Path) -> None:
    old = b"\x01" + bytes(8)
    rows = [memory(key, "", encrypted_envelope=b"e", embedding=old) for key in "abc"]
    path = make_store(tmp_path / "m.db", rows)
    warned: list[Skipped] = []

    summary = run(fake_plan(path), warned).summary

    assert (summary.replaced, summary.kept) == (0, {Cause.ENCRYPTED: 3})
    assert [row.key for row in warned] == ["a", "b", "c"]
    assert select(path, "SELECT DISTINCT embedding FROM memories") == [(old,)]


def test_an_embedder_that_can_not_be_built_leaves_nothing(tmp_path: Path) -> None:
    path = make_store(tmp_path / "m.db", [memory("a")])
    plan = dataclasses.replace(fake_plan(path), target=dataclasses.replace(FAKE, backend="nothing"))
    before = files(tmp_path)

    with pytest.raises(EmbedderError) as refused:
        run(plan)

    assert wording(refused, tmp_path) == snapshot("there is no embedder for the backend 'nothing'")
    assert files(tmp_path) == before


@pytest.mark.system
@pytest.mark.parametrize("runner", ["DirectRunner", "BundleBasedDirectRunner"])
def test_a_workers_trouble_reaches_the_user_as_it_was_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runner: str
) -> None:
    path = make_store(tmp_path / "m.db", [memory("a")])
    before = files(tmp_path)

    def full(run: RunDirectory, *arguments: object, **more: object) -> None:
        raise StagingError("the disk is full; make room")

    monkeypatch.setattr(RunDirectory, "write_shard", full)

    with pytest.raises(StagingError) as failed:
        run(fake_plan(path), through_beam=runner)
    assert str(failed.value) == "the disk is full; make room"
    assert files(tmp_path) == before


def test_a_store_that_vanishes_is_named(tmp_path: Path) -> None:
    plan = fake_plan(make_store(tmp_path / "m.db", [memory("a")]))
    plan.store.path.unlink()

    with pytest.raises(StoreError) as failed:
        run(plan)
    assert wording(failed, tmp_path) == snapshot(
        "TMP/m.db can't be written; make the file and its directory writable and run again"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_plan_without_rows_touches_nothing(tmp_path: Path) -> None:
    plan = fake_plan(make_store(tmp_path / "m.db", []))
    before = files(tmp_path)

    assert run(plan) == Outcome(Summary(), 0.0)
    assert files(tmp_path) == before


def test_a_summary_that_can_not_be_kept_does_not_fail_a_run_that_has_replaced_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_store(tmp_path / "m.db", [memory("a")])
    write_json = RunDirectory.write_json

    def full(run: RunDirectory, name: str, values: Mapping[str, object]) -> None:
        if name == "summary.json":
            raise StagingError("the disk is full")
        write_json(run, name, values)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "write_json", full)
        first = fake_plan(path)
        assert run(first).summary == Summary(embedded=1, replaced=1)

    assert stored(path)["a"] is not None
    assert warnings(caplog, tmp_path) == snapshot(["[RUN] no summary is kept: the disk is full"])
    # The run is not known to have ended, so the next one looks and says so.
    assert first.run.read_manifest().state is State.REPLACING
    assert run(fake_plan(path)).summary == Summary(replaced=1)
    assert first.run.read_manifest().state is State.REPLACED


# What a run that fails leaves.


class Cancelled(PipelineResult):
    def __init__(self) -> None:
        super().__init__(PipelineState.CANCELLED)  # type: ignore[no-untyped-call]

    def wait_until_finish(self, duration: int | None = None) -> str:
        state: str = PipelineState.CANCELLED
        return state


class Cancelling(PipelineRunner):
    """A runner whose jobs somebody cancels."""

    def run_pipeline(self, pipeline: Pipeline, options: object) -> PipelineResult:
        return Cancelled()


def test_no_thread_of_beam_outlives_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(threading.enumerate())

    class Interrupted(PipelineRunner):
        def run_pipeline(self, pipeline: Pipeline, options: object) -> PipelineResult:
            sampler = statesampler.StateSampler("interrupted", CounterFactory())
            sampler.start()
            sampler.started = False  # As if it was interrupted in there.
            assert len(set(threading.enumerate()) - before) == 1
            raise KeyboardInterrupt

    monkeypatch.setattr("reembed.pipeline.runners._make_runner", lambda name: Interrupted())
    with pytest.raises(KeyboardInterrupt):
        run(fake_plan(make_store(tmp_path / "m.db", [memory("a")])), through_beam="DirectRunner")

    assert set(threading.enumerate()) == before


def test_a_job_that_was_cancelled_is_not_taken_for_one_that_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_store(tmp_path / "m.db", [memory("a")])
    before = path.read_bytes()
    monkeypatch.setattr("reembed.pipeline.runners._make_runner", lambda name: Cancelling())

    with pytest.raises(RunError) as failed:
        run(fake_plan(path), through_beam="DirectRunner")

    assert wording(failed, tmp_path) == snapshot(
        "the job ended as CANCELLED, as somebody or something has asked DirectRunner "
        "for; what is staged stays: run again to go on"
    )
    assert path.read_bytes() == before


def failing_shard(monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    """Let the shard of one range fail to be written."""
    write_shard = RunDirectory.write_shard

    def fail(run: RunDirectory, vectors: Any, *, pass_number: int) -> object:
        if vectors.range.index == index:
            raise StagingError("the disk is full; make room")
        return write_shard(run, vectors, pass_number=pass_number)

    monkeypatch.setattr(RunDirectory, "write_shard", fail)


@pytest.mark.system
def test_what_was_staged_before_a_failure_stays_and_the_next_run_embeds_only_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_store(tmp_path / "m.db", [memory(f"{i}") for i in range(9)])
    before = path.read_bytes()
    first = fake_plan(path, rows=2)
    with monkeypatch.context() as patch:
        failing_shard(patch, 2)
        with pytest.raises(StagingError, match=r"^the disk is full; make room$"):
            run(first, through_beam="DirectRunner")

    staged = first.run.staged_rows()
    assert 0 < staged < 9
    manifest = first.run.read_manifest()
    assert (manifest.state, manifest.stopped) == (State.STAGING, "the disk is full; make room")
    assert path.read_bytes() == before

    plan = fake_plan(path, rows=2)
    assert (plan.run, plan.staged_rows) == (first.run, staged)
    assert run(plan).summary == Summary(embedded=9 - staged, replaced=9)
    assert plan.run.read_manifest().stopped is None


@pytest.mark.parametrize(
    ("most", "poisoned", "refused"),
    [
        (0.5, 2, None),
        (
            0.5,
            3,
            snapshot(
                "3 of 4 rows could not be embedded (3 rejected by the model), and "
                "--max-skipped allows 0.5 of them and never all; nothing is replaced "
                "now, and what is staged stays: check the model, then run again with "
                "--retry-skipped, or with a higher --max-skipped"
            ),
        ),
        (
            0,
            1,
            snapshot(
                "1 of 4 rows could not be embedded (1 rejected by the model), and "
                "--max-skipped allows 0 of them and never all; nothing is replaced now, "
                "and what is staged stays: check the model, then run again with "
                "--retry-skipped, or with a higher --max-skipped"
            ),
        ),
        (
            1,
            4,
            snapshot(
                "4 of 4 rows could not be embedded (4 rejected by the model), and "
                "--max-skipped allows 1 of them and never all; nothing is replaced now, "
                "and what is staged stays: check the model, then run again with "
                "--retry-skipped, or with a higher --max-skipped"
            ),
        ),
    ],
    ids=["half", "more than half", "one", "all"],
)
def test_too_many_rows_that_failed_replace_nothing(
    most: float, poisoned: int, refused: str | None, tmp_path: Path
) -> None:
    rows = [memory(f"{i}", POISON if i < poisoned else "good") for i in range(4)]
    sealed = [memory(f"s{i}", "", encrypted_envelope=b"e") for i in range(9)]
    path = make_store(tmp_path / "m.db", [*rows, *sealed])
    before = path.read_bytes()
    plan = fake_plan(path, max_skipped=most)
    warned: list[Skipped] = []

    if refused is None:
        assert run(plan, warned).summary.replaced == 4 - poisoned
        return
    with pytest.raises(TooManySkippedError) as failed:
        run(plan, warned)

    assert wording(failed, tmp_path) == refused
    assert path.read_bytes() == before
    # The rows are named and what is staged stays, so that they can be tried again.
    assert len(warned) == len(plan.run.read_lines("skipped.jsonl")) == poisoned + 9
    assert plan.run.staged_rows() == 13
    change(path, "UPDATE memories SET content = 'mended' WHERE id < '4'")
    assert run(fake_plan(path, max_skipped=most)).summary.replaced == 4


def test_rows_that_the_model_rejected_are_offered_again_only_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_store(tmp_path / "m.db", [memory("a", POISON), memory("b", POISON), memory("c")])
    with pytest.raises(TooManySkippedError) as failed:
        run(fake_plan(path))
    said = wording(failed, tmp_path)
    monkeypatch.setattr("reembed.transforms.embedders.fake.POISON", "nothing is refused any more")

    with pytest.raises(TooManySkippedError) as failed_again:
        run(fake_plan(path))
    assert (
        wording(failed_again, tmp_path)
        == said
        == snapshot(
            "2 of 3 rows could not be embedded (2 rejected by the model), and "
            "--max-skipped allows 0.5 of them and never all; nothing is replaced now, "
            "and what is staged stays: check the model, then run again with "
            "--retry-skipped, or with a higher --max-skipped"
        )
    )
    summary = run(fake_plan(path, retry_skipped=True)).summary

    assert summary == Summary(embedded=2, replaced=3)


def test_a_skipped_rows_old_vector_is_kept_or_cleared_as_asked(tmp_path: Path) -> None:
    old: dict[str, Any] = {"embedding": b"\x01" + bytes(8), "embedding_dim": 2}
    rows = [memory("a", **old), memory("b", POISON, **old)]
    kept, cleared = (make_store(tmp_path / name, rows) for name in ("kept.db", "cleared.db"))

    one = run(fake_plan(kept)).summary
    other = run(fake_plan(cleared, skipped="clear")).summary

    assert (one.kept, one.in_old_space) == ({Cause.REJECTED: 1}, 1)
    assert (other.kept, other.in_old_space) == ({Cause.REJECTED: 1}, 0)
    query = "SELECT embedding, embedding_dim FROM memories WHERE id = 'b'"
    assert select(kept, query) == [(old["embedding"], 2)]
    assert select(cleared, query) == [(None, None)]


def test_a_transaction_that_failed_leaves_the_store_as_it_was_and_says_how_to_go_on(
    tmp_path: Path,
) -> None:
    path = make_store(tmp_path / "m.db", [memory(f"{i}") for i in range(9)])
    jam(path, "5")
    plan = fake_plan(path, rows=2)

    with pytest.raises(IncompleteError) as failed:
        run(plan)

    assert wording(failed, tmp_path) == snapshot(
        "SQLite can't work with TMP/m.db: jammed; look into it and run again; the "
        "replacement by run RUN (to all-MiniLM-L6-v2 (8-dim)) is incomplete: of ranges "
        "0-4, none hold new vectors, and 0-4 were being written: run again to finish it, "
        "or undo it with reembed rollback"
    )
    assert set(stored(path).values()) == {None}
    manifest = plan.run.read_manifest()
    assert (manifest.state, manifest.done) == (State.REPLACING, frozenset())
    assert wording(str(manifest.stopped), tmp_path) == snapshot(
        "SQLite can't work with TMP/m.db: jammed; look into it and run again"
    )
    unjam(path)
    assert run(fake_plan(path)).summary == Summary(replaced=9)


def test_a_run_that_another_process_has_taken_over_writes_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_store(tmp_path / "m.db", [memory("a")])
    plan = fake_plan(path)
    look = replace_vectors

    def overtaken(*arguments: object, **more: object) -> Summary:
        manifest = plan.run.read_manifest()
        plan.run.write_manifest(dataclasses.replace(manifest, attempt="another"))
        return look(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr("reembed.pipeline.run.replace_vectors", overtaken)

    with pytest.raises(RunError) as failed:
        run(plan)

    assert wording(failed, tmp_path) == snapshot(
        "another process has taken over the run RUN; this one stops and writes nothing "
        "more, and reembed status says what the store holds"
    )
    assert stored(path) == {"a": None}
    manifest = plan.run.read_manifest()
    assert (manifest.attempt, manifest.state, manifest.stopped) == ("another", State.STAGING, None)


def test_a_plan_that_is_older_than_what_another_process_did_is_refused(tmp_path: Path) -> None:
    path = make_store(tmp_path / "m.db", [memory(f"{i}") for i in range(4)])
    begin(fake_plan(path), probe=FakeEmbedder(8).embed(["x"]).tolist())
    stale = fake_plan(path)
    run_directory = stale.run
    run_directory.write_manifest(
        dataclasses.replace(run_directory.read_manifest(), attempt="another")
    )
    before = kept_files(tmp_path)

    with pytest.raises(RunError) as refused:
        run(stale)
    assert wording(refused, tmp_path) == snapshot(
        "another process has worked on the run RUN; run again"
    )
    assert kept_files(tmp_path) == before


def test_a_second_run_is_told_the_process_and_the_start_of_the_first(tmp_path: Path) -> None:
    path = make_store(tmp_path / "m.db", [memory("a")])
    plan = fake_plan(path)

    with lock_database(path), pytest.raises(StagingError) as refused:
        run(plan)

    said = MOMENT.sub("since THEN", wording(refused, tmp_path))
    assert said == snapshot(
        "another run is at work on TMP/m.db (process N, since THEN); wait for it to end"
    )
    assert f"process {os.getpid()}," in str(refused.value)
    assert stored(path) == {"a": None}


# A part of the rows at a time.


@pytest.mark.parametrize("most", [4, 8, 9])
def test_rows_are_staged_a_part_at_a_time_and_replaced_when_all_are(
    most: int, tmp_path: Path
) -> None:
    path = make_store(tmp_path / "m.db", [memory(f"{i}") for i in range(9)])
    before = path.read_bytes()
    first = fake_plan(path, rows=2, max_rows=most)

    staged = []
    for calls in range(1, 10):
        outcome = run(fake_plan(path, rows=2, max_rows=most) if calls > 1 else first)
        if outcome.staged is None:
            break
        staged.append(outcome.staged)
        assert outcome.summary == Summary(embedded=most)
        assert path.read_bytes() == before

    assert staged == list(range(most, 9, most))
    assert outcome.summary.replaced == 9
    assert {key: vector_of(path, str(key)) for key in stored(path)} == stored(path)
    assert first.run.read_manifest().state is State.REPLACED


def test_a_part_of_the_rows_is_replaced_at_once_where_that_is_asked_for(tmp_path: Path) -> None:
    path = make_store(tmp_path / "m.db", [memory(f"{i}") for i in range(9)])

    summary = run(fake_plan(path, rows=2, max_rows=3, partial=True)).summary

    assert (summary.embedded, summary.replaced, summary.remaining) == (3, 3, 6)
    assert [key for key, vector in stored(path).items() if vector] == ["0", "1", "2"]
    summary = run(fake_plan(path, rows=2)).summary
    assert (summary.embedded, summary.replaced, summary.remaining) == (6, 9, 0)


def test_the_limit_is_spread_over_the_ranges_in_their_order(tmp_path: Path) -> None:
    path = make_store(tmp_path / "m.db", [memory(f"{i}") for i in range(9)])
    limited = begin(fake_plan(path, rows=2, max_rows=5))

    first, complete = first_pass(limited)

    assert [(keys.index, keys.most) for keys in first.ranges] == [(0, 5), (1, 3), (2, 1)]
    assert (complete, first.phase) == (False, Phase.STAGE)
    partial, complete = first_pass(dataclasses.replace(limited, partial=True))
    assert (partial, complete) == (dataclasses.replace(first, phase=Phase.FORCE), False)
    for whole in (dataclasses.replace(limited, most_rows=most) for most in (9, None)):
        found, complete = first_pass(whole)
        assert (found.number, found.phase, complete) == (1, Phase.HOLD, True)
        assert [keys.index for keys in found.ranges] == list(range(5))


def test_a_row_that_was_skipped_twice_counts_by_the_last_time(tmp_path: Path) -> None:
    path = make_store(tmp_path / "m.db", [memory("a", POISON), memory("b"), memory("c")])
    plan = fake_plan(path, max_rows=2)
    run(plan)
    change(path, "UPDATE memories SET content = 'mended' WHERE id = 'a'")
    run(fake_plan(path, max_rows=1))

    assert {row.key: row.skipped for row in staged_rows(plan)} == {"a": None, "b": None}


# Runners.


def test_a_runner_that_fails_is_told_in_one_sentence(tmp_path: Path) -> None:
    path = make_store(tmp_path / "m.db", [memory("a")])
    before = files(tmp_path)
    plan = dataclasses.replace(fake_plan(path), pause="soon")  # type: ignore[arg-type]

    # What Beam says in between is its own.
    with pytest.raises(RunError, match=r"^DirectRunner failed: .*REEMBED_TRACEBACK=1"):
        run(plan, through_beam="DirectRunner")
    assert files(tmp_path) == before
