"""Whole runs with a model behind a real server: its faults, its limits, keys, cost and outages."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from reembed.transforms import embedders
from reembed.transforms.embedders import PROBE_TEXTS, pace
from reembed.transforms.embedders import http as http_embedder
from reembed.transforms.embedders.fake import FakeEmbedder
from reembed.transforms.staging import find_runs, read_shards
from reembed.transforms.stores import decode
from tests.conftest import (
    ROOT,
    Call,
    Program,
    Scenario,
    Serve,
    change,
    clean_environment,
    kept_files,
    make_store,
    memory,
    select,
    unpack,
)

KEY = "sk-a-key-that-must-not-be-seen-0123456789"
DIMENSION = 8


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Wait little."""
    monkeypatch.setattr(pace, "FIRST_WAIT_SECONDS", 0.02)
    monkeypatch.setattr(pace, "MOST_WAIT_SECONDS", 0.2)
    yield
    embedders._load.cache_clear()


def at(scenario: Scenario, model: str = "a-model") -> list[str]:
    return ["--backend", "openai-compatible", "--base-url", scenario.url, "--model", model]


def fake_at(scenario: Scenario) -> list[str]:
    return [*at(scenario), "--dim", str(DIMENSION)]


def store_of(path: Path, count: int) -> Path:
    return make_store(path, [memory(f"{number:04d}") for number in range(count)])


def text_of(number: int) -> str:
    return f"title {number:04d} content {number:04d}"


def stored(path: Path) -> dict[str, bytes | None]:
    return dict(select(path, "SELECT id, embedding FROM memories ORDER BY id"))


def right(numbers: Sequence[int]) -> dict[str, bytes]:
    vectors = FakeEmbedder(DIMENSION).embed([text_of(number) for number in numbers])
    return {
        f"{number:04d}": b"\x01" + vector.tobytes()
        for number, vector in zip(numbers, vectors, strict=True)
    }


def all_vectors(path: Path) -> np.ndarray[Any, Any]:
    return np.stack([decode(vector or b"") for vector in stored(path).values()])


def status(code: int, **more: Any) -> dict[str, Any]:
    return {"kind": "status", "status": code, **more}


ONE = "title 0004"
FAULTS: list[tuple[dict[str, Any], bool]] = [
    # The fault, and whether the row 4 can't be embedded for it.
    (status(429, headers={"Retry-After": "0.1"}, of=3), False),
    (status(503, after=3, times=3), False),
    (status(500, after=3, times=1), False),
    (status(502, after=3, times=9), False),
    (status(400, on=ONE), True),
    (status(413, on=ONE), True),
    (status(422, on=ONE), True),
    (status(500, on=ONE), True),
    ({"kind": "short", "on": ONE}, True),
    ({"kind": "shuffled"}, False),
    ({"kind": "duplicate", "after": 5, "times": 2}, False),
    ({"kind": "nan", "on": ONE}, True),
    ({"kind": "null", "on": ONE}, True),
    ({"kind": "zeros", "on": ONE}, True),
    ({"kind": "wrong length", "on": ONE}, True),
    ({"kind": "html", "after": 5, "times": 3}, False),
    ({"kind": "html", "on": ONE}, True),
    ({"kind": "cut", "after": 5, "times": 3}, False),
    ({"kind": "cut", "on": ONE}, True),
    ({"kind": "drip", "on": ONE, "seconds": 0.01}, True),
    ({"kind": "hang", "on": ONE, "seconds": 9}, True),
    ({"kind": "gzip"}, False),
]


