"""A server that embeds, for the tests: `python -m tests.server` prints its port and serves.

It speaks Ollama's way and OpenAI's, below `/SCENARIO`. A scenario is a JSON object that is put
to `/scenarios/SCENARIO`; GET there tells what has happened since. Its keys, all optional:

    model       what the answers name ("asked": what was asked for; null: nothing)
    dimension   with it the vectors are the fake embedder's; without, those of all-MiniLM-L6-v2
    key         the key that is wanted
    seconds     that each request takes
    at_once     requests that are worked on at a time; more of them wait
    most_texts  more texts in a request are refused with 422 and a word about it
    most_bytes  a longer text is refused with 400
    window      longer texts count so many tokens, as if they were cut
    packed      false: base64 is refused; "ignored": it is answered with numbers
    tokens      "bytes": where there are several texts, each of their bytes is counted
    faults      what goes wrong: see `_Fault`
"""

from __future__ import annotations

import argparse
import base64
import gzip
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from reembed.transforms.embedders import Embedder
from reembed.transforms.embedders.fake import FakeEmbedder
from reembed.transforms.rows import Vectors


@dataclass
class _Fault:
    """One thing that goes wrong: for requests with a text that holds `on`, `times` times.

    `kind` is "status" (with `status`, `headers` and `body`), or one of the answers that are
    wrong: short, shuffled, reversed, shifted, constant, duplicate, no index, nan, null, zeros,
    wrong length, all wrong length, html, cut, drip, slow headers, hang, gzip, other model,
    other vectors. With `least`, only requests of so many texts are hit. `after`
    requests go well before it, and `of` says of how many requests one is hit. With kind "crash"
    every request fails for `seconds`.
    """

    kind: str
    on: str = ""
    times: int = 10**9
    after: int = 0
    of: int = 1
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    body: str = ""
    seconds: float = 0.0
    least: int = 1
    seen: int = 0
    hit: int = 0

    def hits(self, texts: Sequence[str]) -> bool:
        if len(texts) < self.least or not any(self.on in text for text in texts):
            return False
        self.seen += 1
        due = self.seen > self.after and self.hit < self.times
        if not due or (self.seen - self.after - 1) % self.of:
            return False
        self.hit += 1
        return True


