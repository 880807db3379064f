#!/usr/bin/env python
"""How fast and how frugal is the data path, against its peers in the same run?

    tokenize   tokens per CPU-second and wall time of tools/preprocess_data.py on one .jsonl.zst file and on
               the same as parquet, against a bare pool around sentencepiece, datatrove, datasets.map and,
               with --megatron, Megatron-LM's tools/preprocess_data.py (on the same lines, not compressed)
    memory     peak memory of the same command, and with one document of 100 MB in the corpus, as lines of
               JSON and as parquet
    open       opening a corpus for training: 10 MB in one shard against 1 TB (sparse files) in 100,000 shards
    loader     samples per second of the training loader, the share of permutation and blend in it, and
               megatron-core's GPTDataset on the same shard
    scale      CPU time that one rank of 64 spends on windows, packing and counting, as a share of a step
               of 4,096 samples and 0.5 s; beside a rank that counts the targets of all of them

Every round runs all contenders, the best of the rounds is compared (neighbours on the machine only ever slow
it down), ratios say how many times better ours is, CPU time and memory are those of the whole process tree.

    python benchmarks/data.py [SECTION...] --corpus text.jsonl.zst --tokenizer tokenizer.model

Without --corpus the demo's corpus is made. Peers that are not installed are named and left out; they need not
share our environment: --peer-python /path/to/python. Megatron-LM's tool is not on PyPI: --megatron is a
checkout of it, which --megatron-python can import.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zstandard

from megatron_iiet.data.corpora.indexed_writer import IndexedDatasetWriter

if TYPE_CHECKING:
    from megatron_iiet.data.loader.batches import TrainBatches
    from megatron_iiet.data.loader.order import SampleOrder

T, B = 2048, 8
ROOT = Path(__file__).resolve().parents[1]
SECTIONS = ("tokenize", "memory", "open", "loader", "scale")
GIANT_CHARACTERS = 100_000_000
RANKS, GLOBAL_BATCH, STEP_SECONDS = 64, 4096, 0.5


@dataclass
class Usage:
    """What a command took."""

    wall_s: float
    cpu_s: float
    peak_mb: float
    output: str


def run(command: list[str | Path], *, sample_memory: bool = False) -> Usage:
    """Run a command to its end; CPU time and peak proportional set size of its whole process tree."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start = time.perf_counter()
        process = subprocess.Popen([str(part) for part in command], stdout=out, stderr=err, cwd=ROOT)
        peak = _PeakMemory(process.pid) if sample_memory else None
        _, status, rusage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if process.returncode:
            raise RuntimeError(f"{command} failed with {process.returncode}: {err.read()[-2000:]}")
        memory = peak.stop() if peak else 0.0
        return Usage(wall, rusage.ru_utime + rusage.ru_stime, memory, out.read())


class _PeakMemory:
    """Largest sum of proportional set sizes over a process and its descendants, sampled."""

    def __init__(self, pid: int) -> None:
        self._pid, self._peak, self._done = pid, 0, threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()

    def stop(self) -> float:
        """The peak in MB."""
        self._done.set()
        self._thread.join()
        return self._peak / 1000

    def _sample(self) -> None:
        while not self._done.wait(0.03):
            self._peak = max(self._peak, sum(map(_pss_kb, _tree(self._pid))))


def _tree(pid: int) -> Iterator[int]:
    yield pid
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text(encoding="utf-8").split():
                yield from _tree(int(child))
    except OSError:
        return  # it ended meanwhile


def _pss_kb(pid: int) -> float:
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
    except OSError:
        return 0
    return next(
        (float(line.split()[1]) * 1.024 for line in rollup.splitlines() if line.startswith("Pss:")), 0
    )


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A folder that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def preprocess(corpus: Path, tokenizer: Path, folder: Path, workers: int) -> list[str | Path]:
    """The command under test."""
    return [
        *(sys.executable, "tools/preprocess_data.py", "--input", corpus, "--output-prefix", folder / "ours"),
        *("--tokenizer-model", tokenizer, "--workers", str(workers)),
    ]


def tokens_of(folder: Path) -> int:
    """Tokens that our command wrote."""
    return (folder / "ours_text_document.bin").stat().st_size // 2


