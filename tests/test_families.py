"""What is known of models that servers offer."""

from __future__ import annotations

import pytest

from reembed.transforms.embedders.families import DIMENSIONS, document_prefix, fold_name, same_model


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        ("text-embedding-3-small", "text-embedding-3-small"),
        ("text-embedding-3-small", "openai/text-embedding-3-small"),
        ("openai/text-embedding-3-small", "text-embedding-3-small"),
        ("text-embedding-ada-002", "text-embedding-ada-002-v2"),
        ("nomic-embed-text", "nomic-embed-text:latest"),
        ("nomic-embed-text-v1.5", "nomic-embed-text"),
        ("nomic-embed-text-v1.5", "text-embedding-nomic-embed-text-v1.5"),
        ("gemini-embedding-001", "models/gemini-embedding-001"),
        ("all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"),
        ("mxbai-embed-large", "mxbai-embed-large-v1"),
        ("BAAI/bge-m3", "BAAI/bge-m3/"),
    ],
)
def test_names_of_one_model_are_the_same(asked: str, answered: str) -> None:
    assert same_model(asked, answered)


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        ("text-embedding-3-small", "text-embedding-3-large"),
        ("text-embedding-3", "text-embedding-3-large"),
        ("nomic-embed-text", "all-minilm"),
        ("all-MiniLM-L6-v2", "all-MiniLM-L12-v2"),
        ("bge-m3", "bge-m3-unsupervised"),
        ("qwen3-embedding", "qwen3-embedding-8b"),
        ("maker/model", "another/model"),
        ("e5-large", "e5-large-v2"),
        ("BAAI/bge-small-en", "BAAI/bge-small-en-v1.5"),
        ("m", ""),
    ],
)
def test_names_of_two_models_are_not(asked: str, answered: str) -> None:
    assert not same_model(asked, answered)


def test_every_known_model_is_known_by_its_folded_name() -> None:
    assert [fold_name(name) for name in DIMENSIONS] == list(DIMENSIONS)


@pytest.mark.parametrize(
    ("model", "prefix"),
    [
        ("nomic-embed-text-v1.5", "search_document: "),
        ("nomic-ai/Nomic-Embed-Text-v2-moe", "search_document: "),
        ("text-embedding-3-small", ""),
    ],
)
def test_the_prefix_is_that_of_ai_memory(model: str, prefix: str) -> None:
    assert document_prefix(model) == prefix
