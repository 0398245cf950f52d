"""What the program refuses, how it says so, and that a refusal leaves no trace."""

from __future__ import annotations

import ctypes
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from inline_snapshot import snapshot

from reembed.transforms.stores import sqlite as sqlite_files
from tests.conftest import Call, Ran, change, files, make_store, memory, select, unpack
from tests.test_disk_full import PLENTY, mounted, resize
from tests.test_models import use_hub
from tests.wording import wording

PAGE_BYTES = 4096
ROWS = 202


def tree(directory: Path) -> dict[str, bytes | None]:
    """Every file below a directory with its contents, and every directory."""
    directories = [path for path in directory.rglob("*") if path.is_dir()]
    return {str(path.relative_to(directory)): None for path in directories} | files(directory)


def refusal(done: Ran, code: int) -> str:
    """The one line with which the program refused; nothing went to stdout.

    With exit code 1, another one says that the store is as it was.
    """
    assert (done.code, done.out) == (code, ""), done.err
    assert "Traceback" not in done.err
    lines = done.err.splitlines()
    errors = [line for line in lines if line.startswith("reembed: error: ")]
    if code == 1 and lines[-1] == "reembed: this command wrote nothing to the store":
        lines.pop()
    assert errors == lines[-1:], done.err
    assert "[while running" not in errors[0]
    return errors[0].removeprefix("reembed: error: ")


def both_ways(reembed: Call, *arguments: str | Path) -> tuple[Ran, Ran]:
    """A dry run and a run of the real program."""
    return reembed(*arguments, "--dry-run", real=True), reembed(*arguments, real=True)


