"""Entry points of the commands. A signal during the slow imports ends the process at once, without a traceback.

This module is outside the package dgemma, because importing any part of that package imports much of it.
"""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module
from types import FrameType

ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


# The module of each command, whose `main` runs it.
COMMANDS = {
    "dg-convert": "dgemma.convert.cli",
    "dg-run": "dgemma.cli.run",
    "dg-info": "dgemma.cli.info",
    "dg-bench": "dgemma.cli.bench",
    "dg-eval": "dgemma.cli.eval",
    "dg-serve": "dgemma.cli.serve",
    "dg-models": "dgemma.cli.models",
}


def dg_convert() -> None:
    _start("dg-convert")


def dg_run() -> None:
    _start("dg-run")


def dg_info() -> None:
    _start("dg-info")


def dg_bench() -> None:
    _start("dg-bench")


def dg_eval() -> None:
    _start("dg-eval")


def dg_serve() -> None:
    _start("dg-serve")


def dg_models() -> None:
    _start("dg-models")


def _start(command: str) -> None:
    """Run a command. A signal before or after its `main` ends the process at once: there is nothing to clean up."""
    usual = {number: signal.getsignal(number) for number in ENDING}
    ours = [number for number in ENDING if usual[number] in (signal.SIG_DFL, signal.default_int_handler)]
    _set(dict.fromkeys(ours, _leave))  # signals that nohup or a shell's trap ignores stay ignored
    try:
        main = import_module(COMMANDS[command]).main
        _set({number: usual[number] for number in ours})
        main()
    except KeyboardInterrupt:  # Ctrl-C just before `main` handles it, or just after
        sys.exit(128 + signal.SIGINT)
    finally:
        _set(dict.fromkeys(ours, _leave))


def _set(handlers: dict[int, object]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)  # type: ignore[arg-type]


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)
