"""Which rows a run is about, how much of it is done at a time, and what becomes of failures.

Each mode is run as a user runs it, and combined with what other programs do between two tries.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
from inline_snapshot import snapshot

from reembed.transforms.embedders.fake import NOT_A_NUMBER, POISON, FakeEmbedder
from reembed.transforms.rows import Vectors
from reembed.transforms.stores import Replacement
from reembed.transforms.stores.codec import encode
from reembed.transforms.stores.demo import Memory, hashed_vector
from tests import fake_program
from tests.conftest import (
    Call,
    change,
    half_replace,
    jam,
    kept_files,
    losing_writes,
    make_store,
    memory,
    select,
    unjam,
    unpack,
)
from tests.wording import line_with, wording

pytestmark = pytest.mark.system

WIDE = os.environ.get("HYPOTHESIS_PROFILE") == "wide"
"""Whether more of what is drawn at random is looked at."""

STAMP = "sentence-transformers/all-minilm-l6-v2#none"
ADD_STAMPS = "ALTER TABLE memories ADD COLUMN embedding_space TEXT"
NEW_ROW = (
    "INSERT INTO memories (id, tier, namespace, title, content, created_at, updated_at) "
    "VALUES ('{id}', 'mid', 'global', 'title', '{content}', '', '')"
)
STOP = (
    "INSERT INTO signed_events (id, agent_id, event_type, payload_hash, timestamp, sequence) "
    "VALUES ('stop{at}', 'a', 'substrate.record_stop', x'00', '', {at})"
)
RESUME = (
    "INSERT INTO signed_events (id, agent_id, event_type, payload_hash, timestamp, sequence) "
    "VALUES ('resume{at}', 'a', 'substrate.record_resume', x'00', '', {at})"
)


def former(key: object, dimension: int = 8) -> bytes:
    """The vector that a row has from another model."""
    return hashed_vector(f"{key}", dimension)


def text(key: object, content: str | None = None) -> str:
    return f"title {key} {content or f'content {key}'}"


def texts(*keys: object) -> set[str]:
    return {text(key) for key in keys}


def vector(words: str, dimension: int = 8) -> bytes:
    """What a row with this text is to hold."""
    return encode(FakeEmbedder(dimension).embed([words.replace(POISON, "")])[0])


def new(*keys: object) -> dict[str, bytes]:
    return {f"{key}": vector(text(key)) for key in keys}


def old(*keys: object) -> dict[str, bytes]:
    return {f"{key}": former(key) for key in keys}


def store(tmp_path: Path, rows: Sequence[Memory], *, stamps: bool = False) -> Path:
    path = make_store(tmp_path / "m.db", rows)
    if stamps:
        change(path, ADD_STAMPS)
    return path


def embedded_rows(*keys: object, **more: Any) -> list[Memory]:
    """Rows that have a former model's vectors."""
    return [memory(f"{key}", embedding=former(key), embedding_dim=8, **more) for key in keys]


def stored(path: Path) -> dict[str, Any]:
    return dict(select(path, "SELECT id, embedding FROM memories"))


def stamps(path: Path) -> dict[str, Any]:
    return dict(select(path, "SELECT id, embedding_space FROM memories"))


def put(path: Path, key: str, blob: bytes | None) -> None:
    """Give a row another vector, as another program would."""
    value = "NULL" if blob is None else f"x'{blob.hex()}'"
    change(path, f"UPDATE memories SET embedding = {value} WHERE id = '{key}'")


def runs(path: Path) -> list[Path]:
    root = path.with_name("m.db.reembed")
    return sorted(place for place in root.iterdir() if place.name != "lock")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def meanwhile(monkeypatch: pytest.MonkeyPatch, path: Path, word: str, *statements: str) -> None:
    """Change the store while the first text with this word is embedded, as another program does."""
    embed, left = fake_program.Slow.embed, list(statements)

    def embed_and_change(self: fake_program.Slow, some: Sequence[str]) -> Vectors:
        if left and any(word in text for text in some):
            change(path, *left)
            left.clear()
        return embed(self, some)

    monkeypatch.setattr(fake_program.Slow, "embed", embed_and_change)


# --missing-only


def test_missing_only_embeds_rows_without_a_vector_and_leaves_all_others(
    reembed: Call, tmp_path: Path
) -> None:
    reembed = partial(reembed, through_beam=True)
    path = store(tmp_path, [*embedded_rows(0, 1, 2), memory("3"), memory("4")])

    done = reembed("--db", path, "--missing-only", "--json")

    assert (done.code, done.texts) == (0, texts(3, 4))
    assert {name: done.values[name] for name in ("total", "reembedded", "mode")} == {
        "total": 2,
        "reembedded": 2,
        "mode": "missing only",
    }
    assert stored(path) == old(0, 1, 2) | new(3, 4)
    assert line_with("PRE-FLIGHT", done.err) == snapshot(
        "reembed: PRE-FLIGHT — stored embedding dims: [8]; target: 8-dim (all-MiniLM-L6-v2 "
        "(8-dim, fake)); only rows without a vector get one"
    )

    again = reembed("--db", path, "--missing-only", "--json")
    assert (again.code, again.texts, again.values["total"]) == (0, set(), 0)
    assert reembed("verify", "--db", path).code == 0


def test_missing_only_on_the_originals_store(reembed: Call, original: tuple[str, Path]) -> None:
    version, path = original
    had = dict(select(path, "SELECT id, embedding FROM memories WHERE embedding IS NOT NULL"))

    done = reembed("--db", path, "--missing-only", "--dim", "384", "--json")

    assert done.code == 0
    assert done.values["total"] == {"v57": 130, "v80": 116}[version]
    now = stored(path)
    assert {key: now[key] for key in had} == had
    assert None not in now.values()


def test_a_row_that_got_a_vector_between_tries_keeps_it_with_missing_only(
    reembed: Call, tmp_path: Path
) -> None:
    path = store(tmp_path, [*embedded_rows(0), *(memory(f"{i}") for i in range(1, 7))])
    reembed("--db", path, "--missing-only", "--max-rows", "3", range_rows=2)
    put(path, "2", former("daemon"))
    put(path, "5", former("daemon"))
    put(path, "0", None)
    change(path, "UPDATE memories SET content = 'edited' WHERE id = '3'")

    done = reembed("--db", path, "--missing-only", "--json", range_rows=2)

    assert (done.code, done.values["remaining"]) == (0, 0)
    assert done.texts == {*texts(0, 4, 6), text(3, "edited")}
    assert stored(path) == new(0, 1, 4, 6) | {
        "2": former("daemon"),
        "3": vector(text(3, "edited")),
        "5": former("daemon"),
    }


