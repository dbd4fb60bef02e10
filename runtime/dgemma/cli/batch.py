"""dg-run --batch: answers each line of a file with a line of another file. A killed run can be resumed."""

from __future__ import annotations

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import click

import dgemma
from dgemma.batch import FIELDS, Batch
from dgemma.cli.display import count
from dgemma.cli.files import InputPath, OutputFile
from dgemma.errors import Error, UsageError
from dgemma.files import json_lines
from dgemma.files.identity import identity
from dgemma.files.line_log import DIGITS, HEX, Beginning, LineLog, literal
from dgemma.files.output import readable
from dgemma.model import Model
from dgemma.ui.progress import progress_bar

PACE = 30.0  # seconds between two progress messages where standard error is no terminal

_FIELDS = "\n".join(f"  {name:<10}{text}" for name, text in FIELDS.items())
# The beginning of each line of answers: the request that it answers.
LINE = Beginning(*literal('{"line": '), *DIGITS, *literal(', "input": "'), *HEX, *literal('", "run": {"'))

HELP = f"""With --batch FILE every line of FILE is a request, a JSON object, and -o OUT gets a line for each, in order:
"line" (its number in FILE), "input" (the beginning of its SHA-256), "run" (the model, settings and version that made
the answer), and the answer with its figures, or "error" with the reason. Each line is on the disk before the next
request begins. If the run is killed, the same command continues where it ended; lines of FILE that were changed are
answered again. An OUT of another model or other settings is refused: --restart starts from the first line. The exit
status is 1 where a line could not be answered. A request's fields:

\b
{_FIELDS}
  and generation options by their names in Python (max_tokens, seed, effort, ...), which win over the flags

\b
  dg-run model.gguf --batch prompts.jsonl -o answers.jsonl --max-tokens 512
"""


