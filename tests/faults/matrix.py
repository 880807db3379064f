"""What runs survive, counted: ``python -m tests.faults.matrix [--kills 100] [--pairs 20]`` prints a table.

    kills     SIGKILL of a random rank at a random moment, until the run is through with the same command:
              losses, weights and moments must be those of an undisturbed run, bit by bit (CPU, fp32, 2 to 4
              ranks, ZeRO 1, 2 and 3, pipeline 2, a checkpoint in flight most of the time)
    damages   every damage of tests/training/test_damaged_checkpoints.py to the newer of two checkpoints,
              under ZeRO-1 and with a pipeline: it must be named, and the older one taken
    starts    two starts of one folder at once: one must train, the other be refused
    views     ranks that see different folders: all must end, and name the one that does
    signals   SIGUSR1 or SIGTERM in start-up, training, validation, save, commit and the last step, to a rank
              alone, to a rank or the launcher of torchrun and deepspeed: saved, ended, nobody left after 10 s
    hangs     a rank stopped by SIGSTOP: named within three bounds of a step, the others' stacks on disk

Minutes to an hour; exit status 1 if anything was not as it must be.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_iiet.config import config_to_yaml
from megatron_iiet.storage import checkpoint
from megatron_iiet.training.metrics import read_log
from megatron_iiet.training.resume import NothingToDo
from tests import processes
from tests.distributed.harness import RanksFailedError, run_ranks
from tests.distributed.runs import as_data, ds_json, pretrain_rank
from tests.faults.launched import Tally, hangs, signals
from tests.storage.saves import Saves
from tests.tiny import make_data, tiny_config
from tests.training.test_agreement import look
from tests.training.test_damaged_checkpoints import DAMAGES, resumed_from

ROOT = Path(__file__).resolve().parents[2]
STEPS = 8
LAYOUTS: list[tuple[int, int, dict[str, int]]] = [
    (2, 1, {}),
    (2, 2, {}),
    (2, 3, {}),
    (2, 1, {"pipeline": 2}),
    (2, 1, {"tensor": 2}),
    (4, 3, {}),
    (4, 1, {"pipeline": 2}),
]
"""Ranks, ZeRO stage, grid."""
PARTS = ("views", "hangs", "signals", "damages", "starts", "kills")


def train_until_killed(config: dict[str, Any], ds_path: Path, victim: int, seconds: float) -> None:
    """Train; rank ``victim`` is killed after so long, unless it is through before."""
    if int(os.environ["RANK"]) == victim:
        kill = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
        kill.daemon = True
        kill.start()
    finish(config, ds_path)


def finish(config: dict[str, Any], ds_path: Path) -> None:
    """The same command once more, which may find that the last kill came too late."""
    with suppress(NothingToDo):
        pretrain_rank(config, ds_path)


def learned(run: Path) -> tuple[dict[int, str], Any]:
    """Losses, and digests of the last weights and moments."""
    losses = {step: values["loss"].hex() for step, values in read_log(run).items() if "loss" in values}
    index = checkpoint.checkpoints_folder(run) / checkpoint.tag_of(STEPS) / "index.json"
    return losses, json.loads(index.read_text())["files"]


def kills(folder: Path, number: int, chance: random.Random) -> Tally:
    """Runs with up to three kills each, until so many have hit."""
    data = make_data(folder)
    expected: dict[int, Any] = {}
    durations: dict[int, float] = {}
    hits = good = runs = 0
    run_ranks(os.getpid, 1)  # the first one starts the server of ranks
    while hits < number:
        case, runs = chance.randrange(len(LAYOUTS)), runs + 1
        ranks, stage, grid = LAYOUTS[case]
        ds_path = ds_json(folder, stage)
        sections = {"training": {"steps": STEPS}, "checkpoint": {"interval": 1, "keep": 2}, "parallel": grid}
        if case not in expected:
            whole = folder / f"whole_{case}"
            started = time.monotonic()
            run_ranks(pretrain_rank, ranks, as_data(tiny_config(data, whole, **sections)), ds_path)
            expected[case], durations[case] = learned(whole), time.monotonic() - started
        run = folder / f"run_{runs}"
        config, here = as_data(tiny_config(data, run, **sections)), 0
        for _ in range(chance.randint(1, 3)):
            moment = chance.uniform(0.0, durations[case])
            try:
                run_ranks(train_until_killed, ranks, config, ds_path, chance.randrange(ranks), moment)
                break
            except RanksFailedError:
                here += 1
        else:
            run_ranks(finish, ranks, config, ds_path)
        if not here:
            continue
        hits, same = hits + here, learned(run) == expected[case]
        good += here * same
        if not same:
            print(f"  kills: {run} of layout {LAYOUTS[case]} has learned something else", flush=True)
        else:
            shutil.rmtree(run)
    return good, hits


def damages(folder: Path) -> Tally:
    """Each to a copy of a run."""
    data, good, all_of_them = make_data(folder), 0, 0
    for stage, grid in ((1, {}), (0, {"pipeline": 2})):
        whole = folder / f"damaged_{stage}"
        sections = {"checkpoint": {"interval": 2}, "parallel": grid}
        config = tiny_config(data, whole, training={"stop_after": 4}, **sections)  # type: ignore[arg-type]
        run_ranks(pretrain_rank, 2, as_data(config), ds_json(folder, stage))
        for number, (what, (damage, message)) in enumerate(DAMAGES.items()):
            run = folder / f"damage_{stage}_{number}"
            shutil.copytree(whole, run)
            old, new = (checkpoint.checkpoints_folder(run) / checkpoint.tag_of(step) for step in (2, 4))
            damage(new, old)
            config = replace(checkpoint.read_config(old), output_dir=str(run))
            config.training.stop_after = None
            try:
                said = run_ranks(resumed_from, 2, as_data(config), ds_json(folder, stage))[0]
            except RanksFailedError as error:
                said = [str(error)]
            text = "\n".join(said)
            named = re.search(message, text) or "'latest' names 'step_00000004'" in text
            right = said[-1] == "step 2" and bool(named)
            good, all_of_them = good + right, all_of_them + 1
            if not right:
                print(f"  damages: {what}, stage {stage} {grid}: {text[-300:]}", flush=True)
            shutil.rmtree(run)
    return good, all_of_them


def starts(folder: Path, number: int) -> Tally:
    """Pairs of real processes."""
    data, good = make_data(folder), 0
    for pair in range(number):
        run = folder / f"pair_{pair}"
        file = folder / "pair.yaml"
        file.write_text(config_to_yaml(tiny_config(data, run, training={"steps": 4})))
        command = [sys.executable, "-W", "ignore", "pretrain_iiet.py", "--config", str(file)]
        both = [
            subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        errors = [process.communicate()[1] for process in both]
        codes = sorted(process.returncode for process in both)
        refused = "where another run writes" in "".join(errors)
        # A pair may be so far apart that the second finds a complete run.
        steps = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
        right = (codes == [0, 2] and refused) or codes == [0, 0]
        right = right and len(steps) == len(set(steps))
        good += right
        if not right:
            print(f"  starts: exit statuses {codes}: {''.join(errors)[-300:]}", flush=True)
    return good, number


def views(folder: Path) -> Tally:
    """Of two and three ranks, on what differs."""
    run = folder / "views" / "run"
    Saves(run).save(5, 10)

    def copy(name: str, change: Callable[[Path], object]) -> Path:
        other = folder / name / "run"
        shutil.copytree(run, other)
        change(checkpoint.checkpoints_folder(other))
        return other

    differing: Iterator[Path] = iter(
        [
            copy("older", lambda there: (there / "latest").write_text("step_00000005\n")),
            copy("no_latest", lambda there: (there / "latest").unlink()),
            copy("no_newest", lambda there: shutil.rmtree(there / "step_00000010")),
            copy("empty", lambda there: shutil.rmtree(there)),
            copy("other_save", lambda there: Saves(there.parent).save(10)),
            copy("another", lambda there: Saves(there.parent).save(12)),
        ]
    )
    good = all_of_them = 0
    run_ranks(look, 2, [str(run), str(run)])  # the first one starts the server of ranks
    for other in differing:
        for folders in ([run, other], [run, run, other]):
            started = time.monotonic()
            told = run_ranks(look, len(folders), [str(each) for each in folders])
            right = len({text for text, _ in told}) == 1 and f"rank {len(folders) - 1} on " in told[0][0]
            right = right and time.monotonic() - started < 20
            good, all_of_them = good + right, all_of_them + 1
            if not right:
                print(f"  views: {other}: {told}", flush=True)
    return good, all_of_them


def main() -> None:
    """Run what is asked for, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="number of kills")
    parser.add_argument("--pairs", type=int, default=20, help="number of pairs of starts")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[])
    parser.add_argument("--seed", type=int, default=0, help="of the kills' moments")
    arguments = parser.parse_args()
    processes.guard()  # whatever ends this ends its runs
    parts: dict[str, Callable[[Path], Tally]] = {
        "views": views,
        "hangs": hangs,
        "signals": signals,
        "damages": damages,
        "starts": lambda folder: starts(folder, arguments.pairs),
        "kills": lambda folder: kills(folder, arguments.kills, random.Random(arguments.seed)),
    }
    rows = []
    for name, part in parts.items():
        if arguments.only and name not in arguments.only:
            continue
        folder = Path(tempfile.mkdtemp(prefix=f"faults-{name}-"))
        try:
            started = time.monotonic()
            good, all_of_them = part(folder)
            rows.append((name, good, all_of_them))
            print(f"{name:10} {good:4} of {all_of_them:4}  {time.monotonic() - started:7.0f} s", flush=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    sys.exit(any(good < all_of_them for _, good, all_of_them in rows))


if __name__ == "__main__":
    main()
