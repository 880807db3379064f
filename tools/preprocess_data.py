#!/usr/bin/env python
"""Tokenize JSON-lines text into the .bin/.idx pairs that pretraining reads."""

from __future__ import annotations

import argparse
import os
import signal
import sys

from megatron_iiet.data.preprocess import PreprocessOptions, preprocess


def parse_arguments() -> PreprocessOptions:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--input", nargs="+", required=True, help="files or quoted globs: .jsonl, .jsonl.gz, .jsonl.zst"
    )
    parser.add_argument(
        "--output-prefix", required=True, help="writes OUTPUT_PREFIX_text_document.bin and .idx"
    )
    parser.add_argument("--tokenizer-model", required=True, help="SentencePiece .model or tokenizer.json")
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="one output pair for each key")
    parser.add_argument("--append-eod", action="store_true", help="end every document with the eod token")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="tokenizing processes (default: all cores)"
    )
    arguments = parser.parse_args()
    return PreprocessOptions(
        inputs=arguments.input,
        output_prefix=arguments.output_prefix,
        tokenizer_model=arguments.tokenizer_model,
        json_keys=arguments.json_keys,
        append_eod=arguments.append_eod,
        workers=arguments.workers,
    )


def main() -> int:
    options = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave through the clean-up of what was begun
    try:
        print(preprocess(options))
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
