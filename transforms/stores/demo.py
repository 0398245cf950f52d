"""A demo store: an ai-memory database of schema version 57, made from nothing.

The demo's memories are the same on every machine; a stream of any length serves size tests.
"""

from __future__ import annotations

import os
import random
import re
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import UUID, uuid5

import numpy as np

from reembed.transforms.stores import demo_texts as texts
from reembed.transforms.stores.codec import encode
from reembed.transforms.stores.demo_schema import SCHEMA
from reembed.transforms.stores.demo_texts import Language, Note

__all__ = [
    "SCHEMA",
    "Memory",
    "create_store",
    "demo_memories",
    "generated_memories",
    "hashed_vector",
]

_OLD_DIMENSION = 256
_UNEMBEDDED_ROWS = 60
_ENVELOPE_BYTES = 140
_WEEKS = 24
_IMPORT_BATCHES = 1_100
_SEED = 57
_ID_SPACE = UUID("6f1d7b52-3c0e-4a86-9d55-2b7e8a41c9f0")
_START = datetime(2025, 1, 6, 9)

_CACHED_VECTORS = 64
_GENERATED_SENTENCES = (1, 1, 2, 3, 4, 5, 6, 8, 10, 16)

_CACHE_KIB = 65_536
_INSERT = """
INSERT INTO memories (id, tier, namespace, title, content, source, created_at, updated_at,
    metadata, encrypted_envelope, embedding, embedding_dim)
VALUES (:id, :tier, :namespace, :title, :content, :source, :created_at, :updated_at,
    :metadata, :encrypted_envelope, :embedding, :embedding_dim)
"""


@dataclass(frozen=True)
class Memory:
    """One row of `memories`; columns that aren't named here take the schema's defaults."""

    id: str
    namespace: str
    title: str
    content: str
    embedding: bytes | None
    embedding_dim: int | None
    encrypted_envelope: bytes | None = None
    tier: str = "long"
    source: str = "cli"
    created_at: str = "2025-01-06T09:00:00+00:00"
    updated_at: str = "2025-01-06T09:00:00+00:00"
    metadata: str = '{"agent_id":"assistant"}'


def create_store(path: str, memories: Iterable[Memory], *, journal_mode: str = "delete") -> None:
    """Make a new database at `path` that holds these memories, all of them or no file at all.

    `journal_mode` is "delete" or "wal"; neither leaves a file beside the database. Raises
    FileExistsError if there is a database at `path`, or the log of one that is gone.
    """
    if journal_mode not in ("delete", "wal"):
        raise ValueError(f"journal_mode is {journal_mode!r}, not 'delete' or 'wal'")
    target = Path(path)
    _refuse_existing(target)
    with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as folder:
        built = Path(folder, target.name)
        _fill(built, memories, journal_mode)
        _sync(built)
        _refuse_existing(target)
        built.rename(target)
    _sync(target.parent)


def _refuse_existing(target: Path) -> None:
    # SQLite would replay a log that lies beside a new database of the same name.
    for name in (str(target), f"{target}-wal", f"{target}-journal"):
        if os.path.lexists(name):
            raise FileExistsError(f"{name} exists already, and a demo replaces nothing")


