"""Compares generation settings: how often answers are right, and how long they take."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from dgemma.errors import UsageError
from dgemma.eval.baseline import Say
from dgemma.eval.results import Log, Score, Variant, run, score
from dgemma.eval.tasks import Task
from dgemma.options import efforts, options

NEVER = ("seed", "max_tokens")  # options that cannot be varied: they are no settings of the sampler


@dataclass(frozen=True, slots=True)
class Point:
    """Figures of one setting; `score` is for all tasks together."""

    name: str  # "steps=8, t_min=0.4"
    settings: dict[str, Any]
    score: Score
    front: bool  # no other setting is both faster and more often right

    def told(self) -> dict[str, Any]:
        return asdict(self)


def read_axes(given: Iterable[str]) -> dict[str, list[Any]]:
    """Parse values of --sweep: "steps=8,16,entropy_bound=0.1,0.2" has two axes.

    Raises UsageError.
    """
    axes: dict[str, list[Any]] = {}
    for text in given:
        name = ""
        for part in re.split(r"\s*,\s*", text.strip()):
            begins, equals, value = part.rpartition("=")
            if equals:
                name = begins.strip().replace("-", "_")
                if name in axes:
                    raise UsageError(f"--sweep: {name} is given twice")
                axes[name] = []
            if not name:
                raise UsageError(f"--sweep {text}: expected OPTION=VALUE,VALUE,...")
            axes[name].append(read_value(name, value))
    for name, values in axes.items():
        if len(set(map(str, values))) != len(values):
            raise UsageError(f"--sweep: {name} has a value twice")
    return axes


def read_value(name: str, value: str) -> Any:
    """Parse a value of a generation option, or the name of an effort. Raises UsageError."""
    if name == "effort":
        if value not in efforts():
            raise UsageError(f"--sweep: effort: {value!r} is none of {', '.join(efforts())}")
        return value
    known = {each: option for each, option in options().items() if each not in NEVER}
    if name not in known:
        raise UsageError(f"--sweep: there is no option {name!r} to vary; there are {', '.join(known)}, effort")
    option = known[name]
    if option.flag:
        if value not in ("yes", "no"):
            raise UsageError(f"--sweep: {name}: {value!r} is not yes or no")
        return value == "yes"
    if option.choices:
        return option.read(value)
    try:
        number = float(value) if option.real else int(value)
    except ValueError:
        raise UsageError(f"--sweep: {name}: {value!r} is not a {'number' if option.real else 'whole number'}") from None
    return option.read(number)


def settings(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return every combination of values; the first axis varies slowest."""
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def named(setting: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={said(value)}" for name, value in setting.items())


def said(value: Any) -> str:
    return ("no", "yes")[value] if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def sweep(
    variants: Sequence[Variant], tasks: Sequence[Task], log: Log, *, seeds: int, seed: int, say: Say = lambda line: None
) -> list[Point]:
    """Do all tasks with all variants, and return a Point for each variant."""
    tried = run(variants, tasks, log, seeds=seeds, seed=seed, say=say)
    scored = [(variant, score(tried[variant.name], "all")) for variant in variants]
    best = front([(each.seconds, each.right.share) for _, each in scored])
    return [Point(variant.name, dict(variant.options), each, i in best) for i, (variant, each) in enumerate(scored)]


def front(points: Sequence[tuple[float, float]]) -> set[int]:
    """Return the indices of points (seconds, share) on the Pareto front: no point is better in one and as good in both.

    Less seconds are better, and a larger share is.
    """
    return {
        i
        for i, (seconds, share) in enumerate(points)
        if not any(s <= seconds and q >= share and (s, q) != (seconds, share) for s, q in points)
    }
