"""The vocabulary as a GGUF file has it: tokens with their types, merges, and the ids of special tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from gguf import TokenType

NORMAL, CONTROL = int(TokenType.NORMAL), int(TokenType.CONTROL)
USER_DEFINED, BYTE = int(TokenType.USER_DEFINED), int(TokenType.BYTE)
SCORE = -1000.0

# Special tokens that stay in an answer's text, where its readers need them: the marks of tool calls and of thoughts.
VISIBLE = {
    *("<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>"),
    *("<|channel>", "<channel|>", '<|"|>'),
}
# The special ids that GGUF knows, and the text of each where no file names it.
SPECIAL = {"bos": "<bos>", "eos": "<eos>", "unk": "<unk>", "pad": "<pad>", "mask": "<mask>"}


@dataclass
class Vocabulary:
    """The tokenizer as a GGUF file describes it. `ids` has the special tokens of SPECIAL that exist."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    ids: dict[str, int] = field(default_factory=dict)
    add_bos: bool = True
    around: tuple[list[int], list[int]] | None = None  # ids before and behind texts; None where the file has none
    notes: list[str] = field(default_factory=list)  # what people should know of the vocabulary
    chat_template: str | None = None
    file: Path = Path()  # the file that has the tokens


def is_byte(text: str) -> bool:
    """Return whether a token stands for a byte: `<0x00>` .. `<0xFF>`."""
    return re.fullmatch(r"<0x[0-9A-F]{2}>", text) is not None


def fill(tokens: list[str | None]) -> list[str]:
    """Give each id that has no token one that no text becomes, as Gemma's own `<unusedN>`."""
    taken = {token for token in tokens if token is not None}
    free = (name for n in range(2 * len(tokens)) if (name := f"<unused{n}>") not in taken)
    return [next(free) if token is None else token for token in tokens]
