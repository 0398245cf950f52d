"""The work directory of workers that can't reach the database."""

from __future__ import annotations

import os
import re
import shutil
import threading
from pathlib import Path

import pytest
from apache_beam.io.filesystems import FileSystems
from inline_snapshot import snapshot

from reembed.transforms.errors import RunError, StagingError
from reembed.transforms.rows import KeyRange, RangeRows, RangeVectors, Row, StagedRow, text_digest
from reembed.transforms.workdir import WorkDirectory
from tests.conftest import (
    Call,
    begin,
    change,
    fake_plan,
    make_store,
    memory,
    select,
    worker_pool,
)
from tests.wording import line_with, wording

KEYS = KeyRange(3, None, None)
VECTORS = "SELECT id, hex(embedding) FROM memories ORDER BY id"


def rows(*keys: str) -> tuple[Row, ...]:
    return tuple(Row(key, 0, f"text {key}", text_digest(f"text {key}".encode())) for key in keys)


def staged(*keys: str, part: int = 0) -> RangeVectors:
    return RangeVectors(
        KEYS, part, 2, tuple(StagedRow(key, text_digest(b"x"), b"12345678") for key in keys)
    )


@pytest.fixture
def work(tmp_path: Path) -> WorkDirectory:
    found = WorkDirectory(str(tmp_path / "work" / "run"), "one")
    found.make()
    return found


def test_what_is_left_for_a_range_in_a_pass_is_read_part_by_part(work: WorkDirectory) -> None:
    parts = [RangeRows(KEYS, 0, rows("a", "b")), RangeRows(KEYS, 1, rows("c"))]
    other = RangeRows(KeyRange(33, None, None), 0, rows("d"))
    work.write_inputs([*parts, other], pass_number=1)
    work.write_inputs([RangeRows(KEYS, 0, rows("late"))], pass_number=2)

    assert list(work.read_inputs(KEYS, pass_number=1)) == parts


def test_what_another_try_has_left_is_not_read(work: WorkDirectory) -> None:
    work.write_inputs([RangeRows(KEYS, 0, rows("a"))], pass_number=1)

    assert list(WorkDirectory(work.path, "two").read_inputs(KEYS, pass_number=1)) == []


def test_each_shard_is_fetched_once_by_whatever_try(work: WorkDirectory, tmp_path: Path) -> None:
    run = begin(fake_plan(make_store(tmp_path / "m.db", [memory("a")]))).run
    first = work.write_shard(staged("a"), pass_number=1)
    work.write_shard(staged("a"), pass_number=1)

    assert [work.fetch_shards(run), work.fetch_shards(run)] == [1, 0]
    second = work.write_shard(staged("b", part=1), pass_number=1)

    assert WorkDirectory(work.path, "two").fetch_shards(run) == 1
    assert sorted(path.name for path in run.shards.iterdir()) == [first.shard, second.shard]


def test_a_shard_that_is_not_whole_is_not_fetched_before_it_is(
    work: WorkDirectory, tmp_path: Path
) -> None:
    run = begin(fake_plan(make_store(tmp_path / "m.db", [memory("a")]))).run
    shard = Path(work.path) / "shards" / work.write_shard(staged("a"), pass_number=1).shard
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])

    assert work.fetch_shards(run) == 0
    assert list(run.shards.iterdir()) == []
    shard.write_bytes(content)
    assert work.fetch_shards(run) == 1


