"""tidy and sudoku name the bundled models wherever a MODEL is taken, and what is no file is told what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.checkpoints import write_checkpoint
from support.commands import Inside

import dgemma
from dgemma.cli import bench, eval, info, run
from dgemma.convert.cli import main as convert
from dgemma.files.bundled import BUNDLED
from dgemma.model import bundled

ASK = ("-p", "Sort:\nsea fig ant", "--seed", "1", "--quiet")
COMMANDS = [
    (Inside(run.main, "dg-run"), "{}", *ASK),
    (Inside(info.main, "dg-info"), "{}"),
    (Inside(info.main, "dg-info"), "{}", "--plan", "--machine", "h100"),
    (Inside(bench.main, "dg-bench"), "{}", "--runs", "1"),
    (Inside(eval.main, "dg-eval"), "{}", "--task", "json", "--count", "1"),
    (Inside(eval.main, "dg-eval"), "{}", "--against", "{}", "--prompts", "1"),
    (Inside(convert, "dg-convert"), "{}", "--dry-run"),
]


@pytest.mark.parametrize(("inside", "arguments"), [(each[0], each[1:]) for each in COMMANDS])
def test_every_command_takes_the_name(
    inside: Inside, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = inside.run(capsys, *(each.format("tidy") for each in arguments))
    assert code == 0 and out, err
    if inside.name == "dg-run":
        assert out == "ant fig sea"


def test_python_takes_the_name() -> None:
    for name in BUNDLED:
        with dgemma.Model(name, threads=1) as model:
            assert model.path == bundled(name)


def test_a_file_of_that_name_is_a_path_and_a_line_says_which_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tidy").write_bytes(Path(bundled()).read_bytes())  # another model
    code, out, err = Inside(run.main, "dg-run").run(capsys, "tidy", *ASK)
    assert (code, out) == (0, "ant fig sea")
    assert err == "tidy: the model that comes with dgemma is taken; the file here is ./tidy\n"
    told = json.loads(Inside(info.main, "dg-info").run(capsys, "./tidy", "--json")[1])
    assert told["bytes"] == Path(bundled()).stat().st_size
    for path in ("./tidy", Path("tidy")):
        with dgemma.Model(path, threads=1) as model:
            assert model.path == str(path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("inside", [Inside(run.main, "dg-run"), Inside(info.main, "dg-info")])
def test_a_checkpoint_leads_to_dg_convert(inside: Inside, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "checkpoint"
    write_checkpoint(folder, layers=2, vocab=1024, hidden=128)
    ask = ASK if inside.name == "dg-run" else ()
    told = inside.refused(capsys, 1, folder, *ask)
    assert f"the folder of a checkpoint; dg-convert {folder} -o FILE.gguf makes a model of it" in told
    weights = next(folder.glob("*.safetensors"))
    if inside.name == "dg-run":
        assert "dg-convert makes a GGUF file of the folder" in inside.refused(capsys, 1, weights, *ask)


def test_a_folder_of_files_names_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(10):
        (tmp_path / f"m{i}.gguf").touch()
    told = Inside(run.main, "dg-run").refused(capsys, 1, tmp_path, *ASK)
    assert "a folder, not a GGUF file; in it there are m0.gguf, m1.gguf, " in told and told.endswith("m7.gguf, ...\n")
