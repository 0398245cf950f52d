"""Values that nobody should give: each flag and setting, paths, files, the environment."""

from __future__ import annotations

import json
import os
import pwd
import re
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inline_snapshot import snapshot

from reembed.pipeline.options import CommandOptions, Options
from reembed.pipeline.words import json_line
from reembed.transforms.staging import lock_database
from tests.conftest import Call, Ran, files, make_store, memory
from tests.wording import wording

COMMANDS: tuple[list[str], ...] = ([], ["status"], ["verify"], ["rollback"], ["cleanup"])
DEEP = f"a = {'[' * 20_000}{']' * 20_000}"
DOTS = f"{'.'.join('a' * 20_000)} = 1"
DEEPER = f"{'.'.join('a' * 100)} = 1"
WIDE = f"table = 0x{'f' * 20_000}"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "store").mkdir()
    rows = [memory(f"{at}", embedding=b"\1" + bytes(12), embedding_dim=3) for at in range(3)]
    return make_store(tmp_path / "store" / "m.db", rows)


def refused(ran: Ran, code: int | None = None) -> str:
    """The one sentence that a refusal consists of."""
    assert ran.out == ""
    assert code is None or ran.code == code
    assert ran.code in (1, 2)
    assert "foreseen" not in ran.err
    assert len(ran.err) < 3_000
    return ran.error


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        (
            "loop",
            1,
            snapshot(
                "TMP/loop can't be read (a link leads back to itself); check its name, owner and "
                "mode"
            ),
        ),
        (
            "a" * 300,
            1,
            snapshot(
                "TMP/aaa... can't be read (File name too long); check its name, owner and mode"
            ),
        ),
        (
            "a" * 250,
            1,
            snapshot(
                "TMP/aaa... can't be read (File name too long); check its name, owner and mode"
            ),
        ),  # The names beside it are longer.
        (
            os.fsdecode(b"n\xff.db"),
            2,
            snapshot(
                "the path of the database, TMP/n\\udcff.db, is not UTF-8, as the files must be in "
                "which reembed notes it; rename the file or the directory"
            ),
        ),
        (
            os.fsdecode(b"d\xff/m.db"),
            2,
            snapshot(
                "the path of the database, TMP/d\\udcff/m.db, is not UTF-8, as the files must be "
                "in which reembed notes it; rename the file or the directory"
            ),
        ),
        (
            "to-odd.db",
            2,
            snapshot(
                "the path of the database, TMP/d\\udcff/m.db, is not UTF-8, as the files must be "
                "in which reembed notes it; rename the file or the directory"
            ),
        ),
        (
            "~nosuchuser/m.db",
            2,
            snapshot("there is no such home as in ~nosuchuser/m.db; correct the path"),
        ),
    ],
)
def test_a_path_that_can_be_no_databases_is_refused(
    command: list[str], name: str, code: int, said: str, path: Path, reembed: Call
) -> None:
    place = path.parent
    odd = place / os.fsdecode(b"d\xff")
    odd.mkdir()
    for copy in (odd / "m.db", place / os.fsdecode(b"n\xff.db"), place / ("a" * 250)):
        copy.write_bytes(path.read_bytes())
    (place / "loop").symlink_to("loop")
    (place / "to-odd.db").symlink_to(odd / "m.db")
    before = files(place)

    named = name if name.startswith("~") else place / name
    ran = reembed(*command, "--db", named)

    assert re.sub("a{9,}", "aaa...", wording(refused(ran, code), place)) == said
    assert files(place) == before


