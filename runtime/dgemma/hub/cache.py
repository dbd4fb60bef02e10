"""The Hub's cache of a repository, which other programs share: HF_HUB_CACHE/models--owner--name.

    blobs/SHA                       what files hold, by the checksum of it; SHA.incomplete while it comes
    snapshots/COMMIT/FILE           a link to a blob
    refs/REVISION                   the commit of a branch or a tag, as it was when it was last asked for

Names and checksums come from a server: none becomes a path before it was looked at.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from dgemma.hub.names import Name, is_relative

COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
SHA256 = re.compile(r"[0-9a-f]{64}")
CHUNK = 1 << 20


def folder_of(name: Name) -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE).expanduser() / f"models--{name.repository.replace('/', '--')}"


def blob(name: Name, checksum: str) -> Path:
    """Where what has this SHA-256, or this checksum of git's, is kept."""
    assert COMMIT.fullmatch(checksum), "checked by whoever read it"
    return folder_of(name) / "blobs" / checksum


def snapshot(name: Name, commit: str) -> Path:
    assert COMMIT.fullmatch(commit), "checked by whoever read it"
    return folder_of(name) / "snapshots" / commit


def cached(name: Name) -> tuple[Path, list[str]] | None:
    """The folder of the commit that a name stands for, as far as the cache knows, and the whole files there."""
    revision = name.revision or "main"
    commit = revision
    if not COMMIT.fullmatch(revision):
        try:
            commit = (folder_of(name) / "refs" / revision).read_text().strip()
        except (OSError, UnicodeDecodeError):
            return None
    if not COMMIT.fullmatch(commit):
        return None
    folder = snapshot(name, commit)
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return (folder, files) if files else None


def link(name: Name, commit: str, file: str, to: Path) -> Path:
    """A blob gets its name in the snapshot of a commit."""
    assert is_relative(file), "checked by whoever read it"
    place = snapshot(name, commit) / file
    if place.exists():
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
    """The commit that a branch or a tag stands for, for when the Hub cannot be asked."""
    revision = name.revision or "main"
    if COMMIT.fullmatch(revision):
        return
    ref = folder_of(name) / "refs" / revision
    with suppress(OSError):  # a cache that others keep
        if ref.exists() and ref.read_text() == commit:
            return
        ref.parent.mkdir(parents=True, exist_ok=True)
        beside = ref.with_name(f".{secrets.token_hex(8)}.part")
        beside.write_text(commit)
        os.replace(beside, ref)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            digest.update(data)
    return digest.hexdigest()


def git_checksum(path: Path) -> str:
    """What git calls a file's content, and the Hub a small file's."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            digest.update(data)
    return digest.hexdigest()
