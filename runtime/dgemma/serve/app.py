"""The server's routes.

Requests are read here, in asyncio's thread and its helpers; the worker's thread answers them.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import monotonic, time
from typing import Any

from pydantic_core import from_json
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

import dgemma
from dgemma.errors import Error
from dgemma.files import json_lines
from dgemma.model import Model
from dgemma.options import efforts, options
from dgemma.serve.auth import Guard
from dgemma.serve.edits import EditReply, EditWork, edit_events, read_edit
from dgemma.serve.errors import Refusal, bad_request, refusal_of
from dgemma.serve.event_queue import EventQueue
from dgemma.serve.generation import CanvasStep, WorkerEvent, answer_events
from dgemma.serve.metrics import Metrics
from dgemma.serve.openai import Reply
from dgemma.serve.page import page_files
from dgemma.serve.parameters import Endpoint
from dgemma.serve.requests import Work, read_request
from dgemma.serve.sessions import Pool
from dgemma.serve.worker import Job, Worker

log = logging.getLogger("dgemma.serve")
ENDPOINTS: dict[str, Endpoint] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/edits": "edits",
}
KEEPALIVE = 15.0  # seconds of silence in a stream before a comment is sent, so that nobody takes it for broken
CLIENT_LEFT = 499  # the status in figures of a request whose client left


@dataclass(frozen=True)
class Limits:
    """The limits of a server."""

    context: int  # tokens of a prompt and its answer
    cache: int  # bytes of sessions
    queue: int = 64  # requests that wait
    together: int = 4  # requests that take turns
    body: int = 4 << 20  # bytes of a request
    deadline: float | None = None  # seconds of a request


class Server:
    """The server of one model. `app` is the ASGI application; close() ends the worker."""

    def __init__(self, model: Model, limits: Limits, guard: Guard, name: str | None = None) -> None:
        self.model, self._limits, self._guard = model, limits, guard
        self.name = name or Path(model.path).stem
        self._fingerprint = f"dgemma {dgemma.__version__}, {model.backend}"
        self._created = int(time())
        self.metrics = Metrics()
        self.worker = Worker(
            model, Pool(model, limits.context, limits.cache), self.metrics, limits.queue, limits.together
        )
        self.app = Starlette(
            routes=[
                self._route("GET", "/health", self._health),
                self._route("GET", "/metrics", self._metrics_text),
                self._route("GET", "/v1/models", self._models),
                self._route("GET", "/v1/models/{name:path}", self._one_model),
                *(self._route("POST", path, partial(self._complete, e, path)) for path, e in ENDPOINTS.items()),
                *(self._route("GET", f"/{path}", self._page) for path in page_files()),
            ],
            exception_handlers={HTTPException: self._no_route},
        )

    def close(self) -> None:
        self.worker.close()

    def _route(self, method: str, path: str, handler: Any) -> Route:
        """Return a path's handler behind the guard, whose failures are answers."""

        async def answer(request: Request) -> Response:
            began = monotonic()
            try:
                self._guard.check(request)
                response: Response = await handler(request)
                status = response.status_code
            except ClientDisconnect:
                status, response = CLIENT_LEFT, Response(status_code=CLIENT_LEFT)
                self.metrics.disconnects.inc()
            except Exception as failure:
                refusal = self._refused(failure)
                status = refusal.status
                response = JSONResponse(refusal.body(), status, refusal.all_headers())
            if not isinstance(response, StreamingResponse):
                self._count(path, status, began)
            return response

        return Route(path, answer, methods=[method])

    def _count(self, path: str, status: int, began: float) -> None:
        self.metrics.requests.labels(path, str(status)).inc()
        self.metrics.seconds.labels(path).observe(monotonic() - began)

    def _refused(self, failure: Exception) -> Refusal:
        if not isinstance(failure, (Refusal, Error)):  # its text may hold a user's: place and kind alone
            places = traceback.extract_tb(failure.__traceback__)
            where = " < ".join(f"{Path(p.filename).name}:{p.lineno}" for p in reversed(places))
            log.error("internal error, please report it: %s at %s", type(failure).__name__, where)
        failure.with_traceback(None)  # it holds the frames that hold the failure, and in them the request
        return refusal_of(failure)

    async def _no_route(self, request: Request, problem: Exception) -> Response:
        assert isinstance(problem, HTTPException)
        refusal = Refusal(problem.status_code, f"{request.method} {request.url.path}: {problem.detail}")
        return JSONResponse(refusal.body(), refusal.status, dict(problem.headers or {}))

    async def _health(self, request: Request) -> Response:
        draining = self.worker.draining
        return JSONResponse({"status": "shutting down" if draining else "ok"}, 503 if draining else 200)

    async def _metrics_text(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _page(self, request: Request) -> Response:
        found = page_files()[request.url.path.removeprefix("/")]
        if request.headers.get("if-none-match") == found.headers["ETag"]:
            return Response(status_code=304, headers=found.headers)
        return Response(found.body, headers=found.headers)

    def _model_card(self) -> dict[str, Any]:
        config = self.model.config
        defaults = self.model.settings()
        own = {
            "context": self._limits.context,
            "canvas_length": config.canvas_length,
            "chat": self.model.tokenizer.chat_template is not None,
            "settings": [{**asdict(option), "default": defaults[option.name]} for option in options().values()],
            "efforts": [asdict(effort) for effort in efforts().values()],
        }
        return {"id": self.name, "object": "model", "created": self._created, "owned_by": "dgemma", "diffusion": own}

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_card()]})

    async def _one_model(self, request: Request) -> Response:
        if request.path_params["name"] != self.name:
            raise Refusal(404, f"there is no such model here; {self.name!r} is served", "model_not_found", "model")
        return JSONResponse(self._model_card())

    async def _complete(self, endpoint: Endpoint, path: str, request: Request) -> Response:
        self.worker.refuse_if_full()
        body = await self._guard.body(request)
        work = await asyncio.to_thread(self._read, endpoint, body)
        given = [each for each in (work.deadline, self._limits.deadline) if each is not None]
        about = (self.model.tokenizer, self.name, self._fingerprint)
        reply = EditReply(work, *about) if isinstance(work, EditWork) else Reply(work, *about)
        client = f"{request.client.host if request.client else ''} {work.user}"
        answer = ActiveRequest(self, work, reply, client, min(given, default=None), path)
        headers = {"X-Request-Id": reply.id, "Cache-Control": "no-store"}
        if work.ignored:
            headers["X-Ignored-Parameters"] = ", ".join(work.ignored)
        if work.stream:
            return EventStreamResponse(answer, headers)
        return JSONResponse(await answer.whole(request.receive), headers=headers)

    def _read(self, endpoint: Endpoint, body: bytes) -> Work | EditWork:
        try:
            given = from_json(body, allow_inf_nan=False)
        except ValueError:
            raise bad_request("the body is no JSON", code="invalid_json") from None
        if endpoint == "edits":
            return read_edit(given, self.model, self.name, self._limits.context)
        return read_request(endpoint, given, self.model, self.name, self._limits.context)

    def ended(self, answer: ActiveRequest, status: int) -> None:
        """Log a request in one line: figures, no text."""
        reply, job = answer.reply, answer.job
        if status == CLIENT_LEFT and answer.work.stream:  # the others are counted where their answer fails
            self.metrics.disconnects.inc()
        self.metrics.waited.observe(job.waited)
        log.info(
            "%s %d %s: %d prompt tokens (%d cached), %d answer tokens, %d steps, waited %.2f s, worked %.2f s",
            *(reply.id, status, answer.path, reply.prompt, reply.cached, reply.tokens, reply.steps),
            *(job.waited, job.seconds),
        )


