"""What the program refuses, how it says so, and that a refusal leaves no trace."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from reembed.transforms.stores import sqlite as sqlite_files
from tests.conftest import Call, Program, change, files, make_store, memory, select, unpack

Done = subprocess.CompletedProcess[str]

PAGE_BYTES = 4096
ROWS = 202


def tree(directory: Path) -> dict[str, bytes | None]:
    """Every file below a directory with its contents, and every directory."""
    directories = [path for path in directory.rglob("*") if path.is_dir()]
    return {str(path.relative_to(directory)): None for path in directories} | files(directory)


def refusal(done: Done, code: int) -> str:
    """The one line with which the program refused; nothing went to stdout.

    With exit code 1, another one says that the store is as it was.
    """
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    errors = [line for line in lines if line.startswith("reembed: error: ")]
    if code == 1 and lines[-1] == "reembed: this command wrote nothing to the store":
        lines.pop()
    assert errors == lines[-1:], done.stderr
    assert "[while running" not in errors[0]
    return errors[0].removeprefix("reembed: error: ")


IMPORTS_LISTED = {"PYTHONPROFILEIMPORTTIME": "1"}
"""What has Python list on stderr all that it imports."""


def imported(done: Done) -> set[str]:
    """The modules that a program imported, with its imports listed."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines}


def both_ways(program: Program, *arguments: str | Path, **more: object) -> tuple[Done, Done]:
    """A dry run and a run, at the same time."""
    with ThreadPoolExecutor() as pool:
        dry = pool.submit(program, *arguments, "--dry-run", **more)
        run = pool.submit(program, *arguments, **more)
        return dry.result(), run.result()


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
    "missing": (lambda path: None, "there is no database at {path}"),
    "a directory": (lambda path: path.mkdir(), "{path} is not a file"),
    "a pipe": (lambda path: os.mkfifo(path), "{path} is not a file"),
    "empty": (lambda path: path.touch(), "{path} is empty"),
    "a text file": (a_text_file, "{path} is not a readable SQLite database"),
    "a header alone": (
        lambda path: path.write_bytes(b"SQLite format 3\x00"),
        "{path} is not a readable SQLite database",
    ),
    "another program's": (
        another_programs,
        "{path} is not an ai-memory database: it has no table 'memories' with id, namespace, title "
        "and content (its tables are books, readers)",
    ),
    "encrypted": (
        lambda path: path.write_bytes(random.Random(1).randbytes(8192)),
        "{path} is not a readable SQLite database: it is another kind of file, or encrypted "
        "(SQLCipher)",
    ),
    "truncated": (truncated, "{path} is damaged"),
    "damaged": (damaged, "{path} is damaged"),
    "a view": (a_view, "{path} is not an ai-memory database: it has no table 'memories'"),
    "in UTF-16": (in_utf_16, "{path} stores its texts as UTF-16le"),
    "without a vector column": (without_vectors, "no column 'embedding'"),
}


@pytest.mark.parametrize("kind", BAD_DATABASES)
def test_a_database_that_is_no_store_is_refused_in_one_line_and_left_as_it_is(
    kind: str, tmp_path: Path, program: Program
) -> None:
    make, says = BAD_DATABASES[kind]
    path = tmp_path / "some.db"
    make(path)
    before = tree(tmp_path)

    for done in both_ways(program, "--db", path):
        assert says.format(path=path) in refusal(done, 1)
    assert tree(tmp_path) == before


def test_a_database_by_a_name_that_is_too_long_is_refused(tmp_path: Path, program: Program) -> None:
    done = program("--db", tmp_path / ("a" * 300), "--dry-run")

    assert "File name too long" in refusal(done, 1)
    assert tree(tmp_path) == {}


def test_a_database_of_a_user_who_does_not_exist_is_refused(
    tmp_path: Path, program: Program
) -> None:
    done = program("--db", "~no-such-user-here/ai-memory.db", "--dry-run")

    assert "~no-such-user-here" in refusal(done, 2)
    assert tree(tmp_path) == {}


