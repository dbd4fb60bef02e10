"""Compares one step for the canvases of several sessions with the same steps one after the other.

Both are timed in the same run, alternately, and split into the parts of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from time import perf_counter
from typing import Any

import numpy as np

from dgemma._native import ffi, lib
from dgemma.bench.profile import Profile, parts
from dgemma.errors import check, new_error
from dgemma.model import Model
from dgemma.native.handle import Handle
from dgemma.options import sampling_for
from dgemma.session import Session

WARM = 2  # warm-up steps of a canvas: the first has no self-conditioning


def together(
    model: Model, canvases: int, *, runs: int, prompt: int, temperature: float, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Time `runs` steps of several canvases, one by one and all together.

    Each session has a prompt and a canvas of its own. Returns the ratio of the seconds (all together over one by one)
    of each run, and for both the median seconds of each part.
    """
    options = dict(t_min=temperature, t_max=temperature, confidence=0.0, stability=0, max_tokens=1)
    laps: dict[str, list[dict[str, float]]] = {"apart": [], "together": []}
    with ExitStack() as stack:
        profile = stack.enter_context(Profile(model))
        groups: dict[str, list[Any]] = {}
        for name in laps:
            groups[name] = []
            for i in range(canvases):
                random = np.random.default_rng([seed, i])
                session = stack.enter_context(model.session(prompt + int(model.config.canvas_length)))
                session.encode(random.integers(5, model.config.n_vocab, prompt, dtype=np.int32))
                sampling = sampling_for(model._open_handle().pointer, dict(options, steps=runs + WARM, seed=seed + i))
                groups[name].append(stack.enter_context(_generator(session, sampling)))
        for index in range(runs + WARM):
            say(f"{canvases} canvases, {'warm-up' if index < WARM else f'run {index - WARM + 1} of {runs}'}")
            for name, generators in groups.items():
                profile.lap()
                started = perf_counter()
                for some in [generators] if name == "together" else [[one] for one in generators]:
                    _step(some)
                lap = {"all": perf_counter() - started, **profile.lap()}
                if index >= WARM:
                    laps[name].append(lap)
    ratios = [b["all"] / a["all"] for a, b in zip(laps["apart"], laps["together"], strict=True)]
    rows = {
        part: {name: float(np.median([lap[part] for lap in runs_of])) for name, runs_of in laps.items()}
        for part in ("all", *parts())
    }
    return {"canvases": canvases, "ratio": float(np.median(ratios)), "ratios": ratios, "parts": rows}


class _generator:
    """A `dg_generator *` behind the tokens that the session has encoded; a context manager."""

    def __init__(self, session: Session, sampling: Any) -> None:
        out, error = ffi.new("dg_generator **"), new_error()
        with session._use() as pointer:
            check(lib.dg_generator_new(pointer, sampling, out, error), error)
            self._handle = Handle(out[0], lib.dg_generator_free, session._handle)

    def __enter__(self) -> Any:
        return self._handle.pointer

    def __exit__(self, *_: object) -> None:
        self._handle.close()


def _step(generators: list[Any]) -> None:
    """Run one denoising step for all canvases, in one pass."""
    error = new_error()
    events = ffi.new("dg_event[]", len(generators))
    check(lib.dg_generators_next(ffi.new("dg_generator *[]", generators), len(generators), events, error), error)
    assert all(event.kind == lib.DG_EVENT_STEP for event in events)
