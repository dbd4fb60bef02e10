"""dg-info --plan: readable, honest about what is predicted, within its budgets. The planner itself is tested in C."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.commands import Inside

from dgemma.bench.plan import described, find_machine, machines, plan, rates
from dgemma.bench.synthetic import Synthetic, blueprint
from dgemma.cli.info import main
from dgemma.errors import Error, MemoryBudgetError, UsageError
from dgemma.model import Model, bundled

GIB = 1 << 30
LAPTOP = "rtx4060-laptop"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published Q4_K_M: its header and, as a hole in the file, weights that nobody may need."""
    made = blueprint(Synthetic("26b-a4b"))
    path = tmp_path_factory.mktemp("plan") / "published.gguf"
    with path.open("wb") as file:
        file.write(made.header)
        file.truncate(made.file_bytes)
    return path


INSIDE = Inside(main, "dg-info")
run, refused = INSIDE.run, INSIDE.refused


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    status, out, err = run(capsys, *arguments, "--plan", "--json")
    assert (status, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    return found


# ---- What it promises ----


def test_an_8_gb_laptop_gets_33_tokens_a_second(real: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, real, "--machine", LAPTOP)
    assert found["predicted"]["tokens_per_second"] >= 33 and found["predicted"]["steps"] == 16
    assert found["predicted"]["bound"] == ["PCIe", "CPU"]
    lives = {(way["lives"], way["computed"]): sum(way["blocks"]) for way in found["experts"]}
    assert sum(lives.values()) == 30 * 128
    assert 0.25 < lives["VRAM", "GPU"] / 3840 < 0.4
    assert lives["RAM, page-locked", "GPU"] and lives["RAM", "CPU"] and not lives["disk", "CPU"]
    assert found["used"]["ram"]["total"] <= found["budgets"]["ram"] < 16 * GIB
    assert found["used"]["vram"]["total"] <= found["budgets"]["vram"] < 8 * GIB


def test_an_8_core_zen_3_beside_the_same_gpu_still_gets_33(real: Path) -> None:
    machine = machines()[LAPTOP]
    slower = type(machine)("slower", "", "", {**machine.rates, "cpu_ops": 620e9})
    with Model(real) as model:
        assert plan(model, slower).tokens_per_second >= 33


def test_faster_machines_are_faster(real: Path) -> None:
    with Model(real) as model:
        speeds = {name: plan(model, machine).tokens_per_second for name, machine in machines().items()}
    order = ["laptop-16gb", LAPTOP, "rtx3060", "rtx4090", "h100"]
    assert sorted(speeds, key=lambda name: speeds[name]) == order
    assert (
        3 < speeds["laptop-16gb"] < 8 and 1000 < speeds["h100"] < 2600
    )  # H100: 15 ms a step in fp8, floor 5.0 at 4 bits


@pytest.mark.parametrize(("ram", "vram"), [("2.7G", "5G"), ("6G", "3G"), ("12G", "8G")])
def test_budgets_are_kept(real: Path, capsys: pytest.CaptureFixture[str], ram: str, vram: str) -> None:
    found = told(capsys, real, "--machine", LAPTOP, "--ram", ram, "--vram", vram)
    for side, text in (("ram", ram), ("vram", vram)):
        assert found["budgets"][side] == int(float(text[:-1]) * GIB)
        assert found["used"][side]["total"] <= found["budgets"][side]
        assert (
            sum(size for what, size in found["used"][side].items() if what != "total") == found["used"][side]["total"]
        )


def test_the_plan_knows_what_the_runtime_allocates(real: Path) -> None:
    with Model(real) as model:
        short, long = (plan(model, machines()["h100"], context=n) for n in (1024, 2048))
        config = model.config
    row = sum(
        2 * 4 * config.n_head_kv[i] * (config.head_dim_swa if config.sliding[i] else config.head_dim) for i in range(30)
    )
    assert long.vram["keys and values"] - short.vram["keys and values"] == 1024 * row
    weights = short.vram["experts"] + short.vram["other weights"]
    assert 0 <= 16_790_985_600 - weights < 32 * 692  # the published data section, less its padding


def test_direct_reads_bring_a_little_more(real: Path) -> None:
    """Direct reads of a machine without a GPU add less than two granules to each matrix."""
    with Model(real) as model:
        found = plan(model, machines()["laptop-16gb"])
    weights = sum(way.bytes for way in found.ways) + found.ram["other weights"]
    assert 0 < weights - 16_790_985_600 < (30 * 128 * 2 + 692) * 2 * 4096


# ---- What it says ----


def test_the_page_is_readable(real: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, real, "--plan", "--machine", LAPTOP)
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines()[1:])) <= 120  # behind the path
    for words in (
        "Experts",
        "page-locked",
        "PCIe",
        "of a budget of 13.0 GiB",
        "keys and values",
        machines()[LAPTOP].about,
    ):
        assert words in out, words
    last = out.splitlines()[-1]
    assert last.startswith("Predicted: ") and "tokens/s at 16 steps" in last and last.endswith("bound by PCIe and CPU")


