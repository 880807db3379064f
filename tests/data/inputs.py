"""Text of the data tests, made from a list of syllables."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

_SYLLABLES = [c + v for c in "bcdfghjklmnprstvwxz" for v in "aeiou"]


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of made-up words, some with line breaks, digits and characters outside ASCII."""
    chance = random.Random(seed)
    words = ["".join(chance.choices(_SYLLABLES, k=chance.randint(1, 4))) for _ in range(500)]
    texts = []
    for _ in range(count):
        lines = [
            " ".join(chance.choices(words, k=chance.randint(3, 20))) for _ in range(chance.randint(1, 5))
        ]
        texts.append(f"{chance.randint(0, 999)} é世 " + "\n".join(lines))
    return texts


def jsonl(texts: Sequence[str]) -> bytes:
    return "".join(json.dumps({"text": text, "meta": {}}) + "\n" for text in texts).encode()
