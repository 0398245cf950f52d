"""What looks after runs, as a user runs it: status, verify, rollback and cleanup."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from inline_snapshot import snapshot

from reembed.transforms import embedders, rollback
from reembed.transforms.embedders.fake import POISON, FakeEmbedder
from reembed.transforms.embedders.models import MINILM, find_model
from reembed.transforms.errors import EmbedderError
from reembed.transforms.replacing import reads_back
from reembed.transforms.rollback import DELETED, NOT_KEPT
from reembed.transforms.rows import RangeVectors
from reembed.transforms.staging import RunDirectory, State, lock_database, read_shards
from reembed.transforms.stores import Store, Written
from reembed.transforms.stores.codec import encode
from reembed.transforms.stores.demo import hashed_vector
from reembed.transforms.stores.vec0 import connect as vec_connect
from tests.conftest import (
    Call,
    all_columns,
    begin,
    change,
    fake_plan,
    files,
    half_replace,
    jam,
    kept_files,
    make_store,
    memory,
    select,
    unjam,
    unpack,
)
from tests.wording import line_with, wording

SECRET = "projects/p/secrets/s/versions/latest"
COMMANDS = ("status", "verify", "rollback", "cleanup")


def former(key: object) -> bytes:
    """The vector that a row has before any run: of the same length, of another model."""
    return hashed_vector(f"{key}", 8)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store of ten rows, each with a former model's vector."""
    rows = [memory(f"{i}", embedding=former(i), embedding_dim=8) for i in range(10)]
    return make_store(tmp_path / "m.db", rows)


def stored(path: Path) -> dict[str, Any]:
    return dict(select(path, "SELECT id, embedding FROM memories"))


def new(*keys: object) -> dict[str, bytes]:
    """What rows hold after a run."""
    vectors = FakeEmbedder(8).embed([f"title {key} content {key}" for key in keys])
    return {f"{key}": encode(vector) for key, vector in zip(keys, vectors, strict=True)}


def old(*keys: object) -> dict[str, bytes]:
    return {f"{key}": former(key) for key in keys}


def root(path: Path) -> Path:
    return path.with_name(f"{path.name}.reembed")


def runs(path: Path) -> list[str]:
    return sorted(place.name for place in root(path).iterdir() if place.name != "lock")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def put(path: Path, key: str, vector: bytes | None) -> None:
    """Give a row another vector, as another program would."""
    value = "NULL" if vector is None else f"x'{vector.hex()}'"
    change(path, f"UPDATE memories SET embedding = {value} WHERE id = '{key}'")


# Rollback.

ODD = (
    "UPDATE memories SET embedding_dim = 'many' WHERE rowid = 1",
    "UPDATE memories SET embedding_dim = 1.5 WHERE rowid = 2",
    "UPDATE memories SET embedding = 'a text' WHERE rowid = 3",
    "UPDATE memories SET embedding = 7 WHERE rowid = 4",
    "UPDATE memories SET embedding = x'' WHERE rowid = 5",
    "UPDATE memories SET embedding = substr(embedding, 2) WHERE rowid % 7 = 0",
    "UPDATE memories SET embedding_dim = NULL WHERE rowid % 11 = 0",
    "UPDATE memories SET embedding_space = CAST(x'ff' AS TEXT) WHERE rowid = 6",
)
STAMPED = (
    "ALTER TABLE memories ADD COLUMN embedding_space TEXT",
    "UPDATE memories SET embedding_space = 'former#none' WHERE embedding IS NOT NULL",
)
STORES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "v57": ("v57", ()),
    "v80": ("v80", ()),
    "v80 with stamps": ("v80", STAMPED),
    "v80 with odd values": ("v80", (*STAMPED, *ODD)),
}


@pytest.mark.parametrize("kind", STORES)
def test_after_a_run_and_its_rollback_all_columns_of_all_tables_are_as_before(
    reembed: Call, tmp_path: Path, kind: str
) -> None:
    version, statements = STORES[kind]
    path = unpack(version, tmp_path / "ai-memory.db")
    change(path, *statements)
    before, mode = all_columns(path), path.read_bytes()[18:20]
    done = reembed("--db", path, "--dim", "16")
    assert done.code == 0
    assert all_columns(path) != before

    undone = reembed("rollback", "--db", path, "--json")

    assert (undone.code, undone.err) == (0, "")
    [run_id] = runs(path)
    assert undone.values == {
        "schema_version": 1,
        "run_id": run_id,
        "state": "rolled back",
        "restored": 202,
        "unchanged": 0,
        "left": 0,
        "left_by_reason": {},
        "in_the_way": {},
        "lost_files": {},
        "run_directory": str(root(path) / run_id),
    }
    assert all_columns(path) == before
    assert path.read_bytes()[18:20] == mode
    assert select(path, "PRAGMA integrity_check") == [("ok",)]
    assert {name.split("/")[-1] for name in files(root(path) / run_id)} >= {"rollback.json"}
    assert not (root(path) / run_id / "shards").exists()


def test_rows_that_were_edited_after_the_run_are_left_and_named(
    reembed: Call, original: tuple[str, Path], tmp_path: Path
) -> None:
    _, path = original
    query = "SELECT * FROM memories WHERE id {} IN ({}) ORDER BY id"
    keys = [key for (key,) in select(path, "SELECT id FROM memories ORDER BY id")][::21]
    some = ", ".join(f"'{key}'" for key in keys)
    others = select(path, query.format("NOT", some))
    reembed("--db", path, "--dim", "16")
    change(path, f"UPDATE memories SET content = content || '!' WHERE id IN ({some})")
    edited = select(path, query.format("", some))

    undone = reembed("rollback", "--db", path, "--json")

    assert (undone.code, len(keys)) == (0, 10)
    assert undone.values["restored"] == 192
    assert undone.values["left"] == 10
    assert undone.values["left_by_reason"] == {"its text was edited since": 10}
    assert select(path, query.format("NOT", some)) == others
    assert select(path, query.format("", some)) == edited
    [run_id] = runs(path)
    assert lines(root(path) / run_id / "left.jsonl") == [
        {"id": key, "reason": "its text was edited since"} for key in keys
    ]
    first, *rest = undone.err.splitlines()
    assert wording(first, tmp_path).replace(str(keys[0]), "KEY") == snapshot(
        "WARN [RUN] row KEY is left as it is: its text was edited since"
    )
    assert rest == [first.replace(str(keys[0]), str(key)) for key in keys[1:]]


def test_rows_that_were_deleted_overwritten_or_added_are_left_as_they_are(
    reembed: Call, path: Path, tmp_path: Path
) -> None:
    reembed("--db", path, range_rows=3)
    other = hashed_vector("another", 8)
    put(path, "2", other)
    put(path, "3", None)
    put(path, "4", former(4))  # Put back by hand.
    change(
        path,
        "DELETE FROM memories WHERE id IN ('5', '9')",
        "UPDATE memories SET content = 'edited' WHERE id = '6'",
        "INSERT INTO memories (id, tier, namespace, title, content, created_at, updated_at) "
        "VALUES ('95', 'mid', 'global', 'title', 'new', '', '')",
    )

    undone = reembed("rollback", "--db", path)

    assert undone.code == 0
    assert stored(path) == old(0, 1, 4, 7, 8) | new(6) | {"2": other, "3": None, "95": None}
    [run_id] = runs(path)
    left = root(path) / run_id / "left.jsonl"
    assert wording(undone.out, tmp_path) == snapshot("""\
reembed: run RUN is rolled back

restored   4 rows hold their previous vectors again
as before  1 rows
left       5 rows (named in TMP/m.db.reembed/RUN/left.jsonl)
next       set the ai-memory daemon back to the former model and restart it
""")
    why = {
        "2": "its vector was changed by another program since",
        "3": "its vector was changed by another program since",
        "5": "it was deleted since",
        "6": "its text was edited since",
        "9": "it was deleted since",
    }
    assert {line["id"]: line["reason"] for line in lines(left)} == why
    assert wording(undone.err, tmp_path) == snapshot("""\
WARN [RUN] row 2 is left as it is: its vector was changed by another program since
WARN [RUN] row 3 is left as it is: its vector was changed by another program since
WARN [RUN] row 5 is left as it is: it was deleted since
WARN [RUN] row 6 is left as it is: its text was edited since
WARN [RUN] row 9 is left as it is: it was deleted since
""")


