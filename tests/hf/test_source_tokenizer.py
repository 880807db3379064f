"""Exports of other people's models: AutoTokenizer gives the ids that it gives of the source."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from megatron_iiet.evaluation.models import ModelOptions, prepare_model
from megatron_iiet.hf.generation import open_generator
from tests.marks import long_but
from tests.tool_runs import run_here

pytestmark = pytest.mark.slow
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXTS = ["The solver of", "a  b\t\n\n c", "é漢😀", "12345 + 678", "İstanbul \x00 \x01", " lead"]


@pytest.fixture(scope="module")
def definition() -> Tokenizer:
    """Byte pairs under another cut than Qwen's."""
    found = Tokenizer(BPE())
    found.normalizer = normalizers.Lowercase()
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    found.train_from_iterator(["the solver of the layer, the layer of the solver"] * 20, trainer)
    return found


def source(folder: Path, family: str, vocab_size: int = 320) -> Path:
    torch.manual_seed(0)
    if family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=vocab_size, num_key_value_heads=2, **SIZES))
    else:
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **SIZES))
    model.save_pretrained(folder)
    return folder


def converted(folder: Path, *flags: str, to: str = "--to-hf") -> tuple[int, str]:
    ended = run_here("tools/convert_checkpoint.py", "--from-hf", str(folder), to, f"{folder}-export", *flags)
    return ended.code, ended.out + ended.err


def same_ids(folder: Path) -> None:
    one, other = (
        AutoTokenizer.from_pretrained(name, trust_remote_code=False) for name in (folder, f"{folder}-export")
    )
    assert [one(text).input_ids for text in TEXTS] == [other(text).input_ids for text in TEXTS]
    assert one.eos_token_id == other.eos_token_id is not None


@pytest.mark.parametrize("flags", long_but([[], ["--as-llama"]], []), ids=["iiet", "plain"])
@pytest.mark.parametrize("named", long_but([None, "PreTrainedTokenizerFast", "Qwen2Tokenizer"], None))
def test_a_class_that_the_kind_of_model_chose(
    named: str | None, flags: list[str], definition: Tokenizer, tmp_path: Path
) -> None:
    folder = source(tmp_path / "qwen", "qwen2")
    definition.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>"} | ({"tokenizer_class": named} if named else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    status, said = converted(folder, *flags)
    assert status == 0
    pinned = "note: tokenizer_class is Qwen2Tokenizer in the folder, as transformers reads "
    assert (pinned in said) == (named != "Qwen2Tokenizer" and not flags)
    same_ids(folder)


def test_vocabulary_and_merges_of_an_older_form(definition: Tokenizer, tmp_path: Path) -> None:
    folder = source(tmp_path / "qwen", "qwen2")
    definition.model.save(str(folder))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}'
    )
    status, said = converted(folder)
    assert (status, "tokenizer.json" in said) == (0, True)
    same_ids(folder)


def test_more_tokens_than_the_model_knows(definition: Tokenizer, tmp_path: Path) -> None:
    folder = source(tmp_path / "llama", "llama", vocab_size=256)
    definition.save(str(folder / "tokenizer.json"))
    status, said = converted(folder)
    assert status == 0
    size = definition.get_vocab_size()
    assert f"note: the tokenizer of {folder} has {size} tokens, but the model knows 256: a text with" in said


def test_a_tokenizer_that_is_damaged_or_missing(tmp_path: Path) -> None:
    folder = source(tmp_path / "llama", "llama")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (folder / "tokenizer.json").write_text("{")
    status, said = converted(folder)
    told = f"note: the tokenizer is copied, but cannot be used: the tokenizer of {folder} cannot be loaded ("
    assert (status, told in said) == (0, True)
    shutil.rmtree(tmp_path / "llama-export")
    status, said = converted(folder, to="--to")
    assert (status, "note: the tokenizer is copied, but cannot be used: " in said) == (0, True)
    shutil.rmtree(tmp_path / "llama-export")
    (folder / "tokenizer.json").unlink()
    status, said = converted(folder)
    assert (status, "note: no tokenizer came with the model, so the folder has none" in said) == (0, True)
    assert not (tmp_path / "llama-export/tokenizer_config.json").exists()


@pytest.mark.parametrize("to", long_but(["--to-hf", "--to"], "--to-hf"))
@pytest.mark.parametrize("follows", ["bos", "nothing"])
def test_a_text_follows_what_the_source_puts_before_it(
    follows: str, to: str, definition: Tokenizer, tmp_path: Path
) -> None:
    """In generation and evaluation; and control tokens spelled out are what they are there."""
    folder = source(tmp_path / "source", "llama")
    own = Tokenizer.from_str(definition.to_str())
    own.add_special_tokens(["<|begin|>"])
    named = {"eos_token": "<|im_end|>"}
    if follows == "bos":
        named["bos_token"] = "<|begin|>"
        begin = ("<|begin|>", own.token_to_id("<|begin|>"))
        own.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[begin])
    own.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    assert converted(folder, to=to)[0] == 0
    reference = AutoTokenizer.from_pretrained(folder)
    export = f"{folder}-export"
    for path in (str(folder), export):
        codec = open_generator(path).codec
        assert codec.encode("the solver") == reference("the solver").input_ids
        if (path, to) != (export, "--to"):  # of which the data room reads the text
            assert codec.encode("a<|im_end|>b") == reference("a<|im_end|>b").input_ids
        evaluated = prepare_model(ModelOptions(path), 1).codec
        assert evaluated.encode("the solver") == reference("the solver").input_ids
        assert evaluated.start_id == (reference.bos_token_id if follows == "bos" else reference.eos_token_id)
