"""Devices that a local model calculates on, by torch's names for them."""

from __future__ import annotations

import re

from reembed.transforms.errors import EmbedderError, UsageError
from reembed.transforms.hiding import first_line, shown

DEVICES = ("cpu", "cuda", "mps", "xpu")
"""The kinds of devices that a model can be loaded on; torch has others that calculate nothing."""

_NAME = re.compile(rf"({'|'.join(DEVICES)})(?::(\d{{1,4}}))?")


def check_device(name: str) -> str:
    """Give a device's name as torch takes it; torch is imported for any but the processor.

    Raises UsageError for what is no name of a device, EmbedderError for one that is not here.

    >>> check_device("CPU"), check_device("cpu:0")
    ('cpu', 'cpu')
    """
    found = _NAME.fullmatch(name.strip().lower())
    if found is None:
        raise UsageError(
            f"--device {shown(name)} is not one of {', '.join(DEVICES)}, or one with a number such "
            f"as cuda:1; {_here()}"
        )
    kind, number = found[1], int(found[2] or 0)
    if kind == "cpu" and number == 0:
        return kind
    if number >= _counts()[kind]:
        raise EmbedderError(f"the device {name} is not there: {_here()}")
    return kind if found[2] is None else f"{kind}:{number}"


def require_precision(device: str, precision: str) -> None:
    """Raise EmbedderError if a device does not multiply numbers of a precision."""
    import torch

    try:
        tried = torch.ones((2, 2), device=device, dtype=getattr(torch, precision))
        (tried @ tried).sum().item()
    except Exception as error:
        raise EmbedderError(
            f"the device {device} can't calculate with numbers of {precision} here "
            f"({type(error).__name__}: {shown(first_line(error))}); choose another --precision or "
            "--device"
        ) from error


def _here() -> str:
    import torch

    names = [
        name
        for kind, count in _counts().items()
        for name in ([kind] if count == 1 else [f"{kind}:{number}" for number in range(count)])
    ]
    return f"torch {torch.__version__} finds {', '.join(names)} on this machine; use one of these"


def _counts() -> dict[str, int]:
    """Count the devices of each kind."""
    import torch

    return {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
        "xpu": torch.xpu.device_count() if torch.xpu.is_available() else 0,
    }
