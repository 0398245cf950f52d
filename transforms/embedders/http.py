"""Models behind a server: Ollama, and everything that speaks as OpenAI's servers do."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from reembed.transforms.embedders.base import (
    PROBE_TEXTS,
    TOGETHER,
    WITNESS_COSINE,
    Batch,
    Embedder,
    cosines,
    have_direction,
    same_vectors,
)
from reembed.transforms.embedders.client import Busy, Client, Failed, Refused
from reembed.transforms.embedders.endpoint import host
from reembed.transforms.embedders.families import BYTES_A_TOKEN, OLLAMA_NAMES, fold_name
from reembed.transforms.embedders.pace import Budget, Outage, Pace, backoff
from reembed.transforms.embedders.target import Target
from reembed.transforms.embedders.wire import OLLAMA, Answer
from reembed.transforms.errors import EmbedderError, RunError, TextRejected
from reembed.transforms.rows import Vectors

_logger = logging.getLogger("reembed")

MOST_TEXTS = 2_048
"""Texts, tokens and bytes of a request; the first two are all that OpenAI's servers take."""

MOST_TOKENS = 300_000
MOST_BYTES = 4 * 1_048_576

PROBED_TOGETHER = len(TOGETHER)
"""Texts in the largest request of the probe; each larger request is compared when it is made."""

_TELL_SECONDS = 5.0

_MOST_WAITS = 8
"""How often a batch is told to wait, while others are not, until it is taken for too large."""

_MOST_WAITS_ALONE = 20
"""The same for a text that is alone, and is skipped then."""