def test_a_database_whose_name_is_not_utf_8_is_refused(tmp_path: Path, program: Program) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.db")
    make_store(path, [memory("a")])
    before = tree(tmp_path)

    done = program("--db", path, "--dry-run")

    # A run could not note its path, so a plan would promise too much.
    assert "is not UTF-8" in refusal(done, 2)
    assert tree(tmp_path) == before


def test_a_database_whose_name_has_the_marks_of_a_uri_is_planned(
    tmp_path: Path, program: Program
) -> None:
    path = make_store(tmp_path / "50% off? #1 & more.db", [memory("a")])
    before = tree(tmp_path)

    done = program("--db", path, "--dry-run", "--json")

    assert done.returncode == 0
    assert json.loads(done.stdout)["database"] == str(path)
    assert tree(tmp_path) == before


def test_a_namespace_that_is_not_utf_8_is_refused(tmp_path: Path, program: Program) -> None:
    path = make_store(tmp_path / "ai-memory.db", [memory("a")])
    before = tree(tmp_path)

    done = program("--db", path, "--namespace", os.fsdecode(b"caf\xe9"), "--dry-run")

    assert "--namespace" in refusal(done, 2)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "says"),
    [
        (
            ["--model", "no-such-model"],
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            3,
            "the model no-such-model is not on this machine and the hub at "
            "http://127.0.0.1:9 can't be reached",
        ),
        (
            ["--model", "no-such-model"],
            {"HF_HUB_OFFLINE": "1"},
            3,
            "the model no-such-model is not on this machine and HF_HUB_OFFLINE forbids asking",
        ),
        (["--model", "./models/none"], {}, 3, "models/none: the directory or its weights"),
        (["--model", "."], {}, 3, "the directory or its weights (model.safetensors) are missing"),
        (["--model", "~no-such-user-here/m"], {}, 3, "~no-such-user-here/m"),
        (["--model", "a" * 300], {"HF_HUB_OFFLINE": "1"}, 3, "a" * 90),
        (
            ["--dim", "768"],
            {},
            3,
            "all-MiniLM-L6-v2 makes vectors of 384 numbers, but 768 were asked for",
        ),
        (
            [],
            {"AI_MEMORY_EMBED_DIM": "768"},
            3,
            "all-MiniLM-L6-v2 makes vectors of 384 numbers, but 768 were asked for",
        ),
        (
            ["--backend", "ollama", "--base-url", "http://127.0.0.1:9", "--model", "a-model"],
            {},
            3,
            "the server at 127.0.0.1:9 can't be reached (",
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
            "the server at 127.0.0.1:9 can't be reached (",
        ),
        (["--backend", "openai-compatible"], {}, 3, "openai-compatible has no URL of its own"),
        (["--base-url", "127.0.0.1:9"], {}, 3, "the server's URL is not like https://"),
        (
            ["--base-url", "https://me:sk-secret@example.org/v1"],
            {},
            3,
            "the server's URL holds a user, a password or a query",
        ),
        (
            ["--backend", "openai"],
            {"AI_MEMORY_INFERENCE_EGRESS": "deny", "OPENAI_API_KEY": "sk-secret"},
            3,
            "AI_MEMORY_INFERENCE_EGRESS is deny, so no text may be sent to api.openai.com",
        ),
        (
            ["--backend", "openai", "--base-url", "http://192.0.2.1/v1"],
            {"OPENAI_API_KEY": "sk-secret"},
            3,
            "the key would be sent to 192.0.2.1 over http, where others can read it",
        ),
        (
            ["--base-url", "http://127.0.0.1:9", "--backend", "local"],
            {},
            2,
            "--base-url is a server's, and the backend local embeds on this machine",
        ),
        ([], {"AI_MEMORY_EMBED_BACKEND": "abacus"}, 2, "the backend 'abacus' is not one of"),
        ([], {"AI_MEMORY_EMBED_BACKFILL_BATCH": "many"}, 2, "AI_MEMORY_EMBED_BACKFILL_BATCH"),
    ],
)
def test_an_embedder_that_can_not_be_had_is_refused_and_the_store_left_as_it_is(
    arguments: Sequence[str],
    environment: dict[str, str],
    code: int,
    says: str,
    tmp_path: Path,
    program: Program,
) -> None:
    path = make_store(tmp_path / "ai-memory.db", [memory("a")])
    before = tree(tmp_path)

    for done in both_ways(program, "--db", path, *arguments, environment=environment):
        assert says in refusal(done, code)
        assert "sk-secret" not in done.stderr
    assert tree(tmp_path) == before


