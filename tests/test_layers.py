"""Two layers and one arrow, read off the imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

MODULES = sorted(
    path.relative_to(ROOT)
    for part in ("pipeline", "transforms")
    for path in (ROOT / part).rglob("*.py")
)
BEAM = {
    "pipeline/build.py",
    "pipeline/run.py",
    "pipeline/runners.py",
    "transforms/embed.py",
    "transforms/read.py",
    "transforms/replace.py",
    "transforms/summarize.py",
    "transforms/workdir.py",
}


def imports(path: Path) -> set[str]:
    """Every module that is imported, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def uses(path: Path, package: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for name in imports(path))


def test_there_are_modules_to_look_at() -> None:
    assert len(MODULES) > 20
    assert {str(path) for path in MODULES} >= BEAM


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_transforms_never_imports_pipeline(path: Path) -> None:
    assert not (path.parts[0] == "transforms" and uses(path, "reembed.pipeline"))


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_only_the_graph_and_its_four_transforms_import_beam(path: Path) -> None:
    assert uses(path, "apache_beam") == (str(path) in BEAM)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_sqlite_is_only_used_in_stores(path: Path) -> None:
    in_stores = path.parts[:2] == ("transforms", "stores")
    text = (ROOT / path).read_text(encoding="utf-8")
    sql = re.search(r"\b(SELECT|UPDATE|INSERT INTO|PRAGMA|BEGIN)\b [a-z*_]", text)
    assert in_stores or not (uses(path, "sqlite3") or sql)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_parquet_is_only_used_in_staging(path: Path) -> None:
    in_staging = path.parts[:2] == ("transforms", "staging")
    assert in_staging or not uses(path, "pyarrow")


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_other_processes_are_only_looked_at_in_surroundings(path: Path) -> None:
    assert uses(path, "psutil") == (path == Path("pipeline/surroundings.py"))


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_models_are_only_used_in_embedders(path: Path) -> None:
    in_embedders = path.parts[:2] == ("transforms", "embedders")
    models = ("torch", "transformers", "sentence_transformers", "tokenizers", "huggingface_hub")
    assert in_embedders or not any(uses(path, package) for package in models)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_servers_are_only_spoken_to_in_one_module(path: Path) -> None:
    assert uses(path, "httpx2") == (path == Path("transforms/embedders/client.py"))


@pytest.mark.parametrize("module", ["upkeep", "plan", "report"])
def test_what_looks_at_stores_and_runs_loads_neither_beam_nor_a_model(module: str) -> None:
    # What is imported by what is imported counts, too: so a process of its own looks.
    code = (
        f"import sys, reembed.pipeline.{module}; "
        "print({'apache_beam', 'torch', 'transformers', 'huggingface_hub', 'httpx2'} "
        "& sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert done.stdout == "set()\n"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_only_the_program_prints(path: Path) -> None:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    prints = any(isinstance(node, ast.Name) and node.id == "print" for node in ast.walk(tree))
    assert not prints or str(path) == "pipeline/output.py"