def test_rows_that_were_edited_while_the_run_was_at_work_are_put_back_too(
    reembed: Call, path: Path
) -> None:
    """What they held before the run belonged to their old texts, as it does after it."""
    reembed("--db", path, "--max-rows", "4", range_rows=3)
    change(path, "UPDATE memories SET content = 'edited' WHERE id IN ('1', '8')")
    reembed("--db", path, range_rows=3)

    undone = reembed("rollback", "--db", path, "--json")

    assert (undone.code, undone.values["restored"]) == (0, 10)
    assert stored(path) == old(*range(10))


def test_a_rollback_goes_back_one_run_at_a_time(reembed: Call, path: Path, tmp_path: Path) -> None:
    first = reembed("--db", path, "--json").values["run_id"]
    between = all_columns(path)
    second = reembed("--db", path, "--dim", "16", "--json").values["run_id"]

    assert reembed("rollback", "--db", path, "--json").values["run_id"] == second
    assert all_columns(path) == between
    assert reembed("rollback", "--db", path, "--json").values["run_id"] == first
    assert stored(path) == old(*range(10))
    third = reembed("rollback", "--db", path)
    assert (third.code, third.out) == (2, "")
    assert wording(third.error, tmp_path) == snapshot(
        "there is no run that has replaced anything on TMP/m.db; reembed status shows what there is"
    )


def test_an_older_run_is_rolled_back_only_after_the_newer_one(
    reembed: Call, path: Path, tmp_path: Path
) -> None:
    first = reembed("--db", path, "--json").values["run_id"]
    second = reembed("--db", path, "--namespace", "global", "--dim", "16", "--json")
    between = stored(path)

    refused = reembed("rollback", "--db", path, "--run", first)

    assert (refused.code, stored(path)) == (2, between)
    assert wording(refused.error, tmp_path) == snapshot(
        "run RUN has replaced vectors since run RUN did; undo the newer one first (reembed "
        "rollback)"
    )
    assert refused.error.index(second.values["run_id"]) < refused.error.index(first)
    assert reembed("rollback", "--db", path).code == 0
    assert reembed("rollback", "--db", path, "--run", first).code == 0
    assert stored(path) == old(*"0123456789")


def test_what_can_not_be_rolled_back_is_said(reembed: Call, path: Path, tmp_path: Path) -> None:
    none = reembed("rollback", "--db", path)
    assert none.code == 2
    assert wording(none.error, tmp_path) == snapshot(
        "there is no run that has replaced anything on TMP/m.db; reembed status shows what there is"
    )
    assert not root(path).exists()

    reembed("--db", path, "--max-rows", "4", range_rows=3)
    [run_id] = runs(path)
    unknown = reembed("rollback", "--db", path, "--run", "20260101T000000Z-0000")
    staging = reembed("rollback", "--db", path, "--run", run_id)

    assert (unknown.code, staging.code) == (2, 2)
    assert wording(unknown.error, tmp_path) == snapshot(
        "no run is RUN; reembed status shows what there is"
    )
    assert wording(staging.error, tmp_path) == snapshot(
        "the run RUN is staging, so there is nothing to do with it"
    )


def test_an_incomplete_replacement_is_undone(reembed: Call, path: Path) -> None:
    before = all_columns(path)
    assert half_replace(reembed, path).code == 6
    assert stored(path) == new(0, 1) | old(*range(2, 10))

    undone = reembed("rollback", "--db", path, "--json")

    assert (undone.code, undone.values["restored"], undone.values["unchanged"]) == (0, 2, 8)
    assert all_columns(path) == before
    again = reembed("--db", path)
    assert (again.code, len(again.texts)) == (0, 10)


def test_a_rollback_that_was_cut_off_is_said_by_all_and_goes_on(
    reembed: Call, path: Path, tmp_path: Path
) -> None:
    reembed("--db", path, range_rows=2)
    jam(path, "5")
    cut = reembed("rollback", "--db", path)
    unjam(path)
    assert (cut.code, cut.out) == (6, "")
    assert wording(cut.error, tmp_path) == snapshot(
        "SQLite can't work with TMP/m.db: jammed; look into it and run again; the rollback "
        "of run RUN is incomplete: try it again"
    )
    for command in ("status", "verify", "cleanup"):
        done = reembed(command, "--db", path)
        assert (command, done.code) == (command, 6)
        assert (
            wording(done.error, tmp_path)
            == snapshot(
                {
                    "status": "run RUN (to all-MiniLM-L6-v2 (8-dim)) is half rolled back",
                    "verify": (
                        "run RUN (to all-MiniLM-L6-v2 (8-dim)) is half rolled back; "
                        "finish it or roll it back first"
                    ),
                    "cleanup": (
                        "run RUN (to all-MiniLM-L6-v2 (8-dim)) is half rolled back; "
                        "finish it or roll it back first"
                    ),
                }
            )[command]
        )
    assert reembed("rollback", "--db", path).code == 0
    assert stored(path) == old(*range(10))


def test_a_rollback_of_one_namespace_leaves_the_others(reembed: Call, tmp_path: Path) -> None:
    rows = [
        memory(f"{i}", embedding=former(i), embedding_dim=8, namespace="notes" if i < 4 else "ops")
        for i in range(10)
    ]
    path = make_store(tmp_path / "m.db", rows)
    notes = reembed("--db", path, "--namespace", "notes", "--json").values["run_id"]
    reembed("--db", path, "--namespace", "ops")

    assert reembed("rollback", "--db", path, "--run", notes).code == 0

    assert stored(path) == old(*range(4)) | new(*range(4, 10))


def test_vectors_of_skipped_rows_that_a_run_took_away_come_back(
    reembed: Call, tmp_path: Path
) -> None:
    rows = [memory("a"), memory("b", POISON), memory("c", encrypted_envelope=b"e"), memory("d")]
    path = make_store(
        tmp_path / "m.db", [replace(row, embedding=former(8), embedding_dim=8) for row in rows]
    )
    before = all_columns(path)

    done = reembed("--db", path, "--skipped", "clear", "--json")

    assert (done.code, done.values["skipped"], done.values["in_old_space"]) == (0, 2, 0)
    assert stored(path) == new("a", "d") | {"b": None, "c": None}
    assert reembed("verify", "--db", path).code == 0
    assert reembed("rollback", "--db", path).code == 0
    assert all_columns(path) == before


