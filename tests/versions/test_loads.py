"""What ``make test-transformers`` does in every release, here in the locked one and for one solver."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from tests.versions import exports, transformers_matrix

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long
def test_the_locked_transformers_passes_every_check(tmp_path: Path) -> None:
    with torch.no_grad():
        exports.write(tmp_path, ["iiet-plan"])
    found = transformers_matrix.verdicts(ROOT, tmp_path, ["iiet-plan"])
    row, wrong = transformers_matrix.line(transformers.__version__, found)
    assert wrong == []
    assert row == f"| {transformers.__version__} |" + " 1 of 1 |" * 9


def test_a_row_counts_what_applies_and_tells_what_is_wrong() -> None:
    right = {check.__name__: "ok" for check in transformers_matrix.CHECKS}
    seen = {"one": right, "two": {**right, "assisted": "-: none", "static": "WrongError: [1] instead of [2]"}}
    row, wrong = transformers_matrix.line("5.0.0", seen)
    assert row == "| 5.0.0 | 2 of 2 | 2 of 2 | 1 of 2 | 2 of 2 | 2 of 2 | 1 of 1 | 2 of 2 | 2 of 2 | 2 of 2 |"
    assert wrong == ["5.0.0 two, static: WrongError: [1] instead of [2]"]


@pytest.mark.long
def test_a_process_that_fails_is_no_verdict(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"expected\.json"):
        transformers_matrix.verdicts(ROOT, tmp_path, ["none"])
    subprocess.run(
        [sys.executable, "-m", "tests.versions.transformers_matrix", "--help"], cwd=ROOT, check=True
    )