def test_nothing_is_left_of_a_directory_that_was_removed(
    work: WorkDirectory, tmp_path: Path
) -> None:
    work.write_inputs([RangeRows(KEYS, 0, rows("a"))], pass_number=1)
    work.write_shard(staged("a"), pass_number=1)
    work.write_json("pass-1.json", {"embedded": 1})

    work.remove()
    work.remove()

    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize(
    ("place", "says"),
    [
        (
            "/proc/nowhere",
            snapshot(
                "the work directory /proc/nowhere can't be used (FileNotFoundError: [Errno 2] No "
                "such file or directory: '/proc/nowhere'); name one with --workdir that this "
                "machine and all workers can write"
            ),
        ),
        (
            "nosuchscheme://a/b",
            snapshot(
                "the work directory nosuchscheme://a/b can't be used (ValueError: BEAM); name "
                "one with --workdir that this machine and all workers can write"
            ),
        ),
    ],
)
def test_a_place_that_can_not_be_used_is_told_in_one_sentence(
    place: str, says: str, tmp_path: Path
) -> None:
    with pytest.raises(StagingError) as refused:
        WorkDirectory(place, "one").make()
    # What Beam says differs from version to version.
    said = re.sub(r"ValueError: .*\)", "ValueError: BEAM)", wording(refused, tmp_path))
    assert said == says


@pytest.mark.system
def test_a_run_through_a_work_directory_gives_what_any_run_gives(
    reembed: Call, tmp_path: Path
) -> None:
    """Here it is a URL; in the tests below it is a path."""
    memories = [memory(f"{at:03d}", "POISON" if at == 7 else None) for at in range(150)]
    here, there = (make_store(tmp_path / name, memories) for name in ("a.db", "b.db"))
    place = tmp_path / "work"

    expected = reembed("--db", here, "--json")
    ran = reembed(
        "--db", there, "--json", "--workdir", f"file://{place}", through_beam=True, range_rows=40
    )

    assert (ran.code, ran.values["reembedded"], ran.values["skipped"]) == (0, 149, 1)
    assert ran.values["skipped_by_cause"] == expected.values["skipped_by_cause"]
    assert select(there, VECTORS) == select(here, VECTORS)
    assert list(place.iterdir()) == []


def test_the_plan_says_where_texts_are_copied_to(reembed: Call, tmp_path: Path) -> None:
    path = make_store(tmp_path / "m.db", [memory("a")])

    planned = reembed("--db", path, "--workdir", "gs://bucket/place/", "--dry-run")

    assert wording(line_with("the texts of", planned.err), tmp_path) == snapshot(
        "reembed: the texts of 1 rows are copied to gs://bucket/place/ for the workers, and "
        "deleted when all is replaced"
    )
    assert wording(line_with("workers", planned.out), tmp_path) == snapshot(
        "workers          read texts and leave vectors in gs://bucket/place/RUN"
    )


@pytest.mark.system
def test_what_workers_have_left_is_not_made_again_by_a_later_try(
    reembed: Call, tmp_path: Path
) -> None:
    path = make_store(tmp_path / "m.db", [memory(f"{at:03d}") for at in range(120)])
    place = tmp_path / "work"
    flags = ("--db", path, "--workdir", place)

    stopped = reembed(*flags, "--max-rows", "80", through_beam=True, range_rows=40)
    (run,) = place.iterdir()
    # As if this process had died before it fetched them.
    for shard in (path.with_name("m.db.reembed") / run.name / "shards").iterdir():
        shard.unlink()
    done = reembed(*flags, through_beam=True, range_rows=40)

    assert (stopped.code, done.code) == (0, 0)
    assert len(stopped.texts & {f"title {at:03d} content {at:03d}" for at in range(120)}) == 80
    assert done.texts & stopped.texts <= {"x"}
    assert list(place.iterdir()) == []


@pytest.mark.system
def test_nothing_is_left_of_a_run_that_is_discarded(reembed: Call, tmp_path: Path) -> None:
    path = make_store(tmp_path / "m.db", [memory(f"{at:03d}") for at in range(90)])
    place = tmp_path / "work"
    flags = ("--db", path, "--workdir", place)

    reembed(*flags, "--max-rows", "40", through_beam=True, range_rows=40)
    assert list(place.rglob("*.parquet"))
    done = reembed(*flags, "--fresh", through_beam=True, range_rows=40)

    assert done.code == 0
    assert list(place.iterdir()) == []


