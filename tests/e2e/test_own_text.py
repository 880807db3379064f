"""The commands that the README prints for one's own text, in its order, in an empty folder."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from megatron_iiet.training.metrics import read_log
from tests.tiny import write_corpus

ROOT = Path(__file__).resolve().parents[2]
SHORT = (
    "--training.steps 2 --training.global_batch_size 4 --training.micro_batch_size 2 --evaluation.samples 4"
)


def commands() -> list[str]:
    """The indented commands of the paragraph, each on one line."""
    text = (ROOT / "README.md").read_text()
    paragraph = text[text.index("**Your own text**") :]
    block = re.search(r"\n\n((?:    .*\n)+)", paragraph)
    assert block
    return [line.strip() for line in block[1].replace("\\\n", " ").splitlines()]


@pytest.mark.slow
def test_own_text(tmp_path: Path) -> None:
    write_corpus(tmp_path / "text", documents=400)
    (tmp_path / "mine.jsonl.zst").write_bytes(zstandard.compress((tmp_path / "text").read_bytes()))
    for name in ("tools", "examples", "pretrain_iiet.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    bin_folder = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    found = commands()
    assert [shlex.split(command)[1] for command in found[:2]] == [
        "tools/train_tokenizer.py",
        "tools/preprocess_data.py",
    ]
    for command in found:
        command = command.replace("--vocab-size 4096", "--vocab-size 320").replace(
            "--workers 8", "--workers 1"
        )
        if command.startswith("deepspeed"):
            command += " " + SHORT
        done = subprocess.run(
            shlex.split(command), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert list(read_log(tmp_path / "runs" / "mine")) == [0, 1, 2]
