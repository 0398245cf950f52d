"""The run directory, and the lock that keeps two runs off one database.

DATABASE.reembed/           0700, beside the database
  lock                      held (flock) by the process that runs: its id and its start
  RUN-ID/                   or a link to it, where --run-dir puts it elsewhere
    manifest.json           what the run is about, and how far it has come
    manifest.lock           held (flock) while that is changed
    shards/                 the new vectors, until they are in the store
    backup/                 what was in the store before
    pass-1.json             what the pass did
    summary.json            what was done; its presence says that the run ended
    skipped.jsonl           the rows that got no vector, and why
    remaining.jsonl         the rows that changed so late that they wait for the next run
    rollback.json, left.jsonl    what was put back, and the rows that were left as they are
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from reembed.transforms.errors import RunError, StagingError, UsageError
from reembed.transforms.rows import RangeVectors, StagedRange
from reembed.transforms.staging import files, schema, shards, trust
from reembed.transforms.staging.manifest import Manifest, State
from reembed.transforms.staging.names import (
    BACKUP,
    DAMAGED,
    HALF_MADE,
    OF_A_RUN,
    RUN,
    SHARD,
    SHARDS,
)
from reembed.transforms.staging.shards import Shard

MANIFEST = "manifest.json"
SUMMARY = "summary.json"
SKIPPED = "skipped.jsonl"
REMAINING = "remaining.jsonl"
ROLLBACK = "rollback.json"
LEFT = "left.jsonl"
LOCK = "lock"

_ROOT_SUFFIX = ".reembed"

_LOCK_SECONDS = 0.5
"""How long the lock is tried for: who only looks whether it is held holds it for a moment."""

_DAMAGED = ".damaged"
_MANIFEST_LOCK = "manifest.lock"
_RESERVE = "reserve"
_RESERVE_BYTES = 262_144
"""Kept free for the JSON files, so that a disk that fills up can't hide what was done."""


