"""Read tokenizer.model with the package sentencepiece."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor, set_min_log_level

from dgemma.convert.added import Settings, add_special
from dgemma.convert.opening import refuse_long_tokens
from dgemma.convert.steps import SPACE, merged
from dgemma.convert.vocabulary import BYTE, CONTROL, NORMAL, SPECIAL, USER_DEFINED, VISIBLE, Vocabulary, fill, is_byte
from dgemma.errors import FormatError
from dgemma.files.regular import read_regular

COMPOSED = (
    "e\u0301",
    "\u1100\u1161\u11a8",
    "\u0915\u093c",
    "\u304b\u3099",
)  # sequences that Unicode normalization joins

FATAL = 3  # the package's log level from which messages are shown; it warns of unusual pieces on standard error


def from_sentencepiece(file: Path, n_vocab: int, settings: Settings) -> Vocabulary:
    """Return the vocabulary of `file`. Raises FormatError where it is damaged or the runtime does not support it."""
    data = read_regular(file)
    if not data:  # the package opens an empty file, and fails later
        raise FormatError(f"{file}: not a SentencePiece model (it is empty)")
    set_min_log_level(FATAL)
    try:
        return _vocabulary(file, SentencePieceProcessor(model_proto=data), n_vocab, settings)
    except (RuntimeError, UnicodeDecodeError) as problem:  # the second for pieces that are no UTF-8
        raise FormatError(f"{file}: not a SentencePiece model ({' '.join(str(problem).split())})") from None


def _vocabulary(file: Path, pieces: Any, n_vocab: int, settings: Settings) -> Vocabulary:
    n = pieces.get_piece_size()
    if n > n_vocab:
        raise FormatError(f"{file}: {n} pieces, more than vocab_size in config.json, {n_vocab}")
    tokens: list[str | None] = [pieces.id_to_piece(i) for i in range(n)]
    types = [_type(pieces, i) for i in range(n)]
    refuse_long_tokens(file, tokens, types)
    scores = [pieces.get_score(i) for i in range(n)]
    # The scores of a BPE model are whole numbers, minus the rank of a merge; those of a unigram model are log
    # probabilities.
    if not all(scores[i].is_integer() for i in range(n) if types[i] == NORMAL):
        raise FormatError(f"{file}: not a BPE model, which is the only kind that the runtime knows")
    if odd := next((t for t, kind in zip(tokens, types, strict=False) if kind != BYTE and is_byte(t or "")), None):
        raise FormatError(f"{file}: {odd!r} is no byte there, and in the runtime it is")
    _check_normalizer(file, pieces)
    merges = list(_merges(tokens, types, scores))
    _check_user_defined(file, pieces, types, merges)
    named = {"bos": pieces.bos_id(), "eos": pieces.eos_id(), "unk": pieces.unk_id(), "pad": pieces.pad_id()}
    vocabulary = Vocabulary(
        file=file,
        tokens=fill(tokens + [None] * (n_vocab - n)),
        types=types + [NORMAL] * (n_vocab - n),
        merges=merges,
        ids={name: i for name, i in named.items() if i >= 0},
        notes=[] if BYTE in types else [f"{file}: no tokens of bytes: characters that are no token become <unk>"],
    )
    _check_added(vocabulary, settings)
    return vocabulary


def _check_added(vocabulary: Vocabulary, settings: Settings) -> None:
    """Raise FormatError where other files make a special token of one that is ordinary text in tokenizer.model."""
    ids = {text: i for i, text in enumerate(vocabulary.tokens)}
    added = [{"content": text, "id": i} for text, i in ids.items() if vocabulary.types[i] in (CONTROL, USER_DEFINED)]
    known = {entry["content"] for entry in added}
    for entry in add_special(settings, added, ids, len(ids), vocabulary.notes):
        if entry["content"] not in known or any(entry.get(flag) for flag in ("lstrip", "rstrip", "single_word")):
            what = f"another token than in tokenizer.model is made of {entry['content']!r}"
            raise FormatError(f"{settings.file.parent}: {what}; expected it in a tokenizer.json")


def _check_normalizer(file: Path, pieces: Any) -> None:
    """Raise FormatError unless spaces become U+2581 and all other characters stay the same, also in sequences."""
    probe = "  a  b "
    if pieces.normalize(probe) != probe.replace(" ", SPACE):
        raise FormatError(f"{file}: it puts a space in front or folds spaces, which the runtime does not know")
    every = "".join(map(chr, (*range(1, 0xD800), *range(0xE000, 0x110000))))
    for text in (every, *COMPOSED):
        if pieces.normalize(text) != text.replace(" ", SPACE):
            changed = next((c for c in text if pieces.normalize(f"a{c}a") != f"a{c.replace(' ', SPACE)}a"), text)
            raise FormatError(f"{file}: its normalizer changes {changed!a}, and the runtime changes spaces alone")


def _check_user_defined(file: Path, pieces: Any, types: list[int], merges: list[str]) -> None:
    """Raise FormatError for a user-defined piece with spaces that is not the result of merges.

    sentencepiece finds such a piece in a text directly; the runtime makes it from its parts by merges.
    """
    ranks: dict[tuple[str, str], int] = {}
    for rank, merge in enumerate(merges):
        cut = merge.index(" ", 1)
        ranks.setdefault((merge[:cut], merge[cut + 1 :]), rank)
    for i, kind in enumerate(types):
        text = pieces.id_to_piece(i)
        if kind == NORMAL and SPACE in text and str(pieces.get_score(i)) == "0.0" and merged(text, ranks) != [text]:
            raise FormatError(
                f"{file}: the user-defined piece {text!r}: no merges make it, and the runtime merges spaces"
            )


def _type(pieces: Any, i: int) -> int:
    text = pieces.id_to_piece(i)
    if pieces.is_byte(i):
        return BYTE
    if text in VISIBLE:
        return USER_DEFINED
    if pieces.is_control(i) or pieces.is_unknown(i):
        return CONTROL
    # The package does not tell which pieces are user-defined. Their score is 0; scores of merges count down from -0.
    if str(pieces.get_score(i)) != "0.0" or SPACE in text:
        return NORMAL
    return CONTROL if text in SPECIAL.values() or re.fullmatch(r"<\|.*>|<.*\|>", text) else USER_DEFINED


def _merges(tokens: list[Any], types: list[int], scores: list[float]) -> Iterator[str]:
    """Yield all merges of two pieces into a third: pieces with the highest score first, then the longest."""
    ids = {token: i for i, token in enumerate(tokens) if types[i] == NORMAL}
    for token in sorted((t for t in ids if len(t) > 1), key=lambda t: (-scores[ids[t]], -len(t), ids[t])):
        splits = [
            (left, right) for k in range(1, len(token)) if (left := token[:k]) in ids and (right := token[k:]) in ids
        ]
        for left, right in sorted(splits, key=lambda split: (ids[split[0]], ids[split[1]])):
            yield f"{left} {right}"
