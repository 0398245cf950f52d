"""What lies beside a database under the names of SQLite's own files is not taken for them."""

from __future__ import annotations

import os
import shutil
import sqlite3
import struct
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from inline_snapshot import snapshot

from reembed.transforms.errors import StoreError
from reembed.transforms.stores import recover_store
from reembed.transforms.stores.side_files import check_side_files
from reembed.transforms.stores.sqlite import write_connection, write_transaction
from tests.conftest import Call, files, make_store, memory, select
from tests.wording import wording

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="other owners can only be made by root")
MAGIC = bytes.fromhex("d9d505f920a163d7")
CONTENTS = "SELECT id, content FROM memories ORDER BY id"
COMMANDS = [(), ("--dry-run",), ("verify",), ("rollback",)]
A_MEMBER, NO_MEMBER = 1, 2  # The users daemon and bin, each in the group of its name.


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "store").mkdir()
    return make_store(tmp_path / "store" / "m.db", [memory(f"{at:03d}") for at in range(6)])


def beside(path: Path, suffix: str) -> Path:
    return Path(f"{path}{suffix}")


def header(path: Path, records: int) -> bytes:
    """The first sector of a journal that has to be rolled back."""
    page = struct.unpack(">H", path.read_bytes()[16:18])[0]
    numbers = struct.pack(">IIIII", records, 1, path.stat().st_size // page, 512, page)
    return (MAGIC + numbers).ljust(512, b"\0")


def name_at_the_end(name: str | Path) -> bytes:
    """What makes SQLite delete a file once it has rolled a journal back."""
    content = os.fsencode(name)
    return bytes(4) + content + struct.pack(">II", len(content), sum(content)) + MAGIC


def forged(path: Path, text: bytes) -> bytes:
    """A journal that puts another text into a row."""
    content = path.read_bytes()
    size = struct.unpack(">H", content[16:18])[0]
    at = content.index(b"content 003") // size
    page = content[at * size : (at + 1) * size].replace(b"content 003", text)
    total = 1 + sum(page[place] for place in range(size - 200, 0, -200))
    return header(path, 1) + struct.pack(">I", at + 1) + page + struct.pack(">I", total)


def killed(path: Path) -> dict[str, bytes]:
    """Leave a database as a process does that dies in a large write; return what there is."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        for statement in ("PRAGMA cache_size = 2", "BEGIN"):
            db.execute(statement)
        db.execute("UPDATE memories SET content = content || hex(zeroblob(9000))")
        left = {name: content for name, content in files(path.parent).items() if content}
    for name, content in left.items():
        (path.parent / name).write_bytes(content)
    assert sorted(left) == ["m.db", "m.db-journal"]
    return left


@pytest.mark.parametrize("command", COMMANDS)
def test_a_journal_that_names_somebodys_file_has_it_deleted_by_nobody(
    path: Path, reembed: Call, tmp_path: Path, command: tuple[str, ...]
) -> None:
    victim = tmp_path / "thesis.txt"
    victim.write_text("years of work")
    beside(path, "-journal").write_bytes(header(path, 0) + name_at_the_end(victim))
    before = files(tmp_path)

    refused = reembed(*command, "--db", path)

    assert refused.code == 1
    assert wording(refused.error, tmp_path) == snapshot(
        "TMP/store/m.db-journal would have SQLite delete TMP/thesis.txt, which is no journal "
        "of its own beside TMP/store/m.db; if a program was cut off that wrote to several "
        "databases, let it open TMP/store/m.db again; else somebody may have made the "
        "journal to have that file deleted: move it away, and run again"
    )
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    "name",
    [
        "other-mj0123459AB",
        "m.db-mj012345AAB",
        "../m.db-mj0123459AB",
        "notes",
        "m.db-mj0123459AB/../notes",
    ],
)
def test_only_a_journal_of_its_own_directory_and_kind_may_be_named(
    path: Path, name: str, tmp_path: Path
) -> None:
    victim = path.parent / name
    beside(path, "-journal").write_bytes(header(path, 0) + name_at_the_end(victim))

    if name == "other-mj0123459AB":
        check_side_files(path)
    else:
        with pytest.raises(StoreError) as refused:
            check_side_files(path)
        assert wording(refused, tmp_path).replace(name, "NAME") == snapshot(
            "TMP/store/m.db-journal would have SQLite delete TMP/store/NAME, which is no "
            "journal of its own beside TMP/store/m.db; if a program was cut off that wrote "
            "to several databases, let it open TMP/store/m.db again; else somebody may have "
            "made the journal to have that file deleted: move it away, and run again"
        )


def test_a_name_is_read_up_to_its_first_zero_and_whatever_its_checksum(
    path: Path, tmp_path: Path
) -> None:
    content = b"/etc/passwd\0m.db-mj0123459AB"
    end = bytes(4) + content + struct.pack(">II", len(content), 99) + MAGIC
    beside(path, "-journal").write_bytes(header(path, 0) + end)

    with pytest.raises(StoreError) as refused:
        check_side_files(path)
    assert wording(refused, tmp_path) == snapshot(
        "TMP/store/m.db-journal would have SQLite delete /etc/passwd, which is no journal of "
        "its own beside TMP/store/m.db; if a program was cut off that wrote to several "
        "databases, let it open TMP/store/m.db again; else somebody may have made the "
        "journal to have that file deleted: move it away, and run again"
    )


def test_a_pipe_that_a_write_to_several_databases_names_is_not_waited_for(
    path: Path, tmp_path: Path
) -> None:
    listing = path.parent / "m.db-mj0123459AB"
    os.mkfifo(path.parent / "pipe")
    beside(path, "-journal").write_bytes(header(path, 0) + name_at_the_end(listing))

    listing.write_bytes(os.fsencode(path.parent / "pipe") + b"\0")
    with pytest.raises(StoreError) as refused:
        recover_store(path)
    assert wording(refused, tmp_path) == snapshot(
        "TMP/store/m.db-mj0123459AB names TMP/store/pipe as a journal, which is not a "
        "regular file, so SQLite did not make it; reembed leaves it alone: move "
        "TMP/store/m.db-journal away, and run again"
    )
    listing.unlink()
    os.mkfifo(listing)
    with pytest.raises(StoreError) as refused:
        recover_store(path)
    assert wording(refused, tmp_path) == snapshot(
        "TMP/store/m.db-mj0123459AB is not a regular file, so SQLite did not make it for "
        "TMP/store/m.db; reembed leaves it alone: move it away, and run again"
    )


def test_a_write_that_was_cut_off_is_rolled_back(path: Path, reembed: Call) -> None:
    contents = select(path, CONTENTS)
    killed(path)

    assert reembed("--db", path).code == 0
    assert select(path, CONTENTS) == contents


def test_a_write_to_several_databases_that_was_cut_off_is_rolled_back(path: Path) -> None:
    contents = select(path, CONTENTS)
    journal = killed(path)["m.db-journal"]
    listing = path.parent / "other.db-mj0123459AB"
    listing.write_bytes(os.fsencode(beside(path, "-journal")) + b"\0")
    beside(path, "-journal").write_bytes(journal + name_at_the_end(listing))

    recover_store(path)

    assert select(path, CONTENTS) == contents
    assert sorted(files(path.parent)) == ["m.db"]


def a_link(place: Path) -> None:
    (place.parent.parent / "others").write_bytes(b"theirs")
    place.symlink_to(place.parent.parent / "others")


def a_link_to_nothing(place: Path) -> None:
    place.symlink_to(place.parent.parent / "none")


def a_pipe(place: Path) -> None:
    os.mkfifo(place)


def a_hard_link(place: Path) -> None:
    (place.parent.parent / "others").write_bytes(b"theirs")
    os.link(place.parent.parent / "others", place)


def a_directory(place: Path) -> None:
    place.mkdir()


def writable_by_all(place: Path) -> None:
    place.touch()
    place.chmod(0o666)


def another_owners(place: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("another owner can only be made by root")
    place.touch()
    os.chown(place, 4321, 4321)


@pytest.mark.parametrize("suffix", ["-journal", "-wal", "-shm"])
@pytest.mark.parametrize(
    "make",
    [
        a_link,
        a_link_to_nothing,
        a_pipe,
        a_hard_link,
        a_directory,
        writable_by_all,
        another_owners,
    ],
)
def test_what_sqlite_did_not_make_is_left_alone(
    path: Path, reembed: Call, tmp_path: Path, suffix: str, make: Callable[[Path], None]
) -> None:
    make(beside(path, suffix))
    before = files(tmp_path), sorted(tmp_path.rglob("*"))

    for command in COMMANDS[:2]:
        refused = reembed(*command, "--db", path)

        assert refused.code == 1
        assert beside(path, suffix).name in refused.error
        said = wording(refused.error, tmp_path).replace(suffix, "-SUFFIX")
        assert (
            said
            == snapshot(
                {
                    "a_link": (
                        "TMP/store/m.db-SUFFIX is not a regular file, so SQLite did not "
                        "make it for TMP/store/m.db; reembed leaves it alone: move it "
                        "away, and run again"
                    ),
                    "a_link_to_nothing": (
                        "TMP/store/m.db-SUFFIX is not a regular file, so SQLite did not "
                        "make it for TMP/store/m.db; reembed leaves it alone: move it "
                        "away, and run again"
                    ),
                    "a_pipe": (
                        "TMP/store/m.db-SUFFIX is not a regular file, so SQLite did not "
                        "make it for TMP/store/m.db; reembed leaves it alone: move it "
                        "away, and run again"
                    ),
                    "a_hard_link": (
                        "TMP/store/m.db-SUFFIX is a hard link, so SQLite did not make it "
                        "for TMP/store/m.db, and would write into another file, too; "
                        "reembed leaves it alone: move it away, and run again, or, if "
                        "you know that all in it is yours, put a copy in its place"
                    ),
                    "a_directory": (
                        "TMP/store/m.db-SUFFIX is not a regular file, so SQLite did not "
                        "make it for TMP/store/m.db; reembed leaves it alone: move it "
                        "away, and run again"
                    ),
                    "writable_by_all": (
                        "all users can write TMP/store/m.db-SUFFIX (mode 0666) but not "
                        "TMP/store/m.db, and SQLite would take over what is in it; "
                        "reembed leaves it alone: move it away, and run again, or, if "
                        "you know that all in it is yours, chmod go-w "
                        "TMP/store/m.db-SUFFIX"
                    ),
                    "another_owners": (
                        "TMP/store/m.db-SUFFIX belongs to user 4321, who may not write "
                        "TMP/store/m.db, and SQLite would take over what is in it; "
                        "reembed leaves it alone: move it away, and run again"
                    ),
                }
            )[make.__name__]
        )
    assert (files(tmp_path), sorted(tmp_path.rglob("*"))) == before


@AS_ROOT
def test_another_users_journal_or_log_does_not_get_into_the_database(
    path: Path, reembed: Call, tmp_path: Path
) -> None:
    """As in a directory like /tmp, where each can make files and nobody can take others'."""
    journal = beside(path, "-journal")
    journal.write_bytes(forged(path, b"MALLORY 003"))
    shutil.copytree(path.parent, tmp_path / "proof")
    recover_store(tmp_path / "proof" / "m.db")
    assert ("003", "MALLORY 003") in select(tmp_path / "proof" / "m.db", CONTENTS)
    journal.chmod(0o666)
    os.chown(journal, NO_MEMBER, NO_MEMBER)
    before = files(tmp_path)

    refused = reembed("--db", path)
    assert (refused.code, files(tmp_path)) == (1, before)
    assert wording(refused.error, tmp_path) == snapshot(
        "TMP/store/m.db-journal belongs to bin, who may not write TMP/store/m.db, and SQLite "
        "would take over what is in it; reembed leaves it alone: move it away, and run again"
    )

    journal.unlink()
    log = tmp_path / "log.db"
    shutil.copy(path, log)
    with closing(sqlite3.connect(log, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        shutil.copy(log, path)
        db.execute("UPDATE memories SET content = 'MALLORY 003' WHERE id = '003'")
        shutil.copy(f"{log}-wal", beside(path, "-wal"))
    os.chown(beside(path, "-wal"), NO_MEMBER, NO_MEMBER)
    beside(path, "-wal").chmod(0o666)
    before = files(path.parent)

    refused = reembed("--db", path)
    assert (refused.code, files(path.parent)) == (1, before)
    assert wording(refused.error, tmp_path) == snapshot(
        "TMP/store/m.db-wal belongs to bin, who may not write TMP/store/m.db, and SQLite "
        "would take over what is in it; reembed leaves it alone: move it away, and run again"
    )


@AS_ROOT
@pytest.mark.parametrize(
    ("mode", "owner", "fine"),
    [
        (0o660, A_MEMBER, True),
        (0o660, NO_MEMBER, False),
        (0o640, A_MEMBER, False),
        (0o666, NO_MEMBER, True),
    ],
)
def test_a_member_of_the_group_that_shares_a_database_may_have_made_a_journal(
    path: Path, mode: int, owner: int, fine: bool, tmp_path: Path
) -> None:
    contents = select(path, CONTENTS)
    killed(path)
    path.chmod(mode)
    os.chown(path, -1, 1)
    beside(path, "-journal").chmod(mode)
    os.chown(beside(path, "-journal"), owner, 1)

    if fine:
        recover_store(path)
        assert select(path, CONTENTS) == contents
    else:
        with pytest.raises(StoreError) as refused:
            recover_store(path)
        assert (
            wording(refused, tmp_path)
            == snapshot(
                {
                    "0o660": (
                        "TMP/store/m.db-journal belongs to bin, who may not write "
                        "TMP/store/m.db, and SQLite would take over what is in it; "
                        "reembed leaves it alone: move it away, and run again"
                    ),
                    "0o640": (
                        "TMP/store/m.db-journal belongs to daemon, who may not write "
                        "TMP/store/m.db, and SQLite would take over what is in it; "
                        "reembed leaves it alone: move it away, and run again"
                    ),
                }
            )[oct(mode)]
        )


@AS_ROOT
def test_a_group_that_does_not_share_the_database_may_not_write_its_journal(
    path: Path, tmp_path: Path
) -> None:
    """A member's own group is fine: SQLite makes the file so where the directory has no say."""
    os.chown(path, -1, 1)
    path.chmod(0o660)
    side = beside(path, "-journal")
    side.touch()
    side.chmod(0o660)
    os.chown(side, A_MEMBER, A_MEMBER)
    check_side_files(path)
    os.chown(side, 0, 0)
    check_side_files(path)
    os.chown(side, A_MEMBER, NO_MEMBER)
    with pytest.raises(StoreError) as refused:
        check_side_files(path)
    assert wording(refused, tmp_path) == snapshot(
        "other users can write TMP/store/m.db-journal (mode 0660) but not TMP/store/m.db, "
        "and SQLite would take over what is in it; reembed leaves it alone: move it away, "
        "and run again, or, if you know that all in it is yours, chmod go-w "
        "TMP/store/m.db-journal"
    )


def test_a_journal_that_is_made_while_a_transaction_is_at_work_keeps_it_from_its_commit(
    path: Path,
    tmp_path: Path,
) -> None:
    contents = select(path, CONTENTS)
    journal = beside(path, "-journal")

    with (
        pytest.raises(StoreError) as refused,
        write_connection(path) as db,
        write_transaction(db),
    ):
        journal.write_bytes(b"\0")  # SQLite takes the rights from others if it is empty.
        journal.chmod(0o666)
        db.execute("UPDATE memories SET content = 'new'")
    assert wording(refused, tmp_path) == snapshot(
        "all users can write TMP/store/m.db-journal (mode 0666) but not TMP/store/m.db, and "
        "SQLite would take over what is in it; reembed leaves it alone: move it away, and "
        "run again, or, if you know that all in it is yours, chmod go-w "
        "TMP/store/m.db-journal"
    )
    journal.unlink(missing_ok=True)
    assert select(path, CONTENTS) == contents


def test_the_log_of_a_program_at_work_is_its_own(path: Path, reembed: Call) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("UPDATE memories SET content = 'new' WHERE id = '003'")
        assert beside(path, "-shm").exists()
        assert reembed("--db", path).code == 0