@pytest.mark.parametrize("loss", ["deleted", "emptied", "cut short", "altered", "renamed", "all"])
def test_a_lost_file_of_the_backup_is_named_and_once_it_is_back_so_are_its_rows(
    reembed: Call, path: Path, loss: str, tmp_path: Path
) -> None:
    reembed("--db", path, range_rows=5)
    [run_id] = runs(path)
    first, second = sorted((root(path) / run_id / "backup").iterdir())
    kept = {file: file.read_bytes() for file in (first, second)}
    match loss:
        case "deleted":
            first.unlink()
        case "emptied":
            first.write_bytes(b"")
        case "cut short":
            first.write_bytes(kept[first][:-1])
        case "altered":
            first.write_bytes(kept[first][:99] + b"?" + kept[first][100:])
        case "renamed":
            first.rename(first.with_name(f"0000001.0001.{first.name[13:]}"))
        case _:
            first.unlink()
            second.unlink()

    checked = reembed("verify", "--db", path, "--json")
    undone = reembed("rollback", "--db", path, "--json")

    lost = 10 if loss == "all" else 5
    assert (checked.code, checked.values["lost"], checked.values["checked"]) == (1, lost, 10 - lost)
    assert (undone.code, undone.values["left"], undone.values["restored"]) == (6, lost, 10 - lost)
    assert undone.values["lost_files"][first.name] == 5
    warning = line_with(f"the backup file {first.name}", undone.err)
    next_step = line_with("next", reembed("status", "--db", path).out)
    assert wording(warning, tmp_path).replace(first.name, "FILE") == snapshot(
        "WARN [RUN] the backup file FILE is missing or damaged, so its rows can't be put back"
    )
    assert (
        wording(undone.error, tmp_path).replace(first.name, "FILE")
        == snapshot(
            {
                5: (
                    "the file FILE (5 rows) of the backup in TMP/m.db.reembed/RUN/backup "
                    "is missing or damaged, so rows of TMP/m.db keep the vectors that "
                    "run RUN gave them; put the file back from a copy of it and roll "
                    "back again, or re-embed these rows with the former model"
                ),
                10: (
                    "2 files (10 rows), the first of them FILE, of the backup in "
                    "TMP/m.db.reembed/RUN/backup is missing or damaged, so rows of "
                    "TMP/m.db keep the vectors that run RUN gave them; put the file back "
                    "from a copy of it and roll back again, or re-embed these rows with "
                    "the former model"
                ),
            }
        )[lost]
    )
    assert wording(next_step, tmp_path) == snapshot(
        "next         put the lost files of the backup back in TMP/m.db.reembed/RUN/backup; "
        "then reembed rollback"
    )
    assert stored(path) == new(*range(lost)) | old(*range(lost, 10))
    for file, content in kept.items():
        file.write_bytes(content)
        file.chmod(0o600)

    again = reembed("rollback", "--db", path, "--json")

    assert (again.code, again.values["left"], again.values["restored"]) == (0, 0, lost)
    assert again.values["state"] == "rolled back"
    assert stored(path) == old(*range(10))


# Verify.


def test_a_table_that_is_as_the_run_left_it_is_clean(
    reembed: Call, path: Path, tmp_path: Path
) -> None:
    reembed("--db", path, range_rows=3)
    before = kept_files(path.parent)

    checked = reembed("verify", "--db", path, "--json")
    told = reembed("verify", "--db", path)

    [run_id] = runs(path)
    assert (checked.code, checked.err) == (0, "")
    assert checked.values["lowest_cosine"] == pytest.approx(1)
    assert checked.values | {"lowest_cosine": 1} == {
        "schema_version": 1,
        "run_id": run_id,
        "checked": 10,
        "changed": 0,
        "deleted": 0,
        "put_back": 0,
        "findings": 0,
        "unwritten": 0,
        "lost": 0,
        "sampled": 10,
        "lowest_cosine": 1,
        "unchecked": None,
        "wrong": {},
        "wrong_ids": {},
    }
    assert (told.code, told.err) == (0, "")
    assert wording(told.out, tmp_path) == snapshot("""\
reembed verify: all is as the run left it

run             RUN
rows checked    10
changed since   0 (a new text and vector by another program)
deleted since   0
not of the run  0 (skipped, or added since)
sample          10 rows embedded again, lowest cosine 1.000000
wrong           none
""")
    assert kept_files(path.parent) == before


def faults() -> Iterator[tuple[str, bytes | None, dict[str, int]]]:
    """A row's vector, and what is said of it. What the run did not write is always overwritten."""
    vector = FakeEmbedder(8).embed(["title 4 content 4"])[0]
    yield "a part of it", encode(vector[:7]), {"wrong length": 1}
    yield "longer", encode(np.append(vector, vector)), {"wrong length": 1}
    yield "NaN", encode(np.append(vector[:7], np.float32("nan"))), {"not finite": 1}
    yield "infinity", encode(np.append(vector[:7], np.float32("inf"))), {"not finite": 1}
    yield "zeros", encode(np.zeros(8, np.float32)), {"zeros": 1}
    yield "twice as long", encode(vector * 2), {"not of length 1": 1}
    yield "big-endian", b"\x02" + encode(vector)[1:], {"undecodable": 1}
    yield "cut", encode(vector)[:-2], {"undecodable": 1}
    yield "nothing", None, {"undecodable": 1}
    yield "another row's", new(5)["5"], {}
    yield "without the first byte", encode(vector)[1:], {}


def test_each_fault_of_a_vector_is_found_and_its_row_named(
    reembed: Call, path: Path, tmp_path: Path
) -> None:
    reembed("--db", path, range_rows=3)

    for what, vector, found in faults():
        put(path, "4", vector)
        checked = reembed("verify", "--db", path, "--json")

        wrong = {"overwritten": 1} | found
        assert (what, checked.code, checked.values["wrong"]) == (what, 1, wrong)
        assert checked.values["wrong_ids"] == {kind: ["4"] for kind in wrong}
        warnings = [line for line in checked.err.splitlines() if line.startswith("WARN")]
        for kind, warning in zip(wrong, warnings, strict=True):
            assert (
                wording(warning, tmp_path)
                == snapshot(
                    {
                        "overwritten": (
                            "WARN [RUN] row 4 holds a vector that the run did not write, "
                            "over the text that it embedded"
                        ),
                        "wrong length": (
                            "WARN [RUN] row 4 holds a vector of another length than the target's"
                        ),
                        "not finite": "WARN [RUN] row 4 holds a vector with NaN or infinity",
                        "zeros": "WARN [RUN] row 4 holds a vector of zeros",
                        "not of length 1": (
                            "WARN [RUN] row 4 holds a vector that is not of length 1, "
                            "though the model normalises"
                        ),
                        "undecodable": "WARN [RUN] row 4 holds a vector that can't be decoded",
                    }
                )[kind]
            )
        assert (
            wording(checked.error, tmp_path)
            == snapshot(
                {
                    2: "2 findings in TMP/m.db; run again to re-embed the rows that are wrong",
                    1: "1 findings in TMP/m.db; run again to re-embed the rows that are wrong",
                }
            )[len(wrong)]
        )

    told = reembed("verify", "--db", path)
    assert told.code == 1
    assert wording(told.out, tmp_path) == snapshot("""\
reembed verify: 1 findings

run             RUN
rows checked    10
changed since   0 (a new text and vector by another program)
deleted since   0
not of the run  0 (skipped, or added since)
sample          9 rows embedded again, lowest cosine 1.000000
wrong           a vector that the run did not write, over the text that it embedded 1
""")

    put(path, "4", new(4)["4"])
    assert reembed("verify", "--db", path).code == 0


def test_a_stamp_or_a_length_that_another_program_set_is_found(
    reembed: Call, tmp_path: Path
) -> None:
    rows = [memory(f"{i}", embedding=former(i), embedding_dim=8) for i in range(5)]
    path = make_store(tmp_path / "m.db", rows)
    change(path, "ALTER TABLE memories ADD COLUMN embedding_space TEXT")
    reembed("--db", path)
    change(
        path,
        "UPDATE memories SET embedding_space = 'former#none' WHERE id = '2'",
        "UPDATE memories SET embedding_dim = 7 WHERE id = '3'",
        # Which model made it is unknown then, and not wrong.
        "UPDATE memories SET embedding_space = NULL WHERE id = '4'",
    )

    checked = reembed("verify", "--db", path, "--json")

    assert (checked.code, checked.values["wrong_ids"]) == (1, {"other columns": ["2", "3"]})
    assert wording(line_with("row 2", checked.err), tmp_path) == snapshot(
        "WARN [RUN] row 2 holds a stamp or a length beside its vector that the run did not write"
    )
    assert reembed("--db", path).code == 0
    assert reembed("verify", "--db", path).code == 0


