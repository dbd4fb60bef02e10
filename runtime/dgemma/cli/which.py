"""Which file of a repository a machine can use: predicted from one header, before any download."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import click

from dgemma.bench.plan import Machine, plan
from dgemma.cli.files import standard_input
from dgemma.cli.plan import machine_of
from dgemma.errors import Error, FormatError, MemoryBudgetError
from dgemma.hub.choice import Choice, Choices, choices
from dgemma.hub.models import model_header
from dgemma.model import Model
from dgemma.ui.terminal import is_terminal, one_line, tell
from dgemma.units import size_text

SLOWEST = 60.0  # seconds of a usable step at most: 256 tokens in 16 of them take a quarter of an hour
SLOWER = 1.5  # times the fastest file's step at most
ASKED = 10_000_000_000  # bytes of a download that is asked about before it begins


@dataclass(frozen=True)
class Verdict:
    """Whether a machine can use a file of a repository, and how fast it would be."""

    choice: Choice
    seconds: float | None = None  # predicted, of a step
    streams: bool = False  # a part of it is read from the disk at every step
    refusal: str | None = None  # why the file is not used; None: it can be

    @property
    def usable(self) -> bool:
        return self.refusal is None


def verdicts(
    found: Choices,
    machine: str | None = None,
    ram: int | None = None,
    vram: int | None = None,
    context: int | None = None,
) -> list[Verdict]:
    """Return a verdict on each file. One header is read; the others' plans are made from it by their sizes."""
    judged = {choice.file: _at_once(choice, found) for choice in found.files}
    for base in sorted(found.files, key=lambda choice: (choice.to_come > 0, choice.bytes or 0)):
        if judged[base.file] is not None or not base.bytes:
            continue
        try:
            with model_header(base.name) as header, Model(header.path, backend="cpu", threads=1) as model:
                where = machine_of(header.path, header.is_whole, machine)
                for choice in found.files:
                    if judged[choice.file] is None:
                        scale = (choice.bytes or base.bytes) / base.bytes
                        judged[choice.file] = _planned(choice, model, where, scale, ram, vram, context)
            break
        except FormatError as problem:
            judged[base.file] = Verdict(base, refusal=str(problem).rpartition(f"{base.file}: ")[2])
    unknown = "nothing is known of its size"
    return _compared([judged[choice.file] or Verdict(choice, refusal=unknown) for choice in found.files])


def _compared(judged: list[Verdict]) -> list[Verdict]:
    """Refuse files that are read from the disk where another is not, and those much slower than the fastest."""
    fastest = min((verdict.seconds for verdict in judged if verdict.seconds is not None), default=0.0)
    fits = any(verdict.usable and not verdict.streams for verdict in judged)

    def refusal(verdict: Verdict) -> str | None:
        if not verdict.usable or verdict.seconds is None:
            return verdict.refusal
        if fits and verdict.streams:
            return f"{verdict.seconds:.3g} s a step, and read from the disk at each, which another is not"
        slow = verdict.seconds > SLOWER * fastest
        return f"{verdict.seconds:.3g} s a step, more than {SLOWER:g} times the fastest file's" if slow else None

    return [replace(verdict, refusal=refusal(verdict)) for verdict in judged]


def _at_once(choice: Choice, found: Choices) -> Verdict | None:
    """Return the verdict on a file that nothing more need be known of."""
    if choice.unread:
        return Verdict(choice, refusal=f"this build does not read {choice.type}")
    if found.free is not None and choice.to_come > found.free[1]:
        return Verdict(choice, refusal=f"more than the {size_text(found.free[1])} that are free on the disk")
    return None


def _planned(
    choice: Choice,
    model: Model,
    machine: Machine,
    scale: float,
    ram: int | None,
    vram: int | None,
    context: int | None,
) -> Verdict:
    try:
        found = plan(model, machine, ram, vram, context, scale)
    except MemoryBudgetError as problem:
        return Verdict(choice, refusal=str(problem))
    streams = any(way.lives == "disk" and sum(way.blocks) for way in found.ways)
    slow = f"{found.seconds:.3g} s a step, more than {SLOWEST:g}" if found.seconds > SLOWEST else None
    return Verdict(choice, found.seconds, streams, slow)


