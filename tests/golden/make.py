"""Writes the golden logits beside it with transformers, for machines without torch: `python tests/golden/make.py`.

Kept: every row's argmax, the largest |logit|, and every fifth row.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from support.cases import GOLDEN, trajectory  # noqa: E402
from support.hugging_face import Theirs, load  # noqa: E402

for case in GOLDEN:
    with tempfile.TemporaryDirectory() as folder:
        outputs = trajectory(case, Theirs(load(case.write(Path(folder)))))
    kept = {}
    for name, logits in outputs.items():
        kept[f"{name}/argmax"] = logits.argmax(-1).astype(np.int32)
        kept[f"{name}/peak"] = np.abs(logits).max()
        kept[f"{name}/rows"] = logits[::5]
    np.savez_compressed(HERE / f"{case.name}.npz", **kept)
    print(case.name, *(f"{name}: {logits.shape}" for name, logits in outputs.items()), sep="\n  ")
