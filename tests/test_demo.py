"""The demo store is a real one: the same tables, and rows of every kind that reembed meets."""

from __future__ import annotations

import json
import re
import sqlite3
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from inline_snapshot import snapshot

from reembed.transforms.stores.demo import (
    SCHEMA,
    Memory,
    create_store,
    demo_memories,
    generated_memories,
    hashed_vector,
)
from tests.wording import wording

# What `describe` gives for the tables of a database that ai-memory 0.7.0 made.
V57 = json.loads(Path(__file__).with_name("schema-v57.json").read_text())

CAP_BYTES = 65_536
NAMESPACES = {"global", "notes", "projects/aurora", "projects/harbor", "ops/runbooks", "people"}
ROW = (
    "INSERT INTO memories (id, tier, title, content, created_at, updated_at) "
    "VALUES ('a', 'long', 'title', 'content', '', '')"
)


def describe(db: sqlite3.Connection, table: str) -> dict[str, Any]:
    """Columns, foreign keys, indexes and names of triggers of a table, as JSON values."""
    names = [row[1] for row in db.execute(f"PRAGMA index_list({table})")]
    triggers = "SELECT name FROM sqlite_master WHERE type = 'trigger' AND tbl_name = ?"
    description = {
        "columns": db.execute(f"PRAGMA table_xinfo({table})").fetchall(),
        "foreign_keys": db.execute(f"PRAGMA foreign_key_list({table})").fetchall(),
        "index_list": db.execute(f"PRAGMA index_list({table})").fetchall(),
        "indexes": {name: describe_index(db, name) for name in names},
        "triggers": sorted(name for (name,) in db.execute(triggers, [table])),
    }
    return json.loads(json.dumps(description))  # type: ignore[no-any-return]


def describe_index(db: sqlite3.Connection, name: str) -> dict[str, Any]:
    sql = db.execute("SELECT sql FROM sqlite_master WHERE name = ?", [name]).fetchone()[0] or ""
    return {
        "columns": db.execute(f"PRAGMA index_xinfo({name})").fetchall(),
        "where": " ".join(sql.split()).partition(" WHERE ")[2],
    }


def text(memory: Memory) -> str:
    return f"{memory.title} {memory.content}"


@pytest.fixture
def empty() -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        db.executescript(SCHEMA)
        yield db


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "demo.db"
    create_store(str(path), demo_memories())
    return path


@pytest.fixture
def demo(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        yield db


@pytest.mark.parametrize("table", V57)
def test_a_table_equals_the_one_that_the_original_program_makes(
    empty: sqlite3.Connection, table: str
) -> None:
    assert describe(empty, table) == V57[table]


def test_the_schema_version_is_57(empty: sqlite3.Connection) -> None:
    assert empty.execute("SELECT * FROM schema_version").fetchall() == [(57,)]


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ("{}", ("private", None)),
        ('{"scope":"team","agent_id":"assistant"}', ("team", "assistant")),
        ("not JSON", ("private", None)),
    ],
)
def test_generated_columns_come_from_the_metadata(
    empty: sqlite3.Connection, metadata: str, expected: tuple[str, str | None]
) -> None:
    empty.execute(ROW)
    empty.execute("UPDATE memories SET metadata = ?", [metadata])
    assert empty.execute("SELECT scope_idx, agent_id_idx FROM memories").fetchone() == expected


@pytest.mark.parametrize(
    ("column", "value"),
    [("tier", "huge"), ("priority", 0), ("priority", 11), ("confidence", -0.1), ("confidence", 2)],
)
def test_a_value_out_of_bounds_is_refused_on_insert_and_on_update(
    empty: sqlite3.Connection, column: str, value: str | float
) -> None:
    empty.execute(ROW)
    others = dict.fromkeys(("id", "title", "content", "created_at", "updated_at"), "b")
    row = {**others, "tier": "long", column: value}
    insert = f"INSERT INTO memories ({', '.join(row)}) VALUES (:{', :'.join(row)})"
    for statement in (insert, f"UPDATE memories SET {column} = :{column}"):
        # What a trigger of the schema says, which is ai-memory's.
        with pytest.raises(sqlite3.IntegrityError, match=f"^{column} is not"):
            empty.execute(statement, row)


def test_full_text_search_finds_exactly_the_rows_with_a_word(demo: sqlite3.Connection) -> None:
    select = (
        "SELECT id FROM memories JOIN memories_fts ON memories_fts.rowid = memories.rowid "
        "WHERE memories_fts MATCH 'quarantine'"
    )
    expected = {m.id for m in demo_memories() if "quarantine" in re.findall(r"\w+", text(m))}
    assert expected
    assert {key for (key,) in demo.execute(select)} == expected


def test_full_text_search_follows_the_text_and_not_the_vector(empty: sqlite3.Connection) -> None:
    def found(word: str) -> int:
        query = "SELECT count(*) FROM memories_fts WHERE memories_fts MATCH ?"
        return int(empty.execute(query, [word]).fetchone()[0])

    empty.execute(ROW)
    index = empty.execute("SELECT * FROM memories_fts_data").fetchall()
    empty.execute("UPDATE memories SET embedding = x'01', embedding_dim = 0")
    assert empty.execute("SELECT * FROM memories_fts_data").fetchall() == index
    empty.execute("UPDATE memories SET content = 'another'")
    assert (found("content"), found("another")) == (0, 1)
    empty.execute("DELETE FROM memories")
    assert found("another") == 0


def test_the_store_holds_the_memories_as_they_are(demo: sqlite3.Connection) -> None:
    columns = (
        "id, namespace, title, content, embedding, embedding_dim, encrypted_envelope, tier, "
        "source, created_at, updated_at, metadata"
    )
    rows = demo.execute(f"SELECT {columns} FROM memories ORDER BY rowid")
    assert [Memory(*row) for row in rows] == list(demo_memories())


