"""Memory that is there: what is free decides, limits of control groups included, and what commands name is true."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.little_memory import MIB, binary, control_group, meminfo, python, run_with

import dgemma
from dgemma._native import ffi, lib
from dgemma.bench.synthetic import SHAPES, Synthetic, blueprint, make
from dgemma.cli.bench import main as bench
from dgemma.cli.eval import main as evaluate
from dgemma.cli.info import main as info
from dgemma.files.bundled import BUNDLED
from dgemma.model import bundled

GIB = 1 << 30
SHAPE = dict(
    layers=24, d_model=1024, d_ffn=512, d_expert=512, n_expert=32, n_expert_used=4, n_head=8, n_head_kv=(4, 2),
    head_dim=(64, 128), sliding_window=64, n_vocab=2048, canvas_length=64, context_length=32768,
)  # fmt: skip
ASKED = ["-p", "t600 t601", "--raw", "--steps", "2", "--seed", "1", "--max-tokens", "64"]


@pytest.fixture(scope="module")
def shaped() -> Iterator[None]:
    SHAPES["little"] = SHAPE
    yield
    del SHAPES["little"]


def hollow(path: Path, model: Synthetic) -> Path:
    """A model's header and, as a hole in the file, its weights: zeros."""
    made = blueprint(model)
    with path.open("wb") as file:
        file.write(made.header)
        file.truncate(made.file_bytes)
    return path


