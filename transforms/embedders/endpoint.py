"""Where texts and keys may be sent, decided before anything is."""

from __future__ import annotations

import ipaddress
import os
import socket
import stat
from pathlib import Path
from urllib.parse import urlsplit

from reembed.transforms.embedders.secrets import fetch_secret
from reembed.transforms.embedders.target import Access
from reembed.transforms.errors import EmbedderError
from reembed.transforms.hiding import PROXY_VARIABLES, note_secret, origin

EGRESS = ("allow", "deny", "loopback-only", "internal-only")
"""The values of AI_MEMORY_INFERENCE_EGRESS: where a program may send texts to."""

_MOST_KEY_BYTES = 65_536
_PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")


def check_endpoint(access: Access) -> None:
    """Raise EmbedderError if the URL is none, or texts or the key may not be sent there."""
    check_url(access.url)
    _check_egress(access)
    secret = urlsplit(access.url).scheme == "https" or is_loopback(access.url)
    if access.key_source and not secret and not access.insecure_key:
        raise EmbedderError(
            f"the key would be sent to {host(access.url)} over http, where others can read it; "
            "use https, unset the key, or say --insecure-key if the network is trusted"
        )


def check_url(url: str) -> None:
    """Raise EmbedderError for what is no URL of a server, or holds a password."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        parts, sound = None, None
    if parts is None or not sound:
        raise EmbedderError(
            "the server's URL is not like https://host:port/path; correct --base-url or the "
            "configured base_url"
        )
    if "@" in url or parts.query or parts.fragment:
        raise EmbedderError(
            "the server's URL holds a user, a password or a query, which would end up in logs; "
            "give the key by a variable or a file instead"
        )
    _check_host(parts.hostname or "")


def _check_host(name: str) -> None:
    try:
        name.encode("idna")
    except UnicodeError:
        raise EmbedderError(
            "the host in the server's URL is no name of one: between its dots there may be 1 to 63 "
            "signs; correct --base-url or the configured base_url"
        ) from None


def host(url: str) -> str:
    """The host of a server's URL, with its port if it has one, as it may be shown.

    >>> host("http://localhost:11434/v1"), host("http://me:pw@localhost")
    ('localhost:11434', 'its URL')
    """
    return origin(url).partition("://")[2] or "its URL"


def is_loopback(url: str) -> bool:
    """Whether a URL's host is this machine, by its name or address alone.

    >>> is_loopback("http://127.0.0.1:1/v1"), is_loopback("http://localhost.example.org")
    (True, False)
    """
    name = urlsplit(url).hostname or ""
    address = _address(name)
    return address.is_loopback if address else name == "localhost" or name.endswith(".localhost")


def check_proxies() -> None:
    """Raise EmbedderError for a proxy of the environment that is no URL of one.

    A password with / or # in it would end the URL early, and its rest be taken for a path.
    """
    for name in PROXY_VARIABLES:
        for variable in (name, name.lower()):
            if not _is_proxy(os.environ.get(variable, "").strip()):
                raise EmbedderError(
                    f"{variable} is no URL of a proxy such as http://user:password@host:port; "
                    "write / # ? @ and % in a password as %2F %23 %3F %40 and %25, or unset it"
                )


def _is_proxy(url: str) -> bool:
    if not url:
        return True
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        sound = bool(parts.hostname) and parts.port != 0
        (parts.hostname or "").encode("idna")
    except ValueError:
        return False
    rest = parts.path not in ("", "/") or parts.query or parts.fragment
    doubtful = parts.netloc.count("@") > 1 or not parts.netloc.isprintable()
    return sound and not rest and not doubtful and parts.scheme.lower() in _PROXY_SCHEMES


def _check_egress(access: Access) -> None:
    """Obey what the operator allows; a name that has to be looked up is looked up here."""
    refused = {
        "allow": False,
        "deny": True,
        "loopback-only": not is_loopback(access.url),
        "internal-only": not is_loopback(access.url) and not _is_internal(access.url),
    }[access.egress]
    if refused:
        raise EmbedderError(
            f"AI_MEMORY_INFERENCE_EGRESS is {access.egress}, so no text may be sent to "
            f"{host(access.url)}; nothing was sent: use --backend local, or change the setting"
        )


def _is_internal(url: str) -> bool:
    """Whether every address of a URL's host is private; false if it has none."""
    parts = urlsplit(url)
    name = parts.hostname or ""
    if address := _address(name):
        return not address.is_global
    try:
        found = socket.getaddrinfo(name, parts.port or 443, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    addresses = [_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    return bool(addresses) and all(address and not address.is_global for address in addresses)


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def is_exposed(path: Path) -> bool:
    """Whether a file may be read by others than its owner, or written; such holds no key."""
    return _may_be_read(path.stat())


def _may_be_read(found: os.stat_result) -> bool:
    return bool(stat.S_IMODE(found.st_mode) & ~stat.S_IRUSR)


def read_key_file(path: Path) -> str:
    """Read a key's file; from then on the key is shown nowhere, nor the path: it may be the key.

    Raises EmbedderError if there is none, or others can read it.
    """
    try:
        # Without waiting for a pipe's other end; and what was looked at is what is read.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise EmbedderError("api_key_file names what is not a file; correct the setting")
            content = file.read(_MOST_KEY_BYTES + 1)
        if len(content) > _MOST_KEY_BYTES:
            raise ValueError
        key = content.decode().strip()
        note_secret(key)
        if _may_be_read(found):
            raise EmbedderError(
                "the file that api_key_file names holds a key and must be readable by you "
                "alone: chmod 0400 it"
            )
        return key
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it holds no key"
        raise EmbedderError(
            f"the key can't be read from the file that api_key_file names ({why}); correct the "
            "setting"
        ) from None


def read_key(access: Access) -> str | None:
    """Read the key from where it is kept; None if there is none.

    Raises EmbedderError if it is not there, or others can read the file.
    """
    if access.key_variable is not None:
        key = os.environ.get(access.key_variable, "").strip()
        if not key:
            raise EmbedderError(
                f"the key is to be read from {access.key_source}, which is not set here; set it"
            )
    elif access.key_file is not None:
        key = read_key_file(Path(access.key_file))
    elif access.key_secret is not None:
        key = fetch_secret(access.key_secret)
    else:
        return None
    note_secret(key)
    if not key.isascii() or not key.isprintable() or " " in key:
        # Not quoted: the message must not hold the key.
        raise EmbedderError("the key holds blanks or signs that no HTTP header takes; check it")
    return key
