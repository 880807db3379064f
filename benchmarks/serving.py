#!/usr/bin/env python
"""What does continuous batching bring? Tokens a second of tools/serve.py with one client and with several,
and of transformers' ``generate`` on the same weights, prompt by prompt and as one batch.

    serving.py                                  # a 55M IIET with random weights, 8 clients
    serving.py --model exported --clients 16 --new-tokens 64

The server is a process of its own; clients speak HTTP to it, each sends its next prompt when the answer to
the last one is there. All four ways get the same prompts, of different lengths, and make greedy texts of
equally many tokens; the texts have to be equal, or the exit status is 1 (with random weights that says
little: such a model repeats its last token; tests/serving says more). Rounds are interleaved, the best of
each is taken; the time of a round is all of it, reading the prompts included. CPU time is that of the process
that has the model: where others use the machine as well, it tells more than tokens a second.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import mistral_common
import openai
import psutil
import torch
from transformers import GenerationConfig
from transformers.utils import logging

from megatron_iiet.config import config_from_file
from megatron_iiet.hf.generation import TextGenerator, open_generator
from megatron_iiet.models import Transformer
from megatron_iiet.storage import portable

ROOT = Path(__file__).resolve().parents[1]


def random_model(folder: Path) -> Path:
    """A 55M IIET, r = 3, with random weights and a real tokenizer of 32,000 pieces."""
    config = config_from_file(ROOT / "examples/configs/iiet-55m.yaml", [])
    model = Transformer(config)
    model.initialise(1234)
    tokenizer = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    config.data.tokenizer = tokenizer.name
    portable.save(config, dict(model.named_parameters()), folder / "random-55m", extra_files=[tokenizer])
    return folder / "random-55m"


class Server:
    """tools/serve.py as a process, and clients of it."""

    def __init__(self, model: Path, folder: Path, clients: int, threads: int) -> None:
        ready = folder / "ready"
        command = [sys.executable, str(ROOT / "tools/serve.py"), "--model", str(model), "--port", "0"]
        command += ["--ready-file", str(ready), "--max-concurrent", str(clients), "--name", "served"]
        self._process = subprocess.Popen([*command, "--threads", str(threads)])
        while not ready.is_file():
            if self._process.poll() is not None:
                raise SystemExit("error: the server did not start; its message is above")
            time.sleep(0.1)
        self._client = openai.OpenAI(
            base_url=ready.read_text(encoding="utf-8").strip(), api_key="none", max_retries=0
        )

    def texts(self, prompts: Sequence[list[int]], new_tokens: int, clients: int) -> list[str]:
        """Continuations, asked for by so many clients."""

        def ask(prompt: list[int]) -> str:
            made = self._client.completions.create(
                model="served", prompt=prompt, max_tokens=new_tokens, temperature=0
            )
            if made.usage is None or made.usage.completion_tokens != new_tokens:
                raise SystemExit("error: a text ended early; choose other prompts or fewer new tokens")
            return made.choices[0].text

        with ThreadPoolExecutor(clients) as pool:
            return list(pool.map(ask, prompts))

    @property
    def process(self) -> psutil.Process:
        """The one with the model."""
        return psutil.Process(self._process.pid)

    def stop(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()


@torch.no_grad()
def generated(
    generator: TextGenerator, prompts: Sequence[list[int]], new_tokens: int, batch: int
) -> list[str]:
    """Continuations by transformers' ``generate``, so many at once, padded at the left."""
    unknown = list(range(generator.codec.vocab_size, generator.model.config.vocab_size))
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        suppress_tokens=unknown or None,
    )
    found = []
    for start in range(0, len(prompts), batch):
        rows = prompts[start : start + batch]
        longest = max(map(len, rows))
        tokens = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        made = generator.model.generate(tokens, attention_mask=mask, generation_config=settings)
        for row, ids in zip(rows, made[:, longest:].tolist(), strict=True):
            decode = generator.codec.decode
            found.append(decode([*row, *ids])[len(decode(row)) :])
    return found


@dataclass
class Way:
    """A way of making texts of so many new tokens, and what it took."""

    make: Callable[[int], list[str]]
    process: psutil.Process
    """The one with the model."""
    seconds: float = float("inf")
    cpu: float = float("inf")
    texts: list[str] = field(default_factory=list)

    def measure(self, new_tokens: int) -> None:
        """Do it; the best so far stays."""
        started, before = time.perf_counter(), self._cpu()
        self.texts = self.make(new_tokens)
        self.seconds = min(self.seconds, time.perf_counter() - started)
        self.cpu = min(self.cpu, self._cpu() - before)

    def _cpu(self) -> float:
        times = self.process.cpu_times()
        return times.user + times.system


def main() -> int:
    """Measure and print; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, metavar="DIR", help="default: a 55M IIET with random weights")
    add("--clients", type=int, default=8)
    add("--new-tokens", type=int, default=32)
    add("--prompt", type=int, default=32, help="tokens of the longest; the others have fewer")
    add("--rounds", type=int, default=3)
    add("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    clients, new = arguments.clients, arguments.new_tokens
    with tempfile.TemporaryDirectory(prefix="serving-") as name:
        folder = Path(name)
        model = arguments.model or random_model(folder)
        generator = open_generator(str(model))
        random = torch.Generator().manual_seed(1234)
        lengths = [arguments.prompt - (arguments.prompt // 2) * i // clients for i in range(clients)]
        most = generator.codec.vocab_size
        prompts = [torch.randint(most // 4, most, (length,), generator=random).tolist() for length in lengths]
        server = Server(model, folder, clients, arguments.threads)
        here, there = psutil.Process(), server.process
        ways = {
            "transformers' generate, one by one": Way(lambda n: generated(generator, prompts, n, 1), here),
            f"transformers' generate, batch of {clients}": Way(
                lambda n: generated(generator, prompts, n, clients), here
            ),
            "tools/serve.py, 1 client": Way(lambda n: server.texts(prompts, n, 1), there),
            f"tools/serve.py, {clients} clients": Way(lambda n: server.texts(prompts, n, clients), there),
        }
        try:
            for way in ways.values():
                way.make(2)  # warms up
            for _ in range(arguments.rounds):
                for way in ways.values():
                    way.measure(new)
        finally:
            server.stop()
    first, alone = ways["transformers' generate, one by one"], ways["tools/serve.py, 1 client"]
    total, unequal = clients * new, False
    print(f"\n{clients} prompts of {min(lengths)} to {max(lengths)} tokens, {new} new ones each, "
          f"{arguments.threads} threads, best of {arguments.rounds} rounds\n")  # fmt: skip
    print("| way | tokens/s | against generate, one by one | against 1 client | CPU ms a token | texts |")
    print("|---|---|---|---|---|---|")
    for name, way in ways.items():
        unequal |= way.texts != first.texts
        cells = [f"{total / way.seconds:.1f}", f"{first.seconds / way.seconds:.2f}x"]
        cells += [f"{alone.seconds / way.seconds:.2f}x", f"{1000 * way.cpu / total:.1f}"]
        print(f"| {name} | {' | '.join(cells)} | {'equal' if way.texts == first.texts else 'UNEQUAL'} |")
    return int(unequal)


if __name__ == "__main__":
    raise SystemExit(main())
