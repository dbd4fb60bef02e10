"""Finds the files of a repository of the Hub that a name asks for: by the type in a file's or a folder's name.

    M-Q4_K_M.gguf   M_Q4_K_M.gguf   m.q4_k_m.gguf   Q4_K_M/model.gguf   M-Q4_K_M-00001-of-00002.gguf

are all of type q4_k_m: words of letters and digits count, in upper case or lower. Words behind a type do not belong to
it: M-Q4_K_M-imat.gguf is of type q4_k_m as well, unless another file has that type without them. A name with several
types, such as M-Q4_K_M-f16.gguf, is found by all of them together, q4_k_m-f16, and by none alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from dgemma.errors import FormatError, UsageError

PREFIX = "hf:"
SHAPE = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([^:@\s]+))?(?::([^:\s]+))?")
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.(gguf|safetensors)", re.IGNORECASE)
# GGUF files beside models: a vision tower and a matrix of importance by a part of the path, others by a whole word.
NO_MODEL = re.compile(
    r"mmproj|imatrix|(?<![a-z0-9])(q?loras?|adapters?|vocab|vocabulary|projector|draft|drafter)(?![a-z0-9])",
    re.IGNORECASE,
)
TYPE = re.compile(r"(i?q|tq)\d+[a-z]*|b?f(16|32)|fp(8|16|32)|(mx|nv)fp\d+|int\d+")  # the first word of a type
# The parts of a type's name that may follow: q8_0, q4_0_4_4; then q4_K, iq4_NL, q4_k_XL, q5_k_M, iq5_KS_R4, mxfp4_MOE.
DIGITS = re.compile(r"[a-z]*q\d (\d ([48] [48] )?)")
MORE = re.compile(r"[a-z]|x+[sl]|nl|k[a-z]{1,2}|r\d+|moe|hifi")
BEFORE = {"ud", "i1"}  # words before a type that say how it was made: asked for without, what has none comes first


@dataclass(frozen=True)
class Name:
    """hf:owner/name[@revision][:type]."""

    repository: str
    revision: str | None
    type: str | None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{PREFIX}{self.repository}{revision}" + (f":{self.type}" if self.type else "")


def parse(text: str) -> Name:
    found = SHAPE.fullmatch(text)
    if not found or (found[2] and not is_relative(found[2])):
        raise UsageError(f"{text}: expected hf:owner/name, hf:owner/name@revision or hf:owner/name:TYPE")
    return Name(*found.groups())


def is_relative(path: str) -> bool:
    """Return whether a path with slashes stays in the folder that it is taken from, wherever that is."""
    parts = path.split("/")
    return not any(p in ("", ".", "..") or len(p.encode("utf-8", "replace")) > 255 for p in parts) and not re.search(
        r"[\x00-\x1f\x7f\ud800-\udfff\\]", path
    )


# ---- GGUF files ----


@dataclass(frozen=True)
class _Model:
    """A GGUF file, or the parts of one."""

    whole: str  # the path, of parts without their numbers
    parts: tuple[str, ...]
    of: int  # parts there should be; 0: it is one file

    @property
    def is_complete(self) -> bool:
        numbers = [int(match[2]) for part in self.parts if (match := PART.fullmatch(part))]
        return not self.of or sorted(numbers) == list(range(1, self.of + 1))


def of_type(name: Name, files: Sequence[str]) -> list[str]:
    """Return the one GGUF file, or the parts of the one, that a name asks for.

    Raises UsageError where not just one fits.
    """
    models = _models(files)
    fitting = _fitting(models, name.type)
    if len(fitting) != 1:
        raise UsageError(f"{name}: {_complaint(name, fitting, models, files)}")
    (found,) = fitting
    if not found.is_complete:
        raise FormatError(f"{name}: {found.whole} has {found.of} parts, of which there are {len(found.parts)}")
    return list(found.parts)


def likely_models(files: Iterable[str]) -> list[list[str]]:
    """Return the files, or the parts, of each GGUF file that may be a model and is all there."""
    return [list(model.parts) for model in _fitting(_models(files), None) if model.is_complete]


def type_in(file: str) -> str | None:
    """Return the type in the name of a file or a part of one, as "Q4_K_M" or "UD-Q4_K_XL"; None where it has none.

    It has the words before it that BEFORE lists.
    """
    part = PART.fullmatch(file)
    words, begin, end = _typed(f"{part[1]}.gguf" if part else file)
    first = begin
    while first > 0 and begin < end and words[first - 1] in BEFORE:
        first -= 1
    return "-".join([*words[first:begin], "_".join(words[begin:end])]).upper() if begin < end else None


def name_of(name: Name, parts: Sequence[str], files: Sequence[str]) -> Name:
    """Return the name that finds just these parts among the files of a repository: by a type, or else by the file."""
    for asked in (type_in(parts[0]), parts[0]):
        if asked is not None:
            found = Name(name.repository, name.revision, asked)
            try:
                if of_type(found, files) == list(parts):
                    return found
            except (UsageError, FormatError):
                pass
    return Name(name.repository, name.revision, parts[0])  # which another file's differs from in case alone


def _models(files: Iterable[str]) -> list[_Model]:
    """Return all GGUF files, models or not, by their paths."""
    found: dict[tuple[str, int], list[str]] = {}
    for file in sorted(files):
        if file.lower().endswith(".gguf"):
            part = PART.fullmatch(file)
            found.setdefault((f"{part[1]}.gguf", int(part[3])) if part else (file, 0), []).append(file)
    return [_Model(whole, tuple(parts), of) for (whole, of), parts in found.items()]


def _fitting(models: Sequence[_Model], type: str | None) -> list[_Model]:
    """Return the models that are asked for: by the name of a file, or else by a type."""
    likely = [model for model in models if not NO_MODEL.search(model.whole)]
    if type is None:
        return likely
    wanted = type.lower()
    for names in (
        [{model.parts[0], *([] if model.of else [model.whole])} for model in models],
        [{model.whole} for model in models],
        [{PurePosixPath(path).name for path in (model.parts[0], model.whole)} for model in models],
    ):
        if named := [m for m, own in zip(models, names, strict=True) if wanted in {each.lower() for each in own}]:
            return named
    asked = _words(type)
    fitting = [model for model in likely if _is_of_type(model, asked)]
    return [model for model in fitting if _is_exactly(model, asked)] or fitting


def _words(text: str) -> list[str]:
    """Return a name in words of letters and digits."""
    return [word for word in re.split(r"[\W_]+", text.lower()) if word]


def _is_of_type(model: _Model, asked: list[str]) -> bool:
    """Return whether these words are all of the type in a path, with or without the words before and behind it."""
    words, begin, end = _typed(model.whole)
    least = len(words[begin:end]) or 1
    return any(words[:to][-len(asked) :] == asked and len(asked) >= least + to - end for to in (end, len(words)))


def _is_exactly(model: _Model, asked: list[str]) -> bool:
    """Return whether a name ends in just these words as its type, those of BEFORE counted."""
    words, begin, _ = _typed(model.whole)
    while 0 < begin < len(words) and words[begin - 1] in BEFORE:
        begin -= 1
    return words[begin:] == asked


def _typed(whole: str) -> tuple[list[str], int, int]:
    """Return the words of a path up to its type, and where among them the type begins and ends.

    The words are those up to the file, or to its nearest folder that has a type; of several types all count. Without
    any the type is empty, and at the end.
    """
    path = PurePosixPath(whole).with_suffix("")
    for each in (path, *path.parents):
        before, words = len(_words(str(each.parent))), _words(str(each))
        starts = [i for i in range(before, len(words)) if TYPE.fullmatch(words[i])]
        if starts:
            return words, starts[0], _end_of_type(words, starts[-1])
    words = _words(str(path))
    return words, len(words), len(words)


def _end_of_type(words: list[str], begin: int) -> int:
    """Return the place behind the last word of the type whose first one is at `begin`."""
    end = begin + 1
    if found := DIGITS.match("".join(f"{word} " for word in words[begin:])):
        end += len(found[1].split())
    while end < len(words) and MORE.fullmatch(words[end]):
        end += 1
    return end


def _complaint(name: Name, fitting: list[_Model], models: Sequence[_Model], files: Sequence[str]) -> str:
    if fitting:
        return f"several files fit; give one, as {PREFIX}owner/name:TYPE or :FILE: {_listed(fitting)}"
    if likely := [model for model in models if not NO_MODEL.search(model.whole)]:
        return f"no file is of that type; there are {_listed(likely)}{_no_models(name, models)}"
    if models:
        return f"no GGUF file there is a model: {_listed(models)}"
    if is_checkpoint(files):
        return f"no GGUF file there, but a checkpoint: dg-convert {name} -o FILE makes one of it"
    return "no GGUF file there" if files else "nothing of it is in the cache"


def _no_models(name: Name, models: Sequence[_Model]) -> str:
    """Return which files have the type that is asked for, and are not taken for models."""
    asked = _words(name.type or "")
    others = [model for model in models if NO_MODEL.search(model.whole) and _is_of_type(model, asked)]
    return f"; not taken for a model, unless its whole name is given: {_listed(others)}" if others else ""


def _listed(models: Sequence[_Model]) -> str:
    """Return paths; of parts the first one's, where another has the same without its number."""
    wholes = [model.whole for model in models]
    return ", ".join(model.parts[0] if wholes.count(model.whole) > 1 else model.whole for model in models)


# ---- checkpoints ----


def is_checkpoint(files: Iterable[str]) -> bool:
    return "config.json" in files and any(_is_weights(file) for file in files)


def _is_weights(file: str) -> bool:
    return file.endswith(".safetensors") and "/" not in file


def weights(files: Sequence[str]) -> list[str]:
    return ["model.safetensors"] if "model.safetensors" in files else [file for file in files if _is_weights(file)]


def small(files: Iterable[str]) -> list[str]:
    """Return what a converter reads beside the weights."""
    return [f for f in files if "/" not in f and f.endswith((".json", ".jinja", "tokenizer.model"))]


def lacks_parts(files: Iterable[str]) -> bool:
    """Return whether some parts of a file in numbered parts are missing."""
    found: dict[tuple[str, int], int] = {}
    for part in filter(None, map(PART.fullmatch, files)):
        found[part[1], int(part[3])] = found.get((part[1], int(part[3])), 0) + 1
    return any(there < of for (_, of), there in found.items())
