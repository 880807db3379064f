"""SentencePiece models: exact encoding, and the same vocabulary in a form that gigatoken loads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_iiet.data.tokenizers.base import NotSupportedError, Tokenizer, possible_merges
from megatron_iiet.data.tokenizers.cutting import SPACE, BetweenPieces, Cutting


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; its eos ends documents."""

    name = "sentencepiece"

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor  # only where it is used: workers start faster

        self.path = self.eod_named_in = path
        self._model: Any = SentencePieceProcessor()
        try:
            self._model.Load(str(path))
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"{path} is not a SentencePiece model ({error}); give a SentencePiece .model, "
                "a tokenizer.json or a file of tiktoken ranks."
            ) from None
        model = read_model(path.read_bytes())
        if not (model.HasField("trainer_spec") and model.HasField("normalizer_spec")):
            raise ValueError(
                f"{path} ends behind its {len(model.pieces):,} pieces, without what says how they are used: "
                "it was cut short; fetch it again."
            )
        self.vocab_size = int(self._model.vocab_size())
        self.eod_id = int(self._model.eos_id())
        if self.eod_id < 0:
            raise ValueError(f"{path} has no eos piece to end documents with; train it with an eos_id.")
        self.eod_token = str(self._model.id_to_piece(self.eod_id))
        bos = int(self._model.bos_id())
        self.bos_id = bos if bos >= 0 else None
        is_control = self._model.is_control(list(range(self.vocab_size)))
        self.control_ids = frozenset(number for number, control in enumerate(is_control) if control)

    @cached_property
    def cutting(self) -> Cutting | None:  # type: ignore[override]
        model = read_model(self.path.read_bytes())
        trainer, normalizer = model.trainer_spec, model.normalizer_spec
        if (
            trainer.model_type != trainer.BPE
            or not trainer.byte_fallback
            or trainer.treat_whitespace_as_suffix
            or normalizer.precompiled_charsmap
            or normalizer.remove_extra_whitespaces
            or not normalizer.escape_whitespaces
        ):
            return None
        pieces = texts_of(model, "NORMAL", "USER_DEFINED", "UNUSED").values()
        return BetweenPieces.of(pieces, adds_space=normalizer.add_dummy_prefix)

    @cached_property
    def spelled_out(self) -> tuple[str, ...]:
        model = read_model(self.path.read_bytes())
        return tuple(texts_of(model, "CONTROL", "UNKNOWN", "USER_DEFINED").values())

    def _encode_short(self, texts: list[str]) -> list[npt.NDArray[Any]]:
        return [np.array(ids, dtype=np.int32) for ids in self._model.encode(texts, num_threads=1)]

    def decode(self, ids: npt.ArrayLike) -> str:
        return str(self._model.decode(np.asarray(ids).tolist()))

    def gigatoken_definition(self) -> tuple[bytes, tuple[str, ...]]:
        return gigatoken_definition(self.path.read_bytes())

    def __reduce__(self) -> tuple[Any, ...]:
        state = {"name": self.name, "max_uncut_bytes": self.max_uncut_bytes}
        return SentencePieceTokenizer, (self.path,), state


def read_model(content: bytes) -> Any:
    """The ``ModelProto`` of a ``.model`` file, of sentencepiece_model.proto: all that decides how text is
    encoded. A piece's id is its number; a higher score is merged first."""
    from sentencepiece import sentencepiece_model_pb2 as definitions

    model: Any = definitions.ModelProto.FromString(content)  # type: ignore[attr-defined]  # made at import
    return model


def texts_of(model: Any, *kinds: str) -> dict[int, str]:
    """Pieces of some kinds (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE) by their ids."""
    types = {model.SentencePiece.Type.Value(kind) for kind in kinds}
    return {number: piece.piece for number, piece in enumerate(model.pieces) if piece.type in types}


def gigatoken_definition(content: bytes) -> tuple[bytes, tuple[str, ...]]:
    """A SentencePiece ``.model`` as a tokenizer.json for gigatoken, and the pieces it must not see in text.

    Only pieces that text may yield can result from a merge, and no token is looked for in the text: what
    SentencePiece keeps apart as control pieces and bytes is out of a text's reach here as well. User-defined
    symbols, which SentencePiece does look for in the text, are returned; texts with one need SentencePiece.

    Raises:
        NotSupportedError: the model does something that this form cannot express.
    """
    model = read_model(content)
    symbols = tuple(texts_of(model, "USER_DEFINED").values())
    _refuse_unsupported(model, symbols)
    # A name that no merge and no character can reach keeps the id of a piece that text never yields.
    reached = texts_of(model, "NORMAL", "BYTE")
    vocabulary = {reached.get(number, f"\0{number}"): number for number in range(len(model.pieces))}
    unknown = f"\0{next(iter(texts_of(model, 'UNKNOWN')))}"
    order = {text: -model.pieces[number].score for number, text in texts_of(model, "NORMAL").items()}
    prefix = [{"type": "Prepend", "prepend": SPACE}] if model.normalizer_spec.add_dummy_prefix else []
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    definition = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, spaces]},
        "model": {
            "type": "BPE",
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocabulary,
            "merges": possible_merges(order),  # as SentencePiece would merge them
        },
    }
    return json.dumps(definition, ensure_ascii=False).encode(), symbols


def _refuse_unsupported(model: Any, symbols: Sequence[str]) -> None:
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    normal = set(texts_of(model, "NORMAL").values())
    complaints = {
        "it is not a BPE model": trainer.model_type != trainer.BPE,
        "it has no byte fallback": not trainer.byte_fallback or len(texts_of(model, "BYTE")) != 256,
        "it normalizes text": bool(normalizer.precompiled_charsmap),
        "it removes extra spaces": normalizer.remove_extra_whitespaces,
        "it does not write spaces as ▁": not normalizer.escape_whitespaces,
        "it writes spaces behind words": trainer.treat_whitespace_as_suffix,
        "a user-defined symbol has a space": any({SPACE, " "} & set(symbol) for symbol in symbols),
        "it has unused pieces": bool(texts_of(model, "UNUSED")),
        "a piece has a character without a piece of its own": not set("".join(normal)) <= normal,
    }
    for complaint, applies in complaints.items():
        if applies:
            raise NotSupportedError(complaint)
