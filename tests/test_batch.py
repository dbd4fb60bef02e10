"""Canvases of several sessions in one pass: each gets what it would have got alone, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
from measure.solve_rate import puzzles

import dgemma
from dgemma._native import ffi, lib


@pytest.fixture(scope="module", params=[False, True], ids=["fast", "exact"])
def model(request):
    with dgemma.Model(exact=request.param) as model:
        yield model


def canvases(model, lengths=(96, 7, 96)):
    """(session, canvas, condition) with prompts and canvases of different lengths, some conditioned."""
    random = np.random.default_rng(1)
    for i, n in enumerate(lengths):
        session = model.session()
        session.encode(random.integers(0, 64, 40 + 90 * i))
        condition = random.normal(0, 3, (n, 64)).astype(np.float32) if i != 1 else None
        yield session, random.integers(0, 64, n).astype(np.int32), condition


def test_a_batch_gives_what_each_gets_alone(model):
    batch = list(canvases(model))
    together = model.denoise(batch)
    for (session, canvas, condition), logits in zip(batch, together, strict=True):
        assert (session.denoise(canvas, condition) == logits).all()
        session.close()


def test_what_makes_no_batch_is_refused(model):
    with dgemma.Model() as other, other.session() as foreign, model.session() as session:
        session.encode([2, 3])
        foreign.encode([2, 3])
        with pytest.raises(dgemma.UsageError, match="not all of this model"):
            model.denoise([(session, [1], None), (foreign, [1], None)])
        with pytest.raises(dgemma.UsageError, match="of one session"):
            model.denoise([(session, [1], None), (session, [1], None)])
        with pytest.raises(dgemma.UsageError, match="no canvases"):
            model.denoise([])
        with pytest.raises(dgemma.UsageError, match="condition"):
            model.denoise([(session, [1], np.zeros((2, 64), np.float32))])


def test_generators_together_make_their_own_tokens(model):
    """Puzzles that take different numbers of steps, started together, end as they do alone."""
    prompts = [puzzles(blanks, 1)[0].prompt for blanks in (20, 44, 51)]
    alone = [model.generate(prompt, seed=i) for i, prompt in enumerate(prompts)]
    error, events = ffi.new("dg_error *"), ffi.new("dg_event[]", len(prompts))
    sessions, generators = [], ffi.new("dg_generator *[]", len(prompts))
    for i, prompt in enumerate(prompts):
        session = model.session()
        session.encode(model.prompt_ids(prompt))
        sampling, out = ffi.new("dg_sampling *"), ffi.new("dg_generator **")
        lib.dg_sampling_default(model._handle.pointer, sampling)
        sampling.seed = i
        assert lib.dg_generator_new(session._handle.pointer, sampling, out, error) == 0
        sessions.append(session)
        generators[i] = out[0]
    while any(event.kind != lib.DG_EVENT_DONE for event in events):
        assert lib.dg_generators_next(generators, len(prompts), events, error) == 0
    for generator, want in zip(generators, alone, strict=True):
        result = lib.dg_generator_result(generator)
        assert list(result.ids[0 : result.n_ids]) == want.ids
        assert result.steps == want.steps
        lib.dg_generator_free(generator)
