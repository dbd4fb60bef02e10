"""Times a model: the parts of its denoising steps and the encoding of prompts; measures the memory that it takes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np

from dgemma.bench.device import TYPICAL, time_device
from dgemma.bench.flops import file_formats, pass_operations, step_bytes, step_operations
from dgemma.bench.machine import Machine, Memory, apart, best_of, measure_machine, peak_resident, told
from dgemma.bench.profile import Profile, parts, steps_of
from dgemma.model import Model, Traffic
from dgemma.session import Session

SCHEMA = 1  # version of the JSON
ENCODE = 256  # tokens of the prompt whose encoding is timed
FLAT = 0.6  # the middle of the published temperatures; random logits are almost uniform at it


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of several runs."""

    runs: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    def told(self) -> dict[str, Any]:
        return {"median": self.median, "min": min(self.runs), "max": max(self.runs), "runs": self.runs}


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a step or of an encoding: its time and its work."""

    name: str
    covers: str  # what belongs to the part
    seconds: Times
    operations: int | None  # None: they are not counted for this part
    bytes: int | None  # bytes of weights
    certain: bool = True  # False: `operations` is an upper bound


@dataclass(slots=True)
class Steps:
    """Denoising steps with self-conditioning, at one temperature."""

    temperature: float
    seconds: Times
    parts: list[Part]
    certainty: float  # the mean of e^entropy (perplexity): the number of tokens that are likely at a position
    stream: dict[str, float] | None = None  # under a budget: bytes and seconds of reading per step, and bytes/s


@dataclass(slots=True)
class Encoding:
    """The time that encoding a prompt takes, and the operations in it."""

    tokens: int
    seconds: Times
    operations: int


@dataclass(slots=True)
class Report:
    """All results of a run; bench.report and bench.plot show them."""

    machine: Machine
    settings: dict[str, Any]
    model: dict[str, Any]
    steps: Steps
    flat: Steps | None
    encoding: list[Encoding]
    memory: dict[str, int | None]
    comparison: dict[str, Any] | None = None
    together: dict[str, Any] | None = None
    behind: dict[str, Any] | None = None  # steps after a short and after a long prompt
    budget: dict[str, Any] | None = None
    device: dict[str, Any] | None = None
    canvas: dict[str, float] = field(default_factory=dict)

    @property
    def first(self) -> float:
        """Seconds of a canvas's first step, which has no self-conditioning."""
        condition = next(part for part in self.steps.parts if part.name == "condition")
        return self.steps.seconds.median - condition.seconds.median

    def told(self) -> dict[str, Any]:
        """Return all results for JSON."""
        return {
            "schema": SCHEMA,
            "machine": told(self.machine),
            "clock_hz": self.machine.clock_hz,
            "peaks": [
                {"kind": p.kind, "instructions": p.instructions, "one": p.one, "all": p.all} for p in self.machine.peaks
            ],
            "settings": self.settings,
            "model": self.model,
            "step": steps_told(self, self.steps),
            "flat": steps_told(self, self.flat) if self.flat else None,
            "encoding": [
                {
                    "tokens": e.tokens,
                    "seconds": e.seconds.told(),
                    "tokens_per_second": e.tokens / e.seconds.median,
                    "operations_per_second": e.operations / e.seconds.median,
                }
                for e in self.encoding
            ],
            "canvas": self.canvas,
            "memory": self.memory,
            "budget": self.budget,
            "device": self.device,
            "against": self.comparison,
            "together": self.together,
            "behind": self.behind,
        }


def steps_told(report: Report, steps: Steps) -> dict[str, Any]:
    rows = []
    for part in steps.parts:
        row: dict[str, Any] = {"part": part.name, "covers": part.covers, "seconds": part.seconds.told()}
        row |= {"operations": part.operations, "exact": part.certain, "bytes": part.bytes}
        row |= rates(report.machine, part)
        rows.append(row)
    return {
        "temperature": steps.temperature,
        "exp_entropy": steps.certainty,
        "seconds": steps.seconds.told(),
        "bytes": sum(part.bytes or 0 for part in steps.parts),
        "parts": rows,
    }


def rates(machine: Machine, part: Part) -> dict[str, float | None]:
    """Return a part's operations per second, per cycle and thread, and as a share of the machine's limits.

    A value that is not known is None.
    """
    seconds = part.seconds.median
    speed = part.operations / seconds if part.operations and seconds and part.certain else None
    out: dict[str, float | None] = {"operations_per_second": speed}
    out["operations_per_cycle"] = speed / machine.clock_hz / machine.threads if speed else None
    for kind in ("int8", "float32"):
        best = machine.best(kind)
        out[f"share_of_{kind}"] = speed / best if speed and best else None
    return out


