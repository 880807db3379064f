"""Files of tiktoken ranks (cl100k, o200k, LLaMA-3's ``tokenizer.model``), through the tokenizers library.

A line is the base64 of a token's bytes and its rank, which is its id. Two things that encoding needs are
not in the file and stand in ``FILE.json`` beside it: the pattern that cuts text into words, and the special
tokens.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from pathlib import Path
from typing import Any

from megatron_iiet.data.tokenizers.base import BOS_NAMES, EOD_NAMES, possible_merges
from megatron_iiet.data.tokenizers.cutting import CL100K, O200K
from megatron_iiet.data.tokenizers.hugging_face import BYTE_CHARACTERS, HuggingFaceTokenizer, special_token

_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+")
_ESCAPES_AND_SETS = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]")
_POSSESSIVE = re.compile(r"([?*+]|\{[0-9]+(?:,[0-9]*)?\})\+")

PRESETS: dict[str, dict[str, Any]] = {
    "cl100k": {
        "pattern": CL100K,
        "special_tokens": {
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
        "ranks": 100256,
    },
    "o200k": {
        "pattern": O200K,
        "special_tokens": {"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
        "ranks": 199998,
    },
    "llama3": {
        "pattern": CL100K,
        "special_tokens": {
            "<|begin_of_text|>": 128000,
            "<|end_of_text|>": 128001,
            "<|start_header_id|>": 128006,
            "<|end_header_id|>": 128007,
            "<|eot_id|>": 128009,
        },
        "ranks": 128000,
        "vocab_size": 128256,
    },
    "llama4": {
        "pattern": O200K,
        "special_tokens": {
            "<|begin_of_text|>": 200000,
            "<|end_of_text|>": 200001,
            "<|header_start|>": 200005,
            "<|header_end|>": 200006,
            "<|eot|>": 200008,
        },
        "ranks": 200000,
        "vocab_size": 202048,
    },
}
"""What the published files are used with, by the names that ``FILE.json`` may give as "preset". The models'
vocabularies have more ids than the files: reserved ones."""


def looks_like_ranks(content: bytes) -> bool:
    return _LINE.fullmatch(content[:1000].split(b"\n", 1)[0].strip()) is not None


def ranks_side_file(path: Path) -> Path:
    return path.with_name(path.name + ".json")


class TiktokenTokenizer(HuggingFaceTokenizer):
    """Byte-level BPE from ranks. ``eos_token`` of ``FILE.json`` ends documents, without one the first special
    token with a customary name."""

    name = "tokenizers (tiktoken ranks)"

    def __init__(self, path: Path) -> None:
        ranks = read_ranks(path)
        side_file = ranks_side_file(path)
        pattern, special_tokens, vocab_size, eod, preset = _read_side_file(path, side_file)
        _refuse_other_ranks(path, ranks, side_file, preset)
        taken = {rank: token for token, rank in ranks.items()}
        for name, number in special_tokens.items():
            if number in taken or number < 0:
                raise ValueError(
                    f"{side_file} gives the special token {name!r} the id {number}, which is "
                    f"{'a rank' if number in taken else 'negative'} in {path}; give it a free one."
                )
        declared = {
            kind: next((name for name in names if name in special_tokens), "")
            for kind, names in (("eos_token", [eod] if eod else EOD_NAMES), ("bos_token", BOS_NAMES))
        }
        if not declared["eos_token"]:
            raise ValueError(
                f"{side_file} has no end-of-document token among its special_tokens {list(special_tokens)}; "
                f"add {eod or 'one of ' + ', '.join(EOD_NAMES)}."
            )
        self._set_up(path, json.dumps(_definition(ranks, pattern, special_tokens)), declared)
        self.eod_named_in = side_file
        self.vocab_size = max(self.vocab_size, vocab_size)


class TekkenTokenizer(HuggingFaceTokenizer):
    """Mistral's ``tekken.json``: ranks with their pattern, behind the ids of special tokens."""

    name = "tokenizers (tekken)"

    def __init__(self, path: Path) -> None:
        content = json.loads(path.read_text(encoding="utf-8"))
        try:
            config = content["config"]
            first, size = config["default_num_special_tokens"], config["default_vocab_size"]
            named = {token["rank"]: token["token_str"] for token in content.get("special_tokens") or []}
            tokens = content["vocab"][: size - first]
            ranks = {base64.b64decode(token["token_bytes"]): first + token["rank"] for token in tokens}
            pattern = config["pattern"]
            special_tokens = {
                named.get(number, _TEKKEN.get(number, f"<SPECIAL_{number}>")): number
                for number in range(first)
            }
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is no tekken.json ({type(error).__name__}: {error}); fetch it again."
            ) from None
        if (len(ranks), len(special_tokens)) != (size - first, first):
            raise ValueError(
                f"{path} has {len(ranks):,} tokens and {len(special_tokens):,} special ones, but its config "
                f"tells of {size - first:,} and {first:,}; fetch it again."
            )
        declared = {"eos_token": "</s>", "bos_token": "<s>"}
        self._set_up(path, json.dumps(_definition(ranks, pattern, special_tokens)), declared)
        self.eod_named_in = path


