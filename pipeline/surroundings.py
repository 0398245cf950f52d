"""What else is going on around a database: other processes that have it open, and where it lies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

_NETWORK = ("nfs", "cifs", "smb", "afs", "ncp", "9p", "ceph", "gluster", "lustre", "sshfs", "davfs")


def warnings(database: Path) -> list[str]:
    """What the operator should know before vectors are replaced in a database."""
    found = []
    real = database.resolve()
    kind = file_system(real)
    if kind and any(name in kind.lower() for name in _NETWORK):
        found.append(
            f"{database} lies on a network file system ({kind}), where locks may not hold; stop "
            "every other program that writes to it"
        )
    if (names := real.stat().st_nlink) > 1:
        found.append(
            f"{database} has {names} names (hard links), and all of them change with it; a program "
            "that opens it by another name does not see its journal or log, which can corrupt it"
        )
    for process, name in holders(real):
        found.append(
            f"process {process} ({name}) has {database} open; if it writes vectors, as the "
            "ai-memory daemon does, stop it or set it to the new model first, since it goes on "
            "writing the old model's"
        )
    return found


def holders(real: Path) -> Iterator[tuple[int, str]]:
    """Other processes that have a file open, as far as this user may see: (id, name)."""
    for process in psutil.process_iter(["name", "open_files"]):
        files = process.info["open_files"] or ()
        if process.pid != os.getpid() and any(file.path == str(real) for file in files):
            yield process.pid, process.info["name"]


def file_system(path: Path) -> str | None:
    """The kind of the file system that a path lies on; None if it can't be told."""
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    return next((mounts[place] for place in (path, *path.parents) if place in mounts), None)
