"""The program as its user meets it: flags, output, exit codes, signals."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from inline_snapshot import snapshot

from reembed.pipeline.cli import COMMANDS, _command_parser, _parser
from reembed.pipeline.options import RUNNERS, Options
from reembed.transforms.staging import RunDirectory
from reembed.transforms.stores.codec import decode
from reembed.transforms.stores.demo import generated_memories, hashed_vector
from tests.conftest import (
    ROOT,
    Call,
    Program,
    change,
    clean_environment,
    files,
    make_store,
    memory,
    select,
    unpack,
)
from tests.test_bad_input import refusal, tree
from tests.wording import wording

FLAGS = {f"--{field.name.replace('_', '-')}" for field in fields_of(Options)} - {
    "--beam-options"
} | {"--version"}
HEAVY = {"apache_beam", "torch", "sentence_transformers", "transformers"}
STOP_SECONDS = 3
"""How soon a run stops that is interrupted."""


def test_help_names_every_flag_in_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The README shows all of it, which `tests/test_docs.py` compares."""
    monkeypatch.setenv("COLUMNS", "80")

    text = _parser().format_help()

    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert set(re.findall(r"^  (--[a-z-]+)", text, re.M)) == FLAGS
    assert set(re.findall(r"\[(--[a-z-]+)", text)) == FLAGS
    assert [name for name in RUNNERS if name not in text] == []


IMPORTING = """
import contextlib, io, json, sys
from reembed import __main__
from reembed.pipeline.cli import main

done = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code
    done.append([code, out.getvalue(), sorted(sys.modules)])
print(json.dumps(done))
"""
"""One process that does several things, and says what is imported after each."""


