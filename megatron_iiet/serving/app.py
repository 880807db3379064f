"""The HTTP side: OpenAI's endpoints over an engine."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from uuid import uuid4

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from megatron_iiet.hf.generation import Codec
from megatron_iiet.serving.continuation import Continuation, TokenScore, Update
from megatron_iiet.serving.engine import STOPPED, BusyError, Engine
from megatron_iiet.serving.protocol import (
    Asked,
    Limits,
    RequestError,
    chat_scores,
    completion_scores,
    error_object,
    parse,
    parse_json,
    usage,
)

_BODY_SECONDS = 60.0
_LAST_SECONDS = 30
"""For answers to be sent once the engine has stopped."""
_CLIENT_CLOSED = 499


def make_app(engine: Engine, codec: Codec, limits: Limits, *, max_body: int) -> FastAPI:
    """The application; ``max_body``: most bytes of a request's body."""
    app = FastAPI(title="megatron_iiet", docs_url=None, redoc_url=None, openapi_url=None)
    # One thread: a tokenizer of transformers is not to be called by two at once.
    reader = ThreadPoolExecutor(1, "requests")
    card = {"id": limits.model, "object": "model", "created": int(time.time()), "owned_by": "megatron_iiet"}
    card["max_model_len"] = limits.context

    async def answer(request: Request, chat: bool) -> Response:
        content = await _body(request, max_body)
        work = partial(_read, content, chat, codec, limits)
        asked = await asyncio.get_running_loop().run_in_executor(reader, work)
        job = Job(engine, codec, asked, limits.model)
        return JobStream(job) if asked.stream else await _whole(request, job)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, chat=False)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answer(request, chat=True)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != limits.model:
            raise RequestError(
                f"there is no model '{name[:100]}' here; '{limits.model}' is served",
                "model",
                status=404,
                code="model_not_found",
            )
        return card

    @app.get("/health")
    async def health() -> Response:
        running, waiting = engine.load
        state = {"status": "ok" if engine.alive else "stopped", "running": running, "waiting": waiting}
        return JSONResponse(state, 200 if engine.alive else 503)

    _tell_errors(app)
    return app


