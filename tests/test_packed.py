"""Linear layers that are packed beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers.activations import GELUActivation

from reembed.transforms.embedders import cosines
from reembed.transforms.embedders.local import LocalEmbedder
from reembed.transforms.embedders.models import MINILM, find_model
from reembed.transforms.embedders.packed import PackedLinear, pack_linear, unpack_linear
from tests.tiny import DIMENSION, save_tiny_model

pytestmark = pytest.mark.system

TEXTS = ["a short text", "", "ein Text, der länger ist als der erste", "long " * 400]


class Derived(nn.Linear):
    """A layer that may do anything."""


class Layers(nn.Module):
    """As a model of BERT's kin has them."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(6, 10)
        self.intermediate_act_fn = GELUActivation()
        self.inner = nn.Sequential(nn.Linear(10, 4, bias=False), nn.Tanh())

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.inner(self.intermediate_act_fn(self.dense(rows)))
        return found


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without OpenVINO."""
    monkeypatch.setattr(LocalEmbedder, "_compile", lambda self: None)
    yield


@given(
    st.lists(st.integers(1, 5), max_size=2), st.integers(1, 40), st.integers(1, 40), st.booleans()
)
def test_a_packed_layer_calculates_what_the_layer_does(
    batch: list[int], width: int, height: int, bias: bool
) -> None:
    torch.manual_seed(width * height)
    layer, rows = nn.Linear(width, height, bias=bias), torch.randn(*batch, 3, width)

    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(layer)(rows), layer(rows))
        expected = nn.functional.gelu(layer(rows))
        torch.testing.assert_close(PackedLinear(layer, gelu=True)(rows), expected)


def test_a_models_layers_are_packed_and_come_back_as_they_were() -> None:
    model, rows = Layers(), torch.randn(3, 6)
    before = dict(model.named_modules())

    with torch.inference_mode():
        expected = model(rows)
        replaced = pack_linear(model)
        packed = [name for name, m in model.named_modules() if isinstance(m, PackedLinear)]
        torch.testing.assert_close(model(rows), expected)
        unpack_linear(replaced)

    assert packed == ["dense", "inner.0"]
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize("kind", ["derived", "float64", "hooked"])
def test_a_layer_that_does_something_else_is_left_alone(kind: str) -> None:
    layer = Derived(2, 2) if kind == "derived" else nn.Linear(2, 2)
    if kind == "float64":
        layer.double()
    if kind == "hooked":
        layer.register_forward_hook(lambda *given: None)

    assert pack_linear(nn.Sequential(layer)) == []


def test_without_onednn_a_model_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Layers()
    before = dict(model.named_modules())
    init = PackedLinear.__init__

    def fail(self: PackedLinear, linear: nn.Linear, *, gelu: bool = False) -> None:
        if linear.out_features == 4:
            raise RuntimeError("no oneDNN")
        init(self, linear, gelu=gelu)

    monkeypatch.setattr(PackedLinear, "__init__", fail)

    assert pack_linear(model) == []
    assert dict(model.named_modules()) == before


def test_the_real_model_gives_the_same_vectors_packed(uncompiled: None) -> None:
    plain = SentenceTransformer(str(find_model(MINILM)), device="cpu")
    embedder = LocalEmbedder(MINILM, 384)

    assert sum(isinstance(m, PackedLinear) for m in embedder._model.modules()) == 37
    assert cosines(embedder.embed(TEXTS), plain.encode_document(TEXTS)).min() > 0.999999


def test_layers_that_give_other_vectors_are_not_kept(
    uncompiled: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = str(save_tiny_model(tmp_path))
    plain = SentenceTransformer(model, device="cpu")
    assert any(
        isinstance(m, PackedLinear) for m in LocalEmbedder(model, DIMENSION)._model.modules()
    )
    monkeypatch.setattr(
        PackedLinear, "forward", lambda self, rows: -rows @ self._weight.to_dense().T
    )

    embedder = LocalEmbedder(model, DIMENSION)

    assert not any(isinstance(m, PackedLinear) for m in embedder._model.modules())
    np.testing.assert_allclose(embedder.embed(TEXTS), plain.encode_document(TEXTS), atol=1e-6)
