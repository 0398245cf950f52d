"""What is sent where, and what is shown of it: keys, passwords, servers that mix texts up."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from inline_snapshot import snapshot

from reembed.pipeline.settings import BACKENDS
from reembed.transforms import embedders, hiding
from reembed.transforms.embedders import Access, Embedder, Target, endpoint, load_embedder, pace
from reembed.transforms.embedders import http as http_embedder
from reembed.transforms.embedders.fake import FakeEmbedder
from reembed.transforms.errors import EmbedderError, TextRejected
from reembed.transforms.rows import Vectors
from reembed.transforms.staging import find_runs
from tests.conftest import Call, Ran, Serve, files, make_store, memory, plain_pass
from tests.wording import wording

KEY = "gsk_Zq7vR2xKw9Lm4TbN8yHc3JdF6sP1uGeAoVi5"
PASSWORD = "S3cr3t/Pw#x?Yz"
DIMENSION = 8


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Wait little."""
    monkeypatch.setattr(pace, "FIRST_WAIT_SECONDS", 0.004)
    monkeypatch.setattr(pace, "MOST_WAIT_SECONDS", 0.02)
    monkeypatch.setattr(http_embedder, "_START_SECONDS", 0.2)
    # Tests of the graph show that it does what the loop does.
    monkeypatch.setattr("reembed.pipeline.run._run_pass", plain_pass)
    monkeypatch.setattr("reembed.transforms.embedders.client._CONNECT_SECONDS", 0.1)
    yield
    embedders._load.cache_clear()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store of 20 rows."""
    return make_store(tmp_path / "m.db", [memory(f"{at:02d}") for at in range(20)])


def configure(home: Path, text: str) -> None:
    file = home / ".config" / "ai-memory" / "config.toml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def holds_a_part(text: str, secret: str) -> bool:
    return any(secret[at : at + 6] in text for at in range(len(secret) - 5))


def assert_hidden(done: Ran, path: Path, *secrets: str) -> None:
    """Nothing that is shown or kept holds six signs in a row of a secret."""
    kept = files(path.parent / f"{path.name}.reembed")
    for secret in secrets:
        for said in (done.out, done.err, *(content.decode("latin-1") for content in kept.values())):
            assert not holds_a_part(said, secret)
    assert done.err.count("Traceback") == 0


def at(url: str) -> list[str]:
    return ["--backend", "openai-compatible", "--base-url", url, "--model", "m", "--dim", "8"]


# What is shown.

PROXIES = [
    f"http://alice:{PASSWORD}@127.0.0.1:9",
    "http://alice:S3cr3tPw#x@127.0.0.1:9",
    "http://alice:S3cr3tPw?x@127.0.0.1:9",
    "http://alice:12345678/Pw@127.0.0.1:9",
    "http://S3cr3tPw:1",
    "http://127.0.0.1:S3cr3tPw",
    "S3cr3tPwS3cr3tPw://127.0.0.1",
    "http://alice:S3cr3tPwX@[::1",
]


@pytest.mark.parametrize(
    ("name", "proxy"), [*zip(["HTTP_PROXY", "https_proxy", "ALL_PROXY"] * 3, PROXIES, strict=False)]
)
def test_a_proxy_is_told_of_without_its_password(
    name: str, proxy: str, reembed: Call, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, proxy)
    monkeypatch.setattr(http_embedder, "backoff", lambda attempt: 0.0)

    done = reembed("--db", path, *at("http://192.0.2.1:9/v1"), real=True)

    assert done.code == 3
    assert_hidden(done, path, PASSWORD, "S3cr3tPwX", "12345678")


CONFIGS = [
    f'api_key_env = "{KEY}"',
    f'api_key_env = ["{KEY}"]',
    f'api_key_file = "{KEY}"',
    f'api_key_file = ["{KEY}"]',
    f'api_key_file = "~{KEY}/key"',
    f'api_key_file = {{path = "{KEY}"}}',
    f'base_url = ["{KEY}"]',
    f'base_url = "http://{KEY}@127.0.0.1/v1"',
    f'base_url = "http://127.0.0.1/v1?key={KEY}"',
    f'base_url = "http://127.0.0.1:{KEY}/v1"',
    f'base_url = "{KEY}"',
    f'api_key = "{KEY}"',
    f'"{KEY}" = 1\n"{KEY}" = 2',
    f'model = "{KEY}',
    f"[{KEY}]\n[{KEY}]",
]


@pytest.mark.parametrize(
    ("config", "dry"), [*((config, False) for config in CONFIGS), (CONFIGS[0], True)]
)
def test_a_key_in_the_wrong_setting_is_not_shown(
    config: str, dry: bool, reembed: Call, path: Path, tmp_path: Path
) -> None:
    configure(tmp_path, f"[embeddings]\n{config}\n")
    flags = at("http://127.0.0.1:9/v1")
    if "base_url" in config:
        del flags[2:4]

    done = reembed("--db", path, *flags, *(["--dry-run"] if dry else []), real=True)

    assert done.code in ((0, 2, 3) if dry else (2, 3))
    assert_hidden(done, path, KEY)


FLAGS: list[list[str]] = [
    ["--api-key", KEY],
    [f"--api-key={KEY}"],
    [f"--insecure-key={KEY}"],
    ["--key-secret", KEY],
    ["--max-tokens", KEY],
    ["--", "--secret_access_key", KEY],
    ["--", f"--s3_secret_access_keys={KEY}"],
    ["--workdir", f"s3://me:{KEY}@bucket/x"],
    ["--workdir", f"gs://bucket/x?sig={KEY}"],
    ["--base-url", f"http://{KEY}@127.0.0.1/v1"],
    ["--db", f"postgresql://me:{KEY}@127.0.0.1/x"],
    ["--db", f"postgresql+psycopg:me:{KEY}@127.0.0.1/x"],
    ["--db", f"host=127.0.0.1 password={KEY}"],
    ["--db", f"sqlite:///{KEY}"],
]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: " ".join(flags)[:25])
def test_a_key_in_the_wrong_flag_is_not_shown(flags: list[str], reembed: Call, path: Path) -> None:
    done = reembed("--db", path, "--backend", "openai", *flags, real=True)

    assert done.code == (3 if "--base-url" in flags else 2)
    assert_hidden(done, path, KEY)


@pytest.mark.parametrize("variable", ["AI_MEMORY_DB", "AI_MEMORY_STORE_URL"])
@pytest.mark.parametrize("command", [[], ["status"], ["verify"], ["rollback"], ["cleanup"]])
def test_a_password_of_a_database_is_not_shown(
    variable: str,
    command: list[str],
    reembed: Call,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(variable, f"postgresql://me:{PASSWORD}@127.0.0.1/x")

    done = reembed(*command, *([] if variable == "AI_MEMORY_DB" else ["--db", path]))

    assert done.code == (0 if variable != "AI_MEMORY_DB" and command[-1:] in CLEAN else 2)
    assert_hidden(done, path, PASSWORD)


CLEAN = (["status"], ["cleanup"])

SAID: list[tuple[int, str]] = [
    (401, f"{KEY[:15]}...{KEY[-15:]}"),
    (401, KEY.upper()),
    (400, " ".join(KEY)),
    (400, "-".join(KEY)),
    (422, f"batch size 2 > maximum 1, {KEY[20:27]}"),
    (500, KEY[3:9]),
    (429, f"too large {KEY[:8]}"),
    (404, f"no {KEY[9:16]}"),
]
WITHOUT_IT = {
    400: snapshot(
        "the server at 127.0.0.1:PORT will not embed even a short probe text with m: HTTP 400"
    ),
    401: snapshot("127.0.0.1:PORT refuses the key (HTTP 401); correct the one in A_KEY"),
    404: snapshot(
        "127.0.0.1:PORT has no m at /embeddings (HTTP 404), and no other model is put in its "
        "place: correct --model or --base-url"
    ),
    422: snapshot(
        "the server at 127.0.0.1:PORT will not embed even a short probe text with m: HTTP 422"
    ),
    429: snapshot(
        "the server at 127.0.0.1:PORT will not embed even a short probe text with m: HTTP 429"
    ),
    500: snapshot(
        "the server at 127.0.0.1:PORT gives no right answer (HTTP 500), tried for N s of 0.2 s"
    ),
}
"""What is told of such an answer."""


@pytest.mark.parametrize(("status", "said"), SAID)
def test_a_server_that_repeats_a_part_of_the_key_is_not_quoted(
    status: int, said: str, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_KEY", KEY)
    body = json.dumps({"error": {"message": said}})
    scenario = serve(
        dimension=8,
        faults=[
            {"kind": "status", "status": status, "body": body, "headers": {"Retry-After": "9"}}
        ],
    )

    with pytest.raises(EmbedderError) as error:
        load_embedder(served(scenario.url, key_variable="A_KEY"))

    assert not holds_a_part(str(error.value).casefold(), KEY.casefold())
    found = re.sub(r"tried for \d+ s of", "tried for N s of", wording(error, tmp_path))
    assert found == WITHOUT_IT[status]


@pytest.mark.parametrize(
    ("to", "said"),
    [
        (
            f"http://{KEY}.example/",
            snapshot(
                "127.0.0.1:PORT sends on to http://***.example (HTTP 307), where neither a key "
                "nor texts are sent; give that URL with --base-url if it is the right one"
            ),
        ),
        (
            f"http://a:{KEY}@b/",
            snapshot(
                "127.0.0.1:PORT sends on to another place (HTTP 307), where neither a key nor "
                "texts are sent; give that URL with --base-url if it is the right one"
            ),
        ),
        (
            f"/x?{KEY}",
            snapshot(
                "127.0.0.1:PORT sends on to another place (HTTP 307), where neither a key nor "
                "texts are sent; give that URL with --base-url if it is the right one"
            ),
        ),
        (
            f"http://b/{KEY}",
            snapshot(
                "127.0.0.1:PORT sends on to http://b (HTTP 307), where neither a key nor texts "
                "are sent; give that URL with --base-url if it is the right one"
            ),
        ),
    ],
)
def test_where_a_server_sends_on_to_is_shown_without_the_key(
    to: str, said: str, serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("A_KEY", KEY)
    fault = {"kind": "status", "status": 307, "headers": {"Location": to}}

    with pytest.raises(EmbedderError) as error:
        load_embedder(served(serve(faults=[fault]).url, key_variable="A_KEY"))
    assert wording(error, tmp_path) == said

    assert not holds_a_part(str(error.value).casefold(), KEY.casefold())


def test_secrets_of_any_length_are_known_by_what_gives_them_away() -> None:
    hiding.note_secret("short")
    hiding.note_secret(KEY)

    assert hiding.shown("a model of another sort") == "a model of another sort"
    assert hiding.shown("it was short") == ""
    assert hiding.shown(f"wrong: {KEY}") == "wrong: ***"
    assert hiding.shown(f"wrong: {KEY[:5]}") == f"wrong: {KEY[:5]}"
    assert hiding.shown(f"wrong: {KEY[:6]}") == ""


def test_the_names_of_variables_that_are_shown_are_those_that_are_looked_at() -> None:
    vendors = {name for _, names in BACKENDS.values() for name in names}
    assert {"AI_MEMORY_EMBED_API_KEY", *vendors} == hiding.KEY_VARIABLES


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--model", snapshot("the setting model holds a key or a password; correct it")),
        ("--base-url", snapshot("the setting base_url holds a key or a password; correct it")),
    ],
)
def test_a_key_that_would_be_kept_with_the_run_is_refused(
    flag: str, said: str, reembed: Call, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    flags = [*at("http://127.0.0.1:9/v1"), flag, f"http://127.0.0.1:9/{KEY}/v1"]

    done = reembed("--db", path, *flags, real=True)

    assert done.code == 2
    assert done.error == said
    assert_hidden(done, path, KEY)


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        (
            "AI_MEMORY_STORE_URL",
            f"sqlite:///x?password={KEY}",
            snapshot(
                "AI_MEMORY_STORE_URL says that another file is ai-memory's store, and not "
                "TMP/m.db; name that file with --db, or unset AI_MEMORY_STORE_URL for this command"
            ),
        ),
        (
            "AI_MEMORY_STORE_URL_FILE",
            f"postgresql://me:{KEY}@127.0.0.1/x",
            snapshot(
                "AI_MEMORY_STORE_URL_FILE names a file that can't be read (No such file or "
                "directory), so it can't be told where ai-memory's store is; correct it, or unset "
                "it for this command"
            ),
        ),
    ],
)
def test_where_ai_memorys_store_is_said_to_be_is_shown_without_a_password(
    variable: str,
    value: str,
    said: str,
    reembed: Call,
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(variable, value)

    done = reembed("--db", path)

    assert done.code == 2
    assert wording(done.error, tmp_path) == said
    assert_hidden(done, path, KEY)


# What would end in a traceback.


@pytest.mark.parametrize("url", ["http://" + "a" * 300 + "/v1", "http://a..b/v1", "http://.a/v1"])
@pytest.mark.parametrize("egress", ["allow", "internal-only"])
def test_a_host_that_can_be_none_is_refused(
    url: str, egress: str, reembed: Call, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AI_MEMORY_INFERENCE_EGRESS", egress)

    done = reembed("--db", path, *at(url), real=True)

    assert done.code == 3
    assert done.error == snapshot(
        "the host in the server's URL is no name of one: between its dots there may be 1 to 63 "
        "signs; correct --base-url or the configured base_url"
    )


@pytest.mark.parametrize("what", ["missing", "directory", "empty", "/dev/zero"])
def test_certificates_that_can_not_be_read_are_named(
    what: str, reembed: Call, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / what if what != "/dev/zero" else Path(what)
    if what == "directory":
        file.mkdir()
    elif what == "empty":
        file.touch()
    monkeypatch.setenv("SSL_CERT_FILE", str(file))

    done = reembed("--db", path, *at("https://127.0.0.1:9/v1"), real=True)

    assert done.code == 3
    assert done.error == snapshot(
        "SSL_CERT_FILE names no file or directory of certificates that can be read, so no server "
        "can be trusted; correct it, or unset it"
    )


# Two texts have two vectors.


def served(url: str, backend: str = "openai", **access: Any) -> Target:
    return Target(backend, "m", DIMENSION, access=Access(url, give_up_after=2.0, **access))


@pytest.mark.parametrize("backend", ["openai-compatible", "ollama"])
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (
            "reversed",
            snapshot(
                "the embedder gives other vectors for texts that are asked for together than for "
                "each alone, or in another order, so rows would get each other's vectors; see to "
                "the server, or choose another"
            ),
        ),
        (
            "shifted",
            snapshot(
                "the embedder gives other vectors for texts that are asked for together than for "
                "each alone, or in another order, so rows would get each other's vectors; see to "
                "the server, or choose another"
            ),
        ),
        (
            "constant",
            snapshot(
                "the embedder gives the same vector for different texts, so its vectors say "
                "nothing; see that the model is loaded as it should be, or choose another"
            ),
        ),
    ],
)
def test_a_server_that_mixes_texts_up_is_no_embedder(
    backend: str, kind: str, says: str, reembed: Call, serve: Serve, path: Path, tmp_path: Path
) -> None:
    scenario = serve(dimension=DIMENSION, faults=[{"kind": kind}])
    before = path.read_bytes()
    flags = at(scenario.url)
    flags[1] = backend

    done = reembed("--db", path, *flags, real=True)

    assert done.code == 3
    assert wording(done.error, tmp_path) == says
    assert path.read_bytes() == before
    assert not any(text.startswith("title") for text in scenario.log()["texts"])


def test_a_server_that_mixes_texts_up_from_now_on_is_found_before_the_replacement(
    serve: Serve, tmp_path: Path
) -> None:
    target = served(serve(dimension=DIMENSION, faults=[{"kind": "reversed", "after": 7}]).url)
    probe = embedders.probe_embedder(load_embedder(target), DIMENSION)

    with pytest.raises(EmbedderError) as refused:
        embedders.require_same(target, probe.tolist())
    assert wording(refused, tmp_path) == snapshot(
        "the embedder gives other vectors for texts that are asked for together than for each "
        "alone, or in another order, so rows would get each other's vectors; see to the server, "
        "or choose another"
    )


ALONE = snapshot(
    "the server at 127.0.0.1:PORT takes no two texts in one request, so each text is sent alone"
)


@pytest.mark.parametrize("most", [1, 2, 4])
@pytest.mark.parametrize("named", [True, False])
def test_a_server_that_takes_few_texts_at_a_time_never_gets_more_of_the_rows(
    most: int, named: bool, serve: Serve, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    refuse = {"kind": "status", "status": 400, "least": most + 1}
    scenario = serve(
        dimension=DIMENSION, **({"most_texts": most} if named else {"faults": [refuse]})
    )
    embedder = load_embedder(served(scenario.url))
    embedders.probe_embedder(embedder, DIMENSION)
    asked = len(scenario.log()["sizes"])
    embedders.probe_embedder(embedder, DIMENSION)
    texts = [f"text {at}" for at in range(9)]

    found = embedders.embed_each(embedder, texts, DIMENSION)

    assert found.tobytes() == FakeEmbedder(DIMENSION).embed(texts).tobytes()
    said = [wording(one, tmp_path) for one in caplog.messages]
    assert said == ([ALONE] if most == 1 else [])
    if most == 1:
        assert set(scenario.log()["sizes"][asked:]) == {1}


def test_texts_that_a_model_will_not_take_are_not_compared() -> None:
    class Picky(FakeEmbedder):
        def embed(self, texts: Sequence[str]) -> Vectors:
            if any("Hafen" in text for text in texts):
                raise TextRejected("not that one")
            return super().embed(texts)

    probe = embedders.probe_embedder(Picky(DIMENSION), DIMENSION)

    assert probe.any(axis=1).tolist() == [True, False, True]


@pytest.mark.parametrize("noise", [0.001, 0.01])
def test_a_little_noise_is_no_other_order(noise: float) -> None:
    class Noisy(FakeEmbedder):
        def embed(self, texts: Sequence[str]) -> Vectors:
            vectors = super().embed(texts)
            vectors += noise * len(texts) / 5 / DIMENSION**0.5
            return vectors

    embedders.probe_embedder(Noisy(DIMENSION), DIMENSION)


# A manifest never says where to send what.


@pytest.fixture
def nothing_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note each key that is read and each embedder that is built."""
    done: list[str] = []
    read_key = endpoint.read_key

    def note_key(access: Access) -> str | None:
        done.append("key")
        return read_key(access)

    monkeypatch.setattr("reembed.transforms.embedders.client.read_key", note_key)
    build = embedders._build

    def note_build(target: Target) -> Embedder:
        done.append("model")
        return build(target)

    monkeypatch.setattr(embedders, "_build", note_build)
    return done


