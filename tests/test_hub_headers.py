"""Facts and refusals about a model of the Hub before any of its weights is downloaded."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import huggingface_hub.constants
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.commands import Inside
from support.hub_server import Hollow, Hub, serving
from test_hub import environment, failure

import dgemma.cli.plan
import dgemma.hub.download
import dgemma.hub.models
from dgemma.bench.plan import machines
from dgemma.bench.synthetic import Synthetic, blueprint
from dgemma.cli import info, run, which
from dgemma.convert import convert
from dgemma.errors import FormatError, SystemFailure
from dgemma.hub.choice import choices, is_unread
from dgemma.hub.headers import FIRST, gguf_header
from dgemma.hub.models import local_model, model_header
from dgemma.model import bundled
from dgemma.native.formats import all_formats

LARGE, SMALL = "someone/large-GGUF", "someone/small-GGUF"
TRANSFERRED = 32_000_000  # bytes at most for the plan of a file of 16 GB
MACHINE = ("--machine", "laptop-16gb")
Usage = namedtuple("Usage", "total used free")
Run = Callable[..., subprocess.CompletedProcess[str]]


def hollow(type: str, shape: str = "26b-a4b") -> Hollow:
    """A model of the real one's shapes, keys and size, without weights."""
    plan = blueprint(Synthetic(shape, type=type))
    return Hollow(plan.header, plan.file_bytes)


def in_type(file: Hollow, number: int, name: str) -> Hollow:
    """The same with one matrix in another type, of which no bytes are there."""
    at = file.beginning.index(name.encode()) + len(name)
    (dims,) = struct.unpack_from("<I", file.beginning, at)
    place = at + 4 + 8 * dims
    return Hollow(file.beginning[:place] + struct.pack("<I", number) + file.beginning[place + 4 :], file.size)


@pytest.fixture(scope="module")
def large() -> dict[str, Hollow]:
    return {f"large-{type.upper()}.gguf": hollow(type) for type in ("q8_0", "q4_k_m")}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    room = tmp_path_factory.mktemp("small")
    for type in ("bf16", "q8_0", "q4_0"):
        convert(bundled(), room / f"sudoku-{type}.gguf", type)
    convert(bundled(), room / "split.gguf", "q8_0", split_max_size=600_000)
    parts = {f"parts/{file.name}": file.read_bytes() for file in sorted(room.glob("split-*"))}
    return {f.name: f.read_bytes() for f in room.glob("sudoku-*")} | parts | {"README.md": b"Models."}


@pytest.fixture
def hub(large: dict[str, Hollow], small: dict[str, bytes]) -> Iterator[Hub]:
    with serving(Hub({LARGE: dict(large), SMALL: dict(small)})) as hub:
        yield hub


