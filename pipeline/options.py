"""What the user asked for on the command line."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from reembed.transforms.errors import UsageError
from reembed.transforms.hiding import shown
from reembed.transforms.modes import Mode

RUNNERS = (
    "DirectRunner",
    "BundleBasedDirectRunner",
    "DataflowRunner",
    "FlinkRunner",
    "FnApiRunner",
    "PortableRunner",
)
"""Runners that are known to work."""

LOCAL_RUNNERS = ("DirectRunner", "BundleBasedDirectRunner", "FnApiRunner")
"""Runners that do all the work in this process."""

STORE_FLAGS = (
    "store",
    "table",
    "vector",
    "text_table",
    "text_key",
    "dim_column",
    "space_column",
    "namespace_column",
    "where",
    "format",
    "space",
)
STORE_LISTS = ("key", "text")
"""What says which store is meant; the latter may be given several times."""

SKIPPED = ("keep", "clear")

PRECISIONS = ("float32", "float16", "bfloat16")

_SECRET = re.compile(r"projects/[^/\s]+/(locations/[^/\s]+/)?secrets/[\w-]+/versions/\w+")

_PASSWORD = re.compile(r"//[^/@]*:[^@]*@|://[^?]*\?")

MOST_SECONDS = 30 * 86_400

MAX_COUNT = 10**15
"""Of rows or tokens: more than there are, and still a number of 64 bits."""

MAX_PAUSE_MS = 86_400_000

MAX_PRICE = 1e6

MAX_DIMENSION = 1_000_000
"""The longest vector that may be asked for, far beyond that of any model."""


@dataclass(frozen=True)
class Options:
    """The command line of a run, refused on construction if unsound.

    None stands for a flag that was not given: the settings decide. `max_skipped` is a share,
    `give_up_after` and `timeout` are seconds.
    """

    db: str | None = None
    namespace: str | None = None
    dry_run: bool = False
    batch: int = 0
    json: bool = False
    model: str | None = None
    backend: str | None = None
    dim: int | None = None
    runner: str = "DirectRunner"
    run_dir: str | None = None
    workdir: str | None = None
    fresh: bool = False
    missing_only: bool = False
    skip_current_space: bool = False
    stamp_only: bool = False
    retry_skipped: bool = False
    max_rows: int | None = None
    partial: bool = False
    no_hidden: bool = False
    sleep_ms: int = 0
    max_skipped: float | None = None
    skipped: str | None = None
    one_transaction: bool = False
    base_url: str | None = None
    document_prefix: str | None = None
    in_flight: int | None = None
    give_up_after: float = 600.0
    timeout: float = 120.0
    max_tokens: int | None = None
    price_per_million: float | None = None
    key_secret: str | None = None
    insecure_key: bool = False
    device: str | None = None
    precision: str = "float32"
    store: str | None = None
    config: str | None = None
    table: str | None = None
    key: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    vector: str | None = None
    text_table: str | None = None
    text_key: str | None = None
    dim_column: str | None = None
    space_column: str | None = None
    namespace_column: str | None = None
    where: str | None = None
    format: str | None = None
    space: str | None = None
    beam_options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "db",
            "namespace",
            "model",
            "backend",
            "run_dir",
            "workdir",
            "base_url",
            "key_secret",
            "device",
            "config",
            *STORE_FLAGS,
        ):
            if getattr(self, name) == "":
                raise UsageError(f"{_flag(name)} is empty; give a value, or leave it out")
        for name in STORE_LISTS:
            if "" in getattr(self, name):
                raise UsageError(f"{_flag(name)} is empty; name a column, or leave it out")
        _check_texts(
            self,
            "namespace",
            "model",
            "base_url",
            "document_prefix",
            "run_dir",
            "workdir",
            "device",
            *STORE_FLAGS,
            *STORE_LISTS,
        )
        if not 0 <= self.batch <= 10_000:
            raise UsageError(f"--batch must be from 0 (use the settings) to 10000: {self.batch}")
        if self.dim is not None and not 1 <= self.dim <= MAX_DIMENSION:
            raise UsageError(f"--dim must be from 1 to {MAX_DIMENSION}: {self.dim}")
        if self.runner not in RUNNERS:
            raise UsageError(
                f"--runner {shown(self.runner)} is not one of {', '.join(RUNNERS)}; others were "
                "not tried"
            )
        if self.workdir and _PASSWORD.search(self.workdir):
            # Not quoted: it is the password.
            raise UsageError(
                "--workdir holds a password, or a query that may be one, which would end up in "
                "logs; give it to the file system's own settings instead"
            )
        if self.workdir and self.stamp_only:
            raise UsageError("--workdir does not go with --stamp-only, which runs on this machine")
        if self.precision not in PRECISIONS:
            raise UsageError(
                f"--precision {shown(self.precision)} is not one of {', '.join(PRECISIONS)}"
            )
        self._check_modes()
        self._check_server()

    def _check_modes(self) -> None:
        modes = ("missing_only", "skip_current_space", "stamp_only", "retry_skipped")
        given = [_flag(name) for name in modes if getattr(self, name)]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} exclude each other; give one of them")
        if self.max_rows is not None and not 1 <= self.max_rows <= MAX_COUNT:
            raise UsageError(f"--max-rows must be a positive number of rows: {self.max_rows}")
        if self.partial and self.max_rows is None:
            raise UsageError("--partial goes with --max-rows, which says how many rows to take")
        if self.stamp_only and self.max_rows is not None:
            raise UsageError("--max-rows does not go with --stamp-only, which embeds only a sample")
        if self.retry_skipped and self.max_rows is not None:
            raise UsageError("--max-rows does not go with --retry-skipped, which takes few rows")
        if self.fresh and self.retry_skipped:
            raise UsageError("--fresh and --retry-skipped exclude each other; give one of them")
        if self.sleep_ms < 0:
            raise UsageError(f"--sleep-ms must be 0 or more milliseconds: {self.sleep_ms}")
        if self.sleep_ms > MAX_PAUSE_MS:
            raise UsageError(f"--sleep-ms may be a day ({MAX_PAUSE_MS}) at most: {self.sleep_ms}")
        if self.max_skipped is not None and not 0 <= self.max_skipped <= 1:
            raise UsageError(
                f"--max-skipped must be a share from 0 to 1, or from 0% to 100%: {self.max_skipped}"
            )
        if self.skipped not in (None, *SKIPPED):
            raise UsageError(
                f"--skipped must be one of {', '.join(SKIPPED)}: {shown(repr(self.skipped))}"
            )

    def _check_server(self) -> None:
        if self.in_flight is not None and not 1 <= self.in_flight <= 32:
            raise UsageError(f"--in-flight must be from 1 to 32 requests: {self.in_flight}")
        for name in ("give_up_after", "timeout"):
            if not 0 < getattr(self, name) <= MOST_SECONDS:
                value = getattr(self, name)
                raise UsageError(f"{_flag(name)} must be a time of up to 30 days: {value}")
        if self.max_tokens is not None and not 1 <= self.max_tokens <= MAX_COUNT:
            raise UsageError(f"--max-tokens must be a positive number: {self.max_tokens}")
        _check_secret(self.key_secret)
        price = self.price_per_million
        if price is not None and not 0 <= price < math.inf:
            raise UsageError(f"--price-per-million must be 0 or more: {price}")
        if price is not None and price > MAX_PRICE:
            raise UsageError(f"--price-per-million may be {MAX_PRICE:,.0f} at most: {price}")

    @property
    def mode(self) -> Mode:
        """Which rows are meant."""
        return next(
            (mode for mode in Mode if getattr(self, mode.replace(" ", "_"), False)), Mode.ALL
        )


@dataclass(frozen=True)
class CommandOptions:
    """The command line of what looks after runs: status, verify, rollback or cleanup."""

    command: str
    db: str | None = None
    run_dir: str | None = None
    run: str | None = None
    yes: bool = False
    json: bool = False
    model: str | None = None
    backend: str | None = None
    base_url: str | None = None
    key_secret: str | None = None
    insecure_key: bool = False

    def __post_init__(self) -> None:
        for name in ("db", "run_dir", "run", "model", "backend", "base_url", "key_secret"):
            if getattr(self, name) == "":
                raise UsageError(f"{_flag(name)} is empty; give a value, or leave it out")
        _check_texts(self, "run_dir", "run", "model", "base_url")
        _check_secret(self.key_secret)


def _check_texts(options: Options | CommandOptions, *names: str) -> None:
    """Raise UsageError for what could not be noted: bytes that are not UTF-8."""
    for name in names:
        value = getattr(options, name)
        try:
            " ".join(value or ()).encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"{_flag(name)} holds bytes that are no text; give them as UTF-8"
            ) from None


def _check_secret(name: str | None) -> None:
    if name and not _SECRET.fullmatch(name):
        # Not quoted: it may be the key itself.
        raise UsageError(
            "--key-secret is no name of a secret; it is like "
            "projects/PROJECT/secrets/NAME/versions/latest"
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