@contextmanager
def holding(path: Path, *statements: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that has run these statements and keeps its connection."""
    script = (
        "import sqlite3, sys\n"
        "connection = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "for statement in sys.argv[2:]:\n"
        "    connection.execute(statement).fetchall()\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path), *statements],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


INSERT = (
    "INSERT INTO memories (id, tier, namespace, title, content, created_at, updated_at) "
    "VALUES ('{0}', 'long', 'notes', 'title {0}', 'content', '2025-01-06', '2025-01-06')"
)
IN_THE_LOG = ("PRAGMA wal_autocheckpoint = 0", *(INSERT.format(f"late-{n}") for n in range(3)))


def a_text_file(path: Path) -> None:
    path.write_text("Dear diary, today I moved to another embedding model.\n" * 100)


def another_programs(path: Path) -> None:
    change(path, "CREATE TABLE books (isbn)", "CREATE TABLE readers (name)")


def a_view(path: Path) -> None:
    change(
        path,
        "CREATE TABLE rows (id TEXT, namespace TEXT, title TEXT, content TEXT, embedding BLOB)",
        "CREATE VIEW memories AS SELECT * FROM rows",
    )


def in_utf_16(path: Path) -> None:
    change(
        path,
        "PRAGMA encoding = 'UTF-16le'",
        "CREATE TABLE memories (id TEXT PRIMARY KEY, namespace TEXT, title TEXT, content TEXT, "
        "embedding BLOB)",
        "INSERT INTO memories VALUES ('1', 'global', 'a', 'b', NULL)",
    )


def without_vectors(path: Path) -> None:
    change(path, "CREATE TABLE memories (id TEXT, namespace TEXT, title TEXT, content TEXT)")


def truncated(path: Path) -> None:
    whole = unpack("v57", path).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def damaged(path: Path) -> None:
    """Overwrite the pages that hold some of the texts; the header and the schema stay."""
    whole = bytearray(unpack("v57", path).read_bytes())
    texts = [str(text).encode() for (text,) in select(path, "SELECT content FROM memories")]
    pages = {whole.find(text) // PAGE_BYTES for text in texts[:20]}
    assert pages
    assert min(pages) > 0
    for page in pages:
        whole[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] = b"\xa5" * PAGE_BYTES
    path.write_bytes(whole)


BAD_DATABASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (
        lambda path: None,
        snapshot("there is no database at TMP/some.db; name an existing one with --db"),
    ),
    "a directory": (
        lambda path: path.mkdir(),
        snapshot("TMP/some.db is not a file, so it can't be a database; name one with --db"),
    ),
    "a pipe": (
        lambda path: os.mkfifo(path),
        snapshot("TMP/some.db is not a file, so it can't be a database; name one with --db"),
    ),
    "empty": (
        lambda path: path.touch(),
        snapshot("TMP/some.db is empty: it holds no store; name the right file with --db"),
    ),
    "a text file": (
        a_text_file,
        snapshot(
            "TMP/some.db is not a readable SQLite database: it is another kind of file, or "
            "encrypted (SQLCipher); reembed needs a plain one, so decrypt a copy first if "
            "it is encrypted"
        ),
    ),
    "a header alone": (
        lambda path: path.write_bytes(b"SQLite format 3\x00"),
        snapshot(
            "TMP/some.db is not a readable SQLite database: it is another kind of file, or "
            "encrypted (SQLCipher); reembed needs a plain one, so decrypt a copy first if "
            "it is encrypted"
        ),
    ),
    "another program's": (
        another_programs,
        snapshot(
            "TMP/some.db is not an ai-memory database: it has no table 'memories' with id, "
            "namespace, title and content (its tables are books, readers); name the right "
            "file with --db"
        ),
    ),
    "encrypted": (
        lambda path: path.write_bytes(random.Random(1).randbytes(8192)),
        snapshot(
            "TMP/some.db is not a readable SQLite database: it is another kind of file, or "
            "encrypted (SQLCipher); reembed needs a plain one, so decrypt a copy first if "
            "it is encrypted"
        ),
    ),
    "truncated": (
        truncated,
        snapshot(
            "TMP/some.db is damaged (PRAGMA integrity_check says how); restore or repair "
            "it before its vectors are replaced"
        ),
    ),
    "damaged": (
        damaged,
        snapshot(
            "TMP/some.db is damaged (PRAGMA integrity_check says how); restore or repair "
            "it before its vectors are replaced"
        ),
    ),
    "a view": (
        a_view,
        snapshot(
            "TMP/some.db is not an ai-memory database: it has no table 'memories' with id, "
            "namespace, title and content (its tables are rows); name the right file with "
            "--db"
        ),
    ),
    "in UTF-16": (
        in_utf_16,
        snapshot(
            "TMP/some.db stores its texts as UTF-16le, which ai-memory never does; copy it "
            "into a UTF-8 database first"
        ),
    ),
    "without a vector column": (
        without_vectors,
        snapshot(
            "TMP/some.db is an ai-memory database from before it kept vectors (no column "
            "'embedding'); let a newer ai-memory open it once, or give the column back its "
            "name if it had one"
        ),
    ),
}


@pytest.mark.parametrize("kind", BAD_DATABASES)
def test_a_database_that_is_no_store_is_refused_in_one_line_and_left_as_it_is(
    kind: str, tmp_path: Path, reembed: Call
) -> None:
    make, says = BAD_DATABASES[kind]
    path = tmp_path / "some.db"
    make(path)
    before = tree(tmp_path)

    for done in both_ways(reembed, "--db", path):
        assert wording(refusal(done, 1), tmp_path) == says
    assert tree(tmp_path) == before


def test_a_database_by_a_name_that_is_too_long_is_refused(tmp_path: Path, reembed: Call) -> None:
    done = reembed("--db", tmp_path / ("a" * 300), "--dry-run", real=True)

    assert wording(refusal(done, 1), tmp_path).replace("a" * 300, "LONG") == snapshot(
        "TMP/LONG can't be read (File name too long); check its name, owner and mode"
    )
    assert tree(tmp_path) == {}


def test_a_database_of_a_user_who_does_not_exist_is_refused(tmp_path: Path, reembed: Call) -> None:
    done = reembed("--db", "~no-such-user-here/ai-memory.db", "--dry-run", real=True)

    assert refusal(done, 2) == snapshot(
        "there is no such home as in ~no-such-user-here/ai-memory.db; correct the path"
    )
    assert tree(tmp_path) == {}


def test_a_database_whose_name_is_not_utf_8_is_refused(tmp_path: Path, reembed: Call) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.db")
    make_store(path, [memory("a")])
    before = tree(tmp_path)

    done = reembed("--db", path, "--dry-run", real=True)

    # A run could not note its path, so a plan would promise too much.
    assert wording(refusal(done, 2), tmp_path) == snapshot(
        "the path of the database, TMP/caf\\udce9.db, is not UTF-8, as the files must be "
        "in which reembed notes it; rename the file or the directory"
    )
    assert tree(tmp_path) == before


def test_a_database_whose_name_has_the_marks_of_a_uri_is_planned(
    tmp_path: Path, reembed: Call
) -> None:
    path = make_store(tmp_path / "50% off? #1 & more.db", [memory("a")])
    before = tree(tmp_path)

    done = reembed("--db", path, "--dry-run", "--json", real=True)

    assert done.code == 0
    assert done.values["database"] == str(path)
    assert tree(tmp_path) == before


def test_a_namespace_that_is_not_utf_8_is_refused(tmp_path: Path, reembed: Call) -> None:
    path = make_store(tmp_path / "ai-memory.db", [memory("a")])
    before = tree(tmp_path)

    done = reembed("--db", path, "--namespace", os.fsdecode(b"caf\xe9"), "--dry-run", real=True)

    assert refusal(done, 2) == snapshot(
        "--namespace holds bytes that are no text; give them as UTF-8"
    )
    assert tree(tmp_path) == before


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a server that does not answer asked again at once."""
    monkeypatch.setattr("reembed.transforms.embedders.http.backoff", lambda attempt: 0.01)


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "says"),
    [
        (
            ["--model", "no-such-model"],
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            3,
            snapshot(
                "the model no-such-model is not on this machine and the hub at "
                "http://127.0.0.1:PORT can't be reached (ConnectError); give the model's "
                "directory with --model, or connect"
            ),
        ),
        (
            ["--model", "no-such-model"],
            {"HF_HUB_OFFLINE": "1"},
            3,
            snapshot(
                "the model no-such-model is not on this machine and HF_HUB_OFFLINE forbids "
                "asking the hub for it; give its directory with --model, or unset that "
                "variable"
            ),
        ),
        (
            ["--model", "./models/none"],
            {},
            3,
            snapshot(
                "there is no sentence-transformers model in TMP/models/none: the directory "
                "or its weights (model.safetensors) are missing; name another one with "
                "--model"
            ),
        ),
        (
            ["--model", "."],
            {},
            3,
            snapshot(
                "there is no sentence-transformers model in TMP: the directory or its "
                "weights (model.safetensors) are missing; name another one with --model"
            ),
        ),
        (
            ["--model", "~no-such-user-here/m"],
            {},
            3,
            snapshot("there is no such home as in ~no-such-user-here/m; correct --model"),
        ),
        (
            ["--model", "a" * 300],
            {"HF_HUB_OFFLINE": "1"},
            3,
            snapshot(
                "the model LONG "
                "is not on this machine and HF_HUB_OFFLINE forbids asking the hub for it; "
                "give its directory with --model, or unset that variable"
            ),
        ),
        (
            ["--dim", "768"],
            {},
            3,
            snapshot(
                "all-MiniLM-L6-v2 makes vectors of 384 numbers, but 768 were asked for; "
                "correct --dim or the configured dimension, or choose another model"
            ),
        ),
        (
            [],
            {"AI_MEMORY_EMBED_DIM": "768"},
            3,
            snapshot(
                "all-MiniLM-L6-v2 makes vectors of 384 numbers, but 768 were asked for; "
                "correct --dim or the configured dimension, or choose another model"
            ),
        ),
        (
            ["--backend", "ollama", "--base-url", "http://127.0.0.1:9", "--model", "a-model"],
            {},
            3,
            snapshot(
                "the server at 127.0.0.1:PORT can't be reached (Connection refused); start "
                "it, or correct --base-url or the configured URL"
            ),
        ),
        (
            [],
            {
                "AI_MEMORY_EMBED_BACKEND": "vllm",
                "AI_MEMORY_EMBED_BASE_URL": "http://127.0.0.1:9/v1",
                "AI_MEMORY_EMBED_MODEL": "BAAI/some-model",
                "AI_MEMORY_EMBED_API_KEY": "sk-secret",
            },
            3,
            snapshot(
                "the server at 127.0.0.1:PORT can't be reached (Connection refused); start "
                "it, or correct --base-url or the configured URL"
            ),
        ),
        (
            ["--backend", "openai-compatible"],
            {},
            3,
            snapshot(
                "the backend openai-compatible has no URL of its own; give its server with "
                "--base-url, AI_MEMORY_EMBED_BASE_URL or base_url"
            ),
        ),
        (
            ["--base-url", "127.0.0.1:9"],
            {},
            3,
            snapshot(
                "the server's URL is not like https://host:port/path; correct --base-url "
                "or the configured base_url"
            ),
        ),
        (
            ["--base-url", "https://me:sk-secret@example.org/v1"],
            {},
            3,
            snapshot(
                "the server's URL holds a user, a password or a query, which would end up "
                "in logs; give the key by a variable or a file instead"
            ),
        ),
        (
            ["--backend", "openai"],
            {"AI_MEMORY_INFERENCE_EGRESS": "deny", "OPENAI_API_KEY": "sk-secret"},
            3,
            snapshot(
                "AI_MEMORY_INFERENCE_EGRESS is deny, so no text may be sent to "
                "api.openai.com; nothing was sent: use --backend local, or change the "
                "setting"
            ),
        ),
        (
            ["--backend", "openai", "--base-url", "http://192.0.2.1/v1"],
            {"OPENAI_API_KEY": "sk-secret"},
            3,
            snapshot(
                "the key would be sent to 192.0.2.1 over http, where others can read it; "
                "use https, unset the key, or say --insecure-key if the network is trusted"
            ),
        ),
        (
            ["--base-url", "http://127.0.0.1:9", "--backend", "local"],
            {},
            2,
            snapshot(
                "--base-url is a server's, and the backend local embeds on this machine; "
                "name the kind of server with --backend"
            ),
        ),
        (
            [],
            {"AI_MEMORY_EMBED_BACKEND": "abacus"},
            2,
            snapshot(
                "the backend 'abacus' is not one of local, ollama, openai, xai, gemini, "
                "openrouter, mistral, together, fireworks, qwen, dashscope, lmstudio, "
                "vllm, openai-compatible; correct it"
            ),
        ),
        (
            [],
            {"AI_MEMORY_EMBED_BACKFILL_BATCH": "many"},
            2,
            snapshot(
                "AI_MEMORY_EMBED_BACKFILL_BATCH, or backfill_batch in "
                "TMP/.config/ai-memory/config.toml, must be a whole number from 0 to "
                "10000, not 'many'"
            ),
        ),
    ],
)
def test_an_embedder_that_can_not_be_had_is_refused_and_the_store_left_as_it_is(
    arguments: Sequence[str],
    environment: dict[str, str],
    code: int,
    says: str,
    tmp_path: Path,
    reembed: Call,
    monkeypatch: pytest.MonkeyPatch,
    no_waits: None,
) -> None:
    path = make_store(tmp_path / "ai-memory.db", [memory("a")])
    before = tree(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # The library of the hub read these when it was imported.
    if "HF_ENDPOINT" in environment:
        use_hub(monkeypatch, environment["HF_ENDPOINT"])
    if "HF_HUB_OFFLINE" in environment:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    for done in both_ways(reembed, "--db", path, *arguments):
        assert re.sub("a{100,}", "LONG", wording(refusal(done, code), tmp_path)) == says
        assert "sk-secret" not in done.err
    assert tree(tmp_path) == before


def test_a_server_that_is_not_there_is_missed_by_a_run_and_not_by_a_dry_run(
    tmp_path: Path, reembed: Call, no_waits: None
) -> None:
    path = make_store(tmp_path / "ai-memory.db", [memory("a")])
    before = tree(tmp_path)

    # The length of this model's vectors is known, so its server need not be asked.
    dry, run = both_ways(
        reembed, "--db", path, "--backend", "ollama", "--base-url", "http://127.0.0.1:9"
    )

    assert (dry.code, "nomic-embed-text-v1.5 (768-dim, ollama)" in dry.out) == (0, True)
    assert wording(refusal(run, 3), tmp_path) == snapshot(
        "the server at 127.0.0.1:PORT can't be reached (Connection refused); start it, or "
        "correct --base-url or the configured URL"
    )
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            'tier = "keyword"\n',
            snapshot(
                "the ai-memory tier is keyword, which has no embedder, so there is nothing "
                "to re-embed with; choose another tier, or a model with --model"
            ),
        ),
        (
            'tier = "psychic"\n',
            snapshot(
                "the tier 'psychic' is not one of keyword, semantic, smart, autonomous; "
                "correct the setting"
            ),
        ),
        (
            "tier = \n",
            snapshot(
                "the configuration TMP/config/ai-memory/config.toml can't be read: it is "
                "no TOML, at line 1, column 8 (AI_MEMORY_NO_CONFIG=1 leaves it out); "
                "correct it"
            ),
        ),
        (
            "embeddings = 3\n",
            snapshot(
                "embeddings in TMP/config/ai-memory/config.toml must be a table: [embeddings]"
            ),
        ),
        (
            '[embeddings]\napi_key = "sk-secret"\n',
            snapshot(
                "TMP/config/ai-memory/config.toml holds an API key itself, where other "
                "programs can read it; put it into a variable (api_key_env) or a file of "
                "mode 0400 (api_key_file)"
            ),
        ),
    ],
)
def test_settings_that_can_not_be_used_are_refused_and_the_store_left_as_it_is(
    config: str, says: str, tmp_path: Path, reembed: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_store(tmp_path / "ai-memory.db", [memory("a")])
    file = tmp_path / "config" / "ai-memory" / "config.toml"
    file.parent.mkdir(parents=True)
    file.write_text(config)
    before = tree(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))

    for done in both_ways(reembed, "--db", path):
        assert wording(refusal(done, 2), tmp_path) == says
        assert "sk-secret" not in done.err
    assert tree(tmp_path) == before


