"""Stores: where rows are read and vectors replaced. All SQL is in this package."""

from reembed.transforms.stores.ai_memory import AiMemoryStore, space_stamp
from reembed.transforms.stores.base import (
    Lockout,
    Replacement,
    Store,
    Written,
    contradicts,
    known_part,
    same_columns,
)
from reembed.transforms.stores.codec import decode
from reembed.transforms.stores.copies import Copy, find_copies, unchanged_copies
from reembed.transforms.stores.opening import (
    KINDS,
    check_database,
    choose_store,
    open_store,
    real_path,
    recover_store,
    reopen_store,
)
from reembed.transforms.stores.survey import Holding, Survey, take_stock, take_survey
from reembed.transforms.stores.trial import check_update, try_restore, try_update

__all__ = [
    "KINDS",
    "AiMemoryStore",
    "Copy",
    "Holding",
    "Lockout",
    "Replacement",
    "Store",
    "Survey",
    "Written",
    "check_database",
    "check_update",
    "choose_store",
    "contradicts",
    "decode",
    "find_copies",
    "known_part",
    "open_store",
    "real_path",
    "recover_store",
    "reopen_store",
    "same_columns",
    "space_stamp",
    "take_stock",
    "take_survey",
    "try_restore",
    "try_update",
    "unchanged_copies",
]
