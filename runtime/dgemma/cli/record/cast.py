"""Writes a recording as a terminal session: asciicast v2, for asciinema and its player."""

from __future__ import annotations

from dgemma.cli.frames import sparkline
from dgemma.cli.palette import DARK
from dgemma.cli.record.recorder import Page, Recording
from dgemma.files import json_lines
from dgemma.files.output import MARK


def cast(recording: Recording) -> bytes:
    """Return the file: a header, then a line per page with its time in seconds, "o", and the text for the terminal."""
    height = recording.rows + 2
    header = {
        "version": 2,
        "width": recording.columns,
        "height": height,
        "title": MARK,
        "env": {"TERM": "xterm-256color"},
    }
    rows: list[object] = [header]
    at = 0.0
    for i, page in enumerate(recording.pages):
        rows.append(
            [round(at, 3), "o", ("\x1b[?25l\x1b[2J" if i == 0 else "") + _page(page, recording.rows, recording.columns)]
        )
        at += page.seconds
    rows.append([round(at, 3), "o", "\x1b[?25h"])  # the last page is shown until this time; then the cursor is back
    return "".join(json_lines.as_line(row) + "\n" for row in rows).encode()


def _page(page: Page, rows: int, columns: int) -> str:
    drawn = ["".join(_coloured(text, look) for text, look in line) for line in page.lines]
    drawn += [""] * (rows - len(drawn))
    drawn += [_coloured(page.status, "mark"), _coloured(sparkline(page.means)[-columns:], "mark")]
    return "\x1b[H" + "\r\n".join(line + "\x1b[K" for line in drawn)


def _coloured(text: str, look: str) -> str:
    colour = DARK.colour(look)
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"\x1b[{'1;' if look == 'sure' else ''}38;2;{red};{green};{blue}m{text}\x1b[0m"
