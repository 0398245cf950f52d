"""Models behind a server: Ollama, and everything that speaks as OpenAI's servers do."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import NoReturn

import httpx2
import numpy as np

from transforms.embedders.base import PROBE_TEXTS, Batch, Embedder
from transforms.embedders.endpoint import check_endpoint, host, is_loopback, read_key
from transforms.embedders.families import BYTES_A_TOKEN, OLLAMA_NAMES, fold_name, same_model
from transforms.embedders.pace import Budget, Outage, Pace, backoff
from transforms.embedders.target import Access, Target
from transforms.embedders.wire import (
    OLLAMA,
    Answer,
    BadAnswer,
    path_of,
    read_answer,
    read_code,
    read_complaint,
    read_window,
    request_body,
)
from transforms.errors import EmbedderError, RunError, TextRejected
from transforms.rows import Vectors

MOST_TEXTS = 2_048
"""Texts, tokens and bytes of a request; the first two are all that OpenAI's servers take."""

MOST_TOKENS = 300_000
MOST_BYTES = 4 * 1_048_576

_CONNECT_SECONDS = 10.0
_START_SECONDS = 60.0
"""How long a server may be busy or failing before the first answer; a model may have to load."""

_NUMBER_BYTES = 32
"""The most that an answer may take for a number; and a vector has at most so many:"""

_MOST_NUMBERS = 65_536
_QUOTED = 16
"""So many signs of a text in a server's complaint, and it is not shown."""


class _Busy(Exception):
    """The server asks to wait: for `seconds`, if it says for how long."""

    def __init__(self, reason: str, seconds: float | None) -> None:
        super().__init__(reason)
        self.seconds = seconds


