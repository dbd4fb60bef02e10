"""Turns text into token ids and back, and chats into prompts by a file's template."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from dgemma._native import ffi, lib
from dgemma.chat.messages import read, read_tools, text_of
from dgemma.chat.template import no_template, reads, reads_parts, render_chat
from dgemma.errors import UsageError, check, new_error
from dgemma.native.handle import Handle


class Tokenizer:
    """The tokenizer of a GGUF file. It may be shared by threads, and outlives the model that it came from."""

    __slots__ = ("_handle", "_pointer", "_vocab")
    _handle: Handle  # keeps the object alive that _pointer belongs to
    _pointer: Any
    _vocab: Any

    def __init__(self) -> None:
        raise TypeError("a tokenizer comes from Tokenizer.from_gguf(path) or from Model.tokenizer")

    @classmethod
    def from_gguf(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Open a file that may hold a vocabulary alone. Raises FormatError, or SystemFailure if it cannot be read."""
        name = os.fsencode(path)
        if b"\0" in name:
            raise UsageError(f"a path cannot hold a null character: {path!r}")
        out, error = ffi.new("dg_tokenizer **"), new_error()
        check(lib.dg_tokenizer_open(name, out, error), error)
        return cls._borrow(out[0], Handle(out[0], lib.dg_tokenizer_free))

    @classmethod
    def _borrow(cls, pointer: Any, owner: Handle) -> Tokenizer:
        """Wrap a `dg_tokenizer *` that lives as long as `owner`, which is kept alive."""
        self = object.__new__(cls)
        self._pointer, self._handle = pointer, owner
        self._vocab = lib.dg_tokenizer_vocab(pointer)
        return self

    def __repr__(self) -> str:
        return f"<dgemma.Tokenizer, {self.n_vocab} tokens>"

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("a dgemma.Tokenizer cannot be pickled or copied: open its file again")

    @property
    def n_vocab(self) -> int:
        return int(self._vocab.n_vocab)

    @property
    def bos_id(self) -> int | None:
        return self._id(self._vocab.bos_id)

    @property
    def eos_id(self) -> int | None:
        return self._id(self._vocab.eos_id)

    @property
    def unk_id(self) -> int | None:
        return self._id(self._vocab.unk_id)

    @property
    def pad_id(self) -> int | None:
        return self._id(self._vocab.pad_id)

    @property
    def mask_id(self) -> int | None:
        return self._id(self._vocab.mask_id)

    @staticmethod
    def _id(value: int) -> int | None:
        return int(value) if value >= 0 else None

    @property
    def kinds(self) -> bytes:
        """The type of each token, one byte each, numbered as in GGUF files.

        Marks such as <|turn> have the type that marks.def gives them, even where the file says otherwise.
        """
        return bytes(ffi.buffer(lib.dg_tokenizer_kinds(self._pointer), self.n_vocab))

    @property
    def add_bos(self) -> bool:
        """Whether prompts begin with bos_id: so where the file says so, and always where it has Gemma's <bos>."""
        return bool(self._vocab.add_bos)

    @property
    def chat_template(self) -> str | None:
        """The file's Jinja template."""
        text = self._vocab.chat_template
        return ffi.string(text).decode("utf-8", "replace") if text else None

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Return the ids of a text, without a bos_id in front.

        special: control tokens that are written out in the text, such as "<bos>", are those tokens.
        """
        data = text.encode("utf-8", "surrogatepass")  # a lone surrogate becomes U+FFFD
        capacity, count, error = len(data) + 1, ffi.new("size_t *"), new_error()
        while True:
            ids = ffi.new("int32_t[]", capacity)
            check(lib.dg_tokenize(self._pointer, data, len(data), special, ids, capacity, count, error), error)
            if count[0] <= capacity:
                return ffi.unpack(ids, count[0]) if count[0] else []
            capacity = count[0]

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """Return the text of ids. special: control tokens are written as their names instead of being left out.

        Neighbouring byte tokens are decoded as UTF-8; each byte that is not valid becomes U+FFFD. Raises UsageError for
        an id outside the vocabulary.
        """
        try:
            array = ffi.new("int32_t[]", list(ids))
        except OverflowError as failure:
            raise UsageError(f"a token id is outside the vocabulary of {self.n_vocab}: {failure}") from None
        capacity, count, error = 8 * len(array) + 32, ffi.new("size_t *"), new_error()
        while True:
            text = ffi.new("char[]", capacity)
            check(lib.dg_detokenize(self._pointer, array, len(array), special, text, capacity, count, error), error)
            if count[0] <= capacity:
                return bytes(ffi.buffer(text, count[0])).decode()
            capacity = count[0]

    def prompt(self, text: str) -> list[int]:
        """Encode a text, with bos_id in front (see add_bos) unless the text begins with it."""
        return self.begun(self.encode(text))

    def begun(self, ids: list[int]) -> list[int]:
        """Return ids with bos_id in front, where prompts begin with it (see add_bos) and they do not yet."""
        return ids if not self.add_bos or ids[:1] == [self.bos_id] else [self._vocab.bos_id, *ids]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = False,
    ) -> list[int]:
        """Return the prompt that asks for an answer to messages ({"role": ..., "content": ...}): see render()."""
        text = self.render(messages, tools, thinking)
        return self.prompt(text) if self.chat_template is None else self.encode(text)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = False,
    ) -> str:
        """Return the text of a chat by the file's template; without a template, the last user message's text unchanged.

        Messages and tools may have OpenAI's form or the template's own: dgemma.chat.messages reads both. Raises
        UsageError for messages that are not understood, or that the template refuses or takes too long for; FormatError
        for a template that is no valid Jinja.
        """
        template = self.chat_template
        given = read_tools(tools)
        if template is None:
            if given or thinking:
                raise UsageError(no_template("tools need" if given else "thinking needs"))
            return _last_user_text(read(messages))
        known = reads(template).names
        if thinking and "enable_thinking" not in known:
            raise UsageError("the file's chat template knows no thinking: it never asks for enable_thinking")
        if given and "tools" not in known:
            raise UsageError("the file's chat template knows no tools: it never asks for tools", "tools")
        names = {"bos": self.bos_id, "eos": self.eos_id, "unk": self.unk_id, "pad": self.pad_id, "mask": self.mask_id}
        return render_chat(
            template,
            {
                "messages": self.read(messages),
                "tools": given,
                "documents": None,
                "add_generation_prompt": True,
                "enable_thinking": thinking,
                **{f"{name}_token": self.decode([i], special=True) for name, i in names.items() if i is not None},
            },
        )

    def read(self, messages: Any) -> list[dict[str, Any]]:
        """Return the messages in the form that the file's chat template expects: see dgemma.chat.messages.

        Raises UsageError for a field that the template would leave out of the prompt.
        """
        template = self.chat_template
        if template is None:
            return read(messages)
        return read(messages, reads(template).fields, reads_parts=partial(reads_parts, template))


def _last_user_text(messages: Sequence[Mapping[str, Any]]) -> str:
    user_messages = [message for message in messages if message["role"] == "user"]
    if not user_messages:
        raise UsageError("no user message among the messages, and this file has no chat template")
    for at, message in enumerate(messages):
        if message["role"] in ("system", "tool") or "tool_calls" in message:
            what = "a call of a tool" if "tool_calls" in message else f"a {message['role']} message"
            raise UsageError(f"messages[{at}]: {no_template(f'{what} needs')}", f"messages.{at}.role")
    return text_of(user_messages[-1])
