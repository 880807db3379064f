"""The tokenizer of an exported folder: files from which transformers' AutoTokenizer encodes as ours does.

transformers' own conversion of a SentencePiece ``.model`` gives other ids (runs of spaces). So
``tokenizer.json`` is made here and compared, on hard texts, with the tokenizer that defines the ids. Control
tokens spelled out in a text are text in training; who wants that of a folder's tokenizer loads it with
``split_special_tokens=True``, as our tools do. It is no setting of the folder: fine-tuning appends the end of
a text by its name, and would never teach a model to stop.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_iiet.data.tokenizers.base import NotSupportedError, Tokenizer
from megatron_iiet.data.tokenizers.hard_texts import hard_texts
from megatron_iiet.data.tokenizers.hugging_face import HuggingFaceTokenizer, declared_tokens
from megatron_iiet.data.tokenizers.loading import load_tokenizer
from megatron_iiet.data.tokenizers.sentencepiece import SentencePieceTokenizer, read_model, texts_of
from megatron_iiet.data.tokenizers.tiktoken import TiktokenTokenizer

SENTENCEPIECE_FILE = "tokenizer.model"
OTHER_SENTENCEPIECE_FILE = "sentencepiece.model"
"""Of a SentencePiece model for which no ``tokenizer.json`` can stand."""
DEFINITION_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"

_PAD_NAMES = ("<pad>", "<|pad|>", "[PAD]")
_SPACE = "▁"


NO_TOKENIZER = "no tokenizer came with the model, so the folder has none"
TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Extras:
    """What a folder has besides the model."""

    files: dict[str, bytes]
    """Contents by name."""
    token_ids: dict[str, Any]
    """:data:`TOKEN_FIELDS` of the configuration."""
    note: str = ""
    """What a user must know of them; empty if the files encode exactly as ours."""
    source: Path | None = None
    """The folder whose tokenizer these files are."""


def extras_of_tokenizer(path: Path | None) -> Extras:
    """The files for the tokenizer of ``path``, any that :func:`load_tokenizer` reads; for none, no ids that
    begin or end a text.

    A ``tokenizer.json`` with a ``tokenizer_config.json`` beside it is taken as it is, with that. Otherwise
    nothing is added to a text, and the token that begins a document is the one that ends the document before:
    training here shows the model no other. (A ``bos_token`` in a ``tokenizer_config.json`` says that it has
    seen that one.)

    Raises:
        ValueError: as :func:`load_tokenizer`.
    """
    if path is None:
        return Extras({}, dict.fromkeys(TOKEN_FIELDS), NO_TOKENIZER)
    exact = load_tokenizer(path)
    beside = path.with_name(CONFIG_FILE)
    if isinstance(exact, SentencePieceTokenizer):
        declared = declared_tokens(beside)
        return _export_sentencepiece(
            exact, declared.get("bos_token", "") not in ("", declared.get("eos_token"))
        )
    assert isinstance(exact, HuggingFaceTokenizer)
    if beside.is_file() and not isinstance(exact, TiktokenTokenizer):
        return _as_it_is(exact, path, beside)
    return _export_definition(exact)


def _export_sentencepiece(exact: SentencePieceTokenizer, with_bos: bool) -> Extras:
    content = exact.path.read_bytes()
    model = read_model(content)
    names = texts_of(model, "CONTROL", "UNKNOWN")
    # No text yields the unknown piece of a model with bytes; padding with eos would mask eos in fine-tuning.
    unknown = list(texts_of(model, "UNKNOWN"))
    ids = _token_ids(exact, names, with_bos, otherwise=unknown)
    config = _config(ids, names) | {"unk_token": names[unknown[0]]}
    note = ""
    try:
        definition = _definition_of(exact, content, names)
        _compare(exact, definition)
        files = {SENTENCEPIECE_FILE: content, DEFINITION_FILE: definition}
    except NotSupportedError as reason:
        # Under its usual name transformers would convert it, silently to other ids.
        files = {OTHER_SENTENCEPIECE_FILE: content}
        note = (
            f"no {DEFINITION_FILE} encodes as {exact.path.name} does: {reason}. The folder has it as "
            f"{OTHER_SENTENCEPIECE_FILE}, for the sentencepiece library; AutoTokenizer finds none"
        )
    return Extras({**files, CONFIG_FILE: to_json(config)}, ids, note)


def _definition_of(exact: SentencePieceTokenizer, content: bytes, names: dict[int, str]) -> bytes:
    """What gigatoken loads, with control pieces under their own names, and a decoder.

    Raises:
        NotSupportedError: there is none; the message says why.
    """
    encoded, symbols = exact.gigatoken_definition()
    if symbols:
        raise NotSupportedError(f"it has {len(symbols)} user-defined symbols")
    definition = json.loads(encoded)
    taken = definition["model"]["vocab"]
    free = {text: number for text, number in taken.items() if number not in names}
    if clash := free.keys() & names.values():
        raise NotSupportedError(f"two pieces are called {sorted(clash)[0]!r}")
    definition["model"]["unk_token"] = names[taken[definition["model"]["unk_token"]]]
    definition["model"]["vocab"] = free | {text: number for number, text in names.items()}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    definition["added_tokens"] = [
        {"id": number, "content": text, "special": True, **plain} for number, text in sorted(names.items())
    ]
    spaces = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    adds_space = read_model(content).normalizer_spec.add_dummy_prefix
    decoders = [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, *([strip] if adds_space else [])]
    definition["decoder"] = {"type": "Sequence", "decoders": decoders}
    return json.dumps(definition, ensure_ascii=False).encode()


def _export_definition(exact: HuggingFaceTokenizer) -> Extras:
    """A ``tokenizer.json`` of which nobody has said more, or tiktoken's ranks in that form."""
    definition = json.loads(exact._model.to_str()) | dict.fromkeys(
        ("post_processor", "truncation", "padding")
    )
    names = _control_names(exact)
    ids = _token_ids(exact, names, with_bos=False)
    return Extras({DEFINITION_FILE: to_json(definition), CONFIG_FILE: to_json(_config(ids, names))}, ids)


