"""/v1/edits: reads a request to rewrite a passage of a text, does it, and writes the answer as JSON."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, create_model

from dgemma.infill.edit import Edited, editing, lengths_for
from dgemma.infill.fill import TrialStep
from dgemma.model import Model
from dgemma.serve.canvas_events import CanvasEvents
from dgemma.serve.errors import bad_request
from dgemma.serve.generation import (
    AnswerFinished,
    CanvasStep,
    PassageRewritten,
    PromptEncoded,
    Stopwatch,
    WorkerEvent,
    WorkerEvents,
)
from dgemma.serve.parameters import split_parameters
from dgemma.serve.requests import (
    BaseWork,
    CommonRequest,
    OwnFields,
    check_model,
    delivery,
    option_fields,
    settings_of,
    validated,
)
from dgemma.session import Session
from dgemma.tokenizer import Tokenizer

Length = Annotated[int, Field(ge=1, le=1 << 20)]


class _EditDiffusion(OwnFields):
    span: tuple[int, int] | None = Field(
        None, strict=False, description="edits: where the passage stands in the input, in characters; default: all"
    )
    lengths: list[Length] | None = Field(
        None, min_length=1, max_length=16, description="edits: lengths of the new passage that are tried, in tokens"
    )


EditDiffusion = create_model("EditDiffusion", __base__=_EditDiffusion, **option_fields(but=("max_tokens",)))


class EditRequest(CommonRequest):
    """The JSON of a request for an edit."""

    input: str
    instruction: str


@dataclass
class EditWork(BaseWork):
    """A passage for the worker to rewrite."""

    text: str
    span: tuple[int, int]
    instruction: str
    prompt: list[int]  # close to what is encoded, to choose the session that holds most of it


def read_edit(body: Any, model: Model, served: str, context: int) -> EditWork:
    """Read the work that a request's JSON asks for. Raises a Refusal."""
    used, ignored = split_parameters("edits", body)
    request = validated(EditRequest, used)
    check_model(request.model, served)
    own = validated(EditDiffusion, {} if request.diffusion is None else request.diffusion, "diffusion")
    settings = settings_of(request, own)
    settings["lengths"] = own.lengths
    settings["seed"] = secrets.randbits(32) if settings["seed"] is None else settings["seed"]
    delivered = delivery(request, own, ignored)
    begin, end = (0, len(request.input)) if own.span is None else own.span
    if not 0 <= begin <= end <= len(request.input):
        raise bad_request(
            f"diffusion.span must be within the input's {len(request.input)} characters, not {begin}:{end}",
            "diffusion.span",
        )
    if not request.instruction.strip():
        raise bad_request("the instruction is empty: say what is to be done with the passage", "instruction")
    passage = request.input[begin:end]
    prompt = model.prompt_ids([{"role": "user", "content": f"{request.instruction}\n{passage}"}])
    longest = max(own.lengths or lengths_for(len(model.tokenizer.encode(passage, special=False))))
    need = len(prompt) + longest + 2 * model.config.canvas_length
    if need > context:
        raise bad_request(
            f"a passage with a prompt of {len(prompt)} tokens, rewritten in up to {longest}, needs a context of {need},"
            f" more than {context}",
            "input",
            "context_length_exceeded",
        )
    return EditWork(
        request.input,
        (begin, end),
        request.instruction,
        prompt,
        need=min(context, need + len(model.tokenizer.encode(request.input, special=False)) - len(passage)),
        settings={name: value for name, value in settings.items() if value is not None},
        **delivered,
    )


def edit_events(work: EditWork, session: Session, waited: float) -> WorkerEvents:
    """Yield the events of an edit, as answer_events() has those of answers."""
    stopwatch, steps, encoded = Stopwatch(), 0, False
    trial_steps = editing(session, work.text, work.span, work.instruction, **work.settings)
    with closing(trial_steps):
        while True:
            try:
                with stopwatch:
                    trial_step = next(trial_steps)
            except StopIteration as end:
                edited: Edited = end.value
                break
            if isinstance(trial_step, TrialStep):
                if not encoded:
                    encoded = True
                    yield PromptEncoded(session.length, 0)
                steps += 1
                yield CanvasStep(0, trial_step.step, None, trial_step=trial_step) if work.events else None
            else:
                yield None
    best = edited.filled.best
    figures: dict[str, Any] = {
        "seed": best.result.seed,
        "steps": steps,
        "converged": edited.filled.converged,
        "mean_entropy": best.mean_entropy,
        "span": list(edited.span),
        "passage": edited.passage,
        "trials": [{"lengths": list(t.lengths), "mean_entropy": t.mean_entropy} for t in edited.filled.trials],
        "seconds": {"waiting": round(waited, 6), "prompt": 0.0, "steps": round(stopwatch.seconds, 6)},
    }
    yield PassageRewritten(edited)
    yield AnswerFinished(0, "stop", len(session.model.tokenizer.encode(edited.passage, special=False)), figures)


class EditReply:
    """An answer in the shape of OpenAI's edits: whole, or as chunks of a stream."""

    def __init__(self, work: EditWork, tokenizer: Tokenizer, model: str, fingerprint: str) -> None:
        self._work = work
        self.id = f"edit-{secrets.token_hex(12)}"
        self._head = {"id": self.id, "created": int(time.time()), "model": model, "system_fingerprint": fingerprint}
        self._canvases = CanvasEvents(tokenizer)
        self._choices: list[dict[str, Any]] = []
        self._text = ""
        self.prompt = self.cached = self.tokens = self.steps = 0

    def chunks(self, event: WorkerEvent) -> Iterator[dict[str, Any]]:
        """Yield the chunks that tell the client of an event."""
        if isinstance(event, PromptEncoded):
            self.prompt, self.cached = event.prompt, event.cached
        elif isinstance(event, CanvasStep):
            yield {**self._head, "object": "edit.chunk", "choices": [], "canvas": self._canvases.event(event)}
        elif isinstance(event, PassageRewritten):
            self._text = event.edited.text
        elif isinstance(event, AnswerFinished):
            self.tokens, self.steps = event.tokens, event.figures["steps"]
            self._choices = [
                {"index": 0, "text": self._text, "finish_reason": event.reason, "diffusion": event.figures}
            ]
            yield {**self._head, "object": "edit.chunk", "choices": self._choices}

    def final_chunks(self) -> Iterator[dict[str, Any]]:
        """Yield the chunk behind the choice, if it was asked for."""
        if self._work.usage:
            yield {**self._head, "object": "edit.chunk", "choices": [], "usage": self._usage()}

    def whole(self) -> dict[str, Any]:
        return {**self._head, "object": "edit", "choices": self._choices, "usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.tokens,
            "total_tokens": self.prompt + self.tokens,
        }
