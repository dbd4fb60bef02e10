"""Ctrl-C while a command works: the first ends the work in good order, the second ends the process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

INTERRUPTED = 128 + signal.SIGINT  # the exit status

_restorers: list[Callable[[], object]] = []


@contextmanager
def restored_at_once(restore: Callable[[], object]) -> Iterator[None]:
    """Within the block, call `restore` before a second Ctrl-C ends the process: nothing else is tidied up then."""
    _restorers.append(restore)
    try:
        yield
    finally:
        _restorers.remove(restore)


class StopOnCtrlC:
    """Between begin and end of this context manager, the first Ctrl-C calls `stop`, and the second ends the process.

    stop: is called by Python's signal handler, which runs between two bytecodes, or two layers of a pass; unless given,
    the handler raises KeyboardInterrupt. acknowledge: is called by another thread at once, whatever the library does.
    """

    def __init__(
        self, stop: Callable[[], object] | None = None, acknowledge: Callable[[], object] = lambda: None
    ) -> None:
        self._stop, self._acknowledge = stop, acknowledge
        self._restore: Callable[[], object] | None = None

    def __enter__(self) -> StopOnCtrlC:
        # Who ignores it (nohup, a shell's background) goes on doing so.
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            reading, writing = os.pipe()
            os.set_blocking(writing, False)
            handler: Any = signal.signal(signal.SIGINT, self._hear)
            before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
            watch = threading.Thread(target=self._watch, args=(reading,), daemon=True)
            watch.start()

            def restore() -> None:
                signal.set_wakeup_fd(before)
                signal.signal(signal.SIGINT, handler)
                os.close(writing)
                watch.join()
                os.close(reading)

            self._restore = restore
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if self._restore is not None:
            self._restore()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._stop is None:
            raise KeyboardInterrupt
        self._stop()

    def _watch(self, reading: int) -> None:
        """Count the signals, whose numbers Python's C handler writes into a pipe."""
        count = 0
        while data := os.read(reading, 64):
            for _ in range(data.count(signal.SIGINT)):
                count += 1
                if count == 1:
                    self._acknowledge()
                else:
                    for restore in reversed(_restorers):
                        with suppress(Exception):
                            restore()
                    os._exit(INTERRUPTED)