def alter(path: Path, target: Mapping[str, Any], **access: Any) -> None:
    [(run, manifest)] = find_runs(path)
    values = {**manifest.target, **target}
    if access:
        values["access"] = {**(values["access"] or {}), **access}
    run.write_manifest(replace(manifest, target=values))


ALTERED: list[tuple[dict[str, Any], str]] = [
    (
        {"url": "SINK"},
        snapshot(
            "the run embedded with the backend openai at http://127.0.0.1:PORT, and the settings "
            "name http://127.0.0.1:PORT with another path, so nothing was sent; say with "
            "--base-url which of them is asked"
        ),
    ),
    (
        {"url": "http://me:pw@127.0.0.1:9/v1"},
        snapshot(
            "the run embedded with the backend openai at a URL that can't be shown, and the "
            "settings name http://127.0.0.1:PORT, so nothing was sent; say with --base-url which "
            "of them is asked"
        ),
    ),
    (
        {"key_variable": "UNRELATED"},
        snapshot(
            "the run sent the key in UNRELATED, and the settings say the key in "
            "AI_MEMORY_EMBED_API_KEY, so nothing was sent; say --base-url with the server's URL "
            "if the settings are right, or correct them"
        ),
    ),
    (
        {"key_variable": None, "key_file": "FILE"},
        snapshot(
            "the run sent the key in the file that api_key_file names, and the settings say the "
            "key in AI_MEMORY_EMBED_API_KEY, so nothing was sent; say --base-url with the "
            "server's URL if the settings are right, or correct them"
        ),
    ),
    (
        {"key_variable": None},
        snapshot(
            "the run sent no key, and the settings say the key in AI_MEMORY_EMBED_API_KEY, so "
            "nothing was sent; say --base-url with the server's URL if the settings are right, or "
            "correct them"
        ),
    ),
    (
        {"key_variable": None, "key_secret": "projects/p/secrets/s/versions/1"},
        snapshot(
            "the run sent the key in the secret that --key-secret names, and the settings say the "
            "key in AI_MEMORY_EMBED_API_KEY, so nothing was sent; say --base-url with the "
            "server's URL if the settings are right, or correct them"
        ),
    ),
    (
        {"insecure_key": True},
        snapshot(
            "the run sent a key over http to http://127.0.0.1:PORT because of --insecure-key, so "
            "nothing was sent; say --insecure-key if that network is still trusted, or --base-url "
            "with another server"
        ),
    ),
]


