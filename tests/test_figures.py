"""Every figure of a result's text is in its JSON, for every command."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reembed.pipeline.report import _money
from reembed.pipeline.words import duration, size
from reembed.transforms.embedders.fake import POISON
from reembed.transforms.stores.demo import Memory
from tests.conftest import Call, change, jam, make_store, memory, unjam

_FIGURE = re.compile(r"\d[\d,]*(?:\.\d+)?")


def figures(text: str) -> set[str]:
    """The numbers in a text, as they are written."""
    return {found.rstrip(",") for found in _FIGURE.findall(text)}


def shown(values: Any, name: str = "") -> Iterator[str]:
    """Each way in which the text may write the numbers of a result, and how many a list has."""
    if isinstance(values, dict | list):
        yield str(len(values))
        inner = values.items() if isinstance(values, dict) else ((name, one) for one in values)
        for key, value in inner:
            yield from shown(value, str(key))
            yield from figures(str(key))
    elif isinstance(values, int | float) and not isinstance(values, bool):
        yield from {str(values), f"{values:,}", f"{values:.6f}"}
        if name == "duration_ms":
            yield from figures(duration(values / 1000))
        elif name == "seconds":
            yield from figures(duration(values))
        elif name.startswith("cost"):
            yield from figures(_money(values))
        elif name.endswith("bytes"):
            yield from figures(size(int(values)))


def strings(values: Any) -> Iterator[str]:
    """Each text in a result: a name, a path, a reason."""
    if isinstance(values, dict | list):
        for one in [*values, *values.values()] if isinstance(values, dict) else values:
            yield from strings(one)
    elif isinstance(values, str):
        yield values


def missing(text: str, values: dict[str, Any]) -> set[str]:
    """The figures of a text that a result as JSON does not hold."""
    for name in sorted(strings(values), key=len, reverse=True):
        if len(name) > 2:
            text = text.replace(name, " ")
    return figures(text) - set(shown(values))


def test_a_figure_that_json_does_not_hold_is_found() -> None:
    values = {"rows": 1234, "duration_ms": 2100, "path": "/a/17", "by": {"x": 3}, "all": [5, 5]}

    assert missing("/a/17 has 1,234 rows, 3 in 2.1 s; 2 runs", values) == set()
    assert missing("1,234 rows, 17 skipped", values) == {"17"}


def rows() -> list[Memory]:
    """Rows of every kind, no two kinds as many."""
    kinds: list[tuple[int, dict[str, Any]]] = [
        (23, {"namespace": "notes", "embedding": b"\1" + bytes(12), "embedding_dim": 3}),
        (11, {"namespace": "people", "embedding": b"\1" + bytes(20), "embedding_dim": 5}),
        (7, {}),
        (4, {"encrypted_envelope": b"e", "embedding": b"\1" + bytes(12), "embedding_dim": 3}),
        (2, {"content": "x" * 70_000}),
        (3, {"content": POISON, "namespace": "notes"}),
    ]
    return [
        memory(f"{kind}-{at:02}", **{"content": f"text {kind} {at}", **values})
        for kind, (count, values) in enumerate(kinds)
        for at in range(count)
    ]


def compare(reembed: Call, path: Path, *arguments: str, code: int = 0, **more: Any) -> None:
    """Run a command that changes nothing as text and as JSON."""
    text = reembed(*arguments, "--db", path, **more)
    values = reembed(*arguments, "--db", path, "--json", **more).values

    assert text.code == code, text.err
    assert missing(_same_run(text.out, values), values) == set()


def _same_run(text: str, values: dict[str, Any]) -> str:
    """The text, with the run that it plans named as that of the JSON."""
    return re.sub(r"\d{8}T\d{6}Z-[0-9a-f]{4}", values.get("run_id", "no run"), text)


def both(reembed: Call, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Have a call of the program print its result as text, and keep it as JSON, from one run."""
    from reembed.pipeline import report
    from reembed.pipeline.selection import Report

    def text_and_json(plan: Any, outcome: Any) -> str:
        return f"{report.outcome_json(plan, outcome)}\n{text(plan, outcome)}"

    text = report.outcome_text
    monkeypatch.setattr(report, "outcome_text", text_and_json)
    plain = Report.__init__

    def init(self: Report, text: str, values: dict[str, Any], *rest: Any, **more: Any) -> None:
        plain(self, f"{json.dumps(values)}\n{text}", values, *rest, **more)

    monkeypatch.setattr(Report, "__init__", init)
    return reembed


def test_all_figures_of_a_run_and_of_what_follows_it_are_in_the_json(
    reembed: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_store(tmp_path / "m.db", rows())
    compare(reembed, path, "--dry-run", window=16)
    compare(reembed, path, "status")
    call = both(reembed, monkeypatch)

    def check(*arguments: str, code: int = 0, **more: Any) -> dict[str, Any]:
        ran = call(*arguments, "--db", path, **more)
        line, _, text = ran.out.partition("\n")
        values: dict[str, Any] = json.loads(line)
        assert ran.code == code, ran.err
        assert text
        assert missing(text, values) == set()
        return values

    pilot = check("--max-rows", "19", range_rows=6)
    assert (pilot["staged"], pilot["embedded"] + pilot["skipped"]) == (19, 19)
    assert pilot["skipped"] == sum(pilot["skipped_by_cause"].values())
    check("status")
    run = check()
    assert (run["total"], run["skipped"]) == (50, 9)
    change(path, "UPDATE memories SET embedding = zeroblob(33) WHERE id IN ('0-01', '0-02')")
    verified = check("verify", code=1)
    assert (verified["findings"], verified["checked"]) == (sum(verified["wrong"].values()), 41)
    check("status")
    undone = check("rollback")
    assert (undone["restored"], undone["left"]) == (39, 2)
    check("--max-rows", "5", "--dim", "7")
    jam(path, "1-05")
    reembed("--db", path, "--namespace", "people", range_rows=2, rows_at_once=1, first_rows=2)
    unjam(path)
    check("status", code=6)
    check("--namespace", "people")
    cleaned = check("cleanup")
    assert (len(cleaned["removed"]), len(cleaned["kept"])) == (1, 2)


def test_a_pilot_counts_the_rows_that_it_skipped(reembed: Call, tmp_path: Path) -> None:
    path = make_store(tmp_path / "m.db", rows())

    pilot = reembed("--db", path, "--max-rows", "50", "--dim", "9", "--json", range_rows=49)

    assert pilot.values["skipped_by_cause"] == {
        "encrypted": 4,
        "over the byte cap": 2,
        "rejected by the model": 3,
    }
    assert (pilot.values["skipped"], pilot.values["embedded"]) == (9, 41)
