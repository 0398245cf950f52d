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
from inline_snapshot import snapshot

from reembed.transforms import embedders
from reembed.transforms.embedders import PROBE_TEXTS, pace
from reembed.transforms.embedders import http as http_embedder
from reembed.transforms.embedders.fake import FakeEmbedder
from reembed.transforms.staging import find_runs, read_shards
from reembed.transforms.stores import decode
from tests.conftest import (
    ROOT,
    Call,
    Scenario,
    Serve,
    change,
    clean_environment,
    kept_files,
    make_store,
    memory,
    plain_pass,
    select,
    unpack,
)
from tests.wording import wording

pytestmark = pytest.mark.system

KEY = "sk-a-key-that-must-not-be-seen-0123456789"
DIMENSION = 8


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Wait little."""
    monkeypatch.setattr(pace, "FIRST_WAIT_SECONDS", 0.02)
    monkeypatch.setattr(pace, "MOST_WAIT_SECONDS", 0.2)
    yield
    embedders._load.cache_clear()


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do what a pass does in a plain loop, one request at a time, which takes a fraction."""
    monkeypatch.setattr("reembed.pipeline.run._run_pass", plain_pass)


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
    ({"kind": "drip", "on": ONE, "seconds": 0.05}, True),
    ({"kind": "hang", "on": ONE, "seconds": 9}, True),
    ({"kind": "gzip"}, False),
]


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(("fault", "fails"), FAULTS, ids=[json.dumps(fault) for fault, _ in FAULTS])
def test_whatever_the_server_does_the_vectors_are_right_or_the_row_is_named(
    fault: Mapping[str, Any], fails: bool, reembed: Call, serve: Serve, tmp_path: Path
) -> None:
    path = store_of(tmp_path / "m.db", 12)
    scenario = serve(dimension=DIMENSION, faults=[fault])
    timeout = "1s" if fault["kind"] in ("drip", "hang") else "9s"

    done = reembed("--db", path, *fake_at(scenario), "--batch", 5, "--timeout", timeout, real=True)

    assert done.code == 0
    assert ("skipped row 0004: " in done.err) == fails
    assert stored(path) == right(range(12)) | ({"0004": None} if fails else {})
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
    path = store_of(tmp_path / "m.db", 600)
    scenario = serve(dimension=DIMENSION, seconds=0.1, faults=[status(400, on="title 0007")])

    # Two ranges, of 510 rows and 90.
    done = reembed("--db", path, *fake_at(scenario), "--batch", 30, *runner, real=True)

    assert done.code == 0
    numbers = [number for number in range(600) if number != 7]
    assert stored(path) == right(numbers) | {"0007": None}
    assert scenario.log()["most_at_once"] >= 4


