"""What every store must be able to do: the same tests for each."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from inline_snapshot import snapshot

from reembed.transforms.embedders.fake import POISON
from reembed.transforms.staging import State, find_runs
from tests import kills
from tests.conftest import Call, Ran, change, files, losing_writes, select
from tests.store_kinds import KINDS, NEW_DIMENSION, OLD_DIMENSION, Kind
from tests.wording import wording

pytestmark = pytest.mark.system

TEXTS: list[str | None] = [f"text {at}" for at in range(30)]


@pytest.fixture(params=KINDS, ids=[kind.name for kind in KINDS])
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    return found


one_format = pytest.mark.parametrize(
    "kind",
    [kind for kind in KINDS if kind.name not in ("table f64le", "table json")],
    ids=lambda kind: kind.name,
)
"""For what takes long, and what a table does whatever the format of its vectors is."""


@pytest.fixture
def path(kind: Kind, tmp_path: Path) -> Path:
    (tmp_path / "store").mkdir()
    return kind.make(tmp_path / "store" / "m.db", TEXTS)


def flags(kind: Kind, path: Path, dimension: int = NEW_DIMENSION) -> tuple[str, ...]:
    return ("--db", str(path), "--model", "m", "--dim", str(dimension), *kind.flags)


COMMITTER = """
import select, sqlite3, sys
for line in sys.stdin:
    db = sqlite3.connect(line.rstrip("\\n"), timeout=30, isolation_level=None)
    while not select.select([sys.stdin], [], [], 0.002)[0]:
        db.execute("UPDATE busy SET n = n + 1")
    db.close()
    print(sys.stdin.readline(), end="", flush=True)
