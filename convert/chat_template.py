"""The chat template of a checkpoint, made to say in a GGUF file what it says with the checkpoint's own tokenizer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from dgemma.convert.safetensors import read_json
from dgemma.errors import Error, FormatError, SystemFailure, UsageError
from dgemma.template import render

IN_METADATA = {"bos_token", "eos_token", "unk_token", "pad_token", "mask_token"}  # GGUF files have keys for these
TOKENS = {name: f"<{name.removesuffix('_token')}>" for name in IN_METADATA}
SYSTEM, USER, ANSWER = ({"role": role, "content": "Hi"} for role in ("system", "user", "assistant"))
USUAL = ([USER], [SYSTEM, USER], [USER, ANSWER, USER])
HOLDERS = ("extra_special_tokens", "model_specific_special_tokens")  # of more, by name


def with_tokens(template: str, folder: Path, settings: dict[str, Any]) -> str:
    """The template with the special tokens that it names and that GGUF files have no key for, such as sep_token and
    image_token, set at its beginning: transformers gives a template all that the tokenizer's files name.
    """
    tokens = _named(settings)
    legacy = folder / "special_tokens_map.json"
    if "added_tokens_decoder" not in settings and legacy.exists():
        tokens |= _named(read_json(legacy))
    used = [name for name in tokens if name not in IN_METADATA and re.search(rf"\b{re.escape(name)}\b", template)]
    return "".join(f"{{% set {name} = {json.dumps(tokens[name], ensure_ascii=False)} %}}\n" for name in used) + template


def _named(settings: dict[str, Any]) -> dict[str, str]:
    holders = [settings[name] for name in HOLDERS if isinstance(settings.get(name), dict)]
    found = {name: value for name, value in settings.items() if name.endswith("_token")}
    for more in holders:
        found |= more
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()}
    return {name: text for name, text in texts.items() if name.isidentifier() and isinstance(text, str)}


def try_out(template: str, where: Path) -> None:
    """Raises FormatError for what is no Jinja template, and for one that writes none of the usual chats."""
    names = {"tools": None, "documents": None, "add_generation_prompt": True, "enable_thinking": False}
    refusal: Error | None = None
    for chat in USUAL:
        try:
            render(template, {"messages": chat, **TOKENS, **names})
            return
        except UsageError as problem:
            refusal = problem
        except FormatError as problem:
            raise FormatError(f"{where}: {problem}") from None
        except SystemFailure:  # no process to try it in
            return
    raise FormatError(f"{where}: not even a first message can be written: {refusal}")
