"""A stand-in for tests of logic and of speed: vectors from a text's digest, no meaning."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reembed.transforms.embedders.base import Embedder
from reembed.transforms.errors import TextRejected
from reembed.transforms.rows import Vectors, text_digest

POISON = "POISON"
"""A batch with a text that holds this word is rejected as a whole, as many servers do."""

NOT_A_NUMBER = "NOT-A-NUMBER"
"""A text that holds this word gets a vector with a NaN in it."""


class FakeEmbedder(Embedder):
    """Gives each text a unit vector of its own; the same text always gets the same one."""

    def __init__(self, dimension: int) -> None:
        self._dimension = dimension

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Return vectors of shape (len(texts), dimension)."""
        if any(POISON in text for text in texts):
            raise TextRejected(f"the text holds {POISON}")
        vectors = np.empty((len(texts), self._dimension), dtype=np.float32)
        for at, text in enumerate(texts):
            seed = int.from_bytes(text_digest(text.encode()))
            vector = np.random.Generator(np.random.PCG64(seed)).standard_normal(self._dimension)
            vectors[at] = vector / np.linalg.norm(vector)
            if NOT_A_NUMBER in text:
                vectors[at, 0] = np.nan
        return vectors
