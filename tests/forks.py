"""Children of a process that has imported the program: they start in a tenth of the time.

`python -m tests.forks SOCKET` is that process. Each connection names a module; a fork of it then
becomes what `python -m MODULE` is, with arguments, variables, a directory and streams of its own.
It ends when its stdin does.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

Done = subprocess.CompletedProcess[str]


class Fork:
    """A program at work."""

    def __init__(
        self, command: Sequence[str], connection: socket.socket, streams: Sequence[Path]
    ) -> None:
        self._command = command
        self._connection = connection
        self._answers = connection.makefile()
        self._streams = streams
        self._code: int | None = None
        self.pid = int(self._answers.readline())

    def is_at_work(self) -> bool:
        """Whether it has not ended yet."""
        return self._code is None and not select.select([self._connection], [], [], 0)[0]

    def wait(self, timeout: float) -> Done:
        """Wait for its end; what `subprocess.run` would give."""
        if self._code is None:
            self._connection.settimeout(timeout)
            try:
                self._code = int(self._answers.readline())
            except TimeoutError:
                self.kill()
                raise subprocess.TimeoutExpired(self._command, timeout) from None
        texts = [path.read_text(encoding="utf-8") for path in self._streams]
        return Done(self._command, self._code, *texts)

    def kill(self) -> None:
        """Kill it if it has not ended."""
        if self.is_at_work():
            os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Kill it if need be, and remove what it printed."""
        self.kill()
        self._answers.close()
        self._connection.close()
        for path in self._streams:
            path.unlink(missing_ok=True)


class Forks:
    """Starts programs as forks of one process, which starts with the first of them."""

    def __init__(self, directory: Path, environment: Mapping[str, str]) -> None:
        self._directory = directory
        self._environment = environment
        self._numbers = count()
        self._socket = directory / "socket"
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def _start(self) -> None:
        with self._lock:
            if self._process is not None:
                return
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.forks", str(self._socket)],
                env=self._environment,
                cwd=self._directory,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            assert self._process.stdout is not None
            assert self._process.stdout.readline() == "ready\n"

    def run(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str],
        directory: Path,
        timeout: float,
    ) -> Done:
        """Run a module as a program; what `subprocess.run` would give."""
        started = self.start(module, arguments, environment=environment, directory=directory)
        with closing(started):
            return started.wait(timeout)

    def start(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str],
        directory: Path,
    ) -> Fork:
        """Start a module as a program."""
        self._start()
        number = next(self._numbers)
        out, err = (self._directory / f"{number}.{name}" for name in ("out", "err"))
        request = {
            "module": module,
            "arguments": list(arguments),
            "environment": dict(environment),
            "directory": str(directory),
            "streams": [str(out), str(err)],
        }
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self._socket))
        connection.sendall(json.dumps(request).encode() + b"\n")
        return Fork([module, *arguments], connection, (out, err))

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.close()
            self._process.wait()
            self._process.stdout.close()


def _import_all() -> None:
    from reembed.pipeline.cli import _quieten

    _quieten()
    import pyarrow.dataset
    from apache_beam.runners import direct

    from reembed.pipeline import progress, report, run, surroundings, upkeep
    from reembed.transforms.embedders import http, local
    from reembed.transforms.embedders.loading import _without_sklearn
    from tests import fake_program

    with _without_sklearn():
        import sentence_transformers
    assert all((pyarrow.dataset, direct, progress, report, run, surroundings, upkeep))
    assert all((fake_program, http, local, sentence_transformers))


def _serve(place: str) -> dict[str, Any]:
    """Fork for each connection. It returns in the children alone, with what they shall do."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(place)
        listener.listen()
        print("ready", flush=True)
        usual = signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # Nobody waits for those forked.
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            if sys.stdin in ready:
                os._exit(0)
            connection, _ = listener.accept()
            with connection:
                if os.fork() == 0:
                    signal.signal(signal.SIGCHLD, usual)
                    return _fork_again(connection)


def _fork_again(connection: socket.socket) -> dict[str, Any]:
    """Tell the child's id, and its exit code when it has ended."""
    with connection.makefile() as lines:
        request: dict[str, Any] = json.loads(lines.readline())
    child = os.fork()
    if child == 0:
        return request
    connection.sendall(f"{child}\n".encode())
    _, status = os.waitpid(child, 0)
    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _become(
    module: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    directory: str,
    streams: Sequence[str],
) -> NoReturn:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = [module, *arguments]
    code: str | int | None = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    except BaseException:  # As Python ends a program that does not take its errors.
        traceback.print_exc()
        code = 1
    # What Python does at its end, but for taking down what was imported.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else code is not None)


if __name__ == "__main__":
    _import_all()
    # Collecting what is there for good, or ending it, would copy it in each child.
    gc.freeze()
    atexit._clear()
    _become(**_serve(sys.argv[1]))
