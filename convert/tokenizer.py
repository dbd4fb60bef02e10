"""Read the vocabulary of a checkpoint from tokenizer.json, or else tokenizer.model, and the files beside it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dgemma.convert.added import Settings, add_special, read_settings, text_of
from dgemma.convert.chat_template import with_tokens
from dgemma.convert.opening import refuse_long_tokens
from dgemma.convert.safetensors import read_json
from dgemma.convert.steps import Tokenizer
from dgemma.convert.tokenizer_model import from_sentencepiece
from dgemma.convert.vocabulary import BYTE, CONTROL, NORMAL, SPECIAL, USER_DEFINED, VISIBLE, Vocabulary, fill, is_byte
from dgemma.errors import FormatError
from dgemma.files.regular import read_regular


def read_vocabulary(folder: Path, n_vocab: int, config_ids: dict[str, int]) -> Vocabulary:
    """Return the vocabulary. config_ids: the special ids of config.json, used where the tokenizer's files have none."""
    settings = read_settings(folder)
    if os.path.lexists(folder / "tokenizer.json"):
        vocabulary = _from_json(folder / "tokenizer.json", n_vocab, settings)
    elif os.path.lexists(folder / "tokenizer.model"):
        vocabulary = from_sentencepiece(folder / "tokenizer.model", n_vocab, settings)
    else:
        raise FormatError(f"{folder}: neither tokenizer.json nor tokenizer.model here")
    _add_special_ids(vocabulary, settings, config_ids)
    _begin(folder, vocabulary, settings.values.get("add_bos_token"))
    template = _chat_template(folder, settings.values, vocabulary.notes)
    vocabulary.chat_template = with_tokens(template, settings.values) if template else None
    return vocabulary


def _from_json(file: Path, n_vocab: int, settings: Settings) -> Vocabulary:
    top = read_json(file)
    model = top.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise FormatError(f"{file}: expected a BPE model with a vocabulary, found {_kind(model)}")
    tokens: list[str | None] = [None] * n_vocab
    types = [NORMAL] * n_vocab
    for text, i in model["vocab"].items():
        _put(file, tokens, i, text)
        if is_byte(text):
            types[i] = BYTE
    notes: list[str] = []
    added = add_special(settings, _added(file, top), model["vocab"], n_vocab, notes)
    for entry in added:
        text, i = entry["content"], entry["id"]
        _put(file, tokens, i, text)
        types[i] = CONTROL if entry.get("special") and text not in VISIBLE else USER_DEFINED
    refuse_long_tokens(file, tokens, types)
    merges = model.get("merges") or []
    if not isinstance(merges, list):
        raise FormatError(f"{file}: merges is no list")
    vocabulary = Vocabulary(fill(tokens), types, list(_merges(file, merges)), notes=notes, file=file)
    bytes_ = {text for text in model["vocab"] if is_byte(text)}
    steps = Tokenizer(file, top, added, vocabulary.merges, bytes_)
    steps.check()
    if len(bytes_) < 256:  # with tokens for all bytes no character is unknown
        vocabulary.ids["unk"] = model["vocab"][model["unk_token"]]
    vocabulary.around = steps.around()
    return vocabulary


def _begin(folder: Path, vocabulary: Vocabulary, add_bos: Any) -> None:
    """Set whether <bos> is put before a text: by the post_processor, as in transformers, or else by add_bos_token."""
    asked = add_bos if isinstance(add_bos, bool) else None
    vocabulary.add_bos = asked is not False
    told = "add_bos_token of tokenizer_config.json is false"
    if vocabulary.around is not None:
        before, behind = vocabulary.around
        bos = vocabulary.ids.get("bos")
        if behind or before not in ([], [bos]):
            found = [vocabulary.tokens[i] if 0 <= i < len(vocabulary.tokens) else i for i in before + behind]
            name = repr(vocabulary.tokens[bos]) if bos is not None else "no bos_token"
            what = f"post_processor puts {found} around a text; the runtime puts {name} before it"
            raise FormatError(f"{folder / 'tokenizer.json'}: {what}")
        vocabulary.add_bos = before == [bos]
        if vocabulary.add_bos and asked is False:
            says = "the post_processor of tokenizer.json puts <bos> before texts"
            vocabulary.notes.append(f"{says}, though {told}: the first counts, as in transformers")
        told = "the post_processor of tokenizer.json puts no <bos> before texts"
    if not vocabulary.add_bos:
        vocabulary.notes.append(f"{told}: the file says so too, and dgemma puts Gemma's <bos> there all the same")


