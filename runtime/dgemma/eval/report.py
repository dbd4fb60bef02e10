"""The results of a run of dg-eval, and its reports in Markdown and JSON."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from dgemma.bench.machine import processor
from dgemma.bench.report import count, table
from dgemma.eval.approximations import Comparison
from dgemma.eval.fidelity import Bin, Fidelity, Layer, Reliability
from dgemma.eval.results import Score
from dgemma.eval.statistics import Share
from dgemma.eval.sweep import Point
from dgemma.model import Model
from dgemma.units import size_text

NOTHING = "–"


@dataclass(slots=True)
class Files:
    """The measurements of one file."""

    identity: dict[str, Any]
    fidelity: Fidelity | None = None
    scores: list[Score] = field(default_factory=list)

    def told(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(slots=True)
class Evaluation:
    """All results of one run of dg-eval."""

    about: dict[str, Any]  # date, version, commit, machine, settings
    files: list[Files] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)


def about(model: Model, exact: bool, **settings: Any) -> dict[str, Any]:
    """Return facts that hold for all figures of a run: date, version, machine, settings."""
    import dgemma

    return {
        "date": date.today().isoformat(),
        "version": dgemma.__version__,
        "commit": commit(),
        "processor": processor(),
        "backend": model.backend,
        "threads": model.threads,
        "ram": model.ram,
        "exact": exact,
        **settings,
    }


def commit() -> str | None:
    """Return the git commit of this package's source, with a + where files were changed since.

    Returns None for an installed package.
    """
    here = str(Path(__file__).parent)

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", here, *arguments], capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        if not git("ls-files", "--", __file__):
            return None  # the file lies in a git repository, but is not tracked by it
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


# ---- Markdown ----


def markdown(found: Evaluation) -> str:
    parts = [[heading(found)]]
    if len(found.files) > 1:
        parts.append(overview(found.files))
    for file in found.files:
        if file.fidelity is not None and len(found.files) == 1:
            parts += fidelity(file.fidelity)
        if file.scores and len(found.files) == 1:
            parts.append(scores(file.scores))
    if found.points:
        parts.append(points(found.points))
    if found.comparisons:
        parts.append(comparisons(found.comparisons, found.about["backend"]))
    return "\n\n".join("\n".join(lines) for lines in parts)


def heading(found: Evaluation) -> str:
    names = [file.identity["name"] for file in found.files]
    return f"{names[0] if len(names) == 1 else count(len(names), 'file')}: {where(found)}."


def where(found: Evaluation) -> str:
    """Return the date, the version and the machine of all figures, as text."""
    about = found.about
    commit = f", commit {about['commit']}" if about["commit"] else ""
    machine = f"{about['processor'] or 'unknown processor'}, {about['backend']}, {count(about['threads'], 'thread')}"
    within = f", within {size_text(about['ram'])}" if about["ram"] else ""
    return f"{about['date']}, dgemma {about['version']}{commit}; {machine}{within}{', exact' if about['exact'] else ''}"


def percent(share: float) -> str:
    """Return a share in percent; only exactly 1 is "100", and only exactly 0 is "0"."""
    text = f"{100 * share:.1f}"
    if (text == "100.0" and share < 1) or (text == "0.0" and share > 0):
        return f"{100 * share:.2f}" if f"{100 * share:.2f}" not in ("100.00", "0.00") else f"{100 * share:.4f}"
    return "100" if text == "100.0" else "0" if text == "0.0" else text


def nats(value: float) -> str:
    return "0" if value == 0 else f"{value:.2g}" if value < 0.001 else f"{value:.4f}"


def interval(share: Share) -> str:
    return f"{percent(share.share)} ({100 * share.low:.1f}..{100 * share.high:.1f})"


def seconds(value: float, half: float) -> str:
    digits = 4 if value < 0.1 else 3 if value < 1 else 2
    return f"{value:.{digits}f} ± {half:.{digits}f}"


def overview(files: Sequence[Files]) -> list[str]:
    """Return a table with a row per file."""
    head = ["file", "size", "KL mean", "KL p99", "top-1, %", "committed, %", "steps", "tokens/s"]
    names = [score.task for score in files[0].scores if not score.level]
    head[6:6] = [f"{name}, %" for name in names]
    rows = []
    for file in files:
        f = file.fidelity
        row = [file.identity["name"], size_text(file.identity["bytes"])]
        row += [nats(f.kl_mean), nats(f.kl_p99), percent(f.top1), percent(f.committed)] if f else [NOTHING] * 4
        totals = {score.task: score for score in file.scores if not score.level}
        row += [interval(totals[name].right) for name in names]
        timed = list(totals.values())
        steps = sum(s.steps for s in timed) / len(timed) if timed else f.steps if f else 0.0
        speed = sum(s.tokens_per_second for s in timed) / len(timed) if timed else f.tokens_per_second if f else 0.0
        rows.append([*row, f"{steps:.1f}", f"{speed:.1f}"])
    return table(head, rows)


def fidelity(f: Fidelity) -> list[list[str]]:
    base = f.base
    rows = [
        ["KL(base ∥ file), mean", f"{nats(f.kl_mean)} nats", ""],
        ["KL, 99th percentile", f"{nats(f.kl_p99)} nats", ""],
        ["same likeliest token", f"{percent(f.top1)} %", f"{f.rows} positions of canvases that the base made"],
        ["same committed token", f"{percent(f.committed)} %", "each writing by itself, same seeds"],
        ["steps of a canvas", f"{f.steps:.1f}", f"base {f.base_steps:.1f}"],
        ["canvases that converged", f"{percent(f.converged)} %", f"base {percent(f.base_converged)} %"],
        ["calibration error", f"{f.calibration_error:.4f}", f"base {f.base_calibration_error:.4f}"],
    ]
    if f.kept < 1 - 1e-9:
        rows.append(
            ["compared token by token", f"{percent(f.kept)} %", "least share of a distribution; the rest as one"]
        )
    head = [f"{f.file['name']} against {base['name']}", "", f"{count(f.prompts, 'prompt')} ({base['prompt_set']})"]
    parts = [
        table(head, rows),
        bins("noise in the canvas", f.by_noise),
        bins("step", f.by_step),
        reliability(f.calibration, f.base_calibration),
    ]
    if f.layers:
        parts.append(layers(f.layers, f.worst_layer))
    return parts


def bins(what: str, found: Sequence[Bin]) -> list[str]:
    rows = [
        [b.label, str(b.rows), f"{b.temperature:.2f}", nats(b.kl_mean), nats(b.kl_p99), percent(b.top1)] for b in found
    ]
    return table([what, "positions", "temperature", "KL mean", "KL p99", "top-1, %"], rows)


def reliability(own: Sequence[Reliability], bases: Sequence[Reliability]) -> list[str]:
    """Return a table of the file's bins, with the base's figures for the same bins."""
    other = {b.label: b for b in bases}
    rows = []
    for b in own:
        base = other.get(b.label)
        theirs = [percent(base.stated), percent(base.error)] if base else [NOTHING] * 2
        rows.append([b.label, str(b.rows), percent(b.stated), percent(b.error), *theirs])
    head = ["stated entropy, nats", "positions", "stated error, %", "error, %", "base: stated, %", "base: error, %"]
    return table(head, rows)


def layers(found: Sequence[Layer], worst: int | None) -> list[str]:
    rows = []
    for layer in found:
        name = "embedding" if layer.layer < 0 else str(layer.layer)
        mark = " ←" if layer.layer == worst else ""
        rows.append([name + mark, f"{layer.first:.2e}", f"{layer.middle:.2e}"])
    return table(["hidden state behind layer (←: grows most)", "first step", "middle step"], rows)


def scores(found: Sequence[Score]) -> list[str]:
    rows = []
    for s in found:
        name = f"{s.task}, {s.level}" if s.level else f"**{s.task}**"
        speed = [seconds(s.seconds, s.seconds_half), f"{s.tokens_per_second:.1f}"]
        rows.append([name, interval(s.right), str(s.right.tries), f"{s.steps:.1f}", percent(s.converged), *speed])
    return table(["task", "right, % (95 %)", "tries", "steps", "converged, %", "seconds", "tokens/s"], rows)


def points(found: Sequence[Point]) -> list[str]:
    rows = []
    for p in found:
        s = p.score
        front = "yes" if p.front else ""
        rows.append([p.name, interval(s.right), f"{s.steps:.1f}", seconds(s.seconds, s.seconds_half), front])
    return table(["setting", "right, % (95 %)", "steps", "seconds", "best trade"], rows)


def comparisons(found: Sequence[Comparison], backend: str) -> list[str]:
    rows = []
    for t in found:
        right = [interval(each.right) for each in (t.off, t.on)]
        steps = f"{t.off.steps:.1f} → {t.on.steps:.1f}"
        default = "on" if t.default else "off"
        apart = NOTHING if t.kl_mean is None else nats(t.kl_mean)
        rows.append(
            [
                t.name,
                default,
                *right,
                percent(t.same),
                apart,
                steps,
                f"{t.times_as_fast:.2f} ({t.times_low:.2f}..{t.times_high:.2f})",
            ]
        )
    head = ["approximation", "default", "right off, %", "right on, %", "same answer, %", "KL mean", "steps"]
    head.append("times as fast (95 %)")
    notes = [f"- {t.name}: {t.what}" for t in found]
    if backend.startswith("cpu"):
        notes.append("- precision of keys and values: the CPU keeps them in float32 alone; there is nothing to try")
    return [*table(head, rows), "", *notes]


def told(found: Evaluation) -> dict[str, Any]:
    """Return all results for JSON; kl_mean, kl_p99, top1 and committed of the first file are at the top level."""
    out: dict[str, Any] = {"schema": 1, **found.about}
    first = found.files[0].fidelity
    if first is not None:
        out |= {name: getattr(first, name) for name in ("kl_mean", "kl_p99", "top1", "committed")}
    out["files"] = [file.told() for file in found.files]
    out["sweep"] = [point.told() for point in found.points]
    out["approximations"] = [comparison.told() for comparison in found.comparisons]
    return out
