"""Where texts and keys may be sent, decided before anything is."""

from __future__ import annotations

import ipaddress
import os
import socket
import stat
from pathlib import Path
from urllib.parse import urlsplit

from transforms.embedders.secrets import fetch_secret
from transforms.embedders.target import Access
from transforms.errors import EmbedderError

EGRESS = ("allow", "deny", "loopback-only", "internal-only")
"""The values of AI_MEMORY_INFERENCE_EGRESS: where a program may send texts to."""


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
    if parts.username or parts.password or parts.query or parts.fragment:
        raise EmbedderError(
            f"the URL of the server {parts.hostname} holds a user, a password or a query, which "
            "would end up in logs; give the key by a variable or a file instead"
        )


def host(url: str) -> str:
    """The host of a URL, with its port if it has one.

    >>> host("http://localhost:11434/v1")
    'localhost:11434'
    """
    return urlsplit(url).netloc.rpartition("@")[2]


def is_loopback(url: str) -> bool:
    """Whether a URL's host is this machine, by its name or address alone.

    >>> is_loopback("http://127.0.0.1:1/v1"), is_loopback("http://localhost.example.org")
    (True, False)
    """
    name = urlsplit(url).hostname or ""
    address = _address(name)
    return address.is_loopback if address else name == "localhost" or name.endswith(".localhost")


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
    except OSError:
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
    return bool(stat.S_IMODE(path.stat().st_mode) & ~stat.S_IRUSR)


def read_key(access: Access) -> str | None:
    """Read the key from where it is kept; None if there is none.

    Raises EmbedderError if it is not there, or others can read the file.
    """
    if access.key_variable is not None:
        key = os.environ.get(access.key_variable, "").strip()
        if not key:
            raise EmbedderError(
                f"the key is to be read from {access.key_variable}, which is not set here; set it"
            )
    elif access.key_file is not None:
        path = Path(access.key_file)
        try:
            if is_exposed(path):
                raise EmbedderError(
                    f"{path} holds a key and must be readable by you alone: chmod 0400 it"
                )
            key = path.read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "it is not text"
            raise EmbedderError(
                f"the key can't be read from {path} ({why}); correct api_key_file"
            ) from None
    elif access.key_secret is not None:
        key = fetch_secret(access.key_secret)
    else:
        return None
    if not key.isascii() or not key.isprintable() or " " in key:
        # Not quoted: the message must not hold the key.
        raise EmbedderError("the key holds blanks or signs that no HTTP header takes; check it")
    return key
