#!/usr/bin/env python
"""Train a SentencePiece BPE tokenizer on text."""

from __future__ import annotations

import sys

from megatron_iiet.config.errors import ArgumentParser
from megatron_iiet.data.reading.kinds import ALL_KINDS
from megatron_iiet.data.tokenizers.training import train_tokenizer


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--input", nargs="+", required=True, help=f"files, folders or quoted globs of {ALL_KINDS}"
    )
    parser.add_argument("--output-prefix", required=True, help="writes OUTPUT_PREFIX.model")
    parser.add_argument("--vocab-size", type=int, default=32000, help="number of pieces")
    parser.add_argument(
        "--max-characters",
        type=int,
        default=30_000_000,
        help="text to train on, from all inputs by their sizes",
    )
    parser.add_argument("--json-key", default="text", help="key of the text in each line")
    arguments = parser.parse_args()
    try:
        report = train_tokenizer(
            arguments.input,
            arguments.output_prefix,
            vocab_size=arguments.vocab_size,
            max_characters=arguments.max_characters,
            key=arguments.json_key,
        )
        print(report)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
