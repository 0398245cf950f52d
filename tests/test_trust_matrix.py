"""Each place of a run directory exchanged for something hostile, and each command after it.

What lies where a link leads, or has two names, keeps its bytes; there is one sentence.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from reembed.transforms.staging import staging_root
from tests.conftest import Call, files, make_store, memory, select

pytestmark = pytest.mark.system

VECTORS = "SELECT id, hex(embedding) FROM memories ORDER BY id"
STRANGER = 4321
SUM = "0123456789abcdef"


def link(place: Path, others: Path) -> None:
    """A link to somebody's files, or file, in its place."""
    target = others / ("docs" if place.is_dir() else "letter.txt")
    remove(place)
    place.symlink_to(target)


def hard_link(place: Path, others: Path) -> None:
    """Another name of somebody's file, that has the right bytes where it was one."""
    if place.is_file():
        (others / "letter.txt").write_bytes(place.read_bytes())
    (others / "letter.txt").chmod(0o600)
    remove(place)
    os.link(others / "letter.txt", place)


def pipe(place: Path, _: Path) -> None:
    """What can be opened and never ends."""
    remove(place)
    os.mkfifo(place, 0o600)


def owner(place: Path, _: Path) -> None:
    """Somebody else has made it."""
    os.chown(place, STRANGER, STRANGER)


def mode(place: Path, _: Path) -> None:
    """Somebody else can write it."""
    place.chmod(0o777)


def remove(place: Path) -> None:
    """Make room."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink()


ATTACKS = (link, hard_link, pipe, owner, mode)
PLACES = ("root", "lock", "run", "manifest", "backup", "backup file", "shards", "shard")
COMMANDS = ("run", "status", "verify", "rollback", "cleanup")

READS = {"backup file": {"verify", "rollback"}, "shard": {"run"}}
"""What reads a file whose name alone is enough for the other commands; cleanup deletes it."""


class Prepared:
    """A database with one run that has replaced and one that is staged, as often as is wished."""

    def __init__(self, call: Call, home: Path) -> None:
        self.database = make_store(home / "m.db", [memory(f"{at:03d}") for at in range(6)])
        self.others = home / "others"
        self.root = staging_root(self.database)
        self._kept = home / "kept"
        call("--db", self.database)
        (self.ended,) = (one.name for one in self.root.iterdir() if one.name != "lock")
        self.flags = ("--db", self.database, "--model", "other", "--max-rows", "4")
        call(*self.flags)
        (self.staged,) = (
            one.name for one in self.root.iterdir() if one.name not in ("lock", self.ended)
        )
        self._kept.mkdir()
        shutil.copytree(self.root, self._kept / "root")
        shutil.copy(self.database, self._kept / "m.db")

    def again(self) -> None:
        """Have all as it was."""
        for place in (self.root, self.others):
            if os.path.lexists(place):
                remove(place)
        shutil.copytree(self._kept / "root", self.root)
        shutil.copy(self._kept / "m.db", self.database)
        docs = self.others / "docs"
        (docs / "shards").mkdir(parents=True)
        for name in ("letter.txt", "manifest.json", ".x.tmp", f"0000000.0000.{SUM}.parquet"):
            (docs / name).write_text("somebody's")
        (docs / "shards" / f"0000000.0001.000.00004.{SUM}.parquet").write_text("somebody's")
        (self.others / "letter.txt").write_text("somebody's")

    def place(self, name: str) -> Path:
        """Where something lies."""
        ended, staged = self.root / self.ended, self.root / self.staged
        match name:
            case "root":
                return self.root
            case "lock":
                return self.root / "lock"
            case "run":
                return ended
            case "manifest":
                return ended / "manifest.json"
            case "backup":
                return ended / "backup"
            case "backup file":
                return next((ended / "backup").iterdir())
            case "shards":
                return staged / "shards"
            case _:
                return next((staged / "shards").iterdir())

    def arguments(self, command: str) -> tuple[str | Path, ...]:
        """The command line."""
        match command:
            case "run":
                return self.flags
            case "cleanup":
                return ("cleanup", "--db", self.database, "--run", self.ended, "--yes")
            case _:
                return (command, "--db", self.database)


@pytest.fixture(scope="module")
def once() -> list[Prepared]:
    """What the first test has prepared."""
    return []


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_nothing_of_others_is_touched(
    place: str,
    attack: Callable[[Path, Path], None],
    once: list[Prepared],
    reembed: Call,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    if attack is owner and os.geteuid() != 0:
        pytest.skip("other owners can only be made by root")
    if not once:
        once.append(Prepared(reembed, tmp_path_factory.mktemp("once")))
    prepared = once[0]
    # Read, or exchanged for a new file, it does no harm.
    harmless = attack is hard_link and place in ("manifest", "backup file", "shard")
    for command in COMMANDS:
        prepared.again()
        name = str(prepared.place(place))
        attack(prepared.place(place), prepared.others)
        before, held = files(prepared.others), select(prepared.database, VECTORS)

        done = reembed(*prepared.arguments(command))

        assert files(prepared.others) == before, command
        if harmless or command not in READS.get(place, COMMANDS):
            assert done.code == 0, (command, done.err)
            continue
        assert (done.code, done.out) == (1, ""), (command, done.out, done.err)
        assert name in done.error, (command, done.error)
        assert "Traceback" not in done.err
        assert select(prepared.database, VECTORS) == held
