"""The ladder of settings: command line, environment, [embeddings], flat keys, default."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from inline_snapshot import snapshot

from reembed.pipeline.options import Options
from reembed.pipeline.settings import Settings, check_is_store, read_settings
from reembed.transforms.embedders import Access
from reembed.transforms.embedders.endpoint import check_endpoint
from reembed.transforms.errors import EmbedderError, NoEmbedderError, ReembedError, UsageError
from tests.conftest import Call, files, make_store, memory
from tests.wording import wording

MINILM = "all-MiniLM-L6-v2"
NOMIC = "nomic-embed-text-v1.5"
OLLAMA = "http://localhost:11434"
SECRET = "sk-this-must-not-be-seen"

DASHSCOPE = "https://dashscope.aliyuncs.com/compatible-mode/v1"
# Written by hand from ai-memory's documents: URL, then the variables that may hold the key.
REMOTE: Mapping[str, tuple[str | None, tuple[str, ...]]] = {
    "ollama": (OLLAMA, ()),
    "openai": ("https://api.openai.com/v1", ("OPENAI_API_KEY",)),
    "xai": ("https://api.x.ai/v1", ("XAI_API_KEY",)),
    "gemini": (
        "https://generativelanguage.googleapis.com/v1beta/openai",
        ("GEMINI_API_KEY", "GOOGLE_API_KEY"),
    ),
    "openrouter": ("https://openrouter.ai/api/v1", ("OPENROUTER_API_KEY",)),
    "mistral": ("https://api.mistral.ai/v1", ()),
    "together": ("https://api.together.xyz/v1", ()),
    "fireworks": ("https://api.fireworks.ai/inference/v1", ()),
    "qwen": (DASHSCOPE, ("DASHSCOPE_API_KEY", "QWEN_API_KEY")),
    "dashscope": (DASHSCOPE, ("DASHSCOPE_API_KEY", "QWEN_API_KEY")),
    "lmstudio": ("http://localhost:1234/v1", ()),
    "vllm": ("http://localhost:8000/v1", ()),
    "openai-compatible": (None, ()),
}


class Given(NamedTuple):
    """What is set, and where."""

    options: Mapping[str, Any] = {}
    environment: Mapping[str, str] = {}
    table: Mapping[str, object] = {}
    flat: Mapping[str, object] = {}

    def __or__(self, other: object) -> Given:
        assert isinstance(other, Given)
        return Given(*({**one, **more} for one, more in zip(self, other, strict=True)))


NOTHING = Given()


def toml(given: Given) -> str:
    """A configuration file; JSON's texts, numbers and truth values are TOML's too."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in given.flat.items()]
    if given.table:
        lines += ["[embeddings]"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in given.table.items()]
    return "\n".join(lines)


def config_path(tmp_path: Path) -> Path:
    return tmp_path / "home" / ".config" / "ai-memory" / "config.toml"


