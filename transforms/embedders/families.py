"""What is known of models that servers offer: dimensions, windows, prefixes, other names.

The figures are those of the models' cards on the hub and in Ollama's library, and of
https://platform.openai.com/docs/guides/embeddings,
https://ai.google.dev/gemini-api/docs/embeddings, https://docs.mistral.ai/capabilities/embeddings.
A server is asked all the same before it is believed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

BYTES_A_TOKEN = 4.0
"""Bytes of a text for each token, until a server has said how many it counted."""

DIMENSIONS = {
    "all-minilm-l6-v2": 384,
    "all-mpnet-base-v2": 768,
    "bge-large-en-v1.5": 1024,
    "bge-m3": 1024,
    "gemini-embedding-001": 3072,
    "mistral-embed": 1024,
    "mxbai-embed-large": 1024,
    "nomic-embed-text-v1.5": 768,
    "snowflake-arctic-embed-l": 1024,
    "text-embedding-3-large": 3072,
    "text-embedding-3-small": 1536,
    "text-embedding-ada-002": 1536,
}
"""The lengths of the vectors of models, by their folded names; others are asked."""

WINDOWS = {
    "all-minilm-l6-v2": 256,
    "bge-large-en-v1.5": 512,
    "bge-m3": 8192,
    "gemini-embedding-001": 2048,
    "mxbai-embed-large": 512,
    "text-embedding-3-large": 8192,
    "text-embedding-3-small": 8192,
    "text-embedding-ada-002": 8192,
}
"""The tokens that models look at, by their folded names."""

OLLAMA_NAMES = {
    "all-minilm-l6-v2": "all-minilm",
    "nomic-embed-text-v1.5": "nomic-embed-text",
}
"""What Ollama's library calls models that have another name elsewhere, by their folded names."""

_ALIASES = {
    "mxbai-embed-large-v1": "mxbai-embed-large",
    "text-embedding-ada-002-v2": "text-embedding-ada-002",
    "all-minilm": "all-minilm-l6-v2",
    "mini_lm_l6_v2": "all-minilm-l6-v2",
    "nomic-embed-text": "nomic-embed-text-v1.5",
    "nomic_embed_v15": "nomic-embed-text-v1.5",
}


def fold_name(model: str) -> str:
    """One name for a model, whoever offers it: no maker, no tag of the newest version.

    >>> fold_name("sentence-transformers/all-MiniLM-L6-v2"), fold_name("nomic-embed-text:latest")
    ('all-minilm-l6-v2', 'nomic-embed-text-v1.5')
    """
    name = model.strip().lower().rstrip("/").rpartition("/")[2].removesuffix(":latest")
    name = re.sub(r"^text-embedding-(?=[a-z].*embed)", "", name)  # As LM Studio calls models.
    return _ALIASES.get(name, name)


def same_model(asked: str, answered: str) -> bool:
    """Whether the model that a server names is the one it was asked for.

    It may leave out or add the maker's name; two makers' models of one name are not the same,
    nor are two versions, but for those that are known to be one.

    >>> same_model("text-embedding-ada-002", "openai/text-embedding-ada-002-v2")
    True
    >>> same_model("e5-large", "e5-large-v2")
    False
    """
    makers = _maker(asked), _maker(answered)
    return fold_name(asked) == fold_name(answered) and (not all(makers) or makers[0] == makers[1])


def _maker(model: str) -> str:
    maker = model.strip().lower().rstrip("/").rpartition("/")[0]
    return "" if maker == "models" else maker  # As Gemini's servers call theirs.


def document_prefix(model: str) -> str:
    """What stands before each text that a server embeds with a model, as ai-memory has it."""
    return "search_document: " if "nomic-embed" in model.lower() else ""


@dataclass(frozen=True)
class ServedModel:
    """A model behind a server, as far as it is known without asking: tokens are estimated."""

    window: int | None
    prefix: str = ""

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Estimate each text's tokens from its bytes.

        >>> ServedModel(None, "search_document: ").count_tokens(["x" * 400])
        [105]
        """
        return [int(len((self.prefix + text).encode()) / BYTES_A_TOKEN) + 1 for text in texts]
