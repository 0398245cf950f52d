"""Runs about a part of a store: what they leave beside their vectors, and how it is told."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from inline_snapshot import snapshot

from reembed.transforms.embedders.fake import POISON
from reembed.transforms.stores.demo import hashed_vector
from tests.conftest import Call, Ran, change, make_store, memory, select
from tests.wording import line_with

SAME = ("--dim", "3")
"""As long as the vectors that are there."""


def store(path: Path, *, notes: int = 7, others: int = 5, bare: int = 2, **more: Any) -> Path:
    """Rows with vectors of three numbers in two namespaces, and some without in a third."""
    counts = {"notes": notes, "people": others, "bare": bare}
    rows = [
        memory(
            f"{name}-{at}",
            namespace=name,
            **(old() if name != "bare" else {}),
            **(more if at == 0 and name == "notes" else {}),
        )
        for name, count in counts.items()
        for at in range(count)
    ]
    return make_store(path, rows)


def old() -> dict[str, Any]:
    return {"embedding": hashed_vector("old", 3), "embedding_dim": 3}


def stamped(path: Path) -> Path:
    """Add stamps of another model to a store."""
    change(
        path,
        "ALTER TABLE memories ADD COLUMN embedding_space TEXT",
        "UPDATE memories SET embedding_space = 'other#none' WHERE embedding IS NOT NULL",
    )
    return path


def run(reembed: Call, path: Path, *flags: str, **more: Any) -> Ran:
    ran = reembed("--db", path, "--json", *flags, **more)
    assert ran.code == 0, ran.err
    return ran


def outside(reembed: Call, path: Path, *flags: str, **more: Any) -> int | None:
    """Counts of a dry run, and of the run itself, which are the same."""
    planned = run(reembed, path, "--dry-run", *flags, **more).values["outside_in_old_space"]
    done: int | None = run(reembed, path, *flags, **more).values["outside_in_old_space"]
    assert planned == done
    return done


@pytest.mark.parametrize(
    ("dimension", "stamps", "others", "held"),
    [
        (
            (),
            False,
            snapshot("the others       3-dim 5, no vector 2"),
            snapshot("the store    8-dim 7; outside the selection 3-dim 5, no vector 2"),
        ),
        (
            (),
            True,
            snapshot("the others       3-dim 'other#none' 5, no vector 2"),
            snapshot(
                "the store    8-dim 'sentence-transformers/all-minilm-l6-v2#none' 7; outside the "
                "selection 3-dim 'other#none' 5, no vector 2"
            ),
        ),
        (
            SAME,
            False,
            snapshot("the others       3-dim 5, no vector 2"),
            snapshot("the store    3-dim 7; outside the selection 3-dim 5, no vector 2"),
        ),
        (
            SAME,
            True,
            snapshot("the others       3-dim 'other#none' 5, no vector 2"),
            snapshot(
                "the store    3-dim 'sentence-transformers/all-minilm-l6-v2#none' 7; outside the "
                "selection 3-dim 'other#none' 5, no vector 2"
            ),
        ),
    ],
    ids=["other length", "other length, stamps", "same length", "same length, stamps"],
)
def test_the_rows_outside_a_namespace_are_counted_and_the_next_step_is_true(
    dimension: Sequence[str],
    stamps: bool,
    others: str,
    held: str,
    reembed: Call,
    tmp_path: Path,
) -> None:
    path = store(tmp_path / "m.db")
    path = stamped(path) if stamps else path
    flags = ("--db", path, *dimension, "--namespace", "notes")

    plan = reembed(*flags, "--dry-run")
    ran = reembed(*flags)

    note = snapshot(
        "reembed: NOTE — 5 rows that this run is not about keep vectors of other runs or models, "
        "which can't be compared with the new ones"
    )
    assert line_with("not about", plan.err) == note
    assert line_with("not about", ran.err) == note
    assert line_with("the others ", plan.out) == others
    assert line_with("outside the selection", ran.out) == held
    assert line_with("next ", ran.out) == snapshot(
        "next         the store holds vectors of more than one model: run without --namespace to "
        "move the rest, or go back with reembed rollback"
    )
    assert run(reembed, path, *dimension).values["outside_in_old_space"] is None


def test_what_all_rows_hold_is_counted_from_the_table(reembed: Call, tmp_path: Path) -> None:
    path = stamped(store(tmp_path / "m.db"))

    values = run(reembed, path, "--namespace", "notes", *SAME).values

    def key(held: dict[str, Any]) -> str:
        return repr(held)

    counted = [
        {"selected": bool(selected), "dim": dim, "stamp": stamp, "rows": rows}
        for selected, dim, stamp, rows in select(
            path,
            "SELECT namespace = 'notes', embedding_dim, embedding_space, count(*) FROM memories "
            "GROUP BY 1, 2, 3",
        )
    ]
    assert sorted(values["rows_held"], key=key) == sorted(counted, key=key)
    assert (values["in_old_space"], values["outside_in_old_space"]) == (0, 5)


@pytest.mark.parametrize("stamps", [False, True], ids=["no stamps", "stamps"])
def test_once_the_rest_is_moved_too_nothing_is_left(
    stamps: bool, reembed: Call, tmp_path: Path
) -> None:
    path = store(tmp_path / "m.db")
    path = stamped(path) if stamps else path

    assert outside(reembed, path, *SAME, "--namespace", "notes") == 5
    assert outside(reembed, path, *SAME, "--namespace", "bare") == 5
    last = reembed("--db", path, *SAME, "--namespace", "people")

    assert last.code == 0
    assert line_with("next ", last.out) == snapshot(
        "next         restart the ai-memory daemon with this model; it keeps its index in memory"
    )
    assert outside(reembed, path, *SAME, "--namespace", "people") == 0
    # Another model in one of them, and back by a rollback.
    other = ("--namespace", "bare", "--model", "n")
    assert outside(reembed, path, *SAME, *other, prompt="n: ") == 12
    assert outside(reembed, path, *SAME, "--namespace", "people") == 2
    assert reembed("rollback", "--db", path).code == 0
    assert outside(reembed, path, *SAME, "--namespace", "people") == 0


@pytest.mark.parametrize("stamps", [False, True], ids=["no stamps", "stamps"])
def test_rows_that_a_mode_leaves_are_counted(stamps: bool, reembed: Call, tmp_path: Path) -> None:
    path = store(tmp_path / "m.db")
    path = stamped(path) if stamps else path
    flags = ("--db", path, *SAME, "--missing-only")

    ran = reembed(*flags)

    assert line_with("not about", ran.err) == snapshot(
        "reembed: NOTE — 12 rows that this run is not about keep vectors of other runs or models, "
        "which can't be compared with the new ones"
    )
    assert line_with("next ", ran.out) == snapshot(
        "next         the store holds vectors of more than one model: run without --missing-only "
        "to move the rest, or go back with reembed rollback"
    )
    assert run(reembed, path, *SAME, "--missing-only").values["outside_in_old_space"] is None


@pytest.mark.parametrize("stamps", [False, True], ids=["no stamps", "stamps"])
def test_rows_that_an_earlier_run_moved_are_not_outside(
    stamps: bool, reembed: Call, tmp_path: Path
) -> None:
    path = store(tmp_path / "m.db", content=POISON)
    path = stamped(path) if stamps else path
    run(reembed, path, *SAME)
    change(path, "UPDATE memories SET embedding = NULL WHERE id = 'people-1'")

    retried = outside(reembed, path, *SAME, "--retry-skipped", lenient=1)
    missing = outside(reembed, path, *SAME, "--missing-only", lenient=1)

    assert (retried, missing) == (0, 0)


def test_a_partial_run_that_is_not_done_asks_for_the_rest(reembed: Call, tmp_path: Path) -> None:
    path = store(tmp_path / "m.db")

    ran = reembed("--db", path, "--max-rows", "3", "--partial", range_rows=2)

    assert ran.code == 6
    assert line_with("next ", ran.out) == snapshot(
        "next         run again to finish; until then the store holds vectors of more than one "
        "model"
    )


@pytest.mark.parametrize("format", ["f32le", "json"])
def test_the_rows_that_a_condition_leaves_are_counted_though_the_run_changes_what_it_reads(
    format: str, reembed: Call, tmp_path: Path
) -> None:
    path = tmp_path / "t.db"
    vector = "'[1.0, 0.5, 2.0]'" if format == "json" else "x'0000803f0000003f00000040'"
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, body TEXT, model TEXT, v)")
        for at in range(9):
            model = "former" if at < 5 else "other"
            db.execute(f"INSERT INTO t VALUES ({at}, 'text {at}', '{model}', {vector})")
    flags = ["--table", "t", "--text", "body", "--vector", "v", "--format", format]
    flags += ["--space-column", "model", *SAME]

    by_stamp = outside(reembed, path, *flags, "--where", "model = 'former'")
    by_key = outside(reembed, path, *flags, "--where", "id > 6")

    assert (by_stamp, by_key) == (4, 2)
    ran = reembed("--db", path, *flags, "--where", "id > 6")
    assert line_with("next ", ran.out) == snapshot(
        "next         the store holds vectors of more than one model: run without --where to move "
        "the rest, or go back with reembed rollback"
    )


def test_a_collection_of_llm_has_a_model_of_its_own(reembed: Call, tmp_path: Path) -> None:
    from tests.test_llm import NOTES, collect

    path = tmp_path / "embeddings.db"
    collect(path, "one", NOTES)
    collect(path, "two", NOTES)

    ran = reembed("--db", path, "--model", "m", "--namespace", "two")

    assert (ran.code, "other runs or models" in ran.err + ran.out) == (0, False)
    assert line_with("next ", ran.out) == snapshot(
        "next         embed queries with this model, too, from now on"
    )


def test_rows_that_an_earlier_run_skipped_are_outside(reembed: Call, tmp_path: Path) -> None:
    path = store(tmp_path / "m.db", content=POISON)
    run(reembed, path, *SAME)

    assert outside(reembed, path, *SAME, "--namespace", "people") == 1
    assert outside(reembed, path, *SAME, "--retry-skipped", lenient=1) == 0
    assert outside(reembed, path, *SAME, "--namespace", "people") == 0


def test_skipped_rows_are_outside_a_run_about_missing_ones(reembed: Call, tmp_path: Path) -> None:
    path = store(tmp_path / "m.db", content=POISON)
    run(reembed, path, *SAME)
    change(path, "UPDATE memories SET embedding = NULL WHERE id = 'people-1'")

    assert outside(reembed, path, *SAME, "--missing-only") == 1


def test_a_run_about_another_column_has_moved_none_of_these_rows(
    reembed: Call, tmp_path: Path
) -> None:
    path = tmp_path / "t.db"
    vector = "x'0000803f0000003f00000040'"
    rows = [f"INSERT INTO t VALUES ({at}, 'text {at}', {vector}, {vector})" for at in range(9)]
    change(path, "CREATE TABLE t (id INTEGER PRIMARY KEY, body TEXT, v BLOB, v2 BLOB)", *rows)
    flags = (*SAME, "--table", "t", "--text", "body")
    first = run(reembed, path, *flags, "--vector", "v").values["run_id"]

    assert outside(reembed, path, *flags, "--vector", "v2", "--where", "id < 5") == 4
    # Nor is one in the way of a rollback of the other.
    assert reembed("rollback", "--db", path, "--run", first).code == 0
    assert select(path, f"SELECT count(*) FROM t WHERE v = {vector}") == [(9,)]


def test_another_model_of_the_same_name_has_moved_none_of_these_rows(
    reembed: Call, tmp_path: Path
) -> None:
    path = store(tmp_path / "m.db")
    run(reembed, path, *SAME)

    ran = run(reembed, path, *SAME, "--namespace", "notes", behaviour=0.5)

    assert ran.values["outside_in_old_space"] == 7
    assert (
        run(reembed, path, *SAME, "--namespace", "people", behaviour=0.5).values[
            "outside_in_old_space"
        ]
        == 2
    )
