"""The file that travels with every export, as a file: whoever imports it imports transformers."""

from __future__ import annotations

from pathlib import Path

MODELING_FILE = "modeling_iiet.py"
AUTO_MAP = {
    "AutoConfig": "modeling_iiet.IIETConfig",
    "AutoModel": "modeling_iiet.IIETModel",
    "AutoModelForCausalLM": "modeling_iiet.IIETForCausalLM",
    "AutoModelForSequenceClassification": "modeling_iiet.IIETForSequenceClassification",
}
"""What ``config.json`` says of its classes, as the file itself does."""


def modeling_code() -> bytes:
    """Its content: it computes an exported model without this package."""
    return Path(__file__).with_name(MODELING_FILE).read_bytes()
