"""A RAM budget: the same tokens, memory that stays within it, the file read as often as must be, faults that are told.

The stream itself is tested in C (tests/c/stream.c). Here models have experts enough that a budget matters.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from measure.solve_rate import puzzles
from test_convert_gguf import halves, rewritten

import dgemma
from dgemma.bench import synthetic
from dgemma.bench.synthetic import SHAPES, Synthetic
from dgemma.cli.info import main as info
from dgemma.cli.run import main as run
from dgemma.convert import convert
from dgemma.eval.baseline import looking, opened
from dgemma.eval.fidelity import fidelity
from dgemma.files.routing import load_routing, routing_path

GIB = 1 << 30
MIB = 1 << 20
PUZZLE = puzzles(40, 1)[0].prompt
PROMPT = [2, *range(600, 640)]
SHAPE = dict(
    layers=3, d_model=1024, d_ffn=512, d_expert=512, n_expert=32, n_expert_used=4, n_head=8, n_head_kv=(4, 2),
    head_dim=(64, 128), sliding_window=64, n_vocab=2048, canvas_length=64, context_length=32768,
)  # fmt: skip
SHARP = dict(t_min=0.05, t_max=0.05, confidence=0.0, stability=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    SHAPES["ram"] = SHAPE
    yield tmp_path_factory.mktemp("ram")
    del SHAPES["ram"]
    SHAPES.pop("wide", None)


@pytest.fixture(scope="module")
def small(folder: Path) -> Path:
    """About 60 MiB, nearly all of it experts."""
    return synthetic.make(folder, Synthetic("ram"))


@pytest.fixture(scope="module")
def large(folder: Path) -> Path:
    """About 200 MiB."""
    return synthetic.make(folder, Synthetic("ram", layers=11))


def least_for(path: Path, **options: Any) -> int:
    """The least budget that a refusal names."""
    with pytest.raises(dgemma.MemoryBudgetError, match="at least") as refusal:
        dgemma.Model(path, ram="1M", **options)
    named = re.search(r"at least ([0-9.]+) GiB", str(refusal.value))
    assert named and str(path) in str(refusal.value)
    return int(float(named[1]) * GIB)


def generated(model: dgemma.Model, steps: int = 3) -> list[int]:
    return model.generate(PROMPT, steps=steps, seed=3, max_tokens=100, **SHARP).ids


# ---- The same tokens ----


@pytest.fixture(scope="module")
def expected(small: Path) -> list[int]:
    with dgemma.Model(small) as model:
        return generated(model)


@pytest.mark.parametrize("more", [0, 16 * MIB, 40 * MIB, GIB])
def test_a_budget_does_not_change_a_token(small: Path, expected: list[int], more: int) -> None:
    """From next to nothing in memory to everything."""
    with dgemma.Model(small, ram=least_for(small) + more) as model:
        assert generated(model) == expected
        traffic = model.traffic
        assert traffic is not None and traffic.experts > 40 * MIB
        if more == GIB:
            assert traffic.streamed == 0 and traffic.read < 1.1 * os.path.getsize(small)
        elif more < 40 * MIB:
            assert traffic.streamed > 0.2 * traffic.experts


def test_the_bundled_model_solves_the_same_puzzle(bundled: Any) -> None:
    for ram in (least_for(bundled.path), GIB):
        with dgemma.Model(ram=ram) as model:
            assert model.generate(PUZZLE, seed=3).ids == bundled.generate(PUZZLE, seed=3).ids


@pytest.mark.parametrize(
    "options", [{"backend": "reference"}, {"exact": True}, {"threads": 1}, {"threads": 3}], ids=str
)
def test_every_backend_and_number_of_threads(small: Path, options: dict[str, Any]) -> None:
    logits = []
    for ram in (None, least_for(small, **options)):
        with dgemma.Model(small, ram=ram, **options) as model, model.session(256) as session:
            session.encode(PROMPT[:3])
            logits.append(session.denoise(PROMPT[:5]))
    assert np.array_equal(*logits)


def test_prompts_of_all_lengths_and_batches(small: Path) -> None:
    """Passes that leave out the last layer's experts, that use few experts, and over several canvases."""

    def work(model: dgemma.Model) -> list[Any]:
        out: list[Any] = []
        with model.session(700) as one, model.session(700) as other:
            one.encode([2])
            out.append(one.encode(list(range(300, 600)), logits="last"))
            other.encode(PROMPT)
            out += model.denoise([(one, PROMPT, None), (other, PROMPT[::-1], None)])
            out.append(other.encode([7, 8, 9], logits="all"))
        return out

    with dgemma.Model(small) as plain, dgemma.Model(small, ram=least_for(small) + 24 * MIB) as model:
        assert all(np.array_equal(a, b) for a, b in zip(work(plain), work(model), strict=True))


