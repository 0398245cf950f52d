"""Models compiled by OpenVINO."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from reembed.transforms.embedders import cosines
from reembed.transforms.embedders.compiled import CompiledModel, Tokens
from reembed.transforms.embedders.local import LocalEmbedder
from reembed.transforms.embedders.models import MINILM, find_model
from reembed.transforms.embedders.packed import PackedLinear
from reembed.transforms.rows import Vectors

TEXTS = ["a short text", "", "ein Text, der länger ist als der erste", "long " * 400, "x " * 90]


@pytest.fixture(scope="module")
def plain() -> SentenceTransformer:
    return SentenceTransformer(str(find_model(MINILM)), device="cpu")


def is_packed(embedder: LocalEmbedder) -> bool:
    return any(isinstance(module, PackedLinear) for module in embedder._model.modules())


def test_a_compiled_model_gives_the_librarys_vectors(plain: SentenceTransformer) -> None:
    embedder = LocalEmbedder(MINILM, 384)

    assert embedder._compiled is not None
    assert not is_packed(embedder)
    expected = plain.encode_document(TEXTS)
    assert cosines(embedder.embed(TEXTS), expected).min() > 0.999999
    alone = np.concatenate([embedder.embed([text]) for text in TEXTS])
    assert cosines(embedder.embed(TEXTS), alone).min() > 0.999999


def test_a_batchs_vectors_are_not_overwritten_by_the_next() -> None:
    embedder = LocalEmbedder(MINILM, 384)

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


@pytest.mark.parametrize(
    ("precision", "most"),
    [
        ("bfloat16", {}),
        ("float32", {"MOST_WINDOW": 255}),
        ("float32", {"MOST_WEIGHT_BYTES": 10**6}),
    ],
)
def test_what_a_trace_may_not_hold_for_or_what_is_large_is_not_compiled(
    precision: str, most: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in most.items():
        monkeypatch.setattr(f"reembed.transforms.embedders.compiled.{name}", value)

    assert LocalEmbedder(MINILM, 384, precision=precision)._compiled is None


def test_where_a_compiled_model_fails_the_modules_go_on(
    plain: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder = LocalEmbedder(MINILM, 384)
    call = CompiledModel.__call__

    def fail(model: CompiledModel, columns: dict[str, Tokens]) -> Vectors:
        if columns["input_ids"].shape[1] > 200:
            raise RuntimeError("out of memory")
        return call(model, columns)

    monkeypatch.setattr(CompiledModel, "__call__", fail)

    found = embedder.embed(TEXTS)

    assert embedder._compiled is None
    assert cosines(found, plain.encode_document(TEXTS)).min() > 0.999999


def test_nothing_is_told_to_openvinos_makers(tmp_path: Path) -> None:
    program = (
        "import sys; from reembed.transforms.embedders.local import LocalEmbedder; "
        f"print(LocalEmbedder({MINILM!r}, 384)._compiled is not None, "
        "sys.modules.get('openvino_telemetry'))"
    )

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env=os.environ | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.split() == ["True", "None"]
    assert not (tmp_path / "intel").exists()
