"""Prepare a checkpoint's chat template for a GGUF file, so that it writes the same text as in transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from dgemma.chat.template import TakesTooLong
from dgemma.convert.added import NAMED, text_of
from dgemma.errors import FormatError, SystemFailure, UsageError
from dgemma.tokenizer import Tokenizer

IN_METADATA = {"bos_token", "eos_token", "unk_token", "pad_token", "mask_token"}  # GGUF files have keys for these

_USER = {"role": "user", "content": "Why is the sky blue?"}
_TOOL = {"name": "get_weather", "description": "Tells the weather.", "parameters": {"type": "object", "properties": {}}}
TRIALS: dict[str, dict[str, Any]] = {
    "a user's message": {"messages": [_USER]},
    "a system message": {"messages": [{"role": "system", "content": "Answer in one word."}, _USER]},
    "an answer and another question": {"messages": [_USER, {"role": "assistant", "content": "Scattering."}, _USER]},
    "tools": {"messages": [_USER], "tools": [{"type": "function", "function": _TOOL}]},
}


def with_tokens(template: str, settings: dict[str, Any]) -> str:
    """Return the template, with assignments before it for the tokens that it uses and GGUF files have no key for.

    Such tokens are sep_token and image_token: transformers gives a template all tokens of the tokenizer's files.
    """
    tokens = _named(settings)
    used = [name for name in tokens if name not in IN_METADATA and re.search(rf"\b{re.escape(name)}\b", template)]
    return "".join(f"{{% set {name} = {json.dumps(tokens[name], ensure_ascii=False)} %}}\n" for name in used) + template


def _named(settings: dict[str, Any]) -> dict[str, str]:
    found = {name: value for name, value in settings.items() if name.endswith("_token")} | settings[NAMED]
    texts = {name: text_of(value) for name, value in found.items()}
    return {name: text for name, text in texts.items() if name.isidentifier() and isinstance(text, str)}


def try_out(where: Path, tokenizer: Tokenizer) -> list[str]:
    """Try a template on typical conversations, and return notes on problems.

    There is a note for each conversation that the template refuses, or whose text it leaves out. After the first that
    takes too long, no others are tried. Raises FormatError for a text that is no Jinja template, and for a template
    that refuses all conversations.
    """
    notes: list[str] = []
    refusals: list[UsageError] = []
    written = 0
    for what, given in TRIALS.items():
        try:
            text = tokenizer.render(given["messages"], given.get("tools"))
        except FormatError as problem:
            raise FormatError(f"{where}: {problem}") from None
        except UsageError as problem:
            refusals.append(problem)
            notes.append(f"with {what}: {problem}")
            if isinstance(problem, TakesTooLong):
                break
            continue
        except SystemFailure as problem:  # there is no process to try it in
            return [f"the chat template was not tried: {problem}"]
        written += 1
        if lost := next((m["content"] for m in given["messages"] if m["content"] not in text), None):
            notes.append(f"with {what}: the chat template leaves out {lost!r}")
    if not written:
        raise FormatError(f"{where}: not even a first message can be written: {refusals[0]}")
    return notes[:1] if len(notes) == len(TRIALS) else notes
