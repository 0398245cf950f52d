"""The databases of llm, made and queried by llm itself."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from inline_snapshot import snapshot
from llm.embeddings import Collection
from llm.models import EmbeddingModel
from sqlite_utils import Database

from reembed.transforms.embedders.fake import POISON
from reembed.transforms.embedders.models import MINILM
from reembed.transforms.stores import Replacement
from tests.conftest import Call, all_columns, change, select
from tests.wording import line_with, wording


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
        from reembed.transforms.embedders.hub import fetch_model
        from reembed.transforms.embedders.loading import load_model
        from reembed.transforms.embedders.models import find_model

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


@pytest.mark.system
def test_llms_own_search_finds_in_a_moved_collection_what_it_finds_in_a_fresh_one(
    reembed: Call, tmp_path: Path
) -> None:
    path, fresh = tmp_path / "embeddings.db", tmp_path / "fresh.db"
    collect(path, "notes", NOTES)
    hashes = "SELECT id, content_hash, content, updated FROM embeddings"
    before = select(path, hashes)

    assert reembed("--db", path, "--model", MINILM, real=True).code == 0

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
    assert line_with("NOTE — the collection", ran.err) == snapshot(
        "reembed: NOTE — the collection 'half' keeps its model and its vectors: 2 of its items "
        "have no stored content to embed"
    )
    assert wording(line_with('[2, "i2"]', ran.err), tmp_path) == snapshot(
        'WARN [RUN] skipped row [2, "i2"]: it has no text (NULL) (previous vector kept)'
    )
    assert select(path, "SELECT name, model FROM collections") == [
        ("full", "m"),
        ("half", "letters"),
    ]
    assert select(path, "SELECT * FROM embeddings WHERE collection_id = 2") == before


@pytest.mark.parametrize(
    ("edit", "refusal", "note"),
    [
        (
            "content = CAST(x'ff41' AS TEXT)",
            snapshot(
                "the collection 'half' keeps its model and its vectors: 1 of its items have no "
                "content that could be embedded (0 have none stored; of the others, it or the id "
                "is not UTF-8, or it is over 1,000,000 bytes) ('i1'), so nothing is replaced; "
                "store their content (llm embed-multi --store) or delete them, and run again"
            ),
            snapshot(
                "reembed: NOTE — the collection 'half' keeps its model and its vectors: 1 of its "
                "items have no content that could be embedded (0 have none stored; of the others, "
                "it or the id is not UTF-8, or it is over 1,000,000 bytes)"
            ),
        ),
        (
            "content = printf('%.1000001c', 'x')",
            snapshot(
                "the collection 'half' keeps its model and its vectors: 1 of its items have no "
                "content that could be embedded (0 have none stored; of the others, it or the id "
                "is not UTF-8, or it is over 1,000,000 bytes) ('i1'), so nothing is replaced; "
                "store their content (llm embed-multi --store) or delete them, and run again"
            ),
            snapshot(
                "reembed: NOTE — the collection 'half' keeps its model and its vectors: 1 of its "
                "items have no content that could be embedded (0 have none stored; of the others, "
                "it or the id is not UTF-8, or it is over 1,000,000 bytes)"
            ),
        ),
        (
            "id = CAST(x'ff' AS TEXT)",
            snapshot(
                "the collection 'half' keeps its model and its vectors: 1 of its items have no "
                "content that could be embedded (0 have none stored; of the others, it or the id "
                "is not UTF-8, or it is over 1,000,000 bytes) ('�'), so nothing is replaced; "
                "store their content (llm embed-multi --store) or delete them, and run again"
            ),
            snapshot(
                "reembed: NOTE — the collection 'half' keeps its model and its vectors: 1 of its "
                "items have no content that could be embedded (0 have none stored; of the others, "
                "it or the id is not UTF-8, or it is over 1,000,000 bytes)"
            ),
        ),
    ],
)
def test_a_collection_with_content_that_can_not_be_embedded_stays(
    edit: str, refusal: str, note: str, reembed: Call, tmp_path: Path
) -> None:
    path = tmp_path / "embeddings.db"
    collect(path, "full", NOTES)
    collect(path, "half", NOTES[:2])
    change(path, f"UPDATE embeddings SET {edit} WHERE id = 'i1' AND collection_id = 2")
    half = "SELECT embedding FROM embeddings WHERE collection_id = 2"
    before = select(path, half)

    named = reembed("--db", path, "--model", "m", "--namespace", "half")
    ran = reembed("--db", path, "--model", "m", "--json")

    assert named.code == 5
    assert named.error == refusal
    assert (ran.code, ran.values["reembedded"]) == (0, len(NOTES))
    assert line_with("NOTE — the collection", ran.err) == note
    models = [("full", "m"), ("half", "letters")]
    assert select(path, "SELECT name, model FROM collections") == models
    assert select(path, half) == before
    assert reembed("verify", "--db", path).code == 0


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
    assert ran.error == snapshot(
        "the collection 'half' keeps its model and its vectors: 29 of its items have no stored "
        "content to embed ('i1', 'i10', 'i11', 'i12', 'i13', 'i14', 'i15', 'i16', 'i17', 'i18', "
        "'i19', 'i2', 'i20', 'i21', 'i22', 'i23', 'i24', 'i25', 'i26', 'i27' and 9 more), so "
        "nothing is replaced; store their content (llm embed-multi --store) or delete them, and "
        "run again"
    )
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

    assert (wrong.code, wrong.out) == (2, "")
    assert wording(wrong.error, tmp_path) == snapshot(
        "TMP/embeddings.db has no collection 'note' (like it: 'notes'); correct --namespace"
    )
    assert empty.code == 0
    assert line_with("'empty'", empty.err) == snapshot(
        "reembed: the collection 'empty' has no rows; nothing to do"
    )
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
        "WHEN NOT EXISTS (SELECT 1 FROM embeddings WHERE length(embedding) = 20) "
        "BEGIN SELECT RAISE(ABORT, 'jammed'); END",  # At the end, not when one item is tried.
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
        (
            ["--missing-only"],
            snapshot(
                "the collections of llm are moved as wholes, so only --namespace chooses some of "
                "TMP/embeddings.db; leave out what chooses rows"
            ),
        ),
        (
            ["--max-rows", "2", "--partial"],
            snapshot(
                "the collections of llm are moved as wholes, so only --namespace chooses some of "
                "TMP/embeddings.db; leave out what chooses rows"
            ),
        ),
        (
            ["--skipped", "clear"],
            snapshot(
                "--skipped clear can't be done in TMP/embeddings.db: llm can't search a "
                "collection with an item that has no vector"
            ),
        ),
        (
            ["--store", "llm", "--table", "x"],
            snapshot("--table does not go with --store llm, whose columns are known; leave it out"),
        ),
        (
            ["--store", "ai-memory"],
            snapshot(
                "TMP/embeddings.db is not an ai-memory database: it has no table 'memories' with "
                "id, namespace, title and content (its tables are _sqlite_migrations, "
                "collections, embeddings); name the right file with --db"
            ),
        ),
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
    assert wording(ran.error, tmp_path) == says
    assert all_columns(path) == before


def test_another_database_is_no_llm(reembed: Call, tmp_path: Path) -> None:
    path = tmp_path / "m.db"
    change(path, "CREATE TABLE collections (id)", "CREATE TABLE embeddings (id)")

    ran = reembed("--db", path, "--store", "llm")

    assert ran.code == 1
    assert wording(ran.error, tmp_path) == snapshot(
        "TMP/m.db is no database of llm's: it has no tables collections and embeddings with the "
        "columns of llm 0.12 or later; name the right file with --db"
    )


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
    assert wording(stopped.error, tmp_path) == snapshot(
        "1 items of the collection 'notes' were added or changed meanwhile and have vectors of "
        "another model than m, so nothing was written; stop what adds them if it happens again; "
        "the replacement by run RUN (to m (8-dim)) is incomplete: of ranges 0-0, none hold new "
        "vectors, and 0 were being written: run again to finish it, or undo it with reembed "
        "rollback"
    )
    assert select(path, "SELECT model FROM collections") == [("letters",)]
    done = reembed("--db", path, "--model", "m")
    assert (done.code, done.texts) == (0, {"one more"})
    assert select(path, "SELECT model FROM collections") == [("m",)]
    assert select(path, "SELECT DISTINCT length(embedding) FROM embeddings") == [(32,)]


def added(key: str, collection: int = 1) -> str:
    """The statement that adds an item as llm would, with a vector of the new model."""
    return (
        "INSERT INTO embeddings (collection_id, id, content, embedding) "
        f"VALUES ({collection}, '{key}', 'text', zeroblob(32))"
    )


IN_THE_WAY = {
    "added": (
        added("new"),
        "new",
        "it was added since",
        snapshot(
            '1 rows are in the way (the first, [1, "new"]: it was added since) of putting back '
            "'one' in TMP/embeddings.db, where all rows must have one model, so 6 others keep "
            "their new vectors; delete these items and roll back again, or re-embed the "
            "collection with its former model (--namespace); the others are put back"
        ),
        snapshot('WARN [RUN] row [1, "new"] is in the way: it was added since'),
    ),
    "added without content": (
        "INSERT INTO embeddings (collection_id, id, embedding) VALUES (1, 'new', zeroblob(32))",
        "new",
        "it was added since",
        snapshot(
            '1 rows are in the way (the first, [1, "new"]: it was added since) of putting back '
            "'one' in TMP/embeddings.db, where all rows must have one model, so 6 others keep "
            "their new vectors; delete these items and roll back again, or re-embed the "
            "collection with its former model (--namespace); the others are put back"
        ),
        snapshot('WARN [RUN] row [1, "new"] is in the way: it was added since'),
    ),
    "embedded anew": (
        f"UPDATE embeddings SET content = 'x', embedding = x'{'3f' * 32}' "
        "WHERE id = 'i2' AND collection_id = 1",
        "i2",
        "its vector was changed by another program since",
        snapshot(
            '1 rows are in the way (the first, [1, "i2"]: its vector was changed by another '
            "program since) of putting back 'one' in TMP/embeddings.db, where all rows must have "
            "one model, so 5 others keep their new vectors; delete these items and roll back "
            "again, or re-embed the collection with its former model (--namespace); the others "
            "are put back"
        ),
        snapshot(
            'WARN [RUN] row [1, "i2"] is in the way: its vector was changed by another program '
            "since"
        ),
    ),
    "edited": (
        "UPDATE embeddings SET content = 'x' WHERE id = 'i2' AND collection_id = 1",
        "i2",
        "its text was edited since",
        snapshot(
            '1 rows are in the way (the first, [1, "i2"]: its text was edited since) of putting '
            "back 'one' in TMP/embeddings.db, where all rows must have one model, so 5 others "
            "keep their new vectors; delete these items and roll back again, or re-embed the "
            "collection with its former model (--namespace); the others are put back"
        ),
        snapshot('WARN [RUN] row [1, "i2"] is in the way: its text was edited since'),
    ),
}


@pytest.mark.parametrize("what", IN_THE_WAY)
def test_a_collection_that_can_not_go_back_as_a_whole_holds_back_no_other(
    what: str, reembed: Call, tmp_path: Path
) -> None:
    statement, key, why, said, named = IN_THE_WAY[what]
    path = tmp_path / "embeddings.db"
    collect(path, "one", NOTES)
    collect(path, "two", NOTES[:4])
    before = all_columns(path)
    run_id = reembed("--db", path, "--model", "m", "--json").values["run_id"]
    change(path, statement)

    undone = reembed("rollback", "--db", path, "--json")

    assert (undone.code, undone.values["state"]) == (6, "partly rolled back")
    assert undone.values["in_the_way"] == {"one": {f'[1, "{key}"]': why}}
    assert (undone.values["restored"], undone.values["left"]) == (4, 6)
    assert wording(undone.error, tmp_path) == said
    assert wording(line_with("is in the way", undone.err), tmp_path) == named
    query = "SELECT name, model FROM collections"
    assert select(path, query) == [("one", "m"), ("two", "letters")]
    lengths = "SELECT DISTINCT collection_id, length(embedding) FROM embeddings ORDER BY 1"
    assert select(path, lengths) == [(1, 32), (2, 20)]

    # Neither what was put back nor what has happened since is taken for a fault.
    status = reembed("status", "--db", path, "--json")
    assert (status.code, status.values["runs"][0]["state"]) == (0, "partly rolled back")
    assert wording(status.values["runs"][0]["next"], tmp_path) == snapshot(
        "reembed rollback undoes the rest, once the rows named in "
        "TMP/embeddings.db.reembed/RUN/left.jsonl allow it"
    )
    checked = reembed("verify", "--db", path, "--json")
    assert checked.values["put_back"] == 4
    assert checked.code == (1 if what == "edited" else 0)
    # Without a change it says the same again.
    again = reembed("rollback", "--db", path, "--json")
    assert (again.code, again.values["state"]) == (6, "partly rolled back")
    assert reembed("cleanup", "--db", path, "--json").values["removed"] == []

    change(path, f"DELETE FROM embeddings WHERE collection_id = 1 AND id = '{key}'")
    done = reembed("rollback", "--db", path, "--json")
    assert (done.code, done.values["state"], done.values["run_id"]) == (0, "rolled back", run_id)
    gone = (b"integer", 1, b"text", key.encode())
    expected = [row for row in before["embeddings"] if row[:4] != gone]
    assert all_columns(path)["embeddings"] == expected
    assert select(path, query) == [("one", "letters"), ("two", "letters")]


def test_only_collections_that_were_put_back_are_verified_as_rolled_back(
    reembed: Call, tmp_path: Path
) -> None:
    path = tmp_path / "embeddings.db"
    collect(path, "one", NOTES)
    collect(path, "two", NOTES[:4])
    where = "WHERE collection_id = 1 AND id = 'i1'"
    [(former,)] = select(path, f"SELECT hex(embedding) FROM embeddings {where}")
    reembed("--db", path, "--model", "letters")
    change(
        path,
        f"UPDATE embeddings SET embedding = x'{former}' {where}",
        added("late"),
    )

    assert reembed("rollback", "--db", path, "--json").values["state"] == "partly rolled back"
    checked = reembed("verify", "--db", path, "--json")

    assert (checked.code, checked.values["put_back"]) == (1, 4)
    assert checked.values["wrong_ids"]["overwritten"] == ['[1, "i1"]']


def test_a_collection_may_be_moved_back_instead_with_its_former_model(
    reembed: Call, tmp_path: Path
) -> None:
    path = tmp_path / "embeddings.db"
    collect(path, "one", NOTES)
    collect(path, "two", NOTES[:4])
    reembed("--db", path, "--model", "m")
    change(path, added("new"))
    assert reembed("rollback", "--db", path).code == 6

    moved = reembed("--db", path, "--model", "letters", "--dim", "5", "--namespace", "one")

    assert moved.code == 0
    models = select(path, "SELECT name, model FROM collections")
    assert models == [("one", "letters"), ("two", "letters")]
    lengths = "SELECT DISTINCT length(embedding) FROM embeddings"
    assert select(path, lengths) == [(20,)]


def test_a_collection_from_which_an_item_was_deleted_goes_back(
    reembed: Call, tmp_path: Path
) -> None:
    path = tmp_path / "embeddings.db"
    collect(path, "notes", NOTES)
    reembed("--db", path, "--model", "m")
    change(path, "DELETE FROM embeddings WHERE id = 'i3'")

    undone = reembed("rollback", "--db", path, "--json")

    assert (undone.code, undone.values["restored"], undone.values["left"]) == (0, 5, 1)
    assert undone.values["left_by_reason"] == {"it was deleted since": 1}
    assert select(path, "SELECT model FROM collections") == [("letters",)]


def test_what_a_collection_gets_after_it_went_back_is_in_nobodys_way(
    reembed: Call, tmp_path: Path
) -> None:
    path = tmp_path / "embeddings.db"
    for name in ("one", "two"):
        collect(path, name, NOTES)
    reembed("--db", path, "--model", "m")
    change(path, added("new"))
    assert reembed("rollback", "--db", path).code == 6
    collect(path, "two", [*NOTES[:5], "a changed recipe", "one more"])  # By llm, as it was before.
    change(path, "DELETE FROM embeddings WHERE id = 'new'")
    after = select(path, "SELECT * FROM embeddings WHERE collection_id = 2 ORDER BY id")

    undone = reembed("rollback", "--db", path, "--json")

    assert (undone.code, undone.values["state"]) == (0, "rolled back")
    assert select(path, "SELECT DISTINCT model FROM collections") == [("letters",)]
    assert select(path, "SELECT * FROM embeddings WHERE collection_id = 2 ORDER BY id") == after


def test_an_item_that_came_while_the_run_ended_is_named_if_it_is_in_the_way(
    reembed: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run has embedded it too, so that its previous vector is one of the new model."""
    path = tmp_path / "embeddings.db"
    for name in ("one", "two"):
        collect(path, name, NOTES)
    put = Replacement.transaction

    @contextmanager
    def replace_and_add(table: Replacement) -> Iterator[None]:
        monkeypatch.setattr(Replacement, "transaction", put)
        with table.transaction():
            yield
        change(path, added("late"))

    monkeypatch.setattr(Replacement, "transaction", replace_and_add)
    assert reembed("--db", path, "--model", "m", "--json").values["reembedded"] == 13

    undone = reembed("rollback", "--db", path, "--json")

    assert (undone.code, undone.values["state"]) == (6, "partly rolled back")
    assert undone.values["in_the_way"] == {"one": {'[1, "late"]': "it was added since"}}
    change(path, "DELETE FROM embeddings WHERE id = 'late'")
    assert reembed("rollback", "--db", path).code == 0
    assert select(path, "SELECT DISTINCT model FROM collections") == [("letters",)]


