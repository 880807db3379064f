"""Builds and installs the package: ``pip install -e .``. Metadata is in pyproject.toml."""

from setuptools import find_packages, setup

setup(packages=find_packages(include=["megatron_iiet", "megatron_iiet.*"]))
