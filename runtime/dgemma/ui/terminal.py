r"""Writes text on a terminal with its control characters made visible, as `less` and `cat -v` do.

Text of a model, a file or a server may have control sequences: \x1b]0;... sets the title of a window, \x1b[31m makes
text red. They are shown as ^[]0;... and ^[[31m, other control characters as <U+009B>. A stream that is no terminal gets
the text unchanged.
"""

from __future__ import annotations

import re
import sys
from typing import TextIO

# ASCII control characters except newline and tab, DEL, the control characters U+0080 to U+009F, overrides of text
# direction, and surrogates, which in Python stand for bytes of a file's name that are no UTF-8.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_BYTE = 0xDC00  # the code that surrogateescape adds to a byte


def shown(text: str) -> str:
    r"""Return a text in which all control characters but newlines and tabs are made visible.

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
    """Return JSON of the same value with escapes in place of control characters."""
    return _OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def one_line(text: str) -> str:
    """Return a message in one line with control characters made visible, for a log or a terminal."""
    return shown(" ".join(text.split()))


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a stream exists, is open, and is a terminal."""
    return stream is not None and not stream.closed and stream.isatty()


def tell(line: str, dim: bool = False) -> None:
    """Write a line on standard error; control characters are made visible only where that is a terminal."""
    if sys.stderr is None:
        return
    if is_terminal(sys.stderr):
        line = f"\x1b[2m{shown(line)}\x1b[0m" if dim else shown(line)
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
