"""The Hub's cache of a repository, which other programs share: HF_HUB_CACHE/models--owner--name.

    blobs/SHA                       what files hold, by the checksum of it; SHA.incomplete while it comes
    snapshots/COMMIT/FILE           a link to a blob
    refs/REVISION                   the commit of a branch or a tag, as it was when it was last asked for

Names and checksums come from a server: none becomes a path before it was looked at. What is here may be damaged: it is
then as if it were not there, and is written anew.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from dgemma.files.digest import add_file
from dgemma.hub.names import Name, is_relative

COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
SHA256 = re.compile(r"[0-9a-f]{64}")
LONGEST = 256  # bytes of a ref at most


def folder_of(name: Name) -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE).expanduser() / f"models--{name.repository.replace('/', '--')}"


def blob(name: Name, checksum: str) -> Path:
    """Return where the content of this SHA-256, or of this checksum of git's, is kept."""
    assert COMMIT.fullmatch(checksum), "checked by whoever read it"
    return folder_of(name) / "blobs" / checksum


def snapshot(name: Name, commit: str) -> Path:
    assert COMMIT.fullmatch(commit), "checked by whoever read it"
    return folder_of(name) / "snapshots" / commit


def cached(name: Name) -> tuple[Path, list[str]] | None:
    """Return the folder of the commit that a name stands for, as far as the cache knows, and the whole files there."""
    revision = name.revision or "main"
    commit = revision if COMMIT.fullmatch(revision) else _remembered(name)
    if commit is None:
        return None
    folder = snapshot(name, commit)
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return (folder, files) if files else None


def is_whole(path: Path, size: int | None) -> bool:
    """Return whether a file is there, of this size; None: of any."""
    return path.is_file() and (size is None or path.stat().st_size == size)


def link(name: Name, commit: str, file: str, to: Path) -> Path:
    """Give a blob its name in the snapshot of a commit."""
    assert is_relative(file), "checked by whoever read it"
    place = snapshot(name, commit) / file
    if is_whole(place, to.stat().st_size):
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_name(f".{secrets.token_hex(8)}.part")
    try:
        try:
            beside.symlink_to(os.path.relpath(to.parent.resolve() / to.name, place.parent.resolve()))
        except OSError:  # a file system without links
            shutil.copyfile(to, beside)
        os.replace(beside, place)
    finally:
        with suppress(OSError):
            beside.unlink()
    return place


def remember(name: Name, commit: str) -> None:
    """Write down the commit that a branch or a tag stands for, for when the Hub cannot be asked."""
    if COMMIT.fullmatch(name.revision or "main") or _remembered(name) == commit:
        return
    ref = _ref(name)
    beside = ref.with_name(f".{secrets.token_hex(8)}.part")
    with suppress(OSError):  # a cache that others keep
        _clear_place(ref, folder_of(name))
        ref.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_bytes(commit.encode())
            os.replace(beside, ref)
        finally:
            beside.unlink(missing_ok=True)


def _ref(name: Name) -> Path:
    return folder_of(name) / "refs" / (name.revision or "main")


def _remembered(name: Name) -> str | None:
    """Return what remember() wrote, or another program; None where that is not there, or is no commit."""
    ref = _ref(name)
    try:
        if not ref.is_file():
            return None
        with ref.open("rb") as file:
            text = file.read(LONGEST).decode("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return text if COMMIT.fullmatch(text) else None


def _clear_place(ref: Path, folder: Path) -> None:
    """Remove a folder in a ref's place if it is empty.

    Otherwise it gets another name, as does a file in the place of a folder on the way there: somebody may want it.
    """
    for each in (*(parent for parent in reversed(ref.parents) if parent.is_relative_to(folder)), ref):
        if os.path.lexists(each) and each.is_dir() == (each == ref):
            try:
                each.rmdir()
            except OSError:
                os.replace(each, each.with_name(f".{each.name[:200]}.{secrets.token_hex(8)}"))


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    add_file(digest, path)
    return digest.hexdigest()


def git_checksum(path: Path) -> str:
    """Return what git calls a file's content, and the Hub a small file's."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    add_file(digest, path)
    return digest.hexdigest()