@dataclass(frozen=True)
class RunDirectory:
    """The directory of one run. A value: workers write to it by its path."""

    path: Path

    @property
    def run_id(self) -> str:
        """The run's name: when it began (UTC), to a fraction of a second in hex digits."""
        return self.path.name

    @property
    def shards(self) -> Path:
        """Where the shards are."""
        return self.path / "shards"

    @property
    def backup(self) -> Path:
        """Where the backup is."""
        return self.path / "backup"

    @property
    def exists(self) -> bool:
        """Whether the directory was made."""
        return self.path.is_dir()

    def write_shard(self, vectors: RangeVectors, *, pass_number: int) -> StagedRange:
        """Write one shard."""
        return shards.write_shard(self.shards, vectors, pass_number=pass_number)

    def list_shards(self) -> dict[int, list[Shard]]:
        """List the shards by the index of their range, oldest pass first."""
        return shards.list_shards(self.shards)

    def shards_of(self, index: int, *, before_pass: int | None = None) -> list[Shard]:
        """List the shards of one range, oldest pass first."""
        found = shards.list_shards(self.shards, index=index).get(index, [])
        return [one for one in found if before_pass is None or one.pass_number < before_pass]

    def staged_rows(self) -> int:
        """How many rows are staged, an edited one as often as it was."""
        return sum(one.rows for some in self.list_shards().values() for one in some)

    def last_pass(self) -> int:
        """The number of the last pass that staged anything; 0 if none has."""
        return max((s.pass_number for some in self.list_shards().values() for s in some), default=0)

    def read_manifest(self) -> Manifest:
        """Read the manifest; raise StagingError if it is not there or can't be understood."""
        path = self.path / MANIFEST
        try:
            manifest = Manifest.from_json(trust.read_file(path))
            if manifest.run_id != self.run_id:
                raise ValueError(f"it is that of the run {manifest.run_id}")
            return manifest
        except (OSError, ValueError) as error:
            raise StagingError(
                f"the run {self.path} has no readable {MANIFEST} ({error}), so it can't be told "
                "what it did; restore the file, or move the directory away if you are sure that "
                "the run is of no use"
            ) from None

    def write_manifest(self, manifest: Manifest) -> None:
        """Write the manifest, also where the disk is full."""
        self.write_json(MANIFEST, manifest.to_json())

    def advance(self, attempt: str, **changes: Any) -> Manifest:
        """Note in the manifest how far the run has come, on behalf of an attempt.

        The manifest is read, changed and written under a lock. See `Manifest.changed`. Raises
        RunError if another attempt has taken the run over.
        """
        with self._manifest_locked():
            manifest = self.read_manifest()
            if manifest.attempt != attempt:
                raise RunError(
                    f"another process has taken over the run {self.run_id}; this one stops and "
                    "writes nothing more, and reembed status says what the store holds"
                )
            changed = manifest.changed(**changes)
            if changed != manifest:
                self.write_manifest(changed)
            return changed

    def take_over(self, found: Manifest, attempt: str) -> Manifest:
        """Have a new attempt take the place of the one that a manifest was found with.

        What is left of the former one fails at its next look, before it writes. The directories
        that a copy of the run has left out are there again. Raises RunError if the manifest is
        not as it was found.
        """
        with self._manifest_locked():
            if (manifest := self.read_manifest()) != found:
                raise RunError(f"another process has worked on the run {self.run_id}; run again")
            files.make_directory(self.backup)
            if not manifest.state.ended:
                files.make_directory(self.shards)
            changed = manifest.changed(attempt=attempt, stopped=None, stopped_code=None)
            self.write_manifest(changed)
            return changed

    def move_to(self, database: Path) -> None:
        """Note that a database that was moved here is the one that the run is about.

        Raises StagingError if a copy of it was the first to be noted.
        """
        with self._manifest_locked():
            manifest = self.read_manifest()
            if _is_others(manifest, database):
                place = staging_root(database) / self.run_id
                raise StagingError(_belongs_elsewhere(place, manifest, database))
            self.write_manifest(manifest.changed(database=str(database.resolve())))

    def stop(self, attempt: str, why: str, code: int | None) -> Manifest | None:
        """Note why an attempt stopped, and end it: what is left of it may write no more.

        Its word in the manifest becomes another one. None if another attempt has taken over.
        """
        with self._manifest_locked():
            manifest = self.read_manifest()
            if manifest.attempt != attempt:
                return None
            changed = manifest.changed(attempt=new_token(), stopped=why, stopped_code=code)
            self.write_manifest(changed)
            return changed

    def _missed(self, manifest: Manifest, names: Iterable[str]) -> list[str]:
        """Files that a backup of version 0.1.0, which kept no list, must have had besides `names`.

        Of each range that it has replaced, as far as it saved fewer rows than it re-embedded.
        """
        rows = sum(map(files.count_rows, files.tables(self.backup, BACKUP)))
        ended = manifest.state is not State.REPLACING
        if manifest.scope.mode != "all" or (ended and rows >= manifest.reembedded):
            return []
        known = {int(name.partition(".")[0]) for name in names}
        replaced = (keys for keys in manifest.ranges if keys.index in manifest.done and keys.rows)
        return [f"{k.index:07d}.0000.*{files.PARQUET}" for k in replaced if k.index not in known]

    @contextmanager
    def _manifest_locked(self) -> Iterator[None]:
        with files.failing_clearly(self.path):
            descriptor = trust.open_lock(self.path / _MANIFEST_LOCK)
        try:
            with files.failing_clearly(self.path):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def list_backup(self, manifest: Manifest, attempt: str) -> Manifest:
        """Note the files of the backup that are there and not yet noted.

        Version 0.1.0 noted none; else a process may have died before it noted its last one. A file
        that is lost is needless as long as no row of its range was written: these are saved again.
        """
        rows = {name: files.count_rows(self.backup / name) for name in self.unlisted(manifest)}
        late = manifest.listed_late or manifest.saved is None
        written = manifest.done | manifest.writing
        lost = self.lost_backup(manifest, checked=True)
        needless = {name for name in lost if int(name.partition(".")[0]) not in written}
        return self.advance(attempt, saved=rows, needless=needless, listed_late=late)

    def unlisted(self, manifest: Manifest) -> list[str]:
        """The files of the backup that are there and not noted in the manifest."""
        listed = manifest.saved or {}
        there = [path.name for path in files.tables(self.backup, BACKUP)]
        return [name for name in there if name not in listed]

    def lost_backup(self, manifest: Manifest, *, checked: bool = False) -> dict[str, int | None]:
        """The files of the backup that are missing, or not as they were written, and their rows.

        How many rows one had is None where version 0.1.0 did not note it. All are read, unless
        they are `checked`: `remove_damaged` has just looked.
        """
        listed: dict[str, int | None] = dict(manifest.saved or {})
        there = {path.name: path for path in files.tables(self.backup, BACKUP)}
        if manifest.saved is None or manifest.listed_late:
            with files.failing_clearly(self.backup):
                damaged = [path.stem for path in files.tables(self.backup, DAMAGED)]
            names = [*there, *(f"{stem}{files.PARQUET}" for stem in damaged)]
            names += self._missed(manifest, names)
            listed |= {name: None for name in names if name not in listed}
        return {
            name: rows
            for name, rows in sorted(listed.items())
            if name not in there or not (checked or files.is_sound(there[name]))
        }

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Write a JSON file. Safe to run twice: the last one stays."""
        text = json.dumps({**self.stamp, **values}, ensure_ascii=False) + "\n"
        self._spend_reserve(len(text))
        files.publish(self.path / name, text.encode())

    def write_lines(self, name: str, lines: Iterable[Mapping[str, Any]]) -> int:
        """Write values as lines of JSON; return how many. Safe to run twice.

        Without lines there is no file.
        """
        texts = [json.dumps(values, ensure_ascii=False) + "\n" for values in lines]
        if texts:
            self._spend_reserve(sum(map(len, texts)))
            files.publish(self.path / name, "".join(texts).encode())
        else:
            with files.failing_clearly(self.path):
                (self.path / name).unlink(missing_ok=True)
        return len(texts)

    def read_json(self, name: str) -> dict[str, Any]:
        """Read what `write_json` wrote."""
        with files.failing_clearly(self.path):
            return schema.decode_object(trust.read_file(self.path / name))

    def read_lines(self, name: str) -> list[dict[str, str]]:
        """Read what `write_lines` wrote; nothing if it was not written."""
        with files.failing_clearly(self.path):
            try:
                content = trust.read_file(self.path / name)
            except FileNotFoundError:
                return []
            # Not splitlines(): a key may hold what that takes for the end of a line.
            return [schema.decode_line(line) for line in content.split(b"\n") if line]

    def read_skipped(self, manifest: Manifest) -> list[dict[str, str]]:
        """Read the rows that were skipped; raise StagingError if the list of them is lost."""
        rows = self.read_lines(SKIPPED)
        if not rows and manifest.outcome.get("skipped"):
            raise StagingError(
                f"{self.path / SKIPPED} is gone, which names the {manifest.outcome['skipped']:,} "
                "rows that the run skipped; put it back from a copy, or run without "
                "--retry-skipped"
            )
        return rows

    @property
    def stamp(self) -> dict[str, Any]:
        """What every JSON of a run carries."""
        return {"schema_version": schema.SCHEMA_VERSION, "run_id": self.run_id}

    def make(self, manifest: Manifest, *, like: Path | None = None) -> None:
        """Make the directory with its manifest, all of it or nothing.

        As root makes it, it gets the owner of `like`.
        """
        made = RunDirectory(self.path.with_name(f".{self.path.name}.made"))
        for path in (made.path, made.shards, made.backup):
            files.make_directory(path, like=like, new=True)
        with files.failing_clearly(self.path):
            os.close(trust.open_lock(made.path / _MANIFEST_LOCK))
        made.write_json(MANIFEST, manifest.to_json())
        with files.failing_clearly(self.path):
            made.path.replace(self.path)
            files.sync_directory(self.path.parent)
        self.set_reserve()

    def set_reserve(self) -> None:
        """Set room aside for what is written last; remove what an earlier attempt left half done.

        Raises StagingError if there is no room, or if a directory is in the place of a file.
        """
        with files.failing_clearly(self.path):
            trust.check_no_directories(self.path, OF_A_RUN.gives)
        files.remove_temporaries(self.path, OF_A_RUN)
        files.publish(self.path / _RESERVE, bytes(_RESERVE_BYTES))

    def remove_damaged(self, *, marked: bool = True) -> tuple[list[str], list[str]]:
        """Take away the shards and the files of the backup that are not as they were written.

        Returns their names. The rows of the shards are staged again. Those of the backup can't
        be had again, unless from a copy; its files are kept under another name. With `marked`, a
        file that does not say whose it is is another run's.
        """
        damaged, lost = (
            [path for path in paths if not files.is_sound(path, marked=marked)]
            for paths in (files.tables(self.shards, SHARD), files.tables(self.backup, BACKUP))
        )
        with files.failing_clearly(self.path):
            for path in damaged:
                path.unlink()
            for path in lost:
                path.rename(path.with_suffix(_DAMAGED))
        return [path.name for path in damaged], [path.name for path in lost]

    def remove_shards(self) -> None:
        """Delete the shards: their vectors are in the store, or not wanted any more."""
        files.remove_own(self.shards, SHARDS)
        with suppress(OSError):
            (self.path / _RESERVE).unlink(missing_ok=True)

    def _spend_reserve(self, size: int) -> None:
        reserve = self.path / _RESERVE
        with suppress(OSError):
            # Given back only where it is needed: most often there is room.
            if shutil.disk_usage(self.path).free < size + _RESERVE_BYTES:
                reserve.unlink(missing_ok=True)


def staging_root(database: Path) -> Path:
    """Where the runs on a database are kept or, if elsewhere, linked: beside the real file."""
    real = database.resolve()
    return real.with_name(real.name + _ROOT_SUFFIX)


def new_run(parent: Path) -> RunDirectory:
    """Choose the directory of a new run; nothing is made yet."""
    now = datetime.now(UTC)
    # Runs of the same second must sort as they were begun: the newest is the one to undo.
    fraction = now.microsecond * 65_536 // 1_000_000
    return RunDirectory(parent.absolute() / f"{now:%Y%m%dT%H%M%SZ}-{fraction:04x}")


def new_token(size: int = 4) -> str:
    """A random name, of `size` bytes in hexadecimal digits."""
    return secrets.token_hex(size)


def run_parent(run_dir: Path, database: Path) -> Path:
    """The directory for new runs that --run-dir names, without links.

    Raises UsageError for a place in the runs of another database or in a run, where cleanup would
    take them for what they are not, and for one in which others can exchange them.
    """
    path = _place(run_dir, database)
    with files.failing_clearly(path):
        trust.check_parent(path, "--run-dir", trust.owners_beside(database))
    return path


def find_runs(database: Path, run_dir: Path | None = None) -> list[tuple[RunDirectory, Manifest]]:
    """The runs on a database with their manifests, in the order in which they began to replace.

    They lie beside the database, or wherever a link there leads, or in `run_dir`. Raises
    StagingError for a run that can't be read or trusted, that is another database's or that lies
    in two places, and UsageError for a `run_dir` that lies in a run or in the runs of another
    database.
    """
    root = staging_root(database)
    owners = trust.owners_beside(database)
    _check_root(root, owners)
    found: dict[str, tuple[RunDirectory, Manifest]] = {}
    for run, manifest in _runs_beside(database, owners):
        found[run.run_id] = run, manifest
    elsewhere = _place(run_dir, database) if run_dir is not None else root
    for place in _named_runs(elsewhere) if elsewhere != root else ():
        run = RunDirectory(place)
        if run.run_id in found:
            _require_same(root / run.run_id, found[run.run_id][0], run)
            continue
        manifest = _read_trusted(run, owners)
        if manifest.database != str(database.resolve()):
            raise StagingError(
                f"{run_dir} holds runs on another database, {manifest.database}; name another "
                "directory with --run-dir"
            )
        found[run.run_id] = run, manifest
    return sorted(found.values(), key=lambda pair: pair[1].age)


def _runs_beside(database: Path, owners: frozenset[int]) -> Iterator[tuple[RunDirectory, Manifest]]:
    """The runs beside a database, or where a link there leads; raise StagingError as above."""
    for place in _named_runs(staging_root(database)):
        try:
            run = RunDirectory(_followed(place) if place.is_symlink() else place)
            manifest = _read_trusted(run, owners)
        except (OSError, StagingError):
            if os.path.lexists(place):  # Else another command has just deleted it.
                raise
            continue
        if _is_others(manifest, database):
            raise StagingError(_belongs_elsewhere(place, manifest, database))
        yield run, manifest


def _settle(database: Path) -> None:
    """Note where a database is now in the runs that it had where it was before, and has still.

    Else a file that is put in its former place would own them, and so would another copy of it
    whose links lead to the same runs: what one of the two deletes is the other's way back.
    """
    for run, manifest in _runs_beside(database, trust.owners_beside(database)):
        # Of a run that this user can't write, nothing can be deleted either.
        if _is_gone(manifest.database) and os.access(run.path, os.W_OK):
            run.move_to(database)


def _require_same(known: Path, run: RunDirectory, other: RunDirectory) -> None:
    """Raise StagingError for two directories that claim to be one run: one must be a copy."""
    with files.failing_clearly(other.path):
        if not run.path.samefile(other.path):
            way = f"remove the link {known}" if known.is_symlink() else f"move {known} away"
            raise StagingError(
                f"the run {run.run_id} lies in two places, {run.path} and {other.path}, of which "
                "one must be a copy, so it can't be told which of them says what was done; name "
                f"another directory with --run-dir (or none), or, if {other.path} is the one to "
                f"use, {way}"
            )


def _place(run_dir: Path, database: Path) -> Path:
    """A --run-dir, without links; raise UsageError for one where runs may not lie."""
    path = Path(os.path.realpath(run_dir))
    root = staging_root(database)
    for one in (path, *path.parents):
        if one.suffix == _ROOT_SUFFIX and one != root and one.with_suffix("").is_file():
            raise UsageError(
                f"{path} is where the runs on another database are kept, {one.with_suffix('')}; "
                "name another directory with --run-dir"
            )
        if RUN.fullmatch(one.name) or HALF_MADE.fullmatch(one.name):
            raise UsageError(
                f"{path} is a run or lies in one, {one}, and would be deleted with it; name "
                "another directory with --run-dir"
            )
    return path


def _followed(link: Path) -> Path:
    """The directory that a link to a run leads to.

    Raises StagingError for a link that reembed did not make, or that leads nowhere.
    """
    target = link.readlink()
    if target.name != link.name:
        raise StagingError(
            f"{link} is a symbolic link to {target}, and not one that reembed made, which leads "
            f"to a directory named {link.name}; remove it, and run again"
        )
    if not link.exists():
        raise StagingError(
            f"the run {link.name} lies at {target}, which isn't there; mount it, or remove the "
            f"link {link} if it is gone for good; if it was moved, remove the link and name the "
            "directory that it is in now with --run-dir"
        )
    return Path(os.path.realpath(link))


def _read_trusted(run: RunDirectory, owners: frozenset[int]) -> Manifest:
    """Read the manifest of a run; raise StagingError if the run can't be trusted."""
    with files.failing_clearly(run.path):
        trust.check_directory(run.path, owners)
        for path in (run.shards, run.backup):
            with suppress(FileNotFoundError):
                trust.check_directory(path, owners)
        with suppress(FileNotFoundError), trust.open_file(run.path / MANIFEST):
            pass
    return run.read_manifest()


