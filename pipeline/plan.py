"""What would be done: counted, cut into ranges and estimated, without Beam and without a write."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from reembed.pipeline.options import LOCAL_RUNNERS, Options
from reembed.pipeline.outside import Outside, find_moved, is_part, look_outside, other_columns
from reembed.pipeline.paths import expanded, require_utf8, working_directory
from reembed.pipeline.resume import (
    Earlier,
    choose_rules,
    find_earlier,
    find_scope,
    former_target,
    fresh_runs,
    list_runs,
)
from reembed.pipeline.settings import Settings, check_is_store
from reembed.pipeline.store_options import store_config
from reembed.pipeline.words import nearest
from reembed.transforms.embedders import Access, Target
from reembed.transforms.embedders.devices import check_device
from reembed.transforms.embedders.endpoint import EGRESS, check_endpoint
from reembed.transforms.embedders.families import (
    DIMENSIONS,
    WINDOWS,
    ServedModel,
    document_prefix,
    fold_name,
)
from reembed.transforms.embedders.hub import fetch_model
from reembed.transforms.embedders.models import (
    TokenCounter,
    absolute_source,
    canonical_name,
    describe_model,
    estimate_tokens,
    find_model,
)
from reembed.transforms.embedders.target import MOST_IN_FLIGHT
from reembed.transforms.errors import EmbedderError, UsageError
from reembed.transforms.modes import Mode
from reembed.transforms.replacing import MOST_ROWS_AT_ONCE, ReplaceJob
from reembed.transforms.rows import KeyRange
from reembed.transforms.staging import (
    Rules,
    RunDirectory,
    Scope,
    State,
    new_run,
    new_token,
    run_parent,
    staging_root,
)
from reembed.transforms.stores import Copy, Store, Survey, check_update, choose_store, take_survey

RANGE_ROWS = 2_048
"""Rows of a range for a local model, which are sorted by length before they are embedded in parts.

Of fewer, too few are alike to fill a batch: of 512 it takes a twentieth more time, of 64 a quarter.
"""

PART_ROWS = 256
"""Rows that a local model embeds, and that are staged and counted, as one."""

SERVER_RANGE_ROWS = 512

LEAST_RANGE_ROWS = 16
SPREAD_RANGES = 64
"""On a cluster a table is cut into as many ranges, unless they are then too small or too large."""

SAMPLED_ROWS = 256


@dataclass(frozen=True)
class TokenEstimate:
    """Tokens that will be embedded, and texts longer than the model's window, from a sample."""

    tokens: int
    texts_cut: int
    sampled_rows: int
    window: int | None


