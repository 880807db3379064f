#!/usr/bin/env python
"""Sample text from a portable model folder (tools/convert_checkpoint.py makes one)."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_iiet.config import exit_with_error


def main() -> None:
    """Parse, load, print one continuation a prompt."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", required=True, metavar="DIR", help="portable model folder")
    parser.add_argument("--tokenizer", metavar="FILE", help="default: the one in the model's folder")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="may be repeated; default: empty")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=50, help="0 keeps every token")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    from megatron_iiet import models
    from megatron_iiet.data.tokenizers.loading import load_tokenizer
    from megatron_iiet.evaluation.sampling import sample_text
    from megatron_iiet.ops import resolve_backend

    try:
        model = models.load(arguments.model, backend=resolve_backend("auto")[0])
        tokenizer = load_tokenizer(
            arguments.tokenizer or Path(arguments.model) / Path(model.config.data.tokenizer).name
        )
    except ValueError as error:
        exit_with_error(str(error))
    for prompt in arguments.prompt or [""]:
        text = sample_text(
            model,
            tokenizer,
            prompt,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            seed=arguments.seed,
        )
        print(f"[{prompt}]{text}\n")


if __name__ == "__main__":
    main()