def tokenize(arguments: argparse.Namespace, work: Path) -> dict[str, object]:
    """Ours and the peers, round by round."""
    peers = {"sentencepiece-pool": arguments.tokenizer}
    fast = _fast_tokenizer(arguments.tokenizer, work)
    for name, module in (("datatrove", "datatrove"), ("datasets.map", "datasets")):
        probe = [arguments.peer_python, "-c", f"import {module}"]
        if subprocess.run(probe, capture_output=True).returncode == 0:
            peers[name] = fast
        else:
            print(f"{name}: not installed for {arguments.peer_python}, left out")
    parts = _split(arguments.corpus, work / "parts", arguments.workers)
    ours_reads = {"ours": arguments.corpus, "ours, parquet": _as_parquet(arguments.corpus, work)}
    lines = work / "lines.jsonl"
    if arguments.megatron:
        with lines.open("wb") as file, arguments.corpus.open("rb") as packed:
            zstandard.ZstdDecompressor().copy_stream(packed, file)
    else:
        print("Megatron-LM: no checkout of it is named (--megatron), left out")

    best: dict[str, tuple[Usage, int]] = {}
    for _ in range(arguments.rounds):
        for name, corpus in ours_reads.items():
            with scratch(work) as folder:
                usage = run(preprocess(corpus, arguments.tokenizer, folder, arguments.workers))
                _keep_best(best, name, usage, tokens_of(folder))
        if arguments.megatron:
            with scratch(work) as folder:
                usage = run(_megatrons(arguments, lines, folder))
                size = (folder / "theirs_text_document.bin").stat().st_size
                _keep_best(best, "Megatron-LM", usage, size // (2 if _vocabulary(arguments) < 65_500 else 4))
        for name, tokenizer in peers.items():
            with scratch(work) as folder:
                source = parts if name == "datatrove" else arguments.corpus
                script = ROOT / "benchmarks" / "data_peers.py"
                command = [arguments.peer_python, script, name, source, tokenizer, folder, arguments.workers]
                usage = run(command)
                _keep_best(best, name, usage, int(usage.output.split()[-1]))

    ours, tokens = best["ours"]
    print(f"\ntokenize: {tokens:,} tokens, {arguments.workers} workers, best of {arguments.rounds}")
    print(f"{'':22}{'CPU s':>8}{'Mtok/CPU-s':>12}{'ours x':>8}{'wall s':>8}{'ours / it':>11}")
    for name, (usage, count) in best.items():
        rate = count / usage.cpu_s
        times = f"{tokens / ours.cpu_s / rate:.2f}"
        wall = f"{ours.wall_s / usage.wall_s:.2f}"
        print(f"{name:22}{usage.cpu_s:8.2f}{rate / 1e6:12.3f}{times:>8}{usage.wall_s:8.2f}{wall:>11}")
    return {name: {**asdict(usage), "tokens": count} for name, (usage, count) in best.items()}


def _as_parquet(corpus: Path, work: Path) -> Path:
    """The rows' texts, in row groups of 10,000."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with corpus.open("rb") as packed, zstandard.ZstdDecompressor().stream_reader(packed) as file:
        texts = [json.loads(line)["text"] for line in io.TextIOWrapper(file, "utf-8", newline="\n")]
    path = work / "corpus.parquet"
    pq.write_table(pa.table({"text": texts}), path, row_group_size=10_000, compression="zstd")
    return path


def _vocabulary(arguments: argparse.Namespace) -> int:
    from sentencepiece import SentencePieceProcessor

    return int(SentencePieceProcessor(str(arguments.tokenizer)).vocab_size())


def _megatrons(arguments: argparse.Namespace, lines: Path, folder: Path) -> list[str | Path]:
    """Megatron-LM's command for the same."""
    return [
        *("env", f"PYTHONPATH={arguments.megatron}", arguments.megatron_python, "-W", "ignore"),
        *(arguments.megatron / "tools" / "preprocess_data.py", "--input", lines),
        *("--output-prefix", folder / "theirs", "--tokenizer-type", "SentencePieceTokenizer"),
        *("--tokenizer-model", arguments.tokenizer, "--workers", str(arguments.workers)),
    ]


def _keep_best(best: dict[str, tuple[Usage, int]], name: str, usage: Usage, tokens: int) -> None:
    """The least CPU time and the least wall time, which may come from two rounds."""
    if name in best:
        before = best[name][0]
        usage.cpu_s, usage.wall_s = min(usage.cpu_s, before.cpu_s), min(usage.wall_s, before.wall_s)
    best[name] = (usage, tokens)


def _split(corpus: Path, folder: Path, parts: int) -> Path:
    """The corpus as one file a worker, for tools that split work by file."""
    folder.mkdir()
    files = [(folder / f"{i}.jsonl.zst").open("wb") for i in range(parts)]
    writers = [zstandard.ZstdCompressor(level=3).stream_writer(file) for file in files]
    with corpus.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as reader:
        lines = reader.read().splitlines(keepends=True)
    for i, writer in enumerate(writers):
        writer.write(b"".join(lines[len(lines) * i // parts : len(lines) * (i + 1) // parts]))
        writer.close()
    return folder


def _fast_tokenizer(model: Path, work: Path) -> Path:
    """tokenizer.json with (nearly) the same pieces, which datatrove and datasets' users would load."""
    from transformers import AutoTokenizer

    folder = work / "fast"
    folder.mkdir()
    shutil.copy(model, folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}', encoding="utf-8")
    AutoTokenizer.from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def memory(arguments: argparse.Namespace, work: Path) -> dict[str, object]:
    """Peak memory of our command, without and with a giant document."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    giant, table = work / "giant.jsonl.zst", work / "giant.parquet"
    with arguments.corpus.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as reader:
        raw = reader.read()
    texts = [json.loads(line)["text"] for line in raw.splitlines()[:20_000]]
    filler = "".join(texts)
    filler = (filler * (GIANT_CHARACTERS // len(filler) + 1))[:GIANT_CHARACTERS]
    rows = [*texts[:2000], filler, *texts[2000:4000]]
    giant.write_bytes(
        zstandard.compress("".join(json.dumps({"text": text}) + "\n" for text in rows).encode())
    )
    pq.write_table(pa.table({"text": rows}), table)
    del raw, texts, filler, rows
    results = {}
    print("\nmemory: peak of the process tree, MB (limits 300, 300, 400)")
    for name, corpus in (("corpus", arguments.corpus), ("with a giant", giant), ("that in parquet", table)):
        with scratch(work) as folder:
            command = preprocess(corpus, arguments.tokenizer, folder, arguments.workers)
            usage = run(command, sample_memory=True)
        results[name] = usage.peak_mb
        print(f"{name:24}{usage.peak_mb:8.0f}")
    return results


def opening(arguments: argparse.Namespace, work: Path) -> dict[str, object]:
    """Seconds until a training process holds its first batch, by size of the corpus."""
    from megatron_iiet.data.corpora.mmididx import Shard
    from megatron_iiet.data.corpora.shard_list import write_shards

    small = work / "small_text_document"
    with IndexedDatasetWriter(small, 32000) as writer:
        for _ in range(1000):
            writer.add_document(np.arange(5000, dtype=np.uint16))
    large = work / "large_text_document"
    large.mkdir()
    shards, documents, tokens = [], 1000, 5_000_000  # 10 MB of uint16 each
    index = small.with_name(small.name + ".idx").read_bytes()
    some_index = work / "some.idx"
    for i in range(arguments.shards):
        prefix = large / f"{i:06d}"
        with prefix.with_name(prefix.name + ".bin").open("wb") as file:
            file.truncate(2 * tokens)  # sparse: no disk space behind it
        if i % 20_000 == 0:  # file systems bound the links of a file
            some_index.unlink(missing_ok=True)
            some_index.write_bytes(index)
        os.link(some_index, prefix.with_name(prefix.name + ".idx"))
        shards.append(Shard(f"large_text_document/{i:06d}", tokens, documents, bytes(16), bytes(16)))
    write_shards(large, shards, np.dtype("<u2"), {})

    results: dict[str, object] = {}
    print(f"\nopen: a fresh process to its first batch, best of {arguments.rounds}")
    for name, prefix in (("10 MB, 1 shard", small), (f"1 TB, {arguments.shards:,} shards", large)):
        best = [9e9, 9e9]
        for _ in range(arguments.rounds):
            usage = run([sys.executable, __file__, "--open", prefix])
            best = [min(best[0], usage.wall_s), min(best[1], float(usage.output))]
        results[name] = best
        print(f"{name:26}{best[0]:8.2f} s the process, of which {1000 * best[1]:8.2f} ms opening and reading")
    return results


def open_once(prefix: Path) -> None:
    """What a training process does with its corpus before the first step; prints the seconds."""
    import megatron_iiet.data.loader.batches  # noqa: F401  # importing torch is not opening a corpus

    start = time.perf_counter()
    batches = batches_of(prefix)
    next(batches)
    batches.close()
    print(time.perf_counter() - start)


def batches_of(
    prefix: Path, *, documents: str = "ignore", num_workers: int = 0, ranks: int = 1, **options: Any
) -> TrainBatches:
    """The first rank's training loader on a corpus: micro-batches of 8 x (2048 + 1) tokens."""
    from megatron_iiet.data.loader.batches import TrainBatches
    from megatron_iiet.data.loader.samples import build_splits

    return TrainBatches(
        [build_splits(prefix, T, [0.98, 0.02, 0.0], documents, vocab_size=2**31).train],
        global_batch_size=B if ranks == 1 else GLOBAL_BATCH,
        micro_batch_size=B,
        data_parallel_rank=0,
        data_parallel_size=ranks,
        seed=1234,
        num_workers=num_workers,
        **options,
    )


def loader(arguments: argparse.Namespace, work: Path) -> dict[str, object]:
    """Samples per second, ours in every mode and Megatron's; the share of our order in the time."""
    from megatron_iiet.data.loader.order import SampleOrder

    prefix = _crawled(work, 60_000)
    megabytes = prefix.with_name(prefix.name + ".bin").stat().st_size / 1e6
    print(
        f"\nloader: T = {T}, micro-batches of {B}, one process, a shard of {megabytes:.0f} MB in page cache"
    )

    rates: dict[str, float] = {}
    contenders: dict[str, Callable[[], float]] = {}
    for documents in ("ignore", "reset", "pack"):
        for threads in (0, 1):
            batches = batches_of(prefix, documents=documents, num_workers=threads)
            contenders[f"{documents}, {threads} reading threads"] = lambda batches=batches: _rate(batches)  # type: ignore[misc]
    megatron = _megatron(prefix, work)
    if megatron is not None:
        contenders["megatron-core GPTDataset"] = megatron
    for _ in range(arguments.rounds):
        for name, measure in contenders.items():
            rates[name] = max(rates.get(name, 0.0), measure())
    for name, rate in rates.items():
        print(f"{name:28}{rate:10,.0f} samples/s")
    ours = rates["ignore, 0 reading threads"]
    if megatron is not None:
        print(f"{'ours / megatron-core':28}{ours / rates['megatron-core GPTDataset']:10.2f}")

    n, samples = len(batches_of(prefix).sources[0]), 1 << 18
    for name, order in (
        ("permutation", SampleOrder([n], [1.0], 0)),
        ("permutation, blend of 7", SampleOrder([n] * 7, [52.2, 26.7, 5.2, 4.2, 4.6, 3.8, 3.3], 0)),
    ):
        seconds = min(_seconds_of_order(order, samples) for _ in range(arguments.rounds))
        share = seconds / samples * ours
        rates[f"share of {name}"] = share
        print(f"{name:28}{1e6 * seconds / samples:10.3f} us a sample, {share:.2%} of the loader's time")
    return dict(rates)


def _crawled(work: Path, documents: int) -> Path:
    """A corpus whose documents are as long as those of crawled text."""
    prefix = work / "loader_text_document"
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(6.2, 1.2, documents).astype(np.int64) + 1, 200_000)
    with IndexedDatasetWriter(prefix, 32_000) as writer:
        for length in lengths.tolist():
            writer.add_document(rng.integers(0, 32_000, length, dtype=np.uint16))
    return prefix


def scale(arguments: argparse.Namespace, work: Path) -> dict[str, object]:
    """CPU-seconds a step of one rank of many, whose part of the exchange is one sum of two numbers."""
    prefix = _crawled(work, 300_000)  # more blocks than a step packs, so that none is packed before
    print(f"\nscale: rank 0 of {RANKS}, {GLOBAL_BATCH:,} samples of {T} tokens a step of {STEP_SECONDS} s")
    found: dict[str, object] = {}
    for documents in ("ignore", "reset", "pack"):
        own = batches_of(prefix, documents=documents, ranks=RANKS, add_up=lambda numbers: None)
        seconds = min(_cpu_seconds_of_step(own) for _ in range(4 * arguments.rounds))
        alone = (
            seconds
            if documents == "ignore"
            else _cpu_seconds_of_step(batches_of(prefix, documents=documents, ranks=RANKS))
        )
        found[documents] = {"seconds": seconds, "share": seconds / STEP_SECONDS, "alone": alone}
        print(
            f"{documents:8}{1000 * seconds:8.1f} ms CPU, {seconds / STEP_SECONDS:.2%} of a step (asked: 2 %);"
            f" counting the rows of all: {alone / seconds:.1f} x"
        )
    return found


def _cpu_seconds_of_step(batches: TrainBatches) -> float:
    start = time.process_time()
    for _ in range(batches.micro_steps):
        next(batches)
    return time.process_time() - start


def _rate(batches: TrainBatches, seconds: float = 1.0) -> float:
    """Samples per second over at least so long."""
    next(batches)
    start, read = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < seconds:
        for _ in range(50):
            next(batches)
        read += 50 * B
    return read / passed


def _seconds_of_order(order: SampleOrder, samples: int) -> float:
    """As the loader asks: blocks of 16384 samples."""
    order(np.arange(16_384))
    start = time.perf_counter()
    for first in range(0, samples, 16_384):
        order(np.arange(first, first + 16_384))
    return time.perf_counter() - start


def _megatron(prefix: Path, work: Path) -> Callable[[], float] | None:
    """megatron-core's GPTDataset on the same shard, its __getitem__ stacked as its collate does."""
    try:
        import torch
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    except ImportError:
        print("megatron-core: not installed, left out")
        return None
    torch.distributed.init_process_group("gloo", init_method=f"file://{work}/group", rank=0, world_size=1)
    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=T,
        blend=([str(prefix)], None),
        split="98,1,1",
        path_to_cache=str(work / "cache"),
        tokenizer=_NoTokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    wanted = 40_000
    start = time.perf_counter()
    dataset = BlendedMegatronDatasetBuilder(GPTDataset, [wanted, 0, 0], lambda: True, config).build()[0]
    print(f"megatron-core builds its index in {time.perf_counter() - start:.2f} s; ours has none")

    def measure() -> float:
        start = time.perf_counter()
        for first in range(0, 2000, B):
            torch.stack([torch.as_tensor(dataset[first + row]["tokens"]) for row in range(B)])
        return 2000 / (time.perf_counter() - start)

    return measure


class _NoTokenizer:
    """What GPTDataset asks of a tokenizer."""

    eod = 2
    unique_identifiers: dict[str, str] = {}  # noqa: RUF012
    vocab_size = 32_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--corpus", type=Path, default=Path("data/demo/corpus.jsonl.zst"))
    parser.add_argument(
        "--tokenizer", type=Path, help="SentencePiece model (default: mistral-common's of 32k)"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shards", type=int, default=100_000, help="of the large corpus that is opened")
    parser.add_argument(
        "--peer-python", default=sys.executable, help="interpreter that has datatrove, datasets"
    )
    parser.add_argument("--megatron", type=Path, help="a checkout of Megatron-LM")
    parser.add_argument("--megatron-python", default=sys.executable, help="interpreter that can import it")
    parser.add_argument("--work-dir", type=Path, help="for temporary files (default: the system's)")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.open:
        return open_once(arguments.open)
    chosen = arguments.sections or SECTIONS
    if unknown := set(chosen) - set(SECTIONS):
        parser.error(f"unknown sections {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    if {"tokenize", "memory"} & set(chosen):
        _find_inputs(arguments)
    measures = {"tokenize": tokenize, "memory": memory, "open": opening, "loader": loader, "scale": scale}
    results = {}
    for section in chosen:
        with tempfile.TemporaryDirectory(dir=arguments.work_dir) as work:
            results[section] = measures[section](arguments, Path(work))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return None


def _find_inputs(arguments: argparse.Namespace) -> None:
    """The defaults of --corpus and --tokenizer, made where missing."""
    if arguments.tokenizer is None:
        import mistral_common

        arguments.tokenizer = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    if not arguments.corpus.exists():
        subprocess.run(["make", arguments.corpus], cwd=ROOT, check=True)
    arguments.corpus = arguments.corpus.resolve()


if __name__ == "__main__":
    main()