@pytest.mark.system
def test_a_database_that_another_process_holds_exclusively_is_refused(
    tmp_path: Path, reembed: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_files, "BUSY_SECONDS", 0.5)
    path = unpack("v57", tmp_path / "ai-memory.db")
    before = tree(tmp_path)

    with holding(path, "BEGIN EXCLUSIVE"):
        for more in (["--dry-run"], []):
            done = reembed("--db", path, *more, real=True)
            assert done.code == 1
            assert wording(done.error, tmp_path) == snapshot(
                "TMP/ai-memory.db is locked by another process; wait for it to finish, or "
                "stop it, and run again"
            )
    assert tree(tmp_path) == before


@pytest.mark.system
def test_a_database_that_another_process_writes_to_is_planned_and_a_run_waits_for_it(
    original: tuple[str, Path], reembed: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_files, "BUSY_SECONDS", 0.7)
    _, path = original
    before = tree(path.parent)

    with holding(path, "BEGIN IMMEDIATE") as holder:
        dry = reembed("--db", path, "--dry-run", "--json", real=True)
        started = time.monotonic()
        run = reembed("--db", path, real=True)
        elapsed = time.monotonic() - started
        assert holder.stdin is not None
        holder.stdin.close()  # It ends in good order and takes its log with it.
        assert holder.wait(10) == 0

    assert (dry.code, dry.values["total_rows"]) == (0, ROWS)
    assert run.code == 1
    assert wording(run.error, path.parent) == snapshot(
        "TMP/ai-memory.db is locked by another process; wait for it to finish, or stop it, "
        "and run again"
    )
    assert elapsed >= 0.7
    assert tree(path.parent) == before