@pytest.mark.parametrize("cut", ["before", "after"])
def test_a_rollback_of_collections_that_was_cut_off_is_repeated(
    cut: str, reembed: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "embeddings.db"
    for name in ("one", "two"):
        collect(path, name, NOTES)
    before = all_columns(path)
    reembed("--db", path, "--model", "m")
    put = Replacement.transaction

    @contextmanager
    def die(table: Replacement) -> Iterator[None]:
        monkeypatch.setattr(Replacement, "transaction", put)
        if cut == "before":
            raise KeyboardInterrupt
        with table.transaction():
            yield
        raise KeyboardInterrupt

    monkeypatch.setattr(Replacement, "transaction", die)
    with pytest.raises(KeyboardInterrupt):
        reembed("rollback", "--db", path)
    assert reembed("status", "--db", path).code == 6

    assert reembed("rollback", "--db", path, "--json").values["state"] == "rolled back"
    assert all_columns(path) == before


def test_skipped_items_are_retried_in_the_run_that_they_have_stopped(
    reembed: Call, tmp_path: Path
) -> None:
    path = tmp_path / "embeddings.db"
    collect(path, "notes", [*NOTES, POISON])

    stopped = reembed("--db", path, "--model", "m")
    same = reembed("--db", path, "--model", "m")

    assert (stopped.code, same.code) == (5, 5)
    assert wording(stopped.error, tmp_path) == snapshot(
        "1 of 7 rows could not be embedded (1 rejected by the model), and all rows are replaced "
        "here or none; nothing is replaced now, and what is staged stays: check the model, then "
        "run again with --retry-skipped, or with these rows edited or deleted"
    )
    done = reembed("--db", path, "--model", "m", "--retry-skipped", lenient=1)
    assert (done.code, done.texts) == (0, {POISON})
    ended = reembed("--db", path, "--model", "m", "--retry-skipped")
    assert ended.code == 2
    assert wording(ended.error, tmp_path) == snapshot(
        "the collections of llm are moved as wholes, so only --namespace chooses some of "
        "TMP/embeddings.db; leave out what chooses rows"
    )


def test_a_trigger_on_collections_is_named_and_what_it_changes_is_embedded_again(
    reembed: Call, tmp_path: Path
) -> None:
    path = tmp_path / "embeddings.db"
    for name in ("one", "two"):
        collect(path, name, NOTES)
    change(
        path,
        "CREATE TRIGGER edits AFTER UPDATE OF model ON collections WHEN new.id = 2 BEGIN "
        "UPDATE embeddings SET content = content || '!' WHERE collection_id = 2; END",
    )

    ran = reembed("--db", path, "--model", "m")

    assert line_with("the trigger edits", ran.err) == snapshot(
        "reembed: NOTE — replacing a vector fires the trigger edits, which also writes to "
        "embeddings; a rollback fires it as well"
    )
    assert ran.code == 0
    assert ran.texts == {*NOTES, *(f"{note}!" for note in NOTES)}
    assert reembed("verify", "--db", path).code == 0
