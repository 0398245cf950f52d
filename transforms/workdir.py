"""The work directory of a run whose workers can't reach the database: on any Beam file system.

WORKDIR/RUN-ID/
  inputs-ATTEMPT-0001/     the rows that a pass embeds, by range and part (see `staging.inputs`)
  shards/                  what became of them; the launcher fetches these into the run directory
  pass-1-ATTEMPT.json      what the pass did

On a path of this machine its files are as private as those of a run directory, and as little is
believed of them. Elsewhere files are written under their own names, since object stores have no
cheap rename: the checksum in a name tells a file that is not whole.
"""

import json
import logging
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from apache_beam.io.filesystems import FileSystems

from reembed.transforms.embedders.within import within
from reembed.transforms.errors import ReembedError, StagingError
from reembed.transforms.hiding import first_line, shown
from reembed.transforms.rows import KeyRange, RangeRows, RangeVectors, StagedRange
from reembed.transforms.staging import (
    RunDirectory,
    decode_input,
    encode_input,
    encode_shard,
    files,
    is_whole,
    publish,
    trust,
)
from reembed.transforms.staging.names import INPUT, OF_WORK, SHARD

FILES_AT_ONCE = 16

MOST_SECONDS = 60.0
"""How long a work directory may take to be made."""

_SHARDS = "shards"

