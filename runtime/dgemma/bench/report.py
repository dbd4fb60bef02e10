"""Writes a Report as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dgemma.bench.device import TYPICAL
from dgemma.bench.machine import Machine
from dgemma.bench.measure import Part, Report, Steps, Times, rates
from dgemma.bench.profile import parts
from dgemma.units import size_text

NOTHING = "–"
BUSY = 0.75  # below this share of (threads x one thread's speed), the cores are busy or shared by two threads


def markdown(report: Report) -> str:
    about, settings = report.model, report.settings
    described = f"{about['name']}, {size_text(sum(about['bytes'].values()))} of weights"
    machine = report.machine
    lines = [
        f"# {described}",
        "",
        f"{machine.processor}, {about['threads']} of {settings['processors']} processors, {about['backend']}"
        f"{', exact' if settings['exact'] else ''}; {settings['runs']} runs after a warm-up, a prompt of"
        f" {settings['prompt']} tokens; medians (least..most).",
        "",
        *peaks(machine),
        "",
        *step(report, report.steps),
    ]
    if report.flat:
        lines += ["", *flat(report, report.flat)]
    lines += ["", *summary(report)]
    if report.together:
        lines += ["", *together(report.together)]
    if report.budget:
        lines += ["", *budget(report, report.budget)]
    if report.device:
        lines += ["", *device(report.device)]
    if report.behind:
        lines += ["", *behind(report.behind)]
    if report.comparison:
        lines += ["", *against(report.comparison)]
    return "\n".join(lines)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table; the first column is text, the others are numbers."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * w if i == 0 else "-" * (w - 1) + ":") for i, w in enumerate(widths)]
    return [line(head), f"| {' | '.join(rule)} |", *map(line, rows)]


def peaks(machine: Machine) -> list[str]:
    """Return a table of the machine's limits."""
    rows = []
    for peak in machine.peaks:
        unit = "GB/s" if peak.kind == "memory" else "Gop/s"
        cycles = NOTHING if peak.kind == "memory" else f"{peak.one / machine.clock_hz:.0f}"
        one, all_ = (f"{value / 1e9:.0f} {unit}" for value in (peak.one, peak.all))
        rows.append([f"{peak.kind}, {peak.instructions}", one, all_, cycles])
    head = ["limit of this machine", "one thread", count(machine.threads, "thread"), "op/cycle"]
    lines = [f"Clock {machine.clock_hz / 1e9:.2f} GHz, measured.", "", *table(head, rows)]
    if any(peak.all < BUSY * machine.threads * peak.one for peak in machine.peaks if peak.kind != "memory"):
        lines += ["", "Not all threads had a core of their own at every measurement: figures may be of a busy machine."]
    return lines


def count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def step(report: Report, steps: Steps) -> list[str]:
    head = ["one denoising step", "seconds", "share", "Gop", "Gop/s", "op/cycle/core"]
    head += ["of int8", "of float32", "weights", "GB/s"]
    rows = [part_row(report, steps, part) for part in steps.parts]
    total = Part("step", "the whole step", steps.seconds, None, sum(part.bytes or 0 for part in steps.parts))
    known = sum(part.operations or 0 for part in steps.parts if part.certain)
    last = part_row(report, steps, total)
    last[3] = f"{known / 1e9:.4g}"
    rows.append(["**" + last[0] + "**", *last[1:]])
    dense = next(part for part in steps.parts if part.name == "condition").operations or 0
    note = (
        f"Temperature {steps.temperature:g}: positions hesitate between {steps.certainty:.1f} words (mean e^entropy)."
        f" Self-conditioning may be {dense / 1e9:.3g} Gop at most and is not in the sum."
    )
    return [*table(head, rows), "", note]


def part_row(report: Report, steps: Steps, part: Part) -> list[str]:
    rate = rates(report.machine, part)
    seconds = part.seconds.median
    gop = NOTHING if part.operations is None else f"{part.operations / 1e9:.3g}"
    return [
        part.covers.partition(":")[0],
        spread(part.seconds),
        f"{seconds / steps.seconds.median:.1%}",
        gop if part.certain else f"≤ {gop}",
        number(rate["operations_per_second"], "{:.1f}", 1e-9),
        number(rate["operations_per_cycle"], "{:.1f}"),
        number(rate["share_of_int8"], "{:.1%}"),
        number(rate["share_of_float32"], "{:.1%}"),
        size_text(part.bytes) if part.bytes else NOTHING,
        f"{part.bytes / seconds / 1e9:.2f}" if part.bytes and seconds else NOTHING,
    ]


