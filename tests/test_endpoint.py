"""Where texts and keys may be sent."""

from __future__ import annotations

from pathlib import Path

import pytest
from inline_snapshot import snapshot

from reembed.transforms.embedders import Access
from reembed.transforms.embedders.endpoint import (
    check_endpoint,
    check_url,
    host,
    is_loopback,
    read_key,
)
from reembed.transforms.errors import EmbedderError
from tests.wording import wording

KEY = "sk-secret"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:11434",
        "//localhost",
        "ftp://localhost",
        "http://",
        "http://:80",
        "http://[::1",
        "http://x:99999",
        "http://x:0",
    ],
)
def test_what_is_no_url_of_a_server_is_refused(url: str) -> None:
    with pytest.raises(EmbedderError) as refused:
        check_url(url)
    assert str(refused.value) == snapshot(
        "the server's URL is not like https://host:port/path; correct --base-url or the "
        "configured base_url"
    )


@pytest.mark.parametrize(
    "url",
    [
        "https://user@x/v1",
        f"https://user:{KEY}@x/v1",
        f"https://x/v1?key={KEY}",
        f"https://x#{KEY}",
    ],
)
def test_a_url_that_holds_a_secret_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(EmbedderError) as refused:
        check_url(url)
    assert str(refused.value) == snapshot(
        "the server's URL holds a user, a password or a query, which would end up in logs; "
        "give the key by a variable or a file instead"
    )
    assert KEY not in str(refused.value)


LOOPBACK = [
    "http://localhost:11434",
    "http://LOCALHOST/v1",
    "http://a.localhost",
    "http://127.0.0.1",
    "http://127.8.9.1:80/v1",
    "http://[::1]:80",
]
INTERNAL = ["http://10.0.0.1", "http://192.168.1.1/v1", "http://[fd00::1]", "http://169.254.0.1"]
ELSEWHERE = ["http://8.8.8.8/v1", "http://[2001:4860:4860::8888]", "https://no.such.host.invalid"]


@pytest.mark.parametrize("url", LOOPBACK + INTERNAL + ELSEWHERE)
def test_this_machine_is_known_by_its_names(url: str) -> None:
    assert is_loopback(url) == (url in LOOPBACK)


@pytest.mark.parametrize("url", LOOPBACK + INTERNAL + ELSEWHERE)
@pytest.mark.parametrize(
    ("egress", "allowed"),
    [
        ("allow", LOOPBACK + INTERNAL + ELSEWHERE),
        ("deny", []),
        ("loopback-only", LOOPBACK),
        ("internal-only", LOOPBACK + INTERNAL),
    ],
)
def test_texts_go_only_where_they_may(url: str, egress: str, allowed: list[str]) -> None:
    access = Access(url, egress=egress)

    if url in allowed:
        check_endpoint(access)
    else:
        with pytest.raises(EmbedderError) as refused:
            check_endpoint(access)
        said = str(refused.value).replace(f" is {egress},", " is EGRESS,")
        assert said.replace(host(url), "HOST") == snapshot(
            "AI_MEMORY_INFERENCE_EGRESS is EGRESS, so no text may be sent to HOST; nothing "
            "was sent: use --backend local, or change the setting"
        )


@pytest.mark.parametrize("url", LOOPBACK + INTERNAL + ELSEWHERE)
@pytest.mark.parametrize("insecure", [False, True])
def test_a_key_goes_over_http_to_this_machine_only(url: str, insecure: bool) -> None:
    access = Access(url, key_variable="A_KEY", insecure_key=insecure)

    if url in LOOPBACK or url.startswith("https:") or insecure:
        check_endpoint(access)
    else:
        with pytest.raises(EmbedderError) as refused:
            check_endpoint(access)
        assert str(refused.value).replace(host(url), "HOST") == snapshot(
            "the key would be sent to HOST over http, where others can read it; use https, "
            "unset the key, or say --insecure-key if the network is trusted"
        )


def test_a_host_is_told_without_what_a_url_may_hide() -> None:
    assert host("http://x:1/v1") == "x:1"
    assert host(f"http://user:{KEY}@x:1/v1") == "its URL"


def test_a_key_is_read_without_the_end_of_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_KEY", f" {KEY}\n")
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    file.chmod(0o400)

    assert read_key(Access("http://x", key_variable="A_KEY")) == KEY
    assert read_key(Access("http://x", key_file=str(file))) == KEY
    assert read_key(Access("http://x")) is None


def test_a_key_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", " ")

    # A name that is not set may be the key itself; those that are looked at anyhow are none.
    with pytest.raises(EmbedderError) as refused:
        read_key(Access("http://x", key_variable="A_KEY"))
    assert str(refused.value) == snapshot(
        "the key is to be read from the variable that api_key_env names, which is not set "
        "here; set it"
    )
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(EmbedderError) as refused:
        read_key(Access("http://x", key_variable="OPENAI_API_KEY"))
    assert str(refused.value) == snapshot(
        "the key is to be read from OPENAI_API_KEY, which is not set here; set it"
    )
    with pytest.raises(EmbedderError) as refused:
        read_key(Access("http://x", key_file="/no/file"))
    assert str(refused.value) == snapshot(
        "the key can't be read from the file that api_key_file names (No such file or "
        "directory); correct the setting"
    )


@pytest.mark.parametrize("mode", [0o600, 0o440, 0o404])
def test_a_key_file_that_others_can_read_or_anyone_write_is_refused(
    mode: int, tmp_path: Path
) -> None:
    file = tmp_path / "key"
    file.write_text(KEY)
    file.chmod(mode)

    with pytest.raises(EmbedderError) as refused:
        read_key(Access("http://x", key_file=str(file)))
    assert wording(refused, tmp_path) == snapshot(
        "the file that api_key_file names holds a key and must be readable by you alone: "
        "chmod 0400 it"
    )
    assert KEY not in str(refused.value)


@pytest.mark.parametrize("key", ["two words", "schlüssel", "a\x01b", "a\nb"])
def test_a_key_that_no_header_takes_is_refused_and_not_repeated(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_KEY", key)

    with pytest.raises(EmbedderError) as refused:
        read_key(Access("http://x", key_variable="A_KEY"))
    assert str(refused.value) == snapshot(
        "the key holds blanks or signs that no HTTP header takes; check it"
    )
    assert key not in str(refused.value)
