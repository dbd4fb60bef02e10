"""Which files of a repository of the Hub a name asks for: by the type in a file's name, or in its folder's.

    M-Q4_K_M.gguf   M_Q4_K_M.gguf   m.q4_k_m.gguf   Q4_K_M/model.gguf   M-Q4_K_M-00001-of-00002.gguf

are all of type q4_k_m: words count, which -, _, . and / are between, in upper case or lower.
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
NO_MODEL = re.compile(r"mmproj|imatrix|(?<![a-z0-9])(q?loras?|adapters?|vocab|vocabulary)(?![a-z0-9])", re.IGNORECASE)
TYPE = re.compile(r"(i?q|tq)\d+[a-z]*|b?f(16|32)|fp(8|16|32)|(mx|nv)fp\d+|int\d+")  # the first word of a type
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
    """Whether a path with slashes stays in the folder that it is taken from, wherever that is."""
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
    """The one GGUF file, or the parts of the one, that a name asks for. Raises UsageError where not just one fits."""
    models = _models(files)
    fitting = _fitting(models, name.type)
    if len(fitting) != 1:
        raise UsageError(f"{name}: {_complaint(name, fitting, models, files)}")
    (found,) = fitting
    if not found.is_complete:
        raise FormatError(f"{name}: {found.whole} has {found.of} parts, of which there are {len(found.parts)}")
    return list(found.parts)


def _models(files: Iterable[str]) -> list[_Model]:
    """All GGUF files, models or not, by their paths."""
    found: dict[tuple[str, int], list[str]] = {}
    for file in sorted(files):
        if file.lower().endswith(".gguf"):
            part = PART.fullmatch(file)
            found.setdefault((f"{part[1]}.gguf", int(part[3])) if part else (file, 0), []).append(file)
    return [_Model(whole, tuple(parts), of) for (whole, of), parts in found.items()]


def _fitting(models: Sequence[_Model], type: str | None) -> list[_Model]:
    """Who is asked for by a name of a file comes first, then by a type."""
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
    return [model for model in fitting if _type_of(model.whole) == asked] or fitting


def _words(text: str) -> list[str]:
    """A name in words: what -, _, . and / are between."""
    return [word for word in re.split(r"[-_./]+", text.lower()) if word]


def _is_of_type(model: _Model, asked: list[str]) -> bool:
    """Whether a path, or the folder that its type is in, ends in these words, and its type has no more of them."""
    path = _typed(model.whole)
    words, type = _words(path), _type_of(model.whole, BEFORE)
    return len(asked) >= max(len(type), 1) and words[-len(asked) :] == asked


def _typed(whole: str) -> str:
    """The part of a path that ends in a type: a file's without its ending, or its nearest folder's that has one."""
    path = PurePosixPath(whole).with_suffix("")
    for each in (path, *path.parents):
        if any(map(TYPE.fullmatch, _words(each.name))):
            return str(each)
    return str(path)


def _type_of(whole: str, without: Iterable[str] = ()) -> list[str]:
    """The words of a file's type, those before it too that are not in `without`."""
    words = _words(PurePosixPath(_typed(whole)).name)
    begin = max((i for i, word in enumerate(words) if TYPE.fullmatch(word)), default=len(words))
    while 0 < begin < len(words) and words[begin - 1] in BEFORE - set(without):
        begin -= 1
    return words[begin:]


def _complaint(name: Name, fitting: list[_Model], models: Sequence[_Model], files: Sequence[str]) -> str:
    if fitting:
        return f"several files fit; give one, as {PREFIX}owner/name:TYPE or :FILE: {_listed(fitting)}"
    if likely := [model for model in models if not NO_MODEL.search(model.whole)]:
        return f"no file is of that type; there are {_listed(likely)}"
    if models:
        return f"no GGUF file there is a model: {_listed(models)}"
    if is_checkpoint(files):
        return f"no GGUF file there, but a checkpoint: dg-convert {name} -o FILE makes one of it"
    return "no GGUF file there" if files else "nothing of it is in the cache"


def _listed(models: Sequence[_Model]) -> str:
    """Paths; of parts the first one's, where another has the same without its number."""
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
    """What a converter reads beside the weights."""
    return [f for f in files if "/" not in f and f.endswith((".json", ".jinja", "tokenizer.model"))]


def lacks_parts(files: Iterable[str]) -> bool:
    """Whether of a file in numbered parts some are missing."""
    found: dict[tuple[str, int], int] = {}
    for part in filter(None, map(PART.fullmatch, files)):
        found[part[1], int(part[3])] = found.get((part[1], int(part[3])), 0) + 1
    return any(there < of for (_, of), there in found.items())
