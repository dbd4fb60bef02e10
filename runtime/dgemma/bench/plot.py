"""Draws charts of a report, with matplotlib, which the extra `bench` installs."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill
from typing import Any

from dgemma.bench.measure import Part, Report, rates
from dgemma.ui.charts import blank, logarithmic, save

BAR, FAINT = "#3b6ea5", "#666666"


def plot(report: Report, path: Path) -> None:
    """Draw the seconds of each part, with a whisker from least to most, and its share of the machine's limit."""
    steps = report.steps
    shown = [part for part in steps.parts if part.name != "rest"]
    names = [fill(part.covers.partition(":")[0], 24) for part in shown]
    middle = [part.seconds.median for part in shown]
    low = [part.seconds.median - min(part.seconds.runs) for part in shown]
    high = [max(part.seconds.runs) - part.seconds.median for part in shown]

    figure, axes = blank(9, 0.55 * len(shown) + 1.8)
    places = range(len(shown))
    axes.barh(places, middle, xerr=[low, high], color=BAR, ecolor=FAINT, capsize=3, height=0.62)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    ends = [max(part.seconds.runs) for part in shown]
    most = max(ends)
    for place, part, end in zip(places, shown, ends, strict=True):
        axes.text(end + 0.012 * most, place, label(report, part), va="center", fontsize=9)
    axes.set_xlim(0, most * 1.62)
    about, machine = report.model, report.machine
    title = f"{about['name']}: one denoising step, {steps.seconds.median:.3g} s"
    limits = ", ".join(
        f"{kind} {best / 1e9:.0f}" for kind in ("int8", "float32") if (best := machine.best(kind)) is not None
    )
    where = f"{about['backend']}, threads: {about['threads']}, {machine.clock_hz / 1e9:.2f} GHz"
    subtitle = f"{where}; limits in Gop/s: {limits or 'not known'}"
    axes.annotate(title, (0, 1), (0, 26), "axes fraction", textcoords="offset points", fontsize=12)
    axes.annotate(subtitle, (0, 1), (0, 10), "axes fraction", textcoords="offset points", fontsize=9, color=FAINT)
    save(figure, path)


def plot_writing(report: Report, path: Path) -> None:
    """Draw tokens per second over batch size: of llama.cpp, and of dgemma for several numbers of steps."""
    assert report.comparison is not None
    told = report.comparison["writing"]
    figure, axes = blank(8, 5)
    batches = [row["batch"] for row in told["theirs"]]
    speeds = [row["tokens_per_second"] for row in told["theirs"]]
    fast = [row["batch"] / row["seconds"]["min"] for row in told["theirs"]]
    slow = [row["batch"] / row["seconds"]["max"] for row in told["theirs"]]
    spread = [[m - s for m, s in zip(speeds, slow, strict=True)], [f - m for f, m in zip(fast, speeds, strict=True)]]
    axes.errorbar(batches, speeds, yerr=spread, color="black", marker="o", capsize=3, label="llama.cpp, decoding")
    for row, style in zip(told["ours"], ("--", "-.", ":"), strict=True):
        name = f"dgemma, {row['steps']} steps a canvas: {overtaken(row)}"
        axes.axhline(row["tokens_per_second"], color=BAR, linestyle=style, label=name)
    axes.set_xscale("log", base=2)
    logarithmic(axes, "y")
    axes.set_xticks(batches, list(map(str, batches)))
    axes.set_xlabel("sequences that llama.cpp decodes together (dgemma: canvases one after the other)")
    axes.set_ylabel("tokens per second, all together")
    axes.legend(frameon=False)
    axes.set_title(f"{report.model['name']}: writing", loc="left", fontsize=12)
    save(figure, path)


def writing_path(path: Path) -> Path:
    """Return the path of the second chart of --plot."""
    return path.with_stem(path.stem + "-writing")


def overtaken(row: dict[str, Any]) -> str:
    """Return the text that says from which batch size llama.cpp is faster than this number of steps."""
    if row["crossover"] is None:
        return "never overtaken"
    return "slower than one" if row["crossover"] == 1 else f"overtaken by a batch of {row['crossover']}"


def label(report: Report, part: Part) -> str:
    """Return the text beside a bar."""
    rate = rates(report.machine, part)
    text = f"{part.seconds.median:.3g} s"
    if rate["operations_per_second"]:
        text += f" · {rate['operations_per_second'] / 1e9:.0f} Gop/s"
        if rate["share_of_int8"]:
            text += f" · {rate['share_of_int8']:.0%} of int8"
    return text
