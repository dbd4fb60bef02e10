"""Times a model on a GPU: steps, canvases, and under a memory budget also the queues of a step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from dgemma._native import ffi, lib
from dgemma.bench.profile import endless
from dgemma.events import Block
from dgemma.model import Model
from dgemma.session import Session

TYPICAL = 16  # steps of a canvas of the published model
WARM = 3  # warm-up steps: the first has no self-conditioning, the second is recorded as a CUDA graph
TRIES = 4  # further seeds to try: an answer of random tokens may end within its first canvas

Say = Callable[[str], None]


def rates_of(model: Model) -> dict[str, float] | None:
    """Measure the bytes per second of the GPU's memory and of copies to it; return None without a GPU."""
    out = ffi.new("dg_device_rates *")
    if not lib.dg_device_measure(model._open_handle().pointer, out):
        return None
    return {"memory": float(out.memory), "copies": float(out.copies)}


def time_device(
    model: Model, *, prompt: int, weights: int, temperature: float, runs: int, seed: int, say: Say
) -> dict[str, Any] | None:
    """Time steps and canvases without profiling, and calculate the floor of a step; return None without a GPU.

    weights: the bytes of weights that a step reads. The floor is the time to read them once.
    """
    rates = rates_of(model)
    if rates is None:
        return None
    n = int(model.config.canvas_length)
    ids = np.random.default_rng(seed).integers(5, model.config.n_vocab, prompt, dtype=np.int32)
    with model.session(min(int(model.config.context_length), prompt + 2 * n)) as session:
        session.encode(ids)
        told: dict[str, Any] = time_queues(session, temperature, runs, seed, say)
        canvas = time_canvas(session, temperature, runs, seed, say)
    told["rates"], told["weights"], told["vram"] = rates, weights, model.vram or 0
    told["floor"] = weights / rates["memory"] if rates["memory"] else 0.0
    told["canvas"] = canvas
    told["tokens_per_second"] = n / canvas if canvas else None
    return told


def time_queues(session: Session, temperature: float, runs: int, seed: int, say: Say) -> dict[str, Any]:
    """Time the queues of a step: copies, GPU and CPU.

    Steps are timed twice: as recorded CUDA graphs, and with timers on the queues, which is slower.
    """
    handle, out = session.model._open_handle().pointer, ffi.new("dg_overlap *")
    times = []
    for watched in (False, True):
        say(f"steps {'with their queues watched' if watched else 'recorded'}")
        lib.dg_overlap_watch(handle, False)
        times.append(laps_of(session, temperature, runs, seed, partial(lib.dg_overlap_watch, handle, watched)))
    lib.dg_overlap_read(handle, out)
    lib.dg_overlap_watch(handle, False)
    told = {name: getattr(out, name) / max(1, out.passes) for name in ("copied", "wall", "copying", "gpu", "cpu")}
    return told | {"seconds": median(times[0]), "runs": times[0], "watched": median(times[1])}


def laps_of(
    session: Session, temperature: float, runs: int, seed: int, warm: Callable[[], Any] = lambda: None
) -> list[float]:
    """Return the seconds of each step of one canvas. warm: called after the warm-up steps."""
    laps, started = [], perf_counter()
    with closing(endless(session, temperature, runs + WARM, seed)) as events:
        for index, _ in enumerate(events):
            laps.append(perf_counter() - started)
            if index == WARM - 1:
                warm()
            started = perf_counter()
    return laps[WARM:]


def time_canvas(session: Session, temperature: float, runs: int, seed: int, say: Say) -> float | None:
    """Time a canvas, from the end of one canvas to the end of the next: one encoding, and the steps of the next one.

    Returns the median; None where all answers end within their first canvas.
    """
    before, n = session.length, int(session.model.config.canvas_length)
    options: dict[str, Any] = dict(t_min=temperature, t_max=temperature, confidence=0.0, stability=0, steps=TYPICAL)
    if before + 2 * n > session.context:
        return None
    laps: list[float] = []
    for run in range(runs + TRIES):
        say(f"a canvas of {TYPICAL} steps and its encoding, run {len(laps) + 1} of {runs}")
        ends = []
        with closing(session.stream(max_tokens=3 * n, seed=seed + run, **options)) as events:
            for event in events:
                if isinstance(event, Block):
                    ends.append(perf_counter())
                if len(ends) == 2:
                    laps.append(ends[1] - ends[0])
                    break
        session.rewind(before)
        if len(laps) == runs:
            break
    return median(laps) if laps else None


def time_behind(
    model: Model, lengths: tuple[int, int], *, temperature: float, runs: int, seed: int, say: Say
) -> dict[str, Any]:
    """Time a step after a short prompt and after a long one, in one run."""
    seconds, random = [], np.random.default_rng(seed)
    for length in lengths:
        say(f"steps behind {length} tokens")
        with model.session(length + int(model.config.canvas_length)) as session:
            session.encode(random.integers(5, model.config.n_vocab, length, dtype=np.int32))
            seconds.append(median(laps_of(session, temperature, runs, seed)))
    return {"lengths": list(lengths), "seconds": seconds, "ratio": seconds[1] / seconds[0]}
