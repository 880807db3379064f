"""How many tokens a corpus has, and so what fraction of it makes a sample."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from megatron_iiet.data.preprocess.options import PreprocessOptions
from megatron_iiet.data.reading.long_text import parts_of
from megatron_iiet.data.reading.sources import InputFile, open_input
from megatron_iiet.data.reading.tables import parquet_row_count
from megatron_iiet.data.reading.text import chunks_of, parse_rows
from megatron_iiet.data.tokenizers.base import Tokenizer, UncuttableError

_LOOKED_AT_INPUTS = 16
_LOOKED_AT_BYTES = 2 << 20  # of the text of each
_LOOKED_AT_CHUNK_BYTES = 1 << 16


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
        corpus_tokens, measured_on = estimate(options, inputs, encoder)
    rate = options.sample_tokens / corpus_tokens
    return {"rate": rate, "corpus_tokens": corpus_tokens, "measured_on": measured_on}


def estimate(options: PreprocessOptions, inputs: Sequence[InputFile], encoder: Tokenizer) -> tuple[int, str]:
    """Tokens of the corpus, and what was looked at: the starts of up to 16 inputs spread evenly, scaled by
    the bytes of all; deterministic.

    Defective rows are left out, damaged files used as far as they can be read.
    """
    count = min(_LOOKED_AT_INPUTS, len(inputs))
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
    read, tokens, stored = 0, 0, 0.0
    kind = options.reading.format_of(file.path)
    with suppress(ValueError), open_input(file) as opened:  # whoever makes the shard will complain
        rows = parquet_row_count(opened, file.path) if kind == "parquet" and file.size else 0
        for chunk in chunks_of(opened, file.path, options.reading, _LOOKED_AT_CHUNK_BYTES):
            read += len(chunk.data) + 1
            for row in parse_rows(chunk, options.reading)[0]:
                for content in row.texts:
                    with suppress(UncuttableError):
                        ids = encoder.encode_parts(parts_of(content))
                        tokens += ids.size + (options.append_eod and ids.size > 0)
            if rows:
                stored = file.size * (chunk.first_line + chunk.data.count(b"\n")) / rows
            else:  # a plain file's block reaches beyond the chunk
                stored = min(read, opened.tell()) if kind == "jsonl" else opened.tell()
            if read >= _LOOKED_AT_BYTES:
                break
        else:
            stored = file.size
    return tokens, stored
