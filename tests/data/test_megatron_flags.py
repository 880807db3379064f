"""Flags of Megatron-LM's preprocessing: each works, or is answered in one sentence."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_iiet.data.preprocess import megatron_flags
from tests.tool_runs import run_here


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


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--zzzz 3", "There is no option --zzzz; see --help."),
        ("--output-prefx p", "There is no option --output-prefx; did you mean '--output-prefix'?"),
        ("a.jsonl", "'a.jsonl' belongs to no option; give inputs behind --input, or see --help."),
        (
            "--vocab-size=9",
            "--vocab-size is Megatron-LM's and has no place here: the tokenizer's file",
        ),
        (
            "--tokenizer-hf-no-use-fast",
            "--tokenizer-hf-no-use-fast is Megatron-LM's and has no",
        ),
        ("--dataset-impl lazy", "--dataset-impl is 'lazy'; give mmap, the only kind, or leave it out."),
        ("--bad-rows maybe --input a --output-prefix p --tokenizer-model t", "--bad-rows is 'maybe'; give"),
        (
            "--input-format doc --input a --output-prefix p --tokenizer-model t",
            "--input-format is 'doc'",
        ),
        ("--workers many", "argument --workers: invalid int value: 'many'"),
        ("--input", "argument --input: expected at least one argument"),
    ],
)
def test_a_command_line_that_is_wrong(line: str, sentence: str) -> None:
    """One sentence, without a list of all options."""
    ended = run_here("tools/preprocess_data.py", *line.split())
    assert ended.code in (1, 2)
    assert ended.out == ""
    [said] = ended.err.splitlines()
    assert said.startswith(f"error: {sentence}")
