"""The scripts of examples/ and the examples of docstrings run as they stand."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from cases import Case

import dgemma

EXAMPLES = Path(__file__).parents[1] / "examples"
SOLUTION = "534678912\n672195348\n198342567\n859761423\n426853791\n713924856\n961537284\n287419635\n345286179\n"


def run(name: str, *arguments: str) -> str:
    """What an example prints, run as a user does."""
    script = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["generate.py", "infill.py", "logits.py", "accept.py"])
def test_an_example_solves_its_sudoku(name):
    assert run(name).rstrip("\n") == SOLUTION.rstrip("\n")


def test_the_stream_is_left_when_its_first_row_is_certain():
    *before, last = run("stream.py").splitlines()
    assert SOLUTION[:9] in last and all(line.startswith("step ") for line in before)


def test_the_editor_prints_a_diff(tmp_path):
    """Of a random model, so that any text may come; it has a chat template."""
    case = Case("edit", seed=6, shape=dict(layers=2, hidden=64, canvas=32))
    path = case.convert(tmp_path / "hf", tmp_path / "edit.gguf")
    diff = run("edit.py", str(path), "the sky is red\n", "red", "The colour is wrong.")
    assert diff.startswith("--- a/text\n+++ b/text\n@@") and "-the sky is red\n" in diff and "+the sky is " in diff


def test_every_example_is_run():
    tested = Path(__file__).read_text()
    assert all(f'"{file.name}"' in tested for file in EXAMPLES.glob("*.py"))


def test_examples_of_docstrings_say_what_happens():
    tried, failed = 0, []
    for found in pkgutil.walk_packages(dgemma.__path__, "dgemma."):
        if not found.name.startswith(("dgemma.convert", "dgemma.bench", "dgemma._build", "dgemma.eval.harness")):
            done = doctest.testmod(importlib.import_module(found.name), verbose=False)
            failed += [found.name] * done.failed
            tried += done.attempted
    assert doctest.testmod(dgemma).failed == 0 and not failed and tried > 5