_START_SECONDS = 60.0
"""How long a server may be busy or failing before the first answer; a model may have to load."""


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
        self._client = Client(target, self._access)
        self._pace = Pace(self._access.most_in_flight)
        self._outage = Outage()
        self._budget = Budget(self._access.most_tokens)
        self._stop = threading.Event()
        self._ended: Exception | None = None
        self._all_spent = False
        self._told = 0.0
        self._most_texts = MOST_TEXTS
        self._bytes = self._tokens = 0
        self._rows_counted = False
        self._window = target.window
        self._started = False
        self._patience = min(_START_SECONDS, self._access.give_up_after)
        self._compared = PROBED_TOGETHER
        self._comparing = threading.Lock()
        self._probe = self._start()

    @property
    def usable(self) -> bool:
        """Whether there is a use in asking it again; also not for one that has spent all."""
        return self._ended is None or self._all_spent

    @property
    def in_flight(self) -> int:
        """Requests that the server can do with at a time, as it seems now."""
        return self._pace.width

    @property
    def measured(self) -> int:
        """The length of the vectors that the server gives."""
        return len(self._probe)

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Return the texts' vectors, shape (len(texts), dimension)."""
        batch = self.embed_batch(texts)
        if batch.wrong:
            raise TextRejected(next(iter(batch.wrong.values())))
        return batch.vectors

    def embed_batch(self, texts: Sequence[str]) -> Batch:
        """Embed texts in one request; wait and ask again where that helps.

        Raises TextRejected if the server will not take one of the texts, or can't do so many,
        RunError if there is no use in going on, and EmbedderError if it mixes texts up.
        """
        failures = waits = 0
        recovered = False
        while True:
            asked = time.monotonic()
            try:
                answer = self._ask(texts)
                break
            except Busy as busy:
                waits += 1
                # Among many who are told to wait, these texts may be what it will never take.
                most = _MOST_WAITS_ALONE if len(texts) == 1 else _MOST_WAITS
                if waits % most == 0 and self._is_well():
                    raise TextRejected(str(busy)) from None
                self._wait(str(busy), busy.seconds, waits - 1, asked)
            except Refused as refused:
                if not self._is_well(asked):
                    self._end(f"{host(self._access.url)} {refused}")
                # It takes others: a filter between may have refused the text.
                raise TextRejected(f"it {refused}") from None
            except (TextRejected, Failed) as error:
                failures += 1
                rejected, slow = isinstance(error, TextRejected), getattr(error, "slow", False)
                if rejected and len(texts) > 1:
                    raise
                if failures == 1 and not rejected and not (slow and len(texts) > 1):
                    self._wait(str(error), None, 0, asked)
                    continue
                if not self._is_well(asked):
                    self._wait_until_well(str(error), asked)
                    if len(texts) == 1 and not recovered:
                        recovered = True  # It was down; this text may not be why.
                        continue
                if rejected:
                    raise
                raise TextRejected(str(error), most=len(texts) // 2 if slow else None) from None
        if failures:
            self._is_well()
        batch = self._batch(texts, answer)
        if len(batch.wrong) == len(texts):
            self._is_well()
        if len(texts) > self._compared:
            self._compare_alone(texts, batch.vectors)
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
        """Ask for no more texts at a time from now on; say so once where that is one."""
        if texts == 1 < self._most_texts:
            _logger.warning(
                "%s takes no two texts in one request, so each text is sent alone", self._at
            )
        self._most_texts = min(self._most_texts, texts)

    def _compare_alone(self, texts: Sequence[str], vectors: Vectors) -> None:
        """Ask for the first, a middle and the last text of a request alone, and compare.

        That is done with each that has more texts than all before; other threads' wait for it.
        Raises EmbedderError if the vectors are others.
        """
        with self._comparing:
            if self._ended is not None:
                raise type(self._ended)(*self._ended.args)
            sound = np.flatnonzero(_sound(vectors))
            if len(texts) <= self._compared or not len(sound):
                return
            for at in dict.fromkeys((sound[0], sound[len(sound) // 2], sound[-1])):
                try:
                    alone = self.embed_batch([texts[at]]).vectors
                except TextRejected:
                    continue
                if _sound(alone)[0] and cosines(alone, vectors[at, None])[0] < WITNESS_COSINE:
                    self._ended = EmbedderError(
                        f"{self._at} gives other vectors for {len(texts)} texts in one request "
                        "than for each alone, or in another order, so rows would get each other's "
                        "vectors; nothing was replaced: see to the server, choose another, or "
                        "have fewer texts sent at a time with --batch"
                    )
                    self._stop.set()
                    raise self._ended
            self._compared = len(texts)

    def _start(self) -> NDArray[np.float32]:
        """Ask for one vector, and return it; raise EmbedderError if the server has none."""
        try:
            answer = self._first_answer()
        except TextRejected as error:
            raise EmbedderError(
                f"{self._at} will not embed even a short probe text with {self._target.model}: "
                f"{error}"
            ) from None
        probe = answer.vectors[0]
        if not _sound(probe[None])[0]:
            raise EmbedderError(f"{self._at} gives vectors that are not finite, or all zeros")
        if self._target.dimension and len(probe) != self._target.dimension:
            raise EmbedderError(
                f"{self._at} gives vectors of {len(probe)} numbers with {self._target.model}, "
                f"not {self._target.dimension}; correct --dim or the configured dimension"
            )
        if self._window is None and self._target.backend == OLLAMA:
            self._window = self._client.shown_window()
        self._started = True
        self._patience = self._access.give_up_after
        return probe

    def _first_answer(self) -> Answer:
        failures = waits = 0
        while True:
            asked = time.monotonic()
            try:
                return self._ask(PROBE_TEXTS[:1])
            except TextRejected:
                # A server may know no base64, and no other length than its own.
                if self._client.packed:
                    self._client.packed = False
                elif self._client.asks_dimension:
                    self._client.asks_dimension = False
                else:
                    raise
            except Busy as busy:
                self._wait(str(busy), busy.seconds, waits, asked)
                waits += 1
            except Failed as failed:
                failures += 1
                if failed.unreachable:
                    self._wait_for_start(failed, failures)
                else:
                    self._wait(str(failed), None, failures - 1, asked)
            except Refused as refused:
                other = OLLAMA_NAMES.get(fold_name(self._client.name), self._client.name)
                named = refused.no_model and self._target.backend == OLLAMA
                if not named or other == self._client.name:
                    raise EmbedderError(f"{host(self._access.url)} {refused}") from None
                self._client.name = other  # Its library has the same model under this name.

    def _wait_for_start(self, failed: Failed, failures: int) -> None:
        """Ask a server that is not there only a few times: it may be starting, or be elsewhere."""
        if failures > 2:
            raise EmbedderError(
                f"{self._at} can't be reached ({failed}); start it, or correct --base-url or the "
                "configured URL"
            )
        self._stop.wait(backoff(failures - 1))

    def _ask(self, texts: Sequence[str]) -> Answer:
        """Send one request when it is its turn and there are tokens left for it."""
        with self._pace.turn():
            if self._ended is not None:
                raise type(self._ended)(*self._ended.args)
            reserved = self._budget.reserve(
                lambda: self._estimate(texts),
                alone=lambda: self._started and not self._rows_counted,
            )
            if reserved is None:
                self._end_of_budget()
            spent = 0
            started = time.monotonic()
            try:
                answer = self._client.ask(texts)
                spent = self._count(texts, answer)
            except (Busy, Failed) as error:
                if isinstance(error, Failed) and not error.free:
                    spent = reserved
                self._pace.refused(time.monotonic() - started)
                raise
            finally:
                self._budget.settle(reserved, spent)
            self._pace.answered(time.monotonic() - started)
        self._outage.answered()
        return answer

    def _count(self, texts: Sequence[str], answer: Answer) -> int:
        """The tokens of an answered request; what the server counted makes estimates better."""
        counted = _believable(answer.tokens, texts)
        if counted is None:
            return self._estimate(texts)
        rows = texts[0] not in PROBE_TEXTS
        if rows and not self._rows_counted:  # Rows are better than what stood for them.
            self._tokens = self._bytes = 0
            self._rows_counted = True
        if rows or not self._rows_counted:
            self._tokens += counted
            self._bytes += self._size(texts)
        return counted

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
        tokens = _believable(answer.tokens, texts) or self._estimate(texts)
        return Batch(vectors, tokens=tokens, sizes=(tokens,), cut=frozenset(cut), wrong=wrong)

    def _is_well(self, since: float | None = None) -> bool:
        """Whether the server has given a right answer since a moment, or does so now.

        It is asked for a text that is known; if its vector is another one now, the run ends.
        """
        if since is not None and self._outage.answered_since(since):
            return True
        try:
            vector = self._ask(PROBE_TEXTS[:1]).vectors[0]
        except (TextRejected, Busy, Failed):
            return False
        except Refused as refused:
            self._end(f"{host(self._access.url)} {refused}")
        if len(vector) != len(self._probe):
            self._end(
                f"{self._at} gives vectors of {len(vector)} numbers now, and gave "
                f"{len(self._probe)} before: it has another model"
            )
        if not same_vectors(vector[None], self._probe[None], least=self._target.noise):
            self._end(f"{self._at} gives another vector for the same text now: another model")
        return True

    def _wait_until_well(self, reason: str, asked: float) -> None:
        """Wait until the server embeds a text that is known to be fine."""
        attempt = 1
        self._wait(reason, None, attempt, asked)
        while not self._is_well():
            attempt += 1
            self._wait(reason, None, attempt, asked)

    def _wait(self, reason: str, seconds: float | None, attempt: int, asked: float) -> None:
        """Wait before the next attempt; end the run if the server has been away for too long."""
        away = self._outage.failed(asked)
        wait = seconds or backoff(attempt)
        if away + wait > self._patience:
            asks = f"; it asks to wait {seconds:.0f} s" if seconds else ""
            self._end(
                f"{self._at} gives no right answer ({reason}{asks}), tried for {away:.0f} s of "
                f"{self._patience:g} s"
            )
        now = time.monotonic()
        if away + wait > _TELL_SECONDS and now - self._told > _TELL_SECONDS:
            self._told = now
            _logger.warning("%s gives no right answer (%s); waiting", self._at, reason)
        self._stop.wait(wait)

    def _end(self, why: str) -> NoReturn:
        """End the run, for all threads."""
        if self._started:
            why = f"{why}; what is staged stays: the same command goes on"
        self._ended = RunError(why) if self._started else EmbedderError(why)
        self._stop.set()
        raise self._ended

    def _end_of_budget(self) -> NoReturn:
        self._all_spent = True
        self._end(
            f"stopped, since the next request would pass --max-tokens "
            f"{self._access.most_tokens}: {self._budget.spent} tokens are spent"
        )

    def _estimate(self, texts: Sequence[str]) -> int:
        """Tokens of texts, by their bytes and what the server has counted so far."""
        ratio = self._bytes / self._tokens if self._tokens else BYTES_A_TOKEN
        return int(self._size(texts) / max(ratio, 0.5)) + 1

    def _size(self, texts: Sequence[str]) -> int:
        return sum(len((self._target.prompt + text).encode()) for text in texts)

    @property
    def _at(self) -> str:
        return f"the server at {host(self._access.url)}"


def _sound(vectors: Vectors) -> NDArray[np.bool_]:
    """Which vectors say anything; shape (texts,)."""
    finite: NDArray[np.bool_] = np.all(np.isfinite(vectors), axis=1)
    return finite & have_direction(vectors)


def _believable(tokens: int | None, texts: Sequence[str]) -> int | None:
    """What a server says that it counted, unless texts can't have so many tokens."""
    most = sum(4 * len(text.encode()) + 64 for text in texts)
    return tokens if tokens is not None and tokens <= most else None