def test_split_files_and_separate_gates(small: Path, tmp_path: Path, expected: list[int]) -> None:
    older = rewritten(small, tmp_path / "older.gguf", change=halves)
    parts = convert(older, tmp_path / "split.gguf", "q4_k_m", split_max_size=20 * MIB).paths
    assert len(parts) > 2
    for path in (older, parts[0]):
        with dgemma.Model(path, ram=least_for(path)) as model:
            assert generated(model) == expected
            assert model.traffic is not None and model.traffic.streamed > 0


def test_a_stopped_pass_leaves_nothing_behind(small: Path, expected: list[int]) -> None:
    """Experts that were read for it, or were being read, are not taken for those of the next pass."""
    with dgemma.Model(small, ram=least_for(small)) as model:
        for wait in range(8):
            with model.session() as session:
                timer = threading.Timer(0.004 * wait, session.stop)
                timer.start()
                with suppress(dgemma.Stopped):
                    for _ in range(50):
                        session.encode([5] * 8)
                timer.join()
            assert generated(model) == expected


def test_sessions_of_several_threads_take_turns(small: Path, expected: list[int]) -> None:
    with dgemma.Model(small, ram=least_for(small) + 64 * MIB) as model:
        ids: list[list[int]] = []
        threads = [threading.Thread(target=lambda: ids.append(generated(model))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert ids == [expected] * 3


# ---- Memory ----

CHILD = """
import sys, dgemma
path, ram = sys.argv[1], int(sys.argv[2])
with dgemma.Model(path, ram=ram) as model:
    result = model.generate([2, *range(600, 640)], steps=2, max_tokens=64, t_min=0.05, t_max=0.05, confidence=0.0)
    traffic = model.traffic
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) * 1024, traffic.read, traffic.streamed, traffic.passes)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
@pytest.mark.parametrize("more", [0, 60 * MIB, GIB])
def test_the_process_never_holds_more(large: Path, more: int) -> None:
    """The least, some more, and enough for everything."""
    command = [sys.executable, "-c", CHILD, str(large)]
    refused = subprocess.run([*command, str(MIB)], capture_output=True, text=True, check=False)
    named = re.search(r"MemoryBudgetError.*at least ([0-9.]+) GiB", refused.stderr)
    assert named, refused.stderr
    ram = int(float(named[1]) * GIB) + more
    done = subprocess.run([*command, str(ram)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    most, _, streamed, _ = map(int, done.stdout.split())
    assert most <= ram
    assert (streamed == 0) == (more == GIB)


COMPARING = """
import sys, dgemma
from dgemma.eval.fidelity import fidelity
path, ram = sys.argv[1], int(sys.argv[2])
steps = dict(steps=3, t_min=0.05, t_max=0.05, confidence=0.0)
prompts = [[2, *range(600, 640)], [2, 7, 8]]
found = fidelity(path, path, prompts=prompts, layers=True, options=steps, model={"ram": ram})
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) * 1024, found.kl_mean, found.top1, found.committed, found.worst_layer)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_files_are_compared_within_it(large: Path) -> None:
    """dg-eval, with --layers: the two passes and all that is looked at."""
    command = [sys.executable, "-c", COMPARING, str(large)]
    refused = subprocess.run([*command, str(MIB)], capture_output=True, text=True, check=False)
    named = re.search(r"at least ([0-9.]+) GiB.*\(comparing takes ([0-9.]+) MiB of it\)", refused.stderr)
    assert named, refused.stderr
    ram = int(float(named[1]) * GIB + float(named[2]) * MIB) + 32 * MIB
    done = subprocess.run([*command, str(ram)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    most, *same = done.stdout.split()
    assert int(most) <= ram < os.path.getsize(large) + 200 * MIB
    assert same == ["0.0", "1.0", "1.0", "None"]


def test_what_comparing_takes_is_left_out_of_the_models_budget(folder: Path) -> None:
    """And it takes no more than that: NumPy's arrays, which are counted here, are nearly all of it."""
    SHAPES["wide"] = {**SHAPE, "layers": 2, "d_model": 256, "n_expert": 4, "n_vocab": 65536}
    wide = synthetic.make(folder, Synthetic("wide"))
    taken = looking(wide, layers=True)
    with opened(wide, {"ram": "2G"}, layers=True) as model:
        assert model.ram == 2 * GIB - taken
    tracemalloc.start()
    fidelity(wide, wide, prompts=[PROMPT, PROMPT[:3]], layers=True, options=dict(SHARP, steps=3), model={"ram": "2G"})
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken / 4 < most < taken


def test_a_budget_that_is_too_small_is_refused_with_the_least(small: Path) -> None:
    least = least_for(small)
    dgemma.Model(small, ram=least).close()
    with pytest.raises(dgemma.MemoryBudgetError, match="for a context of 1024 tokens"):
        dgemma.Model(small, ram=least - 64 * MIB)


def test_a_session_that_would_break_it_is_refused(small: Path) -> None:
    with dgemma.Model(small, ram=least_for(small) + 8 * MIB) as model:
        with pytest.raises(
            dgemma.MemoryBudgetError, match=r"a session of 20000 tokens takes .* at least ([0-9.]+) GiB"
        ) as no:
            model.session(20000)
        with model.session() as session:  # as long as there is room for
            assert 1024 <= session.context < 8192
            with pytest.raises(dgemma.MemoryBudgetError, match="other sessions take"):
                model.session(1024)
        with model.session(1024) as session:
            session.encode(PROMPT)
    named = re.search(r"at least ([0-9.]+) GiB", str(no.value))
    assert named
    with dgemma.Model(small, ram=int(float(named[1]) * GIB)) as model, model.session(20000) as session:
        session.encode(PROMPT)


def test_what_makes_no_budget_is_refused(small: Path) -> None:
    for wrong in ("much", -1, 0, True):
        with pytest.raises(dgemma.UsageError, match="ram"):
            dgemma.Model(small, ram=wrong)
    with pytest.raises(dgemma.UsageError, match="repack"):
        dgemma.Model(small, ram="4G", repack="1G")
    with pytest.raises(dgemma.UsageError, match="layers: expected 1 to 3"):
        dgemma.Model(small, layers=4)


# ---- Bytes ----


@pytest.mark.parametrize("more", [0, 24 * MIB])
def test_a_step_reads_what_does_not_stay(small: Path, more: int) -> None:
    """Each expert once, but for those that no token chose and whose turn had not come when that was known."""
    with dgemma.Model(small, ram=least_for(small) + more) as model:
        seen, counts = [], []
        for event in model.stream(PROMPT, steps=12, max_tokens=64, **SHARP):
            if isinstance(event, dgemma.Step):
                seen.append(model.traffic)
                counts.append(model.routing)
    first, last = seen[1], seen[-1]
    steps = len(seen) - 2
    block = last.experts / counts[0].size
    unused = sum(int((after == before).sum()) for before, after in pairwise(counts[1:])) / steps
    each = (last.read - first.read) / steps
    assert last.streamed > 0 and last.copied in (0, last.read)
    assert 0.95 * last.streamed - unused * block <= each <= 1.05 * last.streamed
    assert last.passes == len(seen) + 1


def test_nothing_is_read_before_the_first_pass_and_what_stays_once(small: Path) -> None:
    with dgemma.Model(small, ram=least_for(small) + GIB) as model:
        assert model.traffic is not None and model.traffic.read == model.traffic.passes == 0
        generated(model)
        assert model.traffic.read <= 1.02 * os.path.getsize(small)


# ---- Faults ----


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    target = tmp_path / "copy.gguf"
    target.write_bytes(small.read_bytes())
    return target


def broken(path: Path, harm: Any, words: str) -> None:
    """Harms the file between two steps: the next one fails, and says why; everything can still be closed."""
    with dgemma.Model(path, ram=least_for(path)) as model:
        events = model.stream(PROMPT, steps=20, **SHARP)
        next(events)
        harm()
        with pytest.raises(dgemma.SystemFailure, match=words) as failure:
            list(events)
        assert str(path) in str(failure.value)
        with pytest.raises(dgemma.SystemFailure, match=words):
            generated(model)
        assert model.tokenizer.decode(model.tokenizer.encode("t700"))  # the header is ours


def test_a_file_that_is_cut_is_told(copy: Path) -> None:
    broken(copy, lambda: os.truncate(copy, 20 * MIB), "truncated|had .* bytes and has")


def test_a_file_that_is_emptied_is_told(copy: Path) -> None:
    broken(copy, lambda: os.truncate(copy, 0), "truncated|had .* bytes and has")


def test_a_file_that_is_written_to_is_told(copy: Path) -> None:
    def write() -> None:
        with copy.open("r+b") as file:
            file.seek(30 * MIB)
            file.write(b"x" * 4096)

    broken(copy, write, "written to while it was in use")


def test_a_file_that_is_replaced_is_still_the_one_that_was_opened(
    copy: Path, expected: list[int], tmp_path: Path
) -> None:
    with dgemma.Model(copy, ram=least_for(copy)) as model:
        model.generate(PROMPT, steps=1, **SHARP)
        other = tmp_path / "other"
        other.write_bytes(b"x" * 100 * MIB)
        os.replace(other, copy)
        assert generated(model) == expected


def test_a_stream_that_is_left_ends_the_reading(small: Path) -> None:
    before = threading.active_count()
    for _ in range(5):
        with dgemma.Model(small, ram=least_for(small)) as model:
            next(model.stream(PROMPT, steps=20, **SHARP))
    assert threading.active_count() == before


# ---- Routing ----


def test_every_choice_is_counted(small: Path) -> None:
    with dgemma.Model(small) as model, model.session() as session:
        assert model.routing.shape == (3, 32) and not model.routing.any()
        session.encode(PROMPT)  # the last layer only fills the cache
        assert model.routing.sum(1).tolist() == [4 * len(PROMPT), 4 * len(PROMPT), 0]
        session.denoise(PROMPT)
        assert model.routing.sum(1).tolist() == [8 * len(PROMPT), 8 * len(PROMPT), 4 * len(PROMPT)]


def test_counts_are_kept_added_up_and_used(copy: Path) -> None:
    with dgemma.Model(copy) as model:
        expected = generated(model)
        counts = model.routing
        assert model.save_routing() == routing_path(copy)
        assert np.array_equal(load_routing(routing_path(copy)), counts)
        model.save_routing()
        assert np.array_equal(load_routing(routing_path(copy)), 2 * counts)
    assert sorted(file.name for file in copy.parent.iterdir()) == ["copy.gguf", "copy.gguf.routing.json"]
    with dgemma.Model(copy, ram=least_for(copy) + 24 * MIB) as model:
        assert generated(model) == expected
        used = model.traffic
    os.unlink(routing_path(copy))
    with dgemma.Model(copy, ram=least_for(copy) + 24 * MIB) as model:
        assert generated(model) == expected
        assert used is not None and model.traffic is not None and used.streamed == model.traffic.streamed


@pytest.mark.parametrize("text", ["[]", "{}", '{"version": 1, "tokens": [[1, 2], [3]]}', '{"version": 2}'])
def test_counts_of_another_kind_are_refused_and_never_used(copy: Path, text: str) -> None:
    Path(routing_path(copy)).write_text(text)
    with dgemma.Model(copy, ram="1G") as model, pytest.raises(dgemma.Error, match=r"routing\.json"):
        model.save_routing()
    assert Path(routing_path(copy)).read_text() == text


def test_counts_of_another_shape_are_refused(copy: Path) -> None:
    Path(routing_path(copy)).write_text('{"version": 1, "tokens": [[1, 2], [3, 4]]}')
    with (
        dgemma.Model(copy, ram="1G") as model,
        pytest.raises(dgemma.Error, match=r"2 layers of 2 experts.*3 layers of 32"),
    ):
        model.save_routing()


def test_dg_info_tells_routing(copy: Path) -> None:
    missing = CliRunner().invoke(info, [str(copy), "--routing"])
    assert missing.exit_code == 1 and "--save-routing" in missing.output
    with dgemma.Model(copy) as model:
        generated(model)
        model.save_routing()
        counts = model.routing
    told = json.loads(CliRunner().invoke(info, [str(copy), "--routing", "--json"]).output)
    assert [layer["tokens"] for layer in told["layers"]] == counts.tolist()
    layer = told["layers"][1]
    assert layer["share"] == pytest.approx(np.sort(counts[1])[-4:].sum() / counts[1].sum())
    assert layer["never"] == np.flatnonzero(counts[1] == 0).tolist()
    page = CliRunner().invoke(info, [str(copy), "--routing"]).output
    assert "share of the hottest 4" in page and f"{layer['share']:.0%}" in page
    assert CliRunner().invoke(info, [str(copy), "--routing", "--plan"]).exit_code == 2


# ---- Commands ----


def test_dg_run_keeps_a_budget(copy: Path) -> None:
    arguments = [str(copy), "-p", "t600 t601", "--raw", "--steps", "2", "--json", "--save-routing"]
    plain, within = (CliRunner().invoke(run, [*arguments, *more]) for more in ([], ["--ram", "1G"]))
    assert plain.exit_code == within.exit_code == 0, within.output
    first, second = (json.loads(done.stdout) for done in (plain, within))
    assert first["ids"] == second["ids"] and "traffic" not in first
    assert second["ram"] == GIB and second["traffic"]["read"] > 0
    assert "within 1.0 GiB: " in within.stderr and "waited for the disk" in within.stderr
    assert load_routing(routing_path(copy)).sum() > 0


def test_dg_run_refuses_a_budget_that_is_too_small(small: Path) -> None:
    done = CliRunner().invoke(run, [str(small), "-p", "t600", "--raw", "--ram", "10M"])
    assert done.exit_code == 1 and "at least" in done.output and done.output.startswith("dg-run: ")
    assert CliRunner().invoke(run, [str(small), "-p", "t600", "--ram", "lots"]).exit_code == 2
