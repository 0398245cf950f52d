"""What an embedder is: one method to implement, and what may be known beyond it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from transforms.rows import Vectors

PROBE_TEXTS = (
    "a probe text",
    "Der Hafen liegt im Nebel; 港は霧の中にある。",
    "\n".join(
        f"{at}. The {at}th line of a text that no model reads to its end." for at in range(99)
    ),
)
"""Embedded at the start of each run: what they give tells one model from another."""


@dataclass(frozen=True)
class Batch:
    """The vectors of a batch of texts, shape (texts, dimension), and what is known of them.

    `tokens` is what a server has counted, or an estimate where it says nothing; 0 for a model
    of this machine, which nobody pays for. `cut` are the places of texts that are longer than
    the model looks at. `wrong` says, by place, what the embedder itself found wrong.
    """

    vectors: Vectors
    tokens: int = 0
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
    def in_flight(self) -> int:
        """Batches that may be embedded at a time, by as many threads."""
        return 1

    def fitting(self, texts: Sequence[str]) -> int:
        """How many of these texts, from the first on, go in one call; at least one."""
        return len(texts)

    def learn_limit(self, texts: int) -> None:  # noqa: B027 - most models have none to learn
        """Take note that more texts than these are too many, whatever they say."""
