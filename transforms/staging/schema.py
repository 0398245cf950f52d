"""What a manifest may hold: the types and bounds of the file `manifest.json`.

A manifest may have been written by another version, or by somebody else. Fields that are not
known here are left out; one that is known and of another type is an error.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

SCHEMA_VERSION = 1
"""Version of the files in a run directory and of the JSON that is printed."""

_MOST = 2**53
"""Whole numbers up to here are the same for each reader of JSON."""

MAX_ORDER = 1_000_000_000
"""Runs on a database, beyond which a manifest is not to be believed."""

Count = Annotated[int, Meta(ge=0, le=_MOST)]
Setting = str | bool | list[str] | None
Share = Annotated[float, Meta(ge=0, le=1)]
Span = tuple[Count, Count]


class _Scope(Struct):
    mode: Literal["all", "missing only", "skip current space", "stamp only", "retry skipped"]
    store: dict[str, Setting]
    namespace: str | None = None
    keys: list[str] | None = None


class _Access(Struct):
    url: str
    key_variable: str | None = None
    key_file: str | None = None
    key_secret: str | None = None
    insecure_key: bool = False
    egress: str = "allow"
    most_in_flight: Annotated[int, Meta(ge=1, le=_MOST)] = 1
    give_up_after: Annotated[float, Meta(ge=0)] = 600.0
    timeout: Annotated[float, Meta(ge=0)] = 120.0
    most_tokens: Count | None = None
    asks_dimension: bool = False


class _Target(Struct):
    backend: str
    model: str
    dimension: Annotated[int, Meta(ge=1, le=1_000_000)]
    source: str = ""
    prompt: str = ""
    window: Count | None = None
    normalized: bool = False
    access: _Access | None = None
    device: str | None = None
    precision: Literal["float32", "float16", "bfloat16"] = "float32"


class _Rules(Struct):
    most_skipped: Share
    clear_skipped: bool
    one_transaction: bool


class _Outcome(Struct):
    reembedded: Count | None = None
    skipped: Count | None = None
    remaining: Count | None = None
    previous_dims: list[Count] = []


class _Manifest(Struct):
    schema_version: Literal[1]
    run_id: Annotated[str, Meta(max_length=100)]
    database: str
    started: str
    state: Literal[
        "staging",
        "replacing",
        "replaced",
        "wrote nothing",
        "rolling back",
        "partly rolled back",
        "rolled back",
    ]
    attempt: str
    rows: Count
    done: list[Span]
    writing: list[Span]
    scope: _Scope
    target: _Target
    probe: list[list[float]]
    ranges: list[tuple[str | None, str | None, Count]]
    outcome: dict[str, Any]
    stopped: str | None
    # Not noted by the first versions.
    stopped_code: int | None = None
    wrote: bool | None = None
    order: Annotated[int, Meta(ge=0, le=MAX_ORDER)] = 0
    marked: bool = False
    rules: _Rules | None = None
    saved: dict[str, Count] | None = None
    listed_late: bool = False


def decode(content: bytes) -> _Manifest:
    """Read a manifest; raise ValueError for one that is no JSON, or has other types or bounds."""
    try:
        found = msgspec.json.decode(content, type=_Manifest)
        msgspec.convert(found.outcome, _Outcome)
    except msgspec.MsgspecError as error:  # A ValueError in part of its kinds only.
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None
    return found


def decode_object(content: bytes) -> dict[str, Any]:
    """Read a JSON object; raise ValueError for anything else."""
    try:
        return msgspec.json.decode(content, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(str(error)) from None


def decode_line(content: bytes) -> dict[str, str]:
    """Read a line about a row, which has at least its id; raise ValueError for anything else."""
    try:
        found = msgspec.json.decode(content, type=dict[str, str])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(str(error)) from None
    if "id" not in found:
        raise ValueError("a line of it names no row")
    return found


def to_values(found: Struct) -> dict[str, Any]:
    """A part of a manifest as the values that JSON has."""
    values: dict[str, Any] = msgspec.to_builtins(found)
    return values
