"""sentence-transformers on this machine."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from reembed.transforms.embedders.base import PROBE_TEXTS, Batch, Embedder, same_vectors
from reembed.transforms.embedders.hub import fetch_model
from reembed.transforms.embedders.loading import load_model
from reembed.transforms.embedders.models import (
    MINILM_WINDOW,
    find_model,
    is_minilm,
)
from reembed.transforms.errors import EmbedderError, TextRejected
from reembed.transforms.rows import Vectors

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from tokenizers import Encoding, Tokenizer

    from reembed.transforms.embedders.compiled import CompiledModel, Tokens


MOST_BATCH_TOKENS = 1_024
"""Tokens of a batch that the model calculates at a time, on a processor."""

_FIRST_TRIED_TOKENS = 2_048
_MOST_TRIED_TOKENS = 131_072
_ALIKE_COSINE = 0.99999

_TRIED_CHARACTERS = (1, 60, 300, 900)
"""Lengths of texts that are tried beside the probe texts, each together with others and alone."""

_NO_WINDOW = 2**31
"""Tokenizers of models that look at any number of tokens say an enormous one."""

_COLUMNS = {"input_ids": "ids", "token_type_ids": "type_ids", "attention_mask": "attention_mask"}
"""What a model is given, and what the tokenizer calls it."""


class LocalEmbedder(Embedder):
    """A sentence-transformers model, from this machine if it is here, else from the hub.

    `prompt` stands before each text (None: the model's own for documents). `device` is torch's
    name of one (None: the fastest that is there), `precision` that of the numbers it calculates
    with.
    """

    def __init__(
        self,
        source: str,
        dimension: int,
        *,
        prompt: str | None = None,
        device: str | None = None,
        precision: str = "float32",
    ) -> None:
        directory = find_model(source) or fetch_model(source)
        self._model = load_model(directory, device=device, precision=precision)
        # ai-memory's own copy of MiniLM has no modules.json, which would set these two.
        bare = is_minilm(source) and not (directory / "modules.json").is_file()
        self._normalize = bare
        if bare:
            self._model.max_seq_length = MINILM_WINDOW
        self._dimension = dimension
        self._prompt = prompt
        found = self._model.get_embedding_dimension()
        if found != dimension:
            raise EmbedderError(
                f"{source} makes vectors of {found} numbers, not {dimension}; "
                "give the right --dim, or leave it out"
            )
        _use_cores()
        # One thread for the model: torch starts threads of its own for each that calls it.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._most_tokens = MOST_BATCH_TOKENS
        self._tokenizer = _own_tokenizer(self._model)
        tokenizer = getattr(self._model, "tokenizer", None)
        self._columns = {
            name: column
            for name, column in _COLUMNS.items()
            if name in getattr(tokenizer, "model_input_names", ())
        }
        self._straight = self._tokenizer is not None and self._model.truncate_dim is None
        self._compiled: CompiledModel | None = None
        self._find_shortcuts()
        if self._straight and self._model.device.type != "cpu":
            self._most_tokens = find_budget(self._seconds)

    @property
    def in_flight(self) -> int:
        """Two parts: one is tokenized while the model works on another."""
        return 2

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Return the texts' vectors, shape (len(texts), dimension)."""
        return self.embed_batch(texts).vectors

    def embed_batch(self, texts: Sequence[str]) -> Batch:
        """Also say which texts are longer than the model looks at."""
        try:
            if self._tokenizer is None:
                return Batch(self._thread.submit(self._encode, texts).result())
            return self._embed_tokens(texts, self._tokenizer)
        except Exception as error:
            # A library's message may quote the text, so only the kind of error is told.
            raise TextRejected(f"the model failed with {type(error).__name__}") from error

    def _embed_tokens(self, texts: Sequence[str], tokenizer: Tokenizer) -> Batch:
        prompt = self._prompt or ""
        encodings = tokenizer.encode_batch([prompt + text for text in texts])
        vectors = np.empty((len(texts), self._dimension), np.float32)
        lengths = [len(one) for one in encodings]
        sizes = []
        for places in token_batches(lengths, self._most_tokens):
            sizes.append(sum(lengths[at] for at in places))
            if self._straight:
                some = self._thread.submit(self._calculate, [encodings[at] for at in places])
            else:
                some = self._thread.submit(self._encode, [texts[at] for at in places])
            vectors[places] = some.result()
        cut = frozenset(at for at, encoding in enumerate(encodings) if encoding.overflowing)
        return Batch(vectors, sizes=tuple(sizes), cut=cut)

    def _calculate(self, encodings: Sequence[Encoding]) -> Vectors:
        """Put one padded batch through the model, all its modules."""
        tokenizer = self._model.tokenizer
        longest = max(len(encoding) for encoding in encodings)
        for encoding in encodings:
            encoding.pad(
                longest,
                direction=tokenizer.padding_side,
                pad_id=tokenizer.pad_token_id,
                pad_type_id=tokenizer.pad_token_type_id,
                pad_token=tokenizer.pad_token,
            )
        columns = {
            name: np.array([getattr(encoding, column) for encoding in encodings], np.int64)
            for name, column in self._columns.items()
        }
        vectors = self._put_through(columns)
        if self._normalize:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors

    def _put_through(self, columns: Mapping[str, Tokens]) -> Vectors:
        import torch

        if self._compiled:
            try:
                return self._compiled(columns)
            except Exception:  # A shape or a want of memory that the modules may do with.
                self._compiled = None
        device = self._model.device
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(ids).to(device) for name, ids in columns.items()}
            vectors: Vectors = self._model(tensors)["sentence_embedding"].float().cpu().numpy()
        return vectors

    def _find_shortcuts(self) -> None:
        """Take each way that is faster than the library's and gives the same for a few texts.

        These are: tokens put straight through the modules, and these compiled, or else their
        weights packed beforehand.
        """
        from reembed.transforms.embedders.compiled import MOST_WINDOW
        from reembed.transforms.embedders.packed import pack_linear, unpack_linear

        window = getattr(self._model, "max_seq_length", None) or _NO_WINDOW
        tokenizer = getattr(self._model, "tokenizer", None)
        special = getattr(tokenizer, "all_special_tokens", [])
        texts = [*PROBE_TEXTS, " a ".join(["a", *special]), "word " * min(window, MOST_WINDOW)]
        texts += [PROBE_TEXTS[-1][:length] for length in _TRIED_CHARACTERS]
        try:
            expected = self._encode(texts)
        except Exception:  # Told when a text is embedded.
            self._straight = False
            return

        def alike() -> bool:
            try:
                alone = [self.embed([text]) for text in texts]
                return all(
                    same_vectors(found, expected, least=_ALIKE_COSINE)
                    for found in (self.embed(texts), np.concatenate(alone))
                )
            except TextRejected:
                return False

        self._straight = self._straight and alike()  # Some models want more than tokens.
        if self._straight and window <= MOST_WINDOW:
            self._compiled = self._compile()
            if self._compiled and alike():
                return
            self._compiled = None
        replaced = pack_linear(self._model)
        if replaced and not alike():
            unpack_linear(replaced)

    def _compile(self) -> CompiledModel | None:
        """Compile the modules; None for what this machine can't, or gains nothing from."""
        import torch

        from reembed.transforms.embedders.compiled import MOST_WEIGHT_BYTES, CompiledModel

        if (self._model.device.type, self._model.dtype) != ("cpu", torch.float32):
            return None
        if sum(weights.nbytes for weights in self._model.parameters()) > MOST_WEIGHT_BYTES:
            return None
        try:
            threads = torch.get_num_threads()
            return CompiledModel(self._model, list(self._columns), threads=threads)
        except Exception:  # OpenVINO isn't there, or doesn't know one of the model's operations.
            return None

    def _encode(self, texts: Sequence[str]) -> Vectors:
        vectors: Vectors = self._model.encode_document(
            list(texts),
            prompt=self._prompt,
            batch_size=len(texts),
            show_progress_bar=False,
            convert_to_numpy=True,
            normalize_embeddings=self._normalize,
        )
        return vectors.astype(np.float32, copy=False)

    def _seconds(self, tokens: int) -> float:
        """How long a batch of so many tokens takes."""
        assert self._tokenizer is not None
        text = self._tokenizer.encode("word " * 126)
        started = time.monotonic()
        self._calculate([copy(text) for _ in range(max(1, tokens // len(text)))])
        return time.monotonic() - started


def find_budget(seconds: Callable[[int], float]) -> int:
    """Find how many tokens a device does best with at a time, by a short trial.

    `seconds` says how long so many take; it fails where they are too many for its memory. The
    budget is doubled as long as that gains a tenth.

    >>> find_budget(lambda tokens: max(tokens, 20_000) / 1e6)
    32768
    """
    tokens = _FIRST_TRIED_TOKENS
    try:
        seconds(tokens)  # The first batch waits for the device to wake up.
        rate = tokens / seconds(tokens)
        while tokens < _MOST_TRIED_TOKENS:
            seconds(2 * tokens)
            found = 2 * tokens / seconds(2 * tokens)
            if found < 1.1 * rate:
                break
            tokens, rate = 2 * tokens, found
    except RuntimeError:  # torch.OutOfMemoryError among others.
        return max(_FIRST_TRIED_TOKENS, tokens // 2)
    return tokens


def token_batches(
    lengths: Sequence[int], most_tokens: int = MOST_BATCH_TOKENS
) -> Iterator[list[int]]:
    """Batches of texts of like length, by their places: each of so many tokens, or one text.

    A batch is padded to its longest text, so what is counted is that length for each. Measured
    on two cores with MiniLM: 1.4 times as fast as batches of 32 texts.

    >>> list(token_batches([500, 3, 500, 1100, 5]))
    [[1, 4], [0, 2], [3]]
    """
    batch: list[int] = []
    for at in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[at] > most_tokens:
            yield batch
            batch = []
        batch.append(at)
    if batch:
        yield batch


def _own_tokenizer(model: SentenceTransformer) -> Tokenizer | None:
    """A copy of a model's fast tokenizer, which cuts as the model does; None if it has none."""
    backend = getattr(getattr(model, "tokenizer", None), "backend_tokenizer", None)
    if backend is None:
        return None
    tokenizer: Tokenizer = type(backend).from_str(backend.to_str())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    window = model.max_seq_length
    if window is not None and window < _NO_WINDOW:
        tokenizer.enable_truncation(window, direction=model.tokenizer.truncation_side)
    return tokenizer


def _use_cores() -> None:
    """Let torch use as many threads as this process may use cores, unless it was told fewer."""
    import torch

    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))


def usable_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """The cores that this process may use, by its affinity and its container's quota.

    Source: https://docs.kernel.org/admin-guide/cgroup-v2.html (cpu.max).
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        most, period = quota.read_text().split()
        return min(cores, max(1, math.ceil(int(most) / int(period))))
    except (OSError, ValueError):  # There is none, or it says "max".
        return cores
