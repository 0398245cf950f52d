"""What turns texts into vectors: the fake, sentence-transformers, and how they are loaded."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from inline_snapshot import snapshot

import reembed.transforms.embedders
from reembed.transforms.embedders import (
    PROBE_TEXTS,
    Access,
    Embedder,
    Target,
    cosines,
    load_embedder,
    probe_embedder,
    same_vectors,
)
from reembed.transforms.embedders.fake import NOT_A_NUMBER, POISON, FakeEmbedder
from reembed.transforms.embedders.local import (
    LocalEmbedder,
    _own_tokenizer,
    find_budget,
    usable_cores,
)
from reembed.transforms.embedders.models import describe_model
from reembed.transforms.errors import EmbedderError, TextRejected
from reembed.transforms.rows import Vectors
from tests.conftest import clean_environment, real_embedder
from tests.test_models import MINILM, PACKAGE, serving, write_cache
from tests.wording import wording

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from tokenizers import Encoding

LONG = "one two three four five six seven eight nine ten " * 40
TEXTS = [
    "hello world",
    "Hello world",
    "the quick brown fox jumps over the lazy dog",
    "",
    " \n\t",
    "Grüße, 世界! Ça va? 👋🏽",
    "def f(x):\n    return x + 1\n",
    "hello world",
    LONG,
]


# The fake.


def test_the_fake_gives_each_text_a_unit_vector_of_its_own() -> None:
    texts = [f"text {at}" for at in range(50)]

    vectors = FakeEmbedder(8).embed(texts)

    assert (vectors.shape, vectors.dtype) == ((50, 8), np.dtype(np.float32))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert len(np.unique(vectors, axis=0)) == 50


@pytest.mark.system
def test_the_fake_gives_a_text_the_same_vector_in_any_batch_and_process() -> None:
    dimensions, texts = [1, 3, 384], ["a", "b", "", "ü", "a"]
    code = (
        "from reembed.transforms.embedders.fake import FakeEmbedder\n"
        f"for dimension in {dimensions}:\n"
        f"    print(FakeEmbedder(dimension).embed({texts[::-1]!a}).tobytes().hex())"
    )

    vectors = [FakeEmbedder(dimension).embed(texts) for dimension in dimensions]

    for some in vectors:
        for text, vector in zip(texts, some, strict=True):
            np.testing.assert_array_equal(FakeEmbedder(some.shape[1]).embed([text]), [vector])
    elsewhere = subprocess.run(
        [sys.executable, "-c", code],
        env=clean_environment(Path.cwd()) | {"PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert elsewhere.stdout.split() == [some[::-1].tobytes().hex() for some in vectors]


def test_the_fake_gives_no_texts_no_vectors() -> None:
    assert FakeEmbedder(8).embed([]).shape == (0, 8)


@pytest.mark.parametrize("texts", [[POISON], ["a", f"b {POISON} c"], [f"{POISON}ous", "a"]])
def test_the_fake_rejects_a_whole_batch_for_one_poisoned_text(texts: Sequence[str]) -> None:
    with pytest.raises(TextRejected) as error:
        FakeEmbedder(8).embed(texts)

    assert str(error.value) == snapshot("the text holds POISON")


def test_the_fake_puts_nan_into_the_vector_of_the_text_that_asks_for_it() -> None:
    vectors = FakeEmbedder(8).embed(["a", f"b {NOT_A_NUMBER}", "c"])

    assert np.argwhere(np.isnan(vectors)).tolist() == [[1, 0]]


# Loading.


class Stub(Embedder):
    """Gives what it is told to for any texts, and remembers them."""

    def __init__(self, answer: Vectors | Exception) -> None:
        self.answer = answer
        self.calls: list[list[str]] = []

    def embed(self, texts: Sequence[str]) -> Vectors:
        self.calls.append(list(texts))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


TARGET = Target("local", "a/model", 4)
SOUND: Vectors = np.array([[0.0, 1.0, 0.0, 0.0]], dtype=np.float32)

Build = Callable[[Callable[[Target], Embedder]], None]


@pytest.fixture(autouse=True)
def nothing_loaded() -> Iterator[None]:
    """Leave no stub behind for another test's target."""
    reembed.transforms.embedders._load.cache_clear()
    yield
    reembed.transforms.embedders._load.cache_clear()


