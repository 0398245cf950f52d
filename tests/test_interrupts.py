"""Signals at any time, and streams that fail under the libraries: real processes, so only a few."""

from __future__ import annotations

import atexit
import gc
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from inline_snapshot import snapshot

from reembed.pipeline import interrupts
from tests.conftest import ROOT, clean_environment, make_store, memory, select

LENGTHS = "SELECT length(embedding), count(*) FROM memories GROUP BY 1"
ROWS = 10

# Stops in the import of a module until a signal comes; with "swallow" as a library that loses it.
STOPPING = """
import builtins, os, sys, time
waiting, module, how = sys.argv[1:4]
del sys.argv[1:4]
real = builtins.__import__
def stop(name, *rest):
    if name == module:
        builtins.__import__ = real
        os.close(os.open(waiting, os.O_CREAT | os.O_WRONLY))
        try:
            time.sleep(30)
        except KeyboardInterrupt:
            if how != "swallow":
                raise
            time.sleep(30)
    return real(name, *rest)
builtins.__import__ = stop
from reembed.__main__ import entry
entry()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    rows = [memory(f"{at}", embedding=b"\1" + bytes(12), embedding_dim=3) for at in range(ROWS)]
    return make_store(tmp_path / "m.db", rows)


@contextmanager
def stopped_in(
    module: str, tmp_path: Path, *arguments: str, how: str = ""
) -> Iterator[subprocess.Popen[str]]:
    """The program, waiting in the import of a module."""
    waiting = tmp_path / "waiting"
    command = [sys.executable, "-c", STOPPING, str(waiting), module, how, *arguments]
    pipe = subprocess.PIPE
    environment = clean_environment(tmp_path) | {"REEMBED_DEMO_STORE": str(tmp_path / "demo.db")}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True
    ) as process:
        try:
            ends = time.monotonic() + 60
            while not waiting.exists():
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < ends
                time.sleep(0.01)
            yield process
        finally:
            process.kill()


@pytest.mark.system
@pytest.mark.parametrize(
    ("module", "number", "code"),
    [
        ("argparse", signal.SIGINT, 130),
        ("reembed.pipeline.plan", signal.SIGTERM, 143),
    ],
)
def test_a_signal_while_modules_are_imported_ends_the_program_with_one_line(
    module: str, number: signal.Signals, code: int, path: Path, tmp_path: Path
) -> None:
    with stopped_in(module, tmp_path, "--db", str(path), "--dry-run") as process:
        process.send_signal(number)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=30)

    assert (process.returncode, stdout) == (code, "")
    assert stderr == snapshot("reembed: interrupted; this command wrote nothing to the store\n")


@pytest.mark.system
def test_a_signal_that_a_library_swallows_ends_the_program_all_the_same(
    path: Path, tmp_path: Path
) -> None:
    # It is imported when handlers raise.
    with stopped_in(
        "reembed.transforms.stores.demo", tmp_path, "--dry-run", how="swallow"
    ) as process:
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        time.sleep(1.2)
        process.send_signal(signal.SIGTERM)  # An impatient user; without it, the watch ends it.
        stdout, stderr = process.communicate(timeout=30)

    assert (process.returncode, stdout) == (143, "")
    assert stderr == snapshot("reembed: interrupted; this command wrote nothing to the store\n")
    assert time.monotonic() - started < 4


class Ended(Exception):
    """The process would end, with an exit code."""


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", end)
    # Descriptor 2 takes nothing; pipes are written to by other means.
    monkeypatch.setattr(os, "write", lambda *_: 0)


@pytest.mark.usefixtures("ended")
def test_a_signal_after_the_result_leaves_the_exit_code_as_it_is() -> None:
    state = interrupts.Interrupts()
    state.unwind()
    state.finish(6)

    with pytest.raises(Ended) as end:
        state._interrupt(signal.SIGINT, None)
    assert end.value.args == (6,)


@pytest.mark.usefixtures("ended")
def test_a_signal_that_follows_at_once_is_the_same_and_a_later_one_ends_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    now = [5.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    state = interrupts.Interrupts()
    state.unwind()
    with pytest.raises(KeyboardInterrupt):
        state._interrupt(signal.SIGTERM, None)
    now[0] += 0.5
    state._interrupt(signal.SIGINT, None)
    now[0] += 2
    with pytest.raises(Ended) as end:
        state._interrupt(signal.SIGINT, None)
    assert end.value.args == (143,)


@pytest.mark.usefixtures("ended")
def test_a_signal_in_a_long_call_of_a_library_ends_the_program_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    reader, writer = os.pipe()
    with os.fdopen(reader), os.fdopen(writer, "wb", buffering=0) as pipe:
        pipe.write(bytes([signal.SIGCHLD, signal.SIGTERM]))
        with pytest.raises(Ended) as end:
            interrupts.Interrupts()._wait(reader)
    assert (end.value.args, waited) == ((143,), [interrupts._UNWIND_SECONDS])


# What libraries do with stderr, beside what reembed prints itself.
NOISY = """
import sys, warnings, logging, threading, traceback
from reembed.pipeline import cli
from tests import fake_program
fake_program.install()
real = cli._run
def noisy(*arguments):
    for _ in range(3):
        sys.stderr.write("x" * 100_000 + "\\n")
        print("a warning", file=sys.stderr, flush=True)
        logging.critical("a library's")
        warnings.warn_explicit("w", UserWarning, "f", 1)
        threading.Thread(target=lambda: 1 / 0).start()
    return real(*arguments)
