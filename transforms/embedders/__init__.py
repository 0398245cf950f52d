"""Embedders: what turns texts into vectors. One method to implement; all HTTP is in here."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from transforms.errors import EmbedderError, TextRejected
from transforms.rows import Vectors

PROBE_TEXTS = (
    "a probe text",
    "Der Hafen liegt im Nebel; 港は霧の中にある。",
    "\n".join(
        f"{at}. The {at}th line of a text that no model reads to its end." for at in range(99)
    ),
)
"""Embedded at the start of each run: what they give tells one model from another."""

SAME_COSINE = 0.9999
"""Vectors of one text are one model's from here on; a model's own noise is far smaller."""

WITNESS_COSINE = 0.999
"""The least cosine of a stored vector with the model's that made it; another's are far below."""


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
    `prompt` stands before each text, `window` is the number of tokens that the model looks at
    (None: not known), and `normalized` says whether its last module makes vectors of length 1.
    """

    backend: str
    model: str
    dimension: int
    source: str = ""
    prompt: str = ""
    window: int | None = None
    normalized: bool = False

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """How a target that was noted earlier differs, as phrases for the user.

        Where the model lies does not count: it may have been moved.

        >>> Target("local", "m", 384, window=256).differences(
        ...     vars(Target("local", "m", 384, window=128)))
        ['its maximum length was 128 and is 256 now']
        """
        return [
            f"its {name} was {other.get(field)!r} and is {getattr(self, field)!r} now"
            for field, name in _COMPARED.items()
            if other.get(field) != getattr(self, field)
        ]

    def __str__(self) -> str:
        return f"{self.model} ({self.dimension}-dim, {self.backend})"


_COMPARED = {
    "model": "name",
    "backend": "backend",
    "dimension": "dimension",
    "prompt": "prompt",
    "window": "maximum length",
    "normalized": "normalisation",
}


def probe_embedder(embedder: Embedder) -> Vectors:
    """Embed the probe texts, one by one; shape (texts, dimension)."""
    return np.vstack([embedder.embed([text]) for text in PROBE_TEXTS])


def same_vectors(one: Vectors, other: Vectors) -> bool:
    """Whether two sets of vectors, shape (texts, dimension), are one model's.

    >>> same_vectors(np.float32([[3, 4]]), np.float32([[6, 8]]))
    False
    """
    if one.shape != other.shape:
        return False
    lengths = np.linalg.norm(one, axis=1), np.linalg.norm(other, axis=1)
    alike = np.allclose(*lengths, rtol=1e-2)
    return bool(alike and np.all(cosines(one, other) >= SAME_COSINE))


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

        return LocalEmbedder(target.source or target.model, target.dimension)
    if target.backend == "fake":
        from transforms.embedders.fake import FakeEmbedder

        return FakeEmbedder(target.dimension)
    raise EmbedderError(f"there is no embedder for the backend {target.backend!r}")
