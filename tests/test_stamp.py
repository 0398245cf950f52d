"""Vectors that are the target model's already get its stamp, and stay."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inline_snapshot import snapshot

from reembed.transforms.embedders.fake import NOT_A_NUMBER, POISON, FakeEmbedder
from reembed.transforms.errors import StampError
from reembed.transforms.rows import Vectors
from reembed.transforms.stamp import WITNESSES, check_witnesses
from reembed.transforms.stores.codec import encode
from reembed.transforms.stores.demo import hashed_vector
from tests.conftest import Call, change, fake_plan, jam, make_store, memory, select, unjam
from tests.wording import line_with, wording

STAMP = "sentence-transformers/all-minilm-l6-v2#none"


class Counting(FakeEmbedder):
    """The fake embedder, which keeps the texts that it was given."""

    def __init__(self) -> None:
        super().__init__(8)
        self.texts: list[str] = []

    def embed(self, texts: Sequence[str]) -> Vectors:
        self.texts += texts
        return super().embed(texts)


def own(key: object, content: str | None = None) -> bytes:
    """The vector that the target model gives."""
    words = f"title {key} {content or f'content {key}'}"
    return encode(FakeEmbedder(8).embed([words])[0])


def stamped_store(path: Path, count: int) -> Path:
    """A store that keeps stamps, of rows with the target's vectors but without its stamp."""
    names = [f"{i:03}" for i in range(count)]
    rows = [memory(name, embedding=own(name), embedding_dim=8) for name in names]
    make_store(path, rows)
    change(
        path,
        "ALTER TABLE memories ADD COLUMN embedding_space TEXT",
        "UPDATE memories SET embedding_space = 'unknown#none' WHERE rowid % 2 = 0",
    )
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return stamped_store(tmp_path / "m.db", 10)


def put(path: Path, key: str, blob: bytes | None) -> None:
    value = "NULL" if blob is None else f"x'{blob.hex()}'"
    change(path, f"UPDATE memories SET embedding = {value} WHERE id = '{key}'")


def column(path: Path, name: str) -> dict[str, Any]:
    return dict(select(path, f"SELECT id, {name} FROM memories"))


def test_vectors_get_the_stamp_and_stay(reembed: Call, path: Path, tmp_path: Path) -> None:
    before = column(path, "embedding")

    done = reembed("--db", path, "--stamp-only", "--json", range_rows=3)

    assert (done.code, done.values["total"], done.values["reembedded"]) == (0, 10, 10)
    assert done.values["mode"] == "stamp only"
    assert wording(done.err, tmp_path) == snapshot(
        "reembed: PRE-FLIGHT — stored embedding dims: [8]; target: 8-dim (all-MiniLM-L6-v2 "
        "(8-dim, fake)); no vector is replaced; those without the target's stamp get it\n"
        "reembed: loading all-MiniLM-L6-v2 (8-dim, fake)\n"
    )
    assert column(path, "embedding") == before
    assert set(column(path, "embedding_space").values()) == {STAMP}
    assert set(column(path, "embedding_dim").values()) == {8}
    again = reembed("--db", path, "--stamp-only", "--json")
    assert (again.code, again.values["total"], again.texts) == (0, 0, set())
    assert reembed("verify", "--db", path).code == 0


def test_a_rollback_takes_the_stamps_back(reembed: Call, path: Path) -> None:
    before = select(path, "SELECT * FROM memories")
    assert reembed("--db", path, "--stamp-only").code == 0

    assert reembed("rollback", "--db", path).code == 0

    assert select(path, "SELECT * FROM memories") == before


def test_a_vector_without_the_first_byte_gets_it(reembed: Call, path: Path) -> None:
    before = column(path, "embedding")
    change(path, "UPDATE memories SET embedding = substr(embedding, 2), embedding_dim = NULL")

    assert reembed("--db", path, "--stamp-only").code == 0

    assert column(path, "embedding") == before
    assert set(column(path, "embedding_dim").values()) == {8}


def test_vectors_of_another_length_and_rows_without_one_are_left(
    reembed: Call, path: Path, tmp_path: Path
) -> None:
    put(path, "001", hashed_vector("x", 16))
    put(path, "002", None)
    put(path, "003", b"\x02" + own("003")[1:])  # Big-endian.
    before, stamps = column(path, "embedding"), column(path, "embedding_space")

    done = reembed("--db", path, "--stamp-only", "--json", range_rows=3)

    assert (done.code, done.values["reembedded"], done.values["skipped"]) == (0, 7, 1)
    assert wording(line_with("WARN", done.err), tmp_path) == snapshot(
        "WARN [RUN] skipped row 003: a big-endian vector (first byte 0x02) can't be read "
        "(previous vector kept)"
    )
    assert column(path, "embedding") == before
    left = {key: stamps[key] for key in ("001", "002", "003")}
    assert column(path, "embedding_space") == dict.fromkeys(before, STAMP) | left


