"""The bundled model solves Sudokus as often, and as fast, as its checkpoint does in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
from measure.solve_rate import puzzles, solve_rate

from dgemma.convert import convert
from dgemma.model import bundled as bundled_path

SUDOKU = Path(__file__).parent / "models" / "sudoku"

# blanks: least solved of 20, most mean steps. tests/measure/solve_rate.py has the table of 100 puzzles and 5 seeds.
SHORT = {20: (20, 2.3), 30: (20, 2.5), 36: (20, 3.0), 40: (19, 5.0), 44: (18, 7.5), 48: (16, 20.0)}


@pytest.mark.parametrize("blanks", SHORT)
def test_it_solves(bundled, blanks):
    least, most_steps = SHORT[blanks]
    rate = solve_rate(bundled, blanks, count=20)
    assert rate.solved >= least, rate
    assert rate.mean_steps <= most_steps, rate


def test_the_last_newline_matters(bundled):
    """A prompt is never trimmed, and this model shows why: without its last newline no puzzle is solved."""
    for puzzle in puzzles(30, 5):
        assert bundled.generate(puzzle.prompt).text == puzzle.solution
        assert bundled.generate(puzzle.prompt[:-1]).text != puzzle.solution


def test_the_bundled_file_is_the_checkpoint_converted(tmp_path):
    convert(SUDOKU, tmp_path / "sudoku.gguf", type="q8_0")
    assert (tmp_path / "sudoku.gguf").read_bytes() == Path(bundled_path()).read_bytes()
