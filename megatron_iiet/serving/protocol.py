"""OpenAI's completions and chat completions: bodies of requests, checked and as orders; answers as objects.

What a body asks for is done or refused: nothing in it is left out of account.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_iiet.hf.generation import Codec, Sampling
from megatron_iiet.serving.continuation import Order, TokenScore

DEFAULT_TOKENS = 16
"""``max_tokens`` of a completion, as in OpenAI's API; an answer in a chat may fill the context."""
MOST_LIKELIEST = 20
MOST_STOPS = 16
LONGEST_STOP = 1000

_BOTH = (
    *("model", "max_tokens", "temperature", "top_p", "top_k", "n", "stop", "seed"),
    *("stream", "stream_options", "logprobs"),
)
PARAMETERS = {
    False: (*_BOTH, "prompt", "echo"),
    True: (*_BOTH, "messages", "max_completion_tokens", "top_logprobs"),
}
"""What is understood, by whether it is a chat."""
_NOTHING_ASKED: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "parallel_tool_calls": (),
    "modalities": (["text"],),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
    "prediction": (),
    "audio": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "prompt_cache_key": (),
    "prompt_cache_retention": (),
    "safety_identifier": (),
    "user": (),
}
"""What OpenAI's API has besides, and the values (besides null) with which it asks for nothing."""


