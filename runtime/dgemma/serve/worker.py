"""The one thread that runs a model for the server: a bounded queue, and round-robin scheduling.

Clients take turns in the queue, and requests at work take turns step by step.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic, perf_counter
from typing import TypeAlias

from dgemma.model import Model
from dgemma.serve.errors import Refusal, refusal_of
from dgemma.serve.generation import CanvasStep, WorkerEvent, WorkerEvents
from dgemma.serve.metrics import Metrics
from dgemma.serve.sessions import Pool, Slot
from dgemma.session import Session

OnEvent: TypeAlias = Callable[[WorkerEvent | Exception | None], None]  # None: the answer is over


@dataclass(eq=False)
class Job:
    """A request at work. The worker's thread calls `on_event`, with None or an exception last."""

    prompt: list[int]  # chooses the session: the one that holds most of it
    need: int  # tokens of context
    begin: Callable[[Session, float], WorkerEvents]  # starts it, given the seconds that it waited
    client: str  # turns are shared between these
    on_event: OnEvent
    cancelled: threading.Event = field(default_factory=threading.Event)
    submitted: float = field(default_factory=monotonic)
    waited: float = 0.0  # seconds in the queue
    seconds: float = 0.0  # of work
    slot: Slot | None = None
    events: WorkerEvents | None = None


class Worker:
    """Takes requests from any thread; close() ends it.

    queue: the most requests that wait. together: the most that take turns.
    """

    def __init__(self, model: Model, pool: Pool, metrics: Metrics, queue: int, together: int) -> None:
        self._model, self._pool, self._metrics = model, pool, metrics
        self._queue_limit, self._together = queue, together
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()  # by client; the first has the next turn
        self._running: deque[Job] = deque()
        self._changed = threading.Condition()
        self._draining = self._closed = False
        self._at_work = 0  # those in _running, and the one whose turn it is
        self._mean = 1.0  # moving mean of the seconds of a request
        metrics.add_gauges(self.waiting, lambda: self._at_work, lambda: pool.tokens)
        self._thread = threading.Thread(target=self._work, name="dg-serve worker", daemon=True)
        self._thread.start()

    def waiting(self) -> int:
        """Return how many requests wait."""
        return sum(map(len, list(self._waiting.values())))

    @property
    def draining(self) -> bool:
        return self._draining

    def refuse_if_full(self) -> None:
        """Raise a Refusal where no request would be taken."""
        if self._draining:
            raise Refusal(503, "the server is shutting down", "shutting_down", retry=5)
        if self.waiting() >= self._queue_limit:
            wait = max(1, min(600, round(self._mean * (self.waiting() + 1))))
            raise Refusal(429, f"{self._queue_limit} requests wait already; try again later", "queue_full", retry=wait)

    def submit(self, job: Job) -> None:
        with self._changed:
            self.refuse_if_full()
            self._waiting.setdefault(job.client, deque()).append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """End a request within one step: nobody waits for it any more."""
        job.cancelled.set()
        with self._changed:
            jobs = self._waiting.get(job.client)
            if jobs is not None and job in jobs:
                jobs.remove(job)
                if not jobs:
                    del self._waiting[job.client]
            self._changed.notify()

    def drain(self) -> None:
        """Take no more requests: those that wait are refused, those at work go on."""
        with self._changed:
            self._draining = True
            waiting, self._waiting = [job for jobs in self._waiting.values() for job in jobs], OrderedDict()
        for job in waiting:
            job.on_event(Refusal(503, "the server is shutting down", "shutting_down", retry=5))

    def close(self) -> None:
        """End within one step; requests at work fail with 503."""
        self.drain()
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        try:
            while not self._closed:
                with self._changed:
                    admitted = self._next()
                    if admitted is None and not self._running:
                        if not self._closed:  # read under the lock: close() could notify just before the wait
                            self._changed.wait()
                        continue
                if admitted is not None:
                    self._admit(admitted)
                if self._running:
                    self._turn(self._running.popleft())
        finally:
            self._closed = True
            self.drain()
            while self._running:
                self._end(
                    self._running.popleft(), Refusal(503, "the server is shutting down", "shutting_down", retry=5)
                )
            self._pool.close()

    def _next(self) -> Job | None:
        """Take the next request from the queue, if there is a place for it."""
        if len(self._running) >= self._together or not self._waiting:
            return None
        client, jobs = self._waiting.popitem(last=False)
        job = jobs.popleft()
        if jobs:
            self._waiting[client] = jobs  # behind the others
        return job

    def _admit(self, job: Job) -> None:
        try:
            job.slot = self._pool.acquire(job.prompt, job.need)
        except Exception as failure:
            self._end(job, refusal_of(failure))
            return
        if job.slot is None:  # no room beside those at work: it goes back to the head of the queue
            with self._changed:
                self._waiting.setdefault(job.client, deque()).appendleft(job)
                self._waiting.move_to_end(job.client, last=False)
            return
        job.waited = monotonic() - job.submitted
        job.events = job.begin(job.slot.session, job.waited)
        self._at_work += 1
        self._running.append(job)

    def _turn(self, job: Job) -> None:
        """Do one step of a request, or one stretch of its prompt."""
        if job.cancelled.is_set():
            self._end(job, None)
            return
        assert job.events is not None
        began = perf_counter()
        ended, failure = False, None
        try:
            ended = self._advance(job, job.events)
        except Exception as problem:
            failure = problem
        job.seconds += perf_counter() - began
        if failure is not None or ended:
            self._end(job, failure)
        else:
            self._running.append(job)

    def _advance(self, job: Job, events: WorkerEvents) -> bool:
        """Work until a step is over, and tell what it made final. Returns whether that was the last."""
        assert job.slot is not None
        for event in events:
            job.slot.peak = max(job.slot.peak, job.slot.session.length)
            if event is not None:
                self._metrics.record(event)
                job.on_event(event)
            if event is None or isinstance(event, CanvasStep) or job.cancelled.is_set():
                return False
        return True

    def _end(self, job: Job, failure: Exception | None) -> None:
        if job.events is not None:
            job.events.close()
        if job.slot is not None:
            self._pool.release(job.slot, broken=failure is not None)
            job.slot = None
            self._at_work -= 1
            self._mean += (job.seconds - self._mean) / 8
        job.on_event(failure)
