"""What Beam's `--setup_file ./setup.py` builds for its workers; all else is in pyproject.toml."""

from setuptools import setup

setup()
