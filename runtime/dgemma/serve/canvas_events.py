"""Makes the canvas events of a stream, for clients that watch an answer settle."""

from __future__ import annotations

from typing import Any

from dgemma.chat.answer_parser import Answer
from dgemma.detokenizer import Detokenizer
from dgemma.serve.generation import CanvasStep
from dgemma.tokenizer import Tokenizer


class Canvases:
    """Makes the events of one request."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._detokenizer: Detokenizer | None = None

    def told(self, told: CanvasStep) -> dict[str, Any]:
        """Return the event of a step: of each token its id, text and entropy in nats, and whether it was accepted."""
        step = told.step
        self._detokenizer = self._detokenizer or Detokenizer(self._tokenizer)
        ids = step.canvas.tolist()
        event = {
            "choice": told.choice,
            "block": step.block,
            "step": step.index,
            "place": step.place,
            "temperature": step.temperature,
            "mean_entropy": step.mean_entropy,
            "converged": step.converged,
            "ids": ids,
            "text": [text or self._mark(token) for token, text in self._detokenizer.texts(ids)],
            "entropy": [round(entropy, 4) for entropy in step.entropy.tolist()],
            "accepted": step.accepted.tolist(),
            "final": len(step.final),
        }
        if told.end is not None:
            event["end"] = told.end
        if told.draft is not None:
            event["draft"] = _draft(told.draft)
        if told.tried is not None:
            pinned = told.tried.pinned[step.place : step.place + len(ids)]
            event |= {"trial": told.tried.trial, "pinned": pinned}
        return event

    def _mark(self, token: int) -> str:
        """Return the name of a control token; nothing for a byte whose text stands with its neighbour."""
        assert self._detokenizer is not None
        return "" if self._detokenizer.plain(token) else self._detokenizer.name(token)


def _draft(answer: Answer) -> dict[str, str]:
    calls = "".join(call.text for call in answer.calls)
    return {"content": answer.text + calls, "reasoning_content": answer.thinking}
