"""The program as its user meets it: flags, output, exit codes, signals."""

from __future__ import annotations

import json
import os
import re
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

from reembed.pipeline.cli import COMMANDS
from reembed.pipeline.options import RUNNERS, Options
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
from tests.test_bad_input import IMPORTS_LISTED, Done, imported, refusal, tree

FLAGS = {f"--{field.name.replace('_', '-')}" for field in fields_of(Options)} - {"--beam-options"}
HEAVY = {"apache_beam", "torch", "sentence_transformers", "transformers"}
INTERRUPTED = (
    "reembed: interrupted; what is staged stays and the same command goes on from there "
    "(reembed status says how far it has come)"
)
STOP_SECONDS = 3
"""How soon a run stops that is interrupted."""


def call_entry(*arguments: str) -> Done:
    """Call what the console script calls."""
    return subprocess.run(
        [sys.executable, "-c", "from reembed.pipeline.cli import entry; entry()", *arguments],
        env=clean_environment(Path.home()),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_help_names_every_flag_in_80_columns(program: Program) -> None:
    done = program("--help", environment={"COLUMNS": "80"})

    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    assert set(re.findall(r"^  (--[a-z-]+)", done.stdout, re.M)) == FLAGS
    assert set(re.findall(r"\[(--[a-z-]+)", done.stdout)) == FLAGS
    assert [name for name in RUNNERS if name not in done.stdout] == []


def test_help_imports_nothing_that_is_heavy(program: Program) -> None:
    done = program("--help", environment=IMPORTS_LISTED)

    assert done.returncode == 0
    assert (HEAVY | {"numpy", "pyarrow", "argparse"}) & imported(done) == {"argparse"}


@pytest.mark.parametrize("how", ["--json", "--dry-run"])
def test_a_dry_run_imports_neither_beam_nor_torch(
    how: str, tmp_path: Path, program: Program
) -> None:
    path = unpack("v57", tmp_path / "ai-memory.db")

    done = program("--db", path, "--dry-run", how, environment=IMPORTS_LISTED)

    assert done.returncode == 0
    assert (HEAVY | {"sqlite3", "tokenizers"}) & imported(done) == {"sqlite3", "tokenizers"}


@pytest.mark.parametrize("arguments", [["--help"], ["--batch", "x"]])
def test_the_console_script_is_the_module(arguments: Sequence[str], program: Program) -> None:
    script = Path(sys.executable).with_name("reembed")
    environment = {"COLUMNS": "80"}
    module = program(*arguments, environment=environment, anew=True)
    if script.exists():
        other = subprocess.run(
            [script, *arguments],
            env=clean_environment(Path.home()) | environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    else:
        other = call_entry(*arguments)

    assert len(module.stdout + module.stderr) > 0
    assert (other.returncode, other.stdout, other.stderr) == (
        module.returncode,
        module.stdout,
        module.stderr,
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["-x"], "unrecognized arguments: -x"),
        (["ai-memory.db"], "unrecognized arguments: a word that belongs to no flag;"),
        (["--name", "notes"], "unrecognized arguments: --name;"),
        (["--dry"], "unrecognized arguments: --dry"),
        (["--dry-run", "--json=yes"], "--json: ignored explicit argument 'yes'"),
        (["--db"], "argument --db: expected one argument"),
        (["--namespace"], "argument --namespace: expected one argument"),
        (["--batch"], "argument --batch: expected one argument"),
        (["--batch", "many"], "--batch: invalid int value: 'many'"),
        (["--batch", "1.5"], "--batch: invalid int value: '1.5'"),
        (["--batch", "-1"], "--batch must be from 0 (use the settings) to 10000: -1"),
        (["--batch", "10001"], "--batch must be from 0 (use the settings) to 10000: 10001"),
        (["--dim", "0"], "--dim must be from 1 to 1000000: 0"),
        (["--dim", "-384"], "--dim must be from 1 to 1000000: -384"),
        (["--db", ""], "--db is empty"),
        (["--namespace", ""], "--namespace is empty"),
        (["--model", ""], "--model is empty"),
        (["--backend", ""], "--backend is empty"),
        (["--run-dir", ""], "--run-dir is empty"),
        (["--max-rows", "0"], "--max-rows must be a positive number of rows: 0"),
        (["--partial"], "--partial goes with --max-rows"),
        (["--max-skipped", "many"], "argument --max-skipped: 'many' is no share such as 10%"),
        (["--max-skipped", "101%"], "--max-skipped must be a share from 0 to 1"),
        (["--skipped", "drop"], "--skipped must be one of keep, clear: 'drop'"),
        (["--sleep-ms", "-1"], "--sleep-ms must be 0 or more milliseconds: -1"),
        (["--base-url", ""], "--base-url is empty"),
        (["--in-flight", "33"], "--in-flight must be from 1 to 32 requests: 33"),
        (["--give-up-after", "soon"], "--give-up-after: 'soon' is no time such as 90s, 10m or 2h"),
        (["--timeout", "0m"], "--timeout must be a time of up to 30 days: 0.0"),
        (["--timeout", "2d"], "argument --timeout: '2d' is no time such as 90s, 10m or 2h"),
        (["--max-tokens", "1e6"], "argument --max-tokens: invalid int value;"),
        (["--price-per-million", "-1"], "--price-per-million must be 0 or more: -1.0"),
        (["--fresh", "--retry-skipped"], "--fresh and --retry-skipped exclude each other"),
        (
            ["--missing-only", "--skip-current-space"],
            "--missing-only and --skip-current-space exclude each other",
        ),
        (["--runner", "SparkRunner"], "--runner SparkRunner is not one of DirectRunner"),
        (["--runner", "directrunner"], "--runner directrunner is not one of DirectRunner"),
        (["--", "--frobnicate=1"], "Beam has no option --frobnicate;"),
        (["--", "stray"], "Beam has no option stray;"),
        (["--", "--paralleli=4"], "Beam has no option --paralleli;"),
        (["--", "--parallelism=lots"], "argument --parallelism: invalid int value: 'lots'"),
        (["--", "--parallelism"], "argument --parallelism: expected one argument"),
        (["--", "--runner=FlinkRunner"], "--runner"),
        (["--", "--help"], "--help"),
    ],
)
@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_wrong_usage_is_refused_in_one_line_before_anything_is_looked_at(
    arguments: Sequence[str], says: str, dry: Sequence[str], tmp_path: Path, reembed: Call
) -> None:
    # A run with no more than this is refused because there is no database here.
    done = reembed(*dry, *arguments, real=True)

    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert says in done.error
    assert "no database was named" not in done.err
    assert "[while running" not in done.err
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_without_a_database_it_is_refused_and_none_is_made(
    dry: Sequence[str], tmp_path: Path, program: Program
) -> None:
    done = program(*dry)

    assert refusal(done, 2) == (
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
    tmp_path: Path, program: Program
) -> None:
    path = mixed_store(tmp_path / "ai-memory.db")
    before = tree(tmp_path)

    done = program("--db", path, "--dry-run", "--json")

    assert (done.returncode, done.stdout.count("\n")) == (0, 1)
    plan = json.loads(done.stdout)
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
    assert done.stderr == (
        "reembed: PRE-FLIGHT — stored embedding dims: [4]; target: 384-dim (all-MiniLM-L6-v2 "
        "(384-dim, local)); every scanned row's vector will be REPLACED\n"
        "reembed: NOTE — stored vectors of dimension 4 can't be compared with the target's 384; "
        "they are replaced all at once, and until then the store stays as it is\n"
    )
    assert tree(tmp_path) == before