@pytest.fixture
def built_by(monkeypatch: pytest.MonkeyPatch) -> Build:
    """Have embedders built by a function of the test's."""
    return lambda build: monkeypatch.setattr(reembed.transforms.embedders, "_build", build)


def test_an_embedder_is_probed_with_a_text_that_is_no_rows(built_by: Build) -> None:
    stub = Stub(SOUND)
    built_by(lambda _: stub)

    assert load_embedder(TARGET) is stub
    assert stub.calls == [[PROBE_TEXTS[0]]]


def filled(*values: float) -> Vectors:
    return np.array([values], dtype=np.float32)


@pytest.mark.parametrize(
    "answer",
    [
        filled(1, 0, 0),
        filled(1, 0, 0, 0, 0),
        np.ones((2, 4), dtype=np.float32),
        np.ones((0, 4), dtype=np.float32),
        np.ones(4, dtype=np.float32),
        np.ones((1, 1, 4), dtype=np.float32),
    ],
    ids=lambda answer: str(answer.shape),
)
def test_a_probe_of_another_shape_is_refused(answer: Vectors, built_by: Build) -> None:
    built_by(lambda _: Stub(answer))

    with pytest.raises(EmbedderError) as error:
        load_embedder(TARGET)
    assert str(error.value).replace(str(answer.shape), "SHAPE") == snapshot(
        "a/model gave a vector of shape SHAPE where 4 numbers were expected; the model's "
        "files don't say the truth about it"
    )
    assert error.value.exit_code == 3


@pytest.mark.parametrize(
    "answer",
    [
        filled(1, np.nan, 0, 0),
        filled(np.nan, np.nan, np.nan, np.nan),
        filled(1, 0, 0, np.inf),
        filled(-np.inf, 0, 0, 1),
        filled(0, 0, 0, 0),
    ],
    ids=lambda answer: str(answer.tolist()),
)
def test_a_probe_without_a_direction_is_refused(answer: Vectors, built_by: Build) -> None:
    built_by(lambda _: Stub(answer))

    with pytest.raises(EmbedderError) as error:
        load_embedder(TARGET)
    assert str(error.value) == snapshot(
        "a/model (4-dim, local) gives vectors that are not finite, or all zeros"
    )


def test_a_model_that_rejects_the_probe_is_refused(built_by: Build) -> None:
    built_by(lambda _: Stub(TextRejected("the model failed with IndexError")))

    with pytest.raises(EmbedderError) as error:
        load_embedder(TARGET)
    assert str(error.value) == snapshot(
        "a/model (4-dim, local) can't embed even a short probe text: the model failed with "
        "IndexError"
    )


def test_an_embedder_that_can_not_go_on_is_told_as_it_says(built_by: Build) -> None:
    built_by(lambda _: Stub(EmbedderError("the server is gone")))

    with pytest.raises(EmbedderError, match=r"^the server is gone$"):
        load_embedder(TARGET)


def test_many_threads_load_one_embedder(built_by: Build) -> None:
    built: list[Target] = []
    start = threading.Barrier(8)

    def build(target: Target) -> Embedder:
        built.append(target)
        time.sleep(0.1)
        return Stub(SOUND)

    def load(_: int) -> Embedder:
        start.wait(10)
        return load_embedder(Target("local", "a/model", 4))

    built_by(build)
    with ThreadPoolExecutor(8) as threads:
        embedders = list(threads.map(load, range(8)))

    assert built == [TARGET]
    assert [embedder is embedders[0] for embedder in embedders] == [True] * 8


def test_a_load_that_failed_is_tried_again(built_by: Build) -> None:
    answers: list[Vectors] = [filled(0, 0, 0, 0), SOUND]
    built_by(lambda _: Stub(answers.pop(0)))

    with pytest.raises(EmbedderError):
        load_embedder(TARGET)

    assert load_embedder(TARGET).embed(["a"]) is SOUND
    assert answers == []


def test_another_target_is_another_embedder(built_by: Build) -> None:
    built_by(lambda target: FakeEmbedder(target.dimension))

    four, five = load_embedder(Target("fake", "m", 4)), load_embedder(Target("fake", "m", 5))

    assert (four.embed(["a"]).shape, five.embed(["a"]).shape) == ((1, 4), (1, 5))


def test_the_fake_is_loaded_by_its_backends_name() -> None:
    embedder = load_embedder(Target("fake", MINILM, 16))

    np.testing.assert_array_equal(embedder.embed(["a"]), FakeEmbedder(16).embed(["a"]))


