"""Models from the Hugging Face Hub, by the name hf:owner/name.

    dgemma.Model("hf:unsloth/diffusiongemma-26B-A4B-it-GGUF:Q4_K_M")

Files are kept in the Hub's own cache (HF_HOME), which other programs share, and fetched once: with HF_HUB_OFFLINE=1, or
where the Hub cannot be reached, what is there is used. The endpoint, tokens and proxies are those of `huggingface_hub`,
which is an optional extra. It starts a download over when a process dies in it; large files are therefore fetched here,
go on where they broke off, and are put into the cache once their SHA-256 is right.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from dgemma.errors import Error, FormatError, SystemFailure, UsageError
from dgemma.progress import progress_bar
from dgemma.sizes import size_text

PREFIX = "hf:"
TRIES = 5  # without a byte in between
PAUSE = 1.0  # seconds before the second, then twice as long each time
CHUNK = 1 << 20
SHAPE = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([^:@\s]+))?(?::([^:\s]+))?")
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
NO_MODEL = re.compile(r"(mmproj|imatrix)", re.IGNORECASE)  # GGUF files beside models


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
    if not found:
        raise UsageError(f"{text}: expected hf:owner/name, hf:owner/name@revision or hf:owner/name:TYPE")
    return Name(*found.groups())


def local_model(path: str | os.PathLike[str]) -> str:
    """The GGUF file that a MODEL stands for: a path is itself; of hf:owner/name[@revision][:TYPE] it is the file of
    that type (its first part), fetched unless it is in the cache. TYPE: as files are named, such as q4_k_m, or a whole
    file name. Raises UsageError where not exactly one file fits, SystemFailure where it cannot be had.
    """
    text = os.fspath(path)
    if not text.startswith(PREFIX):
        return text
    name = parse(text)
    with _hub_errors(name):
        repository = _look(name)
        return os.fspath(repository.fetch(_of_type(name, repository.files))[0])


def local_source(path: str | os.PathLike[str]) -> Path:
    """The folder or GGUF file that the SOURCE of a conversion stands for; see local_model. Without a TYPE it is the
    checkpoint, where the repository has one.
    """
    text = os.fspath(path)
    if not text.startswith(PREFIX):
        return Path(text)
    name = parse(text)
    with _hub_errors(name):
        repository = _look(name)
        if name.type or not _is_checkpoint(repository.files):
            return repository.fetch(_of_type(name, repository.files))[0]
        repository.fetch(_small(repository.files))  # first: whoever finds the weights finds them all
        return repository.fetch(_weights(repository.files))[0].parent


def local_headers(path: str | os.PathLike[str], folder: Path) -> Path:
    """As local_source, for who reads no weights: of a checkpoint that is not in the cache the headers alone are
    fetched, into files in `folder` that are as long as the real ones and otherwise empty.
    """
    text = os.fspath(path)
    if not text.startswith(PREFIX):
        return Path(text)
    name = parse(text)
    with _hub_errors(name):
        repository = _look(name)
        if name.type or not _is_checkpoint(repository.files) or not repository.online:
            return local_source(path)
        out = folder / name.repository.rpartition("/")[2]
        out.mkdir()
        for file in repository.fetch(_small(repository.files)):
            shutil.copyfile(file, out / file.name)
        for file_name in _weights(repository.files):
            repository.copy_header(file_name, out / file_name)
        return out


# ---- Which files ----


def _is_checkpoint(files: Iterable[str]) -> bool:
    return "config.json" in files and any(_is_weights(file) for file in files)


def _is_weights(file: str) -> bool:
    return file.endswith(".safetensors") and "/" not in file


def _weights(files: Sequence[str]) -> list[str]:
    return ["model.safetensors"] if "model.safetensors" in files else [file for file in files if _is_weights(file)]


def _small(files: Iterable[str]) -> list[str]:
    """What a converter reads beside the weights."""
    return [f for f in files if "/" not in f and f.endswith((".json", ".jinja", "tokenizer.model"))]


def _of_type(name: Name, files: Sequence[str]) -> list[str]:
    """The one GGUF file, or the parts of the one, that a name asks for."""
    wholes: dict[str, list[str]] = {}
    for file in sorted(files):
        if file.lower().endswith(".gguf") and not NO_MODEL.match(PurePosixPath(file).name):
            part = PART.fullmatch(file)
            wholes.setdefault(f"{part[1]}.gguf" if part else file, []).append(file)
    fitting = [whole for whole in wholes if name.type is None or _fits(whole, wholes[whole], name.type)]
    if len(fitting) != 1:
        raise UsageError(f"{name}: {_complaint(name, fitting, wholes, files)}")
    parts = wholes[fitting[0]]
    if (part := PART.fullmatch(parts[0])) and len(parts) != int(part[3]):
        raise FormatError(f"{name}: {fitting[0]} has {int(part[3])} parts, of which there are {len(parts)}")
    return parts


def _fits(whole: str, parts: Sequence[str], type: str) -> bool:
    if type.lower() in (whole.lower(), PurePosixPath(whole).name.lower(), parts[0].lower()):
        return True
    return bool(re.search(rf"(^|[-./]){re.escape(type.lower())}\.gguf$", whole.lower()))


def _complaint(name: Name, fitting: list[str], wholes: Iterable[str], files: Iterable[str]) -> str:
    if fitting:
        return f"several files fit; give one, as {PREFIX}owner/name:TYPE or :FILE: {', '.join(fitting)}"
    if wholes:
        return f"no file is of that type; there are {', '.join(wholes)}"
    if _is_checkpoint(list(files)):
        return f"no GGUF file there, but a checkpoint: dg-convert {name} -o FILE makes one of it"
    return "no GGUF file there" if any(files) else "nothing of it is in the cache"


# ---- Repositories ----


@dataclass(frozen=True)
class _File:
    size: int | None
    sha256: str | None  # of large files


class _Repository:
    """The files of one commit; offline those that are in the cache."""

    def __init__(self, name: Name, files: dict[str, _File], commit: str | None, folder: Path | None) -> None:
        self._name, self._files, self._commit, self._folder = name, files, commit, folder

    @property
    def files(self) -> list[str]:
        return list(self._files)

    @property
    def online(self) -> bool:
        return self._commit is not None

    def fetch(self, wanted: Sequence[str]) -> list[Path]:
        """The wanted files, in the cache."""
        if self._folder is None:
            for file in wanted:
                if self._files[file].sha256:
                    _fetch_blob(self._name, file, self._files[file], self._url(file))
            folder = Path(_snapshot(self._name, wanted, local_only=False))
        else:
            folder = self._folder
        found = [folder / file for file in wanted]
        for path in found:
            if not path.exists():
                raise SystemFailure(f"{self._name}: {path.name} could not be fetched")
        return found

    def copy_header(self, file: str, to: Path) -> None:
        """The header of a safetensors file, as a file of the whole one's length."""
        size = self._files[file].size
        assert size is not None
        length = int.from_bytes(self._read(file, 0, 8), "little")
        if not 2 <= length <= min(size, 100_000_000):
            raise FormatError(f"{self._name}: {file}: not a safetensors file")
        with to.open("wb") as out:
            out.write(length.to_bytes(8, "little") + self._read(file, 8, length))
            out.truncate(size)

    def _read(self, file: str, start: int, count: int) -> bytes:
        data = bytearray()
        with _get(self._url(file), f"bytes={start}-{start + count - 1}") as response:
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) >= count:
                    break
        if response.status_code != 206 and start:
            raise SystemFailure(f"{self._name}: {file}: the server does not send parts of files")
        return bytes(data[:count])

    def _url(self, file: str) -> str:
        from huggingface_hub import hf_hub_url

        return str(hf_hub_url(self._name.repository, file, revision=self._commit))


