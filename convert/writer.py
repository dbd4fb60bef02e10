"""Write files that get their names only once they are complete."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from gguf import GGUF_MAGIC, GGUFType, Keys

from dgemma.errors import Error, SystemFailure, UsageError
from dgemma.files.gguf_file import File
from dgemma.files.output import Kind, beside, check_kind, check_target, unfinished
from dgemma.units import size_text

LOCK = "lock"  # the name of the locked file in a working folder
MAGIC = GGUF_MAGIC.to_bytes(4, "little")


def gguf_kind(name: str, type: str, unreadable: bool) -> Kind:
    """Return the Kind of GGUF files with this general.type.

    unreadable: whether a file with a damaged header, or a later part of a split file, is of this kind too.
    """

    def holds(path: Path) -> bool:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                return False
        try:
            with File(path) as gguf:
                return (gguf.get(Keys.General.TYPE) or GGUFType.MODEL) == type
        except Error:
            return unreadable

    return Kind(name, holds)


MODEL = gguf_kind("a model in a GGUF file", GGUFType.MODEL, unreadable=True)
IMATRIX = gguf_kind("an imatrix", GGUFType.IMATRIX, unreadable=False)


def refuse_target(out: Path, force: bool, source: Path, kind: Kind = MODEL) -> None:
    """Raise an Error where a file cannot or must not be written to `out`. See also check_distinct()."""
    real = Path(os.path.realpath(source))  # resolve() raises at a link to itself
    if _set_of(out) == _set_of(real):
        raise UsageError(f"{out}: this is the source; call the new file something else")
    if out.parent == real and out.suffix != ".gguf":
        raise UsageError(f"{out}: a file inside the source; call it something.gguf")
    check_target(out, kind)
    if out.exists() and not force:
        raise Error(f"{out}: this file exists; --force replaces it")


def _set_of(path: Path) -> Path:
    """Return a path that is the same for all parts of a split file."""
    return path.with_name(re.sub(r"-\d{5}(-of-\d{5}\.gguf)$", r"\1", path.name))


def part_paths(target: Path, count: int) -> list[Path]:
    """Return the paths of the parts of a split file, named as in llama.cpp; for one part, the target."""
    if count == 1:
        return [target]
    stem = target.name.removesuffix(".gguf")
    return [target.with_name(f"{stem}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold a lock on the folder in which files get their names, so that parts of two conversions never mix."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # some file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def remove_stale(target: Path) -> None:
    """Remove temporary files of killed runs beside a target: those that no process has locked."""
    for path in unfinished(target):
        with contextlib.suppress(OSError):
            locked = path / LOCK if path.is_dir() else path
            descriptor = os.open(locked, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if locked == path:
                    path.unlink()
                else:
                    shutil.rmtree(path)
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def working_file(target: Path) -> Iterator[Path]:
    """Yield the path for a temporary file, which is needed while the target is made.

    It is in a new folder beside the target, which is removed afterwards. A locked file in this folder shows to other
    runs that it is in use.
    """
    remove_stale(target)
    folder = beside(target)
    folder.mkdir()
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with contextlib.suppress(OSError):  # some file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder / "working.gguf"
    finally:
        os.close(descriptor)
        shutil.rmtree(folder, ignore_errors=True)


class NewFile:
    """A file that is written under a temporary name beside its target until it is complete; removed after a failure.

    The temporary file is locked by its writer: one that can be locked was left by a killed run, and is removed.
    """

    def __init__(self, target: Path, size: int, kind: Kind | None = MODEL) -> None:
        self.target = target
        self._kind = kind
        remove_stale(target)
        refuse_full_disk(target, size)
        self._temporary = beside(target)
        with self._named_errors():
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._descriptor = os.open(self._temporary, flags, 0o666)
            made = os.fstat(self._descriptor)
            self._identity = made.st_dev, made.st_ino
            with contextlib.suppress(OSError):  # some file systems have no locks
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def write(self, data: Any) -> None:
        with self._named_errors():
            view = memoryview(data).cast("B")
            while view:
                view = view[os.write(self._descriptor, view) :]

    def commit(self, force: bool) -> None:
        """Put the complete file on the disk, and give it its name."""
        with folder_lock(self.target.parent):
            self.finish(force)
            self.rename(force)
            self.sync_folder()

    def finish(self, force: bool) -> None:
        """Put the complete file on the disk, still under its temporary name."""
        with self._named_errors():
            os.fsync(self._descriptor)
        if self.target.exists() and not force:
            raise Error(f"{self.target}: this file appeared meanwhile; --force replaces it")
        check_kind(self.target, self._kind)

    def rename(self, force: bool) -> None:
        """Give the file its name; without `force` only where no file has this name."""
        with self._named_errors():
            if not force:
                try:
                    os.link(self._temporary, self.target)
                    return
                except FileExistsError:
                    raise Error(f"{self.target}: this file appeared meanwhile; --force replaces it") from None
                except OSError:
                    pass  # some file systems have no hard links
            os.replace(self._temporary, self.target)

    def withdraw(self) -> None:
        """Remove the file again, if the name is still this file's."""
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(self.target, follow_symlinks=False)
            if (found.st_dev, found.st_ino) == self._identity:
                self.target.unlink()

    def sync_folder(self) -> None:
        with self._named_errors():
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

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        os.close(self._descriptor)
        with contextlib.suppress(FileNotFoundError):
            self._temporary.unlink()


class NewFiles:
    """The parts of one file. No part gets its name before all are complete.

    The first part, without which no other can be opened, gets its name last, and an old first part is removed first.
    So old and new parts are never read together.
    """

    def __init__(self, targets: Sequence[Path], sizes: Sequence[int]) -> None:
        refuse_full_disk(targets[0], sum(sizes))
        self._named: list[NewFile] = []
        self.files: list[NewFile] = []
        with contextlib.ExitStack() as stack:
            for target, size in zip(targets, sizes, strict=True):
                self.files.append(stack.enter_context(NewFile(target, size)))
            self._stack = stack.pop_all()

    def commit(self, force: bool) -> None:
        first, *others = self.files
        with folder_lock(first.target.parent):
            for file in self.files:
                file.finish(force)
            if others:
                first.target.unlink(missing_ok=True)
            for file in (*others, first):
                self._named.append(file)
                file.rename(force)
            first.sync_folder()
            self._named.clear()

    def withdraw(self) -> None:
        """Remove the parts again, except where another conversion has replaced them meanwhile."""
        with folder_lock(self.files[0].target.parent):
            for file in self.files:
                file.withdraw()

    def __enter__(self) -> NewFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, at)
        if len(self.files) > 1:
            for file in self._named:  # commit() was interrupted
                file.withdraw()


def refuse_full_disk(target: Path, size: int) -> None:
    """Raise a SystemFailure where so many bytes do not fit beside `target`."""
    free = os.statvfs(target.parent)
    if free.f_blocks and size > free.f_bavail * free.f_frsize:
        needs, has = size_text(size), size_text(free.f_bavail * free.f_frsize)
        raise SystemFailure(f"{target}: no space left on device: it needs {needs}, {target.parent} has {has}")
