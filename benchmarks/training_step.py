#!/usr/bin/env python
"""A training step of ours beside the same model's in other libraries, and beside the machine's matrix rate.

    training_step.py                                   # 55 M parameters, 2 x 1,024 tokens, ZeRO-1
    training_step.py --litgpt-python VENV/bin/python   # and litgpt's model, from an environment of its own
    training_step.py growth                            # exponents of depth, width, length, evaluations, ranks

Every system trains in processes of its own, whose steps are asked for in turn: the order of a round is turned
round in the next one, and ratios are of rounds. Memory is of three further steps, each after what is free was
given back. The peer is transformers' LlamaForCausalLM under the same
DeepSpeed settings with the same optimizer. --precision: bf16 where the CPU multiplies it, else fp32, as torch
takes bf16 element by element on other CPUs, in every library but this one.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
SIZES = {
    "hidden_size": 512,
    "ffn_hidden_size": 1408,
    "num_layers": 12,
    "num_attention_heads": 4,
    "vocab_size": 32000,
    "length": 1024,
    "batch": 2,
}
Step = Callable[[], None]


# ------------------------------------------------------------------------------------------- the systems


def ours(spec: dict[str, Any], stack: ExitStack) -> Step:
    """Transformer++ (r = 0) or IIET under our engine."""
    from megatron_iiet.config import LoadedConfig, config_from_dict
    from megatron_iiet.data.loader.batches import Batch
    from megatron_iiet.ops import resolve_backend
    from megatron_iiet.parallel import ParallelContext
    from megatron_iiet.training.engine import engine_class
    from megatron_iiet.training.pretrain import reconciled_ds_config

    model = {name: spec[name] for name in SIZES if name not in ("length", "batch")}
    r = spec["iterations"]
    config = config_from_dict(
        {
            "model": model | {"max_position_embeddings": spec["length"], "tie_embeddings": True},
            "solver": {"kind": "iiet", "iterations": r} if r else {"kind": "euler"},
            "data": {"sequence_length": spec["length"]},
            "training": {
                "global_batch_size": spec["batch"] * spec["ranks"],
                "micro_batch_size": spec["batch"],
                "precision": spec["precision"],
                "recompute": spec["recompute"],
                "compile": spec["compile"],
            },
        }
    )
    context = stack.enter_context(ParallelContext.start(config.parallel))
    ds_config = reconciled_ds_config(LoadedConfig(config=config, ds_config_path=None), spec["ranks"])
    backend, _ = resolve_backend(config.ops.backend, context.device)
    engine = engine_class(context)(config, ds_config, context, backend)
    batches = itertools.repeat(Batch(tokens_of(spec, 1)))
    return lambda: engine.train_step(batches, 1e-4).read()


def llama(spec: dict[str, Any], stack: ExitStack) -> Step:
    """transformers' LlamaForCausalLM under DeepSpeed's ZeRO-1, with torch's fused AdamW."""
    import deepspeed
    from transformers import LlamaConfig, LlamaForCausalLM

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=spec["hidden_size"],
            intermediate_size=spec["ffn_hidden_size"],
            num_hidden_layers=spec["num_layers"],
            num_attention_heads=spec["num_attention_heads"],
            vocab_size=spec["vocab_size"],
            max_position_embeddings=spec["length"],
            tie_word_embeddings=True,
            use_cache=False,
            attn_implementation="sdpa",
        )
    )
    bf16 = spec["precision"] == "bf16"
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True),
        config={
            "train_batch_size": spec["batch"],
            "gradient_clipping": 1.0,
            "bf16": {"enabled": bf16},
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
            **({"data_types": {"grad_accum_dtype": "fp32"}} if bf16 else {}),
        },
        dist_init_required=False,
    )
    tokens = tokens_of(spec)

    def step() -> None:
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()

    return step


