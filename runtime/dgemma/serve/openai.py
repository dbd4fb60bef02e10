"""Writes answers as OpenAI's JSON: whole, or as chunks of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from typing import Any

from dgemma.chat.answer_parser import Delta, ToolCall
from dgemma.serve.canvas_events import CanvasEvents
from dgemma.serve.generation import AnswerDelta, AnswerFinished, CanvasStep, PromptEncoded, WorkerEvent
from dgemma.serve.requests import Work
from dgemma.tokenizer import Tokenizer


class Reply:
    """The answer to one request.

    Pass each of the worker's events to chunks(), and send what it yields; or call whole() at the end.
    """

    def __init__(self, work: Work, tokenizer: Tokenizer, model: str, fingerprint: str) -> None:
        self._work, self._canvases = work, CanvasEvents(tokenizer)
        chat = work.endpoint == "chat"
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._head = {"id": self.id, "created": int(time.time()), "model": model, "system_fingerprint": fingerprint}
        self._object = "chat.completion" if chat else "text_completion"
        self._choices: list[_Choice] = []
        self.prompt = self.cached = self.tokens = self.steps = 0

    def chunks(self, event: WorkerEvent) -> Iterator[dict[str, Any]]:
        """Yield the chunks that tell the client of an event."""
        if isinstance(event, PromptEncoded):
            self.prompt += event.prompt
            self.cached += event.cached
            for _ in range(self._work.n):
                self._choices.append(_Choice(len(self._choices)))
                if self._work.endpoint == "chat":
                    yield self._chunk(self._choices[-1].index, {"role": "assistant", "content": ""})
            return
        if not isinstance(event, (CanvasStep, AnswerDelta, AnswerFinished)):
            return
        choice = self._choices[event.choice]
        if isinstance(event, CanvasStep):
            yield {**self._head, "object": self._chunk_object, "choices": [], "canvas": self._canvases.event(event)}
        elif isinstance(event, AnswerFinished):
            choice.reason, choice.figures = event.reason, event.figures
            self.tokens += event.tokens
            self.steps += event.figures["steps"]
            yield self._chunk(choice.index, {}, event.reason, event.figures)
        elif self._work.endpoint == "completions":
            choice.text += event.delta.text
            yield self._chunk(choice.index, event.delta.text)
        else:
            yield self._chunk(choice.index, choice.add(event.delta, self._work.calls))

    def final_chunks(self) -> Iterator[dict[str, Any]]:
        """Yield the chunk behind all choices, if it was asked for."""
        if self._work.usage:
            yield {**self._head, "object": self._chunk_object, "choices": [], "usage": self.usage()}

    def whole(self) -> dict[str, Any]:
        choices = [self._whole(choice) for choice in self._choices]
        return {**self._head, "object": self._object, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.tokens,
            "total_tokens": self.prompt + self.tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }

    @property
    def _chunk_object(self) -> str:
        return self._object + ("" if self._work.endpoint == "completions" else ".chunk")

    def _chunk(
        self, index: int, what: Any, reason: str | None = None, figures: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": None}
        if self._work.endpoint == "chat":
            choice["delta"] = what
        else:
            choice["text"] = what or ""
        if figures is not None:
            choice["diffusion"] = figures
        return {**self._head, "object": self._chunk_object, "choices": [choice]}

    def _whole(self, choice: _Choice) -> dict[str, Any]:
        whole: dict[str, Any] = {"index": choice.index, "finish_reason": choice.reason, "logprobs": None}
        if self._work.endpoint == "completions":
            return {**whole, "text": choice.text, "diffusion": choice.figures}
        calls = [_call(call, name) for call, name in choice.calls]
        message: dict[str, Any] = {"role": "assistant", "content": choice.text if choice.text or not calls else None}
        if choice.thinking:
            message["reasoning_content"] = choice.thinking
        if calls:
            message["tool_calls"] = calls
        return {**whole, "message": message, "diffusion": choice.figures}


class _Choice:
    def __init__(self, index: int) -> None:
        self.index = index
        self.text = self.thinking = ""
        self.calls: list[tuple[ToolCall, str]] = []  # each with its id
        self.reason = "stop"
        self.figures: dict[str, Any] = {}

    def add(self, delta: Delta, calls: bool) -> dict[str, Any]:
        """Return the delta of a chunk.

        calls: tool calls are sent as such; else they are text.
        """
        if delta.kind == "thinking":
            self.thinking += delta.text
            return {"reasoning_content": delta.text}
        if delta.call is None or not calls:
            self.text += delta.text
            return {"content": delta.text}
        name = f"call_{secrets.token_hex(12)}"
        self.calls.append((delta.call, name))
        return {"tool_calls": [{"index": len(self.calls) - 1, **_call(delta.call, name)}]}


def _call(call: ToolCall, name: str) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {"id": name, "type": "function", "function": {"name": call.name, "arguments": arguments}}
