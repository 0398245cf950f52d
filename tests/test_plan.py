"""The plan."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inline_snapshot import snapshot

from reembed.pipeline.options import Options
from reembed.pipeline.plan import Plan, holding, make_plan, whole_batches
from reembed.pipeline.settings import read_settings
from reembed.transforms.embed import embed_rows
from reembed.transforms.embedders import Access, Target
from reembed.transforms.embedders.fake import FakeEmbedder
from reembed.transforms.errors import (
    EmbedderError,
    IncompleteError,
    RunError,
    StagingError,
    StampError,
    StoreError,
    UsageError,
)
from reembed.transforms.modes import Mode
from reembed.transforms.read import StoreRows
from reembed.transforms.replacing import ReplaceJob
from reembed.transforms.rows import Cause, KeyRange
from reembed.transforms.staging import Manifest, Rules, Scope, State
from tests.conftest import FAKE, begin, clean_environment, fake_plan, files, make_store, memory
from tests.wording import wording


def plan_for(path: Path, options: Options | None = None) -> Plan:
    options = options or Options()
    settings = read_settings(options, {"HOME": str(path.parent)}, path.parent)
    return make_plan(path, settings, options)


def stage(plan: Plan, ranges: int) -> Plan:
    """Stage the first ranges of a plan, as a run does that is cut off after them."""
    for keys in plan.ranges[:ranges]:
        for part in StoreRows(plan.store, plan.run, 1).read_parts(keys):
            vectors = embed_rows(part, FakeEmbedder(8), dimension=8, batch=9)
            plan.run.write_shard(vectors, pass_number=1)
    return plan


def note(plan: Plan, **changes: Any) -> None:
    """Note something in the manifest of a plan's run."""
    plan.run.write_manifest(replace(plan.run.read_manifest(), **changes))


def test_a_plan_says_what_is_there_and_what_it_becomes(tmp_path: Path) -> None:
    rows = [
        memory(f"{i:04d}", "two words " * (i + 1), title="t", namespace=f"n{i}") for i in range(200)
    ]
    path = make_store(tmp_path / "m.db", rows)
    before = files(tmp_path)

    plan = plan_for(path)

    assert plan.target == Target(
        "local", "all-MiniLM-L6-v2", 384, "all-MiniLM-L6-v2", "", 256, normalized=True
    )
    assert (plan.backend, plan.batch, plan.survey.rows) == ("ollama", 100, 200)
    assert plan.ranges == (KeyRange(0, None, None, 200),)
    assert plan.run.path.parent == tmp_path / "m.db.reembed"
    assert plan.tokens is not None
    assert plan.tokens.window == 256
    assert plan.tokens.sampled_rows == 200
    # The title, two special tokens and two for each two words; 256 at the most.
    counts = [3 + 2 * (i + 1) for i in range(200)]
    assert plan.tokens.tokens == sum(min(count, 256) for count in counts)
    assert plan.tokens.texts_cut == sum(count > 256 for count in counts)
    assert files(tmp_path) == before


def test_the_batch_never_changes_the_ranges(tmp_path: Path) -> None:
    path = make_store(tmp_path / "m.db", [memory(f"{i:04d}") for i in range(150)])

    plans = [plan_for(path, Options(batch=batch)) for batch in (0, 1, 7, 10_000)]

    assert {plan.ranges for plan in plans} == {plans[0].ranges}
    assert [plan.batch for plan in plans] == [100, 1, 7, 10_000]


def test_no_rows_make_no_ranges_and_no_estimate(tmp_path: Path) -> None:
    plan = plan_for(make_store(tmp_path / "m.db", []))

    assert (plan.ranges, plan.tokens) == ((), None)


def test_another_dimension_than_the_models_is_refused(tmp_path: Path) -> None:
    path = make_store(tmp_path / "m.db", [memory("a")])

    with pytest.raises(EmbedderError) as refused:
        plan_for(path, Options(dim=768))
    assert wording(refused, tmp_path) == snapshot(
        "all-MiniLM-L6-v2 makes vectors of 384 numbers, but 768 were asked for; correct "
        "--dim or the configured dimension, or choose another model"
    )