_CAPABILITIES_VERSION = 0x20080522
_OVERRIDE, _READ_SEARCH = 1 << 1, 1 << 2
_GET_SECUREBITS, _SET_SECUREBITS, _NO_SETUID_FIXUP = 27, 28, 1 << 2


@contextmanager
def bound_by_modes(probe: Path) -> Iterator[None]:
    """The modes of files count for a while, also where root runs the tests.

    `probe` is a path that the user has no write permission for. Without the two capabilities
    root is bound as anyone; the securebit has access(2) heed that, too (capabilities(7)).
    """
    if os.geteuid() != 0:
        assert not os.access(probe, os.W_OK)
        yield
        return
    if sys.platform != "linux":
        pytest.skip("file modes don't bind root")
    system = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_VERSION, 0)
    held, fewer = ((ctypes.c_uint32 * 6)() for _ in range(2))
    bits = system.prctl(_GET_SECUREBITS, 0, 0, 0, 0)
    assert system.capget(header, held) == 0
    ctypes.memmove(fewer, held, ctypes.sizeof(held))
    fewer[0] &= ~(_OVERRIDE | _READ_SEARCH)  # Of those that are effective.
    if system.prctl(_SET_SECUREBITS, bits | _NO_SETUID_FIXUP, 0, 0, 0) != 0:
        pytest.skip("file modes don't bind root, who may not give up capabilities here")
    try:
        assert system.capset(header, fewer) == 0
        assert not os.access(probe, os.W_OK)
        yield
    finally:
        assert system.capset(header, held) == 0
        assert system.prctl(_SET_SECUREBITS, bits, 0, 0, 0) == 0


