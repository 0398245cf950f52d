"""What was saved is recorded: of which run, range and pass, and what a run still needs of it."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
from inline_snapshot import snapshot

from reembed.transforms.embedders.fake import POISON
from reembed.transforms.staging import RunDirectory, find_runs
from tests.conftest import Call, change, make_store, memory, select
from tests.store_kinds import KINDS, Kind
from tests.wording import wording

OLD = {f"{i}": bytes([i + 1]) * 8 for i in range(8)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    rows = [memory(key, embedding=vector, embedding_dim=2) for key, vector in OLD.items()]
    return make_store(tmp_path / "m.db", rows)


def vectors(path: Path) -> dict[str, bytes]:
    return {str(key): bytes(v) for key, v in select(path, "SELECT id, embedding FROM memories")}


def newest(path: Path) -> RunDirectory:
    return find_runs(path)[-1][0]


def edit_manifest(run: RunDirectory, **changes: object) -> None:
    file = run.path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def put(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    file.chmod(0o600)


def test_shards_of_another_run_range_or_pass_are_not_used(
    reembed: Call, path: Path, tmp_path: Path
) -> None:
    other = make_store(tmp_path / "other.db", [memory(key) for key in OLD])
    assert reembed("--db", other, "--max-rows", "6", range_rows=2, behaviour=0.5).code == 0
    assert reembed("--db", path, "--max-rows", "6", range_rows=2).code == 0
    own, strange = sorted(newest(path).shards.iterdir()), sorted(newest(other).shards.iterdir())
    assert len(own) == len(strange) == 3
    # Another run's, of the same rows; another range's; one that says that it is of a later pass.
    own[0].unlink()
    put(own[0].with_name(strange[0].name), strange[0].read_bytes())
    second = own[1].read_bytes()
    own[1].rename(own[1].with_name(f"0000003{own[1].name[7:]}"))
    put(own[2].with_name(own[2].name.replace(".0001.", ".0002.")), own[2].read_bytes())

    done = reembed("--db", path, "--json", range_rows=2)

    assert (done.code, done.values["reembedded"]) == (0, 8)
    # The two of the range that is whole are taken; those of the first two, and two new ones.
    assert done.values["embedded"] == 6
    assert done.err.count("was damaged; it is made again") == 3  # Each names its own file.
    expected = make_store(tmp_path / "expected.db", [memory(key) for key in OLD])
    assert reembed("--db", expected, range_rows=2).code == 0
    assert vectors(path) == vectors(expected)
    assert second not in [file.read_bytes() for file in newest(path).backup.iterdir()]


@pytest.mark.parametrize("of", ["another run", "another range"])
def test_files_of_the_backup_that_were_swapped_are_not_used(
    reembed: Call, path: Path, of: str
) -> None:
    assert reembed("--db", path, range_rows=4).code == 0
    first, second = sorted(newest(path).backup.iterdir())
    kept = {file: file.read_bytes() for file in (first, second)}
    if of == "another run":
        assert reembed("--db", path, "--model", "other", range_rows=4, behaviour=0.5).code == 0
        later, _ = sorted(newest(path).backup.iterdir())
        content = later.read_bytes()
        assert reembed("rollback", "--db", path).code == 0
        first.unlink()
        put(first.with_name(later.name), content)
    else:
        first.rename(first.with_name(f"0000001{first.name[7:]}"))

    checked = reembed("verify", "--db", path, "--json")
    undone = reembed("rollback", "--db", path, "--json")

    assert (checked.code, checked.values["lost"], checked.values["checked"]) == (1, 4, 4)
    assert (undone.code, undone.values["restored"], undone.values["left"]) == (6, 4, 4)
    assert undone.values["lost_files"] == {first.name: 4}
    put(first, kept[first])
    assert reembed("rollback", "--db", path).code == 0
    assert vectors(path) == OLD


def test_a_manifest_that_says_staging_though_all_is_replaced_costs_no_backup(
    reembed: Call, path: Path, tmp_path: Path
) -> None:
    assert reembed("--db", path, "--max-rows", "7", range_rows=2).code == 0
    shards = {file: file.read_bytes() for file in newest(path).shards.iterdir()}
    assert reembed("--db", path, range_rows=2).code == 0
    run = newest(path)
    new = vectors(path)
    wrong = {"state": "staging", "done": [], "writing": [], "wrote": False, "saved": {}, "order": 0}
    run.shards.mkdir(mode=0o700)
    for file, content in shards.items():
        put(file, content)
    edit_manifest(run, **wrong)
    backup = {file.name for file in run.backup.iterdir()}

    fresh = reembed("--db", path, "--fresh", range_rows=2)
    assert fresh.code == 1
    assert wording(fresh.error, tmp_path) == snapshot(
        "the manifest of the run RUN says that it is staging, but rows of TMP/m.db hold "
        "vectors that it wrote, so its backup is the way back; finish it with the same "
        "command without --fresh"
    )
    cleaned = reembed("cleanup", "--db", path, "--run", run.run_id, "--json")
    assert (cleaned.code, cleaned.values["removed"]) == (0, [])
    again = reembed("--db", path, "--json", range_rows=2)

    assert (again.code, again.values["reembedded"]) == (0, 8)
    assert vectors(path) == new
    assert {file.name for file in run.backup.iterdir()} >= backup
    assert reembed("verify", "--db", path).code == 0
    undone = reembed("rollback", "--db", path, "--json")
    assert (undone.code, undone.values["restored"]) == (0, 8)
    assert vectors(path) == OLD


def test_a_backup_of_an_attempt_that_wrote_nothing_is_let_go(
    reembed: Call, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("reembed.transforms.replacing._write_all", None)
        with pytest.raises(TypeError):
            reembed("--db", path, range_rows=4)
    run = newest(path)
    assert len(list(run.backup.iterdir())) == 2
    change(path, "UPDATE memories SET content = 'edited' WHERE id = '0'")

    assert reembed("--db", path, range_rows=4).code == 0

    assert len(list(run.backup.iterdir())) == 2
    assert sorted(run.read_manifest().saved or ()) == sorted(f.name for f in run.backup.iterdir())
    undone = reembed("rollback", "--db", path, "--json")
    assert (undone.code, undone.values["restored"]) == (0, 8)


def test_how_skipped_rows_are_treated_stays_with_a_run_that_has_begun_to_replace(
    reembed: Call, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reembed.transforms.stores import Replacement

    change(path, f"UPDATE memories SET content = '{POISON}' WHERE id IN ('1', '5')")
    flags = ("--db", path, "--max-skipped", "0.4")
    several = {"range_rows": 2, "rows_at_once": 2, "first_rows": 2}
    assert reembed(*flags, "--skipped", "keep", "--max-rows", "3", **several).code == 0
    put_back, numbers = Replacement.put, itertools.count()

    def fails(table: Replacement, *arguments: object, **more: object) -> None:
        if next(numbers) == 2:
            raise KeyError("as if it was killed")
        put_back(table, *arguments, **more)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Replacement, "put", fails)
        with pytest.raises(KeyError):
            reembed(*flags, "--skipped", "clear", **several)  # What counts before it replaces.
    assert newest(path).read_manifest().state == "replacing"

    refused = reembed(*flags, "--skipped", "keep", **several)
    assert refused.code == 6  # As from each command until the run is finished.
    assert wording(refused.error, path.parent) == snapshot(
        "the run RUN began to replace with --skipped clear, and all of its rows must be "
        "treated alike; leave out --skipped keep, or undo the run with reembed rollback "
        "first; the replacement by run RUN (to all-MiniLM-L6-v2 (8-dim)) is incomplete: of "
        "ranges 0-3, none hold new vectors, and 0 were being written"
    )
    late = reembed(*flags, "--one-transaction", **several)
    assert late.code == 6
    assert wording(late.error, path.parent) == snapshot(
        "the run RUN has begun to replace in several transactions, so --one-transaction "
        "comes too late; leave it out, or undo the run with reembed rollback first; the "
        "replacement by run RUN (to all-MiniLM-L6-v2 (8-dim)) is incomplete: of ranges "
        "0-3, none hold new vectors, and 0 were being written"
    )
    done = reembed(*flags, "--json", **several)

    assert (done.code, done.values["skipped"]) == (0, 2)
    held = dict(select(path, "SELECT id, embedding FROM memories WHERE embedding IS NULL"))
    assert sorted(held) == ["1", "5"]
    checked = reembed("verify", "--db", path, "--json")
    assert (checked.code, checked.values["findings"]) == (0, 0)
    assert reembed("rollback", "--db", path).code == 0
    assert vectors(path) == OLD


def test_a_lost_list_of_skipped_rows_is_missed(reembed: Call, path: Path) -> None:
    change(path, f"UPDATE memories SET content = '{POISON}' WHERE id = '1'")
    assert reembed("--db", path).code == 0
    (newest(path).path / "skipped.jsonl").unlink()

    refused = reembed("--db", path, "--retry-skipped")

    assert refused.code == 1
    assert wording(refused.error, path.parent) == snapshot(
        "TMP/m.db.reembed/RUN/skipped.jsonl is gone, which names the 1 rows that the run "
        "skipped; put it back from a copy, or run without --retry-skipped"
    )


def test_a_process_that_died_before_it_noted_its_last_file_loses_no_row(
    reembed: Call, path: Path
) -> None:
    assert reembed("--db", path, range_rows=4).code == 0
    run = newest(path)
    saved = dict(run.read_manifest().saved or {})
    last = max(saved)
    del saved[last]
    edit_manifest(run, saved=saved)

    undone = reembed("rollback", "--db", path, "--json")

    assert (undone.code, undone.values["restored"], undone.values["left"]) == (0, 8, 0)
    assert last in (run.read_manifest().saved or {})
    assert vectors(path) == OLD
    shutil.rmtree(run.path)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_lost_file_of_any_store_is_named_and_can_be_put_back(
    kind: Kind, reembed: Call, tmp_path: Path
) -> None:
    path = kind.make(tmp_path / "store.db", [f"text {i}" for i in range(6)])
    before = kind.held(path)
    assert reembed("--db", path, "--model", "m", *kind.flags, range_rows=3).code == 0
    new = kind.held(path)
    first, _ = sorted(newest(path).backup.iterdir())
    content = first.read_bytes()
    first.unlink()

    undone = reembed("rollback", "--db", path)

    assert undone.code == 6
    in_part = snapshot(
        "the file FILE (3 rows) of the backup in TMP/store.db.reembed/RUN/backup is "
        "missing or damaged, so rows of TMP/store.db keep the vectors that run RUN gave "
        "them; put the file back from a copy of it and roll back again, or re-embed these "
        "rows with the former model"
    )
    whole = snapshot(
        "the file FILE (3 rows) of the backup in TMP/store.db.reembed/RUN/backup is "
        "missing or damaged, and in TMP/store.db all rows of one model go back together or "
        "not at all, so nothing was put back; put the file back from a copy of it, and "
        "roll back again"
    )
    said = wording(undone.error, tmp_path).replace(first.name, "FILE")
    if kind.whole:
        assert said == whole
    else:
        assert said == in_part
    assert kind.held(path) == (new if kind.whole else new[:3] + before[3:])
    put(first, content)
    assert reembed("rollback", "--db", path).code == 0
    assert kind.held(path) == before
