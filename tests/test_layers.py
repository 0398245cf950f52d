"""Two layers and one arrow, read off the imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import pytest

from tests.conftest import ROOT

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


@dataclass(frozen=True)
class Module:
    """A module: its path below the root, and its text."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def imports(self) -> set[str]:
        """Every module that is imported, wherever in the file."""
        found: set[str] = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module)
                found.update(f"{node.module}.{alias.name}" for alias in node.names)
        return found

    def uses(self, *packages: str) -> bool:
        return any(
            name == package or name.startswith(f"{package}.")
            for name in self.imports
            for package in packages
        )


def modules() -> Iterator[Module]:
    for part in ("pipeline", "transforms"):
        for path in sorted((ROOT / part).rglob("*.py")):
            yield Module(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))


MODULES = list(modules())


def users(*packages: str, outside: str = "nowhere/") -> set[str]:
    """The modules that import one of these packages, without those in a folder."""
    return {
        module.path
        for module in MODULES
        if module.uses(*packages) and not module.path.startswith(outside)
    }


def test_there_are_modules_to_look_at() -> None:
    assert len(MODULES) > 20
    assert {module.path for module in MODULES} >= BEAM


def test_transforms_never_imports_pipeline() -> None:
    assert users("reembed.pipeline", "pipeline", outside="pipeline/") == set()


def test_only_the_graph_and_its_four_transforms_import_beam() -> None:
    assert users("apache_beam") == BEAM


def test_sqlite_is_only_used_in_stores() -> None:
    sql = re.compile(r"\b(SELECT|UPDATE|INSERT INTO|PRAGMA|BEGIN)\b [a-z*_]")
    speaks = {module.path for module in MODULES if sql.search(module.text)}
    assert users("sqlite3", outside="transforms/stores/") == set()
    assert {path for path in speaks if not path.startswith("transforms/stores/")} == set()


def test_parquet_is_only_used_in_staging() -> None:
    assert users("pyarrow", outside="transforms/staging/") == set()


def test_other_processes_are_only_looked_at_in_surroundings() -> None:
    assert users("psutil") == {"pipeline/surroundings.py"}


def test_models_are_only_used_in_embedders() -> None:
    models = ("torch", "transformers", "sentence_transformers", "tokenizers", "huggingface_hub")
    assert users(*models, outside="transforms/embedders/") == set()


def test_servers_are_only_spoken_to_in_one_module() -> None:
    assert users("httpx2") == {"transforms/embedders/client.py"}


def test_only_the_program_prints() -> None:
    prints = {
        module.path
        for module in MODULES
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Name) and node.id == "print"
    }
    assert prints <= {"pipeline/output.py"}


@pytest.mark.system
def test_what_looks_at_stores_and_runs_loads_neither_beam_nor_a_model() -> None:
    # What is imported by what is imported counts, too: so a process of its own looks.
    code = (
        "import sys, reembed.pipeline.upkeep, reembed.pipeline.plan, reembed.pipeline.report; "
        "print({'apache_beam', 'torch', 'transformers', 'huggingface_hub', 'httpx2'} "
        "& sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert done.stdout == "set()\n"