def test_a_gpu_that_is_not_used_is_explained(real: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, real, "--plan", "--machine", LAPTOP, "--vram", "1G")
    assert "The GPU is not used: it would take 2." in out and "on the CPU" in out


def test_this_machine_is_measured_and_its_disk_assumed(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, bundled())
    assert found["machine"]["name"] == "this machine" and "the disk is assumed" in found["machine"]["source"]
    assert found["machine"]["vram"] == 0 and not found["gpu"]
    assert found["predicted"]["tokens_per_second"] > 10
    assert found["used"]["ram"]["total"] < 2 * GIB


def test_help_names_machines_and_fields(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "--help")
    assert all(name in out for name in machines()) and all(field in out for field in rates())


# ---- Machines from files ----


def test_a_machine_file_is_the_same_as_the_list(tmp_path: Path) -> None:
    machine = machines()[LAPTOP]
    file = tmp_path / "mine.json"
    fields = {rate.field: machine.rates[rate.field] / rate.scale for rate in rates().values()}
    file.write_text(json.dumps({"name": "mine", **fields}))
    found = find_machine(str(file))
    assert found.name == "mine" and found.rates == pytest.approx(machine.rates)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"disk": None}, "disk: expected a number of GB/s"),
        ({"disk": "3 GB/s"}, "disk: expected a number"),
        ({"disk": True}, "disk: expected a number"),
        ({"disk": float("nan")}, "disk: expected a number"),
        ({"disk": 10**400}, "disk: expected a number"),
        ({"floppy": 1}, "no field 'floppy'"),
        ({}, "ram is missing: memory for programs, in GiB"),
    ],
)
def test_wrong_machine_files_are_refused_by_field(change: dict[str, Any], words: str) -> None:
    whole = {"ram": 16, "disk": 3, "host": 30, "cpu_ops": 500} if change else {"disk": 3}
    with pytest.raises(Error, match=r"mine\.json") as refusal:
        described({**whole, **change}, "mine.json")
    assert words in str(refusal.value)


def test_wrong_usage_is_refused(real: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for flag, value in (("--ram", "8G"), ("--vram", "8G"), ("--machine", LAPTOP), ("--context", "100")):
        assert f"{flag} needs --plan" in refused(capsys, 2, real, flag, value)
    assert LAPTOP in refused(capsys, 2, real, "--plan", "--machine", "abacus")
    assert "--ram" in refused(capsys, 2, real, "--plan", "--ram", "much")
    assert "context" in refused(capsys, 2, real, "--plan", "--machine", LAPTOP, "--context", "1000000")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "text.json").write_text("ram = 16")
    (tmp_path / "slow.json").write_text('{"ram": 16, "disk": 0, "host": 30, "cpu_ops": 500}')
    assert "expected an object" in refused(capsys, 1, real, "--plan", "--machine", tmp_path / "list.json")
    assert "no JSON" in refused(capsys, 1, real, "--plan", "--machine", tmp_path / "text.json")
    assert "disk" in refused(capsys, 2, real, "--plan", "--machine", tmp_path / "slow.json")


def test_a_budget_that_cannot_be_kept_is_refused_with_the_least_that_would_do(
    real: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (real, "--plan", "--machine", "laptop-16gb", "--ram")
    err = refused(capsys, 1, *flags, "1G")
    assert "RAM budget of 1.00 GiB" in err and "at least 2." in err
    least = err.partition("at least ")[2].split()[0]
    assert run(capsys, *flags, f"{least}G")[0] == 0
    assert "at least" in refused(capsys, 1, *flags, f"{float(least) - 0.02:.2f}G")
    assert "has 16.00 GiB" in refused(capsys, 1, *flags, "32G")
    assert "VRAM budget" in refused(capsys, 1, *flags, "8G", "--vram", "4G")


def test_errors_have_their_kinds(real: Path) -> None:
    with Model(real) as model:
        with pytest.raises(MemoryBudgetError):
            plan(model, machines()[LAPTOP], ram=GIB // 2)
        with pytest.raises(UsageError):
            plan(model, machines()[LAPTOP], context=-1)
