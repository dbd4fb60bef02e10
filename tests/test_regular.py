"""A pipe, a device, a socket or a folder where a file has to be: refused by name at once, and nobody waits for it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import write_checkpoint
from support.commands import Inside
from support.converting import refused

import dgemma
from dgemma.bench.plan import find_machine
from dgemma.cli.bench import main as bench
from dgemma.cli.commands import saved
from dgemma.cli.eval import main as eval
from dgemma.cli.info import main as info
from dgemma.cli.run import main as run
from dgemma.convert import convert, plan
from dgemma.eval.baseline import Base
from dgemma.files.gguf_file import File
from dgemma.files.regular import read_regular
from dgemma.files.routing import load_routing

SECONDS = 30  # after which a call hangs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "in"
    write_checkpoint(folder, layers=1)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    convert(folder, out := tmp_path_factory.mktemp("model") / "m.gguf", "q8_0")
    return out


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    """Whatever waits is interrupted, and that is a failure, whatever becomes of it."""
    rang: list[int] = []

    def ring(*_: Any) -> None:
        rang.append(1)
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS, 1)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    assert not rang


def make_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


MAKE: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "socket": make_socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.fixture(params=MAKE)
def odd(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """What is no file."""
    (tmp_path / "odd").mkdir()
    MAKE[request.param](path := tmp_path / "odd" / "it.json")
    return path


NAMES = ["model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
NAMES += ["chat_template.jinja", "special_tokens_map.json", "added_tokens.json"]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_a_checkpoint(name: str, odd: Path, folder: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(folder, copy := tmp_path / "copy")
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to(odd)
    err = refused(capsys, 1, copy, "-o", tmp_path / "out.gguf")
    assert f"{copy / name}: expected a file, found a " in err, err


@pytest.mark.parametrize("name", [*NAMES, "model.safetensors.index.json", "adapter_config.json", "tokenizer.model"])
def test_a_link_to_nothing_is_no_missing_file(name: str, folder: Path, tmp_path: Path, capsys: Any) -> None:
    """As a Hub's cache has them, of a file that was not fetched."""
    shutil.copytree(folder, copy := tmp_path / "copy")
    others = {"model.safetensors.index.json": "model.safetensors", "tokenizer.model": "tokenizer.json"}
    for file in (name, others.get(name, name)):
        (copy / file).unlink(missing_ok=True)
    (copy / name).symlink_to("../../blobs/0123")
    err = refused(capsys, 1, copy, "-o", tmp_path / "out.gguf")
    said = "this adapter would be left out" if name == "adapter_config.json" else "no such file"
    assert f"{copy / name}: {said}" in err, err


def test_a_link_to_itself(model: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """pathlib's resolve() raises what is no OSError for one."""
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    calls = [("loop", "-o", "out.gguf"), ("loop/in", "-o", "out.gguf"), (model, "-o", "loop/out.gguf")]
    calls += [(model, "-o", "out.gguf", flag, "loop") for flag in ("--calibrate", "--imatrix")]
    for arguments in calls:
        assert "loop: " in (err := refused(capsys, 1, *arguments)) or "loop/" in err, err
    assert not Path("out.gguf").exists()


def test_a_shard_and_its_index(odd: Path, tmp_path: Path, capsys: Any) -> None:
    write_checkpoint(tmp_path / "in", layers=1, shards=2)
    for name in ("model-00002-of-00002.safetensors", "model.safetensors.index.json"):
        (tmp_path / "in" / name).unlink()
        (tmp_path / "in" / name).symlink_to(odd)
        err = refused(capsys, 1, tmp_path / "in", "-o", tmp_path / "out.gguf")
        assert f"{name}: expected a file, found a " in err, err


def test_a_sentencepiece_model(odd: Path, folder: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(folder, copy := tmp_path / "copy")
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer.model").symlink_to(odd)
    err = refused(capsys, 1, copy, "-o", tmp_path / "out.gguf")
    assert "tokenizer.model: expected a file, found a " in err, err


@pytest.mark.parametrize("flag", ["--imatrix", "--calibrate"])
@pytest.mark.parametrize("name", ["it.json", "it.jsonl"])
def test_a_file_that_a_flag_names(
    flag: str, name: str, odd: Path, model: Path, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    path = odd.rename(odd.with_name(name))
    for source in (model, folder):
        err = refused(capsys, 1, source, "-o", tmp_path / "out.gguf", flag, path)
        assert f"{path}: expected a file, found a " in err, err
        with pytest.raises(dgemma.SystemFailure, match="expected a file"):
            plan(source, **{flag.strip("-"): path})


def test_a_model(odd: Path, tmp_path: Path, capsys: Any) -> None:
    if odd.is_dir():
        odd.rmdir()  # a folder may be a checkpoint
        odd.symlink_to("/dev/null")
    err = refused(capsys, 1, odd, "-o", tmp_path / "out.gguf")
    assert f"{odd}: expected a file, found a " in err, err
    for open_it in (dgemma.Model, dgemma.Tokenizer.from_gguf, File):
        with pytest.raises(dgemma.SystemFailure, match=f"{odd}: (not a regular file|cannot open: No such device)"):
            open_it(odd)
    for command, more in (
        (Inside(info, "dg-info"), []),
        (Inside(run, "dg-run"), ["-p", "x"]),
        (Inside(bench, "dg-bench"), []),
    ):
        status, _, err = command.run(capsys, odd, *more)
        assert status == 1 and str(odd) in err and err.count("\n") == 1, err


def test_requests_and_tasks(odd: Path, tmp_path: Path, capsys: Any) -> None:
    """Requests are read twice, which a pipe cannot be: the second time there would be none."""
    flags = ["--batch", odd, "-o", tmp_path / "out.jsonl"]
    for command, more in ((Inside(run, "dg-run"), flags), (Inside(eval, "dg-eval"), ["--task", odd])):
        assert f"{odd}: expected a file, found a " in command.refused(capsys, 1, *more)


def test_what_is_read_beside_a_model(odd: Path) -> None:
    readers: list[Callable[[Path], object]] = [
        load_routing,
        lambda p: find_machine(str(p)),
        Base.load,
        saved,
        read_regular,
    ]
    for reader in readers:
        with pytest.raises(dgemma.Error, match=f"{odd}: expected a file, found a "):
            reader(odd)


def test_an_absent_file_is_told_as_before(tmp_path: Path) -> None:
    with pytest.raises(dgemma.SystemFailure, match=r"no\.json: no such file or directory"):
        read_regular(tmp_path / "no.json")
    with pytest.raises(FileNotFoundError):
        load_routing(tmp_path / "no.json")
