"""A run through a slow server against the least time it could take: `python -m benchmarks.remote`.

The server, on loopback, takes 200 ms a request and works on 8 at a time; more of them wait. The
ideal is what the requests then take if 8 are always at work. A second server, for a tenth of the
rows, answers 429 to every third request, which costs time but no row.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2

from reembed.transforms.stores.demo import Memory, create_store

SECONDS, AT_ONCE, DIMENSION = 0.2, 8, 384


def main() -> None:
    """Measure and print one line a server."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=100)
    options = parser.parse_args()
    with subprocess.Popen(
        [sys.executable, "-m", "tests.server"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        server = f"http://127.0.0.1:{int(process.stdout.readline())}"
        try:
            refusing = {"kind": "status", "status": 429, "of": 3}
            print(_measure(server, "200ms", [], options.rows, options.batch))
            print(_measure(server, "429", [refusing], options.rows // 10, options.batch))
        finally:
            process.kill()


def _measure(server: str, name: str, faults: list[dict[str, Any]], rows: int, batch: int) -> str:
    scenario = {"dimension": DIMENSION, "seconds": SECONDS, "at_once": AT_ONCE, "faults": faults}
    httpx2.put(f"{server}/scenarios/{name}", json=scenario).raise_for_status()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "m.db"
        create_store(str(path), [_memory(number) for number in range(rows)])
        started = time.monotonic()
        done = subprocess.run(
            [
                *(sys.executable, "-m", "reembed", "--db", str(path), "--json"),
                *("--backend", "openai-compatible", "--base-url", f"{server}/{name}"),
                *("--model", "a-model", "--dim", str(DIMENSION), "--batch", str(batch)),
            ],
            env=os.environ | {"AI_MEMORY_NO_CONFIG": "1"},
            stdout=subprocess.PIPE,
            check=True,
        )
        whole = time.monotonic() - started
    outcome = json.loads(done.stdout)
    log = httpx2.get(f"{server}/scenarios/{name}").json()
    ideal = math.ceil(rows / batch) * SECONDS / AT_ONCE
    return (
        f"{name}: {outcome['reembedded']:,} of {rows:,} rows, {log['requests']} requests, "
        f"{log['most_at_once']} in flight at most; ideal {ideal:.1f} s, at the server "
        f"{log['seconds']:.1f} s ({log['seconds'] / ideal:.2f} times), whole process {whole:.1f} s "
        f"({whole / ideal:.2f} times)"
    )


def _memory(number: int) -> Memory:
    return Memory(
        id=f"{number:08d}",
        namespace="global",
        title=f"memory {number}",
        content=f"what was to be kept of the thing {number} " * 6,
        embedding=None,
        embedding_dim=None,
    )


if __name__ == "__main__":
    main()
