"""What a corpus holds, in a few numbers: two corpora with the same are taken for one, wherever they lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_iiet.data.corpora.mmididx import new_digest
from megatron_iiet.data.corpora.streams import ShardedDataset, TokenStream

BLOCKS = 32
"""Places of a corpus that are looked at."""
BLOCK_TOKENS = 4096
"""Tokens read at each: a corpus of up to 131,072 is read whole."""


def corpus_identity(stream: TokenStream) -> dict[str, Any]:
    """Sizes, a digest of the tokens and document starts of :data:`BLOCKS` places spread over the stream, and
    of a list of shards the digests that it holds. Costs the same for 1 MB and 1 TB.

    Raises:
        ValueError: a file is missing or damaged.
    """
    identity: dict[str, Any] = {
        "tokens": stream.num_tokens,
        "documents": stream.num_documents,
        "sampled": _sampled_digest(stream),
    }
    if isinstance(stream, ShardedDataset):
        identity["listed"] = stream.shards.content_digest().hex()
    return identity


def identity_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first thing that tells two corpora apart, of the one and of the other; None if nothing does.

    What only one of them has (a list of shards that was made or lost since) tells nothing.
    """
    descriptions = {
        "tokens": "{:,} tokens",
        "documents": "{:,} documents",
        "listed": "shards of digest {:.8}",
        "sampled": "tokens of digest {:.8}",
    }
    for name, description in descriptions.items():
        if name in before and name in now and before[name] != now[name]:
            return description.format(before[name]), description.format(now[name])
    return None


def _sampled_digest(stream: TokenStream) -> str:
    hashed, size = new_digest(), min(BLOCK_TOKENS, stream.num_tokens)
    last = stream.num_tokens - size
    for start in sorted({last * block // (BLOCKS - 1) for block in range(BLOCKS)}):
        hashed.update(stream.read(start, start + size).astype("<i8").tobytes())
        hashed.update(stream.document_starts(start, start + size).astype("<i8").tobytes())
    return hashed.hexdigest()
