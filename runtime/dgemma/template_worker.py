"""The process that renders chat templates, which come from strangers' files: see dgemma.template. It is run as a file,
and imports nothing of dgemma.

Requests and replies are JSON with their length before them, on standard input and output. Ends with its input. What it
takes of processor time and memory is limited by the system; what it writes is counted.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import struct
import sys
from typing import Any, BinaryIO


def read(stream: BinaryIO) -> Any:
    """The next message, or None at the end."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    (size,) = struct.unpack("<Q", head)
    data = stream.read(size)
    return json.loads(data) if len(data) == size else None


def write(stream: BinaryIO, message: Any) -> None:
    data = json.dumps(message).encode()
    stream.write(struct.pack("<Q", len(data)))
    stream.write(data)
    stream.flush()


def compiled(template: str) -> Any:
    """A template with what transformers gives to chat templates."""
    from datetime import datetime

    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def render(template: Any, names: dict[str, Any], memory: int, most: int) -> dict[str, str]:
    """{"text": ...}, or {"refused": why}. most: characters of the text."""
    pieces, length = [], 0
    try:
        for piece in template.generate(**names):
            pieces.append(piece)
            length += len(piece)
            if length > most:
                return {"refused": f"it writes more than {most} characters"}
        return {"text": "".join(pieces)}
    except MemoryError:
        return {"refused": f"it takes more than {memory >> 20} MiB of memory"}
    except Exception as failure:  # whatever the template's code stumbles over
        return {"refused": told(failure)}


def told(failure: BaseException) -> str:
    return " ".join(str(failure).split())[:500] or type(failure).__name__


def serve(requests: BinaryIO, replies: BinaryIO, seconds: float, memory: int, most: int) -> None:
    from jinja2 import TemplateError

    known: dict[str, Any] = {}
    write(replies, "ready")
    while (request := read(requests)) is not None:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # of processor time; then SIGPROF ends the process
        try:
            if request["template"] not in known:
                known.clear()
                known[request["template"]] = compiled(request["template"])
            reply = render(known[request["template"]], request["names"], memory, most)
        except (TemplateError, RecursionError, MemoryError, ValueError, OverflowError) as failure:
            reply = {"invalid": told(failure)}
        signal.setitimer(signal.ITIMER_PROF, 0)
        write(replies, reply)


def limit_memory(memory: int) -> None:
    """All of the process's address space."""
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (memory, resource.getrlimit(resource.RLIMIT_AS)[1]))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.path[:] = json.loads(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit_memory(memory := int(sys.argv[3]))
    serve(sys.stdin.buffer, sys.stdout.buffer, float(sys.argv[2]), memory, int(sys.argv[4]))
