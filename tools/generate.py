#!/usr/bin/env python
"""Text from a trained model, as it is made: a run, a portable folder or a Hugging Face folder.

    generate.py --model runs/demo --prompt "The function returns" --prompt "This class"
    generate.py --model exported --interactive --temperature 0 --draft 0

`--draft` lets the model with fewer iterations draft what the whole one then verifies: the same text as
without for `--temperature 0`, the same distribution otherwise, in less time where drafts are good.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from megatron_iiet.config import ArgumentParser, exit_with_error


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="run, checkpoint or model folder")
    parser.add_argument("--step", type=int, help="of a run: checkpoint of this step, not the newest")
    parser.add_argument("--tokenizer", metavar="FILE", help="default: the model's own")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="may be repeated; default: empty")
    parser.add_argument("--interactive", action="store_true", help="ask for prompts until the input ends")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=50, help="0 keeps every token")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument(
        "--kv-cache",
        choices=("all", "last", "first"),
        help="which evaluations of a layer keep keys and values; all (the default) is exact",
    )
    parser.add_argument("--draft", metavar="N|FILE", help="draft with N iterations a layer, or with a plan")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that the folder brings")
    arguments = parser.parse_args()
    if arguments.interactive and arguments.prompt:
        parser.error("--interactive asks for prompts; leave out --prompt")
    if arguments.draft is not None and arguments.draft.lstrip("-").isdecimal():
        arguments.draft = int(arguments.draft)
    return arguments


def prompts(arguments: argparse.Namespace) -> Iterator[str]:
    """Those given, or what is typed."""
    if not arguments.interactive:
        yield from arguments.prompt or [""]
        return
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def main() -> None:
    """Parse, load, print each continuation as it is made."""
    arguments = parse_arguments()
    try:
        from transformers.utils import logging

        from megatron_iiet.hf.generation import Sampling, open_generator

        logging.set_verbosity_error()  # it warns of what it does itself when a model drafts
        logging.disable_progress_bar()
        if arguments.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens is {arguments.max_new_tokens}, but must be at least 1")
        sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
        generator = open_generator(
            arguments.model,
            step=arguments.step,
            tokenizer=arguments.tokenizer,
            precision=arguments.precision,
            kv_cache=arguments.kv_cache,
            draft=arguments.draft,
            trust_remote_code=arguments.trust_remote_code,
        )
        for prompt in prompts(arguments):
            print(f"[{prompt}]", end="", flush=True)
            made = generator.generate(
                prompt,
                sampling,
                max_new_tokens=arguments.max_new_tokens,
                seed=arguments.seed,
                write=lambda text: print(text, end="", flush=True),
            )
            print("\n")
            if arguments.interactive:
                print(f"({made.tokens} tokens, {made.tokens / made.seconds:.1f} a second)")
    except (ValueError, OSError, ImportError) as error:
        exit_with_error(str(error))
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    main()