def test_a_server_that_is_not_there_is_missed_by_a_run_and_not_by_a_dry_run(
    tmp_path: Path, program: Program
) -> None:
    path = make_store(tmp_path / "ai-memory.db", [memory("a")])
    before = tree(tmp_path)

    # The length of this model's vectors is known, so its server need not be asked.
    dry, run = both_ways(
        program, "--db", path, "--backend", "ollama", "--base-url", "http://127.0.0.1:9"
    )

    assert (dry.returncode, "nomic-embed-text-v1.5 (768-dim, ollama)" in dry.stdout) == (0, True)
    assert "the server at 127.0.0.1:9 can't be reached (" in refusal(run, 3)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ('tier = "keyword"\n', "the ai-memory tier is keyword"),
        ('tier = "psychic"\n', "the tier 'psychic' is not one of"),
        ("tier = \n", "can't be read"),
        ("embeddings = 3\n", "must be a table"),
        ('[embeddings]\napi_key = "sk-secret"\n', "holds an API key itself"),
    ],
)
def test_settings_that_can_not_be_used_are_refused_and_the_store_left_as_it_is(
    config: str, says: str, tmp_path: Path, program: Program
) -> None:
    path = make_store(tmp_path / "ai-memory.db", [memory("a")])
    file = tmp_path / "config" / "ai-memory" / "config.toml"
    file.parent.mkdir(parents=True)
    file.write_text(config)
    before = tree(tmp_path)

    here = {"XDG_CONFIG_HOME": str(tmp_path / "config")}
    for done in both_ways(program, "--db", path, environment=here):
        assert says in refusal(done, 2)
        assert "sk-secret" not in done.stderr
    assert tree(tmp_path) == before


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
            assert done.error.startswith(f"{path} is locked by another process")
    assert tree(tmp_path) == before


def test_a_database_that_another_process_writes_to_is_planned_and_a_run_waits_for_it(
    original: tuple[str, Path], reembed: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_files, "BUSY_SECONDS", 2.0)
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
    assert run.error.startswith(f"{path} is locked by another process")
    assert elapsed >= 2
    assert tree(path.parent) == before


def unprivileged(probe: Path) -> Sequence[str]:
    """What to run a program with so that file modes count, also for root.

    `probe` is a path that the current user has no write permission for.
    """
    wrapper: list[str] = []
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("file modes don't bind root, and setpriv (util-linux) is missing")
        caps = "-dac_override,-dac_read_search"
        wrapper = ["setpriv", "--bounding-set", caps, "--inh-caps", "-all"]
        if subprocess.run([*wrapper, "true"], check=False).returncode != 0:
            pytest.skip("file modes don't bind root, and setpriv may not drop its capabilities")
    assert subprocess.run([*wrapper, "test", "-w", str(probe)], check=False).returncode == 1
    return wrapper


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
    original: tuple[str, Path], program: Program
) -> None:
    _, path = original
    before = tree(path.parent)

    with mode(path, 0o444):
        wrapper = unprivileged(path)
        dry = program("--db", path, "--dry-run", "--json", wrapper=wrapper)
        after_the_dry_run = tree(path.parent)
        run = program("--db", path, wrapper=wrapper, environment=IMPORTS_LISTED)

    assert (dry.returncode, json.loads(dry.stdout)["total_rows"]) == (0, ROWS)
    assert after_the_dry_run == before
    assert refusal(run, 1).startswith(f"{path} can't be written; make the file")
    assert tree(path.parent) == before
    assert {"apache_beam", "sentence_transformers"} & imported(run) == {"apache_beam"}


