"""Open a checkpoint's vocabulary with the runtime's tokenizer, before any weight is read.

So a vocabulary that the runtime refuses, or reads differently, is found before the long work.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from dgemma.convert.gguf_header import header
from dgemma.convert.metadata import TOKENIZER_MODEL, Pair
from dgemma.convert.vocabulary import NORMAL, Vocabulary, fill
from dgemma.errors import Error, FormatError
from dgemma.native.metadata import keys
from dgemma.tokenizer import Tokenizer

USUAL = 256  # characters; no token of a real vocabulary has more


def refuse_long_tokens(file: Path, tokens: Sequence[str | None], types: Sequence[int]) -> None:
    """Have the runtime refuse a token that is longer than it reads.

    For before work that takes the square of a token's length. Raises FormatError.
    """
    if all(token is None or len(token) <= USUAL for token in tokens):
        return
    values = {
        "architecture": "any", "tokenizer_model": TOKENIZER_MODEL, "tokens": fill(list(tokens)), "token_type": types,
        "unk_id": 0,
    }  # fmt: skip
    pairs = [Pair(keys()[field].key, keys()[field].kind, value) for field, value in values.items()]
    _opened(pairs, file)


def open_vocabulary(pairs: Sequence[Pair], vocabulary: Vocabulary) -> Tokenizer:
    """Return the tokenizer of a file with these keys. A FormatError names the vocabulary's file."""
    tokenizer = _opened(pairs, vocabulary.file)
    for i, (said, taken) in enumerate(zip(vocabulary.types, tokenizer.kinds, strict=True)):
        if said == NORMAL != taken:
            raise FormatError(
                f"{vocabulary.file}: token {i}, {vocabulary.tokens[i]!r}, is ordinary text there, and a mark in the"
                " runtime; expected it in added_tokens, or under another name"
            )
    return tokenizer


def _opened(pairs: Sequence[Pair], file: Path) -> Tokenizer:
    """Return the tokenizer of a file with these keys. A FormatError names `file`."""
    with TemporaryDirectory(prefix="dgemma-") as folder:
        path = Path(folder) / "vocabulary.gguf"
        try:
            path.write_bytes(header(pairs, []))
        except Error as problem:  # a token that is no text
            raise FormatError(f"{file}: {problem}") from None
        try:
            return Tokenizer.from_gguf(path)
        except FormatError as problem:
            raise FormatError(str(problem).replace(str(path), str(file))) from None
