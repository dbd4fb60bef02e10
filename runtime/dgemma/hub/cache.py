"""The Hub's cache of a repository, HF_HUB_CACHE/models--owner--name, which other programs use too.

    blobs/SHA                       the content of a file, named by its checksum; SHA.incomplete during the download
    snapshots/COMMIT/FILE           a link to a blob
    refs/REVISION                   the commit of a branch or a tag, when the Hub was last asked for it

Names and checksums come from a server: each is checked before it becomes a part of a path. A damaged entry of the cache
counts as missing, and is written again.
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
REPOSITORY = "models--"  # the name of a repository's folder begins with it
INCOMPLETE = ".incomplete"  # the name of a file ends with it during the download
LONGEST = 256  # the most bytes that are read of a ref


def hub_cache() -> Path:
    """Return the folder of the Hub's cache, which is there whether or not huggingface_hub is installed."""
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except (ImportError, ValueError):
        home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
        return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    return Path(HF_HUB_CACHE).expanduser()


def folder_of(name: Name) -> Path:
    return hub_cache() / f"{REPOSITORY}{name.repository.replace('/', '--')}"


def blob(name: Name, checksum: str) -> Path:
    """Return the path of the content with this checksum: SHA-256, or git's SHA-1."""
    assert COMMIT.fullmatch(checksum), "checked by whoever read it"
    return folder_of(name) / "blobs" / checksum


def snapshot(name: Name, commit: str) -> Path:
    assert COMMIT.fullmatch(commit), "checked by whoever read it"
    return folder_of(name) / "snapshots" / commit


def cached(name: Name) -> tuple[Path, list[str]] | None:
    """Return the snapshot folder of the commit that a name stands for, and the complete files in it; None: not cached.

    The commit of a branch is the one that the cache remembers.
    """
    revision = name.revision or "main"
    commit = revision if COMMIT.fullmatch(revision) else _remembered(name)
    if commit is None:
        return None
    folder = snapshot(name, commit)
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return (folder, files) if files else None


def is_whole(path: Path, size: int | None) -> bool:
    """Return whether a file exists and has this size; None: any size."""
    return path.is_file() and (size is None or path.stat().st_size == size)


def link(name: Name, commit: str, file: str, to: Path) -> Path:
    """Make a file's link to its blob in the snapshot of a commit, and return the link's path."""
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
    """Write the commit of a branch or a tag into the cache, for times when the Hub cannot be reached."""
    if COMMIT.fullmatch(name.revision or "main") or _remembered(name) == commit:
        return
    ref = _ref(name)
    beside = ref.with_name(f".{secrets.token_hex(8)}.part")
    with suppress(OSError):  # the cache may be read-only for this user
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
    """Return the commit that remember() or another program wrote; None where there is none, or it is damaged."""
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
    """Make a ref's path free: remove an empty folder that stands there.

    A folder with content is renamed, and so is a file in the place of one of the path's folders: nothing is deleted.
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
    """Return git's SHA-1 of a file's content, by which the Hub names small files."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    add_file(digest, path)
    return digest.hexdigest()
