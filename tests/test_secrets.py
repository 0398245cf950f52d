"""Keys in Google's Secret Manager: the real client, and a server on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud import secretmanager
from google.cloud.secretmanager_v1.services.secret_manager_service.transports import (
    SecretManagerServiceGrpcTransport,
)
from google.cloud.secretmanager_v1.types import (
    AccessSecretVersionRequest,
    AccessSecretVersionResponse,
)
from inline_snapshot import snapshot

from reembed.pipeline.options import Options
from reembed.transforms.embedders.endpoint import read_key
from reembed.transforms.embedders.secrets import fetch_secret
from reembed.transforms.embedders.target import Access
from reembed.transforms.errors import EmbedderError, UsageError
from tests.wording import wording

NAME = "projects/p/secrets/{}/versions/latest"
METHOD = "/google.cloud.secretmanager.v1.SecretManagerService/AccessSecretVersion"
SECRETS = {"key": b"sk-1\n", "binary": b"\xff\xfe"}


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lead the client to a server that knows some secrets."""

    def access(request: Any, context: grpc.ServicerContext) -> AccessSecretVersionResponse:
        name = request.name.split("/")[3]
        if name not in SECRETS:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such secret")
        answer = AccessSecretVersionResponse(name=request.name)
        answer.payload.data = SECRETS[name]
        return answer

    handler = grpc.unary_unary_rpc_method_handler(
        access,
        request_deserializer=AccessSecretVersionRequest.deserialize,
        response_serializer=AccessSecretVersionResponse.serialize,
    )

    class Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
            return handler if handler_call_details.method == METHOD else None

    server = grpc.server(ThreadPoolExecutor(2), handlers=[Handlers()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    transport = SecretManagerServiceGrpcTransport(
        channel=grpc.insecure_channel(f"127.0.0.1:{port}"),
        credentials=AnonymousCredentials(),  # type: ignore[no-untyped-call]
    )
    client = secretmanager.SecretManagerServiceClient
    monkeypatch.setattr(
        secretmanager, "SecretManagerServiceClient", lambda: client(transport=transport)
    )
    yield
    server.stop(None)


def test_a_key_is_fetched_by_the_name_of_its_secret(manager: None) -> None:
    assert read_key(Access("https://x", key_secret=NAME.format("key"))) == "sk-1"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (
            "none",
            snapshot(
                "the key can't be read from the secret that --key-secret names "
                "(there is no such secret or version); correct that flag, or let "
                "this machine's service account read the secret"
            ),
        ),
        (
            "binary",
            snapshot(
                "the key can't be read from the secret that --key-secret names (it "
                "is no text); correct that flag, or let this machine's service "
                "account read the secret"
            ),
        ),
    ],
)
def test_a_secret_that_can_not_be_had_is_told_in_one_sentence(
    name: str, why: str, manager: None, tmp_path: Path
) -> None:
    with pytest.raises(EmbedderError) as refused:
        fetch_secret(NAME.format(name))
    assert wording(refused, tmp_path) == why


def test_nobody_who_is_logged_in_is_told_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for variable, value in (("HOME", str(tmp_path)), ("NO_GCE_CHECK", "true")):
        monkeypatch.setenv(variable, value)

    with pytest.raises(EmbedderError) as refused:
        fetch_secret(NAME.format("key"))
    assert wording(refused, tmp_path) == snapshot(
        "the key can't be read from the secret that --key-secret names (nobody is logged in "
        "to Google here); correct that flag, or let this machine's service account read the "
        "secret"
    )


def test_what_may_be_the_key_itself_is_refused_and_not_quoted(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        Options(key_secret="sk-1")
    assert wording(refused, tmp_path) == snapshot(
        "--key-secret is no name of a secret; it is like "
        "projects/PROJECT/secrets/NAME/versions/latest"
    )

    assert "sk-1" not in str(refused.value)
