"""Canvases that a caller begins: pins stay, holes are filled, and what ends in a hole goes no further."""

from __future__ import annotations

from itertools import pairwise

import gguf
import numpy as np
import pytest
from measure.solve_rate import puzzles
from support.cases import Case
from test_sampler import accept, choose, draws

import dgemma
from dgemma.convert import convert

CASES = 1000
SHAPE = dict(layers=2, hidden=32, ffn=32, heads=2, kv_heads=1, head_dim=16, global_head_dim=16, experts=4, canvas=8)
ENDS, PAD = (1, *range(100, 115)), 0
PROMPT = [2, 7, 9]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A small random model with many end ids, whose pad id has an embedding of zero: see transcribed()."""
    folder = tmp_path_factory.mktemp("pins")
    case = Case("pins", seed=3, shape=dict(SHAPE, vocab=480, eos=list(ENDS)))
    path = folder / "pins.gguf"
    convert(case.write(folder / "hf"), path, type="q8_0")
    reader = gguf.GGUFReader(path, "r+")
    next(t for t in reader.tensors if t.name == "token_embd.weight").data[PAD] = 0
    reader.data.flush()
    return path


@pytest.fixture(scope="module")
def small(file):
    with dgemma.Model(file, exact=True) as model:
        yield model


def start(seed: int, most: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Ids, and which of them are pinned: any share of them, in runs."""
    random = np.random.default_rng(seed)
    n = int(random.integers(1, most + 1))
    pinned = np.repeat(random.random(n) < random.random(), random.integers(1, 6, n))[:n]
    return np.where(pinned, random.integers(0, 480, n), -1), pinned


def kept(canvases: list[dgemma.Step], ids: np.ndarray, pinned: np.ndarray) -> tuple[dict[int, int], bool]:
    """What the rules keep of finished canvases, by place, and whether a hole's end was the end."""
    found: dict[int, int] = {}
    ended = False
    for step in canvases:
        for place, token in enumerate(step.canvas.tolist(), step.place):
            if pinned[place]:
                ended, found[place] = False, int(ids[place])
            elif not ended:
                ended = token in ENDS
                if not ended and token != PAD:
                    found[place] = token
    return found, ended


# ---- pins ----


@pytest.mark.parametrize("backend", dgemma.backends())
def test_pinned_tokens_are_the_same_at_every_step(file, backend):
    """1,000 random cases on every backend: up to three canvases, pins anywhere, end and pad ids among them.

    In each: pins certain and accepted at every step; the answer is what the rules keep, and the cache holds that alone.
    """
    several = 0
    with dgemma.Model(file, backend=backend, threads=1) as model, model.session() as session:
        for seed in range(CASES):
            ids, pinned = start(seed)
            session.prompt(PROMPT)
            *events, result = session.stream(canvas=ids, pinned=pinned, seed=seed, steps=1 + seed % 3)
            canvases: list[dgemma.Step] = []
            for event in events:
                if isinstance(event, dgemma.Step):
                    here = slice(event.place, event.place + len(event.canvas))
                    fixed = pinned[here]
                    assert (event.canvas[fixed] == ids[here][fixed]).all(), f"case {seed}"
                    assert (event.entropy[fixed] == 0).all() and event.accepted[fixed].all(), f"case {seed}"
                    free = event.entropy[~fixed].astype(np.float64)
                    assert event.mean_entropy == pytest.approx(free.mean(), rel=1e-5, abs=1e-7), f"case {seed}"
                    canvases = [*(c for c in canvases if c.place != event.place), event]
            shown = {place for c in canvases for place in range(c.place, c.place + len(c.canvas))}
            given = {int(p): int(ids[p]) for p in np.flatnonzero(pinned)}
            found, ended = kept(canvases, ids, pinned)
            assert dict(zip(result.places, result.ids, strict=True)) == given | found, f"case {seed}"
            assert result.places == sorted(result.places) and shown | set(given) >= set(result.places)
            assert result.finish_reason == ("stop" if ended or pinned[-1] else "length"), f"case {seed}"
            before = [token for block in result.blocks[:-1] for token in block.ids]
            assert session.ids == PROMPT + before and session.length == len(session.ids), f"case {seed}"
            several += len(result.blocks) > 1
    assert several > CASES / 3


def transcribed(session, o: dict, ids: np.ndarray, pinned: np.ndarray, block: int):
    """One canvas by the published rules and those for pins: yields (argmax canvas, entropy, accepted) per step.

    A pin has no self-conditioning: its row is all the pad id, whose embedding is zero. Or it has that of its own id.
    """
    certain = ids if o["pins_conditioned"] else np.full(len(ids), PAD)
    n, v = len(ids), session.model.config.n_vocab
    canvas = np.where(pinned, ids, draws(o["seed"], block, 0, n, v)[1])
    z, last, unchanged = None, None, 0
    for index in range(o["steps"]):
        t = np.float32(o["t_min"] + (o["t_max"] - o["t_min"]) * (o["steps"] - index) / o["steps"])
        if z is not None:
            z[pinned] = np.where(np.arange(v) == certain[pinned, None], 1e4, 0)
        z = session.denoise(canvas, condition=z) / t
        u, noise = draws(o["seed"], block, index + 1, n, v)
        entropy, argmax, sample = choose(z, u)
        entropy[pinned], argmax[pinned], sample[pinned] = 0, ids[pinned], ids[pinned]
        accepted = accept(entropy, o["entropy_bound"]) | pinned
        canvas = np.where(accepted, sample, noise)
        unchanged = unchanged + 1 if last is not None and (argmax == last).all() else 0
        last = argmax
        yield argmax, entropy, accepted
        if unchanged >= o["stability"] and entropy[~pinned].astype(np.float64).mean() < o["confidence"]:
            return


