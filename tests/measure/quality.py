"""Measures the cost of settings and approximations for the bundled Sudoku model: a part of `make bench-quality`.

On the hard levels, settings by quality and time, drawn, and approximations; how near q8_0 comes to float32, layer by
layer; what `tidy`, the other bundled model, gets right. The tables go to standard output, figures and pictures to a
folder, all with date and commit.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click

from dgemma.cli.eval import main as dg_eval
from dgemma.convert import convert
from dgemma.model import bundled

TESTS = Path(__file__).parents[1]
SUDOKU = TESTS / "models" / "sudoku"
SWEEP = ["--sweep", "steps=4,8,16,32,48", "--sweep", "entropy_bound=0.05,0.1,0.3"]
HARD = [flag for blanks in (44, 48, 51, 54) for flag in ("--level", f"{blanks} blanks")]  # the others are all solved


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=TESTS / "bench", show_default=True, help="The folder.")
@click.option("--count", default=50, show_default=True, help="Most puzzles per level.")
@click.option("--seeds", default=1, show_default=True)
def main(out: Path, count: int, seeds: int) -> None:
    tasks = ["--task", "sudoku", "--count", str(count), "--seeds", str(seeds)]
    with tempfile.TemporaryDirectory() as folder:
        f32, q8_0 = (str(convert(SUDOKU, Path(folder) / f"{kind}.gguf", kind).path) for kind in ("f32", "q8_0"))
        run([q8_0, "--against", f32, "--layers", "-o", str(out / "quality-q8_0.json")])
        drawn = ["-o", str(out / "quality-settings.json"), "--plot", str(out / "quality-settings.svg")]
        run([q8_0, *tasks, *HARD, *SWEEP, *drawn])
        run([q8_0, *tasks, *HARD, "--approximations", "-o", str(out / "quality-approximations.json")])
        run([bundled("tidy"), *tasks[2:], "-o", str(out / "quality-tidy.json")])


def run(arguments: list[str]) -> None:
    """dg-eval, whose failure is ours."""
    print("\n$ dg-eval", *(Path(each).name for each in arguments), "\n", flush=True)
    try:
        dg_eval.main(arguments, prog_name="dg-eval")
    except SystemExit as ended:
        if ended.code:
            sys.exit(ended.code)


if __name__ == "__main__":
    main()
