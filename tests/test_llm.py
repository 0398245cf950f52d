"""The databases of llm, made and queried by llm itself."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from llm.embeddings import Collection
from llm.models import EmbeddingModel
from sqlite_utils import Database

from tests.conftest import Call, Program, all_columns, change, select
from transforms.embedders.models import MINILM
from transforms.stores import Replacement


class Letters(EmbeddingModel):
    """The model before: it counts letters."""

    model_id = "letters"

    def embed_batch(
        self, items: Iterable[str | bytes], *, key: str | None = None
    ) -> Iterator[list[float]]:
        for item in items:
            yield [float(str(item).count(letter)) + 0.1 for letter in "aeiou"]


class MiniLm(EmbeddingModel):
    """What llm's plugin for sentence-transformers is, with the packaged model."""

    model_id = "sentence-transformers/all-MiniLM-L6-v2"

    def embed_batch(
        self, items: Iterable[str | bytes], *, key: str | None = None
    ) -> Iterator[list[float]]:
        from transforms.embedders.hub import fetch_model
        from transforms.embedders.loading import load_model
        from transforms.embedders.models import find_model

        model = load_model(find_model(MINILM) or fetch_model(MINILM))
        yield from model.encode(list(map(str, items))).tolist()


NOTES = [
    "the cat sleeps on the warm roof",
    "a kitten naps in the sun",
    "the parliament passed the budget",
    "ministers argued about taxes",
    "boil the pasta for nine minutes",
    "a recipe for tomato sauce",
]


def collect(path: Path, name: str, texts: Sequence[str], *, store: bool = True) -> None:
    with closing(sqlite3.connect(path)) as db:
        collection = Collection(name, Database(db), model=Letters())
        collection.embed_multi(((f"i{at}", text) for at, text in enumerate(texts)), store=store)


def test_llms_own_search_finds_in_a_moved_collection_what_it_finds_in_a_fresh_one(
    program: Program, tmp_path: Path
) -> None:
    path, fresh = tmp_path / "embeddings.db", tmp_path / "fresh.db"
    collect(path, "notes", NOTES)
    hashes = "SELECT id, content_hash, content, updated FROM embeddings"
    before = select(path, hashes)

    assert program("--db", path, "--model", MINILM).returncode == 0

    assert select(path, "SELECT name, model FROM collections") == [("notes", MiniLm.model_id)]
    assert select(path, hashes) == before
    with closing(sqlite3.connect(path)) as one, closing(sqlite3.connect(fresh)) as other:
        expected = Collection("notes", Database(other), model=MiniLm())
        expected.embed_multi(((f"i{at}", text) for at, text in enumerate(NOTES)), store=True)
        moved = Collection("notes", Database(one), model=MiniLm(), create=False)
        assert moved.model_id == MiniLm.model_id
        for query in ("a sleeping animal", "politics", "cooking"):
            found, wanted = moved.similar(query), expected.similar(query)
            assert [entry.id for entry in found] == [entry.id for entry in wanted]
            for entry, other_entry in zip(found, wanted, strict=True):
                assert entry.score == pytest.approx(other_entry.score, abs=1e-5)


def test_a_collection_with_items_without_content_stays_and_is_named(
    reembed: Call, tmp_path: Path
) -> None:
    path = tmp_path / "embeddings.db"
    collect(path, "full", NOTES)
    collect(path, "half", NOTES[:4])
    collect(path, "half", [*NOTES[:4], "secret"], store=False)
    change(path, "UPDATE embeddings SET content = NULL WHERE id = 'i2' AND collection_id = 2")
    before = select(path, "SELECT * FROM embeddings WHERE collection_id = 2")

    ran = reembed("--db", path, "--model", "m", "--json")

    assert (ran.code, ran.values["reembedded"]) == (0, len(NOTES))
    assert "NOTE — the collection 'half' keeps its model and its vectors: 2 of its items" in ran.err
    assert 'skipped row [2, "i2"]: it has no text (NULL)' in ran.err
    assert select(path, "SELECT name, model FROM collections") == [
        ("full", "m"),
        ("half", "letters"),
    ]
    assert select(path, "SELECT * FROM embeddings WHERE collection_id = 2") == before


@pytest.mark.parametrize("flags", [["--dry-run"], []])
def test_a_collection_that_was_named_and_stays_is_a_failure(
    flags: list[str], reembed: Call, tmp_path: Path
) -> None:
    path = tmp_path / "embeddings.db"
    collect(path, "full", NOTES)
    collect(path, "half", ["stored"])
    collect(path, "half", ["stored", *(f"secret {at}" for at in range(29))], store=False)
    change(path, "UPDATE embeddings SET content = NULL WHERE content <> 'stored' AND id <> 'i0'")
    before = all_columns(path)

    ran = reembed("--db", path, "--model", "m", "--namespace", "half", "--json", *flags)

    assert (ran.code, ran.out, ran.texts) == (5, "", set())
    assert ran.error.startswith(
        "the collection 'half' keeps its model and its vectors: 29 of its items have no stored "
        "content to embed ('i1', 'i10', 'i11', "
    )
    assert " and 9 more), so nothing is replaced; store their content" in ran.error
    assert all_columns(path) == before
    assert not path.with_name("embeddings.db.reembed").exists()


