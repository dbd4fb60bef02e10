"""Writes a recording as an animated SVG. It uses CSS only, so it also moves where scripts are not allowed."""

from __future__ import annotations

from xml.sax.saxutils import escape, quoteattr

from rich.cells import cell_len

from dgemma.cli.frames import LOOKS, Line
from dgemma.cli.palette import DARK
from dgemma.cli.record.recorder import Page, Recording
from dgemma.files.output import MARK

SIZE = 16  # pixels of a letter
ADVANCE, HEIGHT = 9.6, 22  # pixels from one letter to the next, and from one line to the next
MARGIN, CORNER, BAR = 20, 10, 26  # pixels: margin, radius of the frame's corners, height of the bars
STEP, LEGEND = 7, 260  # pixels from one bar to the next, and width of the legend
FONTS = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono','Liberation Mono',monospace"


def svg(recording: Recording) -> bytes:
    """Return the drawing, with a group per page.

    Without animation (in print, or where the user wants no motion) the last page is shown.
    """
    width = 2 * MARGIN + recording.columns * ADVANCE
    top = MARGIN + recording.rows * HEIGHT + 12  # where the status line begins
    height = top + HEIGHT + BAR + MARGIN
    total = sum(page.seconds for page in recording.pages)
    style = [f"text{{font:{SIZE}px {FONTS};white-space:pre}}.sure{{font-weight:bold}}.small{{font-size:{SIZE - 3}px}}"]
    style += [f".{look}{{fill:{DARK.colour(look)}}}" for look in LOOKS]
    style += ["g{visibility:hidden}g:last-of-type{visibility:visible}"]
    moves, at = [f"g{{animation:{total:.2f}s step-end infinite}}"], 0.0
    body = []
    for i, page in enumerate(recording.pages):
        begin, end = 100 * at / total, 100 * (at + page.seconds) / total
        keys = f"0%{{visibility:{'hidden' if i else 'visible'}}}"
        keys += f"{begin:.3f}%{{visibility:visible}}" if i else ""
        keys += f"{end:.3f}%{{visibility:hidden}}" if i + 1 < len(recording.pages) else ""
        moves += [f"@keyframes s{i}{{{keys}}}", f"#s{i}{{animation-name:s{i}}}"]
        body.append(f'<g id="s{i}">{_page(page, top, width - 2 * MARGIN)}</g>')
        at += page.seconds
    style.append(f"@media (prefers-reduced-motion:no-preference){{{''.join(moves)}}}")
    size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    label = quoteattr(recording.pages[-1].status)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label={label}>',
        f"<metadata>{MARK}</metadata>",
        f"<style>{''.join(style)}</style>",
        f'<rect width="100%" height="100%" rx="{CORNER}" fill="{DARK.ground}"/>',
        _legend(width - MARGIN, top + HEIGHT + BAR),
        *body,
        "</svg>\n",
    ]
    return "\n".join(parts).encode()


def _page(page: Page, top: float, width: float) -> str:
    return (
        "".join(_line(line, MARGIN + (i + 1) * HEIGHT - 6) for i, line in enumerate(page.lines) if line)
        + _line([(page.status, "mark")], top + HEIGHT - 6)
        + _bars(page, top + HEIGHT + BAR, width)
    )


def _line(line: Line, y: float) -> str:
    """Return a line of text. Each span has its own x and width, so that the columns fit with any font."""
    spans, column = [], 0
    for text, look in line:
        wide = cell_len(text)
        if text.strip():
            place = f'x="{MARGIN + column * ADVANCE:g}" textLength="{wide * ADVANCE:g}"'
            spans.append(f'<tspan class="{look}" {place} lengthAdjust="spacingAndGlyphs">{escape(text)}</tspan>')
        column += wide
    return f'<text xml:space="preserve" y="{y:g}">{"".join(spans)}</text>' if spans else ""


def _bars(page: Page, y: float, width: float) -> str:
    """Return a bar for the mean entropy of each step; the highest entropy of the canvas has the full height."""
    means = page.means[-int((width - LEGEND) / STEP) :]
    most = max(*page.means, 1e-9)
    path = "".join(
        f"M{MARGIN + i * STEP:g} {y:g}v{-max(1.0, mean / most * (BAR - 6)):.1f}h{STEP - 2}V{y:g}z"
        for i, mean in enumerate(means)
    )
    return f'<path class="mark" d="{path}"/>'


def _legend(right: float, y: float) -> str:
    """Return the legend: what the colours mean."""
    looks = ["sure", *(look for look in LOOKS if look.startswith("u"))]
    x = right - 80 - 14 * len(looks)
    swatches = "".join(
        f'<rect class="{look}" x="{x + 14 * i:g}" y="{y - 10:g}" width="12" height="10" rx="2"/>'
        for i, look in enumerate(looks)
    )
    words = f'<text class="mark small" x="{x - 8:g}" y="{y:g}" text-anchor="end">accepted</text>'
    return swatches + words + f'<text class="mark small" x="{right:g}" y="{y:g}" text-anchor="end">uncertain</text>'
