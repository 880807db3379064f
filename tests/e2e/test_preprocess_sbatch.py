"""The SLURM array job for preprocessing, run by bash with the variables that SLURM sets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_iiet.data.corpora.streams import open_corpus
from megatron_iiet.data.tokenizers.training import train_tokenizer
from tests.data.inputs import make_texts
from tests.data.preprocess_runs import write_rows

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "slurm" / "preprocess_slimpajama.sbatch"


def run_element(element: int, elements: int, *arguments: str, **variables: str) -> Any:
    """The script in a folder that is not the one of submission, as under SLURM."""
    slurm = {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_ARRAY_TASK_ID": str(element),
        "SLURM_ARRAY_TASK_COUNT": str(elements),
        "SLURM_ARRAY_TASK_MIN": "0",
        "SLURM_CPUS_PER_TASK": "1",
        "VENV": sys.prefix,
    }
    environment = {**os.environ, **slurm, **variables}
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_array(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    texts = make_texts(120)
    for number in range(3):
        rows = [{"text": text, "meta": {"set": f"S{i % 2}"}} for i, text in enumerate(texts[number::3])]
        write_rows(tmp_path / "in" / f"{number}.jsonl.zst", rows)
    tokenizer = train_tokenizer([str(tmp_path / "in" / "0.jsonl.zst")], tmp_path / "small", vocab_size=300)
    variables = {
        "INPUT": str(tmp_path / "in"),
        "OUTPUT": str(tmp_path / "out"),
        "TOKENIZER": str(tokenizer.path),
        "INPUTS_PER_SHARD": "1",
    }
    for element in (1, 0):
        result = run_element(element, 2, "--split-by", "meta.set", **variables)
        assert result.returncode == 0, result.stderr
    corpora = [open_corpus(tmp_path / "out" / f"S{i}_text_document") for i in range(2)]
    assert sum(corpus.num_documents for corpus in corpora) == len(texts)
    again = run_element(0, 2, "--split-by", "meta.set", **variables)
    assert "nothing to do" in again.stdout


def test_what_is_not_set_is_said() -> None:
    result = run_element(0, 1, OUTPUT="x")
    assert result.returncode != 0
    assert "INPUT: is not set: give the files" in result.stderr
