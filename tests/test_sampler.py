"""The sampler against a NumPy transcription of the published rules, given the same random draws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from measure.solve_rate import puzzles
from support.cases import Case

import dgemma
from dgemma._native import ffi, lib


def draws(seed: int, block: int, step: int, n: int, n_vocab: int) -> tuple[np.ndarray, np.ndarray]:
    u, ids = np.empty(n), np.empty(n, np.int32)
    lib.dg_draw(seed, block, step, n, n_vocab, ffi.from_buffer("double[]", u), ffi.from_buffer("int32_t[]", ids))
    return u, ids


# ---- the transcription: numpy, float64, one rule a function ----


def choose(z: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per row of scaled logits: entropy in nats, argmax, and the inverse-CDF sample."""
    d = z.astype(np.float64) - z.max(-1, keepdims=True)
    p = np.exp(d)
    total = p.sum(-1)
    entropy = np.log(total) - (p * d).sum(-1) / total
    sample = (p.cumsum(-1) > (u * total)[:, None]).argmax(-1)
    return np.maximum(entropy, 0).astype(np.float32), z.argmax(-1), sample


def accept(entropy: np.ndarray, bound: float) -> np.ndarray:
    order = np.argsort(entropy, kind="stable")
    before = np.concatenate([[0.0], np.cumsum(entropy[order].astype(np.float64))[:-1]])
    accepted = np.zeros(len(entropy), bool)
    accepted[order] = before <= np.float32(bound)
    return accepted


def transcribed(session, o: dict, n: int, n_vocab: int, block: int = 0):
    """One canvas: yields (argmax canvas, entropy, accepted, next canvas, stop) per step."""
    canvas = draws(o["seed"], block, 0, n, n_vocab)[1]
    history: list[np.ndarray] = []
    z = None
    for left in range(o["steps"], 0, -1):
        temperature = np.float32(o["t_min"] + (o["t_max"] - o["t_min"]) * left / o["steps"])
        z = session.denoise(canvas, condition=z) / temperature
        u, noise = draws(o["seed"], block, o["steps"] - left + 1, n, n_vocab)
        entropy, argmax, sample = choose(z, u)
        accepted = accept(entropy, o["entropy_bound"])
        k = o["stability"]
        stable = k == 0 or (len(history) >= k and all((argmax == past).all() for past in history[-k:]))
        stop = stable and entropy.astype(np.float64).mean() < o["confidence"]
        history.append(argmax)
        canvas = np.where(accepted, sample, noise).astype(np.int32)
        yield argmax, entropy, accepted, canvas, stop
        if stop:
            return


# ---- the promises ----


@pytest.mark.parametrize("backend", dgemma.backends())
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"steps": 5, "seed": 1},
        {"stability": 0, "confidence": 1e9, "seed": 2},  # stops at the first step
        {"stability": 3, "seed": 3},
        {"steps": 1, "seed": 4},
        {"entropy_bound": 1e9, "seed": 5},  # accepts everything
        {"entropy_bound": 0.0, "steps": 8, "seed": 6},
        {"t_min": 0.0, "t_max": 0.05, "seed": 7},
        {"confidence": 0.0, "steps": 6, "seed": 8},  # never stops early
    ],
    ids=str,
)
def test_generation_follows_the_rules_step_by_step(options, backend):
    puzzle = puzzles(48, 1)[0]
    with dgemma.Model(backend=backend, exact=True) as model, model.session() as session:
        session.encode(model.prompt_ids(puzzle.prompt))
        settings = {**model.settings(**options)}
        rules = transcribed(session, settings, model.config.canvas_length, model.config.n_vocab)
        steps = [event for event in model.stream(puzzle.prompt, **options) if isinstance(event, dgemma.Step)]
        for step, (argmax, entropy, accepted, _, stop) in zip(steps, rules, strict=True):
            where = f"step {step.index}"
            assert (step.canvas == argmax).all(), where
            assert np.allclose(step.entropy, entropy, rtol=1e-4, atol=2e-5), where
            assert (step.accepted == accepted).all(), where
            assert step.converged == stop, where


rows = st.lists(st.lists(st.floats(-30, 30, width=32), min_size=5, max_size=5), min_size=1, max_size=6)