def _as_it_is(exact: HuggingFaceTokenizer, path: Path, beside: Path) -> Extras:
    has_bos = "bos_token" in declared_tokens(beside)
    note = (
        f"{CONFIG_FILE} is the tokenizer's own: transformers adds to a text what it says, which training "
        "here does not"
    )
    return Extras(
        {DEFINITION_FILE: path.read_bytes(), CONFIG_FILE: beside.read_bytes()},
        _token_ids(exact, _control_names(exact), has_bos),
        note,
    )


def _control_names(exact: HuggingFaceTokenizer) -> dict[int, str]:
    return {number: str(exact._model.id_to_token(number)) for number in sorted(exact.control_ids)}


def _token_ids(
    exact: Tokenizer, names: dict[int, str], with_bos: bool, otherwise: Sequence[int] = ()
) -> dict[str, Any]:
    """:data:`TOKEN_FIELDS`. ``names``: control ids and what they are called; ``otherwise``: to pad with if
    none is for that."""
    pads = [number for name in _PAD_NAMES for number, text in names.items() if text == name]
    bos = exact.bos_id if with_bos and exact.bos_id is not None else exact.eod_id
    ids = (bos, exact.eod_id, [*pads, *otherwise, exact.eod_id][0])
    return dict(zip(TOKEN_FIELDS, ids, strict=True))


def _config(ids: dict[str, Any], names: dict[int, str]) -> dict[str, Any]:
    """``tokenizer_config.json``: ``tokenizer.json`` as it stands."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{field.removesuffix("_id"): names[number] for field, number in ids.items()},
        "clean_up_tokenization_spaces": False,
    }


def _compare(exact: Tokenizer, definition: bytes) -> None:
    """Refuse a ``tokenizer.json`` that encodes or decodes a hard text in another way.

    Raises:
        NotSupportedError: it does; the message names the text.
    """
    import tokenizers

    model: Any = tokenizers.Tokenizer.from_buffer(definition)
    model.encode_special_tokens = True  # what split_special_tokens=True sets
    texts = list(hard_texts(exact))
    encodings = model.encode_batch(texts, add_special_tokens=False)
    for text, ids, encoding in zip(texts, exact.encode_batch(texts), encodings, strict=True):
        if not np.array_equal(ids, encoding.ids):
            raise NotSupportedError(f"its ids differ for {text[:60]!r}")
        if model.decode(encoding.ids) != exact.decode(ids):
            raise NotSupportedError(f"it decodes {text[:60]!r} in another way")


def to_json(content: Mapping[str, Any]) -> bytes:
    """As transformers writes its files."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