def test_a_dry_run_counts_in_words_what_it_counts_in_json(tmp_path: Path, program: Program) -> None:
    path = mixed_store(tmp_path / "ai-memory.db")
    before = tree(tmp_path)

    done = program("--db", path, "--dry-run")

    assert done.returncode == 0
    plan, _, settings = done.stdout.partition("\n\nsettings, and where each came from:\n")
    assert settings.splitlines()[0] == f"db       {path} (--db)"
    head, blank, *table = plan.splitlines()
    assert (head, blank) == (
        "reembed plan: total_rows=7 rows_with_embeddings=5 rows_missing_embeddings=2 "
        "target_model='all-MiniLM-L6-v2 (384-dim, local)' target_dim=384 backend=ollama "
        "(dry-run: nothing written)",
        "",
    )
    values = dict(re.split(r"  +", line, maxsplit=1) for line in table)
    tokens, staged = values.pop("tokens"), values.pop("staged in")
    assert values == {
        "database": str(path),
        "store": "an ai-memory database",
        "rows": "7 (4 to embed)",
        "namespaces": "global 5, notes 2",
        "stored vectors": "4-dim 5, no vector 2",
        "skipped by rule": "encrypted 1, over the byte cap 2",
        "target": "all-MiniLM-L6-v2 (384-dim, local)",
    }
    assert re.fullmatch(
        r"about \d+ \(from a sample of 3 rows\); about 1 texts are longer than the model's 256 "
        r"tokens and are cut",
        tokens,
    )
    assert staged.startswith(f"{path}.reembed/")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("dry", [["--dry-run"], []])
