"""Reads the library's profile: the seconds of each part of a pass."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from functools import cache
from types import TracebackType
from typing import Any

from dgemma._native import ffi, lib
from dgemma.errors import check, new_error
from dgemma.events import Step
from dgemma.model import Model
from dgemma.session import Session


@cache
def parts() -> dict[str, str]:
    """Return the parts of profile_parts.def, with their descriptions."""
    table: dict[str, str] = {}
    out = ffi.new("dg_part *")
    while lib.dg_part_at(len(table), out):
        table[ffi.string(out.name).decode()] = ffi.string(out.covers).decode()
    return table


def steps_of(
    session: Session, profile: Profile, temperature: float, steps: int, seed: int = 0
) -> Generator[tuple[Step, dict[str, float]], None, None]:
    """Yield each step of one canvas that never converges, with the seconds of its parts."""
    profile.lap()
    with closing(endless(session, temperature, steps, seed)) as events:
        for step in events:
            yield step, profile.lap()


def endless(session: Session, temperature: float, steps: int, seed: int = 0) -> Generator[Step, None, None]:
    """Yield the steps of a canvas that never converges."""
    options: dict[str, Any] = dict(
        t_min=temperature, t_max=temperature, confidence=0.0, stability=0, max_tokens=1, seed=seed
    )
    with closing(session.stream(steps=steps, **options)) as events:
        for _ in range(steps):
            step = next(events)
            assert isinstance(step, Step)
            yield step


class Profile:
    """Times the operations of a model during a with block. No session may be working when it begins or ends."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._last = dict.fromkeys(parts(), 0.0)

    def __enter__(self) -> Profile:
        error = new_error()
        check(lib.dg_profile_start(self._pointer(), error), error)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        lib.dg_profile_stop(self._pointer())

    def _pointer(self) -> Any:
        return self._model._open_handle().pointer

    def lap(self) -> dict[str, float]:
        """Return the seconds of each part since the last call."""
        entry, i = ffi.new("dg_profile_entry *"), 0
        now = dict.fromkeys(parts(), 0.0)
        while lib.dg_profile_read(self._pointer(), i, entry):
            now[ffi.string(entry.part).decode()] += entry.seconds
            i += 1
        since = {part: now[part] - self._last[part] for part in now}
        self._last = now
        return since