def _look(name: Name) -> _Repository:
    """Asks the Hub; where it cannot be asked, the cache."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        info = HfApi().model_info(name.repository, revision=name.revision, timeout=10, files_metadata=True)
    except (_http_error(), OfflineModeIsEnabled) as problem:
        status = problem.response.status_code if isinstance(problem, HfHubHTTPError) else 503
        folder = _cached(name)
        if status < 500 or not folder:
            raise
        names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        return _Repository(name, dict.fromkeys(names, _File(None, None)), None, folder)
    files = {s.rfilename: _File(s.size, s.lfs.sha256 if s.lfs else None) for s in info.siblings or []}
    return _Repository(name, files, info.sha, None)


def _cached(name: Name) -> Path | None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(_snapshot(name, (), local_only=True))
    except LocalEntryNotFoundError:
        return None


def _snapshot(name: Name, files: Iterable[str], local_only: bool) -> str:
    """The folder of the cache that has a commit's files, these among them."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    patterns = [re.sub(r"([*?[])", r"[\1]", file) for file in files]
    disable_progress_bars()
    try:
        return str(
            snapshot_download(
                name.repository, revision=name.revision, allow_patterns=patterns, local_files_only=local_only
            )
        )
    finally:
        enable_progress_bars()


# ---- Downloads ----


