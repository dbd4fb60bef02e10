"""Hands the events of a request from the worker's thread to asyncio's thread, all that are there at once."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from time import monotonic

from dgemma.serve.generation import AnswerDelta, CanvasStep, WorkerEvent
from dgemma.serve.metrics import Metrics

AHEAD = 64  # events that a client may be behind before it misses canvases


class EventQueue:
    """The events of one request. The worker calls put(), asyncio all else.

    The queue does not refer to who uses it, so that no cycle keeps either alive.
    wake_each: a waiting reader is woken for every event, not for the last alone.
    """

    def __init__(self, metrics: Metrics, wake_each: bool) -> None:
        self._metrics, self._wake_each = metrics, wake_each
        self._loop = asyncio.get_running_loop()
        self._events: deque[WorkerEvent | Exception | None] = deque()
        self._waking = False  # whether _wake() was scheduled, for all events until they are taken
        self._created, self._has_text = monotonic(), False
        self.ready: asyncio.Future[None] = self._loop.create_future()  # done when there is an event
        self.finished = False  # None or an exception, which is the last, was put

    def put(self, event: WorkerEvent | Exception | None) -> None:
        """Add an event."""
        if isinstance(event, CanvasStep) and len(self._events) >= AHEAD:
            return
        if isinstance(event, AnswerDelta) and not self._has_text:
            self._has_text = True
            self._metrics.first.observe(monotonic() - self._created)
        self.finished = self.finished or event is None or isinstance(event, Exception)
        self._events.append(event)
        if (self._wake_each or self.finished) and not self._waking:
            self._waking = True
            with suppress(RuntimeError):  # the loop has ended: nobody waits
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        if not self.ready.done():
            self.ready.set_result(None)

    def take(self) -> list[WorkerEvent | Exception | None]:
        """Take all events that are there."""
        if self.ready.done():
            self.ready = self._loop.create_future()
        self._waking = False  # set before they are taken: an event that comes meanwhile wakes again
        return [self._events.popleft() for _ in range(len(self._events))]
