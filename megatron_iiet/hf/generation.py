"""Text from any trained model, token by token through transformers' ``generate``: of runs, portable folders
and Hugging Face folders, in sampled, greedy and self-speculative decoding.

Shapes: T tokens so far.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from megatron_iiet.config import RunConfig
from megatron_iiet.config.iteration_plan import IterationPlan
from megatron_iiet.data.tokenizers.base import Tokenizer, token_before
from megatron_iiet.data.tokenizers.loading import load_tokenizer
from megatron_iiet.hf import folders
from megatron_iiet.hf.export import DTYPES, config_fields
from megatron_iiet.hf.modeling_iiet import IIETConfig, IIETForCausalLM
from megatron_iiet.hf.tokenizer import TOKEN_FIELDS
from megatron_iiet.storage import portable
from megatron_iiet.storage.hugging_face.weights import tensors_to_write
from megatron_iiet.storage.parameters import RowSource
from megatron_iiet.storage.source import open_model

KVCache = Literal["all", "last", "first"]
T = TypeVar("T")


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.8
    """Of the softmax; 0 takes the likeliest token."""
    top_k: int = 50
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens that together have this probability."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}, but must be at least 0")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}, but must be at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, but must be above 0 and at most 1")


@dataclass(frozen=True)
class Generated:
    """A continuation."""

    text: str
    """Without the prompt."""
    tokens: int
    """Made, an end-of-document token included."""
    seconds: float
    """From the prompt's encoding to the last token."""


@dataclass(frozen=True)
class Codec:
    """Text to ids and back."""

    eos_id: int | None
    """The token that ends a document."""
    vocab_size: int
    """One more than the largest id."""
    encode: Callable[[str], list[int]]
    """Ids of a prompt with the token that a document begins behind; never empty."""
    decode: Callable[[list[int]], str]
    """Text of ids; control ids give nothing."""
    chat: Callable[[list[dict[str, Any]]], list[int]] | None = None
    """Ids of a conversation up to where the answer begins, if the tokenizer has a chat template."""

    def within(self, known: int) -> Codec:
        """For a model that knows the ids below ``known``; a text with another raises a ValueError."""
        if self.vocab_size <= known:
            return self
        encode, chat = only_below(known, self.encode), self.chat and only_below(known, self.chat)
        return replace(self, vocab_size=known, encode=encode, chat=chat)


def only_below(known: int, encode: Callable[[T], list[int]]) -> Callable[[T], list[int]]:
    """``encode``, which then raises a ValueError for a text with an id that the model does not know."""

    def checked(text: T) -> list[int]:
        ids = encode(text)
        if (largest := max(ids, default=0)) >= known:
            raise ValueError(
                f"the tokenizer makes token {largest} of the text, but the model knows {known}; give the "
                "tokenizer that it was trained with"
            )
        return ids

    return checked


