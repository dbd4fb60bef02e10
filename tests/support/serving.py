"""dg-serve in this process, and a client of it: what its tests share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import httpx
import openai

import dgemma
from dgemma.serve.app import Limits, Server
from dgemma.serve.auth import Guard
from dgemma.serve.lifecycle import Running, listen

PATIENCE = 600  # seconds: nothing here takes as long, however busy the machine
get, post = (partial(ask, timeout=PATIENCE) for ask in (httpx.get, httpx.post))


class Live:
    """A server in this process, and a client of it."""

    def __init__(self, server: Server, url: str, stop: Callable[[], None]) -> None:
        self.server, self.url, self.model, self.stop = server, url, server.name, stop
        self.client = openai.OpenAI(
            base_url=f"{url}/v1", api_key="secret", max_retries=0, timeout=600, _strict_response_validation=True
        )

    def chat(self, text: str, **given: Any) -> Any:
        messages = given.pop("messages", [{"role": "user", "content": text}])
        return self.client.chat.completions.create(model=self.model, messages=messages, **given)

    def complete(self, prompt: Any, **given: Any) -> Any:
        return self.client.completions.create(model=self.model, prompt=prompt, **given)

    def figure(self, name: str) -> float:
        lines = get(f"{self.url}/metrics", headers={"Authorization": "Bearer secret"}).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


@contextmanager
def serving(model: dgemma.Model, key: str | None = "secret", grace: float = 5, **limits: Any) -> Iterator[Live]:
    sockets = listen("127.0.0.1", 0)
    allowed = Limits(**{"context": min(2048, model.config.context_length), "cache": 1 << 30, **limits})
    server = Server(model, allowed, Guard(key, "127.0.0.1", allowed.body))
    running = Running(server, sockets, grace)
    thread = threading.Thread(target=running.serve_here)
    thread.start()
    try:
        yield Live(server, f"http://127.0.0.1:{sockets[0].getsockname()[1]}", running.stop)
    finally:
        running.stop()
        thread.join(PATIENCE)
        assert not thread.is_alive(), "the server did not end"


def soon(true: Callable[[], object], what: str) -> None:
    """Waits until something is so."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.02)
