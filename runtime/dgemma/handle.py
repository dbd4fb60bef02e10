"""Ownership of what the C library allocates."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any


class Handle:
    """Owns one C object: frees it when closed or forgotten, and never after its parent, which it keeps alive.

    An object made for another one (a session for its model) dies before it, in whatever order Python forgets them.
    """

    __slots__ = ("__weakref__", "_finalizer", "_pointer")

    def __init__(self, pointer: Any, free: Callable[[Any], None], parent: Handle | None = None) -> None:
        self._pointer = pointer
        self._finalizer = weakref.finalize(self, _free, pointer, free, parent)
        self._finalizer.atexit = False  # a daemon thread may still be inside; the process's end frees it all

    @property
    def pointer(self) -> Any:
        return self._pointer

    def close(self) -> None:
        """Frees the object now; again does nothing. Whoever calls this makes sure that nothing uses it."""
        self._finalizer()


def _free(pointer: Any, free: Callable[[Any], None], parent: Handle | None) -> None:
    del parent  # held by the finalizer's arguments until here
    free(pointer)