def test_a_row_edited_after_it_got_its_vector_is_embedded_again_with_missing_only(
    reembed: Call, tmp_path: Path
) -> None:
    """It has a vector now, so that it is meant no more: but that one is the run's own."""
    path = store(tmp_path, [memory(f"{i}") for i in range(10)])
    half_replace(reembed, path, "--missing-only")
    change(path, "UPDATE memories SET content = 'edited' WHERE id IN ('0', '6')")
    put(path, "1", former("daemon"))
    put(path, "7", former("daemon"))

    done = reembed("--db", path, "--missing-only", "--json")

    assert (done.code, done.values["remaining"]) == (0, 0)
    assert done.texts == {text(0, "edited"), text(6, "edited")}
    edited = {key: vector(text(key, "edited")) for key in "06"}
    assert stored(path) == new(1, 2, 3, 4, 5, 7, 8, 9) | edited


# --skip-current-space


def test_skip_current_space_goes_by_stamp_and_length(reembed: Call, tmp_path: Path) -> None:
    path = store(tmp_path, [memory(f"{i}") for i in range(8)], stamps=True)
    rows: Mapping[str, tuple[bytes | None, str | None]] = {
        "0": (former(0), STAMP),
        "1": (former(1)[1:], STAMP),  # Without the first byte, as older versions wrote it.
        "2": (former(2, 7), STAMP),
        "3": (former(3), "former#none"),
        "4": (former(4), None),
        "5": (None, STAMP),
        "6": (None, None),
        "7": (b"", STAMP),
    }
    for key, (blob, stamp) in rows.items():
        put(path, key, blob)
        change(path, f"UPDATE memories SET embedding_space = {stamp!r} WHERE id = '{key}'") if (
            stamp
        ) else None

    done = reembed("--db", path, "--skip-current-space", "--json", range_rows=3)

    assert (done.code, done.texts) == (0, texts(*range(2, 8)))
    assert (done.values["total"], done.values["reembedded"]) == (6, 6)
    assert stored(path) == {"0": former(0), "1": former(1)[1:]} | new(*range(2, 8))
    assert set(stamps(path).values()) == {STAMP}
    again = reembed("--db", path, "--skip-current-space", "--json")
    assert (again.code, again.texts, again.values["total"]) == (0, set(), 0)


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        (
            "--skip-current-space",
            snapshot(
                "TMP/m.db keeps no stamps (it has no column embedding_space), so it can't be told "
                "which model made a vector; run without --skip-current-space"
            ),
        ),
        (
            "--stamp-only",
            snapshot(
                "TMP/m.db keeps no stamps (it has no column embedding_space), so it can't be told "
                "which model made a vector; run without --stamp-only"
            ),
        ),
    ],
)
def test_a_store_without_stamps_is_refused(
    reembed: Call, tmp_path: Path, flag: str, said: str
) -> None:
    path = store(tmp_path, embedded_rows(0, 1))
    before = path.read_bytes()

    for dry in ((), ("--dry-run",)):
        done = reembed("--db", path, flag, *dry)

        assert (done.code, done.out, done.texts) == (4, "", set())
        assert wording(done.error, tmp_path) == said
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (before, [path])


def test_an_edit_between_tries_is_seen_with_skip_current_space(
    reembed: Call, tmp_path: Path
) -> None:
    reembed = partial(reembed, through_beam=True)
    path = store(tmp_path, embedded_rows(*range(10)), stamps=True)
    assert half_replace(reembed, path, "--skip-current-space").code == 6
    change(
        path,
        # The daemon has edited a row with the new model, one with the former, one with none.
        "UPDATE memories SET content = 'edited' WHERE id IN ('0', '1', '8')",
        f"UPDATE memories SET embedding = x'{former('new').hex()}' WHERE id IN ('0', '9')",
        f"UPDATE memories SET embedding_space = '{STAMP}' WHERE id = '9'",
        f"UPDATE memories SET embedding = x'{former('f').hex()}', "
        "embedding_space = 'former#none' WHERE id = '1'",
        NEW_ROW.format(id="95", content="new"),
    )

    done = reembed("--db", path, "--skip-current-space", "--json")

    assert (done.code, done.values["remaining"]) == (0, 0)
    # Row 0 has a text of the daemon's and the stamp of the model, and so its vector.
    assert done.texts == {text(1, "edited"), text(8, "edited"), "title new"}
    assert stored(path) == new(*range(2, 8), 9) | {
        "0": former("new"),
        "1": vector(text(1, "edited")),
        "8": vector(text(8, "edited")),
        "95": vector("title new"),
    }
    assert set(stamps(path).values()) == {STAMP}


def test_a_run_stamps_what_it_writes_and_takes_the_stamp_with_the_vector(
    reembed: Call, tmp_path: Path
) -> None:
    rows = [*embedded_rows(0, 1), *embedded_rows(2, content=POISON)]
    path = store(tmp_path, rows, stamps=True)
    change(path, "UPDATE memories SET embedding_space = 'former#none'")

    reembed("--db", path)
    assert stamps(path) == {"0": STAMP, "1": STAMP, "2": "former#none"}

    reembed("--db", path, "--skipped", "clear")
    assert stamps(path) == {"0": STAMP, "1": STAMP, "2": None}
    assert select(path, "SELECT embedding, embedding_dim FROM memories WHERE id = '2'") == [
        (None, None)
    ]


# --max-rows and --partial


def test_partial_replaces_each_part_at_once_and_says_so_until_all_is_done(
    reembed: Call, tmp_path: Path
) -> None:
    reembed = partial(reembed, through_beam=True)
    path = store(tmp_path, embedded_rows(*range(10)))
    part = ("--db", path, "--max-rows", "4", "--partial", "--json")

    first = reembed(*part, range_rows=3)
    assert (first.code, first.texts) == (6, texts(*range(4)))
    assert wording(first.error, tmp_path) == snapshot(
        "6 rows remain, so the replacement is incomplete; run again to finish it, or undo it with "
        "reembed rollback"
    )
    assert (first.values["reembedded"], first.values["remaining"]) == (4, 6)
    assert first.values["in_old_space"] == 6
    assert stored(path) == new(*range(4)) | old(*range(4, 10))
    assert [reembed(command, "--db", path).code for command in ("status", "verify")] == [6, 6]

    second = reembed(*part, range_rows=3)
    assert (second.code, second.texts) == (6, texts(*range(4, 8)))
    assert stored(path) == new(*range(8)) | old(8, 9)

    third = reembed(*part, range_rows=3)
    assert (third.code, third.texts) == (0, texts(8, 9))
    assert (third.values["reembedded"], third.values["in_old_space"]) == (10, 0)
    assert stored(path) == new(*range(10))
    assert [reembed(command, "--db", path).code for command in ("status", "verify")] == [0, 0]
    assert reembed("rollback", "--db", path).code == 0
    assert stored(path) == old(*range(10))