_logger = logging.getLogger("reembed")

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
        if self._local:
            with self._failing_clearly():
                self._make_local(Path(directory), None)

        def write(part: RangeRows) -> None:
            name, content = encode_input(directory, part)
            self._write(directory, name, content)

        _several_at_once(write, parts)

    def read_inputs(self, keys: KeyRange, *, pass_number: int) -> Iterator[RangeRows]:
        """Read the parts of a range that were left to be embedded."""
        directory = self._inputs(pass_number)
        for path in self._list(directory, INPUT, f"{keys.index:07d}."):
            yield decode_input(path, self._read(path), keys)

    def write_shard(self, vectors: RangeVectors, *, pass_number: int) -> StagedRange:
        """Leave what became of a part. Safe to run twice, as in a run directory."""
        shards = self._join(_SHARDS)
        staged, content = encode_shard(shards, vectors, pass_number=pass_number)
        self._write(shards, staged.shard, content)
        return staged

    def fetch_shards(self, run: RunDirectory) -> int:
        """Copy the shards that a run directory lacks; return how many.

        Those that are not whole are left for later, or for good.
        """
        there = {shard.path.name for some in run.list_shards().values() for shard in some}
        fetched: list[str] = []

        def fetch(path: str) -> None:
            name, content = _name(path), self._read(path)
            if is_whole(path, content):
                publish(run.shards / name, content)
                fetched.append(name)

        found = self._list(self._join(_SHARDS), SHARD)
        _several_at_once(fetch, (path for path in found if _name(path) not in there))
        return len(fetched)

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Write a JSON file. Safe to run twice: the last one stays."""
        self._write(self.path, self._own(name), json.dumps(values).encode())

    def read_json(self, name: str) -> dict[str, Any]:
        """Read what `write_json` wrote."""
        values: dict[str, Any] = json.loads(self._read(self._join(self._own(name))))
        return values

    def make(self, *, like: Path | None = None) -> None:
        """Make the directory; raise StagingError if nothing can be written there.

        As root makes it on this machine, it gets the owner of `like`. Raises UsageError where
        others could put another directory in its place.
        """
        if self._local:
            with self._failing_clearly():
                for path in (self.path, self._join(_SHARDS)):
                    self._make_local(Path(path), like)
            self._write(self.path, self._own("attempt.json"), b"{}")
            return
        try:
            # Its library may try to log in, or to reach its place, without end.
            within(MOST_SECONDS, self._make_remote)
        except TimeoutError:
            raise StagingError(
                f"the work directory {self.path} gave no answer within {MOST_SECONDS:g} s; see "
                "that this machine can reach it and is logged in there, or name another with "
                "--workdir"
            ) from None

    def _make_remote(self) -> None:
        with self._failing_clearly():
            for path in (self.path, self._join(_SHARDS)):
                if not FileSystems.exists(path):
                    FileSystems.mkdirs(path)
        self._write(self.path, self._own("attempt.json"), b"{}")

    def remove(self) -> None:
        """Delete what the run has left there, and the directory if nothing else is in it."""
        if self._local:
            self._remove_local(Path(self.path))
            return
        with self._failing_clearly():
            for pattern in ("*/*", "*"):
                if paths := [
                    path for path in self._match(self.path, pattern) if self._is_ours(path)
                ]:
                    FileSystems.delete(paths)
            if not self._match(self.path, "**") and FileSystems.exists(self.path):
                FileSystems.delete([self.path])

    def _remove_local(self, path: Path) -> None:
        if not os.path.lexists(path):
            return
        with self._failing_clearly():
            trust.check_directory(path, trust.owners_within(path))
            files.remove_own(path, OF_WORK)
            left = [one for one in path.rglob("*") if not one.is_dir()]
        if any(self._is_ours(str(one)) for one in left):
            raise StagingError(f"{path} can't be deleted; delete it: it holds texts and vectors")
        if os.path.lexists(path):
            _logger.warning("%s stays, since reembed did not make all that is in it", path)

    @property
    def _local(self) -> bool:
        """Whether this is a path of this machine, or one that all workers have mounted."""
        return "://" not in self.path

    def _make_local(self, path: Path, like: Path | None) -> None:
        if path == Path(self.path):
            beside = trust.owners_beside(like) if like else {os.geteuid(), 0}
            trust.check_parent(path.parent, "--workdir", beside)
        files.make_directory(path, like=like)
        owners = trust.owners_beside(like) if like else trust.owners_within(path.parent)
        trust.check_directory(path, owners)

    def _is_ours(self, path: str) -> bool:
        """Whether a file in the directory has a name that a run gives there."""
        *above, name = path.removeprefix(self.path).strip("/").split("/")
        if len(above) > 1:
            return False
        inner = OF_WORK.within(above[0]) if above else OF_WORK
        return inner is not None and inner.gives(name)

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
        with self._failing_clearly():
            if self._local:
                publish(Path(path), content, flush=False)
                return
            with FileSystems.create(path) as file:
                file.write(content)

    def _read(self, path: str) -> bytes:
        with self._failing_clearly():
            if self._local:
                return trust.read_file(Path(path))
            with FileSystems.open(path) as file:
                content: bytes = file.read()
                return content

    def _list(self, directory: str, named: re.Pattern[str], start: str = "") -> list[str]:
        """The files of a directory whose names are of a kind and begin so, by name."""
        with self._failing_clearly():
            if self._local:
                paths = self._list_local(directory)
            else:
                paths = self._match(directory, f"{start}*")
        return sorted(p for p in paths if named.fullmatch(_name(p)) and _name(p).startswith(start))

    def _match(self, directory: str, pattern: str) -> list[str]:
        # Beam's patterns can't quote: "?" stands for any sign, and what it has found too much goes.
        quoted = re.sub(r"[*?\[]", "?", directory)
        (found,) = FileSystems.match([FileSystems.join(quoted, pattern)])
        start = FileSystems.join(directory, "")
        return [one.path for one in found.metadata_list if one.path.startswith(start)]

    def _list_local(self, directory: str) -> list[str]:
        trust.check_directory(Path(self.path), trust.owners_within(Path(self.path)))
        try:
            names = os.listdir(directory)  # noqa: PTH208 - a Path for each name costs too much
        except FileNotFoundError:  # Nothing was left in this pass.
            return []
        return [FileSystems.join(directory, name) for name in names]

    @contextmanager
    def _failing_clearly(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Each file system has errors of its own.
            why = error.__cause__ if isinstance(error, StagingError) else error
            if why is None or isinstance(why, ReembedError):
                raise
            barred = isinstance(why, PermissionError) and trust.barred_by(why, Path(self.path))
            what = barred or "name one with --workdir that this machine and all workers can write"
            raise StagingError(
                f"the work directory {self.path} can't be used ({type(why).__name__}: "
                f"{shown(first_line(why))}); "
                f"{what}"
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
