r"""Parses a model's answer into its thought, the text to show, and calls of tools.

    <|channel>thought\nLet me see.<channel|>It is sunny.<|tool_call>call:look{at:<|"|>sky<|"|>,n:2}<tool_call|>

read(tokenizer, ids) does it at once, a Reader as the ids come. Nothing here raises, whatever a model writes.
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

THINK, THOUGHT = "<|channel>", "<channel|>"  # around a channel: its name, a newline, what is in it
CALL, CALLED = "<|tool_call>", "<tool_call|>"
QUOTE = '<|"|>'  # on both sides of a string in a call
MARKS = (THINK, THOUGHT, CALL, CALLED, QUOTE)
HEADER = "thought\n"  # the name of the one channel there is
DEEPEST = 64  # levels of lists and objects in a call: more is no call

Kind: TypeAlias = Literal["thinking", "text", "call"]

_MARK = re.compile("|".join(map(re.escape, MARKS)))
_STARTS = {mark[:n] for mark in MARKS for n in range(1, len(mark))}  # what may become a mark
_LONGEST = max(map(len, MARKS))
_NAME = re.compile(r"\s*call:([^\s{}]+)\s*(?={)")
_KEY = re.compile(r"[^\s:,{}\[\]]+")
_NUMBER = re.compile(r"-?[0-9]{1,400}(?:\.[0-9]{1,400})?(?:[eE][+-]?[0-9]{1,4})?")
_WORD = re.compile(r"[A-Za-z]{4,5}")
_WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool: `arguments` are what JSON can hold."""

    name: str
    arguments: dict[str, Any]
    text: str = field(repr=False)  # as the model wrote it, marks included


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new in an answer: more of its thinking, more of its text, or a call (whose `text` is as written)."""

    kind: Kind
    text: str
    call: ToolCall | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """A parsed answer. `text` is what to show and remember; it also holds a call that cannot be understood."""

    text: str = ""
    thinking: str = ""
    calls: tuple[ToolCall, ...] = ()

    def message(self) -> dict[str, Any]:
        """Return the message that a chat template is given for this answer later: the thinking is left out."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.calls
            ]
        return message


