"""Downloads models from the Hugging Face Hub, by the name hf:owner/name.

    dgemma.Model("hf:unsloth/diffusiongemma-26B-A4B-it-GGUF:Q4_K_M")

Files are kept in the Hub's own cache (HF_HOME), which other programs use too, so each is downloaded once. With
HF_HUB_OFFLINE=1 only the cache is used. The cache is also used where the Hub cannot be reached or refuses the request;
a line on standard error then says so. The endpoint, tokens and proxies are those of `huggingface_hub`, an optional
extra. This module downloads the files itself: an interrupted download is resumed, a file gets its name in the cache
only after its SHA-256 was checked, and every name from the server is checked before it becomes a path.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import quote

from dgemma.errors import Error, FormatError, SystemFailure, UsageError
from dgemma.hub.cache import (
    COMMIT,
    SHA256,
    blob,
    cached,
    folder_of,
    git_checksum,
    is_whole,
    link,
    remember,
    sha256,
    snapshot,
)
from dgemma.hub.names import PREFIX, Name, is_checkpoint, is_relative, lacks_parts, parse, small, weights
from dgemma.hub.names import of_type as _of_type
from dgemma.ui.progress import progress_bar
from dgemma.ui.terminal import one_line, tell
from dgemma.units import size_text

TRIES = 5  # a download fails after so many tries in a row without a new byte
PAUSE = 1.0  # seconds before the second try; doubled for each further one
ASKED = 10.0  # seconds that the Hub may take to list a repository
LISTING = 64 << 20  # the most bytes of a repository's list of files
LARGEST = 1 << 62  # the most bytes of a file
T = TypeVar("T")


def local_model(path: str | os.PathLike[str]) -> str:
    """Return the path of the GGUF file that a MODEL argument means.

    A path is returned as it is. For hf:owner/name[@revision][:TYPE] it is the repository's file of that type (of a
    split file, its first part), which is downloaded unless it is in the cache. TYPE is a type as in file names, such as
    q4_k_m, or a full file name. Raises UsageError where no file or several fit, SystemFailure where it cannot be
    downloaded.
    """
    text = os.fspath(path)
    if not text.startswith(PREFIX):
        return text
    name = parse(text)
    return os.fspath(_from_hub(name, lambda repository: repository.fetch(_of_type(name, repository.files))[0]))


def local_source(path: str | os.PathLike[str]) -> Path:
    """Return the folder or GGUF file that the SOURCE of a conversion means; see local_model.

    For a repository with a checkpoint, and without a TYPE, it is the checkpoint's folder.
    """
    text = os.fspath(path)
    if not text.startswith(PREFIX):
        return Path(text)
    name = parse(text)
    return _from_hub(name, lambda repository: _source(name, repository))


def local_headers(path: str | os.PathLike[str], folder: Path) -> Path:
    """Return a folder or GGUF file as local_source does, for a caller that reads no weights.

    Of a checkpoint that is not in the cache only the headers are downloaded, into sparse files in `folder` that have
    the size of the real ones.
    """
    text = os.fspath(path)
    if not text.startswith(PREFIX):
        return Path(text)
    name = parse(text)

    def headers(repository: _Repository) -> Path:
        if name.type or not is_checkpoint(repository.files) or not repository.online:
            return _source(name, repository)
        out = folder / name.repository.rpartition("/")[2]
        out.mkdir()
        for file in repository.fetch(small(repository.files)):
            shutil.copyfile(file, out / file.name)
        for file_name in weights(repository.files):
            repository.copy_header(file_name, out / file_name)
        return out

    return _from_hub(name, headers)


def _source(name: Name, repository: _Repository) -> Path:
    files = repository.files
    lacking = lacks_parts(files) if is_checkpoint(files) else "config.json" in files and not _has_gguf(files)
    if not name.type and not repository.online and lacking:  # a plan leaves config.json there and no weights
        raise FormatError(f"{name}: some of its weights are not in the cache")
    if name.type or not is_checkpoint(files):
        return repository.fetch(_of_type(name, files))[0]
    repository.fetch(small(files))  # first, so that a folder with weights has the small files too
    return repository.fetch(weights(files))[0].parent


def _has_gguf(files: Sequence[str]) -> bool:
    return any(file.lower().endswith(".gguf") for file in files)


# ---- The Hub, or its cache ----


_refusals: ContextVar[dict[str, Exception] | None] = ContextVar("refusals", default=None)


@contextmanager
def remember_refusals() -> Iterator[None]:
    """Within the block, do not ask the Hub again for a name that it refused, or for which it could not be reached.

    The cache is used for it until the end of the block, and the message is shown once. An inner block does nothing.
    """
    if _refusals.get() is not None:
        yield
        return
    token = _refusals.set({})
    try:
        yield
    finally:
        _refusals.reset(token)


def _from_hub(name: Name, use: Callable[[_Repository], T]) -> T:
    """Return use(repository), with the repository from the Hub.

    Where the Hub cannot be reached or refuses, the repository has the files in the cache.
    """
    try:
        from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
        from huggingface_hub.utils import validate_repo_id
    except ImportError:
        raise UsageError(f"{name}: needs huggingface_hub: pip install 'dgemma[hub]'") from None
    except ValueError as problem:  # an HF_ENDPOINT that is no address
        raise SystemFailure(f"{name}: huggingface_hub: {problem}") from None
    try:
        validate_repo_id(name.repository)
    except HFValidationError as problem:
        raise UsageError(f"{name}: {problem}") from None
    refusals = _refusals.get()
    refused = refusals.get(str(name)) if refusals is not None else None
    is_news = refused is None
    try:
        if refused is None:
            return use(_Repository(name, *_listing(name)))
    except (_http_error(), OfflineModeIsEnabled, _Broken, _Strange, ValueError) as problem:
        refused = problem  # ValueError: the endpoint or a proxy is no valid address
    except OSError as problem:
        raise _cache_failure(name, problem) from None
    assert refused is not None
    try:
        result = _from_cache(name, use, refused, is_news)
    except OSError as problem:
        raise _cache_failure(name, problem) from None
    if refusals is not None:
        refusals[str(name)] = refused
    return result


def _from_cache(name: Name, use: Callable[[_Repository], T], refused: Exception, is_news: bool) -> T:
    from huggingface_hub.errors import OfflineModeIsEnabled

    offline, why = isinstance(refused, OfflineModeIsEnabled), _reason(name, refused)
    kind = FormatError if isinstance(refused, _Strange) else SystemFailure
    found = cached(name)
    if found is None:
        raise kind(f"{name}: {why}; and it is not in the cache") from None
    try:
        result = use(_Repository(name, None, dict.fromkeys(found[1]), found[0]))
    except Error as problem:
        if offline:
            raise
        lacking = str(problem).removeprefix(f"{name}: ")
        raise kind(f"{name}: {why}; and the cache has not all of it: {lacking}") from None
    if is_news and not offline:
        tell(one_line(f"{name}: {why}; what the cache has is used"))
    return result


def _cache_failure(name: Name, problem: OSError) -> SystemFailure:
    """Return the error for a file of the cache that cannot be read or written."""
    file = problem.filename2 or problem.filename or "the cache"
    return SystemFailure(f"{name}: {file}: {problem.strerror or problem}")


class _Broken(Exception):
    """A connection ended too early."""


class _Strange(Exception):
    """The server's answer has a form that the Hub's answers do not have."""


@dataclass(frozen=True)
class _File:
    size: int | None  # bytes; None: the Hub does not say
    sha256: str | None  # large files have one, small ones do not


class _Repository:
    """The files of one commit on the Hub; or, offline, the files in `folder`, a snapshot in the cache."""

    def __init__(self, name: Name, commit: str | None, files: dict[str, Any], folder: Path | None = None) -> None:
        self._name, self._commit, self._files, self._folder = name, commit, files, folder

    @property
    def files(self) -> list[str]:
        return list(self._files)

    @property
    def online(self) -> bool:
        return self._commit is not None

    def fetch(self, wanted: Sequence[str]) -> list[Path]:
        """Download the wanted files that are not in the cache, and return the paths of all there."""
        if self._commit is None:
            assert self._folder is not None
            return [self._folder / file for file in wanted]
        about = [_about(file, self._files[file]) for file in wanted]  # all are checked before anything is fetched
        found = [self._fetch(file, info) for file, info in zip(wanted, about, strict=True)]
        self._link_known()
        remember(self._name, self._commit)
        return found

    def _fetch(self, file: str, info: _File) -> Path:
        assert self._commit is not None
        present = snapshot(self._name, self._commit) / file
        if is_whole(present, info.size):
            return present
        to = _fetch_large(self._name, file, info, self._url(file)) if info.sha256 else self._fetch_small(file, info)
        return link(self._name, self._commit, file, to)

    def _fetch_small(self, file: str, info: _File) -> Path:
        """Download a file that has no SHA-256, from its beginning, to a blob named by git's checksum."""
        part = folder_of(self._name) / "blobs" / f"{secrets.token_hex(8)}.incomplete"
        part.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as out:
                _download(self._url(file), info.size, out, None)
            to = blob(self._name, git_checksum(part))
            os.replace(part, to)
        finally:
            part.unlink(missing_ok=True)
        return to

    def _link_known(self) -> None:
        """Link files of this commit that the cache has from an earlier one, so that they are found offline too."""
        assert self._commit is not None
        for file, entry in self._files.items():
            with suppress(_Strange, OSError):
                info = _about(file, entry)
                if info.sha256 and is_whole(present := blob(self._name, info.sha256), info.size):
                    link(self._name, self._commit, file, present)

    def copy_header(self, file: str, to: Path) -> None:
        """Download the header of a safetensors file into a sparse file of the full size."""
        size = _about(file, self._files[file]).size
        if size is None:
            raise _Strange(f"{file} has no size there")
        length = int.from_bytes(self._read(file, 0, 8), "little")
        if not 2 <= length <= min(size, 100_000_000):
            raise FormatError(f"{self._name}: {file}: not a safetensors file")
        with to.open("wb") as out:
            out.write(length.to_bytes(8, "little") + self._read(file, 8, length))
            out.truncate(size)

    def _read(self, file: str, start: int, count: int) -> bytes:
        data = bytearray()
        with _get(self._url(file), f"bytes={start}-{start + count - 1}") as response:
            _check_place(response, start)
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) >= count:
                    break
        if response.status_code != 206 and start:
            raise _Strange(f"it does not send parts of files, as of {file}")
        if len(data) < count:
            raise _Broken(f"the connection ended at byte {start + len(data)} of {start + count} of {file}")
        return bytes(data[:count])

    def _url(self, file: str) -> str:
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{self._name.repository}/resolve/{self._commit}/{quote(file)}"


