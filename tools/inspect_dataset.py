#!/usr/bin/env python
"""Show what a tokenized corpus holds; --verify checks every byte of it."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from megatron_iiet.config.errors import ArgumentParser
from megatron_iiet.data.corpora.inspection import Summary, summarize
from megatron_iiet.data.corpora.streams import corpus_prefix
from megatron_iiet.data.corpora.verification import verify
from megatron_iiet.data.tokenizers.loading import load_tokenizer


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="of corpora, or names of their files")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="check digests, pointers, lengths, ranges of ids and ends of documents; exit 1 for any defect",
    )
    parser.add_argument("--tokenizer", help="SentencePiece .model or tokenizer.json, to decode samples")
    parser.add_argument("--samples", type=int, default=3, help="documents to decode (default: 3)")
    parser.add_argument("--json", action="store_true", help="print a JSON list, one entry for each prefix")
    return parser.parse_args()


def inspect(prefix: str, arguments: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Print what a corpus holds, unless as JSON; its entry, and whether it is sound."""
    entry: dict[str, Any] = {"prefix": prefix}
    sound = True
    try:
        tokenizer = load_tokenizer(arguments.tokenizer) if arguments.tokenizer else None
        summary: Summary = summarize(prefix, tokenizer, arguments.samples)
        entry |= summary.as_dict()
        if not arguments.json:
            print(summary)
    except (ValueError, OSError) as error:
        sound = False
        entry["error"] = str(error)
        print(f"error: {error}", file=sys.stderr)
    if arguments.verify:
        result = verify(prefix, arguments.tokenizer)
        sound &= not result.num_defects
        entry["verification"] = vars(result)
        if not arguments.json:
            print(result)
    return entry, sound


def main() -> int:
    arguments = parse_arguments()
    try:
        prefixes = dict.fromkeys(map(corpus_prefix, arguments.prefixes))
        results = [inspect(prefix, arguments) for prefix in prefixes]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted.", file=sys.stderr)
        return 130
    if arguments.json:
        print(json.dumps([entry for entry, _ in results], indent=2, ensure_ascii=False))
    return 0 if all(sound for _, sound in results) else 1


if __name__ == "__main__":
    sys.exit(main())