@contextmanager
def mode(path: Path, bits: int) -> Iterator[None]:
    """A file or directory has this mode for a while."""
    usual = path.stat().st_mode
    path.chmod(bits)
    try:
        yield
    finally:
        path.chmod(usual)


def test_a_read_only_file_is_planned_and_refused_for_a_run_before_the_model_is_loaded(
    original: tuple[str, Path], reembed: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = original
    before = tree(path.parent)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # It can't be imported.

    with mode(path, 0o444), bound_by_modes(path):
        dry = reembed("--db", path, "--dry-run", "--json", real=True)
        after_the_dry_run = tree(path.parent)
        run = reembed("--db", path, real=True)

    assert (dry.code, dry.values["total_rows"]) == (0, ROWS)
    assert after_the_dry_run == before
    assert wording(refusal(run, 1), path.parent) == snapshot(
        "TMP/ai-memory.db can't be written; make the file and its directory writable and run again"
    )
    assert tree(path.parent) == before


def test_a_file_in_a_read_only_directory_is_planned_and_refused_for_a_run(
    original: tuple[str, Path], reembed: Call
) -> None:
    _, path = original
    before = tree(path.parent)

    with mode(path.parent, 0o555), bound_by_modes(path.parent):
        dry = reembed("--db", path, "--dry-run", "--json", real=True)
        run = reembed("--db", path, real=True)

    assert (dry.code, dry.values["total_rows"]) == (0, ROWS)
    assert wording(refusal(run, 1), path.parent) == snapshot(
        "TMP/ai-memory.db can't be written; make the file and its directory writable and run again"
    )
    assert tree(path.parent) == before


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, reembed: Call) -> None:
    path = unpack("v57", tmp_path / "ai-memory.db")
    before = tree(tmp_path)

    with mode(path, 0), bound_by_modes(path):
        results = both_ways(reembed, "--db", path)

    for done in results:
        assert wording(refusal(done, 1), tmp_path) == snapshot(
            "TMP/ai-memory.db can't be read (Permission denied); check its name, owner and mode"
        )
    assert tree(tmp_path) == before


