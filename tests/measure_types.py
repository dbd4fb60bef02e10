"""What every --type makes of a checkpoint: types, size, fidelity to bf16, Sudokus solved; and what calibration adds.

python tests/measure_types.py [CHECKPOINT]      default: the bundled Sudoku model; prints tables in Markdown

Fidelity of the Sudoku model is measured on puzzles that are neither in its training nor in its calibration: of each
level the first ones, while the last ones calibrate. One file's KL is a draw of its rounding errors: the second table
therefore averages over checkpoints whose hidden dimensions are in another order, which compute the same and round
otherwise. There every step is conditioned on what bf16 said: with a file's own words, as in the first table, one puzzle
that takes another way outweighs all else.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from checkpoints import read_safetensors_header, write_checkpoint, write_raw_safetensors
from solve_rate import puzzles, solve_rate

import dgemma
from dgemma.convert import Conversion, convert
from dgemma.convert.recipe import RECIPES
from dgemma.eval.base import Base
from dgemma.eval.fidelity import compare, make_base
from dgemma.sizes import size_text

SUDOKU = Path(__file__).parent / "models" / "sudoku"
LEVELS = (20, 30, 36, 40, 44, 48, 51, 54)  # blanks
CALIBRATING = 12  # puzzles of each level, the last ones
HARD = (48, 51, 54)  # whose solve rate is told
CALIBRATED = ("iq4_nl", "q4_0")  # and K-quants, where rows are whole blocks of them
ROWS = ("q_norm", "k_norm", "layer_scalar", "per_expert_scale")  # vectors of something else than the hidden size
OUTPUTS = {"o_proj": 0, "mlp.down_proj": 0, "self_conditioning.down_proj": 0, "experts.down_proj": 1}

Prompts = Sequence[Any]


def held_out(count: int) -> Prompts:
    return [puzzle.prompt for blanks in LEVELS for puzzle in puzzles(blanks)[:count]]


def write_texts(folder: Path, prompts: Prompts) -> Path:
    file = folder / "calibrate.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return file


def stored(done: Conversion) -> str:
    """The formats of the matrices, the most bytes first."""
    found = [f"{count} {name}" for name, (count, _) in done.plan.histogram().items() if name != "F32"]
    return ", ".join(found) or "all F32"


def reordered(source: Path, out: Path, seed: int) -> Path:
    """The checkpoint with its hidden dimensions in another order: the same function."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.py", "*.log", "*.md", "puzzles*"))
    hidden = json.loads((out / "config.json").read_text())["text_config"]["hidden_size"]
    order = np.random.default_rng(seed).permutation(hidden)
    header, data = read_safetensors_header(out / "model.safetensors")
    changed = bytearray(data)
    for name, entry in header.items():
        if name == "__metadata__" or "vision" in name or any(part in name for part in ROWS):
            continue
        axis = next((axis for part, axis in OUTPUTS.items() if part in name), len(entry["shape"]) - 1)
        if entry["shape"][axis] != hidden:
            raise SystemExit(f"{name}: {entry['shape']} has no hidden dimension {hidden} at {axis}")
        start, end = entry["data_offsets"]
        width = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}[entry["dtype"]]
        values = np.frombuffer(data[start:end], width).reshape(entry["shape"])
        changed[start:end] = np.take(values, order, axis=axis).tobytes()
    write_raw_safetensors(out / "model.safetensors", header, bytes(changed))
    return out


def table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> None:
    click.echo("| " + " | ".join(head) + " |")
    click.echo("|---|---|" + "--:|" * (len(head) - 2))
    for row in rows:
        click.echo("| " + " | ".join(row) + " |")


def types(source: Path, room: Path, prompts: Prompts, solve: Callable[[Path], list[str]]) -> Iterator[list[str]]:
    """A row per type."""
    convert(source, room / "bf16.gguf", "bf16")
    base = make_base(room / "bf16.gguf", prompts=prompts)
    for name in RECIPES:
        done = convert(source, room / "out.gguf", name, force=True)
        f = compare(room / "out.gguf", base)
        size = size_text(done.plan.file_bytes)
        yield [
            name,
            stored(done),
            size,
            f"{f.kl_mean:.2g}",
            f"{f.kl_p99:.2g}",
            f"{100 * f.top1:.2f}",
            *solve(done.path),
        ]


