"""Files of JSON lines: a JSON value per line, as --batch, --task and --calibrate read them.

A line ends at \\n, with or without \\r before it, and nowhere else: JSON strings may hold U+2028, U+0085 and their
like as they are. Lines of blanks are left out but counted. A byte order mark is left out. One line is held at a time.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from typing import Any, BinaryIO, NoReturn

from dgemma.errors import Error, FormatError, SystemFailure, UsageError

MOST_BYTES = 1 << 26  # of a line
DEEPEST = 100  # levels of lists and objects
MOST_DIGITS = 300  # of an integer: a float64 holds no more
BLANKS = b" \t\r\n"  # what JSON calls white space
BOM = "\ufeff"


def lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that hold something, without the blanks around them, each with its number from 1 on.
    Raises SystemFailure where the file cannot be read, FormatError for a line that is too long.
    """
    name = os.fsdecode(path)
    try:
        with open(path, "rb") as opened:
            yield from split(opened, name)
    except OSError as problem:
        raise SystemFailure(f"{name}: {(problem.strerror or str(problem)).lower()}") from None


def split(opened: BinaryIO, where: str) -> Iterator[tuple[int, bytes]]:
    """lines() of an opened file, which errors call `where`."""
    number = 0
    while line := opened.readline(MOST_BYTES + 1):
        number += 1
        if len(line) > MOST_BYTES:
            raise FormatError(f"{where}, line {number}: it is longer than {MOST_BYTES >> 20} MiB")
        if number == 1:
            line = line.removeprefix(BOM.encode())
        if line := line.strip(BLANKS):
            yield number, line


def values(path: str | os.PathLike[str]) -> Iterator[tuple[int, Any]]:
    """The values of lines(), each with the number of its line. Raises FormatError that names file and line for what
    is no JSON.
    """
    for number, line in lines(path):
        try:
            found = value(line)
        except UsageError as problem:
            raise FormatError(f"{os.fsdecode(path)}, line {number}: {problem}") from None
        yield number, found


def value(line: str | bytes) -> Any:
    """The value of a line. Raises UsageError for what is no JSON, and for what JSON allows and readers understand
    differently, or not at all: a key given twice, numbers beyond a float64, deep nesting.
    """
    try:
        text = line if isinstance(line, str) else line.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise UsageError(f"the line is not UTF-8 text: byte {problem.start}") from None
    try:
        found = _DECODER.decode(text.removeprefix(BOM))
    except json.JSONDecodeError as problem:
        raise UsageError(f"the line is no JSON: {problem.msg}, character {problem.pos}") from None
    except RecursionError:
        raise _too_deep() from None
    if text.count("[") + text.count("{") > DEEPEST:
        _check_depth(found)
    return found


def _check_depth(found: Any) -> None:
    level, depth = [found], 0
    while level := [each for each in level if isinstance(each, dict | list)]:
        depth += 1
        if depth > DEEPEST:
            raise _too_deep()
        level = [item for each in level for item in (each.values() if isinstance(each, dict) else each)]


def _too_deep() -> Error:
    return UsageError(f"the line has more than {DEEPEST} levels of lists and objects")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise UsageError(f"the line gives the key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return found


def _integer(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise UsageError(f"the line has a number of {len(text)} digits, more than {MOST_DIGITS}")
    return int(text)


def _real(text: str) -> float:
    found = float(text)
    if math.isinf(found):
        raise UsageError(f"the line has the number {text[:40]}, which no float64 holds")
    return found


def _constant(name: str) -> NoReturn:
    raise UsageError(f"the line is no JSON: it has {name}")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_real, parse_constant=_constant)
