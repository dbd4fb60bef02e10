"""Errors of requests, as OpenAI's JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dgemma.errors import Error, MemoryBudgetError, UsageError

KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}  # others: by the hundred


@dataclass
class Refusal(Exception):
    """An answer that is an error. `param` names what in the request is wrong, `retry` is seconds for Retry-After."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    retry: int | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def all_headers(self) -> dict[str, str]:
        return self.headers | ({} if self.retry is None else {"Retry-After": str(self.retry)})


def bad_request(message: str, param: str | None = None, code: str | None = None) -> Refusal:
    """Return the refusal of a request with a mistake: status 400."""
    return Refusal(400, message, code, param)


def refusal_of(failure: Exception) -> Refusal:
    """Return the refusal that a failure becomes.

    An unforeseen failure is named by its type alone, as its text may hold a user's.
    """
    if isinstance(failure, Refusal):
        return failure
    if isinstance(failure, UsageError):
        return bad_request(str(failure))
    if isinstance(failure, MemoryBudgetError):
        return Refusal(503, str(failure), "no_memory", retry=10)
    if isinstance(failure, Error):
        return Refusal(500, str(failure), "model_error")
    return Refusal(500, f"internal error: {type(failure).__name__}", "internal_error")
