"""Flags of Megatron-LM's preprocessing: each works, or is answered in one sentence."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_iiet.data.preprocess import megatron_flags


def translated(*flags: str) -> tuple[dict[str, Any], list[str]]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokenizer-model")
    megatron_flags.add_flags(parser)
    values, said = vars(parser.parse_args(flags)), []
    megatron_flags.translate(values, said.append)
    return values, said


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    (tmp_path / "gpt2-vocab.json").write_text(json.dumps({"a": 0}))
    (tmp_path / "gpt2-merges.txt").write_text("#version: 0.2\n")
    return tmp_path / "gpt2-vocab.json"


def test_the_files_of_gpt2(vocabulary: Path) -> None:
    merges = str(vocabulary.with_name("gpt2-merges.txt"))
    flags = ("--vocab-file", str(vocabulary), "--merge-file", merges, "--tokenizer-type", "GPT2BPETokenizer")
    assert translated(*flags, "--dataset-impl", "mmap") == ({"tokenizer_model": str(vocabulary)}, [])


def test_what_has_no_effect_is_told(vocabulary: Path) -> None:
    flags = ("--keep-newlines", "--keep-sequential-samples", "--log-interval", "100")
    values, said = translated("--tokenizer-model", str(vocabulary), *flags)
    assert values == {"tokenizer_model": str(vocabulary)}
    assert [line.split(":")[1] for line in said] == [
        " --keep-newlines has no effect",
        " --keep-sequential-samples has no effect",
        " --log-interval has no effect",
    ]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ((), "Give either --tokenizer-model or --vocab-file"),
        (("--tokenizer-model", "{}", "--vocab-file", "{}"), "Give either --tokenizer-model or --vocab-file"),
        (("--tokenizer-model", "{}", "--merge-file", "m"), "--merge-file goes with --vocab-file"),
        (("--vocab-file", "{}", "--merge-file", "m"), "is m, but .* is read with .*gpt2-merges.txt"),
        (("--tokenizer-model", "{}", "--split-sentences"), "--split-sentences: a GPT's samples are cut"),
        (("--tokenizer-model", "{}", "--lang", "english"), "--lang: it is the language of --split-sentences"),
        (("--tokenizer-model", "{}", "--partitions", "4"), "--partitions: inputs are shared by --num-jobs"),
        (("--vocab-file", "{}", "--tokenizer-type", "Bert"), "no data for a GPT; there are GPT2"),
        (
            ("--vocab-file", "{}", "--tokenizer-type", "Llama2Tokenizer"),
            "reads SentencePiece, but .*gpt2-vocab.json is vocabulary and merges; leave the type out",
        ),
    ],
)  # fmt: skip
def test_refusals(flags: tuple[str, ...], sentence: str, vocabulary: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        translated(*(flag.format(vocabulary) for flag in flags))