def read(tmp_path: Path, given: Given = NOTHING, *, config: str | None = None) -> Settings:
    """Read the settings as they are in a home directory of their own."""
    path = config_path(tmp_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(toml(given) if config is None else config)
    environment = {"HOME": str(tmp_path / "home"), **given.environment}
    return read_settings(Options(**given.options), environment, tmp_path)


def refused(
    kind: type[ReembedError],
    tmp_path: Path,
    given: Given = NOTHING,
    *,
    config: str | None = None,
) -> str:
    """The message with which the settings are refused; never with a key in it."""
    with pytest.raises(kind) as error:
        read(tmp_path, given, config=config)
    assert type(error.value) is kind
    assert SECRET not in str(error.value)
    return wording(error, tmp_path)


# The rungs of each setting's ladder, highest first: what is set, and what comes of it.
Rung = tuple[Given, object]
LADDERS: Mapping[str, Sequence[Rung]] = {
    "backend": [
        (Given(options={"backend": "openai"}), "openai"),
        (Given(environment={"AI_MEMORY_EMBED_BACKEND": "xai"}), "xai"),
        (Given(table={"backend": "vllm"}), "vllm"),
        (Given(), "ollama"),
    ],
    "base_url": [
        (Given(options={"base_url": "http://option"}), "http://option"),
        (
            Given(environment={"AI_MEMORY_EMBED_BASE_URL": "http://environment"}),
            "http://environment",
        ),
        (Given(table={"base_url": "http://base"}), "http://base"),
        (Given(table={"url": "http://url"}), "http://url"),
        (Given(flat={"embed_url": "http://embed"}), "http://embed"),
        (Given(flat={"ollama_url": "http://ollama"}), "http://ollama"),
        (Given(), OLLAMA),
    ],
    "model": [
        (Given(options={"model": "by/option"}), "by/option"),
        (Given(environment={"AI_MEMORY_EMBED_MODEL": "by/environment"}), "by/environment"),
        (Given(table={"model": "by/table"}), "by/table"),
        (Given(flat={"embedding_model": "mini_lm_l6_v2"}), MINILM),
        (Given(), NOMIC),
    ],
    "dimension": [
        (Given(options={"dim": 1}), 1),
        (Given(environment={"AI_MEMORY_EMBED_DIM": "2"}), 2),
        (Given(table={"dim": 3}), 3),
        (Given(), None),
    ],
    "batch": [
        (Given(options={"batch": 7}), 7),
        (Given(environment={"AI_MEMORY_EMBED_BACKFILL_BATCH": "8"}), 8),
        (Given(table={"backfill_batch": 9}), 9),
        (Given(), 100),
    ],
    "tier": [
        (Given(flat={"tier": "autonomous"}), "autonomous"),
        (Given(), "semantic"),
    ],
}
# These two are asked of a remote embedder: with none, MiniLM is local and has no address.
NEEDED = {
    "base_url": Given(table={"backend": "ollama"}),
    "model": Given(table={"backend": "ollama"}),
}


@pytest.mark.parametrize(
    ("name", "at"), [(name, at) for name, rungs in LADDERS.items() for at in range(len(rungs))]
)
def test_the_highest_rung_that_is_set_wins(name: str, at: int, tmp_path: Path) -> None:
    given = NEEDED.get(name, NOTHING)
    for rung, _ in LADDERS[name][at:]:
        given |= rung

    settings = read(tmp_path, given)

    rung, expected = LADDERS[name][at]
    assert getattr(settings, name) == expected
    setting = "dim" if name == "dimension" else name
    assert settings.sources.get(setting) == place(rung, tmp_path)


def place(rung: Given, tmp_path: Path) -> str | None:
    """Where the one setting of a rung is, in words."""
    file = config_path(tmp_path)
    places = [f"--{name.replace('_', '-')}" for name in rung.options]
    places += [*rung.environment, *(f"[embeddings] {key} in {file}" for key in rung.table)]
    places += [f"{key} in {file}" for key in rung.flat]
    return places[0] if places else None


@pytest.mark.parametrize(
    ("name", "at"), [(name, at) for name, rungs in LADDERS.items() for at in range(len(rungs))]
)
def test_each_rung_is_enough_alone(name: str, at: int, tmp_path: Path) -> None:
    rung, expected = LADDERS[name][at]

    assert getattr(read(tmp_path, NEEDED.get(name, NOTHING) | rung), name) == expected


# A setting that is empty, one below it, and what comes of it.
EMPTY = {
    "backend": (
        Given(environment={"AI_MEMORY_EMBED_BACKEND": ""}, table={"backend": "vllm"}),
        "vllm",
    ),
    "base_url": (
        Given(
            environment={"AI_MEMORY_EMBED_BASE_URL": ""},
            table={"backend": "ollama", "base_url": "", "url": ""},
            flat={"embed_url": "http://embed"},
        ),
        "http://embed",
    ),
    "model": (
        Given(environment={"AI_MEMORY_EMBED_MODEL": ""}, table={"model": "by/table"}),
        "by/table",
    ),
    "dimension": (Given(environment={"AI_MEMORY_EMBED_DIM": ""}, table={"dim": 3}), 3),
    "batch": (
        Given(
            environment={"AI_MEMORY_EMBED_BACKFILL_BATCH": ""},
            table={"backfill_batch": 9},
        ),
        9,
    ),
}


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_setting_leaves_it_to_the_rung_below(name: str, tmp_path: Path) -> None:
    given, expected = EMPTY[name]

    assert getattr(read(tmp_path, given), name) == expected


def test_an_empty_model_of_the_table_leaves_it_to_the_flat_key(tmp_path: Path) -> None:
    given = Given(table={"model": ""}, flat={"embedding_model": "by/flat"})

    assert read(tmp_path, given).model == "by/flat"


@pytest.mark.parametrize("name", ["backend", "base_url", "model"])
def test_a_blank_variable_leaves_it_to_the_rung_below(name: str, tmp_path: Path) -> None:
    given, expected = EMPTY[name]
    blank = given._replace(environment=dict.fromkeys(given.environment, "  "))

    assert getattr(read(tmp_path, blank), name) == expected


def test_spaces_around_a_text_are_not_part_of_it(tmp_path: Path) -> None:
    given = Given(environment={"AI_MEMORY_EMBED_MODEL": " by/environment\n"})

    assert read(tmp_path, given).model == "by/environment"


def test_no_settings_at_all_mean_local_minilm_under_the_configured_backends_name(
    tmp_path: Path,
) -> None:
    settings = read_settings(Options(), {"HOME": str(tmp_path)}, tmp_path)

    assert settings == Settings(
        database=None,
        demo=None,
        tier="semantic",
        backend="ollama",
        base_url=None,
        model=MINILM,
        local=True,
        key_variable=None,
        key_file=None,
        key_secret=None,
        dimension=None,
        batch=100,
        egress="allow",
        sources={},
    )
    assert settings.key_source is None


@pytest.mark.parametrize("egress", ["allow", "deny", "loopback-only", "internal-only"])
def test_where_texts_may_be_sent_is_read(egress: str, tmp_path: Path) -> None:
    given = Given(environment={"AI_MEMORY_INFERENCE_EGRESS": egress})

    assert read(tmp_path, given).egress == egress


def test_an_egress_that_is_none_is_refused(tmp_path: Path) -> None:
    given = Given(environment={"AI_MEMORY_INFERENCE_EGRESS": "denyy"})

    assert refused(UsageError, tmp_path, given) == snapshot(
        "AI_MEMORY_INFERENCE_EGRESS must be one of allow, deny, loopback-only, "
        "internal-only, not 'denyy'"
    )


# Which model, and whether sentence-transformers embeds with it.
MODELS: Mapping[str, tuple[Given, str, bool, str]] = {
    "a configured model without a backend is remote and verbatim": (
        Given(table={"model": "BAAI/bge-m3"}),
        "BAAI/bge-m3",
        False,
        "ollama",
    ),
    "a configured model of the environment is remote and verbatim": (
        Given(environment={"AI_MEMORY_EMBED_MODEL": "mxbai-embed-large:latest"}),
        "mxbai-embed-large:latest",
        False,
        "ollama",
    ),
    "MiniLM by its short name is local": (Given(table={"model": MINILM}), MINILM, True, "ollama"),
    "MiniLM by its long name is local": (
        Given(table={"model": f"sentence-transformers/{MINILM}"}),
        f"sentence-transformers/{MINILM}",
        True,
        "ollama",
    ),
    "MiniLM in capitals is local": (
        Given(environment={"AI_MEMORY_EMBED_MODEL": MINILM.upper()}),
        MINILM.upper(),
        True,
        "ollama",
    ),
    "MiniLM by ai-memory's name is local": (
        Given(table={"model": "mini_lm_l6_v2"}),
        "mini_lm_l6_v2",
        True,
        "ollama",
    ),
    "MiniLM of another maker is remote": (
        Given(table={"model": "Xenova/all-MiniLM-L6-v2"}),
        "Xenova/all-MiniLM-L6-v2",
        False,
        "ollama",
    ),
    "MiniLM at a configured server is remote": (
        Given(table={"model": MINILM, "base_url": "http://server"}),
        MINILM,
        False,
        "ollama",
    ),
    "MiniLM of a configured backend is remote": (
        Given(table={"model": MINILM, "backend": "ollama"}),
        MINILM,
        False,
        "ollama",
    ),
    "the flat mini_lm_l6_v2 is local": (
        Given(flat={"embedding_model": "mini_lm_l6_v2"}),
        MINILM,
        True,
        "ollama",
    ),
    "the flat mini_lm_l6_v2 is local in any tier": (
        Given(flat={"embedding_model": "mini_lm_l6_v2", "tier": "autonomous"}),
        MINILM,
        True,
        "ollama",
    ),
    "the flat nomic_embed_v15 is remote": (
        Given(flat={"embedding_model": "nomic_embed_v15"}),
        NOMIC,
        False,
        "ollama",
    ),
    "another flat model is remote and verbatim": (
        Given(flat={"embedding_model": "bge-m3"}),
        "bge-m3",
        False,
        "ollama",
    ),
    "the tier smart means remote nomic": (Given(flat={"tier": "smart"}), NOMIC, False, "ollama"),
    "the tier autonomous means remote nomic": (
        Given(flat={"tier": "autonomous"}),
        NOMIC,
        False,
        "ollama",
    ),
    "the tier semantic means local MiniLM": (
        Given(flat={"tier": "semantic"}),
        MINILM,
        True,
        "ollama",
    ),
    "a server without a model means remote nomic": (
        Given(environment={"AI_MEMORY_EMBED_BASE_URL": "http://server"}),
        NOMIC,
        False,
        "ollama",
    ),
    "a backend without a model means remote nomic": (
        Given(environment={"AI_MEMORY_EMBED_BACKEND": "ollama"}),
        NOMIC,
        False,
        "ollama",
    ),
    "ollama's address for other things than embedding leaves MiniLM local": (
        Given(flat={"ollama_url": "http://server"}),
        MINILM,
        True,
        "ollama",
    ),
    "--model without a backend is local": (
        Given(options={"model": "BAAI/bge-m3"}),
        "BAAI/bge-m3",
        True,
        "ollama",
    ),
    "--model without a backend is local in any tier": (
        Given(options={"model": "BAAI/bge-m3"}, flat={"tier": "smart"}),
        "BAAI/bge-m3",
        True,
        "ollama",
    ),
    "--model with an API backend of the table stays remote": (
        Given(options={"model": "text-embedding-3-large"}, table={"backend": "openai"}),
        "text-embedding-3-large",
        False,
        "openai",
    ),
    "--model with an API backend of the environment stays remote": (
        Given(
            options={"model": "text-embedding-3-large"},
            environment={"AI_MEMORY_EMBED_BACKEND": "openai"},
        ),
        "text-embedding-3-large",
        False,
        "openai",
    ),
    "--model MiniLM with an API backend stays remote": (
        Given(options={"model": MINILM}, table={"backend": "openai"}),
        MINILM,
        False,
        "openai",
    ),
    "--backend local alone means MiniLM": (
        Given(options={"backend": "local"}),
        MINILM,
        True,
        "local",
    ),
    "--backend local means MiniLM in any tier": (
        Given(options={"backend": "local"}, flat={"tier": "smart"}),
        MINILM,
        True,
        "local",
    ),
    "--backend local takes the configured model": (
        Given(options={"backend": "local"}, table={"backend": "openai", "model": "BAAI/bge-m3"}),
        "BAAI/bge-m3",
        True,
        "local",
    ),
    "--backend local takes --model first": (
        Given(options={"backend": "local", "model": "a/b"}, table={"model": "BAAI/bge-m3"}),
        "a/b",
        True,
        "local",
    ),
    "a local backend of the environment is local": (
        Given(environment={"AI_MEMORY_EMBED_BACKEND": "local", "AI_MEMORY_EMBED_MODEL": "a/b"}),
        "a/b",
        True,
        "local",
    ),
    "--base-url makes --model remote": (
        Given(options={"model": MINILM, "base_url": "http://server"}),
        MINILM,
        False,
        "ollama",
    ),
    "--base-url alone means remote nomic": (
        Given(options={"base_url": "http://server"}),
        NOMIC,
        False,
        "ollama",
    ),
    "--backend of an API makes MiniLM remote": (
        Given(options={"backend": "openai"}, table={"model": MINILM}),
        MINILM,
        False,
        "openai",
    ),
}


@pytest.mark.parametrize(("given", "model", "local", "backend"), MODELS.values(), ids=list(MODELS))
def test_the_model_and_where_it_runs(
    given: Given, model: str, local: bool, backend: str, tmp_path: Path
) -> None:
    settings = read(tmp_path, given)

    assert (settings.model, settings.local, settings.backend) == (model, local, backend)


@pytest.mark.parametrize(
    "given",
    [
        Given(options={"backend": "local"}, table={"base_url": "http://server"}),
        Given(
            environment={"AI_MEMORY_EMBED_BACKEND": "local", "AI_MEMORY_EMBED_BASE_URL": "http://s"}
        ),
        Given(flat={"ollama_url": "http://server"}),
    ],
    ids=["option", "environment", "ollama_url"],
)
def test_a_local_model_has_no_address(given: Given, tmp_path: Path) -> None:
    settings = read(tmp_path, given)

    assert (settings.local, settings.base_url) == (True, None)


@pytest.mark.parametrize(
    "given",
    [Given(options={"backend": "local"}), Given(environment={"AI_MEMORY_EMBED_BACKEND": "local"})],
    ids=["option", "environment"],
)
def test_an_address_on_the_command_line_and_a_local_backend_exclude_each_other(
    given: Given, tmp_path: Path
) -> None:
    given |= Given(options={"base_url": "http://server"})

    assert refused(UsageError, tmp_path, given) == snapshot(
        "--base-url is a server's, and the backend local embeds on this machine; name the "
        "kind of server with --backend"
    )


def test_ollamas_flat_address_is_no_other_backends(tmp_path: Path) -> None:
    given = Given(table={"backend": "vllm"}, flat={"ollama_url": "http://ollama"})

    assert read(tmp_path, given).base_url == REMOTE["vllm"][0]


@pytest.mark.parametrize("backend", REMOTE)
def test_a_remote_backend_is_taken_at_its_word_and_minilm_not_put_in_its_place(
    backend: str, tmp_path: Path
) -> None:
    url, _ = REMOTE[backend]
    settings = read(tmp_path, Given(table={"backend": backend, "model": "the/Model:v2"}))

    assert (settings.backend, settings.base_url, settings.model, settings.local) == (
        backend,
        url,
        "the/Model:v2",
        False,
    )
    assert settings.key_source is None
    file = config_path(tmp_path)
    assert settings.sources == {
        "backend": f"[embeddings] backend in {file}",
        "model": f"[embeddings] model in {file}",
    }


def test_the_server_is_where_the_address_says(tmp_path: Path) -> None:
    own = read(tmp_path, Given(options={"backend": "openai"}))
    other = read(tmp_path, Given(options={"backend": "openai", "base_url": "http://server:8000"}))

    assert (own.server, other.server) == ("https://api.openai.com/v1", "http://server:8000")


def test_a_backend_without_a_server_of_its_own_must_be_told_one(tmp_path: Path) -> None:
    settings = read(tmp_path, Given(options={"backend": "openai-compatible"}))

    with pytest.raises(EmbedderError) as error:
        _ = settings.server
    assert error.value.exit_code == 3
    assert wording(error, tmp_path) == snapshot(
        "the backend openai-compatible has no URL of its own; give its server with "
        "--base-url, AI_MEMORY_EMBED_BASE_URL or base_url"
    )


@pytest.mark.parametrize(
    ("url", "says"),
    [
        (
            f"https://server/v1?key={SECRET}",
            snapshot(
                "the server's URL holds a user, a password or a query, which would end up in "
                "logs; give the key by a variable or a file instead"
            ),
        ),
        (
            f"https://{SECRET}@server:8000/v1",
            snapshot(
                "the server's URL holds a user, a password or a query, which would end up in "
                "logs; give the key by a variable or a file instead"
            ),
        ),
        (
            f"https://me:{SECRET}@server/v1",
            snapshot(
                "the server's URL holds a user, a password or a query, which would end up in "
                "logs; give the key by a variable or a file instead"
            ),
        ),
        (
            f"https://server/v1#{SECRET}",
            snapshot(
                "the server's URL holds a user, a password or a query, which would end up in "
                "logs; give the key by a variable or a file instead"
            ),
        ),
        (
            "server/v1",
            snapshot(
                "the server's URL is not like https://host:port/path; correct --base-url or the "
                "configured base_url"
            ),
        ),
        (
            f"ftp://{SECRET}",
            snapshot(
                "the server's URL is not like https://host:port/path; correct --base-url or the "
                "configured base_url"
            ),
        ),
        (
            "http://[server",
            snapshot(
                "the server's URL is not like https://host:port/path; correct --base-url or the "
                "configured base_url"
            ),
        ),
        (
            "http://server:0",
            snapshot(
                "the server's URL is not like https://host:port/path; correct --base-url or the "
                "configured base_url"
            ),
        ),
        (
            "http://server:x",
            snapshot(
                "the server's URL is not like https://host:port/path; correct --base-url or the "
                "configured base_url"
            ),
        ),
    ],
)
def test_nothing_but_the_host_of_an_unsound_address_is_told(
    url: str, says: str, tmp_path: Path
) -> None:
    settings = read(tmp_path, Given(table={"backend": "openai-compatible", "base_url": url}))

    with pytest.raises(EmbedderError) as error:
        check_endpoint(Access(settings.server))
    assert error.value.exit_code == 3
    assert SECRET not in str(error.value)
    assert wording(error, tmp_path) == says


@pytest.mark.parametrize(
    "given",
    [
        Given(options={"backend": "OpenAI"}),
        Given(environment={"AI_MEMORY_EMBED_BACKEND": "OpenAI"}),
        Given(table={"backend": "OpenAI"}),
    ],
    ids=["option", "environment", "table"],
)
def test_an_unknown_backend_is_refused_with_those_that_are_known(
    given: Given, tmp_path: Path
) -> None:
    said = refused(UsageError, tmp_path, given)
    assert f" {', '.join(REMOTE)}; " in said
    assert said == snapshot(
        "the backend 'OpenAI' is not one of local, ollama, openai, xai, gemini, openrouter, "
        "mistral, together, fireworks, qwen, dashscope, lmstudio, vllm, openai-compatible; "
        "correct it"
    )


@pytest.mark.parametrize(
    "more",
    [
        Given(),
        Given(table={"backend": "openai", "model": "a/b"}),
        Given(environment={"AI_MEMORY_EMBED_BACKEND": "ollama", "AI_MEMORY_EMBED_MODEL": MINILM}),
    ],
    ids=["alone", "with a table", "with an environment"],
)
def test_the_keyword_tier_has_no_embedder_whatever_is_configured(
    more: Given, tmp_path: Path
) -> None:
    given = Given(flat={"tier": "keyword"}) | more

    assert refused(NoEmbedderError, tmp_path, given) == snapshot(
        "the ai-memory tier is keyword, which has no embedder, so there is nothing to "
        "re-embed with; choose another tier, or a model with --model"
    )
    assert NoEmbedderError.exit_code == 2


@pytest.mark.parametrize(
    ("options", "model"), [({"model": "a/b"}, "a/b"), ({"backend": "local"}, MINILM)]
)
def test_the_command_line_overrules_the_keyword_tier(
    options: Mapping[str, Any], model: str, tmp_path: Path
) -> None:
    settings = read(tmp_path, Given(options=options, flat={"tier": "keyword"}))

    assert (settings.tier, settings.model, settings.local) == ("keyword", model, True)


def test_an_unknown_tier_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    assert refused(UsageError, tmp_path, Given(flat={"tier": "Smart"})) == snapshot(
        "the tier 'Smart' is not one of keyword, semantic, smart, autonomous; correct the setting"
    )


@pytest.mark.parametrize(
    ("option", "environment", "table", "batch"),
    [
        (0, None, None, 100),
        (0, None, 9, 9),
        (0, "8", 9, 8),
        (7, "0", 0, 7),
        (0, "0", None, 64),
        (0, None, 0, 64),
        (0, "0", 9, 64),
        (0, "1", None, 1),
        (0, "10000", None, 10_000),
        (0, None, 1, 1),
        (0, None, 10_000, 10_000),
        (10_000, None, None, 10_000),
    ],
)
def test_the_batch_falls_through_from_0_and_is_64_if_all_are_0(
    option: int, environment: str | None, table: int | None, batch: int, tmp_path: Path
) -> None:
    given = Given(
        options={"batch": option},
        environment={"AI_MEMORY_EMBED_BACKFILL_BATCH": environment} if environment else {},
        table={} if table is None else {"backfill_batch": table},
    )

    assert read(tmp_path, given).batch == batch


NUMBERS = [("AI_MEMORY_EMBED_DIM", "dim"), ("AI_MEMORY_EMBED_BACKFILL_BATCH", "backfill_batch")]


@pytest.mark.parametrize("value", ["x", "-1", "+1", "1.5", "0x10", "1e3", "1_000", "٣", "²", "1 2"])
@pytest.mark.parametrize("names", NUMBERS, ids=lambda names: names[1])
def test_a_variable_that_is_no_whole_number_is_refused(
    names: tuple[str, str], value: str, tmp_path: Path
) -> None:
    message = refused(UsageError, tmp_path, Given(environment={names[0]: value}))

    assert message.endswith(f", not {value!r}")
    assert (
        message.removesuffix(f"{value!r}")
        == snapshot(
            {
                "dim": (
                    "AI_MEMORY_EMBED_DIM, or dim in "
                    "TMP/home/.config/ai-memory/config.toml, must be a whole number from "
                    "1 to 1000000, not "
                ),
                "backfill_batch": (
                    "AI_MEMORY_EMBED_BACKFILL_BATCH, or backfill_batch in "
                    "TMP/home/.config/ai-memory/config.toml, must be a whole number from "
                    "0 to 10000, not "
                ),
            }
        )[names[1]]
    )


@pytest.mark.parametrize("value", [-1, 1.0, True, False, "x", [1], {"a": 1}], ids=repr)
@pytest.mark.parametrize("names", NUMBERS, ids=lambda names: names[1])
def test_a_key_that_is_no_whole_number_is_refused(
    names: tuple[str, str], value: object, tmp_path: Path
) -> None:
    written = "{a = 1}" if isinstance(value, dict) else json.dumps(value)

    message = refused(UsageError, tmp_path, config=f"[embeddings]\n{names[1]} = {written}")

    assert message.endswith(f", not {value!r}")
    assert (
        message.removesuffix(f"{value!r}")
        == snapshot(
            {
                "dim": (
                    "AI_MEMORY_EMBED_DIM, or dim in "
                    "TMP/home/.config/ai-memory/config.toml, must be a whole number from "
                    "1 to 1000000, not "
                ),
                "backfill_batch": (
                    "AI_MEMORY_EMBED_BACKFILL_BATCH, or backfill_batch in "
                    "TMP/home/.config/ai-memory/config.toml, must be a whole number from "
                    "0 to 10000, not "
                ),
            }
        )[names[1]]
    )


@pytest.mark.parametrize("name", ["dimension", "batch"])
def test_spaces_around_a_number_are_not_part_of_it(name: str, tmp_path: Path) -> None:
    variable = {"dimension": "AI_MEMORY_EMBED_DIM", "batch": "AI_MEMORY_EMBED_BACKFILL_BATCH"}[name]

    assert getattr(read(tmp_path, Given(environment={variable: " 12\n"})), name) == 12


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            Given(environment={"AI_MEMORY_EMBED_BACKFILL_BATCH": "10001"}),
            snapshot(
                "AI_MEMORY_EMBED_BACKFILL_BATCH, or backfill_batch in "
                "TMP/home/.config/ai-memory/config.toml, must be a whole number from 0 to 10000, "
                "not '10001'"
            ),
        ),
        (
            Given(table={"backfill_batch": 10_001}),
            snapshot(
                "AI_MEMORY_EMBED_BACKFILL_BATCH, or backfill_batch in "
                "TMP/home/.config/ai-memory/config.toml, must be a whole number from 0 to 10000, "
                "not 10001"
            ),
        ),
    ],
    ids=["environment", "table"],
)
def test_a_batch_above_10000_is_refused(given: Given, says: str, tmp_path: Path) -> None:
    assert refused(UsageError, tmp_path, given) == says


