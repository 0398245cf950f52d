"""What may be shown of words that come from outside: nothing that gives away a key or a password.

What a server answers, what a library says and what a setting holds is shown only through
`shown`, a URL only through `origin`, and where a key is kept only through `key_words`.
"""

from __future__ import annotations

import base64
import html
import os
import re
import tomllib
import unicodedata
from collections.abc import Iterator, Sequence
from urllib.parse import quote, unquote, urlsplit

KEY_VARIABLES = frozenset(
    {
        "AI_MEMORY_EMBED_API_KEY",
        "DASHSCOPE_API_KEY",
        "GEMINI_API_KEY",
        "GOOGLE_API_KEY",
        "OPENAI_API_KEY",
        "OPENROUTER_API_KEY",
        "QWEN_API_KEY",
        "XAI_API_KEY",
    }
)
"""Variables that a key is looked for in, whatever the settings say; their names are no secret."""

PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
"""Variables that name a proxy, in capitals or not."""

MOST_SHOWN = 200
"""Characters of words from outside that are shown."""

_HUB_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_URL_VARIABLES = ("AI_MEMORY_STORE_URL", "AI_MEMORY_DB")

_LONG = 12
_SHARED = 6
"""Consecutive characters of a secret that must not be shown; of a shorter secret, all of it."""

_SECRET_NAME = re.compile(r"key|secret|token|password|passwd", re.IGNORECASE)

_noted: set[str] = set()


def note_secret(secret: str) -> None:
    """Have this process never show a key or a password, nor a part of it."""
    _noted.update(_spellings(secret))


def shown(said: object) -> str:
    """Words from outside, on one line and cut short; nothing if they give away a secret.

    >>> shown("no such\\nmodel")
    'no such model'
    """
    line = "".join(sign if sign.isprintable() else " " for sign in str(said))
    line = " ".join(line.split())
    secrets = sorted(known_secrets(), key=len, reverse=True)
    for secret in secrets:
        if len(secret) >= _LONG:
            line = line.replace(secret, "***")
    read = {line, *_readings(line)}
    line = line[:MOST_SHOWN]
    return "" if any(gives_away(one, secret) for secret in secrets for one in read) else line


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).splitlines() or [""])[0]


def shown_value(name: str, value: object) -> str:
    """The value of a setting as it ends a sentence; nothing of one that may hold a secret.

    >>> shown_value("dim", "many"), shown_value("api_key_env", ["sk-1"]), shown_value("url", 1)
    (", not 'many'", '', '')
    """
    if _SECRET_NAME.search(name) or "url" in name.lower():
        return ""
    words = shown(repr(value))
    return f", not {words}" if words else ""


def is_secret_name(name: str) -> bool:
    """Whether a setting is called so that its value may be a key or a password."""
    return bool(_SECRET_NAME.search(name))


def file_trouble(error: BaseException) -> str:
    """Why a file of settings can't be read, without a word of what is in it.

    >>> file_trouble(tomllib.TOMLDecodeError("Cannot declare sk-1 twice (at line 3, column 4)"))
    'it is no TOML, at line 3, column 4'
    """
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    if isinstance(error, RuntimeError):  # As pathlib says it.
        return "there is no such home"
    if why := getattr(error, "strerror", None):
        return str(why)
    if not isinstance(error, tomllib.TOMLDecodeError):  # In our own words, or Python's of a path.
        return str(error)
    place = re.search(r"\(at (line \d+, column \d+|end of document)\)$", str(error))
    return f"it is no TOML, at {place[1]}" if place else "it is no TOML"


def shown_complaint(said: str) -> str:
    """Return argparse's message without values that may be a key.

    >>> shown_complaint("unrecognized arguments: --api-key sk-1 --to=me")
    'unrecognized arguments: --api-key, --to'
    >>> shown_complaint("argument --insecure-key: ignored explicit argument 'sk-1'")
    'argument --insecure-key: ignored explicit argument'
    """
    before, unknown, given = said.partition("unrecognized arguments: ")
    if unknown and not before:
        return f"{unknown}{shown_flags(given.split())}"
    flag = re.match(r"argument (\S+): [^\"']*", said)
    if flag and is_secret_name(flag[1]):
        return shown(flag[0]).rstrip(" :")
    return shown(said)