@pytest.mark.parametrize("kind", ["no rows", "no such namespace", "no part of a namespace"])
def test_where_no_row_is_meant_all_counts_are_zero_and_nothing_is_created(
    kind: str, dry: Sequence[str], tmp_path: Path, program: Program
) -> None:
    rows = [memory("a", namespace="global"), memory("b", namespace="notes/work")]
    path = make_store(tmp_path / "ai-memory.db", [] if kind == "no rows" else rows)
    name = {"no rows": None, "no such namespace": "absent", "no part of a namespace": "notes"}[kind]
    before = tree(tmp_path)

    chosen = [] if name is None else ["--namespace", name]
    done = program("--db", path, *chosen, *dry, "--json")
    text = program("--db", path, *chosen, *dry)

    said = "reembed: the store has no rows; nothing to do\n"
    if name is not None:
        near = "like it: 'notes/work'" if name == "notes" else "there are: 'global', 'notes/work'"
        said = f"WARN the namespace {name!r} has no rows; nothing to do ({near})\n"
    assert (done.returncode, done.stderr) == (0, said)
    assert (text.returncode, text.stderr) == (0, said)
    result = json.loads(done.stdout)
    if dry:
        names = ("total_rows", "rows_with_embeddings", "rows_missing_embeddings")
        head = "reembed plan: total_rows=0 rows_with_embeddings=0 rows_missing_embeddings=0 "
    else:
        names = ("total", "reembedded", "skipped")
        head = "reembed: 0/0 re-embedded, 0 skipped "
    assert [result[name] for name in names] == [0, 0, 0]
    assert text.stdout.startswith(head)
    assert tree(tmp_path) == before


def test_each_row_that_is_skipped_is_named_once_and_keeps_its_vector(
    tmp_path: Path, program: Program
) -> None:
    path = mixed_store(tmp_path / "ai-memory.db")
    query = "SELECT id, embedding, embedding_dim FROM memories ORDER BY id"
    before = {key: rest for key, *rest in select(path, query)}

    done = program("--db", path, "--json")

    reasons = {
        "over": "content 65537 bytes exceeds embed cap 65536 bytes",
        "far-over": "content 70015 bytes exceeds embed cap 65536 bytes",
        "sealed": "its content is encrypted",
        "broken": "its text is not valid UTF-8",
    }
    assert (done.returncode, done.stdout.count("\n")) == (0, 1)
    result = json.loads(done.stdout)
    warnings = [line for line in done.stderr.splitlines() if "WARN" in line or "skipped" in line]
    assert sorted(warnings) == sorted(
        f"WARN [{result['run_id']}] skipped row {key}: {reason} (previous vector kept)"
        for key, reason in reasons.items()
    )
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
    after = {key: rest for key, *rest in select(path, query)}
    assert {key: after[key] for key in reasons} == {key: before[key] for key in reasons}
    embedded = sorted(after.keys() - reasons)
    assert embedded == ["exact", "plain", "second"]
    assert [(len(after[key][0]), after[key][1]) for key in embedded] == [(1537, 384)] * 3


# Keeps the shards of a run, which it deletes when it has replaced the vectors.
KEEPING_SHARDS = """
import shutil, sys
from reembed.transforms.staging import RunDirectory

remove_shards = RunDirectory.remove_shards

def keep(run):
    shutil.copytree(run.shards, sys.argv.pop(1))
    remove_shards(run)

RunDirectory.remove_shards = keep
from reembed.pipeline.cli import main

sys.exit(main(sys.argv[2:]))
"""


