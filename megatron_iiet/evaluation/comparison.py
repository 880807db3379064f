"""Evaluated models side by side, above the rows of one of the paper's tables."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_iiet.evaluation.paper_results import ACCURACIES, COLUMNS, TABLES
from megatron_iiet.evaluation.paper_table import markdown_table

FORMATS = ("markdown", "latex", "csv")
NOT_AVAILABLE = "not available"
HEAD = (
    *("system", "Wikitext ppl", "LAMBADA ppl", "LAMBADA", "PiQA", "HellaSwag", "SciQ", "ARC-c", "WinoGrande"),
    "mean",
)


def read_results(path: Path) -> dict[str, Any]:
    """A ``results.json`` of ``tools/evaluate.py``, or that of a folder: its own or its ``evaluation``'s.

    Raises:
        ValueError: There is none, or it is not one.
    """
    places = [path, path / "results.json", path / "evaluation/results.json"]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise ValueError(
            f"--results: {path} has no results.json; evaluate the model first, without --compare"
        )
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        for part in (
            found["tasks"],
            *(task["metrics"] for task in found["tasks"].values()),
            found["software"],
        ):
            part.items()
        return {**found, "system": str(found["system"]), "model": str(found["model"])}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--results: {file} is no report of tools/evaluate.py; evaluate anew") from error


def compare(results: Sequence[dict[str, Any]], table: str, form: str) -> str:
    """The measured rows with standard errors, the paper's, and notes on what makes them hard to compare.

    Args:
        results: What :func:`read_results` returned.
        table: A key of :data:`TABLES`.
        form: One of :data:`FORMATS`.
    """
    rows = [_measured(result) for result in results]
    rows += [
        [f"paper: {row.system} ({row.group})", *(cell or NOT_AVAILABLE for cell in row.cells)]
        for row in TABLES[table]
    ]
    notes = _notes(results)
    match form:
        case "csv":
            out = io.StringIO()
            csv.writer(out, lineterminator="\n").writerows([HEAD, *rows])
            return out.getvalue() + "".join(f"# {note}\n" for note in notes)
        case "latex":
            lines = [" & ".join(map(_latex, row)) + r" \\" for row in [HEAD, *rows]]
            body = [r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
            tabular = [rf"\begin{{tabular}}{{l{'r' * (len(HEAD) - 1)}}}", *body, r"\end{tabular}"]
            return "\n".join([*(f"% {note}" for note in notes), *tabular]) + "\n"
    return "\n".join([markdown_table(HEAD, rows), "", *notes]) + "\n"


def _measured(result: dict[str, Any]) -> list[str]:
    cells, accuracies = [], []
    for task, metric in COLUMNS:
        metrics = result["tasks"].get(task, {}).get("metrics", {})
        value, error = metrics.get(metric), metrics.get(f"{metric}_stderr")
        is_accuracy = (task, metric) in ACCURACIES
        scale, digits = (100, 1) if is_accuracy else (1, 2)
        if is_accuracy:
            accuracies.append(value)
        if value is None:
            cells.append(NOT_AVAILABLE)
        else:
            of_error = "" if error is None else f" ± {scale * error:.{digits}f}"
            cells.append(f"{scale * value:.{digits}f}{of_error}")
    known = [value for value in accuracies if value is not None]
    mean = f"{100 * sum(known) / len(known):.1f}" if len(known) == len(ACCURACIES) else NOT_AVAILABLE
    return [f"{result['system']} ({result['model']})", *cells, mean]


def _notes(results: Sequence[dict[str, Any]]) -> list[str]:
    """What differs between the measured models that moves a figure by itself."""
    notes = [
        "The harness version behind the paper's figures is not known here; prompts and metrics may differ."
    ]
    harness = sorted({str(result["software"].get("lm_eval")) for result in results})
    if len(harness) > 1:
        notes.append(f"The models were measured by different versions of the harness: {', '.join(harness)}.")
    for task in dict.fromkeys(task for task, _ in COLUMNS):
        measured = [result["tasks"][task] for result in results if task in result["tasks"]]
        for key, what in (("definition", "versions"), ("rows", "numbers of rows")):
            found = sorted({str(one.get(key)) for one in measured})
            if len(found) > 1:
                notes.append(f"{task} was measured in different {what}: {', '.join(found)}.")
    limited = [result["model"] for result in results if result.get("limit") is not None]
    if limited:
        notes.append(f"Measured on the first rows of each task alone (--limit): {', '.join(limited)}.")
    return notes


def _latex(cell: str) -> str:
    for plain, escaped in (
        ("\\", r"\textbackslash "),
        ("_", r"\_"),
        ("%", r"\%"),
        ("&", r"\&"),
        ("#", r"\#"),
    ):
        cell = cell.replace(plain, escaped)
    return cell.replace("±", r"$\pm$")
