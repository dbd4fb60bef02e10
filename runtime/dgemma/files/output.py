"""Writes files: checks what may be replaced, and makes files appear complete or not at all.

A target is never an input of the same call, and never holds something of another kind than what is written to it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

from dgemma.errors import Error, SystemFailure, UsageError

StrPath: TypeAlias = "str | os.PathLike[str]"

MARK = "Made by dgemma"  # stands in every picture, which is recognised by it
HEAD = 4096  # bytes of a picture in which the mark stands
MOST_JSON = 256 << 20  # bytes of a JSON file that is looked into before it is replaced
TRIED = b"\0" * 4096  # written to try a folder: a full disk has no room for a block

_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of output: its name in messages, and whether the file at a path is one."""

    name: str
    holds: Callable[[Path], bool]


def json_kind(name: str, *keys: str) -> Kind:
    """Return the kind of file that is a JSON object with all these keys."""

    def holds(path: Path) -> bool:
        if path.stat().st_size > MOST_JSON:
            return False
        try:
            found = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            return False
        return isinstance(found, dict) and all(key in found for key in keys)

    return Kind(name, holds)


def marked_kind(name: str, *marks: bytes) -> Kind:
    """Return the kind of file whose first HEAD bytes hold all these marks."""

    def holds(path: Path) -> bool:
        with path.open("rb") as file:
            head = file.read(HEAD)
        return all(mark in head for mark in marks)

    return Kind(name, holds)


def readable(name: str) -> str:
    """Return a file's name as Unicode text; bytes of it that are no UTF-8 become U+FFFD."""
    return os.fsencode(name).decode("utf-8", "replace")


# ---- What may be written to ----


def input_files(path: StrPath) -> list[Path]:
    """Return the files that are read where `path` is an input.

    That is the file itself, all parts of a split file, or those of a checkpoint's folder, where GGUF files are no part
    of it.
    """
    name = Path(os.path.realpath(path))
    if name.is_dir():
        return sorted(each for each in name.iterdir() if each.is_file() and each.suffix != ".gguf")
    return sorted(part for part in {*parts(Path(os.path.abspath(path))), *parts(name)} if part.exists())


def parts(path: Path) -> list[Path]:
    """Return all parts of a split file, by the name of one of them; of another file, itself."""
    found = _PART.search(path.name)
    if not found:
        return [path]
    stem, count = path.name[: found.start()], min(int(found[1]), 9999)
    return [path.with_name(f"{stem}-{i:05}-of-{found[1]}.gguf") for i in range(1, count + 1)]


def check_distinct(outputs: Iterable[tuple[str, StrPath]], inputs: Iterable[tuple[str, StrPath]]) -> None:
    """Raise UsageError where an output is an input, through whatever name or link, or is an output already.

    Both are (what it is called in the message, path).
    """
    taken: dict[object, str] = {}
    for what, path in inputs:
        for file in input_files(path):
            taken.setdefault(_identity(file), f"{what} {os.fspath(path)}")
    for what, path in outputs:
        key = _identity(path)
        if key in taken:
            raise UsageError(f"{what} {os.fspath(path)}: this is {taken[key]} too; give it another name")
        taken[key] = f"{what} {os.fspath(path)}"


def _identity(path: StrPath) -> object:
    """Return a value that two names of one file share, whether the file is there or not."""
    try:
        found = os.stat(path)
        return found.st_dev, found.st_ino
    except OSError:
        return os.path.realpath(path)


def check_target(path: StrPath, kind: Kind | None = None) -> None:
    """Raise where a file cannot or must not be written to `path`.

    That is so where there is no such folder, or nothing can be made in it, or where what is there is no regular file,
    is read-only, or is neither empty nor of this kind.
    """
    name, target = os.fspath(path), Path(os.path.realpath(path))
    try:
        if not target.parent.is_dir():
            raise Error(f"{name}: there is no folder {target.parent}")
        check_kind(path, kind)
    except OSError as failure:
        raise named(failure, name) from None
    try:
        _try_folder(target)
    except OSError as failure:
        raise named(failure, f"{name}: no file can be made in {target.parent}") from None


def check_kind(path: StrPath, kind: Kind | None) -> None:
    """Check what is there already, as check_target does."""
    name = os.fspath(path)
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return
    if stat.S_ISDIR(found.st_mode):
        raise Error(f"{name}: this is a folder; name a file")
    if not stat.S_ISREG(found.st_mode):
        raise Error(f"{name}: not a regular file")
    if not found.st_mode & 0o222:
        raise Error(f"{name}: this file is read-only")
    os.close(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
    if kind is not None and found.st_size and not kind.holds(Path(path)):
        raise Error(f"{name}: this file holds something else than {kind.name}, and is not replaced")


def _try_folder(target: Path) -> None:
    """Make a file beside the target, and remove it."""
    tried = beside(target)
    descriptor = os.open(tried, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, TRIED)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
        os.unlink(tried)


def named(failure: OSError, name: StrPath) -> SystemFailure:
    """Return an error of the operating system about an output, with the name that the user gave."""
    return SystemFailure(f"{os.fspath(name)}: {(failure.strerror or str(failure)).lower()}")


# ---- Files that appear complete ----


@contextlib.contextmanager
def whole_file(path: StrPath, kind: Kind | None = None) -> Iterator[BinaryIO]:
    """Yield a file to write, which gets its name when the block ends; after an exception there is no trace of it.

    It replaces what is there, if that is of this kind, and keeps its mode. A link stays a link. Whoever opens the name
    finds the old file or the new one. Raises SystemFailure with the name that was given.
    """
    name, target = os.fspath(path), Path(os.path.realpath(path))
    part = beside(target)
    try:
        try:
            with open(part, "xb") as opened:
                yield opened
                opened.flush()
                os.fsync(opened.fileno())
            check_kind(path, kind)
            with contextlib.suppress(FileNotFoundError):
                os.chmod(part, os.stat(target).st_mode & 0o7777)
            os.replace(part, target)
        except OSError as failure:
            raise named(failure, name) from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(part)


def write_whole(path: StrPath, data: bytes, kind: Kind | None = None) -> None:
    """Write these bytes as a whole_file()."""
    with whole_file(path, kind) as opened:
        opened.write(data)


def beside(target: Path) -> Path:
    """Return a new name in the target's folder, within the 255 bytes that file systems allow."""
    return target.with_name(f"{_start(target)}{secrets.token_hex(6)}.part")


def unfinished(target: Path) -> list[Path]:
    """Return the files with names of beside() for this target: those of writers at work, and of killed ones."""
    pattern = re.compile(re.escape(_start(target)) + r"[0-9a-f]{12}\.part")
    return [path for path in target.parent.iterdir() if pattern.fullmatch(path.name)]


def _start(target: Path) -> str:
    return f".{os.fsdecode(os.fsencode(target.name)[:200])}."