def test_the_store_passes_sqlites_own_check(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    copy.write_bytes(path.read_bytes())
    with closing(sqlite3.connect(copy)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert db.execute("PRAGMA foreign_key_check").fetchall() == []
        db.execute("INSERT INTO memories_fts (memories_fts) VALUES ('integrity-check')")


def test_the_demo_is_the_same_each_time() -> None:
    assert list(demo_memories()) == list(demo_memories())


def test_the_demo_counts_are_those_of_its_docstring() -> None:
    memories = list(demo_memories())
    by_namespace = Counter(memory.namespace for memory in memories)
    texts = Counter(text(memory) for memory in memories)
    assert len(memories) == 500
    assert len({memory.id for memory in memories}) == 500
    assert len({(memory.title, memory.namespace) for memory in memories}) == 500
    assert set(by_namespace) == NAMESPACES | {"_agents"}
    assert by_namespace["_agents"] == 2
    assert [count for count in texts.values() if count > 1] == [6]
    assert sum(len(words) > 1_300 for words in texts) == 25
    sizes = [len(words.encode()) for words in texts]
    assert [size // 1_000 for size in sizes if size > CAP_BYTES] == [70]


def test_the_demo_speaks_nine_languages() -> None:
    texts = "\n".join(map(text, demo_memories()))
    words = ("berth", "Kräne", "réseau", "servidor", "plantão", "当番", "证书", "كل", "लॉग")
    assert [word for word in words if word not in texts] == []


def test_sixty_rows_have_no_vector_and_the_others_one_of_the_old_model() -> None:
    memories = [memory for memory in demo_memories() if memory.encrypted_envelope is None]
    without = [memory for memory in memories if memory.embedding is None]
    assert [memory.embedding_dim for memory in without] == [None] * 60
    for memory in memories:
        if memory.embedding is not None:
            assert memory.embedding == hashed_vector(text(memory))
            assert memory.embedding_dim == 256


def test_one_row_is_encrypted_and_has_the_vector_of_its_hidden_text() -> None:
    (row,) = [memory for memory in demo_memories() if memory.encrypted_envelope is not None]
    assert (row.content, len(row.encrypted_envelope or b"")) == ("", 140)
    assert row.embedding_dim == 256
    assert len(row.embedding or b"") == 1 + 4 * 256
    assert row.embedding != hashed_vector(text(row))


@pytest.mark.parametrize("words", ["", "...", "tea", "Tea, tea!", "夜間バックアップ", "a b c d e"])
@pytest.mark.parametrize("dimension", [1, 2, 256])
def test_a_hashed_vector_is_a_header_and_floats_of_length_one(words: str, dimension: int) -> None:
    header, *numbers = struct.unpack(f"<B{dimension}f", hashed_vector(words, dimension))
    assert header == 1
    assert sum(number * number for number in numbers) == pytest.approx(1.0, abs=1e-6)


def test_a_hashed_vector_ignores_case_and_order_and_tells_words_apart() -> None:
    assert hashed_vector("The Old Crane") == hashed_vector("crane, old: the")
    assert hashed_vector("crane") != hashed_vector("berth")


def test_generated_memories_are_distinct_and_the_same_each_time() -> None:
    memories = list(generated_memories(1_000, dimension=8, seed=3))
    assert memories == list(generated_memories(1_000, dimension=8, seed=3))
    assert memories != list(generated_memories(1_000, dimension=8, seed=4))
    assert len({memory.id for memory in memories}) == 1_000
    assert len({text(memory) for memory in memories}) == 1_000
    assert {memory.namespace for memory in memories[:6]} == NAMESPACES
    assert {memory.embedding_dim for memory in memories} == {8}
    assert {len(memory.embedding or b"") for memory in memories} == {1 + 4 * 8}


def test_generated_texts_have_about_340_bytes_on_average() -> None:
    sizes = [len(text(memory).encode()) for memory in generated_memories(2_000)]
    assert sum(sizes) / len(sizes) == pytest.approx(340, abs=10)


@pytest.mark.parametrize(("mode", "version"), [("delete", 1), ("wal", 2)])
def test_the_journal_mode_is_in_the_header_and_no_other_file_is_left(
    tmp_path: Path, mode: str, version: int
) -> None:
    path = tmp_path / "store.db"
    create_store(str(path), generated_memories(10), journal_mode=mode)
    assert [file.name for file in tmp_path.iterdir()] == ["store.db"]
    assert tuple(path.read_bytes()[18:20]) == (version, version)


def test_another_journal_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refused:
        create_store(str(tmp_path / "store.db"), [], journal_mode="memory")
    assert str(refused.value) == snapshot("journal_mode is 'memory', not 'delete' or 'wal'")
    assert [file.name for file in tmp_path.iterdir()] == []


@pytest.mark.parametrize("name", ["store.db", "store.db-wal", "store.db-journal"])
def test_an_existing_file_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(FileExistsError) as refused:
        create_store(str(tmp_path / "store.db"), generated_memories(10))
    assert wording(refused, tmp_path).replace(name, "NAME") == snapshot(
        "TMP/NAME exists already, and a demo replaces nothing"
    )
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == b"mine"


def test_a_failure_half_way_leaves_no_file(tmp_path: Path) -> None:
    memory = next(generated_memories(1))
    with pytest.raises(sqlite3.IntegrityError):
        create_store(str(tmp_path / "store.db"), [memory, memory])
    assert [file.name for file in tmp_path.iterdir()] == []