def _added(file: Path, top: dict[str, Any]) -> list[dict[str, Any]]:
    """Return added_tokens. Each has an id; a text that is in the vocabulary has the same id there."""
    added = top.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(entry, dict) for entry in added):
        raise FormatError(f"{file}: added_tokens is no list of objects")
    for entry in added:
        text, i = entry.get("content"), entry.get("id")
        known = top["model"]["vocab"].get(text, i) if isinstance(text, str) else i
        if known != i:
            raise FormatError(f"{file}: added token {text!r} has id {i!r}, and in the vocabulary {known}")
        if not isinstance(text, str) or type(i) is not int:
            raise FormatError(f"{file}: added token {text!r} has id {i!r}; expected a text and a number")
    return added


def _kind(model: Any) -> str:
    return repr(model.get("type")) if isinstance(model, dict) else "none"


def _put(file: Path, tokens: list[str | None], i: Any, text: Any) -> None:
    if type(i) is not int or not 0 <= i < len(tokens) or not isinstance(text, str) or not text:
        raise FormatError(f"{file}: token {text!r} has id {i!r}; expected one below vocab_size, {len(tokens)}")
    if tokens[i] is not None and tokens[i] != text:
        raise FormatError(f"{file}: tokens {tokens[i]!r} and {text!r} have the same id, {i}")
    tokens[i] = text


def _merges(file: Path, merges: Iterable[Any]) -> Iterator[str]:
    """Yield each merge as "left right"; it may also be given as ["left", "right"]."""
    for rank, merge in enumerate(merges):
        if isinstance(merge, str):
            text = merge
        elif isinstance(merge, list) and len(merge) == 2 and all(isinstance(part, str) for part in merge):
            text = f"{merge[0]} {merge[1]}"
            if text[: text.find(" ", 1)] != merge[0]:
                raise FormatError(f"{file}: merge {rank}: {merge!r} has a space, which GGUF files cannot express")
        else:
            text = ""
        if " " not in text[1:-1]:
            raise FormatError(f"{file}: merge {rank}: expected a pair, found {merge!r}")
        yield text


def _add_special_ids(vocabulary: Vocabulary, settings: Settings, config_ids: dict[str, int]) -> None:
    """Set each special id by the first of these that has it: settings, tokenizer's model, config.json, usual text."""
    index = {token: i for i, token in enumerate(vocabulary.tokens)}
    found = {name: index[text] for name, text in SPECIAL.items() if text in index}
    found |= config_ids | vocabulary.ids
    for name in SPECIAL:
        key = f"{name}_token"
        file, text = settings.where(key), text_of(settings.values.get(key))
        if text is None:
            continue
        if not isinstance(text, str) or text not in index:
            raise FormatError(f"{file}: {name}_token is {text!r}, which is no token of the vocabulary")
        if name == "unk" and vocabulary.ids.get(name, index[text]) != index[text]:
            model = vocabulary.tokens[vocabulary.ids[name]]
            raise FormatError(
                f"{file}: unk_token is {text!r}, and the tokenizer's model has {model!r}; expected the same"
            )
        found[name] = index[text]
    vocabulary.ids = found


def _chat_template(folder: Path, settings: dict[str, Any], notes: list[str]) -> str | None:
    """Return the chat template, or the default one of several. A note is added where there is one but of no use."""
    file = folder / "chat_template.jinja"
    if os.path.lexists(file):
        try:
            found: Any = read_regular(file).decode("utf-8")
        except UnicodeDecodeError:
            raise FormatError(f"{file}: not UTF-8 text") from None
    else:
        file, found = folder / "tokenizer_config.json", settings.get("chat_template")
        for name in ("chat_template.json", "processor_config.json"):
            if found is None and os.path.lexists(folder / name):
                file, found = folder / name, read_json(folder / name).get("chat_template")
    template = found
    if isinstance(found, list):
        found = {t["name"]: t.get("template") for t in found if isinstance(t, dict) and isinstance(t.get("name"), str)}
    if isinstance(found, dict):
        template = found.get("default")
    if isinstance(template, str) and template:
        return template
    if found is not None:
        told = f"templates by name: {', '.join(map(repr, found))}" if isinstance(found, dict) else repr(found)[:80]
        notes.append(f"{file}: no chat template is taken: expected a text, alone or named 'default', found {told}")
    return None
