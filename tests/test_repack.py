"""Repacked experts: the same tokens for more memory. Bits per format are tested in C (tests/c/gemm.c)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from measure.solve_rate import puzzles

import dgemma
from dgemma.cli.run import main

PUZZLE = puzzles(40, 1)[0].prompt


def can_repack() -> bool:
    try:
        dgemma.Model(repack="1G").close()
    except dgemma.BackendError:
        return False
    return True


needs_repacking = pytest.mark.skipif(not can_repack(), reason="no instruction set here has a repacked form")


def expert_bytes(model: Any) -> int:
    """Q8_0: 34 bytes per 32 values; the sizes of the Sudoku model are whole strips of 16 rows."""
    return 3 * model.config.d_model * model.config.d_expert * 34 // 32


def in_kib(size: int) -> str:
    """A size below a million bytes needs a unit; the fraction is exact in decimals."""
    return f"{size / 1024:.12f}K"


@pytest.fixture(scope="module")
def logits(bundled: Any) -> Iterator[Any]:
    yield all_logits(bundled)


def all_logits(model: Any) -> Any:
    with model.session() as session:
        session.encode(model.prompt_ids(PUZZLE))
        return session.denoise(np.arange(96) % 64)


@needs_repacking
@pytest.mark.parametrize("experts", [1, 2.5, 9, None])
def test_repacked_experts_give_the_same_tokens(bundled: Any, logits: Any, experts: float | None) -> None:
    """One; two, with memory left over; more than a layer's; all."""
    budget = "1G" if experts is None else in_kib(int(experts * expert_bytes(bundled)))
    with dgemma.Model(repack=budget) as model:
        assert np.array_equal(all_logits(model), logits)
        assert model.generate(PUZZLE, seed=3).ids == bundled.generate(PUZZLE, seed=3).ids


@needs_repacking
def test_memory_for_less_than_an_expert_is_refused_with_the_size_of_one(bundled: Any) -> None:
    one = expert_bytes(bundled)
    with pytest.raises(dgemma.Error, match=rf"^repack: .* {one} bytes of one expert, got {one - 1}$"):
        dgemma.Model(repack=in_kib(one - 1))


def test_a_backend_that_cannot_repack_says_so() -> None:
    for options in ({"backend": "reference"}, {"exact": True}):
        with pytest.raises(dgemma.Error, match="repack is not available"):
            dgemma.Model(repack="1G", **options)
        dgemma.Model(repack=0, **options).close()


@needs_repacking
def test_dg_run_repacks() -> None:
    plain, repacked = (CliRunner().invoke(main, ["-p", PUZZLE, "--quiet", *more]) for more in ([], ["--repack", "1G"]))
    assert plain.exit_code == repacked.exit_code == 0 and plain.output == repacked.output != ""


def test_dg_run_refuses_what_is_no_size() -> None:
    done = CliRunner().invoke(main, ["-p", PUZZLE, "--repack", "plenty"])
    assert done.exit_code == 2 and "'--repack': 'plenty' is no size such as" in done.output