@given(rows, st.integers(0, 2**32 - 1))
def test_choice_is_entropy_argmax_and_inverse_cdf(z, seed):
    """Ties included: equal logits give the lowest id."""
    array = np.array(z, np.float32)
    u = np.random.default_rng(seed).uniform(1e-6, 1 - 1e-6, len(array))
    out = ffi.new("dg_choice[]", len(array))
    lib.dg_choose(ffi.from_buffer("float[]", array), len(array), array.shape[1], ffi.from_buffer("double[]", u), out)
    entropy, argmax, sample = choose(array, u)
    for i, choice in enumerate(out):
        assert choice.argmax == argmax[i]
        assert choice.sample == sample[i]
        assert choice.entropy == pytest.approx(entropy[i], abs=1e-6)


def accepted(entropy: np.ndarray, bound: float) -> np.ndarray:
    """Ask the library."""
    out, error = np.zeros(len(entropy), np.bool_), ffi.new("dg_error *")
    arrays = ffi.from_buffer("float[]", entropy), len(entropy), bound, ffi.from_buffer("bool[]", out)
    assert lib.dg_accept(*arrays, error) == lib.DG_OK
    return out


# few different values: many ties
entropies = st.lists(st.sampled_from([0.0, 0.01, 0.03, 0.05, 0.1, 2.0, np.inf, np.nan]), min_size=1, max_size=64)


@settings(max_examples=300)
@given(entropies, st.sampled_from([0.0, 0.03, 0.1, 0.25, 1e9]))
def test_acceptance_is_by_entropy_then_position(entropy, bound):
    """NaN comes last."""
    array = np.array(entropy, np.float32)
    assert (accepted(array, bound) == accept(array, bound)).all()


@pytest.mark.parametrize("n", [1, 20, 1024])
def test_most_certain_position_is_always_accepted(n):
    """Nothing stands before it, so even a bound of 0 lets it through: a canvas always moves."""
    for seed in range(50):
        entropy = np.random.default_rng(seed).uniform(0.5, 3, n).astype(np.float32)
        assert np.flatnonzero(accepted(entropy, 0.0)).tolist() == [entropy.argmin()]


def test_draws_do_not_depend_on_their_neighbours():
    u, ids = draws(3, 1, 4, 96, 64)
    fewer = draws(3, 1, 4, 10, 64)
    assert (u[:10] == fewer[0]).all() and (ids[:10] == fewer[1]).all()
    assert ((u > 0) & (u < 1)).all() and ((ids >= 0) & (ids < 64)).all()


@pytest.mark.parametrize("seed", range(6))
def test_an_answer_is_canvas_after_canvas_until_an_end_id(random_model, seed):
    """Each finished canvas is encoded, the last is not; the answer stops before the first end id or at max_tokens."""
    model = random_model
    n, v, most = model.config.canvas_length, model.config.n_vocab, 80
    o = model.settings(steps=3, seed=seed)
    prompt = list(range(20, 60))
    with model.session() as session:
        session.encode(prompt)
        answer, steps, ended = [], 0, False
        for block in range(-(-most // n)):
            if block:
                session.encode(argmax.astype(np.int32))  # noqa: F821 (of the canvas before)
            canvas_steps = list(transcribed(session, o, n, v, block))
            argmax = canvas_steps[-1][0]
            steps += len(canvas_steps)
            ends = np.flatnonzero(np.isin(argmax, model.config.end_ids))
            ended = len(ends) > 0
            answer += argmax[: ends[0] if ended else n].tolist()
            if ended:
                break
    result = model.generate(prompt, max_tokens=most, steps=3, seed=seed)
    assert result.ids == answer[:most]
    assert result.steps == steps
    assert result.finish_reason == ("stop" if len(answer) < most and ended else "length")
    assert len(result.blocks) == block + 1


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    """Every id is about as likely as another, so that answers end here and there."""
    folder = tmp_path_factory.mktemp("random")
    case = Case("random", seed=9, shape=dict(layers=2, hidden=64, canvas=32, eos=[1, 6, *range(100, 108)]))
    with dgemma.Model(case.convert(folder / "hf", folder / "random.gguf"), exact=True) as model:
        yield model
