"""Memory of the whole process tree while a giant document is preprocessed."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import psutil
import pytest

from megatron_iiet.data.corpora.streams import open_corpus
from tests.data.inputs import make_texts
from tests.data.preprocess_runs import ENVIRONMENT, command, write_rows

LIMIT = 300e6
GIANT_BYTES = 50_000_000


def proportional_memory(process: psutil.Process) -> int:
    """PSS of a process and its descendants: shared pages are counted once."""
    total = 0
    for member in [process, *process.children(recursive=True)]:
        try:
            total += member.memory_full_info().pss
        except psutil.Error:
            continue
    return total


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one", pytest.param("many", marks=pytest.mark.long)])
def test_a_giant_document_needs_little_memory(tmp_path: Path, sentencepiece_model: Path, layout: str) -> None:
    mistral = pytest.importorskip("mistral_common", reason="its tokenizer is of the usual size")
    tokenizer = Path(mistral.__file__).parent / "data" / "tokenizer.model.v1"
    texts = make_texts(2000)
    lines = "\n".join(texts)
    giant = "\n".join([lines] * (GIANT_BYTES // len(lines.encode()) + 1))
    inputs = [
        write_rows(tmp_path / f"{number}.jsonl.zst", ({"text": text} for text in part))
        for number, part in enumerate([[*texts, giant, *texts], texts, texts])
    ]
    output = ["--output-prefix", tmp_path / "p"] if layout == "one" else ["--output-dir", tmp_path]
    arguments = ["--input", *inputs, "--tokenizer-model", tokenizer, *output, "--workers", 2]
    process = subprocess.Popen(command(*arguments), env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    peak = 0
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            peak = max(peak, proportional_memory(watched))
        except psutil.Error:
            break
        time.sleep(0.05)
    assert process.wait() == 0
    corpus = open_corpus(tmp_path / ("p_text_document" if layout == "one" else "text_document"))
    assert corpus.num_documents == 4 * len(texts) + 1
    assert peak < LIMIT
