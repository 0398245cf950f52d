"""Entry point for Beam's `--setup_file ./setup.py`; the metadata is in pyproject.toml."""

from setuptools import setup

setup()