@pytest.mark.parametrize(
    "given",
    [Given(environment={"AI_MEMORY_EMBED_DIM": "{}"}), Given(table={"dim": "{}"})],
    ids=["environment", "table"],
)
@pytest.mark.parametrize("value", ["0", "1000001"])
def test_a_dimension_of_0_or_above_1000000_is_refused(
    given: Given, value: str, tmp_path: Path
) -> None:
    environment = dict.fromkeys(given.environment, value)
    table = {name: int(value) for name in given.table}

    message = refused(UsageError, tmp_path, Given(environment=environment, table=table))

    written = value if table else repr(value)
    assert message.endswith(f", not {written}")
    assert message.removesuffix(written) == snapshot(
        "AI_MEMORY_EMBED_DIM, or dim in TMP/home/.config/ai-memory/config.toml, must be a "
        "whole number from 1 to 1000000, not "
    )


@pytest.mark.parametrize("value", [5, 1.5, True, ["a"]], ids=repr)
@pytest.mark.parametrize("key", ["backend", "base_url", "url", "model"])
def test_a_key_of_the_table_that_is_no_text_is_refused(
    key: str, value: object, tmp_path: Path
) -> None:
    message = refused(UsageError, tmp_path, Given(table={key: value}))

    said = message.replace(f"{key} in", "KEY in").replace(f"{value!r}", "VALUE")
    assert (
        said
        == snapshot(
            {
                False: "KEY in TMP/home/.config/ai-memory/config.toml must be a text, not VALUE",
                True: "KEY in TMP/home/.config/ai-memory/config.toml must be a text",
            }
        )["url" in key]
    )