def test_a_served_model_of_a_known_dimension_is_planned_without_a_word_to_its_server(
    tmp_path: Path,
) -> None:
    path = make_store(tmp_path / "m.db", [memory(f"{i:04d}") for i in range(150)])
    options = Options(backend="openai", model="text-embedding-3-small", price_per_million=0.02)
    before = files(tmp_path)

    plan = plan_for(path, options)

    assert plan.target == Target(
        "openai",
        "text-embedding-3-small",
        1536,
        window=8192,
        access=Access("https://api.openai.com/v1"),
    )
    assert (plan.backend, plan.price, plan.requests) == ("openai", 0.02, 2)
    # A title and a content of 10 and 12 letters, at four for each token.
    assert plan.tokens is not None
    assert (plan.tokens.tokens, plan.tokens.texts_cut, plan.tokens.window) == (150 * 6, 0, 8192)
    assert files(tmp_path) == before


def test_a_servers_access_is_what_the_command_line_says(tmp_path: Path) -> None:
    path = make_store(tmp_path / "m.db", [memory("a")])
    options = Options(
        model="nomic-embed-text",
        base_url="http://127.0.0.1:9",
        dim=768,
        in_flight=2,
        give_up_after=3.0,
        timeout=4.0,
        max_tokens=5,
    )

    plan = plan_for(path, options)
    other = plan_for(path, replace(options, backend="vllm", dim=512, document_prefix="passage: "))

    access = Access(
        "http://127.0.0.1:9", most_in_flight=2, give_up_after=3.0, timeout=4.0, most_tokens=5
    )
    assert plan.target == Target(
        "ollama", "nomic-embed-text", 768, prompt="search_document: ", access=access
    )
    assert other.target == Target(
        "vllm",
        "nomic-embed-text",
        512,
        prompt="passage: ",
        access=replace(access, asks_dimension=True),
    )


def test_a_document_prefix_goes_before_a_local_models_own(tmp_path: Path) -> None:
    path = make_store(tmp_path / "m.db", [memory("a")])

    assert plan_for(path, Options(document_prefix="passage: ")).target.prompt == "passage: "


@given(st.integers(1, 10_000))
def test_a_range_for_a_server_is_whole_batches_of_at_most_512_rows(batch: int) -> None:
    whole = whole_batches(batch)

    assert whole <= 512
    assert whole % min(batch, 512) == 0 < whole


@pytest.mark.parametrize(
    ("batch", "local", "served"), [(100, 256, 100), (7, 256, 7), (256, 256, 256), (999, 999, 999)]
)
def test_a_part_is_a_request_of_a_server_and_enough_for_a_local_model_to_choose_from(
    tmp_path: Path, batch: int, local: int, served: int
) -> None:
    path = make_store(tmp_path / "m.db", [memory("a")])
    server = Options(batch=batch, backend="ollama", model="nomic-embed-text")

    assert plan_for(path, Options(batch=batch)).part_rows == local
    assert plan_for(path, server).part_rows == served


@pytest.mark.parametrize("flags", [{"device": "cpu"}, {"precision": "float16"}])
def test_a_server_chooses_its_device_itself(tmp_path: Path, flags: dict[str, Any]) -> None:
    path = make_store(tmp_path / "m.db", [memory("a")])

    with pytest.raises(UsageError) as refused:
        plan_for(path, Options(backend="openai", model="text-embedding-3-small", **flags))
    assert wording(refused, tmp_path) == snapshot(
        "--device and --precision are for a model on this machine; leave them out"
    )


def test_device_and_precision_are_part_of_the_target(tmp_path: Path) -> None:
    path = make_store(tmp_path / "m.db", [memory("a")])

    plan = plan_for(path, Options(backend="local", device="cpu", precision="bfloat16"))

    assert (plan.target.device, plan.target.precision) == ("cpu", "bfloat16")


def test_a_precision_that_there_is_not_is_refused() -> None:
    with pytest.raises(UsageError) as refused:
        Options(precision="half")
    assert str(refused.value) == snapshot(
        "--precision half is not one of float32, float16, bfloat16"
    )


def test_a_server_gets_whole_batches(tmp_path: Path) -> None:
    path = make_store(tmp_path / "m.db", [memory(f"{i:04d}") for i in range(950)])
    served = Options(backend="openai", model="text-embedding-3-small")

    plan = plan_for(path, served)

    assert [keys.rows for keys in plan.ranges] == [500, 450]
    assert plan.requests == 10


