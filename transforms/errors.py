"""The exception tree.

    ReembedError            exit code  meaning
    ├── UsageError                  2  an option or a setting that can't be used
    ├── NoEmbedderError             2  the settings say that nothing is to be embedded
    ├── EmbedderError               3  the embedder could not be built, or is not the one asked for
    ├── StoreError                  1  the database can't be read or written
    ├── StagingError                1  the run directory can't be used
    ├── RunError                    1  the run failed; the store is unchanged
    ├── VerifyError                 1  the store does not hold what a run says it wrote
    ├── StampError                  4  a stamp was refused
    ├── TooManySkippedError         5  too many rows failed; the store is unchanged
    └── IncompleteError             6  a replacement is incomplete: rerun or roll back

    TextRejected            one text that a model will not take: trouble with a row, which
                            becomes a `Skipped` value and never ends a run

An UndoneError is a StoreError.

Each message is one sentence or two: what was found, why it matters, what to do. It never
holds a row's text or a key. Lines of their own may follow it, such as flags or a command to copy;
only where columns are proposed do they show the beginning of a value. The arguments of each
constructor go to `Exception.__init__`, so that an error survives pickling between a worker and
the launcher.
"""


class ReembedError(Exception):
    """Something that ends the run; the message is meant for the user, `details` are lines below it.

    >>> StoreError("it has no such table; select one", "--table docs").details
    ('--table docs',)
    """

    exit_code = 1

    def __init__(self, message: str, *details: str) -> None:
        super().__init__(message, *details)

    def __str__(self) -> str:
        return str(self.args[0])

    @property
    def details(self) -> tuple[str, ...]:
        """Lines to print below the message."""
        return self.args[1:]


class UsageError(ReembedError):
    """An option or a setting that can't be used."""

    exit_code = 2


class NoEmbedderError(ReembedError):
    """The settings say that nothing is to be embedded."""

    exit_code = 2


class EmbedderError(ReembedError):
    """The embedder could not be built, or it is not the one that was asked for."""

    exit_code = 3


class StoreError(ReembedError):
    """The database can't be read or written."""


class UndoneError(StoreError):
    """SQLite did not write all rows of a transaction, which was undone."""


class StagingError(ReembedError):
    """The run directory can't be made, written or read."""


class RunError(ReembedError):
    """The run failed; the store is unchanged."""


class VerifyError(ReembedError):
    """The store does not hold what a run says it wrote."""


class StampError(ReembedError):
    """Vectors may not be stamped as the target model's, or the store has no stamps."""

    exit_code = 4


class TooManySkippedError(ReembedError):
    """Too many rows failed to be worth replacing the others; the store is unchanged."""

    exit_code = 5


class IncompleteError(ReembedError):
    """A replacement, or its undoing, was begun and has not come to its end."""

    exit_code = 6


class TextRejected(Exception):
    """A model will not take this text, or one of these texts; the message is the reason.

    `most` is how many it says that it takes at a time, where that may be the reason.
    """

    def __init__(self, reason: str, most: int | None = None) -> None:
        super().__init__(reason, most)
        self.most = most

    def __str__(self) -> str:
        return str(self.args[0])


_BY_NAME: dict[str, type[ReembedError]] = {
    kind.__name__: kind for kind in (*ReembedError.__subclasses__(), UndoneError)
}


def unwrap(error: BaseException) -> ReembedError | None:
    """Find the error of ours that a runner passed on, perhaps wrapped into another.

    Runners add a note in square brackets, or carry a worker's exception as the text of its
    traceback, of which the last line that names one of our classes holds the message.

    >>> unwrap(RuntimeError("\\nreembed.transforms.errors.StoreError: locked [while running 'X']"))
    StoreError('locked')
    """
    if isinstance(error, ReembedError):
        return type(error)(_without_note(str(error)), *error.details)
    for line in reversed(str(error).splitlines()):
        before, _, message = line.partition("Error: ")
        kind = _BY_NAME.get(before.rpartition(".")[2] + "Error")
        if kind and before.strip().startswith(__name__ + "."):
            return kind(_without_note(message))
    return None


def _without_note(message: str) -> str:
    return message.split(" [while running")[0].strip()
