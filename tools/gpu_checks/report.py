"""report.md, report.json and the summary on the screen."""

from __future__ import annotations

import json
from pathlib import Path

from gpu_checks import CHECKS
from gpu_checks.base import Outcome, shown


def write_report(folder: Path, about: dict[str, str], outcomes: dict[str, Outcome]) -> None:
    """Replace the report of this folder."""
    stored = {"about": about, "checks": {name: outcome.as_dict() for name, outcome in outcomes.items()}}
    (folder / "report.json").write_text(
        json.dumps(stored, indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )
    lines = ["# What held on this machine", ""]
    lines += [f"* {key}: {value}" for key, value in about.items()]
    lines += ["", "| check | status | seconds | reason |", "|---|---|---|---|"]
    lines += [
        f"| {n} | {o.status} | {o.seconds:.0f} | {o.reason.replace('|', '/')} |" for n, o in outcomes.items()
    ]
    for name, outcome in outcomes.items():
        lines += [
            "",
            f"## {name}: {CHECKS[name].title}",
            "",
            f"{outcome.status} {outcome.reason}".strip(),
            "",
        ]
        if outcome.figures:
            lines += ["| figure | value | against | bound | |", "|---|---|---|---|---|"]
        for f in outcome.figures:
            held = "" if not f.bound else "holds" if f.holds else "**BROKEN**"
            lines.append(
                f"| {f.name} | {shown(f.value)} {f.unit} | {f.against} | {f.bound} | {held} {f.note} |"
            )
        lines += [f"\n![{p.stem}]({name}/{p.name})" for p in sorted((folder / name).glob("*.png"))]
    (folder / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def summary(about: dict[str, str], outcomes: dict[str, Outcome], folder: Path) -> str:
    """At most twenty lines: a line a check with its most telling figure, the worst first."""
    device = about.get("gpu", about["device"])
    lines = ["", f"{device}, torch {about['torch']}, {about['date']}, sizes {about['sizes']}"]
    for name, outcome in outcomes.items():
        judged = sorted((f for f in outcome.figures if f.bound), key=lambda f: f.holds) or outcome.figures
        figure = (
            f"{judged[0].name} {shown(judged[0].value)} {judged[0].unit} {judged[0].bound}" if judged else ""
        )
        lines.append(
            f"{name:10} {outcome.status:12} {outcome.seconds:4.0f} s  {outcome.reason or figure}"[:160]
        )
    lines.append(f"all figures: {folder / 'report.md'}")
    return "\n".join(lines)
