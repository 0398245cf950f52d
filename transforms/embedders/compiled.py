"""A whole model compiled by OpenVINO for this processor, where that package is installed.

Measured on two cores of an AMD EPYC with AVX-512: 1.2 times as fast as `packed`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from reembed.transforms.rows import Vectors

Tokens = NDArray[np.int64]
"""One column of what a model is given: shape (texts, tokens)."""

MOST_WINDOW = 512
"""The longest window of a model that is compiled: a trace holds for the lengths that were tried."""


MOST_WEIGHT_BYTES = 1_073_741_824
"""The largest model that is compiled: its weights are then held twice."""


class CompiledModel:
    """What a model's modules calculate, of any number of texts of any length.

    `names` are the columns that it is given. Raises ImportError without OpenVINO, and about
    anything for a model that can't be traced. Whether the trace is right has to be tried.
    """

    def __init__(self, model: SentenceTransformer, names: Sequence[str], *, threads: int) -> None:
        with _without_telemetry():
            from openvino import Core
            from openvino.frontend import FrontEndManager
            from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

        self._names = names
        example = tuple(torch.ones(2, 9, dtype=torch.int64) for _ in names)
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):
            traced = TorchScriptPythonDecoder(_Modules(model, names), example_input=example)
            frontend = FrontEndManager().load_by_framework("pytorch")
            graph = frontend.convert(frontend.load(traced))
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "f32",  # Otherwise bfloat16 where the processor has it.
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # Other processes may run on the same cores.
            # What is kept for each shape of a batch, of which there are thousands: 600 MB of it.
            "CPU_RUNTIME_CACHE_CAPACITY": 128,
        }
        self._request = Core().compile_model(graph, "CPU", settings).create_infer_request()

    def __call__(self, columns: Mapping[str, Tokens]) -> Vectors:
        """Return the vectors of one padded batch, shape (texts, dimension)."""
        found = self._request.infer([columns[name] for name in self._names])
        vectors: Vectors = found[0].copy()  # The next call overwrites it.
        return vectors


@contextmanager
def _without_telemetry() -> Iterator[None]:
    """Let OpenVINO find no `openvino_telemetry`, which tells its makers that it is used.

    It does so from the import on, over the network, and leaves an identity in the user's home.
    """
    name = "openvino_telemetry"
    before = sys.modules.get(name)
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before


class _Modules(nn.Module):
    """All modules of a model as a function of its columns."""

    def __init__(self, model: SentenceTransformer, names: Sequence[str]) -> None:
        super().__init__()
        # Without the object around them, of which a trace looks at every attribute.
        self._parts = nn.ModuleList(model.children())
        self._names = names

    def forward(self, *columns: Tensor) -> Tensor:
        features = dict(zip(self._names, columns, strict=True))
        for part in self._parts:
            features = part(features)
        return features["sentence_embedding"]