def test_a_file_in_a_read_only_directory_is_planned_and_refused_for_a_run(
    original: tuple[str, Path], program: Program
) -> None:
    _, path = original
    before = tree(path.parent)

    with mode(path.parent, 0o555):
        wrapper = unprivileged(path.parent)
        dry = program("--db", path, "--dry-run", "--json", wrapper=wrapper)
        run = program("--db", path, wrapper=wrapper)

    assert (dry.returncode, json.loads(dry.stdout)["total_rows"]) == (0, ROWS)
    sentence = refusal(run, 1)
    assert str(path) in sentence
    assert "directory" in sentence
    assert tree(path.parent) == before


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, program: Program) -> None:
    path = unpack("v57", tmp_path / "ai-memory.db")
    before = tree(tmp_path)

    with mode(path, 0):
        results = both_ways(program, "--db", path, wrapper=unprivileged(path))

    for done in results:
        assert refusal(done, 1).startswith(f"{path} can't be read (Permission denied)")
    assert tree(tmp_path) == before


def test_a_file_in_a_directory_that_may_not_be_entered_is_refused(
    tmp_path: Path, program: Program
) -> None:
    (tmp_path / "closed").mkdir()
    path = unpack("v57", tmp_path / "closed" / "ai-memory.db")
    before = tree(tmp_path)

    with mode(path.parent, 0):
        done = program("--db", path, "--dry-run", wrapper=unprivileged(path.parent))

    assert "Permission denied" in refusal(done, 1)
    assert tree(tmp_path) == before


def test_settings_that_may_not_be_read_are_refused(tmp_path: Path, program: Program) -> None:
    path = make_store(tmp_path / "ai-memory.db", [memory("a")])
    folder = tmp_path / "config" / "ai-memory"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text('tier = "keyword"\n')
    here = {"XDG_CONFIG_HOME": str(tmp_path / "config")}

    with mode(folder, 0):
        wrapper = unprivileged(folder)
        done = program("--db", path, "--dry-run", environment=here, wrapper=wrapper)

    assert "Permission denied" in refusal(done, 2)


def test_a_dry_run_of_a_closed_wal_database_leaves_no_log_behind(
    tmp_path: Path, program: Program
) -> None:
    path = unpack("v80", tmp_path / "ai-memory.db")
    before = tree(tmp_path)

    done = program("--db", path, "--dry-run", "--json")

    assert (done.returncode, json.loads(done.stdout)["total_rows"]) == (0, ROWS)
    assert tree(tmp_path) == before
    assert list(before) == ["ai-memory.db"]


def test_a_dry_run_counts_the_rows_in_the_log_of_a_process_at_work_and_leaves_it_alone(
    tmp_path: Path, program: Program
) -> None:
    path = unpack("v80", tmp_path / "ai-memory.db")
    with holding(path, *IN_THE_LOG):
        sizes = {file.name: file.stat().st_size for file in tmp_path.iterdir()}

        done = program("--db", path, "--dry-run", "--json")

        assert (done.returncode, json.loads(done.stdout)["total_rows"]) == (0, ROWS + 3)
        assert {file.name: file.stat().st_size for file in tmp_path.iterdir()} == sizes
    assert sorted(sizes) == ["ai-memory.db", "ai-memory.db-shm", "ai-memory.db-wal"]
    assert sizes["ai-memory.db-wal"] > 0


