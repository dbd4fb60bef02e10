"""Allocates arrays for results of the library, after a check that there is enough free memory."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from dgemma._native import lib
from dgemma.errors import MemoryBudgetError
from dgemma.units import size_text

SMALL = 1 << 26  # bytes; for smaller arrays the system is not asked for its free memory


def floats(shape: tuple[int, ...], what: str) -> npt.NDArray[np.float32]:
    """Return an uninitialised float32 array.

    Raises MemoryBudgetError where there is no memory for it; `what` names the array in the message.
    """
    check_free(math.prod(shape) * 4, what)
    try:
        return np.empty(shape, np.float32)
    except MemoryError:
        raise MemoryBudgetError(f"{what} take {size_text(math.prod(shape) * 4)}: there is no memory for them") from None


def check_free(size: int, what: str) -> None:
    """Raise MemoryBudgetError where `size` bytes are more than the memory that is free; `what` names their use."""
    left = int(lib.dg_memory_free()) if size > SMALL else 0
    if left and size > left:
        raise MemoryBudgetError(f"{what} take {size_text(size)}, and {size_text(left)} of memory are free")
