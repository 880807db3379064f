"""Which documents are kept, and for which split: decided by keyed hashes of their text alone.

A document's fate depends neither on its place nor on the number of jobs, and copies share it. The sample
and the held-out splits use different keys, so they are independent; the split does not depend on the seed
of the sample, so a new sample never moves a document from a held-out split into training.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

from megatron_iiet.data.reading.long_text import LongText

DIGEST_BYTES = 16

_SPLIT_KEY = b"held-out split"


def text_digest(text: str | LongText) -> bytes:
    """128-bit BLAKE2b of the text's UTF-8 bytes."""
    if isinstance(text, str):
        return blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()
    state = blake2b(digest_size=DIGEST_BYTES)
    for part in text.parts():
        state.update(part.encode())
    return state.digest()


@dataclass(frozen=True)
class Filters:
    """The random choices over documents."""

    rate: float | None = None
    """Fraction of documents in the sample; None keeps all."""
    seed: int = 0
    validation: float = 0.0
    test: float = 0.0

    @property
    def splits(self) -> bool:
        """Whether outputs are divided into train, validation and test."""
        return self.validation > 0 or self.test > 0

    @property
    def need_digest(self) -> bool:
        """Whether any choice is to be made."""
        return self.splits or (self.rate is not None and self.rate < 1)

    def sampled(self, digest: bytes) -> bool:
        """Whether a document is in the sample."""
        if self.rate is None or self.rate >= 1:
            return True
        return _fraction(digest, b"sample %d" % self.seed) < self.rate

    def split(self, digest: bytes) -> str:
        """train, validation or test."""
        place = _fraction(digest, _SPLIT_KEY)
        if place < self.validation:
            return "validation"
        return "test" if place < self.validation + self.test else "train"


def _fraction(digest: bytes, key: bytes) -> float:
    """A uniform number in [0, 1) that digest and key determine."""
    return int.from_bytes(blake2b(digest, digest_size=6, key=key).digest(), "little") / 2**48