@pytest.mark.parametrize("value", [5, False, ["a"]], ids=repr)
@pytest.mark.parametrize("key", ["tier", "embed_url", "embedding_model", "ollama_url", "db"])
def test_a_flat_key_that_is_no_text_is_refused(key: str, value: object, tmp_path: Path) -> None:
    given = Given(table={"backend": "ollama"}, flat={key: value})

    message = refused(UsageError, tmp_path, given)

    said = message.replace(f"{key} in", "KEY in").replace(f"{value!r}", "VALUE")
    assert (
        said
        == snapshot(
            {
                False: "KEY in TMP/home/.config/ai-memory/config.toml must be a text, not VALUE",
                True: "KEY in TMP/home/.config/ai-memory/config.toml must be a text",
            }
        )["url" in key]
    )


@pytest.mark.parametrize("key", ["api_key_file", "api_key_env"])
def test_a_keys_place_that_is_no_text_is_refused(key: str, tmp_path: Path) -> None:
    said = refused(UsageError, tmp_path, Given(table={key: 5}))
    assert said.replace(f"{key} in", "KEY in") == snapshot(
        "KEY in TMP/home/.config/ai-memory/config.toml must be a text"
    )


@pytest.mark.parametrize(
    "config",
    [
        "embeddings = 3",
        f'embeddings = "{SECRET}"',
        "embeddings = true",
        "embeddings = []",
        f'[[embeddings]]\napi_key = "{SECRET}"',
    ],
)
def test_embeddings_that_are_no_table_are_refused(config: str, tmp_path: Path) -> None:
    assert refused(UsageError, tmp_path, config=config) == snapshot(
        "embeddings in TMP/home/.config/ai-memory/config.toml must be a table: [embeddings]"
    )


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            "tier = ",
            snapshot(
                "the configuration TMP/home/.config/ai-memory/config.toml can't be read: it is "
                "no TOML, at end of document (AI_MEMORY_NO_CONFIG=1 leaves it out); correct it"
            ),
        ),
        (
            "[embeddings",
            snapshot(
                "the configuration TMP/home/.config/ai-memory/config.toml can't be read: it is "
                "no TOML, at end of document (AI_MEMORY_NO_CONFIG=1 leaves it out); correct it"
            ),
        ),
        (
            'tier = "smart"\ntier = "smart"',
            snapshot(
                "the configuration TMP/home/.config/ai-memory/config.toml can't be read: it is "
                "no TOML, at end of document (AI_MEMORY_NO_CONFIG=1 leaves it out); correct it"
            ),
        ),
        (
            f"[embeddings]\napi_key = {SECRET}",
            snapshot(
                "the configuration TMP/home/.config/ai-memory/config.toml can't be read: it is "
                "no TOML, at line 2, column 11 (AI_MEMORY_NO_CONFIG=1 leaves it out); correct it"
            ),
        ),
        (
            f'[embeddings]\napi_key = "{SECRET}',
            snapshot(
                "the configuration TMP/home/.config/ai-memory/config.toml can't be read: it is "
                "no TOML, at end of document (AI_MEMORY_NO_CONFIG=1 leaves it out); correct it"
            ),
        ),
        (
            f'[embeddings]\napi_key = "{SECRET}\\q"',
            snapshot(
                "the configuration TMP/home/.config/ai-memory/config.toml can't be read: it is "
                "no TOML, at line 2, column 38 (AI_MEMORY_NO_CONFIG=1 leaves it out); correct it"
            ),
        ),
    ],
)
def test_a_malformed_file_is_refused_without_quoting_it(
    config: str, says: str, tmp_path: Path
) -> None:
    assert refused(UsageError, tmp_path, config=config) == says


