"""One passage of a text, rewritten: edit.py MODEL.gguf TEXT PASSAGE INSTRUCTION prints the change as a diff."""

import sys

import dgemma

if len(sys.argv) != 5:
    sys.exit(__doc__)
path, text, passage, instruction = sys.argv[1:]
with dgemma.Model(path) as model:
    begin = text.index(passage)
    edited = model.edit(text, (begin, begin + len(passage)), instruction)
    print(edited.diff(), end="")
