"""Which rows a run is about. Light enough for the command line to import."""

from __future__ import annotations

from enum import StrEnum


class Mode(StrEnum):
    """Which rows a run is about."""

    ALL = "all"
    MISSING_ONLY = "missing only"
    SKIP_CURRENT_SPACE = "skip current space"
    STAMP_ONLY = "stamp only"
    RETRY_SKIPPED = "retry skipped"
