"""The same numbers as transformers, live: logits, and whole generations with the same random draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from measure.solve_rate import puzzles
from models.tidy import tasks
from support.cases import GOLDEN, Case, Ours, drawn, relative_error, trajectory

import dgemma
from dgemma._native import ffi, lib
from dgemma.convert import convert

pytestmark = pytest.mark.oracle
SUDOKU, TIDY = (Path(__file__).parent / "models" / name for name in ("sudoku", "tidy"))


@pytest.fixture(scope="module")
def hugging_face():
    pytest.importorskip("torch")
    pytest.importorskip("transformers.models.diffusion_gemma")
    from support import hugging_face

    return hugging_face


@pytest.mark.parametrize("case", [*GOLDEN, *map(drawn, range(10, 22))], ids=lambda case: case.name)
def test_logits_are_those_of_transformers(case: Case, hugging_face, tmp_path):
    """Relative error <= 1e-4 and the same argmax, for canvases and for next-token logits, on every backend."""
    file = case.convert(tmp_path / "hf", tmp_path / "model.gguf")
    theirs = trajectory(case, hugging_face.Theirs(hugging_face.load(tmp_path / "hf")))
    for backend in dgemma.backends():
        with dgemma.Model(file, backend=backend, exact=True) as model, model.session() as session:
            ours = trajectory(case, Ours(session))
        for name, logits in theirs.items():
            assert relative_error(ours[name], logits) <= 1e-4, f"{backend}: {name}"
            assert (ours[name].argmax(-1) == logits.argmax(-1)).all(), f"{backend}: {name}: another argmax"


class Draws:
    """Our random draws for one canvas, in the order in which transformers asks for random numbers."""

    def __init__(self, seed: int, n: int, n_vocab: int) -> None:
        self.seed, self.n, self.n_vocab = seed, n, n_vocab
        self.canvases = self.samples = 0

    def draw(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        u, ids = np.empty(self.n), np.empty(self.n, np.int32)
        buffers = ffi.from_buffer("double[]", u), ffi.from_buffer("int32_t[]", ids)
        lib.dg_draw(self.seed, 0, step, self.n, self.n_vocab, *buffers)
        return u, ids

    def canvas(self):
        """In place of EntropyBoundSampler.initialize_canvas: the first canvas, then each step's noise."""
        import torch

        ids = self.draw(self.canvases)[1]
        self.canvases += 1
        return torch.tensor(ids[None], dtype=torch.int64)

    def multinomial(self, probabilities, num_samples):
        """In place of torch.multinomial: the inverse CDF."""
        import torch

        self.samples += 1
        below = probabilities.double().cumsum(-1)
        aim = torch.tensor(self.draw(self.samples)[0])[:, None] * below[:, -1:]
        return (below > aim).int().argmax(-1, keepdim=True)


PROMPTS = {
    **{f"sudoku {blanks}": (SUDOKU, [p.prompt for p in puzzles(blanks, 4)]) for blanks in (30, 44, 51)},
    "tidy": (TIDY, [case.messages for task in ("brackets", "json", "sort", "again") for case in tasks.cases(task, 1)]),
}


@pytest.mark.parametrize(("folder", "prompts"), PROMPTS.values(), ids=PROMPTS)
def test_generation_is_that_of_transformers_to_the_token(folder, prompts, hugging_face, tmp_path, monkeypatch):
    """Its generate(), given our random numbers, takes the same steps to the same canvas."""
    import torch
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSampler

    convert(folder, tmp_path / "model.gguf", type="f32")
    reference = hugging_face.load(folder)
    with dgemma.Model(tmp_path / "model.gguf", exact=True) as model:
        for seed, prompt in enumerate(prompts):
            draws = Draws(seed, model.config.canvas_length, model.config.n_vocab)
            monkeypatch.setattr(EntropyBoundSampler, "initialize_canvas", lambda *_, draws=draws, **__: draws.canvas())
            monkeypatch.setattr(torch, "multinomial", draws.multinomial)
            ids = model.prompt_ids(prompt)
            out = reference.generate(torch.tensor([ids]), max_new_tokens=model.config.canvas_length)
            theirs = out.sequences[0, len(ids) :].tolist()
            end = next(i for i, token in enumerate(theirs) if token in model.config.end_ids)

            result = model.generate(prompt, seed=seed, max_tokens=model.config.canvas_length)
            assert result.ids == theirs[:end], f"prompt {seed}"
            assert result.steps == draws.samples, f"prompt {seed}"


def mean_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Root mean square of the difference, in parts of theirs."""
    return float(np.sqrt(np.square(ours - theirs).mean() / np.square(theirs).mean()))


# An expert that another is chosen for moves all logits of its token: rounded weights are held to the mean.
@pytest.mark.parametrize(("kind", "error", "most"), [("bf16", relative_error, 1e-4), ("q8_0", mean_error, 0.1)])
@pytest.mark.parametrize("name", ["sudoku 30", "tidy"])
def test_logits_of_the_bundled_checkpoints_are_those_of_transformers(name, kind, error, most, hugging_face, tmp_path):
    """Trained weights behind a real prompt, as they are and as they are bundled."""
    folder, prompts = PROMPTS[name]
    convert(folder, tmp_path / "model.gguf", type=kind)
    with dgemma.Model(tmp_path / "model.gguf", exact=True) as model, model.session() as session:
        theirs, ours = hugging_face.Theirs(hugging_face.load(folder)), Ours(session)
        ids = np.array(model.prompt_ids(prompts[0]), np.int32)
        noise = np.random.default_rng(0).integers(0, model.config.n_vocab, model.config.canvas_length, np.int32)
        expected = theirs.encode(ids)
        assert error(ours.encode(ids), expected) <= most, "next token"
        expected = theirs.denoise(noise, None)
        assert error(ours.denoise(noise, None), expected) <= most, "canvas"
        condition = expected / np.float32(0.8)
        expected = theirs.denoise(noise, condition)
        assert error(ours.denoise(noise, condition), expected) <= most, "self-conditioned"