@pytest.mark.parametrize(("access", "says"), ALTERED, ids=lambda value: str(value)[:30])
def test_a_check_sends_nothing_where_only_the_manifest_says(
    access: dict[str, Any],
    says: str,
    reembed: Call,
    serve: Serve,
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    nothing_read: list[str],
) -> None:
    assert reembed("--db", path).code == 0
    scenario, sink = serve(dimension=DIMENSION), serve(dimension=DIMENSION)
    monkeypatch.setenv("AI_MEMORY_EMBED_BACKEND", "openai")
    monkeypatch.setenv("AI_MEMORY_EMBED_BASE_URL", scenario.url)
    monkeypatch.setenv("AI_MEMORY_EMBED_API_KEY", KEY)
    monkeypatch.setenv("UNRELATED", "another-secret")
    secret = tmp_path / "secret"
    secret.write_text("another-secret")
    secret.chmod(0o400)
    honest = {"url": scenario.url, "key_variable": "AI_MEMORY_EMBED_API_KEY"}
    alter(path, {"backend": "openai"}, **honest)
    whole = reembed("verify", "--db", path, "--json", real=True)
    assert (whole.code, whole.values["sampled"]) == (0, 20)
    before = scenario.log()["requests"]
    nothing_read.clear()
    given = {"SINK": sink.url, "FILE": str(secret)}

    alter(path, {}, **{name: given.get(str(value), value) for name, value in access.items()})
    done = reembed("verify", "--db", path, "--json", real=True)

    assert (done.code, done.values["checked"], done.values["sampled"]) == (0, 20, 0)
    assert wording(done.values["unchecked"], tmp_path) == says
    assert (sink.log()["requests"], scenario.log()["requests"]) == (0, before)
    assert nothing_read == []
    # What a flag names today is asked, with today's key.
    asked = reembed("verify", "--db", path, "--base-url", scenario.url, "--json", real=True)
    assert asked.values["sampled"] == 20
    assert scenario.log()["keys"] == [f"Bearer {KEY}"]
    assert sink.log()["requests"] == 0


