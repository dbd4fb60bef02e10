"""Fill holes in a text, and keep the rest: infill.py; the bundled models complete a table and a Sudoku.

With your own model: infill.py MODEL.gguf 'Dear [[...]], thank you for [[8]].'
"""

import sys
from pathlib import Path

import dgemma
from dgemma.model import bundled

GRID = Path(__file__).with_name("puzzle.txt").read_text()
TABLE = "| fig | 12 |\n[[...]]\n| sea | red |"

if len(sys.argv) not in (1, 3):
    sys.exit(__doc__)
path, text = sys.argv[1:] or (bundled("tidy"), TABLE)
with dgemma.Model(path) as model:
    filled = model.fill(text)
    print(filled.text, end="\n\n")
    for trial in filled.trials:
        print(f"holes of {trial.lengths} tokens: entropy {trial.mean_entropy:.4f} per token", file=sys.stderr)

if path == bundled("tidy"):  # the Sudoku model was trained without pins: let them count as certain tokens
    with dgemma.Model() as model:
        print(model.fill(GRID.replace(".", "[[1]]"), prompt=GRID, pins_conditioned=True).text, end="")
