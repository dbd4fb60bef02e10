"""Generates dg-run's answer to a prompt: shows the canvas of each step, and prints parts that are final."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any

from dgemma.chat.answer_parser import Delta, Reader
from dgemma.chat.conversation import with_deltas
from dgemma.cli.display import Silent
from dgemma.cli.frames import Framer
from dgemma.cli.interrupts import StopOnCtrlC
from dgemma.cli.output import Speaker
from dgemma.cli.record.recorder import Recorder
from dgemma.cli.running import traffic_facts
from dgemma.events import Block, Result, Step
from dgemma.model import Model
from dgemma.options import Setting
from dgemma.session import Prompt


class Watch:
    """Turns the events of a stream into frames, for a display and recorders."""

    def __init__(self, model: Model, steps: int, shown: Silent, recorders: Sequence[Recorder] = ()) -> None:
        """Take the display and recorders that get the frames. steps: the most steps of a canvas."""
        self._framer = Framer(model.tokenizer, model.config, steps)
        self._shown = shown
        self._recorders = recorders

    def step(self, step: Step) -> None:
        frame = self._framer.frame(step)
        self._shown.step(frame)
        for recorder in self._recorders:
            recorder.step(frame)

    def block(self, block: Block) -> None:
        self._framer.finished(block.ids)


def reader_for(model: Model, prompt: Prompt, raw: bool) -> Reader:
    """Return the parser for the answer; without a chat template, or with --raw, all of the answer is text."""
    marks = model.tokenizer.chat_template is not None and not raw
    return Reader.behind(model.tokenizer, model.prompt_ids(prompt) if marks else [], marks)


def work(
    model: Model,
    prompt: Prompt,
    settings: dict[str, Any],
    reader: Reader,
    shown: Silent,
    watch: Watch,
    speaker: Speaker | None,
) -> Result:
    """Generate an answer, show it, and say it. Raises Stopped after Ctrl-C, with what is finished of it."""
    ids = model.prompt_ids(prompt)
    with (
        model.session_for(ids, **settings) as session,
        StopOnCtrlC(session.stop, shown.stopping),
        closing(with_deltas(session.stream(ids, on_encode=shown.encoded, **settings), reader)) as events,
    ):
        for event in events:
            if isinstance(event, Step):
                watch.step(event)
            elif isinstance(event, Block):
                watch.block(event)
            elif isinstance(event, Delta):
                if speaker is not None:
                    speaker.hear(event)
            else:
                return event
    raise AssertionError("a stream ends with a Result")


def as_object(model: Model, result: Result, reader: Reader, settings: dict[str, Setting]) -> dict[str, Any]:
    """Return the object that --json prints."""
    parts = reader.answer
    fields = {**asdict(result), "text": parts.text, "thinking": parts.thinking}
    fields["tool_calls"] = [{"name": call.name, "arguments": call.arguments} for call in parts.calls]
    fields |= {"settings": settings, "model": model.path, "backend": model.backend, "threads": model.threads}
    fields |= traffic_facts(model)
    return fields
