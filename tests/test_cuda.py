"""The CUDA backend runs whole models: over the emulation (`make test-cuda-emulated`) or on a GPU, against the CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cases import GOLDEN, Case, Ours, relative_error, trajectory

import dgemma

pytestmark = pytest.mark.cuda
GOLDEN_FILES = Path(__file__).parent / "golden"
SUDOKU = Path(__file__).parent.parent / "runtime" / "dgemma" / "models" / "sudoku-q8_0.gguf"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("golden")
    return {case.name: case.convert(folder / case.name, folder / f"{case.name}.gguf") for case in GOLDEN}


def test_it_is_listed():
    assert "cuda" in dgemma.backends()


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case.name)
def test_exact_logits_are_those_of_transformers(case: Case, files):
    with dgemma.Model(files[case.name], backend="cuda", exact=True) as model, model.session() as session:
        ours = trajectory(case, Ours(session))
    with np.load(GOLDEN_FILES / f"{case.name}.npz") as golden:
        for name, logits in ours.items():
            error = np.abs(logits[::5] - golden[f"{name}/rows"]).max() / golden[f"{name}/peak"]
            assert error <= 1e-4, f"{name}: relative error {error:.1e}"
            assert (logits.argmax(-1) == golden[f"{name}/argmax"]).all(), f"{name}: another argmax"


HEADS_64 = Case("heads-64", prompt=40, seed=3, shape=dict(
    layers=2, hidden=256, ffn=256, expert_ffn=256, experts=4, top_k=4, heads=4, kv_heads=2, global_kv_heads=1,
    head_dim=64, global_head_dim=128, window=24, canvas=20, vocab=700))  # fmt: skip


@pytest.mark.parametrize("kind", ["bf16", "q8_0", "q4_k_m"])
def test_fast_logits_stay_near_the_cpus(kind: str, tmp_path):
    """The same canvases step by step: logits within 2 %, the same argmax for 99 of 100. All experts are used: where two
    are all but equal, rounding may choose the other, and that is no error of an operation."""
    from dgemma.convert import convert

    file = tmp_path / f"{kind}.gguf"
    convert(HEADS_64.write(tmp_path / "hf"), file, type=kind)
    both = []
    for backend, exact in (("cpu", True), ("cuda", False)):
        with dgemma.Model(file, backend=backend, exact=exact) as model, model.session() as session:
            both.append(trajectory(HEADS_64, Ours(session)))
    same, rows = 0, 0
    for name, logits in both[0].items():
        if name == "commit":
            break  # what follows depends on each backend's own argmax
        error = relative_error(both[1][name], logits)
        assert error <= 2e-2, f"{name}: relative error {error:.1e}"
        theirs = both[1][name].argmax(-1)
        tie = logits.max(-1) - np.take_along_axis(logits, theirs[:, None], -1)[:, 0] < 1e-3 * np.abs(logits).max()
        same += int(((logits.argmax(-1) == theirs) | tie).sum())
        rows += len(logits)
    assert same >= 0.99 * rows, f"{same} of {rows} rows have the same argmax"


def sudoku(backend: str, **options):
    """The bundled model on its first test puzzle."""
    prompt = (Path(__file__).parent / "models" / "sudoku" / "puzzle.txt").read_text()
    with dgemma.Model(SUDOKU, backend=backend, exact=options.pop("exact", False)) as model:
        return model.generate(prompt, **options)


def test_the_bundled_model_answers_as_on_the_cpu():
    """Steps are recorded into a graph after the first; exact arithmetic gives the CPU's tokens, step for step."""
    want, got = (sudoku(backend, exact=True, seed=3, steps=3) for backend in ("cpu", "cuda"))
    assert (got.ids, got.steps, got.converged) == (want.ids, want.steps, want.converged)
    cpu, gpu = (sudoku(backend, seed=3, steps=2) for backend in ("cpu", "cuda"))
    assert sum(a != b for a, b in zip(cpu.ids, gpu.ids, strict=True)) <= 3, (cpu.text, gpu.text)


def test_canvases_together_are_canvases_alone(files):
    """One pass over two sessions' canvases gives each the bits it gets alone, and leaves the caches as they were."""
    case = GOLDEN[0]
    prompt, _ = case.inputs()
    with dgemma.Model(files[case.name], backend="cuda", exact=True) as model:
        alone = []
        for seed in (1, 2):
            with model.session() as session:
                session.encode(prompt[: 20 * seed])
                alone.append(list(session.generate(seed=seed, steps=4, max_tokens=64).ids))
        with model.session() as one, model.session() as two:
            condition, canvases = None, [np.arange(32, dtype=np.int32), np.arange(32, dtype=np.int32)[::-1].copy()]
            for session, n in ((one, 20), (two, 40)):
                session.encode(prompt[:n])
            together = model.denoise([(one, canvases[0], condition), (two, canvases[1], condition)])
            for session, canvas, logits in zip((one, two), canvases, together, strict=True):
                assert (session.denoise(canvas) == logits).all()
            again = [list(s.generate(seed=seed, steps=4, max_tokens=64).ids) for s, seed in ((one, 1), (two, 2))]
    assert again == alone


def test_pins_are_the_cpus(files):
    """Pinned ids, conditioned on themselves or on nothing, over two canvases: the CPU's tokens and steps."""
    case = GOLDEN[0]
    prompt, canvases = case.inputs()
    start, pinned = np.concatenate(canvases[:2]), np.arange(64) % 3 == 0
    outputs = []
    for backend in ("cpu", "cuda"):
        with dgemma.Model(files[case.name], backend=backend, exact=True) as model:
            outputs.append([])
            for conditioned in (False, True):
                with model.session() as session:
                    session.encode(prompt)
                    made = session.generate(
                        canvas=start, pinned=pinned, seed=5, steps=5, pins_conditioned=conditioned, entropy_bound=2.0
                    )
                    outputs[-1].append((list(made.ids), made.steps))
    assert outputs[0] == outputs[1]


