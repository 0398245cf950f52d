"""Models compiled by OpenVINO."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

from reembed.transforms.embedders import compiled, cosines
from reembed.transforms.embedders.compiled import CompiledModel, Tokens
from reembed.transforms.embedders.local import LocalEmbedder
from reembed.transforms.embedders.models import MINILM, find_model
from reembed.transforms.embedders.packed import PackedLinear
from reembed.transforms.rows import Vectors
from tests.conftest import real_embedder

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

pytestmark = pytest.mark.usefixtures("real_model")

TEXTS = ["a short text", "", "ein Text, der länger ist als der erste", "long " * 400, "x " * 90]


@pytest.fixture(scope="module")
def plain() -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(find_model(MINILM)), device="cpu")


def is_packed(embedder: LocalEmbedder) -> bool:
    return any(isinstance(module, PackedLinear) for module in embedder._model.modules())


def test_a_compiled_model_gives_the_librarys_vectors(plain: SentenceTransformer) -> None:
    embedder = real_embedder()

    assert embedder._compiled is not None
    assert not is_packed(embedder)
    expected = plain.encode_document(TEXTS)
    assert cosines(embedder.embed(TEXTS), expected).min() > 0.999999
    alone = np.concatenate([embedder.embed([text]) for text in TEXTS])
    assert cosines(embedder.embed(TEXTS), alone).min() > 0.999999


def test_a_batchs_vectors_are_not_overwritten_by_the_next() -> None:
    embedder = real_embedder()

    first = embedder.embed(["a text"])
    before = first.copy()
    embedder.embed(["another"])

    assert first.tobytes() == before.tobytes()


def test_a_compiled_model_that_gives_other_vectors_is_not_used(
    plain: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = CompiledModel.__call__
    monkeypatch.setattr(CompiledModel, "__call__", lambda *given: -call(*given))

    embedder = LocalEmbedder(MINILM, 384)

    assert embedder._compiled is None
    assert is_packed(embedder)
    assert cosines(embedder.embed(TEXTS), plain.encode_document(TEXTS)).min() > 0.999999


def test_without_openvino_the_weights_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)

    embedder = LocalEmbedder(MINILM, 384)

    assert embedder._compiled is None
    assert is_packed(embedder)


def test_a_model_whose_window_is_longer_than_what_a_trace_holds_for_is_not_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiled, "MOST_WINDOW", 255)

    assert LocalEmbedder(MINILM, 384)._compiled is None


@pytest.mark.parametrize(
    ("precision", "most_bytes"), [("bfloat16", compiled.MOST_WEIGHT_BYTES), ("float32", 10**6)]
)
def test_a_model_of_half_precision_or_a_large_one_is_not_compiled(
    precision: str, most_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "MOST_WEIGHT_BYTES", most_bytes)
    monkeypatch.setattr(LocalEmbedder, "_find_shortcuts", lambda embedder: None)

    assert LocalEmbedder(MINILM, 384, precision=precision)._compile() is None


def test_where_a_compiled_model_fails_the_modules_go_on(
    plain: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder = real_embedder()
    monkeypatch.setattr(embedder, "_compiled", embedder._compiled)  # It is put back.
    call = CompiledModel.__call__

    def fail(model: CompiledModel, columns: dict[str, Tokens]) -> Vectors:
        if columns["input_ids"].shape[1] > 200:
            raise RuntimeError("out of memory")
        return call(model, columns)

    monkeypatch.setattr(CompiledModel, "__call__", fail)

    found = embedder.embed(TEXTS)

    assert embedder._compiled is None
    assert cosines(found, plain.encode_document(TEXTS)).min() > 0.999999
