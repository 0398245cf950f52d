"""The corpus: memories like those of a real store, the same on every machine.

Half are English, the others in nine languages and code. Most have one to six sentences; a tenth
is longer than the 256 tokens that MiniLM looks at; one in twenty has the text of another one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

from reembed.transforms.stores.demo import Memory, create_store, hashed_vector
from reembed.transforms.stores.demo_texts import DAYS, LANGUAGES, NAMESPACES, ROLES, Language

_SEED = 57
_EVERY_LONG, _EVERY_EQUAL = 10, 20
_LONG_BYTES = (1_600, 6_000)
_SENTENCES = (1, 1, 1, 2, 2, 3, 4, 5, 6)
_OLD_DIMENSION = 256


class Kind(NamedTuple):
    """What memories of one language are made of."""

    titles: tuple[str, ...]
    sentences: tuple[str, ...]
    joint: str = " "


RUSSIAN = Kind(
    ("Резервные копии", "Порядок выпуска", "Отпуск", "Договор с поставщиком"),
    (
        "Копия снимается каждую ночь в {n} минут третьего.",
        "Проверка занимает {n} минут и идёт без людей.",
        "Старые копии хранятся {n} дней, потом удаляются.",
        "Об ошибке сначала узнаёт дежурный.",
        "Выпуск переносится, если тесты не прошли.",
        "Ключи лежат в сейфе на втором этаже.",
    ),
)

CODE = Kind(
    ("Snippet: retry", "Snippet: query", "Shell history", "Traceback of the night job"),
    (
        "def retry(call, tries={n}):\n    for _ in range(tries):\n        return call()",
        "SELECT id, title FROM memories WHERE priority > {n} ORDER BY updated_at DESC;",
        'grep -rn "timeout={n}" src/ | sort | uniq -c',
        "for (let i = 0; i < {n}; i++) queue.push(items[i]);",
        "File \"job.py\", line {n}, in main\nKeyError: 'vector'",
        "if err != nil && retries > {n} then return err",
    ),
    "\n",
)


def make_store(path: Path, rows: int) -> None:
    """Write an ai-memory database of so many rows, with vectors of an old model, in WAL mode."""
    create_store(str(path), memories(rows), journal_mode="wal")


def memories(rows: int) -> Iterator[Memory]:
    """Yield the corpus.

    >>> found = list(memories(400))
    >>> len(found), len({(one.title, one.content) for one in found})
    (400, 380)
    """
    rng = random.Random(_SEED)
    english, *others = map(_kind, LANGUAGES)
    others += [RUSSIAN, CODE]
    last: list[Memory] = []
    for at in range(rows):
        key = str(UUID(int=rng.getrandbits(128), version=4))
        namespace = NAMESPACES[at % len(NAMESPACES)]
        # A title stands once in a namespace, so an equal text is in another one.
        if at % _EVERY_EQUAL == 1:
            yield replace(rng.choice(last), id=key, namespace=namespace)
            continue
        kind = english if rng.random() < 0.5 else rng.choice(others)
        title = f"{rng.choice(kind.titles)} {at}"
        long = at % _EVERY_LONG == _EVERY_LONG - 1
        content = _content(kind, rng, long=long)
        memory = Memory(
            id=key,
            namespace=namespace,
            title=title,
            content=content,
            embedding=hashed_vector(f"{title} {content}", _OLD_DIMENSION),
            embedding_dim=_OLD_DIMENSION,
        )
        last = [*last[-(len(NAMESPACES) - 2) :], memory]
        yield memory


def _kind(language: Language) -> Kind:
    subjects = [topic.subject for topic in language.topics]
    titles = [aspect.title.format(subject=s) for aspect in language.aspects for s in subjects]
    sentences = [fact for topic in language.topics for fact in topic.facts]
    sentences += [sentence for aspect in language.aspects for sentence in aspect.sentences]
    return Kind(tuple(titles), tuple(sentences), language.joint)


def _content(kind: Kind, rng: random.Random, *, long: bool) -> str:
    if not long:
        return kind.joint.join(_filled(kind, rng) for _ in range(rng.choice(_SENTENCES)))
    wanted = rng.randint(*_LONG_BYTES)
    content = _filled(kind, rng)
    while len(content.encode()) < wanted:
        content += kind.joint + _filled(kind, rng)
    return content


def _filled(kind: Kind, rng: random.Random) -> str:
    n, day, role = rng.randint(2, 90), rng.choice(DAYS), rng.choice(ROLES)
    return rng.choice(kind.sentences).format(n=n, day=day, role=role)
