"""ai-memory's schema since v84, as far as it matters here: stamps, hidden rows, a skip list.

No database of such a version was at hand. The statements below are written in our own words after
the public project's migrations (v84, v96, v100), and applied to one that its v80 has made.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from inline_snapshot import snapshot

from tests.conftest import Call, all_columns, change, files, make_store, memory, select, unpack
from tests.wording import line_with, wording

NEWER = (
    "ALTER TABLE memories ADD COLUMN embedding_space TEXT",
    "CREATE INDEX by_space ON memories (embedding_space) WHERE embedding_space NOT NULL",
    "DROP INDEX idx_memories_title_ns",
    "CREATE UNIQUE INDEX idx_memories_title_ns ON memories (title, namespace) "
    "WHERE lifecycle_state <> 'tombstoned'",
    "CREATE TABLE embed_skip (memory_id TEXT NOT NULL PRIMARY KEY, agent_id TEXT NOT NULL, "
    "key_fingerprint TEXT NOT NULL, reason TEXT NOT NULL, created_at TEXT NOT NULL)",
    "CREATE TRIGGER memories_embed_skip_clear_on_content "
    "AFTER UPDATE OF content, encrypted_envelope ON memories "
    "BEGIN DELETE FROM embed_skip WHERE memory_id = NEW.id; END",
    "CREATE TRIGGER memories_embed_skip_clear_on_embed AFTER UPDATE OF embedding ON memories "
    "WHEN NEW.embedding IS NOT NULL BEGIN DELETE FROM embed_skip WHERE memory_id = NEW.id; END",
    "UPDATE schema_version SET version = 101",
    "INSERT INTO embed_skip SELECT id, '', 'f', 'undecryptable', '' FROM memories",
)
SHOWN = ("open", "active", "blocked", "done", "abandoned")
HIDDEN = ("tombstoned", "quarantined", "contaminated")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A database of v101 with rows in each state: two of each hidden one, one of each other."""
    path = unpack("v80", tmp_path / "ai-memory.db")
    ids = [key for (key,) in select(path, "SELECT id FROM memories ORDER BY id LIMIT 11")]
    states = dict(zip(ids, [*SHOWN, *HIDDEN, *HIDDEN], strict=True))
    change(
        path,
        *NEWER,
        *(
            f"UPDATE memories SET lifecycle_state = '{state}' WHERE id = '{key}'"
            for key, state in states.items()
        ),
    )
    return path


def hidden_rows(path: Path) -> list[tuple[object, ...]]:
    names = ", ".join(f"'{state}'" for state in HIDDEN)
    return select(path, f"SELECT * FROM memories WHERE lifecycle_state IN ({names}) ORDER BY id")


def test_hidden_rows_are_counted_and_embedded(path: Path, reembed: Call) -> None:
    before = files(path.parent)

    plan = reembed("--db", path, "--dry-run")
    values = reembed("--db", path, "--dry-run", "--json").values

    assert values["rows_hidden"] == dict.fromkeys(sorted(HIDDEN), 2)
    assert values["rows_meant"] == values["total_rows"] == 202
    assert line_with("hidden  ", plan.out) == snapshot(
        "hidden           contaminated 2, quarantined 2, tombstoned 2 (ai-memory does not show "
        "them; --no-hidden leaves them out)"
    )
    assert files(path.parent) == before
    assert reembed("--db", path, "--json").values["reembedded"] == 202
    assert select(path, "SELECT DISTINCT embedding_dim FROM memories") == [(8,)]