class _Failed(Exception):
    """The server gave no right answer, which may pass; `slow` says that it took too long."""

    def __init__(self, reason: str, *, slow: bool = False, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.slow = slow
        self.unreachable = unreachable


class _Ended(Exception):
    """There is no use in going on; `no_model` if it has no model of this name."""

    def __init__(self, reason: str, *, no_model: bool = False) -> None:
        super().__init__(reason)
        self.no_model = no_model


@dataclass(frozen=True)
class _Response:
    status: int
    headers: Mapping[str, str]
    content: bytes


class HttpEmbedder(Embedder):
    """A model behind a server, asked by many threads at a time.

    What fails is told apart. A server that is busy is waited for; a text that it will not take
    is left alone, and the others go on; a server that is down is waited for so long as
    `Access.give_up_after` says; a key or a model that it refuses ends the run.
    """

    def __init__(self, target: Target) -> None:
        if target.access is None:
            raise EmbedderError(f"it is not said at which server {target} is")
        self._target, self._access = target, target.access
        check_endpoint(self._access)
        self._key = read_key(self._access)
        try:
            self._client = _make_client(self._access, self._key)
        except (httpx2.InvalidURL, ValueError) as error:
            raise EmbedderError(
                f"the server at {host(self._access.url)} can't be asked ({_first_line(error)}); "
                "correct --base-url, the configured URL, or the proxies of the environment"
            ) from None
        self._pace = Pace(self._access.most_in_flight)
        self._outage = Outage()
        self._budget = Budget(self._access.most_tokens)
        self._stop = threading.Event()
        self._ended: Exception | None = None
        self._name = target.model
        self._packed = target.backend != OLLAMA
        self._most_texts = MOST_TEXTS
        self._bytes = self._tokens = 0
        self._window = target.window
        self._started = False
        self._patience = min(_START_SECONDS, self._access.give_up_after)
        self._start()

    @property
    def in_flight(self) -> int:
        """Requests that the server can do with at a time, as it seems now."""
        return self._pace.width

    @property
    def measured(self) -> int:
        """The length of the vectors that the server gives."""
        return self._measured

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Return the texts' vectors, shape (len(texts), dimension)."""
        batch = self.embed_batch(texts)
        if batch.wrong:
            raise TextRejected(next(iter(batch.wrong.values())))
        return batch.vectors

    def embed_batch(self, texts: Sequence[str]) -> Batch:
        """Embed texts in one request; wait and ask again where that helps.

        Raises TextRejected if the server will not take one of the texts, or can't do so many,
        and RunError if there is no use in going on.
        """
        asked = time.monotonic()
        failures = waits = 0
        while True:
            if self._ended is not None:
                raise type(self._ended)(*self._ended.args)
            try:
                answer = self._ask(texts)
            except _Busy as busy:
                self._wait(str(busy), busy.seconds, waits)
                waits += 1
                continue
            except TextRejected as rejected:
                if len(texts) > 1 or self._is_well(asked):
                    raise
                self._wait(str(rejected), None, failures)  # It takes no text at all.
                failures += 1
                continue
            except _Failed as failed:
                failures += 1
                if failed.slow and len(texts) > 1 and self._is_well(asked):
                    raise TextRejected(str(failed), most=len(texts) // 2) from None
                if failures > 1 and self._is_well(asked):
                    # It answers others: these texts are the trouble.
                    raise TextRejected(str(failed)) from None
                self._wait(str(failed), None, failures - 1)
                continue
            except _Ended as ended:
                self._end(f"{host(self._access.url)} {ended}")
            batch = self._batch(texts, answer)
            if len(batch.wrong) == len(texts):
                self._check_dimension()
            return batch

    def fitting(self, texts: Sequence[str]) -> int:
        """How many of these texts, from the first on, go in one request."""
        tokens = size = 0
        for at, text in enumerate(texts[: self._most_texts]):
            tokens += self._estimate([text])
            size += len(text.encode())
            if at and (tokens > MOST_TOKENS or size > MOST_BYTES):
                return at
        return min(len(texts), self._most_texts)

    def learn_limit(self, texts: int) -> None:
        """Ask for no more texts at a time from now on."""
        self._most_texts = min(self._most_texts, texts)

    def _start(self) -> None:
        """Ask for one vector; raise EmbedderError if the server has none of the model."""
        try:
            answer = self._first_answer()
        except TextRejected as error:
            raise EmbedderError(
                f"{self._at} will not embed even a short probe text with {self._target.model}: "
                f"{error}"
            ) from None
        except RunError as error:
            raise EmbedderError(str(error)) from None
        self._measured = len(answer.vectors[0])
        if self._target.dimension and self._measured != self._target.dimension:
            raise EmbedderError(
                f"{self._at} gives vectors of {self._measured} numbers with {self._target.model}, "
                f"not {self._target.dimension}; correct --dim or the configured dimension"
            )
        if self._window is None and self._target.backend == OLLAMA:
            self._window = self._shown_window()
        self._started = True
        self._patience = self._access.give_up_after

    def _first_answer(self) -> Answer:
        failures = waits = 0
        while True:
            try:
                return self._ask(PROBE_TEXTS[:1])
            except TextRejected:
                if not self._packed:
                    raise
                self._packed = False  # A server may know no base64.
            except _Busy as busy:
                self._wait(str(busy), busy.seconds, waits)
                waits += 1
            except _Failed as failed:
                failures += 1
                if failed.unreachable:
                    self._wait_for_start(failed, failures)
                else:
                    self._wait(str(failed), None, failures - 1)
            except _Ended as ended:
                other = OLLAMA_NAMES.get(fold_name(self._name), self._name)
                if not (ended.no_model and self._target.backend == OLLAMA and other != self._name):
                    raise EmbedderError(f"{host(self._access.url)} {ended}") from None
                self._name = other  # Its library has the same model under this name.

    def _wait_for_start(self, failed: _Failed, failures: int) -> None:
        """Ask a server that is not there only a few times: it may be starting, or be elsewhere."""
        if failures > 2:
            raise EmbedderError(
                f"{self._at} can't be reached ({failed}); start it, or correct --base-url or the "
                "configured URL"
            )
        self._stop.wait(backoff(failures - 1))

    def _ask(self, texts: Sequence[str]) -> Answer:
        """Send one request; what it gives may be of another length than the target's."""
        prompt = self._target.prompt
        body = request_body(
            self._target.backend,
            self._name,
            [prompt + text for text in texts],
            dimension=self._target.dimension if self._access.asks_dimension else None,
            packed=self._packed,
        )
        estimate = self._estimate(texts)
        spent = 0
        with self._pace.turn():
            if self._ended is not None:
                raise type(self._ended)(*self._ended.args)
            if not self._budget.reserve(estimate):
                self._end_of_budget()
            started = time.monotonic()
            try:
                response = self._send(path_of(self._target.backend), body, len(texts))
                self._check_status(response, texts)
                answer = read_answer(self._target.backend, response.content, len(texts))
                self._check_model(answer)
                spent = answer.tokens or estimate
            except BadAnswer as error:
                if code := read_code(response.content):  # Some say 200 and put it in the body.
                    self._check_status(replace(response, status=code), texts)
                raise _Failed(str(error)) from None
            except (_Busy, _Failed):
                self._pace.refused(time.monotonic() - started)
                raise
            finally:
                self._budget.settle(estimate, spent)
            self._pace.answered(time.monotonic() - started)
        self._outage.answered()
        if answer.tokens is not None:
            self._tokens += answer.tokens
            self._bytes += sum(len(text.encode()) for text in texts) + len(texts) * len(prompt)
        return answer

    def _send(self, path: str, body: bytes, count: int) -> _Response:
        """Post a request of `count` texts and read the whole answer, within the time for one."""
        longest = (1 + count) * (self._target.dimension or _MOST_NUMBERS) * _NUMBER_BYTES
        deadline = time.monotonic() + self._access.timeout
        slow = f"it gave no answer within {self._access.timeout:g} s"
        content = bytearray()
        try:
            url = self._access.url.rstrip("/") + path
            with self._client.stream("POST", url, content=body) as r:
                for chunk in r.iter_bytes():
                    content += chunk
                    # The client's own limit is for each piece, and a slow drip never ends.
                    if time.monotonic() > deadline:
                        raise _Failed(slow, slow=True)
                    if len(content) > longest + 1_048_576:
                        raise _Failed("its answer is longer than the vectors could be")
                return _Response(r.status_code, r.headers, bytes(content))
        except httpx2.ConnectTimeout:
            raise _Failed("no connection within 10 s", unreachable=True) from None
        except httpx2.TimeoutException:
            raise _Failed(slow, slow=True) from None
        except httpx2.ConnectError as error:
            raise _Failed(_first_line(error), unreachable=True) from None
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            raise _Failed(
                f"its answer broke off or can't be read ({type(error).__name__})"
            ) from None

    def _check_status(self, response: _Response, texts: Sequence[str]) -> None:
        """Tell the ways to fail apart."""
        status = response.status
        if status == 200:
            return
        said = self._said(response, texts)
        if status < 400:
            to = host(response.headers.get("location", "")) or "nowhere"
            raise _Ended(
                f"sends on to {to} (HTTP {status}), where neither a key nor texts are sent; give "
                "that URL with --base-url if it is the right one"
            )
        wrong_key = re.search(r"api[ _-]?key", said, re.IGNORECASE) and status == 400
        if status in (401, 402, 403) or wrong_key:
            source = self._access.key_variable or self._access.key_file
            raise _Ended(
                f"refuses the key (HTTP {status}{_with(said)}); "
                + (f"correct the one in {source}" if source else "it was sent none: set one")
            )
        if status in (404, 405):
            hint = (
                f"fetch it there (ollama pull {self._name}), or say --backend openai-compatible if "
                "that is what the server is"
                if self._target.backend == OLLAMA
                else "correct --model or --base-url"
            )
            raise _Ended(
                f"has no {self._name} at {path_of(self._target.backend)} (HTTP {status}"
                f"{_with(said)}), and no other model is put in its place: {hint}",
                no_model=True,
            )
        if status == 429 and b"insufficient_quota" in response.content:
            raise _Ended(f"says that what may be spent there is spent (HTTP 429{_with(said)})")
        if status in (429, 503, 529):
            raise _Busy(f"HTTP {status}{_with(said)}", _retry_after(response.headers))
        if status in (400, 413, 422):
            most = _named_limit(said, len(texts)) or len(texts) // 2
            raise TextRejected(f"HTTP {status}{_with(said)}", most=most or None)
        raise _Failed(f"HTTP {status}{_with(said)}")

    def _said(self, response: _Response, texts: Sequence[str]) -> str:
        """What the server says is wrong, on one line; nothing that quotes a text or the key."""
        said = " ".join(read_complaint(response.content).split())[:200]
        if self._key and self._key in said:
            said = said.replace(self._key, "***")
        pieces = [said[at : at + _QUOTED] for at in range(max(1, len(said) - _QUOTED + 1))]
        everything = "\n".join(texts)
        quotes = any(piece in everything for piece in pieces if len(piece) == _QUOTED)
        return "" if quotes or any(text in said for text in texts if text.strip()) else said

    def _check_model(self, answer: Answer) -> None:
        if answer.model is not None and not same_model(self._target.model, answer.model):
            raise _Ended(
                f"answers with the model {answer.model!r} where {self._target.model} was asked "
                f"for; if that is the one that is wanted, name it: --model {answer.model}"
            )

    def _batch(self, texts: Sequence[str], answer: Answer) -> Batch:
        dimension = self._target.dimension
        wrong = {
            at: f"the server gave a vector of {len(vector)} numbers, not {dimension}"
            for at, vector in enumerate(answer.vectors)
            if len(vector) != dimension and np.isfinite(vector).any()
        }
        nothing = np.full(dimension, np.nan, np.float32)
        vectors = np.stack([v if len(v) == dimension else nothing for v in answer.vectors])
        window = self._window
        cut = (
            ()
            if window is None
            else [at for at, text in enumerate(texts) if self._estimate([text]) > window]
        )
        tokens = answer.tokens if answer.tokens is not None else self._estimate(texts)
        return Batch(vectors, tokens=tokens, cut=frozenset(cut), wrong=wrong)

    def _check_dimension(self) -> None:
        """Ask for a text that is known to be fine; end the run if its vector has another length."""
        try:
            answer = self._ask(PROBE_TEXTS[:1])
        except (TextRejected, _Busy, _Failed):
            return
        except _Ended as ended:
            self._end(f"{host(self._access.url)} {ended}")
        if len(answer.vectors[0]) != self._target.dimension:
            self._end(
                f"{self._at} gives vectors of {len(answer.vectors[0])} numbers now, and gave "
                f"{self._target.dimension} before: it has another model"
            )

    def _is_well(self, since: float) -> bool:
        """Whether the server has given a right answer since, or does so now."""
        if self._outage.answered_since(since):
            return True
        try:
            self._ask(PROBE_TEXTS[:1])
        except (TextRejected, _Busy, _Failed):
            return False
        except _Ended as ended:
            self._end(f"{host(self._access.url)} {ended}")
        return True

    def _wait(self, reason: str, seconds: float | None, attempt: int) -> None:
        """Wait before the next attempt; end the run if the server has been away for too long."""
        away = self._outage.failed()
        wait = seconds or backoff(attempt)
        if away + wait > self._patience:
            asks = f" and asks to wait {seconds:.0f} s" if seconds else ""
            self._end(f"{self._at} has given no right answer for {away:.0f} s{asks} ({reason})")
        self._stop.wait(wait)

    def _end(self, why: str) -> NoReturn:
        """End the run, for all threads."""
        if self._started:
            why = f"{why}; what is staged stays: the same command goes on"
        self._ended = RunError(why) if self._started else EmbedderError(why)
        self._stop.set()
        raise self._ended

    def _end_of_budget(self) -> NoReturn:
        self._end(
            f"stopped, since the next request would pass --max-tokens "
            f"{self._access.most_tokens}: {self._budget.spent} tokens are spent"
        )

    def _estimate(self, texts: Sequence[str]) -> int:
        """Tokens of texts, by their bytes and what the server has counted so far."""
        ratio = self._bytes / self._tokens if self._tokens else BYTES_A_TOKEN
        size = sum(len(text.encode()) for text in texts) + len(texts) * len(self._target.prompt)
        return int(size / max(ratio, 0.5)) + 1

    def _shown_window(self) -> int | None:
        """The tokens that Ollama's model looks at; None if it doesn't say."""
        try:
            body = request_body(OLLAMA, self._name, [], dimension=None, packed=False)
            shown = self._send("/api/show", body, 64)
        except _Failed:
            return None
        return read_window(shown.content) if shown.status == 200 else None

    @property
    def _at(self) -> str:
        return f"the server at {host(self._access.url)}"


def _make_client(access: Access, key: str | None) -> httpx2.Client:
    """A client that sends the key nowhere but to the server, and goes round no proxy to it."""
    headers = {"Content-Type": "application/json", "User-Agent": "reembed"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    httpx2.URL(access.url)
    return httpx2.Client(
        headers=headers,
        timeout=httpx2.Timeout(access.timeout, connect=_CONNECT_SECONDS, pool=None),
        limits=httpx2.Limits(
            max_connections=access.most_in_flight + 1,
            max_keepalive_connections=access.most_in_flight + 1,
        ),
        follow_redirects=False,
        # A proxy is elsewhere, so it is for those who may send texts anywhere.
        trust_env=access.egress == "allow" and not is_loopback(access.url),
    )


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, from a header that gives them or a date (RFC 9110, 10.2.3).

    >>> _retry_after({"retry-after": "2.5"}), _retry_after({"retry-after": "soon"})
    (2.5, None)
    """
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d+)?", value):
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


def _named_limit(said: str, count: int) -> int | None:
    """The most texts in a request, where a complaint about `count` of them names it.

    >>> _named_limit("batch size 100 > maximum allowed batch size 32", 100)
    32
    """
    if count < 2 or not re.search(r"batch|input|item|limit|maximum|max", said, re.IGNORECASE):
        return None
    named = [int(number) for number in re.findall(r"(?<![\d.])\d{1,4}(?![\d.])", said)]
    return max((number for number in named if 1 <= number < count), default=None)


def _with(said: str) -> str:
    return f": {said}" if said else ""


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
