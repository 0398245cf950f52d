"""The run directory: Parquet shards of vectors, and the summary of a run.

    DATABASE.reembed/           0700, beside the database
      lock                      held (flock) by the process that runs
      RUN-ID/
        shards/0000007.1.000.parquet    range 7, pass 1, part 0
        shards/pass-1.json              what the pass did
        summary.json            what was done; its presence says that the run ended

A shard has one row for each row of the store that was read, in key order:

    key     string              the row's key
    digest  16 bytes            of the exact text (see `rows.text_digest`)
    vector  4 x dimension bytes little-endian float32; null for a skipped row
    cause   string              why the row was skipped; null for a vector
    reason  string              the same for the operator

Shards are never changed: each is written to a temporary name, flushed and renamed.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from transforms.errors import StagingError
from transforms.rows import (
    DIGEST_BYTES,
    Cause,
    RangeVectors,
    Skipped,
    StagedRange,
    StagedRow,
)

SUMMARY = "summary.json"

# A run's directory, or one that was being removed; what else is there is not ours to delete.
_RUN_NAME = re.compile(r"\.?\d{8}T\d{6}Z-[0-9a-f]{4}(\.removed)?")

_RESERVE = "reserve"
_RESERVE_BYTES = 65_536
"""Kept free for the JSON files, so that a disk that fills up can't hide what was done."""

SCHEMA_VERSION = 1
"""Version of the files in a run directory and of the JSON that is printed."""


