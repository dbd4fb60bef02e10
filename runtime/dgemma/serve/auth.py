"""Checks a request before it is read: its host, its key, its type and its size."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from typing import Any

from starlette.requests import Request

from dgemma.serve.errors import Refusal
from dgemma.serve.page import is_page

OPEN = ("/health",)  # tells nothing that needs a key; nor does the page, which asks for one


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guard:
    """Checks requests.

    key: what requests must bring as a bearer token; None: nothing. host: the address that is listened on.
    """

    def __init__(self, key: str | None, host: str, most_bytes: int) -> None:
        self._key = None if key is None else _digest(key)
        self._local = is_loopback(host)
        self._host = host
        self._most = most_bytes

    def check(self, request: Request) -> None:
        """Raise a Refusal for a client that may not ask."""
        if self._key is not None and request.url.path not in OPEN and not is_page(request.url.path):
            scheme, _, token = request.headers.get("authorization", "").partition(" ")
            # Digests are compared, so that not even the length of a key can be measured.
            if not hmac.compare_digest(self._key, _digest(token.strip())) or scheme.lower() != "bearer":
                raise Refusal(
                    401, "wrong or missing API key", "invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
                )
        if self._local and self._key is None and not self._is_ours(request.headers.get("host", "")):
            # A page of another site whose name was made to point at this machine must not read answers: DNS rebinding.
            raise Refusal(403, "this server answers to the name of this machine alone", "wrong_host")

    def _is_ours(self, host: str) -> bool:
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        return is_loopback(name) or name == self._host

    async def body(self, request: Request) -> bytes:
        """Return the body of a request with JSON; refuse one that is too long."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a page of another site cannot send this type without asking first
            raise Refusal(415, "expected Content-Type: application/json", "wrong_content_type")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._most:
                close = {"Connection": "close"}
                raise Refusal(413, f"a request may have {self._most} bytes", "request_too_large", headers=close)
        return bytes(body)


def _digest(text: Any) -> bytes:
    return hashlib.sha256(str(text).encode("utf-8", "surrogatepass")).digest()
