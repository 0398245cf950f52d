"""Linear layers whose weights are laid out for this processor once, not in each call.

PyTorch multiplies float32 matrices with MKL, which knows only AVX2 on processors that are not
Intel's; oneDNN, which PyTorch carries too, uses what there is. Measured on two cores of an AMD
EPYC with AVX-512: 520 GFLOP/s instead of 220.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator


class PackedLinear(nn.Module):
    """What a linear layer calculates, and a GELU after it if it is asked for; for inference only.

    Raises RuntimeError or AttributeError where PyTorch has no oneDNN for this processor.
    """

    def __init__(self, linear: nn.Linear, *, gelu: bool = False) -> None:
        super().__init__()
        # Plain attributes: a tensor in this layout can't be copied or cast as a buffer would be.
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._after = "gelu" if gelu else "none"

    def forward(self, rows: Tensor) -> Tensor:
        """Return rows @ weight.T + bias, shape (..., out_features)."""
        found: Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, self._weight, self._bias, self._after, [], "none"
        )
        return found


class Replaced(NamedTuple):
    """A module that stands no longer in its parent under its name."""

    parent: nn.Module
    name: str
    module: nn.Module


def pack_linear(model: nn.Module) -> list[Replaced]:
    """Pack a model's float32 linear layers on the processor, in place; give what they replaced.

    Where a layer is named as in BERT and its kin, the GELU after it is made part of it.
    """
    replaced: list[Replaced] = []
    try:
        with torch.inference_mode():
            for parent, name, linear in list(_linear_layers(model)):
                act = getattr(parent, "intermediate_act_fn", None)
                gelu = name == "dense" and type(act).__name__ == "GELUActivation"
                packed = PackedLinear(linear, gelu=gelu)
                if gelu:
                    replaced.append(_put(parent, "intermediate_act_fn", nn.Identity()))
                replaced.append(_put(parent, name, packed))
    except (AttributeError, RuntimeError):  # This PyTorch has none for this processor.
        unpack_linear(replaced)
        return []
    return replaced


def unpack_linear(replaced: list[Replaced]) -> None:
    """Undo what `pack_linear` did."""
    for parent, name, module in replaced:
        setattr(parent, name, module)


def _linear_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Layers of exactly that class: others that are derived from it do something else."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear and _is_plain(child):
                yield parent, name, child


def _is_plain(layer: nn.Linear) -> bool:
    weight, hooks = layer.weight, (layer._forward_hooks, layer._forward_pre_hooks)
    return (weight.dtype, weight.device.type) == (torch.float32, "cpu") and not any(hooks)


def _put(parent: nn.Module, name: str, module: nn.Module) -> Replaced:
    replaced = Replaced(parent, name, getattr(parent, name))
    setattr(parent, name, module)
    return replaced
