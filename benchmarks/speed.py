"""How fast reembed is beside its peers: `python -m benchmarks.speed --rows 2000 --rounds 5`.

First embedding alone, on a warm model; then whole processes on a store of 200 rows and on one of
all. All work on the same corpus and take turns. What is told is the median of the rounds; how many
times as fast reembed is as a peer is the median of the rounds' own ratios. Vectors that are not
those of the plain script (cosine under 0.99999) end it with exit code 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import whole
from benchmarks.corpus import make_store

LEAST_COSINE = 0.99999
_SMALL_ROWS = 200

Figures = dict[str, Any]


def main() -> None:
    """Measure, print a table, and save what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="save all figures")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them")
    options = parser.parse_args()
    if options.rows < 1 or options.rounds < 1:
        parser.error("--rows and --rounds must be at least 1")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    figures = measure(options.rows, options.rounds)
    print(show(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if options.plot:
        from benchmarks.plot import draw

        draw(figures, options.plot)
    if figures["min_cosine"] < LEAST_COSINE:
        sys.exit(
            f"The vectors are not the same: a cosine with the plain script's is "
            f"{figures['min_cosine']:.6f}, and {LEAST_COSINE} is the least that is right."
        )


def measure(rows: int, rounds: int) -> Figures:
    """Measure both, with what follows from it."""
    with tempfile.TemporaryDirectory() as directory:
        db = Path(directory) / "corpus.db"
        make_store(db, rows)
        # A process of its own: what this one holds would count as its children's memory.
        ended = whole.run(["benchmarks.embedding", str(db), "--rounds", str(rounds)])
    embedding = add_embedding_rates(ended.printed)
    sizes = sorted({min(rows, _SMALL_ROWS), rows})
    wholes = [add_whole_rates(whole.measure(size, rounds)) for size in sizes]
    least = min(
        one["min_cosine"] for part in (embedding, *wholes) for one in part["contenders"].values()
    )
    return {
        "rows": rows,
        "rounds": rounds,
        "min_cosine": least,
        "embedding": embedding,
        "whole": wholes,
    }


def add_embedding_rates(measured: Figures) -> Figures:
    """Add rates, medians of the rounds, to what embedding took.

    `tokens_per_second` counts the tokens of all texts for every contender, `embedded_per_second`
    those that it embedded. A contender that embeds a sample is taken to need the same time for
    each token of the others.
    """
    tokens = measured["tokens"]
    contenders = measured["contenders"]
    for name, one in contenders.items():
        sample = one["tokens"] / tokens if name == "one" else 1.0
        one["seconds_for_all"] = [seconds / sample for seconds in one["seconds"]]
    ours = contenders["reembed"]
    for one in contenders.values():
        seconds = median(one["seconds_for_all"])
        one["tokens_per_second"] = tokens / seconds
        one["rows_per_second"] = measured["texts"] / seconds
        one["embedded_per_second"] = one["tokens"] / median(one["seconds"])
        one["share_of_peak"] = (
            one["embedded_per_second"] * measured["flops_per_token"] / measured["peak_flops"]
        )
        one["reembed_is_faster"] = _ratio(one["seconds_for_all"], ours["seconds_for_all"])
        # On distinct texts reembed would do as many tokens a second as it embeds.
        one["on_distinct_texts"] = one["reembed_is_faster"] * (
            1.0 if one is ours else ours["tokens"] / tokens
        )
    return measured


def add_whole_rates(measured: Figures) -> Figures:
    """Add rates, medians of the rounds, to what whole processes took."""
    contenders = measured["contenders"]
    for one in contenders.values():
        one["rows_per_second"] = measured["texts"] / median(one["seconds"])
        one["reembed_is_faster"] = _ratio(one["seconds"], contenders["reembed"]["seconds"])
    return measured


def show(figures: Mapping[str, Any]) -> str:
    """The figures as a table."""
    return "\n".join([*_embedding_lines(figures["embedding"]), *_whole_lines(figures["whole"])])


def _embedding_lines(found: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"Embedding {found['texts']:,} texts, {found['distinct_texts']:,} of them distinct and "
        f"{found['texts_cut']:,} cut; {found['tokens']:,} tokens; {found['threads']} threads, "
        f"of which the peak is {found['peak_flops'] / 1e9:,.0f} GFLOP/s"
    )
    yield (
        f"{'':10}{'tokens/s':>10}{'rows/s':>9}{'embedded/s':>12}{'of peak':>9}"
        f"{'reembed is':>12}{'on distinct':>13}"
    )
    for name, one in found["contenders"].items():
        yield (
            f"{name:10}{one['tokens_per_second']:>10,.0f}{one['rows_per_second']:>9,.0f}"
            f"{one['embedded_per_second']:>12,.0f}{one['share_of_peak']:>9.0%}"
            f"{one['reembed_is_faster']:>10.2f} x{one['on_distinct_texts']:>11.2f} x"
        )
    yield "(tokens/s: of all texts; embedded/s: without equal texts; one: every tenth text, scaled)"


def _whole_lines(sizes: list[Mapping[str, Any]]) -> Iterator[str]:
    for found in sizes:
        yield f"\nWhole processes, {found['texts']:,} rows"
        yield f"{'':10}{'seconds':>10}{'rows/s':>9}{'peak MB':>12}{'reembed is':>21}{'cosine':>11}"
        for name, one in found["contenders"].items():
            yield (
                f"{name:10}{median(one['seconds']):>10.1f}{one['rows_per_second']:>9,.0f}"
                f"{median(one['peak_mb']):>12,.0f}{one['reembed_is_faster']:>19.2f} x"
                f"{one['min_cosine']:>11.7f}"
            )


def _ratio(theirs: list[float], ours: list[float]) -> float:
    return median(a / b for a, b in zip(theirs, ours, strict=True))


if __name__ == "__main__":
    main()
