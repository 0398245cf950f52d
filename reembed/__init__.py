"""Move a store of texts and vectors from one embedding model to another, safely.

`plan`, `run`, `status`, `verify`, `rollback` and `cleanup` do what the command line does, and give
values; what it would end with another exit code than 0 is a ReembedError. Each name is loaded when
it is first used, so that `import reembed` costs nothing.
"""

from typing import TYPE_CHECKING

__version__ = "0.2.0"

__all__ = [
    "CleanedUp",
    "EmbedderError",
    "IncompleteError",
    "NoEmbedderError",
    "Outcome",
    "Plan",
    "Progress",
    "ReembedError",
    "RolledBack",
    "RunError",
    "RunSettings",
    "RunStatus",
    "StagingError",
    "StampError",
    "Status",
    "StoreError",
    "TooManySkippedError",
    "UsageError",
    "Verified",
    "VerifyError",
    "__version__",
    "cleanup",
    "plan",
    "rollback",
    "run",
    "status",
    "verify",
]

if TYPE_CHECKING:
    from reembed.pipeline.api import (
        RunSettings,
        cleanup,
        plan,
        rollback,
        run,
        status,
        verify,
    )
    from reembed.pipeline.outcome import Outcome
    from reembed.pipeline.plan import Plan
    from reembed.pipeline.results import (
        CleanedUp,
        Progress,
        RolledBack,
        RunStatus,
        Status,
        Verified,
    )
    from reembed.transforms.errors import (
        EmbedderError,
        IncompleteError,
        NoEmbedderError,
        ReembedError,
        RunError,
        StagingError,
        StampError,
        StoreError,
        TooManySkippedError,
        UsageError,
        VerifyError,
    )
else:

    def __getattr__(name: str) -> object:
        """Load a public name, and leave the interpreter as it is."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        from reembed.transforms.interpreter import undisturbed

        at = "transforms.errors" if name.endswith("Error") else _MODULES.get(name, "pipeline.api")
        with undisturbed():
            value = getattr(import_module(f"{__name__}.{at}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        """List the public names, loaded or not."""
        return sorted({*globals(), *__all__})


_MODULES = {
    "Outcome": "pipeline.outcome",
    "Plan": "pipeline.plan",
    "CleanedUp": "pipeline.results",
    "Progress": "pipeline.results",
    "RolledBack": "pipeline.results",
    "RunStatus": "pipeline.results",
    "Status": "pipeline.results",
    "Verified": "pipeline.results",
}
"""Modules of the names that `pipeline.api` does not define."""