# ---- Answers of the Hub ----


def _listing(name: Name) -> tuple[str, dict[str, Any]]:
    """Return the commit that a name stands for, and the Hub's entry for each of its files."""
    from huggingface_hub import constants

    revision = quote(name.revision or constants.DEFAULT_REVISION, safe="")
    url = f"{constants.ENDPOINT}/api/models/{name.repository}/revision/{revision}?blobs=true"
    data = bytearray()
    with _get(url, timeout=ASKED) as response:
        for chunk in response.iter_bytes():
            data += chunk
            if len(data) > LISTING:
                raise _Strange(f"its list of files is longer than {size_text(LISTING)}")
    return _parse_listing(data)


def _parse_listing(data: bytes | bytearray) -> tuple[str, dict[str, Any]]:
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError):
        raise _Strange("it is no JSON") from None
    if not isinstance(answer, dict):
        raise _Strange(f"it is {answer!r:.60}, not an object")
    commit, siblings = answer.get("sha"), answer.get("siblings", [])
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise _Strange(f"its sha is {commit!r:.60}, not a commit")
    if "siblings" not in answer:
        raise _Strange("it has no siblings, the list of files")
    if not isinstance(siblings, list):
        raise _Strange(f"its siblings are {siblings!r:.60}, not a list of files")
    if not siblings:
        raise _Strange("its list of files is empty")
    for each in siblings:
        if not isinstance(each, dict) or not isinstance(each.get("rfilename"), str):
            raise _Strange(f"its list of files has {each!r:.60}, which names no file")
    return commit, {each["rfilename"]: each for each in siblings}


