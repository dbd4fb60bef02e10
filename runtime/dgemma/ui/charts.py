"""The common parts of all charts, drawn with matplotlib, which the extras `bench` and `eval` install."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dgemma.errors import Error, UsageError
from dgemma.files.output import MARK, marked_kind, whole_file
from dgemma.ui.terminal import shown

MAKER = {".svg": "Creator", ".png": "Software"}  # for each kind of chart the metadata field that names its maker
CHART = marked_kind("a chart of dgemma", MARK.encode())


def refuse_chart(path: Path, extra: str) -> None:
    """Raise Error where --plot could not work; called before anything is measured. extra: it installs matplotlib."""
    if path.suffix.lower() not in MAKER:
        raise UsageError(f"--plot {path}: expected a name that ends in {' or '.join(MAKER)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise Error(f"--plot needs matplotlib: pip install 'dgemma[{extra}]'") from None


def blank(width: float, height: float) -> tuple[Any, Any]:
    """Return a figure, width x height in inches, and its axes. No display is needed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def logarithmic(axes: Any, which: str) -> None:
    """Set a logarithmic scale for the axis "x" or "y" of a chart.

    Labels are plain numbers, at 1, 2, 3 and 5 times each power of ten.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def save(figure: Any, *paths: Path) -> None:
    """Write a figure to files, and close it."""
    from matplotlib import pyplot
    from matplotlib.text import Text

    for text in figure.findobj(Text):  # names of files may have any characters; $ would begin a formula
        text.set_text(shown(text.get_text()).replace("$", r"\$"))
    try:
        for path in paths:
            name = path.suffix.lower()
            with whole_file(path, CHART) as file:
                figure.savefig(file, format=name[1:], dpi=150, metadata={MAKER[name]: MARK})
    finally:
        pyplot.close(figure)
