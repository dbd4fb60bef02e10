"""Measure importance, that is how much each column of a matrix is used, by running the model on the prompts of a file.

The model answers each prompt by a complete denoising trajectory. Only this module and fidelity_check.py of the
converter run a model, both through dgemma's Python API.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from dgemma._native import ffi, lib
from dgemma.chat.messages import read
from dgemma.convert.imatrix import Sums
from dgemma.convert.names import Wanted
from dgemma.convert.source import SourceModel
from dgemma.errors import FormatError, UsageError, check, new_error
from dgemma.events import Step
from dgemma.files import json_lines
from dgemma.files.gguf_file import File
from dgemma.files.regular import open_regular, read_regular
from dgemma.model import Messages, Model, Prompt
from dgemma.tokenizer import Tokenizer

TOKENS = 50_000  # the default limit of tokens that go through the model
# A folder's checkpoint runs from a temporary file of this type: half of bf16's bytes, and several times as fast.
WORKING_TYPE = "q8_0"
# Keys that change the prompt in a line of --batch or --task, but are refused here.
UNREAD = ("system", "thinking", "tools", "raw", "fill")


@dataclass(frozen=True)
class Measured:
    """The result of a calibration."""

    sums: dict[str, Sums]  # by the name of a matrix
    passes: int  # denoising steps
    canvas_length: int
    tokens: int  # tokens of all prompts and steps


def read_prompts(path: Path) -> list[Prompt]:
    """Return the prompts of a file. Raises FormatError where it is no such file.

    A .jsonl file has an object {"prompt": text} or {"messages": [...]} per line. In any other text file, prompts are
    separated by blank lines.
    """
    return [prompt for _, prompt in numbered_prompts(path)]


def numbered_prompts(path: Path) -> list[tuple[int, Prompt]]:
    """Return the prompts of a file, each with the number of the line where it begins."""
    if path.suffix == ".jsonl":
        os.close(open_regular(path))
        found = [(number, _prompt(f"{path}, line {number}", value)) for number, value in json_lines.values(path)]
    else:
        found = list(_paragraphs(_text(path)))
    if not found:
        raise FormatError(f"{path}: no prompt in it")
    return found


def _text(path: Path) -> str:
    data = read_regular(path)
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as problem:
        line = data[: problem.start].count(b"\n") + 1
        raise FormatError(f"{path}, line {line}: not UTF-8 text: byte {data[problem.start]:#04x}") from None


def _paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """Yield (number of the first line, paragraph) of a text; paragraphs are separated by blank lines."""
    first, lines = 0, list[str]()
    for number, line in enumerate([*text.split("\n"), ""], 1):
        if line.strip(" \t"):
            first = number if not lines else first
            lines.append(line)
        elif lines:
            yield first, "\n".join(lines)
            lines = []


def check_prompts(path: Path, prompts: Sequence[tuple[int, Prompt]], tokenizer: Tokenizer, context: int) -> None:
    """Raise FormatError for a prompt that is too long or that the chat template refuses, before the model runs."""
    for number, prompt in prompts:
        try:
            length = len(_ids(tokenizer, prompt))
        except (UsageError, FormatError) as problem:
            raise FormatError(f"{path}, line {number}: {problem}") from None
        if not 0 < length <= context:
            raise FormatError(
                f"{path}, line {number}: a prompt of {length} tokens; expected 1 to the model's {context}"
            )


def _prompt(where: str, value: Any) -> Prompt:
    given = {name: value[name] for name in ("prompt", "messages") if value.get(name)} if isinstance(value, dict) else {}
    found = next(iter(given.values()), None)
    if len(given) != 1 or not isinstance(found, list if "messages" in given else str):
        raise FormatError(f'{where}: expected {{"prompt": text}} or {{"messages": [...]}}')
    if unread := next((name for name in UNREAD if value.get(name)), None):
        raise FormatError(f"{where}: {unread} cannot be part of a prompt here; expected a prompt or messages alone")
    try:
        if isinstance(found, list):
            read(found)
    except UsageError as problem:
        raise FormatError(f"{where}: {problem}") from None
    return found


def measure(
    path: Path,
    prompts: Sequence[Prompt],
    needed: Sequence[Wanted],
    tokens: int | None,
    threads: int,
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """Run the GGUF file `path` on the prompts, and return the sums.

    Each prompt is encoded and answered with one canvas, prompt i with seed i and the file's sampling settings, so that
    levels of noise and self-conditioning are as frequent as in normal use. The run ends after the last prompt, or at
    the step at which `tokens` tokens have gone through the layers.
    """
    limit, done, passes = tokens or TOKENS, 0, 0
    with SourceModel(path, threads=threads) as model, _observed(model) as observed:
        canvas = int(model.config.canvas_length)
        for i, prompt in enumerate(prompts):
            ids = _ids(model.tokenizer, prompt)
            done += len(ids)
            with closing(model.stream(ids, seed=i, max_tokens=canvas)) as events:
                for event in events:
                    if isinstance(event, Step):
                        passes, done = passes + 1, done + canvas
                        if progress:
                            progress(min(done, limit), limit)
                        if done >= limit:
                            break
            if done >= limit:
                break
        if progress:
            progress(limit, limit)  # the prompts may have ended before the limit
        with File(path) as file:
            there = {tensor.name for tensor in file.tensors}
        matrices = [(name, want) for want in needed for name in _names(want, there)]
        sums = {name: _read(observed, name, want) for name, want in matrices}
    return Measured(sums, passes, canvas, done)


def _ids(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Return the ids of a prompt as dg-run does: with a chat template, a text is the message of a user."""
    if isinstance(prompt, str) and tokenizer.chat_template is not None:
        prompt = [{"role": "user", "content": prompt}]
    return tokenizer.prompt(prompt) if isinstance(prompt, str) else tokenizer.chat(cast(Messages, prompt))


