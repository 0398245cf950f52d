"""A real disk that is full: a small tmpfs, which only root can mount.

That there is room is not asked beforehand here, as if another program had taken it since, so that
SQLite's log fills up in the middle of a transaction.
"""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from reembed.pipeline import run
from reembed.transforms import replacing
from reembed.transforms.stores import Replacement
from reembed.transforms.stores.demo import hashed_vector
from tests.conftest import Call, make_store, memory, select

ROWS, RANGE_ROWS = 160, 40
DIMENSION = 256
SEED = 57
TRIES = int(os.environ.get("FAULTS_EACH", "1"))
"""Sizes of the disk that are tried in each setting."""

PLENTY = 64 * 1024
"""KiB: a size with which all is well."""

WHERE = ("the database", "the run directory", "both")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A directory with a file system of its own; skipped where none can be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    with mounted(place):
        yield place


_REMOUNT, _DETACH = 32, 2


@contextmanager
def mounted(place: Path) -> Iterator[None]:
    """A file system of its own for a while; the test is skipped where none can be mounted."""
    if sys.platform != "linux" or _mount(place, PLENTY) != 0:
        pytest.skip("no file system can be mounted here (it takes root)")
    try:
        yield
    finally:
        assert ctypes.CDLL(None).umount2(os.fsencode(place), _DETACH) == 0


def resize(disk: Path, kibibytes: int) -> None:
    """Give the disk another size."""
    assert _mount(disk, kibibytes, _REMOUNT) == 0


def _mount(place: Path, kibibytes: int, flags: int = 0) -> int:
    """Call mount(2), which saves the start of a process each time."""
    flag, size = ctypes.c_ulong(flags), f"size={kibibytes}k".encode()
    found: int = ctypes.CDLL(None).mount(b"tmpfs", os.fsencode(place), b"tmpfs", flag, size)
    return found


def used(disk: Path) -> int:
    """What is on the disk, in KiB."""
    found = os.statvfs(disk)
    return (found.f_blocks - found.f_bfree) * found.f_frsize // 1024


@contextmanager
def noting_most_used(disk: Path, most: list[int]) -> Iterator[None]:
    """Take note of the most that is on the disk at the ends of all transactions."""
    begin = Replacement.transaction

    @contextmanager
    def looking(table: Replacement) -> Iterator[None]:
        with begin(table):
            yield
            most.append(used(disk))
        most.append(used(disk))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Replacement, "transaction", looking)
        yield


def rows(path: Path, scratch: Path) -> dict[str, bytes]:
    """What the rows hold, read from a copy: on a full disk SQLite can't read a log."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    for end in ("", "-wal", "-journal"):
        with suppress(FileNotFoundError):
            shutil.copy(f"{path}{end}", scratch)
    assert select(scratch / path.name, "PRAGMA integrity_check") == [("ok",)]
    return dict(select(scratch / path.name, "SELECT id, embedding FROM memories"))


@pytest.mark.system
@pytest.mark.parametrize("mode", ["wal", "delete"])
@pytest.mark.parametrize("where", WHERE)
def test_a_disk_that_fills_up_in_a_transaction_leaves_whole_ranges_and_the_way_back(
    where: str,
    mode: str,
    disk: Path,
    reembed: Call,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for module in (run, replacing):
        monkeypatch.setattr(module, "require_room", lambda *_: None)
    here = tmp_path / "here"
    path = (here if where == "the run directory" else disk) / "store" / "m.db"
    runs = [] if where == "both" else ["--run-dir", (disk if path.is_relative_to(here) else here)]
    flags = ["--db", path, "--dim", DIMENSION, *runs]
    portions = {"range_rows": RANGE_ROWS, "rows_at_once": 40, "first_rows": 40}
    old = {f"{at:03d}": hashed_vector(f"{at}", DIMENSION) for at in range(ROWS)}

    def start_over() -> int:
        """Make the store; return what it takes on the disk."""
        resize(disk, PLENTY)
        for place in (disk, here):
            shutil.rmtree(place / "store", ignore_errors=True)
            for one in place.glob("2*"):
                shutil.rmtree(one)
        path.parent.mkdir(parents=True)
        make_store(
            path,
            [memory(k, embedding=v, embedding_dim=DIMENSION) for k, v in old.items()],
            mode,
        )
        return used(disk)

    least, most = start_over(), [0]
    with noting_most_used(disk, most):
        assert reembed(*flags, **portions).code == 0
    new = rows(path, tmp_path / "copy")
    assert not new.items() & old.items()

    chance = random.Random(f"{SEED} {where} {mode}")
    ends: Counter[str] = Counter()
    for at in range(TRIES):
        start_over()
        share = (at + chance.random()) / TRIES
        resize(disk, least + 8 + int(share * (max(most) - least)))
        failed = reembed(*flags, **portions)
        found = rows(path, tmp_path / "copy")
        replaced = {int(key) // RANGE_ROWS for key in found if found[key] == new[key]}
        kept = {int(key) // RANGE_ROWS for key in found if found[key] == old[key]}
        ends[f"exit {failed.code}, {len(replaced)} of {ROWS // RANGE_ROWS} ranges new"] += 1
        assert replaced.isdisjoint(kept)
        assert "Traceback" not in failed.err
        assert failed.code in (0, 1, 6), failed.err
        assert failed.code == 6 or len(replaced) in ((4,) if failed.code == 0 else (0,))

        resize(disk, PLENTY)
        status = reembed("status", *flags[:2], *runs)
        assert (status.code == 6) == (failed.code == 6), status.err
        done = reembed(*flags, **portions)
        assert done.code == 0, done.err
        assert rows(path, tmp_path / "copy") == new
        # The way back on a disk that is almost full, and then on one that is not.
        resize(disk, used(disk) + chance.randint(0, 600))
        back = reembed("rollback", *flags[:2], *runs)
        assert "Traceback" not in back.err
        assert back.code in (0, 1, 6)
        resize(disk, PLENTY)
        if back.code != 0:
            assert back.code == 6 or rows(path, tmp_path / "copy") == new
            assert reembed("rollback", *flags[:2], *runs).code == 0
        assert rows(path, tmp_path / "copy") == old
    print(f"{where}, {mode}:", *(f"{what}: {count}" for what, count in ends.items()), sep="\n  ")
