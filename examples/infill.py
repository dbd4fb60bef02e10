"""Holes in a text, filled around what stands: infill.py; the bundled model fills in a Sudoku.

With a model of yours: infill.py MODEL.gguf 'Dear [[...]], thank you for [[8]].'
"""

import sys
from pathlib import Path

import dgemma

GRID = Path(__file__).with_name("puzzle.txt").read_text()

with dgemma.Model(sys.argv[1] if len(sys.argv) > 1 else None) as model:
    if len(sys.argv) > 2:
        filled = model.fill(sys.argv[2])
    else:  # a hole of one token for each blank; this model was trained without pins, so they count as certain tokens
        filled = model.fill(GRID.replace(".", "[[1]]"), prompt=GRID, pins_conditioned=True)
    print(filled.text)
    for trial in filled.trials:
        print(f"holes of {trial.lengths} tokens: entropy {trial.mean_entropy:.4f} per token", file=sys.stderr)