def test_a_dry_run_by_a_link_counts_the_rows_in_the_log_of_the_real_file(
    tmp_path: Path, program: Program
) -> None:
    (tmp_path / "elsewhere").mkdir()
    path = unpack("v80", tmp_path / "elsewhere" / "real.db")
    link = tmp_path / "ai-memory.db"
    link.symlink_to(path)
    with holding(path, *IN_THE_LOG):
        done = program("--db", link, "--dry-run", "--json")

        assert (done.returncode, json.loads(done.stdout)["total_rows"]) == (0, ROWS + 3)
        assert {file.name for file in tmp_path.iterdir()} == {"ai-memory.db", "elsewhere"}


@pytest.mark.parametrize("left", [["-wal"], ["-wal", "-shm"]])
def test_a_dry_run_counts_the_rows_in_the_log_of_a_process_that_died_and_creates_nothing(
    left: Sequence[str], tmp_path: Path, program: Program
) -> None:
    path = unpack("v80", tmp_path / "original.db")
    (tmp_path / "copied").mkdir()
    copy = tmp_path / "copied" / "ai-memory.db"
    with holding(path, *IN_THE_LOG):
        for suffix in ["", *left]:
            shutil.copyfile(f"{path}{suffix}", f"{copy}{suffix}")
    before = tree(copy.parent)

    with mode(copy.parent, 0o555):
        wrapper = unprivileged(copy.parent)
        barred = program("--db", copy, "--dry-run", "--json", wrapper=wrapper)
    free = program("--db", copy, "--dry-run", "--json")

    for done in (barred, free):
        assert (done.returncode, json.loads(done.stdout)["total_rows"]) == (0, ROWS + 3)
    after = tree(copy.parent)
    for shared in (before, after):
        shared.pop("ai-memory.db-shm", None)  # An index of the log, which every reader may renew.
    assert after == before
    assert sorted(before) == ["ai-memory.db", "ai-memory.db-wal"]


def leave_hot_journal(path: Path) -> None:
    """Let a process die in the middle of a large transaction."""
    update = "UPDATE memories SET content = content || ' half-written'"
    with holding(path, "PRAGMA cache_size = 2", "BEGIN", update):
        pass
    assert Path(f"{path}-journal").stat().st_size > 0


def test_a_dry_run_says_that_a_write_was_cut_off_and_leaves_its_journal_alone(
    tmp_path: Path, program: Program
) -> None:
    path = unpack("v57", tmp_path / "ai-memory.db")
    leave_hot_journal(path)
    before = tree(tmp_path)

    done = program("--db", path, "--dry-run")

    assert "journal" in refusal(done, 1)
    assert tree(tmp_path) == before


def test_a_run_after_a_write_that_was_cut_off_rolls_it_back_and_goes_on(
    tmp_path: Path, program: Program
) -> None:
    path = unpack("v57", tmp_path / "ai-memory.db")
    contents = select(path, "SELECT id, content FROM memories ORDER BY id")
    leave_hot_journal(path)

    done = program("--db", path, "--namespace", "_agents", "--json")

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["reembedded"] == 2
    assert select(path, "SELECT id, content FROM memories ORDER BY id") == contents


def test_damage_that_only_the_replacement_meets_leaves_every_byte_as_it_was(
    tmp_path: Path, program: Program
) -> None:
    path = unpack("v57", tmp_path / "ai-memory.db")
    index = "SELECT rootpage FROM sqlite_schema WHERE name = 'idx_memories_embedding_dim'"
    ((page,),) = select(path, index)
    with path.open("r+b") as file:
        file.seek((int(page) - 1) * PAGE_BYTES)
        file.write(b"\xa5" * PAGE_BYTES)
    before = tree(tmp_path)

    dry = program("--db", path, "--dry-run")
    done = program("--db", path)

    assert dry.returncode == 0
    assert refusal(done, 1).startswith(f"{path} is damaged")
    assert tree(tmp_path) == before


SmallDisk = Callable[[str, int], tuple[Done, Path, Path]]
"""Version and KiB of room in; what was said, the database's path and what was left out."""

FULL_DISK = """
mount -t tmpfs -o size="$1" none "$2" && cp "$3" "$2/ai-memory.db" || exit 99
disk=$2 left=$4
shift 4
"$@"
code=$?
cp -a "$disk/." "$left"
exit $code
"""


