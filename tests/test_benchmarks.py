"""The benchmarks work, whatever they measure."""

from __future__ import annotations

import doctest
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from inline_snapshot import snapshot

from benchmarks import speed, whole
from benchmarks.corpus import memories
from reembed.transforms.embedders.models import MINILM, describe_model

ROWS = 20


def test_all_contenders_embed_all_rows_with_the_same_vectors(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    real_model: None,
) -> None:
    run = whole.run

    def run_here(command: Sequence[str]) -> whole.Ended:
        """Only reembed in a process of its own; all others here, where libraries are imported."""
        module, *arguments = command
        if not module.startswith("benchmarks."):
            return run(command)
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        importlib.import_module(module).main()
        return whole.Ended(json.loads(capsys.readouterr().out.splitlines()[-1]), 1.0, 1.0)

    monkeypatch.setattr(whole, "run", run_here)
    monkeypatch.setattr("benchmarks.embedding._PRODUCTS", 1)
    saved = tmp_path / "figures.json"
    flags = ["--rows", str(ROWS), "--rounds", "1", "--json", str(saved)]
    monkeypatch.setattr(sys, "argv", ["speed", *flags])

    speed.main()

    printed = capsys.readouterr().out
    figures = json.loads(saved.read_text())
    embedded, (processes,) = figures["embedding"], figures["whole"]
    texts = {name: one["texts"] for name, one in embedded["contenders"].items()}
    distinct = embedded["distinct_texts"]
    assert texts == {"reembed": distinct, "plain": ROWS, "sorted": ROWS, "one": ROWS // 10}
    assert 0 < distinct < ROWS
    rows = {name: one["rows"] for name, one in processes["contenders"].items()}
    assert rows == dict.fromkeys(("reembed", "plain", "beam"), ROWS)
    assert figures["min_cosine"] >= speed.LEAST_COSINE
    assert {line.split()[0] for line in printed.splitlines() if line} >= {*texts, *rows}


def test_other_vectors_end_it_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["speed"])
    monkeypatch.setattr(speed, "measure", lambda rows, rounds: {"min_cosine": 0.5})
    monkeypatch.setattr(speed, "show", str)

    with pytest.raises(SystemExit) as ended:
        speed.main()
    assert str(ended.value) == snapshot(
        "The vectors are not the same: a cosine with the plain script's is 0.500000, and "
        "0.99999 is the least that is right."
    )


def test_the_corpus_is_what_it_says() -> None:
    texts = [f"{memory.title} {memory.content}" for memory in memories(1_000)]
    model = describe_model(MINILM)
    counts = model.count_tokens(texts)

    assert counts is not None and model.window is not None
    assert 0.09 < sum(count > model.window for count in counts) / len(texts) < 0.12
    assert len(set(texts)) == 950
    assert list(memories(50)) == list(memories(50))


@pytest.mark.parametrize(
    "module",
    ["corpus", "whole", pytest.param("embedding", marks=pytest.mark.system)],  # It imports torch.
)
def test_the_examples_are_true(module: str) -> None:
    found = doctest.testmod(importlib.import_module(f"benchmarks.{module}"))

    assert found.attempted and not found.failed
