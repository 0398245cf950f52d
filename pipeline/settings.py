"""The settings of an ai-memory installation, read once into one value.

For each: the command line, then the environment, then `[embeddings]` of the configuration
file, then the older flat keys, then a default. The file is
`$XDG_CONFIG_HOME/ai-memory/config.toml`, or `~/.config/ai-memory/config.toml`;
`AI_MEMORY_NO_CONFIG` leaves it out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from reembed.pipeline.options import MAX_DIMENSION, Options
from reembed.pipeline.paths import expanded, find_dead_link, read_file, read_toml
from reembed.transforms.embedders.endpoint import EGRESS, is_exposed, read_key_file
from reembed.transforms.embedders.models import MINILM, is_minilm
from reembed.transforms.errors import EmbedderError, NoEmbedderError, UsageError
from reembed.transforms.hiding import (
    file_trouble,
    holds_secret,
    key_words,
    note_secret,
    shown,
    shown_value,
)
from reembed.transforms.stores import real_path

DEFAULT_BATCH = 100
LAST_RESORT_BATCH = 64
MOST_BATCH = 10_000
DEFAULT_MODEL = "nomic-embed-text-v1.5"
DEFAULT_DATABASE = "ai-memory.db"
DEMO_VARIABLE = "REEMBED_DEMO_STORE"
STORE_URL = "AI_MEMORY_STORE_URL"
STORE_URL_FILE = "AI_MEMORY_STORE_URL_FILE"

LOCAL = "local"
TIERS = ("keyword", "semantic", "smart", "autonomous")

# Default URL, and the variables that may hold the key.
BACKENDS: Mapping[str, tuple[str | None, tuple[str, ...]]] = {
    "ollama": ("http://localhost:11434", ()),
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
    "qwen": (
        "https://dashscope.aliyuncs.com/compatible-mode/v1",
        ("DASHSCOPE_API_KEY", "QWEN_API_KEY"),
    ),
    "dashscope": (
        "https://dashscope.aliyuncs.com/compatible-mode/v1",
        ("DASHSCOPE_API_KEY", "QWEN_API_KEY"),
    ),
    "lmstudio": ("http://localhost:1234/v1", ()),
    "vllm": ("http://localhost:8000/v1", ()),
    "openai-compatible": (None, ()),
}

T = TypeVar("T")

_LEGACY_MODELS = {"mini_lm_l6_v2": MINILM, "nomic_embed_v15": DEFAULT_MODEL}


@dataclass(frozen=True)
class Settings:
    """The embedder that the ai-memory daemon would build, and the database.

    `backend` is the one configured, which the daemon names even where it embeds by itself;
    `local` says that it does, with sentence-transformers' `model`. A key would be read from
    the variable `key_variable`, from `key_file` or from `key_secret`. `store_url` is where
    ai-memory itself is told that its store is, and may hold a password; it is in `store_url_file`
    if that is set. `sources` says of each setting where its value came from.
    """

    database: Path | None
    demo: Path | None
    tier: str
    backend: str
    base_url: str | None
    model: str
    local: bool
    key_variable: str | None
    key_file: str | None
    key_secret: str | None
    dimension: int | None
    batch: int
    egress: str
    sources: Mapping[str, str] = field(default_factory=dict)
    store_url: str | None = field(default=None, repr=False)
    store_url_file: Path | None = None

    @property
    def key_source(self) -> str | None:
        """Describe where the key comes from, without the key or a path."""
        return key_words(self.key_variable, self.key_file, self.key_secret)

    @property
    def server(self) -> str:
        """The URL of the server that embeds; raise EmbedderError if none is known."""
        if self.base_url is None:
            raise EmbedderError(
                f"the backend {self.backend} has no URL of its own; give its server with "
                "--base-url, AI_MEMORY_EMBED_BASE_URL or base_url"
            )
        return self.base_url


def read_settings(options: Options, environment: Mapping[str, str], directory: Path) -> Settings:
    """Resolve all settings; `directory` is the working directory.

    Raises UsageError for a setting that can't be used, NoEmbedderError for the keyword tier.
    """
    ladder = _Ladder(environment, _read_file(environment))
    _note_keys(ladder, directory)
    tier = ladder.text("tier", flat="tier") or "semantic"
    if tier not in TIERS:
        raise UsageError(
            f"the tier {shown(repr(tier))} is not one of {', '.join(TIERS)}; correct the setting"
        )
    backend = ladder.text(
        "backend", options.backend, variable="AI_MEMORY_EMBED_BACKEND", table=["backend"]
    )
    if backend is not None and backend not in (*BACKENDS, LOCAL):
        raise UsageError(
            f"the backend {shown(repr(backend))} is not one of "
            f"{', '.join((LOCAL, *BACKENDS))}; correct it"
        )
    if tier == "keyword" and options.backend is None and options.model is None:
        raise NoEmbedderError(
            "the ai-memory tier is keyword, which has no embedder, so there is nothing to re-embed "
            "with; choose another tier, or a model with --model"
        )
    url = ladder.text(
        "base_url",
        options.base_url,
        variable="AI_MEMORY_EMBED_BASE_URL",
        table=["base_url", "url"],
        flat="embed_url",
    )
    model, local = _model(options, ladder, backend=backend, tier=tier, url=url)
    named = backend or "ollama"
    if named == "ollama":
        url = url or ladder.text("base_url", flat="ollama_url")
    for name, value in {"model": model, "base_url": url}.items():
        _refuse_secret(name, value)
    default_url = None if named == LOCAL else BACKENDS[named][0]
    key_variable, key_file = None, None
    if options.key_secret is None:
        key_variable, key_file = _key_source(ladder, named, directory)
    else:
        ladder.sources["key"] = "--key-secret"
    return Settings(
        database=_database(options, ladder, directory),
        demo=Path(demo) if (demo := environment.get(DEMO_VARIABLE)) else None,
        tier=tier,
        backend=named,
        base_url=None if local else url or default_url,
        model=model,
        local=local,
        key_variable=key_variable,
        key_file=key_file,
        key_secret=options.key_secret,
        dimension=ladder.number(
            "dim",
            options.dim,
            variable="AI_MEMORY_EMBED_DIM",
            key="dim",
            least=1,
            most=MAX_DIMENSION,
        ),
        batch=_batch(options, ladder),
        egress=_egress(ladder),
        sources=ladder.sources,
        store_url=environment.get(STORE_URL, "").strip() or None,
        store_url_file=directory / file
        if (file := environment.get(STORE_URL_FILE, "").strip())
        else None,
    )


def check_is_store(settings: Settings, database: Path, directory: Path) -> None:
    """Raise UsageError if ai-memory's settings name another store than a database of its kind.

    The original refuses so, too, whatever its --db says: what is written to a file that no
    daemon reads is lost. The URL is never shown.
    """
    if settings.database is None:  # The demo store is nobody's.
        return
    file, url, variable = settings.store_url_file, settings.store_url, STORE_URL
    if file is not None:
        variable = STORE_URL_FILE
        try:
            url = read_file(file).decode().strip()
        except (OSError, ValueError) as error:
            text = isinstance(error, UnicodeError)
            why = getattr(error, "strerror", None) or ("it is not UTF-8" if text else error)
            raise UsageError(
                f"{variable} names a file that can't be read ({why}), so it can't be told where "
                "ai-memory's store is; correct it, or unset it for this command"
            ) from None
    if url is None:
        return
    scheme, _, rest = url.partition("://")
    if scheme.lower() in ("postgres", "postgresql"):
        raise UsageError(
            f"{variable} says that ai-memory keeps its memories in PostgreSQL, so {database} is "
            "not its store, and it would never see the new vectors; reembed moves SQLite files "
            f"only: unset {variable} for this command if you mean this file"
        )
    if scheme.lower() != "sqlite" or not rest.strip("/"):
        raise UsageError(
            f"{variable} is no URL such as sqlite:///path or postgres://..., so it can't be told "
            f"whether {database} is ai-memory's store; correct it, or unset it for this command"
        )
    named = directory / (rest[1:] if rest.startswith("//") else rest)
    if real_path(named) != real_path(database):
        where = "another file" if "@" in rest or "?" in rest else shown(named)
        raise UsageError(
            f"{variable} says that {where} is ai-memory's store, and not {database}; name that "
            f"file with --db, or unset {variable} for this command"
        )


def _model(
    options: Options, ladder: _Ladder, *, backend: str | None, tier: str, url: str | None
) -> tuple[str, bool]:
    """Choose the model, verbatim, and whether sentence-transformers embeds with it.

    Nothing but all-MiniLM-L6-v2 is ever local unless the command line says so: a model that
    was configured for a server is not looked for here, nor replaced by MiniLM.
    """
    model = ladder.text("model", options.model, variable="AI_MEMORY_EMBED_MODEL", table=["model"])
    if model is None and (legacy := ladder.text("model", flat="embedding_model")):
        model = _LEGACY_MODELS.get(legacy, legacy)
    if backend == LOCAL:
        if options.base_url is not None:
            raise UsageError(
                "--base-url is a server's, and the backend local embeds on this machine; name the "
                "kind of server with --backend"
            )
        return model or MINILM, True
    if backend is None and options.model and options.base_url is None:
        return options.model, True
    if backend is None and url is None:
        if model is None and tier == "semantic":
            return MINILM, True
        if model is not None and is_minilm(model):
            return model, True
    return model or DEFAULT_MODEL, False


def _batch(options: Options, ladder: _Ladder) -> int:
    configured = ladder.number(
        "batch",
        options.batch or None,
        variable="AI_MEMORY_EMBED_BACKFILL_BATCH",
        key="backfill_batch",
        least=0,
        most=MOST_BATCH,
    )
    if configured is None:
        configured = DEFAULT_BATCH
    return configured or LAST_RESORT_BATCH


def _egress(ladder: _Ladder) -> str:
    """Where texts may be sent. An embedder on this machine sends them nowhere."""
    egress = ladder.text("egress", variable="AI_MEMORY_INFERENCE_EGRESS") or EGRESS[0]
    if egress not in EGRESS:
        raise UsageError(
            f"AI_MEMORY_INFERENCE_EGRESS must be one of {', '.join(EGRESS)}"
            f"{shown_value('egress', egress)}"
        )
    return egress


def _database(options: Options, ladder: _Ladder, directory: Path) -> Path | None:
    """The database that is named, or the default one if it exists; None if neither."""
    named = ladder.text("db", options.db, variable="AI_MEMORY_DB", flat="db")
    if named and _LIKE_A_URL.search(named) and not _is_there(directory, named):
        # Not quoted: it may hold a password.
        raise UsageError(
            f"{ladder.sources['db']} holds the URL of a database or how to log in to one, and "
            "reembed moves SQLite files only; give the path of one"
        )
    if named:
        _refuse_secret("db", named)
        return directory / expanded(named)
    default = directory / DEFAULT_DATABASE
    return default if default.exists() else None


_LIKE_A_URL = re.compile(
    r"://"
    r"|^\W*(postgres(ql)?|mysql|mariadb|mongodb|redis|libsql)(\+\w+)?:"
    r"|^\s*(//)?[^/:]*:.*@"
    r"|(pass\w*|pwd|key|token|secret|sig)\s*=",
    re.IGNORECASE | re.DOTALL,
)


def _refuse_secret(setting: str, value: str | None) -> None:
    """Raise UsageError for a value with a secret in it: it would be shown, sent and kept."""
    if value and holds_secret(value):
        raise UsageError(f"the setting {setting} holds a key or a password; correct it")


def _is_there(directory: Path, named: str) -> bool:
    """Whether a file is called so, however odd the name is."""
    return os.path.exists(directory / os.path.expanduser(named))  # noqa: PTH110, PTH111 - no raise


def _note_keys(ladder: _Ladder, directory: Path) -> None:
    """Have nothing shown of the keys that the settings lead to, whatever setting holds one."""
    named = ladder.embeddings.get("api_key_env")
    for key in (ladder.embeddings.get("api_key"), ladder.environment.get(str(named))):
        if isinstance(key, str):
            note_secret(key)
    file = ladder.embeddings.get("api_key_file")
    if isinstance(file, str) and file.strip():
        with suppress(EmbedderError, UsageError, ValueError):
            read_key_file(directory / expanded(file.strip()))


def _key_path(path: str) -> Path:
    try:
        return expanded(path)
    except UsageError:  # Not quoted: it may be the key itself.
        raise UsageError("there is no such home as in api_key_file; correct the path") from None


def _key_source(ladder: _Ladder, backend: str, directory: Path) -> tuple[str | None, str | None]:
    """Where a key is: in a variable, or in a file."""
    if held := ladder.embeddings.get("api_key"):
        note_secret(str(held))
        raise UsageError(
            f"{ladder.file} holds an API key itself, where other programs can read it; put it into "
            "a variable (api_key_env) or a file of mode 0400 (api_key_file)"
        )
    variables = BACKENDS[backend][1] if backend in BACKENDS else ()
    for variable in ("AI_MEMORY_EMBED_API_KEY", *variables):
        if ladder.environment.get(variable):
            ladder.sources["key"] = f"{variable} is set"
            return variable, None
    if file := ladder.text("key", table=["api_key_file"]):
        path = directory / _key_path(file)
        # Not quoted: it may be the key itself.
        try:
            if not path.is_file():
                raise UsageError("api_key_file names what is not a file; correct the setting")
            if is_exposed(path):
                raise UsageError(
                    "the file that api_key_file names holds a key and must be readable by you "
                    "alone: chmod 0400 it"
                )
        except (OSError, ValueError) as error:  # A name too long; a directory without rights.
            why = getattr(error, "strerror", None) or "it is no path"
            raise UsageError(
                f"the file that api_key_file names can't be looked at ({why}); correct the setting"
            ) from None
        return None, str(path)
    named = ladder.text("key", table=["api_key_env"])
    if named and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", named):
        # Not quoted: it may be the key itself.
        raise UsageError(
            f"api_key_env in {ladder.file} is no name of a variable; it names the variable that "
            "holds the key"
        )
    return named, None


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Ladder:
    """Looks a setting up: its flag, the environment, then the file's new and old places.

    `sources` remembers where the value of each was found.
    """

    def __init__(self, environment: Mapping[str, str], file: tuple[Path, dict[str, Any]]) -> None:
        self.environment = environment
        self.file, self._config = file
        self.embeddings = self._config.get("embeddings", {})
        self.sources: dict[str, str] = {}
        if not isinstance(self.embeddings, dict):
            raise UsageError(f"embeddings in {self.file} must be a table: [embeddings]")

    def text(
        self,
        setting: str,
        flag: str | None = None,
        *,
        variable: str | None = None,
        table: Sequence[str] = (),
        flat: str | None = None,
    ) -> str | None:
        """Look for a text; a blank one counts as not set."""
        if flag is not None:
            return self._given(setting, flag)
        name, value = self._find(setting, variable, table, flat)
        if value is not None and not isinstance(value, str):
            raise UsageError(
                f"{name} in {self.file} must be a text{shown_value(name or '', value)}"
            )
        if value and "\0" in value:
            raise UsageError(f"{name} in {self.file} holds a NUL; correct it")
        if value and not _is_text(value):
            raise UsageError(f"{name} holds bytes that are no text; correct it")
        return value.strip() if value else None

    def number(
        self,
        setting: str,
        flag: int | None = None,
        *,
        variable: str,
        key: str,
        least: int,
        most: int,
    ) -> int | None:
        """Look for a whole number."""
        if flag is not None:
            return self._given(setting, flag)
        _, value = self._find(setting, variable, [key], None)
        if value is None:
            return None
        text = str(value).strip()
        digits = text.isascii() and text.isdigit() and len(text) < 10
        sound = digits and int(text) >= least
        if not sound or int(text) > most:
            raise UsageError(
                f"{variable}, or {key} in {self.file}, must be a whole number from {least} "
                f"to {most}{shown_value(key, value)}"
            )
        return int(text)

    def _given(self, setting: str, value: T) -> T:
        self.sources[setting] = f"--{setting.replace('_', '-')}"
        return value

    def _find(
        self, setting: str, variable: str | None, table: Sequence[str], flat: str | None
    ) -> tuple[str | None, Any]:
        """The first place that says anything, and what it says."""
        if variable and self.environment.get(variable, "").strip():
            self.sources[setting] = variable
            return variable, self.environment[variable]
        places = [(key, self.embeddings.get(key)) for key in table]
        places += [(flat, self._config.get(flat))] if flat else []
        for at, (key, value) in enumerate(places):
            if value is not None and not (isinstance(value, str) and not value.strip()):
                where = f"[embeddings] {key}" if at < len(table) else key
                self.sources[setting] = f"{where} in {self.file}"
                return key, value
        return None, None


def _read_file(environment: Mapping[str, str]) -> tuple[Path, dict[str, Any]]:
    """The configuration file and what is in it: nothing if it is absent, or nobody has a home."""
    base = environment.get("XDG_CONFIG_HOME") or f"{environment.get('HOME') or '~'}/.config"
    path = Path(base) / "ai-memory" / "config.toml"
    with suppress(UsageError):  # A user of a container may have no home.
        path = expanded(str(path))
    if environment.get("AI_MEMORY_NO_CONFIG"):
        return path, {}
    try:
        # Else another model would be taken than the one that is configured.
        if link := find_dead_link(path):
            raise ValueError(f"{link} is a link to {link.readlink()}, where nothing is")
        return path, read_toml(path)
    except (FileNotFoundError, NotADirectoryError):
        return path, {}
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the configuration {path} can't be read: {file_trouble(error)} "
            "(AI_MEMORY_NO_CONFIG=1 leaves it out); correct it"
        ) from None