def test_a_file_in_a_directory_that_may_not_be_entered_is_refused(
    tmp_path: Path, reembed: Call
) -> None:
    (tmp_path / "closed").mkdir()
    path = unpack("v57", tmp_path / "closed" / "ai-memory.db")
    before = tree(tmp_path)

    with mode(path.parent, 0), bound_by_modes(path.parent):
        done = reembed("--db", path, "--dry-run", real=True)

    assert wording(refusal(done, 1), tmp_path) == snapshot(
        "TMP/closed/ai-memory.db can't be read (Permission denied); check its name, owner and mode"
    )
    assert tree(tmp_path) == before


def test_settings_that_may_not_be_read_are_refused(
    tmp_path: Path, reembed: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_store(tmp_path / "ai-memory.db", [memory("a")])
    folder = tmp_path / "config" / "ai-memory"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text('tier = "keyword"\n')
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))

    with mode(folder, 0), bound_by_modes(folder):
        done = reembed("--db", path, "--dry-run", real=True)

    assert wording(refusal(done, 2), tmp_path) == snapshot(
        "the configuration TMP/config/ai-memory/config.toml can't be read: Permission "
        "denied (AI_MEMORY_NO_CONFIG=1 leaves it out); correct it"
    )


def test_a_dry_run_of_a_closed_wal_database_leaves_no_log_behind(
    tmp_path: Path, reembed: Call
) -> None:
    path = unpack("v80", tmp_path / "ai-memory.db")
    before = tree(tmp_path)

    done = reembed("--db", path, "--dry-run", "--json", real=True)

    assert (done.code, done.values["total_rows"]) == (0, ROWS)
    assert tree(tmp_path) == before
    assert list(before) == ["ai-memory.db"]


