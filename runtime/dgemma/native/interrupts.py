"""Lets Ctrl-C through while the library computes: between the layers of a pass Python's signal handlers run."""

from __future__ import annotations

import threading
from typing import Any

from dgemma._native import ffi, lib

_raised: BaseException | None = None  # by a signal handler, while a pass of the main thread was asked


def _keep(kind: type[BaseException], value: BaseException, at: Any) -> None:
    global _raised
    _raised = value


@ffi.def_extern(name="dg_python_stops", error=True, onerror=_keep)  # type: ignore[untyped-decorator, unused-ignore]
def _run_handlers(user: Any) -> bool:
    """Return whether the pass shall stop. That Python runs at all here is what runs the handlers."""
    for _ in "handlers run between two bytecodes, or at the end of a loop's round":
        pass
    return _raised is not None


def let_signals_through(session: Any) -> None:
    """Have the passes of a `dg_session *` run signal handlers, if this is the main thread, which alone has any."""
    is_main = threading.current_thread() is threading.main_thread()
    lib.dg_session_ask(session, lib.dg_python_stops if is_main else ffi.NULL, ffi.NULL)


def raise_from_handler() -> None:
    """Raise what a signal handler raised while a pass ran, such as KeyboardInterrupt, if one did."""
    global _raised
    value, _raised = _raised, None
    if value is not None:
        raise value
