"""What would be done: counted, cut into ranges and estimated, without Beam and without a write."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from pipeline.settings import Settings
from transforms.embedders import Target
from transforms.embedders.hub import fetch_model
from transforms.embedders.models import (
    absolute_source,
    canonical_name,
    describe_model,
    estimate_tokens,
    find_model,
)
from transforms.errors import EmbedderError
from transforms.rows import KeyRange
from transforms.staging import RunDirectory, plan_run
from transforms.stores import AiMemoryStore, Survey, open_store, take_survey

MOST_RANGE_ROWS = 512
LEAST_RANGE_ROWS = 64
WANTED_RANGES = 64
"""A small store is cut into about so many ranges, so that progress is seen."""

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

    `pending` are the ranges of which rows are still to be embedded: all of them in the first
    pass. In the `last` pass the replacement goes ahead whatever has changed meanwhile; once it
    is `replaced`, further passes write only the ranges of which rows had changed.
    """

    store: AiMemoryStore
    survey: Survey
    target: Target
    backend: str
    batch: int
    run: RunDirectory
    ranges: tuple[KeyRange, ...]
    pending: tuple[KeyRange, ...]
    tokens: TokenEstimate | None
    pass_number: int = 1
    last: bool = False
    replaced: bool = False


def make_plan(database: Path, settings: Settings, *, namespace: str | None) -> Plan:
    """Look at the store and at the model's files.

    Changes nothing, and sends no row's text anywhere. Raises StoreError for a database that
    is no store, EmbedderError for a model that can't be had.
    """
    store = open_store(database, namespace)
    settings.require_local()
    source = absolute_source(settings.model)
    model = canonical_name(source)
    files = describe_model(source)
    dimension = files.dimension or _measured(source)
    if settings.dimension not in (None, dimension):
        raise EmbedderError(
            f"{model} makes vectors of {dimension} numbers, but {settings.dimension} were asked "
            "for; correct --dim or the configured dimension, or choose another model"
        )
    survey = take_survey(store)
    ranges, sampled = store.cut_ranges(range_rows(survey.rows), SAMPLED_ROWS)
    texts = store.read_texts(sampled)
    estimate = estimate_tokens(files, texts, rows=survey.to_embed)
    return Plan(
        store=store,
        survey=survey,
        target=Target("local", model, dimension, source),
        backend=settings.backend,
        batch=settings.batch,
        run=plan_run(store.path),
        ranges=ranges,
        pending=ranges,
        tokens=TokenEstimate(*estimate, len(texts), files.window) if estimate else None,
    )


def range_rows(rows: int) -> int:
    """Choose how many rows a range has: 64 to 512, by the size of the store.

    >>> range_rows(200), range_rows(10_000), range_rows(1_000_000)
    (64, 157, 512)
    """
    return min(MOST_RANGE_ROWS, max(LEAST_RANGE_ROWS, math.ceil(rows / WANTED_RANGES)))


def _measured(model: str) -> int:
    """The dimension of a model whose files don't say it: it has to be loaded."""
    from transforms.embedders.local import load_model

    dimension = load_model(find_model(model) or fetch_model(model)).get_embedding_dimension()
    if dimension is None:
        raise EmbedderError(f"{model} does not say how long its vectors are; choose another model")
    return dimension