@pytest.mark.system
def test_a_dry_run_counts_the_rows_in_the_log_of_a_process_at_work_and_leaves_it_alone(
    tmp_path: Path, reembed: Call
) -> None:
    """By the name of the file and by a link to it, beside which there is no log."""
    (tmp_path / "real").mkdir()
    path = unpack("v80", tmp_path / "real" / "real.db")
    link = tmp_path / "ai-memory.db"
    link.symlink_to(path)
    with holding(path, *IN_THE_LOG):
        sizes = {file.name: file.stat().st_size for file in path.parent.iterdir()}

        for named in (path, link):
            done = reembed("--db", named, "--dry-run", "--json", real=True)

            assert (done.code, done.values["total_rows"]) == (0, ROWS + 3)
            assert {file.name: file.stat().st_size for file in path.parent.iterdir()} == sizes
        assert {file.name for file in tmp_path.iterdir()} == {"ai-memory.db", "real"}
    assert sorted(sizes) == ["real.db", "real.db-shm", "real.db-wal"]
    assert sizes["real.db-wal"] > 0


def leave_as_a_process_that_died(path: Path, *statements: str, left: Sequence[str]) -> Path:
    """The database and its side files as they are when statements have run and nothing since."""
    place = path.with_name("died")
    place.mkdir()
    copy = place / "ai-memory.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement).fetchall()
        for suffix in ("", *left):
            shutil.copyfile(f"{path}{suffix}", f"{copy}{suffix}")
    return copy


@pytest.mark.parametrize("left", [["-wal"], ["-wal", "-shm"]])
def test_a_dry_run_counts_the_rows_in_the_log_of_a_process_that_died_and_creates_nothing(
    left: Sequence[str], tmp_path: Path, reembed: Call
) -> None:
    path = unpack("v80", tmp_path / "original.db")
    copy = leave_as_a_process_that_died(path, *IN_THE_LOG, left=left)
    before = tree(copy.parent)

    with mode(copy.parent, 0o555), bound_by_modes(copy.parent):
        barred = reembed("--db", copy, "--dry-run", "--json", real=True)
    free = reembed("--db", copy, "--dry-run", "--json", real=True)

    for done in (barred, free):
        assert (done.code, done.values["total_rows"]) == (0, ROWS + 3)
    after = tree(copy.parent)
    for shared in (before, after):
        shared.pop("ai-memory.db-shm", None)  # An index of the log, which every reader may renew.
    assert after == before
    assert sorted(before) == ["ai-memory.db", "ai-memory.db-wal"]


def leave_hot_journal(path: Path) -> Path:
    """A database whose process died in the middle of a large transaction."""
    update = "UPDATE memories SET content = content || ' half-written'"
    statements = ("PRAGMA cache_size = 2", "BEGIN", update)
    copy = leave_as_a_process_that_died(path, *statements, left=["-journal"])
    assert Path(f"{copy}-journal").stat().st_size > 0
    assert copy.read_bytes() != path.read_bytes()  # Which its own process has rolled back.
    return copy


def test_a_dry_run_says_that_a_write_was_cut_off_and_leaves_its_journal_alone(
    tmp_path: Path, reembed: Call
) -> None:
    path = leave_hot_journal(unpack("v57", tmp_path / "ai-memory.db"))
    before = tree(tmp_path)

    done = reembed("--db", path, "--dry-run", real=True)

    assert wording(refusal(done, 1), tmp_path) == snapshot(
        "a write to TMP/died/ai-memory.db was cut off and its journal lies beside it; "
        "start ai-memory or run reembed without --dry-run, and the write is rolled back"
    )
    assert tree(tmp_path) == before


def test_a_run_after_a_write_that_was_cut_off_rolls_it_back_and_goes_on(
    tmp_path: Path, reembed: Call
) -> None:
    original = unpack("v57", tmp_path / "ai-memory.db")
    contents = select(original, "SELECT id, content FROM memories ORDER BY id")
    path = leave_hot_journal(original)

    done = reembed("--db", path, "--namespace", "_agents", "--json")

    assert done.code == 0, done.err
    assert done.values["reembedded"] == 2
    assert select(path, "SELECT id, content FROM memories ORDER BY id") == contents


