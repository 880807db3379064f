"""The rate of a sample: wanted tokens over the tokens of the corpus, which are given or estimated."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from megatron_iiet.data.preprocess.options import PreprocessOptions
from megatron_iiet.data.reading.compression import decompressed_blocks
from megatron_iiet.data.reading.sources import InputFile, open_input
from megatron_iiet.data.reading.text import Chunk, parse_rows
from megatron_iiet.data.tokenizers.base import Tokenizer

_INPUTS = 16
_TEXT_BYTES = 2 << 20


def sampling(
    options: PreprocessOptions, inputs: Sequence[InputFile], encoder: Tokenizer
) -> dict[str, Any] | None:
    """What a plan says about its sample: rate, corpus_tokens, measured_on; None where none is wanted.

    Raises:
        ValueError: nothing could be measured.
    """
    if options.sample_tokens is None:
        return None
    corpus_tokens, measured_on = options.corpus_tokens, None
    if corpus_tokens is None:
        corpus_tokens, measured_on = _estimate(options, inputs, encoder)
    rate = options.sample_tokens / corpus_tokens
    return {"rate": rate, "corpus_tokens": corpus_tokens, "measured_on": measured_on}


def _estimate(options: PreprocessOptions, inputs: Sequence[InputFile], encoder: Tokenizer) -> tuple[int, str]:
    """Tokens of the corpus, and what was looked at: the starts of up to 16 inputs spread evenly, scaled by
    the bytes of all; deterministic.

    Defective rows are left out, damaged files used as far as they can be read.
    """
    count = min(_INPUTS, len(inputs))
    looks = [
        _look_at(inputs[number * (len(inputs) - 1) // max(1, count - 1)], options, encoder)
        for number in range(count)
    ]
    tokens = sum(found for found, _ in looks)
    if not tokens:
        raise ValueError(
            f"No text was found in {count} of the inputs to estimate the corpus by; give --corpus-tokens."
        )
    stored_bytes = sum(stored for found, stored in looks if found)
    all_bytes = sum(file.size for file in inputs)
    corpus_tokens = max(1, round(tokens * all_bytes / stored_bytes))
    return corpus_tokens, f"{tokens:,} tokens of {sum(found > 0 for found, _ in looks):,} inputs"


def _look_at(file: InputFile, options: PreprocessOptions, encoder: Tokenizer) -> tuple[int, float]:
    """Tokens in the first megabytes of a file, and the bytes that these take as stored."""
    text = bytearray()
    stored, whole = 0, 0
    with suppress(ValueError), open_input(file) as opened:  # whoever makes the shard will complain
        for block in decompressed_blocks(opened, file.path):
            text += block
            stored = opened.tell()
            whole = text.rfind(b"\n") + 1
            if len(text) >= _TEXT_BYTES and whole and stored < file.size:
                break
        else:
            whole = len(text)
    tokens = 0
    for row in parse_rows(Chunk(file.path, 1, bytes(text[:whole])), options.json_keys, options.split_by)[0]:
        for content in row.texts:
            ids = encoder.encode_parts([content] if isinstance(content, str) else content.parts())
            tokens += ids.size + (options.append_eod and ids.size > 0)
    return tokens, stored * whole / max(1, len(text))
