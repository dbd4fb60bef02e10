"""The CUDA backend runs whole models: over the emulation (`make test-cuda-emulated`) or on a GPU, against the CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cases import GOLDEN, Case, Ours, relative_error, trajectory
from test_numbers import WHERE, damage, offsets  # noqa: F401

import dgemma
from dgemma._native import ffi, lib
from dgemma.bench import device
from dgemma.bench.plan import Machine, placed, rates

pytestmark = pytest.mark.cuda
GOLDEN_FILES = Path(__file__).parent / "golden"
SUDOKU = Path(__file__).parent.parent / "runtime" / "dgemma" / "models" / "sudoku-q8_0.gguf"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("golden")
    return {case.name: case.convert(folder / case.name, folder / f"{case.name}.gguf") for case in GOLDEN}


def test_it_is_listed():
    assert "cuda" in dgemma.backends()


def test_a_forked_process_is_refused_the_parents_model(files):
    """In words, whatever it asks, and it ends; the parent goes on."""
    with dgemma.Model(files[GOLDEN[0].name], backend="cuda") as model, model.session() as session:
        ids = model.generate([2, 7], steps=2).ids
        pid = os.fork()
        if pid == 0:
            said = []
            for use in (model.session, lambda: session.encode([7]), lambda: model.generate([2, 7], steps=2)):
                try:
                    use()
                except dgemma.BackendError as refused:
                    said.append("a model on a GPU cannot be used in a forked process" in str(refused))
            session.close()
            model.close()
            os._exit(0 if said == [True] * 3 else 1)
        assert os.waitpid(pid, 0)[1] == 0
        assert model.generate([2, 7], steps=2).ids == ids


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


@pytest.mark.parametrize(("tensor", "message"), WHERE, ids=[tensor for tensor, _ in WHERE])
def test_damaged_weights_are_named(tensor: str, message: str, tmp_path, offsets):  # noqa: F811
    """As on the CPU: NaN is not rounded away."""
    path = damage(tmp_path / "bad.gguf", offsets, tensor)
    with dgemma.Model(path, backend="cuda") as model, pytest.raises(dgemma.NumbersError, match=re.escape(message)):
        model.generate("123", steps=2, max_tokens=8, short_canvas=True)


def test_a_step_is_told_beside_its_floor(large, monkeypatch):
    """The parts of dg-bench that a GPU alone has: its own rates, canvases with their encoding, what a plan promises."""
    monkeypatch.setattr(device, "TYPICAL", 2)
    vram = least_vram(large / "busy") + (1 << 20)
    with dgemma.Model(large / "busy", backend="cuda", vram=vram) as model:
        options = dict(temperature=0.5, runs=1, seed=0, say=lambda line: None)
        told = device.time_device(model, prompt=8, weights=10**6, **options)
        assert told["vram"] == vram and told["rates"]["memory"] > 0 and told["rates"]["copies"] > 0
        assert told["floor"] == 10**6 / told["rates"]["memory"] and told["tokens_per_second"] == 8 / told["canvas"]
        assert told["copied"] > 0 and min(told[queue] for queue in ("copying", "gpu", "cpu")) > 0
        assert told["wall"] >= told["gpu"]
        fast, slow = (Machine("", "", "", dict.fromkeys(rates(), speed)) for speed in (1e10, 1e9))
        assert placed(model, slow, 8).seconds == pytest.approx(10 * placed(model, fast, 8).seconds, rel=0.2)
        behind = device.time_behind(model, (8, 40), **options)
        assert behind["lengths"] == [8, 40] and behind["ratio"] > 0


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


@pytest.mark.parametrize("spilled, status", [(0, 0), (8, 1)])
def test_a_hot_kernel_that_spills_fails_make_cubins(spilled: int, status: int, tmp_path):
    """On any target, and only one that its source marks as hot."""
    source = tmp_path / "some.cu"
    source.write_text("__global__ void DG_HOT(128) busy(float *y) {}\n__global__ void rare(float *y) {}\n")
    for target, bytes_ in (("75", 0), ("80", spilled)):
        log = "".join(
            f"ptxas info    : Compiling entry function '_Z4{name}Pf' for 'sm_{target}'\n"
            f"    16 bytes stack frame, {spills} bytes spill stores, 0 bytes spill loads\n"
            "ptxas info    : Used 40 registers, used 0 barriers, 512 bytes smem\n"
            for name, spills in (("busy", bytes_), ("rare", 24))
        )
        (tmp_path / f"some.sm_{target}.log").write_text(log)
    command = [sys.executable, Path(__file__).parent / "cuda" / "report.py", tmp_path, source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    assert ("busy is hot and spills" in done.stderr) == (status == 1)
    assert "rare" in done.stdout and "rare" not in done.stderr


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
    for vram in (None, "1G"):  # a RAM budget's experts come from the disk, and no plan of a device's has them there
        with pytest.raises(dgemma.UsageError, match=r"a budget of RAM is for the CPU.*its own is vram"):
            dgemma.Model(file, backend="cuda", ram="1G", vram=vram)


# Many experts, of which few are met: the processor computes what does not fit. Few, all of them with much to do: to
# copy them is faster than what one processor computes, and no rounding chooses another.
WIDE = Case("wide", prompt=8, seed=5, shape=dict(
    layers=2, hidden=64, ffn=64, expert_ffn=128, experts=64, top_k=2, heads=2, kv_heads=1, global_kv_heads=1,
    head_dim=32, global_head_dim=32, window=24, canvas=8, vocab=500))  # fmt: skip
BUSY = Case("busy", prompt=8, seed=6, shape=dict(
    layers=2, hidden=128, ffn=64, expert_ffn=640, experts=8, top_k=8, heads=2, kv_heads=1, global_kv_heads=1,
    head_dim=32, global_head_dim=32, window=24, canvas=8, vocab=500))  # fmt: skip
LARGE = {"wide": WIDE, "busy": BUSY}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A file of each. Plans are made for one processor."""
    from dgemma.convert import convert

    folder, before = tmp_path_factory.mktemp("large"), os.sched_getaffinity(0)
    for name, kind in (("wide", "f32"), ("busy", "q8_0")):
        convert(LARGE[name].write(folder / f"{name}-hf"), folder / name, type=kind)
    os.sched_setaffinity(0, {min(before)})
    yield folder
    os.sched_setaffinity(0, before)


