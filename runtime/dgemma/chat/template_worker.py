"""The process that renders chat templates, which come from files of strangers: see dgemma.chat.template.

It is run as a script, and imports nothing of dgemma.

It reads requests from standard input and writes replies to standard output: JSON, with its length in 8 bytes before it.
It exits at the end of its input. The system limits its processor time and memory; the length of a text is limited here.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import struct
import sys
from pathlib import Path
from runpy import run_path
from typing import Any, BinaryIO

FIELDS = Path(__file__).with_name("template_fields.py")


def read(stream: BinaryIO) -> Any:
    """Return the next message, or None at the end."""
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


def environment() -> Any:
    """Return the Jinja environment that transformers gives to chat templates: see its utils/chat_template_utils.py."""
    from datetime import datetime

    from jinja2 import TemplateError
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension
    from jinja2.nodes import CallBlock
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """The block {% generation %} ... {% endgeneration %}, which marks text for training.

        Here it only writes the text inside.
        """

        tags = {"generation"}  # noqa: RUF012 (as its base has it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return CallBlock(self.call_method("inside"), [], [], body).set_lineno(line)

        def inside(self, caller: Any) -> Any:
            return caller()

    class NewDict:
        """The functions dict(...) and dict.fromkeys(...) for templates, without the other attributes of the class."""

        def __call__(self, *values: Any, **named: Any) -> dict[Any, Any]:
            return dict(*values, **named)

        def fromkeys(self, *values: Any) -> dict[Any, Any]:
            return dict.fromkeys(*values)

    class Names(Namespace):
        """The function namespace(...) for templates, without names that begin with _."""

        def __init__(*values: Any, **named: Any) -> None:
            attributes = dict(*values[1:], **named)
            for name in attributes:
                public(name)
            Namespace.__init__(values[0], attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            public(name)
            super().__setitem__(name, value)

    def public(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace holds no {name!r}: its names do not begin with _")

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    made.globals["dict"] = NewDict()
    made.globals["namespace"] = Names
    return made


def reads(template: str) -> dict[str, list[str]]:
    """Return {"fields": the fields of messages, "names": the variables} that a template reads."""
    found: dict[str, list[str]] = run_path(str(FIELDS))["reads"](environment().parse(template))
    return found


def render(template: Any, names: dict[str, Any], memory: int, most: int) -> dict[str, str]:
    """Return {"text": ...}, or {"refused": the reason}. most: the most characters of the text."""
    pieces, length = [], 0
    try:
        for piece in template.generate(**names):
            pieces.append(piece)
            length += len(piece)
            if length > most:
                return {"refused": f"it writes more than {most} characters"}
        return {"text": "".join(pieces)}
    except MemoryError:
        return too_large(memory)
    except Exception as failure:  # any error of the template's code
        return {"refused": error_text(failure)}


def too_large(memory: int) -> dict[str, str]:
    return {"refused": f"it takes more than {memory >> 20} MiB of memory"}


def error_text(failure: BaseException) -> str:
    return " ".join(str(failure).split())[:500] or type(failure).__name__


def serve(requests: BinaryIO, replies: BinaryIO, seconds: float, memory: int, most: int) -> None:
    from jinja2 import TemplateError

    known: dict[str, Any] = {}
    reply: dict[str, Any]
    write(replies, "ready")
    while (request := read(requests)) is not None:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # of processor time; then SIGPROF ends the process
        try:
            template = request["template"]
            if "names" in request and template not in known:
                known.clear()
                known[template] = environment().from_string(template)
            reply = render(known[template], request["names"], memory, most) if "names" in request else reads(template)
        except MemoryError:  # Jinja evaluates constant expressions when it compiles, so this may fail too
            reply = too_large(memory)
        except (TemplateError, RecursionError, ValueError, OverflowError) as failure:
            reply = {"invalid": error_text(failure)}
        signal.setitimer(signal.ITIMER_PROF, 0)
        write(replies, reply)


def limit_memory(memory: int) -> None:
    """Limit the process's address space to `memory` bytes."""
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (memory, resource.getrlimit(resource.RLIMIT_AS)[1]))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.path[:] = json.loads(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit_memory(memory := int(sys.argv[3]))
    serve(sys.stdin.buffer, sys.stdout.buffer, float(sys.argv[2]), memory, int(sys.argv[4]))
