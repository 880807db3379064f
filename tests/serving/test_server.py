"""A started server, asked by OpenAI's own client: its greedy texts are those of full forward passes."""

from __future__ import annotations

import http.client
import json
import runpy
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from megatron_iiet import models
from megatron_iiet.data.tokenizers.loading import load_tokenizer
from megatron_iiet.hf.export import export_folder
from megatron_iiet.hf.tokenizer import extras_of_tokenizer
from megatron_iiet.models import Transformer
from megatron_iiet.storage import portable
from tests.serving.server import TOOL, Server, wait_for
from tests.tiny import tiny_config

torch.set_num_threads(1)
pytestmark = pytest.mark.slow  # a server takes seconds to start

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'nobody' %}{{ raise_exception('nobody speaks') }}{% endif %}"
    "{{ m['role'] }}: {{ m['content'] }} {% endfor %}assistant:"
)
CONTEXT = 4096
EOS = 1
PROMPTS = [
    "the solver",
    "a layer merges its input once more.",
    "every rank",
    "this loss stops. " * 9,
    "x",
    "one",
]


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE of ASCII: every token is a text of its own."""
    tokenizer = Tokenizer(BPE(unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=150,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=["Ġ", *map(chr, range(33, 127))],  # Ġ is the space
        show_progress=False,
    )
    tokenizer.train_from_iterator(PROMPTS * 9, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>")
    fast.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``portable`` and ``export``, the same model; the export can chat."""
    folder = tmp_path_factory.mktemp("models")
    data = {"prefix": "none", "tokenizer": str(folder / "tokenizer.json")}
    write_tokenizer(folder)
    shape = {"max_position_embeddings": CONTEXT, "tie_embeddings": False, "init_std": 0.3}
    solver = {"kind": "iiet", "iterations": [2, 0, 1]}
    model = Transformer(tiny_config(data, folder / "run", model=shape, solver=solver))
    model.initialise(5)
    with torch.no_grad():
        model.head.weight[EOS] = 0  # never the likeliest: a greedy text does not end of itself
    files = [folder / "tokenizer.json", folder / "tokenizer_config.json"]
    portable.save(model.config, model.state_dict(), folder / "portable", extra_files=files)
    stored = portable.StoredModel(folder / "portable")
    export_folder(stored.config, stored, folder / "export", extras_of_tokenizer(files[0]))
    (folder / "export/chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    limits = ("--max-concurrent", "4", "--max-waiting", "8", "--max-body", "20000", "--threads", "1")
    server = Server(
        folder / "export", tmp_path_factory.mktemp("server"), "--name", "tiny", "--grace", "1", *limits
    )
    yield server
    stream = greedy(server, "a", 4000, n=4, stream=True)
    assert next(iter(stream)).choices[0].text
    assert server.end() == 0, "SIGTERM ends it and what runs"
    with pytest.raises(openai.APIError, match="the server stops"):
        list(stream)
    assert not server.ready.exists(), "nobody is asked who is gone"
    output = server.output.read_text()
    assert output.splitlines()[-1] == "stopped"
    assert "Traceback" not in output, "of no request"


class Reference:
    """The model as the training side computes it: a full forward pass a token."""

    def __init__(self, folder: Path) -> None:
        self.model = models.load(folder / "portable")
        self.tokenizer = load_tokenizer(folder / "portable/tokenizer.json")
        self.known = self.tokenizer.vocab_size
        assert self.tokenizer.eod_id == EOS

    def ids(self, text: str) -> list[int]:
        return [self.tokenizer.eod_id, *self.tokenizer.encode(text).tolist()]

    @torch.no_grad()
    def greedy(self, prompt: list[int], count: int) -> list[int]:
        ids = list(prompt)
        for _ in range(count):
            logits = self.model(torch.tensor([ids]))[0, -1, : self.known]
            first, second = logits.topk(2).values.tolist()
            assert first - second > 1e-3, "rounding could choose; take another seed"
            ids.append(int(logits.argmax()))
        return ids[len(prompt) :]

    def text(self, prompt: list[int], count: int) -> str:
        whole = self.tokenizer.decode([*prompt, *self.greedy(prompt, count)])
        return whole[len(self.tokenizer.decode(prompt)) :]


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder)