class _Scenario:
    """A way to behave, and what has happened."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        self.faults = [_Fault(**fault) for fault in values.get("faults", [])]
        self.lock = threading.Lock()
        self.places = threading.Semaphore(values.get("at_once", 10**6))
        self.requests = self.tokens = self.now = self.most_at_once = 0
        self.sizes: list[int] = []
        self.texts: Counter[str] = Counter()
        self.alone: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.keys: set[str] = set()
        self.bodies: list[dict[str, Any]] = []
        self.began = self.ended = self.down_until = 0.0

    def log(self) -> dict[str, Any]:
        """What has happened; `seconds` are from the first request of several texts to the last."""
        return {
            "requests": self.requests,
            "tokens": self.tokens,
            "most_at_once": self.most_at_once,
            "sizes": self.sizes,
            "texts": self.texts,
            "alone": self.alone,
            "answered": self.answered,
            "keys": sorted(self.keys),
            "seconds": self.ended - self.began,
            "first_body": self.bodies[0] if self.bodies else None,
        }


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    scenarios: dict[str, _Scenario]
    _model: Embedder | None = None
    _lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # The one who asked was killed.
            super().handle_error(request, client_address)

    def embed(self, texts: Sequence[str], dimension: int | None) -> Vectors:
        if dimension is not None:
            return FakeEmbedder(dimension).embed(texts)
        with self._lock:
            if self._model is None:
                from reembed.transforms.embedders.local import LocalEmbedder

                self._model = LocalEmbedder("all-MiniLM-L6-v2", 384)
            known = _cache
            new = [text for text in dict.fromkeys(texts) if text not in known]
            known.update(zip(new, self._model.embed(new) if new else [], strict=True))
        return np.stack([known[text] for text in texts])


_cache: dict[str, Any] = {}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # Else each answer waits 40 ms between its head and its body.
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_PUT(self) -> None:
        self.server.scenarios[self.path.split("/")[2]] = _Scenario(self._body())
        self._answer(200, b"{}")

    def do_GET(self) -> None:
        scenario = self.server.scenarios[self.path.split("/")[2]]
        self._answer(200, json.dumps(scenario.log()).encode())

    def do_POST(self) -> None:
        _, name, *path = self.path.split("/")
        scenario, body = self.server.scenarios[name], self._body()
        if path == ["api", "show"]:
            window = scenario.values.get("window")
            info = {} if window is None else {"bert.context_length": window}
            return self._answer(200, json.dumps({"model_info": info}).encode())
        if path not in (["api", "embed"], ["embeddings"]):
            return self._answer(404, b'{"error": "no such page"}')
        with scenario.lock:
            scenario.now += 1
            if len(body["input"]) > 1 and not scenario.began:
                scenario.began = time.monotonic()
            scenario.most_at_once = max(scenario.most_at_once, scenario.now)
        try:
            with scenario.places:
                time.sleep(scenario.values.get("seconds", 0))
                self._embed(scenario, body, ollama=path[0] == "api")
        finally:
            with scenario.lock:
                scenario.now -= 1
                scenario.ended = time.monotonic()

    def _embed(self, scenario: _Scenario, body: dict[str, Any], *, ollama: bool) -> None:
        values, texts = scenario.values, body["input"]
        with scenario.lock:
            scenario.requests += 1
            scenario.sizes.append(len(texts))
            scenario.texts.update(texts)
            scenario.alone.update(texts if len(texts) == 1 else [])
            scenario.keys.add(self.headers.get("Authorization", ""))
            scenario.bodies.append(body)
            fault = next((fault for fault in scenario.faults if fault.hits(texts)), None)
        if "key" in values and self.headers.get("Authorization") != f"Bearer {values['key']}":
            shown = self.headers.get("Authorization", "").removeprefix("Bearer ")
            refusal = {"error": {"message": f"Incorrect API key provided: {shown}."}}
            return self._answer(401, json.dumps(refusal).encode())
        if fault is not None and fault.kind == "crash":
            scenario.down_until = time.monotonic() + fault.seconds
        if time.monotonic() < scenario.down_until:
            return self._answer(502, b"")
        if fault is not None and fault.kind == "status":
            return self._answer(fault.status, fault.body.encode(), headers=fault.headers)
        if len(texts) > values.get("most_texts", 10**9):
            said = {"error": f"batch size {len(texts)} > maximum batch size {values['most_texts']}"}
            return self._answer(422, json.dumps(said).encode())
        if any(len(text.encode()) > values.get("most_bytes", 10**9) for text in texts):
            return self._answer(400, b'{"error": {"message": "maximum context length is 8192"}}')
        packed = body.get("encoding_format") == "base64"
        if packed and values.get("packed") is False:
            return self._answer(400, b'{"error": {"message": "unknown encoding_format"}}')
        vectors = list(self.server.embed(texts, values.get("dimension")))
        by_bytes = values.get("tokens") == "bytes" and len(texts) > 1
        counts = [len(text.encode()) if by_bytes else len(text.split()) + 2 for text in texts]
        counts = [min(count, values.get("window", 10**9)) for count in counts]
        with scenario.lock:
            scenario.tokens += sum(counts)
        name = values.get("model", "asked")
        answer = {"model": body["model"] if name == "asked" else name}
        if fault is not None and fault.kind == "other model":
            answer["model"] = fault.body or "another-model"
        vectors = _spoil(vectors, texts, fault)
        if ollama:
            answer |= {
                "embeddings": [vector.tolist() for vector in vectors],
                "prompt_eval_count": sum(counts),
            }
        else:
            data = [
                {"index": at, "embedding": _encoded(vector, packed and "packed" not in values)}
                for at, vector in enumerate(vectors)
            ]
            answer |= {"data": _mislaid(data, fault), "usage": {"prompt_tokens": sum(counts)}}
        self._answer(200, json.dumps(answer).encode(), fault=fault)
        if fault is None:
            with scenario.lock:
                scenario.answered.update(texts)

    def _body(self) -> dict[str, Any]:
        size = int(self.headers.get("Content-Length", 0))
        body: dict[str, Any] = json.loads(self.rfile.read(size) or b"{}")
        return body

    def _answer(
        self,
        status: int,
        content: bytes,
        *,
        headers: dict[str, str] | None = None,
        fault: _Fault | None = None,
    ) -> None:
        kind = fault.kind if fault else ""
        if kind == "html":
            content = b"<html><body>502 Bad Gateway</body></html>"
        if kind == "hang" and fault:
            time.sleep(fault.seconds)
        if kind == "slow headers" and fault:
            with suppress(OSError):
                for sign in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 1_000:
                    self.wfile.write(bytes([sign]))
                    time.sleep(fault.seconds)
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if kind == "gzip":
            content = gzip.compress(content)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        try:
            if kind == "cut":
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
            elif kind == "drip" and fault:
                for at in range(len(content)):
                    self.wfile.write(content[at : at + 1])
                    time.sleep(fault.seconds)
            else:
                self.wfile.write(content)
        except OSError:
            self.close_connection = True  # The one who asked has gone.


def _spoil(vectors: list[Any], texts: Sequence[str], fault: _Fault | None) -> list[Any]:
    """What is wrong with the vectors of the texts that a fault is about."""
    if fault is None:
        return vectors
    ways: dict[str, Callable[[Any], Any]] = {
        "nan": lambda vector: np.full_like(vector, np.nan),
        "zeros": np.zeros_like,
        "wrong length": lambda vector: vector[:-1],
    }
    spoilt = ways.get(fault.kind)
    if fault.kind == "other vectors":
        return [-vector for vector in vectors]
    if fault.kind == "reversed":
        return vectors[::-1]
    if fault.kind == "shifted":
        return [*vectors[1:], vectors[0]]
    if fault.kind == "constant":
        return [np.full_like(vector, 0.5) for vector in vectors]
    if fault.kind == "all wrong length":
        return [vector[:-1] for vector in vectors]
    if fault.kind == "short":
        return vectors[:-1]
    if spoilt is None:
        return vectors
    return [
        spoilt(vector) if fault.on in text else vector
        for vector, text in zip(vectors, texts, strict=True)
    ]


def _mislaid(data: list[dict[str, Any]], fault: _Fault | None) -> list[dict[str, Any]]:
    """What is wrong with the list of embeddings, in OpenAI's way."""
    match fault.kind if fault else "":
        case "shuffled":
            return data[::-1]
        case "duplicate":
            return [entry | {"index": 0} for entry in data]
        case "no index":
            return [{"embedding": entry["embedding"]} for entry in data]
        case "null":
            return [entry | {"embedding": None} for entry in data]
        case _:
            return data


def _encoded(vector: Any, packed: bool) -> list[float] | str:
    if packed:
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    numbers: list[float] = vector.tolist()
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    server = _Server(("127.0.0.1", parser.parse_args().port), _Handler)
    server.scenarios = {}
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