def test_a_callers_acceptance_is_the_cpus(files):
    """What a caller accepts, and what is final, decide the next canvas, which is told."""
    case = GOLDEN[0]
    prompt, _ = case.inputs()

    def steps(backend: str) -> list[tuple[list[int], list[int], list[int], bool]]:
        with dgemma.Model(files[case.name], backend=backend, exact=True) as model, model.session() as session:
            session.encode(prompt)
            options = dict(seed=4, steps=4, max_tokens=32, plateau=3, commit=9.0, accept=lambda h, _: h <= np.median(h))
            events = [e for e in session.stream(**options) if isinstance(e, dgemma.Step)]
        return [(list(e.canvas), list(e.next), list(e.final), e.converged) for e in events]

    assert steps("cuda") == steps("cpu")


def test_queues_are_told(files):
    """Watched passes give the tokens of recorded ones, and add up."""
    from dgemma._native import ffi, lib

    case, ids = GOLDEN[0], []
    prompt, _ = case.inputs()
    with dgemma.Model(files[case.name], backend="cuda") as model:
        handle, out = model._open_handle().pointer, ffi.new("dg_overlap *")
        assert not lib.dg_overlap_watch(handle, True)  # nothing is placed before the first session
        for watch in (False, True):
            with model.session() as session:
                assert lib.dg_overlap_watch(handle, watch)
                session.encode(prompt)
                ids.append(list(session.generate(seed=1, steps=3, max_tokens=32).ids))
        assert lib.dg_overlap_read(handle, out)
        assert out.passes >= 2 and out.wall >= out.gpu >= 0 and out.copied == 0
    assert ids[0] == ids[1]


PROGRAM = """
import sys, dgemma
try:
    with dgemma.Model(sys.argv[1], backend="cuda") as model:
        print(model.generate("x", seed=1, steps=3).ids)
except dgemma.Error as e:
    print(type(e).__name__, e)
"""


def run(file: Path, **environment: str) -> str:
    command = [sys.executable, "-c", PROGRAM, str(file)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif("DG_SHIM" not in os.environ, reason="on a device there is nothing to rearrange")
def test_the_order_of_what_has_none_changes_no_token():
    """Seeds of the emulation reorder threads, blocks and copies."""
    outputs = {run(SUDOKU, DG_SHIM_SEED=seed) for seed in ("0", "1", "2")}
    assert len(outputs) == 1, outputs
    assert outputs.pop().startswith("[")


@pytest.mark.skipif("DG_SHIM" not in os.environ, reason="a device cannot be taken away")
def test_why_it_cannot_run_is_said():
    assert "no NVIDIA driver" in run(SUDOKU, DG_SHIM_DEVICES="0")
    assert "compute capability 6.1" in run(SUDOKU, DG_SHIM_ARCH="61")
    said = run(SUDOKU, DG_SHIM_MEMORY="1000000")
    assert "MemoryBudgetError" in said and "it takes at least" in said, said


def test_a_budget_of_vram_is_kept_or_refused(files):
    """The least that is told is enough; under it nothing is loaded, and longer sessions are refused by name."""
    file = files[GOLDEN[0].name]
    with pytest.raises(dgemma.MemoryBudgetError, match=r"a VRAM budget of 0\.00 GiB cannot be kept") as e:
        dgemma.Model(file, backend="cuda", vram="1M")
    least = float(re.search(r"at least ([\d.]+) GiB", str(e.value))[1])
    with dgemma.Model(file, backend="cuda", vram=int(least * 2**30)) as model, model.session() as session:
        assert session.context >= 1
    with pytest.raises(dgemma.MemoryBudgetError, match=r"has [\d.]+ GiB free"):
        dgemma.Model(file, backend="cuda", vram="900G")
    with pytest.raises(dgemma.UsageError, match="vram"):
        dgemma.Model(file, backend="cpu", vram="1G")
    with pytest.raises(dgemma.UsageError, match="ram"):
        dgemma.Model(file, backend="cuda", ram="1G")


WIDE = Case("wide", prompt=8, seed=5, shape=dict(
    layers=2, hidden=64, ffn=64, expert_ffn=512, experts=64, top_k=2, heads=2, kv_heads=1, global_kv_heads=1,
    head_dim=32, global_head_dim=32, window=24, canvas=8, vocab=500))  # fmt: skip


def test_experts_that_do_not_fit_change_no_token(tmp_path):
    """Exactly: the CPU's tokens under every budget, whether experts are there, pass by or are left to the CPU."""
    from dgemma.convert import convert

    file = tmp_path / "wide.gguf"
    convert(WIDE.write(tmp_path / "hf"), file, type="f32")
    prompt, _ = WIDE.inputs()
    outputs = []
    experts = 2 * 64 * 3 * 512 * 64 * 4  # more than the margins that a refusal adds to the least
    with pytest.raises(dgemma.MemoryBudgetError) as e:
        dgemma.Model(file, backend="cuda", vram="1M")
    least = int(float(re.search(r"at least ([\d.]+) GiB", str(e.value))[1]) * 2**30)
    budgets = [{"backend": "cuda", "vram": least + more} for more in (0, experts // 3, experts)]
    for options in ({"backend": "cpu"}, *budgets):
        with dgemma.Model(file, exact=True, **options) as model, model.session(context=64) as session:
            session.encode(prompt)
            made = session.generate(seed=2, steps=3, max_tokens=8)
            outputs.append((list(made.ids), made.steps))
    assert outputs[1:] == outputs[:1] * 3