@pytest.mark.parametrize("backend", dgemma.backends())
@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_holes_are_denoised_around_pins_by_the_rules(file, backend, seed, conditioned):
    ids, pinned = start(100 + seed)
    ids, pinned = np.append(ids, [5, -1]), np.append(pinned, [True, False])
    options = {
        "seed": seed,
        "steps": 5,
        "entropy_bound": 3.0,
        "t_min": 0.02,
        "t_max": 0.05,
        "pins_conditioned": conditioned,
    }
    with dgemma.Model(file, backend=backend, exact=True) as model, model.session() as session:
        steps = [s for s in model.stream(PROMPT, canvas=ids, pinned=pinned, **options) if isinstance(s, dgemma.Step)]
        settings = model.settings(**options)
        session.encode(PROMPT)
        seen = 0
        for block in sorted({s.block for s in steps}):
            of_block = [s for s in steps if s.block == block]
            here = slice(of_block[0].place, of_block[0].place + len(of_block[0].canvas))
            if block:
                finished = [step for step, after in pairwise(steps) if step.block < min(after.block, block)]
                behind, _ = kept(finished, ids, pinned)
                behind |= {int(p): int(ids[p]) for p in np.flatnonzero(pinned) if p < here.start}
                session.rewind(len(PROMPT))
                if behind:
                    session.encode([behind[p] for p in sorted(behind)])
            rules = transcribed(session, settings, ids[here], pinned[here], block)
            for step, (argmax, entropy, accepted) in zip(of_block, rules, strict=True):
                where = f"canvas {block} step {step.index}"
                assert (step.canvas == argmax).all(), where
                assert np.allclose(step.entropy, entropy, rtol=1e-3, atol=2e-5), where
                assert (step.accepted == accepted).all(), where
                seen += 1
    assert seen


@pytest.mark.parametrize("blanks", [30, 44, 51])
def test_a_canvas_of_holes_alone_is_no_canvas(bundled, blanks):
    puzzle = puzzles(blanks, 1)[0]
    free = bundled.generate(puzzle.prompt, seed=blanks)
    holes = bundled.generate(puzzle.prompt, seed=blanks, canvas=[-1] * 96, pinned=[False] * 96)
    assert (holes.ids, holes.steps, holes.finish_reason) == (free.ids, free.steps, free.finish_reason)
    assert free.places is None and holes.places == list(range(len(free.ids)))


def test_a_canvas_of_pins_alone_takes_no_step(bundled):
    ids = bundled.tokenizer.encode("123456789\n" * 21)
    result = bundled.generate("1", canvas=ids, pinned=[True] * len(ids))
    assert (result.ids, result.steps, result.converged, len(result.blocks)) == (ids, 0, True, 3)


def test_a_later_turn_sees_only_what_was_kept(small):
    """Behind a canvas with a hole that ended early, the cache is that of the kept tokens, to the bit."""
    ids, pinned = np.full(12, -1), np.zeros(12, bool)
    ids[10:], pinned[10:] = 7, True
    for seed in range(40):
        with small.session() as session, small.session() as fresh:
            session.encode(PROMPT)
            result = session.generate(canvas=ids, pinned=pinned, seed=seed, steps=1)
            if len(result.blocks[0].ids) in (0, 8):
                continue
            fresh.encode(PROMPT)
            fresh.encode(result.blocks[0].ids)
            assert session.length == fresh.length < 11
            assert (session.denoise([5] * 8) == fresh.denoise([5] * 8)).all()
            return
    pytest.fail("no hole ended early")


def test_canvases_that_make_no_sense_are_refused(bundled):
    for canvas, pinned, message in (
        ([5], None, "pinned is missing"),
        (None, [True], "canvas is missing"),
        ([5, 6], [True], r"pinned must be bool \(2,\)"),
        ([5, 6], [1, 0], "pinned must be bool"),
        ([], np.zeros(0, bool), "empty canvas"),
        ([64], [True], r"canvas\[0\] is 64, outside"),
        ([5] * 1100, [False] * 1100, "a canvas of 1100 .*1024"),
    ):
        with pytest.raises(dgemma.UsageError, match=message):
            bundled.generate("1", canvas=canvas, pinned=pinned)
    with pytest.raises(dgemma.UsageError, match="no max_tokens"):
        bundled.generate("1", canvas=[5], pinned=[True], max_tokens=5)
    with pytest.raises(TypeError, match="whole numbers"):
        bundled.generate("1", canvas=[0.5], pinned=[True])
