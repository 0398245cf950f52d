"""`python -m reembed`, and the console script: signals are taken before all else is imported."""

from typing import NoReturn

from reembed.pipeline.interrupts import Interrupts


def entry() -> NoReturn:
    """Run the program; end the process with its exit code."""
    interrupts = Interrupts()
    interrupts.take()
    from reembed.pipeline.cli import entry

    entry(interrupts)


if __name__ == "__main__":
    entry()
