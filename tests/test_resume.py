"""A run that goes on where an earlier one stopped, or says why it does not."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inline_snapshot import snapshot
from safetensors.numpy import load_file, save_file

from reembed.transforms.embedders.fake import FakeEmbedder
from reembed.transforms.stores.codec import encode
from tests.conftest import (
    Call,
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
)
from tests.tiny import save_tiny_model
from tests.wording import wording

NEW_ROW = (
    "INSERT INTO memories (id, tier, namespace, title, content, created_at, updated_at) "
    "VALUES ('{id}', 'mid', 'global', 'title', '{content}', '', '')"
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store of ten rows that have no vectors."""
    return make_store(tmp_path / "m.db", [memory(f"{i}") for i in range(10)])


def text(key: object, content: str | None = None) -> str:
    """The text of a row."""
    return f"title {key} {content or f'content {key}'}"


def texts(*keys: object) -> set[str]:
    return {text(key) for key in keys}


def stored(path: Path) -> dict[str, object]:
    return dict(select(path, "SELECT id, embedding FROM memories"))


def expected(path: Path, dimension: int = 8) -> dict[str, object]:
    """What every row is to hold: the vector of its present text."""
    found = select(path, "SELECT id, title || ' ' || content FROM memories")
    vectors = FakeEmbedder(dimension).embed([text for _, text in found])
    return {key: encode(vector) for (key, _), vector in zip(found, vectors, strict=True)}


def runs(path: Path) -> list[str]:
    """The names of the runs on a database."""
    return sorted(
        place.name for place in path.with_name("m.db.reembed").iterdir() if place.name != "lock"
    )


@pytest.mark.system
def test_the_same_command_says_what_is_staged_and_embeds_only_the_rest(
    reembed: Call, path: Path, tmp_path: Path
) -> None:
    reembed = partial(reembed, through_beam=True)
    first = reembed("--db", path, "--max-rows", "4", range_rows=3)
    before = path.read_bytes()
    second = reembed("--db", path, "--json", range_rows=3)

    assert (first.code, first.texts) == (0, texts(0, 1, 2, 3))
    said = re.sub(r"\d+\.\d s\b", "N s", wording(first.out, tmp_path))
    assert said == snapshot("""\
reembed: 4 of 10 rows staged, nothing is replaced yet

staged now  4 embedded, 0 skipped
time        N s
forecast    6 rows are left, about N s at this pace
staged in   TMP/m.db.reembed/RUN
next        the same command goes on; without --max-rows it stages the rest and replaces
""")
    assert set(stored(path)) == {f"{i}" for i in range(10)}
    assert (second.code, second.texts) == (0, texts(*range(4, 10)))
    run_id = second.values["run_id"]
    said = re.sub(r"(?m)^reembed: \d+ of 10 rows embedded.*\n", "", wording(second.err, tmp_path))
    assert said == snapshot("""\
reembed: PRE-FLIGHT — stored embedding dims: []; target: 8-dim (all-MiniLM-L6-v2 (8-dim, fake)); every scanned row's vector will be REPLACED
reembed: 4 of 10 rows are staged; going on (run RUN)
reembed: loading all-MiniLM-L6-v2 (8-dim, fake)
""")  # noqa: E501
    assert f"(run {run_id})" in second.err
    assert stored(path) == expected(path)
    assert runs(path) == [run_id]
    assert before != path.read_bytes()


def test_numbers_are_put_as_people_write_them(reembed: Call, tmp_path: Path) -> None:
    path = make_store(tmp_path / "m.db", [memory(f"{i:04}") for i in range(1_100)])
    reembed("--db", path, "--max-rows", "1050", range_rows=512)

    done = reembed("--db", path, "--dry-run", range_rows=512)

    assert "reembed: 1,050 of 1,100 rows are staged; going on (run " in done.err
    assert "staged           1,050 of them, by an earlier try\n" in done.out