def test_control_characters_of_a_name_never_reach_a_terminal(path: Path, reembed: Call) -> None:
    odd = path.with_name("e\x1b[31m\r\n\x9b\u202e.db")
    path.rename(odd)

    flags = ["--db", odd, "--model", "m\x1b]0;x\x07", "--dim", "4"]
    for arguments in (
        ["--dry-run", *flags],
        flags,
        ["status", "--db", odd],
        ["verify", *flags[:2]],
    ):
        for how in ([], ["--json"]):
            ran = reembed(*arguments, *how)
            assert ran.code in (0, 1, 6)
            shown = ran.out + ran.err
            assert {sign for sign in shown if not sign.isprintable()} <= {"\n"}
            if how:
                assert ran.values["schema_version"] == 1
    assert str(odd) in {ran.values["database"] for ran in [reembed("status", *flags[:2], "--json")]}
    gone = reembed("status", "--db", f"{odd}x")
    assert gone.error.isprintable()


def test_json_for_a_terminal_is_still_json() -> None:
    values = {"a\x9b": ["\x1b", "日本 \u3000", "\U000e0001", "\u2028", 1.5]}

    assert json.loads(json_line(values)) == values
    assert json_line(values).isprintable()


def broken_config(kind: str, place: Path) -> None:
    """Put something in a file's place."""
    place.parent.mkdir(parents=True, exist_ok=True)
    contents: dict[str, Callable[[], Any]] = {
        "deep": lambda: place.write_text(DEEP),
        "many dots": lambda: place.write_text(DOTS),
        "some dots": lambda: place.write_text(DEEPER),
        "a huge number": lambda: place.write_text(WIDE),
        "long": lambda: place.write_text("#" * 1_000_001),
        "no UTF-8": lambda: place.write_bytes(b"a = '\xff'"),
        "a directory": place.mkdir,
        "a FIFO": lambda: os.mkfifo(place),
        "a device": lambda: place.symlink_to("/dev/zero"),
        "a link to nowhere": lambda: place.symlink_to("nowhere"),
        "a link to itself": lambda: place.symlink_to(place.name),
    }
    contents[kind]()


KINDS_OF_FILES: dict[str, tuple[str, str]] = {
    "deep": (
        snapshot("--config FILE can't be read as TOML (it is nested too deeply); correct it"),
        snapshot(
            "the configuration FILE can't be read: it is nested too deeply (AI_MEMORY_NO_CONFIG=1 "
            "leaves it out); correct it"
        ),
    ),
    "many dots": (
        snapshot("--config FILE can't be read as TOML (it is nested too deeply); correct it"),
        snapshot(
            "the configuration FILE can't be read: it is nested too deeply (AI_MEMORY_NO_CONFIG=1 "
            "leaves it out); correct it"
        ),
    ),
    "some dots": (
        snapshot("--config FILE can't be read as TOML (it is nested too deeply); correct it"),
        snapshot(
            "the configuration FILE can't be read: it is nested too deeply (AI_MEMORY_NO_CONFIG=1 "
            "leaves it out); correct it"
        ),
    ),
    "a huge number": (
        snapshot(
            "--config FILE can't be read as TOML (it holds a number of more than 64 bits); "
            "correct it"
        ),
        snapshot(
            "the configuration FILE can't be read: it holds a number of more than 64 bits "
            "(AI_MEMORY_NO_CONFIG=1 leaves it out); correct it"
        ),
    ),
    "long": (
        snapshot(
            "--config FILE can't be read as TOML (it is longer than 1,000,000 bytes); correct it"
        ),
        snapshot(
            "the configuration FILE can't be read: it is longer than 1,000,000 bytes "
            "(AI_MEMORY_NO_CONFIG=1 leaves it out); correct it"
        ),
    ),
    "no UTF-8": (
        snapshot("--config FILE can't be read as TOML (it is not UTF-8); correct it"),
        snapshot(
            "the configuration FILE can't be read: it is not UTF-8 (AI_MEMORY_NO_CONFIG=1 leaves "
            "it out); correct it"
        ),
    ),
    "a directory": (
        snapshot("--config FILE can't be read as TOML (Is a directory); correct it"),
        snapshot(
            "the configuration FILE can't be read: Is a directory (AI_MEMORY_NO_CONFIG=1 leaves "
            "it out); correct it"
        ),
    ),
    "a FIFO": (
        snapshot("--config FILE can't be read as TOML (it is not a regular file); correct it"),
        snapshot(
            "the configuration FILE can't be read: it is not a regular file "
            "(AI_MEMORY_NO_CONFIG=1 leaves it out); correct it"
        ),
    ),
    "a device": (
        snapshot("--config FILE can't be read as TOML (it is not a regular file); correct it"),
        snapshot(
            "the configuration FILE can't be read: it is not a regular file "
            "(AI_MEMORY_NO_CONFIG=1 leaves it out); correct it"
        ),
    ),
    "a link to nowhere": (
        snapshot("--config FILE can't be read as TOML (No such file or directory); correct it"),
        snapshot(
            "the configuration FILE can't be read: FILE is a link to nowhere, where nothing is "
            "(AI_MEMORY_NO_CONFIG=1 leaves it out); correct it"
        ),
    ),
    "a link to itself": (
        snapshot(
            "--config FILE can't be read as TOML (Too many levels of symbolic links); correct it"
        ),
        snapshot(
            "the configuration FILE can't be read: FILE is a link to config.toml, where nothing "
            "is (AI_MEMORY_NO_CONFIG=1 leaves it out); correct it"
        ),
    ),
}
"""What is told of each kind of FILE: of one that --config names, and of ai-memory's own."""


