r"""Parses a model's answer into its thought, the text to show, and calls of tools.

    <|channel>thought\nLet me see.<channel|>It is sunny.<|tool_call>call:look{at:<|"|>sky<|"|>,n:2}<tool_call|>

read(tokenizer, ids) parses a finished answer, a Reader parses an answer while it is generated. Neither raises for
anything that a model may write.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from dgemma.detokenizer import Detokenizer

if TYPE_CHECKING:
    from dgemma.tokenizer import Tokenizer

THINK, THOUGHT = "<|channel>", "<channel|>"  # around a channel: its name, a newline, its text
CALL, CALLED = "<|tool_call>", "<tool_call|>"
QUOTE = '<|"|>'  # on both sides of a string in a call
MARKS = (THINK, THOUGHT, CALL, CALLED, QUOTE)
HEADER = "thought\n"  # the name of the one channel there is
DEEPEST = 64  # the most levels of lists and objects in a call; with more, it is not read as a call

Kind: TypeAlias = Literal["thinking", "text", "call"]

_MARK = re.compile("|".join(map(re.escape, MARKS)))
_STARTS = {mark[:n] for mark in MARKS for n in range(1, len(mark))}  # the beginnings of marks
_LONGEST = max(map(len, MARKS))
_NAME = re.compile(r"\s*call:([^\s{}]+)\s*(?={)")
_KEY = re.compile(r"[^\s:,{}\[\]]+")
_NUMBER = re.compile(r"-?[0-9]{1,400}(?:\.[0-9]{1,400})?(?:[eE][+-]?[0-9]{1,4})?")
_WORD = re.compile(r"[A-Za-z]{4,5}")
_WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool. `arguments` are values that JSON can hold."""

    name: str
    arguments: dict[str, Any]
    text: str = field(repr=False)  # as the model wrote it, marks included


