"""One request to a server that embeds, and all the ways in which it can fail."""

from __future__ import annotations

import os
import re
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx2

from reembed.transforms.embedders.endpoint import (
    check_endpoint,
    check_proxies,
    host,
    is_loopback,
    read_key,
)
from reembed.transforms.embedders.families import same_model
from reembed.transforms.embedders.target import Access, Target
from reembed.transforms.embedders.wire import (
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
from reembed.transforms.embedders.within import within
from reembed.transforms.errors import EmbedderError, TextRejected
from reembed.transforms.hiding import origin, shown

_CONNECT_SECONDS = 10.0

_NUMBER_BYTES = 32
"""The most that an answer may take for a number; and a vector has at most so many:"""

_MOST_NUMBERS = 65_536
_QUOTED = 16
"""So many signs of a text in a server's complaint, and it is not shown."""


class Busy(Exception):
    """The server asks to wait: for `seconds`, if it says for how long."""

    def __init__(self, reason: str, seconds: float | None) -> None:
        super().__init__(reason)
        self.seconds = seconds


class Failed(Exception):
    """The server gave no right answer, which may pass.

    `slow` says that it took too long, `unreachable` that it is not there. Unless `free`, it may
    have counted the tokens all the same.
    """

    def __init__(
        self, reason: str, *, slow: bool = False, unreachable: bool = False, free: bool = False
    ) -> None:
        super().__init__(reason)
        self.slow = slow
        self.unreachable = unreachable
        self.free = free or unreachable


class Refused(Exception):
    """The server refuses the key, or has no such model (`no_model`)."""

    def __init__(self, reason: str, *, no_model: bool = False) -> None:
        super().__init__(reason)
        self.no_model = no_model


@dataclass(frozen=True)
class Response:
    """An answer as it came."""

    status: int
    headers: Mapping[str, str]
    content: bytes


class Client:
    """A server that embeds, asked for one model.

    `name` is what the model is called there. Vectors are asked for as base64 while it is
    `packed`, and of the target's length if it `asks_dimension`.
    """

    def __init__(self, target: Target, access: Access) -> None:
        check_endpoint(access)
        self._access = access
        self._backend, self._model = target.backend, target.model
        self._dimension, self._prompt = target.dimension, target.prompt
        self._key = read_key(access)
        self.name = target.model
        self.packed = target.backend != OLLAMA
        self.asks_dimension = access.asks_dimension
        self._client = _make_client(access, self._key)

    def ask(self, texts: Sequence[str]) -> Answer:
        """Send one request; the vectors may be of another length than the target's.

        Raises TextRejected if the server will not take a text, or not so many; Busy, Failed or
        Refused for what is not the texts' fault.
        """
        body = request_body(
            self._backend,
            self.name,
            [self._prompt + text for text in texts],
            dimension=self._dimension if self.asks_dimension else None,
            packed=self.packed,
        )
        response = self._send(path_of(self._backend), body, len(texts))
        self._check_status(response, texts)
        try:
            answer = read_answer(self._backend, response.content, len(texts))
        except BadAnswer as error:
            if code := read_code(response.content):  # Some say 200 and put it in the body.
                self._check_status(replace(response, status=code), texts)
            raise Failed(str(error)) from None
        self._check_model(answer, texts)
        return answer

    def shown_window(self) -> int | None:
        """The tokens that Ollama's model looks at; None if it doesn't say."""
        try:
            body = request_body(OLLAMA, self.name, [], dimension=None, packed=False)
            shown = self._send("/api/show", body, 64)
        except (Failed, Refused):
            return None
        return read_window(shown.content) if shown.status == 200 else None

    def _send(self, path: str, body: bytes, count: int) -> Response:
        """Post a request of `count` texts and read the whole answer, within the time for one.

        The client's own limit is for each piece that comes, and a slow drip never ends.
        """
        slow = Failed(f"it gave no answer within {self._access.timeout:g} s", slow=True)
        try:
            return within(self._access.timeout, lambda: self._exchange(path, body, count))
        except (TimeoutError, httpx2.ReadTimeout, httpx2.WriteTimeout):
            raise slow from None
        except httpx2.ConnectTimeout:
            raise Failed("no connection within 10 s", unreachable=True) from None
        except httpx2.ConnectError as error:
            raise Failed(_why_not_connected(error), unreachable=True) from None
        except httpx2.ProxyError:
            raise Failed("the proxy does not let it be reached", unreachable=True) from None
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            raise Failed(
                f"its answer broke off or can't be read ({type(error).__name__})"
            ) from None
        except (ValueError, httpx2.InvalidURL) as error:
            raise Refused(
                f"can't be asked ({type(error).__name__}); correct its URL, or the proxies of the "
                "environment"
            ) from None

    def _exchange(self, path: str, body: bytes, count: int) -> Response:
        longest = (1 + count) * (self._dimension or _MOST_NUMBERS) * _NUMBER_BYTES
        deadline = time.monotonic() + self._access.timeout
        content = bytearray()
        with self._client.stream("POST", self._access.url.rstrip("/") + path, content=body) as r:
            for chunk in r.iter_bytes():
                content += chunk
                if len(content) > longest + 1_048_576:
                    raise Failed("its answer is longer than the vectors could be")
                if time.monotonic() > deadline:
                    break  # Nobody waits for it any more.
            return Response(r.status_code, r.headers, bytes(content))

    def _check_status(self, response: Response, texts: Sequence[str]) -> None:
        """Tell the ways to fail apart."""
        status = response.status
        if 200 <= status < 300:
            return
        complaint = read_complaint(response.content)
        said = self._said(complaint, texts)
        reason = f"HTTP {status}{_with(said)}"
        if status < 400:
            to = self._said(origin(response.headers.get("location", "")), texts)
            raise Refused(
                f"sends on to {to or 'another place'} (HTTP {status}), where neither a key nor "
                "texts are sent; give that URL with --base-url if it is the right one"
            )
        wrong_key = status == 400 and re.search(r"api[ _-]?key", complaint, re.IGNORECASE)
        if status in (401, 402, 403) or wrong_key:
            source = self._access.key_source
            raise Refused(
                f"refuses the key ({reason}); "
                + (f"correct the one in {source}" if source else "it was sent none: set one")
            )
        if status in (404, 405):
            hint = (
                f"fetch it there (ollama pull {self.name}), or say --backend openai-compatible if "
                "that is what the server is"
                if self._backend == OLLAMA
                else "correct --model or --base-url"
            )
            raise Refused(
                f"has no {self.name} at {path_of(self._backend)} ({reason}), and no other "
                f"model is put in its place: {hint}",
                no_model=True,
            )
        if status == 429 and b"insufficient_quota" in response.content:
            raise Refused(f"says that what may be spent there is spent ({reason})")
        too_large = status == 429 and re.search(r"too (large|long)", complaint, re.IGNORECASE)
        if status in (400, 413, 422) or too_large:
            most = _named_limit(complaint, len(texts)) or len(texts) // 2
            raise TextRejected(reason, most=most or None)
        if status in (429, 503, 529):
            raise Busy(reason, _retry_after(response.headers))
        raise Failed(reason, free=True)

    def _said(self, said: str, texts: Sequence[str]) -> str:
        """What the server says, on one line; nothing that quotes a text or the key."""
        line = shown(said)
        folded = line.casefold()
        for text in texts:
            pieces = " ".join(text.casefold().split())
            if pieces and (pieces in folded or _shares(folded, pieces)):
                return ""
        return line

    def _check_model(self, answer: Answer, texts: Sequence[str]) -> None:
        if answer.model is not None and not same_model(self._model, answer.model):
            named = self._said(answer.model, texts) or "another"
            raise Refused(
                f"answers with the model {named!r} where {self._model} was asked for; if "
                "that is the one that is wanted, name it with --model"
            )


def _make_client(access: Access, key: str | None) -> httpx2.Client:
    """A client that sends the key nowhere but to the server, and goes round no proxy to it."""
    headers = {"Content-Type": "application/json", "User-Agent": "reembed"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    # A proxy is elsewhere, so it is for those who may send texts anywhere.
    by_proxy = access.egress == "allow" and not is_loopback(access.url)
    if by_proxy:
        check_proxies()
    certificates = _certificates()
    try:
        httpx2.URL(access.url)
        return httpx2.Client(
            headers=headers,
            timeout=httpx2.Timeout(access.timeout, connect=_CONNECT_SECONDS, pool=None),
            # No most of all: a request that was left behind must not hold up the next.
            limits=httpx2.Limits(
                max_connections=None, max_keepalive_connections=access.most_in_flight
            ),
            follow_redirects=False,
            verify=certificates,
            trust_env=by_proxy,
        )
    except (httpx2.InvalidURL, ValueError, ImportError):
        # Not what the library says: it quotes what it stumbles over.
        raise EmbedderError(
            f"the server at {host(access.url)} can't be asked: its URL, or a proxy or NO_PROXY in "
            "the environment, is not as it should be; correct --base-url, the configured base_url "
            "or these variables"
        ) from None


def _certificates() -> ssl.SSLContext:
    """The authorities that servers' certificates are checked with.

    Raises EmbedderError where the environment names some that can't be read.
    """
    named = [name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)][:1]
    try:
        # A pipe would be waited for, and a device read for ever.
        if named == ["SSL_CERT_FILE"] and not Path(os.environ[named[0]]).is_file():
            raise FileNotFoundError
        return httpx2.create_ssl_context()
    except (OSError, ValueError):
        what = named[0] if named else "this machine's store of certificates, or SSLKEYLOGFILE,"
        raise EmbedderError(
            f"{what} names no file or directory of certificates that can be read, so no server can "
            "be trusted; correct it, or unset it"
        ) from None


def _why_not_connected(error: BaseException) -> str:
    """Why there is no connection, in words of our own where the cause is known."""
    cause: BaseException | None = error
    while cause is not None:
        match cause:
            case ssl.SSLCertVerificationError():
                why = shown(cause.verify_message)
                return f"its certificate is not accepted{_with(why)}"
            case ssl.SSLError():
                return f"it does not speak TLS as it should{_with(shown(cause.reason or ''))}"
            case socket.gaierror():
                return "its name has no address"
            case OSError() if cause.errno:
                return os.strerror(cause.errno)
        cause = cause.__cause__ or cause.__context__
    return "no connection"


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
    except (ValueError, OverflowError):
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


def _shares(line: str, text: str) -> bool:
    """Whether a line and a text have 16 signs in a row in common, or a text's first half.

    >>> _shares("can't embed: the quick brown fox", "lo, the quick brown fox jumps")
    True
    """
    size = min(_QUOTED, max(8, len(text) // 2))
    return any(line[at : at + size] in text for at in range(len(line) - size + 1))


def _with(said: str) -> str:
    return f": {said}" if said else ""