def test_a_missing_database_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError) as refused:
        plan_for(tmp_path / "m.db")
    assert wording(refused, tmp_path) == snapshot(
        "there is no database at TMP/m.db; name an existing one with --db"
    )


@pytest.mark.system
def test_planning_imports_neither_beam_nor_torch(tmp_path: Path) -> None:
    path = make_store(tmp_path / "m.db", [memory("a")])
    code = (
        "import sys; from reembed.pipeline import cli\n"
        "cli.main(['--db', sys.argv[1], '--dry-run'])\n"
        "print(sorted({'apache_beam', 'torch', 'transformers'} & sys.modules.keys()))"
    )

    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        check=True,
        env=clean_environment(tmp_path),
    )

    assert done.stdout.splitlines()[-1] == "[]"


# The ranges that hold some keys.


def cut(borders: Sequence[str]) -> list[KeyRange]:
    """Ranges that end at these borders, the last one open."""
    starts, ends = [None, *borders], [*borders, None]
    return [KeyRange(at, *pair) for at, pair in enumerate(zip(starts, ends, strict=True))]


def holds(keys: KeyRange, key: str) -> bool:
    return (keys.after is None or key > keys.after) and (keys.until is None or key <= keys.until)


texts = st.text(max_size=3)
borders = st.lists(st.text(min_size=1, max_size=3), unique=True).map(sorted)


@given(borders, st.sets(texts))
def test_of_all_ranges_those_are_taken_that_hold_a_key_and_no_others(
    borders: list[str], keys: set[str]
) -> None:
    ranges = cut(borders)

    found = holding(ranges, keys)

    expected = [one for one in ranges if any(holds(one, key) for key in keys)]
    assert found == tuple(replace(one, index=at) for at, one in enumerate(expected))


@given(borders, st.sets(texts, min_size=1))
def test_every_key_is_in_exactly_one_of_the_ranges_that_are_taken(
    borders: list[str], keys: set[str]
) -> None:
    found = holding(cut(borders), keys)

    assert [sum(holds(one, key) for one in found) for key in keys] == [1] * len(keys)


def test_a_row_whose_id_is_no_text_may_be_in_any_range() -> None:
    ranges = cut(["b", "d"])

    assert holding(ranges, {"rowid 7"}) == tuple(ranges)


# What the flags make of a plan.


def mixed(path: Path) -> Path:
    """Two rows with a vector of the target's length, two without, one that is encrypted."""
    old: dict[str, Any] = {"embedding": b"\x01" + bytes(32), "embedding_dim": 8}
    rows = [memory("a", **old), memory("b"), memory("c", **old), memory("d", namespace="notes")]
    return make_store(path, [*rows, memory("e", "", encrypted_envelope=b"sealed")])


def test_a_plan_for_missing_vectors_means_only_rows_without_one(tmp_path: Path) -> None:
    plan = fake_plan(mixed(tmp_path / "m.db"), missing_only=True)

    assert (plan.mode, plan.scope) == (Mode.MISSING_ONLY, Scope(None, "missing only"))
    assert (plan.survey.rows, plan.survey.meant, plan.survey.to_embed) == (5, 3, 2)
    assert plan.survey.by_rule == {Cause.ENCRYPTED: 1}


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        (
            "skip_current_space",
            snapshot(
                "TMP/m.db keeps no stamps (it has no column embedding_space), so it "
                "can't be told which model made a vector; run without "
                "--skip-current-space"
            ),
        ),
        (
            "stamp_only",
            snapshot(
                "TMP/m.db keeps no stamps (it has no column embedding_space), so it "
                "can't be told which model made a vector; run without --stamp-only"
            ),
        ),
    ],
)
def test_a_store_without_stamps_is_refused_where_stamps_are_looked_at(
    flag: str, says: str, tmp_path: Path
) -> None:
    path = mixed(tmp_path / "m.db")
    flags: dict[str, Any] = {flag: True}

    with pytest.raises(StampError) as refused:
        fake_plan(path, **flags)
    assert wording(refused, tmp_path) == says