def test_the_size_of_a_batch_changes_neither_the_vectors_nor_the_shards(tmp_path: Path) -> None:
    vectors: dict[str, dict[str, Any]] = {}
    shards: dict[str, dict[str, list[str]]] = {}
    for batch in ("1", "500"):
        path = make_store(tmp_path / f"{batch}.db", list(generated_memories(150)))
        kept = tmp_path / f"kept-{batch}"
        script = [sys.executable, "-c", KEEPING_SHARDS, str(kept)]
        done = subprocess.run(
            [*script, "--db", str(path), "--batch", batch, "--json"],
            env=clean_environment(tmp_path),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["reembedded"] == 150
        stored = select(path, "SELECT id, embedding FROM memories")
        vectors[batch] = {key: decode(blob) for key, blob in stored}
        shards[batch] = {  # Without their checksums: the vectors differ in their last digits.
            path.name.rsplit(".", 2)[0]: pq.read_table(path).column("key").to_pylist()
            for path in sorted(kept.glob("*.parquet"))
        }

    assert [len(keys) for keys in shards["1"].values()] == [150]
    assert sorted(key for keys in shards["1"].values() for key in keys) == sorted(vectors["1"])
    assert shards["1"] == shards["500"]
    assert vectors["1"].keys() == vectors["500"].keys()
    pairs = [(vectors["1"][key], vectors["500"][key]) for key in vectors["1"]]
    assert max(float(np.abs(one - other).max()) for one, other in pairs) <= 1e-6
    norms = [np.linalg.norm(one) * np.linalg.norm(other) for one, other in pairs]
    cosines = [float(one @ other / norm) for (one, other), norm in zip(pairs, norms, strict=True)]
    assert min(cosines) >= 0.999999


@contextmanager
def at_work(module: str, path: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A run in a process of its own that has staged some of its rows."""
    with subprocess.Popen(
        [sys.executable, "-m", module, "--db", str(path)],
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


def test_a_second_run_is_refused_with_the_process_and_the_start_of_the_first_and_looking_is_not(
    tmp_path: Path, fake_program: Program
) -> None:
    path = make_store(tmp_path / "ai-memory.db", [memory(f"{i:03d}") for i in range(200)])
    before = path.read_bytes()
    with at_work("tests.fake_program", path, FAKE_SECONDS="0.5", FAKE_RANGE_ROWS="1") as first:
        done = fake_program("--db", path)
        dry = fake_program("--db", path, "--dry-run", "--json")
        status = fake_program("status", "--db", path, "--json")
        cleanup = fake_program("cleanup", "--db", path)

        assert first.poll() is None
    said = (
        rf"another run is at work on {path} \(process {first.pid}, since "
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC\); wait for it to end"
    )
    assert re.fullmatch(said, refusal(done, 1))
    assert re.fullmatch(said, refusal(cleanup, 1))
    assert (dry.returncode, json.loads(dry.stdout)["total_rows"]) == (0, 200)
    (run,) = json.loads(status.stdout)["runs"]
    assert (status.returncode, run["state"], run["rows"]) == (0, "staging", 200)
    assert path.read_bytes() == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("module", ["reembed", "tests.fake_program"])
def test_a_run_that_is_interrupted_stops_soon_and_the_same_command_goes_on(
    module: str, number: signal.Signals, code: int, tmp_path: Path, fake_program: Program
) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "temporary").mkdir()
    path = make_store(tmp_path / "store" / "ai-memory.db", list(generated_memories(2000)))
    before = path.read_bytes()
    environment = {"TMPDIR": str(tmp_path / "temporary"), "FAKE_SECONDS": "0.3"}
    with at_work(module, path, **environment) as process:
        process.send_signal(number)
        started = time.monotonic()
        stdout, stderr = process.communicate(timeout=10)
        elapsed = time.monotonic() - started

    print(f"stopped after {elapsed:.2f} s")
    assert (process.returncode, stdout) == (code, "")
    assert elapsed < STOP_SECONDS
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1] == INTERRUPTED
    assert path.read_bytes() == before
    assert sorted(place.name for place in path.parent.iterdir()) == [
        "ai-memory.db",
        "ai-memory.db.reembed",
    ]
    assert files(tmp_path / "temporary") == {}

    status = fake_program("status", "--db", path, "--json")
    (run,) = json.loads(status.stdout)["runs"]
    assert (run["state"], run["stopped"], run["rows"]) == ("staging", "interrupted", 2000)
    assert 0 < run["staged"] < 2000
    if module == "tests.fake_program":
        done = fake_program("--db", path, "--json")
        assert f"{run['staged']:,} of 2,000 rows are staged; going on" in done.stderr
        assert (done.returncode, json.loads(done.stdout)["reembedded"]) == (0, 2000)


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


def test_help_names_every_command(program: Program) -> None:
    text = program("--help").stdout

    assert COMMANDS.keys() == COMMAND_FLAGS.keys()
    listed = text.partition("commands that look after runs")[2].partition("\n\n")[0]
    assert re.findall(r"^  (\w+)", listed, re.M) == list(COMMANDS)


@pytest.mark.parametrize("command", COMMAND_FLAGS)
def test_the_help_of_a_command_names_its_flags_in_80_columns(
    command: str, program: Program
) -> None:
    done = program(command, "--help", environment={"COLUMNS": "80"} | IMPORTS_LISTED)

    assert done.returncode == 0
    assert [line for line in done.stdout.splitlines() if len(line) > 80] == []
    assert set(re.findall(r"^  (--[a-z-]+)", done.stdout, re.M)) == COMMAND_FLAGS[command]
    assert (HEAVY | {"numpy", "pyarrow", "argparse"}) & imported(done) == {"argparse"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["status", "--yes"], "unrecognized arguments: --yes"),
        (["status", "--run", "x"], "unrecognized arguments: --run;"),
        (["verify", "--yes"], "unrecognized arguments: --yes"),
        (["rollback", "--backend", "openai"], "unrecognized arguments: --backend;"),
        (["rollback", "--model", "m"], "unrecognized arguments: --model;"),
        (["verify", "--key-secret", "sk-1"], "--key-secret is no name of a secret; it is like"),
        (["rollback", "--base-url", "http://x"], "unrecognized arguments: --base-url;"),
        (["rollback", "now"], "unrecognized arguments: now"),
        (["rollback", "--run"], "argument --run: expected one argument"),
        (["rollback", "--", "--parallelism=4"], "--parallelism"),
        (["cleanup", "--run", ""], "--run is empty"),
        (["cleanup", "--run-dir", ""], "--run-dir is empty"),
        (["cleanup", "--db", ""], "--db is empty"),
        (["--json", "status"], "unrecognized arguments: status"),
        (["statuses"], "unrecognized arguments: statuses"),
    ],
)
def test_wrong_usage_of_a_command_is_refused_in_one_line(
    arguments: Sequence[str], says: str, reembed: Call
) -> None:
    done = reembed(*arguments, real=True)

    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert says in done.error


def test_the_commands_of_one_run_by_their_exit_codes_and_what_they_import(
    tmp_path: Path, program: Program, fake_program: Program
) -> None:
    path = make_store(tmp_path / "ai-memory.db", [memory(f"{i}") for i in range(5)])
    before = select(path, "SELECT * FROM memories")
    done = fake_program("--db", path, "--json")
    assert done.returncode == 0
    listed = {name: program(name, "--db", path, environment=IMPORTS_LISTED) for name in COMMANDS}
    results = {name: call.stdout.splitlines()[0] for name, call in listed.items()}
    run_id = json.loads(done.stdout)["run_id"]

    assert {name: call.returncode for name, call in listed.items()} == dict.fromkeys(COMMANDS, 0)
    assert re.fullmatch(rf"run {run_id}, begun \S+", results["status"])
    assert results["verify"] == "reembed verify: all is as the run left it"
    assert results["rollback"] == f"reembed: run {run_id} is rolled back"
    assert results["cleanup"].startswith("reembed: 1 runs removed, ")
    assert select(path, "SELECT * FROM memories") == before
    # The fake embedder is all that `verify` needed here.
    for name, call in listed.items():
        assert (name, HEAVY & imported(call)) == (name, set())


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--help"], ["--dry-run"], ["--dry-run", "--json"]])
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
    lines = [line for line in done.stderr.splitlines() if "PRE-FLIGHT" not in line]
    assert [line.startswith("reembed: error: ") for line in lines] == [True]


def test_names_that_the_terminal_can_not_show_are_no_error(
    tmp_path: Path, program: Program
) -> None:
    path = make_store(tmp_path / "ai-memory.db", [memory("a", namespace="日本")])

    done = program("--db", path, "--dry-run", environment={"PYTHONIOENCODING": "latin-1"})

    assert "Traceback" not in done.stderr
    assert done.returncode == 0
    assert "rows             1 (1 to embed)" in done.stdout


@pytest.mark.parametrize(("kind", "told"), [("grpc.RpcError", False), ("ValueError", True)])
def test_a_thread_of_beams_that_loses_its_connection_is_no_news(
    kind: str, told: bool, tmp_path: Path
) -> None:
    program = (
        "import grpc, threading\nfrom reembed.pipeline.cli import _quieten\n_quieten()\n"
        f"def end():\n    raise {kind}('it ended')\n"
        "thread = threading.Thread(target=end)\nthread.start()\nthread.join()"
    )

    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=clean_environment(tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )

    assert ("it ended" in done.stderr) == told
