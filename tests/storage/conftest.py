"""The small models of the tests of models."""

from tests.models.conftest import build, tokens

__all__ = ["build", "tokens"]
