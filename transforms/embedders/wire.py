"""What is said to servers and what they answer: Ollama's way and OpenAI's, which many others have.

https://docs.ollama.com/api/embed
https://platform.openai.com/docs/api-reference/embeddings/create
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

OLLAMA = "ollama"


class BadAnswer(Exception):
    """An answer that is not what was asked for; the message says what is wrong with it."""


@dataclass(frozen=True)
class Answer:
    """A server's answer: one vector a text, in the order of the texts, of whatever length.

    `model` is what the server says it embedded with, `tokens` what it says that it counted.
    """

    vectors: list[NDArray[np.float32]]
    model: str | None
    tokens: int | None


def path_of(backend: str) -> str:
    """Where below the URL of a server it embeds."""
    return "/api/embed" if backend == OLLAMA else "/embeddings"


def request_body(
    backend: str, model: str, texts: Sequence[str], *, dimension: int | None, packed: bool
) -> bytes:
    """What is asked of a server; with `packed`, vectors as base64 where it offers that."""
    body: dict[str, Any] = {"model": model, "input": list(texts)}
    if backend == OLLAMA:
        body["truncate"] = True
    elif packed:
        body["encoding_format"] = "base64"
    if dimension is not None:
        body["dimensions"] = dimension
    return json.dumps(body, ensure_ascii=False).encode()


def read_answer(backend: str, content: bytes, count: int) -> Answer:
    """Read the answer for `count` texts; raise BadAnswer for one that is not for just these."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        raise BadAnswer("it answered with something that is no JSON") from None
    if not isinstance(body, dict):
        raise BadAnswer("it answered with JSON of another shape")
    model = body.get("model")
    if backend == OLLAMA:
        found = body.get("embeddings")
        tokens = body.get("prompt_eval_count")
    else:
        found = _ordered(body.get("data"))
        usage = body.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        tokens = usage.get("prompt_tokens", usage.get("total_tokens"))
    if not isinstance(found, list) or len(found) != count:
        size = len(found) if isinstance(found, list) else "no"
        raise BadAnswer(f"it answered with {size} vectors for {count} texts")
    return Answer(
        vectors=[_vector(entry) for entry in found],
        model=model if isinstance(model, str) and model.strip() else None,
        tokens=tokens if type(tokens) is int and tokens > 0 else None,
    )


def read_window(content: bytes) -> int | None:
    """The tokens that a model looks at, from what Ollama shows of it; None if it doesn't say.

    A parameter `num_ctx` of the model goes before the length that it was built for.
    https://docs.ollama.com/api/show
    """
    try:
        shown = json.loads(content)
        info, parameters = shown.get("model_info") or {}, str(shown.get("parameters") or "")
        built = [size for name, size in info.items() if name.endswith(".context_length")]
        words = [line.split() for line in parameters.splitlines()]
        set_to = [int(line[1]) for line in words if line[:1] == ["num_ctx"] and len(line) == 2]
        sizes = [size for size in (*built[:1], *set_to[:1]) if type(size) is int and size > 0]
    except (ValueError, AttributeError):
        return None
    return min(sizes, default=None)


def read_complaint(content: bytes) -> str:
    """What a server says is wrong, from the shapes that errors have; "" if that can't be told."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return ""
    if isinstance(body, list) and body:  # As Gemini's servers answer.
        body = body[0]
    for key in ("error", "message", "detail"):
        if isinstance(body, dict) and body.get(key):
            body = body[key]
    if isinstance(body, dict):
        body = body.get("message") or body.get("type")
    return body if isinstance(body, str) else ""


def read_code(content: bytes) -> int | None:
    """The HTTP status that a body of another status says that it has; None if it says none.

    https://openrouter.ai/docs/api-reference/errors
    """
    try:
        error = json.loads(content).get("error")
        code = error.get("code")
    except (ValueError, RecursionError, AttributeError):
        return None
    return code if type(code) is int and 400 <= code < 600 else None


def _ordered(data: Any) -> list[Any]:
    """The embeddings of OpenAI's answer in the order of their index."""
    if not isinstance(data, list) or not all(isinstance(entry, dict) for entry in data):
        raise BadAnswer("it answered without a list of embeddings")
    indexes = [entry.get("index") for entry in data]
    if any(type(index) is not int for index in indexes):
        if any(index is not None for index in indexes):
            raise BadAnswer("it answered with embeddings of which some have no index")
    elif sorted(indexes) != list(range(len(data))):
        raise BadAnswer("it answered with embeddings whose indexes don't fit the texts")
    else:
        data = sorted(data, key=lambda entry: int(entry["index"]))
    return [entry.get("embedding") for entry in data]


def _vector(entry: Any) -> NDArray[np.float32]:
    """A vector as a list of numbers, or as base64 of little-endian float32."""
    try:
        if isinstance(entry, str):
            return np.frombuffer(base64.b64decode(entry, validate=True), "<f4").astype(np.float32)
        if isinstance(entry, list) and all(type(number) in (float, int) for number in entry):
            with np.errstate(over="ignore"):  # What is too large becomes infinite, and is found.
                return np.asarray(entry, np.float64).astype(np.float32)
    except (ValueError, OverflowError, binascii.Error):
        pass
    if entry is None or isinstance(entry, list):
        # A null among the numbers, or instead of them, is how some servers say NaN.
        return np.full(len(entry) if entry else 1, np.nan, np.float32)
    raise BadAnswer("it answered with vectors that are no lists of numbers")
