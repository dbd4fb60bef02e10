"""Measures the machine's limits, and the memory of this process."""

from __future__ import annotations

import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.resource_tracker import ensure_running
from types import TracebackType
from typing import Any, TypeVar, cast

from dgemma._native import ffi, lib
from dgemma.errors import SystemFailure

SAMPLE = 0.02  # seconds between two samples of the memory


@dataclass(frozen=True, slots=True)
class Peak:
    """A limit: operations (two per multiply-add) or bytes per second, on one thread and on all threads."""

    kind: str  # int8, float32, memory
    instructions: str
    one: float
    all: float


@dataclass(frozen=True, slots=True)
class Machine:
    """A processor and its limits."""

    processor: str
    clock_hz: float  # of a busy core, measured
    threads: int
    peaks: list[Peak]

    def best(self, kind: str) -> float | None:
        """Return the highest limit of this kind on all threads; None where the library cannot measure it here."""
        return max((peak.all for peak in self.peaks if peak.kind == kind), default=None)


def measure_machine(threads: int) -> Machine:
    """Measure this machine. It takes a few seconds, and half a gigabyte of memory, which is freed afterwards."""
    peaks: list[Peak] = []
    out = ffi.new("dg_peak *")
    while lib.dg_peak_measure(len(peaks), threads, out):
        kind, instructions = (ffi.string(text).decode() for text in (out.kind, out.instructions))
        peaks.append(Peak(kind, instructions, out.one, out.all))
    return Machine(processor(), lib.dg_clock(), threads, peaks)


Measured = TypeVar("Measured")


def apart(measure: Callable[..., Measured], *arguments: object, **options: object) -> Measured:
    """Call a function in another process, so that its memory does not count as ours; return its result.

    The process is killed if this one is interrupted.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, measure, arguments, options))
    ensure_running()  # start the resource tracker now: in the block below, its start would unblock Ctrl-C
    try:
        with _interrupts_held():
            process.start()
        sender.close()
        measured, failure = receiver.recv()
    except EOFError:
        process.join()
        raise SystemFailure(f"the process that measures this machine ended with {process.exitcode}") from None
    finally:
        receiver.close()
        if process.pid is not None:
            process.kill()
            process.join()
    if failure is not None:
        raise failure
    return cast(Measured, measured)


def _measure(to: Connection, measure: Callable[..., object], arguments: Any, options: Any) -> None:
    """Run `measure` in the other process, and send (result, None) or (None, exception)."""
    try:
        result = measure(*arguments, **options), None
    except Exception as failure:
        to.send((None, failure))
    else:
        to.send(result)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Block SIGINT until the block ends. A process that is started in the block never gets it.

    Otherwise that process would print a traceback after Ctrl-C.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def measure_disk(path: str | os.PathLike[str], seconds: float = 3.0) -> float | None:
    """Return the highest speed of reading this file without the page cache, in bytes/s; None for a small file."""
    return float(lib.dg_disk_measure(os.fsencode(path), seconds)) or None


def best_of(one: Machine, other: Machine) -> Machine:
    """Return the higher limits of two measurements: the lower ones were taken while the machine was busy."""
    peaks = [
        Peak(a.kind, a.instructions, max(a.one, b.one), max(a.all, b.all))
        for a, b in zip(one.peaks, other.peaks, strict=True)
    ]
    return Machine(one.processor, max(one.clock_hz, other.clock_hz), one.threads, peaks)


def processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return " ".join(line.partition(":")[2].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def resident() -> dict[str, int] | None:
    """Return the bytes of this process that are in memory now; None where the system does not tell.

    "all": the total; "anonymous": memory of its own; "file": pages of mapped files.
    """
    try:
        with open("/proc/self/status", encoding="utf-8") as file:
            lines = dict(line.split(":", 1) for line in file)
    except OSError:
        return None
    fields = {"all": "VmRSS", "anonymous": "RssAnon", "file": "RssFile"}
    if not all(field in lines for field in fields.values()):
        return None
    return {name: int(lines[field].split()[0]) * 1024 for name, field in fields.items()}


def peak_resident() -> int | None:
    """Return the most bytes that this process ever had in memory, or None; for systems without resident()."""
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


class Memory:
    """Samples the process's memory during a with block. `peak` is then the maximum of each kind, or None."""

    def __init__(self) -> None:
        self.peak = resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        if self.peak is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._done.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE):
            now = resident()
            if now and self.peak:
                self.peak = {name: max(size, self.peak[name]) for name, size in now.items()}


def told(machine: Machine) -> dict[str, Any]:
    """Return the machine's description for JSON."""
    system = f"{platform.system()} {platform.machine()}"
    return {"processor": machine.processor, "system": system, "processors": os.cpu_count()}
