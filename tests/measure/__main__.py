"""Runs one of the programs beside this file: python tests/measure NAME [ARGUMENTS], such as solve_rate --seeds 5."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAMES = sorted(path.stem for path in HERE.glob("*.py") if path.stem != "__main__")

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        sys.exit(f"{__doc__}\nNAME is one of {', '.join(NAMES)}.")
    name = sys.argv.pop(1)
    sys.path[0] = str(HERE.parent)  # the programs import measure, support, models and fuzz
    runpy.run_path(str(HERE / f"{name}.py"), run_name="__main__")
