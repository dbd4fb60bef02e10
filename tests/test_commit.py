"""`commit`: the beginning of a canvas is final before the rest, and what was told of it is never taken back."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models.tidy import tasks

import dgemma
from dgemma.model import bundled


@pytest.fixture(scope="module")
def tidy() -> Iterator[dgemma.Model]:
    with dgemma.Model(bundled("tidy")) as model:
        yield model


ASKED = [case.messages for task in ("indent", "sort", "json") for case in tasks.cases(task, 2)]


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(ASKED), st.sampled_from([1e-4, 0.02, 0.5, 10]), st.integers(0, 9), st.sampled_from([5, 48, 96]))
def test_what_is_final_is_the_beginning_of_what_comes(
    tidy: dgemma.Model, messages: list, commit: float, seed: int, most: int
) -> None:
    told: list[int] = []
    start = 0  # of the canvas, in the answer
    before: dgemma.Step | None = None
    for event in tidy.stream(messages, commit=commit, seed=seed, max_tokens=most, steps=12):
        if isinstance(event, dgemma.Step):
            assert event.final[: len(told) - start] == told[start:], "taken back"
            told = told[:start] + event.final
            grown = len(event.final)
            assert list(event.canvas[:grown]) == event.final and list(event.next[:grown]) == event.final
            if before is not None and before.block == event.block:  # each of them settled at one step
                assert not event.entropy[: len(before.final)].any() and event.accepted[:grown].all()
                same = event.canvas[:grown] == before.canvas[:grown]
                assert same.all() and (event.entropy[:grown] <= np.float32(commit)).all()
            else:
                assert grown == 0, "nothing is the same as before at the first step"
            before = event
        elif isinstance(event, dgemma.Block):
            assert event.ids[: len(told) - start] == told[start:], "taken back at the end"
            told = told[:start] + event.ids
            start = len(told)
        else:
            assert event.ids == told


def test_it_is_final_before_the_canvas_is_and_the_canvas_ends_with_the_answer(tidy: dgemma.Model) -> None:
    """Where all up to the end id is final, no step more is taken: what stands behind it says nothing."""
    case = tasks.cases("indent", 1)[0]
    steps = [e for e in tidy.stream(case.messages, commit=0.001, stability=40) if isinstance(e, dgemma.Step)]
    assert any(step.final and not step.converged for step in steps)
    assert steps[-1].converged and tidy.tokenizer.decode(steps[-1].final) == case.answer
    assert len(steps) < 40, "stability alone would have taken as long"


def test_holes_are_final_from_the_front_as_well(tidy: dgemma.Model) -> None:
    holes = next(h for h in tasks.holes("infill", "upper", 5))
    from measure.success_rate import canvas_of, prompt_of

    given = canvas_of(tidy, holes)
    *events, result = tidy.stream(prompt_of(tidy, holes.case), **given, commit=0.5)
    finals = [e.final for e in events if isinstance(e, dgemma.Step)]
    assert all(result.ids[: len(final)] == final for final in finals)


def test_without_it_nothing_is_final_before_the_end(tidy: dgemma.Model) -> None:
    plain = list(tidy.stream(ASKED[0], seed=3))
    assert not any(event.final for event in plain if isinstance(event, dgemma.Step))
    assert plain[-1].ids == tidy.generate(ASKED[0], seed=3, effort="reference").ids
    with pytest.raises(dgemma.UsageError, match=r"commit 0\.1 is not of the published sampler"):
        tidy.generate(ASKED[0], effort="reference", commit=0.1)