"""
"""Commits to the file that a line names until there is another line, which it answers."""


@pytest.fixture(scope="module")
def committer() -> Iterator[subprocess.Popen[str]]:
    command, pipe = [sys.executable, "-c", COMMITTER], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def committing(process: subprocess.Popen[str], path: Path) -> Iterator[Callable[[], int]]:
    """Another process commits to the file all the while; give how often it has."""
    assert process.stdin is not None
    assert process.stdout is not None
    change(path, "CREATE TABLE busy (n INTEGER)", "INSERT INTO busy VALUES (0)")

    def commits() -> int:
        ((count,),) = select(path, "SELECT n FROM busy")
        return int(count)

    print(path, file=process.stdin, flush=True)
    try:
        ends = time.monotonic() + 60
        while not commits():
            assert time.monotonic() < ends
        yield commits
    finally:
        print("stop", file=process.stdin, flush=True)
        assert process.stdout.readline() == "stop\n"


@pytest.fixture
def moved(kind: Kind, path: Path, reembed: Call) -> Callable[[], Ran]:
    """Move a store to a model; what is given moves it to that model with another prompt."""
    assert reembed(*flags(kind, path)).code == 0
    return lambda: reembed(*flags(kind, path), "--json", prompt="doc: ", range_rows=8)


def test_a_plan_says_what_is_there_and_changes_no_byte(
    kind: Kind, path: Path, reembed: Call
) -> None:
    before = files(path.parent)

    planned = reembed(*flags(kind, path), "--dry-run", "--json")

    assert planned.values["total_rows"] == planned.values["rows_with_embeddings"] == len(TEXTS)
    assert planned.values["rows_by_stored_dim"] == {str(OLD_DIMENSION): len(TEXTS)}
    assert planned.values["store"]["kind"] == kind.name.split()[0]
    assert files(path.parent) == before


@one_format
def test_every_row_gets_the_vector_of_its_text_and_the_run_is_verified(
    kind: Kind, path: Path, reembed: Call
) -> None:
    ran = reembed(*flags(kind, path), "--json", through_beam=True, range_rows=8)

    assert (ran.code, ran.values["reembedded"], ran.values["skipped"]) == (0, len(TEXTS), 0)
    assert kind.held(path) == [kind.new(str(text)) for text in TEXTS]
    assert reembed("verify", "--db", path).code == 0


@contextmanager
def nobody() -> Iterator[Callable[[], int]]:
    """No other process is at work; what is given counts how often it was called."""
    yield itertools.count().__next__


@pytest.mark.parametrize("move", ["another length", "the same length", "another prompt"])
def test_every_move_is_one_that_the_table_confirms(
    kind: Kind, path: Path, reembed: Call, move: str
) -> None:
    check_move(kind, path, reembed, move, nobody())


@one_format
@pytest.mark.parametrize("move", ["another length", "the same length", "another prompt"])
def test_every_move_is_one_that_the_table_confirms_while_another_process_commits(
    kind: Kind, path: Path, reembed: Call, move: str, committer: subprocess.Popen[str]
) -> None:
    check_move(kind, path, reembed, move, committing(committer, path))


def check_move(
    kind: Kind,
    path: Path,
    reembed: Call,
    move: str,
    others: AbstractContextManager[Callable[[], int]],
) -> None:
    dimension = NEW_DIMENSION if move == "another length" else OLD_DIMENSION
    prompt = "doc: " if move == "another prompt" else ""
    if prompt:
        assert reembed(*flags(kind, path, dimension)).code == 0

    with others as commits:
        before = commits()
        ran = reembed(*flags(kind, path, dimension), "--json", prompt=prompt, range_rows=8)
        assert commits() > before

    assert (ran.code, ran.values["reembedded"]) == (0, len(TEXTS))
    new = [kind.new(str(text), dimension=dimension, prompt=prompt) for text in TEXTS]
    assert kind.held(path) == new
    assert reembed("verify", "--db", path, prompt=prompt).code == 0


def test_a_write_that_is_lost_is_noticed_and_done_again(
    kind: Kind, path: Path, moved: Callable[[], Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    with losing_writes(monkeypatch, times=1):
        ran = moved()

    assert (ran.code, ran.values["reembedded"], ran.values["remaining"]) == (0, len(TEXTS), 0)
    assert kind.held(path) == [kind.new(str(text), prompt="doc: ") for text in TEXTS]


def test_rows_whose_writes_are_always_lost_are_named_with_exit_code_6(
    kind: Kind,
    path: Path,
    moved: Callable[[], Ran],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    with losing_writes(monkeypatch, times=1_000):
        ran = moved()

    assert (ran.code, ran.values["remaining"], ran.values["unwritten"]) == (6, 1, 1)
    assert f"row {kind.key(len(TEXTS) - 1)} remains: it does not hold its new vector" in ran.err
    assert wording(ran.error, tmp_path) == snapshot(
        "1 rows don't hold their new vectors, although these were written: a trigger of the "
        "database or another program puts others back; drop or stop it and run again, or undo the "
        "replacement with reembed rollback"
    )
    finished = moved()
    assert (finished.code, finished.texts) == (0, set())
    assert kind.held(path) == [kind.new(str(text), prompt="doc: ") for text in TEXTS]


def test_a_rollback_puts_back_all_columns_of_all_tables_byte_for_byte(
    kind: Kind, path: Path, reembed: Call
) -> None:
    before = kind.contents(path)
    reembed(*flags(kind, path), range_rows=8)
    assert kind.contents(path) != before

    undone = reembed("rollback", "--db", path, "--json")

    assert (undone.code, undone.values["restored"]) == (0, len(TEXTS))
    assert kind.contents(path) == before


def test_a_rollback_whose_writes_are_lost_says_so_and_can_be_repeated(
    kind: Kind,
    path: Path,
    moved: Callable[[], Ran],
    reembed: Call,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    before = kind.contents(path)
    assert moved().code == 0
    with losing_writes(monkeypatch, times=1):
        lost = reembed("rollback", "--db", path)

    assert lost.code == 6
    said = re.sub(r"the first: .*?\), although", "the first: KEY), although", lost.error)
    assert wording(said, tmp_path) == snapshot(
        "1 rows of TMP/store/m.db hold what the run wrote again (the first: KEY), although their "
        "previous vectors were put back: a trigger of the database or another program undoes it; "
        "drop or stop it; the rollback of run RUN is incomplete: try it again"
    )
    assert reembed("status", "--db", path).code == 6
    assert reembed("rollback", "--db", path).code == 0
    assert kind.contents(path) == before


def test_a_row_that_the_model_will_not_take_keeps_its_vector_and_is_named(
    kind: Kind, tmp_path: Path, reembed: Call
) -> None:
    path = kind.make(tmp_path / "m.db", [*TEXTS[:4], POISON, *TEXTS[5:]])

    ran = reembed(*flags(kind, path), "--json")

    if kind.whole:
        assert (ran.code, kind.held(path)) == (5, [kind.old(at) for at in range(len(TEXTS))])
        return
    assert (ran.code, ran.values["skipped"]) == (0, 1)
    assert f"skipped row {kind.key(4)}: " in ran.err
    assert kind.held(path)[4] == kind.old(4)
    assert kind.held(path)[5] == kind.new("text 5")
    retried = reembed(*flags(kind, path), "--retry-skipped", "--json", lenient=1)
    assert (retried.code, retried.values["reembedded"]) == (0, 1)
    assert kind.held(path)[4][1] == NEW_DIMENSION


def test_a_run_that_goes_on_embeds_nothing_twice_but_what_was_edited(
    kind: Kind, path: Path, reembed: Call
) -> None:
    first = reembed(*flags(kind, path), "--max-rows", "16", range_rows=8)
    change(path, kind.edit(3, "edited"))
    second = reembed(*flags(kind, path), range_rows=8)

    texts = [kind.text(str(text)) for text in TEXTS]
    assert (first.code, first.texts) == (0, set(texts[:16]))
    assert (second.code, second.texts) == (0, {*texts[16:], kind.text("edited")})
    assert kind.held(path)[3] == kind.new("edited")
    assert kind.held(path)[4:] == [kind.new(str(text)) for text in TEXTS[4:]]


def test_a_rollback_leaves_and_names_what_was_edited_since(
    kind: Kind, path: Path, reembed: Call
) -> None:
    reembed(*flags(kind, path))
    change(path, kind.edit(7, "edited"))

    undone = reembed("rollback", "--db", path, "--json")

    if kind.whole:
        assert f"(the first, {kind.key(7)}: its text was edited since)" in undone.error
        assert kind.held(path) == [kind.new(str(text)) for text in TEXTS]
        return
    assert (undone.values["restored"], undone.values["left"]) == (len(TEXTS) - 1, 1)
    assert f"row {kind.key(7)} is left as it is: its text was edited since" in undone.err
    assert kind.held(path)[7] == kind.new("text 7")
    assert kind.held(path)[8] == kind.old(8)


@pytest.fixture(scope="module")
def fork_server() -> None:
    kills.start_fork_server(__name__)


@pytest.mark.usefixtures("fork_server")
@one_format
def test_killed_while_it_replaces_it_is_finished_or_undone(
    kind: Kind, path: Path, reembed: Call, tmp_path: Path
) -> None:
    before = kind.contents(path)
    variables = {"RANGE_ROWS": "2", "ROWS_AT_ONCE": "1", "FIRST_ROWS": "2"}
    environment = {f"FAKE_{name}": value for name, value in variables.items()}
    _, tell = kills.FORKS.Pipe(duplex=False)
    work = (tmp_path, tell, environment, flags(kind, path))
    process = kills.FORKS.Process(target=kills.run_program, args=work)
    process.start()
    ends = time.monotonic() + 60
    while not _has_begun_to_replace(path, kind):
        assert process.is_alive() or kind.whole
        assert time.monotonic() < ends
        time.sleep(0.005)
    process.kill()
    process.join()
    states = {"old": [kind.old(at) for at in range(30)], "new": [kind.new(str(t)) for t in TEXTS]}
    seen = kind.held(path)
    assert all(one in (old, new) for one, old, new in zip(seen, *states.values(), strict=True))
    if kind.whole:
        assert seen in states.values()
    else:
        assert reembed("status", "--db", path).code == 6

    finished = reembed(*flags(kind, path), range_rows=2)

    assert (finished.code, finished.texts) == (0, set())
    assert kind.held(path) == states["new"]
    assert reembed("rollback", "--db", path).code == 0
    assert kind.contents(path) == before


def _has_begun_to_replace(path: Path, kind: Kind) -> bool:
    try:
        return any(
            manifest.state in (State.REPLACING, State.REPLACED) and (manifest.done or kind.whole)
            for _, manifest in find_runs(path)
        )
    except OSError:
        return False