def shown_flags(words: Sequence[str]) -> str:
    """The flags among the words of a command line, without their values.

    A short first word of letters alone is a command that is none, not a key.

    >>> shown_flags(["--to=me", "--at", "sk-1"]), shown_flags(["sk-1"]), shown_flags(["statuses"])
    ('--to, --at', 'a word that belongs to no flag', 'statuses')
    """
    flags = [word.partition("=")[0] for word in words]
    named = [shown(flag) for flag in flags if re.fullmatch(r"--?[A-Za-z][A-Za-z_-]*", flag)]
    named += [shown(word) for word in words[:1] if re.fullmatch(r"[a-z]{1,12}", word)]
    return ", ".join(named) or "a word that belongs to no flag"


def origin(url: str) -> str:
    """Scheme, host and port of a URL that has no user part; nothing of any other.

    >>> origin("https://host:8000/v1?key=1"), origin("https://me:pw@host/"), origin("http://a:1/b@c")
    ('https://host:8000', '', '')
    """
    try:
        parts = urlsplit(url)
        sound = parts.scheme and parts.hostname and parts.port != 0 and "@" not in url
    except ValueError:
        return ""
    return shown(f"{parts.scheme}://{parts.netloc}") if sound else ""


def key_words(variable: str | None, file: str | None, secret: str | None) -> str | None:
    """Describe where a key is kept; None if there is no key.

    A name of a variable that is not set may be the key itself, put into the wrong setting.
    """
    if variable is not None:
        known = variable in KEY_VARIABLES or os.environ.get(variable, "").strip()
        return variable if known else "the variable that api_key_env names"
    if file is not None:
        return "the file that api_key_file names"
    return None if secret is None else "the secret that --key-secret names"


def gives_away(line: str, secret: str) -> bool:
    """Whether a line holds a short secret, or six characters in a row of a long one.

    Blanks, capitals and marks between the characters don't hide it.

    >>> gives_away("S K - 0 1 2 3 4", "sk-0123456789abcdef"), gives_away("0123", "01234")
    (True, False)
    """
    for fold in (_without_blanks, _only_letters):
        held, wanted = fold(line), fold(secret)
        size = _SHARED if len(secret) >= _LONG else len(wanted)
        pieces = (wanted[at : at + size] for at in range(len(wanted) - size + 1))
        if any(piece and piece in held for piece in pieces):
            return True
    return False


def holds_secret(text: str) -> bool:
    """Whether a text holds a whole key or password that this process knows of."""
    return any(len(secret) >= _LONG and secret in text for secret in known_secrets())


def known_secrets() -> set[str]:
    """The keys and passwords that this process knows of: those it read, those of its variables."""
    found = set(_noted)
    for name in (*KEY_VARIABLES, *_HUB_VARIABLES):
        found.update(_spellings(os.environ.get(name, "")))
    for name in PROXY_VARIABLES:
        for variable in (name, name.lower()):
            found.update(_passwords(os.environ.get(variable, ""), tokens=True))
    for name in _URL_VARIABLES:
        found.update(_passwords(os.environ.get(name, "")))
    return found


def _passwords(url: str, *, tokens: bool = False) -> Iterator[str]:
    """The password of a URL, also where it has signs in it that no URL may have.

    With `tokens`, a user without a password is one: a proxy's token may be written so.
    """
    start, scheme, rest = url.strip().partition("://")
    held = re.match(r"([^:@/]*)(?::(.*))?@", rest if scheme else start.lstrip("/"), re.DOTALL)
    if held is None:
        return
    user, password = held[1], held[2] or ""
    if password or tokens:
        yield from _spellings(password or user)
        pair = f"{unquote(user)}:{unquote(password)}"
        yield base64.b64encode(pair.encode()).decode()


def _spellings(secret: str) -> Iterator[str]:
    if secret := secret.strip():
        yield from {secret, unquote(secret), quote(secret, safe="")}
        if len(secret) >= _LONG:
            content = secret.encode(errors="replace")
            yield content.hex()
            for before in range(3):  # What it looks like depends on what stands before it.
                written = base64.b64encode(bytes(before) + content).decode()
                yield written[4 if before else 0 : len(written) // 4 * 4 - 4]


def _readings(line: str) -> Iterator[str]:
    """Decode a line from URL, HTML and JSON escapes."""
    yield unquote(line)
    yield html.unescape(line)
    yield re.sub(r"\\[ux]\{?([0-9a-fA-F]{2,4})\}?", lambda sign: chr(int(sign[1], 16)), line)


def _without_blanks(text: str) -> str:
    return "".join(text.casefold().split())


def _only_letters(text: str) -> str:
    """Letters and digits alone, without accents."""
    return "".join(
        sign for sign in unicodedata.normalize("NFKD", text) if sign.isalnum()
    ).casefold()