def _is_gone(database: str) -> bool:
    """Whether there is no such database; not where that can't be told, for lack of a right."""
    try:
        Path(database).stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return True
    except OSError:
        return False
    return False


def _is_others(manifest: Manifest, database: Path) -> bool:
    """Whether a run is another database's; where that is gone, this is it, moved."""
    try:
        return not Path(manifest.database).samefile(database)
    except (OSError, ValueError):
        return False


def _belongs_elsewhere(place: Path, manifest: Manifest, database: Path) -> str:
    """Say that a run is another database's: a copy and a moved file can't be told apart."""
    real = database.resolve()
    value = json.dumps(str(real), ensure_ascii=False)
    moved = f'set "database" to {value} in {place / MANIFEST}'
    if place.is_symlink():
        return (
            f"the run {place.name} belongs to {manifest.database}, of which {real} is a copy; "
            f"remove the link {place}, which leads to it; if {real} is the file that the run "
            f"replaced vectors in, and the other one the copy, {moved} instead"
        )
    return (
        f"the run {place.name} belongs to {manifest.database}, which is another file than {real}, "
        f"so neither can use it here; move {place} elsewhere; if {real} is the file that the run "
        f"replaced vectors in, moved here, {moved} instead"
    )


def make_run(run: RunDirectory, database: Path, manifest: Manifest) -> None:
    """Make a run's directory, and the link to it where it does not lie beside the database."""
    parent = run.path.parent
    files.make_directory(parent, like=database)
    if parent != staging_root(database):  # Others may have made it since it was looked at.
        run_parent(parent, database)
    run.make(manifest, like=database)
    link_run(run, database)


