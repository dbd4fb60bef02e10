"""The vocabulary of a GGUF file: tokens with their types, merges, and the ids of special tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from gguf import TokenType

NORMAL, CONTROL = int(TokenType.NORMAL), int(TokenType.CONTROL)
USER_DEFINED, BYTE = int(TokenType.USER_DEFINED), int(TokenType.BYTE)
SCORE = -1000.0

# Special tokens that are not left out of an answer's text, because its parser needs them: marks of calls and thoughts.
VISIBLE = {
    *("<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>"),
    *("<|channel>", "<channel|>", '<|"|>'),
}
# The special tokens that GGUF has keys for, and the text of each where no file names it.
SPECIAL = {"bos": "<bos>", "eos": "<eos>", "unk": "<unk>", "pad": "<pad>", "mask": "<mask>"}


@dataclass
class Vocabulary:
    """The tokenizer for a GGUF file."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    ids: dict[str, int] = field(default_factory=dict)  # ids of the special tokens of SPECIAL that exist
    add_bos: bool = True
    # The ids that a post_processor puts before and behind a text; None without a post_processor.
    around: tuple[list[int], list[int]] | None = None
    notes: list[str] = field(default_factory=list)  # notes on the vocabulary for the user
    chat_template: str | None = None
    file: Path = Path()  # the file that has the tokens


def is_byte(text: str) -> bool:
    """Return whether a token stands for a byte: `<0x00>` .. `<0xFF>`."""
    return re.fullmatch(r"<0x[0-9A-F]{2}>", text) is not None


def fill(tokens: list[str | None]) -> list[str]:
    """Give each id without a token a name such as `<unused0>`, which no text is encoded to; Gemma does the same."""
    taken = {token for token in tokens if token is not None}
    free = (name for n in range(2 * len(tokens)) if (name := f"<unused{n}>") not in taken)
    return [next(free) if token is None else token for token in tokens]
