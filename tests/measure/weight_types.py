"""What every --type makes of the bundled checkpoints, and what calibration adds: part of `make bench-quality`.

The first table has a line per type: the formats that are stored (where rows are too short for a K-quant, another one),
size, nearness to the checkpoint's own bf16, held-out tasks solved, speed. Sudoku has rows of 128, tidy of 256.

The second table sets a type beside itself calibrated. One file's KL is a draw of its rounding errors, so it has means
over checkpoints whose hidden dimensions are in other orders, which compute the same and round otherwise. It calibrates
on Sudokus and on messages that are neither among those that are measured nor, of tidy, held out from training.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from measure.solve_rate import puzzles, solve_rate
from measure.success_rate import success_rate
from models.tidy import tasks
from support.checkpoints import read_safetensors_header, write_raw_safetensors

import dgemma
from dgemma.convert import Conversion, convert
from dgemma.convert.calibrate import measure
from dgemma.convert.imatrix import Sums, write_imatrix
from dgemma.convert.names import wanted
from dgemma.convert.recipe import RECIPES
from dgemma.convert.source import open_source
from dgemma.eval import distributions
from dgemma.eval.baseline import Base, replay
from dgemma.eval.fidelity import compare, make_base
from dgemma.eval.report import about
from dgemma.model import bundled
from dgemma.units import size_text

TESTS = Path(__file__).parents[1]
LEVELS = (20, 30, 36, 40, 44, 48, 51, 54)  # blanks
TASKS = [name for name in tasks.TASKS if name not in ("tool", "reply", "think", "again")]  # of one message each
CALIBRATING = 12  # puzzles of each level, the last ones; as many messages
OTHER_INPUTS = ("attn_output", "down")  # of matrices whose inputs are not the hidden dimensions
OTHER_ROWS = ("q_norm", "k_norm", "layer_scalar", "per_expert_scale")  # vectors of something else
OUTPUTS = {"o_proj": 0, "mlp.down_proj": 0, "self_conditioning.down_proj": 0, "experts.down_proj": 1}

Prompts = Sequence[Any]


@dataclass(frozen=True)
class Bench:
    """A checkpoint with its tasks."""

    name: str
    prompts: Callable[[int], Prompts]  # held out: so many of each level or task
    calibrating: Callable[[], Prompts]
    solved: Callable[[dgemma.Model, int], float]  # share of held-out tasks, so many of each level or task
    compared: Sequence[str]  # types that the second table has

    @property
    def folder(self) -> Path:
        return TESTS / "models" / self.name


def sudokus(count: int) -> Prompts:
    return [puzzle.prompt for i in range(count) for blanks in LEVELS for puzzle in puzzles(blanks)[i : i + 1]]


def other_sudokus() -> Prompts:
    return [puzzles(blanks)[-1 - i].prompt for i in range(CALIBRATING) for blanks in LEVELS]


def sudokus_solved(model: dgemma.Model, count: int) -> float:
    rates = [solve_rate(model, blanks, count) for blanks in LEVELS]
    return sum(rate.solved for rate in rates) / sum(rate.tries for rate in rates)


def messages(count: int) -> Prompts:
    return [case.messages for i in range(count) for task in TASKS for case in tasks.cases(task, count)[i : i + 1]]


def other_messages() -> Prompts:
    found = (case.messages for case in tasks.training(5) if isinstance(case, tasks.Case) and not case.tools)
    return [next(found) for _ in range(CALIBRATING * 40)]


def messages_solved(model: dgemma.Model, count: int) -> float:
    rates = [success_rate(model, task, count=count) for task in tasks.TASKS]
    return sum(rate.right for rate in rates) / sum(rate.tries for rate in rates)


BENCHES = [
    Bench("sudoku", sudokus, other_sudokus, sudokus_solved, ("q4_0", "iq4_nl")),
    Bench("tidy", messages, other_messages, messages_solved, ("q4_0", "iq4_nl", "q4_k_m", "q5_k_m", "q6_k")),
]


# ---- a line per type ----


@dataclass(frozen=True)
class Type:
    name: str
    stored: str
    bytes: int
    kl_mean: float
    kl_p99: float
    top1: float
    committed: float
    solved: float
    tokens_per_second: float


def stored(done: Conversion) -> str:
    """The formats of the matrices, the most bytes first."""
    found = [f"{count} {name}" for name, (count, _) in done.plan.histogram().items() if name != "F32"]
    return ", ".join(found) or "all F32"


def types(of: Bench, room: Path, count: int, solving: int, threads: int | None) -> Iterator[Type]:
    convert(of.folder, room / "bf16.gguf", "bf16", threads=threads)
    base = make_base(room / "bf16.gguf", prompts=of.prompts(count), model={"threads": threads})
    for name in RECIPES:
        done = convert(of.folder, room / "out.gguf", name, threads=threads, force=True)
        f = compare(done.path, base, model={"threads": threads})
        with dgemma.Model(done.path, threads=threads) as model:
            solved = of.solved(model, solving)
        kl, told = (f.kl_mean, f.kl_p99), (f.top1, f.committed, solved, f.tokens_per_second)
        yield Type(name, stored(done), done.plan.file_bytes, *kl, *told)


# ---- with and without calibration ----


@dataclass(frozen=True)
class Calibrated:
    name: str
    stored: str
    plain: list[float]  # mean KL per order
    calibrated: list[float]

    @property
    def nearer(self) -> int:
        return sum(b < a for a, b in zip(self.plain, self.calibrated, strict=True))

    @property
    def gained(self) -> list[float]:
        return [a - b for a, b in zip(self.plain, self.calibrated, strict=True)]


def orders(hidden: int, count: int) -> list[Any]:
    """Of the hidden dimensions."""
    return [np.random.default_rng(seed).permutation(hidden) for seed in range(count)]


def reordered(source: Path, out: Path, order: Any) -> Path:
    """The checkpoint with its hidden dimensions in another order: the same function."""
    out.mkdir()
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, out)
    header, data = read_safetensors_header(source / "model.safetensors")
    changed = bytearray(data)
    for name, entry in header.items():
        if name == "__metadata__" or "vision" in name or any(part in name for part in OTHER_ROWS):
            continue
        axis = next((axis for part, axis in OUTPUTS.items() if part in name), len(entry["shape"]) - 1)
        if entry["shape"][axis] != len(order):
            raise SystemExit(f"{name}: {entry['shape']} has no hidden dimension {len(order)} at {axis}")
        start, end = entry["data_offsets"]
        width = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}[entry["dtype"]]
        values = np.frombuffer(data[start:end], width).reshape(entry["shape"])
        changed[start:end] = np.take(values, order, axis=axis).tobytes()
    write_raw_safetensors(out / "model.safetensors", header, bytes(changed))
    return out


def reordered_sums(sums: dict[str, Sums], order: Any) -> dict[str, Sums]:
    """What would be measured on the checkpoint in that order."""
    return {
        name: of
        if any(part in name for part in OTHER_INPUTS)
        else Sums(of.squares[:, order], of.counts, None if of.inputs is None else of.inputs[:, order])
        for name, of in sums.items()
    }


def divergence(file: Path, base: Base, threads: int | None) -> float:
    """The mean KL of compare(), without the rest."""
    found = []
    with dgemma.Model(file, threads=threads) as model:
        for t in base.trajectories:
            n = len(t.canvases[0])
            with model.session(len(t.prompt)) as session:
                session.encode(t.prompt)
                before = partial(_before, t.rows, n, int(model.config.n_vocab))
                for step, logits in replay(session, list(t.canvases), before, set(), []):
                    found.append(distributions.divergence(t.rows, step * n, logits))
    return float(np.concatenate(found).mean())


def _before(of: distributions.Rows, n: int, n_vocab: int, step: int) -> Any:
    return distributions.condition(of, step * n, n, n_vocab)


def calibrated(
    of: Bench, room: Path, count: int, n_orders: int, threads: int | None, tokens: int | None = None
) -> list[Calibrated]:
    """tokens: that calibration sees; None: as many as by default."""
    convert(of.folder, room / "bf16.gguf", "bf16", threads=threads, force=True)
    base = make_base(room / "bf16.gguf", prompts=of.prompts(count), model={"threads": threads})
    with open_source(room / "bf16.gguf") as source:
        needed, hidden = wanted(source.config), source.config.values["d_model"]
    convert(of.folder, room / "working.gguf", "q8_0", threads=threads, force=True)
    measured = measure(room / "working.gguf", of.calibrating(), needed, tokens, threads or 1)
    found = {name: Calibrated(name, "", [], []) for name in of.compared}
    for i, order in enumerate(orders(hidden, n_orders)):
        folder, imatrix = reordered(of.folder, room / f"order-{i}", order), room / f"imatrix-{i}.gguf"
        write_imatrix(imatrix, reordered_sums(measured.sums, order), "", measured.passes, measured.canvas_length, False)
        for name, so_far in found.items():
            for weights, kl in ((None, so_far.plain), (imatrix, so_far.calibrated)):
                done = convert(folder, room / "out.gguf", name, imatrix=weights, threads=threads, force=True)
                kl.append(divergence(done.path, base, threads))
            found[name] = Calibrated(name, stored(done), so_far.plain, so_far.calibrated)
        shutil.rmtree(folder)
    return list(found.values())


# ---- what is told ----


def thousandths(value: float) -> str:
    """Of nats."""
    return f"{1e3 * value:.2g}" if value < 0.01 else f"{1e3 * value:.1f}"


def spread(values: Sequence[float]) -> str:
    """The mean and its standard error, in thousandths of a nat."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{1e3 * statistics.fmean(values):.2f} ± {1e3 * error:.2f}"


