"""Move a store of texts and vectors from one embedding model to another, safely."""

__version__ = "0.2.0"