class RequestError(ValueError):
    """A request that is refused; the message is a sentence for who sent it."""

    def __init__(
        self, message: str, parameter: str | None = None, *, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.parameter, self.status, self.code = parameter, status, code

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return error_object(str(self), kind, self.parameter, self.code)


def error_object(
    message: str, kind: str, parameter: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error as OpenAI's API tells it."""
    return {"error": {"message": message, "type": kind, "param": parameter, "code": code}}


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    model: str
    """The name that requests must give."""
    context: int
    """Most tokens of prompt and continuation."""
    max_tokens: int
    """Most tokens of a continuation."""
    max_sequences: int
    """Most continuations."""


@dataclass(frozen=True)
class Asked:
    """A request that can be done."""

    chat: bool
    orders: list[Order]
    """``n`` for each prompt, prompt by prompt."""
    echo: list[str]
    """Text in front of each continuation."""
    prompt_tokens: int
    stream: bool
    include_usage: bool
    tells_scores: bool


def parse_json(content: bytes) -> dict[str, Any]:
    """The object in a request's body.

    Raises:
        RequestError: it is no JSON object, or has a name twice or a number that JSON does not have.
    """

    def once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise RequestError(f"the body has {_shown(name)} twice; give it once")
            found[name] = value
        return found

    def no_number(word: str) -> None:
        raise RequestError(f"the body has the number {word}, which is no JSON; give another")

    try:
        found = json.loads(content, object_pairs_hook=once, parse_constant=no_number)
        json.dumps(found, ensure_ascii=False).encode()  # halves of surrogate pairs are no text
    except RequestError:
        raise
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is no JSON ({str(error)[:100]}); send a JSON object") from error
    if not isinstance(found, dict):
        raise RequestError(f"the body is a JSON {type(found).__name__}; send an object")
    return found


def parse(body: Mapping[str, Any], chat: bool, codec: Codec, limits: Limits) -> Asked:
    """What a request asks for.

    Raises:
        RequestError: it cannot be done.
    """
    given = _known(body, chat)
    model = _text(given, "model", None)
    if model is None:
        raise RequestError(f"model is missing; give '{limits.model}'", "model")
    if model != limits.model:
        raise RequestError(
            f"model is {_shown(model)}, but '{limits.model}' is served here; give that",
            "model",
            status=404,
            code="model_not_found",
        )
    prompts, texts = _conversation(given, codec) if chat else _prompts(given, codec)
    echo = _truth(given, "echo", False)
    scores = _scores(given, chat)
    n = _whole(given, "n", 1, least=1, most=limits.max_sequences)
    if n * len(prompts) > limits.max_sequences:
        raise RequestError(
            f"{len(prompts)} prompts with n = {n} ask for {n * len(prompts)} texts, but the server makes at "
            f"most {limits.max_sequences} at once; send several requests",
            "n",
        )
    stream = _truth(given, "stream", False)
    seed = _whole(given, "seed", None, least=-(2**63), most=2**63 - 1)
    first_seed = random.getrandbits(62) if seed is None else seed
    sampling, stop = _sampling(given), _stops(given)
    orders = [
        Order(
            prompt,
            _new_tokens(given, chat, echo, len(prompt), limits),
            sampling,
            (first_seed + n * i + j) % 2**63,
            stop,
            scores,
            prompt_logprobs=echo and scores is not None,
        )
        for i, prompt in enumerate(prompts)
        for j in range(n)
    ]
    return Asked(
        chat,
        orders,
        [text if echo else "" for text in texts for _ in range(n)],
        sum(map(len, prompts)),
        stream,
        _include_usage(given, stream),
        scores is not None,
    )


def _known(body: Mapping[str, Any], chat: bool) -> dict[str, Any]:
    """What is given of the parameters; null is the same as nothing."""
    for name, value in body.items():
        if name in PARAMETERS[chat] or (value is None and name in _NOTHING_ASKED):
            continue
        if name in PARAMETERS[not chat] or name in _NOTHING_ASKED:
            if value in _NOTHING_ASKED.get(name, ()):
                continue
            where = "in chats" if chat else "in completions"
            raise RequestError(
                f"{name} is {_shown(value)}, but is not supported {where} here; leave it out", name
            )
        raise RequestError(f"there is no parameter {_shown(name)}; leave it out", name[:100])
    return {name: value for name, value in body.items() if value is not None}


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "…"


def _wrong(name: str, value: Any, wanted: str) -> RequestError:
    return RequestError(f"{name} is {_shown(value)}; give {wanted}", name)


def _text(given: Mapping[str, Any], name: str, default: Any) -> Any:
    value = given.get(name, default)
    if value is not default and not isinstance(value, str):
        raise _wrong(name, value, "a text")
    return value


def _truth(given: Mapping[str, Any], name: str, default: bool) -> bool:
    value = given.get(name, default)
    if not isinstance(value, bool):
        raise _wrong(name, value, "true or false")
    return value


def _whole(given: Mapping[str, Any], name: str, default: Any, *, least: int, most: int) -> Any:
    value = given.get(name, default)
    if value is not default and (
        not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most
    ):
        raise _wrong(name, value, f"a whole number from {least} to {most}")
    return value


def _number(given: Mapping[str, Any], name: str, default: float, least: float, most: float) -> float:
    value = given.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        raise _wrong(name, value, f"a number from {least:g} to {most:g}")
    return float(value)


def _sampling(given: Mapping[str, Any]) -> Sampling:
    top_p = _number(given, "top_p", 1.0, 0, 1)
    if not top_p:
        raise _wrong(
            "top_p", given["top_p"], "a number above 0 and at most 1; temperature 0 takes the likeliest"
        )
    top_k = _whole(given, "top_k", 0, least=0, most=2**31)
    return Sampling(_number(given, "temperature", 1.0, 0, 2), top_k, top_p)


def _stops(given: Mapping[str, Any]) -> tuple[str, ...]:
    value = given.get("stop", [])
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(
        isinstance(stop, str) and 0 < len(stop) <= LONGEST_STOP for stop in stops
    ):  # fmt: skip
        wanted = f"a text or at most {MOST_STOPS} of them, each of 1 to {LONGEST_STOP} characters"
        raise _wrong("stop", value, wanted)
    return tuple(stops)


def _scores(given: Mapping[str, Any], chat: bool) -> int | None:
    """How many likeliest tokens are told beside each token; None: not even that one's probability."""
    if not chat:
        return _whole(given, "logprobs", None, least=0, most=MOST_LIKELIEST)
    likeliest = _whole(given, "top_logprobs", None, least=0, most=MOST_LIKELIEST)
    if not _truth(given, "logprobs", False):
        if likeliest is not None:
            raise RequestError(
                f"top_logprobs is {likeliest}, but logprobs is not true; make it so", "top_logprobs"
            )
        return None
    return likeliest or 0


def _include_usage(given: Mapping[str, Any], stream: bool) -> bool:
    options = given.get("stream_options", {})
    if not isinstance(options, dict) or not set(options) <= {"include_usage", "include_obfuscation"}:
        raise _wrong("stream_options", options, '{"include_usage": true}')
    if options and not stream:
        raise RequestError("stream_options is given, but stream is not true; leave it out", "stream_options")
    if _truth(options, "include_obfuscation", False):
        raise RequestError("stream_options.include_obfuscation is not supported here; leave it out",
                           "stream_options")  # fmt: skip
    return _truth(options, "include_usage", False)


def _new_tokens(given: Mapping[str, Any], chat: bool, echo: bool, prompt: int, limits: Limits) -> int:
    """Most tokens to make behind ``prompt`` tokens."""
    names = [name for name in ("max_tokens", "max_completion_tokens") if name in given]
    least = 0 if echo else 1
    wanted = [_whole(given, name, None, least=least, most=limits.max_tokens) for name in names]
    if len(set(wanted)) > 1:
        raise RequestError(
            f"max_tokens is {wanted[0]}, but max_completion_tokens is {wanted[1]}; give one of them",
            "max_tokens",
        )
    room = limits.context - prompt
    if room < least or (wanted and wanted[0] > room):
        new = f" and {wanted[0]} new ones are asked for" if wanted else ""
        raise RequestError(
            f"the prompt has {prompt} tokens{new}, but the context is {limits.context} tokens; shorten it",
            "messages" if chat else "prompt",
            code="context_length_exceeded",
        )
    return wanted[0] if wanted else min(room, limits.max_tokens if chat else DEFAULT_TOKENS)


def _prompts(given: Mapping[str, Any], codec: Codec) -> tuple[list[list[int]], list[str]]:
    """Ids of each prompt, and its text."""
    prompt = given.get("prompt")
    if prompt is None:
        raise RequestError("prompt is missing; give a text, a list of texts or token ids", "prompt")
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and all(map(_is_id, prompt))):
        prompt = [prompt]
    if not isinstance(prompt, list):
        raise _wrong("prompt", prompt, "a text, a list of texts, or token ids")
    found: list[tuple[list[int], str]] = []
    for one in prompt:
        if not one and isinstance(one, str | list):
            break
        if isinstance(one, str):
            try:
                found.append((codec.encode(one), one))
            except ValueError as error:
                raise RequestError(str(error), "prompt") from error
        elif isinstance(one, list) and all(map(_is_id, one)):
            _check_ids(one, codec)
            found.append((one, codec.decode(one)))
        else:
            raise _wrong("prompt", one, "a text, a list of texts, or token ids")
    if len(found) < len(prompt) or not prompt:
        raise RequestError("the prompt is empty; give a text or token ids", "prompt")
    return [ids for ids, _ in found], [text for _, text in found]


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_ids(ids: Sequence[int], codec: Codec) -> None:
    for token in ids:
        if not 0 <= token < codec.vocab_size:
            raise RequestError(
                f"the prompt has the token {token}, but ids are from 0 to {codec.vocab_size - 1}; "
                "use the model's own tokenizer",
                "prompt",
            )


def _conversation(given: Mapping[str, Any], codec: Codec) -> tuple[list[list[int]], list[str]]:
    """Ids of a conversation up to where the answer begins."""
    if codec.chat is None:
        raise RequestError(
            "the model's tokenizer has no chat template, so that this server cannot chat; "
            "use /v1/completions",
            "messages",
        )
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages", messages, "a list of at least one message")
    plain = [_message(message) for message in messages]
    try:
        return [codec.chat(plain)], [""]
    except Exception as error:  # whatever the template raises
        raise RequestError(
            f"the model's chat template does not take these messages ({str(error)[:200]}); change them",
            "messages",
        ) from error


def _message(message: Any) -> dict[str, Any]:
    wanted = '{"role": …, "content": a text}'
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise _wrong("messages", message, wanted)
    given = {name: value for name, value in message.items() if value is not None}
    strange = sorted(set(given) - {"role", "content", "name"})
    if strange:
        raise RequestError(
            f"a message has '{strange[0][:100]}', which is not supported here; leave it out", "messages"
        )
    content = given.get("content")
    if isinstance(content, list):
        parts = content
        for part in parts:
            fits = isinstance(part, dict) and set(part) == {"type", "text"} and part["type"] == "text"
            if not fits or not isinstance(part["text"], str):
                raise _wrong("messages", part, 'parts of the form {"type": "text", "text": …} only')
        content = "".join(part["text"] for part in parts)
    if not isinstance(content, str) or not isinstance(given.get("name", ""), str):
        raise _wrong("messages", message, wanted)
    return {**given, "content": content}


# --- answers ---


def usage(prompt_tokens: int, made: int) -> dict[str, int]:
    """Counts of tokens; one that ends a text is among those made."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": made,
        "total_tokens": prompt_tokens + made,
    }


def completion_scores(scores: Sequence[TokenScore], offset: int) -> dict[str, Any]:
    """``logprobs`` of a completion; ``offset``: characters before the first token."""
    offsets = []
    for score in scores:
        offsets.append(offset)
        offset += len(score.text)
    return {
        "tokens": [score.text for score in scores],
        "token_logprobs": [score.logprob for score in scores],
        # Of two that read the same the likelier one, which comes first, stays.
        "top_logprobs": [None if each.logprob is None else dict(_finite(each)[::-1]) for each in scores],
        "text_offset": offsets,
    }


def chat_scores(scores: Sequence[TokenScore]) -> dict[str, Any]:
    """``logprobs`` of an answer in a chat."""

    def told(text: str, logprob: float | None) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return {
        "content": [
            {**told(each.text, each.logprob), "top_logprobs": [told(*pair) for pair in _finite(each)]}
            for each in scores
        ],
        "refusal": None,
    }


def _finite(score: TokenScore) -> list[tuple[str, float]]:
    """The likeliest tokens, without those that the tokenizer does not have."""
    return [(text, value) for text, value in score.likeliest if math.isfinite(value)]
