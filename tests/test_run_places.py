"""Where the runs on a database lie: copies of them, databases that moved, what is missing there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conftest import Call, all_columns, files, make_store, memory
from transforms.staging import staging_root
from transforms.stores.demo import hashed_vector


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store of four rows with vectors."""
    vectors = ((f"{at}", hashed_vector(f"{at}", 8)) for at in range(4))
    return make_store(
        tmp_path / "m.db",
        [memory(key, embedding=vector, embedding_dim=8) for key, vector in vectors],
    )


@pytest.mark.parametrize("linked", [True, False])
def test_a_copy_of_a_run_does_not_take_its_place(
    reembed: Call, path: Path, tmp_path: Path, linked: bool
) -> None:
    before = all_columns(path)
    original = tmp_path / "runs" if linked else staging_root(path)
    flags = ("--run-dir", original) if linked else ()
    assert reembed("--db", path, *flags, "--max-rows", "2").code == 0
    [run] = original.glob("2*")
    shutil.copytree(run, tmp_path / "copy" / run.name)
    kept = files(tmp_path)

    for command in (["status"], ["verify"], ["rollback"], ["cleanup", "--yes"], []):
        refused = reembed(*command, "--db", path, "--run-dir", tmp_path / "copy")
        assert refused.code == 1, command
        assert f"lies in two places, {run} and {tmp_path / 'copy' / run.name}" in refused.error
    assert files(tmp_path) == kept

    assert reembed("--db", path, *flags).code == 0
    assert reembed("status", "--db", path).out.count("replaced") == 1
    assert reembed("rollback", "--db", path, *flags).code == 0
    assert all_columns(path) == before
