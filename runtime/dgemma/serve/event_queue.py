"""Hands events of a request from the worker's thread to asyncio's thread, all that are there at once."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from time import monotonic

from dgemma.serve.generation import CanvasStep, Said, Told
from dgemma.serve.metrics import Metrics

AHEAD = 64  # events that a client may be behind before it misses canvases


class EventQueue:
    """The events of one request.

    The worker calls hear(), asyncio all else. The queue knows nothing of who uses it: no cycle keeps either alive.
    live: whoever waits is woken for every event, not for the end alone.
    """

    def __init__(self, metrics: Metrics, live: bool) -> None:
        self._metrics, self._live = metrics, live
        self._loop = asyncio.get_running_loop()
        self._told: deque[Told | Exception | None] = deque()
        self._called = False  # whether _ring() was called, for all events until they are taken
        self._began, self._spoke = monotonic(), False
        self.bell: asyncio.Future[None] = self._loop.create_future()  # done when there is an event
        self.over = False  # None or an exception was heard, which is the last

    def hear(self, told: Told | Exception | None) -> None:
        """Add an event."""
        if isinstance(told, CanvasStep) and len(self._told) >= AHEAD:
            return
        if isinstance(told, Said) and not self._spoke:
            self._spoke = True
            self._metrics.first.observe(monotonic() - self._began)
        self.over = self.over or told is None or isinstance(told, Exception)
        self._told.append(told)
        if (self._live or self.over) and not self._called:
            self._called = True
            with suppress(RuntimeError):  # the loop has ended: nobody waits
                self._loop.call_soon_threadsafe(self._ring)

    def _ring(self) -> None:
        if not self.bell.done():
            self.bell.set_result(None)

    def take(self) -> list[Told | Exception | None]:
        """Take all events that are there."""
        if self.bell.done():
            self.bell = self._loop.create_future()
        self._called = False  # set before they are taken: an event that comes meanwhile rings again
        return [self._told.popleft() for _ in range(len(self._told))]
