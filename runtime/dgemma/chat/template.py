"""Renders chat templates in a separate process.

A template is code from a stranger's file. Jinja's sandbox keeps it away from the machine's files, but does not stop an
endless loop or a template that fills the memory; the system's limits on a process do. There is one such process, which
is started when it is needed.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from dgemma.chat.messages import WHOLE_MESSAGE
from dgemma.chat.template_worker import read, write
from dgemma.errors import FormatError, SystemFailure, UsageError

WORKER = Path(__file__).with_name("template_worker.py")


def no_template(needs: str, where: str = "this file has none") -> str:
    """Return the error message for a chat template that is missing. needs: what requires one, such as "tools need"."""
    return f"{needs} a chat template, and {where}"


class TakesTooLong(UsageError):
    """A template was stopped because it took too much processor time."""


@dataclass(frozen=True, slots=True)
class Reads:
    """The inputs that a template reads: fields of messages (WHOLE_MESSAGE: all of them), and variables."""

    fields: frozenset[str]
    names: frozenset[str]


class Renderer:
    """Renders templates in one other process, which threads use one after the other.

    seconds: the most processor time for one text; memory: the most bytes of the process's address space; most: the most
    characters of a text.
    """

    def __init__(self, seconds: float = 5, memory: int = 1 << 30, most: int = 1 << 26) -> None:
        self._limits = (seconds, memory, most)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, template: str, names: Mapping[str, Any]) -> str:
        """Return the text that a template writes.

        Raises FormatError for a text that is no valid template; UsageError where the template refuses the messages, or
        takes too much time or memory, or writes too much; SystemFailure where no process can be started.
        """
        return str(self._answer({"template": template, "names": names})["text"])

    def reads(self, template: str) -> Reads:
        """Return what a template reads. Raises as render() does."""
        found = self._answer({"template": template})
        return Reads(frozenset(found["fields"]), frozenset(found["names"]))

    def _answer(self, request: Any) -> dict[str, Any]:
        with self._lock:
            try:
                reply = self._ask(request)
            except BaseException:  # Ctrl-C too: otherwise the next request would get the reply to this one
                self._stop(kill=True)
                raise
        if "invalid" in reply:
            raise FormatError(f"the file's chat template is no Jinja template: {reply['invalid']}")
        if "refused" in reply:
            kind = TakesTooLong if reply.get("late") else UsageError
            raise kind(f"the chat template refuses these messages: {reply['refused']}")
        return reply

    def _ask(self, request: Any) -> dict[str, Any]:
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            write(process.stdin, request)  # type: ignore[arg-type]
            reply = read(process.stdout)  # type: ignore[arg-type]
        except BrokenPipeError:
            reply = None
        if reply is not None:
            return dict(reply)
        status = self._stop(kill=False)
        if status == -signal.SIGPROF:
            return {"refused": f"it takes more than {self._limits[0]:g} seconds", "late": "yes"}
        return {"refused": f"it ended the process that renders it (status {status})"}

    def _start(self) -> subprocess.Popen[bytes]:
        path = json.dumps([entry for entry in sys.path if entry])
        try:
            process = subprocess.Popen(
                [sys.executable or "python3", "-I", str(WORKER), path, *map(str, self._limits)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in a terminal does not reach it
            )
        except OSError as failure:
            raise SystemFailure(f"cannot start the process that renders chat templates: {failure}") from None
        self._process = process
        assert process.stdout is not None
        if read(process.stdout) != "ready":  # type: ignore[arg-type]
            raise SystemFailure(
                f"cannot start the process that renders chat templates: {sys.executable} ended with {process.wait()}"
            )
        return process

    def _stop(self, kill: bool) -> int:
        """End the process, if there is one, and return its status."""
        process, self._process = self._process, None
        if process is None:
            return 0
        if kill:
            process.kill()
        assert process.stdin is not None and process.stdout is not None
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):  # the request may not be written yet
                pipe.close()
        return process.wait()

    def close(self) -> None:
        """End the process, even where a forked process holds its pipes open. The next text starts a new one."""
        with self._lock:
            self._stop(kill=True)

    def forget(self) -> None:
        """Forget the process after a fork: it belongs to the parent."""
        self._lock, self._process = threading.Lock(), None


_renderer = Renderer()
atexit.register(_renderer.close)
os.register_at_fork(after_in_child=_renderer.forget)


@lru_cache(256)
def reads(template: str) -> Reads:
    """Return what a template reads, by the one renderer of this process; cached."""
    return _renderer.reads(template)


def render_chat(template: str, names: Mapping[str, Any]) -> str:
    """Render a chat whose messages messages.read() has checked.

    Raises UsageError also where the template leaves out the content or the name of a message, as some do with a system
    message that is not the first. A template that never reads content is a fixed text, and is not checked for this:
    dg-convert warns of it.
    """
    text = render(template, names)
    messages = names["messages"]
    if reads(template).fields.isdisjoint(("content", WHOLE_MESSAGE)):
        return text
    unseen = [(i, field) for i, message in enumerate(messages) for field in _unseen(message, text)]
    if not unseen:
        return text
    # A template may change a text before it writes it. It is rendered again with a simple word in the text's place: a
    # template that writes the field at all writes this word.
    words = {(i, field): f"{field}{i}word" for i, field in unseen}
    marked = [{**m, **{field: word for (at, field), word in words.items() if at == i}} for i, m in enumerate(messages)]
    try:
        tried = render(template, {**names, "messages": marked}).casefold()
    except UsageError:
        return text
    for (i, field), word in words.items():
        if word not in tried:
            problem = f"the chat template leaves out the {field} of a {messages[i]['role']} message here"
            raise UsageError(f"messages[{i}]: {problem}", f"messages.{i}.{field}")
    return text


def _unseen(message: Mapping[str, Any], text: str) -> list[str]:
    """Return the fields of a message that a prompt may lack; a tool's name need not be there, its call has it."""
    content = message["content"]
    parts = [content] if isinstance(content, str) else [part["text"] for part in content]
    lacks = not all(part.strip() in text for part in parts)  # most templates write the text without the space around it
    named = "name" in message and message["role"] != "tool"
    return ["content"] * lacks + ["name"] * named


def render(template: str, names: Mapping[str, Any]) -> str:
    """Render a template by the one renderer of this process."""
    try:
        plain = json.loads(json.dumps(names, default=_plain))
    except (TypeError, ValueError, RecursionError) as failure:
        raise UsageError(f"messages and tools are made of text, numbers, lists and dicts: {failure}") from None
    return _renderer.render(template, plain)


@lru_cache(256)
def reads_parts(template: str, role: str) -> bool:
    """Return whether a template can write content that is a list of parts, in a message of this role.

    Some templates write the list itself, and some fail. The only way to know is to try.
    """
    question = {"role": "user", "content": "?"}
    around = {"system": ([], [question]), "assistant": ([question], [question])}
    before, behind = around.get(role, ([], []) if role == "user" else ([question], []))
    names = {"tools": None, "documents": None, "add_generation_prompt": True, "enable_thinking": False}
    tried = [{"type": "text", "text": text} for text in ("first", "second")]
    try:
        text = render(template, {"messages": [*before, {"role": role, "content": tried}, *behind], **names})
    except (UsageError, FormatError):
        return False
    return "first" in text and "second" in text and not re.search("['\"]text['\"]", text)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return list(value)
    raise TypeError(f"not {type(value).__name__}")
