#!/usr/bin/env python
"""Join tokenized corpora (pairs .bin/.idx or shard lists .shards) into one."""

from __future__ import annotations

import argparse
import sys

from megatron_iiet.config.errors import ArgumentParser
from megatron_iiet.data.corpora.merge import merge
from megatron_iiet.durable import Terminated, leave_cleanly_on_sigterm


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--inputs",
        nargs="+",
        required=True,
        metavar="PREFIX",
        help="prefixes of corpora, or quoted globs of prefixes; joined in this order",
    )
    parser.add_argument("--output-prefix", required=True, help="writes OUTPUT_PREFIX.bin, .idx and .shards")
    parser.add_argument(
        "--by-reference",
        action="store_true",
        help="write only OUTPUT_PREFIX.shards, which names the inputs' pairs where they are",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus of that prefix")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    leave_cleanly_on_sigterm()
    try:
        print(merge(**vars(arguments)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, Terminated) as signal:
        print("error: interrupted; nothing was written.", file=sys.stderr)
        return 143 if isinstance(signal, Terminated) else 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