@dataclass(frozen=True, slots=True)
class Delta:
    """A new part of an answer: more of its thinking, more of its text, or a call (`text`: as the model wrote it)."""

    kind: Kind
    text: str
    call: ToolCall | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """A parsed answer. `text` is the part to show and to keep; calls that cannot be parsed stay in it."""

    text: str = ""
    thinking: str = ""
    calls: tuple[ToolCall, ...] = ()

    def message(self) -> dict[str, Any]:
        """Return this answer as a message for the prompts that follow: the thinking is left out."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.calls
            ]
        return message


class Reader:
    """Parses an answer while it is generated: feed(ids) or feed_text(text), then finish(), return its new parts.

    However the answer is cut into pieces, the deltas add up to the same answer. The time is linear in its length.
    thinking: the prompt ends inside a thought (see `opens_thought`). marks=False: nothing is a mark, all is text.
    """

    def __init__(self, tokenizer: Tokenizer | None = None, thinking: bool = False, marks: bool = True) -> None:
        self._detokenizer = Detokenizer(tokenizer) if tokenizer is not None else None
        found = {self._detokenizer.id(mark): mark for mark in MARKS} if self._detokenizer is not None and marks else {}
        self._marks = {token: mark for token, mark in found.items() if token is not None}
        self._literal = not marks
        self._bytes: list[int] = []  # byte tokens at the end: the rest of their character may follow
        self._tail = ""  # text at the end that may be the beginning of a mark
        self._header: str | None = "" if thinking else None  # text at a thought's beginning that may become HEADER
        self._inside: Kind = "thinking" if thinking else "text"
        self._call: list[str] = []
        self._new: list[tuple[Kind, str | ToolCall]] = []
        self._parts: dict[Kind, list[str]] = {"thinking": [], "text": []}
        self._calls: list[ToolCall] = []

    @classmethod
    def behind(cls, tokenizer: Tokenizer, prompt: Sequence[int], marks: bool = True) -> Reader:
        """Return a reader of the answer to a prompt, which may end inside a thought. marks: as for Reader."""
        return cls(tokenizer, marks and opens_thought(tokenizer, prompt), marks)

    @property
    def answer(self) -> Answer:
        """The answer as far as it was returned in deltas."""
        return Answer("".join(self._parts["text"]), "".join(self._parts["thinking"]), tuple(self._calls))

    def feed(self, ids: Iterable[int]) -> list[Delta]:
        """Read more of the answer, given as ids. Only tokens of marks are marks, not text that looks like one."""
        assert self._detokenizer is not None, "a Reader of ids needs a tokenizer"
        for token in ids:
            if token in self._marks:
                self._flush_bytes()
                self._mark(self._marks[token])
                continue
            text = self._detokenizer.plain(token)
            if self._detokenizer.byte(token):
                self._bytes.append(token)
            elif text:
                self._flush_bytes()
                self._text(text)
        return self._take_deltas()

    def feed_text(self, text: str) -> list[Delta]:
        """Read more of the answer, given as text with marks in it."""
        text, at = self._tail + text, 0
        self._tail = ""
        if self._literal:
            self._text(text)
            return self._take_deltas()
        for mark in _MARK.finditer(text):
            self._text(text[at : mark.start()])
            self._mark(mark.group())
            at = mark.end()
        for n in range(min(_LONGEST - 1, len(text) - at), 0, -1):
            if text[-n:] in _STARTS:
                text, self._tail = text[:-n], text[-n:]
                break
        self._text(text[at:])
        return self._take_deltas()

    def peek(self, ids: Iterable[int]) -> Answer:
        """Return what feed(ids) and finish() would add to the answer, without a change to this reader."""
        other = copy(self)
        other._bytes, other._call, other._calls, other._new = [*self._bytes], [*self._call], [], []
        other._parts = {"thinking": [], "text": []}
        other.feed(ids)
        other.finish()
        return other.answer

    def finish(self) -> list[Delta]:
        """End the answer, and return what was held back."""
        self._flush_bytes()
        tail, self._tail = self._tail, ""
        self._text(tail)
        self._end_header()
        self._end_call(parse=False)
        return self._take_deltas()

    def _flush_bytes(self) -> None:
        if self._bytes and self._detokenizer is not None:
            run, self._bytes = self._bytes, []
            self._text(self._detokenizer.joined(run))

    def _text(self, text: str) -> None:
        if not text:
            return
        if self._inside == "call":
            self._call.append(text)
            return
        if self._header is not None:
            text = self._header + text
            if HEADER.startswith(text) and text != HEADER:
                self._header = text
                return
            self._header = None
            text = text.removeprefix(HEADER)
        self._emit(text)

    def _mark(self, mark: str) -> None:
        if self._inside == "call":
            if mark not in (CALL, CALLED):
                self._call.append(mark)
                return
            if mark == CALLED:
                self._call.append(mark)
            self._end_call(parse=mark == CALLED)
        elif self._inside == "thinking":
            if mark != THOUGHT:
                self._text(mark)
                return
            self._end_header()
            self._inside = "text"
            return
        if mark == CALL:
            self._inside, self._call = "call", [mark]
        elif mark == THINK:
            self._inside, self._header = "thinking", ""
        elif mark == QUOTE:
            self._text(mark)

    def _end_header(self) -> None:
        header, self._header = self._header, None
        if header is not None and header != HEADER.rstrip():
            self._emit(header)

    def _end_call(self, parse: bool) -> None:
        if self._inside != "call":
            return
        text, self._call, self._inside = "".join(self._call), [], "text"
        call = parse_call(text) if parse else None
        if call is None:
            self._emit(text)
        else:
            self._calls.append(call)
            self._new.append(("call", call))

    def _emit(self, text: str) -> None:
        if text:
            self._parts[self._inside].append(text)
            self._new.append((self._inside, text))

    def _take_deltas(self) -> list[Delta]:
        """Return the new parts, and forget them; neighbouring parts of one kind are joined."""
        deltas: list[Delta] = []
        run: list[str] = []
        new, self._new = self._new, []
        for i, (kind, what) in enumerate(new):
            if isinstance(what, ToolCall):
                deltas.append(Delta(kind, what.text, what))
                continue
            run.append(what)
            if i + 1 == len(new) or new[i + 1][0] != kind:
                deltas.append(Delta(kind, "".join(run)))
                run = []
        return deltas


def read(tokenizer: Tokenizer, ids: Iterable[int], thinking: bool = False) -> Answer:
    """Parse a finished answer, given as ids."""
    reader = Reader(tokenizer, thinking)
    reader.feed(ids)
    reader.finish()
    return reader.answer


def read_text(text: str, thinking: bool = False) -> Answer:
    """Parse a finished answer, given as text with marks in it."""
    reader = Reader(thinking=thinking)
    reader.feed_text(text)
    reader.finish()
    return reader.answer


def opens_thought(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
    """Return whether a prompt ends inside a thought; the answer then begins with the rest of the thought."""
    tail = tokenizer.decode(list(prompt[-8:]), special=True)
    return tail.rstrip().endswith(THINK + HEADER.rstrip())


# ---- calls ----


class _Malformed(Exception):
    pass


def parse_call(text: str) -> ToolCall | None:
    """Parse a call from its text, with or without the marks around it; None where it is no valid call."""
    inner = text.removeprefix(CALL).removesuffix(CALLED)
    name = _NAME.match(inner)
    if name is None:
        return None
    try:
        arguments, at = _object(inner, name.end(), 1)
    except _Malformed:
        return None
    return ToolCall(name.group(1), arguments, text) if not inner[at:].strip() else None


def _space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _value(text: str, at: int, depth: int) -> tuple[Any, int]:
    """Return the value that begins at `at`, and where it ends."""
    if depth > DEEPEST:
        raise _Malformed
    if text.startswith(QUOTE, at) or text.startswith('"', at):
        return _string(text, at)
    if text.startswith("{", at):
        return _object(text, at, depth)
    if text.startswith("[", at):
        return _list(text, at, depth)
    if word := _WORD.match(text, at):
        if word.group() not in _WORDS:
            raise _Malformed
        return _WORDS[word.group()], word.end()
    number = _NUMBER.match(text, at)
    if number is None:
        raise _Malformed
    digits = number.group()
    if digits.lstrip("-").isdigit():
        return int(digits), number.end()
    value = float(digits)
    if not math.isfinite(value):
        raise _Malformed
    return value, number.end()


def _string(text: str, at: int) -> tuple[str, int]:
    if text.startswith(QUOTE, at):
        start = at + len(QUOTE)
        end = text.find(QUOTE, start)
        if end < 0:
            raise _Malformed
        return text[start:end], end + len(QUOTE)
    try:
        value, end = json.JSONDecoder().raw_decode(text, at)  # some models write JSON instead
    except ValueError:
        raise _Malformed from None
    return str(value).encode("utf-8", "replace").decode(), end  # surrogates are replaced


def _list(text: str, at: int, depth: int) -> tuple[list[Any], int]:
    values: list[Any] = []
    at = _space(text, at + 1)
    while not text.startswith("]", at):
        value, at = _value(text, at, depth + 1)
        values.append(value)
        at = _next(text, at, "]")
    return values, at + 1


def _object(text: str, at: int, depth: int) -> tuple[dict[str, Any], int]:
    values: dict[str, Any] = {}
    at = _space(text, at + 1)
    while not text.startswith("}", at):
        if text.startswith((QUOTE, '"'), at):
            key, at = _string(text, at)
        elif bare := _KEY.match(text, at):
            key, at = bare.group(), bare.end()
        else:
            raise _Malformed
        at = _space(text, at)
        if not text.startswith(":", at):
            raise _Malformed
        values[key], at = _value(text, _space(text, at + 1), depth + 1)
        at = _next(text, at, "}")
    return values, at + 1


def _next(text: str, at: int, end: str) -> int:
    """Return where the next item of a list or an object begins, or where the closing bracket is."""
    at = _space(text, at)
    if text.startswith(",", at):
        return _space(text, at + 1)
    if not text.startswith(end, at):
        raise _Malformed
    return at
