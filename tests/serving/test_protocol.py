"""What a request's body may say, and what is answered where it says something else."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from megatron_iiet.hf.generation import Codec, Sampling
from megatron_iiet.serving.continuation import TokenScore
from megatron_iiet.serving.protocol import (
    Asked,
    Limits,
    RequestError,
    chat_scores,
    completion_scores,
    parse,
    parse_json,
)


def answer(messages: list[dict[str, Any]]) -> list[int]:
    if messages[0]["role"] == "nobody":
        raise RuntimeError("there is no such role")
    return list("".join(f"{each['role']}:{each['content']};" for each in messages).encode())


CODEC = Codec(0, 200, lambda text: list(text.encode()), lambda ids: bytes(ids).decode(), answer)
LIMITS = Limits("served", context=100, max_tokens=60, max_sequences=6)
HELLO = [{"role": "user", "content": "hello"}]


def read(chat: bool = False, codec: Codec = CODEC, **body: Any) -> Asked:
    default: dict[str, Any] = {"messages": HELLO} if chat else {"prompt": "hello"}
    content = json.dumps({"model": "served", **default, **body}).encode()
    return parse(parse_json(content), chat, codec, LIMITS)


def test_what_is_meant_where_nothing_is_said() -> None:
    [order] = read().orders
    assert (order.prompt, order.max_tokens, order.sampling) == (list(b"hello"), 16, Sampling(1.0, 0, 1.0))
    assert (order.stop, order.logprobs, order.prompt_logprobs) == ((), None, False)
    asked = read(chat=True)
    assert asked.orders[0].prompt == list(b"user:hello;")
    assert asked.orders[0].max_tokens == 60
    assert (asked.stream, asked.include_usage, asked.tells_scores) == (False, False, False)
    assert len({read().orders[0].seed for _ in range(3)}) == 3
    assert read(prompt="x" * 90).orders[0].max_tokens == 10, "what there is room for"
    long = [{"role": "user", "content": "x" * 60}]
    assert read(chat=True, messages=long).orders[0].max_tokens == 100 - len("user:;") - 60


def test_what_is_said() -> None:
    asked = read(
        prompt=["a", "bc"], n=2, max_tokens=3, temperature=0.5, top_p=0.9, top_k=7, stop=["x", "yz"], seed=5,
        stream=True, stream_options={"include_usage": True}, echo=True, logprobs=2,
    )  # fmt: skip
    assert [bytes(order.prompt) for order in asked.orders] == [b"a", b"a", b"bc", b"bc"]
    assert asked.echo == ["a", "a", "bc", "bc"]
    assert [order.seed for order in asked.orders] == [5, 6, 7, 8]
    assert {order.sampling for order in asked.orders} == {Sampling(0.5, 7, 0.9)}
    assert {(each.max_tokens, each.stop, each.logprobs, each.prompt_logprobs) for each in asked.orders} == {
        (3, ("x", "yz"), 2, True)
    }
    assert (asked.prompt_tokens, asked.stream, asked.include_usage, asked.tells_scores) == (
        3,
        True,
        True,
        True,
    )
    [order] = read(chat=True, max_completion_tokens=9, logprobs=True, top_logprobs=4, stop="end").orders
    assert (order.max_tokens, order.logprobs, order.stop) == (9, 4, ("end",))
    assert read(chat=True, logprobs=True).orders[0].logprobs == 0
    assert read(prompt=[1, 2, 3]).orders[0].prompt == [1, 2, 3]
    assert [order.prompt for order in read(prompt=[[1, 2], [3]]).orders] == [[1, 2], [3]]
    assert read(prompt=[65, 66], echo=True).echo == ["AB"]
    assert read(echo=True, max_tokens=0).orders[0].max_tokens == 0


def test_parts_of_a_message() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    messages = [{"role": "system", "content": parts, "name": None}, *HELLO]
    assert bytes(read(chat=True, messages=messages).orders[0].prompt) == b"system:one two;user:hello;"


def test_values_that_ask_for_nothing() -> None:
    """Null everywhere; and what OpenAI's clients send of themselves."""
    nothing = {"user": None, "best_of": 1, "frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}}
    assert read(**nothing, stop=None, seed=None, logprobs=None).orders[0].logprobs is None
    assert read(chat=True, response_format={"type": "text"}, tools=None, max_tokens=None, n=None)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"model": None}, "model is missing; give 'served'"),
        ({"model": 3}, "model is 3; give a text"),
        ({"prompt": None}, "prompt is missing; give"),
        ({"prompt": ""}, "the prompt is empty; give"),
        ({"prompt": []}, "the prompt is empty; give"),
        ({"prompt": ["a", ""]}, "the prompt is empty; give"),
        ({"prompt": [[1], []]}, "the prompt is empty; give"),
        ({"prompt": {"a": 1}}, 'prompt is {"a": 1}; give a text'),
        ({"prompt": [True]}, "prompt is true; give a text"),
        ({"prompt": ["a", 3]}, "prompt is 3; give a text"),
        ({"prompt": [1, 200]}, "the prompt has the token 200, but ids are from 0 to 199;"),
        ({"prompt": [-1]}, "the prompt has the token -1, but"),
        ({"prompt": "x" * 100}, "the prompt has 100 tokens, but the context is 100 tokens; shorten it"),
        ({"max_tokens": 0}, "max_tokens is 0; give a whole number from 1 to 60"),
        ({"max_tokens": 61}, "max_tokens is 61; give a whole number from 1 to 60"),
        ({"max_tokens": "3"}, 'max_tokens is "3"; give a whole number'),
        ({"max_tokens": 2.0}, "max_tokens is 2.0; give a whole number"),
        ({"prompt": "x" * 50, "max_tokens": 51}, "has 50 tokens and 51 new ones are asked for"),
        ({"temperature": -0.1}, "temperature is -0.1; give a number from 0 to 2"),
        ({"temperature": True}, "temperature is true; give a number"),
        ({"temperature": 1e400}, "the body has the number Infinity"),
        ({"top_p": 0}, "top_p is 0; give a number above 0"),
        ({"top_p": 1.1}, "top_p is 1.1; give a number from 0 to 1"),
        ({"top_k": -1}, "top_k is -1; give a whole number from 0"),
        ({"n": 0}, "n is 0; give a whole number from 1 to 6"),
        ({"n": 4, "prompt": ["a", "b"]}, "2 prompts with n = 4 ask for 8 texts, but the server makes at"),
        ({"stop": [""]}, r'stop is \[""\]; give a text or at most 16'),
        ({"stop": [3]}, r"stop is \[3\]; give"),
        ({"stop": ["a"] * 17}, "stop is .*…; give a text or at most 16 of them, each of 1 to 1000"),
        ({"stop": "a" * 1001}, "stop is "),
        ({"seed": 2**63}, "seed is 9223372036854775808; give a whole number from"),
        ({"stream": 1}, "stream is 1; give true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options is given, but stream is not true"),
        ({"stream": True, "stream_options": {"other": 1}}, 'stream_options is {"other": 1}; give'),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "include_obfuscation is not"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "include_usage is 1; give true or false"),
        ({"echo": "yes"}, 'echo is "yes"; give true or false'),
        ({"logprobs": True}, "logprobs is true; give a whole number from 0 to 20"),
        ({"logprobs": 21}, "logprobs is 21; give a whole number from 0 to 20"),
        ({"best_of": 2}, "best_of is 2, but is not supported in completions here; leave it out"),
        ({"frequency_penalty": 0.5}, "frequency_penalty is 0.5, but is not supported"),
        ({"logit_bias": {"3": 1}}, 'logit_bias is {"3": 1}, but is not supported'),
        ({"user": "me"}, 'user is "me", but is not supported'),
        ({"messages": HELLO}, "messages is .* but is not supported in completions here"),
        ({"max_completion_tokens": 3}, "max_completion_tokens is 3, but is not supported in completions"),
        ({"temprature": 0}, 'there is no parameter "temprature"; leave it out'),
        ({"foo": None}, 'there is no parameter "foo"; leave it out'),
        ({"prompt": "a\ud800"}, "the body is no JSON .*surrogates not allowed"),
    ],
)  # fmt: skip
def test_refused_completions(body: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        read(**body)
    assert caught.value.status == 400
    told = caught.value.body()["error"]
    assert (told["message"], told["type"]) == (str(caught.value), "invalid_request_error")
    if "the body" not in str(caught.value) and "messages" not in body:
        assert told["param"] in (*body, "prompt", "stream_options.include_usage", "include_usage")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": None}, "messages is null; give a list of at least one message"),
        ({"messages": []}, r"messages is \[\]; give"),
        ({"messages": ["hello"]}, 'messages is "hello"; give {"role": …'),
        ({"messages": [{"role": "user"}]}, 'messages is {"role": "user"}; give'),
        ({"messages": [{"role": "user", "content": 3}]}, "messages is .*; give"),
        ({"messages": [{"role": "user", "content": "a", "name": 3}]}, "messages is .*; give"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
         "messages is .*; give parts of the form"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}, "give parts of"),
        ({"messages": [{"role": "assistant", "content": "a", "tool_calls": []}]},
         "a message has 'tool_calls', which is not supported here"),
        ({"messages": [{"role": "nobody", "content": "a"}]},
         r"the model's chat template does not take these messages \(there is no such role\)"),
        ({"messages": [{"role": "user", "content": "x" * 95}]}, "the prompt has 101 tokens, but the context"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens is 3, but max_completion_tokens is 4"),
        ({"logprobs": 3}, "logprobs is 3; give true or false"),
        ({"top_logprobs": 3}, "top_logprobs is 3, but logprobs is not true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs is 21; give a whole number from 0 to 20"),
        ({"echo": True}, "echo is true, but is not supported in chats here"),
        ({"tools": [{"type": "function"}]}, "tools is .*, but is not supported in chats here"),
        ({"response_format": {"type": "json_object"}}, "response_format is .*, but is not supported"),
        ({"prompt": "a"}, 'prompt is "a", but is not supported in chats here'),
    ],
)  # fmt: skip
def test_refused_chats(body: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        read(chat=True, **body)
    assert caught.value.status == 400


def test_another_model() -> None:
    with pytest.raises(RequestError, match="model is \"gpt\", but 'served' is served here") as caught:
        read(model="gpt")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


def test_a_tokenizer_without_a_chat_template() -> None:
    with pytest.raises(RequestError, match="tokenizer has no chat template, so that this server cannot chat"):
        read(chat=True, codec=dataclasses.replace(CODEC, chat=None))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the body is no JSON"),
        (b"[1", "the body is no JSON"),
        (b"\xff", "the body is no JSON"),
        (b"[" * 100_000, "the body is no JSON"),
        (b'{"n": ' + b"9" * 5000 + b"}", "the body is no JSON"),
        (b"3", "the body is a JSON int; send an object"),
        (b"[]", "the body is a JSON list; send an object"),
        (b'{"n": 1, "n": 2}', 'the body has "n" twice; give it once'),
        (b'{"n": NaN}', "the body has the number NaN, which is no JSON"),
        (b'{"n": -Infinity}', "the body has the number -Infinity, which is no JSON"),
    ],
)
def test_bodies_that_are_no_object(content: bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse_json(content)


def test_tokens_that_the_model_does_not_know() -> None:
    few = CODEC.within(ord("m"))
    assert read(codec=few, prompt="hall").orders[0].prompt == list(b"hall")
    with pytest.raises(RequestError, match="makes token 109 of the text, but the model knows 109; give"):
        read(codec=few, prompt="ham")
    with pytest.raises(RequestError, match="the prompt has the token 150, but ids are from 0 to 108"):
        read(codec=few, prompt=[1, 150])
    with pytest.raises(RequestError, match=r"does not take these messages \(the tokenizer makes token 117"):
        read(chat=True, codec=few)
    assert CODEC.within(200) is CODEC


def test_scores_as_they_are_told() -> None:
    scores = [
        TokenScore("ab", None),
        TokenScore("", -0.5, (("?", -0.25), ("", -0.5), ("?", -1.0))),
        TokenScore("é", -1.0, (("é", -1.0), ("x", -float("inf")))),
    ]
    told = completion_scores(scores, 10)
    assert told["tokens"] == ["ab", "", "é"]
    assert told["token_logprobs"] == [None, -0.5, -1.0]
    assert told["top_logprobs"] == [None, {"?": -0.25, "": -0.5}, {"é": -1.0}]
    assert told["text_offset"] == [10, 12, 12]
    told = chat_scores(scores[1:])["content"]
    assert told[1] == {
        "token": "é", "logprob": -1.0, "bytes": [195, 169],
        "top_logprobs": [{"token": "é", "logprob": -1.0, "bytes": [195, 169]}],
    }  # fmt: skip
    assert [each["token"] for each in told[0]["top_logprobs"]] == ["?", "", "?"]