def test_a_dry_run_tells_what_is_staged_and_where_and_changes_nothing(
    reembed: Call, path: Path
) -> None:
    reembed("--db", path, "--max-rows", "4", range_rows=3)
    before = kept_files(path.parent)

    done = reembed("--db", path, "--dry-run", "--json", range_rows=3)

    assert (done.code, done.texts) == (0, set())
    assert (done.values["rows_staged"], done.values["rows_meant"]) == (4, 10)
    assert done.values["run_id"] in runs(path)
    assert kept_files(path.parent) == before


def test_rows_that_were_edited_added_or_deleted_between_tries_are_as_they_are_now(
    reembed: Call, path: Path
) -> None:
    reembed("--db", path, "--max-rows", "6", range_rows=3)
    change(
        path,
        "UPDATE memories SET content = 'edited' WHERE id IN ('1', '8')",
        "DELETE FROM memories WHERE id IN ('2', '9')",
        NEW_ROW.format(id="10", content="new"),
    )

    done = reembed("--db", path, "--json", range_rows=3)

    assert done.code == 0
    assert done.texts == {*texts(6, 7), text(1, "edited"), text(8, "edited"), "title new"}
    assert stored(path) == expected(path)
    assert (done.values["total"], done.values["reembedded"]) == (9, 9)


def test_rows_that_were_edited_since_they_were_staged_are_not_counted_as_staged(
    reembed: Call, path: Path
) -> None:
    reembed("--db", path, "--max-rows", "9", range_rows=5)
    change(path, "UPDATE memories SET content = 'edited'")

    done = reembed("--db", path, "--max-rows", "9", "--json", range_rows=5)

    assert done.code == 0
    assert "reembed: 9 of 10 rows are staged; going on" in done.err
    assert (done.values["staged"], done.values["total"]) == (9, 10)
    assert "10 of 10" in reembed("--db", path, "--max-rows", "9", range_rows=5).err
    assert stored(path) == expected(path)


def test_other_ranges_than_before_change_nothing_for_a_run_that_goes_on(
    reembed: Call, path: Path
) -> None:
    """The ranges depend on the number of rows, which may have grown."""
    reembed("--db", path, "--max-rows", "4", range_rows=3)

    done = reembed("--db", path, range_rows=7)

    assert (done.code, done.texts) == (0, texts(*range(4, 10)))
    assert stored(path) == expected(path)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("cut short", snapshot(["WARN [RUN] the shard SHARD was damaged; it is made again"])),
        ("altered", snapshot(["WARN [RUN] the shard SHARD was damaged; it is made again"])),
        ("gone", []),
    ],
)
def test_a_shard_that_is_not_as_it_was_written_is_made_again(
    reembed: Call, path: Path, damage: str, told: list[str], tmp_path: Path
) -> None:
    reembed("--db", path, "--max-rows", "6", range_rows=3)
    shard = min(path.with_name("m.db.reembed").glob("*/shards/*.parquet"))
    content = shard.read_bytes()
    match damage:
        case "cut short":
            shard.write_bytes(content[:-9])
        case "altered":
            shard.write_bytes(content[:40] + b"?" + content[41:])
        case _:
            shard.unlink()

    done = reembed("--db", path, range_rows=3)

    assert (done.code, done.texts) == (0, texts(0, 1, 2, *range(6, 10)))
    warned = wording(done.err, tmp_path).replace(shard.name, "SHARD")
    warnings = [line for line in warned.splitlines() if line.startswith("WARN")]
    assert warnings == told
    assert stored(path) == expected(path)


# Another target.

