"""A tiny run for tests: real text made here, a real shard, a real tokenizer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_iiet.config import RunConfig, config_from_dict, config_to_yaml
from megatron_iiet.data.corpora.indexed_writer import IndexedDatasetWriter
from megatron_iiet.data.loader.inputs import inputs_of
from megatron_iiet.data.loader.samples import build_splits
from megatron_iiet.data.loader.validation import ValidationBatches
from megatron_iiet.data.tokenizers.training import train_tokenizer
from megatron_iiet.models import Transformer
from megatron_iiet.storage.checkpoint import TrainState
from megatron_iiet.storage.fragments import MASTER, FragmentReader, Place
from megatron_iiet.storage.integrity import SaveIdentity

_SUBJECTS = [
    "the solver",
    "a layer",
    "the optimizer",
    "every rank",
    "one increment",
    "the history",
    "a gradient",
    "this loss",
]
_VERBS = ["merges", "adds", "keeps", "reads", "predicts", "corrects", "normalises", "scales"]
_OBJECTS = [
    "the residual stream",
    "its input",
    "all earlier increments",
    "a batch of tokens",
    "the next token",
]
_ENDINGS = ["once more.", "in every step.", "before the norm.", "without a word.", "twice.", "and stops."]


def read_full(reader: FragmentReader, name: str, kind: str = MASTER) -> torch.Tensor:
    """A whole parameter of a checkpoint, fp32 in its global shape."""
    entry = reader.parameters[name]
    place = Place(entry.shape, entry.shard, 1, 0, 0)
    return reader.read(name, kind, place, math.prod(entry.shape)).view(entry.shape)


def write_corpus(path: Path, documents: int = 200, seed: int = 0) -> None:
    """English-like documents as SlimPajama-shaped JSON lines."""
    rng = np.random.default_rng(seed)
    with path.open("w") as f:
        for _ in range(documents):
            sentences = [
                " ".join(str(rng.choice(part)) for part in (_SUBJECTS, _VERBS, _OBJECTS, _ENDINGS))
                for _ in range(int(rng.integers(4, 30)))
            ]
            row = {"text": " ".join(sentences), "meta": {"redpajama_set_name": "Test"}}
            f.write(json.dumps(row) + "\n")


def write_shard(prefix: Path, *, vocab_size: int = 96, documents: int = 120, seed: int = 0) -> None:
    """A shard of learnable token sequences: noisy walks over the vocabulary."""
    rng = np.random.default_rng(seed)
    with IndexedDatasetWriter(prefix, vocab_size) as writer:
        for _ in range(documents):
            steps = rng.choice([1, 2, 5], size=int(rng.integers(40, 200)))
            writer.add_document((np.cumsum(steps) + rng.integers(vocab_size)) % vocab_size)


def make_data(folder: Path) -> dict[str, str]:
    """A shard and a tokenizer; the ``data`` section's paths."""
    write_shard(folder / "shard")
    write_corpus(folder / "corpus.jsonl")
    train_tokenizer([str(folder / "corpus.jsonl")], folder / "tokenizer", vocab_size=300)
    return {"prefix": str(folder / "shard"), "tokenizer": str(folder / "tokenizer.model")}


def tiny_config(paths: dict[str, str], output_dir: Path, **sections: dict[str, Any]) -> RunConfig:
    """A three-layer model, 32 wide, on :func:`make_data`'s shard; ``sections`` override."""
    base: dict[str, Any] = {
        "output_dir": str(output_dir),
        "model": {
            "hidden_size": 32,
            "ffn_hidden_size": 48,
            "num_layers": 3,
            "num_attention_heads": 2,
            "vocab_size": 384,
            "max_position_embeddings": 32,
        },
        "solver": {"kind": "iiet", "iterations": 1},
        "data": {**paths, "sequence_length": 16, "split": [0.8, 0.1, 0.1]},
        "optimizer": {"lr": 1e-2},
        "training": {"steps": 8, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32"},
        "evaluation": {"interval": 0, "samples": 8},
        "checkpoint": {"interval": 0},
        "logging": {"interval": 2, "solver_interval": 4, "peak_tflops": 0.1},
    }
    if sections.get("solver", {}).get("kind", "iiet") != "iiet":
        base["solver"] = {}  # the keys depend on the kind
    for name, values in sections.items():
        base[name] = {**base[name], **values} if name in base else values
    return config_from_dict(base)


def save_of(config: RunConfig, state: TrainState) -> SaveIdentity:
    """A save of a run that did not take place."""
    return SaveIdentity.draw(state.step, config_to_yaml(config))


def validation_loss(model: Transformer) -> float:
    """What a run logs as validation loss, computed from a loaded model in one process."""
    config = model.config
    splits = build_splits(
        config.data.prefix,
        config.data.sequence_length,
        config.data.split,
        config.data.documents,
        vocab_size=config.model.vocab_size,
    )
    batches = ValidationBatches(
        [splits.validation], samples=config.evaluation.samples, micro_batch_size=2, dp_rank=0, dp_size=1
    )
    losses, counted = 0.0, 0
    with torch.no_grad():
        for inputs in map(inputs_of, batches):
            losses += model(*inputs).item()
            counted += int(inputs.counted.item())
    return losses / counted