def test_a_file_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    path = config_path(tmp_path)
    path.parent.mkdir(parents=True)
    path.write_bytes(b'tier = "sm\xffart"')

    with pytest.raises(UsageError) as error:
        read_settings(Options(), {"HOME": str(tmp_path / "home")}, tmp_path)
    assert wording(error, tmp_path) == snapshot(
        "the configuration TMP/home/.config/ai-memory/config.toml can't be read: it is not "
        "UTF-8 (AI_MEMORY_NO_CONFIG=1 leaves it out); correct it"
    )


def put_config(directory: Path, model: str) -> None:
    path = directory / "ai-memory" / "config.toml"
    path.parent.mkdir(parents=True)
    path.write_text(f'[embeddings]\nmodel = "{model}"')


@pytest.mark.parametrize(
    ("xdg", "model"),
    [(None, "in/home"), ("", "in/home"), ("xdg", "in/xdg"), ("nothing-there", MINILM)],
)
def test_the_file_is_xdg_config_homes_or_dot_configs(
    xdg: str | None, model: str, tmp_path: Path
) -> None:
    put_config(tmp_path / ".config", "in/home")
    put_config(tmp_path / "xdg", "in/xdg")
    environment = {"HOME": str(tmp_path)}
    if xdg is not None:
        environment["XDG_CONFIG_HOME"] = str(tmp_path / xdg) if xdg else ""

    assert read_settings(Options(), environment, tmp_path).model == model


