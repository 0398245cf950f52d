"""Jobs for Dataflow: the real runner translates and sends them to a service on this machine."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pytest
from inline_snapshot import snapshot

from reembed.pipeline.runners import make_pipeline, parse_beam_options
from reembed.transforms.embedders import cosines
from reembed.transforms.embedders.fake import FakeEmbedder
from reembed.transforms.embedders.local import LocalEmbedder
from reembed.transforms.embedders.models import MINILM
from reembed.transforms.stores.codec import decode
from tests.conftest import (
    ROOT,
    Call,
    Program,
    Serve,
    change,
    clean_environment,
    make_store,
    memory,
    select,
    worker_pool,
)
from tests.dataflow import Dataflow, Job, dataflow, install
from tests.wording import wording

KEY = "sk-very-secret-0123456789"

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("dataflow")]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dataflow]:
    with dataflow(tmp_path_factory.mktemp("google")) as found:
        yield found


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What of the project an sdist is built from."""
    place = tmp_path_factory.mktemp("checkout")
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, place)
    for name in ("pipeline", "transforms", "reembed"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, place / name, symlinks=True, ignore=ignored)
    return place


@pytest.fixture(scope="module")
def worker(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a worker that has installed what `--setup_file` gives it."""
    place = tmp_path_factory.mktemp("worker")
    program = ["setup.py", "-q", "sdist", "--dist-dir", str(place)]
    subprocess.run([sys.executable, *program], cwd=checkout, check=True)
    (sdist,) = place.glob("*.tar.gz")
    return install(sdist.read_bytes(), place)


def launch(
    program: Program,
    service: Dataflow,
    store: Path,
    *flags: str,
    beam: Sequence[str],
    environment: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    return program(
        "--db",
        store,
        "--json",
        *flags,
        "--runner",
        "DataflowRunner",
        "--workdir",
        "gs://bucket/work",
        "--",
        *service.options,
        *beam,
        environment=service.environment | (environment or {}),
    )


def test_a_worker_needs_no_file_but_those_of_the_sdist(worker: Path, tmp_path: Path) -> None:
    program = """
import importlib, pkgutil, reembed
for module in pkgutil.walk_packages(reembed.__path__, "reembed."):
    if not module.name.endswith("__main__"):
        print(importlib.import_module(module.name).__file__)
"""
    ran = subprocess.run(
        [worker, "-c", program],
        cwd=tmp_path,
        env=clean_environment(tmp_path) | {"PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )

    found = {Path(line) for line in ran.stdout.splitlines()}
    assert all(path.is_relative_to(worker.parents[1]) for path in found)
    in_checkout = [
        path for name in ("pipeline", "transforms") for path in (ROOT / name).rglob("*.py")
    ]
    assert len(found) == len(in_checkout) - 1  # But for __main__.


@pytest.mark.timeout(300)  # An sdist is built, and workers start that load the real model.
def test_a_job_that_is_translated_and_done_gives_the_models_vectors(
    service: Dataflow,
    checkout: Path,
    worker: Path,
    program: Program,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the real model; the workers have the sdist, and neither the checkout nor the store."""
    memories = [memory(f"{at:03d}", f"a note about {at % 30}") for at in range(40)]
    memories[7] = memory("007", "x" * 70_000)
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    store = make_store(hidden / "m.db", memories)

    @contextmanager
    def workers(job: Job) -> Iterator[str]:
        variables = service.environment | {"PYTHONPATH": ""}
        with worker_pool(
            tmp_path, hidden=hidden, python=worker, directory=tmp_path, environment=variables
        ) as address:
            yield address

    service.workers = workers
    ran = launch(program, service, store, beam=[f"--setup_file={checkout / 'setup.py'}"])

    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["reembedded"] == 39
    # Tried and compiled it takes 5 s to load, and gives the same.
    monkeypatch.setattr(LocalEmbedder, "_find_shortcuts", lambda embedder: None)
    texts = [f"{one.title} {one.content}" for one in memories]
    expected = LocalEmbedder(MINILM, 384).embed(texts)
    found = select(store, "SELECT id, embedding FROM memories ORDER BY id")
    for (key, vector), other in zip(found, expected, strict=True):
        if key == "007":
            assert vector is None
        else:
            assert cosines(decode(cast(bytes, vector))[None], other[None])[0] > 0.999999, key
    job = service.jobs[-1]
    assert job.counters["embedded"] == 39
    assert job.counters["skipped"] == 1
    assert service.objects("work/") == {}


def test_a_job_says_what_its_workers_get_and_holds_no_key_and_no_text(
    service: Dataflow, checkout: Path, program: Program, serve: Serve, tmp_path: Path
) -> None:
    server = serve(dimension=8, key=KEY)
    store = make_store(tmp_path / "m.db", [memory("a", "a text of mine")])
    service.workers = None  # The job fails at once.

    ran = launch(
        program,
        service,
        store,
        *("--backend", "openai", "--base-url", server.url, "--model", "m"),
        beam=[
            f"--setup_file={checkout / 'setup.py'}",
            "--max_num_workers=7",
            "--autoscaling_algorithm=THROUGHPUT_BASED",
            "--machine_type=n1-standard-4",
            "--resource_hint=accelerator=type:nvidia-tesla-t4;count:1;install-nvidia-driver",
        ],
        environment={"OPENAI_API_KEY": KEY},
    )

    assert ran.returncode == 1
    # With the number of the job, and what the library says of it.
    assert "DataflowRunner failed: DataflowRuntimeException: no workers" in ran.stderr
    job = service.jobs[-1]
    (pool,) = job.environment["workerPools"]
    assert {package["name"] for package in pool["packages"]} >= {"workflow.tar.gz"}
    assert (pool["autoscalingSettings"]["maxNumWorkers"], pool["machineType"]) == (
        7,
        "n1-standard-4",
    )
    assert job.sent["name"].startswith("reembed-2")
    assert "nvidia-tesla-t4" in str(job.pipeline)
    with tarfile.open(fileobj=io.BytesIO(job.staged["workflow.tar.gz"])) as sdist:
        assert any(name.endswith("/transforms/embed.py") for name in sdist.getnames())
    labels = {one.unique_name for one in job.pipeline.components.transforms.values()}
    assert labels >= {"Ranges", "Spread", "Read", "Embed", "Replace", "Summarize", "Record"}
    for content in (json.dumps(job.sent).encode(), *job.staged.values()):
        assert KEY.encode() not in content
        assert b"a text of mine" not in content


def test_a_bucket_that_is_not_there_is_told_in_one_sentence(
    service: Dataflow, reembed: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = make_store(tmp_path / "m.db", [memory("a")])
    for name, value in service.environment.items():
        monkeypatch.setenv(name, value)

    ran = reembed("--db", store, "--model", "m", "--workdir", "gs://nobucket/work")

    assert ran.code == 1
    *_, loading, _, _ = ran.err.splitlines()
    assert loading.startswith("reembed: loading")
    assert wording(ran.error, tmp_path) == snapshot(
        "the work directory gs://nobucket/work/RUN can't be used (InvalidResponse: "
        "('Request failed with status code', 404, 'Expected one of', <HTTPStatus.OK: 200>, "
        "<HTTPStatus.CREATED: 201>)); name one with --workdir that this machine and all "
        "workers can write"
    )
    assert not list(tmp_path.glob("m.db.reembed/2*"))


def test_one_process_of_a_machine_loads_the_model_unless_another_number_is_wanted(
    service: Dataflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in service.environment.items():
        monkeypatch.setenv(name, value)

    def experiments(*flags: str, one_process: bool) -> list[str]:
        options = parse_beam_options("DataflowRunner", [*service.options, *flags])
        pipeline = make_pipeline("DataflowRunner", options, job="j", one_process=one_process)
        found: list[str] | None = pipeline._options.get_all_options()["experiments"]
        return found or []

    several = "use_multiple_sdk_containers"
    assert experiments(one_process=True) == [f"no_{several}"]
    assert experiments(one_process=False) == []
    assert experiments(f"--experiments={several}", one_process=True) == [several]


def test_an_edited_row_goes_to_dataflow_in_a_job_of_its_own(
    service: Dataflow, checkout: Path, fake_program: Program, tmp_path: Path
) -> None:
    store = make_store(tmp_path / "m.db", [memory(f"{at:03d}") for at in range(20)])
    before = len(service.jobs)

    @contextmanager
    def workers(job: Job) -> Iterator[str]:
        if len(service.jobs) == before + 1:
            change(store, "UPDATE memories SET content = 'edited' WHERE id = '007'")
        with worker_pool(tmp_path, environment=service.environment) as address:
            yield address

    service.workers = workers
    ran = launch(
        fake_program, service, store, "--model", "m", beam=["--sdk_container_image=registry/image"]
    )

    assert ran.returncode == 0, ran.stderr
    first, second = service.jobs[before:]
    assert (first.counters["embedded"], second.counters["embedded"]) == (20, 1)
    # Each job stages where its own options say, not below the place of the one before.
    places = [job.environment["tempStoragePrefix"].count("/") for job in (first, second)]
    assert places[0] == places[1]
    expected = FakeEmbedder(8).embed(["title 007 edited"])[0]
    (found,) = select(store, "SELECT embedding FROM memories WHERE id = '007'")
    assert decode(cast(bytes, found[0])).tolist() == expected.tolist()