def bench(
    model: Model,
    *,
    runs: int,
    prompt: int,
    temperature: float,
    flat: bool,
    seed: int,
    about: dict[str, Any],
    settings: dict[str, Any],
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Measure a model.

    say: called with a line about the current work. about, settings: more facts on the model and the run for the report.
    """
    say("the machine's peaks")
    measure = measure_machine if model.ram is None else partial(apart, measure_machine)
    machine = measure(model.threads)
    random = np.random.default_rng(seed)
    ids = random.integers(5, model.config.n_vocab, max(prompt, ENCODE), dtype=np.int32)
    context = min(int(model.config.context_length), max(prompt, ENCODE) + int(model.config.canvas_length))
    with Memory() as memory, model.session(context) as session, Profile(model) as profile:
        lengths = sorted({prompt, min(ENCODE, session.context)})
        encoding = [time_encoding(session, ids[:n], runs, say) for n in lengths]
        session.rewind(0)
        session.encode(ids[:prompt])
        steps = time_steps(session, profile, temperature, runs, seed, say)
        loose = time_steps(session, profile, FLAT, min(runs, 2), seed, say) if flat else None
    weights = sum(part.bytes or 0 for part in steps.parts)
    timed: dict[str, Any] = dict(prompt=prompt, temperature=temperature, runs=runs, seed=seed, say=say)
    device = time_device(model, weights=weights, **timed)
    most = memory.peak["all"] if memory.peak else peak_resident()
    budget = None if steps.stream is None else {"ram": model.ram, "most_ever": peak_resident(), **steps.stream}
    say("the machine's peaks, again")
    machine = best_of(machine, measure(model.threads))
    report = Report(
        machine=machine,
        settings={**settings, "runs": runs, "prompt": prompt, "seed": seed},
        model={**about, "backend": model.backend, "threads": model.threads, "bytes": file_formats(model)},
        steps=steps,
        flat=loose,
        encoding=encoding,
        memory={
            "peak": most,
            "anonymous": memory.peak["anonymous"] if memory.peak else None,
            "file": memory.peak["file"] if memory.peak else None,
        },
        budget=budget,
        device=device,
    )
    seconds = report.first + (TYPICAL - 1) * steps.seconds.median
    n = model.config.canvas_length
    report.canvas = {"tokens": n, "steps": TYPICAL, "first_step_seconds": report.first}
    report.canvas |= {"seconds": seconds, "tokens_per_second": n / seconds}
    return report


def time_encoding(session: Session, ids: np.ndarray, runs: int, say: Callable[[str], None]) -> Encoding:
    """Time the encoding of ids from an empty cache, without logits."""
    times = []
    for run in range(runs + 1):
        say(f"encoding {len(ids)} tokens, {'warm-up' if run == 0 else f'run {run} of {runs}'}")
        session.rewind(0)
        started = perf_counter()
        session.encode(ids)
        times.append(perf_counter() - started)
    work = pass_operations(session.model.config, len(ids), 0, causal=True, output=False)
    return Encoding(len(ids), Times(times[1:]), sum(work.values()))


def time_steps(
    session: Session, profile: Profile, temperature: float, runs: int, seed: int, say: Callable[[str], None]
) -> Steps:
    """Time the steps of one canvas that never converges.

    The first two steps are not timed: the first has no self-conditioning, and the second is a warm-up.
    """
    model = session.model
    laps: dict[str, list[float]] = {part: [] for part in (*parts(), "rest")}
    whole, certainty, moved = [], [], [model.traffic]
    say(f"a step at temperature {temperature:g}, warm-up")
    started = perf_counter()
    with closing(steps_of(session, profile, temperature, runs + 2, seed)) as events:
        for index, (step, lap) in enumerate(events):
            seconds = perf_counter() - started
            if index >= 2:
                whole.append(seconds)
                lap["rest"] = max(0.0, seconds - sum(lap.values()))
                for part, took in lap.items():
                    laps[part].append(took)
                certainty.append(float(np.exp(step.entropy).mean()))
            moved.append(model.traffic)
            say(f"a step at temperature {temperature:g}, {'warm-up' if index < 1 else f'run {index} of {runs}'}")
            started = perf_counter()
    operations, sizes = step_operations(model.config, session.length), step_bytes(model)
    covers = {**parts(), "rest": "what is no operation: bookkeeping of the sampler and of Python"}
    rows = [
        Part(name, covers[name], Times(times), operations.get(name), sizes.get(name), certain=name != "condition")
        for name, times in laps.items()
    ]
    return Steps(temperature, Times(whole), rows, float(np.mean(certainty)), stream_of(moved[2:]))


def stream_of(moved: Sequence[Traffic | None]) -> dict[str, float] | None:
    """Return the bytes and seconds of reading per step under a memory budget; None without a budget.

    moved: the model's counters (Model.traffic) before the first step and after each step.
    """
    first, last = moved[0], moved[-1]
    if first is None or last is None:
        return None
    steps = len(moved) - 1
    reading = last.reading - first.reading
    told = {name: (getattr(last, name) - getattr(first, name)) / steps for name in ("read", "copied", "waited")}
    told |= {name: getattr(last, name) for name in ("resident", "ring", "streamed", "experts")}
    return told | {"disk": (last.read - first.read) / reading if reading else 0.0}


def without_table(steps: Steps) -> Sequence[Part]:
    """Return the parts of the backbone: no head, no self-conditioning."""
    return [part for part in steps.parts if part.name not in ("head", "condition", "rest")]
