"""Lists the models that are kept on this machine, and removes them: the Hub's cache, the shapes of dg-bench.

What is listed was looked into: a GGUF file says that it is a model of the architecture that dgemma runs, a checkpoint's
config.json the same. Nothing else is ever removed. A file of the Hub's cache is a link in a snapshot to a blob; the
blob goes with the last link to it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from dgemma.errors import Error, SystemFailure, UsageError
from dgemma.files.bundled import BUNDLED, bundled
from dgemma.files.gguf_file import File
from dgemma.hub.cache import COMMIT, INCOMPLETE, REPOSITORY, hub_cache
from dgemma.hub.names import Name, is_checkpoint, likely_models, name_of, small, weights
from dgemma.native.metadata import keys

ARCHITECTURE, MODEL_TYPE = "diffusion-gemma", "diffusion_gemma"
SHAPES = ("gemma4", ARCHITECTURE)  # architectures of dg-bench's files


@dataclass(frozen=True)
class Kept:
    """A model that is kept here."""

    name: str  # by which commands take it
    kind: str  # "bundled", "GGUF file", "checkpoint", "shape of dg-bench", "unfinished download"
    path: Path  # of parts the first
    bytes: int
    used: float  # when it was last read, or written: seconds since 1970
    files: tuple[Path, ...] = ()  # what goes when it is removed; of the Hub's cache the links
    root: Path | None = None  # the folder of the repository in the Hub's cache


def kept_models(shapes: Path | None = None) -> list[Kept]:
    """Return all that is kept here: bundled models, those of the Hub's cache, and those of dg-bench in `shapes`."""
    found = [_kept(name, "bundled", [Path(bundled(name))], ()) for name in BUNDLED]
    for root in sorted(hub_cache().glob(f"{REPOSITORY}*--*")):
        if root.is_dir() and not root.is_symlink():
            with suppress(OSError):
                found += _of_repository(root)
    if shapes is not None and shapes.is_dir():
        for path in sorted(shapes.glob("*.gguf")):
            if _is_shape(path):
                found.append(_kept(path.stem, "shape of dg-bench", [path], (path,)))
    return found


def find(name: str, shapes: Path | None = None) -> Kept:
    """Return the model of a name, as kept_models() lists it, in capitals or not. Raises UsageError for another."""
    there = kept_models(shapes)
    fitting = [each for each in there if each.name == name] or [e for e in there if e.name.lower() == name.lower()]
    if len(fitting) == 1:
        return fitting[0]
    begun = [each.name for each in there if each.name.lower().startswith(f"{name.lower()}:")]
    more = f"; there are {', '.join(begun)}" if begun else ": dg-models list tells the names"
    raise UsageError(f"{name}: no model of that name is kept here{more}")


@dataclass(frozen=True)
class Removal:
    """The files that go when a model is removed; they are found before anything is touched."""

    model: Kept
    files: list[Path]
    bytes: int  # that the disk gets back
    shared: list[Path] = field(default_factory=list)  # blobs that stay, as other snapshots link to them


def removal(model: Kept) -> Removal:
    """Return what removing a model takes away. Raises UsageError for one that is not removed."""
    if not model.files:
        raise UsageError(f"{model.name}: it comes with dgemma, and is not removed")
    if model.root is None or model.kind == "unfinished download":
        return Removal(model, list(model.files), sum(_bytes(file) for file in model.files))
    links = {link: _blob(link, model.root) for link in _links(model.root)}
    gone = [blob for blob in dict.fromkeys(links[file] for file in model.files if file in links) if blob is not None]
    shared = [blob for blob in gone if any(to == blob and link not in model.files for link, to in links.items())]
    gone = [blob for blob in gone if blob not in shared]
    plain = [file for file in model.files if not file.is_symlink()]  # a file system without links
    return Removal(model, [*model.files, *gone], sum(map(_bytes, [*gone, *plain])), shared)


def remove(what: Removal) -> None:
    """Remove these files, and folders of the Hub's cache that are then empty.

    Raises SystemFailure for what cannot be removed, Error for a download that goes on right now.
    """
    if what.model.kind == "unfinished download":
        _refuse_running(what.model)
    for file in what.files:
        try:
            file.unlink(missing_ok=True)
        except OSError as problem:
            raise SystemFailure(f"{file}: {(problem.strerror or str(problem)).lower()}") from None
    if what.model.root is not None:
        _remove_empty(what.model.root)


# ---- The Hub's cache ----


