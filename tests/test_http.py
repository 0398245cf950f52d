"""Embedders behind a real server on loopback: what is asked, what is answered, what goes wrong."""

from __future__ import annotations

import json
import pickle
import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inline_snapshot import snapshot

from reembed.transforms import embedders
from reembed.transforms.embed import Embedded, Work, embed_texts
from reembed.transforms.embedders import PROBE_TEXTS, Access, Target, load_embedder, pace
from reembed.transforms.embedders import http as http_embedder
from reembed.transforms.embedders.fake import FakeEmbedder
from reembed.transforms.embedders.http import HttpEmbedder
from reembed.transforms.errors import EmbedderError, RunError
from reembed.transforms.rows import Cause
from tests.conftest import Scenario, Serve
from tests.wording import wording

DIMENSION = 8
KEY = "sk-a-key-that-must-not-be-seen-0123456789"
BACKENDS = ["ollama", "openai"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Wait little."""
    monkeypatch.setattr(pace, "FIRST_WAIT_SECONDS", 0.004)
    monkeypatch.setattr(pace, "MOST_WAIT_SECONDS", 0.02)
    monkeypatch.setattr(http_embedder, "_START_SECONDS", 0.3)
    # Faults are counted from the first request on; tests/test_hiding.py is about two texts at once.
    monkeypatch.setattr(embedders, "embed_together", lambda embedder, texts: None)
    monkeypatch.setattr(http_embedder, "PROBED_TOGETHER", 10**9)
    yield
    embedders._load.cache_clear()


def target(
    scenario: Scenario,
    backend: str = "openai",
    *,
    model: str = "a-model",
    dimension: int = DIMENSION,
    prompt: str = "",
    **access: Any,
) -> Target:
    reached: dict[str, Any] = {"give_up_after": 5.0, **access}
    return Target(backend, model, dimension, prompt=prompt, access=Access(scenario.url, **reached))


def right(texts: Sequence[str]) -> list[bytes]:
    return [vector.tobytes() for vector in FakeEmbedder(DIMENSION).embed(texts)]


def made(work: Work) -> list[bytes | None]:
    return [result.vector for result in work.results]


def why(result: Embedded) -> tuple[Cause, str]:
    assert result.failed is not None
    return result.failed


def said_in(error: pytest.ExceptionInfo[BaseException], tmp_path: Path) -> str:
    """The words of an error, without the seconds for which a server was asked in vain."""
    return re.sub(r"tried for \d+ s of", "tried for N s of", wording(error, tmp_path))


def texts_of(count: int) -> list[str]:
    return [f"the text number {at}" for at in range(count)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_vectors_are_those_of_the_server_in_the_order_of_the_texts(
    backend: str, serve: Serve
) -> None:
    scenario = serve(dimension=DIMENSION)
    embedder = load_embedder(target(scenario, backend))

    batch = embedder.embed_batch(texts_of(50))

    assert [vector.tobytes() for vector in batch.vectors] == right(texts_of(50))
    assert batch.tokens == 50 * 6
    assert scenario.log()["sizes"][-1] == 50


def test_ollama_is_asked_in_its_own_way(serve: Serve) -> None:
    scenario = serve(dimension=DIMENSION)
    load_embedder(target(scenario, "ollama"))

    assert scenario.log()["first_body"] == {
        "model": "a-model",
        "input": ["a probe text"],
        "truncate": True,
    }


def test_others_are_asked_in_openais_way_with_base64(serve: Serve) -> None:
    scenario = serve(dimension=DIMENSION)
    load_embedder(target(scenario, asks_dimension=True))

    assert scenario.log()["first_body"] == {
        "model": "a-model",
        "input": ["a probe text"],
        "encoding_format": "base64",
        "dimensions": DIMENSION,
    }


@pytest.mark.parametrize("packed", [False, "ignored"])
def test_a_server_without_base64_gives_the_same_vectors(packed: object, serve: Serve) -> None:
    embedder = load_embedder(target(serve(dimension=DIMENSION, packed=packed)))

    assert [v.tobytes() for v in embedder.embed(texts_of(3))] == right(texts_of(3))


def test_the_prefix_stands_before_each_text(serve: Serve) -> None:
    scenario = serve(dimension=DIMENSION)
    embedder = load_embedder(target(scenario, prompt="search_document: "))
    embedder.embed(["one", "two"])

    texts = scenario.log()["texts"]
    assert {"search_document: one", "search_document: two"} <= texts.keys()
    assert all(text.startswith("search_document: ") for text in texts)


def test_a_model_is_found_at_ollama_under_the_name_of_its_library(serve: Serve) -> None:
    missing = {"kind": "status", "status": 404, "times": 1}
    scenario = serve(dimension=DIMENSION, faults=[missing])

    embedder = HttpEmbedder(target(scenario, "ollama", model="nomic-embed-text-v1.5"))

    assert embedder.measured == DIMENSION
    assert scenario.log()["first_body"]["model"] == "nomic-embed-text-v1.5"


WRONG_ANSWERS = ["short", "shuffled", "duplicate", "no index", "html", "cut", "gzip"]


@pytest.mark.parametrize("kind", WRONG_ANSWERS)
def test_a_wrong_answer_that_passes_costs_nothing(kind: str, serve: Serve) -> None:
    scenario = serve(dimension=DIMENSION, faults=[{"kind": kind, "after": 2, "times": 1}])
    embedder = load_embedder(target(scenario))

    work = embed_texts(texts_of(20), embedder, DIMENSION)

    assert made(work) == right(texts_of(20))


@pytest.mark.parametrize("kind", [*WRONG_ANSWERS, "nan", "zeros", "null", "wrong length"])
@pytest.mark.parametrize("on", ["number 7", "number"])
def test_a_wrong_answer_that_stays_fails_just_the_texts_that_it_is_about(
    kind: str, on: str, serve: Serve
) -> None:
    scenario = serve(dimension=DIMENSION, faults=[{"kind": kind, "on": on}])
    embedder = load_embedder(target(scenario))
    texts = texts_of(9)[5:]

    work = embed_texts(texts, embedder, DIMENSION)

    expected: list[bytes | None] = list(right(texts))
    harmless = ["shuffled", "gzip", "no index"]
    # An index of 0 is right for a text that is alone.
    if kind not in [*harmless, "duplicate"]:
        expected = [
            None if on in text else vector for text, vector in zip(texts, right(texts), strict=True)
        ]
    assert made(work) == expected
    assert max(scenario.log()["alone"].get(text, 0) for text in texts) <= 2


@pytest.mark.parametrize("status", [400, 413, 422, 500])
def test_a_text_that_is_refused_costs_the_others_nothing(status: int, serve: Serve) -> None:
    fault = {"kind": "status", "status": status, "on": "number 5", "body": '{"error": "too long"}'}
    scenario = serve(dimension=DIMENSION, faults=[fault])
    embedder = load_embedder(target(scenario))

    work = embed_texts(texts_of(16), embedder, DIMENSION)

    assert [at for at, vector in enumerate(made(work)) if vector is None] == [5]
    assert why(work.results[5]) == (Cause.REJECTED, f"HTTP {status}: too long")
    assert scenario.log()["alone"]["the text number 5"] == (2 if status == 500 else 1)
    assert made(work)[6] == right(texts_of(16))[6]


def test_a_complaint_that_quotes_the_text_is_not_repeated(serve: Serve) -> None:
    said = '{"error": "can not embed: the text number 5, says the server"}'
    fault = {"kind": "status", "status": 400, "on": "number 5", "body": said}
    embedder = load_embedder(target(serve(dimension=DIMENSION, faults=[fault])))

    work = embed_texts(texts_of(8), embedder, DIMENSION)

    assert why(work.results[5]) == (Cause.REJECTED, "HTTP 400")


def test_the_most_texts_that_a_server_takes_are_learnt_from_its_refusal(serve: Serve) -> None:
    scenario = serve(dimension=DIMENSION, most_texts=32)
    embedder = load_embedder(target(scenario))

    assert embedder.fitting(texts_of(100)) == 100
    assert made(embed_texts(texts_of(100), embedder, DIMENSION)) == right(texts_of(100))
    assert embedder.fitting(texts_of(100)) == 32
    assert scenario.log()["sizes"][2:] == [100, 32, 32, 32, 4]


@pytest.mark.system
def test_a_batch_that_takes_too_long_is_halved(serve: Serve) -> None:
    hang = {"kind": "hang", "on": "number 3", "seconds": 3.0}
    scenario = serve(dimension=DIMENSION, faults=[hang])
    embedder = load_embedder(target(scenario, timeout=0.4))

    work = embed_texts(texts_of(8), embedder, DIMENSION)

    assert [at for at, vector in enumerate(made(work)) if vector is None] == [3]
    assert why(work.results[3]) == (Cause.REJECTED, snapshot("it gave no answer within 0.4 s"))
    assert scenario.log()["alone"]["the text number 3"] == 2


@pytest.mark.system
def test_an_answer_that_drips_is_not_waited_for_without_end(serve: Serve) -> None:
    drip = {"kind": "drip", "on": "number 3", "seconds": 0.05}
    embedder = load_embedder(target(serve(dimension=DIMENSION, faults=[drip]), timeout=0.4))

    started = time.monotonic()
    work = embed_texts(["the text number 3"], embedder, DIMENSION)

    assert why(work.results[0]) == (Cause.REJECTED, snapshot("it gave no answer within 0.4 s"))
    assert time.monotonic() - started < 15


@pytest.mark.system
@pytest.mark.parametrize(("status", "after"), [(429, "0.4"), (503, "date")])
def test_a_server_that_asks_to_wait_is_asked_again_when_it_said(
    status: int, after: str, serve: Serve
) -> None:
    soon = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 2))
    headers = {"Retry-After": soon if after == "date" else after}
    busy = {"kind": "status", "status": status, "headers": headers, "after": 2, "times": 1}
    embedder = load_embedder(target(serve(dimension=DIMENSION, faults=[busy])))

    started = time.monotonic()
    assert made(embed_texts(texts_of(4), embedder, DIMENSION)) == right(texts_of(4))
    assert time.monotonic() - started > 0.4


def test_a_refusal_that_is_sent_as_a_success_is_one(serve: Serve) -> None:
    said = '{"error": {"code": 429, "message": "slow down"}}'
    hidden = {"kind": "status", "status": 200, "body": said, "after": 2, "times": 2}
    scenario = serve(dimension=DIMENSION, faults=[hidden])
    embedder = load_embedder(target(scenario))

    assert made(embed_texts(texts_of(4), embedder, DIMENSION)) == right(texts_of(4))
    assert scenario.log()["sizes"] == [1, 1, 4, 4, 4]


@pytest.mark.parametrize("after", ["0", "-5", "Thu, 01 Jan 1970 00:00:00 GMT"])
def test_a_server_that_asks_to_wait_for_no_time_is_not_pressed(
    after: str, serve: Serve, tmp_path: Path
) -> None:
    headers = {"Retry-After": after}
    busy = {"kind": "status", "status": 429, "headers": headers, "after": 2}
    scenario = serve(dimension=DIMENSION, faults=[busy])
    embedder = load_embedder(target(scenario, give_up_after=0.2))

    with pytest.raises(RunError) as refused:
        embedder.embed(["one"])
    assert said_in(refused, tmp_path) == snapshot(
        "the server at 127.0.0.1:PORT gives no right answer (HTTP 429), tried for N s of 0.2 s; "
        "what is staged stays: the same command goes on"
    )
    assert scenario.log()["requests"] < 40


def test_no_row_is_lost_where_a_third_of_the_requests_is_refused(serve: Serve) -> None:
    scenario = serve(dimension=DIMENSION, faults=[{"kind": "status", "status": 429, "of": 3}])
    embedder = load_embedder(target(scenario, give_up_after=60.0))
    batches = [texts_of(500)[at : at + 10] for at in range(0, 500, 10)]

    with ThreadPoolExecutor(8) as pool:
        works = list(pool.map(lambda some: embed_texts(some, embedder, DIMENSION), batches))

    assert made(sum(works, Work())) == right(texts_of(500))


@pytest.mark.system
def test_more_requests_are_in_flight_while_the_server_can_do_with_them(serve: Serve) -> None:
    scenario = serve(dimension=DIMENSION, seconds=0.2)
    embedder = load_embedder(target(scenario, most_in_flight=8))

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(embedder.embed, [[text] for text in texts_of(60)]))

    # How many it comes to depends on how busy this machine is.
    assert 4 < scenario.log()["most_at_once"] <= 8


def test_no_more_requests_are_in_flight_than_was_asked_for(serve: Serve) -> None:
    scenario = serve(dimension=DIMENSION, seconds=0.02)
    embedder = load_embedder(target(scenario, most_in_flight=2))

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(embedder.embed, [[text] for text in texts_of(20)]))

    assert scenario.log()["most_at_once"] == 2


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (
            401,
            snapshot(
                "127.0.0.1:PORT refuses the key (HTTP 401); it was sent none: set one; what is "
                "staged stays: the same command goes on"
            ),
        ),
        (
            402,
            snapshot(
                "127.0.0.1:PORT refuses the key (HTTP 402); it was sent none: set one; what is "
                "staged stays: the same command goes on"
            ),
        ),
        (
            403,
            snapshot(
                "127.0.0.1:PORT refuses the key (HTTP 403); it was sent none: set one; what is "
                "staged stays: the same command goes on"
            ),
        ),
        (
            404,
            snapshot(
                "127.0.0.1:PORT has no a-model at /embeddings (HTTP 404), and no other model is "
                "put in its place: correct --model or --base-url; what is staged stays: the same "
                "command goes on"
            ),
        ),
        (
            302,
            snapshot(
                "127.0.0.1:PORT sends on to http://x (HTTP 302), where neither a key nor texts "
                "are sent; give that URL with --base-url if it is the right one; what is staged "
                "stays: the same command goes on"
            ),
        ),
    ],
)
def test_a_refused_key_or_model_ends_the_run_at_once_and_for_all_threads(
    status: int, said: str, serve: Serve, tmp_path: Path
) -> None:
    refusal = {"kind": "status", "status": status, "after": 3, "headers": {"Location": "http://x/"}}
    scenario = serve(dimension=DIMENSION, faults=[refusal])
    embedder = load_embedder(target(scenario))
    embedder.embed(["one"])

    for _ in range(3):
        with pytest.raises(RunError) as refused:
            embedder.embed(["two"])
        assert wording(refused, tmp_path) == said
    # The text, and one that is known to be fine.
    assert scenario.log()["requests"] == 3 + 2


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_filter_that_refuses_one_text_as_if_it_were_the_key_costs_only_that(
    status: int, serve: Serve
) -> None:
    refusal = {"kind": "status", "status": status, "on": "number 5"}
    embedder = load_embedder(target(serve(dimension=DIMENSION, faults=[refusal])))

    work = embed_texts(texts_of(8), embedder, DIMENSION)

    assert [at for at, vector in enumerate(made(work)) if vector is None] == [5]


def test_a_text_that_is_told_to_wait_for_ever_is_skipped_and_the_others_are_not(
    serve: Serve,
) -> None:
    busy = {"kind": "status", "status": 503, "on": "number 5"}
    embedder = load_embedder(target(serve(dimension=DIMENSION, faults=[busy]), give_up_after=60.0))

    work = embed_texts([*texts_of(2), "the text number 5"], embedder, DIMENSION)

    assert made(work) == [*right(texts_of(2)), None]


def test_a_batch_that_is_too_large_for_a_limit_of_tokens_is_halved_at_once(serve: Serve) -> None:
    said = (
        '{"error": {"message": "Request too large on tokens per min: Limit 600, Requested 1479"}}'
    )
    busy = {"kind": "status", "status": 429, "body": said, "after": 2, "times": 1}
    scenario = serve(dimension=DIMENSION, faults=[busy])
    embedder = load_embedder(target(scenario))

    assert made(embed_texts(texts_of(8), embedder, DIMENSION)) == right(texts_of(8))
    assert scenario.log()["sizes"][2:] == [8, 4, 4]


@pytest.mark.system
def test_a_text_that_brings_the_server_down_each_time_is_found_and_skipped(serve: Serve) -> None:
    crash = {"kind": "crash", "on": "number 5", "seconds": 0.1}
    scenario = serve(dimension=DIMENSION, faults=[crash])
    embedder = load_embedder(target(scenario, give_up_after=30.0))

    work = embed_texts(texts_of(8), embedder, DIMENSION)

    assert [at for at, vector in enumerate(made(work)) if vector is None] == [5]


@pytest.mark.system
@pytest.mark.parametrize(
    ("after", "said"),
    [
        (
            0,
            snapshot(
                "the server at 127.0.0.1:PORT gives no right answer (it gave no answer within 0.4 "
                "s), tried for N s of 0.3 s"
            ),
        ),
        (
            2,
            snapshot(
                "the server at 127.0.0.1:PORT gives no right answer (it gave no answer within 0.4 "
                "s), tried for N s of 1 s; what is staged stays: the same command goes on"
            ),
        ),
    ],
    ids=["at the start", "half way"],
)
def test_headers_that_never_end_are_not_waited_for(
    after: int, said: str, serve: Serve, tmp_path: Path
) -> None:
    slow = {"kind": "slow headers", "seconds": 0.05, "after": after}
    scenario = serve(dimension=DIMENSION, faults=[slow])
    started = time.monotonic()

    with pytest.raises((EmbedderError, RunError)) as refused:
        load_embedder(target(scenario, timeout=0.4, give_up_after=1.0)).embed(["one"])
    assert said_in(refused, tmp_path) == said
    assert time.monotonic() - started < 15


def test_a_server_with_another_model_of_the_same_length_after_an_outage_ends_the_run(
    serve: Serve, tmp_path: Path
) -> None:
    down = {"kind": "status", "status": 502, "after": 2, "times": 5}
    faults = [down, {"kind": "other vectors", "after": 2}]
    embedder = load_embedder(target(serve(dimension=DIMENSION, faults=faults)))

    with pytest.raises(RunError) as refused:
        embed_texts(texts_of(8), embedder, DIMENSION)
    assert wording(refused, tmp_path) == snapshot(
        "the server at 127.0.0.1:PORT gives another vector for the same text now: another model; "
        "what is staged stays: the same command goes on"
    )


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, snapshot("127.0.0.1:PORT refuses the key (HTTP 401); it was sent none: set one")),
        (402, snapshot("127.0.0.1:PORT refuses the key (HTTP 402); it was sent none: set one")),
        (403, snapshot("127.0.0.1:PORT refuses the key (HTTP 403); it was sent none: set one")),
        (
            404,
            snapshot(
                "127.0.0.1:PORT has no a-model at /embeddings (HTTP 404), and no other model is "
                "put in its place: correct --model or --base-url"
            ),
        ),
        (
            302,
            snapshot(
                "127.0.0.1:PORT sends on to another place (HTTP 302), where neither a key nor "
                "texts are sent; give that URL with --base-url if it is the right one"
            ),
        ),
        (
            400,
            snapshot(
                "the server at 127.0.0.1:PORT will not embed even a short probe text with "
                "a-model: HTTP 400"
            ),
        ),
        (
            500,
            snapshot(
                "the server at 127.0.0.1:PORT gives no right answer (HTTP 500), tried for N s of "
                "0.3 s"
            ),
        ),
        (
            429,
            snapshot(
                "the server at 127.0.0.1:PORT gives no right answer (HTTP 429), tried for N s of "
                "0.3 s"
            ),
        ),
    ],
)
def test_a_server_that_refuses_from_the_start_is_no_embedder(
    status: int, said: str, serve: Serve, tmp_path: Path
) -> None:
    scenario = serve(faults=[{"kind": "status", "status": status}])

    with pytest.raises(EmbedderError) as refused:
        load_embedder(target(scenario))
    assert said_in(refused, tmp_path) == said


def test_a_server_that_is_not_there_is_told_at_once(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(EmbedderError) as refused:
        load_embedder(target(Scenario("http://127.0.0.1:9", ""), give_up_after=600.0))
    assert wording(refused, tmp_path) == snapshot(
        "the server at 127.0.0.1:PORT can't be reached (Connection refused); start it, or correct "
        "--base-url or the configured URL"
    )
    assert time.monotonic() - started < 5


def test_a_server_that_goes_down_is_waited_for(serve: Serve) -> None:
    down = {"kind": "status", "status": 502, "after": 2, "times": 12}
    embedder = load_embedder(target(serve(dimension=DIMENSION, faults=[down])))

    assert made(embed_texts(texts_of(8), embedder, DIMENSION)) == right(texts_of(8))


def test_a_server_that_stays_down_ends_the_run_after_the_time_for_that(
    serve: Serve, tmp_path: Path
) -> None:
    down = {"kind": "status", "status": 502, "after": 2}
    embedder = load_embedder(target(serve(dimension=DIMENSION, faults=[down]), give_up_after=0.2))

    with pytest.raises(RunError) as refused:
        embed_texts(texts_of(8), embedder, DIMENSION)
    assert said_in(refused, tmp_path) == snapshot(
        "the server at 127.0.0.1:PORT gives no right answer (HTTP 502), tried for N s of 0.2 s; "
        "what is staged stays: the same command goes on"
    )


def test_a_wait_that_is_longer_than_the_time_for_that_is_not_begun(
    serve: Serve, tmp_path: Path
) -> None:
    busy = {"kind": "status", "status": 429, "headers": {"Retry-After": "86400"}, "after": 2}
    embedder = load_embedder(target(serve(dimension=DIMENSION, faults=[busy])))

    started = time.monotonic()
    with pytest.raises(RunError) as refused:
        embedder.embed(["one"])
    assert said_in(refused, tmp_path) == snapshot(
        "the server at 127.0.0.1:PORT gives no right answer (HTTP 429; it asks to wait 86400 s), "
        "tried for N s of 5 s; what is staged stays: the same command goes on"
    )
    assert time.monotonic() - started < 2


def test_a_server_that_refuses_every_text_of_a_sudden_is_taken_for_down(
    serve: Serve, tmp_path: Path
) -> None:
    broken = {"kind": "status", "status": 400, "after": 2}
    embedder = load_embedder(target(serve(dimension=DIMENSION, faults=[broken]), give_up_after=0.2))

    with pytest.raises(RunError) as refused:
        embed_texts(texts_of(4), embedder, DIMENSION)
    assert said_in(refused, tmp_path) == snapshot(
        "the server at 127.0.0.1:PORT gives no right answer (HTTP 400), tried for N s of 0.2 s; "
        "what is staged stays: the same command goes on"
    )


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            "all wrong length",
            snapshot(
                "the server at 127.0.0.1:PORT gives vectors of 7 numbers now, and gave 8 before: "
                "it has another model; what is staged stays: the same command goes on"
            ),
        ),
        (
            "other model",
            snapshot(
                "127.0.0.1:PORT answers with the model 'another-model' where a-model was asked "
                "for; if that is the one that is wanted, name it with --model; what is staged "
                "stays: the same command goes on"
            ),
        ),
    ],
)
def test_a_server_that_has_another_model_half_way_ends_the_run(
    kind: str, said: str, serve: Serve, tmp_path: Path
) -> None:
    embedder = load_embedder(
        target(serve(dimension=DIMENSION, faults=[{"kind": kind, "after": 3}]))
    )
    embedder.embed(texts_of(2))

    with pytest.raises(RunError) as refused:
        embed_texts(texts_of(2), embedder, DIMENSION)
    assert wording(refused, tmp_path) == said


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            "another-model",
            snapshot(
                "127.0.0.1:PORT answers with the model 'another-model' where a-model was asked "
                "for; if that is the one that is wanted, name it with --model"
            ),
        ),
        (
            "a-model-large",
            snapshot(
                "127.0.0.1:PORT answers with the model 'a-model-large' where a-model was asked "
                "for; if that is the one that is wanted, name it with --model"
            ),
        ),
        (
            "a-model-v2",
            snapshot(
                "127.0.0.1:PORT answers with the model 'a-model-v2' where a-model was asked for; "
                "if that is the one that is wanted, name it with --model"
            ),
        ),
    ],
)
def test_a_substitute_is_refused_at_the_start(
    model: str, said: str, serve: Serve, tmp_path: Path
) -> None:
    with pytest.raises(EmbedderError) as refused:
        load_embedder(target(serve(dimension=DIMENSION, model=model)))
    assert wording(refused, tmp_path) == said


@pytest.mark.parametrize("model", [None, "maker/A-Model", "a-model:latest"])
def test_another_name_of_the_model_is_none(model: str | None, serve: Serve) -> None:
    load_embedder(target(serve(dimension=DIMENSION, model=model)))


def test_another_dimension_is_refused_at_the_start(serve: Serve, tmp_path: Path) -> None:
    with pytest.raises(EmbedderError) as refused:
        load_embedder(target(serve(dimension=16)))
    assert wording(refused, tmp_path) == snapshot(
        "the server at 127.0.0.1:PORT gives vectors of 16 numbers with a-model, not 8; correct "
        "--dim or the configured dimension"
    )


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (
            "",
            snapshot(
                "stopped, since the next request would pass --max-tokens 500: 486 tokens are "
                "spent; what is staged stays: the same command goes on"
            ),
        ),
        (
            "x" * 40,
            snapshot(
                "stopped, since the next request would pass --max-tokens 500: 486 tokens are "
                "spent; what is staged stays: the same command goes on"
            ),
        ),
    ],
)
def test_what_may_be_spent_is_never_passed(
    prompt: str, said: str, serve: Serve, tmp_path: Path
) -> None:
    scenario = serve(dimension=DIMENSION)
    embedder = load_embedder(target(scenario, most_tokens=500, prompt=prompt))

    with pytest.raises(RunError) as refused:
        for at in range(100):
            embedder.embed([f"{at} {text}" for text in texts_of(4)])
    assert wording(refused, tmp_path) == said

    assert 200 < scenario.log()["tokens"] <= 500


def test_what_may_be_spent_is_passed_by_no_more_than_the_first_request_if_tokens_are_many(
    serve: Serve,
) -> None:
    scenario = serve(dimension=DIMENSION, tokens="bytes")
    embedder = load_embedder(target(scenario, most_tokens=2_000))
    batches = [[f"{at} {text}" for text in texts_of(20)] for at in range(40)]

    def spend(texts: list[str]) -> bool:
        try:
            embedder.embed(texts)
        except RunError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        answered = sum(pool.map(spend, batches))

    assert 0 < answered < 40
    assert scenario.log()["tokens"] <= 2_000 * 1.05


def test_texts_longer_than_the_window_are_counted_by_an_estimate(serve: Serve) -> None:
    scenario = serve(dimension=DIMENSION, window=50)
    embedder = load_embedder(target(scenario, "ollama"))

    batch = embedder.embed_batch(["short", "word " * 200])

    assert batch.cut == {1}


def test_a_request_holds_no_more_tokens_and_bytes_than_servers_take(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder = load_embedder(target(serve(dimension=DIMENSION)))
    texts = ["x" * 1_000] * 100

    assert embedder.fitting(texts) == 100
    monkeypatch.setattr(http_embedder, "MOST_BYTES", 10_000)
    assert embedder.fitting(texts) == 10
    assert embedder.fitting(["x" * 20_000, "y"]) == 1
    assert embedder.fitting(["x"] * 5_000) == 2_048


def test_the_key_is_read_from_its_variable_and_sent_as_a_bearer_token(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_KEY", KEY)
    scenario = serve(dimension=DIMENSION, key=KEY)

    load_embedder(target(scenario, key_variable="A_KEY"))

    assert scenario.log()["keys"] == [f"Bearer {KEY}"]


def test_a_server_that_repeats_a_wrong_key_does_not_get_it_into_the_error(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("A_KEY", KEY)

    with pytest.raises(EmbedderError) as error:
        load_embedder(target(serve(key="another"), key_variable="A_KEY"))

    assert wording(error, tmp_path) == snapshot(
        "127.0.0.1:PORT refuses the key (HTTP 401: Incorrect API key provided: ***.); correct the "
        "one in A_KEY"
    )


@pytest.mark.parametrize(
    "said",
    [
        "x" * 180 + f" Bearer {KEY} and more",
        f"the key {KEY.upper()} is wrong",
        "half of it: " + KEY[:20],
        "IT CAN'T EMBED: THE TEXT NUMBER 5, AND THAT IS ALL",
    ],
)
def test_what_the_server_says_is_not_repeated_where_it_gives_away_a_part_of_key_or_text(
    said: str, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_KEY", KEY)
    body = json.dumps({"error": said})
    fault = {"kind": "status", "status": 400, "on": "number 5", "body": body}
    scenario = serve(dimension=DIMENSION, faults=[fault])
    embedder = load_embedder(target(scenario, key_variable="A_KEY"))

    work = embed_texts(["the text number 5"], embedder, DIMENSION)

    reason = why(work.results[0])[1]
    assert reason.startswith("HTTP 400")
    assert KEY[:10].casefold() not in reason.casefold()
    assert "number 5" not in reason.casefold()


def test_what_the_server_says_can_not_move_the_cursor_or_break_a_file(serve: Serve) -> None:
    body = r'{"error": "a\u001b[31m b\n\ud800 c"}'
    fault = {"kind": "status", "status": 400, "on": "number 5", "body": body}
    embedder = load_embedder(target(serve(dimension=DIMENSION, faults=[fault])))

    work = embed_texts(["the text number 5"], embedder, DIMENSION)

    assert why(work.results[0]) == (Cause.REJECTED, "HTTP 400: a [31m b c")


def test_a_model_whose_name_is_a_key_is_not_repeated(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("A_KEY", KEY)

    with pytest.raises(EmbedderError) as error:
        load_embedder(target(serve(dimension=DIMENSION, model=f"\x1b {KEY}"), key_variable="A_KEY"))
    assert wording(error, tmp_path) == snapshot(
        "127.0.0.1:PORT answers with the model '***' where a-model was asked for; if that is the "
        "one that is wanted, name it with --model"
    )


@pytest.mark.parametrize(
    "headers",
    [
        {"Location": "http://[bad"},
        {"Retry-After": "Mon, 01 Jan 99999999999999999999 00:00:00 GMT"},
    ],
)
def test_headers_that_make_no_sense_bring_nothing_down(
    headers: dict[str, str], serve: Serve, tmp_path: Path
) -> None:
    status = 302 if "Location" in headers else 429
    fault = {"kind": "status", "status": status, "headers": headers, "times": 2, "after": 2}
    embedder = load_embedder(target(serve(dimension=DIMENSION, faults=[fault])))

    if status == 302:
        with pytest.raises(RunError) as refused:
            embedder.embed(["one"])
        assert wording(refused, tmp_path) == snapshot(
            "127.0.0.1:PORT sends on to another place (HTTP 302), where neither a key nor texts "
            "are sent; give that URL with --base-url if it is the right one; what is staged "
            "stays: the same command goes on"
        )
    else:
        assert made(embed_texts(texts_of(2), embedder, DIMENSION)) == right(texts_of(2))


def test_a_vector_that_is_none_is_no_dimension(serve: Serve, tmp_path: Path) -> None:
    with pytest.raises(EmbedderError) as refused:
        HttpEmbedder(target(serve(dimension=DIMENSION, faults=[{"kind": "null"}]), dimension=0))
    assert wording(refused, tmp_path) == snapshot(
        "the server at 127.0.0.1:PORT gives vectors that are not finite, or all zeros"
    )


def test_a_server_that_knows_no_dimensions_is_asked_without(serve: Serve) -> None:
    said = '{"error": "does not support matryoshka representation"}'
    refusal = {"kind": "status", "status": 400, "body": said, "times": 2}
    scenario = serve(dimension=DIMENSION, faults=[refusal])

    embedder = load_embedder(target(scenario, asks_dimension=True))

    assert made(embed_texts(texts_of(2), embedder, DIMENSION)) == right(texts_of(2))


def test_no_key_goes_where_a_server_sends_on_to(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("A_KEY", KEY)
    other = serve(dimension=DIMENSION)
    to = {"kind": "status", "status": 307, "headers": {"Location": f"{other.url}/embeddings"}}

    with pytest.raises(EmbedderError) as refused:
        load_embedder(target(serve(faults=[to]), key_variable="A_KEY"))
    assert wording(refused, tmp_path) == snapshot(
        "127.0.0.1:PORT sends on to http://127.0.0.1:PORT (HTTP 307), where neither a key nor "
        "texts are sent; give that URL with --base-url if it is the right one"
    )

    assert other.log()["requests"] == 0


def test_no_proxy_stands_between_this_machine_and_itself(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario = serve(dimension=DIMENSION)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")

    load_embedder(target(scenario))


def test_nothing_that_workers_get_holds_the_key(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_KEY", KEY)
    its = target(serve(dimension=DIMENSION), key_variable="A_KEY")
    load_embedder(its)

    assert KEY.encode() not in pickle.dumps(its)
    assert KEY not in repr(its.to_json())
    assert Target.from_json(its.to_json()) == its


def test_threads_that_wait_are_woken_when_the_run_ends(serve: Serve, tmp_path: Path) -> None:
    busy = {"kind": "status", "status": 429, "headers": {"Retry-After": "4"}, "on": "slow"}
    gone = {"kind": "status", "status": 401, "after": 2}
    scenario = serve(dimension=DIMENSION, faults=[busy, gone])
    embedder = load_embedder(target(scenario))
    errors: list[Exception] = []

    def wait() -> None:
        try:
            embedder.embed(["slow"])
        except RunError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    while scenario.log()["requests"] < 3:  # It has been told to wait.
        time.sleep(0.01)
    with pytest.raises(RunError) as refused:
        embedder.embed(["another"])
    assert wording(refused, tmp_path) == snapshot(
        "127.0.0.1:PORT refuses the key (HTTP 401); it was sent none: set one; what is staged "
        "stays: the same command goes on"
    )
    thread.join(timeout=2)

    assert [type(error) for error in errors] == [RunError]


@pytest.mark.system
def test_a_texts_vector_is_the_same_from_the_real_model_here_and_behind_a_server(
    serve: Serve,
) -> None:
    here = load_embedder(Target("local", "all-MiniLM-L6-v2", 384)).embed(PROBE_TEXTS)
    there = load_embedder(target(serve(), model="all-minilm", dimension=384)).embed(PROBE_TEXTS)

    assert np.sum(here * there, axis=1).min() > 0.999999