def _fill(path: Path, memories: Iterable[Memory], journal_mode: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        # A crash loses nothing but the temporary folder, so the file is synced once, later.
        connection.execute("PRAGMA journal_mode=OFF")
        connection.execute("PRAGMA synchronous=OFF")
        connection.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
        connection.executescript(SCHEMA)
        connection.execute("BEGIN")
        connection.executemany(_INSERT, map(vars, memories))
        connection.execute("COMMIT")
        connection.execute(f"PRAGMA journal_mode={journal_mode}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hashed_vector(text: str, dimension: int = _OLD_DIMENSION) -> bytes:
    """Embed a text with the demo's "old model": a bag of words hashed into `dimension` places.

    Each lower-cased word counts +1 or -1 at one place, both taken from its BLAKE2b hash, and
    the sum has length 1. Returns it as ai-memory's BLOB: 0x01, then little-endian float32.

    >>> hashed_vector("Tea, tea!", 4).hex(" ", 4)
    '01 00000000 000080bf 00000000 00000000'
    """
    vector = np.zeros(dimension)
    for word, count in Counter(re.findall(r"\w+", text.lower())).items():
        digest = int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little")
        vector[(digest >> 1) % dimension] += count if digest & 1 else -count
    if not vector.any():
        vector[0] = 1.0  # no words, or words that cancel out: a vector of zeros is no vector
    return encode(vector / np.linalg.norm(vector))


def demo_memories() -> Iterator[Memory]:
    """Yield the demo's 500 memories, in the order in which they were written down.

    Of these, 60 have no vector and the others one of the old model; 25 are longer than the 256
    tokens that MiniLM reads; one is over the cap of 65,536 bytes; one is encrypted; one text
    stands in six namespaces.
    """
    rng = random.Random(_SEED)
    notes = [*texts.SHORT_NOTES, *_minutes(rng)]
    for language in texts.LANGUAGES:
        notes += _composed(language, rng)
    rng.shuffle(notes)
    memories = [_memory(note, embedded=at >= _UNEMBEDDED_ROWS) for at, note in enumerate(notes)]
    house_rules = (Note(namespace, *texts.HOUSE_RULES) for namespace in texts.NAMESPACES)
    memories += map(_memory, (*house_rules, *texts.AGENTS, _import_log(rng)))
    memories.append(_encrypted(rng))
    rng.shuffle(memories)
    for at, memory in enumerate(memories):
        written = f"{(_START + timedelta(hours=7 * at)).isoformat()}+00:00"
        yield replace(memory, created_at=written, updated_at=written)


def _memory(note: Note, *, embedded: bool = True) -> Memory:
    return Memory(
        id=str(uuid5(_ID_SPACE, f"{note.namespace} {note.title}")),
        namespace=note.namespace,
        title=note.title,
        content=note.content,
        embedding=hashed_vector(f"{note.title} {note.content}") if embedded else None,
        embedding_dim=_OLD_DIMENSION if embedded else None,
    )


def _encrypted(rng: random.Random) -> Memory:
    """A memory whose vector was made before its content was sealed."""
    plain = _memory(Note("people", texts.ENCRYPTED_TITLE, texts.ENCRYPTED_CONTENT))
    return replace(plain, content="", encrypted_envelope=rng.randbytes(_ENVELOPE_BYTES))


def _composed(language: Language, rng: random.Random) -> Iterator[Note]:
    """One memory for each topic and aspect: at least one sentence of each, in their order."""
    for topic in language.topics:
        for aspect in language.aspects:
            sentences = _some(topic.facts, rng) + _some(aspect.sentences, rng)
            content = language.joint.join(_filled(sentence, rng) for sentence in sentences)
            yield Note(topic.namespace, aspect.title.format(subject=topic.subject), content)


def _some(parts: Sequence[str], rng: random.Random) -> list[str]:
    places = rng.sample(range(len(parts)), rng.randint(1, len(parts)))
    return [parts[place] for place in sorted(places)]


def _filled(sentence: str, rng: random.Random) -> str:
    return sentence.format(
        n=rng.randint(2, 90), day=rng.choice(texts.DAYS), role=rng.choice(texts.ROLES)
    )


def _minutes(rng: random.Random) -> Iterator[Note]:
    """Minutes of weekly meetings: each longer than the 256 tokens that MiniLM reads."""
    points = [
        f"{aspect.title.format(subject=topic.subject)}. {sentence}"
        for topic in texts.ENGLISH.topics
        for aspect in texts.ENGLISH.aspects
        for sentence in aspect.sentences
    ]
    for week in range(1, _WEEKS + 1):
        namespace = texts.NAMESPACES[week % len(texts.NAMESPACES)]
        said = [texts.MINUTES_OPENING, *rng.sample(points, rng.randint(18, 50))]
        title = texts.MINUTES_TITLE.format(week=week, namespace=namespace)
        yield Note(namespace, title, "\n- ".join(_filled(point, rng) for point in said))


def _import_log(rng: random.Random) -> Note:
    """About 70,000 bytes, where a document may have 65,536."""
    lines = [
        texts.IMPORT_LOG_LINE.format(
            clock=(_START + timedelta(seconds=7 * batch)).strftime("%H:%M:%S"),
            batch=batch,
            batches=_IMPORT_BATCHES,
            rows=rng.randint(400, 512),
            late=rng.randint(0, 9),
        )
        for batch in range(1, _IMPORT_BATCHES + 1)
    ]
    return Note("projects/harbor", texts.IMPORT_LOG_TITLE, "\n".join(lines))


def generated_memories(count: int, *, dimension: int = 384, seed: int = 0) -> Iterator[Memory]:
    """Yield `count` memories for size tests: random keys, texts of about 340 bytes on average.

    Their vectors have `dimension` numbers and say nothing about the texts: a few random ones,
    normalised, are used again and again, since making one a row would cost most of the time.
    """
    rng = random.Random(seed)
    sentences = [fact for topic in texts.ENGLISH.topics for fact in topic.facts]
    vectors = np.random.default_rng(seed).standard_normal((_CACHED_VECTORS, dimension))
    blobs = [encode(vector / np.linalg.norm(vector)) for vector in vectors]
    for at in range(count):
        yield Memory(
            id=str(UUID(int=rng.getrandbits(128), version=4)),
            namespace=texts.NAMESPACES[at % len(texts.NAMESPACES)],
            title=f"Memory {at}",
            content=" ".join(rng.choices(sentences, k=rng.choice(_GENERATED_SENTENCES))),
            embedding=blobs[at % _CACHED_VECTORS],
            embedding_dim=dimension,
        )