@pytest.mark.parametrize("backend", ["ollama", "", "LOCAL"])
def test_an_unknown_backend_is_refused_and_nothing_else_loaded(backend: str) -> None:
    with pytest.raises(EmbedderError) as error:
        load_embedder(Target(backend, MINILM, 384))

    assert str(error.value).replace(repr(backend), "NAME") == snapshot(
        "there is no embedder for the backend NAME"
    )


def test_a_model_behind_a_server_is_not_looked_for_without_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("reembed.transforms.embedders.http.backoff", lambda attempt: 0.01)
    target = Target("openai", MINILM, 384, access=Access("http://127.0.0.1:9", give_up_after=0.1))

    with pytest.raises(EmbedderError) as refused:
        load_embedder(target)
    assert str(refused.value) == snapshot(
        "the server at 127.0.0.1:9 can't be reached (Connection refused); start it, or "
        "correct --base-url or the configured URL"
    )


def test_an_embedder_that_can_not_go_on_is_built_anew(
    built_by: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    built_by(lambda _: Stub(SOUND))
    first = load_embedder(TARGET)

    assert load_embedder(TARGET) is first
    monkeypatch.setattr(Stub, "usable", property(lambda stub: stub is not first))
    assert load_embedder(TARGET) is not first


def test_a_target_is_a_value_that_workers_get() -> None:
    copy = pickle.loads(pickle.dumps(TARGET))

    assert (copy, hash(copy), str(copy)) == (TARGET, hash(TARGET), "a/model (4-dim, local)")


# What a target is, and whether it is still the same.

NOTED = Target("local", "a/model", 4, "/models/a", "doc: ", 256, normalized=True)


def test_a_target_that_was_noted_as_json_is_not_another_one() -> None:
    for target in (NOTED, replace(NOTED, access=Access("http://server/v1", "A_KEY"))):
        noted = json.loads(json.dumps(target.to_json()))

        assert target.differences(noted) == []
        assert Target.from_json(noted) == target


def test_a_target_that_another_version_noted_is_read_as_far_as_it_is_known() -> None:
    noted = {**NOTED.to_json(), "colour": "red", "access": {"url": "http://server", "colour": 1}}

    assert Target.from_json(noted) == replace(NOTED, access=Access("http://server"))
    assert Target.from_json({"backend": "local", "model": "m", "dimension": 2}) == Target(
        "local", "m", 2
    )


@pytest.mark.parametrize("changes", [{"source": "/elsewhere/a"}, {"access": Access("http://b")}])
def test_a_model_that_was_moved_is_not_another_one(changes: dict[str, Any]) -> None:
    assert replace(NOTED, **changes).differences(NOTED.to_json()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "b/model"}, snapshot(["its name was 'a/model' and is 'b/model' now"])),
        ({"backend": "fake"}, snapshot(["its backend was 'local' and is 'fake' now"])),
        ({"dimension": 5}, snapshot(["its dimension was 4 and is 5 now"])),
        ({"prompt": ""}, snapshot(["its prompt was 'doc: ' and is '' now"])),
        ({"window": 128}, snapshot(["its maximum length was 256 and is 128 now"])),
        ({"window": None}, snapshot(["its maximum length was 256 and is None now"])),
        ({"precision": "float16"}, snapshot(["its precision was 'float32' and is 'float16' now"])),
        ({"normalized": False}, snapshot(["its normalisation was True and is False now"])),
        (
            {"dimension": 5, "prompt": "text: "},
            snapshot(
                ["its dimension was 4 and is 5 now", "its prompt was 'doc: ' and is 'text: ' now"]
            ),
        ),
    ],
    ids=str,
)
def test_every_other_change_of_a_target_is_named(
    changes: dict[str, Any], said: Sequence[str]
) -> None:
    assert replace(NOTED, **changes).differences(NOTED.to_json()) == said


def test_every_part_of_a_target_but_its_place_is_compared() -> None:
    told = NOTED.differences({"precision": None})

    assert len(told) == len(fields(Target)) - len(["source", "access", "device"])


def test_what_was_noted_before_there_was_a_choice_of_precision_is_float32() -> None:
    noted = {name: value for name, value in NOTED.to_json().items() if name != "precision"}

    assert NOTED.differences(noted) == []
    assert replace(NOTED, precision="bfloat16").differences(noted) == snapshot(
        ["its precision was 'float32' and is 'bfloat16' now"]
    )


