"""Finds the files of a Hub repository that hf:owner/name:TYPE means, by the type in the name of a file or folder.

    M-Q4_K_M.gguf   M_Q4_K_M.gguf   m.q4_k_m.gguf   Q4_K_M/model.gguf   M-Q4_K_M-00001-of-00002.gguf

are all of type q4_k_m: names are compared by their words (of letters and digits) in lower case. Words behind a type are
not a part of it: M-Q4_K_M-imat.gguf has the type q4_k_m too, but a file without such words is preferred. A name with
several types, such as M-Q4_K_M-f16.gguf, is found by all of them together, q4_k_m-f16, and not by one alone.
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
# GGUF files that are no models. mmproj (a vision tower) and imatrix are found anywhere in the path, others as words.
NO_MODEL = re.compile(
    r"mmproj|imatrix|(?<![a-z0-9])(q?loras?|adapters?|vocab|vocabulary|projector|draft|drafter)(?![a-z0-9])",
    re.IGNORECASE,
)
TYPE = re.compile(r"(i?q|tq)\d+[a-z]*|b?f(16|32)|fp(8|16|32)|(mx|nv)fp\d+|int\d+")  # the first word of a type
# The parts of a type's name that may follow: q8_0, q4_0_4_4; then q4_K, iq4_NL, q4_k_XL, q5_k_M, iq5_KS_R4, mxfp4_MOE.
DIGITS = re.compile(r"[a-z]*q\d (\d ([48] [48] )?)")
MORE = re.compile(r"[a-z]|x+[sl]|nl|k[a-z]{1,2}|r\d+|moe|hifi")
BEFORE = {"ud", "i1"}  # words before a type that say how it was made; files without them are preferred


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
    """Return whether a path with slashes is relative and stays inside its folder."""
    parts = path.split("/")
    return not any(p in ("", ".", "..") or len(p.encode("utf-8", "replace")) > 255 for p in parts) and not re.search(
        r"[\x00-\x1f\x7f\ud800-\udfff\\]", path
    )


# ---- GGUF files ----


@dataclass(frozen=True)
class _Model:
    """A GGUF file of a repository, or all parts of a split one."""

    path: str  # the path; of a split file, without the numbers of the part
    parts: tuple[str, ...]  # the paths of the parts that are there
    count: int  # the number of parts that there should be; 0: it is a single file

    @property
    def is_complete(self) -> bool:
        numbers = [int(match[2]) for part in self.parts if (match := PART.fullmatch(part))]
        return not self.count or sorted(numbers) == list(range(1, self.count + 1))


def of_type(name: Name, files: Sequence[str]) -> list[str]:
    """Return the GGUF file that a name means; of a split file, its parts.

    Raises UsageError where no file or several files fit, FormatError where parts are missing.
    """
    models = _models(files)
    fitting = _fitting(models, name.type)
    if len(fitting) != 1:
        raise UsageError(f"{name}: {_complaint(name, fitting, models, files)}")
    (found,) = fitting
    if not found.is_complete:
        raise FormatError(f"{name}: {found.path} has {found.count} parts, of which there are {len(found.parts)}")
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
    return [_Model(path, tuple(parts), count) for (path, count), parts in found.items()]


def _fitting(models: Sequence[_Model], type: str | None) -> list[_Model]:
    """Return the models that fit `type`, which may be a file's name or a type; None: all models."""
    likely = [model for model in models if not NO_MODEL.search(model.path)]
    if type is None:
        return likely
    wanted = type.lower()
    for names in (
        [{model.parts[0], *([] if model.count else [model.path])} for model in models],
        [{model.path} for model in models],
        [{PurePosixPath(path).name for path in (model.parts[0], model.path)} for model in models],
    ):
        if named := [m for m, own in zip(models, names, strict=True) if wanted in {each.lower() for each in own}]:
            return named
    wanted_words = _words(type)
    fitting = [model for model in likely if _is_of_type(model, wanted_words)]
    return [model for model in fitting if _is_exactly(model, wanted_words)] or fitting


def _words(text: str) -> list[str]:
    """Split a name into its words of letters and digits, in lower case."""
    return [word for word in re.split(r"[\W_]+", text.lower()) if word]