_TEKKEN = {0: "<unk>", 1: "<s>", 2: "</s>"}


def read_ranks(path: Path) -> dict[bytes, int]:
    """{token's bytes: rank} of a file of tiktoken ranks.

    Raises:
        ValueError: a line is no token and rank, one is given twice, or single bytes are missing.
    """
    ranks: dict[bytes, int] = {}
    numbers: set[int] = set()
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            encoded, rank = line.split()
            token, rank_id = base64.b64decode(encoded, validate=True), int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"{path}, line {number}: {line[:60]!r} is no base64 token and rank; give a file "
                "of tiktoken ranks."
            ) from None
        if token in ranks or rank_id in numbers:
            raise ValueError(f"{path}, line {number}: the token or rank of {line[:60]!r} was given before.")
        ranks[token] = rank_id
        numbers.add(rank_id)
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(
            f"{path} has no rank for {len(missing)} of the 256 single bytes, such as {missing[0]:#04x}; "
            "the file is not whole."
        )
    return ranks


def _refuse_other_ranks(path: Path, ranks: dict[bytes, int], side_file: Path, preset: str) -> None:
    """Refuse ranks that a preset does not have: of a file that was cut, or of another model."""
    found = {name for name, known in PRESETS.items() if known["ranks"] == len(ranks)}
    if preset and preset not in found:
        whose = f", as {' and '.join(sorted(found))} has; give that preset" if found else "; fetch it again"
        raise ValueError(
            f"{path} has {len(ranks):,} ranks, but the preset {preset!r} of {side_file} has "
            f"{PRESETS[preset]['ranks']:,}{whose}, or write pattern and special_tokens of ranks of your own."
        )


def _read_side_file(path: Path, side_file: Path) -> tuple[str, dict[str, int], int, str, str]:
    """Pattern, special tokens, ids of the model's vocabulary or 0, the token that ends documents or "", the
    preset or ""."""
    wanted = f'{{"preset": "{"|".join(PRESETS)}"}} or {{"pattern": REGEX, "special_tokens": {{NAME: ID}}}}'
    if not side_file.is_file():
        raise ValueError(
            f"{path} holds tiktoken ranks, which leave open how text is cut into words and which ids "
            f"are special; write {side_file} with {wanted}."
        )
    try:
        content = json.loads(side_file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{side_file} is not valid JSON ({error}); write {wanted}.") from None
    content = content if isinstance(content, dict) else {}
    if "preset" in content:
        if content["preset"] not in PRESETS:
            raise ValueError(
                f"{side_file} asks for preset {content['preset']!r}; there are {', '.join(PRESETS)}."
            )
        content = {**PRESETS[content["preset"]], **content}
    pattern, special_tokens = content.get("pattern"), content.get("special_tokens")
    if not isinstance(pattern, str) or not isinstance(special_tokens, dict):
        raise ValueError(f"{side_file} lacks a pattern or special_tokens; write {wanted}.")
    for name, number in special_tokens.items():
        if not isinstance(number, int) or isinstance(number, bool):
            raise ValueError(
                f"{side_file} gives the special token {name!r} the id {number!r}; give an integer."
            )
    found = _POSSESSIVE.search(_ESCAPES_AND_SETS.sub("x", pattern))
    if found:
        raise ValueError(
            f"The pattern in {side_file} has the possessive repetition {found[0]!r}, which the tokenizers "
            f"library reads otherwise; write {found[1]!r}."
        )
    vocab_size = content.get("vocab_size", 0)
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool):
        raise ValueError(f"{side_file} gives the vocab_size {vocab_size!r}; give an integer, or none.")
    eod = content.get("eos_token", "")
    if not isinstance(eod, str):
        raise ValueError(f"{side_file} gives the eos_token {eod!r}; give a special token's name, or none.")
    return pattern, special_tokens, vocab_size, eod, content.get("preset", "")


def _definition(ranks: dict[bytes, int], pattern: str, special_tokens: dict[str, int]) -> dict[str, Any]:
    """tokenizer.json of ranks: tiktoken merges whatever gives the token of lowest rank, leftmost first."""
    text = {token: "".join(map(BYTE_CHARACTERS.__getitem__, token)) for token in ranks}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "added_tokens": [
            special_token(name, number)
            for name, number in sorted(special_tokens.items(), key=lambda item: item[1])
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "ignore_merges": True,  # a word that is a token is that token
            "vocab": {**{text[token]: rank for token, rank in ranks.items()}, **special_tokens},
            "merges": [(text[left], text[right]) for left, right in possible_merges(ranks)],
        },
    }
