"""Run the benchmarks that need nothing else: `python -m benchmarks`.

benchmarks.speed   how fast embedding and whole runs are beside peers (takes --json, --plot)
benchmarks.rows    what a row costs where the model costs nothing
Besides these there are benchmarks.remote, a run through a slow server, and benchmarks.peers.
`python -m benchmarks --rows 50 --rounds 1` is a quick try, not a measurement.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from benchmarks.whole import ROOT


def main() -> None:
    """Run them one after the other; stop at the first that fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", help="default: each one's own")
    parser.add_argument("--rounds")
    options, more = parser.parse_known_args()
    rows = ["--rows", options.rows] if options.rows else []
    rounds = ["--rounds", options.rounds] if options.rounds else []
    for name, flags in (("speed", [*rows, *rounds, *more]), ("rows", rows)):
        done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *flags], cwd=ROOT)
        if done.returncode:
            sys.exit(done.returncode)
    print("There is also benchmarks.remote: a run through a slow server, about a minute or two.")


if __name__ == "__main__":
    main()