def _is_of_type(model: _Model, wanted_words: list[str]) -> bool:
    """Return whether these words are the full type in a path, with or without the words before and behind it."""
    words, begin, end = _typed(model.path)
    least = len(words[begin:end]) or 1
    return any(
        words[:to][-len(wanted_words) :] == wanted_words and len(wanted_words) >= least + to - end
        for to in (end, len(words))
    )


def _is_exactly(model: _Model, wanted_words: list[str]) -> bool:
    """Return whether a name ends in exactly these words as its type; words of BEFORE are a part of it."""
    words, begin, _ = _typed(model.path)
    while 0 < begin < len(words) and words[begin - 1] in BEFORE:
        begin -= 1
    return words[begin:] == wanted_words


def _typed(name: str) -> tuple[list[str], int, int]:
    """Return the words of a path, and where among them its type begins and ends.

    The type is looked for in the file's name, then in its folders, the nearest first; the words end with the name in
    which it is found. Of several types in one name, the range has all. Without any it is empty, and at the end.
    """
    path = PurePosixPath(name).with_suffix("")
    for each in (path, *path.parents):
        before, words = len(_words(str(each.parent))), _words(str(each))
        starts = [i for i in range(before, len(words)) if TYPE.fullmatch(words[i])]
        if starts:
            return words, starts[0], _end_of_type(words, starts[-1])
    words = _words(str(path))
    return words, len(words), len(words)


def _end_of_type(words: list[str], begin: int) -> int:
    """Return the index after the last word of the type whose first word is at `begin`."""
    end = begin + 1
    if found := DIGITS.match("".join(f"{word} " for word in words[begin:])):
        end += len(found[1].split())
    while end < len(words) and MORE.fullmatch(words[end]):
        end += 1
    return end


def _complaint(name: Name, fitting: list[_Model], models: Sequence[_Model], files: Sequence[str]) -> str:
    if fitting:
        return f"several files fit; give one, as {PREFIX}owner/name:TYPE or :FILE: {_listed(fitting)}"
    if likely := [model for model in models if not NO_MODEL.search(model.path)]:
        return f"no file is of that type; there are {_listed(likely)}{_no_models(name, models)}"
    if models:
        return f"no GGUF file there is a model: {_listed(models)}"
    if is_checkpoint(files):
        return f"no GGUF file there, but a checkpoint: dg-convert {name} -o FILE makes one of it"
    return "no GGUF file there" if files else "nothing of it is in the cache"


def _no_models(name: Name, models: Sequence[_Model]) -> str:
    """Return the part of a message that lists files which have the wanted type but do not look like models."""
    wanted_words = _words(name.type or "")
    others = [model for model in models if NO_MODEL.search(model.path) and _is_of_type(model, wanted_words)]
    return f"; not taken for a model, unless its whole name is given: {_listed(others)}" if others else ""


def _listed(models: Sequence[_Model]) -> str:
    """Return the paths of models; where two are the same without numbers of parts, those of their first parts."""
    paths = [model.path for model in models]
    return ", ".join(model.parts[0] if paths.count(model.path) > 1 else model.path for model in models)


# ---- checkpoints ----


def is_checkpoint(files: Iterable[str]) -> bool:
    return "config.json" in files and any(_is_weights(file) for file in files)


def _is_weights(file: str) -> bool:
    return file.endswith(".safetensors") and "/" not in file


def weights(files: Sequence[str]) -> list[str]:
    return ["model.safetensors"] if "model.safetensors" in files else [file for file in files if _is_weights(file)]


def small(files: Iterable[str]) -> list[str]:
    """Return the small files of a checkpoint that a converter reads: configuration, tokenizer, chat template."""
    return [f for f in files if "/" not in f and f.endswith((".json", ".jinja", "tokenizer.model"))]


def lacks_parts(files: Iterable[str]) -> bool:
    """Return whether parts of a split file are missing."""
    found: dict[tuple[str, int], int] = {}
    for part in filter(None, map(PART.fullmatch, files)):
        found[part[1], int(part[3])] = found.get((part[1], int(part[3])), 0) + 1
    return any(present < count for (_, count), present in found.items())