def test_the_flags_reach_the_replacement(tmp_path: Path) -> None:
    path = mixed(tmp_path / "m.db")

    plain = fake_plan(path)
    strict = fake_plan(
        path,
        max_skipped=0.1,
        skipped="clear",
        one_transaction=True,
        sleep_ms=250,
        max_rows=2,
        partial=True,
    )

    assert plain.rules == Rules(most_skipped=0.5, clear_skipped=False, one_transaction=False)
    assert (plain.pause, plain.most_rows, plain.partial) == (0, None, False)
    assert strict.rules == Rules(most_skipped=0.1, clear_skipped=True, one_transaction=True)
    assert (strict.pause, strict.most_rows, strict.partial) == (0.25, 2, True)
    assert strict.job == ReplaceJob(
        store=strict.store,
        run=strict.run,
        ranges=strict.ranges,
        target=FAKE,
        rules=strict.rules,
        attempt=strict.attempt,
        vector_bytes=2 * 33,
    )


def test_a_new_run_lies_beside_the_database_or_where_it_is_told_to(tmp_path: Path) -> None:
    path = mixed(tmp_path / "m.db")

    assert fake_plan(path).run.path.parent == tmp_path / "m.db.reembed"
    assert fake_plan(path, run_dir=str(tmp_path / "a")).run.path.parent == tmp_path / "a"
    assert not (tmp_path / "a").exists()


# Earlier runs.


def nine(path: Path) -> Path:
    return make_store(path, [memory(f"{i}") for i in range(9)])


def test_a_plan_goes_on_with_the_run_that_was_cut_off_and_changes_no_byte(tmp_path: Path) -> None:
    path = nine(tmp_path / "m.db")
    first = stage(begin(fake_plan(path, rows=2)), 3)
    before = files(tmp_path)

    plan = fake_plan(path, rows=5)

    assert plan.run == first.run
    assert plan.earlier is not None
    assert plan.earlier.manifest == first.run.read_manifest()
    assert (plan.staged_rows, plan.begun) == (6, False)
    # The ranges are the first run's: its shards are named by them.
    assert plan.ranges == first.ranges
    assert plan.attempt != first.attempt
    assert files(tmp_path) == before


def test_a_plan_finds_the_run_that_lies_elsewhere(tmp_path: Path) -> None:
    path = nine(tmp_path / "m.db")
    elsewhere = str(tmp_path / "elsewhere")
    first = stage(begin(fake_plan(path, rows=2, run_dir=elsewhere)), 1)

    assert first.run.path.parent == tmp_path / "elsewhere"
    assert fake_plan(path).run == first.run
    assert fake_plan(path, run_dir=elsewhere).run == first.run


def test_a_run_directory_of_another_database_is_refused(tmp_path: Path) -> None:
    elsewhere = str(tmp_path / "elsewhere")
    begin(fake_plan(nine(tmp_path / "m.db"), run_dir=elsewhere))
    other = nine(tmp_path / "other.db")

    with pytest.raises(StagingError) as refused:
        fake_plan(other, run_dir=elsewhere)
    assert wording(refused, tmp_path) == snapshot(
        "TMP/elsewhere holds runs on another database, TMP/m.db; name another directory "
        "with --run-dir"
    )


def test_a_fresh_start_discards_the_run_that_was_cut_off(tmp_path: Path) -> None:
    path = nine(tmp_path / "m.db")
    first = stage(begin(fake_plan(path, rows=2)), 3)
    before = files(tmp_path)

    plan = fake_plan(path, fresh=True)

    assert plan.run != first.run
    assert (plan.earlier, plan.staged_rows) == (None, 0)
    assert (plan.discarded, plan.others) == ((first.run,), ())
    assert files(tmp_path) == before  # Only the run itself deletes anything.


def test_a_run_about_other_rows_is_left_alone_and_named(tmp_path: Path) -> None:
    path = nine(tmp_path / "m.db")
    first = stage(begin(fake_plan(path, rows=2)), 3)

    for flags in (
        {"namespace": "global"},
        {"missing_only": True},
        {"fresh": True, "namespace": "x"},
    ):
        plan = fake_plan(path, **flags)
        assert plan.run != first.run
        assert (plan.earlier, plan.others, plan.discarded) == (None, (first.run,), ())


def test_a_run_that_has_ended_is_not_gone_on_with(tmp_path: Path) -> None:
    path = nine(tmp_path / "m.db")
    first = begin(fake_plan(path))
    note(first, state=State.REPLACED)

    plan = fake_plan(path)

    assert plan.run != first.run
    assert (plan.earlier, plan.others) == (None, ())


