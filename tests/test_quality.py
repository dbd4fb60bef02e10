"""Speed is not paid for in quality: rounded activations and sparse self-conditioning against float32 throughout."""

from __future__ import annotations

import numpy as np
import pytest
from measure.solve_rate import puzzles, solve_rate

import dgemma

FAST = [name for name in dgemma.backends() if name.startswith("cpu-")]


@pytest.fixture(scope="module")
def exact():
    with dgemma.Model(exact=True) as model:
        yield model


@pytest.mark.skipif(not FAST, reason="no instruction set with integer products here")
@pytest.mark.parametrize("backend", FAST)
def test_argmax_agrees_along_trajectories(backend, exact):
    """The same canvases and conditions, step by step: at least 99 % of positions have the same most likely token."""
    agreed = total = 0
    with dgemma.Model(backend=backend) as fast:
        for blanks in (36, 44, 51):
            for puzzle in puzzles(blanks, 3):
                with exact.session() as one, fast.session() as other:
                    ids = exact.prompt_ids(puzzle.prompt)
                    one.encode(ids)
                    other.encode(ids)
                    condition = None
                    canvas = np.random.default_rng(0).integers(0, 64, 96)
                    for step in (s for s in exact.stream(puzzle.prompt) if isinstance(s, dgemma.Step)):
                        logits = one.denoise(canvas, condition)
                        agreed += (logits.argmax(-1) == other.denoise(canvas, condition).argmax(-1)).sum()
                        total += len(canvas)
                        condition = logits / np.float32(step.temperature)
                        noise = np.random.default_rng(step.index).integers(0, 64, 96)
                        canvas = np.where(step.accepted, step.canvas, noise)
    assert agreed >= 0.99 * total, f"{agreed} of {total}"


@pytest.mark.parametrize("backend", FAST)
def test_puzzles_are_solved_as_often(backend, exact):
    """A short form of the comparison; tests/measure/solve_rate.py has the long one."""
    with dgemma.Model(backend=backend) as fast:
        rates = [solve_rate(model, 44, count=20) for model in (exact, fast)]
    assert abs(rates[0].solved - rates[1].solved) <= 1, rates