def greedy(server: Server, prompt: Any, count: int, **more: Any) -> Any:
    return server.client.completions.create(
        model="tiny", prompt=prompt, max_tokens=count, temperature=0, **more
    )


def test_texts_of_a_crowd_are_those_of_full_forward_passes(server: Server, reference: Reference) -> None:
    """Of more clients than places, with prompts and texts of different lengths, some twice."""
    counts = [18, 5, 11, 24, 2, 14]
    expected = [reference.text(reference.ids(p), n) for p, n in zip(PROMPTS, counts, strict=True)]
    assert len(set(expected)) == len(expected)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: greedy(server, PROMPTS[n % 6], counts[n % 6]), range(12)))
    for n, answer in enumerate(answers):
        [choice] = answer.choices
        assert choice.text == expected[n % 6]
        assert (choice.finish_reason, choice.index, choice.logprobs) == ("length", 0, None)
        asked = len(reference.ids(PROMPTS[n % 6]))
        assert answer.usage.prompt_tokens == asked
        assert answer.usage.completion_tokens == counts[n % 6]
        assert answer.usage.total_tokens == asked + counts[n % 6]
    assert len({answer.id for answer in answers}) == 12


def test_prompts_as_ids_and_several_at_once(server: Server, reference: Reference) -> None:
    ids = [reference.ids(prompt) for prompt in PROMPTS[:3]]
    expected = [reference.text(prompt, 8) for prompt in ids]
    assert greedy(server, ids[1], 8).choices[0].text == expected[1]
    for prompts in (ids, PROMPTS[:3]):
        answer = greedy(server, prompts, 8, n=2, echo=True)
        assert [choice.index for choice in answer.choices] == list(range(6))
        assert [choice.text for choice in answer.choices] == [
            prompt + text for prompt, text in zip(PROMPTS, expected, strict=False) for _ in range(2)
        ]
        assert answer.usage.prompt_tokens == sum(map(len, ids))
        assert answer.usage.completion_tokens == 48


def test_a_stream_is_the_text_in_pieces(server: Server) -> None:
    whole = greedy(server, PROMPTS[:2], 12, echo=True, logprobs=1)
    usage = {"include_usage": True}
    chunks = list(greedy(server, PROMPTS[:2], 12, echo=True, logprobs=1, stream=True, stream_options=usage))
    assert len({chunk.id for chunk in chunks}) == 1
    *parts, last = chunks
    assert not last.choices
    assert last.usage == whole.usage
    assert all(chunk.usage is None for chunk in parts)
    for index in range(2):
        pieces = [c for chunk in parts for c in chunk.choices if c.index == index]
        assert "".join(piece.text for piece in pieces) == whole.choices[index].text
        assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1].finish_reason == "length"
        assert len(pieces) >= 12, "a piece a token"
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            found = [value for piece in pieces if piece.logprobs for value in getattr(piece.logprobs, name)]
            expected = getattr(whole.choices[index].logprobs, name)
            if name in ("tokens", "text_offset"):
                assert found == expected
            elif name == "token_logprobs":
                assert found[1:] == pytest.approx(expected[1:], abs=1e-4)
    assert not any(chunk.usage for chunk in greedy(server, "one", 2, stream=True))


def test_scores_are_those_of_the_model(server: Server, reference: Reference) -> None:
    """Of prompt and text, as lm-evaluation-harness asks for them."""
    ids = reference.ids(PROMPTS[1])
    made = reference.greedy(ids, 3)
    found = greedy(server, PROMPTS[1], 3, echo=True, logprobs=2).choices[0]
    with torch.no_grad():
        logprobs = reference.model(torch.tensor([ids + made]))[0, :, : reference.known].log_softmax(-1)
    expected = [logprobs[n, token].item() for n, token in enumerate((ids + made)[1:])]
    assert found.logprobs.token_logprobs[0] is None
    assert found.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    assert "".join(found.logprobs.tokens) == found.text
    only_read = greedy(server, PROMPTS[1], 0, echo=True, logprobs=2)
    assert only_read.choices[0].text == PROMPTS[1]
    assert only_read.choices[0].logprobs.token_logprobs == pytest.approx(
        found.logprobs.token_logprobs[: len(ids)], abs=1e-4
    )
    assert only_read.usage.completion_tokens == 0


