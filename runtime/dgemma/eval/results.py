"""Lets models do tasks, checks the answers, and logs each of them, so that a killed run can be resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from types import TracebackType
from typing import Any

from dgemma.chat.answer_parser import Reader
from dgemma.eval.baseline import Say
from dgemma.eval.checks import holds
from dgemma.eval.statistics import Share, mean_of, share_of
from dgemma.eval.tasks import Task
from dgemma.events import Result
from dgemma.files.line_log import HEX, Beginning, LineLog, literal
from dgemma.infill.fill import Filled
from dgemma.model import Model


@dataclass(frozen=True, slots=True)
class Attempt:
    """One answer to a task, with one seed."""

    run: str  # see Variant
    task: str
    id: str
    asked: str  # digest of the task: see Task.asked
    seed: int
    level: str
    right: bool
    steps: int
    converged: bool
    tokens: int
    seconds: float
    text: str  # the text that was checked

    @classmethod
    def read(cls, value: Any) -> Attempt:
        """Return an Attempt from its dict. Raises TypeError where fields or types are wrong."""
        kinds: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "bool": (bool,), "float": (int, float)}
        found = cls(**value)
        for field in fields(cls):
            if not isinstance(getattr(found, field.name), kinds[str(field.type)]):
                raise TypeError(f"{field.name} is no {field.type}")
        return found

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.run, self.task, self.id, self.seed


class Log:
    """The attempts so far; a context manager.

    With a path, they are read from this file, and each new one is added to it at once.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.tried: dict[tuple[str, str, str, int], Attempt] = {}
        self._file = LineLog(path, LINE, "dg-eval's results") if path is not None else None
        if self._file is not None:
            try:
                self._file.recover(lambda value: self._keep(Attempt.read(value)))
                self._file.mend()
            except BaseException:
                self._file.__exit__(None, None, None)
                raise

    def _keep(self, tried: Attempt) -> None:
        self.tried[tried.key] = tried

    def add(self, tried: Attempt) -> None:
        self._keep(tried)
        if self._file is not None:
            self._file.append(asdict(tried))

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if self._file is not None:
            self._file.__exit__(kind, value, at)


# The beginning of each line: the run (see Variant), whose first part is the digest of the model.
LINE = Beginning(*literal('{"run": "[\\"'), *HEX, *literal('\\", '))


@dataclass(frozen=True, slots=True)
class Variant:
    """A model and the generation options that it is run with."""

    name: str
    model: Model
    run: str  # its key in a log: the file's digest, the backend, all arguments and options but the seed
    options: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        name: str,
        model: Model,
        known: Mapping[str, Any],
        arguments: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Variant:
        """Return a variant. known: identity() of the model's file. arguments: those that Model was opened with."""
        chosen = {each: value for each, value in model.settings(**(options or {})).items() if each != "seed"}
        kept = {
            each: value
            for each, value in (arguments or {}).items()
            if each not in ("threads", "backend") and value not in ("auto", "off")
        }
        run = json.dumps([known["sha256"][:16], model.backend, kept, chosen], sort_keys=True)
        return cls(name, model, run, options or {})


def run(
    variants: Sequence[Variant],
    tasks: Sequence[Task],
    log: Log,
    *,
    seeds: int = 1,
    seed: int = 0,
    say: Say = lambda line: None,
) -> dict[str, list[Attempt]]:
    """Do every task with `seeds` seeds from `seed` on, in each variant.

    Returns the attempts by name of the variant. Attempts that are in the log are not made again.

    Each task is done in all variants before the next one, and each time another variant is first: so a change of the
    machine's speed affects all of them alike.
    """
    out: dict[str, list[Attempt]] = {variant.name: [] for variant in variants}
    for each in range(seed, seed + seeds):
        for i, task in enumerate(tasks):
            for turn in range(len(variants)):
                variant = variants[(i + turn) % len(variants)]
                known = log.tried.get((variant.run, task.name, task.id, each))
                if known is None or known.asked != task.asked:
                    say(f"{task.name} {i + 1} of {len(tasks)}, seed {each}")
                    known = attempt(variant, task, each)
                    log.add(known)
                out[variant.name].append(known)
    return out


def attempt(variant: Variant, task: Task, seed: int) -> Attempt:
    model, options = variant.model, {**variant.options, "seed": seed}
    if task.fill:
        filled = model.fill(task.fill, None if task.prompt is None else task.ids(model), **options)
        tokens = sum(len(model.tokenizer.encode(hole)) for hole in filled.holes)
        return tried(variant, task, seed, filled, "\n".join(filled.holes), tokens)
    limit = {"max_tokens": model.config.canvas_length if task.max_tokens is None else task.max_tokens}
    prompt = task.ids(model)
    result = model.generate(prompt, **{**limit, **options})
    return tried(variant, task, seed, result, shown(model, prompt, result), len(result.ids))


def tried(variant: Variant, task: Task, seed: int, found: Result | Filled, text: str, tokens: int) -> Attempt:
    """Return the record of an attempt. text, tokens: the answer, and its number of tokens."""
    return Attempt(
        run=variant.run,
        task=task.name,
        id=task.id,
        asked=task.asked,
        seed=seed,
        level=task.level,
        right=holds(text, task.check),
        steps=found.steps,
        converged=found.converged,
        tokens=tokens,
        seconds=found.seconds,
        text=text,
    )


def shown(model: Model, prompt: Sequence[int], result: Result) -> str:
    """Return the text of an answer without its thought; calls of tools are as the model wrote them."""
    reader = Reader.behind(model.tokenizer, prompt)
    deltas = [*reader.feed(result.ids), *reader.finish()]
    return "".join(delta.text for delta in deltas if delta.kind != "thinking")


@dataclass(frozen=True, slots=True)
class Score:
    """Figures of the attempts at the tasks of one name, of one level or of all levels."""

    task: str
    level: str  # "": all levels
    right: Share  # right answers
    steps: float  # mean steps of an answer
    converged: float  # share of the answers that converged
    seconds: float  # mean seconds of an answer
    seconds_half: float  # half of the 95 % interval of the mean
    tokens_per_second: float


def score(tried: Sequence[Attempt], task: str, level: str = "") -> Score:
    """Return the Score of attempts, with this task and level as its name."""
    items: dict[str, list[bool]] = {}
    levels: dict[str, list[float]] = {}
    for each in tried:
        items.setdefault(f"{each.task} {each.id}", []).append(each.right)
        levels.setdefault(f"{each.task} {each.level}", []).append(each.seconds)
    seconds, half = mean_of(list(levels.values()))
    return Score(
        task=task,
        level=level,
        right=share_of(list(items.values())),
        steps=sum(each.steps for each in tried) / len(tried),
        converged=sum(each.converged for each in tried) / len(tried),
        seconds=seconds,
        seconds_half=half,
        tokens_per_second=sum(each.tokens for each in tried) / max(sum(each.seconds for each in tried), 1e-9),
    )


def scores(tried: Sequence[Attempt]) -> list[Score]:
    """Return scores by task and level, in the order of the attempts; after the levels of a task its total."""
    out = []
    for task in unique(each.task for each in tried):
        its = [each for each in tried if each.task == task]
        levels = unique(each.level for each in its)
        if levels != [""]:
            out += [score([each for each in its if each.level == level], task, level) for level in levels]
        out.append(score(its, task))
    return out


def unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