@pytest.fixture(scope="module")
def large(shaped: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More than 400 MiB of random weights."""
    return make(tmp_path_factory.mktemp("memory"), Synthetic("little"))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hollow(tmp_path_factory.mktemp("memory") / "published.gguf", Synthetic("26b-a4b"))


@pytest.fixture(scope="module")
def small(shaped: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that are there, about 40 MiB."""
    return make(tmp_path_factory.mktemp("memory"), Synthetic("little", layers=2))


# ---- What is free ----

READERS = """
from dgemma._native import lib
from dgemma.bench.plan import free_memory
from dgemma.errors import MemoryBudgetError
from dgemma.native.arrays import check_free
try:
    check_free(1 << 40, "giants")
except MemoryBudgetError as refusal:
    print(lib.dg_memory_free(), free_memory(), refusal, sep="\\n")
"""


@pytest.mark.parametrize("version", [1, 2])
def test_every_reader_sees_the_limit_of_a_control_group(tmp_path: Path, version: int) -> None:
    """Its file cache is free, however often it was read."""
    groups = control_group(tmp_path, version, limit=600 * MIB, used=500 * MIB, cached=300 * MIB)
    told = python(groups, meminfo(tmp_path, 8 * GIB), code=READERS).splitlines()
    assert told[:2] == [str(400 * MIB)] * 2
    assert told[2].endswith("and 400.0 MiB of memory are free")


def test_where_memory_is_lower_than_the_limit_it_counts(tmp_path: Path) -> None:
    groups = control_group(tmp_path, 2, limit=600 * MIB, used=100 * MIB, cached=0)
    assert python(groups, meminfo(tmp_path, 300 * MIB), code=READERS).splitlines()[0] == str(300 * MIB)


def test_a_plan_for_this_machine_stays_within_its_limit(tmp_path: Path) -> None:
    groups = control_group(tmp_path, 2, limit=900 * MIB, used=100 * MIB, cached=0)
    command: list[object] = [binary("dg-info"), bundled(), "--plan", "--json"]
    done = run_with(groups, meminfo(tmp_path, 8 * GIB), command=command)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["used"]["ram"]["total"] <= told["budgets"]["ram"] <= told["machine"]["ram"] == 800 * MIB


# ---- --ram auto ----

OPENING = """
import sys, dgemma
with dgemma.Model(sys.argv[1], ram=sys.argv[2]) as model:
    print(model.ram, model.memory.needs, model.memory.free, model.memory.least)
"""


def chosen(tmp_path: Path, path: Path, free: int, ram: str = "auto") -> list[int | None]:
    words = python(meminfo(tmp_path, free), code=OPENING, arguments=(path, ram)).split()
    return [None if word == "None" else int(word) for word in words]


def test_a_file_larger_than_memory_gets_what_is_free_less_a_margin(tmp_path: Path, published: Path) -> None:
    free = 98 * GIB // 10 // 1024 * 1024  # the system tells KiB
    ram, needs, seen, least = chosen(tmp_path, published, free)
    margin = int(lib.dg_plan_margin(free, False))
    assert ram and needs and least and seen == free
    assert free - margin < ram < free - margin + 200 * MIB  # and what the process holds
    assert least < ram < free < 16 * GIB < needs


def test_a_file_that_fits_is_mapped(tmp_path: Path, published: Path) -> None:
    needs = chosen(tmp_path, published, GIB)[1]
    assert needs is not None
    assert chosen(tmp_path, published, needs + 1024)[0] is None
    assert chosen(tmp_path, published, needs - 1024)[0] is not None
    assert chosen(tmp_path, published, needs // 2, "off")[0] is None


def test_where_the_margin_leaves_too_little_the_least_is_chosen(tmp_path: Path, large: Path) -> None:
    ram, _, _, least = chosen(tmp_path, large, 500 * MIB)
    assert ram == least


def test_where_nothing_helps_the_file_is_mapped(tmp_path: Path, published: Path) -> None:
    ram, needs, free, least = chosen(tmp_path, published, GIB)
    assert ram is None and needs and free == GIB and least and least > 2 * GIB


def test_dg_run_goes_on_within_what_is_free_and_says_so(tmp_path: Path, large: Path) -> None:
    told = meminfo(tmp_path, 500 * MIB)
    flags = {"auto": [], "quiet": ["--quiet"], "off": ["--ram", "off"], "size": ["--ram", "450M"]}
    done = {name: run_with(told, command=[binary("dg-run"), large, *ASKED, "--json", *f]) for name, f in flags.items()}
    found = {name: json.loads(each.stdout) for name, each in done.items()}
    line = next(line for line in done["auto"].stderr.splitlines() if " takes " in line)
    assert re.fullmatch(
        r"diffusion-gemma-little-\S+ takes \d+\.\d MiB and 500\.0 MiB of memory are free: it runs within \d+\.\d MiB,"
        r" experts are read again at every step; --ram SIZE or off says otherwise",
        line,
    )
    assert done["quiet"].stderr == "" and not any(" takes " in done[name].stderr for name in ("off", "size"))
    assert all(each["ids"] == found["off"]["ids"] for each in found.values())
    assert "ram" not in found["off"] and found["size"]["ram"] == 450 * MIB
    assert 0 < found["auto"]["ram"] == found["quiet"]["ram"] < 500 * MIB and found["auto"]["traffic"]["streamed"] > 0


def test_where_even_the_least_is_not_free_dg_run_says_so(tmp_path: Path, large: Path) -> None:
    """And goes on as it can."""
    done = run_with(meminfo(tmp_path, 200 * MIB), command=[binary("dg-run"), large, *ASKED])
    assert done.returncode == 0, done.stderr
    assert "less than the least budget of" in done.stderr and "the file is mapped" in done.stderr


def test_other_commands_choose_and_tell_too(tmp_path: Path, large: Path) -> None:
    told = meminfo(tmp_path, 600 * MIB)
    done = run_with(told, command=[binary("dg-bench"), large, "--runs", 1, "--json"])
    assert done.returncode == 0 and " takes " in done.stderr, done.stderr
    assert 0 < json.loads(done.stdout)["budget"]["ram"] < 600 * MIB
    (tmp_path / "tasks.jsonl").write_text('{"id": "a", "prompt": "t600", "check": {"kind": "exact", "text": "x"}}\n')
    asked = ["--task", tmp_path / "tasks.jsonl", "--json"]
    done = run_with(told, command=[binary("dg-eval"), large, *asked])
    assert done.returncode == 0 and " takes " in done.stderr, done.stderr
    assert 0 < json.loads(done.stdout)["ram"] < 600 * MIB


def test_a_budget_and_what_cannot_have_one_are_refused_together() -> None:
    for ram in ("auto", "1G"):
        flags = ["--shape", "26b-a4b", "--against", "llama-cpp", "--ram", ram]
        done = CliRunner().invoke(bench, flags)
        assert done.exit_code == 2 and "--ram and --against do not go together" in done.output
        done = CliRunner().invoke(evaluate, ["--approximations", "--ram", ram])
        assert done.exit_code == 2 and "no --ram" in done.output
    done = CliRunner().invoke(info, [bundled(), "--plan", "--ram", "off"])
    assert done.exit_code == 2 and "'off' is no size" in done.output


# ---- Too much ----

TOO_MUCH = r"ram: ([\d.]+) GiB is more than the ([\d.]+) GiB of memory that are free; at most ([\d.]+) GiB, or auto"


def test_more_than_is_free_is_refused_with_what_would_do(tmp_path: Path) -> None:
    told = meminfo(tmp_path, 4 * GIB)
    refused = run_with(told, command=[binary("dg-run"), "-p", "x", "--ram", "500G"])
    found = re.fullmatch(f"dg-run: {TOO_MUCH}\n", refused.stderr)
    assert refused.returncode == 1 and found, refused.stderr
    asked, free, most = map(float, found.groups())
    assert asked == 500 and 3.9 < most < free < 4.3
    command: list[object] = [binary("dg-run"), "-p", "x", "--steps", "1", "--ram", f"{most}G"]
    assert run_with(told, command=command).returncode == 0


def test_c_has_the_same_words() -> None:
    options, out, error = ffi.new("dg_model_options *"), ffi.new("dg_model **"), ffi.new("dg_error *")
    for ram, words in ((-2, "expected a number of bytes, got -2"), (1 << 60, "or auto")):
        options.ram = ram
        assert lib.dg_model_open(bundled().encode(), options, out, error) != lib.DG_OK
        assert words in ffi.string(error.message).decode()
    options.ram = lib.DG_RAM_AUTO
    assert lib.dg_model_open(bundled().encode(), options, out, error) == lib.DG_OK
    found = ffi.new("dg_ram *")
    lib.dg_model_ram(out[0], found)
    assert found.budget == 0 and 0 < found.needs < found.free and found.least > 0
    lib.dg_model_free(out[0])


def test_auto_and_repacked_experts_go_together() -> None:
    """The budget does not: it is given by number alone."""
    try:
        with dgemma.Model(ram="auto", repack="1G") as model:
            assert model.ram is None
    except dgemma.BackendError:
        pytest.skip("no instruction set here has a repacked form")


# ---- Too little ----


def least_told(command: list[object]) -> tuple[str, str]:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    found = re.search(r"at least ([\d.]+) GiB", done.stderr)
    assert found, done.stderr
    return done.stderr.partition(": ")[2], found[1]


@pytest.mark.parametrize("name", [*BUNDLED, "small", "large"])
def test_dg_run_and_dg_info_name_the_same_least_and_it_does(name: str, small: Path, large: Path) -> None:
    path = bundled(name) if name in BUNDLED else {"small": small, "large": large}[name]
    planned, least = least_told([binary("dg-info"), path, "--plan", "--machine", "laptop-16gb", "--ram", "1M"])
    ran, _ = least_told([binary("dg-run"), path, *ASKED, "--ram", "1M"])
    assert planned == ran
    done = subprocess.run([binary("dg-run"), path, *ASKED, "--ram", f"{least}G"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    below = f"{float(least) - 0.02:.2f}G"
    assert least_told([binary("dg-run"), path, *ASKED, "--ram", below])[1] == least
    planning = [str(path), "--plan", "--machine", "laptop-16gb", "--ram"]
    assert CliRunner().invoke(info, [*planning, f"{least}G"]).exit_code == 0
    assert f"at least {least} GiB" in CliRunner().invoke(info, [*planning, below]).output


# ---- dg-serve ----


def first_line(*told: tuple[Path, str], flags: list[object]) -> str:
    """Return the line that dg-serve prints at its start; then it is ended."""
    code = """if True:
        import subprocess, sys
        server = subprocess.Popen(sys.argv[1:], stderr=subprocess.PIPE, text=True)
        lines = []
        for line in server.stderr:
            lines.append(line)
            if " at http" in line:
                break
        server.terminate()
        server.wait()
        print("".join(lines))"""
    return python(*told, code=code, arguments=(binary("dg-serve"), "--port", 0, *flags))


def cache_of(line: str) -> float:
    found = re.search(r"cache ([\d.]+) (MiB|GiB)$", line.strip())
    assert found, line
    return float(found[1]) * (GIB if found[2] == "GiB" else MIB)


def test_the_cache_is_a_share_of_what_the_model_leaves(tmp_path: Path, large: Path) -> None:
    pytest.importorskip("starlette")
    assert cache_of(first_line(meminfo(tmp_path, 20 * GIB), flags=[])) == 4 * GIB
    assert 0.4 * GIB < cache_of(first_line(meminfo(tmp_path, GIB), flags=[])) < 0.51 * GIB
    within = first_line(meminfo(tmp_path, 600 * MIB), flags=[large])
    told = re.search(r"it runs within ([\d.]+) MiB", within)
    assert told and cache_of(within) < 0.5 * float(told[1]) * MIB


def test_a_cache_that_there_is_no_room_for_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("starlette")
    words = r"--cache: {} GiB is more than the {} MiB of memory that encoded prompts can take"
    for flags, asked, most in (
        (["--cache", "3G"], r"3\.0", r"7\d\d\.\d"),
        (["--cache", "2G", "--ram", "700M"], r"2\.0", r"5\d\d\.\d"),
    ):
        refused = first_line(meminfo(tmp_path, 750 * MIB), flags=flags)
        assert re.search(words.format(asked, most), refused), refused


def test_a_cache_within_a_budget_keeps_it(large: Path) -> None:
    """As many sessions as the cache holds, and weights beside them."""
    with dgemma.Model(large, ram="600M") as model:
        room = model.session_room()
        assert room is not None and room < 600 * MIB
        sessions = []
        while sum(model.session_bytes(1024) for _ in sessions) + model.session_bytes(1024) <= room:
            sessions.append(model.session(1024))
        assert len(sessions) >= 2 and (model.session_room() or 0) < model.session_bytes(1024)
        with pytest.raises(dgemma.MemoryBudgetError):
            model.session(1024)
