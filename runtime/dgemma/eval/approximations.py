"""Measures the cost and the gain of each approximation that makes a model faster.

The model does the same tasks with the same seeds, with the approximation on and off.
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

PROMPTS = 8  # prompts for measuring a divergence
DRAWS = 1000  # bootstrap samples of the tasks for an interval
HOLES = ("pins_conditioned",)  # options that have an effect only in tasks with holes


@dataclass(frozen=True, slots=True)
class Approximation:
    """An approximation, and how to run a model with it and without it."""

    name: str
    what: str  # a description
    default: bool  # whether it is on by default
    off: dict[str, Any]  # arguments of Model without it
    on: dict[str, Any]  # arguments of Model with it
    options: dict[str, Any]  # generation options that turn it on; without them it is off
    logits: bool = False  # whether it changes the logits of a given canvas, so that a divergence measures its cost


@dataclass(frozen=True, slots=True)
class Comparison:
    """The cost and the gain of one approximation."""

    name: str
    what: str
    default: bool
    off: Score
    on: Score
    same: float  # share of the answers that are exactly the same
    kl_mean: float | None  # mean KL(off || on) in nats; None where the approximation does not change logits
    times_as_fast: float  # work() without it over work() with it
    times_low: float  # lower end of the 95 % interval of times_as_fast
    times_high: float  # upper end of this interval

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
    """Return an Approximation for each option of options.def that the published sampler does not have.

    The option's value is the one that an effort sets.
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

    Each task is done in all variants before the next task, so that a change of the machine's speed affects all alike.
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
        divergence = None
        if each.logits:
            base = make_base(path, count=PROMPTS, seed=seed, model={**model, **each.off}, say=say)
            divergence = compare(path, base, model={**model, **each.on}, say=say).kl_mean
        out.append(judged(each, tried[way(each.off, {})], tried[way(each.on, each.options)], divergence))
    return out


def way(arguments: dict[str, Any], options: dict[str, Any]) -> str:
    """Return the name of a variant: its arguments and options as text."""
    return ", ".join(f"{name}={value}" for name, value in (arguments | options).items())


def judged(each: Approximation, off: Sequence[Attempt], on: Sequence[Attempt], divergence: float | None) -> Comparison:
    same = sum(a.text == b.text for a, b in zip(off, on, strict=True)) / len(off)
    return Comparison(
        each.name, each.what, each.default, score(off, "all"), score(on, "all"), same, divergence, *faster(off, on)
    )


def faster(off: Sequence[Attempt], on: Sequence[Attempt]) -> tuple[float, float, float]:
    """Return how many times as fast `on` is as `off`, and the ends of a 95 % interval.

    The ends are percentiles over bootstrap samples of the pairs of attempts (Efron and Tibshirani 1993, An Introduction
    to the Bootstrap, chapter 13).
    """
    n = len(off)
    draws = np.vstack([np.arange(n), np.random.default_rng(0).integers(0, n, (DRAWS, n))])
    first, *others = work(off, draws) / np.maximum(work(on, draws), 1e-9)
    low, high = np.percentile(others, (2.5, 97.5))
    return float(first), float(low), float(high)


def work(tried: Sequence[Attempt], draws: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return robust estimates of the seconds that samples of attempts take.

    draws: samples, one per row: indices of attempts. The estimate for a row is the number of all its steps times the
    median seconds of a step, so that outliers on a busy machine do not count, as they would in a sum.
    """
    steps = np.array([each.steps for each in tried], np.float64)
    each_step = np.array([each.seconds for each in tried]) / steps
    seconds: npt.NDArray[np.float64] = steps[draws].sum(axis=1) * np.median(each_step[draws], axis=1)
    return seconds
