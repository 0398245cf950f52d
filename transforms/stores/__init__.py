"""Stores: where rows are read and vectors replaced. All SQL is in this package."""

from transforms.stores.ai_memory import (
    AiMemoryStore,
    Replacement,
    open_store,
    recover_store,
    space_stamp,
)
from transforms.stores.codec import decode
from transforms.stores.survey import Survey, take_survey

__all__ = [
    "AiMemoryStore",
    "Replacement",
    "Survey",
    "decode",
    "open_store",
    "recover_store",
    "space_stamp",
    "take_survey",
]