@dataclass(frozen=True)
class Plan:
    """One run on one store: what is there, what it becomes, in which ranges, staged where.

    It never changes; what differs from pass to pass is a `Pass`.

    `earlier` is the run that goes on, of which `staged_rows` are there; None for a new one.
    `others` are unfinished runs that are not about the same rows, and `former` says how the
    target differs from that of the last run. `sample_pairs` are keys with the beginnings of their
    texts, where these are joined; `warnings` say which columns may be the wrong ones. For a run
    that is about a part of the store, `outside` says what the whole holds now. `copies`
    are other columns of the file with vectors as long as the stored ones.
    """

    store: Store
    survey: Survey
    target: Target
    backend: str
    batch: int
    run: RunDirectory
    scope: Scope
    ranges: tuple[KeyRange, ...]
    tokens: TokenEstimate | None
    attempt: str
    settings: Settings
    price: float | None = None
    earlier: Earlier | None = None
    staged_rows: int = 0
    others: tuple[RunDirectory, ...] = ()
    former: tuple[str, ...] = ()
    outside: Outside | None = None
    copies: tuple[Copy, ...] = ()
    discarded: tuple[RunDirectory, ...] = ()
    sample_pairs: tuple[tuple[str, str], ...] = ()
    warnings: tuple[str, ...] = ()
    rules: Rules = field(default_factory=Rules)
    pause: float = 0.0
    workdir: str | None = None
    most_rows: int | None = None
    partial: bool = False
    retry_skipped: bool = False

    @property
    def begun(self) -> bool:
        """Whether the run that goes on has begun to replace."""
        return self.earlier is not None and self.earlier.manifest.state is State.REPLACING

    @property
    def values(self) -> dict[str, Any]:
        """The plan as `--dry-run --json` prints it."""
        from reembed.pipeline.report import plan_values

        return plan_values(self)

    @property
    def job(self) -> ReplaceJob:
        """The replacement."""
        return ReplaceJob(
            store=self.store,
            run=self.run,
            ranges=self.ranges,
            target=self.target,
            rules=self.rules,
            attempt=self.attempt,
            vector_bytes=self.survey.vector_bytes,
        )

    @property
    def readers_out(self) -> int | None:
        """About how many seconds readers are kept out; None if they will hardly notice."""
        rows = self.survey.to_embed
        if rows > MOST_ROWS_AT_ONCE and not self.rules.one_transaction:
            return None
        lockout = self.store.lockout(rows, self.target.dimension)
        return lockout and math.ceil(lockout.seconds)

    @property
    def requests(self) -> int:
        """About how many requests the whole store takes of a server."""
        return sum(math.ceil(keys.rows / self.batch) for keys in self.ranges)

    @property
    def work(self) -> str | None:
        """The run's place in the work directory of workers that don't reach the database."""
        return self.work_of(self.run)

    def work_of(self, run: RunDirectory) -> str | None:
        """The place of any run there."""
        return f"{self.workdir.rstrip('/')}/{run.run_id}" if self.workdir else None

    @property
    def part_rows(self) -> int:
        """The most rows that are embedded, staged and counted as one: for a server, a request's.

        A local model cuts batches of its own from them, by their tokens.
        """
        return self.batch if self.target.access else max(PART_ROWS, self.batch)

    @property
    def call_rows(self) -> int:
        """The most rows in one call of the embedder: what was asked for, if between two pauses."""
        return self.batch if self.pause else self.part_rows

    @property
    def mode(self) -> Mode:
        """Which rows are meant."""
        return self.store.selection.mode


