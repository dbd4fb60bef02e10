"""Generates a request's answers as a stream of events; between two of them another request may be worked on."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from time import perf_counter
from typing import Any, TypeAlias, TypeVar

from dgemma.chat.answer_parser import Answer, Delta, Reader
from dgemma.events import Block, Result, Step
from dgemma.infill.edit import Edited
from dgemma.infill.fill import TrialStep
from dgemma.serve.requests import Work
from dgemma.serve.stops import StopFilter
from dgemma.session import CHUNK, Session

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PromptEncoded:
    """The prompt is encoded."""

    prompt: int  # tokens
    cached: int  # tokens of it that were encoded already


@dataclass(frozen=True, slots=True)
class CanvasStep:
    """A denoising step of an answer is done."""

    choice: int
    step: Step
    draft: Answer | None  # the rest of the answer if the canvas stayed as it is; None where it has pins
    end: int | None = None  # where its first end id stands, without pins
    trial_step: TrialStep | None = None  # the step of an edit


@dataclass(frozen=True, slots=True)
class AnswerDelta:
    """More of an answer is final."""

    choice: int
    delta: Delta


@dataclass(frozen=True, slots=True)
class AnswerFinished:
    """An answer is over."""

    choice: int
    reason: str  # stop, length, tool_calls
    tokens: int
    figures: dict[str, Any]


@dataclass(frozen=True, slots=True)
class PassageRewritten:
    """A passage is rewritten."""

    edited: Edited


WorkerEvent: TypeAlias = PromptEncoded | CanvasStep | AnswerDelta | PassageRewritten | AnswerFinished
WorkerEvents: TypeAlias = Generator[WorkerEvent | None, None, None]  # None: some work is done, without an event


def answer_events(work: Work, session: Session, waited: float) -> WorkerEvents:
    """Yield the events of all answers to all prompts.

    Closed, it stops within one step, and the session can be used again. waited: seconds in the queue, for the figures.
    """
    for at, prompt in enumerate(work.prompts):
        cached = session.shared(prompt)
        session.rewind(cached)
        stopwatch = Stopwatch()
        for start in range(cached, len(prompt), CHUNK):
            with stopwatch:
                session.encode(prompt[start : start + CHUNK])
            yield None
        yield PromptEncoded(len(prompt), cached)
        for i in range(work.n):
            seconds = {"waiting": waited, "prompt": stopwatch.seconds}
            yield from _answer(work, session, prompt, work.seed + i, at * work.n + i, seconds)
            waited = stopwatch.seconds = 0.0


def _answer(
    work: Work, session: Session, prompt: list[int], seed: int, choice: int, seconds: dict[str, float]
) -> WorkerEvents:
    reader = Reader.behind(session.model.tokenizer, prompt, work.marks)
    stops = StopFilter(work.stops)
    stopwatch = Stopwatch()
    tokens = steps = 0
    sent = 0  # tokens of this canvas that events had already
    calls, converged, reason, fault = False, True, "stop", None
    with closing(session.stream(prompt, seed=seed, **work.settings)) as events:
        for event in stopwatch.times(events):
            new: list[int] = []
            deltas: list[Delta] = []
            if isinstance(event, Step):
                new, sent, steps = event.final[sent:], len(event.final), steps + 1
            elif isinstance(event, Block):
                new, sent = event.ids[sent:], 0
                converged, fault = converged and event.converged, fault or event.fault
            else:
                deltas += stops.feed(reader.finish())
                seed, reason = event.seed, event.finish_reason
            # Tokens are read one by one if a stop text may end the answer: those behind it do not count.
            for ids in ([token] for token in new) if work.stops else [new]:
                deltas += stops.feed(reader.feed(ids))
                tokens += len(ids)
                if stops.hit:
                    break
            if isinstance(event, Result) and not stops.hit:
                deltas += stops.finish()
            for delta in _joined(deltas):
                calls = calls or (work.calls and delta.kind == "call")
                yield AnswerDelta(choice, delta)
            if stops.hit:
                reason = "stop"
                break
            if isinstance(event, Step):  # yielded last: another request may be worked on then
                yield _canvas(work, session, reader, choice, event) if work.events else None
    figures: dict[str, Any] = {"seed": seed, "steps": steps, "converged": converged, "fault": fault}
    figures["seconds"] = {what: round(time, 6) for what, time in {**seconds, "steps": stopwatch.seconds}.items()}
    yield AnswerFinished(choice, "tool_calls" if calls and reason == "stop" else reason, tokens, figures)


def _canvas(work: Work, session: Session, reader: Reader, choice: int, step: Step) -> CanvasStep:
    if "canvas" in work.settings:
        return CanvasStep(choice, step, None)
    ids = step.canvas.tolist()
    end = next((at for at, token in enumerate(ids) if token in session.model.config.end_ids), len(ids))
    return CanvasStep(choice, step, reader.peek(ids[len(step.final) : end]), end)


class Stopwatch:
    """Adds up the seconds of work, without the time between its parts."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._began = perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += perf_counter() - self._began

    def times(self, events: Iterator[T]) -> Iterator[T]:
        while True:
            with self:
                event = next(events, None)
            if event is None:
                return
            yield event


def _joined(deltas: list[Delta]) -> list[Delta]:
    """Return deltas with neighbours of a kind joined."""
    joined: list[Delta] = []
    for delta in deltas:
        if joined and joined[-1].kind == delta.kind != "call":
            joined[-1] = Delta(delta.kind, joined[-1].text + delta.text)
        else:
            joined.append(delta)
    return joined