def test_the_model_here_and_behind_a_server_gives_equal_vectors(
    reembed: Call, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reembed.transforms.embedders.local.LocalEmbedder._compile", lambda _: None)
    paths = [unpack("v80", tmp_path / name) for name in ("here.db", "there.db")]
    there = [*at(serve(), "all-minilm"), "--json"]

    for path, flags in zip(paths, ([], there), strict=True):
        done = reembed("--db", path, "--namespace", "notes", *flags, real=True)
        assert done.code == 0, done.err

    query = "SELECT embedding FROM memories WHERE namespace = 'notes' ORDER BY id"
    here, served = (np.stack([decode(v) for (v,) in select(path, query)]) for path in paths)
    assert len(here) == 32
    assert np.sum(here * served, axis=1).min() > 0.999999


def test_a_run_that_is_killed_sends_no_text_twice_but_those_in_flight(
    reembed: Call, serve: Serve, tmp_path: Path
) -> None:
    path = store_of(tmp_path / "m.db", 1_500)
    scenario = serve(dimension=DIMENSION, seconds=0.1)
    flags = ["--db", str(path), *fake_at(scenario), "--in-flight", "2", "--batch", "50"]
    command = [sys.executable, "-m", "reembed", *flags]
    environment = clean_environment(tmp_path)
    first = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.DEVNULL)
    while len(scenario.log()["answered"]) < 500:
        assert first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    [(run, _)] = find_runs(path)
    staged = {
        row.key
        for shards in run.list_shards().values()
        for row in read_shards(shards, with_vectors=False)
    }
    assert 250 < len(staged) < 1_500
    assert not any(stored(path).values())

    again = reembed(*flags, real=True)

    assert again.code == 0, again.err
    assert f"reembed: {len(staged):,} of 1,500 rows are staged; going on" in again.err
    assert stored(path) == right(range(1_500))
    # Each process asks for three texts of its first request once more, alone.
    texts = Counter(scenario.log()["texts"]) - Counter(scenario.log()["alone"])
    twice = {text for text, times in texts.items() if times > 1 and text not in PROBE_TEXTS}
    assert twice.isdisjoint(text_of(int(key)) for key in staged)
    # Two requests of 50 texts, and what was answered of the two ranges that they are of.
    assert len(twice) <= 2 * 50
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
    said = re.sub(r"tried for \d s", "tried for N s", wording(gone.error, tmp_path))
    assert said == snapshot(
        "the server at 127.0.0.1:PORT gives no right answer (HTTP 503), tried for N s of "
        "1 s; what is staged stays: the same command goes on"
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
    assert wording(done.error, tmp_path) == snapshot(
        "127.0.0.1:PORT refuses the key (HTTP 401); it was sent none: set one; what is "
        "staged stays: the same command goes on"
    )
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
    said = re.sub(r"[\d,]+ tokens", "N tokens", wording(stopped.error, tmp_path))
    assert said == snapshot(
        "stopped, since the next request would pass --max-tokens 3000: N tokens are "
        "spent; what is staged stays: the same command goes on"
    )
    spent = scenario.log()["tokens"]
    assert 1_500 < spent <= 3_000
    assert not any(stored(path).values())
    done = reembed(*flags, "--json", real=True)
    assert (done.code, stored(path)) == (0, right(range(600)))
    assert done.values["tokens"] == 600 * 6
    assert done.values["cost"] == 600 * 6 * 2 / 1e6
    texts = Counter(scenario.log()["texts"]) - Counter(scenario.log()["alone"])
    assert {times for text, times in texts.items() if text not in PROBE_TEXTS} == {1}


@pytest.mark.usefixtures("plain")
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
    said = re.sub(r"\d+\.\d s\b", "N s", wording(second.out, tmp_path))
    assert said == snapshot("""\
reembed: 120 of 600 rows staged, nothing is replaced yet

staged now  60 embedded, 0 skipped
time        N s
forecast    480 rows are left, about N s at this pace, about 2,880 tokens, 0.029
staged in   TMP/m.db.reembed/RUN
next        the same command goes on; without --max-rows it stages the rest and replaces
""")


def test_a_dry_run_sends_no_rows_text_and_asks_only_for_what_it_can_not_know(
    reembed: Call, serve: Serve, tmp_path: Path
) -> None:
    path = store_of(tmp_path / "m.db", 5)
    known, unknown = serve(dimension=384), serve(dimension=384)
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
    assert wording(plan.err, tmp_path) == snapshot("""\
reembed: PRE-FLIGHT — stored embedding dims: []; target: 1536-dim (text-embedding-3-small (1536-dim, openai)); every scanned row's vector will be REPLACED
reembed: the texts of 600 rows go to 127.0.0.1:PORT (with the key in MY_KEY)
""")  # noqa: E501
    assert f"go to {scenario.url.split('/')[2]} " in plan.err
    assert KEY not in plan.out + plan.err
    assert scenario.log()["requests"] == 0


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    ("egress", "refusal"),
    [
        (
            "deny",
            snapshot(
                "AI_MEMORY_INFERENCE_EGRESS is deny, so no text may be sent to "
                "127.0.0.1:PORT; nothing was sent: use --backend local, or change the "
                "setting"
            ),
        ),
        ("loopback-only", None),
        ("internal-only", None),
    ],
)
def test_what_may_not_be_sent_is_not_sent(
    egress: str,
    refusal: str | None,
    reembed: Call,
    serve: Serve,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = store_of(tmp_path / "m.db", 5)
    scenario = serve(dimension=DIMENSION)
    monkeypatch.setenv("AI_MEMORY_INFERENCE_EGRESS", egress)

    done = reembed("--db", path, *fake_at(scenario), real=True)

    assert done.code == (3 if refusal else 0)
    assert (wording(done.error, tmp_path) if done.code else None) == refusal
    assert bool(scenario.log()["requests"]) == (refusal is None)


@pytest.mark.usefixtures("plain")
def test_another_prefix_is_not_mixed_with_what_is_staged(
    reembed: Call, serve: Serve, tmp_path: Path
) -> None:
    path = store_of(tmp_path / "m.db", 300)
    flags = ["--db", path, *fake_at(serve(dimension=DIMENSION)), "--max-rows", 10]
    assert reembed(*flags, real=True).code == 0

    other = reembed(*flags, "--document-prefix", "passage: ", real=True)

    assert other.code == 1
    assert wording(other.error, tmp_path) == snapshot(
        "the run RUN has staged rows for another target: its prompt was '' and is "
        "'passage: ' now; mixing the two would be wrong: give the same target as before, "
        "or start over with --fresh"
    )


@pytest.mark.usefixtures("plain")
def test_another_model_under_the_same_name_is_not_mixed_with_what_is_staged(
    reembed: Call, serve: Serve, tmp_path: Path
) -> None:
    path = store_of(tmp_path / "m.db", 300)
    first, second = serve(dimension=384), serve(dimension=384, faults=[{"kind": "other vectors"}])
    for scenario, code in ((first, 0), (second, 1)):
        done = reembed("--db", path, *at(scenario), "--max-rows", 10, real=True)
        assert done.code == code
    assert wording(done.error, tmp_path) == snapshot(
        "a-model (384-dim, openai-compatible) does not behave as it did when the run RUN "
        "began: it gives other vectors for the same texts, and mixing the two would be "
        "wrong; bring the former model back, or start over with --fresh"
    )


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
    assert wording(done.error, tmp_path) == snapshot(
        "a-model (8-dim, openai-compatible) gives other vectors for the same texts now "
        "than when the run began, so what is staged may be of two models, and it is not "
        "put into the store; bring the former model back and start over with --fresh"
    )
    assert path.read_bytes() == before


@pytest.mark.usefixtures("plain")
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
    assert wording(done.out, tmp_path) == snapshot("""\
reembed verify: all is as the run left it by its digests; no sample was embedded again

run             RUN
rows checked    100
changed since   0 (a new text and vector by another program)
deleted since   0
not of the run  0 (skipped, or added since)
sample          not checked: AI_MEMORY_INFERENCE_EGRESS is deny, so no text may be sent to 127.0.0.1:PORT; nothing was sent: use --backend local, or change the setting
wrong           none
""")  # noqa: E501


def test_the_spending_is_one_whatever_a_runner_repeats(
    reembed: Call, serve: Serve, tmp_path: Path
) -> None:
    path = store_of(tmp_path / "m.db", 600)
    scenario = serve(dimension=DIMENSION)
    flags = ["--max-tokens", 2_000, "--batch", 20, "--runner", "BundleBasedDirectRunner"]

    done = reembed("--db", path, *fake_at(scenario), *flags, real=True)

    assert done.code == 1
    assert 1_000 < scenario.log()["tokens"] <= 2_000


def keyed(path: Path, serve: Serve, *, seconds: float) -> Scenario:
    """A server that wants the key, and puts it into a refusal."""
    store_of(path, 300)
    faults = [status(400, on="title 0007", body=json.dumps({"error": f"no, {KEY}, no"}))]
    return serve(dimension=DIMENSION, key=KEY, seconds=seconds, faults=faults)


def check_hidden(path: Path, scenario: Scenario, said: str) -> None:
    """The key is in the requests, and in nothing that is said or kept."""
    assert "skipped row 0007: HTTP 400: no, ***, no" in said
    assert scenario.log()["keys"] == [f"Bearer {KEY}"]
    assert KEY not in said
    searched = kept_files(path.with_name("m.db.reembed")) | {"m.db": path.read_bytes()}
    assert len(searched) > 3
    assert not [name for name, content in searched.items() if KEY.encode() in content]


def test_the_key_in_a_variable_is_nowhere_but_in_the_request(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "m.db"
    scenario = keyed(path, serve, seconds=0.2)
    process = subprocess.Popen(
        [sys.executable, "-m", "reembed", "--db", str(path), *fake_at(scenario)],
        env=clean_environment(tmp_path / "home") | {"AI_MEMORY_EMBED_API_KEY": KEY},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    shown: set[str] = set()
    while process.poll() is None:
        with suppress(psutil.Error):  # It may end meanwhile.
            its = psutil.Process(process.pid)
            shown.update(*(one.cmdline() for one in (its, *its.children(recursive=True))))
        time.sleep(0.1)
    said, _ = process.communicate()

    assert process.returncode == 0, said
    check_hidden(path, scenario, said)
    assert "--base-url" in shown
    assert not any(KEY in argument for argument in shown)


def test_the_key_in_a_file_is_nowhere_but_in_the_request(
    reembed: Call, serve: Serve, tmp_path: Path
) -> None:
    path = tmp_path / "m.db"
    scenario = keyed(path, serve, seconds=0)
    config = tmp_path / ".config" / "ai-memory" / "config.toml"
    config.parent.mkdir(parents=True)
    file = tmp_path / "elsewhere" / "key"
    file.parent.mkdir()
    file.write_text(KEY)
    file.chmod(0o400)
    config.write_text(f'[embeddings]\napi_key_file = "{file}"\n')

    done = reembed("--db", path, *fake_at(scenario), real=True)

    assert done.code == 0
    check_hidden(path, scenario, done.out + done.err)
    assert not any(KEY in argument for argument in psutil.Process().cmdline())
    assert not any(KEY in value for value in os.environ.values())


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
    assert done.error == snapshot(
        "the key is to be read from the variable that api_key_env names, which is not "
        "set here; set it"
    )


# A check of the store, after a run.

NOBODY = "http://127.0.0.1:9/v1"


@pytest.mark.usefixtures("plain")
def test_a_check_needs_no_server_for_what_the_run_has_noted(
    reembed: Call, serve: Serve, tmp_path: Path
) -> None:
    path = store_of(tmp_path / "m.db", 100)
    scenario = serve(dimension=DIMENSION)
    assert reembed("--db", path, *fake_at(scenario), real=True).code == 0
    before = scenario.log()["requests"]

    away = reembed("verify", "--db", path, "--base-url", NOBODY, "--json", real=True)

    assert (away.code, away.values["checked"], away.values["sampled"]) == (0, 100, 0)
    # Why it can't be reached is said by the system.
    why = re.compile(r"can't be reached \([^)]*\)")
    assert why.sub("can't be reached (WHY)", away.values["unchecked"]) == snapshot(
        "the server at 127.0.0.1:9 can't be reached (WHY); start it, or correct "
        "--base-url or the configured URL"
    )
    assert why.sub("can't be reached (WHY)", wording(away.err, tmp_path)) == snapshot(
        "WARN [RUN] the sample is not checked: the server at 127.0.0.1:PORT can't be "
        "reached (WHY); start it, or correct --base-url or the configured URL\n"
    )
    told = reembed("verify", "--db", path, "--base-url", NOBODY, real=True)
    assert why.sub("can't be reached (WHY)", wording(told.out, tmp_path)) == snapshot("""\
reembed verify: all is as the run left it by its digests; no sample was embedded again

run             RUN
rows checked    100
changed since   0 (a new text and vector by another program)
deleted since   0
not of the run  0 (skipped, or added since)
sample          not checked: the server at 127.0.0.1:PORT can't be reached (WHY); start it, or correct --base-url or the configured URL
wrong           none
""")  # noqa: E501
    change(path, "UPDATE memories SET embedding = zeroblob(32) WHERE id = '0007'")
    wrong = reembed("verify", "--db", path, "--base-url", NOBODY, "--json", real=True)
    assert (wrong.code, wrong.values["wrong"]) == (1, {"overwritten": 1, "zeros": 1})
    assert scenario.log()["requests"] == before


@pytest.mark.usefixtures("plain")
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
    assert wording(wrong.error, tmp_path) == snapshot(
        "a-model (8-dim, openai-compatible) does not behave as it did when the run RUN "
        "began, so its rows can't be checked with it; bring the former model back"
    )


@pytest.mark.usefixtures("plain")
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
    assert wording(unasked.values["unchecked"], tmp_path) == snapshot(
        "the run embedded with the backend openai-compatible at http://127.0.0.1:PORT, "
        "and the settings name the backend local, so nothing was sent; say where that "
        "server is with --base-url, and its kind with --backend if it takes that "
        "backend's key"
    )
    assert scenario.log()["requests"] == before
    asked = reembed("verify", "--db", path, "--base-url", scenario.url, "--json", real=True)
    assert (asked.code, asked.values["sampled"]) == (0, 20)
    monkeypatch.setenv("AI_MEMORY_EMBED_BACKEND", "openai-compatible")
    monkeypatch.setenv("AI_MEMORY_EMBED_BASE_URL", scenario.url)
    assert reembed("verify", "--db", path, "--json", real=True).values["sampled"] == 20
    monkeypatch.delenv("AI_MEMORY_EMBED_API_KEY")
    other = reembed("verify", "--db", path, "--json", real=True)
    assert (other.code, other.values["sampled"]) == (0, 0)
    assert wording(other.values["unchecked"], tmp_path) == snapshot(
        "the run sent the key in AI_MEMORY_EMBED_API_KEY, and the settings say no key, "
        "so nothing was sent; say --base-url with the server's URL if the settings are "
        "right, or correct them"
    )
    none = reembed("verify", "--db", path, "--base-url", scenario.url, "--json", real=True)
    assert (none.code, none.values["sampled"]) == (0, 0)
    assert wording(none.values["unchecked"], tmp_path) == snapshot(
        "127.0.0.1:PORT refuses the key (HTTP 401: Incorrect API key provided: .); it "
        "was sent none: set one"
    )
    assert scenario.log()["keys"] == ["", f"Bearer {KEY}"]


@pytest.mark.usefixtures("plain")
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
    assert wording(refused.values["unchecked"], tmp_path) == snapshot(
        "the key would be sent to 192.0.2.1:9 over http, where others can read it; use "
        "https, unset the key, or say --insecure-key if the network is trusted"
    )
    monkeypatch.setenv("AI_MEMORY_INFERENCE_EGRESS", "loopback-only")
    forbidden = reembed("verify", "--db", path, *elsewhere, "--insecure-key", "--json", real=True)
    assert wording(forbidden.values["unchecked"], tmp_path) == snapshot(
        "AI_MEMORY_INFERENCE_EGRESS is loopback-only, so no text may be sent to "
        "192.0.2.1:9; nothing was sent: use --backend local, or change the setting"
    )


@pytest.mark.usefixtures("plain")
def test_a_served_model_is_not_looked_for_on_this_machine(
    reembed: Call, serve: Serve, tmp_path: Path
) -> None:
    path = store_of(tmp_path / "m.db", 20)
    assert reembed("--db", path, *fake_at(serve(dimension=DIMENSION)), real=True).code == 0

    refused = reembed("verify", "--db", path, "--model", "m", real=True)

    assert refused.code == 2
    assert wording(refused.error, tmp_path) == snapshot(
        "--model is about a model on this machine, and a-model (8-dim, "
        "openai-compatible) is behind a server; leave it out, or name the server with "
        "--base-url"
    )