def make_plan(database: Path, settings: Settings, options: Options) -> Plan:
    """Look at the store, at the model's files and at earlier runs.

    Changes nothing, and sends no row's text anywhere. Raises StoreError for a database that
    is no store, EmbedderError for a model that can't be had, IncompleteError for a replacement
    that was begun and must first be finished or undone.
    """
    store = choose_store(database, options.namespace, store_config(options))
    if store.kind == "ai-memory":
        check_is_store(settings, database, working_directory())
    target, counter = _find_target(settings, options)
    runs = list_runs(store.path, options.run_dir)
    scope = find_scope(runs, namespace=options.namespace, mode=options.mode, store=store.config)
    _check_store(store, options, Mode(scope.mode))
    earlier = find_earlier(runs, scope, target, fresh=options.fresh)
    discarded = fresh_runs(runs, scope) if options.fresh else []
    keys = None if scope.keys is None else frozenset(scope.keys)
    store = store.select(
        Mode(scope.mode), model=target.model, dimension=target.dimension, keys=keys
    )
    survey = take_survey(store)
    if earlier is None:
        _check_namespace(store, survey)
    if earlier is None or earlier.manifest.state is State.STAGING:
        store.check_namespace()
    store.check_skipped(sum(survey.by_rule.values()), target.dimension)
    rows = _range_rows(target, settings, options, survey)
    ranges, sampled = store.cut_ranges(rows, SAMPLED_ROWS)
    texts = store.read_texts(sampled)
    estimate = estimate_tokens(counter, texts, rows=survey.to_embed)
    if earlier:
        ranges = earlier.manifest.ranges
    elif not survey.meant:
        ranges = ()  # So that no run is made that does nothing.
    elif keys is not None and store.ordered_by_key:
        ranges = holding(ranges, keys)
    if earlier is None or earlier.manifest.state is not State.REPLACING:
        tried = ranges if survey.to_embed else ()
        notes = check_update(store, tried, model=target.model, dimension=target.dimension)
        store = replace(store, trigger_notes=notes)
    outside = None
    if ranges and is_part(store, scope):
        moved = find_moved(runs, scope, target)
        outside = look_outside(store, target, moved, left=survey.meant_with_vector)
    parent = staging_root(store.path)
    if options.run_dir:
        parent = run_parent(expanded(options.run_dir), store.path)
    ours = [earlier.run] if earlier else discarded
    return Plan(
        store=store,
        survey=survey,
        target=target,
        backend=settings.backend,
        batch=settings.batch,
        run=earlier.run if earlier else new_run(parent),
        scope=scope,
        ranges=ranges,
        tokens=TokenEstimate(*estimate, len(texts), counter.window) if estimate else None,
        attempt=new_token(),
        settings=settings,
        price=options.price_per_million,
        earlier=earlier,
        staged_rows=min(earlier.run.staged_rows(), survey.meant) if earlier else 0,
        others=tuple(run for run, m in runs if not m.state.ended and run not in ours),
        former=tuple(target.differences(former)) if (former := former_target(runs, scope)) else (),
        outside=outside,
        copies=other_columns(store, survey, target, runs, store.selection.mode) if ranges else (),
        discarded=tuple(discarded),
        sample_pairs=store.sample_pairs(sampled),
        warnings=(*store.notes, *store.text_warnings(sampled)),
        rules=choose_rules(
            earlier,
            max_skipped=0.0 if store.whole else options.max_skipped,
            skipped=options.skipped,
            one_transaction=options.one_transaction or store.whole,
        ),
        pause=options.sleep_ms / 1000,
        workdir=options.workdir and _work_directory(options.workdir, settings),
        most_rows=options.max_rows,
        partial=options.partial,
        retry_skipped=options.retry_skipped,
    )


def _check_store(store: Store, options: Options, mode: Mode) -> None:
    """Raise UsageError for what is asked of a store and can't be done there."""
    if options.skipped == "clear" and store.not_clearable:
        raise UsageError(f"--skipped clear can't be done in {store.path}: {store.not_clearable}")
    if store.whole and (mode is not Mode.ALL or options.partial):
        raise UsageError(
            f"{store.described} are moved as wholes, so only --namespace chooses some of "
            f"{store.path}; leave out what chooses rows"
        )


def _check_namespace(store: Store, survey: Survey) -> None:
    """Raise UsageError for a namespace that isn't there; ai-memory's own command takes any."""
    name = store.namespace
    if name is None or survey.rows or name in survey.existing or store.kind == "ai-memory":
        return
    raise UsageError(
        f"{store.path} has no {store.namespace_word} {name!r} ({nearest(name, survey.existing)}); "
        "correct --namespace"
    )


def _find_target(settings: Settings, options: Options) -> tuple[Target, TokenCounter]:
    return _local_target(settings, options) if settings.local else _served_target(settings, options)


def _local_target(settings: Settings, options: Options) -> tuple[Target, TokenCounter]:
    device = options.device and check_device(options.device)
    source = absolute_source(settings.model)
    require_utf8(source, "the path of the model")
    model = canonical_name(source)
    files = describe_model(source)
    dimension = files.dimension or _measured(source)
    if settings.dimension not in (None, dimension):
        raise EmbedderError(
            f"{model} makes vectors of {dimension} numbers, but {settings.dimension} were asked "
            "for; correct --dim or the configured dimension, or choose another model"
        )
    prompt = files.prompt if options.document_prefix is None else options.document_prefix
    target = Target(
        "local",
        model,
        dimension,
        source,
        prompt,
        files.window,
        files.normalized,
        device=device,
        precision=options.precision,
    )
    return target, files


