"""Open a checkpoint's vocabulary with the runtime's tokenizer, before any weight is read.

So a vocabulary that the runtime refuses, or reads differently, is found before the long work.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from dgemma.convert.gguf_header import header
from dgemma.convert.metadata import Pair
from dgemma.convert.vocabulary import NORMAL, Vocabulary
from dgemma.errors import FormatError
from dgemma.tokenizer import Tokenizer


def open_vocabulary(pairs: Sequence[Pair], vocabulary: Vocabulary) -> Tokenizer:
    """Return the tokenizer of a GGUF file with these pairs. A FormatError names the vocabulary's file."""
    with TemporaryDirectory(prefix="dgemma-") as folder:
        file = Path(folder) / "vocabulary.gguf"
        file.write_bytes(header(pairs, []))
        try:
            tokenizer = Tokenizer.from_gguf(file)
        except FormatError as problem:
            raise FormatError(str(problem).replace(str(file), str(vocabulary.file))) from None
    for i, (said, taken) in enumerate(zip(vocabulary.types, tokenizer.kinds, strict=True)):
        if said == NORMAL != taken:
            raise FormatError(
                f"{vocabulary.file}: token {i}, {vocabulary.tokens[i]!r}, is ordinary text there, and a mark in the"
                " runtime; expected it in added_tokens, or under another name"
            )
    return tokenizer
