"""Writes what each type may cost the bundled model: `python tests/golden/make_fidelity.py`, when it costs less.

fidelity.npz: the float32 checkpoint's pass over three Sudokus, in float32. fidelity.json: how near each type comes.
"""

import json
import sys
import tempfile
from pathlib import Path

from dgemma.convert import convert
from dgemma.convert.recipe import RECIPES
from dgemma.eval.baseline import Base
from dgemma.eval.fidelity import compare, make_base
from dgemma.eval.prompts import puzzles

HERE = Path(__file__).parent
SUDOKU = HERE.parent / "models" / "sudoku"
EXACT = {"exact": True}  # so that it does not matter which products a processor has


def measured(kind: str, base: Base, folder: Path) -> dict[str, float]:
    """The figures of the checkpoint converted to a type."""
    path = folder / f"{kind}.gguf"
    convert(SUDOKU, path, type=kind)
    found = compare(path, base, model=EXACT)
    return {name: getattr(found, name) for name in ("kl_mean", "kl_p99", "top1", "committed")}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.gguf"
        convert(SUDOKU, path, type="f32")
        prompts = [next(p.prompt for p in puzzles() if p.blanks == blanks) for blanks in (30, 40, 48)]
        base = make_base(path, prompts=prompts, model=EXACT)
        base.save(HERE / "fidelity.npz")
        figures = {kind: measured(kind, base, Path(folder)) for kind in RECIPES}
    (HERE / "fidelity.json").write_text(json.dumps(figures, indent=1) + "\n")
    json.dump(figures, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
