"""Writes files: checks which files may be replaced, and makes files appear complete or not at all.

A target is never an input of the same command, and a file of another kind is never replaced.
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

MARK = "Made by dgemma"  # a text in every picture of ours, by which it is recognised
HEAD = 4096  # bytes at the beginning of a picture that are searched for the mark
MOST_JSON = 256 << 20  # bytes; a larger JSON file is not parsed, and not replaced
TRIAL = b"\0" * 4096  # one block, written to test a folder: on a full disk this fails

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
    """Return the files that are read for an input `path`.

    These are the file itself, or all parts of a split file, or all files of a checkpoint's folder but GGUF files.
    """
    name = Path(os.path.realpath(path))
    if name.is_dir():
        return sorted(each for each in name.iterdir() if each.is_file() and each.suffix != ".gguf")
    return sorted(part for part in {*parts(Path(os.path.abspath(path))), *parts(name)} if part.exists())


def parts(path: Path) -> list[Path]:
    """Return the paths of all parts of a split file, given one of them; for another file, its own path."""
    found = _PART.search(path.name)
    if not found:
        return [path]
    stem, count = path.name[: found.start()], min(int(found[1]), 9999)
    return [path.with_name(f"{stem}-{i:05}-of-{found[1]}.gguf") for i in range(1, count + 1)]


def check_distinct(outputs: Iterable[tuple[str, StrPath]], inputs: Iterable[tuple[str, StrPath]]) -> None:
    """Raise UsageError where an output is the same file as an input or another output, even by another name or a link.

    outputs, inputs: pairs of the name in the message, such as a flag, and the path.
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
    """Return a value that is equal for two names of one file, whether the file exists or not."""
    try:
        found = os.stat(path)
        return found.st_dev, found.st_ino
    except OSError:
        return os.path.realpath(path)


def check_target(path: StrPath, kind: Kind | None = None) -> None:
    """Raise Error where a file cannot or must not be written to `path`.

    That is so where the folder does not exist or no file can be made in it, and where the path exists already and is no
    regular file, is read-only, or is neither empty nor of this kind.
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
    """Raise Error where `path` exists and must not be replaced: see check_target."""
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
    """Test whether files can be made in the target's folder: make one, and remove it."""
    trial = beside(target)
    descriptor = os.open(trial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, TRIAL)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
        os.unlink(trial)


def named(failure: OSError, name: StrPath) -> SystemFailure:
    """Return the SystemFailure for an error of the operating system, with the name of the output that the user gave."""
    return SystemFailure(f"{os.fspath(name)}: {(failure.strerror or str(failure)).lower()}")


# ---- Files that appear complete ----


@contextlib.contextmanager
def whole_file(path: StrPath, kind: Kind | None = None) -> Iterator[BinaryIO]:
    """Yield a file to write, which gets its name when the block ends; after an exception it is removed.

    It replaces an existing file of this kind, and keeps that file's permissions. A symbolic link stays one. At any time
    the name refers to the complete old file or the complete new one. Raises SystemFailure, which names the path.
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
    """Return an unused path for a temporary file beside the target; the name is within the 255 bytes allowed."""
    return target.with_name(f"{_start(target)}{secrets.token_hex(6)}.part")


def unfinished(target: Path) -> list[Path]:
    """Return existing temporary files of beside() for this target: of running writers, and of killed ones."""
    pattern = re.compile(re.escape(_start(target)) + r"[0-9a-f]{12}\.part")
    return [path for path in target.parent.iterdir() if pattern.fullmatch(path.name)]


def _start(target: Path) -> str:
    return f".{os.fsdecode(os.fsencode(target.name)[:200])}."
