"""What tokenizer_config.json says of added tokens beside tokenizer.json: more of them, or others' settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dgemma.errors import FormatError

LISTS = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


def text_of(token: Any) -> Any:
    """A token's text, which may be an object with its settings."""
    return token.get("content") if isinstance(token, dict) else token


def add_special(
    file: Path, settings: Mapping[str, Any], added: Sequence[dict[str, Any]], vocab: Mapping[str, int]
) -> list[dict[str, Any]]:
    """The added tokens as transformers has them: with the settings of added_tokens_decoder, and with the tokens that
    are called special and are in the vocabulary. file: tokenizer_config.json.
    """
    if settings.get("split_special_tokens"):
        raise FormatError(
            f"{file}: split_special_tokens: marks of turns would be text, and in the runtime they are not"
        )
    known = {entry["content"]: dict(entry) for entry in added}
    by_id = settings.get("added_tokens_decoder")
    for key, entry in by_id.items() if isinstance(by_id, dict) else ():
        text = text_of(entry)
        i = None
        if isinstance(text, str):
            i = known[text]["id"] if text in known else vocab.get(text)
        if not isinstance(entry, dict) or str(i) != key:
            raise FormatError(f"{file}: added_tokens_decoder: {key} is {text!r}, whose id in tokenizer.json is {i}")
        flags = {flag: entry[flag] for flag in FLAGS if flag in entry}
        known[text] = known.get(text, {"content": text, "id": i}) | flags
    for token in _special(settings):
        text = text_of(token)
        if not isinstance(text, str):
            if isinstance(token, dict):
                raise FormatError(f"{file}: a special token without a text: {str(token)[:80]}")
            continue
        if text not in known and text in vocab:
            known[text] = {"content": text, "id": vocab[text], "special": True, "normalized": False}
        if isinstance(token, dict) and text in known:
            known[text] |= {flag: token[flag] for flag in FLAGS if flag != "special" and flag in token}
    return list(known.values())


def _special(settings: Mapping[str, Any]) -> Iterator[Any]:
    """Whatever is called a special token: a text or an object."""
    for key, value in settings.items():
        if key in LISTS and isinstance(value, (list, dict)):
            yield from value.values() if isinstance(value, dict) else value
        elif key.endswith("_token"):
            yield value
