"""What the user asked for on the command line."""

from __future__ import annotations

from dataclasses import dataclass

from transforms.errors import UsageError

RUNNERS = (
    "DirectRunner",
    "BundleBasedDirectRunner",
    "FlinkRunner",
    "FnApiRunner",
    "PortableRunner",
)
"""Runners whose workers can reach a file of this machine."""


@dataclass(frozen=True)
class Options:
    """The command line, refused on construction if unsound.

    None stands for a flag that was not given: the settings decide.
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
    beam_options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("db", "namespace", "model", "backend"):
            if getattr(self, name) == "":
                raise UsageError(f"--{name} is empty; give a value, or leave it out")
        for name in ("namespace", "model"):
            try:
                (getattr(self, name) or "").encode()
            except UnicodeEncodeError:
                value = getattr(self, name)
                raise UsageError(f"--{name} holds bytes that are no text: {value!r}") from None
        if not 0 <= self.batch <= 10_000:
            raise UsageError(f"--batch must be from 0 (use the settings) to 10000: {self.batch}")
        if self.dim is not None and self.dim < 1:
            raise UsageError(f"--dim must be a positive number of floats: {self.dim}")
        if self.runner not in RUNNERS:
            raise UsageError(
                f"--runner {self.runner} is not one of {', '.join(RUNNERS)}; runners whose workers "
                "can't reach the database file are not supported yet"
            )