@pytest.mark.parametrize(("fault", "fails"), FAULTS, ids=[json.dumps(fault) for fault, _ in FAULTS])
def test_whatever_the_server_does_the_vectors_are_right_or_the_row_is_named(
    fault: Mapping[str, Any], fails: bool, reembed: Call, serve: Serve, tmp_path: Path
) -> None:
    path = store_of(tmp_path / "m.db", 12)
    scenario = serve(faults=[fault])
    clean = serve()

    done = reembed(
        "--db", path, *at(scenario, "all-MiniLM-L6-v2"), "--batch", 5, "--timeout", "2s", real=True
    )
    other = store_of(tmp_path / "other.db", 12)
    reembed("--db", other, *at(clean, "all-MiniLM-L6-v2"), real=True)

    assert done.code == 0
    assert ("skipped row 0004: " in done.err) == fails
    expected = stored(other) | ({"0004": None} if fails else {})
    assert stored(path) == expected
    assert scenario.log()["alone"].get(text_of(4), 0) <= 2


RUNNERS = [
    ["--runner", "DirectRunner"],
    ["--runner", "BundleBasedDirectRunner"],
    ["--runner", "PortableRunner", "--", "--job_endpoint=embed", "--environment_type=LOOPBACK"],
]


@pytest.mark.parametrize("runner", RUNNERS, ids=lambda runner: str(runner[1]))
def test_several_requests_are_in_flight_on_each_runner(
    runner: Sequence[str], reembed: Call, serve: Serve, tmp_path: Path
) -> None:
    path = store_of(tmp_path / "m.db", 900)
    scenario = serve(dimension=DIMENSION, seconds=0.1, faults=[status(400, on="title 0007")])

    done = reembed("--db", path, *fake_at(scenario), *runner, real=True)

    assert done.code == 0
    numbers = [number for number in range(900) if number != 7]
    assert stored(path) == right(numbers) | {"0007": None}
    assert scenario.log()["most_at_once"] >= 4


def test_the_model_here_and_behind_a_server_gives_equal_vectors(
    program: Program, serve: Serve, tmp_path: Path
) -> None:
    paths = [unpack("v80", tmp_path / name) for name in ("here.db", "there.db")]
    there = [*at(serve(), "all-minilm"), "--json"]

    for path, flags in zip(paths, ([], there), strict=True):
        done = program("--db", path, "--namespace", "notes", *flags)
        assert done.returncode == 0, done.stderr

    query = "SELECT embedding FROM memories WHERE namespace = 'notes' ORDER BY id"
    here, served = (np.stack([decode(v) for (v,) in select(path, query)]) for path in paths)
    assert len(here) == 32
    assert np.sum(here * served, axis=1).min() > 0.999999


def test_a_run_that_is_killed_sends_no_text_twice_but_those_in_flight(
    serve: Serve, tmp_path: Path
) -> None:
    path = store_of(tmp_path / "m.db", 3_000)
    scenario = serve(dimension=DIMENSION, seconds=0.15)
    command = [sys.executable, "-m", "reembed", "--db", str(path), *fake_at(scenario)]
    command += ["--in-flight", "2"]
    environment = clean_environment(tmp_path)
    first = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.DEVNULL)
    while len(scenario.log()["answered"]) < 1_000:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    [(run, _)] = find_runs(path)
    staged = {
        row.key
        for shards in run.list_shards().values()
        for row in read_shards(shards, with_vectors=False)
    }
    assert 500 < len(staged) < 3_000
    assert not any(stored(path).values())

    again = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert again.returncode == 0, again.stderr
    assert f"reembed: {len(staged):,} of 3,000 rows are staged; going on" in again.stderr
    assert stored(path) == right(range(3_000))
    # Each process asks for three texts of its first request once more, alone.
    texts = Counter(scenario.log()["texts"]) - Counter(scenario.log()["alone"])
    twice = {text for text, times in texts.items() if times > 1 and text not in PROBE_TEXTS}
    assert twice.isdisjoint(text_of(int(key)) for key in staged)
    # Two requests of 100 texts, and what was answered of the two ranges that they are of.
    assert len(twice) <= 2 * 100
    assert max(texts[text] for text in twice | {text_of(0)}) <= 2


