"""Draws a chart of quality over time, as SVG and PNG, with matplotlib, which the extra `eval` installs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dgemma.eval.report import Evaluation, where
from dgemma.eval.sweep import Point
from dgemma.ui.charts import MAKER, blank, logarithmic, save

MARKERS, LINES = "osD^vPX*<>", ("--", ":", "-.", (0, (5, 1)), (0, (1, 1)))
COLOURS = ("#1b4f8a", "#c25a00", "#2d7d46", "#8a2b6b", "#555555", "#0f8b8d")  # equally dark when printed in grey
PLACES = ((1, -1), (1, 1), (-1, 1), (-1, -1))  # the direction of a label from its point (right, up), by line
FAINT = "#666666"


def series(points: Sequence[Point]) -> dict[str, list[tuple[str, Point]]]:
    """Return the points of each line of the chart, with their values of the first axis.

    The points of a line differ in the first axis only; the key is the values of the others.
    """
    out: dict[str, list[tuple[str, Point]]] = {}
    for point in points:
        first, *rest = point.name.split(", ")
        out.setdefault(", ".join(rest), []).append((first, point))
    return out


def plot(found: Evaluation, path: Path) -> list[Path]:
    """Draw the sweep into `path` and into a second file of the other kind; return both paths."""
    figure, axes = blank(8.6, 5.4)
    lines = series(found.points)
    axis = found.points[0].name.split("=")[0]
    for i, (name, its) in enumerate(lines.items()):
        draw(axes, its, name, i)
    best = sorted((p.score.seconds, 100 * p.score.right.share) for p in found.points if p.front)
    axes.plot(
        *zip(*best, strict=True), color="black", linewidth=4, alpha=0.18, drawstyle="steps-post", zorder=1,
        solid_capstyle="round", label="no setting is both faster and better",
    )  # fmt: skip
    axes.set_xlabel("seconds for an answer (mean, 95 % interval)")
    axes.set_ylabel("right answers, % (95 % interval)")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    spans = [p.score.seconds for p in found.points]
    if max(spans) > 3 * min(spans) > 0:
        logarithmic(axes, "x")
    axes.legend(fontsize=9, frameon=False, loc="lower right")
    tasks = ", ".join(found.about["tasks"] + found.about["levels"])
    axes.set_title(f"{found.files[0].identity['name']}: {tasks}, by {axis}", loc="left", fontsize=12, pad=24)
    axes.annotate(where(found), (0, 1), (0, 8), "axes fraction", textcoords="offset points", fontsize=8, color=FAINT)
    both = [path, *beside(path)]
    save(figure, *both)
    return both


def beside(path: Path) -> list[Path]:
    """Return the path of the second file: the same name with the other ending."""
    return [path.with_suffix(kind) for kind in MAKER if path.suffix.lower() in MAKER and path.suffix.lower() != kind]


def draw(axes: Any, its: Sequence[tuple[str, Point]], name: str, i: int) -> None:
    """Draw one line of settings, each point with its value of the first axis.

    Points on the Pareto front have filled markers.
    """
    from matplotlib.patheffects import withStroke

    colour, marker, style = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], LINES[i % len(LINES)]
    x = [point.score.seconds for _, point in its]
    y = [100 * point.score.right.share for _, point in its]
    low = [100 * (point.score.right.share - point.score.right.low) for _, point in its]
    high = [100 * (point.score.right.high - point.score.right.share) for _, point in its]
    half = [point.score.seconds_half for _, point in its]
    axes.errorbar(x, y, yerr=[low, high], xerr=half, fmt="none", ecolor=colour, elinewidth=0.8, capsize=2.5, alpha=0.45)
    axes.plot(
        x, y, color=colour, linestyle=style, linewidth=1.3, marker=marker, markersize=7, markerfacecolor="white",
        label=name or None, zorder=2,
    )  # fmt: skip
    for at, (value, point) in enumerate(its):
        if point.front:
            axes.plot([x[at]], [y[at]], marker=marker, markersize=7, color=colour, zorder=3)
        text = value.partition("=")[2]
        right, up = PLACES[i % len(PLACES)]
        axes.annotate(
            text, (x[at], y[at]), (6 * right, 6 * up), textcoords="offset points", fontsize=8, color=colour,
            ha="left" if right > 0 else "right", va="bottom" if up > 0 else "top",
            path_effects=[withStroke(linewidth=2, foreground="white")],
        )  # fmt: skip
