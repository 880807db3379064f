"""Train a SentencePiece BPE vocabulary on JSON-lines text."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from megatron_iiet.data.reading.sources import InputFile, list_inputs
from megatron_iiet.data.reading.text import iter_documents
from megatron_iiet.data.tokenizers.sentencepiece import SentencePieceTokenizer
from megatron_iiet.durable import check_output, make_parent, write_bytes

_PLAIN = (".jsonl", ".json", ".ndjson", ".txt", ".csv", ".tsv")
_TEXT_A_BYTE = 4  # of a compressed file, about
_SPREAD = 16
_SHOWN_CHARACTERS = 500


@dataclass(frozen=True)
class TrainedTokenizer:
    """What was written."""

    path: Path
    vocab_size: int
    characters: int  # of text that it was trained on
    inputs: int  # files that this came from
    bytes_per_token: float  # of the beginnings of its documents

    def __str__(self) -> str:
        return (
            f"wrote {self.path}: {self.vocab_size:,} pieces from {self.characters:,} characters of "
            f"{self.inputs:,} files, {self.bytes_per_token:.2f} bytes a token"
        )


def train_tokenizer(
    inputs: Sequence[str],
    output_prefix: str | os.PathLike[str],
    vocab_size: int = 32000,
    max_characters: int = 30_000_000,
    key: str = "text",
) -> TrainedTokenizer:
    """Train on about ``max_characters`` characters of all inputs and write ``OUTPUT_PREFIX.model``.

    Each file gives its share by size, of documents spread over the beginning of it, 16 times as much at most.
    The shape of LLaMA's vocabulary: unk, bos, eos are 0, 1, 2; digits stand alone; characters without a
    piece become bytes; white space is kept as it is.

    Raises:
        ValueError: a bad input, too little text for ``vocab_size`` pieces, or another file there; nothing
            is written.
    """
    from sentencepiece import SentencePieceTrainer

    target = Path(f"{os.fspath(output_prefix)}.model")
    check_output(target)
    sample = _Sample(list_inputs(inputs), key, max_characters)
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=sample.lines(),
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
            f"Training {vocab_size} pieces on {sample.characters:,} characters failed ({error}); "
            "give more text or a --vocab-size that fits it (at least 259 plus the alphabet)."
        ) from None
    if target.exists() and target.read_bytes() != model.getvalue():
        raise ValueError(
            f"{target} is there already, and is not what this training gives; choose another "
            "--output-prefix, or remove it yourself if nothing was tokenized with it."
        )
    make_parent(target)
    write_bytes(target, model.getvalue())
    tokens = sum(map(len, SentencePieceTokenizer(target).encode_batch(sample.shown)))
    bytes_per_token = sum(len(text.encode()) for text in sample.shown) / tokens
    return TrainedTokenizer(target, vocab_size, sample.characters, sample.inputs, bytes_per_token)


class _Sample:
    """About ``most`` characters of all files: of each its share by size, and what those before it had not."""

    def __init__(self, files: Sequence[InputFile], key: str, most: int) -> None:
        self._files, self._key, self._most = files, key, most
        self.characters = self.inputs = 0
        self.shown: list[str] = []
        """The beginnings of the documents taken."""

    def lines(self) -> Iterator[str]:
        """Lines of the documents, in pieces that the trainer takes."""
        share, size = 0.0, sum(max(1, file.size) for file in self._files)  # a stream has none
        for file in self._files:
            share += self._most * max(1, file.size) / size
            text = file.size * (1 if file.path.endswith(_PLAIN) else _TEXT_A_BYTE)
            every = max(1, min(_SPREAD, int(text / max(1.0, share - self.characters))))
            self.inputs += self.characters < share
            for first in range(every):  # again, with the documents between, where those were too few
                if self.characters < share:
                    yield from self._documents(file, first, every, share)

    def _documents(self, file: InputFile, first: int, every: int, share: float) -> Iterator[str]:
        with closing(iter_documents([file], self._key)) as documents:
            for document in islice(documents, first, None, every):
                if self.characters >= share:
                    return
                self.shown.append(document[:_SHOWN_CHARACTERS])
                yield from self._pieces(document, share)

    def _pieces(self, document: str, share: float) -> Iterator[str]:
        for line in document.split("\n"):
            if self.characters >= share:
                return
            # The trainer takes NUL for the end of a string and leaves out lines over 4192 bytes.
            line = line.replace("\0", " ")
            for start in range(0, len(line), 1000):
                yield line[start : start + 1000]
            self.characters += len(line)
