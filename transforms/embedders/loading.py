"""Loading a sentence-transformers model: all of it or nothing, and nothing besides."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from reembed.transforms.embedders.devices import check_device, require_precision
from reembed.transforms.embedders.models import require_tokenizer
from reembed.transforms.errors import EmbedderError
from reembed.transforms.hiding import first_line, shown
from reembed.transforms.interpreter import undisturbed

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


@undisturbed()
def load_model(
    directory: Path, *, device: str | None = None, precision: str = "float32"
) -> SentenceTransformer:
    """Load a model from its directory; never from the hub.

    Raises EmbedderError, also for a device or a precision that is not here, and for a model that
    would load with some of it made up: without a tokenizer every word is unknown, and weights
    that are missing are drawn at random.
    """
    require_tokenizer(directory)
    device = device and check_device(device)
    try:
        with _without_sklearn():
            from sentence_transformers import SentenceTransformer
            from sentence_transformers.util import get_device_name

        if device not in (None, "cpu") or precision != "float32":
            require_precision(device or get_device_name(), precision)
        with _loading_report() as report:
            model = SentenceTransformer(
                str(directory),
                device=device,
                local_files_only=True,
                model_kwargs={"dtype": precision},
            ).eval()
    except EmbedderError:
        raise
    except Exception as error:
        raise EmbedderError(
            f"the model in {directory} can't be loaded ({type(error).__name__}: "
            f"{shown(first_line(error))}); it may be incomplete, or need another library"
        ) from error
    missing = _missing_weights(report)
    if missing:
        raise EmbedderError(
            f"the model in {directory} lacks weights ({missing[0]}), and random ones would take "
            "their place; fetch it again"
        )
    return model


@contextmanager
def _without_sklearn() -> Iterator[None]:
    """Keep scikit-learn from being imported for two functions that embedding never calls.

    It takes a fifth of the time of importing sentence-transformers.
    """
    names = ("sklearn", "sklearn.metrics")
    if any(name in sys.modules for name in names):
        yield
        return

    def later(name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **more: getattr(import_module("sklearn.metrics"), name)(*args, **more)

    for name in names:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__getattr__ = later  # type: ignore[method-assign]
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


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
    bars = library.is_progress_bar_enabled()
    library.disable_progress_bar()
    library.disable_default_handler()
    library.set_verbosity_warning()
    library.add_handler(handler)
    try:
        yield lines
    finally:
        library.remove_handler(handler)
        library.set_verbosity_error()
        if bars:
            library.enable_progress_bar()
