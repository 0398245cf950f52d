"""Embedders: what turns texts into vectors. One method to implement; all HTTP is in here."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations

import numpy as np

from reembed.transforms.embedders.base import (
    PROBE_TEXTS,
    TOGETHER,
    WITNESS_COSINE,
    Batch,
    Embedder,
    cosines,
    have_direction,
    same_vectors,
)
from reembed.transforms.embedders.target import SAME_COSINE, Access, Target
from reembed.transforms.errors import EmbedderError, RunError, TextRejected
from reembed.transforms.interpreter import undisturbed
from reembed.transforms.rows import Vectors

__all__ = [
    "PROBE_TEXTS",
    "SAME_COSINE",
    "WITNESS_COSINE",
    "Access",
    "Batch",
    "Embedder",
    "Target",
    "cosines",
    "embed_each",
    "embed_together",
    "have_direction",
    "load_embedder",
    "probe_embedder",
    "require_same",
    "same_vectors",
]


def probe_embedder(embedder: Embedder, dimension: int) -> Vectors:
    """Embed the probe texts, one by one; shape (texts, dimension), zeros for one not taken.

    Raises EmbedderError if two texts have the same vector, or if a text has another one where it
    is asked for together with others: then rows would get each other's vectors.
    """
    alone = np.vstack([embed_each(embedder, [text], dimension) for text in PROBE_TEXTS])
    taken = [at for at, vector in enumerate(alone) if vector.any()]
    if dimension > 1:  # One number says no more than plus or minus.
        for one, other in combinations(taken, 2):
            if _alike(alone[one], alone[other]):
                raise EmbedderError(
                    "the embedder gives the same vector for different texts, so its vectors say "
                    "nothing; see that the model is loaded as it should be, or choose another"
                )
    places = [at for at in TOGETHER if at in taken]
    together = embed_together(embedder, [PROBE_TEXTS[at] for at in places])
    if not all(map(_alike, together, alone[places])):
        raise EmbedderError(
            "the embedder gives other vectors for texts that are asked for together than for each "
            "alone, or in another order, so rows would get each other's vectors; see to the "
            "server, or choose another"
        )
    return alone


def embed_together(embedder: Embedder, texts: Sequence[str]) -> Vectors:
    """Embed texts in one call, or as many of the first ones as it takes; shape (taken, dimension).

    An embedder that refuses even two is never given two again.
    """
    texts = texts[: embedder.fitting(texts)]
    while len(texts) > 1:
        try:
            return embedder.embed(texts)
        except TextRejected as error:
            most = min(error.most or len(texts) // 2, len(texts) - 1)
            texts = texts[: max(1, most)]
            if most < 2:
                embedder.learn_limit(1)
    return np.empty((0, 0), np.float32)


def _alike(one: Vectors, other: Vectors) -> bool:
    return same_vectors(one[None], other[None], least=WITNESS_COSINE)


def embed_each(embedder: Embedder, texts: Sequence[str], dimension: int) -> Vectors:
    """Embed texts for a comparison; zeros stand for one that the model will not take."""
    at_once = embedder.fitting(texts)
    if at_once < len(texts):
        parts = texts[:at_once], texts[at_once:]
        return np.vstack([embed_each(embedder, part, dimension) for part in parts])
    try:
        return embedder.embed(texts)
    except TextRejected:
        if len(texts) == 1:
            return np.zeros((1, dimension), np.float32)
    return np.vstack([embed_each(embedder, [text], dimension) for text in texts])


def require_same(target: Target, probe: Sequence[Sequence[float]]) -> None:
    """Raise RunError if the target's embedder gives other vectors for the probe texts now.

    A model here stays what it was when it was loaded; a server may be given another one at any
    time, perhaps of the same name and length.
    """
    known = np.array(probe, dtype=np.float32)
    now = probe_embedder(load_embedder(target), target.dimension)
    if not same_vectors(known, now, least=target.noise):
        raise RunError(
            f"{target} gives other vectors for the same texts now than when the run began, so what "
            "is staged may be of two models, and it is not put into the store; bring the former "
            "model back and start over with --fresh"
        )


def load_embedder(target: Target) -> Embedder:
    """Build the target's embedder, once in a process, and probe it.

    Raises EmbedderError if it can't be built or is not what the target says.
    """
    with _loading:
        embedder = _load(target)
        if not embedder.usable:
            _load.cache_clear()
            embedder = _load(target)
        return embedder


_loading = threading.Lock()


@lru_cache(maxsize=1)
def _load(target: Target) -> Embedder:
    embedder = _build(target)
    try:
        probe = embedder.embed(PROBE_TEXTS[:1])
    except TextRejected as error:
        raise EmbedderError(f"{target} can't embed even a short probe text: {error}") from error
    if probe.shape != (1, target.dimension):
        raise EmbedderError(
            f"{target.model} gave a vector of shape {probe.shape} where {target.dimension} numbers "
            "were expected; the model's files don't say the truth about it"
        )
    if not np.isfinite(probe).all() or not have_direction(probe).all():
        raise EmbedderError(f"{target} gives vectors that are not finite, or all zeros")
    if target.access is not None:
        # Each process learns for itself whether two texts may be sent, before it sends any rows.
        embed_together(embedder, [PROBE_TEXTS[at] for at in TOGETHER])
    return embedder


def _build(target: Target) -> Embedder:
    if target.backend == "local":
        with undisturbed():
            from reembed.transforms.embedders.local import LocalEmbedder

            return LocalEmbedder(
                target.source or target.model,
                target.dimension,
                prompt=target.prompt,
                device=target.device,
                precision=target.precision,
            )
    if target.backend == "fake":
        from reembed.transforms.embedders.fake import FakeEmbedder

        return FakeEmbedder(target.dimension)
    if target.access is not None:
        from reembed.transforms.embedders.http import HttpEmbedder

        return HttpEmbedder(target)
    raise EmbedderError(f"there is no embedder for the backend {target.backend!r}")
