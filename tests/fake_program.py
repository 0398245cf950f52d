"""The whole program with the fake embedder in place of a model: `python -m tests.fake_program`.

`--model` is any name, `--dim` the length of its vectors (8 without). Variables that start with
FAKE_ set the rest of the target (FAKE_PROMPT, FAKE_WINDOW, FAKE_NORMALIZED), the rows of a range
(FAKE_RANGE_ROWS), seconds to wait in each call of the embedder (FAKE_SECONDS), the rows from
which on a replacement takes several transactions (FAKE_ROWS_AT_ONCE), the rows of the first of
them (FAKE_FIRST_ROWS), and a number that changes all vectors a little (FAKE_BEHAVIOUR). With
FAKE_LENIENT it takes the texts that the fake embedder rejects.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from reembed.pipeline import plan as planning
from reembed.pipeline.cli import entry
from reembed.pipeline.options import Options
from reembed.pipeline.settings import Settings
from reembed.transforms import replacing
from reembed.transforms.embedders import Target, fake
from reembed.transforms.embedders.models import ModelFiles
from reembed.transforms.rows import Vectors

embedded: list[str] = []
"""The texts that were embedded in this process."""


class Slow(fake.FakeEmbedder):
    """The fake embedder, with the time that a model takes."""

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Return vectors of shape (len(texts), dimension)."""
        time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
        embedded.extend(texts)
        texts = [os.environ.get("FAKE_PROMPT", "") + text for text in texts]
        if os.environ.get("FAKE_LENIENT"):
            texts = [text.replace(fake.POISON, "") for text in texts]
        vectors = super().embed(texts)
        return vectors + np.float32(os.environ.get("FAKE_BEHAVIOUR", "0"))


def find_target(settings: Settings, options: Options) -> tuple[Target, ModelFiles]:
    """The target that the options and the environment describe."""
    dimension = settings.dimension or 8
    target = Target(
        "fake",
        settings.model,
        dimension,
        prompt=os.environ.get("FAKE_PROMPT", ""),
        window=int(os.environ.get("FAKE_WINDOW", "256")),
        normalized=os.environ.get("FAKE_NORMALIZED", "1") == "1",
    )
    return target, ModelFiles(Path("nowhere"), dimension, None)


PLACES = (
    (planning, "_find_target"),
    (planning, "RANGE_ROWS"),
    (fake, "FakeEmbedder"),
    (replacing, "MOST_ROWS_AT_ONCE"),
    (replacing, "_FIRST_ROWS"),
)
"""What `install` takes the place of."""


def install() -> None:
    """Put the fakes in their places."""
    planning._find_target = find_target
    planning.RANGE_ROWS = int(os.environ.get("FAKE_RANGE_ROWS", "64"))
    fake.FakeEmbedder = Slow  # type: ignore[misc]
    at_once = os.environ.get("FAKE_ROWS_AT_ONCE")
    replacing.MOST_ROWS_AT_ONCE = int(at_once) if at_once else replacing.MOST_ROWS_AT_ONCE
    first = os.environ.get("FAKE_FIRST_ROWS")
    replacing._FIRST_ROWS = int(first) if first else replacing._FIRST_ROWS


if __name__ == "__main__":
    install()
    entry()