def batch_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --batch, -o and --restart."""
    restart = "For --batch: remove the answers that are in OUT, and start from the first line."
    command = click.option("--restart", "restart", is_flag=True, help=restart)(command)
    out = "The file for the answers of --batch. If it exists, the batch continues where it ended."
    command = click.option("-o", "--output", "output", type=OutputFile(None), metavar="OUT", help=out)(command)
    text = "Answer every line of this file: see above."
    return click.option("--batch", "batch", type=InputPath(), metavar="FILE", help=text)(command)


def run(model: Model, batch: Path, output: Path, quiet: bool, restart: bool, exact: bool, **defaults: Any) -> int:
    """Answer the requests that have no answer yet; return an exit status."""
    requests = [(number, _digest(line)) for number, line in json_lines.lines(batch)]
    total = len(requests)
    with Batch(model, **defaults) as answers, LineLog(output, LINE, "dg-run --batch") as out:
        made_by = {"batch": readable(os.path.abspath(batch)), **run_of(model, exact, **defaults)}
        resumed = _resume(out, requests, made_by, batch, output, restart)
        already = done = len(resumed.done)
        failed, tokens, started = resumed.failed, 0, time.monotonic()
        reported = started
        with progress_bar("answers", "lines") as bar:
            for place, (number, line) in islice(enumerate(json_lines.lines(batch)), total):
                if _digest(line) != requests[place][1]:
                    raise Error(f"{batch}, line {number}: it was changed meanwhile; the same command goes on from here")
                if place in resumed.done:
                    continue
                answer = answers.answer(line)
                out.append({"line": number, "input": _digest(line), "run": made_by, **answer})
                resumed.places.append(place)
                done, failed, tokens = done + 1, failed + ("error" in answer), tokens + answer.get("tokens", 0)
                if quiet:
                    continue
                if bar is not None:
                    bar(done, total)
                elif time.monotonic() - reported >= PACE:
                    reported = time.monotonic()
                    click.echo(f"{done} of {count(total, 'line')}, {reported - started:.0f} s", err=True)
        if resumed.places != list(range(total)) or resumed.moved:
            out.replace(_in_order(out, resumed.places, requests))
    seconds = time.monotonic() - started
    if not quiet:
        more = f", {already} were there already" if already else ""
        more += f", {resumed.changed} of changed lines were taken out" if resumed.changed else ""
        click.echo(
            f"{count(done - already, 'line')} answered{more}: {tokens} tokens, {seconds:.1f} s,"
            f" {tokens / max(seconds, 1e-9):.1f} tokens/s",
            err=True,
        )
    if failed:
        raise Error(f"{failed} of {count(done, 'line')} could not be answered; {output} says why")
    return 0


def run_of(model: Model, exact: bool, **defaults: Any) -> dict[str, Any]:
    """Return the model, settings and version that answers depend on, besides their requests."""
    chat = {name: defaults[name] for name in FIELDS if defaults.get(name) is not None}
    options = {name: value for name, value in defaults.items() if name not in FIELDS and value is not None}
    about = {"version": dgemma.__version__, "model": identity(model.path)["sha256"][:16]}
    return {**about, "backend": model.backend.split()[0], "exact": exact, **chat, **model.settings(**options)}


def _digest(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()[:16]


@dataclass(slots=True)
class Resumed:
    """The answers that OUT holds when a batch starts."""

    places: list[int | None]  # for each line its request, counted from 0; None: the request is no longer in FILE
    done: frozenset[int]  # requests that have an answer
    failed: int  # lines with an error instead of an answer
    changed: int  # lines whose request is no longer in FILE
    moved: bool  # whether a request has another line number in FILE than in OUT


def _resume(
    out: LineLog, requests: Sequence[tuple[int, str]], run: dict[str, Any], batch: Path, output: Path, restart: bool
) -> Resumed:
    """Match the answers in OUT with the requests.

    Raises UsageError where OUT was made with another model or other settings, or for another file: one with another
    name, to most of whose lines OUT has no answer.
    """
    existing: list[tuple[int, str, bool]] = []
    other: dict[str, Any] | None = None

    same_name = True

    def read(value: dict[str, Any]) -> None:
        nonlocal other, same_name
        existing.append((value["line"], value["input"], "error" in value))
        made_by = dict(value["run"])
        same_name &= made_by.get("batch") == run["batch"]
        if other is None and made_by | {"batch": run["batch"]} != run:
            other = made_by

    out.recover(read)
    if restart:
        out.clear()
        return Resumed([], frozenset(), 0, 0, False)
    if other is not None:
        raise UsageError(f"{output}: its answers were made with {_difference(other, run)}: --restart begins anew")
    unanswered: dict[str, deque[int]] = {}
    for place, (_, digest) in enumerate(requests):
        unanswered.setdefault(digest, deque()).append(place)
    places = [unanswered[digest].popleft() if unanswered.get(digest) else None for _, digest, _ in existing]
    done = frozenset(place for place in places if place is not None)
    lost = sum(place is None and not error for place, (_, _, error) in zip(places, existing, strict=True))
    if lost > len(done) and not same_name:
        raise UsageError(
            f"{output}: {lost} of its {count(len(existing), 'line')} answer none of {batch}: --restart begins anew"
        )
    out.mend()
    failed = sum(place is not None and error for place, (_, _, error) in zip(places, existing, strict=True))
    moved = any(p is not None and requests[p][0] != line for p, (line, _, _) in zip(places, existing, strict=True))
    return Resumed(places, done, failed, places.count(None), moved)


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Return a difference in words: "seed 1, not 2"."""
    names = [name for name in (*now, *before) if before.get(name) != now.get(name) and name != "batch"]
    return ", ".join(f"{name} {before.get(name)}, not {now.get(name)}" for name in dict.fromkeys(names))


def _in_order(
    out: LineLog, places: Sequence[int | None], requests: Sequence[tuple[int, str]]
) -> Iterator[dict[str, Any]]:
    """Yield the lines of OUT in the order of the requests, without lines whose request is no longer in FILE."""
    answers = {place: value for place, value in zip(places, out.values(), strict=True) if place is not None}
    for place in sorted(answers):
        yield {**answers[place], "line": requests[place][0]}
