"""The forward pass: transformers' numbers from golden files, and what must not change a bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.cases import GOLDEN, Case, Ours, relative_error, trajectory

import dgemma

GOLDEN_FILES = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """The golden cases' checkpoints as float32 GGUF files."""
    folder = tmp_path_factory.mktemp("golden")
    return {case.name: case.convert(folder / case.name, folder / f"{case.name}.gguf") for case in GOLDEN}


@pytest.mark.parametrize("backend", dgemma.backends())
@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case.name)
def test_logits_are_those_of_transformers(case: Case, backend: str, files):
    """Prompt, canvases with and without self-conditioning, later canvases; windows smaller than the prompt."""
    with dgemma.Model(files[case.name], backend=backend, exact=True) as model, model.session() as session:
        ours = trajectory(case, Ours(session))
    with np.load(GOLDEN_FILES / f"{case.name}.npz") as golden:
        for name, logits in ours.items():
            error = np.abs(logits[::5] - golden[f"{name}/rows"]).max() / golden[f"{name}/peak"]
            assert error <= 1e-4, f"{name}: relative error {error:.1e}"
            assert (logits.argmax(-1) == golden[f"{name}/argmax"]).all(), f"{name}: another argmax"


@pytest.fixture(scope="module")
def case(files):
    return GOLDEN[0], files[GOLDEN[0].name]


def test_any_number_of_threads_gives_the_same_bits(case):
    outputs = []
    for threads in (1, 2, 3):
        with dgemma.Model(case[1], threads=threads, exact=True) as model, model.session() as session:
            outputs.append(trajectory(case[0], Ours(session)))
    for other in outputs[1:]:
        assert all((other[name] == logits).all() for name, logits in outputs[0].items())


@pytest.mark.parametrize("backend", dgemma.backends())
def test_a_prompt_in_pieces_is_the_prompt(case, backend):
    """However a prompt is cut, the cache behind it is the same to the bit."""
    prompt, canvases = case[0].inputs()
    with dgemma.Model(case[1], backend=backend, exact=True) as model:
        seen = []
        for cuts in ([], [1], [7, 8, 33]):
            with model.session() as session:
                logits = [session.encode(part, logits="all") for part in np.split(prompt, cuts)]
                seen.append((np.concatenate(logits), session.denoise(canvases[0])))
        for encoded, denoised in seen[1:]:
            assert (encoded == seen[0][0]).all()
            assert (denoised == seen[0][1]).all()


def test_a_prompt_longer_than_a_pass_is_encoded_like_a_short_one(tmp_path):
    """600 tokens take three passes; next-token logits of one pass per token agree."""
    long = Case("long", prompt=600, seed=5, shape=dict(layers=2, window=300))
    prompt, canvases = long.inputs()
    file = long.convert(tmp_path / "hf", tmp_path / "long.gguf")
    with dgemma.Model(file, exact=True) as model, model.session() as whole, model.session() as pieces:
        last = whole.encode(prompt, logits="last")
        for part in np.split(prompt, [13, 280, 599]):
            final = pieces.encode(part, logits="last")
        assert (last == final).all()
        assert (whole.denoise(canvases[0]) == pieces.denoise(canvases[0])).all()


def test_rewinding_forgets(case):
    prompt, canvases = case[0].inputs()
    with dgemma.Model(case[1], exact=True) as model, model.session() as session:
        session.encode(prompt)
        want = session.denoise(canvases[0])
        session.encode(canvases[1])
        session.denoise(canvases[2])
        session.rewind(len(prompt))
        assert session.length == len(prompt)
        assert (session.denoise(canvases[0]) == want).all()


def test_denoising_leaves_the_cache_alone(case):
    """The decoder only reads what the encoder wrote."""
    prompt, canvases = case[0].inputs()
    with dgemma.Model(case[1], exact=True) as model, model.session() as session, model.session() as fresh:
        session.encode(prompt)
        for canvas in canvases:
            session.denoise(canvas)
        fresh.encode(prompt)
        assert (session.encode(canvases[0], logits="all") == fresh.encode(canvases[0], logits="all")).all()


def test_sessions_of_one_model_do_not_mix(case):
    prompt, canvases = case[0].inputs()
    with dgemma.Model(case[1], exact=True) as model, model.session() as one, model.session() as other:
        one.encode(prompt)
        other.encode(prompt[::-1].copy())
        mine, yours = one.denoise(canvases[0]), other.denoise(canvases[0])
        assert (one.denoise(canvases[0]) == mine).all()
        assert relative_error(mine, yours) > 1e-3


def test_quantised_files_stay_near_their_source(case, tmp_path):
    """Every type runs on every backend; backends agree on each, and eight bits are nearer than four."""
    from dgemma.convert import convert

    folder = case[0].write(tmp_path / "hf")
    prompt, canvases = case[0].inputs()

    def logits(file, backend):
        with dgemma.Model(file, backend=backend, exact=True) as model, model.session() as session:
            session.encode(prompt)
            return session.denoise(canvases[0])

    exact, errors = logits(case[1], "cpu"), {}
    for kind in ("bf16", "f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0"):
        file = tmp_path / f"{kind}.gguf"
        convert(folder, file, type=kind)
        fast = logits(file, "cpu")
        assert relative_error(fast, logits(file, "reference")) <= 1e-4, kind
        errors[kind] = float(np.sqrt(np.mean((fast - exact) ** 2) / np.mean(exact**2)))
    assert errors["f16"] < errors["q8_0"] < errors["q4_0"], errors
    assert max(errors.values()) < 0.5, errors
