"""Results and warnings that can't be written."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import pytest
from inline_snapshot import snapshot

from reembed.pipeline.output import open_streams
from reembed.transforms.staging import staging_root
from tests.conftest import Call, Ran, half_replace, jam, make_store, memory, select
from tests.wording import wording

ROWS = 10
LENGTHS = "SELECT length(embedding), count(*) FROM memories GROUP BY 1"
OLD, NEW = [(13, ROWS)], [(33, ROWS)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    rows = [memory(f"{at}", embedding=b"\1" + bytes(12), embedding_dim=3) for at in range(ROWS)]
    return make_store(tmp_path / "m.db", rows)


@contextmanager
def broken(how: str) -> Iterator[TextIO | None]:
    """A stream that can't be written: of a full disk, closed, or without a reader."""
    if how == "closed":
        yield None
    elif how == "full":
        with Path("/dev/full").open("w") as full:
            yield full  # What it still held would fail as it is closed.
    else:
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "w") as pipe:
            yield pipe


def call_into(
    name: str, how: str, reembed: Call, monkeypatch: pytest.MonkeyPatch, *arguments: str | Path
) -> Ran:
    with broken(how) as stream, monkeypatch.context() as patch:
        patch.setattr(sys, name, stream)
        ran = reembed(*arguments)
    return ran


@pytest.mark.parametrize(
    ("how", "said", "said_of_rollback"),
    [
        (
            "full",
            snapshot(
                "done, but the result could not be written (No space left on device); it is kept "
                "in TMP/m.db.reembed/RUN/summary.json"
            ),
            snapshot(
                "done, but the result could not be written (No space left on device); it is kept "
                "in TMP/m.db.reembed/RUN/rollback.json"
            ),
        ),
        (
            "closed",
            snapshot(
                "done, but the result could not be written (stdout is closed); it is kept in "
                "TMP/m.db.reembed/RUN/summary.json"
            ),
            snapshot(
                "done, but the result could not be written (stdout is closed); it is kept in "
                "TMP/m.db.reembed/RUN/rollback.json"
            ),
        ),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["text", "json"])
def test_a_run_goes_on_and_says_where_its_result_is(
    how: str,
    said: str,
    said_of_rollback: str,
    flags: list[str],
    path: Path,
    tmp_path: Path,
    reembed: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran = call_into("stdout", how, reembed, monkeypatch, "--db", path, *flags)

    [kept] = staging_root(path).glob("2*/summary.json")
    assert select(path, LENGTHS) == NEW
    assert (ran.code, ran.out) == (1, "")
    assert wording(ran.error, tmp_path) == said

    undone = call_into("stdout", how, reembed, monkeypatch, "rollback", "--db", path, *flags)

    assert select(path, LENGTHS) == OLD
    kept = kept.with_name("rollback.json")
    assert kept.exists()
    assert undone.code == 1
    assert wording(undone.error, tmp_path) == said_of_rollback


NOTHING_TOLD = snapshot(
    [
        "reembed: error: done, but the result could not be written (No space left on device); "
        "this command wrote nothing to the store"
    ]
)
HELP_NOT_TOLD = snapshot(
    [
        "reembed: error: the help could not be written (No space left on device); send stdout "
        "elsewhere",
        "reembed: this command wrote nothing to the store",
    ]
)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        *((some, NOTHING_TOLD) for some in (["--dry-run"], ["--max-rows", "3"])),
        *(([command], NOTHING_TOLD) for command in ("status", "cleanup")),
        (["--help"], HELP_NOT_TOLD),
    ],
    ids=str,
)
def test_what_writes_nothing_to_the_store_says_so(
    arguments: list[str],
    said: list[str],
    path: Path,
    reembed: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    named = [] if arguments == ["--help"] else ["--db", str(path)]
    ran = call_into("stdout", "full", reembed, monkeypatch, *arguments, *named)

    assert (ran.code, select(path, LENGTHS)) == (1, OLD)
    lines = [line for line in ran.err.splitlines() if "written" in line or "wrote" in line]
    assert lines == said


def test_the_exit_code_of_what_happened_to_the_store_stays(
    path: Path, reembed: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    half_replace(reembed, path)

    ran = call_into("stdout", "full", reembed, monkeypatch, "status", "--db", path, "--json")

    assert ran.code == 6
    errors = [line for line in ran.err.splitlines() if "error" in line]
    assert [wording(line, path.parent) for line in errors] == snapshot(
        [
            "reembed: error: done, but the result could not be written (No space left on device); "
            "this command wrote nothing to the store",
            "reembed: error: the replacement by run RUN (to all-MiniLM-L6-v2 (8-dim)) is "
            "incomplete: of ranges 0-4, 0 hold new vectors, and 1-2 were being written",
        ]
    )


def test_a_reader_that_has_gone_is_no_failure(
    path: Path, reembed: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = call_into("stdout", "gone", reembed, monkeypatch, "--db", path)

    assert (ran.code, select(path, LENGTHS)) == (0, NEW)
    assert "error" not in ran.err


@pytest.mark.parametrize("how", ["full", "closed", "gone"])
def test_what_can_not_be_told_ends_nothing(
    how: str, path: Path, reembed: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = call_into("stderr", how, reembed, monkeypatch, "--db", path, "--json")

    assert (ran.code, ran.values["reembedded"], select(path, LENGTHS)) == (0, ROWS, NEW)

    refused = call_into("stderr", how, reembed, monkeypatch, "--db", path, "--json", "--batch", "x")
    assert (refused.code, refused.out) == (2, "")


def test_a_failure_says_that_nothing_was_written(path: Path, reembed: Call) -> None:
    absent = reembed("--db", path.with_name("absent.db"))
    jam(path, "5")
    jammed = reembed("--db", path)

    assert (absent.code, jammed.code) == (1, 6)
    assert wording(absent.err, path.parent) == snapshot("""\
reembed: error: there is no database at TMP/absent.db; name an existing one with --db
reembed: this command wrote nothing to the store
""")
    # It had begun, so it is not said.
    assert wording(jammed.error, path.parent) == snapshot(
        "SQLite can't work with TMP/m.db: jammed; look into it and run again; the replacement by "
        "run RUN (to all-MiniLM-L6-v2 (8-dim)) is incomplete: of ranges 0-0, none hold new "
        "vectors, and 0 were being written: run again to finish it, or undo it with reembed "
        "rollback"
    )
    assert "wrote nothing" not in jammed.err


def test_an_error_that_says_what_is_written_says_it_once(
    path: Path, reembed: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reembed.pipeline import plan as planning
    from reembed.transforms.errors import StoreError

    def refuse(*_: object) -> None:
        raise StoreError("two rows are one; nothing was written")

    monkeypatch.setattr(planning, "_check_store", refuse)
    ran = reembed("--db", path)

    assert ran.err == snapshot("reembed: error: two rows are one; nothing was written\n")


def test_a_descriptor_that_is_closed_is_no_files_that_is_opened_next() -> None:
    kept = os.dup(0)
    os.close(0)
    try:
        open_streams()
        assert os.fstat(0).st_rdev == Path(os.devnull).stat().st_rdev
    finally:
        os.dup2(kept, 0)
        os.close(kept)
