"""Runs the application in uvicorn: addresses, signals, and a shutdown that answers every request."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn

from dgemma.errors import SystemFailure
from dgemma.serve.app import Server
from dgemma.ui.terminal import one_line, shown

HEADERS = 10  # seconds for an idle connection
M_MMAP_THRESHOLD = -3  # of malloc.h


class Running(uvicorn.Server):
    """A server that runs until a signal or stop().

    Then new requests are refused, those that wait are refused too, and those at work have `grace` seconds to be
    finished.
    """

    def __init__(self, server: Server, sockets: list[socket.socket], grace: float) -> None:
        config = uvicorn.Config(
            server.app,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_keep_alive=HEADERS,
            timeout_graceful_shutdown=None,
        )
        super().__init__(config)
        self._server, self._sockets, self._grace = server, sockets, grace

    def serve_here(self) -> None:
        """Serve until the end."""
        try:
            self.run(sockets=self._sockets)
        finally:
            self._server.close()

    def stop(self) -> None:
        """Stop serving; may be called from any thread."""
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals as uvicorn does, but what ended cleanly ends with 0, not with the signal."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {each: signal.signal(each, self.handle_exit) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    async def shutdown(self, sockets: Any = None) -> None:
        self._server.worker.drain()
        loop = asyncio.get_running_loop()
        late = loop.call_later(self._grace, lambda: threading.Thread(target=self._server.close, daemon=True).start())
        try:
            await super().shutdown(sockets)
        finally:
            late.cancel()


def listen(host: str, port: int) -> list[socket.socket]:
    """Open a socket per address of a host.

    Raises SystemFailure where one is in use, or is no address of this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        return [_listen(family, address) for family, *_, address in dict.fromkeys(found)]
    except OSError as failure:
        raise SystemFailure(f"--host {host} --port {port}: {failure.strerror or failure}") from None


def _listen(family: int, address: Any) -> socket.socket:
    # With TCP by name: only then does asyncio have a connection's small pieces sent at once, not 40 ms later.
    opened = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        opened.bind(address)
        opened.listen(512)
    except OSError:
        opened.close()
        raise
    return opened


def return_large_blocks() -> None:
    """Return large blocks of memory to the system as soon as they are free.

    glibc else keeps blocks of up to 32 MiB once it has seen some, in each thread that reads requests: memory would
    follow the largest request that each of them ever met.
    """
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 << 10)  # glibc's first value; once set, it stays


class OneLine(logging.Formatter):
    """Formats a log message as one line, whatever it quotes.

    Only a traceback has more lines, and nothing that a terminal obeys.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = one_line(record.message)
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


def log_to_stderr() -> None:
    """Log a line per request and per trouble, without the text of anybody."""
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine("%(asctime)s %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