def test_an_outage_keeps_what_is_staged_and_the_same_command_goes_on(
    reembed: Call, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Else it may come while the first requests wait for the look at one of them.
    monkeypatch.setattr(http_embedder, "PROBED_TOGETHER", 10**9)
    path = store_of(tmp_path / "m.db", 600)
    down = serve(dimension=DIMENSION, faults=[status(503, after=8)])
    before = path.read_bytes()

    gone = reembed("--db", path, *fake_at(down), "--give-up-after", "1s", real=True)

    assert gone.code == 1
    assert re.search(
        r"the server at 127.0.0.1:\d+ gives no right answer \(HTTP 503\), tried for \d s of 1 s; "
        "what is staged stays: the same command goes on",
        gone.error,
    )
    assert path.read_bytes() == before
    well = serve(dimension=DIMENSION)
    done = reembed("--db", path, *fake_at(well), real=True)
    assert (done.code, stored(path)) == (0, right(range(600)))
    sent = well.log()["texts"].keys() - set(PROBE_TEXTS)
    answered = down.log()["answered"].keys() - set(PROBE_TEXTS)
    assert answered
    assert sent == {text_of(number) for number in range(600)} - answered


def test_a_key_that_is_refused_half_way_ends_the_run_and_keeps_what_is_staged(
    reembed: Call, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_embedder, "PROBED_TOGETHER", 10**9)  # No texts asked for alone.
    path = store_of(tmp_path / "m.db", 600)
    scenario = serve(dimension=DIMENSION, faults=[status(401, after=8)])

    done = reembed("--db", path, *fake_at(scenario), "--in-flight", "4", real=True)

    assert done.code == 1
    assert "refuses the key (HTTP 401); it was sent none: set one; what is staged" in done.error
    # Each of the four in flight may ask twice, and one more may start as the first gives up.
    assert scenario.log()["requests"] <= 8 + 3 * 4


def test_the_spending_stops_before_the_limit_and_the_next_run_goes_on(
    reembed: Call, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_embedder, "PROBED_TOGETHER", 10**9)  # No texts asked for alone.
    path = store_of(tmp_path / "m.db", 600)
    scenario = serve(dimension=DIMENSION)
    flags = ["--db", path, *fake_at(scenario), "--price-per-million", 2, "--batch", 20]

    stopped = reembed(*flags, "--max-tokens", 3_000, real=True)

    assert stopped.code == 1
    assert "stopped, since the next request would pass --max-tokens 3000" in stopped.error
    spent = scenario.log()["tokens"]
    assert 1_500 < spent <= 3_000
    assert not any(stored(path).values())
    done = reembed(*flags, "--json", real=True)
    assert (done.code, stored(path)) == (0, right(range(600)))
    assert done.values["tokens"] == 600 * 6
    assert done.values["cost"] == 600 * 6 * 2 / 1e6
    texts = Counter(scenario.log()["texts"]) - Counter(scenario.log()["alone"])
    assert {times for text, times in texts.items() if text not in PROBE_TEXTS} == {1}


def test_a_pilot_ends_with_a_forecast(reembed: Call, serve: Serve, tmp_path: Path) -> None:
    path = store_of(tmp_path / "m.db", 600)
    flags = ["--db", path, *fake_at(serve(dimension=DIMENSION)), "--max-rows", 60]

    first = reembed(*flags, "--price-per-million", 10, "--json", real=True)

    assert (first.code, first.values["staged"]) == (0, 60)
    forecast = first.values["forecast"]
    assert (forecast["rows"], forecast["tokens"]) == (540, 540 * 6)
    assert forecast["cost"] == 540 * 6 * 10 / 1e6
    assert forecast["seconds"] >= 0
    second = reembed(*flags, "--price-per-million", 10, real=True)
    assert re.search(
        r"\nforecast +480 rows are left, about \S+ s at this pace, about 2,880 tokens, 0.029\n",
        second.out,
    )


def test_a_dry_run_sends_no_rows_text_and_asks_only_for_what_it_can_not_know(
    reembed: Call, serve: Serve, tmp_path: Path
) -> None:
    path = store_of(tmp_path / "m.db", 5)
    known, unknown = serve(), serve()
    before = kept_files(tmp_path)

    plan = reembed("--db", path, *at(known, "nomic-embed-text"), "--dry-run", "--json", real=True)
    other = reembed("--db", path, *at(unknown, "my-own"), "--dry-run", "--json", real=True)

    assert (plan.values["target_dim"], other.values["target_dim"]) == (768, 384)
    assert known.log()["requests"] == 0
    assert unknown.log()["texts"].keys() == {PROBE_TEXTS[0]}
    assert kept_files(tmp_path) == before


def test_the_plan_says_where_each_value_came_from_and_what_it_will_cost(
    reembed: Call, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store_of(tmp_path / "m.db", 600)
    scenario = serve()
    config = tmp_path / ".config" / "ai-memory" / "config.toml"
    config.parent.mkdir(parents=True)
    config.write_text(
        '[embeddings]\nbackend = "openai"\nmodel = "text-embedding-3-small"\n'
        f'base_url = "{scenario.url}"\napi_key_env = "MY_KEY"\n'
    )
    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.setenv("AI_MEMORY_EMBED_BACKFILL_BATCH", "50")

    plan = reembed("--db", path, "--dry-run", "--json", "--price-per-million", 0.02, real=True)

    assert plan.values["settings"] == {
        "db": [str(path), "--db"],
        "tier": ["semantic", "default"],
        "backend": ["openai", f"[embeddings] backend in {config}"],
        "base_url": [scenario.url.rpartition("/")[0], f"[embeddings] base_url in {config}"],
        "model": ["text-embedding-3-small", f"[embeddings] model in {config}"],
        "key": ["in MY_KEY", f"[embeddings] api_key_env in {config}"],
        "batch": ["50", "AI_MEMORY_EMBED_BACKFILL_BATCH"],
        "egress": ["allow", "default"],
    }
    assert plan.values["target_dim"] == 1536
    assert plan.values["requests_estimated"] == 12
    assert plan.values["cost_estimated"] == plan.values["tokens_estimated"] * 0.02 / 1e6
    assert f"the texts of 600 rows go to {scenario.url.split('/')[2]}" in plan.err
    assert KEY not in plan.out + plan.err
    assert scenario.log()["requests"] == 0


@pytest.mark.parametrize("egress", ["deny", "loopback-only", "internal-only"])
def test_what_may_not_be_sent_is_not_sent(
    egress: str, reembed: Call, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store_of(tmp_path / "m.db", 5)
    scenario = serve(dimension=DIMENSION)
    monkeypatch.setenv("AI_MEMORY_INFERENCE_EGRESS", egress)

    done = reembed("--db", path, *fake_at(scenario), real=True)

    assert done.code == (3 if egress == "deny" else 0)
    assert bool(scenario.log()["requests"]) == (egress != "deny")


def test_another_prefix_is_not_mixed_with_what_is_staged(
    reembed: Call, serve: Serve, tmp_path: Path
) -> None:
    path = store_of(tmp_path / "m.db", 300)
    flags = ["--db", path, *fake_at(serve(dimension=DIMENSION)), "--max-rows", 10]
    assert reembed(*flags, real=True).code == 0

    other = reembed(*flags, "--document-prefix", "passage: ", real=True)

    assert other.code == 1
    assert "its prompt was '' and is 'passage: ' now" in other.error


def test_another_model_under_the_same_name_is_not_mixed_with_what_is_staged(
    reembed: Call, serve: Serve, tmp_path: Path
) -> None:
    path = store_of(tmp_path / "m.db", 300)
    first, second = serve(dimension=384), serve()
    for scenario, code in ((first, 0), (second, 1)):
        done = reembed("--db", path, *at(scenario), "--max-rows", 10, real=True)
        assert done.code == code
    assert "does not behave as it did when the run" in done.error


def test_equal_texts_are_sent_once_whatever_range_they_are_in(
    reembed: Call, serve: Serve, tmp_path: Path
) -> None:
    rows = [memory(f"{at:04d}", f"content {at % 3}", title="same") for at in range(900)]
    rows = [replace(row, namespace=f"of {at}") for at, row in enumerate(rows)]
    path = make_store(tmp_path / "m.db", rows)
    scenario = serve(dimension=DIMENSION, seconds=0.05)

    done = reembed("--db", path, *fake_at(scenario), real=True)

    assert done.code == 0
    texts = {text: count for text, count in scenario.log()["texts"].items() if "content" in text}
    assert texts == {f"same content {at}": 1 for at in range(3)}
    vectors = FakeEmbedder(DIMENSION).embed([f"same content {at % 3}" for at in range(900)])
    assert np.array_equal(all_vectors(path), vectors)


def test_vectors_of_two_models_are_never_put_into_the_store(
    reembed: Call, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_embedder, "PROBED_TOGETHER", 10**9)  # No texts asked for alone.
    path = store_of(tmp_path / "m.db", 300)
    # The same name, the same length, no outage: only its vectors tell.
    scenario = serve(dimension=DIMENSION, faults=[{"kind": "other vectors", "after": 8}])
    before = path.read_bytes()

    done = reembed("--db", path, *fake_at(scenario), real=True)

    assert done.code == 1
    assert "gives other vectors for the same texts now than when the run began" in done.error
    assert path.read_bytes() == before


def test_a_check_sends_no_text_where_none_may_be_sent_any_more(
    reembed: Call, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store_of(tmp_path / "m.db", 100)
    scenario = serve(dimension=DIMENSION)
    assert reembed("--db", path, *fake_at(scenario), real=True).code == 0
    monkeypatch.setenv("AI_MEMORY_EMBED_BACKEND", "openai-compatible")
    monkeypatch.setenv("AI_MEMORY_EMBED_BASE_URL", scenario.url)
    checked = reembed("verify", "--db", path, "--json", real=True)
    assert (checked.code, checked.values["sampled"]) == (0, 50)
    requests = scenario.log()["requests"]
    monkeypatch.setenv("AI_MEMORY_INFERENCE_EGRESS", "deny")

    done = reembed("verify", "--db", path, real=True)

    assert (done.code, scenario.log()["requests"]) == (0, requests)
    assert "sample          not checked: AI_MEMORY_INFERENCE_EGRESS is deny" in done.out


def test_the_spending_is_one_whatever_a_runner_repeats(
    reembed: Call, serve: Serve, tmp_path: Path
) -> None:
    path = store_of(tmp_path / "m.db", 600)
    scenario = serve(dimension=DIMENSION)
    flags = ["--max-tokens", 2_000, "--batch", 20, "--runner", "BundleBasedDirectRunner"]

    done = reembed("--db", path, *fake_at(scenario), *flags, real=True)

    assert done.code == 1
    assert 1_000 < scenario.log()["tokens"] <= 2_000


@pytest.mark.parametrize("kept", ["variable", "file"])
def test_the_key_is_nowhere_but_in_the_request(kept: str, serve: Serve, tmp_path: Path) -> None:
    path = store_of(tmp_path / "m.db", 300)
    faults = [status(400, on="title 0007", body=json.dumps({"error": f"no, {KEY}, no"}))]
    scenario = serve(dimension=DIMENSION, key=KEY, seconds=0.3, faults=faults)
    home = tmp_path / "home"
    environment = clean_environment(home)
    if kept == "variable":
        environment["AI_MEMORY_EMBED_API_KEY"] = KEY
    else:
        config = home / ".config" / "ai-memory" / "config.toml"
        config.parent.mkdir(parents=True)
        file = tmp_path / "elsewhere" / "key"
        file.parent.mkdir()
        file.write_text(KEY)
        file.chmod(0o400)
        config.write_text(f'[embeddings]\napi_key_file = "{file}"\n')
    process = subprocess.Popen(
        [sys.executable, "-m", "reembed", "--db", str(path), *fake_at(scenario)],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    shown: set[str] = set()
    while process.poll() is None:
        with suppress(psutil.Error):  # It may end meanwhile.
            its = psutil.Process(process.pid)
            shown.update(*(one.cmdline() for one in (its, *its.children(recursive=True))))
        time.sleep(0.1)
    out, err = process.communicate()

    assert process.returncode == 0, err
    assert b"skipped row 0007: HTTP 400: no, ***, no" in err
    assert scenario.log()["keys"] == [f"Bearer {KEY}"]
    assert "--base-url" in shown
    assert not any(KEY in argument for argument in shown)
    assert KEY.encode() not in out + err
    searched = kept_files(tmp_path / "m.db.reembed") | {"m.db": path.read_bytes()}
    assert len(searched) > 3
    assert not [name for name, content in searched.items() if KEY.encode() in content]


def test_a_missing_key_is_told_before_anything_is_done(
    reembed: Call, serve: Serve, tmp_path: Path
) -> None:
    path = store_of(tmp_path / "m.db", 5)
    config = tmp_path / ".config" / "ai-memory" / "config.toml"
    config.parent.mkdir(parents=True)
    config.write_text('[embeddings]\napi_key_env = "MY_KEY"\n')
    assert "MY_KEY" not in os.environ

    done = reembed("--db", path, *fake_at(serve()), real=True)

    assert done.code == 3
    # What is not set is not named: it may be the key itself.
    assert done.error == (
        "the key is to be read from the variable that api_key_env names, which is not set here; "
        "set it"
    )


# A check of the store, after a run.

NOBODY = "http://127.0.0.1:9/v1"


def test_a_check_needs_no_server_for_what_the_run_has_noted(
    reembed: Call, serve: Serve, tmp_path: Path
) -> None:
    path = store_of(tmp_path / "m.db", 100)
    scenario = serve(dimension=DIMENSION)
    assert reembed("--db", path, *fake_at(scenario), real=True).code == 0
    before = scenario.log()["requests"]

    away = reembed("verify", "--db", path, "--base-url", NOBODY, "--json", real=True)

    assert (away.code, away.values["checked"], away.values["sampled"]) == (0, 100, 0)
    assert "can't be reached (" in away.values["unchecked"]
    assert "correct --base-url" in away.values["unchecked"]
    assert "WARN" in away.err
    assert "the sample is not checked" in away.err
    told = reembed("verify", "--db", path, "--base-url", NOBODY, real=True)
    assert told.out.startswith(
        "reembed verify: all is as the run left it by its digests; no sample was embedded again\n"
    )
    change(path, "UPDATE memories SET embedding = zeroblob(32) WHERE id = '0007'")
    wrong = reembed("verify", "--db", path, "--base-url", NOBODY, "--json", real=True)
    assert (wrong.code, wrong.values["wrong"]) == (1, {"overwritten": 1, "zeros": 1})
    assert scenario.log()["requests"] == before


def test_a_server_that_has_moved_is_named_to_the_check(
    reembed: Call, serve: Serve, tmp_path: Path
) -> None:
    path = store_of(tmp_path / "m.db", 100)
    scenario, moved = serve(dimension=DIMENSION), serve(dimension=DIMENSION)
    other = serve(dimension=DIMENSION, faults=[{"kind": "other vectors", "times": 10**6}])
    assert reembed("--db", path, *fake_at(scenario), real=True).code == 0
    before = scenario.log()["requests"]

    checked = reembed("verify", "--db", path, "--base-url", moved.url, "--json", real=True)
    wrong = reembed("verify", "--db", path, "--base-url", other.url, "--json", real=True)

    assert (checked.code, checked.values["unchecked"]) == (0, None)
    assert checked.values["sampled"] == 50
    assert moved.log()["requests"] > 0
    assert scenario.log()["requests"] == before
    # A model that answers, and is another one, is a finding about the model.
    assert (wrong.code, wrong.values["checked"], wrong.values["wrong"]) == (3, 100, {})
    assert "does not behave as it did when the run" in wrong.error


def test_a_key_goes_only_where_a_flag_or_a_setting_says(
    reembed: Call, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store_of(tmp_path / "m.db", 20)
    scenario = serve(dimension=DIMENSION, key=KEY)
    monkeypatch.setenv("AI_MEMORY_EMBED_API_KEY", KEY)
    assert reembed("--db", path, *fake_at(scenario), real=True).code == 0
    before = scenario.log()["requests"]

    unasked = reembed("verify", "--db", path, "--json", real=True)

    assert (unasked.code, unasked.values["checked"], unasked.values["sampled"]) == (0, 20, 0)
    assert "the settings name the backend local, so nothing was sent" in unasked.values["unchecked"]
    assert "say where that server is with --base-url" in unasked.values["unchecked"]
    assert scenario.log()["requests"] == before
    asked = reembed("verify", "--db", path, "--base-url", scenario.url, "--json", real=True)
    assert (asked.code, asked.values["sampled"]) == (0, 20)
    monkeypatch.setenv("AI_MEMORY_EMBED_BACKEND", "openai-compatible")
    monkeypatch.setenv("AI_MEMORY_EMBED_BASE_URL", scenario.url)
    assert reembed("verify", "--db", path, "--json", real=True).values["sampled"] == 20
    monkeypatch.delenv("AI_MEMORY_EMBED_API_KEY")
    other = reembed("verify", "--db", path, "--json", real=True)
    assert (other.code, other.values["sampled"]) == (0, 0)
    assert (
        "sent the key in AI_MEMORY_EMBED_API_KEY, and the settings say no key, so nothing was sent"
        in other.values["unchecked"]
    )
    none = reembed("verify", "--db", path, "--base-url", scenario.url, "--json", real=True)
    assert (none.code, none.values["sampled"]) == (0, 0)
    assert "it was sent none: set one" in none.values["unchecked"]
    assert scenario.log()["keys"] == ["", f"Bearer {KEY}"]


def test_a_key_goes_over_http_to_another_machine_only_if_it_is_said_again(
    reembed: Call, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store_of(tmp_path / "m.db", 20)
    scenario = serve(dimension=DIMENSION)
    assert reembed("--db", path, *fake_at(scenario), real=True).code == 0
    monkeypatch.setenv("AI_MEMORY_EMBED_API_KEY", KEY)
    elsewhere = ("--base-url", "http://192.0.2.1:9/v1")
    monkeypatch.setattr("reembed.transforms.embedders.client._CONNECT_SECONDS", 0.1)

    refused = reembed("verify", "--db", path, *elsewhere, "--json", real=True)

    assert refused.code == 0
    assert "the key would be sent to 192.0.2.1:9 over http" in refused.values["unchecked"]
    monkeypatch.setenv("AI_MEMORY_INFERENCE_EGRESS", "loopback-only")
    forbidden = reembed("verify", "--db", path, *elsewhere, "--insecure-key", "--json", real=True)
    assert "AI_MEMORY_INFERENCE_EGRESS is loopback-only" in forbidden.values["unchecked"]


def test_a_served_model_is_not_looked_for_on_this_machine(
    reembed: Call, serve: Serve, tmp_path: Path
) -> None:
    path = store_of(tmp_path / "m.db", 20)
    assert reembed("--db", path, *fake_at(serve(dimension=DIMENSION)), real=True).code == 0

    refused = reembed("verify", "--db", path, "--model", "m", real=True)

    assert (refused.code, "name the server with --base-url" in refused.error) == (2, True)