def test_a_partial_replacement_is_undone_as_a_whole(reembed: Call, tmp_path: Path) -> None:
    path = store(tmp_path, embedded_rows(*range(6)))
    for _ in range(2):
        reembed("--db", path, "--max-rows", "2", "--partial", range_rows=3)

    assert reembed("rollback", "--db", path).code == 0

    assert stored(path) == old(*range(6))


@pytest.mark.parametrize("flags", [(), ("--max-rows", "2")], ids=["the rest", "two rows"])
def test_a_partial_replacement_goes_on_without_the_flag(
    reembed: Call, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    """What is staged is replaced: the store holds two models' vectors already."""
    path = store(tmp_path, embedded_rows(*range(10)))
    reembed("--db", path, "--max-rows", "4", "--partial", range_rows=3)

    done = reembed("--db", path, *flags, range_rows=3)

    if flags:
        assert (done.code, done.texts) == (6, texts(4, 5))
        assert wording(done.error, tmp_path) == snapshot(
            "4 rows remain, so the replacement is incomplete; run again to finish it, or undo it "
            "with reembed rollback"
        )
        assert "nothing is replaced" not in done.out
        assert stored(path) == new(*range(6)) | old(*range(6, 10))
    else:
        assert (done.code, done.texts) == (0, texts(*range(4, 10)))
        assert stored(path) == new(*range(10))


def test_edits_between_the_parts_never_leave_a_vector_of_another_text(
    reembed: Call, tmp_path: Path
) -> None:
    path = store(tmp_path, embedded_rows(*range(10)))
    part = ("--db", path, "--max-rows", "4", "--partial", "--json")
    reembed(*part, range_rows=3)
    change(
        path,
        "UPDATE memories SET content = 'edited' WHERE id IN ('0', '1', '5')",
        "DELETE FROM memories WHERE id IN ('2', '9')",
        NEW_ROW.format(id="95", content="new"),
    )
    put(path, "3", former(3))
    codes, seen = [], set[str]()
    for _ in range(4):
        done = reembed(*part, range_rows=3)
        codes.append(done.code)
        seen |= done.texts
        if done.code == 0:
            break

    assert codes == [6, 0]
    edited = {key: text(key, "edited") for key in "015"}
    assert seen == {*edited.values(), *texts(4, 6, 7, 8), "title new"}
    assert stored(path) == new(3, 4, 6, 7, 8) | {"95": vector("title new")} | {
        key: vector(words) for key, words in edited.items()
    }


@pytest.mark.parametrize("flag", ["--missing-only", "--skip-current-space"])
def test_parts_of_a_mode_come_to_their_end(reembed: Call, tmp_path: Path, flag: str) -> None:
    rows = [*embedded_rows(0, 1), *(memory(f"{i}") for i in range(2, 9))]
    path = store(tmp_path, rows, stamps=True)
    change(path, f"UPDATE memories SET embedding_space = '{STAMP}' WHERE id < '2'")
    results = [
        reembed("--db", path, flag, "--max-rows", "3", "--partial", "--json", range_rows=2)
        for _ in range(3)
    ]

    assert [done.code for done in results] == [6, 6, 0]
    assert [done.texts for done in results] == [
        texts(2, 3, 4),
        texts(5, 6, 7),
        texts(8),
    ]
    assert [done.values["remaining"] for done in results] == [4, 1, 0]
    assert stored(path) == old(0, 1) | new(*range(2, 9))


def test_as_many_rows_as_there_are_are_replaced_by_the_same_call(
    reembed: Call, tmp_path: Path
) -> None:
    path = store(tmp_path, embedded_rows(*range(6)))

    short = reembed("--db", path, "--max-rows", "5", "--json", range_rows=2)
    assert (short.code, short.values["staged"], short.values["reembedded"]) == (0, 5, 0)
    assert stored(path) == old(*range(6))

    rest = reembed("--db", path, "--max-rows", "1", "--json", range_rows=2)
    assert (rest.code, rest.values["staged"], rest.values["reembedded"]) == (0, None, 6)
    assert stored(path) == new(*range(6))


def test_rows_skipped_by_rule_count_as_staged(reembed: Call, tmp_path: Path) -> None:
    rows = [memory(f"{i}", "x" * 70_000 if i < 3 else None) for i in range(6)]
    path = store(tmp_path, rows)

    calls = [
        reembed("--db", path, "--max-rows", "2", "--json", range_rows=2).values["staged"]
        for _ in range(3)
    ]

    assert calls == [2, 4, None]
    assert stored(path) == dict.fromkeys("012") | new(3, 4, 5)


# --sleep-ms


def test_sleep_ms_waits_after_each_batch(reembed: Call, tmp_path: Path) -> None:
    reembed = partial(reembed, through_beam=True)
    path = store(tmp_path, embedded_rows(*range(6)))

    done = reembed("--db", path, "--batch", "2", "--sleep-ms", "100", "--json")

    assert done.code == 0
    assert done.values["duration_ms"] >= 3 * 100
    assert stored(path) == new(*range(6))


# Failures: --skipped, --max-skipped, --retry-skipped


def failing(keys: Sequence[object], failed: Sequence[object]) -> list[Memory]:
    """Rows with vectors, of which the model will not take some."""
    rows = embedded_rows(*keys)
    wanted = {f"{key}" for key in failed}
    return [replace(row, content=POISON) if row.id in wanted else row for row in rows]


def test_a_skipped_row_keeps_its_vector_and_is_counted_in_the_old_space(
    reembed: Call, tmp_path: Path
) -> None:
    rows = [*failing(range(6), [4]), memory("6", POISON), memory("7")]
    path = store(tmp_path, rows)

    done = reembed("--db", path, "--json")

    assert (done.code, done.values["skipped"], done.values["in_old_space"]) == (0, 2, 1)
    assert stored(path) == new(0, 1, 2, 3, 5, 7) | old(4) | {"6": None}
    told = reembed("--db", path)
    assert line_with("old vectors ", told.out) == snapshot(
        "old vectors  1 rows still hold a vector that this run did not make; searches can't "
        "compare it with the new ones"
    )


def test_skipped_clear_takes_the_vector_of_a_skipped_row_away(
    reembed: Call, tmp_path: Path
) -> None:
    reembed = partial(reembed, through_beam=True)
    path = store(tmp_path, failing(range(6), [4]))

    done = reembed("--db", path, "--skipped", "clear", "--json")

    assert (done.code, done.values["skipped"], done.values["in_old_space"]) == (0, 1, 0)
    assert stored(path) == new(0, 1, 2, 3, 5) | {"4": None}
    assert wording(line_with("skipped row", done.err), tmp_path) == snapshot(
        "WARN [RUN] skipped row 4: the text holds POISON (previous vector cleared)"
    )
    assert reembed("verify", "--db", path).code == 0


def test_skipped_clear_can_not_be_chosen_by_the_call_that_finishes_a_replacement(
    reembed: Call, tmp_path: Path
) -> None:
    path = store(tmp_path, failing(range(10), [8]))
    assert half_replace(reembed, path).code == 6

    refused = reembed("--db", path, "--skipped", "clear")
    done = reembed("--db", path, "--json")

    assert refused.code == 6
    assert wording(refused.error, tmp_path) == snapshot(
        "the run RUN began to replace with --skipped keep, and all of its rows must be treated "
        "alike; leave out --skipped clear, or undo the run with reembed rollback first; the "
        "replacement by run RUN (to all-MiniLM-L6-v2 (8-dim)) is incomplete: of ranges 0-4, 0 "
        "hold new vectors, and 1-2 were being written"
    )
    assert (done.code, done.values["in_old_space"]) == (0, 1)
    assert stored(path) == new(*range(8), 9) | old(8)
    assert reembed("rollback", "--db", path).code == 0
    assert stored(path) == old(*range(10))


def test_the_list_of_skipped_rows_names_them_and_never_holds_a_text(
    reembed: Call, tmp_path: Path
) -> None:
    secret = "a-secret-word"
    rows = [
        memory("a", f"{POISON} {secret}", namespace="notes"),
        memory("b", f"{NOT_A_NUMBER} {secret}"),
        memory("c", secret * 9_000),
        memory("d", "", title=secret, encrypted_envelope=b"e"),
        *(memory(f"{i}") for i in range(4)),
    ]
    path = store(tmp_path, rows)

    done = reembed("--db", path)

    assert done.code == 0
    [run] = runs(path)
    assert sorted(lines(run / "skipped.jsonl"), key=itemgetter("id")) == [
        {
            "id": "a",
            "namespace": "notes",
            "cause": "rejected by the model",
            "reason": "the text holds POISON",
        },
        {
            "id": "b",
            "namespace": "global",
            "cause": "unusable vector",
            "reason": "the model gave a vector with NaN or inf",
        },
        {
            "id": "c",
            "namespace": "global",
            "cause": "over the byte cap",
            "reason": "content 117008 bytes exceeds embed cap 65536 bytes",
        },
        {
            "id": "d",
            "namespace": "global",
            "cause": "encrypted",
            "reason": "its content is encrypted",
        },
    ]
    content = b"".join(kept_files(run).values())
    assert secret.encode() not in content
    assert secret not in done.out + done.err


SHARES: list[tuple[Sequence[str], int, str | None]] = [
    ((), 5, None),
    (
        (),
        6,
        snapshot(
            "6 of 10 rows could not be embedded (6 rejected by the model), and --max-skipped "
            "allows 0.5 of them and never all; nothing is replaced now, and what is staged stays: "
            "check the model, then run again with --retry-skipped, or with a higher --max-skipped"
        ),
    ),
    (("--max-skipped", "20%"), 2, None),
    (
        ("--max-skipped", "0.2"),
        3,
        snapshot(
            "3 of 10 rows could not be embedded (3 rejected by the model), and --max-skipped "
            "allows 0.2 of them and never all; nothing is replaced now, and what is staged stays: "
            "check the model, then run again with --retry-skipped, or with a higher --max-skipped"
        ),
    ),
    (
        ("--max-skipped", "0"),
        1,
        snapshot(
            "1 of 10 rows could not be embedded (1 rejected by the model), and --max-skipped "
            "allows 0 of them and never all; nothing is replaced now, and what is staged stays: "
            "check the model, then run again with --retry-skipped, or with a higher --max-skipped"
        ),
    ),
    (("--max-skipped", "100%"), 9, None),
]
"""How many of ten rows fail, and what is told where that is too many."""


def test_more_failures_than_the_share_that_is_allowed_replace_nothing(
    reembed: Call, tmp_path: Path
) -> None:
    for at, (flags, failed, said) in enumerate(SHARES):
        (tmp_path / f"{at}").mkdir()
        # Rows skipped by rule are no failures, and don't count as tried.
        rows = [*failing(range(10), range(failed)), memory("x", encrypted_envelope=b"e")]
        path = store(tmp_path / f"{at}", rows)
        before = path.read_bytes()

        done = reembed("--db", path, *flags)

        assert (flags, failed, done.code) == (flags, failed, 0 if said is None else 5)
        if said is not None:
            assert wording(done.error, tmp_path) == said
            assert path.read_bytes() == before
            [run] = runs(path)
            assert len(lines(run / "skipped.jsonl")) == failed + 1
        else:
            assert stored(path) == old(*range(failed)) | new(*range(failed, 10)) | {"x": None}


def test_when_all_rows_failed_what_is_staged_stays(reembed: Call, tmp_path: Path) -> None:
    path = store(tmp_path, failing(range(4), range(4)))

    first = reembed("--db", path, "--max-skipped", "100%")
    assert first.code == 5
    assert wording(first.error, tmp_path) == snapshot(
        "4 of 4 rows could not be embedded (4 rejected by the model), and --max-skipped allows 1 "
        "of them and never all; nothing is replaced now, and what is staged stays: check the "
        "model, then run again with --retry-skipped, or with a higher --max-skipped"
    )

    # They were tried, and are not tried again unasked.
    second = reembed("--db", path, "--max-skipped", "100%", lenient=1)
    assert (second.code, second.texts) == (5, set())
    assert wording(line_with("going on", second.err), tmp_path) == snapshot(
        "reembed: 4 of 4 rows are staged; going on (run RUN)"
    )

    third = reembed("--db", path, "--retry-skipped", lenient=1)
    assert (third.code, len(third.texts)) == (0, 4)
    assert stored(path) == {f"{i}": vector(text(i, POISON)) for i in range(4)}
    assert len(runs(path)) == 1


def test_when_all_rows_are_skipped_by_rule_the_run_is_done(reembed: Call, tmp_path: Path) -> None:
    rows = [memory("a", "x" * 70_000), memory("b", encrypted_envelope=b"e")]
    path = store(tmp_path, rows)

    done = reembed("--db", path, "--max-skipped", "0", "--json")

    assert (done.code, done.texts) == (0, set())
    assert done.values["skipped_by_cause"] == {"encrypted": 1, "over the byte cap": 1}


def test_the_share_counts_what_earlier_tries_have_staged(reembed: Call, tmp_path: Path) -> None:
    path = store(tmp_path, failing(range(10), range(3)))
    reembed("--db", path, "--max-rows", "4", range_rows=2)

    refused = reembed("--db", path, "--max-skipped", "20%", range_rows=2)
    assert (refused.code, refused.texts) == (5, texts(*range(4, 10)))
    assert wording(refused.error, tmp_path) == snapshot(
        "3 of 10 rows could not be embedded (3 rejected by the model), and --max-skipped allows "
        "0.2 of them and never all; nothing is replaced now, and what is staged stays: check the "
        "model, then run again with --retry-skipped, or with a higher --max-skipped"
    )
    assert stored(path) == old(*range(10))

    taken = reembed("--db", path, "--max-skipped", "30%", range_rows=2)
    assert (taken.code, taken.texts) == (0, set())
    assert stored(path) == old(0, 1, 2) | new(*range(3, 10))


def test_parts_in_which_too_many_rows_fail_do_not_end_as_done(
    reembed: Call, tmp_path: Path
) -> None:
    path = store(tmp_path, failing(range(10), range(2, 10)))
    part = ("--db", path, "--max-rows", "2", "--partial")
    codes = [reembed(*part, range_rows=2).code for _ in range(6)]

    # The first part is in the store, so that this is told as an incomplete replacement.
    assert codes == [6, 6, 6, 6, 6, 6]
    last = reembed(*part, range_rows=2)
    assert wording(last.error, tmp_path) == snapshot(
        "8 of 10 rows could not be embedded (8 rejected by the model), and --max-skipped allows "
        "0.5 of them and never all; nothing is replaced now, and what is staged stays: check the "
        "model, then run again with --retry-skipped, or with a higher --max-skipped; run RUN (to "
        "all-MiniLM-L6-v2 (8-dim)) has replaced vectors but not come to its end: rows may be left "
        "that were added or edited meanwhile, or left for later: run again to finish it, or undo "
        "it with reembed rollback"
    )
    assert stored(path) == new(0, 1) | old(*range(2, 10))
    assert reembed(*part, "--max-skipped", "80%").code == 0


def test_retry_skipped_after_a_finished_run_tries_just_those_rows(
    reembed: Call, tmp_path: Path
) -> None:
    rows = [*failing(range(9), [2, 7]), *embedded_rows("x", encrypted_envelope=b"e")]
    path = store(tmp_path, rows)
    assert reembed("--db", path, range_rows=3).code == 0
    change(path, "UPDATE memories SET content = 'edited' WHERE id = '4'")

    done = reembed("--db", path, "--retry-skipped", "--json", range_rows=3, lenient=1)

    assert (done.code, done.texts) == (0, {text(2, POISON), text(7, POISON)})
    assert done.values["total"] == 3
    assert (done.values["mode"], done.values["skipped"]) == ("retry skipped", 1)
    now = stored(path)
    assert now == new(0, 1, 3, 4, 5, 6, 8) | old("x") | {
        key: vector(text(key, POISON)) for key in "27"
    }
    assert len(runs(path)) == 2

    # Only what can't be embedded by rule is left of them.
    again = reembed("--db", path, "--retry-skipped", "--json", range_rows=3)
    assert (again.code, again.texts, again.values["total"]) == (0, set(), 1)

    # The last one wrote nothing, so it is passed over; row 4 was edited since the first.
    for _ in range(2):
        assert reembed("rollback", "--db", path).code == 0
    assert stored(path) == old(0, 1, 2, 3, 5, 6, 7, 8, "x") | new(4)


def test_retry_skipped_after_a_run_without_skipped_rows_has_nothing_to_do(
    reembed: Call, tmp_path: Path
) -> None:
    path = store(tmp_path, embedded_rows(*range(4)))
    none = reembed("--db", path, "--retry-skipped")
    assert none.code == 2
    assert wording(none.error, tmp_path) == snapshot(
        "there is no run whose skipped rows could be tried again; run without it"
    )

    reembed("--db", path)
    before = kept_files(tmp_path)
    done = reembed("--db", path, "--retry-skipped", "--json")

    assert (done.code, done.texts, done.values["total"]) == (0, set(), 0)
    assert wording(line_with("nothing to try again", done.err), tmp_path) == snapshot(
        "reembed: the last run skipped no rows; nothing to try again"
    )
    assert kept_files(tmp_path) == before


def test_retry_skipped_in_an_unfinished_run_tries_its_failures_again_and_goes_on(
    reembed: Call, tmp_path: Path
) -> None:
    reembed = partial(reembed, through_beam=True)
    path = store(tmp_path, failing(range(10), [1, 2, 8]))
    reembed("--db", path, "--max-rows", "4", range_rows=2)

    done = reembed("--db", path, "--retry-skipped", "--json", range_rows=2, lenient=1)

    assert (done.code, done.values["skipped"], done.values["mode"]) == (0, 0, "all")
    again = {text(key, POISON) for key in (1, 2, 8)}
    assert done.texts == {*again, *texts(4, 5, 6, 7, 9)}
    assert stored(path) == new(0, 3, 4, 5, 6, 7, 9) | {
        f"{key}": vector(text(key, POISON)) for key in (1, 2, 8)
    }
    [run] = runs(path)
    assert not (run / "skipped.jsonl").exists()


def test_retry_skipped_in_an_incomplete_replacement_tries_its_failures_again(
    reembed: Call, tmp_path: Path
) -> None:
    path = store(tmp_path, failing(range(10), [0, 8]))
    assert half_replace(reembed, path).code == 6
    assert stored(path) == old(0, *range(2, 10)) | new(1)

    done = reembed("--db", path, "--retry-skipped", "--json", lenient=1)

    assert (done.code, done.values["skipped"]) == (0, 0)
    assert done.texts == {text(0, POISON), text(8, POISON)}
    assert stored(path) == new(*range(1, 8), 9) | {key: vector(text(key, POISON)) for key in "08"}


def test_retry_skipped_that_is_cut_off_goes_on_with_the_same_rows(
    reembed: Call, tmp_path: Path
) -> None:
    path = store(tmp_path, failing(range(10), [1, 4, 5]))
    assert reembed("--db", path, range_rows=2).code == 0
    cut = half_replace(reembed, path, "--retry-skipped")
    assert cut.code == 5  # All of them failed again.

    done = half_replace(
        lambda *some, **more: reembed(*some, **more, lenient=1), path, "--retry-skipped"
    )

    assert done.code == 6
    last = reembed("--db", path, "--retry-skipped", "--json", lenient=1)
    assert (last.code, last.values["total"], last.values["skipped"]) == (0, 3, 0)
    mended = {f"{key}": vector(text(key, POISON)) for key in (1, 4, 5)}
    assert stored(path) == new(0, 2, 3, 6, 7, 8, 9) | mended


def test_retry_skipped_is_about_the_last_run_of_the_same_namespace(
    reembed: Call, tmp_path: Path
) -> None:
    rows = [
        replace(row, namespace="ab"[int(row.id) % 2]) for row in failing(range(8), [1, 2, 3, 6])
    ]
    path = store(tmp_path, rows)
    for name in "ab":
        assert reembed("--db", path, "--namespace", name).code == 0

    done = reembed("--db", path, "--namespace", "a", "--retry-skipped", lenient=1)

    assert (done.code, done.texts) == (0, {text(2, POISON), text(6, POISON)})
    unknown = reembed("--db", path, "--retry-skipped", lenient=1)
    assert (unknown.code, unknown.texts) == (2, set())


def test_retry_skipped_after_a_rollback_has_no_run_to_go_by(reembed: Call, tmp_path: Path) -> None:
    path = store(tmp_path, failing(range(4), [1]))
    reembed("--db", path)
    reembed("rollback", "--db", path)

    done = reembed("--db", path, "--retry-skipped")

    assert (done.code, done.texts) == (2, set())
    assert stored(path) == old(*range(4))


def test_retry_skipped_knows_rows_that_were_deleted_or_mended_meanwhile(
    reembed: Call, tmp_path: Path
) -> None:
    path = store(tmp_path, failing(range(6), [1, 2, 3]))
    reembed("--db", path)
    change(
        path,
        "DELETE FROM memories WHERE id = '1'",
        "UPDATE memories SET content = 'mended' WHERE id = '2'",
    )

    done = reembed("--db", path, "--retry-skipped", "--json")

    assert (done.code, done.values["total"], done.values["skipped"]) == (0, 2, 1)
    assert stored(path) == new(0, 4, 5) | old(3) | {"2": vector(text(2, "mended"))}


# Record-stop


def test_a_record_stop_is_obeyed_before_any_work(reembed: Call, tmp_path: Path) -> None:
    path = store(tmp_path, embedded_rows(*range(4)))
    change(path, STOP.format(at=1), RESUME.format(at=2), STOP.format(at=3))
    before = path.read_bytes()

    done = reembed("--db", path)

    assert (done.code, done.texts) == (1, set())
    assert wording(done.error, tmp_path) == snapshot(
        "a record-stop is in force in TMP/m.db, and no program may write to it; resume recording "
        "with ai-memory and run again"
    )
    assert path.read_bytes() == before
    assert reembed("--db", path, "--dry-run").code == 0

    change(path, RESUME.format(at=4))
    assert reembed("--db", path).code == 0
    change(path, STOP.format(at=5))
    stopped = reembed("rollback", "--db", path)
    assert stopped.code == 1
    assert wording(stopped.error, tmp_path) == snapshot(
        "a record-stop is in force in TMP/m.db, and no program may write to it; resume recording "
        "with ai-memory and run again"
    )
    assert stored(path) == new(*range(4))


def test_a_record_stop_that_comes_while_rows_are_embedded_is_obeyed_in_the_transaction(
    reembed: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store(tmp_path, embedded_rows(*range(4)))
    meanwhile(monkeypatch, path, "title", STOP.format(at=1))

    done = reembed("--db", path, range_rows=2)

    assert wording(done.error, tmp_path) == snapshot(
        "a record-stop is in force in TMP/m.db, and no program may write to it; resume recording "
        "with ai-memory and run again; the replacement by run RUN (to all-MiniLM-L6-v2 (8-dim)) "
        "is incomplete: of ranges 0-1, none hold new vectors, and 0-1 were being written: run "
        "again to finish it, or undo it with reembed rollback"
    )
    assert stored(path) == old(*range(4))
    change(path, RESUME.format(at=2))
    again = reembed("--db", path, range_rows=2)
    assert (again.code, again.texts) == (0, set())
    assert stored(path) == new(*range(4))


def test_a_record_stop_between_two_transactions_is_obeyed(reembed: Call, tmp_path: Path) -> None:
    path = store(tmp_path, embedded_rows(*range(10)))
    change(
        path,
        "CREATE TRIGGER stop AFTER UPDATE OF embedding ON memories WHEN new.id = '1' "
        f"BEGIN {STOP.format(at=1)}; END",
    )

    done = reembed("--db", path, range_rows=2, rows_at_once=1, first_rows=2)

    assert done.code == 6
    assert wording(done.error, tmp_path) == snapshot(
        "a record-stop is in force in TMP/m.db, and no program may write to it; resume recording "
        "with ai-memory and run again; the replacement by run RUN (to all-MiniLM-L6-v2 (8-dim)) "
        "is incomplete: of ranges 0-4, 0 hold new vectors, and 1-2 were being written: run again "
        "to finish it, or undo it with reembed rollback"
    )
    assert stored(path) == new(0, 1) | old(*range(2, 10))
    change(path, RESUME.format(at=2))
    assert reembed("--db", path).code == 0
    assert stored(path) == new(*range(10))


# Modes exclude each other


def test_a_run_of_one_mode_is_no_try_of_another(reembed: Call, tmp_path: Path) -> None:
    path = store(tmp_path, [*embedded_rows(0, 1), *(memory(f"{i}") for i in range(2, 8))])
    reembed("--db", path, "--missing-only", "--max-rows", "2", range_rows=3)
    [missing] = runs(path)

    done = reembed("--db", path, range_rows=3)

    assert (done.code, done.texts) == (0, texts(*range(8)))
    note = line_with("about other rows", done.err)
    assert note.replace(missing.name, "THE OTHER") == snapshot(
        "reembed: NOTE — run THE OTHER about other rows is not finished; its own command goes on "
        "with it"
    )
    rest = reembed("--db", path, "--missing-only", "--json", range_rows=3)
    assert (rest.code, rest.texts, rest.values["total"]) == (0, set(), 0)
    assert stored(path) == new(*range(8))


@pytest.mark.parametrize(
    "flags",
    [(), ("--missing-only",), ("--skip-current-space",), ("--max-rows", "500", "--partial")],
)
def test_a_mode_with_the_original_store_and_stamps_is_verified_and_undone(
    reembed: Call, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    path = unpack("v80", tmp_path / "m.db")
    change(
        path,
        ADD_STAMPS,
        f"UPDATE memories SET embedding_space = '{STAMP}' WHERE rowid % 3 = 0 "
        "AND embedding IS NOT NULL",
    )
    query = "SELECT id, embedding, embedding_dim, embedding_space FROM memories ORDER BY id"
    before = select(path, query)

    done = reembed("--db", path, "--dim", "384", *flags)

    assert done.code == 0
    changed = {new[0] for new, old in zip(select(path, query), before, strict=True) if new != old}
    meant = {
        row[0]
        for row in before
        if not flags
        or "--partial" in flags
        or row[1] is None
        or (flags == ("--skip-current-space",) and row[3] != STAMP)
    }
    assert changed == meant
    assert reembed("verify", "--db", path).code == 0
    assert reembed("rollback", "--db", path).code == 0
    assert select(path, query) == before


# Anything, in any order


class Others:
    """What other programs do to a store between two tries, and what the rows are to hold then.

    `theirs` is what a row last got from another program: a vector and its stamp, or none.
    """

    def __init__(self, path: Path, mode: str, dice: random.Random) -> None:
        self.path, self.mode, self.dice = path, mode, dice
        self.texts: dict[str, str] = {}
        self.theirs: dict[str, tuple[bytes | None, str | None]] = {}
        self.touched: set[str] = set()
        self.count = 0

    def begin(self) -> None:
        for _ in range(9):
            self.add()
        self.touched.clear()

    def act(self) -> None:
        """Do one thing to one row."""
        do = self.dice.choice([self.add, self.delete, self.edit, self.edit, self.put, self.clear])
        do()

    def add(self) -> None:
        key = f"{self.dice.random():.6f}"
        change(self.path, NEW_ROW.format(id=key, content="").replace("'title'", f"'{key}'"))
        self._write(key)
        self._hold(key, *self.dice.choice([(None, None), self._vector(), self._vector()]))

    def delete(self) -> None:
        key = self._any()
        change(self.path, f"DELETE FROM memories WHERE id = '{key}'")
        del self.texts[key], self.theirs[key]

    def edit(self) -> None:
        key = self._any()
        self._write(key)
        if self.dice.random() < 0.3:
            self._hold(key, *self._vector())

    def put(self) -> None:
        self._hold(self._any(), *self._vector())

    def clear(self) -> None:
        self._hold(self._any(), None, None)

    def expected(self, key: str) -> tuple[bytes | None, str | None]:
        """What a row is to hold when a run has come to its end."""
        held, stamp = self.theirs[key]
        meant = {
            "--missing-only": held is None,
            "--skip-current-space": held is None or stamp != STAMP,
        }.get(self.mode, True)
        return (vector(self.texts[key]), STAMP) if meant else (held, stamp)

    def _any(self) -> str:
        return self.dice.choice(sorted(self.texts))

    def _vector(self) -> tuple[bytes, str]:
        self.count += 1
        return vector(f"theirs {self.count}"), self.dice.choice([STAMP, "former#none"])

    def _write(self, key: str) -> None:
        self.count += 1
        self.touched.add(key)
        words = f"{POISON if self.dice.random() < 0.15 else 'text'} {self.count}"
        self.texts[key] = f"{key} {words}"
        change(self.path, f"UPDATE memories SET content = '{words}' WHERE id = '{key}'")

    def _hold(self, key: str, blob: bytes | None, stamp: str | None) -> None:
        self.touched.add(key)
        self.theirs[key] = blob, stamp
        put(self.path, key, blob)
        value = "NULL" if stamp is None else f"'{stamp}'"
        change(self.path, f"UPDATE memories SET embedding_space = {value} WHERE id = '{key}'")


@pytest.mark.parametrize("seed", range(60 if WIDE else 6))
def test_whatever_happens_between_tries_each_row_ends_as_its_mode_has_it(
    reembed: Call, tmp_path: Path, seed: int
) -> None:
    dice = random.Random(seed)
    mode = ["", "--missing-only", "--skip-current-space"][seed % 3]
    path = store(tmp_path, [], stamps=True)
    others = Others(path, mode, dice)
    others.begin()
    query = "SELECT id, embedding, embedding_space FROM memories"
    before = {key: held for key, *held in select(path, query)}
    flags = ["--db", path, *([mode] if mode else []), "--max-skipped", "100%", "--json"]
    seen: set[str] = set()
    for call in range(12):
        calm = call > 6
        how = "" if calm else dice.choice(["jam", "part", "stage", ""])
        if how == "jam":
            jam(path, dice.choice(sorted(others.texts)))
        more = ["--max-rows", f"{dice.randint(1, 6)}"] if how in ("part", "stage") else []
        more += ["--partial"] if how == "part" else []
        wanted = {
            words for key, words in others.texts.items() if others.expected(key)[0] == vector(words)
        }

        done = reembed(*flags, *more, range_rows=2, rows_at_once=1, first_rows=2)

        assert done.code in (0, 5, 6), done.err
        assert done.texts <= wanted
        assert not done.texts & seen
        seen |= done.texts
        if how == "jam":
            unjam(path)
        state = reembed("status", "--db", path, "--json").values["runs"][-1]["state"]
        if state == "replaced":
            break
        if not calm:
            for _ in range(dice.randint(0, 3)):
                others.act()
    assert state == "replaced", done.err
    now = {key: tuple(held) for key, *held in select(path, query)}
    for key, held in now.items():
        expected = others.expected(key)
        if POISON in others.texts[key] and others.theirs[key] != expected:
            assert held[0] != expected[0]  # It keeps what it held: theirs, or of another text.
        else:
            assert (key, held) == (key, expected)
    wrong = reembed("verify", "--db", path, "--json").values["wrong_ids"]
    assert wrong.keys() <= {"stale", "overwritten"}
    assert all(POISON in others.texts[key] for key in wrong.get("stale", ()))
    # Where only some rows are meant, others may overwrite what the run wrote, and keep it.
    assert all(mode and now[key] == others.theirs[key] for key in wrong.get("overwritten", ()))
    assert reembed("rollback", "--db", path).code == 0
    after = {key: held for key, *held in select(path, query)}
    for key in before.keys() - others.touched & after.keys():
        assert after[key] == before[key]


# ---- What was written is read back ----


@pytest.mark.parametrize(
    ("flags", "variables"),
    [
        ([], {}),
        ([], {"rows_at_once": 2, "first_rows": 2, "range_rows": 2}),
        (["--one-transaction"], {"rows_at_once": 2, "range_rows": 2}),
        (["--namespace", "global"], {}),
        (["--missing-only"], {}),
        (["--skip-current-space"], {}),
        (["--stamp-only"], {}),
        (["--max-rows", "4", "--partial"], {"range_rows": 2}),
        (["--skipped", "clear"], {}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(len(value)),
)
def test_in_each_mode_a_write_that_is_lost_is_named_and_done_by_the_next_run(
    flags: list[str],
    variables: dict[str, int],
    tmp_path: Path,
    reembed: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dimension = 8 if "--stamp-only" in flags else 3
    rows = [
        memory(
            key,
            embedding=None
            if "--missing-only" in flags
            else encode(FakeEmbedder(8).embed([text(key)])[0])
            if dimension == 8
            else former(key, 3),
            embedding_dim=None if "--missing-only" in flags else dimension,
        )
        for key in "012345"
    ]
    path = make_store(tmp_path / "m.db", rows)
    change(path, ADD_STAMPS)

    with losing_writes(monkeypatch, times=1_000):
        lost = reembed("--db", path, *flags, "--json", **variables)

    held = "SELECT embedding, embedding_space FROM memories WHERE embedding_space IS NULL"
    count = len(select(path, held))
    assert (lost.code, lost.values["unwritten"]) == (6, count - (2 if "--partial" in flags else 0))
    assert "remains: it does not hold its new vector" in lost.err or "--partial" in flags
    while (found := reembed("--db", path, *flags, "--json", **variables)).code == 6:
        assert found.values["unwritten"] == 0
    assert (found.code, found.values["unwritten"], select(path, held)) == (0, 0, [])


def test_a_vector_that_a_trigger_puts_back_is_named_until_the_trigger_is_gone(
    tmp_path: Path, reembed: Call
) -> None:
    rows = [memory(key, embedding=former(key), embedding_dim=8) for key in "012345"]
    path = make_store(tmp_path / "m.db", rows)
    change(
        path,
        "CREATE TRIGGER back AFTER UPDATE OF embedding ON memories WHEN new.id = '4' BEGIN "
        "UPDATE memories SET embedding = old.embedding WHERE id = old.id; END",
    )

    refused = reembed("--db", path, "--json")

    assert (refused.code, refused.values["reembedded"], refused.values["unwritten"]) == (6, 5, 1)
    assert wording(line_with("row 4 remains", refused.err), tmp_path) == snapshot(
        "WARN [RUN] row 4 remains: it does not hold its new vector, although that was written"
    )
    assert wording(refused.error, tmp_path) == snapshot(
        "1 rows don't hold their new vectors, although these were written: a trigger of the "
        "database or another program puts others back; drop or stop it and run again, or undo the "
        "replacement with reembed rollback"
    )
    change(path, "DROP TRIGGER back")
    assert reembed("--db", path).code == 0
    assert reembed("verify", "--db", path).code == 0


@contextmanager
def after_the_first_transaction(
    monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]
) -> Iterator[None]:
    """Have another program write once, after the first of several transactions."""
    transaction, left = Replacement.transaction, [act]

    @contextmanager
    def watched(table: Replacement) -> Iterator[None]:
        with transaction(table):
            yield
        if left:
            left.pop()()

    with monkeypatch.context() as patch:
        patch.setattr(Replacement, "transaction", watched)
        yield


@pytest.mark.parametrize("by", ["a trigger", "another program"])
@pytest.mark.parametrize(
    "flags",
    [
        ("--skip-current-space",),
        ("--where", "ifnull(model, '') <> 'm'"),
        ("--where", "ifnull(dim, 0) = (SELECT ifnull(dim, 0) FROM t WHERE id = 0)"),
    ],
    ids=["--skip-current-space", "--where by stamp", "--where by another row"],
)
def test_a_row_that_loses_its_new_vector_is_not_lost_from_the_count(
    flags: tuple[str, ...],
    by: str,
    tmp_path: Path,
    reembed: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "m.db"
    old = FakeEmbedder(8).embed(["former"])[0].tobytes()
    change(
        path,
        "CREATE TABLE t (id INTEGER PRIMARY KEY, body TEXT, model TEXT, dim INTEGER, v BLOB)",
        "CREATE TABLE other (n INTEGER)",
        *(f"INSERT INTO t VALUES ({n}, 'text {n}', 'old', NULL, x'{old.hex()}')" for n in range(9)),
    )
    table = ["--table", "t", "--text", "body", "--vector", "v", "--space-column", "model"]
    table += ["--dim-column", "dim", "--model", "m", *flags, "--json"]
    lose = f"UPDATE t SET v = x'{old.hex()}' WHERE id = 1"
    several = {"range_rows": 3, "rows_at_once": 1, "first_rows": 3}

    if by == "a trigger":
        change(
            path, f"CREATE TRIGGER back AFTER UPDATE OF v ON t WHEN new.id = 1 BEGIN {lose}; END"
        )
        lost = reembed("--db", path, *table, **several)
        assert lost.out, lost.err
        assert (lost.code, lost.values["total"], lost.values["unwritten"]) == (6, 9, 1)
        change(path, "DROP TRIGGER back")
        ran = reembed("--db", path, *table, **several)
    else:
        act = partial(change, path, lose, "INSERT INTO other VALUES (1)")
        with after_the_first_transaction(monkeypatch, act):
            ran = reembed("--db", path, *table, **several)

    assert (ran.code, ran.values["total"], ran.values["reembedded"]) == (0, 9, 9)
    expected = [(FakeEmbedder(8).embed([f"text {n}"])[0].tobytes(),) for n in range(9)]
    assert select(path, "SELECT v FROM t ORDER BY id") == expected


def test_a_row_that_loses_its_new_vector_is_no_longer_missing_and_still_counts(
    tmp_path: Path, reembed: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_store(tmp_path / "m.db", [memory(key) for key in "012345"])
    act = partial(put, path, "0", former("daemon"))

    with after_the_first_transaction(monkeypatch, act):
        ran = reembed(
            "--db", path, "--missing-only", "--json", range_rows=2, rows_at_once=1, first_rows=2
        )

    assert (ran.code, ran.values["total"], ran.values["reembedded"]) == (0, 6, 6)
    assert stored(path) == new(*range(6))


def test_another_column_that_does_not_keep_what_was_written_is_noticed(
    tmp_path: Path, reembed: Call
) -> None:
    rows = [memory(key, embedding=former(key), embedding_dim=8) for key in "012345"]
    path = make_store(tmp_path / "m.db", rows)
    change(
        path,
        ADD_STAMPS,
        "CREATE TRIGGER touch AFTER UPDATE OF embedding ON memories WHEN new.id = '4' BEGIN "
        "UPDATE memories SET embedding_space = 'touched' WHERE id = '4'; END",
    )

    touched = reembed("--db", path, "--json")

    assert (touched.code, touched.values["reembedded"], touched.values["unwritten"]) == (6, 5, 1)
    change(path, "DROP TRIGGER touch")
    assert reembed("--db", path).code == 0
    assert set(stamps(path).values()) == {STAMP}


@pytest.mark.parametrize("kind", ["TEXT", "INTEGER", "REAL", "NUMERIC", "BLOB", ""])
def test_a_column_that_stores_a_value_by_its_own_type_holds_what_was_written(
    kind: str, tmp_path: Path, reembed: Call
) -> None:
    path = tmp_path / "m.db"
    change(
        path,
        f"CREATE TABLE t (id INTEGER PRIMARY KEY, body TEXT, model {kind}, dim {kind}, v BLOB)",
        *(f"INSERT INTO t VALUES ({n}, 'text {n}', 'old', 1, x'0000803f')" for n in range(9)),
    )
    table = ("--table", "t", "--text", "body", "--vector", "v", "--space-column", "model")
    flags = ("--db", path, *table, "--dim-column", "dim", "--space", "12", "--model", "m")

    assert reembed(*flags).code == 0
    assert reembed("verify", "--db", path).code == 0
    assert reembed(*flags, prompt="doc: ").code == 0
    assert reembed("rollback", "--db", path).code == 0
