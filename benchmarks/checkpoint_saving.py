"""How long a checkpoint stops training: written while training waits, or copied and written behind its back;
beside ``torch.save`` of the same tensors, synced to disk.

    python benchmarks/checkpoint_saving.py --hidden 512 --layers 12 --output /path/on/the/disk

Each round times all three, interleaved; the medians are printed. What is timed of the second is all that a
step waits for: the copy, and the start of the writing thread. The first round, which allocates the memory of
the copies, is shown apart.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from megatron_iiet.config import config_from_dict, config_to_yaml
from megatron_iiet.config.deepspeed import reconcile
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.storage.integrity import SaveIdentity
from megatron_iiet.training.engine import engine_class
from megatron_iiet.training.saving import HostCopies, Saving


def main() -> None:
    """Build an engine, save it again and again."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=512, help="width")
    parser.add_argument("--layers", type=int, default=12, help="number of layers")
    parser.add_argument("--rounds", type=int, default=5, help="times that each is timed")
    parser.add_argument("--output", default=".", help="folder on the disk that is written to")
    arguments = parser.parse_args()
    shape = {
        "hidden_size": arguments.hidden,
        "ffn_hidden_size": 11 * arguments.hidden // 4,
        "num_layers": arguments.layers,
        "num_attention_heads": max(1, arguments.hidden // 64),
    }
    config = config_from_dict({"model": shape, "training": {"micro_batch_size": 1, "global_batch_size": 1}})
    ds_config = reconcile({"zero_optimization": {"stage": 1}}, config, 1, source="the benchmark")
    Path(arguments.output).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=arguments.output))
    try:
        with ParallelContext.start(config.parallel) as context:
            engine = engine_class(context)(config, ds_config, context, "reference")
            measure(engine, context, folder, config_to_yaml(config), arguments.rounds)
    finally:
        shutil.rmtree(folder)


def measure(engine, context, folder: Path, text: str, rounds: int) -> None:  # type: ignore[no-untyped-def]
    """Time and print."""
    fragments, copies = engine.fragments(), HostCopies()
    size = sum(tensor.numel() * 4 for f in fragments for tensor in f.tensors.values())
    times: dict[str, list[float]] = {"sync": [], "async": [], "torch.save": []}
    for number in range(rounds + 1):
        save = SaveIdentity.draw(number, text)
        started = time.perf_counter()
        Saving(context, folder / "sync", save, fragments).finish()
        times["sync"].append(time.perf_counter() - started)
        started = time.perf_counter()
        saving = Saving(context, folder / "async", save, copies.take(fragments))
        times["async"].append(time.perf_counter() - started)
        saving.finish()
        started = time.perf_counter()
        with (folder / "peer.pt").open("wb") as file:
            torch.save({(f.name, kind): t for f in fragments for kind, t in f.tensors.items()}, file)
            os.fsync(file.fileno())
        times["torch.save"].append(time.perf_counter() - started)
    median = {name: statistics.median(each[1:]) for name, each in times.items()}
    result = {
        "bytes": size,
        "first round, s": {name: round(each[0], 3) for name, each in times.items()},
        "median, s": {name: round(value, 3) for name, value in median.items()},
        "async / sync": round(median["async"] / median["sync"], 3),
        "sync / torch.save": round(median["sync"] / median["torch.save"], 3),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
