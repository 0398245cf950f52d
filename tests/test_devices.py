"""A device is looked at before the model, and the model is not blamed for it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from inline_snapshot import snapshot

from reembed.transforms.embedders import devices
from reembed.transforms.embedders.devices import check_device, require_precision
from reembed.transforms.embedders.loading import load_model
from reembed.transforms.embedders.models import MINILM, find_model
from reembed.transforms.errors import EmbedderError, UsageError
from tests.conftest import Call, files, make_store, memory


def said(error: str | pytest.ExceptionInfo[BaseException]) -> str:
    """A sentence without the version of torch."""
    text = error if isinstance(error, str) else str(error.value)
    return re.sub(r"torch \S+ finds", "torch VERSION finds", text)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The devices of this machine, made up."""
    made_up = {"cpu": 1, "cuda": 0, "mps": 0, "xpu": 0}
    monkeypatch.setattr(devices, "_counts", lambda: made_up)
    return made_up


@pytest.mark.parametrize(
    "name", ["gpu", "nowhere", "meta", "hip", "cuda:", "cuda:x", "cuda:-1", "cuda 1", "cpu:00000"]
)
def test_what_is_no_device_is_a_wrong_usage(name: str, counts: dict[str, int]) -> None:
    with pytest.raises(UsageError) as refused:
        check_device(name)

    assert said(refused).replace(f"--device {name} ", "--device NAME ") == snapshot(
        "--device NAME is not one of cpu, cuda, mps, xpu, or one with a number such as "
        "cuda:1; torch VERSION finds cpu on this machine; use one of these"
    )


@pytest.mark.parametrize("name", ["cuda", "CUDA:0", "mps", "xpu:1", "cpu:1"])
def test_a_device_that_is_not_there_is_named_with_those_that_are(
    name: str, counts: dict[str, int]
) -> None:
    with pytest.raises(EmbedderError) as refused:
        check_device(name)

    assert said(refused).replace(name, "NAME") == snapshot(
        "the device NAME is not there: torch VERSION finds cpu on this machine; use one of these"
    )


def test_devices_are_counted(counts: dict[str, int]) -> None:
    counts |= {"cuda": 2, "mps": 1}

    assert [check_device(name) for name in ("cuda", " CUDA:01", "mps", "mps:0")] == [
        "cuda",
        "cuda:1",
        "mps",
        "mps:0",
    ]
    with pytest.raises(EmbedderError) as refused:
        check_device("cuda:2")
    assert said(refused) == snapshot(
        "the device cuda:2 is not there: torch VERSION finds cpu, cuda:0, cuda:1, mps on "
        "this machine; use one of these"
    )


def test_the_processor_is_known_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)

    assert check_device("cpu") == check_device("CPU:0") == "cpu"


@pytest.mark.parametrize(
    ("name", "code", "sentence"),
    [
        (
            "gpu",
            2,
            snapshot(
                "--device gpu is not one of cpu, cuda, mps, xpu, or one with a number such "
                "as cuda:1; torch VERSION finds cpu on this machine; use one of these"
            ),
        ),
        (
            "meta",
            2,
            snapshot(
                "--device meta is not one of cpu, cuda, mps, xpu, or one with a number "
                "such as cuda:1; torch VERSION finds cpu on this machine; use one of these"
            ),
        ),
        (
            "mps",
            3,
            snapshot(
                "the device mps is not there: torch VERSION finds cpu on this machine; use "
                "one of these"
            ),
        ),
        (
            "cpu:7",
            3,
            snapshot(
                "the device cpu:7 is not there: torch VERSION finds cpu on this machine; "
                "use one of these"
            ),
        ),
    ],
)
def test_a_plan_and_a_run_look_at_the_device_first(
    name: str, code: int, sentence: str, counts: dict[str, int], reembed: Call, tmp_path: Path
) -> None:
    path = make_store(tmp_path / "m.db", [memory("a")])
    before = files(tmp_path)

    for flags in (["--dry-run"], [], ["--model", "nobody/has-this", "--dry-run"]):
        ran = reembed("--db", path, "--backend", "local", "--device", name, *flags, real=True)
        assert (ran.code, said(ran.error)) == (code, sentence)

    assert files(tmp_path) == before


@pytest.mark.system  # It imports torch and transformers.
def test_a_precision_that_the_device_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def ones(*_: object, **settings: object) -> None:
        raise TypeError("BFloat16 is not supported on MPS\nand more")

    monkeypatch.setattr("torch.ones", ones)
    directory = find_model(MINILM)
    assert directory is not None

    for device in ("cpu", None):
        with pytest.raises(EmbedderError) as refused:
            load_model(directory, device=device, precision="bfloat16")
        assert str(refused.value) == snapshot(
            "the device cpu can't calculate with numbers of bfloat16 here (TypeError: "
            "BFloat16 is not supported on MPS); choose another --precision or --device"
        )


@pytest.mark.system
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_the_processor_has_each_precision(precision: str) -> None:
    require_precision("cpu", precision)