@pytest.mark.system
def test_what_is_heavy_is_imported_by_what_needs_it(tmp_path: Path, reembed: Call) -> None:
    path = make_store(tmp_path / "m.db", [memory(f"{i}") for i in range(5)])
    before = select(path, "SELECT * FROM memories")
    done = reembed("--db", path, "--json")
    assert done.code == 0
    other = unpack("v57", tmp_path / "ai-memory.db")
    helps = [["--help"], *([name, "--help"] for name in COMMANDS)]
    plans = [["--db", str(other), "--dry-run", *json_flag] for json_flag in (["--json"], [])]
    commands = [[name, "--db", str(path)] for name in COMMANDS]

    ran = subprocess.run(
        [sys.executable, "-c", IMPORTING, json.dumps([*helps, *plans, *commands])],
        env=clean_environment(tmp_path),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    results = [(code, out, set(modules)) for code, out, modules in json.loads(ran.stdout)]
    assert [code for code, _, _ in results] == [0] * 11
    *_, imported = results[len(helps) - 1]
    assert (HEAVY | {"numpy", "pyarrow", "argparse"}) & imported == {"argparse"}
    *_, imported = results[len(helps) + len(plans) - 1]
    assert (HEAVY | {"sqlite3", "tokenizers"}) & imported == {"sqlite3", "tokenizers"}
    # The fake embedder is all that `verify` needed here.
    *_, imported = results[-1]
    assert HEAVY & imported == set()
    said = {
        name: out.splitlines()[0] for name, (_, out, _) in zip(COMMANDS, results[-4:], strict=True)
    }
    assert re.fullmatch(rf"run {done.values['run_id']}, begun \S+", said.pop("status"))
    assert said.pop("cleanup").startswith("reembed: 1 runs removed, ")  # And how large it was.
    assert {name: wording(line, tmp_path) for name, line in said.items()} == snapshot(
        {
            "verify": "reembed verify: all is as the run left it",
            "rollback": "reembed: run RUN is rolled back",
        }
    )
    assert select(path, "SELECT * FROM memories") == before


@pytest.mark.system
def test_the_console_script_and_the_module_are_the_program(
    tmp_path: Path, reembed: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Path(sys.executable).with_name("reembed")
    from_script = [str(script)]
    if not script.exists():  # What it calls.
        from_script = [sys.executable, "-c", "from reembed.__main__ import entry; entry()"]
    environment = clean_environment(tmp_path) | {"COLUMNS": "80"}
    monkeypatch.setenv("COLUMNS", "80")

    shown, wrong = (
        subprocess.run(
            command,
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        for command in (
            [*from_script, "--help"],
            [sys.executable, "-m", "reembed", "--batch", "x"],
        )
    )

    assert (shown.returncode, shown.stdout, shown.stderr) == (0, _parser().format_help(), "")
    here = reembed("--batch", "x", real=True)
    assert len(here.err) > 0
    assert (wrong.returncode, wrong.stdout, wrong.stderr) == (here.code, here.out, here.err)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--frobnicate"], snapshot("unrecognized arguments: --frobnicate; see reembed --help")),
        (["-x"], snapshot("unrecognized arguments: -x; see reembed --help")),
        (
            ["ai-memory.db"],
            snapshot("unrecognized arguments: a word that belongs to no flag; see reembed --help"),
        ),
        (["--name", "notes"], snapshot("unrecognized arguments: --name; see reembed --help")),
        (["--dry"], snapshot("unrecognized arguments: --dry; see reembed --help")),
        (
            ["--dry-run", "--json=yes"],
            snapshot("argument --json: ignored explicit argument 'yes'; see reembed --help"),
        ),
        (["--db"], snapshot("argument --db: expected one argument; see reembed --help")),
        (
            ["--namespace"],
            snapshot("argument --namespace: expected one argument; see reembed --help"),
        ),
        (["--batch"], snapshot("argument --batch: expected one argument; see reembed --help")),
        (
            ["--batch", "many"],
            snapshot("argument --batch: invalid int value: 'many'; see reembed --help"),
        ),
        (
            ["--batch", "1.5"],
            snapshot("argument --batch: invalid int value: '1.5'; see reembed --help"),
        ),
        (["--batch", "-1"], snapshot("--batch must be from 0 (use the settings) to 10000: -1")),
        (
            ["--batch", "10001"],
            snapshot("--batch must be from 0 (use the settings) to 10000: 10001"),
        ),
        (["--dim", "0"], snapshot("--dim must be from 1 to 1000000: 0")),
        (["--dim", "-384"], snapshot("--dim must be from 1 to 1000000: -384")),
        (["--db", ""], snapshot("--db is empty; give a value, or leave it out")),
        (["--namespace", ""], snapshot("--namespace is empty; give a value, or leave it out")),
        (["--model", ""], snapshot("--model is empty; give a value, or leave it out")),
        (["--backend", ""], snapshot("--backend is empty; give a value, or leave it out")),
        (["--run-dir", ""], snapshot("--run-dir is empty; give a value, or leave it out")),
        (["--max-rows", "0"], snapshot("--max-rows must be a positive number of rows: 0")),
        (
            ["--partial"],
            snapshot("--partial goes with --max-rows, which says how many rows to take"),
        ),
        (
            ["--max-skipped", "many"],
            snapshot(
                "argument --max-skipped: 'many' is no share such as 10% or 0.1; see reembed --help"
            ),
        ),
        (
            ["--max-skipped", "101%"],
            snapshot("--max-skipped must be a share from 0 to 1, or from 0% to 100%: 1.01"),
        ),
        (["--skipped", "drop"], snapshot("--skipped must be one of keep, clear: 'drop'")),
        (["--sleep-ms", "-1"], snapshot("--sleep-ms must be 0 or more milliseconds: -1")),
        (["--base-url", ""], snapshot("--base-url is empty; give a value, or leave it out")),
        (["--in-flight", "33"], snapshot("--in-flight must be from 1 to 32 requests: 33")),
        (
            ["--give-up-after", "soon"],
            snapshot(
                "argument --give-up-after: 'soon' is no time such as 90s, 10m or 2h; see "
                "reembed --help"
            ),
        ),
        (["--timeout", "0m"], snapshot("--timeout must be a time of up to 30 days: 0.0")),
        (
            ["--timeout", "2d"],
            snapshot(
                "argument --timeout: '2d' is no time such as 90s, 10m or 2h; see reembed --help"
            ),
        ),
        (
            ["--max-tokens", "1e6"],
            snapshot("argument --max-tokens: invalid int value; see reembed --help"),
        ),
        (["--price-per-million", "-1"], snapshot("--price-per-million must be 0 or more: -1.0")),
        (
            ["--fresh", "--retry-skipped"],
            snapshot("--fresh and --retry-skipped exclude each other; give one of them"),
        ),
        (
            ["--missing-only", "--skip-current-space"],
            snapshot(
                "--missing-only and --skip-current-space exclude each other; give one of them"
            ),
        ),
        (
            ["--runner", "SparkRunner"],
            snapshot(
                "--runner SparkRunner is not one of DirectRunner, BundleBasedDirectRunner, "
                "DataflowRunner, FlinkRunner, FnApiRunner, PortableRunner; others were not "
                "tried"
            ),
        ),
        (
            ["--runner", "directrunner"],
            snapshot(
                "--runner directrunner is not one of DirectRunner, "
                "BundleBasedDirectRunner, DataflowRunner, FlinkRunner, FnApiRunner, "
                "PortableRunner; others were not tried"
            ),
        ),
        (
            ["--", "--frobnicate=1"],
            snapshot("Beam has no option --frobnicate; correct what stands after --"),
        ),
        (["--", "stray"], snapshot("Beam has no option stray; correct what stands after --")),
        (
            ["--", "--paralleli=4"],
            snapshot("Beam has no option --paralleli; correct what stands after --"),
        ),
        (
            ["--", "--parallelism=lots"],
            snapshot(
                "Beam refuses its options after --: argument --parallelism: invalid int "
                "value: 'lots'"
            ),
        ),
        (
            ["--", "--parallelism"],
            snapshot(
                "Beam refuses its options after --: argument --parallelism: expected one argument"
            ),
        ),
        (
            ["--", "--runner=FlinkRunner"],
            snapshot("--runner is not for Beam; give it before the --"),
        ),
        (["--", "--help"], snapshot("--help is not for Beam; give it before the --")),
    ],
)
@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_wrong_usage_is_refused_in_one_line_before_anything_is_looked_at(
    arguments: Sequence[str], says: str, dry: Sequence[str], tmp_path: Path, reembed: Call
) -> None:
    # A run with no more than this is refused because there is no database here.
    done = reembed(*dry, *arguments, real=True)

    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.error == says
    assert "no database was named" not in done.err
    assert "[while running" not in done.err
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_without_a_database_it_is_refused_and_none_is_made(
    dry: Sequence[str], tmp_path: Path, reembed: Call
) -> None:
    done = reembed(*dry, real=True)

    assert refusal(done, 2) == snapshot(
        "no database was named, and there is no ai-memory.db here; name one with --db or "
        "AI_MEMORY_DB"
    )
    assert tree(tmp_path) == {}


def mixed_store(path: Path) -> Path:
    """Rows of each kind: to embed, of exactly the cap, over it, encrypted, not UTF-8."""
    old: dict[str, Any] = {"embedding": hashed_vector("old", 4), "embedding_dim": 4}
    longest = 65_536 - len("title exact ")
    make_store(
        path,
        [
            memory("plain", **old),
            memory("second", namespace="notes"),
            memory("exact", "é " * (longest // 3) + "x" * (longest % 3), **old),
            memory("over", "x" * (65_537 - len("title over ")), **old),
            memory("far-over", "x" * 70_000, namespace="notes"),
            memory("sealed", "", encrypted_envelope=b"sealed", **old),
            memory("broken", **old),
        ],
    )
    change(path, "UPDATE memories SET content = CAST(x'666fff6f' AS TEXT) WHERE id = 'broken'")
    return path


def test_a_dry_run_counts_in_json_what_the_original_counted_and_more(
    tmp_path: Path, reembed: Call
) -> None:
    path = mixed_store(tmp_path / "ai-memory.db")
    before = tree(tmp_path)

    done = reembed("--db", path, "--dry-run", "--json", real=True)

    assert (done.code, done.out.count("\n")) == (0, 1)
    plan = done.values
    run_id, tokens = plan.pop("run_id"), plan.pop("tokens_estimated")
    assert plan == {
        "total_rows": 7,
        "rows_with_embeddings": 5,
        "rows_missing_embeddings": 2,
        "target_model": "all-MiniLM-L6-v2 (384-dim, local)",
        "target_dim": 384,
        "backend": "ollama",
        "schema_version": 1,
        "database": str(path),
        "store": {"kind": "ai-memory"},
        "namespace": None,
        "rows_by_namespace": {"global": 5, "notes": 2},
        "rows_by_stored_dim": {"4": 5},
        "rows_skipped_by_rule": {"encrypted": 1, "over the byte cap": 2},
        "rows_hidden": {},
        "texts_cut_estimated": 1,
        "rows_sampled": 3,
        "window": 256,
        "requests_estimated": None,
        "cost_estimated": None,
        "server": None,
        "settings": {
            "db": [str(path), "--db"],
            "tier": ["semantic", "default"],
            "backend": ["local", "default"],
            "model": ["all-MiniLM-L6-v2", "default"],
            "batch": ["100", "default"],
            "egress": ["allow", "default"],
        },
        "run_directory": f"{path}.reembed/{run_id}",
        "work_directory": None,
        "mode": "all",
        "rows_meant": 7,
        "rows_to_embed": 4,
        "rows_staged": 0,
        "readers_out_seconds": None,
        "sample_pairs": [],
        "warnings": [],
        "rows_held": None,
        "outside_in_old_space": None,
        "copies": [],
    }
    assert re.fullmatch(r"\d{8}T\d{6}Z-[0-9a-f]{4}", run_id)
    assert 256 < tokens < 512
    assert wording(done.err, tmp_path).splitlines() == snapshot(
        [
            "reembed: PRE-FLIGHT — stored embedding dims: [4]; target: 384-dim "
            "(all-MiniLM-L6-v2 (384-dim, local)); every scanned row's vector will be "
            "REPLACED",
            "reembed: NOTE — stored vectors of dimension 4 can't be compared with the "
            "target's 384; they are replaced all at once, and until then the store stays "
            "as it is",
        ]
    )
    assert tree(tmp_path) == before


def test_a_dry_run_counts_in_words_what_it_counts_in_json(tmp_path: Path, reembed: Call) -> None:
    path = mixed_store(tmp_path / "ai-memory.db")
    before = tree(tmp_path)

    done = reembed("--db", path, "--dry-run", real=True)

    assert done.code == 0
    head, _, table = wording(done.out, tmp_path).partition("\n\n")
    assert head == snapshot(
        "reembed plan: total_rows=7 rows_with_embeddings=5 rows_missing_embeddings=2 "
        "target_model='all-MiniLM-L6-v2 (384-dim, local)' target_dim=384 backend=ollama "
        "(dry-run: nothing written)"
    )
    assert table.splitlines() == snapshot(
        [
            "database         TMP/ai-memory.db",
            "store            an ai-memory database",
            "rows             7 (4 to embed)",
            "namespaces       global 5, notes 2",
            "stored vectors   4-dim 5, no vector 2",
            "skipped by rule  encrypted 1, over the byte cap 2",
            "target           all-MiniLM-L6-v2 (384-dim, local)",
            "tokens           about 357 (from a sample of 3 rows); about 1 texts are "
            "longer than the model's 256 tokens and are cut",
            "staged in        TMP/ai-memory.db.reembed/RUN",
            "",
            "settings, and where each came from:",
            "db       TMP/ai-memory.db (--db)",
            "tier     semantic (default)",
            "backend  local (default)",
            "model    all-MiniLM-L6-v2 (default)",
            "batch    100 (default)",
            "egress   allow (default)",
        ]
    )
    assert tree(tmp_path) == before


@pytest.mark.parametrize("dry", [["--dry-run"], []])
@pytest.mark.parametrize("kind", ["no rows", "no such namespace", "no part of a namespace"])
def test_where_no_row_is_meant_all_counts_are_zero_and_nothing_is_created(
    kind: str, dry: Sequence[str], tmp_path: Path, reembed: Call
) -> None:
    rows = [memory("a", namespace="global"), memory("b", namespace="notes/work")]
    path = make_store(tmp_path / "ai-memory.db", [] if kind == "no rows" else rows)
    name = {"no rows": None, "no such namespace": "absent", "no part of a namespace": "notes"}[kind]
    before = tree(tmp_path)

    chosen = [] if name is None else ["--namespace", name]
    done = reembed("--db", path, *chosen, *dry, "--json", real=True)
    text = reembed("--db", path, *chosen, *dry, real=True)

    said = {
        "no rows": snapshot("reembed: the store has no rows; nothing to do\n"),
        "no such namespace": snapshot(
            "WARN the namespace 'absent' has no rows; nothing to do (there are: 'global', "
            "'notes/work')\n"
        ),
        "no part of a namespace": snapshot(
            "WARN the namespace 'notes' has no rows; nothing to do (like it: 'notes/work')\n"
        ),
    }
    assert (done.code, done.err) == (0, text.err)
    assert (text.code, text.err) == (0, said[kind])
    result = done.values
    if dry:
        names = ("total_rows", "rows_with_embeddings", "rows_missing_embeddings")
        head = "reembed plan: total_rows=0 rows_with_embeddings=0 rows_missing_embeddings=0 "
    else:
        names = ("total", "reembedded", "skipped")
        head = "reembed: 0/0 re-embedded, 0 skipped "
    assert [result[name] for name in names] == [0, 0, 0]
    assert text.out.startswith(head)
    assert tree(tmp_path) == before


@pytest.mark.system
def test_each_row_that_is_skipped_is_named_once_and_keeps_its_vector(
    tmp_path: Path, reembed: Call
) -> None:
    path = mixed_store(tmp_path / "ai-memory.db")
    query = "SELECT id, embedding, embedding_dim FROM memories ORDER BY id"
    before = {key: rest for key, *rest in select(path, query)}

    done = reembed("--db", path, "--dim", "384", "--json", through_beam=True)

    assert (done.code, done.out.count("\n")) == (0, 1)
    result = done.values
    warnings = [line for line in done.err.splitlines() if "WARN" in line or "skipped" in line]
    assert [wording(line, tmp_path) for line in sorted(warnings)] == snapshot(
        [
            "WARN [RUN] skipped row broken: its text is not valid UTF-8 (previous vector kept)",
            "WARN [RUN] skipped row far-over: content 70015 bytes exceeds embed cap 65536 "
            "bytes (previous vector kept)",
            "WARN [RUN] skipped row over: content 65537 bytes exceeds embed cap 65536 "
            "bytes (previous vector kept)",
            "WARN [RUN] skipped row sealed: its content is encrypted (previous vector kept)",
        ]
    )
    assert warnings[0].startswith(f"WARN [{result['run_id']}] ")
    assert {name: result[name] for name in ("total", "reembedded", "skipped", "remaining")} == {
        "total": 7,
        "reembedded": 3,
        "skipped": 4,
        "remaining": 0,
    }
    assert result["skipped_by_cause"] == {
        "encrypted": 1,
        "not valid text": 1,
        "over the byte cap": 2,
    }
    skipped = ["broken", "far-over", "over", "sealed"]
    after = {key: rest for key, *rest in select(path, query)}
    assert {key: after[key] for key in skipped} == {key: before[key] for key in skipped}
    embedded = sorted(after.keys() - skipped)
    assert embedded == ["exact", "plain", "second"]
    assert [(len(after[key][0]), after[key][1]) for key in embedded] == [(1537, 384)] * 3


def test_the_size_of_a_batch_changes_neither_the_vectors_nor_the_shards(
    tmp_path: Path, reembed: Call, monkeypatch: pytest.MonkeyPatch, real_model: None
) -> None:
    rows = 40
    remove_shards = RunDirectory.remove_shards
    vectors: dict[str, dict[str, Any]] = {}
    shards: dict[str, dict[str, list[str]]] = {}
    for batch in ("1", "500"):
        path = make_store(tmp_path / f"{batch}.db", list(generated_memories(rows)))
        kept = tmp_path / f"kept-{batch}"

        def keep(run: RunDirectory, kept: Path = kept) -> None:
            """Copy what a run deletes when it has replaced the vectors."""
            shutil.copytree(run.shards, kept)
            remove_shards(run)

        monkeypatch.setattr(RunDirectory, "remove_shards", keep)
        done = reembed("--db", path, "--batch", batch, "--json", real=True)
        assert (done.code, done.values["reembedded"]) == (0, rows)
        stored = select(path, "SELECT id, embedding FROM memories")
        vectors[batch] = {key: decode(blob) for key, blob in stored}
        shards[batch] = {  # Without their checksums: the vectors differ in their last digits.
            path.name.rsplit(".", 2)[0]: pq.read_table(path).column("key").to_pylist()
            for path in sorted(kept.glob("*.parquet"))
        }

    assert [len(keys) for keys in shards["1"].values()] == [rows]
    assert sorted(key for keys in shards["1"].values() for key in keys) == sorted(vectors["1"])
    assert shards["1"] == shards["500"]
    assert vectors["1"].keys() == vectors["500"].keys()
    pairs = [(vectors["1"][key], vectors["500"][key]) for key in vectors["1"]]
    assert max(float(np.abs(one - other).max()) for one, other in pairs) <= 1e-6
    norms = [np.linalg.norm(one) * np.linalg.norm(other) for one, other in pairs]
    cosines = [float(one @ other / norm) for (one, other), norm in zip(pairs, norms, strict=True)]
    assert min(cosines) >= 0.999999


@contextmanager
def at_work(
    program: Sequence[str], path: Path, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """A run in a process of its own that has staged some of its rows."""
    with subprocess.Popen(
        [sys.executable, *program, "--db", str(path)],
        env=clean_environment(path.parent) | environment,
        cwd=path.parent,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            deadline = time.monotonic() + 60
            while not list(path.parent.glob("*.reembed/*/shards/*.parquet")):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            yield process
        finally:
            process.kill()


@pytest.mark.system
def test_a_second_run_is_refused_with_the_process_and_the_start_of_the_first_and_looking_is_not(
    tmp_path: Path, reembed: Call
) -> None:
    path = make_store(tmp_path / "ai-memory.db", [memory(f"{i:03d}") for i in range(200)])
    before = path.read_bytes()
    slow = {"FAKE_SECONDS": "0.5", "FAKE_RANGE_ROWS": "1"}
    with at_work(["-m", "tests.fake_program"], path, **slow) as first:
        done = reembed("--db", path)
        dry = reembed("--db", path, "--dry-run", "--json")
        status = reembed("status", "--db", path, "--json")
        cleanup = reembed("cleanup", "--db", path)

        assert first.poll() is None
    for refused in (done, cleanup):
        sentence = refusal(refused, 1)
        assert f"(process {first.pid}, since " in sentence
        without_time = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", "TIME", sentence)
        assert wording(without_time, tmp_path) == snapshot(
            "another run is at work on TMP/ai-memory.db (process N, since TIME); wait for it to end"
        )
    assert (dry.code, dry.values["total_rows"]) == (0, 200)
    (run,) = status.values["runs"]
    assert (status.code, run["state"], run["rows"]) == (0, "staging", 200)
    assert path.read_bytes() == before


REAL_IN_SMALL_RANGES = """
from reembed.pipeline import cli, plan
plan.RANGE_ROWS = 16
cli.entry()
"""
"""The program with the real model, which so has staged something soon."""


@pytest.mark.system
@pytest.mark.parametrize(
    ("program", "number", "code"),
    [
        (["-c", REAL_IN_SMALL_RANGES], signal.SIGINT, 130),
        (["-m", "tests.fake_program"], signal.SIGTERM, 143),
    ],
    ids=["the real model", "the fake"],
)
def test_a_run_that_is_interrupted_stops_soon_and_the_same_command_goes_on(
    program: Sequence[str], number: signal.Signals, code: int, tmp_path: Path, reembed: Call
) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "temporary").mkdir()
    path = make_store(tmp_path / "store" / "ai-memory.db", list(generated_memories(300)))
    before = path.read_bytes()
    environment = {"TMPDIR": str(tmp_path / "temporary"), "FAKE_SECONDS": "0.3"}
    with at_work(program, path, **environment) as process:
        process.send_signal(number)
        started = time.monotonic()
        stdout, stderr = process.communicate(timeout=10)
        elapsed = time.monotonic() - started

    assert (process.returncode, stdout) == (code, "")
    assert elapsed < STOP_SECONDS
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1] == snapshot(
        "reembed: interrupted; what is staged stays and the same command goes on from "
        "there (reembed status says how far it has come)"
    )
    assert path.read_bytes() == before
    assert sorted(place.name for place in path.parent.iterdir()) == [
        "ai-memory.db",
        "ai-memory.db.reembed",
    ]
    assert files(tmp_path / "temporary") == {}

    (run,) = reembed("status", "--db", path, "--json").values["runs"]
    assert (run["state"], run["stopped"], run["rows"]) == ("staging", "interrupted", 300)
    assert 0 < run["staged"] < 300
    if "tests.fake_program" in program:
        done = reembed("--db", path, "--json")
        assert f"{run['staged']} of 300 rows are staged; going on" in done.err
        assert (done.code, done.values["reembedded"]) == (0, 300)


# The commands that look after runs.

COMMAND_FLAGS = {
    "status": {"--db", "--run-dir", "--json"},
    "verify": {
        "--db",
        "--run-dir",
        "--run",
        "--model",
        "--backend",
        "--base-url",
        "--key-secret",
        "--insecure-key",
        "--json",
    },
    "rollback": {"--db", "--run-dir", "--run", "--json"},
    "cleanup": {"--db", "--run-dir", "--run", "--yes", "--json"},
}


def test_help_names_every_command() -> None:
    text = _parser().format_help()

    assert COMMANDS.keys() == COMMAND_FLAGS.keys()
    listed = text.partition("commands that look after runs")[2].partition("\n\n")[0]
    assert re.findall(r"^  (\w+)", listed, re.M) == list(COMMANDS)


@pytest.mark.parametrize("command", COMMAND_FLAGS)
def test_the_help_of_a_command_names_its_flags_in_80_columns(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")

    text = _command_parser(command).format_help()

    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert set(re.findall(r"^  (--[a-z-]+)", text, re.M)) == COMMAND_FLAGS[command]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["status", "--yes"], snapshot("unrecognized arguments: --yes; see reembed --help")),
        (["status", "--run", "x"], snapshot("unrecognized arguments: --run; see reembed --help")),
        (["verify", "--yes"], snapshot("unrecognized arguments: --yes; see reembed --help")),
        (
            ["rollback", "--backend", "openai"],
            snapshot("unrecognized arguments: --backend; see reembed --help"),
        ),
        (
            ["rollback", "--model", "m"],
            snapshot("unrecognized arguments: --model; see reembed --help"),
        ),
        (
            ["verify", "--key-secret", "sk-1"],
            snapshot(
                "--key-secret is no name of a secret; it is like "
                "projects/PROJECT/secrets/NAME/versions/latest"
            ),
        ),
        (
            ["rollback", "--base-url", "http://x"],
            snapshot("unrecognized arguments: --base-url; see reembed --help"),
        ),
        (["rollback", "now"], snapshot("unrecognized arguments: now; see reembed --help")),
        (
            ["rollback", "--run"],
            snapshot("argument --run: expected one argument; see reembed --help"),
        ),
        (
            ["rollback", "--", "--parallelism=4"],
            snapshot("unrecognized arguments: --parallelism; see reembed --help"),
        ),
        (["cleanup", "--run", ""], snapshot("--run is empty; give a value, or leave it out")),
        (
            ["cleanup", "--run-dir", ""],
            snapshot("--run-dir is empty; give a value, or leave it out"),
        ),
        (["cleanup", "--db", ""], snapshot("--db is empty; give a value, or leave it out")),
        (["--json", "status"], snapshot("unrecognized arguments: status; see reembed --help")),
        (["statuses"], snapshot("unrecognized arguments: statuses; see reembed --help")),
    ],
)
def test_wrong_usage_of_a_command_is_refused_in_one_line(
    arguments: Sequence[str], says: str, reembed: Call
) -> None:
    done = reembed(*arguments, real=True)

    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.error == says


@pytest.mark.system
@pytest.mark.parametrize(
    ("arguments", "unbuffered"),
    [(["--help"], ""), (["--dry-run"], "1"), (["--dry-run", "--json"], "")],
)
def test_output_that_nobody_reads_is_no_error(
    arguments: Sequence[str], unbuffered: str, tmp_path: Path
) -> None:
    path = unpack("v57", tmp_path / "ai-memory.db")
    before = tree(tmp_path)
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "reembed", "--db", str(path), *arguments],
            env=clean_environment(tmp_path) | {"PYTHONUNBUFFERED": unbuffered},
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        os.close(writer)

    assert [line for line in done.stderr.splitlines() if "PRE-FLIGHT" not in line] == []
    assert tree(tmp_path) == before


