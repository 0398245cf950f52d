"""Reading and replacing in an ai-memory database, in both journal modes."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inline_snapshot import snapshot

from reembed.transforms.errors import StampError, StoreError
from reembed.transforms.modes import Mode
from reembed.transforms.rows import Cause, KeyRange, Row, Stored, text_digest
from reembed.transforms.stores import Store, open_store, take_survey
from reembed.transforms.stores import sqlite as sqlite_files
from reembed.transforms.stores.ai_memory import TEXT_CAP_BYTES, space_stamp
from reembed.transforms.stores.codec import decode, encode
from tests.conftest import change, files, make_store, memory, other_contents, select, unpack
from tests.wording import wording

VECTOR = np.array([3.0, 4.0], dtype=np.float32)
RAW = VECTOR.tobytes()
EVERYTHING = KeyRange(0, None, None)


def new(store: Store, model: str = "m") -> Stored:
    """What a row holds once it has the vector."""
    return store.describe(RAW, model=model, dimension=2)


@pytest.fixture(params=["delete", "wal"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_text_is_title_one_space_and_content(tmp_path: Path, mode: str) -> None:
    rows = [memory("a", "  x\n", title=" t "), memory("b", "", title="t"), memory("c", "x\0y")]
    store = open_store(make_store(tmp_path / "m.db", rows, mode))

    read = store.read_range(EVERYTHING)

    assert [row.text for row in read] == [" t    x\n", "t ", "title c x\0y"]
    assert [row.digest for row in read] == [text_digest(row.text.encode()) for row in read]
    assert [row.skipped for row in read] == [None, None, None]


@pytest.mark.parametrize(("extra", "passes"), [(0, True), (1, False)])
def test_the_cap_is_65536_bytes_of_utf8(tmp_path: Path, extra: int, passes: bool) -> None:
    # "é" is two bytes: the title, the space and 32,765 of them are 65,536 bytes.
    content = "é" * ((TEXT_CAP_BYTES - 6) // 2) + "x" * extra
    path = make_store(tmp_path / "m.db", [memory("a", content, title="title")])

    (row,) = open_store(path).read_range(EVERYTHING)

    reason = f"content {TEXT_CAP_BYTES + extra} bytes exceeds embed cap 65536 bytes"
    assert (row.skipped and (row.skipped.cause, row.skipped.reason)) == (
        None if passes else (Cause.OVER_CAP, reason)
    )


def test_rows_that_have_no_text_are_skipped_by_rule(tmp_path: Path) -> None:
    path = make_store(
        tmp_path / "m.db", [memory("a", "", encrypted_envelope=b"sealed"), memory("b")]
    )
    change(
        path,
        "INSERT INTO memories (id, tier, namespace, title, content, created_at, updated_at) "
        "VALUES (NULL, 'mid', 'global', 'n', 'n', '', ''), (x'ff', 'mid', 'global', 'b', 'b', '', "
        "''), ('c', 'mid', 'global', 'c', CAST(x'ff' AS TEXT), '', '')",
    )

    read = open_store(path).read_range(EVERYTHING)

    assert [(row.key, row.skipped and row.skipped.reason, row.text) for row in read] == [
        ("rowid 3", "its id is not text", ""),
        ("a", "its content is encrypted", ""),
        ("b", None, "title b content b"),
        ("c", "its text is not valid UTF-8", ""),
        ("rowid 4", "its id is not text", ""),
    ]


keys = st.lists(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=4),
    unique=True,
    max_size=30,
)


@settings(max_examples=20)
@given(keys, st.integers(1, 9), keys, st.sampled_from([None, "even"]))
def test_every_row_present_or_future_is_in_exactly_one_range(
    tmp_path_factory: pytest.TempPathFactory,
    present: list[str],
    size: int,
    future: list[str],
    namespace: str | None,
) -> None:
    path = tmp_path_factory.mktemp("s") / "m.db"
    spaces = ["even", "odd"]
    make_store(
        path, [memory(key, title=key, namespace=spaces[i % 2]) for i, key in enumerate(present)]
    )
    store = open_store(path, namespace)
    meant = [key for i, key in enumerate(present) if namespace in (None, spaces[i % 2])]

    ranges, sampled = store.cut_ranges(size, 5)

    read = [row.key for keys in ranges for row in store.read_range(keys)]
    assert read == sorted(meant, key=str.encode)
    assert [keys.rows for keys in ranges] == [len(store.read_range(keys)) for keys in ranges]
    assert all(keys.rows <= size for keys in ranges)
    assert [keys.index for keys in ranges] == list(range(len(ranges)))
    assert set(sampled) <= set(meant)
    if not ranges:
        assert meant == []
        return
    added = [key for key in future if key not in present]
    connection = sqlite3.connect(path)
    for key in added:
        connection.execute(
            "INSERT INTO memories (id, tier, namespace, title, content, created_at, updated_at) "
            "VALUES (?, 'mid', 'even', ?, '', '', '')",
            (key, f"new {key}"),
        )
    connection.commit()
    connection.close()
    read = [row.key for keys in ranges for row in store.read_range(keys)]
    assert read == sorted(meant + added, key=str.encode)


def test_ranges_of_a_namespace_read_only_its_rows(tmp_path: Path, mode: str) -> None:
    rows = [memory(f"{i:03d}", namespace="odd" if i % 2 else "even") for i in range(20)]
    store = open_store(make_store(tmp_path / "m.db", rows, mode), "odd")

    ranges, _ = store.cut_ranges(3, 4)

    assert [row.key for keys in ranges for row in store.read_range(keys)] == [
        f"{i:03d}" for i in range(1, 20, 2)
    ]


def test_a_namespace_matches_exactly_never_a_subtree(tmp_path: Path) -> None:
    rows = [memory("a", namespace="ops"), memory("b", namespace="ops/x"), memory("c", namespace="")]
    path = make_store(tmp_path / "m.db", rows)

    assert [row.key for row in open_store(path, "ops").read_range(EVERYTHING)] == ["a"]
    assert open_store(path, "ops").cut_ranges(5, 5)[1] == ("a",)
    assert take_survey(open_store(path, "ops")).rows == 1


def test_a_replacement_changes_vector_dimension_and_nothing_else(tmp_path: Path, mode: str) -> None:
    old = encode(np.array([1.0], dtype=np.float32))
    rows = [memory(key, embedding=old, embedding_dim=1) for key in "abc"]
    path = make_store(tmp_path / "m.db", rows, mode)
    before, store = other_contents(path), open_store(path)

    with store.replacing() as table, table.transaction():
        found = table.read_range(EVERYTHING)
        table.put([(found[1].rowid, new(store))])

    stored = select(path, "SELECT id, embedding, embedding_dim FROM memories ORDER BY id")
    assert stored == [("a", old, 1), ("b", encode(VECTOR), 2), ("c", old, 1)]
    assert other_contents(path) == before
    assert sorted(files(tmp_path)) == ["m.db"]
    assert path.read_bytes()[18] == (2 if mode == "wal" else 1)


def test_a_replacement_that_fails_half_way_changes_nothing(tmp_path: Path, mode: str) -> None:
    path = make_store(tmp_path / "m.db", [memory(key) for key in "abc"], mode)
    before = path.read_bytes()

    store = open_store(path)

    with pytest.raises(ZeroDivisionError), store.replacing() as table, table.transaction():
        table.put([(1, new(store))])
        raise ZeroDivisionError

    assert select(path, "SELECT count(embedding) FROM memories") == [(0,)]
    assert path.read_bytes() == before


def test_a_row_that_vanished_undoes_the_replacement(tmp_path: Path) -> None:
    path = make_store(tmp_path / "m.db", [memory("a")])
    store = open_store(path)

    with (
        pytest.raises(StoreError) as refused,
        store.replacing() as table,
        table.transaction(),
    ):
        table.put([(1, new(store)), (99, new(store))])
    assert wording(refused, tmp_path) == snapshot(
        "SQLite wrote 1 of 2 rows of TMP/m.db, as it does if a trigger ignores some; that "
        "transaction was undone"
    )
    assert select(path, "SELECT count(embedding) FROM memories") == [(0,)]


def test_a_vector_never_keeps_another_models_stamp(tmp_path: Path) -> None:
    path = make_store(tmp_path / "m.db", [memory("a"), memory("b")])
    change(
        path,
        "ALTER TABLE memories ADD COLUMN embedding_space TEXT",
        "UPDATE memories SET embedding_space = 'old#none'",
    )

    store = open_store(path)
    with store.replacing() as table, table.transaction():
        table.put([(1, new(store, "all-MiniLM-L6-v2"))])

    assert select(path, "SELECT id, embedding_space FROM memories ORDER BY id") == [
        ("a", "sentence-transformers/all-minilm-l6-v2#none"),
        ("b", "old#none"),
    ]


@pytest.mark.parametrize(
    ("model", "stamp"),
    [
        ("mini_lm_l6_v2", "sentence-transformers/all-minilm-l6-v2#none"),
        ("sentence-transformers/all-MiniLM-L6-v2", "sentence-transformers/all-minilm-l6-v2#none"),
        ("all-minilm", "sentence-transformers/all-minilm-l6-v2#none"),
        ("Nomic-Embed-Text", "nomic-ai/nomic-embed-text-v1.5#nomic-task-v1"),
        ("nomic-embed-text-v2-moe:latest", "nomic-embed-text-v2-moe#nomic-task-v1"),
        ("BAAI/bge-m3:latest", "baai/bge-m3#none"),
        (" x (3-dim, local)", "x#none"),
    ],
)
def test_the_stamp_folds_names_as_ai_memory_does(model: str, stamp: str) -> None:
    assert space_stamp(model) == stamp


def test_a_store_from_before_the_dimension_column_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    change(
        path,
        "CREATE TABLE memories (id TEXT PRIMARY KEY, namespace TEXT NOT NULL, title TEXT NOT NULL, "
        "content TEXT NOT NULL, embedding BLOB)",
        f"INSERT INTO memories VALUES ('a', 'n', 't', 'c', x'{RAW.hex()}')",
        "INSERT INTO memories VALUES ('b', 'n', 't', 'd', x'010203')",
    )
    store = open_store(path)

    assert take_survey(store).dimensions == {0: 1, 2: 1}
    with store.replacing() as table, table.transaction():
        table.put([(1, new(store))])

    assert select(path, "SELECT embedding FROM memories WHERE id = 'a'") == [(encode(VECTOR),)]


def test_the_survey_counts_what_the_plan_shows(tmp_path: Path, mode: str) -> None:
    one: dict[str, Any] = {"embedding": b"\x01" + bytes(8), "embedding_dim": 2}
    rows = [
        memory("a", **one),
        memory("b", "x", title="y"),
        memory("c", namespace="notes", **one),
        memory("d", namespace="notes", embedding=bytes(12)),
        memory("e", "x" * 70_000, **one),
        memory("f", "", encrypted_envelope=b"e", **one),
    ]
    survey = take_survey(open_store(make_store(tmp_path / "m.db", rows, mode)))

    assert (survey.rows, survey.with_vector, survey.to_embed) == (6, 5, 4)
    assert survey.namespaces == {"global": 4, "notes": 2}
    assert survey.dimensions == {2: 4, 3: 1}
    assert survey.by_rule == {Cause.ENCRYPTED: 1, Cause.OVER_CAP: 1}


def test_reading_leaves_a_closed_wal_database_alone(tmp_path: Path) -> None:
    path = unpack("v80", tmp_path / "m.db")
    before = files(tmp_path)

    assert len(open_store(path).read_range(EVERYTHING)) == 202
    assert files(tmp_path) == before


def test_the_log_of_a_dead_process_is_read_and_left_alone(tmp_path: Path) -> None:
    path = unpack("v80", tmp_path / "m.db")
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("UPDATE memories SET title = 'only in the log' WHERE rowid = 1")
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy(path, copy / "m.db")
    shutil.copy(f"{path}-wal", copy / "m.db-wal")
    connection.close()
    before = files(copy)

    rows = open_store(copy / "m.db").read_range(EVERYTHING)

    assert sum(row.text.startswith("only in the log ") for row in rows) == 1
    assert files(copy) == before


def test_an_open_wal_database_is_read_as_its_writer_left_it(tmp_path: Path) -> None:
    path = unpack("v80", tmp_path / "m.db")
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("DELETE FROM memories WHERE namespace = 'notes'")

    assert len(open_store(path).read_range(EVERYTHING)) == 202 - 32
    connection.close()


def test_a_database_that_changes_while_it_is_read_without_locks_is_read_again(
    tmp_path: Path,
) -> None:
    path = unpack("v80", tmp_path / "m.db")
    seen: list[int] = []

    def count(db: sqlite3.Connection) -> int:
        seen.append(db.execute("SELECT count(*) FROM memories").fetchone()[0])
        if len(seen) == 1:
            change(path, "DELETE FROM memories WHERE namespace = 'notes'")
        return seen[-1]

    assert sqlite_files.read_only(path, wal=True, query=count) == 202 - 32
    assert seen == [202, 202 - 32]


def test_trying_the_write_lock_changes_no_byte(tmp_path: Path, mode: str) -> None:
    path = make_store(tmp_path / "m.db", [memory("a")], mode)
    before, modified = files(tmp_path), path.stat().st_mtime_ns

    open_store(path).check_writable()

    assert files(tmp_path) == before
    assert path.stat().st_mtime_ns == modified


def test_a_locked_database_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_files, "BUSY_SECONDS", 0.1)
    store = open_store(make_store(tmp_path / "m.db", [memory("a")]))
    connection = sqlite3.connect(store.path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")

    with pytest.raises(StoreError) as refused:
        store.check_writable()
    assert wording(refused, tmp_path) == snapshot(
        "TMP/m.db is locked by another process; wait for it to finish, or stop it, and run again"
    )
    connection.close()


def test_a_row_is_a_value(tmp_path: Path) -> None:
    path = make_store(tmp_path / "m.db", [memory("a")])

    assert open_store(path).read_range(EVERYTHING) == [
        Row(
            "a",
            1,
            "title a content a",
            text_digest(b"title a content a"),
            namespace="global",
        )
    ]


def test_vectors_are_read_back_as_they_were_given(tmp_path: Path) -> None:
    path = make_store(tmp_path / "m.db", [memory("a")])
    store = open_store(path)
    with store.replacing() as table, table.transaction():
        table.put([(1, new(store))])

    ((blob,),) = select(path, "SELECT embedding FROM memories")
    assert isinstance(blob, bytes)
    assert decode(blob).tolist() == [3.0, 4.0]


@pytest.mark.parametrize(
    ("events", "refused"),
    [
        ([], False),
        ([("record_stop", 1)], True),
        ([("record_stop", 1), ("record_resume", 2)], False),
        ([("record_stop", 3), ("record_resume", 2)], True),
        ([("record_stop", 1), ("record_resume", 2), ("record_stop", 3), ("other", 4)], True),
    ],
)
def test_a_record_stop_is_obeyed_before_and_in_the_replacement(
    tmp_path: Path, events: list[tuple[str, int]], refused: bool
) -> None:
    path = make_store(tmp_path / "m.db", [memory("a")])
    for at, (event, sequence) in enumerate(events):
        change(
            path,
            "INSERT INTO signed_events (id, agent_id, event_type, payload_hash, timestamp, "
            f"sequence) VALUES ('{at}', 'a', 'substrate.{event}', x'', '', {sequence})",
        )
    store = open_store(path)

    if refused:
        with pytest.raises(StoreError) as before:
            store.check_writable()
        with pytest.raises(StoreError) as inside, store.replacing() as t, t.transaction():
            pass
        for error in (before, inside):
            assert wording(error, tmp_path) == snapshot(
                "a record-stop is in force in TMP/m.db, and no program may write to it; "
                "resume recording with ai-memory and run again"
            )
    else:
        store.check_writable()
        with store.replacing() as table, table.transaction():
            table.put([(1, new(store))])
    assert select(path, "SELECT count(embedding) FROM memories") == [(int(not refused),)]


@pytest.mark.parametrize("lie", ["'abc'", "1.5", "-7", "0"])
def test_a_dimension_that_is_none_is_taken_from_the_vector(tmp_path: Path, lie: str) -> None:
    rows = [memory(key, embedding=encode(VECTOR), embedding_dim=2) for key in "ab"]
    path = make_store(tmp_path / "m.db", rows)
    change(path, f"UPDATE memories SET embedding_dim = {lie} WHERE id = 'a'")

    assert take_survey(open_store(path)).dimensions == {2: 2}


NUMBERS = st.one_of(
    st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False).map(lambda x: x + 0.0)
)
odd_values = st.one_of(
    st.none(),
    st.binary(max_size=9),
    NUMBERS,
    st.binary(max_size=9).map(lambda some: memoryview(some)),
)


def _exactly(path: Path) -> list[tuple[Any, ...]]:
    """The replaced columns of each row: types and bytes, and numbers to their last digit."""
    shown = ", ".join(
        f"typeof({name}), CASE typeof({name}) WHEN 'real' THEN {name} ELSE hex({name}) END"
        for name in ("embedding", "embedding_dim", "embedding_space")
    )
    return select(path, f"SELECT rowid, {shown} FROM memories ORDER BY rowid")


@settings(max_examples=20)
@given(st.lists(st.tuples(odd_values, odd_values, odd_values), min_size=1, max_size=4))
def test_whatever_was_stored_is_put_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[Any, Any, Any]]
) -> None:
    path = tmp_path_factory.mktemp("s") / "m.db"
    make_store(path, [memory(str(at)) for at in range(len(rows))])
    change(path, "ALTER TABLE memories ADD COLUMN embedding_space TEXT")
    connection = sqlite3.connect(path)
    for at, values in enumerate(rows):
        # A memoryview stands for a text, of any bytes; bytes are a BLOB.
        places = ["CAST(? AS TEXT)" if isinstance(value, memoryview) else "?" for value in values]
        connection.execute(
            "UPDATE memories SET embedding = {}, embedding_dim = {}, embedding_space = {} "
            "WHERE id = ?".format(*places),
            (*map(_bound, values), str(at)),
        )
    connection.commit()
    connection.close()
    before, store = _exactly(path), open_store(path)

    read = store.read_range(EVERYTHING, with_stored=True)
    with store.replacing() as table, table.transaction():
        table.put([(row.rowid, new(store)) for row in read])
    assert [row.stored for row in store.read_range(EVERYTHING, with_stored=True)] == [
        new(store)
    ] * len(rows)
    with store.replacing() as table, table.transaction():
        table.put([(row.rowid, row.stored) for row in read if row.stored is not None])

    assert _exactly(path) == before
    assert store.read_range(EVERYTHING, with_stored=True) == read
    held = [row.stored.digest for row in read if row.stored is not None]
    assert [held.index(one) for one in held] == [
        [row[1:] for row in before].index(row[1:]) for row in before
    ]


def _bound(value: Any) -> Any:
    return bytes(value) if isinstance(value, memoryview) else value


def test_what_is_put_is_what_was_described(tmp_path: Path, mode: str) -> None:
    path = make_store(tmp_path / "m.db", [memory(key) for key in "abc"], mode)
    change(path, "ALTER TABLE memories ADD COLUMN embedding_space TEXT")
    store = open_store(path)
    none = store.describe(None, model="m", dimension=2)

    with store.replacing() as table, table.transaction():
        table.put([(1, new(store)), (2, none)])
        inside = table.read_range(EVERYTHING)
    outside = store.read_range(EVERYTHING, with_stored=True)

    assert [row.stored for row in inside] == [new(store), none, none]
    assert outside == inside
    assert select(path, "SELECT embedding, embedding_dim, embedding_space FROM memories") == [
        (encode(VECTOR), 2, "m#none"),
        (None, None, None),
        (None, None, None),
    ]


def test_rows_are_written_in_the_order_of_the_file(tmp_path: Path) -> None:
    rows = [memory(key) for key in "dacb"]
    path = make_store(tmp_path / "m.db", rows)
    change(
        path,
        "CREATE TABLE log (key TEXT)",
        "CREATE TRIGGER noted AFTER UPDATE OF embedding ON memories "
        "BEGIN INSERT INTO log VALUES (new.id); END",
    )
    store = open_store(path)

    with store.replacing() as table, table.transaction():
        table.put([(row.rowid, new(store)) for row in table.read_range(EVERYTHING)])

    assert select(path, "SELECT key FROM log ORDER BY rowid") == [(key,) for key in "dacb"]


def test_without_what_is_stored_it_is_not_read(tmp_path: Path) -> None:
    store = open_store(make_store(tmp_path / "m.db", [memory("a", embedding=encode(VECTOR))]))

    (row,) = store.read_range(EVERYTHING)
    (full,) = store.read_range(EVERYTHING, with_stored=True)

    assert row.stored is None
    assert full.stored == Stored(encode(VECTOR), "embedding_dim=null:")


STAMP = "m#none"
space_rows = st.lists(
    st.tuples(
        st.sampled_from([None, "m#none", "other#none", ""]),
        st.sampled_from([None, 0, 4, 7, 8, 9, 12, 13]),
        st.sampled_from(["even", "odd"]),
    ),
    max_size=12,
)


@settings(max_examples=20)
@given(
    space_rows, st.sampled_from(Mode), st.sampled_from([None, "even"]), st.sets(st.integers(0, 11))
)
def test_a_mode_means_exactly_its_rows(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str | None, int | None, str]],
    mode: Mode,
    namespace: str | None,
    named: set[int],
) -> None:
    path = tmp_path_factory.mktemp("s") / "m.db"
    memories = [
        memory(f"{at:02d}", namespace=space, embedding=None if size is None else bytes(size))
        for at, (_, size, space) in enumerate(rows)
    ]
    make_store(path, memories)
    change(path, "ALTER TABLE memories ADD COLUMN embedding_space TEXT")
    for at, (stamp, _, _) in enumerate(rows):
        if stamp is not None:
            change(path, f"UPDATE memories SET embedding_space = '{stamp}' WHERE id = '{at:02d}'")
    keys = frozenset(f"{at:02d}" for at in named) if mode is Mode.RETRY_SKIPPED else None
    store = open_store(path, namespace).select(mode, model="m", dimension=2, keys=keys)

    def is_meant(at: int, stamp: str | None, size: int | None) -> bool:
        right = size in (8, 9)
        return {
            Mode.ALL: True,
            Mode.MISSING_ONLY: size is None,
            Mode.SKIP_CURRENT_SPACE: not (stamp == STAMP and right),
            Mode.STAMP_ONLY: right and stamp != STAMP,
            Mode.RETRY_SKIPPED: at in named,
        }[mode]

    inside = [
        (f"{at:02d}", is_meant(at, stamp, size))
        for at, (stamp, size, space) in enumerate(rows)
        if namespace in (None, space)
    ]
    meant = [key for key, is_one in inside if is_one]
    assert [row.key for row in store.read_range(EVERYTHING)] == meant
    assert [
        (row.key, row.meant) for row in store.read_range(EVERYTHING, with_stored=True)
    ] == inside
    survey = take_survey(store)
    assert survey.rows == len(inside)
    if mode is not Mode.RETRY_SKIPPED:
        assert survey.meant == survey.to_embed == len(meant)


@pytest.mark.parametrize("mode_", [Mode.SKIP_CURRENT_SPACE, Mode.STAMP_ONLY])
def test_a_mode_that_looks_at_stamps_is_refused_where_there_are_none(
    tmp_path: Path, mode_: Mode
) -> None:
    store = open_store(make_store(tmp_path / "m.db", [memory("a")]))

    with pytest.raises(StampError) as refused:
        store.select(mode_, model="m", dimension=2)
    assert (
        wording(refused, tmp_path)
        == snapshot(
            {
                "skip current space": (
                    "TMP/m.db keeps no stamps (it has no column embedding_space), so it "
                    "can't be told which model made a vector; run without "
                    "--skip-current-space"
                ),
                "stamp only": (
                    "TMP/m.db keeps no stamps (it has no column embedding_space), so it "
                    "can't be told which model made a vector; run without --stamp-only"
                ),
            }
        )[mode_.value]
    )


def test_the_survey_adds_up_the_sizes_of_the_vectors(tmp_path: Path) -> None:
    rows = [memory("a", embedding=bytes(9)), memory("b", embedding=bytes(1000)), memory("c")]

    assert take_survey(open_store(make_store(tmp_path / "m.db", rows))).vector_bytes == 1009


def test_texts_of_a_few_rows_are_read_but_not_of_those_skipped_by_rule(
    tmp_path: Path, mode: str
) -> None:
    rows = [memory("a"), memory("b", "", encrypted_envelope=b"sealed"), memory("c"), memory("d")]
    store = open_store(make_store(tmp_path / "m.db", rows, mode))

    assert store.read_texts(["c", "b", "gone", "a"]) == ["title c content c", "title a content a"]


def test_a_row_without_a_key_is_in_the_first_of_several_ranges(tmp_path: Path) -> None:
    path = make_store(tmp_path / "m.db", [memory(key) for key in "abcd"])
    for namespace in ("global", "other"):
        change(
            path,
            "INSERT INTO memories (id, tier, namespace, title, content, created_at, updated_at) "
            f"VALUES (NULL, 'mid', '{namespace}', 'n', 'n', '', '')",
        )
    store = open_store(path, "global")
    ranges, _ = store.cut_ranges(2, 1)
    assert len(ranges) > 1

    for with_stored in (False, True):
        read = [
            [row.key for row in store.read_range(keys, with_stored=with_stored)] for keys in ranges
        ]
        assert read[0][0] == "rowid 5"
        assert [key for keys in read for key in keys] == ["rowid 5", "a", "b", "c", "d"]


def test_a_sound_database_is_found_sound(tmp_path: Path, mode: str) -> None:
    rows = [memory(f"{at:03d}", "x" * 500) for at in range(50)]
    path = make_store(tmp_path / "m.db", rows, mode)
    before = files(tmp_path)

    open_store(path).check_sound()

    assert files(tmp_path) == before


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_a_database_with_a_damaged_page_is_refused_and_not_touched(
    tmp_path: Path, share: float
) -> None:
    rows = [memory(f"{at:03d}", "x" * 500) for at in range(200)]
    path = make_store(tmp_path / "m.db", rows)
    content = bytearray(path.read_bytes())
    page = int(len(content) * share) // 4096 * 4096
    content[page : page + 4096] = b"\xa5" * 4096
    path.write_bytes(content)
    store, before = open_store(path), files(tmp_path)

    with pytest.raises(StoreError) as refused:
        store.check_sound()
    assert wording(refused, tmp_path) == snapshot(
        "TMP/m.db is damaged (PRAGMA integrity_check says how); restore or repair it before "
        "its vectors are replaced"
    )
    assert files(tmp_path) == before


def test_a_transaction_makes_no_database_where_there_is_none(tmp_path: Path) -> None:
    path = tmp_path / "gone.db"

    with (
        pytest.raises(StoreError) as refused,
        sqlite_files.write_connection(path),
    ):
        pass
    assert wording(refused, tmp_path) == snapshot(
        "TMP/gone.db or the log beside it can't be opened; check the owner and mode of the "
        "file and its directory"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_commit_is_on_the_disk_when_it_returns(tmp_path: Path, mode: str) -> None:
    path = make_store(tmp_path / "m.db", [memory("a")], mode)

    with (
        sqlite_files.write_connection(path) as connection,
        sqlite_files.write_transaction(connection),
    ):
        # 2 is FULL: https://sqlite.org/pragma.html#pragma_synchronous
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
        assert connection.in_transaction
