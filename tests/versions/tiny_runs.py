"""Short trainings by the launcher and an export, in whatever environment this runs; their losses as JSON.

python -m tests.versions.tiny_runs FOLDER
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from megatron_iiet.config import config_to_yaml
from megatron_iiet.training.metrics import read_log
from tests.distributed.harness import free_port
from tests.tiny import make_data, tiny_config

ROOT = Path(__file__).resolve().parents[2]
RUNS = {  # ranks, ZeRO stage, precision
    "2 ranks, ZeRO-1, fp32": (2, 1, "fp32"),
    "2 ranks, ZeRO-1, bf16": (2, 1, "bf16"),
    "1 rank, ZeRO-3, bf16": (1, 3, "bf16"),
}


def train(name: str, data: dict[str, str], folder: Path) -> list[float]:
    """Losses of eight steps under ``deepspeed``."""
    ranks, stage, precision = RUNS[name]
    output = folder / f"zero{stage}-{precision}"
    config = tiny_config(data, output, training={"precision": precision}, logging={"interval": 1})
    output.with_suffix(".yaml").write_text(config_to_yaml(config))
    output.with_suffix(".json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    launcher = Path(sys.executable).with_name("deepspeed")
    flags = ["--config", str(output.with_suffix(".yaml")), "--ds-config", str(output.with_suffix(".json"))]
    run = ["--num_accelerators", str(ranks), "--master_port", str(free_port()), "pretrain_iiet.py", *flags]
    started = subprocess.run([launcher, *run], cwd=ROOT, env=environment(), capture_output=True, text=True)
    if started.returncode:
        sys.exit(f"{name}: {started.stdout[-2000:]}\n{started.stderr[-4000:]}")
    if "merge_norm backend: cpu" not in started.stdout:
        sys.exit(f"{name}: did not run on the extension\n{started.stdout[-2000:]}")
    log = read_log(output)
    return [log[step]["loss"] for step in sorted(log) if "loss" in log[step]]


def exported_difference(folder: Path) -> float:
    """Largest difference of the logits of the fp32 run and of its export in transformers."""
    from transformers import AutoModelForCausalLM

    from megatron_iiet import models

    run, tool = folder / "zero1-fp32", [sys.executable, "tools/convert_checkpoint.py"]
    for flag in ("--to", "--to-hf"):
        command = [*tool, "--from-run", str(run), flag, str(folder / flag.strip("-"))]
        subprocess.run(command, cwd=ROOT, env=environment(), check=True, capture_output=True)
    there = AutoModelForCausalLM.from_pretrained(folder / "to-hf", trust_remote_code=True)
    tokens = torch.arange(32).view(2, 16)
    with torch.no_grad():
        return (there(tokens).logits - models.load(folder / "to")(tokens)).abs().max().item()


def environment() -> dict[str, str]:
    """This one, with its programs first on PATH and one thread a rank."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    data = make_data(folder)
    losses = {name: train(name, data, folder) for name in RUNS}
    found = {"torch": torch.__version__, "losses": losses, "export": exported_difference(folder)}
    (folder / "found.json").write_text(json.dumps(found, indent=2) + "\n")
