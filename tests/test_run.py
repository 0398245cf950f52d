"""Running a plan."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from pipeline.plan import Plan
from pipeline.run import (
    MOST_LATE_PASSES,
    MOST_PASSES,
    Outcome,
    check_runner,
    parse_beam_options,
    run_plan,
)
from tests.conftest import FAKE, change, fake_plan, files, make_store, memory, select
from transforms import replace as replacing
from transforms.embedders.fake import POISON, FakeEmbedder
from transforms.errors import EmbedderError, RunError, StagingError, StoreError, UsageError
from transforms.rows import Cause, Skipped, Summary
from transforms.staging import RunDirectory
from transforms.stores import AiMemoryStore, Replacement
from transforms.stores.codec import decode


@contextlib.contextmanager
def silent(plan: Plan) -> Iterator[None]:
    yield


def run(plan: Plan, warned: list[Skipped] | None = None, runner: str = "DirectRunner") -> Outcome:
    heard = [] if warned is None else warned
    return run_plan(
        plan,
        runner=runner,
        options=parse_beam_options(runner, []),
        progress=silent,
        warn=heard.append,
    )


def stored(path: Path) -> dict[object, list[float] | None]:
    return {
        key: decode(blob).tolist() if isinstance(blob, bytes) else None
        for key, blob in select(path, "SELECT id, embedding FROM memories")
    }


def test_a_run_replaces_all_and_keeps_only_its_summary(tmp_path: Path) -> None:
    plan = fake_plan(make_store(tmp_path / "m.db", [memory(f"{i}") for i in range(9)]), rows=2)

    outcome = run(plan)

    assert outcome.summary == Summary(embedded=9, replaced=9)
    assert sorted(files(tmp_path)) == [
        "m.db",
        f"m.db.reembed/{plan.run.run_id}/summary.json",
        "m.db.reembed/lock",
    ]
    summary = json.loads((plan.run.path / "summary.json").read_text())
    assert summary == {
        "schema_version": 1,
        "run_id": plan.run.run_id,
        "total": 9,
        "reembedded": 9,
        "skipped": 0,
        "model": "all-MiniLM-L6-v2 (8-dim, fake)",
        "dim": 8,
        "duration_ms": round(outcome.seconds * 1000),
        "skipped_by_cause": {},
        "remaining": 0,
    }


@pytest.mark.parametrize("runner", ["DirectRunner", "BundleBasedDirectRunner"])
def test_every_skipped_row_is_named_once(tmp_path: Path, runner: str) -> None:
    rows = [memory("a"), memory("b", POISON), memory("c", "x" * 70_000), memory("d")]
    warned: list[Skipped] = []

    outcome = run(fake_plan(make_store(tmp_path / "m.db", rows)), warned, runner)

    assert outcome.summary.kept == {Cause.REJECTED: 1, Cause.OVER_CAP: 1}
    assert warned == [
        Skipped("b", Cause.REJECTED, f"the text holds {POISON}"),
        Skipped("c", Cause.OVER_CAP, "content 70008 bytes exceeds embed cap 65536 bytes"),
    ]


def editing(
    monkeypatch: pytest.MonkeyPatch, path: Path, statements: Sequence[tuple[str, ...]]
) -> None:
    """Change the store each time that the replacement begins to look at it."""
    look = replacing.replace_vectors
    left = list(statements)

    def edited(*arguments: object, **more: object) -> Summary:
        if left:
            change(path, *left.pop(0))
        return look(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(replacing, "replace_vectors", edited)


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

    outcome = run(fake_plan(path, rows=2))

    assert outcome.summary == Summary(embedded=1, replaced=9)
    texts = dict(select(path, "SELECT id, title || ' ' || content FROM memories"))
    embedder = FakeEmbedder(8)
    assert stored(path) == {
        key: embedder.embed([str(text)])[0].tolist() for key, text in texts.items()
    }
    assert texts["3"] == "title 3 edited"
    assert "4" not in texts
    assert texts["99"] == "new row"


def edits_of_one_row(count: int) -> list[tuple[str]]:
    return [(f"UPDATE memories SET content = 'v{i}' WHERE id = '3'",) for i in range(count)]


def test_a_row_that_is_edited_until_the_replacement_gets_its_vector_in_a_late_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_store(tmp_path / "m.db", [memory(f"{i}") for i in range(5)])
    editing(monkeypatch, path, edits_of_one_row(MOST_PASSES))

    summary = run(fake_plan(path, rows=2)).summary

    assert (summary.replaced, summary.remaining, summary.total) == (5, 0, 5)
    expected = FakeEmbedder(8).embed([f"title 3 v{MOST_PASSES - 1}"])[0].tolist()
    assert stored(path)["3"] == expected
    assert None not in stored(path).values()


def test_a_row_that_is_edited_between_the_look_and_the_lock_gets_its_vector_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_store(tmp_path / "m.db", [memory(f"{i}") for i in range(5)])
    lock = AiMemoryStore.replacing
    edits = edits_of_one_row(1)

    def late(store: AiMemoryStore) -> AbstractContextManager[Replacement]:
        if edits:
            change(path, *edits.pop())
        return lock(store)

    monkeypatch.setattr(AiMemoryStore, "replacing", late)

    summary = run(fake_plan(path, rows=2)).summary

    assert (summary.replaced, summary.remaining) == (5, 0)
    assert stored(path)["3"] == FakeEmbedder(8).embed(["title 3 v0"])[0].tolist()


def test_a_late_pass_writes_only_the_ranges_that_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_store(tmp_path / "m.db", [memory(f"{i}") for i in range(9)])
    change(
        path,
        "CREATE TABLE written (id TEXT)",
        "CREATE TRIGGER writing AFTER UPDATE OF embedding ON memories "
        "BEGIN INSERT INTO written VALUES (new.id); END",
    )
    editing(monkeypatch, path, edits_of_one_row(MOST_PASSES))

    run(fake_plan(path, rows=2))

    counts = dict(select(path, "SELECT id, count(*) FROM written GROUP BY id"))
    # Row 3 first waits while its range's other row is written, then both are.
    assert counts == {f"{i}": 1 for i in range(9)} | {"2": 2}


def test_a_row_that_is_edited_in_every_pass_is_left_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_store(tmp_path / "m.db", [memory(f"{i}") for i in range(5)])
    editing(monkeypatch, path, edits_of_one_row(MOST_PASSES + MOST_LATE_PASSES))

    summary = run(fake_plan(path, rows=2)).summary

    assert (summary.replaced, summary.remaining, summary.total) == (4, 1, 5)
    assert [key for key, vector in stored(path).items() if vector is None] == ["3"]


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

    with pytest.raises(EmbedderError, match="no embedder for the backend 'nothing'"):
        run(plan)

    assert files(tmp_path) == before


@pytest.mark.parametrize("runner", ["DirectRunner", "BundleBasedDirectRunner"])
def test_a_workers_trouble_reaches_the_user_as_it_was_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runner: str
) -> None:
    path = make_store(tmp_path / "m.db", [memory("a")])
    before = files(tmp_path)

    def full(run: RunDirectory, *arguments: object, **more: object) -> None:
        raise StagingError("the disk is full; make room")

    monkeypatch.setattr(RunDirectory, "write_shard", full)

    with pytest.raises(StagingError, match=r"^the disk is full; make room$"):
        run(fake_plan(path), runner=runner)
    assert files(tmp_path) == before


def test_a_store_that_vanishes_is_named(tmp_path: Path) -> None:
    plan = fake_plan(make_store(tmp_path / "m.db", [memory("a")]))
    plan.store.path.unlink()

    with pytest.raises(StoreError):
        run(plan)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_without_rows_touches_nothing(tmp_path: Path) -> None:
    plan = fake_plan(make_store(tmp_path / "m.db", []))
    before = files(tmp_path)

    assert run(plan) == Outcome(Summary(), 0.0)
    assert files(tmp_path) == before


def test_a_summary_that_can_not_be_kept_does_not_fail_a_run_that_has_replaced_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_store(tmp_path / "m.db", [memory("a")])

    def full(run: RunDirectory, values: object) -> None:
        raise StagingError("the disk is full")

    monkeypatch.setattr(RunDirectory, "finish", full)

    assert run(fake_plan(path)).summary == Summary(embedded=1, replaced=1)
    assert stored(path)["a"] is not None


def test_a_runner_that_fails_is_told_in_one_sentence(tmp_path: Path) -> None:
    path = make_store(tmp_path / "m.db", [memory("a")])
    before = files(tmp_path)
    plan = dataclasses.replace(fake_plan(path), batch="many")  # type: ignore[arg-type]

    with pytest.raises(RunError, match=r"^DirectRunner failed: .*REEMBED_TRACEBACK=1"):
        run(plan)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("runner", "flags", "says"),
    [
        ("FlinkRunner", [], "FlinkRunner needs a job server"),
        ("PortableRunner", [], "PortableRunner needs a job server"),
        ("PortableRunner", ["--job_endpoint=nowhere"], "not 'nowhere'"),
        ("PortableRunner", ["--job_endpoint=127.0.0.1:1"], "no job server answers at 127.0.0.1:1"),
    ],
)
def test_a_runner_without_its_job_server_is_refused(
    runner: str, flags: list[str], says: str
) -> None:
    with pytest.raises((UsageError, RunError), match=says):
        check_runner(runner, parse_beam_options(runner, flags))


def test_a_job_server_that_answers_is_enough() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        flags = [f"--job_endpoint=127.0.0.1:{server.getsockname()[1]}"]
        check_runner("PortableRunner", parse_beam_options("PortableRunner", flags))


@pytest.mark.parametrize("flags", [["--nope=1"], ["--direct_num_workers=x"], ["word"]])
def test_what_beam_does_not_know_is_refused(flags: list[str]) -> None:
    with pytest.raises(UsageError, match="Beam"):
        parse_beam_options("DirectRunner", flags)


def test_beams_own_options_reach_it() -> None:
    options = parse_beam_options("DirectRunner", ["--direct_runner_bundle_repeat=1"])

    assert options.get_all_options()["direct_runner_bundle_repeat"] == 1
