#!/usr/bin/env python
"""What does continuous batching bring? Tokens a second of tools/serve.py with one client and with several,
and of transformers' ``generate`` on the same weights, prompt by prompt and as one batch.

    serving.py                                  # a 55M IIET with random weights, 8 clients
    serving.py --model exported --clients 16 --new-tokens 64

The server is a process of its own; clients speak HTTP to it, each sends its next prompt when the answer to
the last one is there. All four ways get the same prompts, of different lengths, and make greedy texts of
equally many tokens; the texts have to be equal, or the exit status is 1 (with random weights that says
little: such a model repeats its last token; tests/serving says more). Rounds are interleaved, the best of
each is taken; the time of a round is all of it, reading the prompts included.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mistral_common
import openai
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
        self._client = openai.OpenAI(base_url=ready.read_text().strip(), api_key="none", max_retries=0)

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

    def stop(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()


@torch.no_grad()
def generated(
    generator: TextGenerator, prompts: Sequence[list[int]], new_tokens: int, batch: int
) -> list[str]:
    """Continuations by transformers' ``generate``, so many at once, padded at the left."""
    settings = GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0
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


def measure(ways: dict[str, Callable[[], list[str]]], rounds: int) -> tuple[dict[str, float], list[str]]:
    """The fewest seconds of each way in interleaved rounds, after one to warm up; ways whose texts are not
    those of the first."""
    seconds = dict.fromkeys(ways, float("inf"))
    expected: list[str] = []
    unequal: list[str] = []
    for round_number in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            texts = way()
            if round_number:
                seconds[name] = min(seconds[name], time.perf_counter() - started)
            expected = expected or texts
            if texts != expected:
                unequal.append(name)
    return seconds, list(dict.fromkeys(unequal))


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
        prompts = [torch.randint(300, most, (length,), generator=random).tolist() for length in lengths]
        server = Server(model, folder, clients, arguments.threads)
        ways: dict[str, Callable[[], Any]] = {
            "transformers' generate, one by one": lambda: generated(generator, prompts, new, 1),
            f"transformers' generate, batch of {clients}": lambda: generated(
                generator, prompts, new, clients
            ),
            "tools/serve.py, 1 client": lambda: server.texts(prompts, new, 1),
            f"tools/serve.py, {clients} clients": lambda: server.texts(prompts, new, clients),
        }
        try:
            seconds, unequal = measure(ways, arguments.rounds)
        finally:
            server.stop()
    first, total = next(iter(seconds)), clients * new
    print(f"\n{clients} prompts of {min(lengths)} to {max(lengths)} tokens, {new} new ones each, "
          f"{arguments.threads} threads, best of {arguments.rounds} rounds\n")  # fmt: skip
    print(f"| way | tokens/s | against {first} | against 1 client | texts |\n|---|---|---|---|---|")
    alone = seconds["tools/serve.py, 1 client"]
    for way, took in seconds.items():
        equal = "UNEQUAL" if way in unequal else "equal"
        cells = [way, f"{total / took:.1f}", f"{seconds[first] / took:.2f}x", f"{alone / took:.2f}x", equal]
        print(f"| {' | '.join(cells)} |")
    return int(bool(unequal))


if __name__ == "__main__":
    raise SystemExit(main())
