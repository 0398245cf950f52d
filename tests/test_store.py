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

from tests.conftest import change, files, make_store, memory, other_contents, select, unpack
from transforms.errors import StoreError
from transforms.rows import Cause, KeyRange, Row, text_digest
from transforms.stores import open_store, take_survey
from transforms.stores import sqlite as sqlite_files
from transforms.stores.ai_memory import TEXT_CAP_BYTES, space_stamp
from transforms.stores.codec import decode, encode

VECTOR = np.array([3.0, 4.0], dtype=np.float32)
RAW = VECTOR.tobytes()
EVERYTHING = KeyRange(0, None, None)


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


@settings(max_examples=60, deadline=None)
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

    with store.replacing() as table:
        found = table.read_range(EVERYTHING)
        table.put([(found[1].rowid, RAW)], dimension=2, model="m")

    stored = select(path, "SELECT id, embedding, embedding_dim FROM memories ORDER BY id")
    assert stored == [("a", old, 1), ("b", encode(VECTOR), 2), ("c", old, 1)]
    assert other_contents(path) == before
    assert sorted(files(tmp_path)) == ["m.db"]
    assert path.read_bytes()[18] == (2 if mode == "wal" else 1)


def test_a_replacement_that_fails_half_way_changes_nothing(tmp_path: Path, mode: str) -> None:
    path = make_store(tmp_path / "m.db", [memory(key) for key in "abc"], mode)
    before = path.read_bytes()

    with pytest.raises(ZeroDivisionError), open_store(path).replacing() as table:
        table.put([(1, RAW)], dimension=2, model="m")
        raise ZeroDivisionError

    assert select(path, "SELECT count(embedding) FROM memories") == [(0,)]
    assert path.read_bytes() == before


def test_a_row_that_vanished_undoes_the_replacement(tmp_path: Path) -> None:
    path = make_store(tmp_path / "m.db", [memory("a")])

    with (
        pytest.raises(StoreError, match="replaced 1 of 2 vectors"),
        open_store(path).replacing() as table,
    ):
        table.put([(1, RAW), (99, RAW)], dimension=2, model="m")

    assert select(path, "SELECT count(embedding) FROM memories") == [(0,)]


def test_a_vector_never_keeps_another_models_stamp(tmp_path: Path) -> None:
    path = make_store(tmp_path / "m.db", [memory("a"), memory("b")])
    change(
        path,
        "ALTER TABLE memories ADD COLUMN embedding_space TEXT",
        "UPDATE memories SET embedding_space = 'old#none'",
    )

    with open_store(path).replacing() as table:
        table.put([(1, RAW)], dimension=2, model="all-MiniLM-L6-v2")

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
    with store.replacing() as table:
        table.put([(1, RAW)], dimension=2, model="m")

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

    with pytest.raises(StoreError, match=r"m\.db is locked by another process"):
        store.check_writable()
    connection.close()


def test_a_row_is_a_value(tmp_path: Path) -> None:
    path = make_store(tmp_path / "m.db", [memory("a")])

    assert open_store(path).read_range(EVERYTHING) == [
        Row("a", 1, "title a content a", text_digest(b"title a content a"))
    ]


def test_vectors_are_read_back_as_they_were_given(tmp_path: Path) -> None:
    path = make_store(tmp_path / "m.db", [memory("a")])
    with open_store(path).replacing() as table:
        table.put([(1, RAW)], dimension=2, model="m")

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
        with pytest.raises(StoreError, match="a record-stop is in force"):
            store.check_writable()
        with pytest.raises(StoreError, match="a record-stop is in force"), store.replacing():
            pass
    else:
        store.check_writable()
        with store.replacing() as table:
            table.put([(1, RAW)], dimension=2, model="m")
    assert select(path, "SELECT count(embedding) FROM memories") == [(int(not refused),)]


@pytest.mark.parametrize("lie", ["'abc'", "1.5", "-7", "0"])
def test_a_dimension_that_is_none_is_taken_from_the_vector(tmp_path: Path, lie: str) -> None:
    rows = [memory(key, embedding=encode(VECTOR), embedding_dim=2) for key in "ab"]
    path = make_store(tmp_path / "m.db", rows)
    change(path, f"UPDATE memories SET embedding_dim = {lie} WHERE id = 'a'")

    assert take_survey(open_store(path)).dimensions == {2: 2}
