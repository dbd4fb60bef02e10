"""Answers many requests, given as lines of JSON. dg-run --batch and examples/batch_ray.py use it.

{"prompt": "Why is the sky blue?", "id": 7, "seed": 3}
{"messages": [{"role": "user", "content": "Hi"}], "thinking": true, "max_tokens": 512, "effort": "low"}
"""

from __future__ import annotations

from typing import Any

from dgemma.chat.answer_parser import Reader
from dgemma.chat.template import no_template
from dgemma.errors import Error, UsageError
from dgemma.files import json_lines
from dgemma.model import Model
from dgemma.options import options
from dgemma.session import Session

FIELDS = {
    "prompt": "a text: one user message through the file's chat template, if it has one",
    "messages": "or a chat: {role, content} each, as OpenAI has them",
    "system": "a system message before the prompt",
    "thinking": "true: the model thinks before it answers",
    "tools": "functions that it may call, as OpenAI has them",
    "raw": "true: no chat template, the model goes on from the prompt",
    "id": "any value; the answer has the same id",
}


class Batch:
    """Answers lines one after the other, in one session; a context manager.

    A beginning that a prompt shares with the one before is not encoded again.

    defaults: fields (see FIELDS) and generation options for lines that do not give them. Only one thread at a time may
    use a Batch.
    """

    def __init__(self, model: Model, **defaults: Any) -> None:
        self._model = model
        self._defaults = {name: value for name, value in defaults.items() if value is not None}
        self._session: Session | None = None
        model.settings(**{name: value for name, value in self._defaults.items() if name not in FIELDS})

    def close(self) -> None:
        if self._session is not None:
            self._session.close()
        self._session = None

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def answer(self, line: str | bytes) -> dict[str, Any]:
        """Answer a line.

        Returns a dict with text, thinking, tool_calls and figures; or with "error", its type and message, for a line
        that is wrong or could not be answered. It has the line's "id", if the line has one.
        """
        answer: dict[str, Any] = {}
        try:
            given = self._read(line)
            if "id" in given:
                answer["id"] = given.pop("id")
            return answer | self._answer(given)
        except (Error, TypeError) as failure:
            return answer | {"error": {"type": type(failure).__name__, "message": " ".join(str(failure).split())}}

    def _read(self, line: str | bytes) -> dict[str, Any]:
        given = json_lines.value(line)
        if not isinstance(given, dict):
            raise UsageError("the line is no JSON object")
        return given

    def _answer(self, given: dict[str, Any]) -> dict[str, Any]:
        known = {*FIELDS, *options(), "effort"}
        if unknown := sorted(set(given) - known):
            raise UsageError(f"there is no field {unknown[0]!r}; the fields are {', '.join(sorted(known))}")
        request = self._defaults | given
        settings = {name: value for name, value in request.items() if name not in FIELDS}
        used = self._model.settings(**settings)
        if "system" in given and _begins_with_system(given.get("messages")):
            raise UsageError("a line has one system message: system, or the first of messages")
        ids, marks = self._prompt(request)
        n = self._model.config.canvas_length
        session = self._session_for(len(ids) + (-(-int(used["max_tokens"]) // n) - 1) * n)
        result = session.generate(ids, **settings)
        reader = Reader.behind(self._model.tokenizer, ids, marks)
        reader.feed(result.ids)
        reader.finish()
        parts = reader.answer
        return {
            "text": parts.text,
            "thinking": parts.thinking,
            "tool_calls": [{"name": call.name, "arguments": call.arguments} for call in parts.calls],
            "finish_reason": result.finish_reason,
            "prompt_tokens": result.prompt_tokens,
            "encoded_tokens": result.encoded_tokens,
            "tokens": len(result.ids),
            "steps": result.steps,
            "converged": result.converged,
            "fault": result.fault,
            "seed": result.seed,
            "seconds": round(result.seconds, 6),
        }

    def _prompt(self, request: dict[str, Any]) -> tuple[list[int], bool]:
        """Return the ids of a request's prompt, and whether thoughts and calls are marked in the answer."""
        prompt, messages, system = request.get("prompt"), request.get("messages"), request.get("system")
        thinking, tools, raw = request.get("thinking", False), request.get("tools"), request.get("raw", False)
        if (prompt is None) == (messages is None):
            raise UsageError("a line has a prompt or messages, one of them")
        _check("prompt", prompt, str)
        _check("system", system, str)
        _check("thinking", thinking, bool)
        _check("raw", raw, bool)
        for name, value in (("messages", messages), ("tools", tools)):
            if value is not None and not (isinstance(value, list) and all(isinstance(each, dict) for each in value)):
                raise UsageError(f"{name} must be a list of objects")
        if not (prompt or messages):
            raise UsageError("empty prompt")
        templated = self._model.tokenizer.chat_template is not None and not raw
        if not templated:
            for name, value in (("system", system), ("thinking", thinking), ("tools", tools), ("messages", messages)):
                if value and (name != "messages" or raw):
                    raise UsageError(no_template(f"{name} needs", "there is none to use"))
            return self._model.prompt_ids(prompt or messages or []), False
        if messages is None:
            messages = [{"role": "user", "content": prompt}]
        if system is not None and not _begins_with_system(messages):
            messages = [{"role": "system", "content": system}, *messages]
        return self._model.tokenizer.chat(messages, tools, thinking), True

    def _session_for(self, needed: int) -> Session:
        """Return a session with a context of at least `needed` tokens: the current one where it is long enough."""
        most: int = self._model.config.context_length
        if needed > most:
            raise UsageError(f"the prompt and its answer need a context of {needed} tokens, more than {most}")
        before = 0 if self._session is None else self._session.context
        if self._session is None or needed > before:
            self.close()
            self._session = self._model.session(min(most, max(needed, 2 * before)))
        return self._session


def _begins_with_system(messages: Any) -> bool:
    first = messages[0] if isinstance(messages, list) and messages else None
    return isinstance(first, dict) and first.get("role") in ("system", "developer")


def _check(name: str, value: Any, kind: type) -> None:
    if value is not None and not isinstance(value, kind):
        raise UsageError(f"{name} must be {'a text' if kind is str else 'true or false'}")
