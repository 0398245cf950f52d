"""The next step that `status` names for a run: it is taken, and gets further."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from inline_snapshot import snapshot

from reembed.transforms.embedders.fake import POISON
from reembed.transforms.errors import StagingError
from reembed.transforms.staging import RunDirectory
from reembed.transforms.stores.demo import hashed_vector
from tests.conftest import Call, change, half_replace, jam, make_store, memory, select, unjam
from tests.wording import wording


def rows(path: Path, *texts: str | None) -> Path:
    """A store of ten rows; the texts are those of the first ones."""
    more = [None] * (10 - len(texts))
    return make_store(
        path,
        [
            memory(f"{at}", text, embedding=hashed_vector(f"{at}", 8), embedding_dim=8)
            for at, text in enumerate([*texts, *more])
        ],
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return rows(tmp_path / "m.db")


def run_of(reembed: Call, path: Path, at: int = -1) -> dict[str, Any]:
    """The part of status about one run."""
    found: dict[str, Any] = reembed("status", "--db", path, "--json").values["runs"][at]
    return found


def state(reembed: Call, path: Path) -> tuple[str, str]:
    run = run_of(reembed, path)
    return run["state"], run["next"]


RESUME = snapshot("rerun the same command to resume; --fresh starts over")


def test_a_run_that_is_staged_in_part_is_resumed_or_started_over(reembed: Call, path: Path) -> None:
    reembed("--db", path, "--max-rows", "4", range_rows=2)
    assert state(reembed, path) == ("staging", RESUME)

    fresh = reembed("--db", path, "--fresh", "--max-rows", "4", range_rows=2)
    assert (fresh.code, len(fresh.texts)) == (0, 4)
    resumed = reembed("--db", path, "--max-rows", "4", range_rows=2)
    assert (resumed.code, len(resumed.texts)) == (0, 4)
    assert run_of(reembed, path)["staged"] == 8


def test_a_run_that_was_stopped_while_it_staged_is_resumed(
    reembed: Call, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reembed("--db", path, "--max-rows", "4", range_rows=2)
    with monkeypatch.context() as patch:
        patch.setattr("reembed.pipeline.run.require_room", fail)
        assert reembed("--db", path, range_rows=2).code == 1
    run = run_of(reembed, path)
    assert (run["state"], run["stopped"], run["stopped_code"]) == ("staging", "no room", 1)
    assert run["next"] == RESUME

    done = reembed("--db", path, range_rows=2)

    assert (done.code, len(done.texts)) == (0, 6)
    assert run_of(reembed, path)["stopped_code"] is None


def fail(*_: object) -> None:
    raise StagingError("no room")


@pytest.mark.parametrize(
    ("mode", "following"),
    [
        (
            (),
            snapshot(
                "rerun the command with --retry-skipped, without --max-rows, once the model takes "
                "the rows in TMP/m.db.reembed/RUN/skipped.jsonl, or allow more of them with "
                "--max-skipped (never all)"
            ),
        ),
        (
            ("--missing-only",),
            snapshot(
                "rerun the command with --retry-skipped, without --max-rows and --missing-only, "
                "once the model takes the rows in TMP/m.db.reembed/RUN/skipped.jsonl, or allow "
                "more of them with --max-skipped (never all)"
            ),
        ),
        (
            ("--max-rows", "10"),
            snapshot(
                "rerun the command with --retry-skipped, without --max-rows, once the model takes "
                "the rows in TMP/m.db.reembed/RUN/skipped.jsonl, or allow more of them with "
                "--max-skipped (never all)"
            ),
        ),
    ],
)
@pytest.mark.parametrize("step", ["--retry-skipped", "--max-skipped"])
def test_after_too_many_failures_it_is_not_the_same_command_that_helps(
    reembed: Call, tmp_path: Path, mode: tuple[str, ...], following: str, step: str
) -> None:
    path = rows(tmp_path / "m.db", *[POISON] * 6)
    change(path, "UPDATE memories SET embedding = NULL")
    flags = ("--db", path, *mode)
    assert [reembed(*flags).code, reembed(*flags).code] == [5, 5]
    run = run_of(reembed, path)
    assert (run["state"], run["stopped_code"]) == ("staging", 5)
    assert wording(run["next"], tmp_path) == following

    if step == "--retry-skipped":
        done = reembed("--db", path, "--retry-skipped", "--json", lenient=1)
        assert (done.code, done.values["reembedded"]) == (0, 10)
    else:
        done = reembed(*flags, "--max-skipped", "70%", "--json")
        assert (done.code, done.values["reembedded"], done.values["skipped"]) == (0, 4, 6)


@pytest.mark.parametrize("step", ["--retry-skipped", "edit", "delete"])
def test_of_a_store_that_is_moved_as_a_whole_rows_are_mended_or_deleted(
    reembed: Call, tmp_path: Path, step: str
) -> None:
    path = tmp_path / "embeddings.db"
    change(
        path,
        "CREATE TABLE collections (id INTEGER PRIMARY KEY, name TEXT, model TEXT)",
        "CREATE TABLE embeddings (collection_id INTEGER, id TEXT, embedding BLOB, content TEXT)",
        "INSERT INTO collections VALUES (1, 'notes', 'letters')",
        *(
            f"INSERT INTO embeddings VALUES (1, 'i{at}', x'0000803f0000803f', '{text}')"
            for at, text in enumerate(["a", "b", POISON])
        ),
    )
    flags = ("--db", path, "--model", "m")
    assert reembed(*flags).code == 5
    run = run_of(reembed, path)
    assert wording(run["next"], tmp_path) == snapshot(
        "rerun the command with --retry-skipped, without --max-rows, once the model takes the "
        "rows in TMP/embeddings.db.reembed/RUN/skipped.jsonl, or once they are edited or deleted"
    )

    if step == "--retry-skipped":
        assert reembed(*flags, "--retry-skipped", lenient=1).code == 0
        return
    statements = {
        "edit": "UPDATE embeddings SET content = 'c' WHERE id = 'i2'",
        "delete": "DELETE FROM embeddings WHERE id = 'i2'",
    }
    change(path, statements[step])
    assert reembed(*flags, "--retry-skipped").code == 0
    assert select(path, "SELECT model FROM collections") == [("m",)]


def test_an_incomplete_replacement_is_finished_or_undone(reembed: Call, path: Path) -> None:
    half_replace(reembed, path)
    expected = snapshot(
        ("replacing", "rerun the same command to finish it; reembed rollback undoes it")
    )
    assert state(reembed, path) == expected
    assert reembed("--db", path).code == 0
    assert state(reembed, path)[0] == "replaced"

    half_replace(reembed, path, "--dim", "16")
    assert state(reembed, path) == expected
    assert reembed("rollback", "--db", path).code == 0
    assert state(reembed, path)[0] == "rolled back"


def test_a_part_of_a_replacement_with_too_many_failures_is_retried_or_undone(
    reembed: Call, tmp_path: Path
) -> None:
    path = rows(tmp_path / "m.db", None, None, POISON, POISON, POISON, POISON)
    flags = ("--db", path, "--max-rows", "2", "--partial")
    assert [reembed(*flags, range_rows=2).code for _ in range(3)] == [6, 6, 6]
    run = run_of(reembed, path)
    assert (run["state"], run["stopped_code"]) == ("replacing", 5)
    assert wording(run["next"], tmp_path) == snapshot(
        "rerun the command with --retry-skipped, without --max-rows, once the model takes the "
        "rows in TMP/m.db.reembed/RUN/skipped.jsonl, or allow more of them with --max-skipped "
        "(never all); reembed rollback undoes it"
    )

    done = reembed("--db", path, "--retry-skipped", "--json", lenient=1)

    assert (done.code, done.values["reembedded"]) == (0, 10)


def test_a_replaced_run_is_verified_and_undone_by_its_name_where_it_takes_one(
    reembed: Call, tmp_path: Path
) -> None:
    path = make_store(
        tmp_path / "m.db", [memory(f"{at}", namespace="ab"[at % 2]) for at in range(4)]
    )
    for namespace in "ab":
        reembed("--db", path, "--namespace", namespace)
    first, second = (run_of(reembed, path, at)["run_id"] for at in (0, 1))
    following = run_of(reembed, path, 0)["next"]
    assert following.replace(first, "FIRST") == snapshot(
        "reembed verify --run FIRST checks it; reembed rollback --run FIRST undoes it"
    )
    assert state(reembed, path) == snapshot(
        ("replaced", "reembed verify checks it; reembed rollback undoes it")
    )
    assert reembed("verify", "--db", path, "--run", first).code == 0
    assert reembed("rollback", "--db", path, "--run", first).code == 0
    reembed("--db", path, "--dim", "16")
    third = run_of(reembed, path)["run_id"]
    following = run_of(reembed, path, 1)["next"]
    assert following.replace(second, "SECOND").replace(third, "THIRD") == snapshot(
        "reembed verify --run SECOND checks it; run THIRD must be rolled back before it can be"
    )
    assert reembed("rollback", "--db", path, "--run", second).code == 2
    assert reembed("rollback", "--db", path).code == 0
    assert reembed("rollback", "--db", path, "--run", second).code == 0


def test_a_rollback_that_was_cut_off_is_finished(reembed: Call, path: Path) -> None:
    reembed("--db", path, range_rows=2)
    jam(path, "5")
    assert reembed("rollback", "--db", path).code == 6
    unjam(path)
    assert state(reembed, path) == snapshot(("rolling back", "reembed rollback finishes it"))

    assert reembed("rollback", "--db", path).code == 0

    assert state(reembed, path) == snapshot(("rolled back", "reembed cleanup removes it"))


def test_another_run_that_is_incomplete_comes_first(reembed: Call, path: Path) -> None:
    reembed("--db", path, "--dim", "16")
    half_replace(reembed, path)
    half = run_of(reembed, path)["run_id"]
    assert run_of(reembed, path, 0)["next"].replace(half, "HALF") == snapshot(
        "run HALF must be finished or rolled back first"
    )
    assert reembed("cleanup", "--db", path).code == 6

    assert reembed("rollback", "--db", path).code == 0

    assert run_of(reembed, path, 0)["next"] == snapshot(
        "reembed verify checks it; reembed rollback undoes it"
    )


def test_runs_that_have_ended_without_a_way_back_are_removed(reembed: Call, path: Path) -> None:
    reembed("--db", path)
    reembed("rollback", "--db", path)
    assert state(reembed, path) == snapshot(("rolled back", "reembed cleanup removes it"))
    change(
        path,
        "INSERT INTO memories (id, tier, namespace, title, content, created_at, updated_at, "
        "encrypted_envelope) VALUES ('sealed', 'mid', 'global', 'sealed', '', '', '', x'00')",
    )
    reembed("--db", path, "--missing-only")
    assert state(reembed, path) == snapshot(("wrote nothing", "reembed cleanup removes it"))
    for _ in range(2):
        reembed("--db", path)
    assert state(reembed, path) == snapshot(
        ("wrote nothing", "reembed verify checks it; reembed cleanup removes it")
    )
    assert reembed("verify", "--db", path).code == 0

    assert len(reembed("cleanup", "--db", path, "--json").values["removed"]) == 3

    assert state(reembed, path)[0] == "replaced"


def test_nothing_is_named_by_a_sentence_that_has_to_be_read(reembed: Call, tmp_path: Path) -> None:
    """The kind of what stopped a run is noted beside its sentence."""
    path = rows(tmp_path / "m.db", *[POISON] * 6)
    reembed("--db", path)
    place = Path(run_of(reembed, path)["run_directory"])
    run = RunDirectory(place)
    run.write_manifest(replace(run.read_manifest(), stopped="another sentence"))

    assert "--retry-skipped" in state(reembed, path)[1]


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        (
            "--missing-only",
            snapshot(
                "2 findings in TMP/m.db; run again without --missing-only to re-embed the rows "
                "that are wrong"
            ),
        ),
        (
            "--skip-current-space",
            snapshot(
                "2 findings in TMP/m.db; run again without --skip-current-space to re-embed the "
                "rows that are wrong"
            ),
        ),
    ],
)
def test_what_a_check_has_found_is_right_after_the_run_that_it_names(
    reembed: Call, tmp_path: Path, mode: str, said: str
) -> None:
    path = rows(tmp_path / "m.db")
    change(
        path,
        "ALTER TABLE memories ADD COLUMN embedding_space TEXT",
        "UPDATE memories SET embedding = NULL",
    )
    reembed("--db", path, mode)
    change(path, "UPDATE memories SET embedding = zeroblob(32) WHERE id = '7'")

    found = reembed("verify", "--db", path)

    assert found.code == 1
    assert wording(found.error, tmp_path) == said
    assert reembed("--db", path).code == 0
    assert reembed("verify", "--db", path).code == 0
