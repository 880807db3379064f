"""Training through DeepSpeed: all ZeRO stages and offload give the CPU's losses; a resumed run is the run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from gpu_checks.base import Figure, Setting, largest
from gpu_checks.pretraining import command, made_up_corpus, made_up_tokenizer, need_deepspeed, run

STEPS = 6
BOUND = "<= 0.0002"
"""Of the losses in fp32, relative: other devices sum in another order, and steps enlarge that."""
CPU = {"device": "cpu", "pin_memory": True}
STAGES: dict[str, dict[str, Any]] = {
    "ZeRO-1": {"stage": 1},
    "ZeRO-2": {"stage": 2},
    "ZeRO-3": {"stage": 3},
    "ZeRO-1, optimizer on the CPU": {"stage": 1, "offload_optimizer": CPU},
    "ZeRO-3, all on the CPU": {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU},
}
Step = tuple[float, float]
"""Loss and norm of the gradients."""


def configuration(setting: Setting) -> Path:
    """A small IIET in fp32."""
    vocabulary, length = 512, 64
    prefix = made_up_corpus(setting.folder / "corpus", vocabulary, 40_000)
    tokenizer = made_up_tokenizer(setting.folder / "tokenizer.json")
    wide = 64 if setting.toy else 256
    fields = {
        "model": {"num_layers": 2 if setting.toy else 4, "hidden_size": wide, "ffn_hidden_size": 2 * wide,
                  "num_attention_heads": 4, "vocab_size": vocabulary, "max_position_embeddings": length},
        "solver": {"kind": "iiet", "iterations": 2},
        "data": {"prefix": str(prefix), "tokenizer": str(tokenizer), "sequence_length": length,
                 "split": [0.9, 0.1, 0.0], "num_workers": 0},
        "optimizer": {"lr": 1e-3},
        "training": {"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 1, "precision": "fp32"},
        "evaluation": {"interval": 0},
        "checkpoint": {"interval": STEPS // 2},
        "logging": {"interval": 1},
    }  # fmt: skip
    path = setting.folder / "run.yaml"
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    return path


def check(setting: Setting) -> Iterator[Figure]:
    """Runs of six steps against one on this machine's CPU; one of them resumed from half-way."""
    need_deepspeed()
    ranks = 1
    if setting.device == "cuda":
        import torch

        ranks = max(n for n in (1, 2, 4, 8) if n <= torch.cuda.device_count())
    config = configuration(setting)

    def train(
        name: str, stage: dict[str, Any], device: str, count: int, launcher: bool = False
    ) -> list[Step]:
        folder = setting.folder / name
        options = ("--output_dir", str(folder))
        ds_config = {"zero_optimization": stage}
        arguments = command(config, ds_config, count, device, *options, launcher=launcher)
        rows = run(folder, arguments, device, setting.left - 1)
        return [(row["loss"], row["grad_norm"]) for row in rows if "loss" in row]

    wanted = train("on-the-cpu", {"stage": 1}, "cpu", 1, launcher=True)
    whole: list[Step] = []
    stages = ["ZeRO-2"] if setting.toy else list(STAGES)  # the CPU's own run is ZeRO-1
    for name in stages:
        if not setting.time_for(name, 12):
            continue
        found = train(folder_of(name), STAGES[name], setting.device, ranks)
        whole = whole or found
        worst = largest(abs(a - b) / b for (a, _), (b, _) in zip(found, wanted, strict=True))
        where = f"losses of {name}, {ranks} x {setting.device}, {STEPS} steps"
        yield Figure(where, worst, "relative", "the same run on one CPU process", BOUND)
    if whole and setting.time_for("a run that is resumed", 12):
        first = STAGES[stages[0]]
        as_if_killed(setting.folder / folder_of(stages[0]), setting.folder / "resumed")
        resumed = train("resumed", first, setting.device, ranks)
        note, allowed = "", "== 0"
        whole = whole[STEPS // 2 :]
        if resumed != whole and setting.left > 6:
            again = train("once-more", first, setting.device, ranks)[STEPS // 2 :]
            spread = difference(again, whole)
            note = f"two runs that nobody stopped differ by {spread:.2g} here"
            allowed = f"<= {2 * spread:.3g}" if spread else allowed
        apart = difference(resumed, whole)
        yield Figure(
            "losses and gradient norms of a resumed run",
            apart,
            "",
            "the same run, undisturbed",
            allowed,
            note,
        )


def folder_of(name: str) -> str:
    return name.replace(" ", "-").replace(",", "")


def as_if_killed(run: Path, target: Path) -> None:
    """A run's folder as it was after its first checkpoint; without the log, so that none of it counts."""
    later = f"step_{STEPS:08}"
    shutil.copytree(run, target, ignore=shutil.ignore_patterns("log.jsonl", "tensorboard", later))
    (target / "checkpoints/latest").write_text(f"step_{STEPS // 2:08}", encoding="utf-8")


def difference(found: list[Step], wanted: list[Step]) -> float:
    """The largest of two runs' losses and gradient norms, step by step."""
    pairs = zip(found, wanted, strict=True)
    return largest(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True))
