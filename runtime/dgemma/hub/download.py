"""Downloads files of a repository of the Hugging Face Hub.

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
    INCOMPLETE,
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
from dgemma.hub.headers import gguf_header
from dgemma.hub.names import Name, is_relative
from dgemma.ui.progress import progress_bar
from dgemma.ui.terminal import one_line, tell
from dgemma.units import size_text

TRIES = 5  # a download fails after so many tries in a row without a new byte
PAUSE = 1.0  # seconds before the second try; doubled for each further one
ASKED = 10.0  # seconds that the Hub may take to list a repository
LISTING = 64 << 20  # the most bytes of a repository's list of files
LARGEST = 1 << 62  # the most bytes of a file
T = TypeVar("T")


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


def from_hub(name: Name, use: Callable[[Repository], T]) -> T:
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
            return use(Repository(name, *_listing(name)))
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


def _from_cache(name: Name, use: Callable[[Repository], T], refused: Exception, is_news: bool) -> T:
    from huggingface_hub.errors import OfflineModeIsEnabled

    offline, why = isinstance(refused, OfflineModeIsEnabled), _reason(name, refused)
    kind = FormatError if isinstance(refused, _Strange) else SystemFailure
    found = cached(name)
    if found is None:
        raise kind(f"{name}: {why}; and it is not in the cache") from None
    try:
        result = use(Repository(name, None, dict.fromkeys(found[1]), found[0]))
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


class Repository:
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
        self.check_disk(wanted)
        found = [self._fetch(file, of) for file, of in zip(wanted, about, strict=True)]
        self._link_known()
        remember(self._name, self._commit)
        return found

    def size(self, file: str) -> int | None:
        """Return the bytes of a file; None where the Hub does not tell."""
        if self._folder is not None:
            return (self._folder / file).stat().st_size
        return _about(file, self._files[file]).size

    def to_come(self, file: str) -> int:
        """Return the bytes of a file that are still to be fetched, as far as the Hub tells its size."""
        if self._commit is None:
            return 0
        of = _about(file, self._files[file])
        if is_whole(snapshot(self._name, self._commit) / file, of.size):
            return 0
        if of.sha256 is None:
            return of.size or 1
        there = blob(self._name, of.sha256)
        if is_whole(there, of.size):
            return 0
        partial = _partial(there)
        return max((of.size or 1) - (partial.stat().st_size if partial.is_file() else 0), 1)

    def check_disk(self, wanted: Sequence[str]) -> None:
        """Raise SystemFailure where the disk has no room for what is still to come of these files."""
        needed, free = sum(map(self.to_come, wanted)), free_disk(self._name)
        if free is not None and needed > free[1]:
            raise SystemFailure(
                f"{self._name}: no space left for {wanted[0]}: {size_text(needed)} of it are still to come,"
                f" {free[0]} has {size_text(free[1])}: make room (dg-models list), or set HF_HUB_CACHE to another disk"
            )

    def _fetch(self, file: str, of: _File) -> Path:
        assert self._commit is not None
        there = snapshot(self._name, self._commit) / file
        if is_whole(there, of.size):
            return there
        to = _fetch_large(self._name, file, of, self._url(file)) if of.sha256 else self._fetch_small(file, of)
        return link(self._name, self._commit, file, to)

    def _fetch_small(self, file: str, of: _File) -> Path:
        """Fetch a file that has no SHA-256, from its beginning, under git's checksum."""
        part = folder_of(self._name) / "blobs" / f"{secrets.token_hex(8)}{INCOMPLETE}"
        part.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as out:
                _download(self._url(file), of.size, out, None)
            to = blob(self._name, git_checksum(part))
            os.replace(part, to)
        finally:
            part.unlink(missing_ok=True)
        return to

    def _link_known(self) -> None:
        """Link what the cache has from an earlier commit to this one: it is found when the Hub cannot be asked."""
        assert self._commit is not None
        for file, told in self._files.items():
            with suppress(_Strange, OSError):
                of = _about(file, told)
                if of.sha256 and is_whole(there := blob(self._name, of.sha256), of.size):
                    link(self._name, self._commit, file, there)

    def copy_gguf_header(self, file: str, to: Path) -> None:
        """Copy the header of a GGUF file into a file of the whole one's length."""
        size = self._known_size(file)
        try:
            header = gguf_header(lambda start, count: self._read(file, start, count), size)
        except FormatError as problem:
            raise FormatError(f"{self._name}: {file}: {problem}") from None
        with to.open("wb") as out:
            out.write(header)
            out.truncate(size)

    def copy_header(self, file: str, to: Path) -> None:
        """Copy the header of a safetensors file into a file of the whole one's length."""
        size = self._known_size(file)
        length = int.from_bytes(self._read(file, 0, 8), "little")
        if not 2 <= length <= min(size, 100_000_000):
            raise FormatError(f"{self._name}: {file}: not a safetensors file")
        with to.open("wb") as out:
            out.write(length.to_bytes(8, "little") + self._read(file, 8, length))
            out.truncate(size)

    def _known_size(self, file: str) -> int:
        size = self.size(file)
        if size is None:
            raise _Strange(f"{file} has no size there")
        return size

    def _read(self, file: str, start: int, count: int) -> bytes:
        """Return bytes of a file. A connection that breaks is tried again."""
        tries = 0
        while True:
            try:
                return self._read_once(file, start, count)
            except (_http_error(), _Broken) as problem:
                tries += 1
                _wait_or_raise(problem, tries)

    def _read_once(self, file: str, start: int, count: int) -> bytes:
        if not count:
            return b""
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


# ---- What the Hub says ----