def test_stops_and_seeds(server: Server, reference: Reference) -> None:
    text = reference.text(reference.ids(PROMPTS[0]), 18)
    stop = text[6:8]
    found = greedy(server, PROMPTS[0], 18, stop=["nowhere", stop]).choices[0]
    assert (found.text, found.finish_reason) == (text[: text.find(stop)], "stop")
    pieces = [chunk.choices[0] for chunk in greedy(server, PROMPTS[0], 18, stop=stop, stream=True)]
    assert "".join(piece.text for piece in pieces) == found.text
    assert pieces[-1].finish_reason == "stop"

    def drawn(**more: Any) -> list[str]:
        answer = server.client.completions.create(model="tiny", prompt="one", max_tokens=9, **more)
        return [choice.text for choice in answer.choices]

    assert drawn(seed=3, n=2) == drawn(seed=3, n=2)
    assert len({*drawn(seed=3, n=2), *drawn(seed=8, n=2)}) == 4
    assert drawn(seed=3, temperature=1.5, extra_body={"top_k": 1}) == [
        reference.text(reference.ids("one"), 9)
    ]


def test_a_chat(server: Server, reference: Reference) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "the solver"}, {"role": "user", "content": "merges this loss"},
    ]  # fmt: skip
    ids = reference.tokenizer.encode("system: the solver user: merges this loss assistant:").tolist()
    expected = reference.text(ids, 10)
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": messages,
        "temperature": 0,
        "max_completion_tokens": 10,
    }
    answer = server.client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == (
        "assistant", expected, "length",
    )  # fmt: skip
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 10)
    scores = choice.logprobs.content  # type: ignore[union-attr]
    assert "".join(score.token for score in scores) == expected  # type: ignore[union-attr]
    assert all(score.logprob == score.top_logprobs[0].logprob for score in scores)  # type: ignore[union-attr]
    chunks = list(server.client.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "length"
    with pytest.raises(openai.BadRequestError, match=r"does not take these messages \(nobody speaks\)"):
        server.client.chat.completions.create(model="tiny", messages=[{"role": "nobody", "content": "a"}])  # type: ignore[list-item]


def test_what_is_served(server: Server) -> None:
    [card] = server.client.models.list().data
    assert (card.id, card.max_model_len) == ("tiny", CONTEXT)  # type: ignore[attr-defined]
    assert server.client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other' here; 'tiny' is served"):
        server.client.models.retrieve("other")
    assert server.ask("GET", "/health")[::2] == (200, {"status": "ok", "running": 0, "waiting": 0})


def test_requests_that_are_refused(server: Server) -> None:
    """With OpenAI's error object, whatever is wrong."""
    with pytest.raises(openai.BadRequestError, match='there is no parameter "typo"; leave it out') as caught:
        greedy(server, "a", 1, extra_body={"typo": 1})
    assert caught.value.body == {
        "message": 'there is no parameter "typo"; leave it out',
        "type": "invalid_request_error", "param": "typo", "code": None,
    }  # fmt: skip
    with pytest.raises(openai.BadRequestError, match="the prompt has 5000 tokens and 1 new ones are asked"):
        greedy(server, [5] * 5000, 1)
    with pytest.raises(openai.NotFoundError, match="model is \"gpt\", but 'tiny' is served here"):
        server.client.completions.create(model="gpt", prompt="a")
    path, body = "/v1/completions", {"model": "tiny", "prompt": "a"}
    for method, where, content, kind, status, words in (
        ("POST", path, b"{", "application/json", 400, "the body is no JSON"),
        ("POST", path, b" " * 20001, "application/json", 413, "the body has more than 20,000 bytes"),
        ("POST", path, body, "text/plain", 415, "content type is 'text/plain'; send application/json"),
        ("GET", path, None, "", 405, "GET /v1/completions: Method Not Allowed"),
        ("POST", "/v1/embeddings", body, "application/json", 404, "POST /v1/embeddings: Not Found"),
        ("GET", "/docs", None, "", 404, "GET /docs: Not Found"),
    ):
        found, _, told = server.ask(method, where, content, kind)
        assert (found, told["error"]["type"]) == (status, "invalid_request_error")
        assert words in told["error"]["message"]


def test_a_client_that_goes_within_its_body(server: Server) -> None:
    """(The fixture looks at the server's output in the end.)"""
    with closing(server.connection()) as connection:
        connection.putrequest("POST", "/v1/completions")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", "100")
        connection.endheaders(b'{"model":')
    assert greedy(server, "a", 1).usage.completion_tokens == 1


def test_places_are_limited_and_free_again_when_a_client_goes(server: Server) -> None:
    """Of streams and whole answers. (Left alone, the first one would end before the second.)"""
    long = {"model": "tiny", "prompt": "the solver", "max_tokens": 4000, "temperature": 0}

    def request(connection: http.client.HTTPConnection, **more: Any) -> None:
        content = json.dumps({**long, **more})
        connection.request("POST", "/v1/completions", content, {"Content-Type": "application/json"})

    with ExitStack() as stack:
        first, second, waiting = (stack.enter_context(closing(server.connection())) for _ in range(3))
        request(first, stream=True)
        stream = stack.enter_context(closing(first.getresponse()))
        assert stream.getheader("content-type", "").startswith("text/event-stream")
        assert stream.readline().startswith(b"data: {")
        request(second, n=3)
        wait_for(lambda: server.load() == (4, 0))
        request(waiting, n=8)
        wait_for(lambda: server.load() == (4, 8))
        status, headers, told = server.ask("POST", "/v1/completions", {**long, "max_tokens": 1})
        assert (status, headers["retry-after"]) == (503, "1")
        assert told["error"]["message"] == (
            "the server has as many requests as it takes; try again in a second"
        )
        with pytest.raises(openai.BadRequestError, match="n is 13; give a whole number from 1 to 12"):
            greedy(server, "a", 1, n=13)
        waiting.close()
        wait_for(lambda: server.load() == (4, 0))
        second.close()
        wait_for(lambda: server.load() == (1, 0))
        request(second, n=3, stream=True)
        other = stack.enter_context(closing(second.getresponse()))
        assert other.readline().startswith(b"data: {")
        wait_for(lambda: server.load() == (4, 0))
        other.close()
        second.close()
        wait_for(lambda: server.load() == (1, 0))
    wait_for(lambda: server.load() == (0, 0))
    assert greedy(server, "a", 1).usage.completion_tokens == 1


def test_starts_that_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = runpy.run_path(str(TOOL))

    def arguments(*flags: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["serve.py", "--model", str(folder / "portable"), *flags])
        return tool["parse_arguments"]()

    notes = folder / "notes"
    notes.write_text("of somebody")
    with pytest.raises(ValueError, match="notes, which holds something else; name another file"):
        tool["serve"](arguments("--ready-file", str(notes)))
    assert notes.read_text() == "of somebody"

    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"cannot listen at --host 127.0.0.1 --port {port} \("):
            tool["listen"]("127.0.0.1", port)
    with pytest.raises(ValueError, match="--context is 5000, but the model knows 4096 positions; give fewer"):
        tool["open_server"](arguments("--context", "5000"))
    for flags in (("--port", "70000"), ("--max-concurrent", "0"), ("--kv-cache", "last"), ("--grace", "-1")):
        with pytest.raises(SystemExit, match="2"):
            arguments(*flags)


def test_what_a_start_says(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a portable folder, which is served under its name; and without limits of one's own."""
    tool = runpy.run_path(str(TOOL))
    monkeypatch.setattr(sys, "argv", ["serve.py", "--model", str(folder / "portable")])
    engine, app = tool["open_server"](tool["parse_arguments"]())
    assert capsys.readouterr().out == (
        "serving 'portable' (fp32, cpu): 8 sequences at once, 4096 tokens of context\n"
    )
    assert (engine.batch.places, engine.batch.context, engine.max_waiting) == (8, 4096, 64)
    assert engine.batch.codec.chat is None
    assert {route.path for route in app.routes} == {
        "/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/{name:path}", "/health",
    }  # fmt: skip


@pytest.mark.long
def test_the_benchmark(folder: Path) -> None:
    """All four ways make the same texts, and a row each."""
    script = TOOL.parents[1] / "benchmarks/serving.py"
    sizes = "--clients 3 --new-tokens 6 --prompt 5 --rounds 1 --threads 1"
    command = [sys.executable, str(script), "--model", str(folder / "portable"), *sizes.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.endswith("| equal |")]
    assert len(rows) == 4
    assert "3 prompts of 4 to 5 tokens, 6 new ones each, 1 threads" in done.stdout
