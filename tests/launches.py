"""Count the processes that tests start, and refuse them where a test is not marked `system`."""

from __future__ import annotations

import sys
from collections.abc import Generator
from typing import Any

import pytest

FIXTURES = {"program", "fake_program", "real_model"}
"""What runs the program in a process of its own, or takes long: such tests are `system`."""

_EVENTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"}


class Launches:
    """A plugin of pytest: counts per worker, which the controller adds up."""

    def __init__(self) -> None:
        self.count = 0
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EVENTS:
            self.count += 1

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Mark what runs the program as a process; have one worker load the real model."""
        for item in items:
            names = set(getattr(item, "fixturenames", ()))
            if FIXTURES & names:
                item.add_marker(pytest.mark.system)
            if "real_model" in names and item.config.pluginmanager.hasplugin("xdist"):
                item.add_marker(pytest.mark.xdist_group("real model"))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """Fail a test that starts a process and is not marked."""
        before = self.count
        result = yield
        if self.count > before and item.get_closest_marker("system") is None:
            pytest.fail("it starts a process: mark it with pytest.mark.system, or call in process")
        return result

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Hand the count to the controller, if there is one."""
        output = getattr(session.config, "workeroutput", None)
        if output is not None:
            output["launches"] = self.count

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Add what a worker has counted."""
        self.count += getattr(node, "workeroutput", {}).get("launches", 0)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the count."""
        terminalreporter.write_line(f"{self.count} processes started")
