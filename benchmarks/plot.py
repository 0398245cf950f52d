"""The figures of `benchmarks.speed` and `benchmarks.rows` as pictures; needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

_OURS, _THEIRS = "#1f6f8b", "#b8c4c8"


def draw(figures: Mapping[str, Any], file: Path) -> None:
    """Write a PNG: tokens embedded a second, and the seconds of whole processes."""
    pyplot = _pyplot()
    wholes = figures["whole"]
    figure, axes = pyplot.subplots(1, 1 + len(wholes), figsize=(4.5 * (1 + len(wholes)), 3.2))
    embedding = figures["embedding"]
    rates = {name: one["tokens_per_second"] for name, one in embedding["contenders"].items()}
    _bars(axes[0], f"embedding {embedding['texts']:,} texts, tokens/s", rates, "{:,.0f}")
    for axis, found in zip(axes[1:], wholes, strict=True):
        seconds = {name: median(one["seconds"]) for name, one in found["contenders"].items()}
        _bars(axis, f"whole process, {found['texts']:,} rows, s", seconds, "{:,.1f}")
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def draw_rows(figures: Sequence[Mapping[str, float]], file: Path) -> None:
    """Write a PNG: seconds and memory against rows, where the model costs nothing."""
    figure, (seconds, memory) = _pyplot().subplots(1, 2, figsize=(9, 3.2))
    rows = [one["rows"] for one in figures]
    for name in ("run", "staging", "saving", "replacement", "plan"):
        seconds.plot(rows, [one[name] for one in figures], marker="o", markersize=3, label=name)
    seconds.set(xscale="log", yscale="log", xlabel="rows")
    seconds.set_title("seconds", fontsize=10, loc="left")
    seconds.legend(fontsize=8, frameon=False)
    memory.plot(rows, [one["peak_mb"] for one in figures], marker="o", markersize=3, color=_OURS)
    memory.set(xscale="log", xlabel="rows", ylim=(0, 1.2 * max(one["peak_mb"] for one in figures)))
    memory.set_title("resident at most, MB", fontsize=10, loc="left")
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def _pyplot() -> Any:
    import_module("matplotlib").use("Agg")
    return import_module("matplotlib.pyplot")


def _bars(axis: Any, title: str, values: Mapping[str, float], form: str) -> None:
    colours = [_OURS if name == "reembed" else _THEIRS for name in values]
    bars = axis.barh(list(values), list(values.values()), color=colours)
    axis.bar_label(bars, labels=[form.format(value) for value in values.values()], padding=3)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.2 * max(values.values()))
    axis.set_xticks([])
    axis.set_title(title, fontsize=10, loc="left")
    axis.spines[:].set_visible(False)
