"""Embedding alone, on a warm model: `python -m benchmarks.embedding DB --rounds 5`.

reembed embeds the rows as the pipeline does, in parts of up to 512 rows; three peers embed the same
texts in the same process, in turns. `one` embeds every tenth text only. Nothing is written.
Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from benchmarks.peers import encode_one, encode_plain, encode_sorted
from benchmarks.whole import turned
from reembed.pipeline.options import Options
from reembed.pipeline.plan import RANGE_ROWS, Plan, make_plan
from reembed.pipeline.settings import read_settings
from reembed.transforms.embed import embed_rows, known_texts
from reembed.transforms.embedders import cosines, load_embedder
from reembed.transforms.embedders.models import MINILM, describe_model
from reembed.transforms.embedders.packed import PackedLinear
from reembed.transforms.read import PART_TEXT_BYTES, split_rows, text_bytes
from reembed.transforms.rows import RangeRows, Vectors
from reembed.transforms.staging import new_token

_EVERY = 10
"""`one` embeds every tenth text."""

_WARM_UP = 16
_PRODUCTS = 20
_PRODUCT_ROWS = 2_048

Encode = Callable[[], Vectors]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("db", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(json.dumps(measure(options.db, options.rounds)))


def measure(db: Path, rounds: int) -> dict[str, Any]:
    """Measure the contenders in turns, each round from another one on.

    `tokens` of a contender are those that it embeds in a round, `seconds` are by round,
    `min_cosine` is the least of its vectors with those of plain.
    """
    given = Options(db=str(db), backend="local", model=MINILM)
    plan = make_plan(db, read_settings(given, {}, db.parent), given)
    parts = read_parts(plan)
    texts = [row.text for part in parts for row in part.rows]
    files = describe_model(MINILM)
    counts, window = files.count_tokens(texts), files.window
    assert counts is not None and window is not None
    tokens = np.minimum(counts, window)
    distinct = list(dict(zip(texts, tokens.tolist(), strict=True)).values())

    model = SentenceTransformer(str(files.directory))
    contenders: dict[str, Encode] = {
        "reembed": lambda: encode_parts(plan, parts),
        "plain": lambda: encode_plain(model, texts),
        "sorted": lambda: encode_sorted(model, texts),
        "one": lambda: encode_one(model, texts[::_EVERY]),
    }
    encode_parts(plan, [replace(parts[0], rows=parts[0].rows[:_WARM_UP])])
    encode_plain(model, texts[:_WARM_UP])

    shape = _config(files.directory)
    peak = 0.0
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    vectors: dict[str, Vectors] = {}
    for at in range(rounds):
        peak = max(peak, _peak(shape["hidden_size"], shape["intermediate_size"]))
        for name in turned(list(contenders), at):
            began = time.perf_counter()
            vectors[name] = contenders[name]()
            seconds[name].append(time.perf_counter() - began)

    embedded = dict.fromkeys(contenders, (len(texts), int(tokens.sum())))
    embedded["reembed"] = len(distinct), sum(distinct)
    embedded["one"] = len(texts[::_EVERY]), int(tokens[::_EVERY].sum())
    whole = vectors["plain"]
    return {
        "texts": len(texts),
        "distinct_texts": len(distinct),
        "texts_cut": sum(count > window for count in counts),
        "tokens": int(tokens.sum()),
        "threads": torch.get_num_threads(),
        "peak_flops": peak,
        "flops_per_token": flops_per_token(shape),
        "contenders": {
            name: {
                "texts": embedded[name][0],
                "tokens": embedded[name][1],
                "seconds": seconds[name],
                "min_cosine": float(
                    cosines(found, whole[::_EVERY] if name == "one" else whole).min()
                ),
            }
            for name, found in vectors.items()
        },
    }


def read_parts(plan: Plan) -> list[RangeRows]:
    """Read the rows as the pipeline does of a large store."""
    ranges, _ = plan.store.cut_ranges(RANGE_ROWS, 1)
    return [
        RangeRows(keys, part, rows)
        for keys in ranges
        for part, rows in enumerate(
            split_rows(
                sorted(plan.store.read_range(keys), key=text_bytes, reverse=True),
                PART_TEXT_BYTES,
                plan.part_rows,
            )
        )
    ]


def encode_parts(plan: Plan, parts: Sequence[RangeRows]) -> Vectors:
    """Embed the parts as a worker does that knows no text yet."""
    target = plan.target
    embedder, known = load_embedder(target), known_texts(target, new_token())
    found = [
        embed_rows(part, embedder, dimension=target.dimension, batch=plan.part_rows, known=known)
        for part in parts
    ]
    blobs = b"".join(row.vector or b"" for part in found for row in part.rows)
    return np.frombuffer(blobs, "<f4").reshape(-1, target.dimension)


def flops_per_token(config: dict[str, int]) -> int:
    """Floating-point operations of a transformer's linear layers for a token.

    Attention, which grows with the length of a text, is left out.

    >>> flops_per_token({"num_hidden_layers": 6, "hidden_size": 384, "intermediate_size": 1536})
    21233664
    """
    hidden = config["hidden_size"]
    weights = 4 * hidden * hidden + 2 * hidden * config["intermediate_size"]
    return 2 * config["num_hidden_layers"] * weights


def _config(directory: Path) -> dict[str, int]:
    content: dict[str, int] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return content


def _peak(hidden: int, inner: int) -> float:
    """The best rate of a product of float32 matrices as the model has them, in FLOP/s."""
    rates = []
    for width, height in ((hidden, inner), (inner, hidden)):
        rows, layer = torch.rand(_PRODUCT_ROWS, width), torch.nn.Linear(width, height)
        # Of MKL and of oneDNN, which is ahead on some processors.
        for product in (layer, PackedLinear(layer)):
            for _ in range(_PRODUCTS):
                began = time.perf_counter()
                with torch.inference_mode():
                    product(rows)
                rates.append(2 * _PRODUCT_ROWS * width * height / (time.perf_counter() - began))
    return max(rates)


if __name__ == "__main__":
    main()
