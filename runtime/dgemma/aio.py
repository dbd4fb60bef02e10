"""Streams of events for asyncio: each step of a blocking stream runs in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from contextlib import aclosing
from typing import Any

from dgemma.events import Block, Result, Step

Event = Step | Block | Result


class _Abandoned(Exception):
    """Stops the encoding of a prompt that nobody waits for any more."""


async def in_threads(
    stream: Callable[..., Generator[Event, None, None]], prompt: Any, given: Mapping[str, Any]
) -> AsyncGenerator[Event, None]:
    """Yield the events of stream(prompt, **given), each step in a thread.

    After the caller stops the stream or is cancelled, the step that runs is finished, and no other one begins.
    """
    abandoned, callback = threading.Event(), given.get("on_encode")

    def on_encode(done: int, total: int) -> None:
        if abandoned.is_set():
            raise _Abandoned
        if callback is not None:
            callback(done, total)

    events = stream(prompt, **{**given, "on_encode": on_encode})
    try:
        while True:
            step = asyncio.ensure_future(asyncio.to_thread(next, events, None))
            try:
                event = await asyncio.shield(step)
            except asyncio.CancelledError:
                abandoned.set()
                await _end(step)
                raise
            if event is None:
                return
            yield event
    finally:
        events.close()


async def _end(step: asyncio.Future[Any]) -> None:
    """Wait until a step has ended, even where the waiting is cancelled; its exception, if any, is dropped."""
    while not step.done():
        try:
            await asyncio.wait([step])
        except asyncio.CancelledError:
            continue
    step.exception()


async def last_of(events: AsyncGenerator[Event, None]) -> Result:
    """Return the Result that ends a stream."""
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Result):
                return event
    raise AssertionError("a stream ends with a Result")
