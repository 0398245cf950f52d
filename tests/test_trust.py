"""What is trusted of a run directory that others could have made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from inline_snapshot import snapshot

from reembed.transforms.errors import StagingError
from reembed.transforms.staging import trust
from reembed.transforms.staging.files import publish
from reembed.transforms.staging.trust import open_lock, read_file
from tests.wording import wording


def test_a_file_is_read_up_to_a_size(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"12345")
    path.chmod(0o600)

    assert read_file(path) == read_file(path, most=5) == b"12345"
    with pytest.raises(StagingError) as refused:
        read_file(path, most=4)
    assert wording(refused, tmp_path) == snapshot(
        (
            "TMP/f is larger than 4 bytes, which no file of its kind is; restore it from a copy, "
            "or move it away"
        )
    )
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "gone")


def test_a_lock_is_made_for_its_owner_only_and_opened_again(tmp_path: Path) -> None:
    former = os.umask(0)
    try:
        os.close(open_lock(tmp_path / "lock"))
    finally:
        os.umask(former)
    os.close(open_lock(tmp_path / "lock"))

    assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o600


def test_what_could_not_be_read_again_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust, "MAX_JSON_BYTES", 100)
    publish(tmp_path / "a.json", bytes(75))
    publish(tmp_path / "a.jsonl", bytes(200))

    with pytest.raises(StagingError) as refused:
        publish(tmp_path / "a.json", bytes(76))
    assert wording(refused, tmp_path) == snapshot(
        (
            "TMP/a.json would be larger than reembed reads again (76 bytes); do the work in "
            "parts, such as by --namespace"
        )
    )
    assert read_file(tmp_path / "a.json") == bytes(75)
    monkeypatch.setattr(trust, "MAX_JSON_BYTES", 74)
    with pytest.raises(StagingError) as refused:
        read_file(tmp_path / "a.json")
    assert wording(refused, tmp_path) == snapshot(
        (
            "TMP/a.json is larger than 74 bytes, which no file of its kind is; restore it from a "
            "copy, or move it away"
        )
    )
