"""sentence-transformers on this machine."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from transforms.embedders.models import MINILM_WINDOW, fetch_model, find_model, is_minilm
from transforms.errors import EmbedderError, TextRejected
from transforms.rows import Vectors

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class LocalEmbedder:
    """A sentence-transformers model, from this machine if it is here, else from the hub."""

    def __init__(self, model: str, dimension: int) -> None:
        # Set before anything forks; the tokenizer otherwise warns and stops using threads.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        directory = find_model(model) or fetch_model(model)
        self._lock = threading.Lock()  # Torch's own threads use the cores; two calls only wait.
        self._model = load_model(directory)
        # ai-memory's own copy of MiniLM has no modules.json, which would set these two.
        bare = is_minilm(model) and not (directory / "modules.json").is_file()
        self._normalize = bare
        if bare:
            self._model.max_seq_length = MINILM_WINDOW
        found = self._model.get_embedding_dimension()
        if found != dimension:
            raise EmbedderError(
                f"{model} makes vectors of {found} numbers, not {dimension}; "
                "give the right --dim, or leave it out"
            )

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Return the texts' vectors, shape (len(texts), dimension)."""
        with self._lock:
            try:
                vectors: Vectors = self._model.encode_document(
                    list(texts),
                    show_progress_bar=False,
                    convert_to_numpy=True,
                    normalize_embeddings=self._normalize,
                )
            except Exception as error:
                # A library's message may quote the text, so only the kind of error is told.
                raise TextRejected(f"the model failed with {type(error).__name__}") from error
        return vectors


def load_model(directory: Path) -> SentenceTransformer:
    """Load a model from its directory; never from the hub. Raises EmbedderError."""
    try:
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        return SentenceTransformer(str(directory), local_files_only=True)
    except Exception as error:
        raise EmbedderError(
            f"the model in {directory} can't be loaded ({type(error).__name__}: "
            f"{_first_line(error)}); it may be incomplete, or need another library"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]