@pytest.mark.parametrize("flags", [["--dry-run"], []])
def test_a_collection_that_is_not_there_is_refused_with_those_like_it(
    flags: list[str], reembed: Call, tmp_path: Path
) -> None:
    path = tmp_path / "embeddings.db"
    collect(path, "notes", NOTES)
    change(path, "INSERT INTO collections (name, model) VALUES ('empty', 'letters')")
    before = all_columns(path)

    wrong = reembed("--db", path, "--model", "m", "--namespace", "note", *flags)
    empty = reembed("--db", path, "--model", "m", "--namespace", "empty", *flags)

    said = f"{path} has no collection 'note' (like it: 'notes'); correct --namespace"
    assert (wrong.code, wrong.out, wrong.error) == (2, "", said)
    assert empty.code == 0
    assert "reembed: the collection 'empty' has no rows; nothing to do" in empty.err
    assert all_columns(path) == before


def test_one_collection_is_moved_and_the_others_stay(reembed: Call, tmp_path: Path) -> None:
    path = tmp_path / "embeddings.db"
    for name in ("one", "two"):
        collect(path, name, NOTES)
    before = all_columns(path)

    ran = reembed("--db", path, "--model", "m", "--namespace", "two", "--space", "n", "--json")

    assert (ran.code, ran.values["reembedded"]) == (0, len(NOTES))
    assert select(path, "SELECT name, model FROM collections") == [("one", "letters"), ("two", "n")]
    lengths = "SELECT DISTINCT collection_id, length(embedding) FROM embeddings ORDER BY 1"
    assert select(path, lengths) == [(1, 20), (2, 32)]
    assert reembed("rollback", "--db", path).code == 0
    assert all_columns(path) == before


def test_no_reader_ever_sees_vectors_without_their_model(reembed: Call, tmp_path: Path) -> None:
    path = tmp_path / "embeddings.db"
    collect(path, "notes", [f"note {at}" for at in range(60)])
    change(
        path,
        "CREATE TRIGGER jam BEFORE UPDATE OF model ON collections "
        "BEGIN SELECT RAISE(ABORT, 'jammed'); END",
    )
    before = all_columns(path)

    ran = reembed("--db", path, "--model", "m", range_rows=4, rows_at_once=1, first_rows=2)

    assert ran.code == 6
    assert all_columns(path) == before
    change(path, "DROP TRIGGER jam")
    assert reembed("--db", path, "--model", "m", range_rows=4).code == 0
    assert select(path, "SELECT model FROM collections") == [("m",)]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--missing-only"], "the collections of llm are moved as wholes"),
        (["--max-rows", "2", "--partial"], "the collections of llm are moved as wholes"),
        (["--skipped", "clear"], "llm can't search a collection with an item that has no vector"),
        (["--store", "llm", "--table", "x"], "--table does not go with --store llm"),
        (["--store", "ai-memory"], "is not an ai-memory database"),
    ],
)
def test_what_would_leave_a_collection_with_two_models_is_refused(
    flags: list[str], says: str, reembed: Call, tmp_path: Path
) -> None:
    path = tmp_path / "embeddings.db"
    collect(path, "notes", NOTES)
    before = all_columns(path)

    ran = reembed("--db", path, "--model", "m", *flags)

    assert ran.code != 0
    assert says in ran.error
    assert all_columns(path) == before


def test_another_database_is_no_llm(reembed: Call, tmp_path: Path) -> None:
    path = tmp_path / "m.db"
    change(path, "CREATE TABLE collections (id)", "CREATE TABLE embeddings (id)")

    ran = reembed("--db", path, "--store", "llm")

    assert (ran.code, "is no database of llm's: it has no tables" in ran.error) == (1, True)


def test_an_item_that_comes_in_the_middle_stops_the_replacement_and_the_rerun_has_it(
    reembed: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "embeddings.db"
    collect(path, "notes", NOTES)
    put = Replacement.transaction

    @contextmanager
    def add_and_begin(table: Replacement) -> Iterator[None]:
        monkeypatch.setattr(Replacement, "transaction", put)
        collect(path, "notes", [*NOTES, "one more"])
        with table.transaction():
            yield

    monkeypatch.setattr(Replacement, "transaction", add_and_begin)
    stopped = reembed("--db", path, "--model", "m")

    assert stopped.code == 6
    assert "1 items of the collection 'notes' were added or changed meanwhile" in stopped.error
    assert select(path, "SELECT model FROM collections") == [("letters",)]
    done = reembed("--db", path, "--model", "m")
    assert (done.code, done.texts) == (0, {"one more"})
    assert select(path, "SELECT model FROM collections") == [("m",)]
    assert select(path, "SELECT DISTINCT length(embedding) FROM embeddings") == [(32,)]


def test_a_rollback_is_refused_once_an_item_was_added_since(reembed: Call, tmp_path: Path) -> None:
    path = tmp_path / "embeddings.db"
    collect(path, "notes", NOTES)
    reembed("--db", path, "--model", "m")
    change(
        path,
        "INSERT INTO embeddings (collection_id, id, content, embedding) "
        "VALUES (1, 'new', 'text', zeroblob(32))",
    )
    before = all_columns(path)

    undone = reembed("rollback", "--db", path)

    assert undone.code == 1
    assert reembed("status", "--db", path).code == 0
    assert "1 items of the collection 'notes' were added or changed meanwhile" in undone.error
    assert all_columns(path) == before
