"""Makes the canvas events of a stream, for clients that show the denoising steps."""

from __future__ import annotations

from typing import Any

from dgemma.chat.answer_parser import Answer
from dgemma.detokenizer import Detokenizer
from dgemma.serve.generation import CanvasStep
from dgemma.tokenizer import Tokenizer


class CanvasEvents:
    """Makes the events of one request."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._detokenizer: Detokenizer | None = None

    def event(self, event: CanvasStep) -> dict[str, Any]:
        """Return the event of a step: of each token its id, text and entropy in nats, and whether it was accepted."""
        step = event.step
        self._detokenizer = self._detokenizer or Detokenizer(self._tokenizer)
        ids = step.canvas.tolist()
        found = {
            "choice": event.choice,
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
        if event.end is not None:
            found["end"] = event.end
        if event.draft is not None:
            found["draft"] = _draft(event.draft)
        if event.trial_step is not None:
            pinned = event.trial_step.pinned[step.place : step.place + len(ids)]
            found |= {"trial": event.trial_step.trial, "pinned": pinned}
        return found

    def _mark(self, token: int) -> str:
        """Return the name of a control token; nothing for a byte whose text stands with its neighbour."""
        assert self._detokenizer is not None
        return "" if self._detokenizer.plain(token) else self._detokenizer.name(token)


def _draft(answer: Answer) -> dict[str, str]:
    calls = "".join(call.text for call in answer.calls)
    return {"content": answer.text + calls, "reasoning_content": answer.thinking}