def link_run(run: RunDirectory, database: Path) -> None:
    """Make the link to a run that does not lie beside the database. Safe to run twice."""
    root = staging_root(database)
    _check_root(root, trust.owners_beside(database))
    with files.failing_clearly(root):
        if not os.path.lexists(root / run.run_id):
            (root / run.run_id).symlink_to(run.path)
            owner = root.stat()
            if os.geteuid() == 0:
                os.lchown(root / run.run_id, owner.st_uid, owner.st_gid)
            files.sync_directory(root)


def remove_run(run: RunDirectory, database: Path) -> None:
    """Delete a run, and the link to it: first, since one that leads nowhere stops every command.

    Raises StagingError, and leaves the link, if the run can't be deleted.
    """
    link = staging_root(database) / run.run_id
    linked = link.is_symlink()
    files.check_removable(run.path, OF_A_RUN)
    with files.failing_clearly(link):
        if linked:
            link.unlink()
    try:
        files.remove_tree(run.path, OF_A_RUN)
    except StagingError:
        if linked and run.exists:
            link_run(run, database)
        raise


def discard_run_if_empty(run: RunDirectory, database: Path) -> None:
    """Delete a run that has come to nothing: no write to the store, and no shard."""
    if not run.exists:
        return
    with suppress(StagingError):
        staging = run.read_manifest().state is State.STAGING
        if staging and not run.list_shards() and not files.tables(run.backup, BACKUP):
            remove_run(run, database)