@pytest.mark.parametrize(("value", "model"), [("1", MINILM), ("", "in/home")])
def test_ai_memory_no_config_leaves_the_file_out(value: str, model: str, tmp_path: Path) -> None:
    put_config(tmp_path / ".config", "in/home")
    environment = {"HOME": str(tmp_path), "AI_MEMORY_NO_CONFIG": value}

    assert read_settings(Options(), environment, tmp_path).model == model


def test_a_file_that_is_left_out_may_be_malformed(tmp_path: Path) -> None:
    given = Given(environment={"AI_MEMORY_NO_CONFIG": "1", "AI_MEMORY_EMBED_DIM": "7"})

    assert read(tmp_path, given, config="tier = ").dimension == 7


DATABASES: Sequence[tuple[Given, str]] = [
    (Given(options={"db": "by-option.db"}), "by-option.db"),
    (Given(environment={"AI_MEMORY_DB": "by-environment.db"}), "by-environment.db"),
    (Given(flat={"db": "by-config.db"}), "by-config.db"),
    (Given(), "ai-memory.db"),
]


@pytest.mark.parametrize("at", range(len(DATABASES)))
@pytest.mark.parametrize("others", [True, False], ids=["with those below", "alone"])
def test_the_database_is_the_highest_that_is_named(at: int, others: bool, tmp_path: Path) -> None:
    given = NOTHING
    for rung, _ in DATABASES[at:] if others else DATABASES[at : at + 1]:
        given |= rung
    (tmp_path / "ai-memory.db").touch()

    assert read(tmp_path, given).database == tmp_path / DATABASES[at][1]


def test_without_a_name_and_without_the_default_file_there_is_no_database(tmp_path: Path) -> None:
    assert read(tmp_path).database is None


def test_a_database_of_the_table_is_not_a_setting(tmp_path: Path) -> None:
    assert read(tmp_path, Given(table={"db": "by-table.db"})).database is None


@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize(
    ("written", "resolved"),
    [
        ("sub/m.db", "work/sub/m.db"),
        ("../m.db", "work/../m.db"),
        ("~/m.db", "home/m.db"),
        ("{tmp}/m.db", "m.db"),
        ("a~b.db", "work/a~b.db"),
    ],
)
def test_a_databases_path_is_taken_from_the_working_directory_or_the_home(
    at: int, written: str, resolved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    name = written.format(tmp=tmp_path)
    given = (
        Given(options={"db": name}),
        Given(environment={"AI_MEMORY_DB": name}),
        Given(flat={"db": name}),
    )[at]
    config_path(tmp_path).parent.mkdir(parents=True)
    config_path(tmp_path).write_text(toml(given))
    environment = {"HOME": str(tmp_path / "home"), **given.environment}

    settings = read_settings(Options(**given.options), environment, tmp_path / "work")

    assert settings.database == tmp_path / resolved


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            Given(options={"db": "~no-such-user/m.db"}),
            snapshot("there is no such home as in ~no-such-user/m.db; correct the path"),
        ),
        (
            Given(table={"api_key_file": "~no-such-user/key"}),
            snapshot("there is no such home as in api_key_file; correct the path"),
        ),
    ],
    ids=["db", "api_key_file"],
)
def test_a_home_that_is_nobodys_is_refused(given: Given, says: str, tmp_path: Path) -> None:
    assert refused(UsageError, tmp_path, given) == says


