"""The table against the run that wrote it, and a sample of its rows against the model."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from reembed.pipeline.options import CommandOptions
from reembed.pipeline.results import Verified
from reembed.pipeline.resume import describe
from reembed.pipeline.selection import Chosen, Report, job_of, report_of
from reembed.pipeline.settings import LOCAL, Settings
from reembed.pipeline.words import counts, one_line, table
from reembed.transforms.embedders import (
    WITNESS_COSINE,
    Access,
    Target,
    cosines,
    embed_each,
    load_embedder,
    probe_embedder,
    same_vectors,
)
from reembed.transforms.embedders.models import absolute_source, find_model, is_place
from reembed.transforms.errors import (
    EmbedderError,
    IncompleteError,
    NoEmbedderError,
    ReembedError,
    UsageError,
    VerifyError,
)
from reembed.transforms.hiding import origin, shown
from reembed.transforms.modes import Mode
from reembed.transforms.rollback import describe_lost
from reembed.transforms.staging import Manifest, RunDirectory, State
from reembed.transforms.staging.runs import ROLLBACK
from reembed.transforms.stores import Store
from reembed.transforms.verify import WRONG, Findings, verify_rows

SAMPLED_ROWS = 64
"""Rows that are embedded again."""

_NAMED_ROWS = 20
"""Rows that are named on stderr; all are counted."""

_logger = logging.getLogger("reembed")

ServerSettings = Callable[[], Settings]
"""The settings as the flags of the command and the environment have them now."""


@dataclass(frozen=True)
class Compared:
    """Sampled rows whose texts were embedded again, and the lowest cosine with what is stored.

    `trouble` is why the sample is unchecked; None if it was checked.
    """

    rows: int = 0
    lowest: float | None = None
    trouble: ReembedError | None = None


def verify(
    path: Path, chosen: Chosen, options: CommandOptions, *, settings_of: ServerSettings
) -> Report:
    """Check the table against a run, and a sample of its rows against the model.

    The table needs no model; where there is none now, the sample is reported as unchecked.
    """
    run, manifest = chosen
    target = Target.from_json(manifest.target)
    _check_flags(options, target)
    job = job_of(path, run, manifest)
    rolled_back = manifest.state is State.PARTLY_BACK
    lost = run.lost_backup(manifest)
    findings = verify_rows(
        job.store,
        run,
        manifest.ranges,
        dimension=target.dimension,
        normalized=target.normalized,
        columns=job.describe(b"").others,
        rolled_back=rolled_back,
        held_back=run.read_json(ROLLBACK)["in_the_way"] if rolled_back else (),
        lost=lost | dict.fromkeys(run.unlisted(manifest) if manifest.saved is not None else (), 0),
        samples=SAMPLED_ROWS,
    )
    compared = _compare_sample(
        findings, job.store, target, manifest, options=options, settings_of=settings_of
    )
    for kind, keys in findings.keys.items():
        for key in keys[:_NAMED_ROWS]:
            _logger.warning("[%s] row %s holds %s", run.run_id, one_line(key), WRONG[kind])
    if compared.trouble is not None:
        _logger.warning(
            "[%s] the sample is not checked: %s", run.run_id, one_line(str(compared.trouble))
        )
    trouble = _trouble(path, chosen, findings, compared, lost)
    return report_of(
        _verified(run.run_id, findings, compared),
        f"reembed verify: {_head(findings, compared, trouble)}\n\n"
        + table(_lines(chosen, findings, compared)),
        trouble,
    )


def _check_flags(options: CommandOptions, target: Target) -> None:
    if options.model and target.access is not None:
        raise UsageError(
            f"--model is about a model on this machine, and {target} is behind a server; leave it "
            "out, or name the server with --base-url"
        )
    given = {
        "--backend": options.backend,
        "--base-url": options.base_url,
        "--key-secret": options.key_secret,
        "--insecure-key": options.insecure_key,
    }
    named = [flag for flag, value in given.items() if value]
    if named and target.access is None:
        raise UsageError(
            f"{' and '.join(named)} is about a server, and {target} runs on this machine; leave it "
            "out"
        )


def _compare_sample(
    findings: Findings,
    store: Store,
    target: Target,
    manifest: Manifest,
    *,
    options: CommandOptions,
    settings_of: ServerSettings,
) -> Compared:
    """Embed the sampled texts again; add to the findings the rows that hold other vectors."""
    sample = findings.sample
    if not sample:
        return Compared()
    try:
        embedder = load_embedder(_as_reached_now(target, options, settings_of))
        try:
            probe = probe_embedder(embedder, target.dimension)
        except EmbedderError as error:
            raise _OtherModelError(str(error)) from None
        if not same_vectors(np.array(manifest.probe, dtype=np.float32), probe, least=target.noise):
            raise _OtherModelError(
                f"{target} does not behave as it did when the run {manifest.run_id} began, so its "
                "rows can't be checked with it; bring the former model back"
            )
        try:
            made = embed_each(embedder, [row.text for row in sample], target.dimension)
        except EmbedderError as error:
            raise _OtherModelError(str(error)) from None
    except ReembedError as error:
        return Compared(trouble=error)
    stored = np.vstack([store.decode((row.stored and row.stored.vector) or b"") for row in sample])
    found = cosines(made, stored)
    for row, cosine in zip(sample, found, strict=True):
        if not cosine >= WITNESS_COSINE:
            findings.fault("other vector", row.key)
    return Compared(len(sample), float(found.min()))


class _OtherModelError(EmbedderError):
    """The model gives other vectors than when the run began."""


def _as_reached_now(target: Target, options: CommandOptions, settings_of: ServerSettings) -> Target:
    """The target where today's flags and settings say that its model, or its server, is.

    A manifest says what was. Where the flags are silent and the settings say something else than
    it does, EmbedderError names both, and nothing is sent or loaded. The device is this machine's
    own choice.
    """
    target = replace(target, device=None)
    if target.backend == LOCAL:
        source = absolute_source(options.model) if options.model else None
        source = source or _source_now(target, settings_of)
        return replace(target, source=source, access=None)
    if target.access is None:
        return replace(target, source="")
    access = _access_now(target, target.access, options, settings_of())
    return replace(target, source="", access=access)


def _access_now(
    target: Target, noted: Access, options: CommandOptions, settings: Settings
) -> Access:
    """Build the server access from today's settings; the manifest adds only `asks_dimension`."""
    now = Access(
        url=settings.base_url or "",
        key_variable=settings.key_variable,
        key_file=settings.key_file,
        key_secret=settings.key_secret,
        insecure_key=options.insecure_key,
        egress=settings.egress,
        asks_dimension=noted.asks_dimension,
    )
    kind = LOCAL if settings.local else settings.backend
    if options.base_url is None:
        was = f"the run embedded with the backend {shown(target.backend)} at {_named(noted.url)}"
        if kind != target.backend:
            raise EmbedderError(
                f"{was}, and the settings name the backend {kind}"
                + (f" at {_named(now.url)}" if now.url else "")
                + ", so nothing was sent; say where that server is with --base-url, and its kind "
                "with --backend if it takes that backend's key"
            )
        if _folded(now.url) != _folded(noted.url):
            named = _named(now.url) if now.url else "no server"
            raise EmbedderError(
                f"{was}, and the settings name {named}{_other_path(now.url, noted.url)}, so "
                "nothing was sent; say with --base-url which of them is asked"
            )
        if _place(now) != _place(noted) and options.key_secret is None:
            raise EmbedderError(
                f"the run sent {_key_named(noted)}, and the settings say {_key_named(now)}, so "
                "nothing was sent; say --base-url with the server's URL if the settings are right, "
                "or correct them"
            )
        if noted.insecure_key and not options.insecure_key:
            raise EmbedderError(
                f"the run sent a key over http to {_named(noted.url)} because of --insecure-key, "
                "so nothing was sent; say --insecure-key if that network is still trusted, or "
                "--base-url with another server"
            )
    elif options.backend is not None and kind != target.backend:
        raise EmbedderError(
            f"the run embedded with the backend {shown(target.backend)}, which --backend {kind} is "
            "not, so nothing was sent; leave it out, or correct it"
        )
    return now