@pytest.mark.system
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_can_not_be_written_is_refused_in_one_line(
    unbuffered: str, tmp_path: Path
) -> None:
    path = unpack("v57", tmp_path / "ai-memory.db")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "reembed", "--db", str(path), "--dry-run"],
            env=clean_environment(tmp_path) | {"PYTHONUNBUFFERED": unbuffered},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )

    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert [line for line in done.stderr.splitlines() if "PRE-FLIGHT" not in line] == snapshot(
        [
            "reembed: error: done, but the result could not be written (No space left on "
            "device); this command wrote nothing to the store"
        ]
    )


def test_names_that_the_terminal_can_not_show_are_no_error(
    tmp_path: Path, program: Program
) -> None:
    path = make_store(tmp_path / "ai-memory.db", [memory("a", namespace="日本")])

    done = program("--db", path, "--dry-run", environment={"PYTHONIOENCODING": "latin-1"})

    assert "Traceback" not in done.stderr
    assert done.returncode == 0
    assert "rows             1 (1 to embed)" in done.stdout


@pytest.mark.system
def test_a_thread_of_beams_that_loses_its_connection_is_no_news(tmp_path: Path) -> None:
    program = """
import grpc, threading
from reembed.pipeline.cli import _quieten
_quieten()
def end(kind):
    raise kind(f"{kind.__name__} ended it")
for kind in (grpc.RpcError, ValueError):
    thread = threading.Thread(target=end, args=[kind])
    thread.start()
    thread.join()
"""

    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=clean_environment(tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )

    told = [kind for kind in ("RpcError", "ValueError") if f"{kind} ended it" in done.stderr]
    assert told == ["ValueError"]
