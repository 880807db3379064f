"""Text from models of every kind of folder: what comes is what full forward passes say, piece by piece."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_iiet.data.tokenizers.loading import load_tokenizer
from megatron_iiet.hf.export import export_folder
from megatron_iiet.hf.generation import (
    Sampling,
    TextGenerator,
    _Pieces,
    hugging_face_codec,
    open_generator,
    own_codec,
)
from megatron_iiet.hf.tokenizer import extras_of_tokenizer
from megatron_iiet.models import Transformer
from megatron_iiet.storage import portable
from tests.tiny import make_data, tiny_config
from tests.tool_runs import run_here

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    solver = {"kind": "iiet", "iterations": 2}
    made = Transformer(tiny_config(data, tmp_path_factory.mktemp("run"), solver=solver))
    made.initialise(3)
    return made.eval()


@pytest.fixture(scope="module")
def folder(model: Transformer, data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a portable folder with its tokenizer."""
    path = tmp_path_factory.mktemp("models") / "portable"
    portable.save(model.config, model.state_dict(), path, extra_files=[data["tokenizer"]])
    return path


@pytest.fixture(scope="module")
def generator(folder: Path) -> TextGenerator:
    return open_generator(str(folder))


def written_out(model: Transformer, ids: list[int], count: int) -> list[int]:
    """The likeliest continuation, a full forward pass a token."""
    ids = list(ids)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1, :300].argmax()))  # the tokenizer's
    return ids


def test_greedy_is_what_full_forward_passes_say(
    model: Transformer, data: dict[str, str], generator: TextGenerator
) -> None:
    tokenizer = load_tokenizer(data["tokenizer"])
    prompt = [tokenizer.eod_id, *tokenizer.encode("the solver").tolist()]
    ids = written_out(model, prompt, 12)
    assert tokenizer.eod_id not in ids[1:], "choose a seed whose text does not end"
    pieces: list[str] = []
    made = generator.generate("the solver", GREEDY, max_new_tokens=12, write=pieces.append)
    assert made.text == tokenizer.decode(ids[1:])[len("the solver") :] == "".join(pieces)
    assert made.tokens == 12
    assert len(pieces) > 1


def test_a_draft_changes_nothing(generator: TextGenerator, tmp_path: Path) -> None:
    plain = generator.generate("the", GREEDY, max_new_tokens=16)
    for draft in (0, [1, 0, 2]):
        drafted = TextGenerator(generator.model, generator.codec, draft)
        pieces: list[str] = []
        assert drafted.generate("the", GREEDY, max_new_tokens=16, write=pieces.append).text == plain.text
        assert "".join(pieces) == plain.text
    with pytest.raises(ValueError, match="iterations lists 1 numbers, but num_hidden_layers is 3"):
        TextGenerator(generator.model, generator.codec, [1])


