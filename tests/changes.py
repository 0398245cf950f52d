"""A program that adds, edits and deletes rows as ai-memory does: `python -m tests.changes m.db`."""

from __future__ import annotations

import json
import random
import select as waiting
import sqlite3
import sys
import time
from contextlib import closing

from reembed.transforms.stores.demo import Memory, hashed_vector

PAUSE_SECONDS = 1 / 40
OLD = 32


def old_memory(key: str, content: str | None = None) -> Memory:
    """A row as a daemon with the old model writes it."""
    content = f"content {key}" if content is None else content
    vector = hashed_vector(f"title {key} {content}", OLD)
    return Memory(
        id=key,
        namespace="global",
        title=f"title {key}",
        content=content,
        embedding=vector,
        embedding_dim=OLD,
    )


def write(path: str) -> None:
    """Add, edit and delete rows as ai-memory does, until stdin ends; then print what was done."""
    dice = random.Random(20)
    changes: list[tuple[str, str, float]] = []
    refused: list[str] = []
    waits = [0.0]
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA busy_timeout=5000")
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=NORMAL")
        keys = [key for (key,) in db.execute("SELECT id FROM memories ORDER BY id")]
        print("at work", flush=True)
        while not waiting.select([sys.stdin], [], [], PAUSE_SECONDS)[0]:
            what = dice.choice(["add", "edit", "edit and embed", "delete"])
            key = dice.choice(keys) if what != "add" else f"{dice.getrandbits(64):016x}"
            began = time.monotonic()
            try:
                apply(db, what, key, f"{len(changes)} of the writer")
            except sqlite3.OperationalError as error:
                refused.append(str(error))
                continue
            waits.append(time.monotonic() - began)
            changes.append((what, key, time.time()))
            if what == "add":
                keys.append(key)
            elif what == "delete":
                keys.remove(key)
    print(json.dumps([changes, refused, max(waits)]))


def apply(db: sqlite3.Connection, what: str, key: str, content: str) -> None:
    """Make one change; where the daemon embeds, it is with the old model."""
    vector = hashed_vector(f"title {key} {content}", OLD)
    match what:
        case "add":
            row = vars(old_memory(key, content))
            places = ", ".join(f":{name}" for name in row)
            db.execute(f"INSERT INTO memories ({', '.join(row)}) VALUES ({places})", row)
        case "edit":
            db.execute("UPDATE memories SET content = ? WHERE id = ?", (content, key))
        case "edit and embed":
            db.execute(
                "UPDATE memories SET content = ?, embedding = ?, embedding_dim = ? WHERE id = ?",
                (content, vector, OLD, key),
            )
        case _:
            db.execute("DELETE FROM memories WHERE id = ?", (key,))


if __name__ == "__main__":
    write(*sys.argv[1:])