def number(value: float | None, form: str, scale: float = 1.0) -> str:
    return NOTHING if value is None else form.format(value * scale)


def spread(times: Times) -> str:
    """Return the median, and in brackets the least and the most, with three digits of the median."""
    digits = max(0, min(6, 2 - math.floor(math.log10(times.median)))) if times.median > 0 else 3
    return f"{times.median:.{digits}f} ({min(times.runs):.{digits}f}..{max(times.runs):.{digits}f})"


def flat(report: Report, steps: Steps) -> list[str]:
    """Return lines on steps with almost uniform logits, whose self-conditioning sums over the whole vocabulary."""
    rows = []
    for name in ("condition", "head"):
        part = next(part for part in steps.parts if part.name == name)
        rows.append([part.covers.partition(":")[0], spread(part.seconds)])
    rows.append(["the whole step", spread(steps.seconds)])
    head = [f"flat logits, temperature {steps.temperature:g}", "seconds"]
    return [*table(head, rows), "", f"Positions hesitate between {steps.certainty:.0f} words (mean e^entropy)."]


def summary(report: Report) -> list[str]:
    canvas, memory = report.canvas, report.memory
    rows = []
    for e in report.encoding:
        speed = f"{e.tokens / e.seconds.median:.1f} tokens/s"
        rows.append([f"encoding {count(e.tokens, 'token')}", speed, spread(e.seconds) + " s"])
    rows += [
        ["a step", f"{report.steps.seconds.median:.3g} s", spread(report.steps.seconds) + " s"],
        ["a canvas's first step", f"{report.first:.3g} s", "a step without self-conditioning"],
        [
            f"a canvas of {canvas['steps']} steps",
            f"{canvas['tokens_per_second']:.2f} tokens/s",
            f"{canvas['seconds']:.2f} s for {canvas['tokens']} tokens, computed",
        ],
        ["weights read per step", size_text(sum(part.bytes or 0 for part in report.steps.parts)), "each once"],
    ]
    if memory["peak"] is not None:
        rows.append(["memory, at most", size_text(memory["peak"]), "resident, the mapped file's pages among it"])
    if memory["anonymous"] is not None:
        rows.append(["of that not the file", size_text(memory["anonymous"]), "cache, logits, work room and Python"])
    return table(["summary", "", "note"], rows)


def together(told: dict[str, Any]) -> list[str]:
    """Return lines on several canvases in one step."""
    names = {"all": "the whole step", **{name: covers.partition(":")[0] for name, covers in parts().items()}}
    rows = []
    for name, took in told["parts"].items():
        ratio = took["together"] / took["apart"] if took["apart"] else math.nan
        rows.append([names[name], f"{took['apart']:.4f}", f"{took['together']:.4f}", f"{ratio:.3f}"])
    head = [f"a step of {told['canvases']} canvases", "one by one, s", "together, s", "together over one by one"]
    ends = f"{min(told['ratios']):.3f}..{max(told['ratios']):.3f}"
    return [*table(head, rows), "", f"Medians; run by run the ratio is {told['ratio']:.3f} ({ends})."]


def budget(report: Report, told: dict[str, Any]) -> list[str]:
    """Return lines on a step under a memory budget."""
    seconds, rest = report.steps.seconds.median, sum(report.model["bytes"].values()) - told["resident"]
    disk = told["read"] / told["disk"] if told["disk"] else 0.0
    rows = [
        ["weights that stay", size_text(told["resident"]), "read once"],
        ["buffers", size_text(told["ring"]), "that the others come through"],
        [
            "read a step",
            size_text(told["read"]),
            f"{told['read'] / rest:.3f} of the weights that do not stay" if rest > 0 else "",
        ],
        ["of that copied", size_text(told["copied"]), "where the file system has no direct reads"],
        ["the disk meanwhile", f"{told['disk'] / 1e9:.2f} GB/s", f"alone it reads {told['machine']['disk'] / 1e9:.2f}"],
        ["reading took", f"{disk:.3g} s", f"of which a step waited {told['waited']:.3g} s"],
        ["a step, predicted", f"{told['predicted']:.3g} s", f"{told['predicted'] / seconds:.2f} of the measured"],
    ]
    if told["most_ever"] is not None:
        rows.append(["memory ever resident", size_text(told["most_ever"]), f"of {size_text(told['ram'])}"])
    return table([f"within {size_text(told['ram'])}", "", "note"], rows)