class Reader:
    """Takes an answer apart as it comes: feed(ids) or feed_text(text) and finish() return what is new.

    However it is cut into pieces, the deltas add up to the same answer, in time that grows with its length alone.
    thinking: the prompt ends inside a thought (see `opens_thought`). marks=False: there are none, all is text.
    """

    def __init__(self, tokenizer: Tokenizer | None = None, thinking: bool = False, marks: bool = True) -> None:
        self._detokenizer = Detokenizer(tokenizer) if tokenizer is not None else None
        found = {self._detokenizer.id(mark): mark for mark in MARKS} if self._detokenizer is not None and marks else {}
        self._marks = {token: mark for token, mark in found.items() if token is not None}
        self._literal = not marks
        self._bytes: list[int] = []  # bytes whose neighbours may still come
        self._tail = ""  # what may become a mark
        self._head: str | None = "" if thinking else None  # the beginning of a thought that may become its header
        self._inside: Kind = "thinking" if thinking else "text"
        self._call: list[str] = []
        self._new: list[tuple[Kind, str | ToolCall]] = []
        self._told: dict[Kind, list[str]] = {"thinking": [], "text": []}
        self._calls: list[ToolCall] = []

    @classmethod
    def behind(cls, tokenizer: Tokenizer, prompt: Sequence[int], marks: bool = True) -> Reader:
        """Return a reader of the answer to a prompt, which may end inside a thought. marks: as for Reader."""
        return cls(tokenizer, marks and opens_thought(tokenizer, prompt), marks)

    @property
    def answer(self) -> Answer:
        """What was told so far."""
        return Answer("".join(self._told["text"]), "".join(self._told["thinking"]), tuple(self._calls))

    def feed(self, ids: Iterable[int]) -> list[Delta]:
        """Read more of the answer as ids. Only tokens that are marks count as marks, not text that looks like them."""
        assert self._detokenizer is not None, "a Reader of ids needs a tokenizer"
        for token in ids:
            if token in self._marks:
                self._settle()
                self._mark(self._marks[token])
                continue
            text = self._detokenizer.plain(token)
            if self._detokenizer.byte(token):
                self._bytes.append(token)
            elif text:
                self._settle()
                self._text(text)
        return self._take()

    def feed_text(self, text: str) -> list[Delta]:
        """Read more of the answer as text with its marks in it."""
        text, at = self._tail + text, 0
        self._tail = ""
        if self._literal:
            self._text(text)
            return self._take()
        for mark in _MARK.finditer(text):
            self._text(text[at : mark.start()])
            self._mark(mark.group())
            at = mark.end()
        for n in range(min(_LONGEST - 1, len(text) - at), 0, -1):
            if text[-n:] in _STARTS:
                text, self._tail = text[:-n], text[-n:]
                break
        self._text(text[at:])
        return self._take()

    def peek(self, ids: Iterable[int]) -> Answer:
        """Return the answer that feed(ids) and finish() would add, and change nothing."""
        other = copy(self)
        other._bytes, other._call, other._calls, other._new = [*self._bytes], [*self._call], [], []
        other._told = {"thinking": [], "text": []}
        other.feed(ids)
        other.finish()
        return other.answer

    def finish(self) -> list[Delta]:
        """End the answer: what was held back is told."""
        self._settle()
        tail, self._tail = self._tail, ""
        self._text(tail)
        self._end_header()
        self._end_call(parse=False)
        return self._take()

    def _settle(self) -> None:
        if self._bytes and self._detokenizer is not None:
            run, self._bytes = self._bytes, []
            self._text(self._detokenizer.joined(run))

    def _text(self, text: str) -> None:
        if not text:
            return
        if self._inside == "call":
            self._call.append(text)
            return
        if self._head is not None:
            text = self._head + text
            if HEADER.startswith(text) and text != HEADER:
                self._head = text
                return
            self._head = None
            text = text.removeprefix(HEADER)
        self._say(text)

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
            self._inside, self._head = "thinking", ""
        elif mark == QUOTE:
            self._text(mark)

    def _end_header(self) -> None:
        head, self._head = self._head, None
        if head is not None and head != HEADER.rstrip():
            self._say(head)

    def _end_call(self, parse: bool) -> None:
        if self._inside != "call":
            return
        text, self._call, self._inside = "".join(self._call), [], "text"
        call = parse_call(text) if parse else None
        if call is None:
            self._say(text)
        else:
            self._calls.append(call)
            self._new.append(("call", call))

    def _say(self, text: str) -> None:
        if text:
            self._told[self._inside].append(text)
            self._new.append((self._inside, text))

    def _take(self) -> list[Delta]:
        """Return what is new; neighbours of a kind are one."""
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
    """Take a whole answer apart, given as ids."""
    reader = Reader(tokenizer, thinking)
    reader.feed(ids)
    reader.finish()
    return reader.answer


def read_text(text: str, thinking: bool = False) -> Answer:
    """Take a whole answer apart, given as text with its marks in it."""
    reader = Reader(thinking=thinking)
    reader.feed_text(text)
    reader.finish()
    return reader.answer


def opens_thought(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
    """Return whether a prompt ends inside a thought, which the answer then goes on with."""
    tail = tokenizer.decode(list(prompt[-8:]), special=True)
    return tail.rstrip().endswith(THINK + HEADER.rstrip())


# ---- calls ----


class _Malformed(Exception):
    pass


def parse_call(text: str) -> ToolCall | None:
    """Read a call from the text between its marks, which may be there too; None where that is no call."""
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
    written = number.group()
    if written.lstrip("-").isdigit():
        return int(written), number.end()
    value = float(written)
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
    """Return where the next item of a list or an object begins, or its end is."""
    at = _space(text, at)
    if text.startswith(",", at):
        return _space(text, at + 1)
    if not text.startswith(end, at):
        raise _Malformed
    return at
