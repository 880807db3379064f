"""Train a SentencePiece BPE vocabulary on JSON-lines text."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_iiet.data.reading.sources import list_inputs
from megatron_iiet.data.reading.text import iter_documents
from megatron_iiet.durable import check_output, make_parent, write_bytes


@dataclass(frozen=True)
class TrainedTokenizer:
    """What was written."""

    path: Path
    vocab_size: int
    characters: int  # characters of text read

    def __str__(self) -> str:
        return f"wrote {self.path}: {self.vocab_size:,} pieces from {self.characters:,} characters of text"


def train_tokenizer(
    inputs: Sequence[str],
    output_prefix: str | os.PathLike[str],
    vocab_size: int = 32000,
    max_characters: int = 30_000_000,
    key: str = "text",
) -> TrainedTokenizer:
    """Train on the first ``max_characters`` characters and write ``OUTPUT_PREFIX.model``.

    The shape of LLaMA's vocabulary: unk, bos, eos are 0, 1, 2; digits stand alone; characters without a
    piece become bytes; white space is kept as it is.

    Raises:
        ValueError: a bad input, too little text for ``vocab_size`` pieces, or another file there; nothing
            is written.
    """
    from sentencepiece import SentencePieceTrainer

    target = Path(f"{os.fspath(output_prefix)}.model")
    check_output(target)
    documents = iter_documents(list_inputs(inputs), key)
    characters = 0

    def lines() -> Iterator[str]:
        nonlocal characters
        for document in documents:
            for line in document.split("\n"):
                if characters >= max_characters:
                    return
                # The trainer takes NUL for the end of a string and leaves out lines over 4192 bytes.
                line = line.replace("\0", " ")
                for start in range(0, len(line), 1000):
                    yield line[start : start + 1000]
                characters += len(line)

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=lines(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"Training {vocab_size} pieces on {characters:,} characters failed ({error}); "
            "give more text or a --vocab-size that fits it (at least 259 plus the alphabet)."
        ) from None
    if target.exists() and target.read_bytes() != model.getvalue():
        raise ValueError(
            f"{target} is there already, and is not what this training gives; choose another "
            "--output-prefix, or remove it yourself if nothing was tokenized with it."
        )
    make_parent(target)
    write_bytes(target, model.getvalue())
    return TrainedTokenizer(target, vocab_size, characters)
