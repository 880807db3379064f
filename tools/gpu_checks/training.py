"""The rest of the time: Transformer++ and IIET at 55M on the same tokens; loss by tokens, FLOPs, time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from gpu_checks.base import Figure, Setting
from gpu_checks.pretraining import command, made_up_corpus, made_up_tokenizer, need_deepspeed, run, said
from gpu_checks.step import CONFIGS, TOY, preset

SYSTEMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Transformer++": ("transformer-pp-55m", ()),
    "IIET r = 1": ("iiet-55m", ("--solver.iterations", "1")),
    "IIET r = 3": ("iiet-55m", ("--solver.iterations", "3")),
}
TOKENS = 4_000_000
"""Of the made-up corpus, which is read again when it is through."""


def check(setting: Setting) -> Iterator[Figure]:
    """Each system gets an equal part of the time; curves are drawn, losses at equal tokens told."""
    need_deepspeed()
    vocabulary = preset("transformer-pp-55m", setting).model.vocab_size
    prefix, tokenizer = setting.shard, setting.tokenizer
    if prefix is None:
        tokens = 30_000 if setting.toy else TOKENS
        prefix = str(made_up_corpus(setting.folder / "corpus", vocabulary, tokens))
        tokenizer = str(made_up_tokenizer(setting.folder / "tokenizer.json"))
    data = {"data.prefix": prefix, "data.tokenizer": str(tokenizer), "data.split": "[0.95,0.05,0.0]"}
    curves: dict[str, list[dict[str, Any]]] = {}
    systems = list(SYSTEMS.items())[: 1 if setting.toy else None]
    for i, (label, (name, options)) in enumerate(systems):
        seconds = (setting.left - 6) / (len(systems) - i) - 4  # the end of a run takes some
        if not setting.time_for(label, 6 + 9 * (len(systems) - i)):
            continue
        curves[label] = _train(setting, label, name, [*options], data, seconds)
    for label, rows in curves.items():
        last = rows[-1]
        if not last["loss"] < rows[0]["loss"]:
            raise RuntimeError(f"{label} did not learn: loss {rows[0]['loss']:.3f} -> {last['loss']:.3f}")
        yield Figure(f"{label}: steps", len(rows), "", "its share of the time")
        yield Figure(f"{label}: last loss", last["loss"], "nats", f"{rows[0]['loss']:.3f} at the start")
    common = min(map(len, curves.values()), default=0)
    for label, rows in curves.items():
        window = [row["loss"] for row in rows[max(common - 10, 0) : common]]
        yield Figure(f"{label}: loss at step {common}, mean of {len(window)}", sum(window) / len(window))
    _draw(setting.folder / "loss.png", curves)


def _train(
    setting: Setting, label: str, name: str, options: list[str], data: dict[str, str], seconds: float
) -> list[dict[str, Any]]:
    config = setting.folder / f"{name}-{len(options)}.yaml"
    config.write_text(yaml.safe_dump({"base": str(CONFIGS / f"{name}.yaml")}), encoding="utf-8")
    steps, batch, micro = (4, 4, 1) if setting.toy else (100_000, 64, 16)
    folder = setting.folder / label.replace(" ", "").replace("+", "p").replace("=", "")
    flags = {
        **data, "output_dir": folder,
        "training.steps": steps, "training.global_batch_size": batch, "training.micro_batch_size": micro,
        "optimizer.schedule": "constant", "optimizer.lr": "5e-4", "evaluation.interval": 0,
        "evaluation.samples": 8, "checkpoint.interval": 0, "logging.interval": 10,
    }  # fmt: skip
    arguments = [*options, *(TOY if setting.toy else ())]
    for key, value in flags.items():
        arguments += [f"--{key}", str(value)]
    ranks = 1
    if setting.device == "cuda":
        import torch

        ranks = max(n for n in (1, 2, 4) if n <= torch.cuda.device_count())
    started = command(config, {"zero_optimization": {"stage": 1}}, ranks, setting.device, *arguments)
    rows = run(folder, started, setting.device, seconds, stop=not setting.toy)
    found = [row for row in rows if "loss" in row]
    if len(found) < 2:
        last = said(folder.with_suffix(".txt"))
        raise RuntimeError(f"{label} logged {len(found)} steps in {seconds:.0f} s: {last}")
    return found


def _draw(path: Path, curves: dict[str, list[dict[str, Any]]]) -> None:
    try:
        import matplotlib
    except ImportError:  # the figures are the result
        print("no picture: matplotlib is not installed")
        return

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(15, 4), sharey=True, layout="constrained")
    for label, rows in curves.items():
        losses = [row["loss"] for row in rows]
        seconds = [row["step_seconds"] for row in rows]
        for panel, each in zip(
            panels, ([1.0] * len(rows), [row["flops"] for row in rows], seconds), strict=True
        ):
            total, reached = 0.0, []
            for amount in each:
                total += amount
                reached.append(total)
            panel.plot(reached, losses, label=label)
    for panel, name in zip(panels, ("steps (equal tokens)", "FLOPs", "seconds"), strict=True):
        panel.set_xlabel(name)
    panels[0].set_ylabel("loss, nats per token")
    panels[0].legend()
    figure.savefig(path)
    pyplot.close(figure)
