"""What benchmarks/inference.py found: as a table, as JSON and as a picture."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from inference_systems import BASELINE, FULL, LLAMA, System
from inference_timing import Decoding

import megatron_iiet

PAPER_RATIOS = {"IIET r = 3": 4.5, "E-IIET": 1.9}
"""Time a token against Transformer++ at 340M on one A100, from the tokens/s in Table 3 of arXiv 2509.22463:
49.97 / 11.07 and 49.97 / 25.95."""


def row(
    system: System, cache: str, decoding: Decoding, facts: dict[str, Any], batch: int, prompt: int
) -> dict[str, Any]:
    """The figures of a system with one kind of cache that need no other system; ``facts``: those that need no
    clock."""
    timed = not decoding.refused
    iterations = system.iterations
    return {
        "system": system.name,
        "cache": cache,
        "refused": decoding.refused or None,
        "solver": system.config.solver.kind,
        "iterations": iterations,
        "tokens_per_second": batch / decoding.seconds if timed else None,
        "prompt_tokens_per_second": batch * prompt / decoding.prompt if timed else None,
        "seconds_a_token": decoding.seconds if timed else None,
        "peak_bytes": decoding.peak_bytes,
        **facts,
        "compiled": decoding.compiled,
        "tokens_equal_to_dynamic": None if (c := decoding.comparison) is None else c.tokens_equal,
        "logits_difference_to_dynamic": None if c is None else c.difference,
        "comparison": None if c is None else c.verdict,
    }


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Time against that of Transformer++, of LLaMA and of the full IIET with the same kind of cache; None
    where one of the two was not measured."""
    seconds = {(row["system"], row["cache"]): row["seconds_a_token"] for row in rows}

    def ratio(row: dict[str, Any], other: str) -> float | None:
        own, theirs = row["seconds_a_token"], seconds.get((other, row["cache"]))
        return own / theirs if own and theirs else None

    for each in rows:
        each["time_ratio_to_transformer_pp"] = ratio(each, BASELINE)
        each["time_ratio_to_llama"] = ratio(each, LLAMA)
        full = ratio(each, FULL)
        each["speedup_over_full_iiet"] = full and 1 / full


def table(rows: list[dict[str, Any]]) -> str:
    """One markdown table; memory is a peak where one was measured, else computed, as its heading says."""
    peak = any(row["peak_bytes"] is not None for row in rows)
    columns = [
        "system",
        "cache",
        "tokens/s",
        "prompt tokens/s",
        "time a token",
        "against LLaMA",
        "against IIET",
    ]
    columns += ["TFLOPs", "counted", "cache bytes a token", "of the formula"]
    columns += ["peak, MB" if peak else "weights + cache, MB (computed)", "as dynamic"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [
            row["system"],
            row["cache"] + " (no CUDA graphs)" * bool((row["compiled"] or {}).get("cudagraph_skips")),
            f"refused: {row['refused']}" if row["refused"] else f"{row['tokens_per_second']:.2f}",
            _shown(row["prompt_tokens_per_second"], ".0f"),
            _shown(row["time_ratio_to_transformer_pp"], ".2f", "x"),
            _shown(row["time_ratio_to_llama"], ".2f", "x"),
            _shown(row["speedup_over_full_iiet"], ".2f", "x faster"),
            _shown(row["flops_formula"] / 1e12, ".3f"),
            _shown(row["flops_counted"] / 1e12, ".3f"),
            _shown(row["cache_bytes_per_token"], ","),
            _shown(row["cache_bytes_per_token"] / row["cache_bytes_per_token_formula"], ".3f"),
            _shown(
                (memory := row["peak_bytes" if peak else "weights_and_cache_bytes"]) and memory / 1e6, ",.1f"
            ),
            row["comparison"] or "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _shown(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}}{unit}"


def machine(device: torch.device) -> dict[str, Any]:
    """The device, and versions of what ran on it."""
    cuda = device.type == "cuda"
    return {
        "device": {"type": device.type, "name": torch.cuda.get_device_name(device) if cuda else _processor()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "transformers": transformers.__version__,
            "megatron_iiet": megatron_iiet.__version__,
        },
    }


def _processor() -> str:
    """The CPU's name, as Linux has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Tokens a second and time against Transformer++, by evaluations of a layer beyond the first: r of IIET
    (a line for each kind of cache), its mean over layers of E-IIET, and other solvers where they stand."""
    try:
        import matplotlib
    except ImportError:  # the figures are the result
        print("no picture: matplotlib is not installed")
        return

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    panels = zip(axes, ("tokens_per_second", "time_ratio_to_transformer_pp"), strict=True)
    for axis, key in panels:
        shown = [row for row in rows if row[key] is not None]
        kinds = dict.fromkeys(row["cache"] for row in rows)
        for color, cache in zip(plt.cm.tab10.colors, kinds, strict=False):  # type: ignore[attr-defined]
            line = [(_extra(row), row[key]) for row in shown if row["cache"] == cache and _is_iiet(row)]
            if line:
                axis.plot(*zip(*sorted(line), strict=True), "o-", color=color, label=f"IIET, {cache} cache")
            others = [row for row in shown if row["cache"] == cache and not _is_iiet(row)]
            for marker, row in zip("sD^v*P", others, strict=False):
                axis.plot(_extra(row), row[key], marker, color=color, label=f"{row['system']}, {cache}")
        axis.set_xlabel("evaluations of a layer beyond the first (IIET: r)")
        axis.grid(alpha=0.3)
    for color, (name, ratio) in zip(("black", "gray"), PAPER_RATIOS.items(), strict=True):
        axes[1].axhline(
            ratio, linestyle="--", linewidth=1, color=color, label=f"paper (A100, 340M): {name}, {ratio}"
        )
    axes[0].set_ylabel("tokens/s")
    axes[1].set_ylabel("time a token, Transformer++ = 1")
    axes[1].legend(fontsize=6)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _is_iiet(row: dict[str, Any]) -> bool:
    return row["system"].startswith("IIET r = ")


def _extra(row: dict[str, Any]) -> float:
    return row["evaluations"] / row["layers"] - 1