def test_a_plan_for_another_target_is_refused_while_rows_are_staged(tmp_path: Path) -> None:
    path = nine(tmp_path / "m.db")
    first = begin(fake_plan(path))
    note(first, target=replace(FAKE, window=128).to_json())

    with pytest.raises(RunError) as error:
        fake_plan(path)

    assert wording(error, tmp_path) == snapshot(
        "the run RUN has staged rows for another target: its maximum length was 128 and "
        "is None now; mixing the two would be wrong: give the same target as before, or "
        "start over with --fresh"
    )
    assert fake_plan(path, fresh=True).discarded == (first.run,)


def test_a_replacement_that_was_begun_is_finished_by_its_own_command_only(tmp_path: Path) -> None:
    path = nine(tmp_path / "m.db")
    first = stage(begin(fake_plan(path, rows=2)), 5)
    note(first, state=State.REPLACING, done=frozenset({0, 1}), writing=frozenset({2}))

    assert (fake_plan(path).run, fake_plan(path).begun) == (first.run, True)
    for flags in ({"fresh": True}, {"namespace": "global"}, {"missing_only": True}):
        with pytest.raises(IncompleteError) as error:
            fake_plan(path, **flags)
        assert wording(error, tmp_path) == snapshot(
            "the replacement by run RUN (to all-MiniLM-L6-v2 (8-dim)) is incomplete: of "
            "ranges 0-4, 0-1 hold new vectors, and 2 were being written; finish it with "
            "its own command, or undo it with reembed rollback, before another one"
        )
    note(first, state=State.ROLLING_BACK)
    with pytest.raises(IncompleteError) as error:
        fake_plan(path)
    assert wording(error, tmp_path) == snapshot(
        "run RUN (to all-MiniLM-L6-v2 (8-dim)) is half rolled back; finish it with reembed rollback"
    )


def test_to_retry_means_the_rows_that_the_last_run_skipped(tmp_path: Path) -> None:
    path = nine(tmp_path / "m.db")
    first = begin(fake_plan(path, rows=2))
    first.run.write_lines("skipped.jsonl", [{"id": "7"}, {"id": "2"}])
    note(first, state=State.REPLACED)

    plan = fake_plan(path, rows=2, retry_skipped=True)

    assert plan.mode is Mode.RETRY_SKIPPED
    assert plan.scope == Scope(None, "retry skipped", ("2", "7"))
    assert (plan.survey.meant, plan.retry_skipped) == (2, True)
    assert plan.ranges == (KeyRange(0, "1", "3", 2), KeyRange(1, "5", "7", 2))
    with pytest.raises(UsageError) as refused:
        fake_plan(path, namespace="notes", retry_skipped=True)
    assert wording(refused, tmp_path) == snapshot(
        "there is no run whose skipped rows could be tried again; run without it"
    )


def test_to_retry_in_a_run_that_was_cut_off_goes_on_with_it(tmp_path: Path) -> None:
    path = nine(tmp_path / "m.db")
    first = stage(begin(fake_plan(path, rows=2)), 3)

    plan = fake_plan(path, retry_skipped=True)

    assert (plan.run, plan.scope, plan.retry_skipped) == (first.run, Scope(), True)


def test_a_run_whose_manifest_can_not_be_read_is_named(tmp_path: Path) -> None:
    path = nine(tmp_path / "m.db")
    first = begin(fake_plan(path))
    (first.run.path / "manifest.json").write_text("{")

    with pytest.raises(StagingError) as refused:
        fake_plan(path)
    assert wording(refused, tmp_path) == snapshot(
        "the run TMP/m.db.reembed/RUN has no readable manifest.json (Input data was "
        "truncated), so it can't be told what it did; restore the file, or move the "
        "directory away if you are sure that the run is of no use"
    )


def test_the_manifest_of_a_run_says_what_its_plan_was_about(tmp_path: Path) -> None:
    path = nine(tmp_path / "m.db")
    plan = begin(fake_plan(path, rows=2, namespace="global"), probe=[[0.5] * 8])

    assert plan.run.read_manifest() == Manifest(
        run_id=plan.run.run_id,
        database=str(path),
        started="2026-01-01T00:00:00Z",
        scope=Scope("global", "all"),
        target=FAKE.to_json(),
        probe=[[0.5] * 8],
        ranges=plan.ranges,
        rows=9,
        attempt=plan.attempt,
    )
