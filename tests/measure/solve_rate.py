"""How many Sudokus a file solves, by number of blanks: `python tests/measure solve_rate [MODEL.gguf] --seeds 5`.

With --pinned the clues are also pinned on the canvas; with --set NAME=VALUE, other options, such as --set effort=low;
with --blanks 54, that level alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

import dgemma

LEVELS = (20, 30, 36, 40, 44, 48, 51, 54)
PUZZLES = Path(__file__).parents[1] / "models" / "sudoku" / "puzzles_test.txt"


@dataclass(frozen=True)
class Puzzle:
    blanks: int
    prompt: str  # nine rows, each with its newline
    solution: str


def puzzles(blanks: int, count: int = 100) -> list[Puzzle]:
    """The first `count` test puzzles with this many blanks."""
    return [p for p in _all() if p.blanks == blanks][:count]


def _all() -> Iterator[Puzzle]:
    for line in PUZZLES.read_text().splitlines():
        if not line.startswith("#"):
            blanks, puzzle, solution = line.split()
            yield Puzzle(int(blanks), puzzle.replace("/", "\n") + "\n", solution.replace("/", "\n") + "\n")


@dataclass(frozen=True)
class Rate:
    solved: int
    tries: int
    mean_steps: float
    most_steps: int


def clues(model: dgemma.Model, puzzle: Puzzle) -> dict[str, list]:
    """A canvas on which all but the blanks is pinned, as generate()'s arguments: the grid, an end id, pad ids."""
    length, end, pad = model.config.canvas_length, model.config.end_ids[0], model.tokenizer.pad_id
    ids = [*model.tokenizer.encode(puzzle.prompt), end]
    pinned = [c != "." for c in puzzle.prompt] + [True] * (length - len(puzzle.prompt))
    return {"canvas": ids + [pad] * (length - len(ids)), "pinned": pinned}


def solve_rate(
    model: dgemma.Model, blanks: int, count: int = 100, seeds: int = 1, pinned: bool = False, **options
) -> Rate:
    """Every puzzle once per seed 0 .. seeds - 1, with the file's own settings but for `options`."""
    steps, solved = [], 0
    for seed in range(seeds):
        for puzzle in puzzles(blanks, count):
            given = clues(model, puzzle) if pinned else {}
            result = model.generate(puzzle.prompt, seed=seed, **given, **options)
            solved += result.text == puzzle.solution
            steps.append(result.steps)
    return Rate(solved, len(steps), sum(steps) / len(steps), max(steps))


def settings_of(texts: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE, each; a value is a number or true where it is one, else text."""
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


@click.command()
@click.argument("model", required=False)
@click.option("--seeds", default=5, show_default=True)
@click.option("--count", default=100, show_default=True, help="puzzles per level")
@click.option(
    "--blanks", "levels", multiple=True, type=click.Choice(list(map(str, LEVELS))), help="these alone; may be repeated"
)
@click.option("--pinned", is_flag=True, help="clues are pinned on the canvas")
@click.option("--exact", is_flag=True, help="float32 throughout")
@click.option("--backend", default="auto", show_default=True)
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="an option of generate()")
def main(
    model: str | None,
    seeds: int,
    count: int,
    levels: tuple[str, ...],
    pinned: bool,
    exact: bool,
    backend: str,
    settings: tuple[str, ...],
) -> None:
    """Prints a Markdown table for MODEL, or for the bundled one."""
    options = settings_of(settings)
    with dgemma.Model(model, exact=exact, backend=backend) as m:
        print("| blanks | solved | % | steps mean / max |\n|--:|--:|--:|--:|")
        for blanks in map(int, levels or LEVELS):
            r = solve_rate(m, blanks, count, seeds, pinned, **options)
            share = f"{r.solved}/{r.tries} | {100 * r.solved / r.tries:.1f}"
            print(f"| {blanks} | {share} | {r.mean_steps:.2f} / {r.most_steps} |", flush=True)


if __name__ == "__main__":
    main()