@pytest.mark.parametrize(("value", "demo"), [("demo/m.db", Path("demo/m.db")), ("", None)])
def test_the_demo_store_is_named_by_its_variable(
    value: str, demo: Path | None, tmp_path: Path
) -> None:
    assert read(tmp_path, Given(environment={"REEMBED_DEMO_STORE": value})).demo == demo


@pytest.mark.parametrize("options", [{}, {"backend": "local"}], ids=["remote", "local"])
def test_a_key_in_the_file_itself_is_refused(options: Mapping[str, Any], tmp_path: Path) -> None:
    given = Given(options=options, table={"backend": "openai", "api_key": SECRET})

    assert refused(UsageError, tmp_path, given) == snapshot(
        "TMP/home/.config/ai-memory/config.toml holds an API key itself, where other "
        "programs can read it; put it into a variable (api_key_env) or a file of mode 0400 "
        "(api_key_file)"
    )


def test_a_key_in_the_file_is_refused_even_if_a_better_one_is_set(tmp_path: Path) -> None:
    given = Given(environment={"AI_MEMORY_EMBED_API_KEY": "k"}, table={"api_key": SECRET})

    assert refused(UsageError, tmp_path, given) == snapshot(
        "TMP/home/.config/ai-memory/config.toml holds an API key itself, where other "
        "programs can read it; put it into a variable (api_key_env) or a file of mode 0400 "
        "(api_key_file)"
    )


KEYS = [
    (backend, ("AI_MEMORY_EMBED_API_KEY", *variables)) for backend, (_, variables) in REMOTE.items()
]


@pytest.mark.parametrize(
    ("backend", "variables"),
    [(backend, names[at:]) for backend, names in KEYS for at in range(len(names))],
)
def test_a_keys_variable_is_found_in_order_and_only_its_name_is_kept(
    backend: str, variables: Sequence[str], tmp_path: Path
) -> None:
    given = Given(
        environment=dict.fromkeys(variables, SECRET),
        table={"backend": backend, "api_key_env": "ANOTHER", "model": "a/b"},
    )

    settings = read(tmp_path, given)

    assert (settings.key_source, settings.key_variable, settings.key_file) == (
        variables[0],
        variables[0],
        None,
    )
    assert SECRET not in repr(settings)


@pytest.mark.parametrize("backend", REMOTE)
def test_another_vendors_key_is_not_taken(backend: str, tmp_path: Path) -> None:
    own = REMOTE[backend][1]
    others = {name for _, names in REMOTE.values() for name in names} - set(own)
    assert others

    given = Given(environment=dict.fromkeys(others, SECRET), table={"backend": backend})

    assert read(tmp_path, given).key_source is None


def test_an_empty_variable_holds_no_key(tmp_path: Path) -> None:
    given = Given(
        environment={"AI_MEMORY_EMBED_API_KEY": "", "OPENAI_API_KEY": SECRET},
        table={"backend": "openai"},
    )

    assert read(tmp_path, given).key_source == "OPENAI_API_KEY"


def test_api_key_env_names_the_variable(tmp_path: Path) -> None:
    given = Given(
        environment={"MY_KEY": SECRET}, table={"backend": "openai", "api_key_env": "MY_KEY"}
    )

    settings = read(tmp_path, given)

    assert settings.key_variable == "MY_KEY"
    assert settings.sources["key"] == f"[embeddings] api_key_env in {config_path(tmp_path)}"
    assert SECRET not in repr(settings)


def test_a_key_that_stands_where_its_variable_should_is_refused_and_not_repeated(
    tmp_path: Path,
) -> None:
    given = Given(table={"backend": "openai", "api_key_env": "sk-proj-0123"})

    said = refused(UsageError, tmp_path, given)
    assert said == snapshot(
        "api_key_env in TMP/home/.config/ai-memory/config.toml is no name of a variable; it "
        "names the variable that holds the key"
    )
    assert "sk-proj" not in said


def make_key(path: Path, mode: int) -> Path:
    path.write_text(SECRET)
    path.chmod(mode)
    return path


def test_a_key_file_that_its_owner_alone_may_read_is_named(tmp_path: Path) -> None:
    path = make_key(tmp_path / "key", 0o400)

    settings = read(tmp_path, Given(table={"backend": "openai", "api_key_file": str(path)}))

    assert (settings.key_file, settings.key_variable) == (str(path), None)
    assert settings.key_source == "the file that api_key_file names"
    assert settings.sources["key"] == f"[embeddings] api_key_file in {config_path(tmp_path)}"
    assert SECRET not in repr(settings)


def test_a_key_file_may_lie_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = make_key(tmp_path / "key", 0o400)

    assert read(tmp_path, Given(table={"api_key_file": "~/key"})).key_file == str(path)


@pytest.mark.parametrize("mode", [0o600, 0o500, 0o440, 0o404, 0o644, 0o777], ids=oct)
def test_a_key_file_of_another_mode_is_refused(mode: int, tmp_path: Path) -> None:
    path = make_key(tmp_path / "key", mode)

    assert refused(UsageError, tmp_path, Given(table={"api_key_file": str(path)})) == snapshot(
        "the file that api_key_file names holds a key and must be readable by you alone: "
        "chmod 0400 it"
    )


@pytest.mark.parametrize("kind", ["missing", "directory"])
def test_a_key_file_that_is_no_file_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "key"
    if kind == "directory":
        path.mkdir(mode=0o400)

    assert refused(UsageError, tmp_path, Given(table={"api_key_file": str(path)})) == snapshot(
        "api_key_file names what is not a file; correct the setting"
    )


