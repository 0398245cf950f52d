"""The program on the original's own databases, with the real model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from reembed.transforms.stores.codec import decode
from tests.conftest import (
    FIXTURES,
    Call,
    Program,
    all_columns,
    files,
    other_contents,
    select,
)


def cosines(path: Path, version: str) -> list[float]:
    """The cosine of each stored vector with the one that the original program stored."""
    after = np.load(FIXTURES / f"ai-memory-{version}-after.npz")
    ours = dict(select(path, "SELECT id, embedding FROM memories"))
    assert sorted(map(str, ours)) == after["keys"].tolist()
    result = []
    for key, theirs in zip(after["keys"].tolist(), after["vectors"], strict=True):
        blob = ours[key]
        assert isinstance(blob, bytes)
        vector = decode(blob)
        product = np.linalg.norm(vector) * np.linalg.norm(theirs)
        result.append(float(vector @ theirs / product))
    return result


@pytest.mark.usefixtures("real_model")
def test_every_vector_equals_the_original_programs_and_all_is_as_before_when_undone(
    original: tuple[str, Path], reembed: Call, program: Program
) -> None:
    """One of them in a process as a user starts it, the other in this one."""
    version, path = original
    before, everything = other_contents(path), all_columns(path)
    mode = path.read_bytes()[18:20]

    if version == "v57":
        ran = program("--db", path, "--json", anew=True)
        code, out = ran.returncode, ran.stdout
    else:
        done = reembed("--db", path, "--json", real=True)
        code, out = done.code, done.out

    assert (code, out.count("\n")) == (0, 1)
    result = json.loads(out)
    assert {name: result[name] for name in ("total", "reembedded", "skipped", "model", "dim")} == {
        "total": 202,
        "reembedded": 202,
        "skipped": 0,
        "model": "all-MiniLM-L6-v2 (384-dim, local)",
        "dim": 384,
    }
    assert isinstance(result["duration_ms"], int)
    assert other_contents(path) == before
    assert select(path, "SELECT DISTINCT embedding_dim FROM memories") == [(384,)]
    assert min(cosines(path, version)) >= 0.99999
    assert path.read_bytes()[18:20] == mode
    assert select(path, "PRAGMA integrity_check") == [("ok",)]
    run = f"ai-memory.db.reembed/{result['run_id']}"
    kept = {name for name in files(path.parent) if not name.startswith(f"{run}/backup/")}
    assert kept == {
        "ai-memory.db",
        "ai-memory.db.reembed/lock",
        f"{run}/manifest.json",
        f"{run}/manifest.lock",
        f"{run}/pass-1.json",
        f"{run}/summary.json",
    }

    checked = reembed("verify", "--db", path, "--json", real=True)
    undone = reembed("rollback", "--db", path, "--json", real=True)

    found = checked.values
    assert (checked.code, found["checked"], found["wrong"]) == (0, 202, {})
    assert 0 < found["sampled"] <= 64
    assert found["lowest_cosine"] > 0.9999
    assert (undone.code, undone.values["restored"]) == (0, 202)
    assert all_columns(path) == everything
    assert path.read_bytes()[18:20] == mode


def test_a_namespace_is_re_embedded_alone(original: tuple[str, Path], reembed: Call) -> None:
    _, path = original
    query = "SELECT id, embedding FROM memories WHERE namespace {} 'notes' ORDER BY id"
    others = select(path, query.format("<>"))
    notes = dict(select(path, query.format("=")))

    done = reembed("--db", path, "--namespace", "notes", "--json")

    assert done.code == 0
    assert done.values["reembedded"] == len(notes)
    assert select(path, query.format("<>")) == others
    after = dict(select(path, query.format("=")))
    assert sorted(map(str, after)) == sorted(map(str, notes))
    assert [key for key in after if after[key] == notes[key]] == []


def test_a_dry_run_prints_the_originals_figures_and_changes_no_byte(
    original: tuple[str, Path], reembed: Call
) -> None:
    version, path = original
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    modified = path.stat().st_mtime_ns
    stored = {"v57": 72, "v80": 86}[version]

    done = reembed("--db", path, "--dry-run", "--json", real=True)
    text = reembed("--db", path, "--dry-run", real=True)

    assert (done.code, text.code) == (0, 0)
    result = done.values
    figures = {
        "total_rows": 202,
        "rows_with_embeddings": stored,
        "rows_missing_embeddings": 202 - stored,
        "target_model": "all-MiniLM-L6-v2 (384-dim, local)",
        "target_dim": 384,
        "backend": "ollama",
    }
    assert {name: result[name] for name in figures} == figures
    assert sum(result["rows_by_namespace"].values()) == 202
    assert result["rows_by_stored_dim"] == {"384": stored}
    # Of the original program, to the letter.
    assert text.out.splitlines()[0] == (
        f"reembed plan: total_rows=202 rows_with_embeddings={stored} "
        f"rows_missing_embeddings={202 - stored} "
        "target_model='all-MiniLM-L6-v2 (384-dim, local)' target_dim=384 backend=ollama "
        "(dry-run: nothing written)"
    )
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before
    assert path.stat().st_mtime_ns == modified
    assert list(files(path.parent)) == ["ai-memory.db"]
