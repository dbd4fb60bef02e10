"""A conversation: messages and answers in turn, in one session."""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from dgemma.chat.answer_parser import Answer, Delta, Reader
from dgemma.chat.messages import plain
from dgemma.errors import Error, UsageError
from dgemma.events import Block, Result, Step
from dgemma.session import Event, OnEncode, Session

if TYPE_CHECKING:
    from dgemma.model import Model

BUSY = "this conversation is answering; finish its stream or close it first"

ConversationEvent: TypeAlias = Step | Block | Delta | Result


@dataclass(frozen=True, slots=True)
class Reply:
    """A finished turn. `result` is None where it was left early: `answer` is what was committed until then."""

    answer: Answer
    result: Result | None
    encoded: int  # of the prompt's tokens
    reused: int  # of them: they were in the cache


def taken_apart(events: Generator[Event, None, None], reader: Reader) -> Generator[ConversationEvent, None, None]:
    """Yield the events of a stream, and behind each Block the Deltas of the answer that it makes final."""
    with closing(events):
        for event in events:
            if isinstance(event, Result):
                yield from reader.finish()
            yield event
            if isinstance(event, Block):
                yield from reader.feed(event.ids)


class Conversation:
    """Messages, and a session for their answers; a context manager.

    The next answer reuses the session as far as its prompt begins like the one before.

    `messages` ({"role": ..., "content": ...}: see dgemma.chat.messages) may be changed between turns; a message's
    "thinking" is kept, but no prompt contains it. `thinking` lets the model think. context: tokens to have room for;
    None: room grows with what is asked, up to the model's own. One thread at a time; conversations of one model are
    free of each other.

        with Conversation(model, system="Be brief.") as chat:
            print(chat.ask("Why is the sky blue?").answer.text)
            print(chat.ask("And at night?").answer.text)
    """

    def __init__(
        self,
        model: Model,
        messages: Sequence[Mapping[str, Any]] = (),
        *,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = False,
        context: int | None = None,
    ) -> None:
        self.messages: list[dict[str, Any]] = plain([*messages])
        if self.messages:
            model.tokenizer.read(self.messages)  # refuses what no prompt could be made of
        self.tools = tools
        self.thinking = thinking
        self.last: Reply | None = None
        self._grows = context is None
        self._session = model.session(context)
        self._busy = threading.Lock()
        if system is not None:
            self.system = system

    def close(self) -> None:
        """Free the session. A second call does nothing."""
        self._session.close()

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def model(self) -> Model:
        return self._session.model

    @property
    def session(self) -> Session:
        """The session of the answers; it is another one after more room was needed."""
        return self._session

    @property
    def system(self) -> str | None:
        """The text of the system message; setting it to None takes the message away."""
        first = self.messages[0] if self.messages else {}
        return first.get("content") if first.get("role") in ("system", "developer") else None

    @system.setter
    def system(self, text: str | None) -> None:
        if self.system is not None:
            del self.messages[0]
        if text is not None:
            self.messages.insert(0, {"role": "system", "content": text})

    def prompt(self) -> list[int]:
        """Return the ids that ask for an answer to the messages, by the file's chat template."""
        told = [{key: value for key, value in message.items() if key != "thinking"} for message in self.messages]
        return self.model.tokenizer.chat(told, self.tools, self.thinking)

    def ask(self, text: str, **options: Any) -> Reply:
        """Say something and return the answer; the options are those of Model.generate."""
        self.say(text)
        with closing(self.stream(**options)) as events:
            for _ in events:
                pass
        assert self.last is not None
        return self.last

    def say(self, text: str) -> None:
        """Add a message of the user's. One that is still without an answer is replaced."""
        if self.unanswered:
            del self.messages[-1]
        self.messages.append({"role": "user", "content": text})

    @property
    def unanswered(self) -> bool:
        """Whether the last message is the user's."""
        return bool(self.messages) and self.messages[-1].get("role") == "user"

    def unanswer(self) -> bool:
        """Take the last answer away, for stream() to give another. Returns whether there is a message to answer."""
        if self.messages and self.messages[-1].get("role") == "assistant":
            del self.messages[-1]
        return self.unanswered

    def stream(self, *, on_encode: OnEncode | None = None, **options: Any) -> Generator[ConversationEvent, None, None]:
        """Answer the last message: yield Steps, Blocks and Deltas as they happen, then the Result.

        The answer joins the messages, and `last` tells of it. So does what is committed of one that is left early, if
        there is text in it. Raises UsageError where there is nothing to answer or the context is too short, and Error
        while another answer is made.
        """
        if not self.unanswered and (not self.messages or self.messages[-1].get("role") != "tool"):
            raise UsageError("there is no message to answer")
        if self._busy.locked():
            raise Error(BUSY)
        ids = self.prompt()
        self._make_room(len(ids) + self._canvases(options.get("max_tokens")))
        return self._stream(ids, on_encode, options)

    def _stream(
        self, ids: list[int], on_encode: OnEncode | None, options: dict[str, Any]
    ) -> Generator[ConversationEvent, None, None]:
        tokenizer = self.model.tokenizer
        reader = Reader.behind(tokenizer, ids, marks=tokenizer.chat_template is not None)
        if not self._busy.acquire(blocking=False):
            raise Error(BUSY)
        result: Result | None = None
        reused = 0
        self.last = None
        try:
            reused = self._session.shared(ids)
            events = self._session.stream(ids, on_encode=on_encode, **options)
            with closing(taken_apart(events, reader)) as told:
                for event in told:
                    if isinstance(event, Result):
                        result = event
                    yield event
        finally:
            reader.finish()
            answer = reader.answer
            self.last = Reply(answer, result, len(ids) - reused, reused)
            if result is not None or answer.text or answer.calls:
                message = answer.message()
                if answer.thinking:
                    message["thinking"] = answer.thinking
                self.messages.append(message)
            self._busy.release()

    def _canvases(self, max_tokens: int | None) -> int:
        """Return the tokens of context that an answer of so many tokens takes behind a prompt.

        These are its canvases, but for the last.
        """
        n: int = self.model.config.canvas_length
        return (-(-int(self.model.settings(max_tokens=max_tokens)["max_tokens"]) // n) - 1) * n

    def _make_room(self, needed: int) -> None:
        session = self._session
        most: int = self.model.config.context_length if self._grows else session.context
        if needed > most:
            raise UsageError(f"the conversation and its answer need a context of {needed} tokens, more than {most}")
        if needed > session.context:
            self._session = self.model.session(min(most, max(needed, 2 * session.context)))
            session.close()
