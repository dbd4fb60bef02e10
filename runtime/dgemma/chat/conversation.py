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
from dgemma.session import Event, OnEncode, Session, needed_context

if TYPE_CHECKING:
    from dgemma.model import Model

BUSY = "this conversation is answering; finish its stream or close it first"

ConversationEvent: TypeAlias = Step | Block | Delta | Result


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to one message. `result` is None where the stream was stopped early; `answer` is then incomplete."""

    answer: Answer
    result: Result | None
    encoded: int  # tokens of the prompt that had to be encoded
    reused: int  # tokens of the prompt that the session held already


def with_deltas(events: Generator[Event, None, None], reader: Reader) -> Generator[ConversationEvent, None, None]:
    """Yield the events of a stream, and after each Block the Deltas for the ids of that block."""
    with closing(events):
        for event in events:
            if isinstance(event, Result):
                yield from reader.finish()
            yield event
            if isinstance(event, Block):
                yield from reader.feed(event.ids)


class Conversation:
    """A list of messages, and a session for the answers; a context manager.

    Only the part of a prompt that differs from the prompt before is encoded.

    `messages` ({"role": ..., "content": ...}: see dgemma.chat.messages) may be changed between answers. A message's
    "thinking" is kept in the list, but no prompt contains it. `thinking`: whether the model thinks before it answers.
    context: the most tokens that the session can hold; None: it grows as needed, up to the model's context. Only one
    thread at a time may use a conversation; several conversations of one model do not affect each other.

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
            model.tokenizer.read(self.messages)  # raises for messages that no prompt can be made of
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
        """The current session. It is replaced by a larger one when a prompt and its answer need more context."""
        return self._session

    @property
    def system(self) -> str | None:
        """The text of the system message, or None; setting it to None removes the message."""
        first = self.messages[0] if self.messages else {}
        return first.get("content") if first.get("role") in ("system", "developer") else None

    @system.setter
    def system(self, text: str | None) -> None:
        if self.system is not None:
            del self.messages[0]
        if text is not None:
            self.messages.insert(0, {"role": "system", "content": text})

    def prompt(self) -> list[int]:
        """Return the ids of the prompt for an answer to the messages, by the file's chat template."""
        messages = [{key: value for key, value in message.items() if key != "thinking"} for message in self.messages]
        return self.model.tokenizer.chat(messages, self.tools, self.thinking)

    def ask(self, text: str, **options: Any) -> Reply:
        """Add a user message and return the answer; the options are those of Model.generate."""
        self.say(text)
        with closing(self.stream(**options)) as events:
            for _ in events:
                pass
        assert self.last is not None
        return self.last

    def say(self, text: str) -> None:
        """Add a user message. It replaces a last user message that has no answer yet."""
        if self.unanswered:
            del self.messages[-1]
        self.messages.append({"role": "user", "content": text})

    @property
    def unanswered(self) -> bool:
        """Whether the last message is the user's."""
        return bool(self.messages) and self.messages[-1].get("role") == "user"

    def unanswer(self) -> bool:
        """Remove the last answer, so that stream() can give another. Returns whether there is a message to answer."""
        if self.messages and self.messages[-1].get("role") == "assistant":
            del self.messages[-1]
        return self.unanswered

    def stream(self, *, on_encode: OnEncode | None = None, **options: Any) -> Generator[ConversationEvent, None, None]:
        """Answer the last message: yield Steps, Blocks and Deltas as they happen, then the Result.

        The answer is added to the messages, and `last` is its Reply. Of a stream that is stopped early, the finished
        blocks are added, if they have text. Raises UsageError where there is nothing to answer or the context is too
        short, and Error while another answer is being generated.
        """
        if not self.unanswered and (not self.messages or self.messages[-1].get("role") != "tool"):
            raise UsageError("there is no message to answer")
        if self._busy.locked():
            raise Error(BUSY)
        ids = self.prompt()
        self._make_room(needed_context(self.model.config, len(ids), options.get("max_tokens") or 0))
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
            with closing(with_deltas(events, reader)) as events_and_deltas:
                for event in events_and_deltas:
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

    def _make_room(self, needed: int) -> None:
        session = self._session
        most: int = self.model.config.context_length if self._grows else session.context
        if needed > most:
            raise UsageError(f"the conversation and its answer need a context of {needed} tokens, more than {most}")
        if needed > session.context:
            self._session = self.model.session(min(most, max(needed, 2 * session.context)))
            session.close()
