"""Rewrites a passage of a text inside its surroundings."""

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
FOLLOWS = "\n\nThe text goes on after it:\n"  # introduces what stands behind the last canvas


@dataclass(frozen=True, slots=True)
class Edited:
    """A text with one passage rewritten. str() gives all of it."""

    text: str
    before: str  # the whole text, as it was
    span: tuple[int, int]  # where the new passage stands in `text`, in characters
    filled: Filled = field(repr=False)  # how it was written

    @property
    def passage(self) -> str:
        """The new passage."""
        return self.text[slice(*self.span)]

    def diff(self, name: str = "text") -> str:
        """Return a unified diff from before to after, as git has it and patch -p1 reads it.

        It is empty where nothing changed.
        """
        changes = list(difflib.unified_diff(lines_of(self.before), lines_of(self.text)))[2:]  # without the names
        if not changes:
            return ""
        path = posixpath.normpath(name).lstrip("/")
        names = [f"{mark} {quoted(f'{side}/{path}')}\n" for mark, side in (("---", "a"), ("+++", "b"))]
        ended = (line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in changes)
        return "".join([*names, *ended])

    def __str__(self) -> str:
        return self.text


def lines_of(text: str) -> list[str]:
    r"""Return the lines of a text, each with its end.

    A line ends at \n, as diffs have it, and nowhere else that Unicode ends a line.
    """
    return io.StringIO(text, newline="\n").readlines()


def quoted(path: str) -> str:
    """Return a file's name in a diff's head, as git writes it.

    It is in quotes where bytes in it need that, with a tab behind spaces. A space at the end is in quotes too: patch
    would leave it out.
    """
    data = os.fsencode(path)
    if all(32 <= byte < 127 and byte not in b'"\\' for byte in data) and not path.endswith(" "):
        return path + "\t" * (" " in path)
    return (
        '"' + "".join(ESCAPES.get(byte) or (chr(byte) if 32 <= byte < 127 else f"\\{byte:03o}") for byte in data) + '"'
    )


def lengths_for(tokens: int) -> tuple[int, ...]:
    """Return the lengths to try for the rewrite of so many tokens.

    They leave a little and a good deal of room, which filler may take.

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
    """Return the context that editing needs: what follows the passage may take half of it, beside the message."""
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
    """Rewrite a passage in a session, in turns between which others may work."""
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
