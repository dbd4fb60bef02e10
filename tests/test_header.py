"""The C header's own usage example compiles and runs as it stands."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from measure.solve_rate import puzzles

from dgemma.model import bundled as bundled_path

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_example_of_the_header_runs(bundled, tmp_path):
    comment = (ROOT / "runtime" / "dg.h").read_text().split("*/")[0]
    example = re.findall(r"^ \*     (.*)$", comment, re.MULTILINE)
    assert len(example) == 6
    puzzle = puzzles(30, 1)[0]
    ids = bundled.prompt_ids(puzzle.prompt)
    print_text = (
        "char text[256]; size_t n;"
        " dg_detokenize(dg_model_tokenizer(m), r->ids, (size_t)r->n_ids, false, text, sizeof text, &n, &e);"
        ' printf("%.*s", (int)n, text);'
    )
    *before, last = example
    lines = ["#include <stdio.h>", '#include "dg.h"', "int main(void) {"]
    lines += [f"const int32_t ids[] = {{{','.join(map(str, ids))}}};", f"const int32_t n_ids = {len(ids)};"]
    lines += [*before, print_text, last, "return 0; }"]
    program = "\n".join(lines).replace("model.gguf", bundled_path())
    (tmp_path / "example.c").write_text(program)
    subprocess.run(["make", "-s", "-C", ROOT, "lib", f"BUILD={ROOT / 'build'}"], check=True)
    flags = ["-std=c11", "-pthread", f"-I{ROOT / 'quants'}", f"-I{ROOT / 'runtime'}", "-Wall", "-Wextra", "-Werror"]
    library = ROOT / "build" / "libdgemma.a"
    subprocess.run(["cc", *flags, tmp_path / "example.c", library, "-lm", "-o", tmp_path / "example"], check=True)
    run = subprocess.run([tmp_path / "example"], capture_output=True, text=True, check=True)
    assert run.stdout == puzzle.solution
