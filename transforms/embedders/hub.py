"""Models that are not on this machine: fetched from the hub, which must never be waited for long.

https://huggingface.co/docs/huggingface_hub/package_reference/file_download
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reembed.transforms.embedders.within import within
from reembed.transforms.errors import EmbedderError
from reembed.transforms.hiding import origin, shown

HUB_TIMEOUT_SECONDS = 10.0


def fetch_model(model: str, *, small_only: bool = False) -> Path:
    """Fetch a model from the hub into its cache, perhaps its small files only.

    Returns the directory. Raises EmbedderError if the hub has no such model or falls silent.
    """
    from huggingface_hub import (
        HfApi,
        constants,
        errors,
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
    )

    here = f"the model {shown(model)} is not on this machine"
    if constants.HF_HUB_OFFLINE:
        raise EmbedderError(
            f"{here} and HF_HUB_OFFLINE forbids asking the hub for it; give its directory with "
            "--model, or unset that variable"
        )
    repository = model if "/" in model else f"sentence-transformers/{model}"

    def fetch() -> Path | None:
        directory = None
        info = HfApi().model_info(repository, timeout=HUB_TIMEOUT_SECONDS)
        # File by file, each asked for first: the library waits 10 s for the content of a file,
        # but minutes to learn that there is one, and without a limit for a list of them.
        for name in _wanted([file.rfilename for file in info.siblings or []], small_only):
            get_hf_file_metadata(hf_hub_url(repository, name), timeout=HUB_TIMEOUT_SECONDS)
            file = hf_hub_download(repository, name, etag_timeout=HUB_TIMEOUT_SECONDS)
            directory = Path(file.removesuffix(name))
        return directory

    try:
        # Small files have a minute in all; a large one has as long as it keeps coming.
        directory = within(6 * HUB_TIMEOUT_SECONDS, fetch) if small_only else fetch()
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise EmbedderError(
            f"{here} and the hub has no {shown(repository)}, or keeps it private; check the name "
            "given with --model"
        ) from None
    except Exception as error:
        raise EmbedderError(
            f"{here} and the hub at {origin(constants.ENDPOINT)} can't be reached "
            f"({type(error).__name__}); give the model's directory with --model, or connect"
        ) from error
    if directory is None:
        raise EmbedderError(
            f"{here} and {shown(repository)} at the hub holds no files of a sentence-transformers "
            "model; check the name given with --model"
        )
    return directory


def _wanted(files: Sequence[str], small_only: bool) -> list[str]:
    """The files of a repository that sentence-transformers reads with PyTorch.

    >>> _wanted(["config.json", "model.safetensors", "pytorch_model.bin", "onnx/a.onnx"], False)
    ['config.json', 'model.safetensors']
    """
    other = {".h5", ".msgpack", ".ot", ".onnx", ".tflite"}
    safe = any(name.endswith(".safetensors") for name in files)
    wanted = []
    for name in files:
        path = Path(name)
        twice = safe and path.name.startswith("pytorch_model")
        if path.parts[0] not in ("onnx", "openvino") and path.suffix not in other and not twice:
            wanted.append(name)
    return [name for name in wanted if name.endswith(".json") or not small_only]
