"""Memory of the whole process tree while a giant document is preprocessed."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryFile
from types import SimpleNamespace

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_iiet.data.corpora.indexed_writer import IndexedDatasetWriter
from megatron_iiet.data.corpora.streams import open_corpus
from megatron_iiet.data.preprocess.tasks import Packed
from megatron_iiet.data.tokenizers.base import UncuttableError
from tests.data.inputs import make_texts
from tests.data.preprocess_runs import ENVIRONMENT, command, write_rows

LIMITS = {"jsonl.zst": 300e6, "parquet": 400e6}
GIANT_BYTES = 100_000_000


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
@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        ("one", "jsonl.zst"),
        pytest.param("many", "jsonl.zst", marks=pytest.mark.long),
        pytest.param("one", "parquet", marks=pytest.mark.long),
    ],
)
def test_a_giant_document_needs_little_memory(tmp_path: Path, layout: str, kind: str) -> None:
    mistral = pytest.importorskip("mistral_common", reason="its tokenizer is of the usual size")
    tokenizer = Path(mistral.__file__).parent / "data" / "tokenizer.model.v1"
    texts = make_texts(2000)
    lines = "\n".join(texts)
    giant = "\n".join([lines] * (GIANT_BYTES // len(lines.encode()) + 1))
    inputs = [tmp_path / f"{number}.{kind}" for number in range(3)]
    for path, part in zip(inputs, [[*texts * 3, giant, *texts], texts, texts], strict=True):
        if kind == "parquet":
            pq.write_table(pa.table({"text": part}), path)
        else:
            write_rows(path, ({"text": text} for text in part))
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
    assert corpus.num_documents == 6 * len(texts) + 1
    assert peak < LIMITS[kind]


def test_tokens_on_disk_are_as_in_memory(tmp_path: Path) -> None:
    """Also where a document turns out to have no place to cut it, and what it had is taken back."""
    encoder = SimpleNamespace(eod_id=7)
    recipe = SimpleNamespace(dtype=np.dtype("<u2"), encoder=encoder, options=SimpleNamespace(append_eod=True))

    def uncuttable() -> Iterator[np.ndarray]:
        yield np.arange(5)
        raise UncuttableError("no place")

    held = []
    for number, file in enumerate((BytesIO(), TemporaryFile(dir=tmp_path))):  # noqa: SIM115 closed by write
        packed = Packed(file)
        assert packed.add(recipe, [np.arange(3), np.arange(40_000, 40_002)])
        assert not packed.add(recipe, [np.arange(0)])
        with pytest.raises(UncuttableError):
            packed.add(recipe, uncuttable())
        assert packed.add(recipe, [np.arange(2)])
        with IndexedDatasetWriter(tmp_path / str(number), 50_000) as writer:
            packed.write(writer)
        corpus = open_corpus(tmp_path / str(number))
        held.append((corpus.read(0, corpus.num_tokens).tolist(), packed.lengths))
    assert held[0] == held[1] == ([0, 1, 2, 40_000, 40_001, 7, 0, 1, 7], [6, 3])
    assert len(list(tmp_path.iterdir())) == 2 * 2  # the pairs alone