def test_damage_that_only_the_replacement_meets_leaves_every_byte_as_it_was(
    tmp_path: Path, reembed: Call
) -> None:
    path = unpack("v57", tmp_path / "ai-memory.db")
    index = "SELECT rootpage FROM sqlite_schema WHERE name = 'idx_memories_embedding_dim'"
    ((page,),) = select(path, index)
    with path.open("r+b") as file:
        file.seek((int(page) - 1) * PAGE_BYTES)
        file.write(b"\xa5" * PAGE_BYTES)
    before = tree(tmp_path)

    dry = reembed("--db", path, "--dry-run", real=True)
    done = reembed("--db", path, real=True)

    assert dry.code == 0
    assert wording(refusal(done, 1), tmp_path) == snapshot(
        "TMP/ai-memory.db is damaged (PRAGMA integrity_check says how); restore or repair "
        "it before its vectors are replaced"
    )
    assert tree(tmp_path) == before


SmallDisk = Callable[..., tuple[Ran, Path]]
"""Version and KiB of room in; what was said, and the database's path."""


@pytest.fixture
def small_disk(tmp_path: Path, reembed: Call) -> Iterator[SmallDisk]:
    """Run on a disk of its own, on which a database lies that leaves so much room."""
    source, disk = tmp_path / "source.db", tmp_path / "disk"
    disk.mkdir()

    def run(version: str, free_kib: int, *, through_beam: bool = False) -> tuple[Ran, Path]:
        unpack(version, source)
        resize(disk, source.stat().st_size // 1024 + free_kib)
        path = Path(shutil.copy(source, disk / "ai-memory.db"))
        return reembed("--db", path, "--dim", "384", through_beam=through_beam), path

    with mounted(disk):
        yield run


def test_a_disk_without_room_for_the_run_directory_leaves_the_store_alone_on_it(
    small_disk: SmallDisk, tmp_path: Path
) -> None:
    done, path = small_disk("v57", 64)

    assert wording(refusal(done, 1), tmp_path) == snapshot(
        "the run directory TMP/disk/ai-memory.db.reembed/RUN can't be used (No space left "
        "on device); make room, and run again"
    )
    assert tree(path.parent) == {"ai-memory.db": (tmp_path / "source.db").read_bytes()}


@pytest.mark.parametrize("version", ["v57", "v80"])
def test_a_disk_without_room_for_the_vectors_is_refused_before_any_work(
    version: str, small_disk: SmallDisk, tmp_path: Path
) -> None:
    # More than the shards of 202 rows take, less than the backup and SQLite's log beside them.
    done, path = small_disk(version, 480)

    said = re.sub(r"[\d,]+ (bytes|MB)", "SIZE", wording(refusal(done, 1), tmp_path))
    assert said == snapshot(
        "about SIZE are needed for the new vectors, the backup and SQLite's log, and SIZE "
        "are free at TMP/disk/ai-memory.db.reembed/RUN; make room, or name another place "
        "for the run directory with --run-dir"
    )
    assert tree(path.parent) == {"ai-memory.db": (tmp_path / "source.db").read_bytes()}


@pytest.mark.parametrize("free_kib", [1300, 1740, 2200])
@pytest.mark.parametrize("version", ["v57", "v80"])
def test_a_disk_that_may_fill_up_in_the_replacement_leaves_all_old_or_all_new_and_a_way_on(
    free_kib: int, version: str, small_disk: SmallDisk, tmp_path: Path, reembed: Call
) -> None:
    # With the least room it is Beam's workers that find none.
    done, path = small_disk(version, free_kib, through_beam=free_kib == 1300)
    vectors = "SELECT id, embedding FROM memories ORDER BY id"
    old = select(tmp_path / "source.db", vectors)
    resize(path.parent, PLENTY)

    assert select(path, "PRAGMA integrity_check") == [("ok",)]
    changed = sum(one != other for one, other in zip(select(path, vectors), old, strict=True))
    if done.code == 0:
        assert changed == ROWS
        assert "unchanged" not in done.err
        return
    assert changed == 0
    # Which call finds no room first varies.
    sentence = refusal(done, done.code)
    assert ("is incomplete" in sentence) == (done.code == 6)
    assert "make room" in sentence
    # With room for it, what is staged is put in, and no text is embedded again.
    staged = any(path.parent.glob("*.reembed/*/shards/*.parquet"))
    again = reembed("--db", path, "--dim", "384", "--json")
    assert (again.code, again.values["reembedded"], again.values["remaining"]) == (0, ROWS, 0)
    assert (again.texts == set()) == staged