@cache
def least_vram(file: Path) -> int:
    """The smallest budget, to 4 KiB: between what is told, which leaves some room, and nothing."""
    with pytest.raises(dgemma.MemoryBudgetError) as e:
        dgemma.Model(file, backend="cuda", vram="1M")
    enough = int(float(re.search(r"at least ([\d.]+) GiB", str(e.value))[1]) * 2**30)
    too_few = enough - (32 << 20)
    while enough - too_few > 4096:
        middle = (enough + too_few) // 2
        try:
            dgemma.Model(file, backend="cuda", vram=middle).close()
            enough = middle
        except dgemma.MemoryBudgetError:
            too_few = middle
    return enough


@dataclass
class Made:
    """What a model under a budget makes of a prompt, where its experts were, and what moved."""

    tokens: tuple
    logits: np.ndarray
    homes: dict[str, int]
    moved: Any
    routing: np.ndarray


def run_under(file: Path, backend: str = "cuda", vram: int | None = None, exact: bool = False, save=False) -> Made:
    case = LARGE[file.name]
    prompt, canvases = case.inputs()
    with dgemma.Model(file, backend=backend, exact=exact, vram=vram) as model, model.session(context=64) as session:
        plan, moved, handle = ffi.new("dg_plan *"), ffi.new("dg_overlap *"), model._open_handle().pointer
        lib.dg_model_placed(handle, plan)
        lib.dg_overlap_watch(handle, True)
        session.encode(prompt)
        logits = session.denoise(canvases[0])
        made = session.generate(seed=2, steps=2, max_tokens=8)
        lib.dg_overlap_read(handle, moved)
        if save:
            model.save_routing()
        homes = {
            home: sum(sum(plan.blocks[way][0 : model.config.n_layer]) for way in ways)
            for home, ways in {"device": [0], "copied": [1, 3], "cpu": [2, 4]}.items()
        }
        return Made((list(made.ids), made.steps), logits, homes, moved, model.routing)