def table(head: Sequence[str], lines: Iterator[Sequence[str]]) -> None:
    click.echo("| " + " | ".join(head) + " |")
    click.echo("|---|---|" + "--:|" * (len(head) - 2))
    for line in lines:
        click.echo("| " + " | ".join(line) + " |")
    click.echo()


def type_line(of: Type) -> list[str]:
    shares = [f"{100 * share:.1f}" for share in (of.top1, of.committed, of.solved)]
    kl = [thousandths(of.kl_mean), thousandths(of.kl_p99)]
    return [of.name, of.stored, size_text(of.bytes), *kl, *shares, f"{of.tokens_per_second:.0f}"]


def calibrated_line(of: Calibrated) -> list[str]:
    ratio = statistics.fmean(of.calibrated) / statistics.fmean(of.plain)
    kl = [spread(of.plain), spread(of.calibrated), spread(of.gained)]
    return [of.name, of.stored, *kl, f"{ratio:.2f}", f"{of.nearer} of {len(of.plain)}"]


TYPE_HEAD = ["type", "stored", "size", "KL", "KL p99", "same token, %", "committed, %", "solved, %", "tokens/s"]
CALIBRATED_HEAD = ["type", "stored", "KL", "calibrated", "gained", "ratio", "nearer"]


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=TESTS / "bench", show_default=True, help="The folder.")
@click.option("--model", "names", multiple=True, type=click.Choice([b.name for b in BENCHES]), help="Default: both.")
@click.option("--prompts", default=4, show_default=True, help="Held-out prompts of each level or task, for KL.")
@click.option("--count", default=20, show_default=True, help="Held-out tasks of each level or kind, to be solved.")
@click.option("--orders", "n_orders", default=12, show_default=True, help="For calibration; 0: without.")
@click.option("--types/--no-types", "with_types", default=True, help="The table of types.")
@click.option("--threads", type=int)
def main(
    out: Path, names: tuple[str, ...], prompts: int, count: int, n_orders: int, with_types: bool, threads: int | None
) -> None:
    """Prints Markdown, KL in thousandths of a nat, and writes quality-types-MODEL.json."""
    for of in (bench for bench in BENCHES if bench.name in (names or [b.name for b in BENCHES])):
        with tempfile.TemporaryDirectory(prefix="dgemma-measure-") as name:
            room = Path(name)
            lines = []
            if with_types:
                click.echo(f"{of.name}: every type\n")
                for line in types(of, room, prompts, count, threads):
                    lines.append(line)
                    click.echo(f"{line.name} done", err=True)
                table(TYPE_HEAD, map(type_line, lines))
            gains = calibrated(of, room, prompts, n_orders, threads) if n_orders else []
            if gains:
                click.echo(f"{of.name}: with and without calibration\n")
                table(CALIBRATED_HEAD, map(calibrated_line, gains))
            with dgemma.Model(bundled(of.name)) as model:
                told = about(model, False, prompts=prompts, count=count, orders=n_orders)
            told |= {"types": [asdict(line) for line in lines], "calibration": [asdict(gain) for gain in gains]}
            (out / f"quality-types-{of.name}.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