@pytest.fixture
def small_disk(tmp_path: Path, fake_program: Program) -> SmallDisk:
    """Run on a disk of its own: a tmpfs, in a mount namespace that ends with the program."""

    def run(version: str, free_kib: int) -> tuple[Done, Path, Path]:
        source = unpack(version, tmp_path / "source.db")
        disk, left = tmp_path / "disk", tmp_path / "left"
        disk.mkdir()
        left.mkdir()
        size = f"{source.stat().st_size // 1024 + free_kib}k"
        wrapper = ["unshare", "--mount", "sh", "-c", FULL_DISK, "sh"]
        wrapper += [size, str(disk), str(source), str(left)]
        if shutil.which("unshare") is None:
            pytest.skip("unshare (util-linux) is missing, so there is no small disk to fill")
        if subprocess.run([*wrapper, "true"], check=False, capture_output=True).returncode != 0:
            pytest.skip("this user may not mount a tmpfs, so there is no small disk to fill")
        (left / "ai-memory.db").unlink()
        path = disk / "ai-memory.db"
        return fake_program("--db", path, "--dim", "384", wrapper=wrapper), path, left

    return run


def test_a_disk_without_room_for_the_run_directory_leaves_the_store_alone_on_it(
    small_disk: SmallDisk, tmp_path: Path
) -> None:
    done, path, left = small_disk("v57", 64)

    sentence = refusal(done, 1)
    assert sentence.startswith(f"the run directory {path}.reembed/")
    assert "No space left on device" in sentence
    assert tree(left) == {"ai-memory.db": (tmp_path / "source.db").read_bytes()}


@pytest.mark.parametrize("version", ["v57", "v80"])
def test_a_disk_without_room_for_the_vectors_is_refused_before_any_work(
    version: str, small_disk: SmallDisk, tmp_path: Path
) -> None:
    # More than the shards of 202 rows take, less than the backup and SQLite's log beside them.
    done, path, left = small_disk(version, 480)

    assert re.fullmatch(
        r"about [\d,]+ (bytes|MB) are needed for the new vectors, the backup and SQLite's log, and "
        rf"[\d,]+ bytes are free at {path}\.reembed/\S+; make room, or name another place for the "
        r"run directory with --run-dir",
        refusal(done, 1),
    )
    assert tree(left) == {"ai-memory.db": (tmp_path / "source.db").read_bytes()}


@pytest.mark.parametrize("free_kib", [1300, 1740, 2200])
@pytest.mark.parametrize("version", ["v57", "v80"])
def test_a_disk_that_may_fill_up_in_the_replacement_leaves_all_old_or_all_new_and_a_way_on(
    free_kib: int, version: str, small_disk: SmallDisk, fake_program: Program
) -> None:
    done, _, left = small_disk(version, free_kib)
    path = left / "ai-memory.db"
    vectors = "SELECT id, embedding FROM memories ORDER BY id"
    old = select(left.parent / "source.db", vectors)

    assert select(path, "PRAGMA integrity_check") == [("ok",)]
    changed = sum(one != other for one, other in zip(select(path, vectors), old, strict=True))
    if done.returncode == 0:
        assert changed == ROWS
        assert "unchanged" not in done.stderr
        return
    assert changed == 0
    sentence = refusal(done, done.returncode)
    assert ("is incomplete" in sentence) == (done.returncode == 6)
    assert "make room" in sentence
    # With room for it, what is staged is put in, and no text is embedded again.
    staged = any(left.glob("*.reembed/*/shards/*.parquet"))
    again = fake_program("--db", path, "--dim", "384", "--json")
    result = json.loads(again.stdout)
    assert (again.returncode, result["reembedded"], result["remaining"]) == (0, ROWS, 0)
    passed = json.loads((next(left.glob("*.reembed/*/pass-*.json"))).read_text())
    assert passed["embedded"] == (0 if staged else ROWS)