def device(told: dict[str, Any]) -> list[str]:
    """Return lines on a step and a canvas on a GPU, with the time of reading the weights and of the queues."""
    seconds, floor, rates = told["seconds"], told["floor"], told["rates"]
    weights, copied = size_text(told["weights"]), size_text(told["copied"])
    rows = [
        ["a step", f"{seconds * 1e3:.4g} ms", "recorded, as users have it; above, every operation is waited for"],
        ["its floor", f"{floor * 1e3:.4g} ms", f"{weights} at {rates['memory'] / 1e9:.4g} GB/s measured"],
        ["share of the floor", f"{floor / seconds:.1%}", "1 is a step that does nothing but read weights once"],
    ]
    if told["canvas"] is not None:
        note = f"{told['canvas'] * 1e3:.4g} ms: {TYPICAL} steps, and the encoding for what follows"
        rows.append(["a canvas", f"{told['tokens_per_second']:.4g} tokens/s", note])
    rows += [
        ["a step, watched", f"{told['wall'] * 1e3:.4g} ms", "on the GPU, from its beginning to its end; not recorded"],
        ["copies", f"{told['copying'] * 1e3:.4g} ms", f"{copied}; alone {rates['copies'] / 1e9:.4g} GB/s"],
        ["the GPU", f"{told['gpu'] * 1e3:.4g} ms", "less what it waited for the others"],
        ["the CPU", f"{told['cpu'] * 1e3:.4g} ms", "computing experts"],
    ]
    queues = max(told["copying"], told["gpu"], told["cpu"])
    rows.append(["overlap", f"{told['wall'] / queues if queues else 1.0:.2f}", "a step over its longest queue"])
    if "predicted" in told:
        ratio = f"a step takes {seconds / told['predicted']:.2f} of that"
        rows.append(["a step, predicted", f"{told['predicted'] * 1e3:.4g} ms", ratio])
    return table([f"within {size_text(told['vram'])} of VRAM" if told["vram"] else "on the GPU", "", "note"], rows)


def behind(told: dict[str, Any]) -> list[str]:
    """Return lines on steps after a short and after a long prompt."""
    rows = [
        [f"behind {count(length, 'token')}", f"{seconds:.4g} s", f"{seconds / told['seconds'][0]:.3f}"]
        for length, seconds in zip(told["lengths"], told["seconds"], strict=True)
    ]
    return table(["a step", "", "over the first"], rows)


def against(told: dict[str, Any]) -> list[str]:
    """Return lines that compare dgemma with llama.cpp on the same layers."""
    rows = []
    for row in told["rows"]:
        both = row["ours"], row["theirs"]
        speeds = [f"{tokens / times['median']:.1f}" for times, tokens in zip(both, row["tokens"], strict=True)]
        rows.append([row["what"], *(spread_told(times) for times in both), *speeds, f"{row['ratio']:.2f}"])
    head = [f"the same backbone in {told['engine']}", "dgemma, s", "theirs, s"]
    head += ["dgemma, tokens/s", "theirs, tokens/s", "times as fast"]
    return [*table(head, rows), "", told["note"], "", *writing(told["writing"])]


def writing(told: dict[str, Any]) -> list[str]:
    """Return lines that compare dgemma's canvases with sequences that llama.cpp decodes, for one user or many."""
    rows = [
        [
            f"dgemma, a canvas of {told['canvas']} in {each['steps']} steps",
            f"{each['tokens_per_second']:.2f}",
            f"{each['tokens_per_second']:.2f}",
            "never" if each["crossover"] is None else f"{each['crossover']}",
        ]
        for each in told["ours"]
    ]
    for each in told["theirs"]:
        speed = each["tokens_per_second"]
        who = "1 sequence" if each["batch"] == 1 else f"{each['batch']} sequences together"
        rows.append([f"llama.cpp, {who}", f"{speed:.2f}", f"{speed / each['batch']:.2f}", ""])
    head = ["writing, one token after the other or a canvas at once", "tokens/s", "for each user", "overtaken at batch"]
    note = (
        f"Interleaved, behind a prompt of {told['prompt']} that all share. A canvas takes its steps, the first one"
        " shorter, and its encoding for what follows. Random tokens are decoded, without the time that choosing one"
        " takes. Canvases of several users are computed one after the other."
    )
    return [*table(head, rows), "", note]


def spread_told(times: dict[str, Any]) -> str:
    return f"{times['median']:.3f} ({times['min']:.3f}..{times['max']:.3f})"