@pytest.mark.parametrize(
    ("backend", "says"),
    [
        (
            "ollama",
            snapshot(
                "the run embedded with the backend ollama at http://127.0.0.1:PORT, and the "
                "settings name the backend openai at http://127.0.0.1:PORT, so nothing was sent; "
                "say where that server is with --base-url, and its kind with --backend if it "
                "takes that backend's key"
            ),
        ),
        (
            "gemini",
            snapshot(
                "the run embedded with the backend gemini at http://127.0.0.1:PORT, and the "
                "settings name the backend openai at http://127.0.0.1:PORT, so nothing was sent; "
                "say where that server is with --base-url, and its kind with --backend if it "
                "takes that backend's key"
            ),
        ),
        (
            "local",
            snapshot(
                "the run loaded /nowhere/model, and the settings name nomic-embed-text-v1.5 at a "
                "server, so nothing was loaded; say with --model where the run's model is"
            ),
        ),
    ],
)
def test_a_backend_that_only_the_manifest_names_is_not_asked(
    backend: str,
    says: str,
    reembed: Call,
    serve: Serve,
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    nothing_read: list[str],
) -> None:
    assert reembed("--db", path).code == 0
    scenario = serve(dimension=DIMENSION)
    monkeypatch.setenv("AI_MEMORY_EMBED_BACKEND", "openai")
    monkeypatch.setenv("AI_MEMORY_EMBED_BASE_URL", scenario.url)
    monkeypatch.setenv("GEMINI_API_KEY", KEY)
    alter(path, {"backend": backend, "source": "/nowhere/model"}, url=scenario.url)
    nothing_read.clear()

    done = reembed("verify", "--db", path, "--json", real=True)

    assert (done.code, done.values["sampled"]) == (0, 0)
    assert wording(done.values["unchecked"], tmp_path) == says
    assert (scenario.log()["requests"], nothing_read) == (0, [])


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (
            "/models/of/others",
            snapshot(
                "the run loaded /models/of/others, and the settings name all-MiniLM-L6-v2, so "
                "nothing was loaded; say with --model where the run's model is"
            ),
        ),
        (
            "maker/model",
            snapshot(
                "the run loaded maker/model, and the settings name all-MiniLM-L6-v2, so nothing "
                "was loaded; say with --model where the run's model is"
            ),
        ),
        (
            "./here",
            snapshot(
                "the run loaded ./here, and the settings name all-MiniLM-L6-v2, so nothing was "
                "loaded; say with --model where the run's model is"
            ),
        ),
        (
            "here/there",
            snapshot(
                "the run loaded here/there, and the settings name all-MiniLM-L6-v2, so nothing "
                "was loaded; say with --model where the run's model is"
            ),
        ),
        (
            "",
            snapshot(
                "the run loaded /models/of/others, and the settings name all-MiniLM-L6-v2, so "
                "nothing was loaded; say with --model where the run's model is"
            ),
        ),
    ],
)
def test_a_model_is_not_loaded_from_where_only_the_manifest_says(
    source: str, says: str, reembed: Call, path: Path, tmp_path: Path, nothing_read: list[str]
) -> None:
    assert reembed("--db", path).code == 0
    (tmp_path / "here" / "there").mkdir(parents=True)
    (tmp_path / "here" / "there" / "model.safetensors").touch()
    named = {"backend": "local", "source": source, "model": source or "/models/of/others"}
    alter(path, named)
    nothing_read.clear()

    done = reembed("verify", "--db", path, "--json", real=True)

    assert (done.code, done.values["sampled"], nothing_read) == (0, 0, [])
    assert wording(done.values["unchecked"], tmp_path) == says


