"""Embedders: what turns texts into vectors. One method to implement; all HTTP is in here."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from transforms.errors import EmbedderError, TextRejected
from transforms.rows import Vectors

PROBE_TEXT = "a probe text"


class Embedder(Protocol):
    """A model that is ready to embed."""

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Return the texts' vectors: float32, shape (len(texts), dimension), in their order.

        Raises TextRejected if the model will not take one of the texts, EmbedderError if it
        can't go on at all.
        """
        ...


@dataclass(frozen=True)
class Target:
    """The model that the store is moved to. A value: workers build the embedder from it.

    `backend` is how it is reached: "local" for sentence-transformers on this machine. `source`
    is where that loads it from, a directory or a name; `model` is what the model is called.
    """

    backend: str
    model: str
    dimension: int
    source: str = ""

    def __str__(self) -> str:
        return f"{self.model} ({self.dimension}-dim, {self.backend})"


def load_embedder(target: Target) -> Embedder:
    """Build the target's embedder, once in a process, and probe it.

    Raises EmbedderError if it can't be built or is not what the target says.
    """
    with _loading:
        return _load(target)


_loading = threading.Lock()


@lru_cache(maxsize=1)
def _load(target: Target) -> Embedder:
    embedder = _build(target)
    try:
        probe = embedder.embed([PROBE_TEXT])
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

        return LocalEmbedder(target.source or target.model, target.dimension)
    if target.backend == "fake":
        from transforms.embedders.fake import FakeEmbedder

        return FakeEmbedder(target.dimension)
    raise EmbedderError(f"there is no embedder for the backend {target.backend!r}")
