"""The documents against the program."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from reembed.pipeline import report
from reembed.pipeline.cli import COMMANDS, _parser
from reembed.pipeline.outcome import Outcome
from reembed.transforms.errors import ReembedError
from reembed.transforms.rows import Summary
from tests.conftest import ROOT, Call, fake_plan, make_store, memory

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_shows_the_help_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")

    assert f"```text\n{_parser().format_help()}```" in README


def test_the_readme_names_every_json_key(tmp_path: Path) -> None:
    plan = fake_plan(make_store(tmp_path / "m.db", [memory("a")]))
    tables = README[README.index("## JSON") : README.index("## How it works")]
    named = re.findall(r"`(\w+)`", tables)

    keys = json.loads(report.plan_json(plan)) | json.loads(
        report.outcome_json(plan, Outcome(Summary(replaced=1), 1.0))
    )

    assert sorted(set(named)) == sorted(keys)


def test_the_readme_names_every_json_key_of_the_commands(reembed: Call, tmp_path: Path) -> None:
    path = make_store(tmp_path / "m.db", [memory("a")])
    section = README[README.index("## After a run") : README.index("## Exit codes")]
    named = set(re.findall(r"`(\w+)`", section[section.index("| `--json`") :]))
    reembed("--db", path)

    keys = {"schema_version", *COMMANDS}
    for command in COMMANDS:
        values = reembed(command, "--db", path, "--json").values
        keys |= values.keys() | (values["runs"][0].keys() if command == "status" else set())

    assert named | {"schema_version"} == keys


def test_the_readme_names_every_exit_code() -> None:
    section = README[README.index("## Exit codes") : README.index("## JSON")]
    codes = {
        int(code) for code in re.findall(r"\d+", "".join(re.findall(r"^\| [\d, ]+", section, re.M)))
    }

    assert codes == {0, 130, 143} | {kind.exit_code for kind in ReembedError.__subclasses__()}


@pytest.mark.parametrize(
    "document", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


def test_the_design_names_every_module() -> None:
    design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    layers = design[design.index("## Layers") : design.index("## The graph")]
    modules = [
        path.stem
        for layer in ("pipeline", "transforms")
        for path in (ROOT / layer).rglob("*.py")
        if path.stem != "__init__"
    ]
    assert len(modules) > 30

    assert [name for name in modules if not re.search(rf"\b{name}\b", layers)] == []


def test_the_tests_that_the_reliability_table_names_exist() -> None:
    table = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"tests/(test_\w+\.py)(?: -k (\w+))?", table)

    assert len(named) > 10
    for file, words in named:
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert re.search(rf"def {words or 'test_'}", text), (file, words)