def _source_now(target: Target, settings_of: ServerSettings) -> str:
    """Locate the run's local model by today's settings.

    It is where the settings say, or where its name leads to: in the hub's cache, or installed.
    """
    noted, named = target.source or target.model, None
    with suppress(UsageError, NoEmbedderError):
        settings = settings_of()
        named = settings.model if settings.local else f"{settings.model} at a server"
        if settings.local and absolute_source(settings.model) == noted:
            return noted
    if not is_place(target.model) and not os.path.lexists(target.model):
        found = find_model(target.model)
        if found is not None and found.is_absolute() and noted in (target.model, str(found)):
            return noted
    raise EmbedderError(
        f"the run loaded {shown(noted)}, and the settings name {shown(named or 'no model')}, so "
        "nothing was loaded; say with --model where the run's model is"
    )


def _place(access: Access) -> tuple[str | None, ...]:
    return access.key_variable, access.key_file, access.key_secret


def _key_named(access: Access) -> str:
    return f"the key in {access.key_source}" if access.key_source else "no key"


def _named(url: str) -> str:
    return origin(url) or "a URL that can't be shown"


def _folded(url: str) -> str:
    return url.strip().rstrip("/")


def _other_path(one: str, other: str) -> str:
    """Describe the difference between two URLs that look the same when shortened."""
    return " with another path" if origin(one) and origin(one) == origin(other) else ""