under = cache(run_under)


@pytest.mark.parametrize("name, there", [("wide", {"device", "cpu"}), ("busy", {"device", "copied", "cpu"})])
def test_experts_that_do_not_fit_change_no_token(name: str, there: set[str], large):
    """Exactly: the CPU's tokens, whether experts are there, pass by or are left to the CPU."""
    made = under(large / name, vram=least_vram(large / name) + (1 << 20), exact=True)
    assert {home for home, blocks in made.homes.items() if blocks} == there
    assert made.moved.cpu > 0 and (made.moved.copied > 0) == ("copied" in there)
    assert made.tokens == under(large / name, backend="cpu", exact=True).tokens


def test_where_all_experts_fit_none_is_left_to_the_cpu(large):
    """The rates that plans assume are guesses: they decide only what must be decided."""
    made = under(large / "busy")
    assert made.homes == {"device": 16, "copied": 0, "cpu": 0} and made.moved.cpu == made.moved.copied == 0


def test_a_plan_is_repeatable_and_plans_agree(large):
    """The same plan gives the same bits; another one agrees as backends do."""
    some, all_there = least_vram(large / "busy") + (1 << 20), under(large / "busy")
    made, again = (run_under(large / "busy", vram=some) for _ in range(2))
    assert (again.tokens, again.homes) == (made.tokens, made.homes) and (again.logits == made.logits).all()
    assert all(made.homes.values())
    error = relative_error(made.logits, all_there.logits)
    assert error <= 2e-2, f"{made.homes} and {all_there.homes} are {error:.1e} apart"


def test_experts_that_were_used_stay_on_the_device(large, tmp_path):
    """By the counts beside the file, as under a budget of RAM: those that no token met are left to the CPU."""
    file = tmp_path / "wide"
    file.symlink_to(large / "wide")
    vram = least_vram(large / "wide") + (7 << 20)
    first, second = (run_under(file, vram=vram, exact=True, save=True) for _ in range(2))
    most, there = max((counts > 0).sum() for counts in first.routing), first.homes["device"] // 2
    assert first.homes["cpu"] > 0 and first.homes["copied"] == 0 and most < there, (first.homes, most)
    assert second.tokens == first.tokens
    assert first.moved.cpu > 0 and second.moved.passes > 0 and second.moved.cpu == 0