def test_the_probe_texts_are_embedded_one_by_one() -> None:
    calls: list[list[str]] = []

    class Noting(FakeEmbedder):
        def embed(self, texts: Sequence[str]) -> Vectors:
            calls.append(list(texts))
            return super().embed(texts)

    vectors = probe_embedder(Noting(4), 4)

    *alone, together = calls
    assert alone == [[text] for text in PROBE_TEXTS]
    assert together[:2] == [PROBE_TEXTS[1], PROBE_TEXTS[0]]
    np.testing.assert_array_equal(vectors, FakeEmbedder(4).embed(PROBE_TEXTS))


def test_a_probe_text_that_a_model_will_not_take_counts_as_zeros() -> None:
    class Short(FakeEmbedder):
        def embed(self, texts: Sequence[str]) -> Vectors:
            if len(texts[0]) > 99:
                raise TextRejected("too long")
            return super().embed(texts)

    probe = probe_embedder(Short(4), 4)

    assert probe.any(axis=1).tolist() == [True, True, False]
    assert same_vectors(probe, probe)
    assert not same_vectors(probe, probe_embedder(FakeEmbedder(4), 4))


numbers = st.floats(-100, 100, width=32).filter(lambda number: number == 0 or abs(number) > 1e-3)
some_vectors = st.tuples(st.integers(1, 5), st.integers(1, 6)).flatmap(
    lambda shape: arrays(np.float32, shape, elements=numbers)
)


@given(some_vectors, st.data())
def test_cosines_are_those_of_the_pairs(one: Vectors, data: st.DataObject) -> None:
    other = data.draw(arrays(np.float32, one.shape, elements=numbers))

    expected = []
    for a, b in zip(one.tolist(), other.tolist(), strict=True):
        product = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        expected.append(dot / product if product else 0.0)
    np.testing.assert_allclose(cosines(one, other), expected, rtol=0, atol=1e-9)


@given(some_vectors)
def test_vectors_are_the_same_as_themselves_up_to_noise(vectors: Vectors) -> None:
    vectors[:, 0] += np.float32(1000)  # None of zeros, which has no direction.

    assert same_vectors(vectors, vectors)
    assert same_vectors(vectors, vectors * np.float32(1 + 1e-6))


UNIT: Vectors = np.eye(3, dtype=np.float32)


@pytest.mark.parametrize(
    "other",
    [
        UNIT[:2],
        UNIT[:, :2],
        UNIT[::-1],
        -UNIT,
        UNIT * np.float32(2),
        UNIT * np.float32(1.05),
        UNIT * np.float32(0),
        np.full((3, 3), np.nan, dtype=np.float32),
        np.array([[1, 0.02, 0], [0, 1, 0], [0, 0, 1]], dtype=np.float32),
    ],
    ids=[
        "fewer",
        "shorter",
        "another order",
        "negated",
        "twice as long",
        "longer",
        "zeros",
        "nan",
        "one turned by a degree",
    ],
)
def test_other_vectors_are_not_the_same(other: Vectors) -> None:
    assert not same_vectors(UNIT, other)
    assert not same_vectors(other, UNIT)


def test_another_fake_dimension_is_noticed_by_its_probe() -> None:
    four, five = (probe_embedder(FakeEmbedder(size), size) for size in (4, 5))

    assert same_vectors(four, probe_embedder(FakeEmbedder(4), 4))
    assert not same_vectors(four, five)


def test_a_servers_vectors_may_differ_by_more_than_a_models_of_this_machine() -> None:
    served = Target("openai", "m", 2, access=Access("http://server"))
    one, other = filled(1, 0), filled(1, 0.03)

    assert not same_vectors(one, other, least=TARGET.noise)
    assert same_vectors(one, other, least=served.noise)
    assert not same_vectors(one, filled(1, 0.05), least=served.noise)


# sentence-transformers.

SMALL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt")


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An empty cache, and a hub that may not be asked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def minilm(offline: None) -> LocalEmbedder:
    """The real model, from the installed package."""
    assert describe_model(MINILM).directory == PACKAGE
    return real_embedder()


@pytest.fixture
def no_shortcuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load models that are neither tried nor compiled, which takes 5 s."""
    monkeypatch.setattr(LocalEmbedder, "_find_shortcuts", lambda embedder: None)


@pytest.fixture
def not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load models that are tried, but not compiled, which takes 2 s."""
    monkeypatch.setattr(LocalEmbedder, "_compile", lambda embedder: None)


