"""Rewrites one passage of a text, and keeps the text around it."""

from __future__ import annotations

import difflib
import io
import os
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dgemma.errors import UsageError
from dgemma.infill.fill import Filled, Hole, Layout, TrialSteps, done, filling, within
from dgemma.session import OnEncode, OnStep, Session

if TYPE_CHECKING:
    from dgemma.model import Model

ESCAPES = {ord(letter): f"\\{name}" for letter, name in zip('\a\b\t\n\v\f\r"\\', 'abtnvfr"\\', strict=True)}
FOLLOWS = "\n\nThe text goes on after it:\n"  # in the prompt, before the text that comes behind the last canvas


@dataclass(frozen=True, slots=True)
class Edited:
    """A text with one passage rewritten. str() returns `text`."""

    text: str  # the whole text, with the new passage
    before: str  # the whole text, with the old passage
    span: tuple[int, int]  # the new passage is text[span[0]:span[1]]
    filled: Filled = field(repr=False)  # the trials in which the passage was written

    @property
    def passage(self) -> str:
        """The new passage."""
        return self.text[slice(*self.span)]

    def diff(self, name: str = "text") -> str:
        """Return a unified diff from `before` to `text`, in the form that git writes and patch -p1 reads.

        It is "" where nothing changed.
        """
        changes = list(difflib.unified_diff(lines_of(self.before), lines_of(self.text)))[2:]  # without file names
        if not changes:
            return ""
        path = posixpath.normpath(name).lstrip("/")
        names = [f"{mark} {quoted(f'{side}/{path}')}\n" for mark, side in (("---", "a"), ("+++", "b"))]
        ended = (line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in changes)
        return "".join([*names, *ended])

    def __str__(self) -> str:
        return self.text


def lines_of(text: str) -> list[str]:
    r"""Return the lines of a text, each with its newline.

    A line ends at \n only, as in diffs, and not at other characters that end a line in Unicode.
    """
    return io.StringIO(text, newline="\n").readlines()


def quoted(path: str) -> str:
    """Return a file's name for the header of a diff, as git writes it.

    A name with special bytes is quoted, and so is a name with a space at its end, which patch would drop. A name with
    other spaces is followed by a tab.
    """
    data = os.fsencode(path)
    if all(32 <= byte < 127 and byte not in b'"\\' for byte in data) and not path.endswith(" "):
        return path + "\t" * (" " in path)
    return (
        '"' + "".join(ESCAPES.get(byte) or (chr(byte) if 32 <= byte < 127 else f"\\{byte:03o}") for byte in data) + '"'
    )


def lengths_for(tokens: int) -> tuple[int, ...]:
    """Return the lengths of the hole to try for a passage of `tokens` tokens.

    All are longer than the passage: pad ids may fill the rest.

    >>> lengths_for(10)
    (12, 16, 23)
    """
    return tokens + 2, tokens + tokens // 4 + 4, tokens + tokens // 2 + 8


def edit(
    model: Model, text: str, span: tuple[int, int], instruction: str, *, on_step: OnStep | None = None, **given: Any
) -> Edited:
    """Rewrite a passage: see Model.edit."""
    with model.session(room_for(model, text, instruction, given.get("lengths"))) as session:
        return done(editing(session, text, span, instruction, **given), on_step)


def room_for(model: Model, text: str, instruction: str, lengths: Sequence[int] | None) -> int:
    """Return the context that editing needs. At most half of it is for the text behind the passage."""
    tokens = len(model.tokenizer.encode(text))
    longest = max(lengths_for(tokens) if lengths is None else lengths, default=0)
    return within(model, 4 * tokens + 2 * len(model.tokenizer.encode(instruction)) + longest)


def editing(
    session: Session,
    text: str,
    span: tuple[int, int],
    instruction: str,
    *,
    lengths: Sequence[int] | None = None,
    on_encode: OnEncode | None = None,
    **options: Any,
) -> TrialSteps[Edited]:
    """Rewrite a passage in a session. Yields after each short piece of work, so that the caller can do other work."""
    model = session.model
    begin, end = span
    if not 0 <= begin <= end <= len(text):
        raise UsageError(f"span must be within the text's {len(text)} characters, not {begin}:{end}")
    if not instruction.strip():
        raise UsageError("the instruction is empty: say what is to be done with the passage")
    passage = text[begin:end]
    tried = lengths_for(len(model.tokenizer.encode(passage, special=False))) if lengths is None else lengths
    pieces = [piece for piece in (text[:begin], Hole(), text[end:]) if piece != ""]
    message = f"{instruction}\n{passage}"
    layout = Layout.of(model, pieces, [max(tried)], special=False)
    if layout.last < len(layout.ids):
        n = model.config.canvas_length
        spare = session.context // 2 - len(model.tokenizer.encode(message)) - 2 * n
        message += FOLLOWS + model.tokenizer.decode(layout.ids[layout.last : layout.last + max(0, spare)])
    prompt = [{"role": "user", "content": message}]
    filled = yield from filling(session, pieces, prompt, lengths=tried, on_encode=on_encode, **options)
    return Edited(filled.text, text, (begin, begin + len(filled.holes[0])), filled)
