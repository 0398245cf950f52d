"""`python -m pipeline` in a checkout: the program that `python -m reembed` is, too."""

import sys

from reembed.__main__ import entry

if __name__ == "__main__":
    sys.modules.pop("pipeline", None)  # Or its code would be there under two names.
    entry()