def _fetch_blob(name: Name, file: str, of: _File, url: str) -> None:
    """A large file into the cache, under its checksum: huggingface_hub finds it there. What was there of it is kept."""
    from huggingface_hub.constants import HF_HUB_CACHE

    assert of.sha256 is not None and of.size is not None
    blob = Path(HF_HUB_CACHE).expanduser() / f"models--{name.repository.replace('/', '--')}" / "blobs" / of.sha256
    if blob.exists():
        return
    blob.parent.mkdir(parents=True, exist_ok=True)
    partial = blob.with_name(f"{blob.name}.incomplete")
    with _locked(partial) as out, progress_bar(PurePosixPath(file).name) as progress:
        if blob.exists():  # another process fetched it meanwhile
            partial.unlink()
            return
        _refuse_full_disk(name, file, blob.parent, of.size - out.tell())
        _download(name, file, url, of.size, out, progress)
        out.flush()
        os.fsync(out.fileno())
        if (found := _sha256(partial)) != of.sha256:
            partial.unlink()
            raise SystemFailure(f"{name}: {file} came damaged, with SHA-256 {found} instead of {of.sha256}: try again")
        os.replace(partial, blob)


@contextmanager
def _locked(path: Path) -> Iterator[Any]:
    """The file, to append to, for one process at a time."""
    while True:
        with path.open("ab") as out:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(out, fcntl.LOCK_EX)
            if _is_at(path, out.fileno()):
                yield out
                return


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file still has this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            digest.update(data)
    return digest.hexdigest()


def _download(
    name: Name, file: str, url: str, size: int, out: Any, progress: Callable[[int, int], None] | None
) -> None:
    """Appends to `out` until it has `size` bytes. A connection that breaks is taken up again."""
    tries = 0
    while out.tell() < size:
        before = out.tell()
        try:
            with _get(url, f"bytes={before}-") as response:
                if response.status_code != 206 and before:  # all of it, from the start
                    out.truncate(0)
                    before = 0
                for chunk in response.iter_bytes():
                    out.write(chunk)
                    if progress:
                        progress(out.tell(), size)
                    if out.tell() > size:
                        return
            if out.tell() < size:
                raise _Broken(f"the connection ended at byte {out.tell()} of {size}")
        except (_http_error(), _Broken) as problem:
            tries = 1 if out.tell() > before else tries + 1
            if tries >= TRIES or _status(problem) in (401, 403, 404):
                raise
            time.sleep(PAUSE * 2 ** (tries - 1))


class _Broken(Exception):
    pass


@contextmanager
def _get(url: str, range_: str) -> Iterator[Any]:
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = {**build_hf_headers(library_name="dgemma"), "Range": range_, "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=30) as response:
        hf_raise_for_status(response)
        yield response


def _refuse_full_disk(name: Name, file: str, folder: Path, size: int) -> None:
    if size > (free := shutil.disk_usage(folder).free):
        raise SystemFailure(
            f"{name}: no space left for {file}: it needs {size_text(size)}, {folder} has {size_text(free)}"
        )


# ---- Errors ----


def _http_error() -> type[Exception]:
    """What the client of huggingface_hub raises, whichever it is."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


def _status(problem: Exception) -> int | None:
    return getattr(getattr(problem, "response", None), "status_code", None)


@contextmanager
def _hub_errors(name: Name) -> Iterator[None]:
    """One line, that names the repository, of all that can go wrong."""
    try:
        from huggingface_hub import errors
    except ImportError:
        raise UsageError(f"{name}: needs huggingface_hub: pip install 'dgemma[hub]'") from None
    try:
        yield
    except Error:
        raise
    except errors.GatedRepoError:
        raise SystemFailure(f"{name}: access has to be asked for on its page, then: hf auth login") from None
    except errors.RepositoryNotFoundError:
        raise SystemFailure(f"{name}: there is no such repository, or it is private: hf auth login") from None
    except errors.RevisionNotFoundError:
        raise SystemFailure(f"{name}: the repository has no revision {name.revision}") from None
    except errors.OfflineModeIsEnabled:
        raise SystemFailure(f"{name}: not in the cache, and HF_HUB_OFFLINE is set") from None
    except errors.HFValidationError as problem:
        raise UsageError(f"{name}: {problem}") from None
    except (_http_error(), _Broken, errors.LocalEntryNotFoundError, OSError, ValueError) as problem:
        text = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise SystemFailure(f"{name}: not in the cache, and it cannot be fetched: {text}") from None
