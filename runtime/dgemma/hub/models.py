"""Finds the file that a MODEL or a SOURCE stands for: a path, a bundled model's name, or hf:owner/name.

    dgemma.Model("hf:unsloth/diffusiongemma-26B-A4B-it-GGUF:Q4_K_M")

What a repository has is looked at by its headers alone, in a temporary folder, wherever that is enough: before a
download, and for plans.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from dgemma.errors import Error, FormatError, UsageError
from dgemma.files.bundled import named, refuse_folder
from dgemma.hub.download import Repository, free_disk, from_hub
from dgemma.hub.headers import check_model
from dgemma.hub.names import PREFIX, Name, is_checkpoint, lacks_parts, likely_models, of_type, parse, small, weights
from dgemma.ui.progress import telling

UNSEEN = 16 << 20  # bytes: a smaller download begins without a look at the header, which may be as long


def local_model(path: str | os.PathLike[str]) -> str:
    """Return the GGUF file that a MODEL stands for.

    A path is itself, the name of a bundled model is that one's file; of hf:owner/name[@revision][:TYPE] it is the file
    of that type (its first part), fetched unless it is in the cache. TYPE: as files are named, such as q4_k_m, or a
    whole file name. Raises UsageError where not exactly one file fits, SystemFailure where it cannot be had or the disk
    has no room for it, FormatError where its header says that it cannot run: all that before it is fetched.
    """
    text = named(path)
    if not text.startswith(PREFIX):
        refuse_folder(text)
        return text
    name = parse(text)
    return os.fspath(from_hub(name, lambda repository: _whole(name, repository)))


def _whole(name: Name, repository: Repository) -> Path:
    files = of_type(name, repository.files)
    if repository.online and sum(map(repository.to_come, files)) > UNSEEN:
        repository.check_disk(files)
        with TemporaryDirectory(prefix="dgemma-") as room, _names_of(name, Path(room)):
            header = _copied(repository, files, Path(room))
            try:
                check_model(os.fspath(header))
            except FormatError as problem:
                others = len(likely_models(repository.files)) > 1
                lists = f"; dg-info {Name(name.repository, name.revision, None)} lists the other files"
                raise FormatError(f"{problem}{lists if others else ''}") from None
    return repository.fetch(files)[0]


@dataclass(frozen=True)
class Header:
    """A GGUF file, or a file as long that has its header and no weights."""

    path: Path
    name: str  # what it is called in messages
    is_whole: bool
    to_come: int = 0  # bytes that would have to be fetched to run it
    free: tuple[Path, int] | None = None  # where they would be kept, and bytes that are free there


@contextmanager
def model_header(path: str | os.PathLike[str]) -> Iterator[Header]:
    """Yield the file that a MODEL stands for, or its header alone where it would have to be fetched.

    Nothing of that is left when the block ends. An Error that is raised in the block has the name that was given in
    place of the temporary file's.
    """
    text = named(path)
    if not text.startswith(PREFIX):
        refuse_folder(text)
        yield Header(Path(text), text, True)
        return
    name = parse(text)
    with TemporaryDirectory(prefix="dgemma-") as room, _names_of(name, Path(room)):
        yield from_hub(name, lambda repository: _header(name, repository, Path(room)))


def _header(name: Name, repository: Repository, room: Path) -> Header:
    files = of_type(name, repository.files)
    to_come = sum(map(repository.to_come, files))
    if not to_come:
        whole = repository.fetch(files)[0]
        return Header(whole, os.fspath(whole), True)
    copy = _copied(repository, files, room)
    return Header(copy, f"{_label(name)}{files[0]}", False, to_come, free_disk(name))


def _copied(repository: Repository, files: Sequence[str], room: Path) -> Path:
    """Return a copy of the first file's header, beside those of the others."""
    folder = room / "headers"
    with telling() as say:
        for file in files:
            say(f"reading the header of {file}")
            to = folder / file
            to.parent.mkdir(parents=True, exist_ok=True)
            repository.copy_gguf_header(file, to)
    return folder / files[0]


def _label(name: Name) -> str:
    """Return what stands before a file of the repository in messages."""
    return f"{Name(name.repository, name.revision, None)}:"


@contextmanager
def _names_of(name: Name, room: Path) -> Iterator[None]:
    """Give errors of the block the repository's files for those of the temporary folder."""
    try:
        yield
    except UsageError:
        raise
    except Error as problem:
        raise type(problem)(str(problem).replace(f"{room / 'headers'}/", _label(name))) from None


# ---- Sources of a conversion ----


def local_source(path: str | os.PathLike[str]) -> Path:
    """Return the folder or GGUF file that the SOURCE of a conversion stands for; see local_model.

    Without a TYPE it is the checkpoint, where the repository has one.
    """
    text = named(path)
    if not text.startswith(PREFIX):
        return Path(text)
    name = parse(text)
    return from_hub(name, lambda repository: _source(name, repository))


@contextmanager
def source_headers(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield what local_source returns, for a caller that reads no weights; see model_header.

    Of what is not in the cache the headers alone are fetched, into files that are as long as the real ones and
    otherwise empty. A checkpoint's small files are kept in the cache.
    """
    text = named(path)
    if not text.startswith(PREFIX):
        yield Path(text)
        return
    name = parse(text)
    with TemporaryDirectory(prefix="dgemma-") as room, _names_of(name, Path(room)):
        yield from_hub(name, lambda repository: _source_headers(name, repository, Path(room)))


def _source_headers(name: Name, repository: Repository, room: Path) -> Path:
    if not repository.online:
        return _source(name, repository)
    if name.type or not is_checkpoint(repository.files):
        return _header(name, repository, room).path
    out = room / name.repository.rpartition("/")[2]
    out.mkdir()
    for file in repository.fetch(small(repository.files)):
        shutil.copyfile(file, out / file.name)
    for file_name in weights(repository.files):
        repository.copy_header(file_name, out / file_name)
    return out


def _source(name: Name, repository: Repository) -> Path:
    files = repository.files
    lacking = lacks_parts(files) if is_checkpoint(files) else "config.json" in files and not _has_gguf(files)
    if not name.type and not repository.online and lacking:  # a plan leaves config.json there and no weights
        raise FormatError(f"{name}: some of its weights are not in the cache")
    if name.type or not is_checkpoint(files):
        return repository.fetch(of_type(name, files))[0]
    repository.check_disk([*weights(files), *small(files)])
    repository.fetch(small(files))  # first: whoever finds the weights finds them all
    return repository.fetch(weights(files))[0].parent


def _has_gguf(files: Sequence[str]) -> bool:
    return any(file.lower().endswith(".gguf") for file in files)
