#!/usr/bin/env python
"""List the checkpoints of a run, verify them, pin or reject one, set the run back to one.

python tools/checkpoints.py RUN_DIR                      # which there are, and which is in force
python tools/checkpoints.py RUN_DIR --verify             # read all of them, every block against its digest
python tools/checkpoints.py RUN_DIR --pin 5000           # keep it for good
python tools/checkpoints.py RUN_DIR --roll-back 4000     # the next start goes on from there
"""

from __future__ import annotations

from pathlib import Path

from megatron_iiet.config import ArgumentParser, exit_with_error


def main() -> None:
    """Parse, do what is asked for, then list."""
    parser = ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Exit status 1: --verify found damage.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN_DIR", help="output_dir of a training run")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--verify", nargs="*", type=int, metavar="STEP", help="read the checkpoints of these steps, or all"
    )
    what.add_argument("--pin", type=int, metavar="STEP", help="keep this one whatever checkpoint.keep says")
    what.add_argument("--unpin", type=int, metavar="STEP", help="take that back")
    what.add_argument("--reject", type=int, metavar="STEP", help="never go on from this one")
    what.add_argument("--accept", type=int, metavar="STEP", help="take that back")
    what.add_argument(
        "--roll-back",
        type=int,
        metavar="STEP",
        help="once all of it is verified, have the next start go on from this one; later ones stay, rejected",
    )
    parser.add_argument("--reason", default="by hand", help="what is noted with a pin or a rejection")
    arguments = parser.parse_args()
    from megatron_iiet.storage.checkpoint import STATE, checkpoints_folder, tag_of
    from megatron_iiet.storage.retention import PINNED, REJECTED, mark, roll_back, unmark
    from megatron_iiet.training.lock import RunLock

    def folder_of(step: int) -> Path:
        folder = checkpoints_folder(arguments.run) / tag_of(step)
        if not (folder / STATE).is_file():
            raise ValueError(
                f"{folder} is no complete checkpoint; tools/checkpoints.py {arguments.run} lists them"
            )
        return folder

    sound, lock = True, RunLock(arguments.run)
    try:
        if not checkpoints_folder(arguments.run).is_dir():
            raise ValueError(f"{arguments.run} has no checkpoints; give the output_dir of a training run")
        if {arguments.reject, arguments.accept, arguments.roll_back} != {None}:
            lock.take()  # a run that is going on would not notice
        if arguments.pin is not None:
            mark(folder_of(arguments.pin), PINNED, arguments.reason)
        elif arguments.unpin is not None:
            unmark(folder_of(arguments.unpin), PINNED)
        elif arguments.reject is not None:
            mark(folder_of(arguments.reject), REJECTED, arguments.reason)
        elif arguments.accept is not None:
            unmark(folder_of(arguments.accept), REJECTED)
        elif arguments.roll_back is not None:
            roll_back(folder_of(arguments.roll_back))
        if arguments.verify is not None:
            sound = _verify(arguments.run, [folder_of(step) for step in arguments.verify])
        else:
            _print_list(arguments.run)
    except (ValueError, OSError) as error:
        exit_with_error(str(error))
    finally:
        lock.release()
    if not sound:
        raise SystemExit(1)


def _verify(run: str, folders: list[Path]) -> bool:
    """Say of each checkpoint whether it is as it was written; whether all are."""
    from megatron_iiet.storage import checkpoint

    sound = True
    there = [checkpoint.checkpoints_folder(run) / tag for tag in checkpoint.complete_tags(run)]
    for folder in folders or there:
        try:
            size = checkpoint.verify(folder)
            lacks = checkpoint.lacks(folder)
            print(f"{folder.name}  {'read' if lacks else 'verified'}, {size / 1e6:,.1f} MB", end="")
            print(f", {lacks}" if lacks else "")
        except ValueError as error:
            sound = False
            print(f"{folder.name}  {error}")
    return sound


def _print_list(run: str) -> None:
    """A line for each checkpoint, oldest first."""
    from megatron_iiet.storage.retention import describe_checkpoints

    lines = describe_checkpoints(run)
    print("\n".join(lines) if lines else "no checkpoints yet")


if __name__ == "__main__":
    main()