def _about(file: str, entry: dict[str, Any]) -> _File:
    """Return the size and checksum of a file from its entry in the list. Raises _Strange where they make no sense."""
    if not is_relative(file):
        raise _Strange(f"it has a file of the name {file!r}, which is no path within a repository")
    large = entry.get("lfs")
    if not isinstance(large, (dict, type(None))):
        raise _Strange(f"{file} has lfs {large!r:.60} there, not an object")
    size = entry.get("size") if large is None or large.get("size") is None else large["size"]
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= LARGEST):
        raise _Strange(f"{file} has size {size!r:.60} there, not a number of bytes")
    if not large:
        return _File(size, None)
    checksum = large.get("sha256", large.get("oid"))
    if not isinstance(checksum, str) or not SHA256.fullmatch(checksum.lower()):
        raise _Strange(f"{file} has SHA-256 {checksum!r:.80} there, not 64 hexadecimal digits")
    return _File(size, checksum.lower())


# ---- Downloads ----


def _fetch_large(name: Name, file: str, info: _File, url: str) -> Path:
    """Download a file into the cache, to a blob named by its SHA-256. An interrupted download is resumed."""
    assert info.sha256 is not None
    to = blob(name, info.sha256)
    if is_whole(to, info.size):
        return to
    to.parent.mkdir(parents=True, exist_ok=True)
    partial = to.with_name(f"{to.name}.incomplete")
    with _locked(partial) as out, progress_bar(PurePosixPath(file).name) as progress:
        if is_whole(to, info.size):  # another process downloaded it meanwhile
            partial.unlink()
            return to
        if info.size is not None:
            _refuse_full_disk(name, file, to.parent, info.size - out.tell())
        _download(url, info.size, out, progress)
        out.flush()
        os.fsync(out.fileno())
        if (found := sha256(partial)) != info.sha256:
            partial.unlink()
            raise _Strange(f"{file} came damaged, with SHA-256 {found} instead of {info.sha256}: try again")
        os.replace(partial, to)
    return to


