r"""Writes text for people: what a terminal would obey is made visible, as `less` and `cat -v` do.

A model, a file and a server may write anything: \x1b]0;... sets the title of a window, \x1b[31m leaves it red. On a
terminal these are ^[]0;... and ^[[31m; other controls are <U+009B>. Each stream is judged by itself.
"""

from __future__ import annotations

import re
import sys
from typing import TextIO

# Controls of ASCII but newline and tab, DEL, the controls U+0080 to U+009F, overrides of the direction of text, and
# halves of characters: Python's word for bytes of a file's name that are no UTF-8.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_BYTE = 0xDC00  # the code that surrogateescape adds to a byte


def shown(text: str) -> str:
    r"""Return a text with nothing in it that a terminal obeys, but newlines and tabs.

    >>> shown("\x1b[31mred\x7f\u202e")
    '^[[31mred^?<U+202E>'
    """
    return _OBEYED.sub(_name, text)


def _name(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code < 0x80:
        return f"^{chr(code ^ 0x40)}"
    if 0x80 <= code - _BYTE <= 0xFF:
        return f"<{code - _BYTE:02X}>"
    return f"<U+{code:04X}>"


def shown_json(text: str) -> str:
    """Return JSON of the same value with nothing that a terminal obeys."""
    return _OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def one_line(text: str) -> str:
    """Return a message in one line, which may go to a log as well as to a terminal."""
    return shown(" ".join(text.split()))


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a stream is there and a terminal."""
    return stream is not None and not stream.closed and stream.isatty()


def tell(line: str, dim: bool = False) -> None:
    """Write a line on standard error; exactly, where that is no terminal."""
    if sys.stderr is None:
        return
    if is_terminal(sys.stderr):
        line = f"\x1b[2m{shown(line)}\x1b[0m" if dim else shown(line)
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
