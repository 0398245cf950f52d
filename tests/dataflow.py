"""Dataflow on this machine, for the tests: Google's two services, and workers that do the jobs.

Jobs come over HTTP, as Google's client sends them, and are kept; what they stage lies in an
emulated Cloud Storage. A job is done as Dataflow does it: the pipeline is read from where it was
staged, and run in workers that have what the job says that they get.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from apache_beam.runners.runner import PipelineState
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from gcp_storage_emulator.server import create_server
from google.auth.credentials import AnonymousCredentials
from google.cloud.storage import Client

BUCKET = "bucket"

Workers = Callable[["Job"], AbstractContextManager[str]]
"""What starts the workers of a job and gives the address of their pool."""


@dataclass
class Job:
    """A job as it was sent, and what it staged."""

    sent: dict[str, Any]
    pipeline: beam_runner_api_pb2.Pipeline
    staged: dict[str, bytes]
    state: str = "JOB_STATE_RUNNING"
    counters: dict[str, int] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, Any]:
        """What it says of its workers."""
        found: dict[str, Any] = self.sent["environment"]
        return found


class Dataflow:
    """The service; `workers` do its jobs, which are only kept if there are none."""

    def __init__(self, storage: str, directory: Path) -> None:
        self.jobs: list[Job] = []
        self.workers: Workers | None = None
        self._storage = storage
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self._port = self._server.server_address[1]
        self._credentials = directory / "credentials.json"
        self._credentials.write_text(json.dumps(_service_account(self._port)))

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which Google's clients find Cloud Storage here, and who they are."""
        return {
            "STORAGE_EMULATOR_HOST": self._storage,
            "GOOGLE_APPLICATION_CREDENTIALS": str(self._credentials),
        }

    @property
    def options(self) -> list[str]:
        """Beam's options for it, without what its workers get."""
        return [
            "--project=project",
            "--region=region",
            f"--temp_location=gs://{BUCKET}/tmp",
            f"--dataflow_endpoint=http://localhost:{self._port}",
        ]

    @contextmanager
    def running(self) -> Iterator[Dataflow]:
        """Serve."""
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        """What lies in the bucket below a prefix."""
        client = Client(
            project="project",
            credentials=AnonymousCredentials(),  # type: ignore[no-untyped-call]
            client_options={"api_endpoint": self._storage},
        )
        return {
            blob.name.removeprefix(prefix): blob.download_as_bytes()
            for blob in client.list_blobs(BUCKET, prefix=prefix)
        }

    def take(self, sent: dict[str, Any]) -> dict[str, Any]:
        """Take a job and begin to work on it."""
        url: str = sent["environment"]["sdkPipelineOptions"]["options"]["pipelineUrl"]
        place = url.removeprefix(f"gs://{BUCKET}/").rpartition("/")[0]
        staged = self.objects(f"{place}/")
        job = Job(sent, beam_runner_api_pb2.Pipeline.FromString(staged["pipeline.pb"]), staged)
        self.jobs.append(job)
        threading.Thread(target=self._work, args=[job], daemon=True).start()
        begun = {"currentState": "JOB_STATE_RUNNING", "clientRequestId": sent["clientRequestId"]}
        return self.describe(len(self.jobs) - 1) | begun

    def describe(self, number: int) -> dict[str, Any]:
        """What is told of a job."""
        job = self.jobs[number]
        return {"id": f"job-{number}", "name": job.sent["name"], "currentState": job.state}

    def messages(self, number: int) -> list[dict[str, str]]:
        """What its page says of a job: why it failed."""
        if self.jobs[number].state != "JOB_STATE_FAILED":
            return []
        why = "no workers" if self.workers is None else "the workers failed"
        time = "2026-01-01T00:00:00Z"
        return [{"messageText": why, "messageImportance": "JOB_MESSAGE_ERROR", "time": time}]

    def _work(self, job: Job) -> None:
        state = "JOB_STATE_FAILED"
        try:
            if self.workers is not None:
                with self.workers(job) as address:
                    state = "JOB_STATE_DONE" if _run(job, address) else state
        finally:
            job.state = state


def _run(job: Job, address: str) -> bool:
    pipeline = beam_runner_api_pb2.Pipeline()
    pipeline.CopyFrom(job.pipeline)
    for environment in pipeline.components.environments.values():
        payload = beam_runner_api_pb2.ExternalPayload()
        payload.endpoint.url = address
        environment.urn = "beam:env:external:v1"
        environment.payload = payload.SerializeToString()
        del environment.dependencies[:]
    result = FnApiRunner().run_via_runner_api(pipeline, PipelineOptions())
    done: bool = result.wait_until_finish() == PipelineState.DONE
    found = result.metrics().query()["counters"]
    job.counters = {one.key.metric.name: one.committed for one in found}
    return done


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, service: Dataflow, *arguments: Any) -> None:
        self._service = service
        super().__init__(*arguments)

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["content-length"]))
        if self.path == "/token":
            self._answer({"access_token": "token", "token_type": "Bearer", "expires_in": 3600})
        else:
            self._answer(self._service.take(json.loads(content)))

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].split("/")
        if path[-1] == "messages":
            self._answer({"jobMessages": self._service.messages(int(path[-2][4:]))})
        else:
            self._answer(self._service.describe(int(path[-1][4:])))

    def log_message(self, format: str, *values: Any) -> None:
        """Say nothing."""

    def _answer(self, values: dict[str, Any]) -> None:
        content = json.dumps(values).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _service_account(port: int) -> dict[str, str]:
    """The credentials of somebody who gets tokens at this port."""
    private = rsa.generate_private_key(public_exponent=65_537, key_size=2_048)
    pem = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return {
        "type": "service_account",
        "project_id": "project",
        "private_key_id": "1",
        "private_key": pem.decode(),
        "client_email": "reembed@project.example",
        "client_id": "1",
        "token_uri": f"http://127.0.0.1:{port}/token",
    }


@contextmanager
def dataflow(directory: Path) -> Iterator[Dataflow]:
    """Both services, for which a file is left in a directory."""
    storage = create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    storage.start()
    try:
        port = storage._api._httpd.server_address[1]
        with Dataflow(f"http://127.0.0.1:{port}", directory).running() as service:
            yield service
    finally:
        storage.stop()


def install(package: bytes, directory: Path) -> Path:
    """Install an sdist alone in a fresh environment; return its Python.

    What it requires is that of this environment, where all but the project itself is seen.
    """
    sdist = directory / "workflow.tar.gz"
    sdist.write_bytes(package)
    subprocess.run([sys.executable, "-m", "venv", str(directory / "venv")], check=True)
    python = directory / "venv" / "bin" / "python"
    (site,) = (directory / "venv" / "lib").glob("python*/site-packages")
    (here,) = (path for path in map(Path, sys.path) if path.name == "site-packages")
    # A path that is named in such a file has no such files of its own: none of what is editable.
    (site / "here.pth").write_text(f"{here}\n")
    program = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([*program, "--no-deps", str(sdist)], env=kept, cwd=directory, check=True)
    return python
