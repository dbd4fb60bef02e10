"""Makes arrays for the results of calls, after a check against the memory that is free."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from dgemma._native import lib
from dgemma.errors import MemoryBudgetError
from dgemma.units import size_text

SMALL = 1 << 26  # bytes that are not worth asking the system about


def floats(shape: tuple[int, ...], what: str) -> npt.NDArray[np.float32]:
    """Return an array of float32 that is yet to be filled.

    Raises MemoryBudgetError, with `what` in its message, where there is no memory for it.
    """
    check_free(math.prod(shape) * 4, what)
    try:
        return np.empty(shape, np.float32)
    except MemoryError:
        raise MemoryBudgetError(f"{what} take {size_text(math.prod(shape) * 4)}: there is no memory for them") from None


def check_free(size: int, what: str) -> None:
    """Raise MemoryBudgetError where `what`, which take so many bytes, are more than the memory that is free."""
    left = int(lib.dg_memory_free()) if size > SMALL else 0
    if left and size > left:
        raise MemoryBudgetError(f"{what} take {size_text(size)}, and {size_text(left)} of memory are free")
