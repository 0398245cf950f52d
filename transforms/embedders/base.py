"""What an embedder is: one method to implement, and what may be known beyond it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from reembed.transforms.embedders.target import SAME_COSINE
from reembed.transforms.rows import Vectors

PROBE_TEXTS = (
    "a probe text",
    "Der Hafen liegt im Nebel; 港は霧の中にある。",
    "\n".join(
        f"{at}. The {at}th line of a text that no model reads to its end." for at in range(99)
    ),
)
"""Embedded at the start of each run: what they give tells one model from another."""

TOGETHER = (1, 0, 0, 1, 0)
"""The probe texts of one request, not the long one, which would cost as much as a hundred rows.

Neither sorting them nor turning or shifting their order leaves it as it is.
"""

WITNESS_COSINE = 0.999
"""The least cosine of a stored vector with the model's that made it; another's are far below."""


@dataclass(frozen=True)
class Batch:
    """The vectors of a batch of texts, shape (texts, dimension), and what is known of them.

    `tokens` is what a server has counted, or an estimate where it says nothing; 0 for a model
    of this machine, which nobody pays for. `sizes` are the tokens of each batch that went through
    the model, or of the request; none where they are not known. `cut` are the places of texts
    that are longer than the model looks at. `wrong` says, by place, what the embedder itself
    found wrong.
    """

    vectors: Vectors
    tokens: int = 0
    sizes: tuple[int, ...] = ()
    cut: frozenset[int] = frozenset()
    wrong: Mapping[int, str] = field(default_factory=dict)


class Embedder(ABC):
    """A model that is ready to embed; `embed` is what there is to implement."""

    @abstractmethod
    def embed(self, texts: Sequence[str]) -> Vectors:
        """Return the texts' vectors: float32, shape (len(texts), dimension), in their order.

        Raises TextRejected if the model will not take one of the texts, EmbedderError or
        RunError if it can't go on at all.
        """

    def embed_batch(self, texts: Sequence[str]) -> Batch:
        """The same, with what is known besides."""
        return Batch(self.embed(texts))

    @property
    def usable(self) -> bool:
        """Whether there is a use in asking it again."""
        return True

    @property
    def in_flight(self) -> int:
        """Batches that may be embedded at a time, by as many threads."""
        return 1

    def fitting(self, texts: Sequence[str]) -> int:
        """How many of these texts, from the first on, go in one call; at least one."""
        return len(texts)

    def learn_limit(self, texts: int) -> None:  # noqa: B027 - most models have none to learn
        """Take note that more texts than these are too many, whatever they say."""


def same_vectors(one: Vectors, other: Vectors, *, least: float = SAME_COSINE) -> bool:
    """Whether two sets of vectors, shape (texts, dimension), are one model's.

    >>> same_vectors(np.float32([[3, 4]]), np.float32([[6, 8]]))
    False
    """
    if one.shape != other.shape:
        return False
    a, b = (np.linalg.norm(vectors.astype(np.float64), axis=1) for vectors in (one, other))
    alike = np.allclose(a, b, rtol=1e-2)
    nothing = ~one.any(axis=1) & ~other.any(axis=1)  # Neither takes such a text.
    return bool(alike and np.all((cosines(one, other) >= least) | nothing))


def have_direction(vectors: Vectors) -> NDArray[np.bool_]:
    """Which vectors have a length; shape (texts,). The squares of tiny numbers are zeros.

    >>> have_direction(np.float32([[3, 4], [0, 0], [1e-30, 0]])).tolist()
    [True, False, False]
    """
    with np.errstate(all="ignore"):
        found: NDArray[np.bool_] = np.sum(vectors * vectors, axis=1) != 0
    return found


def cosines(one: Vectors, other: Vectors) -> NDArray[np.float64]:
    """The cosine of each pair of vectors, shape (texts,); 0 for a vector of zeros."""
    a, b = one.astype(np.float64), other.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    products: NDArray[np.float64] = np.sum(a * b, axis=1)
    found: NDArray[np.float64] = np.zeros_like(products)
    np.divide(products, lengths, out=found, where=lengths > 0)
    return found
