"""What a person reads, as snapshots hold it: without what differs from call to call."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

_RUN_ID = re.compile(r"\b\d{8}T\d{6}Z-[0-9a-f]{4}\b")
_CHANGING = (
    (re.compile(r"\b\d+ ms\b"), "N ms"),
    (re.compile(r"\b[\d.]+ (s|min|h) \([\d,]+ rows/s\)"), "N s (N rows/s)"),
    (re.compile(r"\b[\d,]+ rows/s"), "N rows/s"),
    (re.compile(r"(127\.0\.0\.1|localhost):\d+(/[0-9a-f]{8}\b)?"), r"\1:PORT"),
    (re.compile(r"\bprocess \d+\b"), "process N"),
)


def line_with(words: str, said: str) -> str:
    """The one line of a text that holds these words."""
    [found] = [line for line in said.splitlines() if words in line]
    return found


def wording(said: str | BaseException | pytest.ExceptionInfo[BaseException], tmp_path: Path) -> str:
    """The words of a text or an error: paths below `tmp_path` begin with TMP, runs are RUN.

    What was measured, ports and process ids are letters.
    """
    text = str(said.value if isinstance(said, pytest.ExceptionInfo) else said)
    for name in dict.fromkeys((str(tmp_path.resolve()), str(tmp_path))):
        text = text.replace(name, "TMP")
    text = _RUN_ID.sub("RUN", text)
    for pattern, name in _CHANGING:
        text = pattern.sub(name, text)
    return text
