"""GGUF out: the header as bytes, and a file that gets its name only once it is complete."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from dgemma.convert.metadata import Pair
from dgemma.errors import Error, SystemFailure, UsageError

ALIGNMENT = 32
MAGIC, VERSION = b"GGUF", 3

# GGUF's numbers of value types, and how struct packs them.
KINDS = {"U32": (4, "I"), "I32": (5, "i"), "F32": (6, "f"), "BOOL": (7, "?"), "STRING": (8, "")}
ARRAY = 9


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def header(pairs: Sequence[Pair], tensors: Iterable[tuple[str, Sequence[int], int, int]]) -> bytes:
    """Everything before the data section, padded. tensors: name, dims fastest first, format id, offset in the data."""
    tensors = list(tensors)
    out = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(pairs)))
    for pair in pairs:
        out += _string(pair.key, pair.key) + _value(pair)
    for name, dims, format_id, offset in tensors:
        out += _string(name, name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, format_id, offset)
    return bytes(out.ljust(aligned(len(out)), b"\0"))


def _value(pair: Pair) -> bytes:
    if pair.kind in KINDS:
        number, code = KINDS[pair.kind]
        return struct.pack("<I", number) + _scalar(pair.key, code, pair.value)
    number, code = KINDS[pair.kind.removesuffix("S")]
    prefix = struct.pack("<IIQ", ARRAY, number, len(pair.value))
    if code:
        return prefix + struct.pack(f"<{len(pair.value)}{code}", *pair.value)
    return prefix + b"".join(_string(pair.key, text) for text in pair.value)


def _scalar(key: str, code: str, value: Any) -> bytes:
    return struct.pack(f"<{code}", value) if code else _string(key, value)


def _string(key: str, text: str) -> bytes:
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError:
        raise Error(f"{key}: {text!r} is no Unicode text") from None
    return struct.pack("<Q", len(data)) + data


def refuse_target(out: Path, force: bool, source: Path) -> None:
    """Raises an Error where a file cannot or must not be written to `out`."""
    if not out.parent.is_dir():
        raise Error(f"{out}: there is no folder {out.parent}")
    if out.is_dir() or (out.exists() and not out.is_file()):
        raise Error(f"{out}: not a regular file")
    if out.parent == source.resolve() and out.suffix != ".gguf":
        raise UsageError(f"{out}: a file inside the source; call it something.gguf")
    if out.exists() and not force:
        raise Error(f"{out}: this file exists; --force replaces it")


class NewFile:
    """A file written beside its target, under another name until it is complete. Any failure leaves nothing behind.

    The temporary is locked while its writer lives: one that can be locked is a dead run's, and is removed.
    """

    def __init__(self, target: Path, size: int) -> None:
        self.target = target
        self._remove_stale()
        free = os.statvfs(target.parent)
        if free.f_blocks and size > free.f_bavail * free.f_frsize:
            needs, has = size_text(size), size_text(free.f_bavail * free.f_frsize)
            raise SystemFailure(f"{target}: no space left on device: it needs {needs}, {target.parent} has {has}")
        self._temporary = target.parent / f".{target.name}.{secrets.token_hex(6)}.part"
        with self._named_errors():
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._descriptor = os.open(self._temporary, flags, 0o666)
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def write(self, data: Any) -> None:
        with self._named_errors():
            view = memoryview(data).cast("B")
            while view:
                view = view[os.write(self._descriptor, view) :]

    def commit(self, force: bool) -> None:
        """Puts the complete file under its name, safely on disk."""
        with self._named_errors():
            os.fsync(self._descriptor)
            if self.target.exists() and not force:
                raise Error(f"{self.target}: this file appeared meanwhile; --force replaces it")
            os.replace(self._temporary, self.target)
            folder = os.open(self.target.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as problem:
            raise SystemFailure(f"{self.target}: {(problem.strerror or str(problem)).lower()}") from None

    def _remove_stale(self) -> None:
        for path in self.target.parent.glob(f".{_escaped(self.target.name)}.*.part"):
            with contextlib.suppress(OSError):
                descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                finally:
                    os.close(descriptor)

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        os.close(self._descriptor)
        with contextlib.suppress(FileNotFoundError):
            self._temporary.unlink()


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def size_text(size: float) -> str:
    """Bytes in powers of 1024: "15.7 GiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
