"""Manifests, file names and configuration files as nobody should give them.

Whatever they hold, a command ends with one of its exit codes and in a sentence, never with a
traceback; it takes little memory; and the table is not touched unless the exit code says so.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from inline_snapshot import snapshot

from reembed.transforms.stores.demo import hashed_vector
from tests.conftest import Call, Ran, half_replace, make_store, memory, select
from tests.wording import wording

ROWS = 10
MOST_MEMORY = 200 * 1024 * 1024
MOST_SECONDS = 30

WIDE = os.environ.get("HYPOTHESIS_PROFILE") == "wide"
"""Whether to look for other examples than the same ones, and for more."""

LOOKS = (("status",), ("status", "--json"), ("verify",), ("cleanup",), ("--dry-run", "--json"))
"""Commands that never write to the table."""

WRITES = ((), ("rollback",))
COMMANDS = (*LOOKS, ("cleanup", "--yes"), *WRITES)

DEEP = "@@deep@@"
"""Stands for lists that are nested too deeply for any parser."""


def fuzzed(examples: int) -> settings:
    """So many examples, more of them where others than the same ones are looked for."""
    return settings(
        max_examples=40 * examples if WIDE else examples,
        # What is found by memory or by time takes too long to be made smaller.
        phases=(Phase.explicit, Phase.generate),
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


Rows = dict[str, bytes | None]


class Bench:
    """A store with a run in each state, put in place again for each example."""

    def __init__(self, reembed: Call, directory: Path) -> None:
        self.reembed = reembed
        self.path = directory / "store" / "m.db"
        self.path.parent.mkdir()
        self.bystander = directory / "bystander.parquet"
        self._kept = directory / "kept"
        old = {f"{at}": hashed_vector(f"{at}", 5) for at in range(ROWS)}
        make_store(self.path, [memory(k, embedding=v, embedding_dim=5) for k, v in old.items()])
        self.old: Rows = dict(old)
        self._keep("none")
        flags = ("--db", self.path)
        reembed(*flags, "--max-rows", "6", range_rows=2)
        self._keep("staging")
        reembed(*flags, range_rows=2)
        self._keep("replaced")
        self.new = self.rows()
        assert not self.new.items() & self.old.items()
        self._note("rolling back", "rolling back")
        self.put("replaced")
        reembed("rollback", *flags)
        self._keep("rolled back")
        self.put("none")
        half_replace(reembed, self.path)
        self._keep("replacing")
        self.put("replaced")
        reembed(*flags, range_rows=2)  # A second run, which writes nothing.
        self._keep("wrote nothing")
        self.states = sorted(place.name for place in self._kept.iterdir())
        self.examples = {state: self._example(state) for state in self.states if state != "none"}

    def _keep(self, state: str) -> None:
        shutil.copytree(self.path.parent, self._kept / state)

    def _note(self, state: str, noted: str) -> None:
        values = json.loads(self.manifest.read_text())
        self.manifest.write_text(json.dumps(values | {"state": noted}))
        self._keep(state)

    def _example(self, state: str) -> dict[str, Any]:
        self.put(state)
        values: dict[str, Any] = json.loads(self.manifest.read_text())
        return values

    @property
    def run(self) -> Path:
        """The directory of the newest run."""
        return max(self.path.parent.glob("m.db.reembed/2*"))

    @property
    def manifest(self) -> Path:
        return self.run / "manifest.json"

    def put(self, state: str) -> None:
        """Put the store in place as it was in a state."""
        shutil.rmtree(self.path.parent)
        shutil.copytree(self._kept / state, self.path.parent)
        self.bystander.write_bytes(b"precious")

    def rows(self) -> Rows:
        return dict(select(self.path, "SELECT id, embedding FROM memories"))

    def check(self, command: Sequence[str | Path]) -> Ran:
        """Call the program, and look at all that it must never do."""
        content, before = self.path.read_bytes(), self.rows()
        with within_bounds():
            done = self.reembed(*command, "--db", self.path, range_rows=2)
        assert 0 <= done.code <= 6
        assert "Traceback" not in done.out + done.err
        assert "NaN" not in done.out
        errors = [line for line in done.err.splitlines() if line.startswith("reembed: error: ")]
        # A plan says in its exit code alone that a replacement is incomplete.
        planned = "--dry-run" in command and done.code == 6 and done.out
        assert len(errors) == (done.code != 0 and not planned), done.err
        if tuple(command) in LOOKS or "manifest.json" in "".join(errors):
            assert self.path.read_bytes() == content
        after = self.rows()
        if done.code in (1, 2, 3, 4, 5):
            assert after == before
        for key, vector in after.items():
            assert vector in (self.old[key], self.new[key])
        if tuple(command) == ("rollback",) and done.code == 0:
            for key in [key for key in after if after[key] != self.old[key]]:
                assert f"row {key} is left as it is" in done.err
        assert self.bystander.read_bytes() == b"precious"
        return done


@contextmanager
def within_bounds() -> Iterator[None]:
    """Fail if it takes more than 200 MB or half a minute."""

    def end(*_: object) -> None:
        raise TimeoutError(f"it has not ended in {MOST_SECONDS} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(MOST_SECONDS)
    Path("/proc/self/clear_refs").write_text("5")  # Counts the most anew.
    most = _resident("VmHWM")
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert _resident("VmHWM") - most < MOST_MEMORY


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise LookupError(name)


@pytest.fixture(scope="module")
def benches() -> list[Bench]:
    """The one that all tests use in turn, once it is made."""
    return []


@pytest.fixture
def bench(reembed: Call, benches: list[Bench], tmp_path_factory: pytest.TempPathFactory) -> Bench:
    if not benches:
        benches.append(Bench(reembed, tmp_path_factory.mktemp("bench")))
    benches[0].reembed = reembed
    return benches[0]


# ---- Manifests ----

numbers = st.one_of(
    st.sampled_from([-1, 0, 1, 10**9, 10**17, 10**30, -(10**400), 1e17, 1e308]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.integers(),
)
texts = st.one_of(
    st.text(st.characters(codec=None), max_size=8),
    st.sampled_from(["", "\ud800", "a\udcffb", "\x00", "\x1b[2J", "x" * 100_000, DEEP, "/", ".."]),
)
leaves = st.one_of(st.none(), st.booleans(), numbers, texts)
anything = st.one_of(
    leaves,
    st.sampled_from([[], {}, [[0, 10**17]], [[0, 1e17]], [[5, 1]], [[-5, 1]], [[0, 1, 2]], [[0]]]),
    st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
        max_leaves=6,
    ),
)

Place = tuple[str | int, ...]


def places(values: Any, above: Place = ()) -> Iterator[Place]:
    """Where there are values within others."""
    if isinstance(values, dict | list):
        named = values.items() if isinstance(values, dict) else enumerate(values)
        for name, value in named:
            yield (*above, name)
            yield from places(value, (*above, name))


@st.composite
def altered(draw: Callable[..., Any], example: Mapping[str, Any]) -> bytes:
    """A manifest in which something is not as it was: another value, none, or one more."""
    values = copy.deepcopy(dict(example))
    # Vectors of probes are long, and one number of them as good as any other.
    found = [place for place in places(values) if place[0] != "probe" or len(place) < 3]
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.sampled_from(found))
        inner: Any = values
        with suppress(KeyError, IndexError, TypeError):  # It may be gone by now.
            for name in place[:-1]:
                inner = inner[name]
            match draw(st.sampled_from(["other", "other", "other", "missing", "more"])):
                case "other":
                    inner[place[-1]] = draw(anything)
                case "missing":
                    del inner[place[-1]]
                case _ if isinstance(inner, dict):
                    inner[draw(texts)] = draw(anything)
                case _:
                    inner.append(draw(anything))
    deep = "[" * 50_000 + "]" * 50_000
    return json.dumps(values).replace(f'"{DEEP}"', deep).encode()


@st.composite
def broken(draw: Callable[..., Any], content: bytes) -> Any:
    """The bytes of a manifest, cut short, with others in between, or quite others."""
    at = draw(st.integers(0, len(content)))
    some = draw(st.sampled_from([b"", b"\xff", b"\x00", b"\xef\xbb\xbf", b"NaN", b"[", b"{", b"}"]))
    choices = [content[:at], content[:at] + some + content[at:], some]
    return choices[draw(st.integers(0, 2))]


@pytest.mark.system
def test_a_manifest_of_any_content_is_used_or_refused_in_a_sentence(bench: Bench) -> None:
    @fuzzed(60)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        state = data.draw(st.sampled_from(sorted(bench.examples)))
        example = bench.examples[state]
        manifests = st.one_of(
            altered(example),
            altered(example),
            altered(example),
            broken(json.dumps(example).encode()),
        )
        content = data.draw(manifests)
        command = data.draw(st.sampled_from(COMMANDS))
        bench.put(state)
        bench.manifest.write_bytes(content)
        bench.check(command)

    check()


VALUES: Sequence[tuple[str, object]] = (
    ("done", [[0, 10_000_000]]),
    ("done", [[-10_000_000, 0]]),
    ("writing", [[0, 10_000_000]]),
    ("ranges", []),
    ("ranges", [[None, None, 10**30]]),
    ("target", None),
    ("target", []),
    ("scope", {"namespace": None, "mode": "all", "keys": None, "store": []}),
    ("state", "\ud800"),
    ("rows", float("nan")),
    ("outcome", {"reembedded": float("inf")}),
    ("outcome", {"reembedded": "many"}),
    ("database", "\x00"),
    ("run_id", "../../bystander"),
)


@pytest.mark.system
def test_values_that_end_other_programs_are_refused_in_a_sentence(bench: Bench) -> None:
    found = []
    for (name, value), command in product(VALUES, (LOOKS[0], *WRITES)):
        bench.put("replacing" if name in ("done", "writing") else "replaced")
        values = json.loads(bench.manifest.read_text())
        bench.manifest.write_text(json.dumps(values | {name: value}))
        try:
            bench.check(command)
        except Exception as error:
            found.append(f"{name} {value!r}: {' '.join(command)}: {type(error).__name__}: {error}")

    assert not found, "\n".join(found)


# ---- The names of shards and of files of the backup ----

numbers_of_names = st.sampled_from(["0000000", "0000001", "1", "-1", "99999999999999999999", "x"])
names = st.one_of(
    st.sampled_from(
        [
            "foo.parquet",
            "my.data.parquet",
            ".hidden.parquet",
            "a.b.c.d.e.parquet",
            "0000000.parquet",
            "{} (conflicted copy).parquet",
            "{}.tmp",
            "copy of {}",
            "\udcff.parquet",
            "0000000.0000.\udcff.parquet",
            "0000000.0000.000.00002.\n.parquet",
        ]
    ),
    st.builds("{}.{}.{}.parquet".format, *[numbers_of_names] * 3),
    st.builds("{}.{}.{}.{}.{}.parquet".format, *[numbers_of_names] * 5),
)
KINDS = ("a copy", "nothing", "noise", "a directory", "a pipe", "a link", "a link to nowhere")


def put_there(bench: Bench, directory: Path, name: str, kind: str, *, moved: bool) -> None:
    """Put something into a directory of the run, perhaps in the place of the file there."""
    real = min(directory.glob("*.parquet"))
    content = real.read_bytes()
    place = directory / name.format(real.name)
    if moved:
        real.unlink()
    if os.path.lexists(place):
        place.unlink()
    match kind:
        case "a copy":
            place.write_bytes(content)
        case "nothing":
            place.touch()
        case "noise":
            place.write_bytes(content[::-1])
        case "a directory":
            place.mkdir()
        case "a pipe":
            os.mkfifo(place)
        case "a link":
            place.symlink_to(bench.bystander)
        case _:
            place.symlink_to(bench.bystander.with_name("nowhere"))


@pytest.mark.system
def test_files_of_any_name_and_kind_among_shards_and_backup_are_told_in_a_sentence(
    bench: Bench,
) -> None:
    @fuzzed(40)
    @given(
        place=st.sampled_from(["staging/shards", "replaced/backup", "replacing/backup"]),
        name=names,
        kind=st.sampled_from(KINDS),
        command=st.sampled_from(COMMANDS),
        moved=st.booleans(),
    )
    def check(place: str, name: str, kind: str, command: Sequence[str], moved: bool) -> None:
        state, directory = place.split("/")
        bench.put(state)
        put_there(bench, bench.run / directory, name, kind, moved=moved)
        bench.check(command)

    check()


# ---- Configuration files ----

toml_texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    st.sampled_from(["", "docs", "local", "x" * 10_000, "/", "{", "{a", "http://[", "\x00"]),
)
toml_leaves = st.one_of(
    toml_texts.map(lambda text: json.dumps(text).replace("\x7f", "\\u007f")),
    st.sampled_from(
        ["0", "-1", "9" * 400, "nan", "-inf", "1e999", "true", "1979-05-27", "07:32:00"]
    ),
)
toml_values = st.recursive(
    toml_leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda some: f"[{', '.join(some)}]"),
        inner.map("{{a = {}}}".format),
    ),
    max_leaves=4,
)
STORE_NAMES = ("store", "table", "key", "text", "vector", "where", "format", "space", "dim-column")
OUR_NAMES = ("tier", "embed_url", "embedding_model", "embeddings", "db", "ollama_url")
EMBEDDING_NAMES = ("backend", "base_url", "url", "model", "dim", "batch", "api_key_env", "api_key")


@st.composite
def toml(draw: Callable[..., Any], names: Sequence[str], tables: Sequence[str]) -> Any:
    """A configuration file with a few settings, or what no parser takes."""
    lines = [
        f"{draw(st.sampled_from(names))} = {draw(toml_values)}"
        for _ in range(draw(st.integers(1, 3)))
    ]
    if draw(st.booleans()) and tables:
        lines += ["[embeddings]", f"{draw(st.sampled_from(tables))} = {draw(toml_values)}"]
    whole = "\n".join(lines).encode()
    deep = b"table = " + b"[" * 20_000
    choices = [whole, whole, whole, deep, b"\xff", b"\x00", b"\xef\xbb\xbf"]
    return choices[draw(st.integers(0, len(choices) - 1))]


@pytest.mark.system
def test_a_configuration_of_any_content_is_used_or_refused_in_a_sentence(
    bench: Bench, tmp_path: Path
) -> None:
    config = tmp_path / ".config" / "ai-memory" / "config.toml"
    config.parent.mkdir(parents=True)

    @fuzzed(25)
    @given(toml(OUR_NAMES, EMBEDDING_NAMES), st.sampled_from(COMMANDS))
    def check(content: bytes, command: Sequence[str]) -> None:
        bench.put("replaced" if command and command != LOOKS[-1] else "none")
        config.write_bytes(content)
        bench.check(command)

    check()


@pytest.mark.system
def test_a_description_of_a_store_of_any_content_is_used_or_refused_in_a_sentence(
    bench: Bench, tmp_path: Path
) -> None:
    config = tmp_path / "store.toml"

    @fuzzed(20)
    @given(toml(STORE_NAMES, ()), st.sampled_from([LOOKS[-1], ()]))
    def check(content: bytes, command: Sequence[str]) -> None:
        bench.put("none")
        config.write_bytes(content)
        bench.check([*command, "--config", config])

    check()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            "a directory",
            snapshot(
                "the configuration TMP/.config/ai-memory/config.toml can't be read: Is a "
                "directory (AI_MEMORY_NO_CONFIG=1 leaves it out); correct it"
            ),
        ),
        (
            "a pipe",
            snapshot(
                "the configuration TMP/.config/ai-memory/config.toml can't be read: it is not a "
                "regular file (AI_MEMORY_NO_CONFIG=1 leaves it out); correct it"
            ),
        ),
        (
            "a link to nowhere",
            snapshot(
                "the configuration TMP/.config/ai-memory/config.toml can't be read: "
                "TMP/.config/ai-memory/config.toml is a link to TMP/nowhere, where nothing is "
                "(AI_MEMORY_NO_CONFIG=1 leaves it out); correct it"
            ),
        ),
        (
            "/dev/zero",
            snapshot(
                "the configuration TMP/.config/ai-memory/config.toml can't be read: it is not a "
                "regular file (AI_MEMORY_NO_CONFIG=1 leaves it out); correct it"
            ),
        ),
    ],
)
def test_a_configuration_that_is_no_file_is_refused_in_a_sentence(
    kind: str, said: str, reembed: Call, tmp_path: Path
) -> None:
    path = make_store(tmp_path / "m.db", [memory("1")])
    config = tmp_path / ".config" / "ai-memory" / "config.toml"
    config.parent.mkdir(parents=True)
    match kind:
        case "a directory":
            config.mkdir()
        case "a pipe":
            os.mkfifo(config)
        case "a link to nowhere":
            config.symlink_to(tmp_path / "nowhere")
        case _:
            config.symlink_to(kind)
    before = path.read_bytes()

    for flags in ((), ("--config", str(config)), ("status",)):
        with within_bounds():
            done = reembed(*flags, "--db", path)
        assert (flags, done.code) == (flags, 2)
        assert wording(done.error, tmp_path) == said

    assert path.read_bytes() == before
