#!/usr/bin/env python
"""Say what a run achieved and list the files it left."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_iiet.config import exit_with_error


def main() -> None:
    """Parse, print."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN_DIR", help="output_dir of a training run")
    parser.add_argument(
        "--also", nargs="*", default=[], metavar="PATH", help="further files or folders to list"
    )
    parser.add_argument("--brief", action="store_true", help="what it achieved, without files and sample")
    parser.add_argument(
        "--complete",
        action="store_true",
        help="only whether it has taken all its steps: exit status 0, else 2",
    )
    arguments = parser.parse_args()
    from megatron_iiet.training.summary import check_complete, list_files, summarize_run

    try:
        if arguments.complete:
            check_complete(arguments.run)
            return
        summary = summarize_run(arguments.run)
    except ValueError as error:
        exit_with_error(str(error))
    if arguments.brief:
        print(f"{arguments.run}: {summary}")
        return
    print(f"\n{summary}")
    sample = Path(arguments.run) / "sample.txt"
    if sample.is_file():
        print(f"\nsampled text ({sample}):\n{sample.read_text(encoding='utf-8').rstrip()}")
    print("\nfiles:", *list_files(*arguments.also, arguments.run), sep="\n")


if __name__ == "__main__":
    main()
