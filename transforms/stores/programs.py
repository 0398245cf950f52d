"""Files of programs whose vectors can't be moved here, known by their tables, and what does it.

Replacing what looks like vectors in them would succeed, and their search would fail.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from reembed.transforms.errors import StoreError
from reembed.transforms.stores.sqlite import folded, quoted


@dataclass(frozen=True)
class Program:
    """A program by the tables of its files and their columns; why and by what command they move.

    `texts` stand in the SQL of some table.
    """

    name: str
    tables: Mapping[str, Set[str]]
    why: str
    command: str
    texts: tuple[str, ...] = ()


PROGRAMS = (
    Program(
        "Chroma",
        {
            "embeddings_queue": {"seq_id", "topic", "vector"},
            "segments": {"id", "scope"},
        },
        "it is searched through index files beside it, and the vectors in it are only a log; embed "
        "the documents again through its own API, as into a new collection",
        "new.add(ids=old['ids'], documents=old['documents'], metadatas=old['metadatas'])",
    ),
    Program(
        "qmd",
        {"content_vectors": {"hash", "seq"}, "vectors_vec": set()},
        "it keeps only the places of the chunks that were embedded, not their texts; qmd cuts and "
        "embeds them again itself",
        "qmd embed -f",
        ("hash_seq",),
    ),
    Program(
        "txtai",
        {"sections": {"indexid", "id", "text"}, "documents": {"id", "data"}},
        "its vectors are in an index file beside it; txtai embeds the texts again itself",
        "embeddings.reindex(path='MODEL')",
    ),
    *(
        Program(
            "mnemosyne",
            {"working_memory": {"id", "content"}, memories: set()},
            "its vectors are quantized and kept in several tables; mnemosyne embeds them again "
            "itself, and makes a backup first",
            "mnemosyne reindex --model MODEL",
            ("binary_vector",),
        )
        for memories in ("vec_episodes", "episodic_memory")  # The former with sqlite-vec only.
    ),
)

_SCHEMA = "SELECT name, ifnull(sql, '') FROM sqlite_schema WHERE type = 'table'"
_INDEX = (
    "SELECT tbl_name, name, sql FROM sqlite_schema WHERE type = 'index' "
    "AND instr(lower(sql), 'libsql_vector_idx') LIMIT 1"
)


def find_program(db: sqlite3.Connection) -> Program | None:
    """The program whose file a database is, if it is one of those."""
    schema = {folded(name): sql for name, sql in db.execute(_SCHEMA)}
    sql = " ".join(schema.values())
    return next(
        (
            program
            for program in PROGRAMS
            if program.tables.keys() <= schema.keys()
            and all(text in sql for text in program.texts)
            # Not of a virtual table, whose module may not be there.
            and all(not names or names <= _columns(db, t) for t, names in program.tables.items())
        ),
        None,
    )


def check_programs(db: sqlite3.Connection, path: Path) -> None:
    """Raise StoreError for a file that another program must move."""
    program = find_program(db)
    if program is not None:
        raise StoreError(f"{path} is a database of {program.name}: {program.why}", program.command)
    found = db.execute(_INDEX).fetchone()
    if found is not None:
        table, index, sql = found
        raise StoreError(
            f"{path} is a database of libSQL: the table {table} has the index {index} by "
            "libsql_vector_idx, without which SQLite can neither write its vectors nor check the "
            "file; re-embed it with the program that made it, or, if the new vectors are as long "
            "as the old ones, drop the index before the run and create it again with libSQL after "
            "it",
            f"DROP INDEX {quoted(index)};",
            f"{sql};",
        )


def _columns(db: sqlite3.Connection, table: str) -> set[str]:
    return {
        folded(name) for (name,) in db.execute("SELECT name FROM pragma_table_info(?)", [table])
    }