def divergence(file: Path, base_file: Path, base: Base) -> float:
    """Mean KL of softmax(logits / temperature) over the base's trajectories, each step conditioned on the base."""
    found = []
    with dgemma.Model(file) as ours, dgemma.Model(base_file) as theirs:
        for t in base.trajectories:
            with ours.session(len(t.prompt)) as a, theirs.session(len(t.prompt)) as b:
                a.encode(t.prompt)
                b.encode(t.prompt)
                condition = None
                for canvas, temperature in zip(t.canvases, t.temperature, strict=True):
                    got, wanted = (s.denoise(canvas, condition) / np.float32(temperature) for s in (a, b))
                    p, q = log_softmax(wanted), log_softmax(got)
                    found.append((np.exp(p) * (p - q)).sum(axis=1))
                    condition = wanted
    return float(np.concatenate(found).mean())


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z.astype(np.float64) - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def calibrated(
    source: Path, room: Path, prompts: Prompts, texts: Path, names: Sequence[str], orders: int
) -> Iterator[list[str]]:
    """A row per type: KL without and with calibration, each the mean over checkpoints in other orders."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for seed in range(orders):
        folder = reordered(source, room / f"order-{seed}", seed)
        convert(folder, room / "base.gguf", "bf16", force=True)
        base = make_base(room / "base.gguf", prompts=prompts)
        imatrix = room / f"imatrix-{seed}.gguf"
        convert(folder, room / "out.gguf", "q8_0", calibrate=texts, save_imatrix=imatrix, force=True)
        for name in names:
            kl = []
            for weights in (None, imatrix):
                convert(folder, room / "out.gguf", name, imatrix=weights, force=True)
                kl.append(divergence(room / "out.gguf", room / "base.gguf", base))
            found[name].append((kl[0], kl[1]))
    for name, pairs in found.items():
        plain, weighed = ([pair[i] for pair in pairs] for i in (0, 1))
        better = sum(b < a for a, b in pairs)
        ratio = statistics.fmean(weighed) / statistics.fmean(plain)
        yield [name, f"{better} of {len(pairs)}", spread(plain), spread(weighed), f"{ratio:.2f}"]


def spread(values: Sequence[float]) -> str:
    """The mean and its standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.4f} ± {error:.4f}"


@click.command()
@click.argument("checkpoint", default=SUDOKU, type=click.Path(path_type=Path))
@click.option(
    "--random", "random_", is_flag=True, help="A random checkpoint of hidden size 256 instead, on ids as text."
)
@click.option("--puzzles", "count", default=4, help="Held-out puzzles of each level for KL.")
@click.option("--solve", "solving", default=100, help="Puzzles of each hard level for the solve rate; 0: none.")
@click.option("--orders", default=6, help="Orders of the hidden dimensions that calibration is measured on; 0: none.")
def main(checkpoint: Path, random_: bool, count: int, solving: int, orders: int) -> None:
    with tempfile.TemporaryDirectory(prefix="dgemma-measure-") as name:
        room = Path(name)
        sudoku = checkpoint == SUDOKU and not random_
        prompts: Prompts = held_out(count)
        texts = write_texts(room, [p.prompt for blanks in LEVELS for p in puzzles(blanks)[-CALIBRATING:]])
        if not sudoku:
            sentences = [f"the sky is {a} and {b}" for a in ("blue", "high", "wide") for b in ("red", "near", "far")]
            prompts, texts = sentences[: 2 * count], write_texts(room, sentences[2 * count :] or sentences)
            solving = 0
        if random_:
            checkpoint = room / "random"
            write_checkpoint(checkpoint, layers=4, hidden=256, ffn=256, expert_ffn=256, experts=8, canvas=64)

        def solve(path: Path) -> list[str]:
            if not solving:
                return []
            with dgemma.Model(path) as model:
                rates = [solve_rate(model, blanks, solving) for blanks in HARD]
            return [f"{100 * rate.solved / rate.tries:.0f}" for rate in rates]

        head = ["type", "stored", "size", "KL", "KL p99", "same token, %"]
        head += [f"solved of {blanks} blanks, %" for blanks in HARD] if solving else []
        table(head, types(checkpoint, room, prompts, solve))
        if orders:
            names = [*(() if sudoku else ("q6_k", "q5_k_m", "q4_k_m")), *CALIBRATED]
            click.echo()
            head = ["type", "calibrated is nearer", "KL plain", "KL calibrated", "ratio"]
            table(head, calibrated(checkpoint, room, prompts, texts, names, orders))


if __name__ == "__main__":
    main()
