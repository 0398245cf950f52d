"""The backup: what rows held before a run wrote to them."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inline_snapshot import snapshot

from reembed.transforms.errors import StagingError
from reembed.transforms.rows import Saved, Stored, vector_digest
from reembed.transforms.staging import Ledger, read_ledger, saved_ranges, write_backup
from reembed.transforms.staging import backup as backup_module
from reembed.transforms.staging.files import read_table, tables
from reembed.transforms.staging.names import BACKUP
from tests.wording import wording

digests = st.binary(min_size=16, max_size=16)
stored = st.builds(
    Stored,
    st.one_of(st.none(), st.binary(max_size=9)),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=9),
)
saved_rows = st.builds(
    Saved, st.sampled_from("abc"), digests, digests, digests, st.booleans(), stored
)


def one(key: str, vector: bytes | None = b"old", *, written: bytes | None = b"new") -> Saved:
    old = Stored(vector, "embedding_dim=integer:31")
    return Saved(key, b"t" * 16, vector_digest(written), old.digest, True, old)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(saved_rows, max_size=5), max_size=4))
def test_all_that_was_saved_is_read_back_the_latest_first(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[Saved]]
) -> None:
    directory = tmp_path_factory.mktemp("backup")
    for saved in files:
        write_backup(directory, 3, saved)

    everything = [row for saved in files for row in saved]
    for with_vectors in (True, False):
        ledger = read_ledger(directory, 3, with_vectors=with_vectors)
        seen = everything if with_vectors else [row._replace(stored=None) for row in everything]
        assert {key: list(ledger.of(key)) for key in ledger.keys} == {
            key: [row for row in reversed(seen) if row.key == key]
            for key in {row.key for row in seen}
        }
        assert list(ledger.of("none")) == []


def test_no_vector_and_an_empty_one_are_told_apart(tmp_path: Path) -> None:
    write_backup(tmp_path, 0, [one("a", None), one("b", b"")])

    ledger = read_ledger(tmp_path, 0, with_vectors=True)

    assert [row.stored and row.stored.vector for key in "ab" for row in ledger.of(key)] == [
        None,
        b"",
    ]


def test_a_ledger_takes_note_of_more(tmp_path: Path) -> None:
    first, second, other = one("a"), one("a", b"later"), one("b")
    ledger = Ledger([first])
    ledger.add([second, other])

    assert list(ledger.of("a")) == [second, first]
    assert list(ledger.of("b")) == [other]
    assert sorted(ledger.keys) == ["a", "b"]


def test_each_range_has_files_of_its_own(tmp_path: Path) -> None:
    for index, key in ((7, "a"), (7, "b"), (70, "c")):
        write_backup(tmp_path, index, [one(key)])

    assert {
        index: [path.name[:13] for path in paths] for index, paths in saved_ranges(tmp_path).items()
    } == {7: ["0000007.0000.", "0000007.0001."], 70: ["0000070.0000."]}
    assert sorted(read_ledger(tmp_path, 7, with_vectors=False).keys) == ["a", "b"]
    assert sorted(read_ledger(tmp_path, 8, with_vectors=False).keys) == []


def test_saying_the_same_again_changes_nothing(tmp_path: Path) -> None:
    for _ in range(2):
        write_backup(tmp_path, 0, [one("a")])

    assert set(read_ledger(tmp_path, 0, with_vectors=True).of("a")) == {one("a")}


def test_a_backup_is_parquet_that_others_can_read(tmp_path: Path) -> None:
    write_backup(tmp_path, 0, [one("a")])
    (path,) = tmp_path.iterdir()

    assert pq.read_table(path).to_pylist() == [
        {
            "key": "a",
            "digest": b"t" * 16,
            "written": vector_digest(b"new"),
            "was": one("a").was,
            "restorable": True,
            "vector": b"old",
            "others": "embedding_dim=integer:31",
        }
    ]


def test_a_backup_that_is_not_read_back_as_it_was_written_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(path: Path, columns: list[str]) -> object:
        return read_table(path, columns).slice(1)

    monkeypatch.setattr(backup_module, "read_table", lose)
    with pytest.raises(StagingError) as refused:
        write_backup(tmp_path, 0, [one("a"), one("b")])
    (path,) = tables(tmp_path, BACKUP)
    assert wording(refused, tmp_path).replace(path.name, "FILE") == snapshot(
        "the backup TMP/FILE is not as it was written; check the disk"
    )


def test_a_damaged_backup_is_named_and_never_read_as_an_empty_one(tmp_path: Path) -> None:
    write_backup(tmp_path, 0, [one("a")])
    (path,) = tables(tmp_path, BACKUP)
    path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(StagingError) as refused:
        read_ledger(tmp_path, 0, with_vectors=False)
    assert wording(refused, tmp_path).replace(path.name, "FILE") == snapshot(
        "TMP/FILE is damaged: its bytes are not those that were written; run reembed again, which "
        "looks through all files of the run first"
    )


def test_a_run_that_is_gone_is_not_taken_for_one_without_a_backup(tmp_path: Path) -> None:
    with pytest.raises(StagingError) as refused:
        read_ledger(tmp_path / "gone" / "backup", 0, with_vectors=False)
    assert wording(refused, tmp_path) == snapshot(
        "the run directory TMP/gone/backup can't be used (No such file or directory: "
        "TMP/gone); restore it from a copy; if another command has just removed it, run "
        "again"
    )


@pytest.mark.parametrize("latest", range(8))  # Names of one number go by their checksums.
def test_a_file_goes_after_those_that_are_there_though_one_before_it_was_taken_away(
    tmp_path: Path, latest: int
) -> None:
    for vector in (b"a", b"b", b"c"):
        write_backup(tmp_path, 0, [one("a", vector)])
    first = tables(tmp_path, BACKUP)[0]
    first.rename(first.with_suffix(".damaged"))

    write_backup(tmp_path, 0, [one("a", bytes([latest]))])

    ledger = read_ledger(tmp_path, 0, with_vectors=True)
    assert [row.stored and row.stored.vector for row in ledger.of("a")] == [
        bytes([latest]),
        b"c",
        b"b",
    ]
