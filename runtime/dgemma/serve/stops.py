"""Stop texts: an answer ends before the first of them, wherever it is cut into pieces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from dgemma.chat.answer_parser import Delta


class StopFilter:
    """Passes deltas on, and holds back what may become a stop text. Thoughts are not searched. `hit`: one was found."""

    def __init__(self, texts: tuple[str, ...]) -> None:
        self._texts = texts
        self._held = ""
        self.hit = False

    def feed(self, deltas: Iterable[Delta]) -> Iterator[Delta]:
        for delta in deltas:
            if self.hit:
                return
            if delta.kind == "text" and self._texts:
                yield from self._text(delta)
            else:
                yield from self.finish()
                yield delta

    def finish(self) -> Iterator[Delta]:
        """End the answer, or its text: what was held back is passed on."""
        held, self._held = self._held, ""
        if held:
            yield Delta("text", held)

    def _text(self, delta: Delta) -> Iterator[Delta]:
        text = self._held + delta.text
        found = [(at + len(stop), at) for stop in self._texts if (at := text.find(stop)) >= 0]
        if found:  # the text that is complete first counts: so it does not matter how the answer is cut
            self.hit, self._held, text = True, "", text[: min(found)[1]]
        else:
            keep = max(self._may_become(text, stop) for stop in self._texts)
            text, self._held = text[: len(text) - keep], text[len(text) - keep :]
        if text:
            yield replace(delta, text=text)

    @staticmethod
    def _may_become(text: str, stop: str) -> int:
        """Return the length of the longest end of the text that the stop text begins with."""
        longest = min(len(stop) - 1, len(text))
        return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