def test_a_seed_is_a_text(generator: TextGenerator) -> None:
    texts = [generator.generate("", Sampling(), max_new_tokens=20, seed=seed).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    one = [generator.generate("", Sampling(top_k=1), max_new_tokens=8, seed=seed).text for seed in (1, 2)]
    assert one[0] == one[1] == generator.generate("", GREEDY, max_new_tokens=8).text


def test_it_ends_at_the_end_of_the_document_and_of_the_window(
    model: Transformer, data: dict[str, str], generator: TextGenerator
) -> None:
    tokenizer = load_tokenizer(data["tokenizer"])
    prompt = [tokenizer.eod_id, *tokenizer.encode("the").tolist()]
    made = written_out(model, prompt, 10)[len(prompt) :]
    last = made[4]

    ended = TextGenerator(generator.model, replace(own_codec(tokenizer), eos_id=last))
    assert ended.generate("the", GREEDY, max_new_tokens=10).tokens == made.index(last) + 1
    room = generator.window - len(prompt)
    assert generator.generate("the", GREEDY, max_new_tokens=room + 1).tokens == room
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens, but the model knows 32 positions"):
        generator.generate("the " * generator.window, GREEDY)


def test_a_prompt_that_just_fills_the_window_is_refused(
    data: dict[str, str], generator: TextGenerator
) -> None:
    codec = replace(own_codec(load_tokenizer(data["tokenizer"])), encode=lambda prompt: [5] * int(prompt))
    long = TextGenerator(generator.model, codec)
    with pytest.raises(ValueError, match="the prompt has 32 tokens, but the model knows 32 positions"):
        long.generate("32", GREEDY)
    assert long.generate("31", GREEDY).tokens == 1


class Bytes:
    """Ids are bytes of UTF-8; 1 begins a text where it is asked to, and 0 ends one or nothing does."""

    def __init__(self, eos: int | None, begins: bool) -> None:
        self.bos_token_id, self.eos_token_id, self._begins = 1, eos, begins

    def __len__(self) -> int:
        return 256

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [1] * (self._begins and add_special_tokens) + list(text.encode())

    def decode(self, ids: list[int], **_: bool) -> str:
        return bytes(number for number in ids if number > 1).decode(errors="replace")


def test_prompts_of_foreign_models_begin_as_their_tokenizers_say() -> None:
    """Of ours behind the end of a document. Nothing can be continued that has no token at all."""
    prompts = {
        (eos, begins, ours): [hugging_face_codec(Bytes(eos, begins), ours).encode(text) for text in ("a", "")]
        for eos, begins, ours in (
            *((0, True, "tokenizer"), (0, False, "tokenizer"), (None, True, "tokenizer")),
            *((0, True, "eod"), (0, False, "bos"), (0, True, "nothing")),
        )
    }
    assert prompts == {
        (0, True, "tokenizer"): [[1, 97], [1]],
        (0, False, "tokenizer"): [[97], [0]],
        (None, True, "tokenizer"): [[1, 97], [1]],
        (0, True, "eod"): [[0, 97], [0]],
        (0, False, "bos"): [[1, 97], [1]],
        (0, True, "nothing"): [[97], [0]],
    }
    with pytest.raises(ValueError, match="the prompt is empty and the tokenizer has no token to begin with"):
        hugging_face_codec(Bytes(None, False)).encode("")


def test_half_a_character_is_not_written() -> None:
    """é and € come byte by byte; what is cut off in the end is shown as such."""
    pieces: list[str] = []
    streamer = _Pieces(hugging_face_codec(Bytes(None, False)), list(b"the "), pieces.append)
    streamer.put(torch.tensor([list(b"the ")]))
    for byte in "é €\N{EURO SIGN}".encode()[:-1]:
        streamer.put(torch.tensor([byte]))
    assert "".join(pieces) == "é €"
    assert streamer.finish() == "".join(pieces) == "é €\N{REPLACEMENT CHARACTER}"


def tool(*flags: str, typed: str = "") -> str:
    """tools/generate.py: flags → what it prints, errors too."""
    ended = run_here("tools/generate.py", *flags, typed=typed)
    return ended.err if ended.code else ended.out


@pytest.mark.slow
def test_tool(folder: Path, generator: TextGenerator, tmp_path: Path) -> None:
    """A portable folder and its export give the same text, asked for once or typed in."""
    exported = str(tmp_path / "exported")
    assert run_here("tools/convert_checkpoint.py", "--from-model", str(folder), "--to-hf", exported).code == 0
    wanted = f"[the]{generator.generate('the', GREEDY, max_new_tokens=8).text}\n\n"
    greedy = ("--temperature", "0", "--max-new-tokens", "8")
    for flags in (("--model", str(folder)), ("--model", exported), ("--model", exported, "--draft", "0")):
        assert tool(*flags, *greedy, "--prompt", "the") == wanted
    shown = tool("--model", exported, *greedy, "--interactive", typed="the\nthe\n")
    assert shown.count(wanted) == 2
    assert shown.count("(8 tokens, ") == 2


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--temperature", "-1"], "temperature is -1.0, but must be at least 0"),
        (["--top-k", "-1"], "top_k is -1, but must be at least 0"),
        (["--top-p", "0"], "top_p is 0.0, but must be above 0 and at most 1"),
        (["--step", "3"], "holds no complete checkpoint"),
        (["--draft", "nowhere.json"], "cannot read the iteration plan nowhere.json: No such file"),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0, but must be at least 1"),
        (["--draft=-1"], "iterations is -1; iteration counts are whole numbers of at least 0"),
        (["--interactive", "--prompt", "x"], "--interactive asks for prompts; leave out --prompt"),
        (["--model", "nowhere"], "--model is nowhere, which does not exist"),
        (["--tokenizer", "nowhere.model"], "nowhere.model"),
    ],
    ids=lambda value: "".join(value[:2]) if isinstance(value, list) else "",
)
def test_refusals(folder: Path, flags: list[str], sentence: str) -> None:
    shown = tool("--model", str(folder), *flags)
    assert shown.splitlines()[-1].startswith("error: ")
    assert sentence in shown


def test_the_cache_of_a_foreign_model_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert tool("--model", str(tmp_path), "--kv-cache", "last").strip() == (
        f"error: --kv-cache is given, but {tmp_path} is no IIET; leave it out"
    )


def test_folders_that_are_refused(folder: Path, data: dict[str, str], tmp_path: Path) -> None:
    stored = portable.StoredModel(folder)
    extras = extras_of_tokenizer(Path(data["tokenizer"]))

    def refusal(name: str, change: Callable[[dict[str, Any]], object]) -> str:
        broken = tmp_path / name
        export_folder(stored.config, stored, broken, extras)
        fields = json.loads((broken / "config.json").read_text())
        change(fields)
        (broken / "config.json").write_text(json.dumps(fields))
        return tool("--model", str(broken)).strip()

    assert refusal("a", lambda fields: fields.pop("solver")) == (
        f"error: {tmp_path}/a/config.json names no solver; convert the model again"
    )
    assert "solver.kind is 'rk8'; supported are" in refusal("b", lambda f: f["solver"].update(kind="rk8"))
    words = refusal("c", lambda fields: fields["solver"].update(iterations=[1, 2]))
    assert words.startswith(f"error: {tmp_path}/c/config.json: solver.iterations lists 2 numbers, but num")
    assert "no file named model.safetensors" in refusal(
        "d", lambda f: (tmp_path / "d/model.safetensors").unlink()
    )