def test_vectors_of_another_model_are_refused_and_nothing_is_left(
    reembed: Call, path: Path, tmp_path: Path
) -> None:
    put(path, "004", hashed_vector("another model", 8))
    before = path.read_bytes()

    done = reembed("--db", path, "--stamp-only", range_rows=3)

    assert (done.code, done.out) == (4, "")
    assert wording(done.error, tmp_path) == snapshot(
        "1 of 10 sampled rows hold vectors that are not this model's (lowest cosine 0.298), "
        "so they may not be stamped as its; re-embed the rows, or name the model that made "
        "them; nothing was written"
    )
    assert path.read_bytes() == before
    assert reembed("status", "--db", path, "--json").values["runs"] == []


def test_a_vector_over_an_edited_text_is_no_witness_for_the_model(
    reembed: Call, path: Path
) -> None:
    change(path, "UPDATE memories SET content = 'edited' WHERE id = '004'")

    assert reembed("--db", path, "--stamp-only").code == 4


@pytest.mark.parametrize("rows", [1, 64, 65, 300])
def test_a_sample_of_at_most_64_rows_from_all_over_the_table_is_embedded(
    tmp_path: Path, rows: int
) -> None:
    path = stamped_store(tmp_path / "m.db", rows)
    plan = fake_plan(path, rows=20, stamp_only=True)
    embedder = Counting()

    check_witnesses(plan.store, plan.ranges, embedder)

    assert min(rows, WITNESSES // 2) <= len(embedder.texts) <= WITNESSES
    found = [int(text.split()[1]) for text in embedder.texts]
    steps = np.diff([-1, *found, rows])
    assert steps.min() >= 1
    assert steps.max() <= 2 * rows // len(found) + 1


def test_rows_of_one_corner_of_a_large_table_have_witnesses_too(tmp_path: Path) -> None:
    path = stamped_store(tmp_path / "m.db", 300)
    change(path, f"UPDATE memories SET embedding_space = '{STAMP}' WHERE id NOT IN ('101', '102')")
    put(path, "102", hashed_vector("another model", 8))
    plan = fake_plan(path, rows=2, stamp_only=True)

    with pytest.raises(StampError) as refused:
        check_witnesses(plan.store, plan.ranges, FakeEmbedder(8))
    assert wording(refused, tmp_path) == snapshot(
        "1 of 2 sampled rows hold vectors that are not this model's (lowest cosine -0.066), "
        "so they may not be stamped as its; re-embed the rows, or name the model that made "
        "them; nothing was written"
    )


def test_one_stray_witness_is_enough(tmp_path: Path) -> None:
    path = stamped_store(tmp_path / "m.db", 10)
    put(path, "009", hashed_vector("another model", 8))
    plan = fake_plan(path, stamp_only=True)

    with pytest.raises(StampError) as refused:
        check_witnesses(plan.store, plan.ranges, FakeEmbedder(8))
    assert wording(refused, tmp_path) == snapshot(
        "1 of 10 sampled rows hold vectors that are not this model's (lowest cosine -0.240), "
        "so they may not be stamped as its; re-embed the rows, or name the model that made "
        "them; nothing was written"
    )


def test_vectors_that_differ_by_rounding_are_the_models(tmp_path: Path) -> None:
    """As those of a model that was run in half precision."""
    path = stamped_store(tmp_path / "m.db", 10)
    for key, blob in column(path, "embedding").items():
        halves = np.frombuffer(blob[1:], "<f4").astype(np.float16).astype(np.float32)
        put(path, key, encode(halves))
    plan = fake_plan(path, stamp_only=True)

    check_witnesses(plan.store, plan.ranges, FakeEmbedder(8))


def test_without_rows_to_stamp_nothing_is_embedded(tmp_path: Path) -> None:
    path = stamped_store(tmp_path / "m.db", 10)
    change(path, f"UPDATE memories SET embedding_space = '{STAMP}'")
    plan = fake_plan(path, stamp_only=True)
    embedder = Counting()

    check_witnesses(plan.store, plan.ranges, embedder)

    assert embedder.texts == []


def test_rows_that_can_not_be_embedded_are_neither_witnesses_nor_stamped(
    reembed: Call, path: Path
) -> None:
    change(path, "UPDATE memories SET encrypted_envelope = x'00' WHERE id = '004'")
    stamp = column(path, "embedding_space")["004"]

    done = reembed("--db", path, "--stamp-only", "--json")

    assert (done.code, done.values["skipped_by_cause"]) == (0, {"encrypted": 1})
    assert column(path, "embedding_space")["004"] == stamp


@pytest.mark.parametrize("word", [POISON, NOT_A_NUMBER])
def test_a_model_that_takes_no_text_of_the_sample_is_refused(
    path: Path, word: str, tmp_path: Path
) -> None:
    change(path, f"UPDATE memories SET content = '{word}'")
    plan = fake_plan(path, stamp_only=True)

    with pytest.raises(StampError) as refused:
        check_witnesses(plan.store, plan.ranges, FakeEmbedder(8))
    assert (
        wording(refused, tmp_path)
        == snapshot(
            {
                "POISON": (
                    "10 of 10 sampled rows hold vectors that are not this model's (it "
                    "takes none of the texts), so they may not be stamped as its; "
                    "re-embed the rows, or name the model that made them; nothing was "
                    "written"
                ),
                "NOT-A-NUMBER": (
                    "10 of 10 sampled rows hold vectors that are not this model's "
                    "(lowest cosine 0.000), so they may not be stamped as its; re-embed "
                    "the rows, or name the model that made them; nothing was written"
                ),
            }
        )[word]
    )


def test_a_text_that_the_model_rejects_is_no_witness(reembed: Call, path: Path) -> None:
    change(path, f"UPDATE memories SET content = '{POISON}' WHERE id = '004'")

    done = reembed("--db", path, "--stamp-only")

    assert done.code == 0
    assert set(column(path, "embedding_space").values()) == {STAMP}


def nearly(key: str) -> bytes:
    """A row's vector as another machine would make it."""
    return encode(np.frombuffer(own(key)[1:], "<f4") + np.float32(1e-4))


def test_a_try_that_failed_is_forgotten_where_vectors_are_new(
    reembed: Call, path: Path, tmp_path: Path
) -> None:
    """To stamp replaces no vector, also where another program made it since."""
    zeros = [f"{i:03}" for i in range(3, 9)]
    for key in zeros:
        put(path, key, encode(np.zeros(8)))
    failed = reembed("--db", path, "--stamp-only", range_rows=3)
    assert failed.code == 5
    assert wording(failed.error, tmp_path) == snapshot(
        "6 of 10 rows could not be embedded (6 unusable vector), and --max-skipped allows "
        "0.5 of them and never all; nothing is replaced now, and what is staged stays: check "
        "the model, then run again with --retry-skipped, or with a higher --max-skipped"
    )
    for key in [*zeros, "001"]:
        put(path, key, nearly(key))
    before = column(path, "embedding")

    done = reembed("--db", path, "--stamp-only", "--json", range_rows=3)

    assert (done.code, done.values["reembedded"], done.values["skipped"]) == (0, 10, 0)
    assert column(path, "embedding") == before
    assert set(column(path, "embedding_space").values()) == {STAMP}


def test_vectors_that_are_new_since_the_replacement_was_begun_are_left_and_named(
    reembed: Call, path: Path, tmp_path: Path
) -> None:
    """They were not there when the sample was looked at."""
    jam(path, "005")
    cut = reembed("--db", path, "--stamp-only", range_rows=2, rows_at_once=1, first_rows=2)
    unjam(path)
    other = hashed_vector("another model", 8)
    put(path, "007", other)
    change(
        path,
        # Row 0 has its stamp already, rows 7 and 10 have not.
        "UPDATE memories SET content = 'edited' WHERE id IN ('000', '008')",
        "INSERT INTO memories (id, tier, namespace, title, content, created_at, updated_at, "
        f"embedding) VALUES ('010', 'mid', 'global', 'new', 'new', '', '', x'{other.hex()}')",
    )
    before, stamps = column(path, "embedding"), column(path, "embedding_space")

    done = reembed("--db", path, "--stamp-only", "--json", range_rows=2)

    assert (cut.code, done.code) == (6, 0)
    assert (done.values["reembedded"], done.values["skipped"], done.values["remaining"]) == (
        7,
        4,
        0,
    )
    warned = [line for line in done.err.splitlines() if line.startswith("WARN")]
    assert wording("\n".join(warned), tmp_path) == snapshot(
        "WARN [RUN] skipped row 000: it is newer than the check of the sample; stamp it with "
        "another run (previous vector kept)\n"
        "WARN [RUN] skipped row 007: it is newer than the check of the sample; stamp it with "
        "another run (previous vector kept)\n"
        "WARN [RUN] skipped row 008: it is newer than the check of the sample; stamp it with "
        "another run (previous vector kept)\n"
        "WARN [RUN] skipped row 010: it is newer than the check of the sample; stamp it with "
        "another run (previous vector kept)"
    )
    assert column(path, "embedding") == before
    left = {key: stamps[key] for key in ("007", "008", "010")}
    assert column(path, "embedding_space") == dict.fromkeys(before, STAMP) | left

    # Another run looks at a sample of these.
    assert reembed("--db", path, "--stamp-only").code == 4


def test_stamps_are_taken_back_when_stamping_was_cut_off(reembed: Call, path: Path) -> None:
    before = select(path, "SELECT * FROM memories")
    jam(path, "005")
    cut = reembed("--db", path, "--stamp-only", range_rows=2, rows_at_once=1, first_rows=2)
    unjam(path)
    assert cut.code == 6
    assert select(path, "SELECT * FROM memories") != before

    assert reembed("rollback", "--db", path).code == 0

    assert select(path, "SELECT * FROM memories") == before
