"""The paper's tables as data, and evaluated models beside them."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_iiet.evaluation.comparison import HEAD, NOT_AVAILABLE, compare, read_results
from megatron_iiet.evaluation.paper_results import COLUMNS, TABLES

ROOT = Path(__file__).resolve().parents[2]


def result(system: str, accuracy: float = 0.25, lm_eval: str = "0.4.13", rows: int = 100) -> dict[str, Any]:
    tasks: dict[str, Any] = {}
    for task, metric in COLUMNS:
        value = accuracy if metric.startswith("acc") else 20.0
        metrics = tasks.setdefault(task, {"metrics": {}, "rows": rows, "definition": 1.0})["metrics"]
        metrics[metric] = value
        if task != "wikitext":
            metrics[f"{metric}_stderr"] = value / 10
    return {"system": system, "model": f"runs/{system}", "tasks": tasks, "software": {"lm_eval": lm_eval}}


def test_means_are_those_of_the_printed_cells() -> None:
    for table, rows in TABLES.items():
        whole = [row.cells for row in rows if None not in row.cells[2:]]
        assert len(whole) == {"table1": 12, "table2": 3, "table5": 9}[table]
        for cells in whole:
            values = [float(cell or "nan") for cell in cells[2:]]
            assert sum(values[:-1]) / 6 == pytest.approx(values[-1], abs=0.1)  # rounded twice


def test_tables_agree_with_each_other() -> None:
    """Tables 2 and 5 print systems of Table 1 again, Table 5 with another digit."""
    first = {row.system: row.cells for row in TABLES["table1"][:3]}
    again = {row.system.replace(" r = 3", ""): row.cells for row in TABLES["table5"]}
    for system, cells in first.items():
        for cell, other in zip(cells, again[system], strict=True):
            assert float(cell or "nan") == pytest.approx(float(other or "nan"), abs=0.0501)
    assert TABLES["table2"][0].cells[2:] == first["IIET"][2:]


def test_markdown_has_models_and_the_papers_rows() -> None:
    lines = compare([result("a"), result("b", 0.5)], "table5", "markdown").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert cells[0] == list(HEAD)
    assert cells[2] == ["a (runs/a)", "20.00", "20.00 ± 2.00", *["25.0 ± 2.5"] * 6, "25.0"]
    assert cells[3][-1] == "50.0"
    last = cells[-1]
    assert last[0] == "paper: IIET r = 8 (340M, 16 B tokens)"
    assert (last[1], last[2], last[3], last[-1]) == (NOT_AVAILABLE, "32.02", NOT_AVAILABLE, NOT_AVAILABLE)


def test_csv_and_latex_have_the_same_cells() -> None:
    lines = compare([result("a_b")], "table2", "csv").splitlines()
    rows = list(csv.reader(line for line in lines if not line.startswith("#")))
    assert len(rows) == 5
    assert {len(row) for row in rows} == {len(HEAD)}
    latex = compare([result("a_b")], "table2", "latex")
    assert r"a\_b (runs/a\_b) & 20.00 & 20.00 $\pm$ 2.00 &" in latex
    assert latex.count(r" \\") == 5


def test_a_mean_of_some_tasks_is_none() -> None:
    some = result("a")
    del some["tasks"]["sciq"]
    row = compare([some], "table1", "csv").splitlines()[1].split(",")
    assert (row[6], row[-1]) == (NOT_AVAILABLE, NOT_AVAILABLE)


def test_what_differs_is_said() -> None:
    same = compare([result("a"), result("b")], "table1", "markdown")
    assert "different" not in same
    other = {**result("b", lm_eval="0.4.9", rows=50), "limit": 50}
    other["tasks"]["piqa"]["definition"] = 2.0
    said = compare([result("a"), other], "table1", "markdown")
    assert "different versions of the harness: 0.4.13, 0.4.9." in said
    assert "piqa was measured in different versions: 1.0, 2.0." in said
    assert "sciq was measured in different numbers of rows: 100, 50." in said
    assert "(--limit): runs/b." in said


def test_results_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no results\.json"):
        read_results(tmp_path)
    for text in ("{", "[]", '{"tasks": {"piqa": 1}}'):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(ValueError, match="is no report"):
            read_results(tmp_path)


@pytest.mark.parametrize(
    ("flags", "wrong"),
    [
        (["--compare", "paper", "--results", "run", "--table", "table2", "--format", "csv"], ""),
        (["--compare", "paper"], "--results"),
        (["--compare", "paper", "--results", "run", "--model", "run"], "--model"),
        (["--results", "run"], "--compare"),
        ([], "--model"),
    ],
)
def test_the_command(tmp_path: Path, flags: list[str], wrong: str) -> None:
    (tmp_path / "run/evaluation").mkdir(parents=True)
    (tmp_path / "run/evaluation/results.json").write_text(json.dumps(result("a")))
    done = subprocess.run(
        [sys.executable, ROOT / "tools/evaluate.py", *flags], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode == 0) == (not wrong), done.stderr
    assert wrong in done.stderr
    if not wrong:
        assert done.stdout == compare([result("a")], "table2", "csv")
