"""Write the derived parts of README.md and docs/ (`make docs`). With --check, name the pages that are not current.

A page has blocks, which begin with a line `<!-- figures: NAME -->` and end with `<!-- end -->`. The text between them
is what BLOCKS[NAME] returns, made from the JSON files under tests/bench. docs/commands.md is made from the commands'
--help.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, median
from typing import Any

import click

from dgemma_start import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "tests" / "bench"
BLOCK = re.compile(r"(<!-- figures: ([a-z0-9-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
BACKENDS = re.compile(r"(--backend NAME\s+auto), or one of: [^.]*\.")  # the list of backends differs between builds
GIB, MIB, GIGA, KILO_NATS = 2**30, 2**20, 1e9, 1e3
STEPS = 16  # steps of a canvas, for times that are predicted from the time of a step

BLOCKS: dict[str, Callable[[], str]] = {}


def block(make: Callable[[], str]) -> Callable[[], str]:
    """Add a function to BLOCKS, under its name with hyphens."""
    BLOCKS[make.__name__.replace("_", "-")] = make
    return make


def load(name: str) -> Any:
    """Return the value in tests/bench/NAME.json."""
    return json.loads((BENCH / f"{name}.json").read_text())


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a Markdown table whose columns but the first are right-aligned."""
    names = list(head)
    lines = [names, ["---"] + ["--:"] * (len(names) - 1), *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def number(value: float, digits: int = 2) -> str:
    """Return a value with `digits` significant digits, without an exponent."""
    if value == 0 or value >= 10**digits:
        return f"{value:.0f}"
    return f"{value:#.{digits}g}".rstrip(".")


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


# ---- the whole model ----


@block
def real_model() -> str:
    """Return the memory and time of the 26B model on a CPU: with the file mapped, and within budgets of RAM."""
    whole = load("26b-a4b-30-layers-avx2")
    disk = f"{sum(whole['model']['bytes'].values()) / GIB:.1f}"
    step, minutes = whole["step"]["seconds"]["median"], whole["canvas"]["seconds"] / 60
    mapped = [f"{whole['memory']['peak'] / GIB:.1f}", "q4_k_m", disk, "none"]
    rows = [[*mapped, f"{step:.1f} (measured)", f"{minutes:.1f} (measured)"]]
    for each in reversed(load("26b-a4b-ram")["budgets"]):
        within, step = each["within"], median(each["within"]["seconds"])
        flags = f"`--ram {within['ram'] // GIB}G`"
        cells = [f"{within['peak'] / GIB:.1f}", "q4_k_m", disk, flags, f"{step:.1f} (measured)"]
        rows.append([*cells, f"{STEPS * step / 60:.1f} (predicted)"])
    head = ["memory, GiB (measured)", "file", "disk, GiB", "flags", "one step, s", "256 tokens, minutes"]
    machine, clock = whole["machine"], whole["clock_hz"] / GIGA
    note = f"Random weights, {machine['processors']} cores of an {machine['processor']} at {clock:.1f} GHz with"
    note += f" AVX2, no GPU. Memory is the peak. {whole['canvas']['tokens']} tokens take {STEPS} steps."
    return f"{table(head, rows)}\n{note}\n"


@block
def word_by_word() -> str:
    """Compare the speed with llama.cpp, which writes one token after the other."""
    told = load("26b-a4b-6-layers-llama-cpp")["against"]["writing"]
    ours = next(row for row in told["ours"] if row["steps"] == STEPS)["tokens_per_second"]
    theirs = told["theirs"][0]["tokens_per_second"]
    return (
        f"- On two CPU cores, writing token by token is faster: llama.cpp makes {number(theirs)} tokens/s, dgemma"
        f" {number(ours)} (6 layers, {STEPS} steps).\n"
    )


@block
def ram() -> str:
    rows = []
    for each in load("26b-a4b-ram")["budgets"]:
        within, plain = each["within"], each["plain"]
        cells = [within["peak"] / GIB, within["read"] / GIB, median(within["seconds"]), within["predicted"]]
        cells += [within["disk"] / GIGA, plain["read"] / GIB, median(plain["seconds"])]
        rows.append([f"{within['ram'] // GIB}", *(f"{cell:.1f}" for cell in cells)])
    head = ["`--ram`, GiB", "peak memory, GiB", "read per step, GiB", "step, s", "step that was predicted, s"]
    return table([*head, "disk, GB/s", "plain map: read per step, GiB", "plain map: step, s"], rows)


# ---- speed ----


@block
def steps() -> str:
    """Return the time of one step and more, with six layers and with all."""
    runs = [load("26b-a4b-6-layers-avx2"), load("26b-a4b-30-layers-avx2")]
    rows = [
        ["one step, s", *(f"{run['step']['seconds']['median']:.2f}" for run in runs)],
        ["likely words per position", *(f"{run['step']['exp_entropy']:.1f}" for run in runs)],
        ["one step with flat logits, s", *(f"{run['flat']['seconds']['median']:.2f}" for run in runs)],
        *(
            [f"encoding {runs[0]['encoding'][i]['tokens']} tokens, s"]
            + [f"{run['encoding'][i]['seconds']['median']:.2f}" for run in runs]
            for i in range(2)
        ),
        ["16 steps, s", *(f"{run['canvas']['seconds']:.1f}" for run in runs)],
        ["16 steps, tokens/s", *(f"{run['canvas']['tokens_per_second']:.1f}" for run in runs)],
        ["two canvases in one step, over one by one", *(f"{run['together']['ratio']:.2f}" for run in runs)],
        ["memory without the mapped file, GiB", *(f"{run['memory']['anonymous'] / GIB:.2f}" for run in runs)],
        ["weights that a step reads, GiB", *(f"{run['step']['bytes'] / GIB:.1f}" for run in runs)],
    ]
    return table(["AVX2", *(f"{run['model']['layers']} layers" for run in runs)], rows)


@block
def parts() -> str:
    whole = load("26b-a4b-30-layers-avx2")
    cores, rows = whole["settings"]["processors"], []
    for part in whole["step"]["parts"]:
        speed, share = part["operations_per_second"], part["share_of_int8"]
        cells = [f"{speed / GIGA / cores:.0f}", percent(share)] if speed else ["–", "–"]
        rows.append([part["covers"], f"{part['seconds']['median']:.3f}", *cells])
    return table(["part of a step, 30 layers", "s", "Gop/s and core", "of the int8 limit, %"], rows)


@block
def against_llama_cpp() -> str:
    told, rows = load("26b-a4b-6-layers-llama-cpp")["against"], []
    for row in told["rows"]:
        cells = [row["ours"]["median"], row["theirs"]["median"], row["ratio"]]
        rows.append([row["what"], *(f"{cell:.2f}" for cell in cells)])
    return table(["6 layers", "dgemma, s", f"{told['engine']}, s", "ratio"], rows)


@block
def writing() -> str:
    """Return tokens per second of canvases, and of llama.cpp's decoding."""
    told = load("26b-a4b-6-layers-llama-cpp")["against"]["writing"]
    rows = []
    for row in told["ours"]:
        rows.append([f"dgemma, canvas of {told['canvas']}, {row['steps']} steps", number(row["tokens_per_second"])])
    for row in told["theirs"]:
        users = "1 user" if row["batch"] == 1 else f"{row['batch']} users"
        rows.append([f"llama.cpp, token by token, {users}", number(row["tokens_per_second"])])
    return table(["6 layers", "tokens/s"], rows)


@block
def served() -> str:
    told = load("serve")
    rows = []
    for name, each in told["overhead"].items():
        for way in ("whole", "streamed"):
            added = [each[way]["added_ms"]["median"], percent(each[way]["added_part"])]
            rows.append([f"{name}, {way}", each["alone_ms"]["median"], *added])
    return table(["answer", "without a server, ms", "added, ms", "added, %"], rows)


@block
def served_load() -> str:
    told = load("serve")["load"]
    memory, unlike = told["memory_MiB"], len(told["answers_unlike_alone"])
    rows = [
        ["clients", told["clients"]],
        ["most requests that wait", load("serve")["queue"]],
        ["seconds", f"{told['seconds']:.0f}"],
        ["clients that were killed in the middle of an answer", told["clients_killed_while_streaming"]],
        ["answers", told["answers"]],
        ["answers that differ from the answer to the same request alone", unlike],
        ["errors", len(told["errors"])],
        ["requests sent away with 429", told["sent_away_429"]],
        ["memory after a third of the time, MiB", f"{memory['after_a_third']:.0f}"],
        ["memory at the end, MiB", f"{memory['at_the_end']:.0f}"],
    ]
    return table(["load", "count"], rows)


# ---- quality ----


def made(run: Any) -> str:
    """Return the line with the date, commit and machine of a file of dg-eval or of tests/measure/weight_types.py."""
    threads = "1 thread" if run["threads"] == 1 else f"{run['threads']} threads"
    return f"\n{run['date']}, commit {run['commit']}, {run['processor']}, {run['backend']}, {threads}.\n"


@block
def sudoku() -> str:
    run, rows = load("quality-sudoku"), []
    for score in run["files"][0]["scores"]:
        if score["level"]:
            right = score["right"]
            rows.append([score["level"].split()[0], right["tries"], percent(right["share"]), f"{score['steps']:.1f}"])
    return table(["blanks", "tries", "solved, %", "steps, mean"], rows) + made(run)


def types(name: str) -> str:
    run, rows = load(f"quality-types-{name}"), []
    for each in run["types"]:
        cells = [each["bytes"] / MIB, each["kl_mean"] * KILO_NATS]
        cells_text = [f"{cells[0]:.1f}", f"{cells[1]:.2g}" if cells[1] >= 1e-4 else "0"]
        shares = [percent(each[field]) for field in ("top1", "committed", "solved")]
        rows.append([each["name"], each["stored"], *cells_text, *shares])
    head = ["type", "tensors are stored as", "file, MiB", "KL, 1e-3 nats", "same top token, %"]
    return table([*head, "same committed tokens, %", "solved, %"], rows) + made(run)


@block
def types_sudoku() -> str:
    return types("sudoku")


@block
def types_tidy() -> str:
    return types("tidy")


@block
def calibration() -> str:
    rows = []
    for name in ("sudoku", "tidy"):
        for each in load(f"quality-types-{name}")["calibration"]:
            cells = [f"{mean(each[way]) * KILO_NATS:.2g}" for way in ("plain", "calibrated")]
            rows.append([f"{name}, {each['name']}", len(each["plain"]), *cells])
    return table(["model and type", "runs", "KL without, 1e-3 nats", "KL with `--calibrate`, 1e-3 nats"], rows)


@block
def settings() -> str:
    """Return the shares of hard Sudokus that are solved, by the limit of steps and the entropy bound."""
    run, rows = load("quality-settings"), []
    for each in run["sweep"]:
        score, chosen = each["score"], each["settings"]
        cells = [percent(score["right"]["share"]), f"{score['steps']:.1f}", f"{score['seconds'] * 1e3:.0f}"]
        rows.append([chosen["steps"], chosen["entropy_bound"], *cells])
    return table(["`--steps`", "`--entropy-bound`", "solved, %", "steps, mean", "time, ms"], rows) + made(run)


@block
def approximations() -> str:
    run, rows = load("quality-approximations"), []
    for each in run["approximations"]:
        shares = [percent(each[way]["right"]["share"]) for way in ("off", "on")]
        used = "on" if each["default"] else "off"
        rows.append([f"{each['name']}: {each['what']}", used, *shares, f"{each['times_as_fast']:.2f}"])
    return table(["approximation", "default", "solved without, %", "solved with, %", "times as fast"], rows) + made(run)


@block
def tidy() -> str:
    run = load("quality-tidy")
    scores = [score for score in run["files"][0]["scores"] if not score["level"]]
    rows = [[s["task"], s["right"]["tries"], percent(s["right"]["share"]), f"{s['steps']:.1f}"] for s in scores]
    return table(["task", "tries", "right, %", "steps, mean"], rows) + made(run)


def earlier(page: str) -> str:
    """Return the figures of a page whose runs left no file."""
    figures = [row for row in load("earlier")["figures"] if row["page"] == page]
    return table(["what", "figure"], [[row["what"], f"{row['figure']} {row['unit']}"] for row in figures])


@block
def earlier_quality() -> str:
    return earlier("quality")


@block
def earlier_performance() -> str:
    return earlier("performance")


# ---- commands ----


def commands() -> str:
    """Return the text of docs/commands.md."""
    text = [
        "# Commands\n",
        "`make docs` makes this page from each command's `--help`: do not edit it. `--help` lists the backends of your",
        "build for `--backend NAME`: `cpu` and `reference`, others such as `cpu-avx2` by processor, and `cuda` after",
        "`make CUDA=1`.\n",
    ]
    for name, module in sorted(COMMANDS.items()):
        command = importlib.import_module(module).main
        width = {"max_content_width": 100, "terminal_width": 100}
        context = click.Context(command, info_name=name, **(command.context_settings | width))
        help_text = BACKENDS.sub(r"\1, or a backend by name.", command.get_help(context))
        text += [f"## {name}\n", "```text", help_text.rstrip(), "```\n"]
    return "\n".join(text)


def pages() -> dict[Path, str]:
    """Return the text that each page should have."""
    wanted = {ROOT / "docs" / "commands.md": commands()}
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        if page not in wanted:
            wanted[page] = BLOCK.sub(lambda found: found[1] + BLOCKS[found[2]]() + found[3], page.read_text())
    return wanted


def stale() -> list[Path]:
    """Return the pages that are not current."""
    return [page for page, text in pages().items() if not page.exists() or page.read_text() != text]


def main() -> None:
    """Write the pages that are not current, or with --check name them and fail."""
    for page in (found := stale()):
        if "--check" in sys.argv:
            print(f"{page.relative_to(ROOT)} is not current: make docs", file=sys.stderr)
        else:
            page.write_text(pages()[page])
    sys.exit(1 if "--check" in sys.argv and found else 0)


if __name__ == "__main__":
    main()
