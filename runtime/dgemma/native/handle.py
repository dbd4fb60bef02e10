"""Owners of objects that the C library allocates, and locks that survive a fork."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from dgemma._native import ffi


class Handle:
    """Owns one C object. It is freed when nobody holds its `pointer` any more, and never before its children.

    `pointer` is an owner itself: a call into the library holds its arguments until it returns, so the object outlives
    the call even if another thread closes the handle meanwhile. A child object (a session of a model) holds its
    parent's pointer, so it is freed first.
    """

    __slots__ = ("_pointer",)

    def __init__(self, pointer: Any, free: Callable[[Any], None], parent: Handle | None = None) -> None:
        owner = ffi.cast(ffi.typeof(pointer), pointer)
        _when_dead(owner, _free, free, pointer, None if parent is None else parent.pointer)
        self._pointer = owner

    @property
    def pointer(self) -> Any:
        """The C object, to be passed to the library. A pointer that is read out of its fields is not an owner."""
        return self._pointer

    def buffer(self, part: Any, size: int) -> Any:
        """Return `size` bytes of the object's memory as a buffer that keeps the object alive.

        part: a pointer into the object's memory, where the buffer begins.
        """
        _when_dead(part, _let_go, self._pointer)
        return ffi.buffer(part, size)

    def close(self) -> None:
        """Release the object: it is freed now, or when the last call that uses it has ended.

        A second call does nothing. The caller makes sure that nobody uses this handle's pointer afterwards.
        """
        self._pointer = None


def _when_dead(owner: Any, then: Callable[..., None], *held: Any) -> None:
    """Call then(*held) once nobody holds the object `owner` any more.

    The finalizer holds `held` until then: the garbage collector frees the objects of a cycle in any order, and this
    keeps a parent alive until its child is freed.
    """
    finalizer = weakref.finalize(owner, then, *held)
    finalizer.atexit = False  # a daemon thread may still be in the library; the end of the process frees everything


def _free(free: Callable[[Any], None], pointer: Any, parent_pointer: Any) -> None:
    free(pointer)
    del parent_pointer


def _let_go(parent_pointer: Any) -> None:
    del parent_pointer


_owners: WeakSet[Any] = WeakSet()


def give_lock(owner: Any) -> None:
    """Give an object a re-entrant lock, as owner._lock.

    A forked process gets a new lock: the thread that held the old one does not exist there.
    """
    owner._lock = threading.RLock()
    _owners.add(owner)


def _in_child() -> None:
    for owner in list(_owners):
        owner._lock = threading.RLock()


os.register_at_fork(after_in_child=_in_child)