def table(found: Choices, judged: Sequence[Verdict] | None) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the columns and rows of a list of files, with verdicts if there are any."""
    rows = []
    for i, choice in enumerate(found.files):
        size = size_text(choice.bytes) if choice.bytes is not None else "?"
        row = (choice.type or "?", size, choice.file)
        verdict = judged[i] if judged else _at_once(choice, found)
        seconds = f"{verdict.seconds:.3g} s" if verdict and verdict.seconds is not None else ""
        notes = [verdict.refusal] if verdict and verdict.refusal else ["usable"] if verdict else []
        notes += ["in the cache"] if not choice.to_come else []
        rows.append((*row, *([seconds] if judged else []), ", ".join(notes)))
    return ("type", ">size", "file", *([">a step"] if judged else []), ""), rows


def as_json(found: Choices, judged: Sequence[Verdict] | None) -> dict[str, Any]:
    free = None if found.free is None else {"folder": str(found.free[0]), "bytes": found.free[1]}
    files: list[dict[str, Any]] = []
    for i, choice in enumerate(found.files):
        told: dict[str, Any] = {name: getattr(choice, name) for name in ("name", "file", "type", "bytes", "to_come")}
        verdict = judged[i] if judged else _at_once(choice, found)
        told["refusal"] = verdict.refusal if verdict else None
        files.append(told | ({"usable": judged[i].usable, "seconds": judged[i].seconds} if judged else {}))
    return {"repository": found.name, "free": free, "files": files}


# ---- For dg-run ----


def choose(model: str, command: str, ram: int | str | None, yes: bool) -> str:
    """Return the MODEL, or of a repository without a type the largest file that this machine's plan calls usable.

    Where files are in the cache, it is the largest of those. A line on standard error says why. On a terminal a large
    download is asked about first, unless `yes`. Raises Error where none is usable, with all of them.
    """
    found = choices(model, least=1)
    if found is None:
        return model
    if len(found.files) == 1:
        chosen = found.files[0]
    elif here := [choice for choice in found.files if not choice.to_come]:
        chosen = here[0]
        tell(
            one_line(f"{command}: {chosen.name} is in the cache; dg-info {found.name} --plan tells of the other files")
        )
    else:
        judged = verdicts(found, ram=ram if isinstance(ram, int) else None)
        best = next((verdict for verdict in judged if verdict.usable), None)
        if best is None:
            every = "; ".join(map(_line, judged))
            raise Error(f"{found.name}: none of its files is usable here; one runs all the same by its type: {every}")
        larger = judged[: judged.index(best)]
        why = f"; not {'; not '.join(map(_line, larger))}" if larger else ""
        chosen = best.choice
        tell(one_line(f"{command}: {chosen.name} is the largest of {len(judged)} that is usable: {_line(best)}{why}"))
    if chosen.to_come >= ASKED and not yes:
        _ask(chosen, found)
    return chosen.name


def _line(verdict: Verdict) -> str:
    choice = verdict.choice
    size = size_text(choice.bytes) if choice.bytes is not None else "of unknown size"
    why = verdict.refusal or f"{verdict.seconds:.3g} s a step predicted"
    return f"{choice.type or choice.file} ({size}): {why}"


def _ask(choice: Choice, found: Choices) -> None:
    """Ask before a download, where somebody can answer. Raises Error for a no."""
    if not (is_terminal(standard_input()) and is_terminal(sys.stderr)):
        return
    where = f" into {found.free[0]}, which has {size_text(found.free[1])}" if found.free else ""
    if not click.confirm(f"Fetch {size_text(choice.to_come)}{where}?", default=True, err=True):
        raise Error(f"{choice.name} was not fetched")
