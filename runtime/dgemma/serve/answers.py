"""A request's answers as they become final, in small turns: between two, another request may have its own."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeAlias

from dgemma.events import Block, Step
from dgemma.serve.requests import Work
from dgemma.serve.stops import Stops
from dgemma.session import CHUNK, Session
from dgemma.turns import Delta, Reader


@dataclass(frozen=True, slots=True)
class Began:
    """A prompt is encoded."""

    prompt: int  # tokens
    cached: int  # of them: they were encoded already


@dataclass(frozen=True, slots=True)
class Canvas:
    """A step of an answer."""

    choice: int
    step: Step


@dataclass(frozen=True, slots=True)
class Said:
    """More of an answer, never taken back."""

    choice: int
    delta: Delta


@dataclass(frozen=True, slots=True)
class Ended:
    """An answer is over."""

    choice: int
    reason: str  # stop, length, tool_calls
    tokens: int
    figures: dict[str, Any]


Told: TypeAlias = Began | Canvas | Said | Ended
Turns: TypeAlias = Generator[Told | None, None, None]  # None: a turn with nothing to tell


def answers(work: Work, session: Session) -> Turns:
    """All answers to all prompts. Closed, it stops within one step, and the session can be used again."""
    for at, prompt in enumerate(work.prompts):
        cached = session.shared(prompt)
        session.rewind(cached)
        for start in range(cached, len(prompt), CHUNK):
            session.encode(prompt[start : start + CHUNK])
            yield None
        yield Began(len(prompt), cached)
        for i in range(work.n):
            yield from _answer(work, session, prompt, work.seed + i, at * work.n + i)


def _answer(work: Work, session: Session, prompt: list[int], seed: int, choice: int) -> Turns:
    reader = Reader(session.model.tokenizer, work.thinking, work.marks)
    stops = Stops(work.stops)
    tokens = steps = 0
    calls, converged, reason, fault = False, True, "stop", None
    with closing(session.stream(prompt, seed=seed, **work.settings)) as events:
        for event in events:
            deltas: list[Delta] = []
            if isinstance(event, Step):
                yield Canvas(choice, event) if work.events else None
            elif isinstance(event, Block):
                steps, converged, fault = steps + event.steps, converged and event.converged, fault or event.fault
                # One by one where the answer may end at any of them: those behind do not count.
                for ids in ([token] for token in event.ids) if work.stops else [event.ids]:
                    deltas += stops.hear(reader.feed(ids))
                    tokens += len(ids)
                    if stops.hit:
                        break
            else:
                deltas += stops.hear(reader.finish())
                seed, reason = event.seed, event.finish_reason
            if not isinstance(event, (Step, Block)) and not stops.hit:
                deltas += stops.finish()
            for delta in _joined(deltas):
                calls = calls or (work.calls and delta.kind == "call")
                yield Said(choice, delta)
            if stops.hit:
                reason = "stop"
                break
    figures = {"seed": seed, "steps": steps, "converged": converged, "fault": fault}
    yield Ended(choice, "tool_calls" if calls and reason == "stop" else reason, tokens, figures)


def _joined(deltas: list[Delta]) -> list[Delta]:
    """Neighbours of a kind as one."""
    joined: list[Delta] = []
    for delta in deltas:
        if joined and joined[-1].kind == delta.kind != "call":
            joined[-1] = Delta(delta.kind, joined[-1].text + delta.text)
        else:
            joined.append(delta)
    return joined
