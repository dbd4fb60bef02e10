"""Check that the steps of a tokenizer.json give the same ids as the runtime's tokenizer; refuse the file if not.

The message names the step and its effect. A step without any effect is allowed.

The runtime cuts out added tokens, the leftmost and longest first; replaces ' ' by U+2581; separates runs of newlines
from other text; turns a run of newlines into one token if the vocabulary has it; and applies merges to the characters
of all other text. Characters without a token become the tokens of their bytes; in a vocabulary without such tokens,
neighbouring ones together become the unknown token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from dgemma.errors import FormatError

SPACE = "\u2581"
Step = Mapping[str, Any]

TOP = {"version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder"}
TOP |= {"model"}
MODEL = {"type", "vocab", "merges", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"}
MODEL |= {"fuse_unk", "byte_fallback", "ignore_merges", "cache_capacity"}

# NEEDS_SPACE: patterns of a Split that match only where there is a space. NEWLINES: patterns for runs of newlines.
NEEDS_SPACE = {" ", " +", "[ ]", "[ ]+", "( )", "( )+", "( +)", r"\ ", r"\ +"}
NEWLINES = {"\n+", r"\n+", "[\n]+", r"[\n]+", "(\n+)", r"(\n+)"}
NEWLINES |= {f"[^{n}]+|{n}+" for n in ("\n", r"\n")} | {f"[^{n}]+|[{n}]+" for n in ("\n", r"\n")}
NEWLINES |= {f"{n}+|[^{n}]+" for n in ("\n", r"\n")} | {f"[{n}]+|[^{n}]+" for n in ("\n", r"\n")}


class Tokenizer:
    """The steps of a tokenizer.json, with its added tokens and merges."""

    def __init__(
        self, file: Path, top: Mapping[str, Any], added: Sequence[Step], merges: Sequence[str], bytes_: set[str]
    ) -> None:
        """Take the parts of a tokenizer.json. merges: "left right" each. bytes_: the tokens that stand for bytes."""
        self.file, self.top, self.model = file, top, top["model"]
        self.added, self.merges, self.bytes = added, merges, bytes_

    def refuse(self, what: str, effect: str) -> NoReturn:
        raise FormatError(f"{self.file}: {what}: {effect}")

    def check(self) -> None:
        """Raise FormatError where the ids of a text, or the text of ids, would differ from the runtime's."""
        for name in [*self.top.keys() - TOP, *self.model.keys() - MODEL]:
            self.refuse(name, "the converter does not know what it does")
        self._lengths()
        self._model()
        self._merges(isolated=self._text())
        self._added()
        self._decoder()

    def _lengths(self) -> None:
        truncation, padding = self.top.get("truncation"), self.top.get("padding")
        if truncation is not None:
            self.refuse(
                f"truncation {_described(truncation)}", "it cuts off long texts, and the runtime does not; remove it"
            )
        if padding is not None and (
            not isinstance(padding, dict)
            or padding.get("strategy") != "BatchLongest"
            or padding.get("pad_to_multiple_of") is not None
        ):
            self.refuse(f"padding {_described(padding)}", "it makes texts longer, and the runtime does not; remove it")

    def _model(self) -> None:
        model = self.model
        for key in ("continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(key):
                self.refuse(
                    f"{key} is {model[key]!r}", "it changes the parts of words, which the runtime does not know"
                )
        if model.get("ignore_merges"):
            self.refuse("ignore_merges is true", "texts that are tokens would be taken whole; the runtime merges them")
        if model.get("dropout"):
            self.refuse(
                f"dropout is {model['dropout']!r}", "merges are left out by chance, which the runtime never does"
            )
        if self.bytes and not model.get("byte_fallback"):
            self.refuse(
                f"byte_fallback is false and {min(self.bytes)} a token",
                "unknown characters would not become bytes; in the runtime they do",
            )
        if 0 < len(self.bytes) < 256:
            missing = next(name for i in range(256) if (name := f"<0x{i:02X}>") not in self.bytes)
            self.refuse(
                f"{min(self.bytes)} is a token and {missing} is none",
                "unknown characters would come before or behind others than in the runtime; expected all 256, or none",
            )
        if not self.bytes:  # without tokens for bytes, characters may be unknown
            unk = model.get("unk_token")
            if not isinstance(unk, str) or unk not in model["vocab"]:
                self.refuse(
                    f"unk_token is {unk!r}, which is no token",
                    "unknown characters would vanish or be an error; the runtime has a token for them",
                )
            if model.get("fuse_unk") is not True:
                self.refuse(
                    "fuse_unk is false", "each unknown character is a token; the runtime makes one of neighbours"
                )

    # ---- From text to pieces ----

    def _text(self) -> bool:
        """Check normalizer and pre_tokenizer, and return whether runs of newlines are separated from other text."""
        spaced = isolated = False
        for step in self._steps("normalizer", "normalizers"):
            if _replaces(step, " ", SPACE) or (spaced and _literal(step) and " " in _literal(step)):
                spaced = True
            elif not (step.get("type") == "Strip" and step.get("strip_left") is step.get("strip_right") is False):
                self.refuse(f"normalizer {_described(step)}", "the runtime replaces ' ' by U+2581 and changes no more")
        for step in self._steps("pre_tokenizer", "pretokenizers"):
            if _is_metaspace(step) and step.get("split") is False:
                spaced = True
            elif step.get("type") == "Split" and _splits_newlines(step):
                isolated = True
            elif not (step.get("type") == "Split" and spaced and not step.get("invert") and _needs_space(step)):
                self.refuse(f"pre_tokenizer {_described(step)}", "it splits texts where the runtime does not")
        if not spaced:
            self.refuse("normalizer", "no step replaces ' ' by U+2581, which the runtime does")
        return isolated

    def _merges(self, isolated: bool) -> None:
        vocab, ranks = self.model["vocab"], dict[tuple[str, str], int]()
        special = self.bytes | {self.model.get("unk_token")}
        for rank, merge in enumerate(self.merges):
            cut = merge.index(" ", 1)
            left, right = merge[:cut], merge[cut + 1 :]
            what = f"merge {rank}, {left!r} and {right!r}"
            if not (left in vocab and right in vocab and left + right in vocab):
                self.refuse(what, "expected tokens of the vocabulary, and one of both together")
            if left in special or right in special:
                self.refuse(what, "the runtime never merges what is no character")
            if "\n" in merge and (left + right).strip("\n"):
                if not isolated:
                    self.refuse(what, "the runtime merges newlines with nothing else")
            elif "\n" in merge:
                ranks[left, right] = rank
        for token in self.model["vocab"]:
            if token[:1] == "\n" and not token.strip("\n") and len(parts := merged(token, ranks)) > 1:
                self.refuse(
                    f"merges make {len(parts)} tokens of {len(token)} newlines",
                    "the runtime takes the token that they are",
                )

    # ---- Added tokens ----

    def _added(self) -> None:
        early, late = [], []
        for entry in self.added:
            text = entry["content"]
            if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", text):
                self.refuse(f"added token {text!r}", "in the runtime it is a byte, or else stays what it is in texts")
            for key, effect in (
                ("lstrip", "it takes the white space before it"),
                ("rstrip", "it takes the white space behind it"),
                ("single_word", "it is found between other characters than letters alone"),
            ):
                if entry.get(key):
                    self.refuse(f"added token {text!r} has {key}", f"{effect}, and in the runtime it does not")
            if entry.get("normalized", not entry.get("special")):
                if " " in text or SPACE in text:
                    self.refuse(
                        f"added token {text!r} is normalized", "the runtime looks for it before spaces are replaced"
                    )
                late.append(text)
            else:
                early.append(text)
        for text in late:  # normalized tokens are searched for in the text between the other ones
            for other in early:
                ends = (text.endswith(other[:n]) for n in range(1, min(len(other), len(text))))
                if other in text or any(ends):
                    self.refuse(
                        f"added token {text!r} is normalized and {other!r} is not",
                        "it would be found after that; the runtime takes what comes first",
                    )

    # ---- From pieces to text ----

    def _decoder(self) -> None:
        spaced = bytes_ = fused = False
        for step in self._steps("decoder", "decoders"):
            kind = step.get("type")
            if _replaces(step, SPACE, " ") or _is_metaspace(step):
                spaced = True
            elif kind == "ByteFallback" and not fused and (spaced or not self.bytes):
                bytes_ = True
            elif kind == "Fuse":
                fused = True
            elif not (kind == "Strip" and step.get("start") == step.get("stop") == 0):
                self.refuse(
                    f"decoder {_described(step)}",
                    "the runtime makes spaces of U+2581, then text of bytes, and changes no more",
                )
        if not spaced or (self.bytes and not bytes_):
            missing = "U+2581 would stay in texts" if not spaced else "bytes would stay tokens in texts"
            self.refuse(f"decoder {_described(self.top.get('decoder'))}", f"{missing}, and in the runtime they do not")

    def around(self) -> tuple[list[int], list[int]] | None:
        """Return the ids that the post_processor puts before and behind a text; None without a post_processor."""
        if self.top.get("post_processor") is None:
            return None
        before: list[int] = []
        behind: list[int] = []
        for step in self._steps("post_processor", "processors"):
            if step.get("type") == "TemplateProcessing":
                first, last = self._template(step)
                before, behind = first + before, behind + last
            elif step.get("type") != "ByteLevel":  # it moves offsets and changes no id
                self.refuse(f"post_processor {_described(step)}", "the runtime puts <bos> before a text, or nothing")
        return before, behind

    def _template(self, step: Step) -> tuple[list[int], list[int]]:
        sides: list[list[int]] = [[]]
        pieces, known = step.get("single"), step.get("special_tokens")
        for piece in pieces if isinstance(pieces, list) else []:
            token = piece.get("SpecialToken") if isinstance(piece, dict) else None
            name = token.get("id") if isinstance(token, dict) else None
            entry = known.get(name) if isinstance(name, str) and isinstance(known, dict) else None
            ids = entry.get("ids") if isinstance(entry, dict) else None
            if (
                isinstance(piece, dict)
                and isinstance(piece.get("Sequence"), dict)
                and piece["Sequence"].get("id") == "A"
            ):
                sides.append([])
            elif isinstance(ids, list) and all(type(i) is int for i in ids):
                sides[-1].extend(ids)
            else:
                self.refuse(f"post_processor: {piece!r}", "expected a token of special_tokens or the text A")
        if len(sides) != 2:
            self.refuse("post_processor", f"its template has the text {len(sides) - 1} times; expected once")
        return sides[0], sides[1]

    def _steps(self, part: str, key: str) -> Iterator[Step]:
        """Yield the steps of a part in order, with those of sequences within sequences."""
        waiting = [] if self.top.get(part) is None else [self.top[part]]
        while waiting:
            step = waiting.pop()
            if not isinstance(step, dict):
                self.refuse(part, f"expected an object, found {step!r}")
            if step.get("type") != "Sequence":
                yield step
                continue
            inner = step.get(key) or []
            if not isinstance(inner, list):
                self.refuse(f"{part}: {key}", f"expected a list, found {inner!r}")
            waiting.extend(reversed(inner))


def _described(step: Any) -> str:
    """Return a description of a step, such as 'Split' of {'Regex': '[a-z]'}."""
    if not isinstance(step, dict):
        return repr(step)
    if not isinstance(step.get("type"), str):
        return repr(step)
    named = [f"{key} {step[key]!r}" for key in ("behavior", "invert") if step.get(key)]
    return " ".join([repr(step["type"]), *([f"of {step['pattern']!r}"] if "pattern" in step else []), *named])


def _literal(step: Step) -> str:
    """Return the text that a Replace step searches for; "" for a regular expression or another step."""
    pattern = step.get("pattern")
    if step.get("type") != "Replace" or not isinstance(pattern, dict):
        return ""
    text = pattern.get("String", pattern.get("Regex"))
    plain = isinstance(text, str) and ("String" in pattern or re.escape(text).replace("\\ ", " ") == text)
    return text if plain and isinstance(text, str) else ""


def _replaces(step: Step, old: str, new: str) -> bool:
    return _literal(step) == old and step.get("content") == new


def _is_metaspace(step: Step) -> bool:
    """Return whether a step is a Metaspace that adds no space before the text."""
    right = step.get("type") == "Metaspace" and step.get("replacement") == SPACE
    return right and step.get("prepend_scheme") == "never" and not step.get("add_prefix_space")


def _needs_space(step: Step) -> bool:
    pattern = step.get("pattern")
    if not isinstance(pattern, dict):
        return False
    text, expression = pattern.get("String"), pattern.get("Regex")
    if isinstance(text, str):
        return " " in text
    return isinstance(expression, str) and expression in NEEDS_SPACE


def _splits_newlines(step: Step) -> bool:
    """Return whether a Split step makes pieces of runs of newlines and of the texts between them."""
    pattern = step.get("pattern")
    if not isinstance(pattern, dict) or step.get("invert"):
        return False
    if step.get("behavior") == "Contiguous":
        return pattern in ({"String": "\n"}, {"Regex": "\n"}, {"Regex": r"\n"})
    return step.get("behavior") == "Isolated" and pattern.get("Regex") in NEWLINES


def merged(text: str, ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Return the tokens of a text after all merges, lowest rank first."""
    parts = list(text)
    while True:
        pairs = [(ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks]
        if not pairs:
            return parts
        _, i = min(pairs)
        parts[i : i + 2] = ["".join(parts[i : i + 2])]
