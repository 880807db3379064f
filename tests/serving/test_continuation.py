"""Text of one sequence: what comes piece by piece is what comes at once, and nothing that may yet be cut."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_iiet.data.tokenizers.loading import load_tokenizer
from megatron_iiet.hf import folders
from megatron_iiet.hf.generation import Codec, hugging_face_codec, own_codec
from megatron_iiet.hf.tokenizer import extras_of_tokenizer
from megatron_iiet.serving.continuation import Detokenizer, StopFilter
from tests.tiny import make_data


@pytest.fixture(scope="module", params=["ours", "transformers"])
def codec(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Codec:
    """Of a SentencePiece model with bytes for what it does not know, and of the export of it."""
    folder = tmp_path_factory.mktemp("data")
    path = make_data(folder)["tokenizer"]
    if request.param == "ours":
        return own_codec(load_tokenizer(path))
    for name, content in extras_of_tokenizer(Path(path)).files.items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return hugging_face_codec(folders.load_tokenizer(folder), "eod")


@pytest.mark.parametrize("before", ["", "the solver", "an é"])
def test_pieces_are_the_whole_text(codec: Codec, before: str) -> None:
    """Of random ids (bytes of characters, control ids and all), and of text with characters in pieces."""
    prompt = codec.encode(before) if before else []
    ids = range(codec.vocab_size)
    if isinstance(
        codec.decode, partial
    ):  # of transformers, which takes back good bytes where bad ones follow
        ids = [token for token in ids if "\N{REPLACEMENT CHARACTER}" not in codec.decode([token])]
    draw = random.Random(1)
    texts = [draw.choices(ids, k=draw.randrange(1, 40)) for _ in range(200)]
    texts += [codec.encode("the höhe of 水 merges 🙂 once more, a layer keeps")]
    for ids in texts:
        detokenizer = Detokenizer(codec.decode, prompt)
        pieces = [detokenizer.add(token) for token in ids]
        found = "".join([*pieces, detokenizer.finish()])
        assert found == codec.decode([*prompt, *ids])[len(codec.decode(prompt)) if prompt else 0 :]
    assert sum(map(bool, pieces)) > 20, "it comes in pieces"
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_piece_that_may_come_is_told_without_taking_it(codec: Codec) -> None:
    detokenizer = Detokenizer(codec.decode, codec.encode("a layer"))
    ids = codec.encode(" keeps")[1:]
    for token in ids:
        peeked = detokenizer.peek(token)
        assert detokenizer.add(token) == peeked


@given(
    st.lists(st.text("ab", max_size=4), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=3), max_size=3),
)
def test_stops(pieces: list[str], stops: list[str]) -> None:
    """Against the whole text; what is given out never has to be taken back, and comes as early as it can."""
    whole, filtered, shown, seen = "".join(pieces), StopFilter(stops), "", ""
    for piece in pieces:
        seen += piece
        shown += filtered.add(piece)
        ends = [at for at in map(seen.find, stops) if at >= 0]
        if not ends:
            rest = seen[len(shown) :]
            assert seen.startswith(shown)
            assert not rest or any(stop.startswith(rest) for stop in stops)
            assert not any(stop.startswith(seen[n:]) for stop in stops for n in range(len(shown)))
    # A stop is seen as soon as it is there: the earliest of those that the first piece with one completes.
    for n in range(len(pieces) + 1):
        part = "".join(pieces[:n])
        ends = [at for at in map(part.find, stops) if at >= 0]
        if ends:
            assert filtered.stopped
            assert shown + filtered.finish() == part[: min(ends)]
            return
    assert not filtered.stopped
    assert shown + filtered.finish() == whole
