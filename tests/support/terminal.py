"""Commands as a person meets them: on a terminal."""

from __future__ import annotations

import os
import re
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path

import pytest

INSTALLED = Path(sys.executable).with_name("dg-run")
RUN = [str(INSTALLED)] if INSTALLED.exists() else [sys.executable, "-m", "dgemma.cli.run"]


def environment(more: dict[str, str]) -> dict[str, str]:
    plain = {**os.environ, "TERM": "xterm-256color"}
    for name in ("COLUMNS", "LINES", "NO_COLOR", "COLORTERM", "COLORFGBG"):
        plain.pop(name, None)
    return {**plain, **more}


def on_terminal(
    *arguments: str, rows: int = 24, columns: int = 80, stop_at: Sequence[str] = (), **environ: str
) -> tuple[int, str]:
    """Runs dg-run with all three streams on a terminal: its status and all it wrote.

    Ctrl-C comes once the first of stop_at is there, and again at each that follows.
    """
    waits = list(stop_at)
    pty, termios, fcntl = pytest.importorskip("pty"), pytest.importorskip("termios"), pytest.importorskip("fcntl")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    process = subprocess.Popen([*RUN, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=environment(environ))
    os.close(theirs)
    data, began = b"", time.monotonic()
    while time.monotonic() - began < 60:
        if waits and waits[0] in data.decode("utf-8", "ignore"):
            process.send_signal(signal.SIGINT)
            del waits[0]
        if select.select([ours], [], [], 0.1)[0]:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the other side is closed
                break
            if not part:
                break
            data += part
    os.close(ours)
    return process.wait(timeout=60), data.decode()


def streams(
    *command: str, terminals: Collection[str] = ("out", "err"), given: bytes = b"", **environ: str
) -> tuple[int, str, str]:
    """Runs a command of this environment with these of its streams on a terminal of their own, the others in pipes: its
    status, and what it wrote to each, a terminal's ends of lines as newlines."""
    pty = pytest.importorskip("pty")
    reading, writing = {}, {}
    for name in ("out", "err"):
        reading[name], writing[name] = pty.openpty() if name in terminals else os.pipe()
    binary = str(Path(sys.executable).with_name(command[0]))
    process = subprocess.Popen(
        [binary, *command[1:]],
        stdin=subprocess.PIPE,
        stdout=writing["out"],
        stderr=writing["err"],
        env=environment(environ),
    )
    assert process.stdin is not None
    process.stdin.write(given)
    process.stdin.close()
    for end in writing.values():
        os.close(end)
    data = dict.fromkeys(reading, b"")
    names = {end: name for name, end in reading.items()}
    began = time.monotonic()
    while names and time.monotonic() - began < 60:
        for end in select.select(list(names), [], [], 0.1)[0]:
            try:
                part = os.read(end, 65536)
            except OSError:  # the other side of a terminal is closed
                part = b""
            data[names[end]] += part
            if not part:
                del names[end]
    for end in reading.values():
        os.close(end)
    told = {n: d.replace(b"\r\n", b"\n") if n in terminals else d for n, d in data.items()}
    return process.wait(timeout=60), told["out"].decode(), told["err"].decode()


def screen(written: str) -> list[str]:
    """What a terminal shows in the end, without colours: it knows what is used here, and refuses the rest."""
    lines, row, column = [""], 0, 0
    for code, text in re.findall(r"(\x1b\[[?\d;]*[A-Za-z]|[\r\n])|([^\x1b\r\n]+)", written):
        if text:
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
            column += len(text)
        elif code == "\r":
            column = 0
        elif code == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif code == "\x1b[2K":
            lines[row] = ""
        elif code.endswith("A"):
            row -= int(code[2:-1] or 1)
            assert row >= 0, "the cursor went above what was drawn"
        else:
            assert code.endswith("m") or code in ("\x1b[?25l", "\x1b[?25h"), code
    return "\n".join(line.rstrip() for line in lines).rstrip().split("\n")


class Typing:
    """dg-run on a terminal that someone types at. A context manager."""

    def __init__(self, *arguments: str, rows: int = 40, columns: int = 100) -> None:
        pty, termios, fcntl = pytest.importorskip("pty"), pytest.importorskip("termios"), pytest.importorskip("fcntl")
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.process = subprocess.Popen(
            [*RUN, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment({"PROMPT_TOOLKIT_NO_CPR": "1"}),  # nobody here tells where the cursor is
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C reaches it
        )
        os.close(theirs)
        self.written = ""
        self._read = 0  # how much of it was waited for

    def __enter__(self) -> Typing:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(timeout=60)
        os.close(self._ours)

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def wait(self, pattern: str, seconds: float = 30) -> str:
        """Until what is written behind the last match matches; returns what is written up to there."""
        began = time.monotonic()
        while True:
            rest = re.sub(r"\x1b\[[?\d;]*[A-Za-z]|\x1b[=>]", "", self.written[self._read :])
            if found := re.search(pattern, rest):
                self._read = len(self.written)
                return rest[: found.end()]
            if time.monotonic() - began > seconds:
                raise AssertionError(f"{pattern!r} did not come: {rest!r}")
            self._pump()

    def end(self, seconds: float = 20) -> int:
        """Its exit status."""
        began = time.monotonic()
        while self.process.poll() is None and time.monotonic() - began < seconds:
            self._pump()
        return self.process.wait(timeout=1)

    def _pump(self) -> None:
        if select.select([self._ours], [], [], 0.1)[0]:
            try:
                self.written += os.read(self._ours, 65536).decode("utf-8", "replace")
            except OSError:  # the other side is closed
                time.sleep(0.05)