@pytest.mark.system
def test_no_text_is_left_by_a_run_that_came_to_nothing(
    reembed: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_store(tmp_path / "m.db", [memory("a")])
    place = tmp_path / "work"

    def fail(work: WorkDirectory, keys: KeyRange, *, pass_number: int) -> None:
        assert list(place.rglob("*.parquet"))
        raise RunError("it failed")

    monkeypatch.setattr(WorkDirectory, "read_inputs", fail)

    ran = reembed("--db", path, "--workdir", place, through_beam=True)

    assert (ran.code, ran.error) == (1, "it failed")
    assert list(place.iterdir()) == []


@pytest.mark.system
def test_rows_that_are_edited_meanwhile_are_embedded_in_another_pass(
    reembed: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_store(tmp_path / "m.db", [memory(f"{at:03d}") for at in range(90)])
    other = make_store(tmp_path / "other.db", [memory(f"{at:03d}") for at in range(90)])
    edit = "UPDATE memories SET content = 'edited' WHERE id = '050'"
    fetch = WorkDirectory.fetch_shards

    def fetch_and_edit(work: WorkDirectory, run: object) -> int:
        change(path, edit)
        return fetch(work, run)  # type: ignore[arg-type]

    monkeypatch.setattr(WorkDirectory, "fetch_shards", fetch_and_edit)

    ran = reembed("--db", path, "--workdir", tmp_path / "work", through_beam=True, range_rows=40)
    change(other, edit)
    reembed("--db", other)

    assert ran.code == 0
    assert select(path, VECTORS) == select(other, VECTORS)


@pytest.mark.skipif(
    not shutil.which("unshare") or os.geteuid() != 0, reason="hides the database with unshare"
)
@pytest.mark.system
def test_workers_that_can_not_reach_the_database_embed_all_the_same(
    reembed: Call, tmp_path: Path
) -> None:
    memories = [memory(f"{at:03d}") for at in range(150)]
    (tmp_path / "private").mkdir()
    hidden = make_store(tmp_path / "private" / "m.db", memories)
    other = make_store(tmp_path / "other.db", memories)
    external = ("--job_endpoint=embed", "--environment_type=EXTERNAL")

    reembed("--db", other)
    with worker_pool(tmp_path, hidden=hidden.parent) as address:
        flags = ("--db", hidden, "--runner", "PortableRunner")
        beam = ("--", *external, f"--environment_config={address}")
        refused = reembed(*flags, *beam, through_beam=True)
        done = reembed(*flags, "--workdir", tmp_path / "work", *beam, through_beam=True)

    assert refused.code == 1
    assert (done.code, done.err.count("error")) == (0, 0)
    assert select(hidden, VECTORS) == select(other, VECTORS)


@pytest.mark.system
def test_workers_that_find_nothing_of_what_was_left_for_them_end_the_run(
    reembed: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_store(tmp_path / "m.db", [memory(f"{i}") for i in range(9)])
    before = path.read_bytes()
    monkeypatch.setattr(WorkDirectory, "read_inputs", lambda *_, **__: iter(()))

    ran = reembed("--db", path, "--workdir", tmp_path / "work", through_beam=True)

    assert ran.code == 1
    assert wording(ran.error, tmp_path) == snapshot(
        "of 9 rows that were left for the workers in TMP/work/RUN, they have found 0; name a "
        "work directory with --workdir that all workers see as this machine does"
    )
    assert path.read_bytes() == before


def test_a_place_that_does_not_answer_is_told_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    from reembed.transforms import workdir

    released = threading.Event()
    monkeypatch.setattr(workdir, "MOST_SECONDS", 0.05)
    monkeypatch.setattr(FileSystems, "exists", lambda path: released.wait(30))
    try:
        with pytest.raises(StagingError) as refused:
            WorkDirectory("gs://b/x", "1").make()
        assert wording(refused, tmp_path) == snapshot(
            "the work directory gs://b/x gave no answer within 0.05 s; see that this machine "
            "can reach it and is logged in there, or name another with --workdir"
        )
    finally:
        released.set()
    assert str(refused.value) == snapshot(
        "the work directory gs://b/x gave no answer within 0.05 s; see that this machine can "
        "reach it and is logged in there, or name another with --workdir"
    )
