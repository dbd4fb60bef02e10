"""Checks of answers. CHECKS has all kinds.

A check is an object with a `kind` and the fields that its function takes:

    {"kind": "exact", "text": "42", "strip": true}     the answer is this text; strip: ignore white space around it
    {"kind": "regex", "pattern": "^[a-z]+$"}           the pattern is found anywhere in the answer
    {"kind": "json", "equals": {"a": 1}}               the answer is valid JSON; equals: with this value
    {"kind": "numeric", "value": 3.14, "tolerance": 0.01}   the last number in the answer is this one
    {"kind": "markdown-balanced"}                      brackets, code and emphasis are closed, tables are complete
    {"kind": "python-compiles"}                        the answer is valid Python; it is parsed, never run
    {"kind": "call", "name": "look", "arguments": {"at": "sky"}}   the answer has one tool call: this one

A list of checks is passed if each of them is. JSON and Python may be in a code fence.
"""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeAlias

from dgemma.chat.answer_parser import read_text
from dgemma.errors import UsageError

Check: TypeAlias = Mapping[str, Any] | Sequence[Mapping[str, Any]]

FENCED = re.compile(r"\s*(`{3,}|~{3,})[^\n]*\n(.*?)\n?\1\s*", re.DOTALL)
NUMBER = re.compile(r"[-+]?(?:\d[\d,]*)(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+]?\.\d+")
LINE_END = re.compile(r"\r\n|\n|\r")  # the ends of lines in Markdown
PAIRS = {")": "(", "]": "[", "}": "{"}
_nothing = object()


def exact(answer: str, text: str, strip: bool = False) -> bool:
    if not isinstance(text, str):
        raise TypeError(f"text must be text, not {text!r}")
    return answer.strip() == text.strip() if strip else answer == text


def regex(answer: str, pattern: str) -> bool:
    return re.search(pattern, answer) is not None


def json_valid(answer: str, equals: Any = _nothing) -> bool:
    try:
        value = json.loads(unfenced(answer), parse_constant=_no_json)
    except (ValueError, RecursionError):
        return False
    return equals is _nothing or same(value, equals)


def _no_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def numeric(answer: str, value: float, tolerance: float = 0.0) -> bool:
    found = NUMBER.findall(answer)
    return bool(found) and math.isclose(float(found[-1].replace(",", "")), value, rel_tol=1e-12, abs_tol=tolerance)


def python_compiles(answer: str) -> bool:
    code = unfenced(answer)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return bool(code.strip())


def markdown_balanced(answer: str) -> bool:
    prose: list[str] = []
    fence = ""
    for line in LINE_END.split(answer):
        mark = re.match(r" {0,3}(`{3,}|~{3,})(.*)", line)
        if fence:
            if mark and mark[1].startswith(fence) and not mark[2].strip():
                fence = ""
        elif mark:
            fence = mark[1]
        else:
            prose.append(line)
    return not fence and tables_whole(prose) and marks_closed("\n".join(prose))


def tables_whole(lines: list[str]) -> bool:
    """Return whether every table has a rule under its header, and the same number of cells in all rows."""
    for at, line in enumerate(lines):
        if line.lstrip().startswith("|") and (at == 0 or not lines[at - 1].lstrip().startswith("|")):
            rows = []
            for row in lines[at:]:
                if not row.lstrip().startswith("|"):
                    break
                rows.append(row.strip())
            if len(rows) < 2 or not re.fullmatch(r"(\|\s*:?-+:?\s*)+\|", rows[1]):
                return False
            cells = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
            if len(cells) != 1 or not all(len(row) > 1 and row.endswith("|") for row in rows):
                return False
    return True


def marks_closed(text: str) -> bool:
    """Return whether code spans, bold marks and brackets are closed; escaped ones and those in code are ignored."""
    text = re.sub(r"\\.", "", text)
    text = re.sub(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", "", text, flags=re.DOTALL)
    if "`" in text or len(re.findall(r"\*\*", text)) % 2:
        return False
    still_open: list[str] = []
    for line in LINE_END.split(text):
        line = re.sub(r"^\s*\(?\w{1,3}\)\s", "", line)  # "a) " begins a list
        for mark in line:
            if mark in PAIRS.values():
                still_open.append(mark)
            elif mark in PAIRS and (not still_open or still_open.pop() != PAIRS[mark]):
                return False
    return not still_open


def call(answer: str, name: str, arguments: Any = _nothing) -> bool:
    calls = read_text(answer).calls
    return len(calls) == 1 and calls[0].name == name and (arguments is _nothing or same(calls[0].arguments, arguments))


def same(one: Any, other: Any) -> bool:
    """Return whether two values are the same in JSON: 1 and 1.0 are equal, but true is not 1."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def unfenced(text: str) -> str:
    """Return the content of a code fence, if the text is nothing else; otherwise the text."""
    found = FENCED.fullmatch(text)
    return found[2] if found else text


CHECKS: dict[str, Callable[..., bool]] = {
    "exact": exact,
    "regex": regex,
    "json": json_valid,
    "numeric": numeric,
    "markdown-balanced": markdown_balanced,
    "python-compiles": python_compiles,
    "call": call,
}


def refuse(check: Any) -> None:
    """Raise UsageError where a value is no valid check."""
    for each in check if isinstance(check, list) else [check]:
        if not isinstance(each, Mapping) or each.get("kind") not in CHECKS:
            raise UsageError(f"a check needs a kind, one of {', '.join(CHECKS)}")
        try:
            for answer in ("", "0"):
                holds(answer, each)
        except (TypeError, ValueError, re.error) as problem:
            raise UsageError(f"check {each['kind']}: {problem}") from None
    if isinstance(check, list) and not check:
        raise UsageError("an empty list of checks")


def holds(answer: str, check: Check) -> bool:
    """Return whether an answer passes a check."""
    if isinstance(check, Mapping):
        fields = {name: value for name, value in check.items() if name != "kind"}
        return CHECKS[check["kind"]](answer, **fields)
    return all(holds(answer, each) for each in check)
