"""sentence-transformers on this machine."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from transforms.embedders.base import Batch, Embedder
from transforms.embedders.hub import fetch_model
from transforms.embedders.models import (
    MINILM_WINDOW,
    find_model,
    is_minilm,
    require_tokenizer,
)
from transforms.errors import EmbedderError, TextRejected
from transforms.rows import Vectors

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer


MOST_BATCH_TOKENS = 2_048
"""Tokens of a batch that the model calculates at a time."""


class LocalEmbedder(Embedder):
    """A sentence-transformers model, from this machine if it is here, else from the hub.

    `prompt` stands before each text (None: the model's own for documents), and `window` is the
    number of tokens that it looks at.
    """

    def __init__(
        self, source: str, dimension: int, *, prompt: str | None = None, window: int | None = None
    ) -> None:
        # Set before anything forks; the tokenizer otherwise warns and stops using threads.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        directory = find_model(source) or fetch_model(source)
        self._lock = threading.Lock()  # Torch's own threads use the cores; two calls only wait.
        self._model = load_model(directory)
        # ai-memory's own copy of MiniLM has no modules.json, which would set these two.
        bare = is_minilm(source) and not (directory / "modules.json").is_file()
        self._normalize = bare
        if bare:
            self._model.max_seq_length = MINILM_WINDOW
        self._dimension = dimension
        self._prompt = prompt
        self._window = window
        self._tokenizer = _own_tokenizer(self._model)
        found = self._model.get_embedding_dimension()
        if found != dimension:
            raise EmbedderError(
                f"{source} makes vectors of {found} numbers, not {dimension}; "
                "give the right --dim, or leave it out"
            )

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Return the texts' vectors, shape (len(texts), dimension)."""
        return self.embed_batch(texts).vectors

    def embed_batch(self, texts: Sequence[str]) -> Batch:
        """Also say which texts are longer than the model looks at."""
        lengths = self._count_tokens(texts)
        window = self._window or max(lengths, default=0)
        cut = frozenset(at for at, length in enumerate(lengths) if length > window)
        vectors = np.empty((len(texts), self._dimension), np.float32)
        with self._lock:
            try:
                for places in token_batches([min(length, window) for length in lengths]):
                    vectors[places] = self._encode([texts[at] for at in places])
            except Exception as error:
                # A library's message may quote the text, so only the kind of error is told.
                raise TextRejected(f"the model failed with {type(error).__name__}") from error
        return Batch(vectors, cut=cut)

    def _encode(self, texts: list[str]) -> Vectors:
        vectors: Vectors = self._model.encode_document(
            texts,
            prompt=self._prompt,
            batch_size=len(texts),
            show_progress_bar=False,
            convert_to_numpy=True,
            normalize_embeddings=self._normalize,
        )
        return vectors

    def _count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Count each text's tokens; without a fast tokenizer, guess them from its length."""
        if self._tokenizer is None:
            return [1 + len(text) // 4 for text in texts]
        prompt = self._prompt or ""
        return [len(found) for found in self._tokenizer.encode_batch([prompt + t for t in texts])]


def token_batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Batches of texts of like length, by their places: each of at most 2,048 tokens, or one text.

    A batch is padded to its longest text, so what is counted is that length for each. Measured
    on two cores with MiniLM: 1.4 times as fast as batches of 32 texts.

    >>> list(token_batches([900, 3, 900, 1100, 5]))
    [[1, 4], [0, 2], [3]]
    """
    batch: list[int] = []
    for at in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[at] > MOST_BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(at)
    if batch:
        yield batch


def _own_tokenizer(model: SentenceTransformer) -> Tokenizer | None:
    """A copy of a model's fast tokenizer that cuts nothing; None if it has none."""
    backend = getattr(getattr(model, "tokenizer", None), "backend_tokenizer", None)
    if backend is None:
        return None
    tokenizer: Tokenizer = type(backend).from_str(backend.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def load_model(directory: Path) -> SentenceTransformer:
    """Load a model from its directory; never from the hub.

    Raises EmbedderError, also for a model that would load with some of it made up: without a
    tokenizer every word is unknown, and weights that are missing are drawn at random.
    """
    require_tokenizer(directory)
    try:
        from sentence_transformers import SentenceTransformer

        with _loading_report() as report:
            model = SentenceTransformer(str(directory), local_files_only=True)
    except Exception as error:
        raise EmbedderError(
            f"the model in {directory} can't be loaded ({type(error).__name__}: "
            f"{_first_line(error)}); it may be incomplete, or need another library"
        ) from error
    missing = _missing_weights(report)
    if missing:
        raise EmbedderError(
            f"the model in {directory} lacks weights ({missing[0]}), and random ones would take "
            "their place; fetch it again"
        )
    return model


def _missing_weights(report: list[str]) -> list[str]:
    """Names of weights in a report's table that are missing; the pooler's are never used.

    >>> _missing_weights(["encoder.weight | MISSING |", "pooler.bias | MISSING |", "- MISSING: x"])
    ['encoder.weight']
    """
    cells = [line.split("|") for line in report if "|" in line]
    missing = [cell[0].strip() for cell in cells if cell[1].strip() == "MISSING"]
    return [name for name in missing if not name.startswith("pooler.")]


@contextmanager
def _loading_report() -> Iterator[list[str]]:
    """Collect what the library warns of while it loads a model, line by line; print nothing."""
    from transformers.utils import logging as library

    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.extend(record.getMessage().splitlines())  # type: ignore[method-assign]
    library.disable_progress_bar()
    library.disable_default_handler()
    library.set_verbosity_warning()
    library.add_handler(handler)
    try:
        yield lines
    finally:
        library.remove_handler(handler)
        library.set_verbosity_error()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]