@pytest.fixture
def here(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The Hub of this process, whose temporary files are in a folder of the test's."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dgemma.hub.download, "PAUSE", 0.001)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return hub


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No machine is measured: all are a laptop of the library's list."""
    monkeypatch.setattr(dgemma.cli.plan, "this_machine", lambda *given: machines()["laptop-16gb"])


def sent(hub: Hub) -> int:
    return sum(count for method, _, _, count in hub.sent if method == "GET")


def nothing_is_left(tmp_path: Path) -> bool:
    return not [*(tmp_path / "temporary").iterdir()] and not (tmp_path / "cache").exists()


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(dgemma.hub.download.shutil, "disk_usage", lambda _: Usage(size, 0, size))


# ---- The header ----


def test_the_plan_of_16_gb_takes_a_few_megabytes_and_leaves_nothing(here: Hub, tmp_path: Path, capsys: object) -> None:
    name = f"hf:{LARGE}:q4_k_m"
    code, out, err = Inside(info.main, "dg-info").run(capsys, name, "--plan", *MACHINE)  # type: ignore[arg-type]
    assert code == 0, err
    assert len(here.repositories[LARGE]["large-Q4_K_M.gguf"]) > 16_000_000_000
    assert 0 < sent(here) <= TRANSFERRED
    assert out.startswith(f"hf:{LARGE}:large-Q4_K_M.gguf on laptop-16gb") and "s a step" in out
    assert "Its header alone was read. Still to be fetched to run it: 15.6 GiB" in out
    assert nothing_is_left(tmp_path)


def test_the_plan_of_a_header_is_that_of_the_file(here: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    plan = ("--plan", *MACHINE, "--json")
    told = json.loads(Inside(info.main, "dg-info").run(capsys, f"hf:{SMALL}:q8_0", *plan)[1])
    assert told.pop("to_come") > 0 and told.pop("free")
    there = local_model(f"hf:{SMALL}:q8_0")
    assert told == json.loads(Inside(info.main, "dg-info").run(capsys, there, *plan)[1])


@pytest.mark.parametrize("type", ["q8_0", "parts/split.gguf"])
def test_what_a_header_tells_is_what_the_file_tells(
    type: str, here: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, inside = f"hf:{SMALL}:{type}", Inside(info.main, "dg-info")
    told = json.loads(inside.run(capsys, name, "--json")[1])
    assert told.pop("path").startswith(f"hf:{SMALL}:") and nothing_is_left(tmp_path)
    assert told.pop("to_come") and told.pop("free")
    whole = json.loads(inside.run(capsys, local_model(name), "--json")[1])
    assert whole.pop("path") and told == whole
    asked = len(here.sent)
    code, out, _ = inside.run(capsys, name)
    assert code == 0 and "header alone" not in out and len(here.sent) == asked, "what the cache has is used"


def test_a_dry_run_of_a_gguf_file_reads_its_header_alone(here: Hub, tmp_path: Path) -> None:
    todo = dgemma.convert.plan(f"hf:{LARGE}:q8_0", "q4_k_m")
    assert todo.file_bytes > 16_000_000_000 and sent(here) <= TRANSFERRED and nothing_is_left(tmp_path)


def test_this_machine_is_measured_without_the_weights(here: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = Inside(info.main, "dg-info").run(capsys, f"hf:{SMALL}:q8_0", "--plan", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert "random weights" in told["machine"]["source"] and told["predicted"]["seconds"] > 0


def test_a_header_that_breaks_off_is_gone_on_with(here: Hub) -> None:
    here.break_at["large-Q4_K_M.gguf"] = FIRST + 1000
    with model_header(f"hf:{LARGE}:q4_k_m") as header:
        assert header.path.stat().st_size == len(here.repositories[LARGE]["large-Q4_K_M.gguf"])
    assert sent(here) <= TRANSFERRED


@given(st.data())
def test_a_damaged_header_is_read_no_further_and_refused_by_the_reader(data: st.DataObject) -> None:
    whole = bytearray(Path(bundled()).read_bytes())
    at = data.draw(st.integers(0, 2000))
    whole[at] = data.draw(st.integers(0, 255))
    read = []

    def part(start: int, count: int) -> bytes:
        assert start == sum(read) and count > 0 and start + count <= len(whole)
        read.append(count)
        return bytes(whole[start : start + count])

    try:
        assert whole.startswith(gguf_header(part, len(whole)))
    except FormatError as refused:
        assert "longer than 64.0 MiB" in str(refused)


@pytest.mark.parametrize("length", [0, 3, 4, 23, 24, 1000, FIRST])
def test_a_file_that_ends_in_its_header_is_read_to_its_end(length: int, large: dict[str, Hollow]) -> None:
    whole = large["large-Q4_K_M.gguf"].beginning[:length]
    assert gguf_header(lambda start, count: whole[start : start + count], length) == whole


# ---- What is refused before a download ----


@pytest.mark.parametrize(
    ("beginning", "complaint"),
    [
        (b"<!doctype html>", "large-Q4_K_M.gguf: not a GGUF file but a web page"),
        (b"PK\3\4", "not a GGUF file but a zip archive"),
        (b"GGUF\3\0\0\0" + bytes(16), "'general.architecture' is missing"),
    ],
)
def test_a_file_that_is_no_model_is_refused_before_its_download(
    beginning: bytes, complaint: str, here: Hub, tmp_path: Path
) -> None:
    here.repositories[LARGE]["large-Q4_K_M.gguf"] = Hollow(beginning, 10**10)
    with pytest.raises(FormatError, match=f"^hf:{LARGE}:large-Q4_K_M.gguf: .*{complaint.rpartition(': ')[2]}"):
        local_model(f"hf:{LARGE}:q4_k_m")
    assert sent(here) <= FIRST and nothing_is_left(tmp_path)


def test_a_type_that_is_not_read_is_refused_by_name_before_its_download(here: Hub, tmp_path: Path) -> None:
    file = in_type(here.repositories[LARGE]["large-Q4_K_M.gguf"], 16, "blk.3.attn_q.weight")  # type: ignore[arg-type]
    here.repositories[LARGE]["large-Q4_K_M.gguf"] = file
    told = r"Q4_K_M.gguf: tensor 'blk.3.attn_q.weight' is IQ2_XXS, which this .*; dg-info hf:someone/large-GGUF lists"
    with pytest.raises(FormatError, match=told):
        local_model(f"hf:{LARGE}:q4_k_m")
    assert sent(here) <= TRANSFERRED and nothing_is_left(tmp_path)


def test_too_little_room_is_told_before_anything_is_fetched(
    here: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 10**10)
    with pytest.raises(SystemFailure, match=r"no space left for large-Q4_K_M.gguf: 15.6 GiB of it are still to come,"):
        local_model(f"hf:{LARGE}:q4_k_m")
    assert sent(here) == 0
    whole = sum(len(data) for name, data in here.repositories[SMALL].items() if name.startswith("parts/"))
    free(monkeypatch, whole - 1)  # each part has room, but not all of them
    with pytest.raises(SystemFailure, match=r"no space left for parts/split-00001-of-"):
        local_model(f"hf:{SMALL}:parts/split.gguf")
    assert sent(here) == 0


def test_what_is_there_already_needs_no_room(here: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    there = local_model(f"hf:{SMALL}:q8_0")
    free(monkeypatch, 0)
    assert local_model(f"hf:{SMALL}:q8_0") == there


# ---- Which file ----


def test_without_a_type_all_files_are_listed_with_their_sizes(
    here: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here.repositories[LARGE] |= {"large-IQ2_XXS.gguf": Hollow(b"GGUF", 9 * 10**9), "mmproj-F16.gguf": b"GGUF"}
    code, out, err = Inside(info.main, "dg-info").run(capsys, f"hf:{LARGE}")
    assert code == 0 and sent(here) == 0 and nothing_is_left(tmp_path), err
    lines = [line.split() for line in out.splitlines()]
    assert ["Q8_0", "25.0", "GiB", "large-Q8_0.gguf"] in lines and [
        "Q4_K_M",
        "15.6",
        "GiB",
        "large-Q4_K_M.gguf",
    ] in lines
    assert "this build does not read IQ2_XXS" in out and "mmproj" not in out
    told = json.loads(Inside(info.main, "dg-info").run(capsys, f"hf:{LARGE}", "--json")[1])
    assert [file["type"] for file in told["files"]] == ["Q8_0", "Q4_K_M", "IQ2_XXS"]
    assert [file["name"] for file in told["files"]][1] == f"hf:{LARGE}:Q4_K_M"


def test_the_list_says_what_a_machine_can_use(here: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    given = (f"hf:{LARGE}", "--plan", *MACHINE, "--json")
    told = json.loads(Inside(info.main, "dg-info").run(capsys, *given)[1])
    assert sent(here) <= TRANSFERRED
    assert [file["usable"] for file in told["files"]] == [False, True]
    assert "more than 1.5 times the fastest file's" in told["files"][0]["refusal"]
    slow, fast = (file["seconds"] for file in told["files"])
    assert slow > fast > 0
    exact = Inside(info.main, "dg-info").run(capsys, f"hf:{LARGE}:q8_0", "--plan", *MACHINE, "--json")[1]
    assert slow == pytest.approx(json.loads(exact)["predicted"]["seconds"], rel=0.1)


def test_a_file_that_fits_into_memory_comes_before_a_larger_one_that_does_not(
    here: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a slow processor both take as long, and the larger one reads the disk all the time."""
    machine = tmp_path / "slow.json"
    machine.write_text(json.dumps({"ram": 24, "disk": 100, "host": 100, "cpu_ops": 50}))
    told = json.loads(
        Inside(info.main, "dg-info").run(capsys, f"hf:{LARGE}", "--plan", "--machine", machine, "--json")[1]
    )
    large, small = told["files"]
    assert large["seconds"] == pytest.approx(small["seconds"], rel=0.1) and small["usable"]
    assert "read from the disk at each, which another is not" in large["refusal"]


def test_the_largest_usable_file_runs_and_a_line_says_why(
    here: Hub, quick: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = ("-p", "12", "--raw", "--steps", "1", "--quiet")
    code, _, err = Inside(run.main, "dg-run").run(capsys, f"hf:{SMALL}", *ask)
    assert code == 0 and err.count("\n") == 1, err
    assert err.startswith(f"dg-run: hf:{SMALL}:BF16 is the largest of 4 that is usable: BF16 (")
    assert here.bytes_of("sudoku-bf16.gguf") and not here.bytes_of("sudoku-q8_0.gguf")

    code, _, err = Inside(run.main, "dg-run").run(capsys, f"hf:{SMALL}", *ask)
    assert (
        code == 0
        and err == f"dg-run: hf:{SMALL}:BF16 is in the cache; dg-info hf:{SMALL} --plan tells of the other files\n"
    )

    shutil.rmtree(huggingface_hub.constants.HF_HUB_CACHE)
    free(monkeypatch, len(here.repositories[SMALL]["sudoku-bf16.gguf"]) - 1)
    code, _, err = Inside(run.main, "dg-run").run(capsys, f"hf:{SMALL}", *ask)
    assert code == 0 and "is the largest of 4 that is usable" in err and "not BF16 (" in err, err


def test_where_no_file_is_usable_all_are_told_with_the_reason(
    here: Hub, quick: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(which, "SLOWEST", 0.0)
    told = Inside(run.main, "dg-run").refused(capsys, 1, f"hf:{SMALL}", "-p", "12")
    assert (
        "none of its files is usable here; one runs all the same by its type: BF16 (" in told
        and "Q4_0 (" in told
        and "s a step, more than 0" in told
    )


@pytest.mark.parametrize(("answer", "flags"), [(True, []), (False, []), (None, ["--yes"])])
def test_a_terminal_is_asked_before_a_large_download(
    answer: bool | None,
    flags: list[str],
    here: Hub,
    quick: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(which, "ASKED", 1)
    monkeypatch.setattr(which, "is_terminal", lambda stream: True)
    monkeypatch.setattr(click, "confirm", lambda text, **more: [asked.append(text), answer][1])
    ask = ("-p", "12", "--raw", "--steps", "1", "--quiet", *flags)
    code, _, err = Inside(run.main, "dg-run").run(capsys, f"hf:{SMALL}", *ask)
    assert (code == 0) == (answer is not False), err
    assert bool(asked) == (answer is not None) and bool(here.bytes_of("sudoku-bf16.gguf")) == (answer is not False)
    if asked:
        assert asked[0].startswith("Fetch ") and str(huggingface_hub.constants.HF_HUB_CACHE) in asked[0]


def test_one_file_alone_needs_no_choice(here: Hub) -> None:
    here.repositories[SMALL] = {"sudoku-q8_0.gguf": here.repositories[SMALL]["sudoku-q8_0.gguf"]}
    assert choices(f"hf:{SMALL}") is None and choices(f"hf:{LARGE}:q8_0") is None and choices("model.gguf") is None


def test_types_are_known_by_name_as_read_or_not() -> None:
    assert not any(is_unread(each.name) for each in all_formats())
    mixtures = ["Q4_K_M", "Q5_K_S", "UD-Q4_K_XL", "I1-IQ4_NL", "Q3_K_L", "FP8", None]
    assert [is_unread(type) for type in mixtures] == [False] * len(mixtures)
    assert all(map(is_unread, ["IQ2_XXS", "IQ3_M", "UD-IQ2_M", "MXFP4_MOE", "Q4_1", "TQ1_0"]))


# ---- No file at all ----


def test_a_shape_is_planned_without_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    inside, flags = Inside(info.main, "dg-info"), ("--plan", "--shape", "26b-a4b", *MACHINE)
    code, out, err = inside.run(capsys, *flags, "--type", "q8_0")
    assert code == 0 and out.startswith("26b-a4b, 30 layers, q8_0: 25.0 GiB on laptop-16gb"), err
    seconds = [
        json.loads(inside.run(capsys, *flags, "--json", *more)[1])["predicted"]["seconds"]
        for more in ((), ("--type", "q8_0"), ("--layers", 6))
    ]
    assert seconds[1] > seconds[0] > seconds[2] > 0 and nothing_is_left(tmp_path)
    assert "needs --plan" in inside.refused(capsys, 2, "--shape", "tiny")
    assert "--type needs --shape" in inside.refused(capsys, 2, "m.gguf", "--plan", "--type", "q8_0")
    assert "give one" in inside.refused(capsys, 2, "m.gguf", "--plan", "--shape", "tiny")
    assert "MODEL" in inside.refused(capsys, 2, "--plan")


def test_commands_leave_nothing_of_a_header_when_they_are_ended(hub: Hub, tmp_path: Path) -> None:
    """A signal while a header comes: the temporary folder is gone."""
    hub.stall_at["large-Q4_K_M.gguf"] = 1_000_000
    (tmp_path / "t").mkdir()
    binary = str(Path(sys.executable).with_name("dg-info"))
    more = environment(hub, tmp_path / "home", TMPDIR=str(tmp_path / "t"))
    with subprocess.Popen([binary, f"hf:{LARGE}:q4_k_m"], env=more, stderr=subprocess.PIPE) as process:
        assert hub.stalled.wait(60)
        process.terminate()
        assert process.wait(60) == 143
    assert os.listdir(tmp_path / "t") == []


def test_without_huggingface_hub_a_repository_needs_it(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "from dgemma.cli.run import main; main(['hf:a/b', '-p', 'x'], prog_name='dg-run')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert failure(done, 2) == "dg-run: hf:a/b: needs huggingface_hub: pip install 'dgemma[hub]'\n"
