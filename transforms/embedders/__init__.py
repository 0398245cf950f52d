"""Embedders: what turns texts into vectors. One method to implement; all HTTP is in here."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from transforms.embedders.base import PROBE_TEXTS, Batch, Embedder
from transforms.embedders.target import SAME_COSINE, Access, Target
from transforms.errors import EmbedderError, TextRejected
from transforms.rows import Vectors

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
    "forget_embedder",
    "load_embedder",
    "probe_embedder",
    "same_vectors",
]

WITNESS_COSINE = 0.999
"""The least cosine of a stored vector with the model's that made it; another's are far below."""


def probe_embedder(embedder: Embedder, dimension: int) -> Vectors:
    """Embed the probe texts, one by one; shape (texts, dimension), zeros for one not taken."""
    return np.vstack([embed_each(embedder, [text], dimension) for text in PROBE_TEXTS])


def same_vectors(one: Vectors, other: Vectors, *, least: float = SAME_COSINE) -> bool:
    """Whether two sets of vectors, shape (texts, dimension), are one model's.

    >>> same_vectors(np.float32([[3, 4]]), np.float32([[6, 8]]))
    False
    """
    if one.shape != other.shape:
        return False
    lengths = np.linalg.norm(one, axis=1), np.linalg.norm(other, axis=1)
    alike = np.allclose(*lengths, rtol=1e-2)
    nothing = ~one.any(axis=1) & ~other.any(axis=1)  # Neither takes such a text.
    return bool(alike and np.all((cosines(one, other) >= least) | nothing))


def embed_each(embedder: Embedder, texts: Sequence[str], dimension: int) -> Vectors:
    """Embed texts for a comparison; zeros stand for one that the model will not take."""
    try:
        return embedder.embed(texts)
    except TextRejected:
        if len(texts) == 1:
            return np.zeros((1, dimension), np.float32)
    return np.vstack([embed_each(embedder, [text], dimension) for text in texts])


def cosines(one: Vectors, other: Vectors) -> NDArray[np.float64]:
    """The cosine of each pair of vectors, shape (texts,); 0 for a vector of zeros."""
    a, b = one.astype(np.float64), other.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    products: NDArray[np.float64] = np.sum(a * b, axis=1)
    found: NDArray[np.float64] = np.zeros_like(products)
    np.divide(products, lengths, out=found, where=lengths > 0)
    return found


def load_embedder(target: Target) -> Embedder:
    """Build the target's embedder, once in a process, and probe it.

    Raises EmbedderError if it can't be built or is not what the target says.
    """
    with _loading:
        return _load(target)


def forget_embedder() -> None:
    """Have the next load build an embedder anew: this one can't go on."""
    with _loading:
        _load.cache_clear()


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
    if not np.isfinite(probe).all() or not probe.any():
        raise EmbedderError(f"{target} gives vectors that are not finite, or all zeros")
    return embedder


def _build(target: Target) -> Embedder:
    if target.backend == "local":
        from transforms.embedders.local import LocalEmbedder

        return LocalEmbedder(
            target.source or target.model,
            target.dimension,
            prompt=target.prompt,
            window=target.window,
        )
    if target.backend == "fake":
        from transforms.embedders.fake import FakeEmbedder

        return FakeEmbedder(target.dimension)
    if target.access is not None:
        from transforms.embedders.http import HttpEmbedder

        return HttpEmbedder(target)
    raise EmbedderError(f"there is no embedder for the backend {target.backend!r}")