def _trouble(
    path: Path,
    chosen: Chosen,
    findings: Findings,
    compared: Compared,
    lost: Mapping[str, int | None],
) -> ReembedError | None:
    run, manifest = chosen
    wrong = sum(findings.wrong.values())
    written = max(findings.written, manifest.reembedded)
    if manifest.state.incomplete:
        return IncompleteError(f"{describe(run, manifest)}; finish it or roll back")
    if wrong:
        return VerifyError(
            f"{wrong} findings in {path}; run again{_choosing(manifest)} to re-embed the rows that "
            "are wrong"
        )
    if lost:
        return VerifyError(
            f"{describe_lost(lost)} of the backup in {run.backup} is missing or damaged, so its "
            "rows can't be checked, nor put back; put the file back from a copy of it"
        )
    if not written:
        return UsageError(f"the run {run.run_id} wrote nothing, so there is nothing to verify")
    if not findings.checked and not findings.put_back:
        return VerifyError(
            f"none of the {written:,} rows that the run {run.run_id} wrote in {path} can be "
            f"checked: {_why_none(run, manifest, findings)}"
        )
    return compared.trouble if isinstance(compared.trouble, _OtherModelError) else None


def _choosing(manifest: Manifest) -> str:
    """The flags that select the rows of a run again, where its own command no longer does."""
    mode = manifest.scope.mode
    changes = [f"without --{mode.replace(' ', '-')}"] if mode != Mode.ALL else []
    if manifest.scope.store.get("where"):
        changes.append("with a --where that is true of them")
    return f" {' and '.join(changes)}" if changes else ""


def _why_none(run: RunDirectory, manifest: Manifest, findings: Findings) -> str:
    if not findings.written:
        if unlisted := run.unlisted(manifest):
            return (
                f"its manifest lists none of the files in {run.backup} ({len(unlisted)}), so it "
                "can't be told whether these are all; restore the manifest from a copy (reembed "
                "rollback puts back what they hold)"
            )
        return "its backup, which says what it wrote, is gone"
    counted = {"deleted": findings.deleted, "given another text and vector": findings.changed}
    found = " and ".join(f"{count:,} were {what}" for what, count in counted.items() if count)
    return f"{found} since"


def _head(findings: Findings, compared: Compared, trouble: ReembedError | None) -> str:
    wrong = sum(findings.wrong.values())
    if wrong:
        return f"{wrong} findings"
    if isinstance(trouble, IncompleteError):
        return "the replacement is incomplete"
    if isinstance(trouble, VerifyError | UsageError):
        return "not all rows of the run can be checked"
    if compared.trouble is not None:
        return "all is as the run left it by its digests; no sample was embedded again"
    if findings.put_back:
        return "what is not rolled back is as the run left it"
    return "all is as the run left it"


def _lines(chosen: Chosen, findings: Findings, compared: Compared) -> dict[str, str]:
    run, manifest = chosen
    where = ", or outside its --where" if manifest.scope.store.get("where") else ""
    lines = {
        "run": run.run_id,
        "rows checked": f"{findings.checked:,}",
        "changed since": f"{findings.changed:,} (a new text and vector by another program)",
        "deleted since": f"{findings.deleted:,}",
        "rolled back": f"{findings.put_back:,} (as they were before the run)",
        "not of the run": f"{findings.unwritten:,} (skipped, or added since{where})",
        "lost": f"{findings.lost:,} (their files of the backup are missing or damaged)",
        "sample": f"{compared.rows} rows embedded again, lowest cosine "
        + ("-" if compared.lowest is None else f"{compared.lowest:.6f}"),
        "wrong": counts({WRONG[kind]: count for kind, count in findings.wrong.items()}),
    }
    if compared.trouble is not None:
        lines["sample"] = f"not checked: {one_line(str(compared.trouble))}"
    if not findings.put_back:
        del lines["rolled back"]
    if not findings.lost:
        del lines["lost"]
    return lines


def _verified(run_id: str, findings: Findings, compared: Compared) -> Verified:
    return Verified(
        run_id=run_id,
        checked=findings.checked,
        changed=findings.changed,
        deleted=findings.deleted,
        put_back=findings.put_back,
        findings=sum(findings.wrong.values()),
        unwritten=findings.unwritten,
        lost=findings.lost,
        sampled=compared.rows,
        lowest_cosine=compared.lowest,
        unchecked=None if compared.trouble is None else str(compared.trouble),
        wrong=dict(findings.wrong),
        wrong_ids=findings.keys,
    )
