r"""Reads and writes JSON lines, a JSON value per line, for --batch, --task and --calibrate.

A line ends at \n or \r\n only: JSON strings may hold other characters that end lines, such as U+2028 and U+0085.
Blank lines are skipped but counted. A byte order mark is skipped. Only one line is in memory at a time.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO, NoReturn

from dgemma.errors import FormatError, SystemFailure, UsageError
from dgemma.files.regular import opener

MOST_BYTES = 1 << 26  # the most bytes of a line
DEEPEST = 100  # levels of lists and objects
TOO_DEEP = f"has more than {DEEPEST} levels of lists and objects"
MOST_DIGITS = 300  # the most digits of an integer: larger ones do not fit a float64
BLANKS = b" \t\r\n"  # JSON's white space
BOM = "\ufeff"
# Characters that are written as escapes: some readers end a line at the first three; surrogates stand for bytes of a
# file's name that are no UTF-8. In JSON they can only be inside strings.
_ESCAPED = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029, *range(0xD800, 0xE000))}


def lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
    """Yield (number, line) for the lines of a file that are not blank, without blanks around them; counted from 1.

    Raises SystemFailure where the file cannot be read, FormatError for a line that is too long.
    """
    name = os.fsdecode(path)
    try:
        with open(path, "rb", opener=opener) as opened:
            yield from split(opened, name)
    except OSError as problem:
        raise SystemFailure(f"{name}: {(problem.strerror or str(problem)).lower()}") from None


def split(opened: BinaryIO, where: str) -> Iterator[tuple[int, bytes]]:
    """Yield the lines() of an opened file. where: its name in errors."""
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
    """Yield (number, value) for the lines() of a file.

    Raises FormatError, which names the file and the line, for a line that is no JSON.
    """
    for number, line in lines(path):
        try:
            found = value(line)
        except UsageError as problem:
            raise FormatError(f"{os.fsdecode(path)}, line {number}: {problem}") from None
        yield number, found


def value(line: str | bytes, name: str = "the line") -> Any:
    """Return the value of a text in JSON. name: what errors call the text.

    Raises UsageError for a text that is no JSON, and for JSON that readers understand differently or not at all: a key
    that is given twice, numbers beyond a float64, deep nesting.
    """
    try:
        text = line if isinstance(line, str) else line.decode("utf-8")
        found = _DECODER.decode(text.removeprefix(BOM))
        if text.count("[") + text.count("{") > DEEPEST:
            _check_depth(found)
    except UnicodeDecodeError as problem:
        raise UsageError(f"{name} is not UTF-8 text: byte {problem.start}") from None
    except json.JSONDecodeError as problem:
        raise UsageError(f"{name} is no JSON: {problem.msg}, character {problem.pos}") from None
    except RecursionError:
        raise UsageError(f"{name} {TOO_DEEP}") from None
    except _NotRead as problem:
        raise UsageError(f"{name} {problem}") from None
    return found


def as_line(value: Any, compact: bool = False) -> str:
    """Return a value as JSON in one line, without characters at which some readers end a line, such as U+2028."""
    return _escaped(json.dumps(value, ensure_ascii=False, separators=(",", ":") if compact else None))


def as_bytes(value: Any, indent: int | None = None) -> bytes:
    """Return a value as JSON in UTF-8 with a newline at the end: one line, or indented over several lines."""
    text = as_line(value) if indent is None else _escaped(json.dumps(value, ensure_ascii=False, indent=indent))
    return f"{text}\n".encode()


def _escaped(text: str) -> str:
    """Return JSON with escapes in place of characters at which some readers end a line, and of surrogates.

    Python reads the same value from it, even a file's name that is no Unicode text.
    """
    return text.translate(_ESCAPED)


class _NotRead(Exception):
    """A text cannot be read. The message continues a sentence that begins with the text's name."""


def _check_depth(found: Any) -> None:
    level, depth = [found], 0
    while level := [each for each in level if isinstance(each, dict | list)]:
        depth += 1
        if depth > DEEPEST:
            raise _NotRead(TOO_DEEP)
        level = [item for each in level for item in (each.values() if isinstance(each, dict) else each)]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise _NotRead(f"gives the key {twice!r} twice")
    return found


def _integer(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise _NotRead(f"has a number of {len(text)} digits, more than {MOST_DIGITS}")
    return int(text)


def _real(text: str) -> float:
    found = float(text)
    if math.isinf(found):
        raise _NotRead(f"has the number {text[:40]}, which no float64 holds")
    return found


def _constant(name: str) -> NoReturn:
    raise _NotRead(f"is no JSON: it has {name}")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_real, parse_constant=_constant)