def _of_repository(root: Path) -> Iterator[Kept]:
    repository = root.name.removeprefix(REPOSITORY).replace("--", "/", 1)
    refs = _refs(root)
    main = refs.get("main")
    snapshots = [
        each for each in sorted((root / "snapshots").glob("*")) if COMMIT.fullmatch(each.name) and not each.is_symlink()
    ]
    for snapshot in sorted(snapshots, key=lambda each: each.name != main):
        revision = None if snapshot.name == main else _revision(snapshot.name, refs)
        yield from _of_snapshot(Name(repository, revision, None), snapshot, root)
    for partial in sorted((root / "blobs").glob(f"*{INCOMPLETE}")):
        if partial.is_file() and not partial.is_symlink():
            name = f"hf:{repository}:{partial.name}"
            yield _kept(name, "unfinished download", [partial], (partial,), root)


def _refs(root: Path) -> dict[str, str]:
    """Return the commits of branches and tags, as far as they are readable."""
    found = {}
    for ref in sorted((root / "refs").rglob("*")):
        with suppress(OSError, UnicodeDecodeError):
            if ref.is_file() and ref.stat().st_size < 256 and COMMIT.fullmatch(text := ref.read_text("ascii").strip()):
                found[ref.relative_to(root / "refs").as_posix()] = text
    return found


def _revision(commit: str, refs: dict[str, str]) -> str:
    return next((name for name, of in refs.items() if of == commit), commit)


def _of_snapshot(name: Name, snapshot: Path, root: Path) -> Iterator[Kept]:
    files = sorted(file.relative_to(snapshot).as_posix() for file in snapshot.rglob("*") if file.is_file())
    for parts in likely_models(files):
        paths = tuple(snapshot / part for part in parts)
        if _architecture(paths[0]) == ARCHITECTURE:
            yield _kept(str(name_of(name, parts, files)), "GGUF file", paths, paths, root)
    if is_checkpoint(files) and _is_ours(snapshot / "config.json"):
        paths = tuple(snapshot / file for file in [*weights(files), *small(files)])
        yield _kept(str(name), "checkpoint", (snapshot, *paths), paths, root)


def _is_ours(config: Path) -> bool:
    """Return whether a checkpoint's config.json is of the model that dgemma converts."""
    try:
        told = json.loads(config.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(told, dict) and told.get("model_type") == MODEL_TYPE


def _links(root: Path) -> Iterator[Path]:
    """Return all files of all snapshots."""
    return (file for file in (root / "snapshots").rglob("*") if file.is_symlink() or file.is_file())


def _blob(link: Path, root: Path) -> Path | None:
    """Return the blob of this repository that a file of a snapshot is a link to; None where it is none."""
    blobs, to = (root / "blobs").resolve(), link.resolve()
    return to if link.is_symlink() and to.parent == blobs else None


def _remove_empty(root: Path) -> None:
    """Remove folders without files, and the names of commits that are no more there."""
    for folder in sorted((root / "snapshots").rglob("*"), reverse=True):
        if folder.is_dir() and not folder.is_symlink():
            with suppress(OSError):  # it is not empty
                folder.rmdir()
    for ref, commit in _refs(root).items():
        if not (root / "snapshots" / commit).exists():
            (root / "refs" / ref).unlink(missing_ok=True)
    for folder in (root / "snapshots", root / "blobs", root / "refs", root):
        with suppress(OSError):
            folder.rmdir()


def _refuse_running(model: Kept) -> None:
    import fcntl

    with model.path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Error(f"{model.name}: it is being fetched right now") from None


# ---- Files ----


def _architecture(path: Path) -> str | None:
    """Return the architecture that a GGUF file names; None for a file that cannot be read."""
    try:
        with File(path) as file:
            found = file.get(keys()["architecture"].key)
    except Error:
        return None
    return found if isinstance(found, str) else None


def _is_shape(path: Path) -> bool:
    """Return whether a file is one that dg-bench made: its name is the model's name in it."""
    if path.is_symlink() or not path.is_file() or _architecture(path) not in SHAPES:
        return False
    with File(path) as file:
        return bool(file.get(keys()["name"].key) == path.stem)


def _kept(
    name: str, kind: str, paths: list[Path] | tuple[Path, ...], files: tuple[Path, ...], root: Path | None = None
) -> Kept:
    stats = [path.stat() for path in (files or paths)]
    used = max(max(each.st_atime, each.st_mtime) for each in stats)
    return Kept(name, kind, paths[0], sum(each.st_size for each in stats), used, files, root)


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
