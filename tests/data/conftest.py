"""Inputs of the data tests, all made here: tokenizers trained on made-up text, small shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_iiet.data.corpora.indexed_writer import IndexedDatasetWriter
from megatron_iiet.data.tokenizers.training import train_tokenizer
from tests.data.inputs import jsonl, make_texts


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text.jsonl").write_bytes(jsonl(make_texts(300)))
    return train_tokenizer([str(folder / "text.jsonl")], folder / "small", vocab_size=500).path


@pytest.fixture(scope="session")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(make_texts(300), trainer)
    tokenizer.enable_truncation(8)  # what some published files carry; must not bite
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture
def make_shard(tmp_path: Path) -> Callable[..., Path]:
    """Write a shard of documents of the given lengths; token i of the stream is i modulo the vocabulary."""

    def make(lengths: Sequence[int], name: str = "shard", vocab_size: int = 60000) -> Path:
        with IndexedDatasetWriter(tmp_path / name, vocab_size) as writer:
            writer.add_documents(np.arange(sum(lengths)) % vocab_size, lengths)
        return tmp_path / name

    return make
