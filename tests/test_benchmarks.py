"""The benchmarks work, whatever they measure."""

from __future__ import annotations

import doctest
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import speed
from benchmarks.corpus import memories
from reembed.transforms.embedders.models import MINILM, describe_model
from tests.conftest import ROOT

ROWS = 50


def test_all_contenders_embed_all_rows_with_the_same_vectors(tmp_path: Path) -> None:
    saved = tmp_path / "figures.json"
    flags = ["--rows", str(ROWS), "--rounds", "1", "--json", str(saved)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    figures = json.loads(saved.read_text())
    embedding, (whole,) = figures["embedding"], figures["whole"]
    texts = {name: one["texts"] for name, one in embedding["contenders"].items()}
    distinct = embedding["distinct_texts"]
    assert texts == {"reembed": distinct, "plain": ROWS, "sorted": ROWS, "one": ROWS // 10}
    assert 0 < distinct < ROWS
    rows = {name: one["rows"] for name, one in whole["contenders"].items()}
    assert rows == dict.fromkeys(("reembed", "plain", "beam"), ROWS)
    assert figures["min_cosine"] >= speed.LEAST_COSINE
    assert {line.split()[0] for line in done.stdout.splitlines() if line} >= {*texts, *rows}


def test_other_vectors_end_it_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["speed"])
    monkeypatch.setattr(speed, "measure", lambda rows, rounds: {"min_cosine": 0.5})
    monkeypatch.setattr(speed, "show", str)

    with pytest.raises(SystemExit, match=r"cosine with the plain script's is 0\.500000"):
        speed.main()


def test_the_corpus_is_what_it_says() -> None:
    texts = [f"{memory.title} {memory.content}" for memory in memories(1_000)]
    model = describe_model(MINILM)
    counts = model.count_tokens(texts)

    assert counts is not None and model.window is not None
    assert 0.09 < sum(count > model.window for count in counts) / len(texts) < 0.12
    assert len(set(texts)) == 950
    assert list(memories(50)) == list(memories(50))


@pytest.mark.parametrize("module", ["corpus", "embedding", "whole"])
def test_the_examples_are_true(module: str) -> None:
    found = doctest.testmod(importlib.import_module(f"benchmarks.{module}"))

    assert found.attempted and not found.failed