@pytest.mark.parametrize("source", ["all-MiniLM-L6-v2", "PACKAGED"])
def test_a_model_that_its_name_leads_to_is_loaded(
    source: str, reembed: Call, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reembed.transforms.embedders.models import find_model

    assert reembed("--db", path).code == 0
    source = str(find_model("all-MiniLM-L6-v2")) if source == "PACKAGED" else source
    alter(path, {"backend": "local", "source": source})
    loaded: list[str] = []

    def build(target: Target) -> Embedder:
        loaded.append(target.source)
        return FakeEmbedder(target.dimension)

    monkeypatch.setattr(embedders, "_build", build)
    done = reembed("verify", "--db", path, "--json", real=True)

    assert (done.values["sampled"], loaded) == (20, [source])


# How secrets are written.


@pytest.mark.parametrize(
    "proxy",
    [
        "bob:{}@127.0.0.1:9",
        "//bob:{}@127.0.0.1:9",
        "http://bob:{}@127.0.0.1:9",
        "{}@127.0.0.1:9",
        "http://{}@127.0.0.1:9",
        "http://{}:@127.0.0.1:9",
    ],
)
def test_a_proxys_password_is_known_however_its_url_is_written(
    proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "Pr0xyPassw0rdXyz"
    monkeypatch.setenv("http_proxy", proxy.format(secret))
    user, _, password = proxy.partition("@")[0].removeprefix("http:").strip("/").partition(":")
    pair = f"{user}:{password}".format(secret).encode()

    assert secret not in hiding.shown(f"the user bob:{secret} is unknown")
    assert base64.b64encode(pair).decode() not in hiding.shown(
        f"not Basic {base64.b64encode(pair).decode()}"
    )


@pytest.mark.parametrize("url", ["memories@home.db", "/home/me@work/m.db", "postgres://me@host/x"])
def test_a_databases_name_without_a_password_hides_nothing(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AI_MEMORY_DB", url)
    monkeypatch.setenv("AI_MEMORY_STORE_URL", "sqlite:///home/me@work/m.db")

    assert hiding.shown("/home/me/memories of me") == "/home/me/memories of me"


LOGINS = [
    "jdbc:postgresql://u:{}@h/db",
    "//u:{}@h/db",
    "u:{}@h/db",
    "host=h pwd={}",
    "Server=h;Pwd={};",
    "passwd = {}",
    "x.db?key={}",
    "file:x.db?token={}",
    "PGPASSWORD={}",
    "'postgres://u:{}@h/d'",
    "psql postgres://u:{}@h",
    "postgres:/u:{}@h",
    "~nobody:{}@h",
]


LOGIN_IN_DB = snapshot(
    "--db holds the URL of a database or how to log in to one, and reembed moves SQLite files "
    "only; give the path of one"
)
LOGIN_IN_SETTING = snapshot(
    "AI_MEMORY_DB holds the URL of a database or how to log in to one, and reembed moves SQLite "
    "files only; give the path of one"
)


@pytest.mark.parametrize("login", LOGINS)
def test_what_logs_in_to_a_database_is_not_shown(
    login: str, reembed: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = login.format("hunter2SecretPw")
    flag = ["--db", named]

    for call in (["status", *flag], ["--dry-run", *flag], ["status"], ["--dry-run"]):
        monkeypatch.setenv("AI_MEMORY_DB", "" if "--db" in call else named)
        done = reembed(*call)
        assert done.code == 2
        assert done.error == (LOGIN_IN_DB if "--db" in call else LOGIN_IN_SETTING)
        assert_hidden(done, tmp_path, "hunter2SecretPw")


@pytest.mark.parametrize("name", ["key=1.db", "a:b@c.db"])
def test_a_file_that_is_called_like_a_login_is_used(
    name: str, reembed: Call, tmp_path: Path
) -> None:
    path = make_store(tmp_path / name, [memory("a")])

    assert reembed("--db", name, "--dry-run").code == 0
    assert reembed("status", "--db", path).code == 0


def test_a_database_whose_name_is_a_key_is_refused_wherever_it_is_named(
    reembed: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("AI_MEMORY_DB", str(tmp_path / KEY))

    done = reembed("status")

    assert done.code == 2
    assert done.error == snapshot("the setting db holds a key or a password; correct it")


KEY_IN = {
    "model": snapshot("the setting model holds a key or a password; correct it"),
    "base_url": snapshot("the setting base_url holds a key or a password; correct it"),
    "ollama_url": snapshot("the setting base_url holds a key or a password; correct it"),
    "backend": snapshot(
        "the backend '***' is not one of local, ollama, openai, xai, gemini, openrouter, mistral, "
        "together, fireworks, qwen, dashscope, lmstudio, vllm, openai-compatible; correct it"
    ),
    "tier": snapshot(
        "the tier '***' is not one of keyword, semantic, smart, autonomous; correct the setting"
    ),
}
"""What is told where a setting is a key."""


@pytest.mark.parametrize("place", ["api_key_env", "api_key_file"])
@pytest.mark.parametrize("setting", KEY_IN)
def test_a_key_that_only_the_configuration_leads_to_is_known_from_the_start(
    place: str,
    setting: str,
    reembed: Call,
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key = f"{place}-{setting}-8jQ2mWv5Xr"  # No other test has made it known.
    monkeypatch.setenv("MY_KEY", key)
    (tmp_path / "key").write_text(key)
    (tmp_path / "key").chmod(0o400)
    value = f"http://127.0.0.1:9/{key}" if "url" in setting else key
    flat = f'{setting} = "{value}"' if setting in ("ollama_url", "tier") else ""
    held = f'{place} = "{"MY_KEY" if place == "api_key_env" else "key"}"'
    kind = 'backend = "ollama"' if setting != "backend" else ""
    table = f'{setting} = "{value}"' if not flat else ""
    configure(tmp_path, "\n".join([flat, "[embeddings]", kind, held, table]))

    for flags in ([], ["--dry-run", "--json"]):
        done = reembed("--db", path, *flags, real=True)

        assert done.code == 2
        assert_hidden(done, path, key.removeprefix(f"{place}-{setting}"))
        assert done.error == KEY_IN[setting]


# A server that mixes up only larger requests.


@pytest.mark.parametrize("backend", ["openai-compatible", "ollama"])
@pytest.mark.parametrize("kind", ["reversed", "shifted", "constant"])
def test_a_server_that_mixes_up_only_larger_requests_is_found_before_a_row_is_staged(
    backend: str, kind: str, reembed: Call, serve: Serve, path: Path, tmp_path: Path
) -> None:
    scenario = serve(dimension=DIMENSION, faults=[{"kind": kind, "least": 6}])
    before = path.read_bytes()
    flags = ["--backend", backend, *at(scenario.url)[2:]]

    done = reembed("--db", path, *flags, real=True)

    assert done.code == 3
    assert wording(done.error, tmp_path) == snapshot(
        "the server at 127.0.0.1:PORT gives other vectors for 20 texts in one request than for "
        "each alone, or in another order, so rows would get each other's vectors; nothing was "
        "replaced: see to the server, choose another, or have fewer texts sent at a time with "
        "--batch"
    )
    assert path.read_bytes() == before
    assert not any(run.list_shards() for run, _ in find_runs(path))
    # As the sentence says, fewer at a time are right.
    assert reembed("--db", path, *flags, "--batch", 5, real=True).code == 0
    checked = reembed("verify", "--db", path, *flags[:4], "--json", real=True)
    assert (checked.code, checked.values["findings"]) == (3, 0)


def test_each_request_that_is_larger_than_all_before_costs_three_texts_more(serve: Serve) -> None:
    scenario = serve(dimension=DIMENSION)
    embedder = load_embedder(served(scenario.url))
    asked = len(scenario.log()["sizes"])
    texts = [f"text {at}" for at in range(9)]

    for size in (5, 7, 7, 6, 9, 9):
        found = embedder.embed(texts[:size])
        assert found.tobytes() == FakeEmbedder(DIMENSION).embed(texts[:size]).tobytes()

    assert scenario.log()["sizes"][asked:] == [5, 7, 1, 1, 1, 7, 6, 9, 1, 1, 1, 9]
    alone = set(scenario.log()["alone"]) & set(texts)
    assert alone == {"text 0", "text 3", "text 6", "text 4", "text 8"}


def test_a_text_that_is_refused_alone_is_not_compared(serve: Serve) -> None:
    refused = {"kind": "status", "status": 400, "on": "text 0", "after": 1}
    embedder = load_embedder(served(serve(dimension=DIMENSION, faults=[refused]).url))

    assert len(embedder.embed([f"text {at}" for at in range(9)])) == 9


def test_threads_whose_requests_are_as_large_wait_for_the_comparison(
    serve: Serve, tmp_path: Path
) -> None:
    fault = {"kind": "reversed", "least": 6}
    embedder = load_embedder(served(serve(dimension=DIMENSION, faults=[fault]).url))

    with ThreadPoolExecutor(4) as pool:
        texts = [[f"text {at} of {part}" for at in range(9)] for part in range(4)]
        for outcome in [pool.submit(embedder.embed, some) for some in texts]:
            with pytest.raises(EmbedderError) as refused:
                outcome.result()
            assert wording(refused, tmp_path) == snapshot(
                "the server at 127.0.0.1:PORT gives other vectors for 9 texts in one request than "
                "for each alone, or in another order, so rows would get each other's vectors; "
                "nothing was replaced: see to the server, choose another, or have fewer texts "
                "sent at a time with --batch"
            )


@pytest.mark.parametrize("values", [{"device": "meta"}, {"precision": "evil"}], ids=str)
def test_a_manifest_chooses_no_device_and_no_precision_that_there_is_not(
    values: dict[str, Any], reembed: Call, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reembed("--db", path).code == 0
    built: list[Target] = []

    def build(target: Target) -> Embedder:
        built.append(target)
        return FakeEmbedder(target.dimension)

    monkeypatch.setattr(embedders, "_build", build)
    alter(path, {"backend": "local", "source": "all-MiniLM-L6-v2", **values})

    done = reembed("verify", "--db", path, "--json", real=True)

    if "device" in values:
        assert (done.code, [target.device for target in built]) == (0, [None])
    else:
        assert (done.code, built) == (1, [])


WRITTEN: dict[str, Callable[[bytes], str]] = {
    "base64": lambda key: base64.b64encode(key).decode(),
    "a header": lambda key: base64.b64encode(b"Bearer " + key).decode(),
    "a user": lambda key: base64.b64encode(b":" + key).decode(),
    "hexadecimal": lambda key: key.hex(),
    "a URL": lambda key: "".join(f"%{sign:02X}" for sign in key),
    "HTML": lambda key: "".join(f"&#{sign};" for sign in key),
    "JSON": lambda key: "".join(f"\\u{sign:04x}" for sign in key),
}


@pytest.mark.parametrize("written", WRITTEN)
def test_a_key_is_not_shown_however_it_is_written(
    written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    said = hiding.shown(f"not {WRITTEN[written](KEY.encode())} here")

    assert said == "" or "***" in said
    assert len(said) < 32  # A few signs at the ends of base64 stay: less than five of the key.
    assert hiding.shown("no such model: text-embedding-3-small") != ""