def _names(want: Wanted, there: set[str]) -> Sequence[str]:
    """Return the name of a matrix in the file, or the names of its two halves."""
    return () if want.is_float else (want.gguf,) if want.gguf in there else want.halves


@contextmanager
def _observed(model: Model) -> Iterator[Any]:
    """Yield the `dg_model *`; during the block it sums the inputs of its matrices."""
    pointer, error = model._open_handle().pointer, new_error()
    check(lib.dg_moments_start(pointer, error), error)
    try:
        yield pointer
    finally:
        lib.dg_moments_stop(pointer)


def _read(pointer: Any, name: str, want: Wanted) -> Sums:
    columns, experts = want.dims[0], want.dims[2] if len(want.dims) > 2 else 1
    found: NDArray[np.float64] = np.empty((2, experts, columns))
    counts: NDArray[np.float32] = np.empty(experts, np.float32)
    for expert in range(experts):
        count, error = ffi.new("int64_t *"), new_error()
        sums, squares = (ffi.from_buffer("double[]", of[expert], require_writable=True) for of in found)
        check(lib.dg_moments_read(pointer, name.encode(), expert, sums, squares, count, error), error)
        counts[expert] = count[0]
    inputs, squared = found.astype(np.float32)
    return Sums(squared, counts, inputs)


def refuse(imatrix: object, calibrate: object, tokens: int | None, save: object) -> None:
    """Raise UsageError for arguments that do not go together."""
    if imatrix is not None and calibrate is not None:
        raise UsageError("imatrix and calibrate both say how much columns are used: give one")
    if calibrate is None and (tokens is not None or save is not None):
        raise UsageError(f"{'calibrate_tokens' if tokens is not None else 'save_imatrix'} needs calibrate")
    if tokens is not None and tokens < 1:
        raise UsageError(f"calibrate_tokens: expected at least 1, found {tokens}")
