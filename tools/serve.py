#!/usr/bin/env python
"""Serve a model over HTTP, as OpenAI's API does: a run, a portable folder or a Hugging Face folder.

    serve.py --model runs/demo                          # http://127.0.0.1:8000/v1
    serve.py --model exported --max-concurrent 16 --context 2048 --dtype bf16

Requests join the running batch between two tokens. There is no password: what reaches the address may use the
model, so it is this machine's own unless --host says otherwise.
"""

from __future__ import annotations

import argparse
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_iiet import durable
from megatron_iiet.config import ArgumentParser, exit_with_error


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="run, checkpoint or model folder")
    add("--step", type=int, help="of a run: checkpoint of this step, not the newest")
    add("--tokenizer", metavar="FILE", help="default: the model's own")
    add("--name", help="of the model in requests (default: the folder's)")
    add("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine only)")
    add("--port", type=_port, default=8000, help="0 takes a free one (default: 8000)")
    add("--ready-file", metavar="FILE", help="holds the address while requests are taken")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights (default: fp32)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--threads", type=_positive, metavar="N", help="of the CPU (default: torch's)")
    add("--kv-cache", choices=("all", "first"), help="evaluations that keep keys and values (default: all)")
    add("--trust-remote-code", action="store_true", help="run code that the folder brings")
    limits = parser.add_argument_group("limits")
    add = limits.add_argument
    add("--max-concurrent", type=_positive, default=8, metavar="N", help="sequences at once (default: 8)")
    add("--max-waiting", type=_whole, default=64, metavar="N", help="sequences that wait (default: 64)")
    add("--context", type=_positive, metavar="T", help="tokens of prompt and text (default: the model's)")
    add("--max-tokens", type=_positive, metavar="T", help="new tokens a request (default: the context)")
    add("--max-body", type=_positive, default=1 << 20, metavar="BYTES", help="of a request (default: 1 MiB)")
    add("--grace", type=_whole, default=10, metavar="S", help="seconds to finish at SIGTERM (default: 10)")
    return parser.parse_args()


def _positive(word: str) -> int:
    return _whole(word, 1)


def _port(word: str) -> int:
    if not word.isdecimal() or int(word) > 65535:
        raise argparse.ArgumentTypeError(f"{word} is no port; give a whole number from 0 to 65535")
    return int(word)


def _whole(word: str, least: int = 0) -> int:
    if not word.isdecimal() or int(word) < least:
        raise argparse.ArgumentTypeError(f"{word} is no whole number of at least {least}")
    return int(word)


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections.

    Raises:
        ValueError: it cannot.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise ValueError(f"cannot listen at --host {host} --port {port} ({error}); give others") from error


def forget_address(file: Path) -> None:
    """Remove the address of an earlier server.

    Raises:
        ValueError: the file holds something else.
    """
    if file.is_file():
        if not file.read_bytes().startswith(b"http://"):
            raise ValueError(f"--ready-file is {file}, which holds something else; name another file")
        file.unlink(missing_ok=True)


def open_server(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The engine, not started, and the application over it."""
    import torch

    from megatron_iiet.hf.generation import open_generator
    from megatron_iiet.serving.app import make_app
    from megatron_iiet.serving.batch import Batch
    from megatron_iiet.serving.engine import Engine
    from megatron_iiet.serving.protocol import Limits

    if arguments.name == "":
        raise ValueError("--name is empty; leave it out, or name the model")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but torch sees no CUDA device; leave it out")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    generator = open_generator(
        arguments.model,
        step=arguments.step,
        tokenizer=arguments.tokenizer,
        precision=arguments.dtype,
        kv_cache=arguments.kv_cache,
        trust_remote_code=arguments.trust_remote_code,
    )
    context = arguments.context or generator.window
    if context > generator.window:
        raise ValueError(
            f"--context is {context}, but the model knows {generator.window} positions; give fewer"
        )
    generator.codec.encode(
        "now"
    )  # what a tokenizer of transformers sets at its first text, before there are threads
    places = arguments.max_concurrent
    batch = Batch(generator.model.to(arguments.device), generator.codec, places=places, context=context)
    limits = Limits(
        arguments.name or Path(arguments.model).resolve().name,
        context,
        min(arguments.max_tokens or context, context),
        places + arguments.max_waiting,
    )
    engine = Engine(batch, max_waiting=arguments.max_waiting)
    app = make_app(engine, generator.codec, limits, max_body=arguments.max_body)
    print(
        f"serving '{limits.model}' ({arguments.dtype}, {arguments.device}): {places} sequences at once, "
        f"{context} tokens of context",
        flush=True,
    )
    return engine, app


def serve(arguments: argparse.Namespace) -> None:
    """Load, listen, serve until a signal comes."""
    for package in ("fastapi", "uvicorn"):
        if find_spec(package) is None:
            raise ValueError(f"{package} is not installed here; run pip install 'megatron-iiet[serve]'")
    ready_file = Path(arguments.ready_file) if arguments.ready_file else None
    if ready_file:
        durable.make_parent(ready_file)
        forget_address(ready_file)
    listening = listen(arguments.host, arguments.port)
    engine, app = open_server(arguments)
    from megatron_iiet.serving.app import run_server

    host, port = listening.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def ready() -> None:
        if not (host == "::1" or host.startswith("127.")):
            print(f"warning: everyone who reaches {address} may use the model: there is no password")
        if ready_file:
            durable.write_text(ready_file, f"{address}/v1\n")
        print(f"ready: {address}/v1", flush=True)

    try:
        run_server(app, engine, listening, grace=arguments.grace, ready=ready)
    finally:
        if (
            ready_file
            and ready_file.is_file()
            and ready_file.read_text(encoding="utf-8") == f"{address}/v1\n"
        ):
            ready_file.unlink()
    print("stopped", flush=True)


def main() -> None:
    """Parse, serve."""
    arguments = parse_arguments()
    try:
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        serve(arguments)
    except (ValueError, OSError, ImportError) as error:
        exit_with_error(str(error))
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    main()
