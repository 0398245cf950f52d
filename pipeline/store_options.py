"""Which store, and which of its columns: as the flags say, or a file of them."""

from __future__ import annotations

from typing import Any

from reembed.pipeline.options import STORE_FLAGS, STORE_LISTS, Options
from reembed.pipeline.paths import expanded, read_toml
from reembed.transforms.errors import UsageError
from reembed.transforms.hiding import file_trouble, is_secret_name, shown

_NAMES = (*STORE_LISTS, *STORE_FLAGS)
_SHOWN = 100


def store_config(options: Options) -> dict[str, Any]:
    """What is said of the store: by the file that --config names, and by flags, which go first.

    Raises UsageError for a file that can't be used.
    """
    config = {} if options.config is None else _read(options.config)
    flags = {name: getattr(options, name) for name in _NAMES if getattr(options, name)}
    config |= {name: list(value) if name in STORE_LISTS else value for name, value in flags.items()}
    if options.no_hidden:
        config["no_hidden"] = True
    if "store" in config:
        config["kind"] = config.pop("store")
    return config


def _read(path: str) -> dict[str, Any]:
    try:
        values = read_toml(expanded(path))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--config {path} can't be read as TOML ({file_trouble(error)}); correct it"
        ) from None
    found: dict[str, Any] = {}
    for name, value in values.items():
        known = name.replace("-", "_")
        if known not in _NAMES:
            known_names = ", ".join(_NAMES)
            raise UsageError(
                f"--config {path} sets {shown(name)[:_SHOWN]}, which is not one of {known_names}"
            )
        if known in found:
            raise UsageError(f"--config {path} sets {known} twice, with a hyphen and without one")
        listed = value if known in STORE_LISTS and isinstance(value, list) else [value]
        if not all(isinstance(one, str) and one for one in listed):
            held = "" if is_secret_name(known) else f" to {shown(repr(value))[:_SHOWN]}"
            raise UsageError(f"--config {path} sets {known}{held}, which is no text")
        found[known] = listed if known in STORE_LISTS else value
    return found
