"""Turns token ids into text one by one, for text that is shown while it is generated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dgemma.tokenizer import Tokenizer

BROKEN = "\ufffd"  # the text of a byte token that is only a part of a character


class Detokenizer:
    """Gives the text of each of a tokenizer's ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._plain: dict[int, str] = {}
        self._byte: dict[int, bool] = {}
        rare = tokenizer.encode("\U0010ffff")  # a character that is encoded in bytes, if the vocabulary has bytes
        self._broken = rare[:1] if self.plain(rare[0]) == BROKEN else []

    def plain(self, token: int) -> str:
        """Return an id's own text: "" for a control token, U+FFFD for a part of a character."""
        text = self._plain.get(token)
        if text is None:
            text = self._plain[token] = self._tokenizer.decode([token])
        return text

    def byte(self, token: int) -> bool:
        """Return whether a token is one byte of UTF-8; it has a text only together with neighbouring bytes."""
        known = self._byte.get(token)
        if known is None:
            text = self.plain(token)
            known = text == BROKEN
            # An ASCII byte token looks like a character. Followed by an invalid byte, it alone decodes to U+FFFD too.
            if text.isascii() and len(text) == 1 and self._broken:
                known = self._tokenizer.decode([token, *self._broken]) == 2 * BROKEN
            self._byte[token] = known
        return known

    def name(self, token: int) -> str:
        """Return how a token is written in the vocabulary, control tokens too."""
        return self._tokenizer.decode([token], special=True)

    def id(self, name: str) -> int | None:
        """Return the token of that name, if the vocabulary has it as one."""
        ids = self._tokenizer.encode(name)
        return ids[0] if len(ids) == 1 and self.name(ids[0]) == name else None

    def joined(self, ids: list[int]) -> str:
        """Return the text of neighbouring bytes."""
        return self._tokenizer.decode(ids) if ids else ""

    def texts(self, ids: Iterable[int]) -> Iterator[tuple[int, str]]:
        """Yield each id with its text; the first of neighbouring bytes has the text of all of them, the others ""."""
        run: list[int] = []  # neighbouring bytes, and tokens without text between them
        for token in ids:
            if self.byte(token) or (run and not self.plain(token)):
                run.append(token)
                continue
            yield from self._run(run)
            run = []
            yield token, self.plain(token)
        yield from self._run(run)

    def _run(self, run: list[int]) -> Iterator[tuple[int, str]]:
        text = self.joined(run)
        for token in run:
            yield token, text
            text = ""