@contextmanager
def _locked(path: Path) -> Iterator[Any]:
    """Open a file to append to it; other processes that do the same wait."""
    while True:
        with path.open("ab") as out:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(out, fcntl.LOCK_EX)
            if _is_at(path, out.fileno()):
                yield out
                return


def _is_at(path: Path, descriptor: int) -> bool:
    """Return whether an open file still has this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _download(url: str, size: int | None, out: Any, progress: Callable[[int, int], None] | None) -> None:
    """Download to the end of `out` until it has `size` bytes; None: until the server has sent all.

    After a connection breaks, the download is resumed.
    """
    if size is None:
        out.truncate(0)
    tries, whole = 0, False
    while not whole and (size is None or out.tell() < size):
        before = out.tell()
        try:
            with _get(url, f"bytes={before}-" if before or size else None) as response:
                _check_place(response, before)
                if response.status_code != 206 and before:  # the server sends the file from its start
                    out.truncate(0)
                    before = 0
                for chunk in response.iter_bytes():
                    out.write(chunk)
                    if progress and size is not None:
                        progress(out.tell(), size)
                    if size is not None and out.tell() > size:
                        raise _Strange(f"a file is longer than the {size} bytes that it has there")
            whole = size is None
            if size is not None and out.tell() < size:
                raise _Broken(f"the connection ended at byte {out.tell()} of {size}")
        except (_http_error(), _Broken) as problem:
            tries = 1 if out.tell() > before else tries + 1
            if tries >= TRIES or (_status(problem) or 500) < 500 or _leads_nowhere(problem):
                raise
            time.sleep(PAUSE * 2 ** (tries - 1))


def _check_place(response: Any, start: int) -> None:
    """Raise _Strange where a part of a file does not begin at `start`, as requested."""
    range_ = response.headers.get("Content-Range", "")
    if response.status_code == 206 and range_ and not range_.startswith(f"bytes {start}-"):
        raise _Strange(f"it sent {range_.strip():.60} instead of those from {start}")


@contextmanager
def _get(url: str, range_: str | None = None, timeout: float = 30) -> Iterator[Any]:
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    if constants.HF_HUB_OFFLINE:
        raise errors.OfflineModeIsEnabled
    headers = {**build_hf_headers(library_name="dgemma"), **({"Range": range_} if range_ else {})}
    headers["Accept-Encoding"] = "identity"
    with get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=timeout) as response:
        hf_raise_for_status(response)
        yield response


def _refuse_full_disk(name: Name, file: str, folder: Path, size: int) -> None:
    if size > (free := shutil.disk_usage(folder).free):
        raise SystemFailure(
            f"{name}: no space left for {file}: it needs {size_text(size)}, {folder} has {size_text(free)}"
        )


# ---- Errors ----


def _http_error() -> type[Exception]:
    """Return the class of errors that the HTTP client of huggingface_hub raises, for any version of it."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


def _leads_nowhere(problem: Exception) -> bool:
    """Return whether the Hub redirected to an invalid address, or too many times."""
    from httpx import TooManyRedirects, UnsupportedProtocol

    return isinstance(problem, (TooManyRedirects, UnsupportedProtocol))


def _status(problem: Exception) -> int | None:
    return getattr(getattr(problem, "response", None), "status_code", None)


def _reason(name: Name, problem: Exception) -> str:
    """Return a text for users: why the Hub gives no file, its HTTP status, and what may help."""
    from huggingface_hub import errors

    status = _status(problem)
    if isinstance(problem, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(problem, _Strange):
        return f"the Hub's answer cannot be used: {problem}"
    if isinstance(problem, errors.GatedRepoError):
        return f"access has to be asked for on its page, then: hf auth login (HTTP {status})"
    if isinstance(problem, errors.RepositoryNotFoundError):
        return f"there is no such repository, or it is private: hf auth login (HTTP {status})"
    if isinstance(problem, errors.RevisionNotFoundError):
        return f"the repository has no revision {name.revision or 'main'} (HTTP {status})"
    if status is None:
        text = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        return f"it cannot be fetched: {text}"
    wait = problem.response.headers.get("Retry-After", "")  # type: ignore[attr-defined]
    helps = {
        401: "the token is missing or wrong: hf auth login, or HF_TOKEN",
        403: "access is refused: ask for it on its page, then: hf auth login",
        404: "there is no such file or page",
        429: f"too many requests: wait {f'{wait} s' if wait.isdecimal() else 'some minutes'}, or hf auth login",
    }
    other = "the Hub fails: try again later" if status >= 500 else "the Hub refuses"
    return f"{helps.get(status, other)} (HTTP {status})"