def _served_target(settings: Settings, options: Options) -> tuple[Target, TokenCounter]:
    """The target behind a server, which is asked only if its dimension is not known.

    Raises EmbedderError if texts or the key may not be sent there.
    """
    if options.device is not None or options.precision != "float32":
        raise UsageError("--device and --precision are for a model on this machine; leave them out")
    name = fold_name(settings.model)
    known = DIMENSIONS.get(name)
    access = Access(
        url=settings.server,
        key_variable=settings.key_variable,
        key_file=settings.key_file,
        key_secret=settings.key_secret,
        insecure_key=options.insecure_key,
        egress=settings.egress,
        most_in_flight=options.in_flight or MOST_IN_FLIGHT,
        give_up_after=options.give_up_after,
        timeout=options.timeout,
        most_tokens=options.max_tokens,
        asks_dimension=settings.dimension not in (None, known) and settings.backend != "ollama",
    )
    check_endpoint(access)
    prefix = options.document_prefix
    target = Target(
        settings.backend,
        settings.model,
        settings.dimension or known or 0,
        prompt=document_prefix(settings.model) if prefix is None else prefix,
        window=WINDOWS.get(name),
        access=access,
    )
    if not target.dimension:
        from reembed.transforms.embedders.http import HttpEmbedder

        target = replace(target, dimension=HttpEmbedder(target).measured)
    return target, ServedModel(target.window, target.prompt)


def holding(ranges: Sequence[KeyRange], keys: Collection[str]) -> tuple[KeyRange, ...]:
    """The ranges that hold any of these keys, numbered anew; at least one if there are any keys.

    >>> ranges = [KeyRange(0, None, "b"), KeyRange(1, "b", "d"), KeyRange(2, "d", None)]
    >>> [(keys.after, keys.until) for keys in holding(ranges, ["a", "z"])]
    [(None, 'b'), ('d', None)]
    """
    ends = [keys.until.encode() for keys in ranges if keys.until is not None]
    # A row whose id is not text is in the first range if that is NULL, else in any.
    odd = any(key.startswith("rowid ") for key in keys)
    wanted = {bisect_left(ends, key.encode()) for key in keys}
    found = [keys for at, keys in enumerate(ranges) if odd or at in wanted]
    return tuple(replace(keys, index=index) for index, keys in enumerate(found))


def _range_rows(target: Target, settings: Settings, options: Options, survey: Survey) -> int:
    if target.access is not None:
        return whole_batches(settings.batch)
    if options.runner in LOCAL_RUNNERS:
        return RANGE_ROWS
    # So that a store of a few hundred rows has something for each of some workers.
    return min(RANGE_ROWS, max(LEAST_RANGE_ROWS, survey.rows // SPREAD_RANGES))


def _work_directory(place: str, settings: Settings) -> str:
    """A work directory as Beam's file systems name it: theirs, or a path of this machine.

    Raises UsageError if texts may not be copied there.
    """
    if "://" in place and not place.startswith("file://"):
        if settings.egress != EGRESS[0]:
            raise UsageError(
                f"AI_MEMORY_INFERENCE_EGRESS is {settings.egress}, so no text may be copied to "
                f"{place}; nothing was copied: name a path of this machine, or change the setting"
            )
        return place
    return str(working_directory() / expanded(place.removeprefix("file://")))


def whole_batches(batch: int) -> int:
    """The rows of a range for a server: as many whole batches as 512 rows hold, at least one.

    >>> whole_batches(100), whole_batches(1000)
    (500, 512)
    """
    batch = min(batch, SERVER_RANGE_ROWS)
    return SERVER_RANGE_ROWS // batch * batch


def _measured(model: str) -> int:
    """The dimension of a model whose files don't say it: it has to be loaded."""
    from reembed.transforms.embedders.loading import load_model

    dimension = load_model(find_model(model) or fetch_model(model)).get_embedding_dimension()
    if dimension is None:
        raise EmbedderError(f"{model} does not say how long its vectors are; choose another model")
    return dimension
