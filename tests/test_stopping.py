"""What our sampler has beside the published one: early stops, short canvases, retries. All off unless asked for."""

from __future__ import annotations

import numpy as np
import pytest
from measure.solve_rate import puzzles

import dgemma

HARD = puzzles(54, 3)
END = 1


def steps_of(model: dgemma.Model, prompt: object, **options: object) -> tuple[list[dgemma.Step], dgemma.Result]:
    *events, result = model.stream(prompt, **options)
    return [event for event in events if isinstance(event, dgemma.Step)], result


@pytest.fixture(scope="module")
def unstopped(bundled):
    """Steps and results of HARD with the published sampler, by max_tokens."""
    kept: dict = {}

    def look_up(max_tokens: int = 96) -> list:
        if max_tokens not in kept:
            asked = [(puzzle.prompt, seed) for seed, puzzle in enumerate(HARD)]
            kept[max_tokens] = [
                steps_of(bundled, prompt, seed=seed, max_tokens=max_tokens)[0] for prompt, seed in asked
            ]
        return kept[max_tokens]

    return look_up


@pytest.mark.parametrize("plateau", [3, 6])
def test_a_plateau_gives_a_canvas_up(bundled, unstopped, plateau):
    """The first step that has no clear new low of the mean entropy, nor had those before it, is the last."""
    stopped = 0
    for seed, puzzle in enumerate(HARD):
        free = unstopped()[seed]
        low, since, last = free[0].mean_entropy, 0, len(free)
        for step in free[1:]:
            clear = step.mean_entropy < np.float32(0.9) * np.float32(low)
            low, since = (step.mean_entropy, 0) if clear else (low, since + 1)
            if since == plateau:
                last = step.index + 1
                break
        steps, result = steps_of(bundled, puzzle.prompt, seed=seed, plateau=plateau)
        assert len(steps) == last and all((a.canvas == b.canvas).all() for a, b in zip(steps, free, strict=False))
        assert result.converged == free[last - 1].converged
        stopped += last < len(free)
    assert stopped


@pytest.mark.parametrize("max_tokens", [96, 30])
def test_settled_looks_at_the_answer_alone(bundled, unstopped, max_tokens):
    """Up to the first end id or max_tokens: the first step at which that is stable and certain is the last."""
    earlier = 0
    for seed, puzzle in enumerate(HARD):
        free = unstopped(max_tokens)[seed]
        last, before = len(free), None
        for step in free:
            ends = np.flatnonzero(step.canvas[:max_tokens] == END)
            part = slice(ends[0] + 1 if len(ends) else max_tokens)
            same = before is not None and (step.canvas[part] == before[part]).all()
            before = step.canvas
            if same and step.entropy[part].astype(np.float64).mean() < 0.005:
                last = step.index + 1
                break
        steps, result = steps_of(bundled, puzzle.prompt, seed=seed, max_tokens=max_tokens, settled=True)
        assert len(steps) == last and steps[-1].converged == (last < 48 or free[-1].converged)
        assert result.converged == steps[-1].converged
        earlier += last < len(free)
    assert earlier or max_tokens == 96


def test_short_canvases_are_no_longer_than_what_is_left(bundled):
    for most, lengths in ((30, [30]), (96, [96]), (130, [96, 34])):
        steps, result = steps_of(bundled, "." * 200, max_tokens=most, steps=1, short_canvas=True)
        assert [len(step.canvas) for step in steps] == lengths[: len(result.blocks)] and len(result.ids) <= most
    steps, _ = steps_of(bundled, "." * 200, max_tokens=30, steps=1)
    assert len(steps[0].canvas) == 96


FAULTY = {("\n", 0): "empty", (puzzles(30, 1)[0].prompt, 0): None}  # with two steps


@pytest.mark.parametrize(("prompt", "seed"), FAULTY)
def test_a_degenerate_answer_is_told_and_drawn_again(bundled, prompt, seed):
    """From the next seed, until it is none or the retries are used up; the answer is then that of the last seed."""
    options = {"steps": 2, "max_tokens": 96}
    plain = bundled.generate(prompt, seed=seed, **options)
    assert plain.fault == plain.blocks[0].fault == FAULTY[prompt, seed]
    assert (plain.seed, plain.retries) == (seed, 0)
    for retries in (1, 2, 8):
        result = bundled.generate(prompt, seed=seed, retries=retries, **options)
        tries = [bundled.generate(prompt, seed=seed + i, **options) for i in range(retries + 1)]
        used = next((i for i, one in enumerate(tries) if one.fault is None), retries)
        assert (result.retries, result.seed) == (used, seed + used)
        assert (result.ids, result.fault) == (tries[used].ids, tries[used].fault)
        assert result.steps == result.blocks[0].steps == sum(one.steps for one in tries[: used + 1])


def test_a_loop_in_a_later_canvas_is_drawn_again_alone(bundled):
    """Which of these loop, and which of them anew in the same words, depends on the instruction set."""
    options = {"steps": 2, "max_tokens": 200}
    for prompt, seed in ((prompt, seed) for seed in range(100) for prompt in ("11", "1", "12")):
        plain = bundled.generate(prompt, seed=seed, **options)
        at = next((block.index for block in plain.blocks if block.fault), 0)
        if at == 0:
            continue
        assert plain.fault == plain.blocks[at].fault == "loop"
        tail = plain.blocks[at].ids[-48:]
        assert any(tail[period:] == tail[:-period] for period in range(1, 13))
        again = bundled.generate(prompt, seed=seed, retries=1, **options)
        assert (again.retries, again.seed) == (1, seed + 1)
        assert again.blocks[:at] == plain.blocks[:at] and again.blocks[at].steps == 2 * plain.blocks[at].steps
        if again.blocks[at].ids != plain.blocks[at].ids:
            return
    pytest.fail("no canvas that was drawn again is another one")


def test_steps_of_a_retry_are_those_of_the_same_canvas(bundled):
    steps, result = steps_of(bundled, "\n", steps=2, retries=1)
    assert result.retries == 1
    assert [(step.block, step.index) for step in steps] == [(0, 0), (0, 1)] * 2


def test_an_effort_is_its_settings(bundled):
    for name, effort in dgemma.efforts().items():
        file = bundled.settings()
        assert bundled.settings(effort=name) == file | effort.settings
        assert bundled.settings(effort=name, steps=5)["steps"] == 5
    assert bundled.settings(effort=None) == bundled.settings(effort="medium") == bundled.settings()
    with pytest.raises(dgemma.UsageError, match="effort must be low, medium, high, reference, not 'max'"):
        bundled.generate("1", effort="max")
    with pytest.raises(dgemma.UsageError, match="retries 3 is not of the published sampler"):
        bundled.generate("1", effort="reference", retries=3)
    assert bundled.settings(effort="reference", retries=0, steps=7)["steps"] == 7


@pytest.mark.parametrize("name", ["settled", "short_canvas"])
def test_a_flag_is_true_or_false(bundled, name):
    assert bundled.settings(**{name: True})[name] is True
    for value in (1, "yes", 0.0):
        with pytest.raises(TypeError, match=f"{name} must be True or False"):
            bundled.generate("1", **{name: value})
