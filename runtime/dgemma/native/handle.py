"""Owns what the C library allocates, and locks what Python owns."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from dgemma._native import ffi


class Handle:
    """Owns one C object, which is freed when nobody holds its pointer any more, and never before its children.

    `pointer` is itself an owner: a call into the library keeps its arguments until it returns, so that whatever closes
    the handle meanwhile, in whatever thread, the object outlives the call. An object made for another one (a session
    for its model) keeps that one, and so dies before it.
    """

    __slots__ = ("_pointer",)

    def __init__(self, pointer: Any, free: Callable[[Any], None], parent: Handle | None = None) -> None:
        owner = ffi.cast(ffi.typeof(pointer), pointer)
        _when_dead(owner, _free, free, pointer, None if parent is None else parent.pointer)
        self._pointer = owner

    @property
    def pointer(self) -> Any:
        """The C object, to be passed as it is. A pointer that was read out of it is not an owner."""
        return self._pointer

    def buffer(self, part: Any, size: int) -> Any:
        """Return `size` bytes of the object's memory as a buffer that keeps the object.

        part: a pointer that was read out of the object.
        """
        _when_dead(part, _let_go, self._pointer)
        return ffi.buffer(part, size)

    def close(self) -> None:
        """Let go of the object: it is freed now, or when the last call that is inside has ended.

        A second call does nothing. Whoever calls this makes sure that nobody asks for the pointer again.
        """
        self._pointer = None


def _when_dead(owner: Any, then: Callable[..., None], *held: Any) -> None:
    """Call then(*held) once nobody holds the object `owner` any more.

    Until then `held` is kept from outside, as Python frees in any order what is forgotten all at once.
    """
    finalizer = weakref.finalize(owner, then, *held)
    finalizer.atexit = False  # a daemon thread may still be inside; the process's end frees it all


def _free(free: Callable[[Any], None], pointer: Any, above: Any) -> None:
    free(pointer)
    del above


def _let_go(above: Any) -> None:
    del above


_owners: WeakSet[Any] = WeakSet()


def give_lock(owner: Any) -> None:
    """Give an object a re-entrant lock, as owner._lock.

    It is free in a forked process, which has none of the threads that may have held it.
    """
    owner._lock = threading.RLock()
    _owners.add(owner)


def _in_child() -> None:
    for owner in list(_owners):
        owner._lock = threading.RLock()


os.register_at_fork(after_in_child=_in_child)
