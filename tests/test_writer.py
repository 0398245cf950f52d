"""Another program writes to the store during the whole run, and neither keeps the other off."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from inline_snapshot import snapshot

from reembed.pipeline import run as running
from reembed.transforms.embedders.fake import FakeEmbedder
from reembed.transforms.rows import Summary
from reembed.transforms.stores import Replacement
from reembed.transforms.stores.codec import encode
from tests.changes import old_memory
from tests.conftest import Call, clean_environment, make_store, plain_pass, select
from tests.wording import wording

ROWS = 300
NEW = 8
SEVERAL = {"rows_at_once": 100, "first_rows": 100}


def new_vectors(path: Path) -> dict[str, bool]:
    """Whether each row holds the new model's vector of its present text."""
    query = "SELECT id, title || ' ' || content, embedding, embedding_dim FROM memories"
    rows = select(path, query)
    vectors = map(encode, FakeEmbedder(NEW).embed([text for _, text, _, _ in rows]))
    return {
        key: (held, dimension) == (vector, NEW)
        for (key, _, held, dimension), vector in zip(rows, vectors, strict=True)
    }


# ---- The writer, a process of its own ----


@dataclass(frozen=True)
class Written:
    """What the writer did: each change (what, key, when it was there) and what kept it off."""

    changes: list[tuple[str, str, float]]
    refused: list[str]
    longest_wait: float


@contextmanager
def writing(path: Path, home: Path) -> Iterator[list[Written]]:
    """A writer is at work; what it did is in the list afterwards."""
    done: list[Written] = []
    command = [sys.executable, "-m", "tests.changes", str(path)]
    pipe = subprocess.PIPE
    environment = clean_environment(home)
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin
        assert process.stdout
        try:
            assert process.stdout.readline() == "at work\n"
            yield done
            stdout, _ = process.communicate("", timeout=30)
        finally:
            process.kill()
    changes, refused, longest = json.loads(stdout)
    done.append(Written([(what, key, at) for what, key, at in changes], refused, longest))


def read_ids(path: Path) -> set[str]:
    return {json.loads(line)["id"] for line in path.read_text().splitlines()}


@pytest.mark.system
@pytest.mark.parametrize(
    ("several", "run_pass"),
    [({}, running._run_pass), (SEVERAL, plain_pass)],
    ids=["one transaction", "several transactions"],
)
def test_a_writer_at_work_is_never_locked_out_and_every_row_is_right_or_named(
    several: dict[str, int],
    run_pass: Callable[..., Summary],
    tmp_path: Path,
    reembed: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It gives up soon, since a pass through Beam takes a second."""
    looked: list[float] = []

    def note(*about: Any) -> Summary:
        summary = run_pass(*about)
        looked.append(time.time())
        return summary

    monkeypatch.setattr(running, "MOST_STALE_PASSES", 1)
    monkeypatch.setattr(running, "_run_pass", note)
    keys = [f"{at:04d}" for at in range(ROWS)]
    path = make_store(tmp_path / "m.db", [old_memory(key) for key in keys], "wal")
    with writing(path, tmp_path) as done:
        first = reembed("--db", path, "--json", through_beam=True, seconds=0.05, **several)
    [written] = done

    result = first.values
    run = Path(result["run_directory"])
    assert written.refused == []
    assert {what for what, _, _ in written.changes} == {"add", "edit", "edit and embed", "delete"}
    assert written.changes[0][2] < looked[0] <= looked[-1] < written.changes[-1][2]
    assert first.code == (6 if result["remaining"] else 0), first.err
    right = new_vectors(path)
    deleted = {key for what, key, _ in written.changes if what == "delete"}
    added = {key for what, key, _ in written.changes if what == "add"}
    assert right.keys() == (set(keys) | added) - deleted
    # What was changed before the last pass began is right or named; what was changed later may be
    # neither, since nobody looked any more.
    late = {key for _, key, at in written.changes if at > looked[-2:][0]}
    named = read_ids(run / "remaining.jsonl") if result["remaining"] else set()
    assert {key for key, is_right in right.items() if not is_right} <= named | late

    again = reembed("--db", path, "--json", **several)

    assert (again.code, again.values["remaining"]) == (0, 0)
    assert new_vectors(path) == dict.fromkeys(right, True)
    assert not (run / "remaining.jsonl").exists()
    assert reembed("status", "--db", path).code == 0


# ---- A daemon that goes on with the old model ----


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """After each of the run's transactions, a daemon embeds some rows anew with the old model."""
    about: dict[str, Any] = {"rows": [], "times": 0}
    begin = Replacement.transaction

    @contextmanager
    def transaction(table: Replacement) -> Iterator[None]:
        with begin(table):
            yield
        if about["times"]:
            about["times"] -= 1
            overwrite(table._store.path, about["rows"])

    monkeypatch.setattr(Replacement, "transaction", transaction)
    yield about


def overwrite(path: Path, keys: Sequence[str]) -> None:
    """Give rows the old model's vectors of their texts, which stay as they are."""
    rows = [old_memory(key) for key in keys]
    with closing(sqlite3.connect(path)) as db, db:
        db.executemany(
            "UPDATE memories SET embedding = ?, embedding_dim = ? WHERE id = ?",
            [(row.embedding, row.embedding_dim, row.id) for row in rows],
        )


@pytest.mark.parametrize("several", [False, True], ids=["one transaction", "several transactions"])
@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_vectors_that_a_daemon_overwrites_after_the_replacement_are_found_by_the_last_pass(
    mode: str, several: bool, daemon: dict[str, Any], tmp_path: Path, reembed: Call
) -> None:
    keys = [f"{at:03d}" for at in range(300)]
    path = make_store(tmp_path / "m.db", [old_memory(key) for key in keys], mode)
    daemon |= {"rows": keys[5::60], "times": 1}

    ran = reembed("--db", path, "--json", **(SEVERAL if several else {}))

    assert (ran.code, ran.values["remaining"], ran.values["in_old_space"]) == (0, 0, 0)
    assert daemon["times"] == 0
    assert new_vectors(path) == dict.fromkeys(keys, True)


def test_rows_that_a_daemon_overwrites_again_and_again_are_named_until_it_stops(
    daemon: dict[str, Any], tmp_path: Path, reembed: Call
) -> None:
    keys = [f"{at:03d}" for at in range(200)]
    path = make_store(tmp_path / "m.db", [old_memory(key) for key in keys], "wal")
    daemon |= {"rows": keys[5::60], "times": -1}

    ran = reembed("--db", path, "--json")

    assert (ran.code, ran.values["remaining"], ran.values["in_old_space"]) == (6, 4, 4)
    assert {key for key, is_new in new_vectors(path).items() if not is_new} == {*keys[5::60]}
    remaining = Path(ran.values["run_directory"]) / "remaining.jsonl"
    assert read_ids(remaining) == {*keys[5::60]}
    assert wording(ran.error, tmp_path) == snapshot(
        "4 rows don't hold their new vectors, although these were written: a trigger of the "
        "database or another program puts others back; drop or stop it and run again, or undo "
        "the replacement with reembed rollback"
    )
    assert reembed("status", "--db", path).code == 6

    daemon["times"] = 0
    again = reembed("--db", path, "--json")

    assert (again.code, again.values["remaining"], again.texts) == (0, 0, set())
    assert new_vectors(path) == dict.fromkeys(keys, True)
    assert not remaining.exists()
    assert reembed("status", "--db", path).code == 0