CHANGES: Mapping[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "name": (
        ("--model", "another"),
        {},
        snapshot(
            "the run RUN has staged rows for another target: its name was "
            "'all-MiniLM-L6-v2' and is 'another' now; mixing the two would be wrong: "
            "give the same target as before, or start over with --fresh"
        ),
    ),
    "dimension": (
        ("--dim", "16"),
        {},
        snapshot(
            "the run RUN has staged rows for another target: its dimension was 8 and is "
            "16 now; mixing the two would be wrong: give the same target as before, or "
            "start over with --fresh"
        ),
    ),
    "prompt": (
        (),
        {"prompt": "passage: "},
        snapshot(
            "the run RUN has staged rows for another target: its prompt was '' and is "
            "'passage: ' now; mixing the two would be wrong: give the same target as "
            "before, or start over with --fresh"
        ),
    ),
    "normalisation": (
        (),
        {"normalized": 0},
        snapshot(
            "the run RUN has staged rows for another target: its normalisation was True "
            "and is False now; mixing the two would be wrong: give the same target as "
            "before, or start over with --fresh"
        ),
    ),
    "maximum length": (
        (),
        {"window": 128},
        snapshot(
            "the run RUN has staged rows for another target: its maximum length was 256 "
            "and is 128 now; mixing the two would be wrong: give the same target as "
            "before, or start over with --fresh"
        ),
    ),
    "behaviour": (
        (),
        {"behaviour": 0.05},
        snapshot(
            "all-MiniLM-L6-v2 (8-dim, fake) does not behave as it did when the run RUN "
            "began: it gives other vectors for the same texts, and mixing the two would "
            "be wrong; bring the former model back, or start over with --fresh"
        ),
    ),
}


@pytest.mark.parametrize("changed", CHANGES)
def test_going_on_is_refused_with_another(
    reembed: Call, path: Path, changed: str, tmp_path: Path
) -> None:
    reembed("--db", path, "--max-rows", "4", range_rows=3)
    before = kept_files(path.parent)
    flags, variables, told = CHANGES[changed]

    done = reembed("--db", path, *flags, range_rows=3, **variables)

    assert (done.code, done.out, done.texts) == (1, "", set())
    assert wording(done.error, tmp_path) == told
    assert kept_files(path.parent) == before

    again = reembed("--db", path, range_rows=3)
    assert (again.code, again.texts) == (0, texts(*range(4, 10)))
    assert stored(path) == expected(path)


@pytest.mark.parametrize("changed", ["dimension", "behaviour"])
def test_fresh_starts_over_with_another(reembed: Call, path: Path, changed: str) -> None:
    reembed("--db", path, "--max-rows", "4", range_rows=3)
    [former] = runs(path)
    flags, variables, _ = CHANGES[changed]

    done = reembed("--db", path, "--fresh", "--json", *flags, range_rows=3, **variables)

    assert (done.code, done.texts) == (0, texts(*range(10)))
    assert f"reembed: starting over; what run {former} has staged is discarded\n" in done.err
    assert runs(path) == [done.values["run_id"]] != [former]


def test_fresh_without_an_earlier_try_is_a_run_like_any_other(reembed: Call, path: Path) -> None:
    done = reembed("--db", path, "--fresh", range_rows=3)

    assert (done.code, done.texts) == (0, texts(*range(10)))
    assert "starting over" not in done.err


def test_fresh_after_a_finished_run_keeps_its_backup(reembed: Call, path: Path) -> None:
    first = reembed("--db", path, "--json", range_rows=3)
    second = reembed("--db", path, "--json", "--fresh", range_rows=3)

    assert (first.code, second.code) == (0, 0)
    assert runs(path) == sorted([first.values["run_id"], second.values["run_id"]])


def test_a_dry_run_with_fresh_discards_nothing(reembed: Call, path: Path) -> None:
    reembed("--db", path, "--max-rows", "4", range_rows=3)
    before = kept_files(path.parent)

    done = reembed("--db", path, "--fresh", "--dry-run", "--json", range_rows=3)

    assert (done.code, done.values["rows_staged"]) == (0, 0)
    assert kept_files(path.parent) == before


def test_fresh_that_fails_before_any_work_discards_nothing(reembed: Call, path: Path) -> None:
    reembed("--db", path, "--max-rows", "4", range_rows=3)
    before = kept_files(path.parent)

    done = reembed("--db", path, "--fresh", "--base-url", "nowhere", range_rows=3, real=True)

    assert done.code == 3
    assert kept_files(path.parent) == before


