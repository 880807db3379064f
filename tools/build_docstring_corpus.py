#!/usr/bin/env python
"""Collect the docstrings of the installed packages into a small English corpus (.jsonl.zst)."""

from __future__ import annotations

import argparse
import os
import sys

from megatron_iiet.data.docstrings import build_corpus


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True, help="file to write, ending in .jsonl.zst")
    parser.add_argument("--min-characters", type=int, default=200, help="leave out shorter docstrings")
    parser.add_argument("--packages", nargs="+", help="read only these packages (default: all installed)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="parsing processes")
    arguments = parser.parse_args()
    try:
        report = build_corpus(
            arguments.output,
            packages=arguments.packages,
            min_characters=arguments.min_characters,
            workers=arguments.workers,
        )
        print(report)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
