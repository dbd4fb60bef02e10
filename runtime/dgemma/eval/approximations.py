"""Measures each approximation that makes a model faster: what it costs, and what it gains.

It is on against off at the same tasks and seeds.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dgemma.eval.baseline import Say
from dgemma.eval.fidelity import compare, make_base
from dgemma.eval.results import Attempt, Log, Score, Variant, run, score
from dgemma.eval.sweep import said
from dgemma.eval.tasks import Task
from dgemma.files.identity import identity
from dgemma.model import Model
from dgemma.options import efforts, options

PROMPTS = 8  # prompts that a divergence is measured on
DRAWS = 1000  # samples of the tasks that an interval is made from
HOLES = ("pins_conditioned",)  # options that do nothing where a task has no holes


@dataclass(frozen=True, slots=True)
class Approximation:
    """Two ways to run a model, with an approximation and without: Model's arguments, and generation options."""

    name: str
    what: str
    default: bool  # whether it is on unless it is turned off
    off: dict[str, Any]
    on: dict[str, Any]
    options: dict[str, Any]  # generation options that turn it on; to turn it off they are left out
    logits: bool = False  # whether it changes the logits of a canvas that is given, so that a divergence tells its cost


@dataclass(frozen=True, slots=True)
class Comparison:
    """The cost and the gain of one approximation."""

    name: str
    what: str
    default: bool
    off: Score
    on: Score
    same: float  # share of the answers that are the same, to the letter
    kl_mean: float | None  # KL(off || on) in nats, where it changes logits
    times_as_fast: float  # work() off over on
    times_low: float  # ends of its 95 % interval
    times_high: float

    def told(self) -> dict[str, Any]:
        return asdict(self)


# The list of approximations.
APPROXIMATIONS = [
    Approximation(
        "activations of 8 bits",
        "activations are rounded before they meet quantised weights (off: --exact, which conditions densely too)",
        True,
        {"exact": True},
        {},
        {},
        logits=True,
    ),
    Approximation(
        "conditioning on likely tokens",
        "a row's next condition is summed over its likely tokens where it is off by 0.001 of its length at most",
        True,
        {"tolerance": 0.0},
        {},
        {},
    ),
    Approximation(
        "conditioning within 0.05",
        "the same, where it is off by 0.05 at most",
        False,
        {},
        {"tolerance": 0.05},
        {},
    ),
]


def optional(tasks: Sequence[Task]) -> list[Approximation]:
    """Return the options of options.def that the published sampler does not have.

    Each has the value that an effort gives it.
    """
    names, holes = list(options()), any(task.fill for task in tasks)
    out = []
    for name in names[names.index("seed") + 1 :]:
        if name in HOLES and not holes:
            continue
        values = [effort.settings[name] for effort in efforts().values() if effort.settings.get(name)]
        value = values[0] if values else True if options()[name].flag else None
        if value is not None:
            what = options()[name].help
            out.append(Approximation(f"{name}={said(value)}", what, False, {}, {}, {name: value}))
    return out


def comparisons(
    path: str | os.PathLike[str],
    tasks: Sequence[Task],
    log: Log,
    *,
    seeds: int,
    seed: int,
    model: dict[str, Any],
    say: Say = lambda line: None,
) -> list[Comparison]:
    """Measure each of APPROXIMATIONS and of optional() on one file.

    model: arguments of Model for all of them.

    All ways to run it take turns at each task, so that no drift of the machine is taken for a gain.
    """
    known, each_of = identity(path), [*APPROXIMATIONS, *optional(tasks)]
    variants: dict[str, Variant] = {}
    models: dict[str, Model] = {}
    with ExitStack() as stack:
        for each in each_of:
            for more, options in ((each.off, {}), (each.on, each.options)):
                if (name := way(more, {})) not in models:
                    models[name] = stack.enter_context(Model(path, **{**model, **more}))
                one = Variant.of(way(more, options), models[name], known, {**model, **more}, options)
                variants.setdefault(one.name, one)
        tried = run(list(variants.values()), tasks, log, seeds=seeds, seed=seed, say=say)
    out = []
    for each in each_of:
        apart = None
        if each.logits:
            base = make_base(path, count=PROMPTS, seed=seed, model={**model, **each.off}, say=say)
            apart = compare(path, base, model={**model, **each.on}, say=say).kl_mean
        out.append(judged(each, tried[way(each.off, {})], tried[way(each.on, each.options)], apart))
    return out


def way(arguments: dict[str, Any], options: dict[str, Any]) -> str:
    """Return the name of a way to run a model among others."""
    return ", ".join(f"{name}={value}" for name, value in (arguments | options).items())


def judged(each: Approximation, off: Sequence[Attempt], on: Sequence[Attempt], apart: float | None) -> Comparison:
    same = sum(a.text == b.text for a, b in zip(off, on, strict=True)) / len(off)
    return Comparison(
        each.name, each.what, each.default, score(off, "all"), score(on, "all"), same, apart, *faster(off, on)
    )


def faster(off: Sequence[Attempt], on: Sequence[Attempt]) -> tuple[float, float, float]:
    """Return how many times as fast one way is, and the ends of a 95 % interval.

    The ends are percentiles over tasks drawn again, in pairs (Efron and Tibshirani 1993, An Introduction to the
    Bootstrap, chapter 13).
    """
    n = len(off)
    draws = np.vstack([np.arange(n), np.random.default_rng(0).integers(0, n, (DRAWS, n))])
    first, *others = work(off, draws) / np.maximum(work(on, draws), 1e-9)
    low, high = np.percentile(others, (2.5, 97.5))
    return float(first), float(low), float(high)


def work(tried: Sequence[Attempt], draws: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return the seconds that the steps of answers take where nothing else slows them down.

    draws: rows of answers by their places; there is a figure for each row: all steps, times the median of the seconds
    of one. A busy machine's outliers do not count, as they would in a sum.
    """
    steps = np.array([each.steps for each in tried], np.float64)
    each_step = np.array([each.seconds for each in tried]) / steps
    seconds: npt.NDArray[np.float64] = steps[draws].sum(axis=1) * np.median(each_step[draws], axis=1)
    return seconds