cli._run = noisy
from reembed.__main__ import entry
entry()
"""


@pytest.mark.system
@pytest.mark.parametrize(
    ("redirection", "flags", "rows"),
    [
        ("2>&-", "--dry-run", [(13, ROWS)]),
        ("2>/dev/full", "", [(33, ROWS)]),
        ("2>&1 >out | true", "--dry-run", [(13, ROWS)]),
    ],
)
def test_stderr_that_fails_under_a_library_ends_nothing(
    redirection: str, flags: str, rows: list[tuple[int, int]], path: Path, tmp_path: Path
) -> None:
    call = f'"{sys.executable}" -c "$1" --db "$2" --json {flags}'
    shell = f'{call} >out {redirection}; echo "${{PIPESTATUS[0]}}"'
    done = subprocess.run(
        ["bash", "-c", shell, "-", NOISY, str(path)],
        cwd=tmp_path,
        env=clean_environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.stdout.split() == ["0"], done
    assert '"schema_version": 1' in (tmp_path / "out").read_text()
    assert select(path, LENGTHS) == rows


@pytest.mark.usefixtures("ended", "reembed")
def test_what_nothing_has_foreseen_is_one_sentence_without_its_words(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from reembed.pipeline import cli

    def fail(*_: object) -> int:
        raise ValueError("a secret")

    state = interrupts.Interrupts()
    monkeypatch.setattr(cli, "_run", fail)
    monkeypatch.setattr(sys, "argv", ["reembed", "--db", str(path)])
    monkeypatch.setattr(state, "watch", lambda: None)
    for module, name in ((gc, "disable"), (atexit, "_run_exitfuncs"), (cli, "open_streams")):
        monkeypatch.setattr(module, name, lambda: None)
    with pytest.raises(Ended) as end:
        cli.entry(state)

    assert end.value.args == (1,)
    said = re.sub(r"(test_interrupts\.py):\d+", r"\1:N", capsys.readouterr().err)
    assert said == snapshot(
        "reembed: error: reembed met an error that it does not know (ValueError at "
        "test_interrupts.py:N); reembed status says what the store holds, and REEMBED_TRACEBACK=1 "
        "shows more\n"
    )


@pytest.mark.usefixtures("ended")
@pytest.mark.parametrize("at", ["result", "unforeseen"])
def test_a_signal_as_the_exit_code_is_noted_ends_the_program_with_its_own_number(
    at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reembed.pipeline import cli

    monkeypatch.setattr(sys, "stderr", sys.stderr)
    state = interrupts.Interrupts()
    state.unwind()

    def signalled(*_: object) -> int:
        state._interrupt(signal.SIGTERM, None)
        return 0

    def fail(*_: object) -> int:
        raise ValueError

    if at == "result":
        monkeypatch.setattr(cli, "_dispatch", lambda *_: 0)
        monkeypatch.setattr(state, "finish", signalled)
    else:
        monkeypatch.setattr(cli, "_dispatch", fail)
        monkeypatch.setattr(cli, "tell", signalled)
        monkeypatch.setattr(cli, "open_streams", lambda: None)
        monkeypatch.setattr(state, "watch", lambda: None)
        monkeypatch.setattr(gc, "disable", lambda: None)
    with pytest.raises(Ended) as end:
        cli._main([], state) if at == "result" else cli.entry(state)
    assert end.value.args == (143,)