STORE_URLS = {
    "postgres://u:{secret}@db.internal/memories": snapshot(
        "says that ai-memory keeps its memories in PostgreSQL, so TMP/m.db is not its store, "
        "and it would never see the new vectors; reembed moves SQLite files only: unset "
        "AI_MEMORY_STORE_URL for this command if you mean this file"
    ),
    "PostgreSQL://u@db.internal/memories?password={secret}": snapshot(
        "says that ai-memory keeps its memories in PostgreSQL, so TMP/m.db is not its store, "
        "and it would never see the new vectors; reembed moves SQLite files only: unset "
        "AI_MEMORY_STORE_URL for this command if you mean this file"
    ),
    " postgresql:///memories ": snapshot(
        "says that ai-memory keeps its memories in PostgreSQL, so TMP/m.db is not its store, "
        "and it would never see the new vectors; reembed moves SQLite files only: unset "
        "AI_MEMORY_STORE_URL for this command if you mean this file"
    ),
    "sqlite://{directory}/other.db": snapshot(
        "says that TMP/other.db is ai-memory's store, and not TMP/m.db; name that file with "
        "--db, or unset AI_MEMORY_STORE_URL for this command"
    ),
    "sqlite:///{directory}/other.db": snapshot(
        "says that TMP/other.db is ai-memory's store, and not TMP/m.db; name that file with "
        "--db, or unset AI_MEMORY_STORE_URL for this command"
    ),
    "sqlite://other.db": snapshot(
        "says that TMP/other.db is ai-memory's store, and not TMP/m.db; name that file with "
        "--db, or unset AI_MEMORY_STORE_URL for this command"
    ),
    "sqlite://": snapshot(
        "is no URL such as sqlite:///path or postgres://..., so it can't be told whether "
        "TMP/m.db is ai-memory's store; correct it, or unset it for this command"
    ),
    "mysql://u:{secret}@db.internal/memories": snapshot(
        "is no URL such as sqlite:///path or postgres://..., so it can't be told whether "
        "TMP/m.db is ai-memory's store; correct it, or unset it for this command"
    ),
    "{secret}": snapshot(
        "is no URL such as sqlite:///path or postgres://..., so it can't be told whether "
        "TMP/m.db is ai-memory's store; correct it, or unset it for this command"
    ),
}


def check_store(directory: Path, environment: Mapping[str, str], db: str = "m.db") -> None:
    """Read the settings for a database, and look whether it is ai-memory's store."""
    settings = read_settings(Options(db=db), {"HOME": str(directory), **environment}, directory)
    assert SECRET not in repr(settings)
    check_is_store(settings, settings.database or directory / "demo.db", directory)


@pytest.mark.parametrize("in_a_file", [False, True])
@pytest.mark.parametrize("url", STORE_URLS)
def test_a_database_that_is_not_ai_memorys_store_is_refused(
    url: str, in_a_file: bool, tmp_path: Path
) -> None:
    given = url.format(secret=SECRET, directory=tmp_path)
    environment = {"AI_MEMORY_STORE_URL": given}
    if in_a_file:  # It goes before the variable.
        (tmp_path / "url").write_text(f"{given}\n")
        environment = {"AI_MEMORY_STORE_URL_FILE": "url", "AI_MEMORY_STORE_URL": "sqlite://m.db"}

    with pytest.raises(UsageError) as refused:
        check_store(tmp_path, environment)

    variable, _, said = wording(refused, tmp_path).partition(" ")
    assert variable == ("AI_MEMORY_STORE_URL_FILE" if in_a_file else "AI_MEMORY_STORE_URL")
    assert SECRET not in said
    assert said.replace("AI_MEMORY_STORE_URL_FILE", "AI_MEMORY_STORE_URL") == STORE_URLS[url]


@pytest.mark.parametrize("content", [None, b"\xff"])
def test_a_store_url_that_can_t_be_read_is_refused(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "url").write_bytes(content)

    with pytest.raises(UsageError) as refused:
        check_store(tmp_path, {"AI_MEMORY_STORE_URL_FILE": "url"})
    assert (
        wording(refused, tmp_path)
        == snapshot(
            {
                None: (
                    "AI_MEMORY_STORE_URL_FILE names a file that can't be read (No such "
                    "file or directory), so it can't be told where ai-memory's store is; "
                    "correct it, or unset it for this command"
                ),
                b"\xff": (
                    "AI_MEMORY_STORE_URL_FILE names a file that can't be read (it is not "
                    "UTF-8), so it can't be told where ai-memory's store is; correct it, "
                    "or unset it for this command"
                ),
            }
        )[content]
    )


@pytest.mark.parametrize("url", ["", " ", "sqlite://m.db", "SQLite://./m.db", "sqlite://{}/m.db"])
def test_a_database_that_is_ai_memorys_store_is_taken(url: str, tmp_path: Path) -> None:
    (tmp_path / "m.db").touch()
    (tmp_path / "link.db").symlink_to("m.db")
    environment = {"AI_MEMORY_STORE_URL": url.format(tmp_path), "AI_MEMORY_STORE_URL_FILE": " "}

    check_store(tmp_path, environment)
    check_store(tmp_path, environment, db="link.db")


def test_the_store_url_matters_for_the_store_of_ai_memory_alone(
    reembed: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_store(tmp_path / "m.db", [memory("a")])
    monkeypatch.setenv("AI_MEMORY_STORE_URL", f"postgres://u:{SECRET}@db.internal/memories")
    before = files(tmp_path)
    flags = ("--table", "memories", "--text", "content", "--vector", "embedding")

    for refused in (reembed("--db", path, "--dry-run"), reembed("--db", path)):
        assert refused.code == 2
        assert SECRET not in refused.err
        assert wording(refused.error, tmp_path) == snapshot(
            "AI_MEMORY_STORE_URL says that ai-memory keeps its memories in PostgreSQL, so "
            "TMP/m.db is not its store, and it would never see the new vectors; reembed "
            "moves SQLite files only: unset AI_MEMORY_STORE_URL for this command if you mean "
            "this file"
        )
    assert files(tmp_path) == before
    assert reembed("--db", path, *flags, "--dry-run").code == 0
    monkeypatch.delenv("AI_MEMORY_STORE_URL")
    assert reembed("--db", path).code == 0
    monkeypatch.setenv("AI_MEMORY_STORE_URL", "postgres://db.internal/memories")
    assert reembed("rollback", "--db", path).code == 0  # What was done by mistake is undone.
