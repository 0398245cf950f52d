"""Staging: the run directory, its shards, backup and manifest. All Parquet is in this package."""

from transforms.staging.backup import (
    Ledger,
    read_ledger,
    saved_ranges,
    write_backup,
)
from transforms.staging.files import require_room, tree_bytes
from transforms.staging.manifest import Manifest, Scope, State, spans
from transforms.staging.runs import (
    RunDirectory,
    discard_run_if_empty,
    find_runs,
    link_run,
    lock_database,
    lock_holder,
    make_run,
    new_run,
    new_token,
    remove_run,
    staging_root,
)
from transforms.staging.shards import Shard, read_shards, read_tokens, read_vectors

__all__ = [
    "Ledger",
    "Manifest",
    "RunDirectory",
    "Scope",
    "Shard",
    "State",
    "discard_run_if_empty",
    "find_runs",
    "link_run",
    "lock_database",
    "lock_holder",
    "make_run",
    "new_run",
    "new_token",
    "read_ledger",
    "read_shards",
    "read_tokens",
    "read_vectors",
    "remove_run",
    "require_room",
    "saved_ranges",
    "spans",
    "staging_root",
    "tree_bytes",
    "write_backup",
]