class TextGenerator:
    """A model, its tokenizer and perhaps fewer iterations of it that draft."""

    def __init__(self, model: Any, codec: Codec, draft: str | int | list[int] | None = None) -> None:
        """``model``: a causal language model of transformers. ``draft``: iterations with which the model
        itself drafts what it then verifies (one number, one a layer, or the file of a plan); None: plain.

        Raises:
            ValueError: the draft's iterations do not fit the model, or it has none.
        """
        self.model = model.eval()
        self.codec = codec.within(model.config.vocab_size)
        self.draft = None
        if draft is not None:
            if not hasattr(model, "with_iterations"):
                raise ValueError(
                    f"a {type(model).__name__} has no iterations to draft with; leave out the draft"
                )
            if isinstance(draft, str):
                layers = model.config.num_hidden_layers
                draft = list(IterationPlan.read(draft, layers=layers).iterations)
            self.draft = model.with_iterations(draft)

    @property
    def window(self) -> int:
        """Most tokens of prompt and continuation."""
        return int(self.model.config.max_position_embeddings)

    def generate(
        self,
        prompt: str,
        sampling: Sampling,
        *,
        max_new_tokens: int = 128,
        seed: int = 0,
        write: Callable[[str], None] = lambda text: None,
    ) -> Generated:
        """Continue ``prompt``; an empty one begins a document. It ends at the end-of-document token or where
        the window is full.

        Args:
            seed: of the draw; the same one gives the same text on one machine.
            write: called with every piece of text as soon as it is certain.

        Raises:
            ValueError: the prompt fills the window, or nothing is to be made.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}, but must be at least 1")
        started = time.perf_counter()
        ids = self.codec.encode(prompt)
        room = self.window - len(ids)
        if room < 1:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, but the model knows {self.window} positions; shorten it"
            )
        streamer = _Pieces(self.codec, ids, write)
        torch.manual_seed(seed)
        tokens_1T = torch.tensor([ids], device=self.model.device)
        # A configuration of its own: what a folder says of generation is its author's taste.
        made_1T = self.model.generate(
            tokens_1T,
            attention_mask=torch.ones_like(tokens_1T),
            generation_config=self._configuration(sampling, min(max_new_tokens, room)),
            assistant_model=self.draft,
            streamer=streamer,
        )
        return Generated(streamer.finish(), made_1T.shape[1] - len(ids), time.perf_counter() - started)

    def _configuration(self, sampling: Sampling, new_tokens: int) -> GenerationConfig:
        drawn: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            drawn = {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_k": sampling.top_k,
                "top_p": sampling.top_p,
            }
        eos = self.codec.eos_id
        unknown = list(range(self.codec.vocab_size, self.model.config.vocab_size))
        if unknown:
            drawn["suppress_tokens"] = unknown
        return GenerationConfig(max_new_tokens=new_tokens, eos_token_id=eos, pad_token_id=eos, **drawn)


class _Pieces(BaseStreamer):
    """Hands on text as it becomes certain."""

    def __init__(self, codec: Codec, prompt: list[int], write: Callable[[str], None]) -> None:
        self._codec, self._write, self._prompt = codec, write, prompt
        self._made: list[int] = []
        self._start = len(codec.decode(prompt))
        self._awaits_prompt = True
        self._text = ""

    def put(self, value: Tensor) -> None:
        if self._awaits_prompt:
            self._awaits_prompt = False
            return
        self._made += value.flatten().tolist()
        text = self._decode()
        # The last character may still be part of one.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._advance(text)

    def end(self) -> None:
        pass

    def finish(self) -> str:
        """The whole continuation."""
        self._advance(self._decode())
        return self._text

    def _decode(self) -> str:
        # As a whole: a tokenizer may write the first piece of a text without its leading space.
        return self._codec.decode([*self._prompt, *self._made])[self._start :]

    def _advance(self, text: str) -> None:
        self._write(text[len(self._text) :])
        self._text = text


def own_codec(tokenizer: Tokenizer, text_follows: str = "eod") -> Codec:
    """Of a tokenizer of the data room; ``text_follows`` is that of the ``data`` section.

    Raises:
        ValueError: the tokenizer has no such token.
    """
    before = token_before(tokenizer, text_follows)

    def encode(prompt: str) -> list[int]:
        ids: list[int] = tokenizer.encode(prompt).tolist()
        return [*([] if before is None else [before]), *ids] or [tokenizer.eod_id]

    return Codec(tokenizer.eod_id, tokenizer.vocab_size, encode, tokenizer.decode)


def hugging_face_codec(tokenizer: Any, text_follows: str = "tokenizer") -> Codec:
    """Of a tokenizer of transformers; ``text_follows``: as in the ``data`` section, or what the tokenizer
    itself puts before a text."""
    eos = tokenizer.eos_token_id
    before = {"eod": eos, "bos": tokenizer.bos_token_id}.get(text_follows)

    def encode(prompt: str) -> list[int]:
        ids = list(tokenizer.encode(prompt, add_special_tokens=text_follows == "tokenizer"))
        ids[:0] = [] if before is None else [before]
        if eos is not None and not ids:
            ids = [eos]
        if not ids:
            raise ValueError(
                "the prompt is empty and the tokenizer has no token to begin with; give a prompt"
            )
        return ids

    decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    chat = None
    if getattr(tokenizer, "chat_template", None):
        chat = partial(
            tokenizer.apply_chat_template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            # A template writes control tokens by their names, which are text in a prompt.
            tokenizer_kwargs={"split_special_tokens": False},
        )
    return Codec(eos, len(tokenizer), encode, decode, chat)


def open_generator(
    path: str,
    *,
    step: int | None = None,
    tokenizer: str | None = None,
    precision: str = "fp32",
    kv_cache: KVCache | None = None,
    draft: str | int | list[int] | None = None,
    trust_remote_code: bool = False,
) -> TextGenerator:
    """The model at ``path``: a run's output_dir (``step``: of which checkpoint), one of its checkpoints, a
    portable folder, or a Hugging Face folder of any causal language model.

    Raises:
        ValueError: (and its subclass ConfigError) no such model, a damaged one, no tokenizer, or options that
            do not fit it.
    """
    folder = Path(path)
    if folders.is_hugging_face(folder):
        if step is not None:
            raise ValueError(f"--step is given, but {path} is a model folder, which has no steps")
        keys: dict[str, Any] = {} if kv_cache is None else {"kv_cache": kv_cache}
        folders.read_fields(folder)  # a damaged configuration is told here
        own = folders.is_own(folder)
        if keys and not own:
            raise ValueError(f"--kv-cache is given, but {folder} is no IIET; leave it out")
        found = folders.load_model(folder, DTYPES[precision], trust_remote_code, **keys)
        if tokenizer is not None:
            follows = folders.text_follows(folder) if own else "eod"
            return TextGenerator(found, own_codec(load_tokenizer(tokenizer), follows), draft)
        theirs = folders.load_tokenizer(folder, trust_remote_code)
        codec = hugging_face_codec(theirs, folders.text_follows(folder))
        return TextGenerator(found, codec, draft)
    source = open_model(path, "--model", step=step)
    name = tokenizer or portable.tokenizer_path(source.config.data.tokenizer, folder)
    if not name:
        raise ValueError(f"{path} names no tokenizer; give one with --tokenizer")
    codec = own_codec(load_tokenizer(name), source.config.data.text_follows)
    model = own_model(source.config, source.weights, precision, kv_cache)
    return TextGenerator(model, codec, draft)


def own_model(
    config: RunConfig, weights: RowSource, precision: str = "fp32", kv_cache: KVCache | None = None
) -> IIETForCausalLM:
    """The model that ``config`` describes, as an export of it would be, without writing one."""
    fields = config_fields(config, dict.fromkeys(TOKEN_FIELDS), precision, as_llama=False)
    fields |= {} if kv_cache is None else {"kv_cache": kv_cache}
    with torch.device("meta"):
        model = IIETForCausalLM(IIETConfig(**fields))
    tensors = tensors_to_write(config, weights, DTYPES[precision], as_llama=False)
    state = {name: tensor.make() for name, tensor in tensors.items()}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    rotary = type(model.model.rotary_emb)
    model.model.rotary_emb = rotary(config=model.config)  # its tables are not stored
    left = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    assert not left, f"{left[0]} was not filled"
    return model
