"""Rewrite one passage of a text: edit.py prints the change as a diff; the bundled model sorts a few words.

With your own model: edit.py MODEL.gguf TEXT PASSAGE INSTRUCTION
"""

import sys

import dgemma
from dgemma.model import bundled

OURS = (bundled("tidy"), "# zoo\ndog cat bee\n- owl: 2\n", "dog cat bee", "Sort:")

if len(sys.argv) not in (1, 5):
    sys.exit(__doc__)
path, text, passage, instruction = sys.argv[1:] or OURS
with dgemma.Model(path) as model:
    begin = text.index(passage)
    edited = model.edit(text, (begin, begin + len(passage)), instruction, seed=0)
    print(edited.diff(), end="")