@pytest.mark.system
def test_a_model_whose_weights_were_altered_under_its_name_is_refused(
    reembed: Call, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reembed.transforms.embedders.local.LocalEmbedder._compile", lambda _: None)
    model = save_tiny_model(tmp_path)
    weights = model / "model.safetensors"
    before = load_file(weights)
    first = reembed("--db", path, "--model", model, "--max-rows", "4", real=True)
    assert first.code == 0, first.err
    kept = kept_files(path.with_name("m.db.reembed"))
    name = "encoder.layer.0.output.dense.weight"
    noise = np.random.default_rng(0).normal(0, 0.5, before[name].shape).astype(np.float32)
    save_file(before | {name: before[name] + noise}, weights, {"format": "pt"})

    altered = reembed("--db", path, "--model", model, real=True)

    assert (altered.code, altered.out) == (1, "")
    assert wording(altered.error, tmp_path) == snapshot(
        "TMP/model (32-dim, local) does not behave as it did when the run RUN began: it "
        "gives other vectors for the same texts, and mixing the two would be wrong; "
        "bring the former model back, or start over with --fresh"
    )
    assert set(stored(path).values()) == {None}
    assert kept_files(path.with_name("m.db.reembed")) == kept

    save_file(before, weights, {"format": "pt"})
    again = reembed("--db", path, "--model", model, real=True)
    assert (again.code, "4 of 10 rows are staged" in again.err) == (0, True)
    assert None not in stored(path).values()


# While a replacement is incomplete.


def test_a_replacement_that_was_cut_off_is_finished_by_the_same_command(
    reembed: Call, path: Path, tmp_path: Path
) -> None:
    cut = half_replace(reembed, path)

    new = expected(path)
    assert (cut.code, cut.out) == (6, "")
    assert wording(cut.error, tmp_path) == snapshot(
        "SQLite can't work with TMP/m.db: jammed; look into it and run again; the "
        "replacement by run RUN (to all-MiniLM-L6-v2 (8-dim)) is incomplete: of ranges "
        "0-4, 0 hold new vectors, and 1-2 were being written: run again to finish it, or "
        "undo it with reembed rollback"
    )
    assert stored(path) == {key: new[key] if key in "01" else None for key in new}

    done = reembed("--db", path, range_rows=2)

    assert (done.code, done.texts) == (0, set())
    assert wording(done.err, tmp_path) == snapshot("""\
reembed: PRE-FLIGHT — stored embedding dims: [8]; target: 8-dim (all-MiniLM-L6-v2 (8-dim, fake)); every scanned row's vector will be REPLACED
reembed: the replacement by run RUN (to all-MiniLM-L6-v2 (8-dim)) is incomplete: of ranges 0-4, 0 hold new vectors, and 1-2 were being written; finishing it
reembed: loading all-MiniLM-L6-v2 (8-dim, fake)
""")  # noqa: E501
    assert stored(path) == new


OTHERS: Mapping[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "fresh": (("--fresh",), {}),
    "another namespace": (("--namespace", "global"), {}),
    "other rows": (("--missing-only",), {}),
} | {changed: (flags, variables) for changed, (flags, variables, _) in CHANGES.items()}


def test_an_incomplete_replacement_goes_before_all_else(reembed: Call, path: Path) -> None:
    half_replace(reembed, path)
    before = kept_files(path.parent)

    for other, (flags, variables) in OTHERS.items():
        done = reembed("--db", path, *flags, range_rows=2, **variables)

        assert (other, done.code, done.texts) == (other, 6, set())
        assert "reembed rollback" in done.error
        assert kept_files(path.parent) == before

    for flags, variables in OTHERS.values():
        done = reembed("--db", path, *flags, "--dry-run", range_rows=2, **variables)

        assert (done.code, done.texts) == (6, set())
        assert "0 hold new vectors, and 1-2 were being written; finish" in done.err
        assert kept_files(path.parent) == before

    assert reembed("--db", path, range_rows=2).code == 0
    assert stored(path) == expected(path)


def test_a_run_after_a_rollback_that_was_cut_off_is_refused(
    reembed: Call, path: Path, tmp_path: Path
) -> None:
    reembed("--db", path, range_rows=2)
    jam(path, "5")
    cut = reembed("rollback", "--db", path)
    unjam(path)
    before = kept_files(path.parent)

    assert cut.code == 6
    for flags in [(), ("--namespace", "global"), ("--fresh",), ("--dry-run",)]:
        done = reembed("--db", path, *flags, range_rows=2)
        assert (done.code, done.texts) == (6, set())
        assert wording(done.error, tmp_path) == snapshot(
            "run RUN (to all-MiniLM-L6-v2 (8-dim)) is half rolled back; finish it with "
            "reembed rollback"
        )
        assert kept_files(path.parent) == before

    assert reembed("rollback", "--db", path).code == 0
    assert set(stored(path).values()) == {None}
    assert reembed("--db", path, range_rows=2).code == 0


def test_rows_edited_after_a_replacement_was_cut_off_get_the_vectors_of_their_new_texts(
    reembed: Call, path: Path
) -> None:
    half_replace(reembed, path)
    change(
        path,
        # One that is replaced, one that is not, one that is new and one that was overwritten.
        "UPDATE memories SET content = 'edited' WHERE id IN ('0', '7')",
        "UPDATE memories SET embedding = x'01' || zeroblob(32) WHERE id = '1'",
        "DELETE FROM memories WHERE id = '9'",
        NEW_ROW.format(id="95", content="new"),
    )

    done = reembed("--db", path, "--json", range_rows=2)

    assert (done.code, done.values["remaining"]) == (0, 0)
    assert done.texts == {text(0, "edited"), text(7, "edited"), "title new"}
    assert stored(path) == expected(path)


# Runs elsewhere, and runs about other rows.


def test_a_run_in_another_directory_is_found_again_with_and_without_the_flag(
    reembed: Call, path: Path, tmp_path: Path
) -> None:
    place = tmp_path / "elsewhere"
    first = reembed("--db", path, "--run-dir", place, "--max-rows", "2", "--json", range_rows=3)
    second = reembed("--db", path, "--max-rows", "2", "--json", range_rows=3)
    third = reembed("--db", path, "--run-dir", place, "--json", range_rows=3)

    assert [done.code for done in (first, second, third)] == [0, 0, 0]
    assert [done.texts for done in (first, second, third)] == [
        texts(0, 1),
        texts(2, 3),
        texts(*range(4, 10)),
    ]
    run_id = first.values["run_id"]
    assert {done.values["run_directory"] for done in (first, second, third)} == {
        str(place / run_id)
    }
    assert [entry.name for entry in place.iterdir()] == [run_id]
    assert (path.with_name("m.db.reembed") / run_id).is_symlink()
    assert stored(path) == expected(path)
    for command in ("status", "verify", "rollback"):
        assert reembed(command, "--db", path, "--json").code == 0
    assert set(stored(path).values()) == {None}
    assert reembed("cleanup", "--db", path, "--json").values["removed"] == [run_id]
    assert list(place.iterdir()) == []
    assert not path.with_name("m.db.reembed").exists()


def test_a_run_in_another_directory_is_found_by_the_flag_alone(
    reembed: Call, path: Path, tmp_path: Path
) -> None:
    """What lies beside the database may be lost, as when the file is copied."""
    place = tmp_path / "elsewhere"
    reembed("--db", path, "--run-dir", place, "--max-rows", "4", range_rows=3)
    shutil.rmtree(path.with_name("m.db.reembed"))

    done = reembed("--db", path, "--run-dir", place, range_rows=3)

    assert (done.code, done.texts) == (0, texts(*range(4, 10)))
    assert stored(path) == expected(path)


COMMANDS = ((), ("status",), ("verify",), ("rollback",), ("cleanup",))


def test_a_directory_with_runs_on_another_database_is_refused(
    reembed: Call, path: Path, tmp_path: Path
) -> None:
    other = make_store(tmp_path / "other.db", [memory("a")])
    place = tmp_path / "elsewhere"
    begin(fake_plan(other, run_dir=str(place)))
    before = kept_files(tmp_path)

    for command in COMMANDS:
        done = reembed(*command, "--db", path, "--run-dir", place)

        assert (command, done.code, done.out) == (command, 1, "")
        assert wording(done.error, tmp_path) == snapshot(
            "TMP/elsewhere holds runs on another database, TMP/other.db; name another "
            "directory with --run-dir"
        )
        assert kept_files(tmp_path) == before


def test_a_run_directory_that_is_gone_is_named(reembed: Call, path: Path, tmp_path: Path) -> None:
    place = tmp_path / "elsewhere"
    reembed("--db", path, "--run-dir", place, "--max-rows", "4", range_rows=3)
    [run_id] = runs(path)
    place.rename(tmp_path / "unmounted")

    for command in COMMANDS:
        done = reembed(*command, "--db", path)

        assert (command, done.code, done.out) == (command, 1, "")
        assert wording(done.error, tmp_path) == snapshot(
            "the run RUN lies at TMP/elsewhere/RUN, which isn't there; mount it, or "
            "remove the link TMP/m.db.reembed/RUN if it is gone for good; if it was "
            "moved, remove the link and name the directory that it is in now with "
            "--run-dir"
        )
        assert str(place / run_id) in done.error

    (tmp_path / "unmounted").rename(place)
    assert reembed("--db", path).texts == texts(*range(4, 10))


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[]", b'{"schema_version": 2}', b"\xff"])
def test_a_run_without_a_readable_manifest_is_named(
    reembed: Call, path: Path, content: bytes | None, tmp_path: Path
) -> None:
    manifest = begin(fake_plan(path)).run.path / "manifest.json"
    manifest.unlink()
    if content is not None:
        manifest.write_bytes(content)
    before = kept_files(path.parent)

    for command in COMMANDS:
        done = reembed(*command, "--db", path)

        assert (command, done.code, done.out) == (command, 1, "")
        # Why it can't be read is said by test_runs.py.
        said = re.sub(r"manifest.json \(.*?\), so", "manifest.json (WHY), so", done.error)
        assert wording(said, tmp_path) == snapshot(
            "the run TMP/m.db.reembed/RUN has no readable manifest.json (WHY), so it "
            "can't be told what it did; restore the file, or move the directory away if "
            "you are sure that the run is of no use"
        )
        assert kept_files(path.parent) == before


def test_an_unfinished_run_about_other_rows_is_left_alone_and_mentioned(
    reembed: Call, tmp_path: Path
) -> None:
    path = make_store(
        tmp_path / "m.db",
        [memory(f"{name}{i}", namespace=name) for name in ("notes", "people") for i in range(4)],
    )
    notes, people = (
        texts(*(f"notes{i}" for i in range(4))),
        texts(*(f"people{i}" for i in range(4))),
    )
    reembed("--db", path, "--namespace", "notes", "--max-rows", "3", range_rows=3)
    [former] = runs(path)
    kept = files(path.with_name("m.db.reembed") / former)

    done = reembed("--db", path, "--namespace", "people", range_rows=3)

    assert (done.code, done.texts) == (0, people)
    [note] = [line for line in done.err.splitlines() if former in line]
    assert wording(note, tmp_path) == snapshot(
        "reembed: NOTE — run RUN about other rows is not finished; its own command goes on with it"
    )
    assert files(path.with_name("m.db.reembed") / former) == kept

    # Nor does --fresh take away what it is not about.
    fresh = reembed("--db", path, "--namespace", "people", "--fresh", range_rows=3)
    assert (fresh.code, former in runs(path)) == (0, True)

    rest = reembed("--db", path, "--namespace", "notes", range_rows=3)
    assert (rest.code, rest.texts) == (0, notes - texts("notes0", "notes1", "notes2"))
    assert stored(path) == expected(path)
    assert "is not finished" not in reembed("--db", path, "--dry-run").err


def test_a_finished_run_is_followed_by_a_new_one(reembed: Call, path: Path) -> None:
    first = reembed("--db", path, "--json", range_rows=3)
    second = reembed("--db", path, "--json", range_rows=3)

    assert (first.code, second.code) == (0, 0)
    assert second.texts == texts(*range(10))
    assert second.values["run_id"] != first.values["run_id"]
