"""Serves the page: the files of page/, each with headers that let it reach this server alone."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

KINDS = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "mjs": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "txt": "text/plain; charset=utf-8",
}
INDEX, PREVIEW = "index.html", "preview.html"
# Nothing but this server's own files, no inline code, and text becomes HTML through the sanitiser alone.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self';"
    " frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    " require-trusted-types-for 'script'; trusted-types dompurify"
)
# The frame of HTML answers: styles and pictures that it brings itself, no script but ours, no network, no origin.
FRAMED = (
    "default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; img-src data:; font-src data:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'self'; sandbox allow-scripts"
)
_SCRIPT = re.compile(rb"<script>(.*?)</script>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Served:
    """A file of the page."""

    body: bytes
    headers: dict[str, str]


def is_page(path: str) -> bool:
    """Return whether a URL's path is one of the page's."""
    return path.removeprefix("/") in page_files()


@cache
def page_files() -> dict[str, Served]:
    """Return all files by their path behind the server's root, and the page itself as "" too."""
    found = {path: _served(path, file.read_bytes()) for path, file in _walk(files("dgemma.serve") / "page", "")}
    return {"": found[INDEX], **found}


def _walk(folder: Traversable, prefix: str) -> Iterator[tuple[str, Traversable]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _walk(entry, f"{prefix}{entry.name}/")
        elif entry.name.rpartition(".")[2] in KINDS:
            yield prefix + entry.name, entry


def _served(path: str, body: bytes) -> Served:
    policy = POLICY
    if path == PREVIEW:
        hashes = (base64.b64encode(hashlib.sha256(script).digest()).decode() for script in _SCRIPT.findall(body))
        policy = FRAMED.format(scripts=" ".join(f"'sha256-{each}'" for each in hashes))
    headers = {
        "Content-Type": KINDS[path.rpartition(".")[2]],
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
        "Cache-Control": "no-cache",
        "ETag": f'"{hashlib.sha256(body).hexdigest()[:32]}"',
    }
    return Served(body, headers)
