"""Table 3 and Figure 3b of the paper, by benchmarks/inference.py: what decoding costs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_checks.base import Figure, Setting, with_package

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks/inference.py"
OPTIONS = ["--size", "340m", "--precision", "bf16", "--new-tokens", "32", "--rounds", "2"]
TABLE = ["--iterations", "0", "1", "3", "--caches", "dynamic", "static"]
CURVE = ["--iterations", *map(str, range(9))]
RATIOS = {"IIET r = 3": "<= 4.5", "E-IIET": "<= 1.9"}
"""Time a token over that of Transformer++, at 340M with a dynamic cache: the paper's Table 3."""


def check(setting: Setting) -> Iterator[Figure]:
    """The table first, then time against r, then the caches compiled, as far as the time goes."""
    yield from figures_of(measured(setting, "table", TABLE), setting)
    if setting.toy:
        return
    for name, options in (("curve", CURVE), ("compiled", ["--iterations", "3", "--compile"])):
        if setting.time_for(f"the {name} runs", 25):
            yield from figures_of(measured(setting, name, options), setting, f"{name}: ")


def measured(setting: Setting, name: str, options: list[str]) -> list[dict[str, Any]]:
    """The benchmark's rows.

    Raises:
        RuntimeError: it failed: a text that is not that of the dynamic cache, or a system that can't decode.
    """
    folder = setting.folder / name
    size = ["--toy"] if setting.toy else OPTIONS
    command = [sys.executable, str(BENCHMARK), "--device", setting.device, *size, *options]
    command += ["--output", str(folder)]
    seconds = max(setting.left - 2, 1)
    try:
        done = subprocess.run(
            command,
            env=with_package(),
            timeout=seconds,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
        )
    except subprocess.TimeoutExpired as late:
        print(late.output)
        raise TimeoutError(f"the benchmark did not end in time ({name})") from None
    print(done.stdout)
    if done.returncode:
        wrong = [
            line
            for line in done.stdout.splitlines()
            if "UNEQUAL" in line or "refused" in line or "rror" in line
        ]
        raise RuntimeError(f"the benchmark ended with status {done.returncode}: {'; '.join(wrong)[:300]}")
    picture = folder / "inference.png"
    if picture.exists():
        picture.rename(setting.folder / f"{name}.png")
    rows: list[dict[str, Any]] = json.loads((folder / "inference.json").read_text(encoding="utf-8"))["rows"]
    return rows


def figures_of(rows: list[dict[str, Any]], setting: Setting, prefix: str = "") -> Iterator[Figure]:
    """Time ratios, tokens a second and memory of every system and cache."""
    for row in rows:
        label = f"{prefix}{row['system']}, {row['cache']}"
        if row["refused"]:
            yield Figure(label, None, note=f"refused: {row['refused']}")
            continue
        memory = row["peak_bytes"] or row["weights_and_cache_bytes"]
        note = (
            f"{row['tokens_per_second']:.1f} tokens/s, {memory / 2**20:,.0f} MiB, {row['comparison'] or ''}"
        )
        bound = ""
        if row["cache"] == "dynamic" and not prefix:
            bound = next((b for name, b in RATIOS.items() if row["system"].startswith(name)), "")
        ratio = row["time_ratio_to_transformer_pp"]
        yield Figure(f"{label}: time a token", ratio, "x", "Transformer++", setting.judged(bound), note)