def with_memory(tmp_path: Path, all_kib: int, free_kib: int, file: Path, vram: int) -> str:
    """Where experts of a session are within that budget, or why there is none, where Linux tells of so much RAM."""
    told = tmp_path / "meminfo"
    told.write_text(f"MemTotal: {all_kib} kB\nMemFree: 1 kB\nMemAvailable: {free_kib} kB\n")
    code = f"""if True:
        import dgemma
        from dgemma._native import ffi, lib
        try:
            with dgemma.Model({str(file)!r}, backend="cuda", vram={vram}) as model, model.session(64) as session:
                session.generate("a", steps=1, max_tokens=1)
                plan = ffi.new("dg_plan *")
                lib.dg_model_placed(model._open_handle().pointer, plan)
                print(*(sum(plan.blocks[way][0 : model.config.n_layer]) for way in range(lib.DG_WAYS)))
        except dgemma.MemoryBudgetError as e:
            print(e)"""
    mounted = ["unshare", "-rm", "sh", "-c", 'mount --bind "$0" /proc/meminfo || exit 99; exec "$@"', str(told)]
    done = subprocess.run([*mounted, sys.executable, "-c", code], capture_output=True, text=True)
    if "unshare" in done.stderr or done.returncode == 99:
        pytest.skip(f"no file systems of one's own here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ram_for_what_is_copied_is_there_before_anything_is_loaded(large, tmp_path):
    """Page-locked memory cannot be swapped: where there is too little of it, what would do is told, and does."""
    file, vram = large / "busy", least_vram(large / "busy") + (1 << 20)
    assert under(file, vram=vram).homes["copied"] > 0
    said = with_memory(tmp_path, 24 << 20, 40, file, vram)
    assert re.search(r"busy: a VRAM budget of 0\.\d\d GiB leaves experts to be copied from page-locked RAM", said), said
    enough = int(float(re.search(r"a VRAM budget of at least ([\d.]+) GiB", said)[1]) * 2**30)
    assert enough > vram
    assert with_memory(tmp_path, 24 << 20, 40, file, enough).split()[1] == "0"
    assert with_memory(tmp_path, 24 << 20, 4 << 20, file, vram).split()[1] != "0"


def test_what_ram_does_not_hold_is_left_to_the_cpu(large, tmp_path):
    """From the map: neither page-locked, nor read and copied at every step."""
    file, vram = large / "busy", least_vram(large / "busy") + (1 << 20)
    short = 8 * ((1216 << 10) + 1024) // 7  # KiB: the margin is an eighth and 1 GiB, the process takes 192 MiB
    there, copied, cpu, read_and_copied, read = map(int, with_memory(tmp_path, short, 1 << 20, file, vram).split())
    assert read > 0 and read_and_copied == copied == 0, (there, copied, cpu, read_and_copied, read)


SMALL = Case("small", prompt=30, seed=7, shape=dict(
    layers=2, hidden=32, ffn=32, expert_ffn=32, experts=4, top_k=2, heads=2, kv_heads=1, global_kv_heads=1,
    head_dim=16, global_head_dim=16, window=8, canvas=12, vocab=500))  # fmt: skip


def test_generators_together_make_their_own_tokens(tmp_path):
    """Canvases of several sessions in one pass: every draw, acceptance and next canvas is the CPU's, exactly; and in
    fast arithmetic each makes what it makes alone."""
    file = SMALL.convert(tmp_path / "small", tmp_path / "small.gguf")
    prompt, _ = SMALL.inputs()

    def run(backend: str, exact: bool, seeds: tuple[int, ...]) -> list[list[tuple]]:
        told: list[list[tuple]] = [[] for _ in seeds]
        error, events = ffi.new("dg_error *"), ffi.new("dg_event[]", len(seeds))
        generators, sampling = ffi.new("dg_generator *[]", len(seeds)), ffi.new("dg_sampling *")
        with dgemma.Model(file, backend=backend, exact=exact) as model, ExitStack() as stack:
            for i, seed in enumerate(seeds):
                session, out = stack.enter_context(model.session(context=64)), ffi.new("dg_generator **")
                session.encode(prompt[: 10 * seed])
                lib.dg_sampling_default(model._open_handle().pointer, sampling)
                sampling.seed, sampling.steps, sampling.max_tokens = seed, 1 + seed, 24
                sampling.t_min, sampling.confidence = 0.2 * seed, 0  # whole canvases at temperatures of their own
                assert lib.dg_generator_new(session._handle.pointer, sampling, out, error) == 0
                stack.callback(lib.dg_generator_free, out[0])
                generators[i] = out[0]
            while any(event.kind != lib.DG_EVENT_DONE for event in events):
                assert lib.dg_generators_next(generators, len(seeds), events, error) == 0, ffi.string(error.message)
                for i, event in enumerate(events):
                    rows = [list(each[0 : event.n]) for each in (event.canvas, event.next, event.accepted) if each]
                    if event.kind == lib.DG_EVENT_STEP:
                        told[i].append((event.block, event.index, *rows, event.converged))
        return told

    together = run("cuda", True, (1, 3))
    assert together == run("cpu", True, (1, 3))
    assert [[step[:2] for step in steps] for steps in together] == [
        [(block, index) for block in (0, 1) for index in range(1 + seed)] for seed in (1, 3)
    ]
    assert run("cuda", False, (1, 3)) == [run("cuda", False, (seed,))[0] for seed in (1, 3)]