class ActiveRequest:
    """One request at the worker, for asyncio's thread.

    It is submitted at once: raises a Refusal if the queue is full.
    """

    def __init__(
        self,
        server: Server,
        work: Work | EditWork,
        reply: Reply | EditReply,
        client: str,
        deadline: float | None,
        path: str,
    ) -> None:
        self._server, self.work, self.reply, self.path = server, work, reply, path
        self._until = None if deadline is None else monotonic() + deadline
        self.began = monotonic()
        self._queue = queue = EventQueue(server.metrics, work.stream)
        if isinstance(work, EditWork):
            self.job = Job(work.prompt, work.need, partial(edit_events, work), client, queue.put)
        else:
            self.job = Job(work.prompts[0], work.need, partial(answer_events, work), client, queue.put)
        server.worker.submit(self.job)

    def cancel(self) -> None:
        """Have the worker stop, where it is still at work."""
        if not self._queue.finished:
            self._server.worker.cancel(self.job)

    async def _batches(self, receive: Receive, timeout: float | None = None) -> AsyncGenerator[list[WorkerEvent], None]:
        """Yield the worker's events, as many at a time as there are; none after `timeout` seconds of silence.

        Raises what the request fails with, and ClientDisconnect when nobody waits for it any more.
        """
        queue, gone = self._queue, asyncio.ensure_future(_disconnected(receive))
        try:
            while True:
                left = None if self._until is None else max(0.0, self._until - monotonic())
                wait = min((each for each in (left, timeout) if each is not None), default=None)
                await asyncio.wait([queue.ready, gone], timeout=wait, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    raise ClientDisconnect
                if self._until is not None and monotonic() >= self._until and not queue.finished:
                    raise Refusal(504, "the deadline of the request has passed", "deadline_exceeded")
                silent = not queue.ready.done()
                taken = queue.take()
                events = [event for event in taken if event is not None and not isinstance(event, Exception)]
                if events or silent:
                    yield events
                if len(events) < len(taken):  # the last event is the end
                    if isinstance(end := taken[-1], Exception):
                        raise end
                    return
        finally:
            gone.cancel()

    async def whole(self, receive: Receive) -> dict[str, Any]:
        """Return the whole answer. Raises as _batches() does."""
        status = CLIENT_LEFT
        try:
            async with aclosing(self._batches(receive)) as batches:
                async for events in batches:
                    for event in events:
                        for _ in self.reply.chunks(event):
                            pass
            status = 200
            return self.reply.whole()
        except Exception as failure:
            if not isinstance(failure, ClientDisconnect):
                status = refusal_of(failure).status
            raise
        finally:
            self.cancel()
            self._server.ended(self, status)

    async def stream(self, receive: Receive) -> AsyncGenerator[bytes, None]:
        """Yield server-sent events; an error is one too, as the status is sent already."""
        status = CLIENT_LEFT
        try:
            async with aclosing(self._batches(receive, KEEPALIVE)) as batches:
                async for events in batches:
                    if piece := b"".join(map(self._encoded, events)) if events else b": still at it\n\n":
                        yield piece
            yield b"".join(map(_event, self.reply.final_chunks())) + b"data: [DONE]\n\n"
            status = 200
        except ClientDisconnect:
            pass
        except Exception as failure:
            refusal = self._server._refused(failure)
            status = refusal.status
            yield _event(refusal.body())
        finally:
            self.cancel()
            self._server._count(self.path, status, self.began)
            self._server.ended(self, status)

    def _encoded(self, event: WorkerEvent) -> bytes:
        name = "canvas" if isinstance(event, CanvasStep) else None
        return b"".join(_event(chunk, name) for chunk in self.reply.chunks(event))


class EventStreamResponse(StreamingResponse):
    """A response of server-sent events. Its end cancels the request, where that is still at work."""

    def __init__(self, answer: ActiveRequest, headers: dict[str, str]) -> None:
        super().__init__((), headers=headers, media_type="text/event-stream")
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._answer.stream(receive)) as self.body_iterator:
                await self.stream_response(send)
        finally:
            self._answer.cancel()  # the generator may never have begun


def _event(data: dict[str, Any], name: str | None = None) -> bytes:
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json_lines.as_line(data, compact=True)}\n\n".encode("utf-8", "replace")


async def _disconnected(receive: Receive) -> None:
    """Wait until the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