def _listing(name: Name) -> tuple[str, dict[str, Any]]:
    """Return the commit that a name stands for, and what is told of each of its files."""
    from huggingface_hub import constants

    revision = quote(name.revision or constants.DEFAULT_REVISION, safe="")
    url = f"{constants.ENDPOINT}/api/models/{name.repository}/revision/{revision}?blobs=true"
    data = bytearray()
    with _get(url, timeout=ASKED) as response:
        for chunk in response.iter_bytes():
            data += chunk
            if len(data) > LISTING:
                raise _Strange(f"its list of files is longer than {size_text(LISTING)}")
    return _understood(data)


def _understood(data: bytes | bytearray) -> tuple[str, dict[str, Any]]:
    try:
        told = json.loads(data)
    except (ValueError, RecursionError):
        raise _Strange("it is no JSON") from None
    if not isinstance(told, dict):
        raise _Strange(f"it is {told!r:.60}, not an object")
    commit, siblings = told.get("sha"), told.get("siblings", [])
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise _Strange(f"its sha is {commit!r:.60}, not a commit")
    if "siblings" not in told:
        raise _Strange("it has no siblings, the list of files")
    if not isinstance(siblings, list):
        raise _Strange(f"its siblings are {siblings!r:.60}, not a list of files")
    if not siblings:
        raise _Strange("its list of files is empty")
    for each in siblings:
        if not isinstance(each, dict) or not isinstance(each.get("rfilename"), str):
            raise _Strange(f"its list of files has {each!r:.60}, which names no file")
    return commit, {each["rfilename"]: each for each in siblings}


def _about(file: str, told: dict[str, Any]) -> _File:
    """Return what is told of a file, once it makes sense."""
    if not is_relative(file):
        raise _Strange(f"it has a file of the name {file!r}, which is no path within a repository")
    large = told.get("lfs")
    if not isinstance(large, (dict, type(None))):
        raise _Strange(f"{file} has lfs {large!r:.60} there, not an object")
    size = told.get("size") if large is None or large.get("size") is None else large["size"]
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= LARGEST):
        raise _Strange(f"{file} has size {size!r:.60} there, not a number of bytes")
    if not large:
        return _File(size, None)
    checksum = large.get("sha256", large.get("oid"))
    if not isinstance(checksum, str) or not SHA256.fullmatch(checksum.lower()):
        raise _Strange(f"{file} has SHA-256 {checksum!r:.80} there, not 64 hexadecimal digits")
    return _File(size, checksum.lower())


# ---- Downloads ----


def _fetch_large(name: Name, file: str, of: _File, url: str) -> Path:
    """Fetch a file into the cache, under its SHA-256. What was there of it is kept."""
    assert of.sha256 is not None
    to = blob(name, of.sha256)
    if is_whole(to, of.size):
        return to
    to.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(to)
    with _locked(partial) as out, progress_bar(PurePosixPath(file).name) as progress:
        if is_whole(to, of.size):  # another process fetched it meanwhile
            partial.unlink()
            return to
        _download(url, of.size, out, progress)
        out.flush()
        os.fsync(out.fileno())
        if (found := sha256(partial)) != of.sha256:
            partial.unlink()
            raise _Strange(f"{file} came damaged, with SHA-256 {found} instead of {of.sha256}: try again")
        os.replace(partial, to)
    return to


def _partial(to: Path) -> Path:
    """Return the path of a blob during its download."""
    return to.with_name(f"{to.name}{INCOMPLETE}")


def free_disk(name: Name) -> tuple[Path, int] | None:
    """Return the folder of the cache, and the bytes that are free there; None where the system does not tell."""
    folder = folder_of(name).parent
    there = next(each for each in (folder, *folder.parents) if each.exists())
    try:
        return folder, shutil.disk_usage(there).free
    except OSError:
        return None


@contextmanager
def _locked(path: Path) -> Iterator[Any]:
    """Open the file to append to, for one process at a time."""
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
    """Append to `out` until it has `size` bytes; None: until the server has sent all.

    A connection that breaks is taken up again.
    """
    if size is None:
        out.truncate(0)
    tries, whole = 0, False
    while not whole and (size is None or out.tell() < size):
        before = out.tell()
        try:
            with _get(url, f"bytes={before}-" if before or size else None) as response:
                _check_place(response, before)
                if response.status_code != 206 and before:  # all of it, from the start
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
            _wait_or_raise(problem, tries)


def _wait_or_raise(problem: Exception, tries: int) -> None:
    """Wait before another try; raise what went wrong where none would help, or after the last."""
    if tries >= TRIES or (_status(problem) or 500) < 500 or _leads_nowhere(problem):
        raise problem
    time.sleep(PAUSE * 2 ** (tries - 1))


def _check_place(response: Any, start: int) -> None:
    """Check that a part of a file begins where it was asked to."""
    told = response.headers.get("Content-Range", "")
    if response.status_code == 206 and told and not told.startswith(f"bytes {start}-"):
        raise _Strange(f"it sent {told.strip():.60} instead of those from {start}")


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


# ---- Errors ----


def _http_error() -> type[Exception]:
    """Return what the client of huggingface_hub raises, whichever it is."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


def _leads_nowhere(problem: Exception) -> bool:
    """Return whether the Hub sent us to an address that is none, or around in a circle."""
    from httpx import TooManyRedirects, UnsupportedProtocol

    return isinstance(problem, (TooManyRedirects, UnsupportedProtocol))


def _status(problem: Exception) -> int | None:
    return getattr(getattr(problem, "response", None), "status_code", None)


def _reason(name: Name, problem: Exception) -> str:
    """Return why the Hub gives nothing, with its status, and what may help."""
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
