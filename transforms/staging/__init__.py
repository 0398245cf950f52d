"""Staging: the run directory, its shards, backup and manifest. All Parquet is in this package."""

from reembed.transforms.staging.backup import (
    Ledger,
    read_ledger,
    saved_columns,
    saved_ranges,
    write_backup,
)
from reembed.transforms.staging.files import count_rows, is_whole, publish, require_room, tree_bytes
from reembed.transforms.staging.inputs import decode_input, encode_input
from reembed.transforms.staging.manifest import Manifest, Rules, Scope, State, spans
from reembed.transforms.staging.runs import (
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
    run_parent,
    staging_root,
)
from reembed.transforms.staging.shards import (
    Shard,
    encode_shard,
    read_shards,
    read_tokens,
    read_vectors,
)

__all__ = [
    "Ledger",
    "Manifest",
    "Rules",
    "RunDirectory",
    "Scope",
    "Shard",
    "State",
    "count_rows",
    "decode_input",
    "discard_run_if_empty",
    "encode_input",
    "encode_shard",
    "find_runs",
    "is_whole",
    "link_run",
    "lock_database",
    "lock_holder",
    "make_run",
    "new_run",
    "new_token",
    "publish",
    "read_ledger",
    "read_shards",
    "read_tokens",
    "read_vectors",
    "remove_run",
    "require_room",
    "run_parent",
    "saved_columns",
    "saved_ranges",
    "spans",
    "staging_root",
    "tree_bytes",
    "write_backup",
]
