"""The rate of a sample: wanted tokens over the tokens of the corpus, which are given or estimated."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from megatron_iiet.data.preprocess.options import PreprocessOptions
from megatron_iiet.data.reading.compression import decompressed_blocks
from megatron_iiet.data.reading.sources import InputFile, open_input
from megatron_iiet.data.reading.text import parse_rows, read_chunks
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
    tokens = used_inputs = 0
    stored_bytes = 0.0
    for number in range(count):
        file = inputs[number * (len(inputs) - 1) // max(1, count - 1)]
        found, text_bytes = _look_at(file, options, encoder)
        if found:
            tokens += found
            used_inputs += 1
            stored_bytes += text_bytes * _stored_per_text_byte(file)
    if not tokens:
        raise ValueError(
            f"No text was found in {count} of the inputs to estimate the corpus by; give --corpus-tokens."
        )
    all_bytes = sum(file.size for file in inputs)
    corpus_tokens = max(1, round(tokens * all_bytes / stored_bytes))
    return corpus_tokens, f"{tokens:,} tokens of {used_inputs:,} inputs"


def _look_at(file: InputFile, options: PreprocessOptions, encoder: Tokenizer) -> tuple[int, int]:
    """Tokens at the start of a file, and the decompressed bytes that hold them."""
    tokens = seen = 0
    with suppress(ValueError):  # whoever makes the shard will complain
        for chunk in read_chunks(file, 1 << 18):
            seen += len(chunk.data) + 1
            for row in parse_rows(chunk, options.json_keys, options.split_by)[0]:
                for text in row.texts:
                    parts = [text] if isinstance(text, str) else text.parts()
                    ids = encoder.encode_parts(parts)
                    tokens += ids.size + (options.append_eod and ids.size > 0)
            if seen >= _TEXT_BYTES:
                break
    return tokens, seen


def _stored_per_text_byte(file: InputFile) -> float:
    """How many bytes of the file a byte of its text takes, by its first megabytes."""
    read = stored = 0
    with suppress(ValueError), open_input(file) as opened:
        for block in decompressed_blocks(opened, file.path):
            read += len(block)
            stored = opened.tell()
            if read >= _TEXT_BYTES and stored < file.size:
                break
    return stored / read if read else 1.0
