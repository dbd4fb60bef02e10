"""Answer one prompt: generate.py [MODEL.gguf [PROMPT]]; without a model, the bundled one solves a Sudoku."""

import sys
from pathlib import Path

import dgemma

GRID = Path(__file__).with_name("puzzle.txt").read_text()

with dgemma.Model(sys.argv[1] if len(sys.argv) > 1 else None) as model:
    prompt = sys.argv[2] if len(sys.argv) > 2 else GRID
    result = model.generate([{"role": "user", "content": prompt}], seed=7)
    print(result.text, end="")
    print(f"{len(result.ids)} tokens, {result.steps} steps, converged: {result.converged}", file=sys.stderr)