@pytest.fixture(scope="module")
def plain() -> SentenceTransformer:
    """The obvious way to the same vectors."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(PACKAGE), device="cpu")


def link(directory: Path, *names: str) -> Path:
    """A directory with some of the real model's files."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        (directory / name).symlink_to(PACKAGE / name)
    return directory


@pytest.fixture(scope="module")
def bare(offline: None, tmp_path_factory: pytest.TempPathFactory) -> LocalEmbedder:
    """The real model as ai-memory keeps it: no file of sentence-transformers' own."""
    cache = tmp_path_factory.mktemp("ai-memory")
    directory = write_cache(cache, f"sentence-transformers/{MINILM}", {})
    link(directory, *SMALL_FILES, "model.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        assert describe_model(MINILM).directory == directory
        return LocalEmbedder(MINILM, 384)


def test_the_vectors_are_those_of_plain_sentence_transformers(
    minilm: LocalEmbedder, plain: SentenceTransformer
) -> None:
    vectors = minilm.embed(TEXTS)

    assert (vectors.shape, vectors.dtype) == ((len(TEXTS), 384), np.dtype(np.float32))
    np.testing.assert_allclose(vectors, plain.encode(TEXTS), rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_a_texts_vector_does_not_depend_on_its_batch(minilm: LocalEmbedder) -> None:
    together = minilm.embed(TEXTS)

    alone = np.concatenate([minilm.embed([text]) for text in TEXTS])

    np.testing.assert_allclose(alone, together, rtol=0, atol=1e-6)
    assert cosines(together[:1], together[2:3])[0] < 0.5


def test_ai_memorys_bare_copy_gives_the_same_vectors(
    minilm: LocalEmbedder, bare: LocalEmbedder
) -> None:
    counts = describe_model(MINILM).count_tokens(TEXTS)
    assert counts is not None
    assert max(counts) > 256

    vectors = bare.embed(TEXTS)

    assert min(cosines(vectors, minilm.embed(TEXTS))) >= 0.99999
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_a_model_is_the_same_whenever_it_is_probed(
    minilm: LocalEmbedder, bare: LocalEmbedder
) -> None:
    probe = probe_embedder(minilm, 384)

    # As the manifest of a run holds it.
    noted = np.array(json.loads(json.dumps(probe.tolist())), dtype=np.float32)

    assert probe.shape == (len(PROBE_TEXTS), 384)
    assert same_vectors(noted, probe_embedder(minilm, 384))
    assert same_vectors(noted, probe_embedder(bare, 384))


def test_a_probe_text_is_longer_than_the_model_looks_at() -> None:
    counts = describe_model(MINILM).count_tokens(PROBE_TEXTS)

    assert counts is not None
    # So that a window of any usual size shows in its vector.
    assert max(counts) > 1_500


@pytest.mark.parametrize("window", [128, 255, 512])
def test_another_window_is_noticed_by_the_probe(
    window: int, minilm: LocalEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = probe_embedder(minilm, 384)
    monkeypatch.setattr(minilm._model, "max_seq_length", window)
    monkeypatch.setattr(minilm, "_tokenizer", _own_tokenizer(minilm._model))

    assert not same_vectors(probe, probe_embedder(minilm, 384))


def test_weights_that_were_altered_are_noticed_by_the_probe(
    minilm: LocalEmbedder, offline: None, no_shortcuts: None, tmp_path: Path
) -> None:
    directory = change_weights(tmp_path / "model", lambda name: name, scale=1.05)

    altered = LocalEmbedder(str(directory), 384)

    assert describe_model(str(directory)).dimension == 384
    assert not same_vectors(probe_embedder(minilm, 384), probe_embedder(altered, 384))


@pytest.mark.parametrize("copy", ["minilm", "bare"])
@pytest.mark.usefixtures("real_model")
def test_what_stands_beyond_the_256th_token_changes_nothing(
    copy: str, request: pytest.FixtureRequest
) -> None:
    embedder: LocalEmbedder = request.getfixturevalue(copy)
    # A special token at either end, and 254 words of one token each between.
    window, shorter = ["one"] * 254, ["one"] * 253

    same = embedder.embed([" ".join([*window, "cat"]), " ".join([*window, "dog"] * 2)])
    other = embedder.embed([" ".join([*shorter, "cat"]), " ".join([*shorter, "dog"])])

    assert cosines(same[:1], same[1:])[0] >= 0.999999
    assert cosines(other[:1], other[1:])[0] < 0.9999


def test_texts_that_are_longer_than_the_model_looks_at_are_told(
    minilm: LocalEmbedder, no_shortcuts: None
) -> None:
    # A special token at either end, and one for each word.
    texts = ["one " * 254, "one " * 255, "", "one " * 255 + "!"]

    batch = minilm.embed_batch(texts)
    prompted = LocalEmbedder(MINILM, 384, prompt="two ").embed_batch(texts)

    assert (batch.cut, prompted.cut) == (frozenset({1, 3}), frozenset({0, 1, 3}))
    assert (batch.tokens, batch.wrong, batch.vectors.shape) == (0, {}, (4, 384))


def test_tokens_are_put_straight_through_a_model_that_takes_them(
    minilm: LocalEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["a short text", "", "ein Text, der länger ist als der erste", "long " * 400]
    expected = minilm._model.encode_document(texts)
    # Not by the library's own way, which tokenizes and pads in batches of 32 texts.
    monkeypatch.setattr(minilm._model, "encode_document", None)

    assert cosines(minilm.embed(texts), expected).min() > 0.999999


def test_half_precision_is_near_and_other_than_full(
    minilm: LocalEmbedder, no_shortcuts: None
) -> None:
    texts = ["a short text", "ein Text, der länger ist als der erste"]

    half = LocalEmbedder(MINILM, 384, precision="bfloat16").embed(texts)

    assert half.dtype == np.float32
    found = cosines(half, minilm.embed(texts))
    assert 0.995 < found.min() <= found.max() < 0.9999999


@pytest.mark.usefixtures("real_model")
def test_a_device_that_is_not_there_is_refused(offline: None) -> None:
    # With the version of torch, and what this machine has.
    with pytest.raises(EmbedderError, match=r"^the device mps is not there: torch .* finds cpu"):
        LocalEmbedder(MINILM, 384, device="mps")


@pytest.mark.usefixtures("real_model")
@pytest.mark.parametrize("odd", [{"truncation_side": "left"}, {"split_special_tokens": True}])
def test_what_a_tokenizers_settings_say_is_done(
    odd: dict[str, Any], offline: None, not_compiled: None, tmp_path: Path
) -> None:
    names = {*SMALL_FILES, "modules.json", "1_Pooling", "model.safetensors"}
    directory = link(tmp_path / "model", *names - {"tokenizer_config.json"})
    settings = json.loads((PACKAGE / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | odd))
    embedder = LocalEmbedder(str(directory), 384)
    texts = ["one " * 300 + "two " * 300 + "three", "a [SEP] b [MASK] c", "a text"]

    found = cosines(embedder.embed(texts), embedder._model.encode_document(texts))

    assert found.min() > 0.999999


@pytest.mark.usefixtures("real_model")
def test_a_model_that_wants_more_than_tokens_is_asked_the_librarys_way(
    offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calculate = LocalEmbedder._calculate
    monkeypatch.setattr(LocalEmbedder, "_calculate", lambda *some: -calculate(*some))
    embedder = LocalEmbedder(MINILM, 384)

    batch = embedder.embed_batch(["a text", "another"])

    assert not embedder._straight
    assert cosines(batch.vectors, embedder._model.encode_document(["a text", "another"])).min() > (
        0.999999
    )


@pytest.mark.usefixtures("real_model")
def test_a_model_of_another_kind_is_asked_the_librarys_way(offline: None, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(PACKAGE / "tokenizer.json"))
    tokenizer.no_padding()
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=8)])
    model.save(str(tmp_path / "model"))
    texts = ["a text", "another one", "word " * 600]

    embedder = LocalEmbedder(str(tmp_path / "model"), 8)

    assert not embedder._straight
    assert cosines(embedder.embed(texts), model.encode_document(texts)).min() > 0.999999


@pytest.mark.parametrize("said", ["max 100000\n", "", None])
def test_without_a_quota_all_cores_of_the_affinity_are_used(
    tmp_path: Path, said: str | None
) -> None:
    quota = tmp_path / "cpu.max"
    if said is not None:
        quota.write_text(said)

    assert usable_cores(quota) == len(os.sched_getaffinity(0))


def test_a_containers_quota_bounds_the_cores(tmp_path: Path) -> None:
    quota = tmp_path / "cpu.max"
    quota.write_text("50000 100000\n")

    assert usable_cores(quota) == 1


@pytest.mark.parametrize(("most", "expected"), [(2_047, 2_048), (40_000, 16_384), (10**9, 131_072)])
def test_a_devices_budget_is_bounded_by_its_memory(most: int, expected: int) -> None:
    def seconds(tokens: int) -> float:
        if tokens > most:
            raise RuntimeError("out of memory")
        return 1.0

    assert find_budget(seconds) == expected


def test_many_threads_get_their_own_texts_vectors(minilm: LocalEmbedder) -> None:
    texts = [f"thread {at} says {at * at}" for at in range(8)]
    expected = minilm.embed(texts)

    with ThreadPoolExecutor(8) as threads:
        vectors = np.concatenate(list(threads.map(lambda text: minilm.embed([text]), texts)))

    np.testing.assert_allclose(vectors, expected, rtol=0, atol=1e-6)


def test_a_failure_of_the_library_rejects_the_texts_without_quoting_them(
    minilm: LocalEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(encodings: Sequence[Encoding]) -> Vectors:
        raise IndexError(f"index out of range in {encodings[0].tokens}")

    monkeypatch.setattr(minilm, "_calculate", fail)

    with pytest.raises(TextRejected) as error:
        minilm.embed(["a secret"])
    assert str(error.value) == snapshot("the model failed with IndexError")


@pytest.mark.usefixtures("real_model")
def test_a_model_of_another_dimension_than_the_targets_is_refused(offline: None) -> None:
    with pytest.raises(EmbedderError) as error:
        load_embedder(Target("local", str(PACKAGE), 385))

    assert str(error.value).replace(str(PACKAGE), "MODEL") == snapshot(
        "MODEL makes vectors of 384 numbers, not 385; give the right --dim, or leave it out"
    )


@pytest.mark.usefixtures("real_model")
@pytest.mark.parametrize("kind", ["garbage", "empty", "cut", "html"])
def test_corrupt_weights_are_told_in_one_sentence(kind: str, offline: None, tmp_path: Path) -> None:
    with (PACKAGE / "model.safetensors").open("rb") as real:
        beginning = real.read(1_000_000)
    content = {"garbage": b"\x00\xff" * 64, "empty": b"", "cut": beginning, "html": b"<html>\n"}
    directory = link(tmp_path / "model", *SMALL_FILES, "modules.json", "1_Pooling")
    (directory / "model.safetensors").write_bytes(content[kind])

    with pytest.raises(EmbedderError) as error:
        load_embedder(Target("local", str(directory), 384))

    message = re.sub(r"\(SafetensorError: [^\n]*\)", "(WHY)", wording(error, tmp_path))
    assert message == snapshot(
        "the model in TMP/model can't be loaded (WHY); it may be incomplete, or need "
        "another library"
    )


@pytest.mark.usefixtures("real_model")
@pytest.mark.parametrize("missing", ["config.json", "1_Pooling"])
def test_a_model_without_one_of_its_files_is_refused(
    missing: str, offline: None, tmp_path: Path
) -> None:
    names = {*SMALL_FILES, "modules.json", "1_Pooling", "model.safetensors"} - {missing}
    directory = link(tmp_path / "model", *names)

    with pytest.raises(EmbedderError) as error:
        load_embedder(Target("local", str(directory), 384))
    # What the library says names files.
    assert re.sub(r"\([^\n]*\)", "(WHY)", wording(error, tmp_path)) == snapshot(
        "the model in TMP/model can't be loaded (WHY); it may be incomplete, or need "
        "another library"
    )


@pytest.mark.usefixtures("real_model")
def test_a_model_without_its_tokenizer_is_refused(offline: None, tmp_path: Path) -> None:
    names = ("config.json", "modules.json", "1_Pooling", "model.safetensors")
    directory = link(tmp_path / "model", *names)

    # It would load, and give texts of as many words the same vector.
    with pytest.raises(EmbedderError) as refused:
        load_embedder(Target("local", str(directory), 384))
    assert wording(refused, tmp_path) == snapshot(
        "the model in TMP/model has no tokenizer (tokenizer.json), so it would take all "
        "words for the same; fetch it again"
    )


def change_weights(
    directory: Path, change: Callable[[str], str | None], *, scale: float = 1
) -> Path:
    """A copy of the real model with its weights renamed, or left out where the name is None.

    Those of the last layer are scaled.
    """
    from safetensors.numpy import load_file, save_file

    link(directory, *SMALL_FILES, "modules.json", "1_Pooling", "sentence_bert_config.json")
    weights = load_file(PACKAGE / "model.safetensors")
    last = "encoder.layer.5.output.dense.weight"
    weights[last] = (weights[last] * scale).astype(weights[last].dtype)
    changed = {name: value for old, value in weights.items() if (name := change(old))}
    save_file(changed, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize(
    "change",
    [
        lambda name: None if name.startswith("encoder.layer.5.") else name,
        lambda name: None if name == "embeddings.word_embeddings.weight" else name,
        lambda name: f"other.{name}",
    ],
    ids=["a layer", "the words", "all"],
)
@pytest.mark.usefixtures("real_model")
def test_a_model_that_lacks_weights_is_refused(
    change: Callable[[str], str | None], offline: None, tmp_path: Path
) -> None:
    directory = change_weights(tmp_path / "model", change)

    # It would load, with random numbers in their place.
    with pytest.raises(EmbedderError) as refused:
        load_embedder(Target("local", str(directory), 384))
    # One of those that the library names.
    assert re.sub(r"\([^\n]*\)", "(NAME)", wording(refused, tmp_path)) == snapshot(
        "the model in TMP/model lacks weights (NAME), and random ones would take their place; "
        "fetch it again"
    )


def test_a_model_without_a_pooler_which_is_not_used_gives_the_same_vectors(
    minilm: LocalEmbedder, no_shortcuts: None, tmp_path: Path
) -> None:
    directory = change_weights(
        tmp_path / "model", lambda name: None if name.startswith("pooler.") else name
    )

    vectors = load_embedder(Target("local", str(directory), 384)).embed(TEXTS)

    np.testing.assert_allclose(vectors, minilm.embed(TEXTS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("as_source", [False, True], ids=["as the model", "as its source"])
def test_ai_memorys_bare_copy_named_by_its_directory_gives_the_same_vectors(
    as_source: bool, minilm: LocalEmbedder, no_shortcuts: None, tmp_path: Path
) -> None:
    directory = write_cache(tmp_path, f"sentence-transformers/{MINILM}", {})
    path = str(link(directory, *SMALL_FILES, "model.safetensors"))
    target = Target("local", MINILM, 384, path) if as_source else Target("local", path, 384)

    vectors = load_embedder(target).embed(TEXTS)

    assert min(cosines(vectors, minilm.embed(TEXTS))) >= 0.99999
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


ALONE = """
import contextlib, os, sys, urllib.error, urllib.request
from reembed.transforms.embedders import Target, load_embedder
from reembed.transforms.embedders.hub import fetch_model
from reembed.transforms.embedders.local import LocalEmbedder
from reembed.transforms.errors import EmbedderError

for model in sys.argv[1:]:
    loaded = load_embedder(Target("local", model, 384))
    compiled = loaded._compiled is not None
    telemetry = sys.modules.get("openvino_telemetry")
    print(loaded.embed(["a text"]).shape, compiled, telemetry)
    LocalEmbedder._find_shortcuts = lambda embedder: None  # 5 s for another one.
with contextlib.suppress(urllib.error.HTTPError):
    urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/loaded")
try:
    fetch_model("maker/model")
except EmbedderError as error:
    print(error)
"""


@pytest.mark.system
def test_a_model_on_this_machine_is_loaded_without_a_word_to_the_hub_or_openvinos_makers(
    tmp_path: Path,
) -> None:
    directory = link(tmp_path / "model", *SMALL_FILES, "modules.json", "1_Pooling")
    link(directory, "model.safetensors")
    with serving() as hub:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", ALONE, MINILM, str(directory)],
            env=clean_environment(tmp_path) | {"HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    by_name, loaded, refused = done.stdout.splitlines()
    assert by_name == "(1, 384) True None"
    assert loaded == "(1, 384) False None"
    assert not (tmp_path / "intel").exists()  # Where OpenVINO's telemetry would note who it is.
    assert refused == snapshot(
        "the model maker/model is not on this machine and the hub has no maker/model, or "
        "keeps it private; check the name given with --model"
    )
    assert hub.requests[0] == "GET /loaded"
    assert hub.requests[-1] == "GET /api/models/maker/model"
