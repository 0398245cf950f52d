"""The work directory of a run whose workers can't reach the database: on any Beam file system.

WORKDIR/RUN-ID/
  inputs-ATTEMPT-0001/     the rows that a pass embeds, by range and part (see `staging.inputs`)
  shards/                  what became of them; the launcher fetches these into the run directory
  pass-1-ATTEMPT.json      what the pass did

Files are written under their own names, since object stores have no cheap rename: the checksum
in a name tells a file that is not whole.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from apache_beam.io.filesystems import FileSystems

from transforms.errors import StagingError
from transforms.hiding import first_line, shown
from transforms.rows import KeyRange, RangeRows, RangeVectors, StagedRange
from transforms.staging import (
    RunDirectory,
    decode_input,
    encode_input,
    encode_shard,
    is_whole,
    publish,
)

FILES_AT_ONCE = 16

_SHARDS = "shards"

T = TypeVar("T")


@dataclass(frozen=True)
class WorkDirectory:
    """Where the workers of one run read texts and leave vectors. A value: they get it.

    `path` is the run's own directory, as Beam's file systems name it, `attempt` the try at the
    run: what an earlier one left to embed is not embedded again. All methods raise StagingError
    if the place can't be used.
    """

    path: str
    attempt: str

    def write_inputs(self, parts: Iterable[RangeRows], *, pass_number: int) -> None:
        """Leave parts of ranges to be embedded."""
        directory = self._inputs(pass_number)

        def write(part: RangeRows) -> None:
            name, content = encode_input(part)
            self._write(directory, name, content)

        _several_at_once(write, parts)

    def read_inputs(self, keys: KeyRange, *, pass_number: int) -> Iterator[RangeRows]:
        """Read the parts of a range that were left to be embedded."""
        directory = self._inputs(pass_number)
        for path in self._list(directory, f"{keys.index:07d}.*"):
            yield decode_input(path, self._read(path), keys)

    def write_shard(self, vectors: RangeVectors, *, pass_number: int) -> StagedRange:
        """Leave what became of a part. Safe to run twice, as in a run directory."""
        staged, content = encode_shard(vectors, pass_number=pass_number)
        self._write(self._join(_SHARDS), staged.shard, content)
        return staged

    def fetch_shards(self, run: RunDirectory) -> int:
        """Copy the shards that a run directory lacks; return how many.

        Those that are not whole are left for later, or for good.
        """
        there = {shard.path.name for some in run.list_shards().values() for shard in some}
        fetched: list[str] = []

        def fetch(path: str) -> None:
            name, content = _name(path), self._read(path)
            if is_whole(name, content):
                publish(run.shards / name, content)
                fetched.append(name)

        found = self._list(self._join(_SHARDS), "*.parquet")
        _several_at_once(fetch, (path for path in found if _name(path) not in there))
        return len(fetched)

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Write a JSON file. Safe to run twice: the last one stays."""
        self._write(self.path, self._own(name), json.dumps(values).encode())

    def read_json(self, name: str) -> dict[str, Any]:
        """Read what `write_json` wrote."""
        values: dict[str, Any] = json.loads(self._read(self._join(self._own(name))))
        return values

    def make(self) -> None:
        """Make the directory; raise StagingError if nothing can be written there."""
        with self._failing_clearly():
            for path in (self.path, self._join(_SHARDS)):
                if not FileSystems.exists(path):
                    FileSystems.mkdirs(path)
        self._write(self.path, self._own("attempt.json"), b"{}")

    def remove(self) -> None:
        """Delete all of it."""
        for pattern in ("*/*", "*"):
            paths = self._list(self.path, pattern)
            with self._failing_clearly():
                if paths:
                    FileSystems.delete(paths)
        with self._failing_clearly():
            if FileSystems.exists(self.path):  # What is left of it is empty, or was never there.
                FileSystems.delete([self.path])

    def _inputs(self, pass_number: int) -> str:
        return self._join(f"inputs-{self.attempt}-{pass_number:04d}")

    def _own(self, name: str) -> str:
        stem, _, suffix = name.partition(".")
        return f"{stem}-{self.attempt}.{suffix}"

    def _join(self, *names: str) -> str:
        path: str = FileSystems.join(self.path, *names)
        return path

    def _write(self, directory: str, name: str, content: bytes) -> None:
        path = FileSystems.join(directory, name)
        with self._failing_clearly(), FileSystems.create(path) as file:
            file.write(content)

    def _read(self, path: str) -> bytes:
        with self._failing_clearly(), FileSystems.open(path) as file:
            content: bytes = file.read()
            return content

    def _list(self, directory: str, pattern: str) -> list[str]:
        with self._failing_clearly():
            (found,) = FileSystems.match([FileSystems.join(directory, pattern)])
            return sorted(one.path for one in found.metadata_list)

    @contextmanager
    def _failing_clearly(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Each file system has errors of its own.
            raise StagingError(
                f"the work directory {self.path} can't be used ({type(error).__name__}: "
                f"{shown(first_line(error))}); "
                "name one with --workdir that this machine and all workers can write"
            ) from error


def _several_at_once(work: Callable[[T], None], items: Iterable[T]) -> None:
    """Do something with each item, a few at a time: a store far away answers late."""
    waiting: deque[Future[None]] = deque()
    with ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="workdir") as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > FILES_AT_ONCE:  # What waits is held in memory.
                waiting.popleft().result()
        for one in waiting:
            one.result()


def _name(path: str) -> str:
    return path.replace("\\", "/").rpartition("/")[2]