def test_a_vector_over_a_text_that_was_edited_since_is_stale(reembed: Call, path: Path) -> None:
    reembed("--db", path, range_rows=3)
    change(path, "UPDATE memories SET content = 'edited' WHERE id IN ('4', '7')")

    checked = reembed("verify", "--db", path, "--json")

    assert (checked.code, checked.values["wrong"]) == (1, {"stale": 2})
    assert checked.values["wrong_ids"] == {"stale": ["4", "7"]}
    assert checked.values["checked"] == 8

    # Once another program has given them vectors, they are its own concern.
    put(path, "4", former("edited"))
    put(path, "7", former("edited"))
    again = reembed("verify", "--db", path, "--json")
    assert (again.code, again.values["changed"], again.values["wrong"]) == (0, 2, {})


def test_the_previous_vector_under_an_edited_text_is_a_fault(reembed: Call, path: Path) -> None:
    reembed("--db", path)
    change(path, "UPDATE memories SET content = 'edited' WHERE id = '4'")
    put(path, "4", former(4))

    checked = reembed("verify", "--db", path, "--json")

    assert (checked.code, checked.values["wrong_ids"]) == (1, {"former": ["4"]})
    assert (checked.values["checked"], checked.values["changed"]) == (10, 0)


def test_skipped_new_and_deleted_rows_are_no_faults(reembed: Call, tmp_path: Path) -> None:
    rows = [memory("a"), memory("b", POISON), memory("c"), memory("d")]
    path = make_store(tmp_path / "m.db", rows)
    reembed("--db", path)
    change(
        path,
        "DELETE FROM memories WHERE id = 'd'",
        "INSERT INTO memories (id, tier, namespace, title, content, created_at, updated_at) "
        "VALUES ('e', 'mid', 'global', 'title', 'new', '', '')",
    )

    checked = reembed("verify", "--db", path, "--json")

    assert checked.code == 0
    assert (checked.values["checked"], checked.values["unwritten"]) == (2, 2)


def forge(path: Path, key: str) -> None:
    """Change a row's staged vector, as a fault of the machine before it was written would."""
    [place] = [place for place in root(path).iterdir() if place.name != "lock"]
    run = RunDirectory(place)
    manifest = run.read_manifest()
    for index, shards in run.list_shards().items():
        for shard in shards:
            rows = list(read_shards([shard], with_vectors=True))
            if key in [row.key for row in rows]:
                forged = tuple(
                    row._replace(vector=row.vector and row.vector[4:] + row.vector[:4])
                    if row.key == key
                    else row
                    for row in rows
                )
                shard.path.unlink()
                dimension = manifest.target["dimension"]
                vectors = RangeVectors(manifest.ranges[index], shard.part, dimension, forged)
                run.write_shard(vectors, pass_number=shard.pass_number)


