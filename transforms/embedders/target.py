"""The target: which model the store is moved to, and how its server is reached, if it has one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from reembed.transforms.hiding import key_words, shown

SAME_COSINE = 0.9999
"""Vectors of one text are one model's from here on; a model's own noise is far smaller."""

SAME_SERVED_COSINE = 0.999
"""The same for a server, whose many machines don't calculate alike to the last digits."""

FIRST_IN_FLIGHT = 4
"""Requests at a time to begin with; the server's answers then say how many it can do with."""

MOST_IN_FLIGHT = 32


@dataclass(frozen=True)
class Access:
    """How a server is reached, and how hard it may be pressed.

    There is no key in it, only where one is read: from the variable `key_variable`, from
    `key_file`, or from Google's Secret Manager by the name `key_secret`. `give_up_after` and
    `timeout` are seconds: without any answer, and for one. `most_tokens` is what one process
    may spend. With `asks_dimension` the server is asked for vectors of the target's length.
    """

    url: str
    key_variable: str | None = None
    key_file: str | None = None
    key_secret: str | None = None
    insecure_key: bool = False
    egress: str = "allow"
    most_in_flight: int = MOST_IN_FLIGHT
    give_up_after: float = 600.0
    timeout: float = 120.0
    most_tokens: int | None = None
    asks_dimension: bool = False

    @property
    def key_source(self) -> str | None:
        """Describe where the key comes from, without the key or a path."""
        return key_words(self.key_variable, self.key_file, self.key_secret)


@dataclass(frozen=True)
class Target:
    """The model that the store is moved to. A value: workers build the embedder from it.

    `backend` is how it is reached: "local" for sentence-transformers on this machine, else
    the kind of server that `access` leads to. `source` is where a local model is loaded from,
    a directory or a name; `model` is what the model is called. `prompt` stands before each
    text, `window` is the number of tokens that the model looks at (None: not known), and
    `normalized` says whether its last module makes vectors of length 1. `device` and `precision`
    are those of a local model.
    """

    backend: str
    model: str
    dimension: int
    source: str = ""
    prompt: str = ""
    window: int | None = None
    normalized: bool = False
    access: Access | None = None
    device: str | None = None
    precision: str = "float32"

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """How a target that was noted earlier differs, as phrases for the user.

        Where the model lies does not count: it may have been moved.

        >>> Target("local", "m", 384, window=256).differences(
        ...     vars(Target("local", "m", 384, window=128)))
        ['its maximum length was 128 and is 256 now']
        """
        noted = {**_BEFORE, **other}
        return [
            f"its {name} was {shown(repr(noted.get(field)))} and is "
            f"{shown(repr(getattr(self, field)))} now"
            for field, name in _COMPARED.items()
            if noted.get(field) != getattr(self, field)
        ]

    @property
    def noise(self) -> float:
        """The least cosine of two vectors that the model makes of one text."""
        return SAME_COSINE if self.access is None else SAME_SERVED_COSINE

    def to_json(self) -> dict[str, Any]:
        """The target in types that JSON has; `from_json` is its inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Target:
        """Read what `to_json` gave, also in another version: what is not known is left out."""
        known = {field.name for field in fields(cls)}
        found = {name: value for name, value in values.items() if name in known}
        if (access := found.get("access")) is not None:
            known = {field.name for field in fields(Access)}
            found["access"] = Access(**{k: v for k, v in access.items() if k in known})
        return cls(**found)

    def __str__(self) -> str:
        return f"{self.model} ({self.dimension}-dim, {self.backend})"


_COMPARED = {
    "model": "name",
    "backend": "backend",
    "dimension": "dimension",
    "prompt": "prompt",
    "window": "maximum length",
    "normalized": "normalisation",
    "precision": "precision",
}

_BEFORE: Mapping[str, Any] = {"precision": "float32"}
"""What was the case before it was noted."""