def told(ran: Ran, file: Path) -> str:
    """What is told of a file of settings."""
    return wording(refused(ran, 2).replace(str(file), "FILE"), file.parent)


@pytest.mark.parametrize("kind", KINDS_OF_FILES)
def test_a_file_of_settings_that_is_none_is_named_and_refused(
    kind: str, path: Path, tmp_path: Path, reembed: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.toml"
    broken_config(kind, own)
    ran = reembed("--db", path, "--dry-run", "--config", own)
    assert told(ran, own) == KINDS_OF_FILES[kind][0]

    place = tmp_path / "xdg" / "ai-memory" / "config.toml"
    broken_config(kind, place)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    for command in (["--dry-run"], ["status"], ["rollback"]):
        assert told(reembed(*command, "--db", path), place) == KINDS_OF_FILES[kind][1]
    monkeypatch.setenv("AI_MEMORY_NO_CONFIG", "1")
    assert reembed("--db", path, "--dry-run").code == 0


def test_a_directory_of_settings_that_leads_nowhere_is_not_taken_for_absent(
    path: Path, tmp_path: Path, reembed: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    (tmp_path / "xdg").mkdir()
    assert reembed("--db", path, "--dry-run").code == 0
    (tmp_path / "xdg" / "ai-memory").symlink_to("unmounted")

    assert wording(refused(reembed("--db", path), 2), tmp_path) == snapshot(
        "the configuration TMP/xdg/ai-memory/config.toml can't be read: TMP/xdg/ai-memory is a "
        "link to unmounted, where nothing is (AI_MEMORY_NO_CONFIG=1 leaves it out); correct it"
    )


def test_a_user_without_a_home_needs_none(
    path: Path, reembed: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(_: object) -> None:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.delenv("HOME")

    assert reembed("--db", path, "--dry-run").code == 0
    assert reembed("status", "--db", path).code == 0
    assert refused(reembed("status", "--db", "~/m.db"), 2) == snapshot(
        "there is no such home as in ~/m.db; correct the path"
    )
    found = {
        flag: refused(reembed("--db", path, "--dry-run", flag, "~/x"), 2)
        for flag in ("--run-dir", "--config", "--workdir")
    }
    assert found == snapshot(
        {
            "--run-dir": "there is no such home as in ~/x; correct the path",
            "--config": "there is no such home as in ~/x; correct the path",
            "--workdir": "there is no such home as in ~/x; correct the path",
        }
    )


def test_a_working_directory_that_is_gone_is_named(
    path: Path, tmp_path: Path, reembed: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    for command in COMMANDS:
        assert refused(reembed(*command, "--db", path), 2) == snapshot(
            "the working directory can't be told (No such file or directory), as if it was "
            "deleted; cd to one that is there, and run again"
        )
    monkeypatch.chdir(tmp_path)


def test_a_run_beside_another_one_says_who_is_at_work_before_it_judges_what_is_staged(
    path: Path, reembed: Call
) -> None:
    assert reembed("--db", path, "--model", "a", "--max-rows", "1").code == 0
    with lock_database(path):
        for more in ([], ["--fresh"]):
            ran = reembed("--db", path, "--model", "b", *more)
            said = wording(refused(ran, 1), path.parent)
            assert f"(process {os.getpid()}, " in ran.error
            assert re.sub(r"since [^)]*\)", "since TIME)", said) == snapshot(
                "another run is at work on TMP/m.db (process N, since TIME); wait for it to end"
            )


FLAGS = [field.name for field in fields(Options) if field.name != "beam_options"]
SWITCHES = [field.name for field in fields(Options) if field.type == "bool"]
ODD = (
    *("", " ", "0", "-0", "-1", "1", "nan", "inf", "-inf", "1e400", "5e-324", "1e308", "0x10"),
    *("9" * 30, "9" * 5_000, f"-{'9' * 30}", str(2**63), "1_0", "٣", "1h", "1e9h", "nanm", "%"),
    *("nan%", "inf%", "1e309%", "x" * 5_000, "a\x1b[31m\r\n\x9b", os.fsdecode(b"\xff"), "日本"),
    *("~", "~nosuchuser/x", "/", "/dev/null", "/dev/zero", "/proc/self/mem", ".", "..", "a/b"),
    *("file://", "gs://x", "s3://", "http://", "http://[", "https://h:99999", "://", "{", "--"),
    *("local", "ollama", "openai", "table", "llm", "float16", "cpu", "cuda", "keep", "clear"),
)
KEYS = (
    *("tier", "db", "embed_url", "ollama_url", "embedding_model", "embeddings.backend"),
    *("embeddings.base_url", "embeddings.url", "embeddings.model", "embeddings.dim"),
    *("embeddings.backfill_batch", "embeddings.api_key", "embeddings.api_key_file"),
    *("embeddings.api_key_env", "embeddings"),
)
VARIABLES = (
    *("AI_MEMORY_DB", "AI_MEMORY_EMBED_BACKEND", "AI_MEMORY_EMBED_BASE_URL"),
    *("AI_MEMORY_EMBED_MODEL", "AI_MEMORY_EMBED_DIM", "AI_MEMORY_EMBED_BACKFILL_BATCH"),
    *("AI_MEMORY_EMBED_API_KEY", "AI_MEMORY_INFERENCE_EGRESS", "AI_MEMORY_STORE_URL"),
    *("AI_MEMORY_STORE_URL_FILE", "AI_MEMORY_NO_CONFIG", "HOME", "XDG_CONFIG_HOME", "TMPDIR"),
    *("COLUMNS", "TERM", "LANG"),
)
TOML = st.one_of(
    st.sampled_from([*(one for one in ODD if one.isprintable()), "\0", "a\0b"]).map(json.dumps),
    st.sampled_from(
        *[["nan", "inf", "true", "[]", "{}", "[[1]]", "1979-05-27", "0", "-1", str(2**63 - 1)]]
    ),
)


def one_sentence(ran: Ran) -> None:
    """Whatever was asked for: a plan, or one sentence."""
    assert ran.code in range(7), ran.err
    errors = [line for line in ran.err.splitlines() if line.startswith("reembed: error: ")]
    assert len(errors) == (ran.code != 0), ran.err
    assert {sign for sign in ran.out + ran.err if not sign.isprintable()} <= {"\n"}
    assert len(ran.err) < 20_000


@given(st.data())
@settings(
    max_examples=800 if os.environ.get("HYPOTHESIS_PROFILE") == "wide" else 40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_flags_settings_and_variables_of_whatever_values_give_a_plan_or_one_sentence(
    path: Path,
    tmp_path: Path,
    reembed: Call,
    monkeypatch: pytest.MonkeyPatch,
    data: st.DataObject,
) -> None:
    odd = st.sampled_from(ODD)
    flags = data.draw(st.dictionaries(st.sampled_from(FLAGS), odd, max_size=3))
    variables = data.draw(st.dictionaries(st.sampled_from(VARIABLES), odd, max_size=2))
    config = data.draw(st.dictionaries(st.sampled_from(KEYS), TOML, max_size=2))
    command = data.draw(st.sampled_from(COMMANDS))
    own = {field.name for field in fields(CommandOptions)}
    named = [
        f"--{name.replace('_', '-')}" + ("" if name in SWITCHES else f"={value}")
        for name, value in flags.items()
        if not command or name in own
    ]
    file = tmp_path / ".config" / "ai-memory" / "config.toml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{name} = {value}\n" for name, value in config.items()))
    before = files(path.parent)
    with monkeypatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        start = command or ["--dry-run"]
        db = [] if data.draw(st.booleans()) and "db" not in flags else [f"--db={path}"]
        one_sentence(reembed(*start, *db, *named))
    assert files(path.parent) == before


NUMBERS = ("9" * 30, f"-{'9' * 30}", "9" * 5_000)
NO_NUMBERS: dict[str, tuple[str, str, str]] = {
    "--sleep-ms": (
        snapshot("--sleep-ms may be a day (86400000) at most: NUMBER"),
        snapshot("--sleep-ms must be 0 or more milliseconds: NUMBER"),
        snapshot("argument --sleep-ms: invalid int value: 'NUMBER; see reembed --help"),
    ),
    "--dim": (
        snapshot("--dim must be from 1 to 1000000: NUMBER"),
        snapshot("--dim must be from 1 to 1000000: NUMBER"),
        snapshot("argument --dim: invalid int value: 'NUMBER; see reembed --help"),
    ),
    "--max-rows": (
        snapshot("--max-rows must be a positive number of rows: NUMBER"),
        snapshot("--max-rows must be a positive number of rows: NUMBER"),
        snapshot("argument --max-rows: invalid int value: 'NUMBER; see reembed --help"),
    ),
    "--max-tokens": (
        snapshot("--max-tokens must be a positive number: NUMBER"),
        snapshot("--max-tokens must be a positive number: NUMBER"),
        snapshot("argument --max-tokens: invalid int value; see reembed --help"),
    ),
    "--batch": (
        snapshot("--batch must be from 0 (use the settings) to 10000: NUMBER"),
        snapshot("--batch must be from 0 (use the settings) to 10000: NUMBER"),
        snapshot("argument --batch: invalid int value: 'NUMBER; see reembed --help"),
    ),
}
"""What is told of each NUMBER for each flag."""


@pytest.mark.parametrize("flag", NO_NUMBERS)
@pytest.mark.parametrize("kind", range(len(NUMBERS)))
def test_a_number_that_is_no_machines_is_refused(
    flag: str, kind: int, path: Path, reembed: Call
) -> None:
    said = refused(reembed("--db", path, f"{flag}={NUMBERS[kind]}"), 2)
    assert re.sub(r"-?9{9,}", "NUMBER", said) == NO_NUMBERS[flag][kind]


def test_a_price_that_would_make_an_infinity_is_refused(path: Path, reembed: Call) -> None:
    said = refused(reembed("--db", path, "--price-per-million", "1e308"), 2)
    assert said == snapshot("--price-per-million may be 1,000,000 at most: 1e+308")


@pytest.mark.skipif(sys.platform != "linux", reason="a FIFO is made")
def test_the_file_of_a_url_is_read_like_any_other(
    path: Path, tmp_path: Path, reembed: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "url")
    monkeypatch.setenv("AI_MEMORY_STORE_URL_FILE", str(tmp_path / "url"))
    assert wording(refused(reembed("--db", path), 2), tmp_path) == snapshot(
        "AI_MEMORY_STORE_URL_FILE names a file that can't be read (it is not a regular file), so "
        "it can't be told where ai-memory's store is; correct it, or unset it for this command"
    )
