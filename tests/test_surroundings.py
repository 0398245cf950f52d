"""What else goes on around a database: who has it open, and where it lies."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from inline_snapshot import snapshot

from reembed.pipeline.surroundings import file_system, holders, warnings
from tests.conftest import make_store, memory
from tests.test_bad_input import holding
from tests.wording import wording

Mounted = Callable[[Mapping[str, str]], None]


@pytest.fixture
def mounted(monkeypatch: pytest.MonkeyPatch) -> Mounted:
    """Have file systems of these kinds mounted at these places."""

    def mount(kinds: Mapping[str, str]) -> None:
        parts = [SimpleNamespace(mountpoint=place, fstype=kind) for place, kind in kinds.items()]
        monkeypatch.setattr(psutil, "disk_partitions", lambda **_: parts)

    return mount


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_store(tmp_path / "ai-memory.db", [memory("a")])


def test_nothing_is_said_of_a_database_that_is_alone_on_a_disk(
    path: Path, mounted: Mounted
) -> None:
    mounted({"/": "ext4"})

    assert warnings(path) == []


@pytest.mark.system
def test_each_process_that_has_the_database_open_is_named_with_its_id(
    path: Path, mounted: Mounted, tmp_path: Path
) -> None:
    mounted({"/": "ext4"})
    link = path.with_name("link.db")
    link.symlink_to(path)

    with holding(path, "SELECT * FROM memories") as process:
        name = psutil.Process(process.pid).name()
        [found] = warnings(path)
        [by_the_link] = warnings(link)
        held = list(holders(path))
        with holding(path, "SELECT 1") as other:
            both = {process for process, _ in holders(path)}

    assert held == [(process.pid, name)]
    assert both == {process.pid, other.pid}
    assert found.startswith(f"process {process.pid} ({name}) has ")
    assert wording(found, tmp_path).replace(f"({name})", "(NAME)") == snapshot(
        "process N (NAME) has TMP/ai-memory.db open; if it writes vectors, as the ai-memory "
        "daemon does, stop it or set it to the new model first, since it goes on writing the "
        "old model's"
    )
    assert by_the_link == found.replace(f" {path} ", f" {link} ")
    assert list(holders(path)) == []


@pytest.mark.system
def test_this_process_and_those_of_other_databases_are_not_named(path: Path) -> None:
    other = make_store(path.with_name("other.db"), [memory("a")])
    connection = sqlite3.connect(path)
    try:
        connection.execute("SELECT * FROM memories").fetchall()
        own = psutil.Process(os.getpid()).open_files()
        with holding(other, "SELECT * FROM memories"):
            assert list(holders(path)) == []
    finally:
        connection.close()
    assert str(path) in [file.path for file in own]


def test_a_process_that_may_not_be_looked_at_is_passed_over(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(process: psutil.Process) -> list[object]:
        raise psutil.AccessDenied(process.pid)

    monkeypatch.setattr(psutil.Process, "open_files", denied)

    assert list(holders(path)) == []


@pytest.mark.parametrize(
    "kind", ["nfs", "nfs4", "cifs", "smb3", "smbfs", "fuse.sshfs", "9p", "ceph", "CIFS", "afs"]
)
def test_a_network_file_system_is_named(
    kind: str, path: Path, mounted: Mounted, tmp_path: Path
) -> None:
    mounted({"/": "ext4", str(path.parent): kind})

    [found] = warnings(path)
    assert wording(found, tmp_path).replace(f"({kind})", "(KIND)") == snapshot(
        "TMP/ai-memory.db lies on a network file system (KIND), where locks may not hold; "
        "stop every other program that writes to it"
    )


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "zfs", "apfs", "tmpfs", "overlay"])
def test_a_disk_of_this_machine_is_no_network(kind: str, path: Path, mounted: Mounted) -> None:
    mounted({"/": "nfs4", str(path.parent): kind})

    assert warnings(path) == []


def test_a_link_to_a_network_file_system_is_followed(
    path: Path, tmp_path_factory: pytest.TempPathFactory, mounted: Mounted
) -> None:
    link = tmp_path_factory.mktemp("local") / "link.db"
    link.symlink_to(path)
    mounted({"/": "ext4", str(path.parent): "nfs4"})

    (found,) = warnings(link)

    assert wording(found, link.parent) == snapshot(
        "TMP/link.db lies on a network file system (nfs4), where locks may not hold; stop "
        "every other program that writes to it"
    )


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/srv/store/ai-memory.db", "nfs4"),
        ("/srv/store/local/ai-memory.db", "xfs"),
        ("/srv/storehouse/ai-memory.db", "ext4"),
        ("/srv/store", "nfs4"),
        ("/ai-memory.db", "ext4"),
    ],
)
def test_the_nearest_mount_says_the_kind(path: str, kind: str, mounted: Mounted) -> None:
    mounted({"/": "ext4", "/srv/store": "nfs4", "/srv/store/local": "xfs"})

    assert file_system(Path(path)) == kind


def test_a_kind_that_can_not_be_told_is_no_warning(path: Path, mounted: Mounted) -> None:
    mounted({})

    assert file_system(path) is None
    assert warnings(path) == []


def test_the_kind_of_a_real_file_system_is_told(path: Path) -> None:
    assert file_system(path)


def test_other_names_of_the_database_are_told(path: Path, mounted: Mounted, tmp_path: Path) -> None:
    mounted({"/": "ext4"})
    (tmp_path / "copy.db").hardlink_to(path)

    [told] = warnings(path)

    assert wording(told, tmp_path) == snapshot(
        "TMP/ai-memory.db has 2 names (hard links), and all of them change with it; a program that "
        "opens it by another name does not see its journal or log, which can corrupt it"
    )
