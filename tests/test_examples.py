"""The scripts of examples/ and the examples of docstrings run as they stand."""

from __future__ import annotations

import doctest
import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import dgemma
from dgemma.files import json_lines
from dgemma.model import bundled

EXAMPLES = Path(__file__).parents[1] / "examples"
SOLUTION = "534678912\n672195348\n198342567\n859761423\n426853791\n713924856\n961537284\n287419635\n345286179\n"


def run(name: str, *arguments: str, timeout: float = 120) -> str:
    """What an example prints, run as a user does."""
    script = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(script, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["generate.py", "logits.py", "accept.py"])
def test_an_example_solves_its_sudoku(name):
    assert run(name).rstrip("\n") == SOLUTION.rstrip("\n")


def test_the_stream_is_left_when_its_first_row_is_certain():
    *before, last = run("stream.py").splitlines()
    assert SOLUTION[:9] in last and all(line.startswith("step ") for line in before)


def test_holes_are_filled():
    table, sudoku = run("infill.py").split("\n\n")
    assert table == "| fig | 12 |\n|---|---|\n| sea | red |"
    assert sudoku == SOLUTION


def test_the_editor_prints_a_diff():
    head = "--- a/text\n+++ b/text\n@@ -1,3 +1,3 @@\n # zoo\n"
    assert run("edit.py") == head + "-dog cat bee\n+bee cat dog\n - owl: 2\n"
    shout = (bundled("tidy"), "cat dog", "cat dog", "Upper case:")
    assert "+CAT DOG\n" in run("edit.py", *shout)


def test_a_batch_goes_through_ray(tmp_path):
    """On one machine, with two workers: the answers of dg-run --batch, in order."""
    pytest.importorskip("ray", reason="the Ray example is not run: pip install 'dgemma[ray]'")
    from dgemma.batch import Batch
    from dgemma.model import bundled

    lines = [json.dumps({"prompt": f"Sort:\n{text}", "id": i}) for i, text in enumerate(["sea fig", "ink ant", "owl"])]
    lines.append('{"prompt": 1}')
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    out = tmp_path / "answers.jsonl"
    run("batch_ray.py", bundled("tidy"), str(tmp_path / "prompts.jsonl"), str(out), "--workers", "2", timeout=600)
    with dgemma.Model(bundled("tidy")) as model, Batch(model) as batch:
        wanted = [batch.answer(line) for line in lines]
    found = [line for _, line in json_lines.values(out)]
    for answer in [*wanted, *found]:
        for name in ("seconds", "encoded_tokens"):
            answer.pop(name, None)
    assert found == wanted and "error" in found[-1]


def test_every_example_is_run():
    tested = Path(__file__).read_text()
    assert all(f'"{file.name}"' in tested for file in EXAMPLES.glob("*.py"))


def test_examples_of_docstrings_say_what_happens():
    tried, failed = 0, []
    skipped = ("dgemma.convert", "dgemma.bench.synthetic", "dgemma._build", "dgemma.eval.harness")
    for found in pkgutil.walk_packages(dgemma.__path__, "dgemma."):
        if not found.name.startswith(skipped):
            done = doctest.testmod(importlib.import_module(found.name), verbose=False)
            failed += [found.name] * done.failed
            tried += done.attempted
    assert doctest.testmod(dgemma).failed == 0 and not failed and tried > 5
