"""The prompts that fidelity is measured on. A model gets the first shipped set that it can read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TypeAlias

from dgemma.errors import UsageError
from dgemma.model import Model
from dgemma.session import Messages

Given: TypeAlias = str | Messages
PER_LEVEL = 2  # Sudokus of each number of blanks


@dataclass(frozen=True)
class Puzzle:
    """A Sudoku that the bundled model was not trained on."""

    blanks: int
    prompt: str  # nine rows, each with its newline
    solution: str


@cache
def puzzles() -> tuple[Puzzle, ...]:
    """The shipped Sudokus, 100 for each number of blanks, fewest blanks first."""
    found = []
    for line in data("sudoku.txt").splitlines():
        if not line.startswith("#"):
            blanks, puzzle, solution = line.split()
            found.append(Puzzle(int(blanks), puzzle.replace("/", "\n") + "\n", solution.replace("/", "\n") + "\n"))
    return tuple(found)


def data(name: str) -> str:
    """The text of a shipped file."""
    return files("dgemma.eval").joinpath("data", name).read_text(encoding="utf-8")


@cache
def sudokus() -> tuple[Given, ...]:
    """The first puzzles of each level, in turns: any number of them is of all levels."""
    levels: dict[int, list[str]] = {}
    for puzzle in puzzles():
        levels.setdefault(puzzle.blanks, []).append(puzzle.prompt)
    return tuple(prompts[turn] for turn in range(PER_LEVEL) for prompts in levels.values())


@cache
def texts() -> tuple[Given, ...]:
    return tuple(json.loads(data("prompts.json")))


SETS = {"text": texts, "sudoku": sudokus}


def choose(model: Model) -> tuple[str, Sequence[Given]]:
    """The name and the prompts of the first set that the model can read. Raises UsageError where there is none."""
    for name, prompts in SETS.items():
        if all(readable(model, text) for prompt in prompts() for text in contents(prompt)):
            return name, prompts()
    raise UsageError(
        f"{model.path}: its vocabulary reads none of the shipped prompts ({', '.join(SETS)}); give prompts"
    )


def contents(prompt: Given) -> list[str]:
    return [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]


def readable(model: Model, text: str) -> bool:
    """Whether the text comes back from its ids, with no unknown among them."""
    tokenizer = model.tokenizer
    ids = tokenizer.encode(text, special=False)
    return tokenizer.unk_id not in ids and tokenizer.decode(ids) == text