@pytest.mark.parametrize(
    "real", [False, pytest.param(True, marks=pytest.mark.system)], ids=["fake", "real model"]
)
def test_a_vector_that_is_not_the_models_is_found_in_the_sample(
    reembed: Call, path: Path, real: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if real:
        request.getfixturevalue("real_model")
    reembed("--db", path, "--max-rows", "9", real=real)
    forge(path, "4")
    assert reembed("--db", path, real=real).code == 0

    checked = reembed("verify", "--db", path, "--json", real=real)

    assert (checked.code, checked.values["wrong"]) == (1, {"other vector": 1})
    assert checked.values["wrong_ids"] == {"other vector": ["4"]}
    assert (checked.values["sampled"], checked.values["lowest_cosine"] < 0.9) == (10, True)
    assert wording(line_with("row 4", checked.err), tmp_path) == snapshot(
        "WARN [RUN] row 4 holds a sampled row's vector that is not what the model gives for its "
        "text"
    )
    if real:  # The model may lie elsewhere by now.
        model = find_model(MINILM)
        assert model is not None
        (tmp_path / "moved").symlink_to(model)
        moved = reembed("verify", "--db", path, "--json", "--model", tmp_path / "moved", real=True)
        assert (moved.code, moved.values["sampled"]) == (1, 10)


def test_verify_with_a_model_that_is_another_now_says_so(
    reembed: Call, path: Path, tmp_path: Path
) -> None:
    reembed("--db", path)

    checked = reembed("verify", "--db", path, "--json", behaviour=0.05)

    assert checked.code == 3
    assert wording(checked.error, tmp_path) == snapshot(
        "all-MiniLM-L6-v2 (8-dim, fake) does not behave as it did when the run RUN began, so "
        "its rows can't be checked with it; bring the former model back"
    )
    # What needs no model was checked all the same.
    assert (checked.values["checked"], checked.values["wrong"]) == (10, {})
    assert (checked.values["sampled"], checked.values["unchecked"]) == (0, checked.error)
    put(path, "4", None)
    worse = reembed("verify", "--db", path, behaviour=0.05)
    assert worse.code == 1
    assert wording(worse.error, tmp_path) == snapshot(
        "2 findings in TMP/m.db; run again to re-embed the rows that are wrong"
    )


def test_without_the_model_the_digests_are_checked(
    reembed: Call, path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reembed("--db", path)

    def gone(target: object) -> NoReturn:
        raise EmbedderError("the model is nowhere on this machine")

    monkeypatch.setattr(embedders, "_build", gone)
    checked = reembed("verify", "--db", path, "--json")
    told = reembed("verify", "--db", path)
    put(path, "4", former(4))
    wrong = reembed("verify", "--db", path, "--json")

    assert (checked.code, checked.values["checked"], checked.values["sampled"]) == (0, 10, 0)
    assert checked.values["unchecked"] == "the model is nowhere on this machine"
    assert checked.values["lowest_cosine"] is None
    assert wording(told.out, tmp_path) == snapshot("""\
reembed verify: all is as the run left it by its digests; no sample was embedded again

run             RUN
rows checked    10
changed since   0 (a new text and vector by another program)
deleted since   0
not of the run  0 (skipped, or added since)
sample          not checked: the model is nowhere on this machine
wrong           none
""")
    assert wording(told.err, tmp_path) == snapshot(
        "WARN [RUN] the sample is not checked: the model is nowhere on this machine\n"
    )
    assert (wrong.code, wrong.values["wrong_ids"]) == (1, {"overwritten": ["4"]})


@pytest.mark.parametrize(
    "flag", [["--base-url", "http://x"], ["--insecure-key"], ["--key-secret", SECRET]]
)
def test_flags_of_a_server_are_refused_for_a_model_that_runs_here(
    flag: list[str], reembed: Call, path: Path, tmp_path: Path
) -> None:
    reembed("--db", path)

    refused = reembed("verify", "--db", path, *flag)

    assert refused.code == 2
    assert wording(refused.error, tmp_path).replace(flag[0], "FLAG") == snapshot(
        "FLAG is about a server, and all-MiniLM-L6-v2 (8-dim, fake) runs on this machine; "
        "leave it out"
    )


def test_what_is_wrong_is_right_after_another_run(reembed: Call, path: Path) -> None:
    reembed("--db", path)
    put(path, "4", None)
    change(path, "UPDATE memories SET content = 'edited' WHERE id = '5'")
    assert reembed("verify", "--db", path).code == 1

    reembed("--db", path)

    assert reembed("verify", "--db", path).code == 0


def test_verify_needs_a_run_that_has_replaced_something(
    reembed: Call, path: Path, tmp_path: Path
) -> None:
    reembed("--db", path, "--max-rows", "4")
    [run_id] = runs(path)

    checked = reembed("verify", "--db", path)
    named = reembed("verify", "--db", path, "--run", run_id)

    assert (checked.code, named.code) == (2, 2)
    assert wording(checked.error, tmp_path) == snapshot(
        "there is no run that has replaced anything on TMP/m.db; reembed status shows what there is"
    )
    assert wording(named.error, tmp_path) == snapshot(
        "the run RUN is staging, so there is nothing to do with it"
    )


def test_an_older_run_is_verified_by_name(reembed: Call, path: Path) -> None:
    first = reembed("--db", path, "--json").values["run_id"]
    reembed("--db", path, "--dim", "16")

    assert reembed("verify", "--db", path).code == 0
    older = reembed("verify", "--db", path, "--run", first, "--json")
    assert (older.code, older.values["run_id"]) == (1, first)
    assert older.values["wrong"] == {"overwritten": 10, "wrong length": 10}


# Status.


def test_without_runs_there_is_nothing_to_look_after(
    reembed: Call, path: Path, tmp_path: Path
) -> None:
    before = files(path.parent)

    told = reembed("status", "--db", path)
    listed = reembed("status", "--db", path, "--json")
    cleaned = reembed("cleanup", "--db", path, "--json")

    assert (told.code, told.err) == (0, "")
    assert wording(told.out, tmp_path) == snapshot(
        "no runs on TMP/m.db; nothing is staged, nothing to undo\n"
    )
    assert listed.values == {
        "schema_version": 1,
        "database": str(path),
        "at_work": None,
        "runs": [],
    }
    assert (cleaned.code, cleaned.values["removed"]) == (0, [])
    assert [reembed(command, "--db", path).code for command in ("verify", "rollback")] == [2, 2]
    assert files(path.parent) == before


def status_of(reembed: Call, path: Path) -> tuple[int, dict[str, Any]]:
    done = reembed("status", "--db", path, "--json")
    *_, last = done.values["runs"]
    return done.code, last


def test_status_shows_a_run_from_its_start_to_its_removal(reembed: Call, path: Path) -> None:
    reembed("--db", path, "--max-rows", "4", range_rows=2)
    [run_id] = runs(path)
    place = root(path) / run_id
    common = {
        "run_id": run_id,
        "model": "all-MiniLM-L6-v2",
        "dim": 8,
        "namespace": None,
        "mode": "all",
        "rows": 10,
        "ranges": 5,
        "run_directory": str(place),
    }

    code, staging = status_of(reembed, path)
    assert code == 0
    assert staging.items() >= (common | {"state": "staging", "staged": 4}).items()
    assert staging["next"] == "rerun the same command to resume; --fresh starts over"
    assert staging["bytes"] >= sum(map(len, files(place).values()))

    half_replace(reembed, path)
    code, replacing = status_of(reembed, path)
    assert code == 6
    changes = {"state": "replacing", "ranges_replaced": [[0, 0]], "rows_in_ranges_replaced": 2}
    assert replacing.items() >= (common | changes | {"staged": 10}).items()
    assert "jammed" in replacing["stopped"]
    assert replacing["next"] == "rerun the same command to finish it; reembed rollback undoes it"

    reembed("--db", path)
    code, replaced = status_of(reembed, path)
    assert code == 0
    changes = {"state": "replaced", "staged": None, "reembedded": 10, "skipped": 0, "stopped": None}
    assert replaced.items() >= (common | changes).items()
    assert replaced["backup_bytes"] > 10 * 32
    assert replaced["next"] == "reembed verify checks it; reembed rollback undoes it"

    reembed("rollback", "--db", path)
    code, undone = status_of(reembed, path)
    assert (code, undone["state"]) == (0, "rolled back")
    assert undone["next"] == "reembed cleanup removes it"

    reembed("cleanup", "--db", path)
    assert reembed("status", "--db", path, "--json").values["runs"] == []
    assert list(path.parent.iterdir()) == [path]


def test_status_tells_it_to_a_person(reembed: Call, tmp_path: Path) -> None:
    rows = [memory(f"{i}", POISON if i == 7 else None, namespace="notes") for i in range(10)]
    path = make_store(tmp_path / "m.db", rows)
    reembed("--db", path, "--namespace", "notes", "--json", range_rows=2)
    [done] = runs(path)
    half_replace(reembed, path, "--dim", "16")
    [_, half] = runs(path)

    told = reembed("status", "--db", path)

    assert told.code == 6
    error, shown = (
        wording(said.replace(done, "DONE").replace(half, "HALF"), tmp_path)
        for said in (told.error, told.out)
    )
    assert error == snapshot(
        "the replacement by run HALF (to all-MiniLM-L6-v2 (16-dim)) is incomplete: of ranges "
        "0-4, 0 hold new vectors, and 1-2 were being written"
    )
    assert re.sub(r"(begun|on disk) .*", r"\1 ...", shown) == snapshot("""\
run DONE, begun ...
state        replaced
target       all-MiniLM-L6-v2 (8-dim)
about        all, namespace notes
rows         10
re-embedded  9
skipped      1
on disk ...
directory    TMP/m.db.reembed/DONE
next         run HALF must be finished or rolled back first

run HALF, begun ...
state        replacing (SQLite can't work with TMP/m.db: jammed; look into it and run again)
target       all-MiniLM-L6-v2 (16-dim)
about        all, all namespaces
rows         10
staged       10
new vectors  in ranges 0 of 5 (counted from 0): 2 rows; the others hold the previous ones
on disk ...
directory    TMP/m.db.reembed/HALF
next         rerun the same command to finish it; reembed rollback undoes it
""")


def test_status_names_the_process_that_is_at_work_and_does_not_disturb_it(
    reembed: Call, path: Path, tmp_path: Path
) -> None:
    begin(fake_plan(path))
    with lock_database(path):
        told = reembed("status", "--db", path)
        listed = reembed("status", "--db", path, "--json")
        refused = reembed("rollback", "--db", path)

    assert (told.code, refused.code) == (0, 2)
    at_work, *_ = told.out.splitlines()
    assert re.sub(r"since .*", "since ...", wording(at_work, tmp_path)) == snapshot(
        "at work on TMP/m.db: process N, since ..."
    )
    assert listed.values["at_work"].startswith("process ")
    assert reembed("status", "--db", path, "--json").values["at_work"] is None


def test_rollback_and_cleanup_wait_for_no_run_that_is_at_work(
    reembed: Call, path: Path, tmp_path: Path
) -> None:
    reembed("--db", path)
    before = kept_files(path.parent)

    with lock_database(path):
        done = [reembed(command, "--db", path) for command in COMMANDS]

    assert [one.code for one in done] == [0, 0, 1, 1]
    for one in done[2:]:
        assert re.sub(r"since .* UTC", "since ...", wording(one.error, tmp_path)) == snapshot(
            "another run is at work on TMP/m.db (process N, since ...); wait for it to end"
        )
    assert kept_files(path.parent) == before


@pytest.mark.parametrize("command", ["status", "verify"])
def test_what_only_looks_changes_nothing(reembed: Call, path: Path, command: str) -> None:
    half_replace(reembed, path)
    before = files(path.parent)

    assert reembed(command, "--db", path).code == 6

    assert files(path.parent) == before


def test_an_incomplete_replacement_is_said_by_every_command(
    reembed: Call, path: Path, tmp_path: Path
) -> None:
    reembed("--db", path, "--dim", "16", range_rows=2)
    [finished] = runs(path)
    half_replace(reembed, path)
    [_, half] = runs(path)

    for arguments in (
        ("status",),
        ("verify",),
        ("verify", "--run", finished),
        ("rollback", "--run", finished),
        ("cleanup",),
        ("cleanup", "--yes"),
        ("cleanup", "--run", half, "--yes"),
        ("cleanup", "--run", finished, "--yes"),
    ):
        done = reembed(*arguments, "--db", path)
        asked = " ".join(arguments).replace(finished, "FINISHED").replace(half, "HALF")
        assert (asked, done.code) == (asked, 6)
        said = wording(done.error.replace(half, "HALF"), tmp_path)
        what, _, advice = said.partition("; ")
        assert what == snapshot(
            "the replacement by run HALF (to all-MiniLM-L6-v2 (8-dim)) is incomplete: of ranges "
            "0-4, 0 hold new vectors, and 1-2 were being written"
        )
        assert (
            advice
            == snapshot(
                {
                    "status": "",
                    "verify": "finish it or roll back",
                    "verify --run FINISHED": "finish it or roll it back first",
                    "rollback --run FINISHED": "finish it or roll it back first",
                    "cleanup": "finish it or roll it back first",
                    "cleanup --yes": "finish it or roll it back first",
                    "cleanup --run HALF --yes": "finish it or roll it back first",
                    "cleanup --run FINISHED --yes": "finish it or roll it back first",
                }
            )[asked]
        )
    assert runs(path) == [finished, half]
    assert reembed("rollback", "--db", path, "--json").values["run_id"] == half


def test_verify_of_an_incomplete_replacement_checks_what_is_new(reembed: Call, path: Path) -> None:
    half_replace(reembed, path)

    checked = reembed("verify", "--db", path, "--json")

    assert (checked.code, checked.values["wrong"]) == (6, {"overwritten": 8})


# Cleanup.


def test_cleanup_keeps_the_only_way_back_unless_it_is_told_so(
    reembed: Call, path: Path, tmp_path: Path
) -> None:
    first = reembed("--db", path, "--json").values["run_id"]
    second = reembed("--db", path, "--dim", "16", "--json").values["run_id"]
    third = reembed("--db", path, "--namespace", "global", "--json").values["run_id"]
    reembed("rollback", "--db", path)

    cleaned = reembed("cleanup", "--db", path, "--json")

    assert cleaned.code == 0
    assert cleaned.values["removed"] == [first, third]
    assert cleaned.values["freed_bytes"] > 0
    why = "it is the only way back to the previous vectors; --yes removes it"
    assert cleaned.values["kept"] == {second: why}
    assert runs(path) == [second]
    named = reembed("cleanup", "--db", path, "--run", second)
    assert (named.code, runs(path)) == (0, [second])
    assert wording(named.out.replace(second, "SECOND"), tmp_path) == snapshot("""\
reembed: 0 runs removed, 0 bytes freed

SECOND  kept: it is the only way back to the previous vectors; --yes removes it
""")

    last = reembed("cleanup", "--db", path, "--yes")

    assert (last.code, last.err) == (0, "")
    said = wording(last.out.replace(second, "SECOND"), tmp_path)
    assert re.sub(r"[\d.,]+ (kB|bytes|MB)", "...", said) == snapshot("""\
reembed: 1 runs removed, ... freed

SECOND  removed
""")
    assert list(path.parent.iterdir()) == [path]


def test_cleanup_keeps_every_backup_that_no_newer_run_makes_needless(
    reembed: Call, tmp_path: Path
) -> None:
    rows = [
        memory(f"{i}", POISON if i == 1 else None, embedding=former(i), embedding_dim=8)
        for i in range(4)
    ]
    path = make_store(
        tmp_path / "m.db", [replace(row, namespace="ab"[int(row.id) % 2]) for row in rows]
    )
    a = reembed("--db", path, "--namespace", "a", "--json").values["run_id"]
    b = reembed("--db", path, "--namespace", "b", "--json").values["run_id"]
    retried = reembed("--db", path, "--namespace", "b", "--retry-skipped", "--json")
    assert retried.code == 5
    change(path, "UPDATE memories SET content = 'mended' WHERE id = '1'")
    retry = reembed("--db", path, "--namespace", "b", "--retry-skipped", "--json").values["run_id"]

    assert reembed("cleanup", "--db", path, "--json").values["removed"] == []
    assert runs(path) == sorted([a, b, retry])

    everything = reembed("--db", path, "--dim", "16", "--json").values["run_id"]
    assert reembed("cleanup", "--db", path, "--json").values["removed"] == sorted([a, b, retry])
    assert runs(path) == [everything]


@pytest.mark.parametrize("skipped", ["keep", "clear"])
def test_cleanup_keeps_the_backup_of_rows_that_newer_runs_skipped(
    skipped: str, reembed: Call, tmp_path: Path
) -> None:
    rows = [
        memory(f"{i}", POISON if i == 1 else None, embedding=former(i), embedding_dim=8)
        for i in range(4)
    ]
    path = make_store(tmp_path / "m.db", rows)
    first = reembed("--db", path, "--json", lenient=1).values["run_id"]
    second = reembed("--db", path, "--dim", "16", "--skipped", skipped, "--json").values["run_id"]

    assert reembed("cleanup", "--db", path, "--json").values["removed"] == []
    assert runs(path) == sorted([first, second])

    third = reembed("--db", path, "--dim", "12", "--json", lenient=1).values["run_id"]
    assert reembed("cleanup", "--db", path, "--json").values["removed"] == sorted([first, second])
    assert runs(path) == [third]


def test_a_second_run_to_the_same_model_is_no_way_back_to_the_former_one(
    reembed: Call, path: Path
) -> None:
    first = reembed("--db", path, "--json").values["run_id"]
    second = reembed("--db", path, "--json").values["run_id"]

    assert reembed("cleanup", "--db", path, "--json").values["removed"] == [second]
    assert reembed("rollback", "--db", path, "--json").values["run_id"] == first
    assert stored(path) == old(*range(10))


def test_cleanup_removes_unfinished_runs_only_by_name(
    reembed: Call, path: Path, tmp_path: Path
) -> None:
    reembed("--db", path, "--max-rows", "4")
    [staging] = runs(path)

    kept = reembed("cleanup", "--db", path, "--yes", "--json")
    unknown = reembed("cleanup", "--db", path, "--run", "another")
    named = reembed("cleanup", "--db", path, "--run", staging, "--json")

    assert (kept.code, kept.values["removed"]) == (0, [])
    why = "it is not finished; --run names it to remove it all the same"
    assert kept.values["kept"] == {staging: why}
    assert unknown.code == 2
    assert wording(unknown.error, tmp_path) == snapshot(
        "there is no run another; reembed status names those that there are"
    )
    assert (named.code, named.values["removed"]) == (0, [staging])
    assert list(path.parent.iterdir()) == [path]


def test_cleanup_of_one_run_leaves_the_others(reembed: Call, path: Path) -> None:
    first = reembed("--db", path, "--json").values["run_id"]
    second = reembed("--db", path, "--json").values["run_id"]

    done = reembed("cleanup", "--db", path, "--run", second, "--yes", "--json")

    assert done.values["removed"] == [second]
    assert runs(path) == [first]


# Runs that wrote nothing.


def docs(path: Path, count: int = 6) -> tuple[str, ...]:
    """An ordinary table of which the last row has no text and no vector; the flags for it."""
    change(
        path,
        "CREATE TABLE docs (id INTEGER PRIMARY KEY, body TEXT, v BLOB)",
        f"INSERT INTO docs (id) VALUES ({count - 1})",
        *(
            f"INSERT INTO docs VALUES ({at}, {at!r}, x'0000803f0000803f')"
            for at in range(count - 1)
        ),
    )
    return ("--table", "docs", "--text", "body", "--vector", "v")


@pytest.mark.parametrize("mode", ["--retry-skipped", "--missing-only", "same again"])
@pytest.mark.parametrize("kind", ["ai-memory", "table"])
def test_a_run_that_wrote_nothing_hides_no_other(
    mode: str, kind: str, reembed: Call, tmp_path: Path
) -> None:
    path = tmp_path / "m.db"
    flags: tuple[str, ...] = ()
    if kind == "table":
        flags = docs(path)
    else:
        rows = [memory(f"{i}", embedding=former(i), embedding_dim=8) for i in range(5)]
        sealed = memory("9", encrypted_envelope=b"sealed")
        make_store(path, [*rows, sealed])
    before = all_columns(path)
    first = reembed("--db", path, *flags, "--json").values["run_id"]
    between = all_columns(path)
    extra = [] if mode == "same again" else [mode]
    empty = reembed("--db", path, *flags, *extra, "--json")
    assert (empty.code, all_columns(path)) == (0, between)
    run_id = empty.values["run_id"]

    newest = reembed("status", "--db", path, "--json").values["runs"][-1]
    assert (newest["run_id"], newest["state"]) == (run_id, "wrote nothing")
    checked = reembed("verify", "--db", path, "--json")
    assert (checked.code, checked.values["checked"]) == (0, 5)
    assert checked.values["run_id"] == (run_id if mode == "same again" else first)
    refused = reembed("rollback", "--db", path, "--run", run_id)
    assert refused.code == 2
    assert wording(refused.error.replace(run_id, "EMPTY"), tmp_path) == snapshot(
        "the run EMPTY wrote nothing, so there is nothing to do with it; reembed status "
        "shows the runs"
    )
    assert reembed("rollback", "--db", path, "--run", first, "--json").values["restored"] == 5
    assert all_columns(path) == before
    assert reembed("cleanup", "--db", path, "--json").values["removed"] == [first, run_id]


def test_only_a_run_that_wrote_something_names_a_way_back(reembed: Call, path: Path) -> None:
    first, again = reembed("--db", path), reembed("--db", path)

    assert [run.out.splitlines()[0].split(",")[0] for run in (first, again)] == [
        "reembed: 10/10 re-embedded"
    ] * 2
    assert ("way back" in first.out, "way back" in again.out) == (True, False)


def test_skipped_rows_are_retried_after_runs_that_wrote_nothing(
    reembed: Call, tmp_path: Path
) -> None:
    rows = [memory("a"), memory("b", POISON), memory("c", encrypted_envelope=b"e"), memory("d")]
    path = make_store(tmp_path / "m.db", rows)
    reembed("--db", path)
    change(path, "UPDATE memories SET content = 'mended' WHERE id = 'b'")
    put(path, "b", former("b"))
    put(path, "c", former("c"))
    assert reembed("--db", path, "--missing-only", "--json").values["total"] == 0

    done = reembed("--db", path, "--retry-skipped", "--json")

    assert (done.values["total"], done.values["reembedded"]) == (2, 1)
    again = reembed("--db", path, "--retry-skipped", "--json")
    assert (again.values["total"], again.values["reembedded"]) == (1, 0)
    last = reembed("--db", path, "--retry-skipped", "--json")
    assert (last.values["total"], last.values["skipped"]) == (1, 1)


def test_a_run_that_took_vectors_away_has_written(reembed: Call, tmp_path: Path) -> None:
    rows = [memory("a", embedding=former("a"), embedding_dim=8, encrypted_envelope=b"e")]
    path = make_store(tmp_path / "m.db", rows)
    done = reembed("--db", path, "--skipped", "clear", "--json")

    assert (done.values["reembedded"], stored(path)) == (0, {"a": None})
    assert status_of(reembed, path)[1]["state"] == "replaced"
    assert reembed("rollback", "--db", path).code == 0
    assert stored(path) == {"a": former("a")}


def note(path: Path, **changes: Any) -> RunDirectory:
    """Change what the manifest of the only run says."""
    [run_id] = runs(path)
    run = RunDirectory(root(path) / run_id)
    run.write_manifest(replace(run.read_manifest(), **changes))
    return run


def test_an_empty_run_of_an_older_version_is_ended_by_a_rollback_that_finds_nothing(
    reembed: Call, path: Path, tmp_path: Path
) -> None:
    change(
        path,
        "INSERT INTO memories (id, tier, namespace, title, content, created_at, updated_at, "
        "encrypted_envelope) VALUES ('sealed', 'mid', 'global', 'sealed', '', '', '', x'00')",
    )
    first = reembed("--db", path, "--json").values["run_id"]
    empty = reembed("--db", path, "--missing-only", "--json").values["run_id"]
    run = RunDirectory(root(path) / empty)
    run.write_manifest(replace(run.read_manifest(), state=State.REPLACED, wrote=True))

    checked = reembed("verify", "--db", path)
    undone = reembed("rollback", "--db", path)

    assert (checked.code, undone.code) == (2, 2)
    assert wording(checked.error.replace(empty, "EMPTY"), tmp_path) == snapshot(
        "the run EMPTY wrote nothing, so there is nothing to verify"
    )
    assert wording(undone.error.replace(empty, "EMPTY"), tmp_path) == snapshot(
        "the run EMPTY wrote nothing, so there was nothing to put back; it is ended, and "
        "reembed status shows the others"
    )
    assert reembed("rollback", "--db", path, "--json").values["run_id"] == first
    change(path, "DELETE FROM memories WHERE id = 'sealed'")
    assert stored(path) == old(*range(10))


def test_a_replacement_that_wrote_nothing_is_ended_by_a_rollback(reembed: Call, path: Path) -> None:
    reembed("--db", path, "--max-rows", "4", range_rows=2)
    note(path, state=State.REPLACING)
    assert reembed("status", "--db", path).code == 6

    undone = reembed("rollback", "--db", path, "--json")

    assert (undone.code, undone.values["state"]) == (0, "wrote nothing")
    assert reembed("status", "--db", path).code == 0
    assert stored(path) == old(*range(10))


def test_a_rollback_that_puts_nothing_back_does_not_close_the_run(
    reembed: Call, path: Path, tmp_path: Path
) -> None:
    reembed("--db", path)
    change(path, "UPDATE memories SET content = content || '!'")
    now = all_columns(path)

    undone = reembed("rollback", "--db", path)

    assert (undone.code, all_columns(path)) == (1, now)
    assert wording(undone.out, tmp_path) == snapshot("""\
reembed: nothing of run RUN was put back

restored   0 rows hold their previous vectors again
as before  0 rows
left       10 rows (named in TMP/m.db.reembed/RUN/left.jsonl)
""")
    assert wording(undone.error, tmp_path) == snapshot(
        "none of the 10 rows that the run RUN wrote in TMP/m.db could be put back (its text "
        "was edited since 10), so it stays as it is; if nothing of it is wanted back, "
        "reembed cleanup --run RUN --yes removes it"
    )
    assert status_of(reembed, path)[1]["state"] == "replaced"

    change(path, "UPDATE memories SET content = rtrim(content, '!')")
    assert reembed("rollback", "--db", path, "--json").values["restored"] == 10
    assert stored(path) == old(*range(10))


def test_a_rollback_that_is_repeated_after_a_kill_closes_the_run(reembed: Call, path: Path) -> None:
    """It finds all rows put back already."""
    reembed("--db", path)
    reembed("rollback", "--db", path)
    note(path, state=State.ROLLING_BACK)

    undone = reembed("rollback", "--db", path, "--json")

    assert (undone.code, undone.values["state"]) == (0, "rolled back")
    assert (undone.values["restored"], undone.values["unchanged"]) == (0, 10)


def test_a_rollback_that_finds_all_as_before_says_which_run_is_left(
    reembed: Call, path: Path, tmp_path: Path
) -> None:
    first = reembed("--db", path, "--json").values["run_id"]
    second = reembed("--db", path, "--dim", "16", "--json").values["run_id"]
    for key, vector in new(*range(10)).items():
        put(path, key, vector)
    change(path, "UPDATE memories SET embedding_dim = 8")

    undone = reembed("rollback", "--db", path)

    assert undone.code == 0
    assert undone.out.index(second) < undone.out.index(first)
    assert wording(undone.out, tmp_path) == snapshot("""\
reembed: run RUN is rolled back

restored   0 rows hold their previous vectors again
as before  10 rows
left       0 rows
next       no row was changed; reembed rollback --run RUN undoes the run before
""")


def test_rows_that_do_not_keep_what_was_put_back_are_left_and_named(
    reembed: Call, path: Path, tmp_path: Path
) -> None:
    run_id = reembed("--db", path, "--json").values["run_id"]
    change(
        path,
        "CREATE TRIGGER spoil AFTER UPDATE OF embedding ON memories WHEN new.id = '5' "
        "BEGIN UPDATE memories SET embedding = zeroblob(33) WHERE id = new.id; END",
    )

    undone = reembed("rollback", "--db", path, "--json")

    assert (undone.code, undone.values["state"]) == (6, "rolled back")
    assert (undone.values["restored"], undone.values["unchanged"]) == (9, 0)
    assert undone.values["left_by_reason"] == {NOT_KEPT: 1}
    assert lines(root(path) / run_id / "left.jsonl") == [{"id": "5", "reason": NOT_KEPT}]
    assert wording(undone.error, tmp_path) == snapshot(
        "1 rows of TMP/m.db were put back and hold something else by now (the first: 5): a "
        "trigger of the database or another program has changed them since; drop or stop it, "
        "and re-embed these rows with the former model"
    )


def test_rows_that_another_program_changes_after_they_were_put_back_are_counted(
    reembed: Call, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reembed("--db", path)

    def late(store: Store, written: Written) -> bool:
        put(path, "3", bytes(33))
        change(path, "DELETE FROM memories WHERE id = '7'")
        return reads_back(store, written)

    monkeypatch.setattr(rollback, "reads_back", late)
    undone = reembed("rollback", "--db", path, "--json")

    assert (undone.code, undone.values["restored"], undone.values["unchanged"]) == (6, 8, 0)
    assert undone.values["left_by_reason"] == {NOT_KEPT: 1, DELETED: 1}


def test_rows_without_a_key_are_not_taken_for_others_after_a_vacuum(
    reembed: Call, tmp_path: Path
) -> None:
    path = tmp_path / "t.db"
    texts = ("first", "same", "same", "last")
    change(
        path,
        "CREATE TABLE t (body TEXT, v BLOB)",
        *(f"INSERT INTO t VALUES ('{text}', x'000{at}803f')" for at, text in enumerate(texts)),
    )
    reembed("--db", path, "--table", "t", "--text", "body", "--vector", "v")
    # An edit is none, not even to another row's text.
    change(path, "UPDATE t SET body = 'last' WHERE body = 'first'")
    assert reembed("verify", "--db", path, "--json").values["wrong"] == {"stale": 1}
    change(path, "UPDATE t SET body = 'first' WHERE rowid = 1")
    assert reembed("verify", "--db", path).code == 0

    change(path, "DELETE FROM t WHERE rowid = 1")
    with closing(sqlite3.connect(path)) as db:
        db.execute("VACUUM")
    now = all_columns(path)

    for command in ("verify", "rollback"):
        refused = reembed(command, "--db", path)
        assert (refused.code, all_columns(path)) == (1, now)
        assert wording(refused.error, tmp_path) == snapshot(
            "the rows of TMP/t.db have other numbers now than when the run RUN wrote them "
            "(VACUUM does that to a table without a key), so it can't be told which row is "
            "which; restore a copy of the file from before, or re-embed the table with the "
            "former model"
        )
    assert status_of(reembed, path)[1]["state"] == "replaced"


# Without runs.


def llm_database(path: Path) -> Path:
    change(
        path,
        "CREATE TABLE collections (id INTEGER PRIMARY KEY, name TEXT, model TEXT)",
        "CREATE TABLE embeddings (collection_id INTEGER, id TEXT, embedding BLOB, content TEXT)",
    )
    return path


def vec_database(path: Path) -> Path:
    with closing(vec_connect(path)) as db, db:
        db.execute("CREATE VIRTUAL TABLE docs USING vec0(embedding float[4], +body TEXT)")
    return path


def table_database(path: Path) -> Path:
    docs(path)
    return path


WITHOUT_RUNS: Mapping[str, Callable[[Path], Path]] = {
    "ai-memory": lambda path: make_store(path, [memory("a")]),
    "llm": llm_database,
    "vec0": vec_database,
    "table": table_database,
}


@pytest.mark.parametrize("kind", WITHOUT_RUNS)
def test_any_database_without_runs_is_told_so(kind: str, reembed: Call, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    path = WITHOUT_RUNS[kind](tmp_path / "store" / "m.db")
    before = files(path.parent)

    done = {command: reembed(command, "--db", path) for command in COMMANDS}

    assert {command: ran.code for command, ran in done.items()} == {
        "status": 0,
        "verify": 2,
        "rollback": 2,
        "cleanup": 0,
    }
    assert wording(done["status"].out, tmp_path) == snapshot(
        "no runs on TMP/store/m.db; nothing is staged, nothing to undo\n"
    )
    assert wording(done["cleanup"].out, tmp_path) == snapshot(
        "no runs on TMP/store/m.db; nothing to remove\n"
    )
    for command in ("verify", "rollback"):
        assert wording(done[command].error, tmp_path) == snapshot(
            "there is no run that has replaced anything on TMP/store/m.db; reembed status "
            "shows what there is"
        )
    assert files(path.parent) == before


def test_a_table_of_ones_own_is_looked_after_without_its_flags(
    reembed: Call, tmp_path: Path
) -> None:
    path = tmp_path / "m.db"
    flags = docs(path)
    before = all_columns(path)
    reembed("--db", path, *flags)

    for command in COMMANDS:
        assert (command, reembed(command, "--db", path).code) == (command, 0)

    assert all_columns(path) == before
    assert runs_left(path) == []
    assert [reembed(command, "--db", path).code for command in COMMANDS] == [0, 2, 2, 0]


def runs_left(path: Path) -> list[str]:
    return runs(path) if root(path).exists() else []


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, snapshot("there is no database at TMP/m.db; name an existing one with --db")),
        (b"", snapshot("TMP/m.db is empty: it holds no store; name the right file with --db")),
        (
            b"text",
            snapshot(
                "TMP/m.db is not a readable SQLite database: it is another kind of file, "
                "or encrypted (SQLCipher); reembed needs a plain one, so decrypt a copy "
                "first if it is encrypted"
            ),
        ),
    ],
)
def test_a_file_that_is_no_database_is_refused_by_every_command(
    command: str, content: bytes | None, says: str, reembed: Call, tmp_path: Path
) -> None:
    path = tmp_path / "m.db"
    if content is not None:
        path.write_bytes(content)

    done = reembed(command, "--db", path)

    assert (done.code, done.out) == (1, "")
    assert wording(done.error, tmp_path) == says


def test_a_check_follows_rows_into_another_namespace_and_counts_only_the_runs_own(
    reembed: Call, tmp_path: Path
) -> None:
    rows = [memory(f"{at}", namespace="ab"[at % 2]) for at in range(10)]
    path = make_store(tmp_path / "m.db", rows)
    change(
        path,
        "ALTER TABLE memories ADD COLUMN embedding_space TEXT",
    )
    reembed("--db", path, "--namespace", "a")
    change(path, "UPDATE memories SET namespace = 'c' WHERE id IN ('2', '4')")

    checked = reembed("verify", "--db", path, "--json")

    assert (checked.code, checked.values["checked"], checked.values["unwritten"]) == (0, 5, 0)
    assert checked.values["sampled"] == 5
    put(path, "4", former(4))
    assert reembed("verify", "--db", path, "--json").values["wrong_ids"] == {"overwritten": ["4"]}
    # Of rows that were current already, such a run is not about.
    reembed("--db", path, "--skip-current-space")
    current = reembed("verify", "--db", path, "--json")
    assert (current.values["checked"], current.values["unwritten"]) == (5, 0)
