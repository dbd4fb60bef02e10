"""dg-bench: synthetic files, the profile, the peaks, and the command, on a shape that runs at once."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from gguf import GGUFReader, dequantize
from support.commands import Inside

import dgemma
from dgemma.bench import synthetic
from dgemma.bench.decoding import told as decoding_told
from dgemma.bench.device import rates_of
from dgemma.bench.flops import BY_NAME, keys_seen, pass_operations, step_bytes, step_operations
from dgemma.bench.machine import Machine, Memory, Peak, apart, best_of, measure_machine
from dgemma.bench.measure import Times
from dgemma.bench.profile import Profile, parts
from dgemma.bench.synthetic import SHAPES, Synthetic, blueprint, config_of, make
from dgemma.cli.bench import main
from dgemma.config import Config
from dgemma.convert.recipe import RECIPES
from dgemma.errors import SystemFailure, UsageError
from dgemma.model import bundled

TINY = Synthetic("tiny")


INSIDE = Inside(main, "dg-bench")
run, refused = INSIDE.run, INSIDE.refused


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def tiny(cache: Path) -> Path:
    return make(cache, TINY)


# ---- Synthetic files ----


@pytest.mark.parametrize("kind", RECIPES)
def test_a_synthetic_file_is_a_model_for_everyone(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """gguf-py reads it, the runtime runs it, and weights are as large as they should be, across pieces too."""
    monkeypatch.setattr(synthetic, "PIECE", 5000)
    path = make(tmp_path, Synthetic("tiny", layers=7, type=kind))
    for tensor in GGUFReader(path).tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        assert np.isfinite(values).all(), tensor.name
        if values.size > 5000 and "ffn_gate_inp" not in tensor.name:
            assert values.std() * np.sqrt(values.shape[-1]) == pytest.approx(1, abs=0.1), tensor.name
    with dgemma.Model(path) as model, model.session() as session:
        assert model.config.sliding == (True,) * 5 + (False, True)
        session.encode(np.arange(20))
        logits = session.denoise(np.arange(32))
    assert np.isfinite(logits).all()
    assert 0.2 < logits.std() < 0.8


def test_no_two_slices_are_alike(tiny: Path):
    tensors = {tensor.name: tensor for tensor in GGUFReader(tiny).tensors}
    seen: set[bytes] = set()
    slices = 0
    for layer in range(6):
        for expert in tensors[f"blk.{layer}.ffn_gate_up_exps.weight"].data:
            seen.add(expert.tobytes())
            slices += 1
    assert len(seen) == slices == 48


def test_a_file_is_made_once(cache: Path, tiny: Path):
    before = tiny.stat()
    calls: list[int] = []
    assert make(cache, TINY, lambda done, total: calls.append(done)) == tiny
    assert (tiny.stat().st_mtime_ns, calls) == (before.st_mtime_ns, [])


def test_a_file_that_was_cut_or_changed_is_made_again(tmp_path: Path):
    path = make(tmp_path, TINY)
    whole = path.read_bytes()
    for broken in (whole[:-1], b"GGUX" + whole[4:]):
        path.write_bytes(broken)
        calls: list[tuple[int, int]] = []
        make(tmp_path, TINY, lambda done, total, calls=calls: calls.append((done, total)))
        assert path.read_bytes() == whole
        assert calls[-1] == (len(whole), len(whole))


def test_another_seed_is_another_model(tmp_path: Path, tiny: Path):
    other = make(tmp_path, Synthetic("tiny", seed=1))
    assert other.name != tiny.name
    assert other.stat().st_size == tiny.stat().st_size
    assert other.read_bytes()[-4096:] != tiny.read_bytes()[-4096:]


def test_the_published_shape_has_the_published_sizes():
    """The data section of the published Q4_K_M and Q8_0 files, to the byte."""
    for kind, size in (("q4_k_m", 16_790_985_600), ("q8_0", 26_863_006_592)):
        plan = blueprint(Synthetic("26b-a4b", type=kind))
        assert plan.file_bytes - len(plan.header) == size
        assert len(plan.tensors) == 692


def test_the_backbone_for_llama_cpp_has_its_names(tmp_path: Path):
    reader = GGUFReader(make(tmp_path, Synthetic("tiny", architecture="gemma4")))
    assert reader.get_field("general.architecture").contents() == "gemma4"
    assert reader.get_field("gemma4.attention.head_count_kv").contents() == [2, 2, 2, 2, 2, 1]
    assert not [key for key in reader.fields if key.startswith("diffusion")]
    names = {tensor.name for tensor in reader.tensors}
    assert "blk.0.ffn_gate_up_exps.weight" in names
    assert not [name for name in names if "self_cond" in name or "enc_layer" in name]


def test_an_unknown_shape_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="26b-a4b"):
        make(tmp_path, Synthetic("7b"))


# ---- What is counted ----


def published() -> Config:
    values: dict[str, Any] = config_of(Synthetic("26b-a4b")).values
    config = object.__new__(Config)
    object.__setattr__(config, "_values", values)
    return config


def test_operations_are_those_of_the_published_model():
    """A short prompt, in units of 10^9."""
    work = step_operations(published(), 200)
    table = {"projections": 568, "dense": 274, "experts": 731, "head": 378}
    assert {part: round(work[part] / 1e9) for part in table} == table
    assert sum(work.values()) / 1e9 == pytest.approx(2411, rel=0.005)


def test_keys_are_counted_as_masks_have_them():
    config = published()
    assert keys_seen(config, 0, 256, 5000, causal=False) == 256 * (256 + 1023)
    assert keys_seen(config, 5, 256, 5000, causal=False) == 256 * 5256
    assert keys_seen(config, 5, 3, 4, causal=True) == 5 + 6 + 7
    assert keys_seen(config, 0, 3, 1022, causal=True) == 1023 + 1024 + 1024


def test_the_last_layer_of_a_prompt_only_fills_the_cache():
    config = published()
    whole, cut = (pass_operations(config, 256, 0, causal=True, output=output) for output in (True, False))
    assert whole["experts"] * 29 == cut["experts"] * 30
    assert whole["projections"] - cut["projections"] == 2 * 256 * 2816 * 2 * 8192


def test_bytes_of_a_step_are_the_file_without_the_encoders_scalars(tiny: Path):
    with dgemma.Model(tiny) as model:
        sizes = step_bytes(model)
    all_of_it = sum(int(tensor.n_bytes) for tensor in GGUFReader(tiny).tensors)
    assert sum(sizes.values()) == pytest.approx(all_of_it - 6 * 4, rel=0.001)
    assert sizes.keys() <= parts().keys()
    assert {part for _, part in BY_NAME if part} <= parts().keys()


# ---- The library's measurements ----


def test_a_profile_books_every_part_and_adds_up(tiny: Path):
    with dgemma.Model(tiny) as model, model.session() as session:
        session.encode(np.arange(20))
        want = session.denoise(np.arange(32))
        with Profile(model) as profile:
            assert set(profile.lap().values()) == {0.0}
            assert (session.denoise(np.arange(32)) == want).all()
            first = profile.lap()
            session.denoise(np.arange(32), condition=want)
            second = profile.lap()
        assert (session.denoise(np.arange(32)) == want).all()
    assert [part for part, seconds in first.items() if seconds == 0] == ["condition"]
    assert [part for part, seconds in second.items() if seconds == 0] == []


def test_nothing_is_timed_unless_it_is_asked_for(tiny: Path):
    from dgemma._native import ffi, lib

    entry = ffi.new("dg_profile_entry *")
    with dgemma.Model(tiny) as model:
        assert not lib.dg_profile_read(model._open_handle().pointer, 0, entry)
        with Profile(model):
            assert lib.dg_profile_read(model._open_handle().pointer, 0, entry)
            assert not lib.dg_profile_read(model._open_handle().pointer, -1, entry)
            assert not lib.dg_profile_read(model._open_handle().pointer, 1 << 20, entry)
        assert not lib.dg_profile_read(model._open_handle().pointer, 0, entry)


def test_peaks_are_plausible():
    machine = measure_machine(1)
    assert 5e8 < machine.clock_hz < 1e10
    assert [peak.kind for peak in machine.peaks][-1] == "memory"
    for peak in machine.peaks:
        assert peak.one > 1e8 and peak.all > 1e8, peak
        if peak.kind != "memory":  # 2 units of 512 bits at the most
            assert peak.one / machine.clock_hz < 600, peak


def test_memory_is_watched():
    with Memory() as memory:
        held = np.ones(1 << 24, np.uint8)
        assert held.sum()
    if memory.peak is None:
        pytest.skip("this system does not tell")
    assert memory.peak["all"] >= memory.peak["anonymous"] > 1 << 24


def test_the_better_of_two_measurements_counts():
    machines = [
        Machine("x", hz, 2, [Peak("int8", "y", one, all_)]) for hz, one, all_ in ((3e9, 5.0, 6.0), (2e9, 4.0, 9.0))
    ]
    best = best_of(*machines)
    assert (best.clock_hz, best.peaks) == (3e9, [Peak("int8", "y", 5.0, 9.0)])
    assert best.best("int8") == 9.0 and best.best("float32") is None


# ---- The command ----

LABELS = ["attention projections", "attention core", "dense FFN", "experts", "router", "norms", "output head"]
LABELS += ["self-conditioning", "**the whole step**", "encoding 64 tokens", "a canvas of 16 steps"]


def test_the_table_is_complete_and_json_says_the_same(capsys, cache: Path, tiny: Path, tmp_path: Path):
    file = tmp_path / "figures.json"
    arguments = ("--shape", "tiny", "--cache", cache, "--runs", 2, "--threads", 2, "-o", file)
    status, out, err = run(capsys, *arguments)
    assert (status, err) == (0, "")
    rows = [line for line in out.splitlines() if line.startswith("| ")]
    for label in LABELS:
        assert [row for row in rows if row.startswith(f"| {label}")], label
    assert "flat logits" in out and "int8" in out

    told = json.loads(file.read_text())
    assert told["schema"] == 1
    assert told["model"]["shape"] == "tiny" and told["model"]["threads"] == 2 and told["model"]["layers"] == 6
    assert told["settings"]["runs"] == 2 and told["settings"]["temperature"] == 0.05
    assert [row["part"] for row in told["step"]["parts"]] == [*parts(), "rest"]
    for name in ("step", "flat"):
        seconds = told[name]["seconds"]
        assert seconds["min"] <= seconds["median"] <= seconds["max"] and len(seconds["runs"]) == 2
        whole = sum(row["seconds"]["median"] for row in told[name]["parts"])
        assert whole == pytest.approx(seconds["median"], rel=0.01)
    head = next(row for row in told["step"]["parts"] if row["part"] == "head")
    assert head["operations"] == 2 * 32 * 256 * 512 and head["exact"]
    speed = head["operations"] / head["seconds"]["median"]
    assert head["operations_per_second"] == pytest.approx(speed)
    assert head["operations_per_cycle"] == pytest.approx(speed / told["clock_hz"] / 2)
    assert [row["tokens"] for row in told["encoding"]] == [64, 256]
    assert told["memory"]["peak"] > told["memory"]["anonymous"] > 0
    assert told["against"] is None


def lib_measures_a_device() -> bool:
    with dgemma.Model() as model:
        return rates_of(model) is not None


def test_canvases_together_are_timed_part_by_part(capsys, cache: Path, tmp_path: Path):
    file = tmp_path / "figures.json"
    flags = ["--shape", "tiny", "--cache", cache, "--runs", 2, "--prompt", 8]
    code, out, err = run(capsys, *flags, "--canvases", 3, "--long", 40, "-o", file)
    assert code == 0, err
    figures = json.loads(file.read_text())
    told, behind = figures["together"], figures["behind"]
    assert told["canvases"] == 3 and len(told["ratios"]) == 2 and told["ratio"] > 0
    assert told["parts"].keys() == {"all", *parts()}
    assert "a step of 3 canvases" in out and f"the ratio is {told['ratio']:.3f}" in out
    assert behind["lengths"] == [8, 40] and behind["ratio"] == behind["seconds"][1] / behind["seconds"][0]
    assert "behind 40 tokens" in out and f"{behind['ratio']:.3f}" in out
    assert figures["device"] is None and not lib_measures_a_device()


def test_a_chart_of_a_file_with_any_name(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    model = tmp_path / (os.fsdecode(b"m$\\frac$\x1b]0;\xff") + ".gguf")
    shutil.copy(bundled("tidy"), model)
    code, _, err = run(capsys, model, "--runs", 1, "--plot", tmp_path / "a.svg")
    assert code == 0, err
    ElementTree.parse(tmp_path / "a.svg")


def test_a_budget_is_measured_and_predicted(capsys, tiny: Path, tmp_path: Path):
    """Before and after: what is predicted from the machine and the first layer, and what steps then take and read."""
    out_file = tmp_path / "figures.json"
    status, out, err = run(capsys, tiny, "--ram", "1G", "--runs", "1", "-o", out_file)
    assert (status, err) == (0, "")
    assert "within 1.0 GiB" in out and "a step, predicted" in out and "weights that stay" in out
    budget = json.loads(out_file.read_text())["budget"]
    assert budget["ram"] == 1 << 30 and budget["predicted"] > 0 and budget["streamed"] == 0
    assert 0.9 * tiny.stat().st_size < budget["resident"] < tiny.stat().st_size
    assert refused(capsys, 1, tiny, "--ram", "1M").endswith("for a context of 1024 tokens\n")


def test_a_model_of_ones_own_and_the_bundled_one(capsys, tiny: Path):
    status, out, _ = run(capsys, tiny, "--runs", 1, "--prompt", 3)
    assert status == 0 and "Temperature 0.6" in out and "flat logits" not in out
    status, out, _ = run(capsys, "--runs", 1, "--prompt", 3)
    assert status == 0 and "sudoku" in out


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_a_plot_is_a_picture(capsys, cache: Path, tmp_path: Path, kind: str):
    pytest.importorskip("matplotlib")
    picture = tmp_path / f"step.{kind}"
    status, _, err = run(capsys, "--shape", "tiny", "--cache", cache, "--runs", 1, "--plot", picture)
    assert (status, err) == (0, "")
    start = picture.read_bytes()[:100]
    assert start.startswith(b"\x89PNG") if kind == "png" else start.startswith(b"<?xml")


@pytest.mark.parametrize(
    ("missing", "flags"), [("llama_cpp", ("--against", "llama-cpp")), ("matplotlib", ("--plot", "step.png"))]
)
def test_a_missing_package_is_told_in_one_line(capsys, tmp_path: Path, monkeypatch, missing: str, flags):
    """And before anything is made or measured."""
    monkeypatch.setitem(sys.modules, missing, None)
    err = refused(capsys, 1, "--shape", "tiny", "--cache", tmp_path, *flags)
    assert flags[0] in err and "pip install 'dgemma[bench]'" in err
    assert list(tmp_path.iterdir()) == []


def test_wrong_usage_is_refused(capsys, tiny: Path, tmp_path: Path):
    assert "give one" in refused(capsys, 2, tiny, "--shape", "tiny")
    assert "--layers" in refused(capsys, 2, tiny, "--layers", 3)
    assert "--against" in refused(capsys, 2, tiny, "--against", "llama-cpp")
    assert "7b" in refused(capsys, 2, "--shape", "7b")
    assert "--runs" in refused(capsys, 2, tiny, "--runs", 0)
    assert ".svg" in refused(capsys, 2, tiny, "--plot", "step.gif")
    assert "no folder" in refused(capsys, 1, tiny, "-o", tmp_path / "none" / "x.json")
    assert "missing.gguf" in refused(capsys, 1, tmp_path / "missing.gguf")


def test_help_names_every_shape(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert all(name in out for name in SHAPES)


def test_the_batch_from_which_decoding_writes_more():
    """A canvas of 100 tokens in 12, 16, 20 steps of a second, the first and its encoding a quarter of one each."""
    theirs = {1: Times([1.0]), 4: Times([1.0]), 16: Times([2.0]), 64: Times([4.0])}
    ours = decoding_told(100, 0.25, Times([1.0]), Times([0.25]), theirs)["ours"]
    assert [row["tokens_per_second"] for row in ours] == [100 / 11.5, 100 / 15.5, 100 / 19.5]
    assert [row["crossover"] for row in ours] == [64, 16, 16]
    assert decoding_told(100, 0.1, Times([0.1]), Times([0.1]), theirs)["ours"][0]["crossover"] is None


def test_llama_cpp_runs_the_same_backbone(capsys, cache: Path, tmp_path: Path):
    pytest.importorskip("llama_cpp")
    file = tmp_path / "figures.json"
    arguments = ("--shape", "tiny", "--cache", cache, "--runs", 1, "--against", "llama-cpp", "-o", file)
    status, out, _ = run(capsys, *arguments, "--plot", tmp_path / "step.svg")
    assert status == 0 and "times as fast" in out
    writing = json.loads(file.read_text())["against"]["writing"]
    assert [row["batch"] for row in writing["theirs"]] == [1, 4, 16, 64]
    assert all(row["tokens_per_second"] > 0 for row in writing["theirs"] + writing["ours"])
    took = (
        writing["first_step_seconds"] + 11 * writing["step_seconds"]["median"] + writing["encoding_seconds"]["median"]
    )
    assert writing["ours"][0]["tokens_per_second"] == pytest.approx(32 / took)
    assert "<svg" in (tmp_path / "step-writing.svg").read_text()
    rows = json.loads(file.read_text())["against"]["rows"]
    assert [row["tokens"][0] for row in rows] == [256, 1024, 32]
    assert all(row["ratio"] > 0 for row in rows)


def test_what_another_process_measures_comes_back_and_so_does_how_it_fails() -> None:
    assert apart(divmod, 7, 2) == (3, 1)
    with pytest.raises(ValueError, match="invalid literal"):
        apart(int, "x")
    with pytest.raises(SystemFailure, match="the process that measures this machine ended with 3"):
        apart(os._exit, 3)
