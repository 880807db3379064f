#!/usr/bin/env python
"""Draw the loss curves of one or several runs into one PNG."""

from __future__ import annotations

import argparse

from megatron_iiet.config import exit_with_error


def main() -> None:
    """Parse, plot."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--run", action="append", required=True, metavar="LABEL=DIR", help="may be repeated")
    parser.add_argument("--output", required=True, metavar="FILE.png")
    arguments = parser.parse_args()
    runs = dict(run.rpartition("=")[::2] for run in arguments.run)
    if "" in runs or "" in runs.values():
        exit_with_error(f"--run wants LABEL=DIR, found {' '.join(arguments.run)}")
    try:
        from megatron_iiet.training.curves import plot_losses

        plot_losses(runs, arguments.output)
    except (ValueError, OSError) as error:
        exit_with_error(str(error))


if __name__ == "__main__":
    main()
