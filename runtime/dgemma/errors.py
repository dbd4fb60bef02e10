"""The errors of dgemma, and the error that each status of the C library stands for."""

from typing import Any

from dgemma._native import ffi, lib

# Characters that a message must not hold, as in the library: controls, ends of lines, overrides of text direction.
_ONE_LINE = dict.fromkeys([*range(32), *range(127, 160), *range(0x2028, 0x202F), *range(0x2066, 0x206A)], "?")


class Error(Exception):
    """Anything that dgemma refuses or fails at.

    The message is one line that names the culprit.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(message.translate(_ONE_LINE))


class UsageError(Error):
    """An argument makes no sense, or does not fit the model.

    place: the path of a wrong field in a chat, such as messages.2.content; "" for other arguments.
    """

    def __init__(self, message: str = "", place: str = "") -> None:
        super().__init__(message)
        self.place = place


class FormatError(Error):
    """A file is damaged, of another kind, or not understood."""


class SystemFailure(Error):
    """The operating system refused: no such file, no memory, a read error."""


class MemoryBudgetError(Error):
    """A memory budget cannot be kept."""


class BackendError(Error):
    """A backend does not exist here, or failed."""


class NumbersError(Error):
    """NaN or infinity came up while a model ran: its weights are damaged.

    The message names the layer and what was computed.
    """


KINDS: dict[int, type[Error]] = {
    lib.DG_ERROR_USAGE: UsageError,
    lib.DG_ERROR_FORMAT: FormatError,
    lib.DG_ERROR_SYSTEM: SystemFailure,
    lib.DG_ERROR_MEMORY: MemoryBudgetError,
    lib.DG_ERROR_BACKEND: BackendError,
    lib.DG_ERROR_NUMBERS: NumbersError,
}


def new_error() -> Any:
    """Return a `dg_error *` for a call to fill."""
    return ffi.new("dg_error *")


def check(status: int, error: Any) -> None:
    """Raise the Error that a call's `status` stands for, with the message it left in `error` (a `dg_error *`)."""
    if status != lib.DG_OK:
        message = ffi.string(error.message).decode("utf-8", "replace")
        raise KINDS.get(status, Error)(message or f"failed with status {status}")