def test_no_hidden_leaves_them_as_they_are(path: Path, reembed: Call) -> None:
    before = hidden_rows(path)

    plan = reembed("--db", path, "--no-hidden", "--dry-run")
    staged = reembed("--db", path, "--no-hidden", "--max-rows", "50", range_rows=32)
    ran = reembed("--db", path, "--no-hidden", "--json", range_rows=32)

    assert line_with("rows  ", plan.out) == snapshot("rows             202 (196 to embed)")
    assert line_with("hidden  ", plan.out) == snapshot(
        "hidden           contaminated 2, quarantined 2, tombstoned 2 (ai-memory does not show "
        "them; they are left out)"
    )
    assert (staged.code, ran.code) == (0, 0)
    assert (ran.values["total"], ran.values["reembedded"]) == (196, 196)
    assert len(ran.texts) <= 196 - 50 + 32  # It went on.
    assert hidden_rows(path) == before
    assert select(path, "SELECT count(*) FROM memories WHERE embedding_dim = 8") == [(196,)]
    assert reembed("verify", "--db", path).code == 0
    assert reembed("--db", path, "--missing-only", "--no-hidden", "--json").values["total"] == 0


def test_a_row_that_is_hidden_meanwhile_is_rolled_back(path: Path, reembed: Call) -> None:
    vectors = "SELECT id, hex(embedding), embedding_dim, embedding_space FROM memories ORDER BY id"
    before = select(path, vectors)
    assert reembed("--db", path, "--no-hidden").code == 0
    change(
        path, "UPDATE memories SET lifecycle_state = 'tombstoned' WHERE lifecycle_state = 'done'"
    )

    undone = reembed("rollback", "--db", path, "--json")

    assert (undone.code, undone.values["restored"]) == (0, 196)
    assert select(path, vectors) == before


def test_a_state_of_a_newer_version_is_hidden_and_none_is_not(path: Path, reembed: Call) -> None:
    change(
        path, "UPDATE memories SET lifecycle_state = 'unheard of' WHERE lifecycle_state = 'done'"
    )

    found = reembed("--db", path, "--dry-run", "--json").values["rows_hidden"]

    assert found["unheard of"] == 1
    assert sum(found.values()) == 7


@pytest.mark.parametrize("version", ["v57", "v80"])
def test_a_database_without_hidden_rows_has_none(
    version: str, tmp_path: Path, reembed: Call
) -> None:
    path = unpack(version, tmp_path / "m.db")

    plan = reembed("--db", path, "--no-hidden", "--dry-run")
    values = reembed("--db", path, "--no-hidden", "--dry-run", "--json").values

    assert plan.code == 0
    assert "hidden  " not in plan.out
    assert (values["rows_hidden"], values["rows_meant"]) == ({}, 202)


def test_no_hidden_is_for_ai_memory(tmp_path: Path, reembed: Call) -> None:
    path = make_store(tmp_path / "m.db", [memory("a")])
    flags = ("--table", "memories", "--text", "content", "--vector", "embedding")

    ran = reembed("--db", path, *flags, "--no-hidden")

    assert ran.code == 2
    assert wording(ran.error, tmp_path) == snapshot(
        "--no-hidden is for an ai-memory database, which has rows that are not shown; leave rows "
        "of this store out with --where"
    )


def test_the_skip_list_is_cleared_and_all_else_is_rolled_back(path: Path, reembed: Call) -> None:
    change(path, "UPDATE memories SET encrypted_envelope = x'00' WHERE lifecycle_state = 'done'")
    change(
        path,
        "INSERT INTO embed_skip SELECT id, '', 'f', 'undecryptable', '' FROM memories "
        "WHERE lifecycle_state = 'done'",
    )
    before = all_columns(path)
    skipped = select(path, "SELECT id FROM memories WHERE lifecycle_state = 'done'")

    ran = reembed("--db", path)

    assert ran.code == 0
    assert line_with("fires the trigger", ran.err) == snapshot(
        "reembed: NOTE — replacing a vector fires the trigger memories_embed_skip_clear_on_embed, "
        "which also writes to embed_skip; a rollback fires it as well"
    )
    assert select(path, "SELECT memory_id FROM embed_skip") == skipped
    assert reembed("verify", "--db", path).code == 0
    left = reembed("--db", path, "--skip-current-space", "--dry-run", "--json")
    assert left.values["rows_meant"] == 1
    assert reembed("rollback", "--db", path).code == 0
    after = all_columns(path)
    assert after.pop("embed_skip") != before.pop("embed_skip")
    assert after == before
