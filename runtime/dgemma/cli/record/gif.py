"""Writes a recording as an animated GIF, with Pillow."""

from __future__ import annotations

import io
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rich.cells import cell_len

from dgemma.cli.frames import LOOKS, Line
from dgemma.cli.palette import DARK
from dgemma.cli.record.recorder import Page, Recording
from dgemma.errors import Error
from dgemma.files.output import MARK

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

    Font = FreeTypeFont | ImageFont

# Pixels: size of letters, height of lines, margin, height of the bars, distance from one bar to the next.
SIZE, HEIGHT, MARGIN, BAR, STEP = 18, 25, 22, 28, 8
SHADES = 20  # shades of each colour: a GIF has 256 colours in all
# Monospaced fonts, plain and bold, by their file names on common systems.
FONTS = (
    ("DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf"),
    ("Menlo.ttc", "Menlo.ttc"),
    ("consola.ttf", "consolab.ttf"),
    ("LiberationMono-Regular.ttf", "LiberationMono-Bold.ttf"),
    ("NotoSansMono-Regular.ttf", "NotoSansMono-Bold.ttf"),
)
# Fonts for characters that are two columns wide.
WIDE = ("NotoSansCJK-Regular.ttc", "NotoSansMonoCJK-Regular.otf", "Hiragino Sans GB.ttc", "msyh.ttc", "msgothic.ttc")


def refuse_gif() -> None:
    """Raise an Error where Pillow is missing."""
    if find_spec("PIL") is None:
        raise Error("a .gif needs Pillow, which is missing here: pip install 'dgemma[record]', or record a .svg")


def gif(recording: Recording) -> bytes:
    """Return the animation, with one picture per page; it repeats for ever."""
    pictures = Pictures(recording)
    pages = [pictures.draw(page) for page in recording.pages]
    out = io.BytesIO()
    times = [round(page.seconds * 100) * 10 for page in recording.pages]  # milliseconds, in the 10 ms units of GIF
    more = dict(append_images=pages[1:], duration=times, loop=0, comment=MARK.encode())
    pages[0].save(out, "GIF", save_all=True, optimize=False, **more)
    return out.getvalue()


class Pictures:
    """Draws pages of the same size with the same colours."""

    def __init__(self, recording: Recording) -> None:
        self._plain, self._bold = fonts()
        self._wide = wide_font() or self._plain
        self._advance = round(max(self._plain.getlength("0"), 1))
        self._size = (
            2 * MARGIN + recording.columns * self._advance,
            2 * MARGIN + (recording.rows + 1) * HEIGHT + 12 + BAR,
        )
        self._top = MARGIN + recording.rows * HEIGHT + 12
        self._palette = palette()

    def draw(self, page: Page) -> Image:
        from PIL import Image, ImageDraw

        image = Image.new("RGB", self._size, DARK.ground)
        pen = ImageDraw.Draw(image)
        for i, line in enumerate(page.lines):
            self._line(pen, line, MARGIN + i * HEIGHT)
        self._line(pen, [(page.status, "mark")], self._top)
        self._bars(pen, page)
        self._legend(pen)
        return image.quantize(palette=self._palette, dither=Image.Dither.NONE)

    def _line(self, pen: ImageDraw, line: Line, y: int) -> None:
        """Draw a line letter by letter, each in the middle of its column, so that any font fits the columns."""
        column = 0
        for text, look in line:
            font, colour = self._bold if look == "sure" else self._plain, DARK.colour(look)
            for letter in text:
                columns = cell_len(letter)
                place = (MARGIN + (column + columns / 2) * self._advance, y)
                pen.text(place, letter, colour, font if columns < 2 else self._wide, anchor="ma")
                column += columns

    def _bars(self, pen: ImageDraw, page: Page) -> None:
        """Draw a bar for the mean entropy of each step; the highest entropy of the canvas has the full height."""
        bottom, most = self._size[1] - MARGIN, max(*page.means, 1e-9)
        means = page.means[-max((self._size[0] - 2 * MARGIN - 36 * self._advance) // STEP, 1) :]  # beside the legend
        for i, mean in enumerate(means):
            x, height = MARGIN + i * STEP, max(1, round(mean / most * (BAR - 6)))
            pen.rectangle((x, bottom - height, x + STEP - 3, bottom), DARK.mark)

    def _legend(self, pen: ImageDraw) -> None:
        """Draw the legend: what the colours mean."""
        looks = ["sure", *(look for look in LOOKS if look.startswith("u"))]
        column = (self._size[0] - 2 * MARGIN) // self._advance - len("accepted  uncertain") - 2 * len(looks)
        y = self._size[1] - MARGIN - HEIGHT
        self._line(pen, [(" " * column + "accepted" + " " * (2 * len(looks) + 2) + "uncertain", "mark")], y)
        for i, look in enumerate(looks):
            x = MARGIN + (column + 9 + 2 * i) * self._advance + 2
            pen.rectangle((x, y + 6, x + 2 * self._advance - 4, y + SIZE), DARK.colour(look))


def palette() -> Image:
    """Return an image with the palette for all pages: each colour in SHADES steps from the background.

    The smooth edges of letters need these steps.
    """
    from PIL import Image

    ground = _rgb(DARK.ground)
    values: list[int] = []
    for colour in sorted({DARK.colour(look) for look in LOOKS}):
        for i in range(1, SHADES + 1):
            values += [round(g + (c - g) * i / SHADES) for g, c in zip(ground, _rgb(colour), strict=True)]
    image = Image.new("P", (1, 1))
    image.putpalette([*ground, *values])
    return image


def _rgb(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def fonts() -> tuple[Font, Font]:
    """Return the first of FONTS that the system or matplotlib has, plain and bold; otherwise Pillow's own font."""
    from PIL import ImageFont

    folders = (None, _matplotlib())
    for names in FONTS:
        for folder in folders:
            try:
                plain, bold = (ImageFont.truetype(str(folder / name if folder else name), SIZE) for name in names)
                return plain, bold
            except OSError:
                continue
    own = ImageFont.load_default(SIZE)
    return own, own


def wide_font() -> Font | None:
    """Return the first of WIDE that the system has."""
    from PIL import ImageFont

    for name in WIDE:
        try:
            return ImageFont.truetype(name, SIZE)
        except OSError:
            continue
    return None


def _matplotlib() -> Path | None:
    """Return the folder of matplotlib's fonts, if matplotlib is installed."""
    spec = find_spec("matplotlib")
    return Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" if spec and spec.origin else None
