"""dg-run --batch: the lines of a file, each answered by a line of another, which a kill leaves whole."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import click

from dgemma import json_lines
from dgemma.batch import FIELDS, Batch
from dgemma.cli.display import count
from dgemma.errors import Error, UsageError
from dgemma.model import Model
from dgemma.progress import progress_bar

PACE = 30.0  # seconds between two lines of progress where there is no terminal

_FIELDS = "\n".join(f"  {name:<10}{text}" for name, text in FIELDS.items())
HELP = f"""With --batch FILE every line of FILE is a request, a JSON object, and -o OUT gets a line for each, in order:
"line" (its number in FILE), "input" (the beginning of its SHA-256), and the answer with its figures, or "error" with
the reason. Each line is on the disk before the next is begun. After a kill, the same command goes on behind the last
whole line. The exit status is 1 where a line was not answered. A request's fields:

\b
{_FIELDS}
  and generation options by their names in Python (max_tokens, seed, effort, ...), which win over the flags

\b
  dg-run model.gguf --batch prompts.jsonl -o answers.jsonl --max-tokens 512
"""


def batch_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags of this file."""
    file = click.Path(dir_okay=False, path_type=Path)
    out = "Where the answers of --batch go. One that is there already is gone on with."
    command = click.option("-o", "--output", "output", type=file, metavar="OUT", help=out)(command)
    text = "Answer every line of this file: see above."
    return click.option("--batch", "batch", type=file, metavar="FILE", help=text)(command)


def run(model: Model, batch: Path, output: Path, quiet: bool, **defaults: Any) -> int:
    """Answers what is not answered yet; an exit status."""
    total = sum(1 for _ in _lines(batch))
    with Batch(model, **defaults) as answers, _opened(output) as out:
        done, failed = _resume(batch, output, out)
        before, tokens, began = done, 0, time.monotonic()
        told = began
        with progress_bar("answers", "lines") as bar:
            for number, line in _lines(batch, done):
                answer = answers.answer(line)
                _append(out, {"line": number, "input": _digest(line), **answer})
                done, failed, tokens = done + 1, failed + ("error" in answer), tokens + answer.get("tokens", 0)
                if quiet:
                    continue
                if bar is not None:
                    bar(done, total)
                elif time.monotonic() - told >= PACE:
                    told = time.monotonic()
                    click.echo(f"{done} of {count(total, 'line')}, {told - began:.0f} s", err=True)
    seconds = time.monotonic() - began
    if not quiet:
        there = f", {before} were there already" if before else ""
        click.echo(
            f"{count(done - before, 'line')} answered{there}: {tokens} tokens, {seconds:.1f} s,"
            f" {tokens / max(seconds, 1e-9):.1f} tokens/s",
            err=True,
        )
    if failed:
        raise Error(f"{failed} of {count(done, 'line')} could not be answered; {output} says why")
    return 0


def _lines(path: Path, skip: int = 0) -> Iterator[tuple[int, bytes]]:
    """The requests of a file behind the first `skip`, with their line numbers; empty lines are none."""
    return islice(json_lines.lines(path), skip, None)


def _digest(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()[:16]


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A file to read and append to, for this process alone."""
    with open(path, "a+b") as opened:
        try:
            import fcntl

            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass  # no locks on this system
        except BlockingIOError:
            raise UsageError(f"{path} is being written by another process") from None
        yield opened


def _resume(batch: Path, output: Path, out: BinaryIO) -> tuple[int, int]:
    """How many requests are answered already, and how many of them with an error; a line that was cut is taken away.
    Raises UsageError for a file that holds anything else.
    """
    out.seek(0)
    done = failed = end = 0
    requests = _lines(batch)
    for line in out:
        if not line.endswith(b"\n"):
            break
        number, request = next(requests, (0, b""))
        try:
            answer = json.loads(line)
            same = (answer["line"], answer["input"]) == (number, _digest(request))
        except (ValueError, KeyError, TypeError, RecursionError):
            same = False
        if not same:
            raise UsageError(f"{output}: line {done + 1} does not answer line {number or done + 1} of {batch}")
        done, failed, end = done + 1, failed + ("error" in answer), end + len(line)
    out.truncate(end)
    return done, failed


def _append(out: BinaryIO, answer: dict[str, Any]) -> None:
    """Adds a line, on the disk when this returns."""
    out.write((json.dumps(answer, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
    out.flush()
    os.fsync(out.fileno())