def _tell_errors(app: FastAPI) -> None:
    """Every error as OpenAI's object."""

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return JSONResponse(error.body(), error.status, {"Retry-After": "1"} if error.status == 503 else None)

    @app.exception_handler(HTTPException)
    async def not_there(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path[:100]}: {error.detail}"
        return JSONResponse(error_object(message, "invalid_request_error"), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        message = f"the server failed ({type(error).__name__}); its own output has more"
        return JSONResponse(error_object(message, "server_error"), 500)


def _read(content: bytes, chat: bool, codec: Codec, limits: Limits) -> Asked:
    return parse(parse_json(content), chat, codec, limits)


async def _body(request: Request, most: int) -> bytes:
    """A request's body.

    Raises:
        RequestError: it is too long, takes too long, or is not called JSON (which a page of another origin
            could send without asking).
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(f"the body's content type is '{kind[:100]}'; send application/json", status=415)
    parts, size = [], 0
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise RequestError(
                        f"the body has more than {most:,} bytes; send less at once", status=413
                    )
                parts.append(part)
    except TimeoutError as error:
        raise RequestError(
            f"the body took more than {_BODY_SECONDS:g} s; send it faster", status=408
        ) from error
    except ClientDisconnect as error:  # nobody hears the answer; it is one line of the log
        raise RequestError("the connection ended within the body; send all of it", status=400) from error
    return b"".join(parts)


class Job:
    """The sequences of a request, as the event loop sees them."""

    def __init__(self, engine: Engine, codec: Codec, asked: Asked, model: str) -> None:
        """Submit them.

        Raises:
            RequestError: the engine has no place.
        """
        self.asked = asked
        self._news: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self.continuations = [
            Continuation(order, codec, partial(self._deliver, index))
            for index, order in enumerate(asked.orders)
        ]
        self._kind = "chat.completion" if asked.chat else "text_completion"
        prefix = "chatcmpl" if asked.chat else "cmpl"
        self._head = {"id": f"{prefix}-{uuid4().hex}", "created": int(time.time()), "model": model}
        try:
            engine.submit(self.continuations)
        except BusyError as error:
            raise RequestError(
                "the server has as many requests as it takes; try again in a second", status=503
            ) from error

    def _deliver(self, index: int, update: Update) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._news.put_nowait, (index, update))

    def cancel(self) -> None:
        """Nobody waits any more."""
        for each in self.continuations:
            each.cancel()

    async def updates(self) -> AsyncIterator[tuple[int, Update]]:
        """Index of a sequence and its news, until all have ended.

        Raises:
            RequestError: one failed.
        """
        left = len(self.continuations)
        while left:
            index, update = await self._news.get()
            if update.error:
                raise RequestError(update.error, status=503 if update.error == STOPPED else 500)
            left -= update.finish is not None
            yield index, update

    @property
    def usage(self) -> dict[str, int]:
        """Tokens read and made."""
        return usage(self.asked.prompt_tokens, sum(len(each.tokens) for each in self.continuations))

    async def whole(self) -> dict[str, Any]:
        """The answer, once all of it is there."""
        gathered = [Gathered(text) for text in self.asked.echo]
        async for index, update in self.updates():
            gathered[index].add(update)
        choices = [self._choice(index, each) for index, each in enumerate(gathered)]
        return {**self._head, "object": self._kind, "choices": choices, "usage": self.usage}

    def _choice(self, index: int, gathered: Gathered) -> dict[str, Any]:
        if self.asked.chat:
            scores = chat_scores(gathered.scores)
            content: dict[str, Any] = {
                "message": {"role": "assistant", "content": gathered.text, "refusal": None}
            }
        else:
            scores = completion_scores(gathered.scores, 0)
            content = {"text": gathered.text}
        told = scores if self.asked.tells_scores else None
        return {"index": index, **content, "logprobs": told, "finish_reason": gathered.finish}

    async def events(self) -> AsyncIterator[str]:
        """The answer piece by piece, as server-sent events."""
        kind = "chat.completion.chunk" if self.asked.chat else self._kind

        def event(choices: list[dict[str, Any]], **more: Any) -> str:
            return _event({**self._head, "object": kind, "choices": choices, **more})

        unknown: dict[str, Any] = {"usage": None} if self.asked.include_usage else {}
        offsets = [0] * len(self.continuations)
        for index, text in enumerate(self.asked.echo):
            if self.asked.chat:
                yield event([self._piece(index, Update(), 0, role="assistant")], **unknown)
            elif text:
                yield event([self._piece(index, Update(text), 0)], **unknown)
        try:
            async for index, update in self.updates():
                yield event([self._piece(index, update, offsets[index])], **unknown)
                offsets[index] += sum(len(score.text) for score in update.scores)
        except RequestError as error:
            yield _event(error.body())
            return
        if self.asked.include_usage:
            yield event([], usage=self.usage)
        yield "data: [DONE]\n\n"

    def _piece(self, index: int, update: Update, offset: int, **delta: str) -> dict[str, Any]:
        if self.asked.chat:
            told = chat_scores(update.scores)
            content: dict[str, Any] = {"delta": {**delta, "content": update.text}}
        else:
            told = completion_scores(update.scores, offset)
            content = {"text": update.text}
        tells = self.asked.tells_scores and update.scores
        return {
            "index": index,
            **content,
            "logprobs": told if tells else None,
            "finish_reason": update.finish,
        }


@dataclass
class Gathered:
    """What has come of a sequence."""

    text: str
    scores: list[TokenScore] = field(default_factory=list)
    finish: str | None = None

    def add(self, update: Update) -> None:
        """Go on."""
        self.text += update.text
        self.scores += update.scores
        self.finish = update.finish


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


class JobStream(StreamingResponse):
    """A job's events; the job ends with the connection."""

    def __init__(self, job: Job) -> None:
        super().__init__(job.events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._job = job

    async def __call__(self, scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()


async def _whole(request: Request, job: Job) -> Response:
    """A job's whole answer; the job ends with the connection."""
    whole, gone = asyncio.ensure_future(job.whole()), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((whole, gone), return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(whole.result()) if whole.done() else Response(status_code=_CLIENT_CLOSED)
    finally:
        job.cancel()
        for task in (whole, gone):
            task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def run_server(
    app: FastAPI, engine: Engine, listening: socket.socket, *, grace: float, ready: Callable[[], None]
) -> None:
    """Take requests until SIGINT or SIGTERM; then what runs has ``grace`` seconds to finish. ``ready`` is
    called once requests and signals are taken."""
    server = _Server(app, engine, grace)
    for number in (signal.SIGINT, signal.SIGTERM):
        # Until uvicorn takes them over; and at its end, when it raises what it has handled once more.
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    engine.start()
    ready()
    try:
        server.run(sockets=[listening])
    finally:
        engine.stop()


class _Server(uvicorn.Server):
    """uvicorn's, which ends requests by an answer instead of cutting their connections."""

    def __init__(self, app: FastAPI, engine: Engine, grace: float) -> None:
        last = int(grace) + _LAST_SECONDS
        super().__init__(
            uvicorn.Config(
                app, log_level="warning", timeout_graceful_shutdown=last, lifespan="off", ws="none"
            )
        )
        self._engine, self._grace = engine, grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._grace, lambda: loop.run_in_executor(None, self._engine.stop))
        await super().shutdown(sockets)
        timer.cancel()