@dataclass(frozen=True)
class RunDirectory:
    """The directory of one run. A value: workers write to it by its path."""

    path: Path

    @property
    def run_id(self) -> str:
        """The run's name: when it began (UTC), and four random digits."""
        return self.path.name

    @property
    def shards(self) -> Path:
        """Where the shards are."""
        return self.path / "shards"

    def write_shard(self, vectors: RangeVectors, *, pass_number: int) -> StagedRange:
        """Write one shard.

        Safe to run twice: the name says which part of which range it is, the file appears
        whole or not at all, and a second one takes its place.
        """
        name = f"{vectors.range.index:07d}.{pass_number}.{vectors.part:03d}.parquet"
        with _failing_clearly(self.shards), _published(self.shards / name) as temporary:
            pq.write_table(_table(vectors), temporary, compression="none", use_dictionary=False)
        skipped = sum(row.skipped is not None for row in vectors.rows)
        return StagedRange(vectors.range, name, len(vectors.rows) - skipped, skipped)

    def list_shards(self, *, before_pass: int | None = None) -> dict[int, list[Path]]:
        """List the shards by the index of their range, oldest pass first."""
        shards: dict[int, list[Path]] = {}
        with _failing_clearly(self.shards):
            for path in sorted(self.shards.iterdir()):
                index, _, rest = path.name.partition(".")
                if path.suffix != ".parquet" or not index:
                    continue
                pass_number = rest.partition(".")[0]
                if before_pass is None or int(pass_number) < before_pass:
                    shards.setdefault(int(index), []).append(path)
        return shards

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Write a JSON file. Safe to run twice: the last one stays."""
        text = json.dumps({**self.stamp, **values}, indent=2, ensure_ascii=False) + "\n"
        with _failing_clearly(self.path):
            (self.shards / _RESERVE).unlink(missing_ok=True)
            with _published(self.path / name) as temporary:
                temporary.write_text(text, encoding="utf-8")

    def read_json(self, name: str) -> dict[str, Any]:
        """Read what `write_json` wrote."""
        with _failing_clearly(self.path):
            values: dict[str, Any] = json.loads((self.path / name).read_text(encoding="utf-8"))
            return values

    @property
    def stamp(self) -> dict[str, Any]:
        """What every JSON of a run carries."""
        return {"schema_version": SCHEMA_VERSION, "run_id": self.run_id}

    @property
    def ended(self) -> bool:
        """Whether the run came to its end."""
        return (self.path / SUMMARY).exists()

    def remove(self) -> None:
        """Delete the directory; it vanishes at once, so that nothing reads half of it."""
        condemned = self.path.with_name(f".{self.path.name}.removed")
        if self.path.exists():
            self.path.replace(condemned)
        shutil.rmtree(condemned, ignore_errors=True)

    def finish(self, values: Mapping[str, Any]) -> None:
        """Keep what was done, and delete the shards: their vectors are in the store."""
        self.write_json(SUMMARY, values)
        shutil.rmtree(self.shards, ignore_errors=True)


def staging_root(database: Path) -> Path:
    """Where the runs on a database are kept: beside the real file."""
    real = database.resolve()
    return real.with_name(real.name + ".reembed")


def plan_run(database: Path) -> RunDirectory:
    """Choose the directory of a new run; nothing is made yet."""
    started = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    return RunDirectory(staging_root(database) / f"{started}-{secrets.token_hex(2)}")


@contextmanager
def begin_run(run: RunDirectory) -> Iterator[None]:
    """Make the run's directory, and hold the lock that keeps other runs off the database.

    The lock dies with the process. What killed runs have left is removed: their vectors are in
    the store, all of them or none. Raises StagingError if another run holds the lock.
    """
    root = run.path.parent
    made = False
    descriptor = None
    try:
        with _failing_clearly(root):
            made = not root.exists()
            root.mkdir(mode=0o700, exist_ok=True)
            descriptor = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        _lock(descriptor, root)
        for place in root.iterdir():
            if _RUN_NAME.fullmatch(place.name):
                earlier = RunDirectory(place)
                # Killed before its summary, a run has left all; killed after it, its shards.
                shutil.rmtree(earlier.shards if earlier.ended else place, ignore_errors=True)
        with _failing_clearly(run.path):
            run.path.mkdir(mode=0o700)
            run.shards.mkdir(mode=0o700)
            with _published(run.shards / _RESERVE) as reserve:
                reserve.write_bytes(bytes(_RESERVE_BYTES))
        yield
    finally:
        if not run.ended:
            run.remove()
            if made:
                shutil.rmtree(root, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def read_shards(paths: Iterable[Path], *, with_vectors: bool) -> Iterator[StagedRow]:
    """Read the rows of shards; without their vectors, only whether a row was skipped is known."""
    names = ["key", "digest", "cause", "reason", *(["vector"] if with_vectors else [])]
    for path in paths:
        with _failing_clearly(path):
            table = pq.read_table(path, columns=names)
        columns = [table.column(name).to_pylist() for name in names]
        if not with_vectors:
            columns.append([None] * table.num_rows)
        for key, digest, cause, reason, vector in zip(*columns, strict=True):
            skipped = None if cause is None else Skipped(key, Cause(cause), reason)
            yield StagedRow(key, digest, vector, skipped)


def _table(vectors: RangeVectors) -> pa.Table:
    rows, skips = vectors.rows, [row.skipped for row in vectors.rows]
    return pa.table(
        {
            "key": pa.array([row.key for row in rows], pa.string()),
            "digest": pa.array([row.digest for row in rows], pa.binary(DIGEST_BYTES)),
            "vector": pa.array([row.vector for row in rows], pa.binary(vectors.dimension * 4)),
            "cause": pa.array([skip and str(skip.cause) for skip in skips], pa.string()),
            "reason": pa.array([skip and skip.reason for skip in skips], pa.string()),
        }
    )


@contextmanager
def _published(path: Path) -> Iterator[Path]:
    """Give a temporary path to write; flush it and rename it to `path` afterwards."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.touch(mode=0o600)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # The rename itself must be on the disk, too.
    finally:
        os.close(directory)


@contextmanager
def _failing_clearly(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise StagingError(
            f"the run directory {path} can't be used ({why}); the store is unchanged: make room, "
            "or make the database's directory writable, and run again"
        ) from error


def _lock(descriptor: int, root: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A run that failed may have removed the file between our opening and our locking it.
        ours = os.path.samestat(os.fstat(descriptor), (root / "lock").stat())
    except OSError:
        ours = False
    if not ours:
        owner = os.pread(descriptor, 100, 0).decode(errors="replace").strip()
        raise StagingError(
            f"another run is at work on {root.with_suffix('')} (process {owner}); "
            "wait for it to end"
        )
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
