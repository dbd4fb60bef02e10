"""Read the files beside tokenizer.json or tokenizer.model that define more special tokens, and settings of tokens."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgemma.convert.safetensors import read_json
from dgemma.errors import FormatError

NAMED, UNNAMED, OLD = "model_specific_special_tokens", "extra_special_tokens", "additional_special_tokens"
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")

# With these values of tokenizer_class, transformers follows tokenizer.json; with others it replaces steps of it.
CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend", "GemmaTokenizer", "GemmaTokenizerFast")


@dataclass(frozen=True)
class Settings:
    """The values of tokenizer_config.json, joined with those of the older files beside it."""

    file: Path
    values: dict[str, Any]
    legacy: Path  # special_tokens_map.json
    of_legacy: frozenset[str]  # the keys whose values are from special_tokens_map.json
    added_file: Path
    added: dict[str, Any]  # text -> id, from added_tokens.json

    def where(self, key: str) -> Path:
        return self.legacy if key in self.of_legacy else self.file


def read_settings(folder: Path) -> Settings:
    """Read the settings as transformers does.

    The older files are used only where tokenizer_config.json has no added_tokens_decoder.
    """
    file, legacy, added_file = (
        folder / name for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    )
    values, more, added = _read(file), _read(legacy), _read(added_file)
    for where, named in ((file, values), (folder / "config.json", _read(folder / "config.json"))):
        if (found := named.get("tokenizer_class")) is not None:
            _check_class(where, found)
            break
    if "added_tokens_decoder" in values:
        more, added = {}, {}
    names = more.keys() | (more[UNNAMED].keys() if isinstance(more.get(UNNAMED), dict) else set())
    names |= {UNNAMED} if OLD in more else set()
    return Settings(file, _joined(values, more), legacy, frozenset(names), added_file, added)


def _read(file: Path) -> dict[str, Any]:
    return read_json(file) if os.path.lexists(file) else {}


def _check_class(file: Path, found: Any) -> None:
    if found not in CLASSES:
        raise FormatError(
            f"{file}: tokenizer_class is {found!r}, which gives other ids than tokenizer.json says; expected"
            f" {', '.join(CLASSES[:-1])} or {CLASSES[-1]}"
        )


def _joined(values: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Join two sets of settings; where both have a key, the second wins.

    Special tokens are given by name or in lists. The list under the key OLD is used only where there is no other.
    """
    joined = {key: value for key, value in {**values, **more}.items() if key not in (NAMED, UNNAMED, OLD)}
    named = dict(found) if isinstance(found := values.get(NAMED), dict) else {}
    lists = [values.get(UNNAMED) or values.get(OLD), more.get(UNNAMED)]
    if OLD in more and not any(isinstance(tokens, list) for tokens in (values.get(UNNAMED), *lists)):
        lists.append(more[OLD])
    unnamed: list[Any] = []
    for tokens in lists:
        if isinstance(tokens, dict):
            named, unnamed = named | tokens, []
        elif isinstance(tokens, list):
            unnamed += tokens
    return joined | {NAMED: named, UNNAMED: unnamed}


def text_of(token: Any) -> Any:
    """Return the text of a token, which may be an object with its settings."""
    return token.get("content") if isinstance(token, dict) else token


def add_special(
    settings: Settings, added: Sequence[dict[str, Any]], vocab: Mapping[str, int], n_vocab: int, notes: list[str]
) -> list[dict[str, Any]]:
    """Return the added tokens as in transformers: with the settings of added_tokens_decoder and added_tokens.json.

    Special tokens that the settings name are added too. For one that has no id, and can get none below n_vocab, a note
    is added to `notes`.
    """
    if settings.values.get("split_special_tokens"):
        raise FormatError(
            f"{settings.file}: split_special_tokens: marks of turns would be text, and in the runtime they are not"
        )
    known = {entry["content"]: dict(entry) for entry in added}
    _decoder(settings, known, vocab)
    special = list(_special(settings.values))
    names = {text for _, token in special if isinstance(text := text_of(token), str)}
    for text, i in settings.added.items():
        found = known[text]["id"] if text in known else vocab.get(text)
        if type(i) is not int or i != found:
            raise FormatError(f"{settings.added_file}: {text!r} has id {i!r}, and {found} in the vocabulary")
        known.setdefault(text, {"content": text, "id": i, "special": text in names, "normalized": text not in names})
    for key, token in special:
        file, text = settings.where(key), text_of(token)
        if not isinstance(text, str):
            if isinstance(token, dict):
                raise FormatError(f"{file}: a special token without a text: {str(token)[:80]}")
            continue
        if text not in known and text not in vocab:
            what = f"{file}: {key} is {text!r}, which is no token of the vocabulary"
            if len(known.keys() | vocab.keys()) < n_vocab:  # the next free id would be its own
                raise FormatError(what)
            notes.append(f"{what}: texts that have it become other tokens")
            continue
        known.setdefault(text, {"content": text, "id": vocab.get(text), "special": True, "normalized": False})
        if isinstance(token, dict):
            known[text] |= {flag: token[flag] for flag in FLAGS if flag != "special" and flag in token}
    return list(known.values())


def _decoder(settings: Settings, known: dict[str, dict[str, Any]], vocab: Mapping[str, int]) -> None:
    by_id = settings.values.get("added_tokens_decoder")
    for key, entry in by_id.items() if isinstance(by_id, dict) else ():
        text = text_of(entry)
        i = None
        if isinstance(text, str):
            i = known[text]["id"] if text in known else vocab.get(text)
        if not isinstance(entry, dict) or str(i) != key:
            raise FormatError(
                f"{settings.file}: added_tokens_decoder: {key} is {text!r}, whose id in tokenizer.json is {i}"
            )
        flags = {flag: entry[flag] for flag in FLAGS if flag in entry}
        known[text] = known.get(text, {"content": text, "id": i}) | flags


def _special(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield each key that names a special token, and the token: a text or an object."""
    for key, value in values.items():
        if key == NAMED:
            yield from value.items()
        elif key == UNNAMED:
            yield from ((key, token) for token in value)
        elif key.endswith("_token"):
            yield key, value