def litgpt(spec: dict[str, Any], stack: ExitStack) -> Step:
    """litgpt's model with its chunked loss, in plain torch: no fp32 masters of bf16 weights."""
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    width = spec["hidden_size"] // spec["num_attention_heads"]
    model = GPT(
        Config(
            block_size=spec["length"],
            n_layer=spec["num_layers"],
            n_embd=spec["hidden_size"],
            n_head=spec["num_attention_heads"],
            head_size=width,
            padded_vocab_size=spec["vocab_size"],
            vocab_size=spec["vocab_size"],
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
            intermediate_size=spec["ffn_hidden_size"],
        )
    )
    model.lm_head.weight = model.transformer.wte.weight
    if spec["precision"] == "bf16":
        model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = tokens_of(spec, 1)

    def step() -> None:
        logits = model(tokens[:, :-1], lm_head_chunk_size=128)
        chunked_cross_entropy(logits, tokens[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


SYSTEMS = {"ours": ours, "llama": llama, "litgpt": litgpt}


def tokens_of(spec: dict[str, Any], more: int = 0) -> torch.Tensor:
    """Random ids, [B, T + more]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(spec["vocab_size"], (spec["batch"], spec["length"] + more), generator=generator)


# ------------------------------------------------------------------------------------------- the processes


def serve(spec: dict[str, Any], answers: int) -> None:
    """Take a step for every line that comes; answer its seconds or, for the line "memory", the bytes it took
    at most beyond what stays."""
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    with os.fdopen(answers, "w", encoding="utf-8") as out, ExitStack() as stack:
        step = SYSTEMS[spec["system"]](spec, stack)
        for line in sys.stdin:
            if line.strip() == "memory":
                ctypes.CDLL(None).malloc_trim(0)
                before = resident("VmRSS")
                Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak so far
                step()
                answer: float = resident("VmHWM") - before
            else:
                started = time.perf_counter()
                step()
                answer = time.perf_counter() - started
            out.write(f"{answer}\n")
            out.flush()


def resident(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").split()
    return 1024 * int(status[status.index(f"{name}:") + 1])


class Worker:
    """The processes that train one system: one, or as many data-parallel ranks as the specification says."""

    def __init__(self, system: str, spec: dict[str, Any], python: str = sys.executable) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(spec["ranks"])}
        ranks = [place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(spec["ranks"])]
        self.ranks = [Process(system, spec, python, rank if len(ranks) > 1 else {}) for rank in ranks]
        self.seconds: list[float] = []
        self.bytes: list[float] = []

    def step(self, noted: list[float] | None = None) -> None:
        """One training step; the slowest rank's time or the largest rank's memory is noted in the list."""
        for rank in self.ranks:
            rank.ask("memory" if noted is self.bytes else "seconds")
        answer = max([rank.answer() for rank in self.ranks])
        if noted is not None:
            noted.append(answer)

    def close(self) -> None:
        """End the processes."""
        for rank in self.ranks:
            rank.close()


class Process:
    """One of them."""

    def __init__(self, system: str, spec: dict[str, Any], python: str, place: dict[str, str]) -> None:
        read, write = os.pipe()
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        command = [python, "-W", "ignore", __file__, "--serve", str(write)]
        threads = str(spec["threads"])
        self.process = subprocess.Popen(
            [*command, json.dumps(spec | {"system": system})],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self.errors,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads} | place,
            pass_fds=[write],
        )
        os.close(write)
        self.answers = os.fdopen(read, encoding="utf-8")

    def ask(self, for_what: str) -> None:
        """Have it take a step."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(f"{for_what}\n")
            self.process.stdin.flush()

    def answer(self) -> float:
        """Seconds of the step or bytes of memory, when it is taken."""
        line = self.answers.readline()
        if not line:
            self.errors.seek(0)
            raise RuntimeError(f"a worker has ended: {self.errors.read()[-2000:].decode(errors='replace')}")
        return float(line)

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        self.answers.close()


def in_turn(workers: Sequence[Worker], rounds: int, for_memory: int = 0) -> None:
    """Rounds of a step of each, after two that warm up, then so many steps of each for the memory."""
    try:
        for number in range(-2, rounds):
            for worker in workers if number % 2 else reversed(workers):
                worker.step(worker.seconds if number >= 0 else None)
        for worker in workers:
            for _ in range(for_memory):
                worker.step(worker.bytes)
    finally:
        for worker in workers:
            worker.close()


# ------------------------------------------------------------------------------------------- the comparison


def step_flops(spec: dict[str, Any]) -> float:
    """FLOPs of products in a step of Transformer++: forward + 2 x forward, the causal half of the scores."""
    d, ffn, n, length = (spec[name] for name in ("hidden_size", "ffn_hidden_size", "num_layers", "length"))
    layer = 2 * (4 * d * d + 3 * d * ffn) + 4 * d * length / 2
    return 3 * spec["batch"] * length * (n * (spec["iterations"] + 1) * layer + 2 * d * spec["vocab_size"])


def matrix_rate(spec: dict[str, Any]) -> float:
    """FLOP/s of this machine's products at the shapes of the model, weighted as they occur."""
    dtype = torch.bfloat16 if spec["precision"] == "bf16" else torch.float32
    rows, d, ffn, n = (
        spec["batch"] * spec["length"],
        spec["hidden_size"],
        spec["ffn_hidden_size"],
        spec["num_layers"],
    )
    shapes = {(d, 3 * d): n, (d, d): n, (d, 2 * ffn): n, (ffn, d): n, (d, spec["vocab_size"]): 1}
    flops = seconds = 0.0
    for (inner, outer), count in shapes.items():
        a, b = torch.randn(rows, inner, dtype=dtype), torch.randn(outer, inner, dtype=dtype)
        times = []
        for _ in range(7):
            started = time.perf_counter()
            torch.nn.functional.linear(a, b)
            times.append(time.perf_counter() - started)
        flops += 2.0 * rows * inner * outer * count
        seconds += statistics.median(times) * count
    return flops / seconds


def ratio(a: Worker, b: Worker) -> str:
    """a over b, of rounds: median and middle half."""
    each = [x / y for x, y in zip(a.seconds, b.seconds, strict=True)]
    low, middle, high = statistics.quantiles(each, n=4)
    return f"{middle:.3f} x (half of the rounds: {low:.3f} to {high:.3f})"


def compare(spec: dict[str, Any], rounds: int, litgpt_python: str | None) -> None:
    """Print the table."""
    rate = matrix_rate(spec)
    workers = {
        "Transformer++": Worker("ours", spec),
        "IIET r = 3": Worker("ours", spec | {"iterations": 3}),
        "IIET r = 3, recompute": Worker("ours", spec | {"iterations": 3, "recompute": "evaluation"}),
        "LlamaForCausalLM": Worker("llama", spec),
    }
    if litgpt_python:
        workers["litgpt"] = Worker("litgpt", spec, litgpt_python)
    in_turn(list(workers.values()), rounds, for_memory=3)
    size = f"{spec['batch']} x {spec['length']} tokens"
    print(f"{spec['precision']}, {spec['threads']} threads, {size}, {rounds} rounds")
    for name, worker in workers.items():
        seconds, most = statistics.median(worker.seconds), statistics.median(worker.bytes)
        print(f"{name:<22} {seconds:8.3f} s a step, {most / 2**20:7.0f} MB beyond what stays")
    base, iterated, _, peer = list(workers.values())[:4]
    flops, more = step_flops(spec), step_flops(spec | {"iterations": 3})
    print(f"LlamaForCausalLM / Transformer++   {ratio(peer, base)}")
    if litgpt_python:
        print(f"litgpt / Transformer++             {ratio(workers['litgpt'], base)}")
    print(f"IIET r = 3 / Transformer++         {ratio(iterated, base)}, FLOPs {more / flops:.3f} x")
    reached = flops / statistics.median(base.seconds)
    of_rate = f"{reached / 1e9:.0f} of {rate / 1e9:.0f} GFLOP/s = {reached / rate:.2f}"
    print(f"Transformer++ / matrix rate        {of_rate}")
    memory = {name: statistics.median(worker.bytes) for name, worker in workers.items()}
    to_peer = memory["Transformer++"] / memory["LlamaForCausalLM"]
    print(f"memory, Transformer++ / peer       {to_peer:.2f} x")
    recomputed = memory["IIET r = 3, recompute"] / memory["Transformer++"]
    print(f"memory, r = 3 recomputed / r = 0   {recomputed:.2f} x")


GROWTH = {
    "num_layers": (6, 12, 24),
    "hidden_size": (256, 512, 1024),
    "length": (256, 512, 1024, 2048),
    "evaluations": (1, 2, 5, 9),
    "ranks": (1, 2),
}


def growth(spec: dict[str, Any], rounds: int, only: Sequence[str]) -> None:
    """Exponents of the step's time, fitted over a range of sizes, beside those of the FLOPs.
    Data-parallel ranks, a thread each, share as many times the tokens: exponent 0 at best."""
    print(f"{'what grows':<14} {'range':<14} {'time':>6} {'FLOPs':>6} {'ratio':>6}")
    for name, values in ((name, values) for name, values in GROWTH.items() if name in only):
        specs = [grown(spec, name, value) for value in values]
        workers = [Worker("ours", each) for each in specs]
        in_turn(workers, rounds)
        seconds = [statistics.median(worker.seconds) for worker in workers]
        of_time, of_flops = exponent(values, seconds), exponent(values, [step_flops(each) for each in specs])
        of = f"{of_time:>6.3f} {of_flops:>6.3f}" + (f" {of_time / of_flops:>6.3f}" if of_flops else "")
        print(f"{name:<14} {values[0]:>5} to {values[-1]:<5} {of}", flush=True)


def grown(spec: dict[str, Any], name: str, value: int) -> dict[str, Any]:
    """The specification with one size changed; a wider model has a wider feed-forward part."""
    if name == "evaluations":
        return spec | {"iterations": value - 1}
    if name == "ranks":
        return spec | {"ranks": value, "threads": 1}
    more = (
        {"ffn_hidden_size": 2.75 * value, "num_attention_heads": value // 128}
        if name == "hidden_size"
        else {}
    )
    return spec | {name: value} | {key: int(number) for key, number in more.items()}


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of log values over log sizes."""
    return statistics.linear_regression([math.log(x) for x in sizes], [math.log(y) for y in values]).slope


def main() -> None:
    """Measure, and print the table."""
    if "--serve" in sys.argv:
        serve(json.loads(sys.argv[-1]), int(sys.argv[sys.argv.index("--serve") + 1]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", nargs="?", default="compare", choices=["compare", "growth"])
    for name, default in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)()
    parser.add_argument("--precision", default="bf16" if supported else "fp32", choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", default="off", choices=["off", "layer"])
    parser.add_argument("--only", nargs="+", default=list(GROWTH), choices=GROWTH, help="of growth")
    parser.add_argument("--litgpt-python", help="Python of an environment with litgpt (pip install litgpt)")
    arguments = parser.parse_args()
    spec = {name: getattr(arguments, name) for name in (*SIZES, "precision", "threads", "compile")}
    spec |= {"iterations": 0, "recompute": "off", "ranks": 1}
    torch.set_num_threads(arguments.threads)
    if arguments.what == "growth":
        growth(spec, arguments.rounds, arguments.only)
    else:
        compare(spec, arguments.rounds, arguments.litgpt_python)


if __name__ == "__main__":
    main()