@contextmanager
def lock_database(database: Path) -> Iterator[None]:
    """Hold the lock that keeps other runs off a database; it dies with the process.

    Where there is no run when it ends, nothing is left. If the database was moved, its runs are
    told. Raises StagingError if another process holds it, with its id and when it began, and as
    `find_runs` does.
    """
    root = staging_root(database)
    with files.failing_clearly(root):
        if not os.path.lexists(root):
            files.make_directory(root, like=database)
        _check_root(root, trust.owners_beside(database))
        descriptor = trust.open_lock(root / LOCK)
    try:
        _lock(descriptor, root)
        try:
            for place in root.iterdir():
                if HALF_MADE.fullmatch(place.name):
                    files.remove_own(place, OF_A_RUN)
            _settle(database)
            yield
        finally:
            _remove_if_empty(root)
    finally:
        os.close(descriptor)


def lock_holder(database: Path) -> str | None:
    """The process that is at work on a database, and since when; None if there is none.

    Raises StagingError if the lock can't be trusted.
    """
    root = staging_root(database)
    _check_root(root, trust.owners_beside(database))
    try:
        descriptor = os.open(root / LOCK, os.O_RDONLY | trust.SAFELY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except OSError:
        return _holder(descriptor)
    finally:
        os.close(descriptor)


def _check_root(root: Path, owners: frozenset[int]) -> None:
    """Raise StagingError if what lies beside a database is there and can't be trusted."""
    with files.failing_clearly(root), suppress(FileNotFoundError):
        trust.check_root(root, owners)
        trust.check_lock(root / LOCK)


def _holder(descriptor: int) -> str:
    process, _, since = os.pread(descriptor, 100, 0).decode(errors="replace").strip().partition(" ")
    return f"process {process}, since {since}" if since else "a process that has just begun"


def _named_runs(parent: Path) -> list[Path]:
    with files.failing_clearly(parent):
        if not parent.is_dir():
            return []  # Or it is a file, which is told where a run is to be made.
        return sorted(place for place in parent.iterdir() if RUN.fullmatch(place.name))


def _lock(descriptor: int, root: Path) -> None:
    ends = time.monotonic() + _LOCK_SECONDS
    while not (locked := _try_lock(descriptor)) and time.monotonic() < ends:
        time.sleep(0.02)
    if not locked or not _holds(descriptor, root):
        raise StagingError(
            f"another run is at work on {root.with_suffix('')} ({_holder(descriptor)}); "
            "wait for it to end"
        )
    holder = f"{os.getpid()} {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC\n"
    with files.failing_clearly(root):
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, holder.encode(), 0)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _holds(descriptor: int, root: Path) -> bool:
    """Whether the file that is open is still the one that others would open."""
    try:
        return os.path.samestat(os.fstat(descriptor), (root / LOCK).lstat())
    except OSError:
        return False


def _remove_if_empty(root: Path) -> None:
    with suppress(OSError):
        if [place.name for place in root.iterdir()] == [LOCK]:
            (root / LOCK).unlink()
            root.rmdir()
