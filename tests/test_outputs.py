"""No output ever replaces an input, another output or a stranger's file, and none is looked at too late.

Which options name files is asked from the commands: one that is added later is tried as well.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from support.commands import Inside

import dgemma
from dgemma.bench.synthetic import Synthetic, make
from dgemma.cli import bench, eval, info, models, run, serve
from dgemma.cli.files import InputFile, OutputBeside, OutputFile
from dgemma.convert import cli as convert
from dgemma.convert.writer import NewFile, NewFiles
from dgemma.eval.baseline import Base
from dgemma.files.line_log import Beginning, LineLog, literal
from dgemma.files.output import check_distinct, input_files, unfinished, whole_file, write_whole
from dgemma.model import bundled

COMMANDS = {
    "dg-run": run.main,
    "dg-info": info.main,
    "dg-bench": bench.main,
    "dg-eval": eval.main,
    "dg-serve": serve.main,
    "dg-models": models.main,
    "dg-convert": convert.main,
}
STRANGER = b"my notes\nkept for years"
ANY = Beginning(*literal('{"line": '))
NO_FILES = {"cache"}  # a folder of files that dg-bench made, and a size of dg-serve


@dataclass(frozen=True)
class Use:
    """A parameter of a command that names a file."""

    command: str
    param: click.Parameter

    def given(self, file: object) -> list[str]:
        """How it is given on a command line."""
        return [str(file)] if isinstance(self.param, click.Argument) else [self.param.opts[0], str(file)]

    def __str__(self) -> str:
        return f"{self.command} {self.param.name}"

    def refused(self, capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
        """What the command says of these arguments, with a model in front where it needs one."""
        main = COMMANDS[self.command]
        return Inside(main, self.command).refused(capsys, code, *arguments)


def uses(*kinds: type[Any]) -> list[Use]:
    found = [Use(name, param) for name, main in COMMANDS.items() for param in main.params]
    return [use for use in found if isinstance(use.param.type, kinds) or isinstance(use.param, kinds)]


INPUTS, OUTPUTS = uses(InputFile), uses(OutputFile)
PAIRS = [
    (one, other)
    for one in OUTPUTS
    for other in INPUTS + OUTPUTS
    if one.command == other.command and (one.param is not other.param or one.param.multiple)
]
SOURCE = {"dg-convert": ["none"]}  # an argument that must be there


def needed(*used: Use) -> list[str]:
    return [] if any(isinstance(use.param, click.Argument) for use in used) else SOURCE.get(used[0].command, [])


def test_every_option_that_names_a_file_is_known_as_input_or_output() -> None:
    typed = {id(use.param) for use in uses(InputFile, OutputFile, OutputBeside)}
    for name, main in COMMANDS.items():
        for param in main.params:
            words = set(re.split(r"\W+", str(param.metavar or param.name).upper()))
            named = bool(words & {"FILE", "DIR", "PATH", "MODEL", "MODELS", "SOURCE", "TEXTS", "OUT", "BASE"})
            named |= isinstance(param.type, (click.Path, click.File))
            assert not named or id(param) in typed or param.name in NO_FILES, f"{name} {param.name}"
    assert len(PAIRS) > 30, "the commands were not looked through"


def same(file: Path, how: str) -> Path:
    """Another name of a file."""
    other = file.with_name(f"{how}.{file.name}")
    if how == "link":
        other.symlink_to(file)
    elif how == "hard link":
        os.link(file, other)
    else:
        return file.parent / "." / file.parent.name / ".." / file.name if how == "path" else file
    return other


@pytest.mark.parametrize("how", ["name", "path", "link", "hard link"])
def test_a_file_is_never_given_twice_where_one_is_written(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / tmp_path.name).mkdir()
    for one, other in PAIRS:
        file = tmp_path / "both"
        file.write_bytes(STRANGER)
        twin = same(file, how)
        for first, second in ((file, twin), (twin, file)):
            arguments = [*needed(one, other), *other.given(first), *one.given(second)]
            told = one.refused(capsys, 2, *arguments)
            assert "give it another name" in told, (str(one), str(other), told)
            assert file.read_bytes() == STRANGER and twin.read_bytes() == STRANGER
        if twin.name != file.name:
            twin.unlink()


def test_two_outputs_that_are_not_there_yet_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for one, other in PAIRS:
        if isinstance(other.param.type, OutputFile):
            (tmp_path / "link").symlink_to(tmp_path / "new")
            arguments = [*needed(one, other), *other.given(tmp_path / "new"), *one.given(tmp_path / "link")]
            assert "give it another name" in one.refused(capsys, 2, *arguments)
            (tmp_path / "link").unlink()
            assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("use", OUTPUTS, ids=str)
def test_a_part_of_a_split_model_is_an_input_too(use: Use, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2))
    for path in (first, second):
        path.write_bytes(STRANGER)
    assert "give it another name" in use.refused(capsys, 2, first, *use.given(second))
    assert second.read_bytes() == STRANGER


def test_what_is_written_with_an_output_is_tried_as_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    beside = tmp_path / "a.png"
    beside.write_bytes(STRANGER)
    for task in ([], ["--task", beside]):
        Inside(eval.main, "dg-eval").refused(capsys, 2 if task else 1, *task, "--plot", tmp_path / "a.svg")
    writing = tmp_path / "a-writing.svg"
    writing.write_bytes(STRANGER)
    Inside(bench.main, "dg-bench").refused(capsys, 1, "--plot", tmp_path / "a.svg")
    counts = tmp_path / "m.gguf.routing.json"
    flags = ["--save-routing", "-p", "hi", "--record", counts]
    assert "another name" in Inside(run.main, "dg-run").refused(capsys, 2, tmp_path / "m.gguf", *flags)
    assert {path.name for path in tmp_path.iterdir()} == {beside.name, writing.name}
    assert beside.read_bytes() == writing.read_bytes() == STRANGER


def a_stranger(path: Path) -> str:
    path.write_bytes(STRANGER)
    return "holds something else than"


def a_folder(path: Path) -> str:
    path.mkdir()
    return "this is a folder"


def a_fifo(path: Path) -> str:
    os.mkfifo(path)
    return "not a regular file"


def a_full_device(path: Path) -> str:
    path.symlink_to("/dev/full")
    return "not a regular file"


def read_only(path: Path) -> str:
    path.write_bytes(b"")
    path.chmod(0o444)
    return "read-only"


def state(path: Path) -> list[int]:
    """Return the facts that a change of a file or a link would change. The time of access is none: reading sets it."""
    found = os.lstat(path)
    return [found.st_mode, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


@pytest.mark.parametrize("make", [a_stranger, a_folder, a_fifo, a_full_device, read_only])
@pytest.mark.parametrize("use", OUTPUTS, ids=str)
def test_what_cannot_be_written_is_refused_before_a_model_is_opened(
    use: Use, make: Callable[[Path], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model does not exist: what is told is the output."""
    target = tmp_path / "target.svg"
    told = make(target)
    before = state(target)
    if isinstance(use.param.type, OutputFile) and use.param.type.kind is None and make is a_stranger:
        pytest.skip("whoever appends to it looks into it: see the next test")
    assert told in use.refused(capsys, 1, tmp_path / "none.gguf", *use.given(target))
    assert state(target) == before and [path.name for path in tmp_path.iterdir()] == [target.name]
    if make is a_stranger:
        assert target.read_bytes() == STRANGER


@pytest.mark.parametrize("ending", ["", "\n", "\n{", '\n{"line": 1, "input": "mine"'])
def test_a_strangers_file_is_never_appended_to(ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = STRANGER + ending.encode()
    asked, target = tmp_path / "asked.jsonl", tmp_path / "target"
    asked.write_text('{"prompt": "Sort:\\nfig"}\n')
    target.write_bytes(text)
    Inside(run.main, "dg-run").refused(capsys, 1, bundled("tidy"), "--batch", asked, "-o", target)
    Inside(run.main, "dg-run").refused(capsys, 1, bundled("tidy"), "--batch", asked, "-o", target, "--restart")
    Inside(eval.main, "dg-eval").refused(capsys, 1, "--task", "sudoku", "--count", 1, "--results", target)
    assert target.read_bytes() == text


def test_a_stranger_with_one_line_and_no_end_is_not_emptied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in (b'{"prompt": "Sort:\\nfig"}', b"x", b'{"run": "mine"}', b'{"line": "1"}', b'{"run": "[1, 2'):
        asked, target = tmp_path / "asked.jsonl", tmp_path / "target"
        asked.write_text('{"prompt": "Sort:\\nfig"}\n')
        target.write_bytes(text)
        Inside(run.main, "dg-run").refused(capsys, 1, bundled("tidy"), "--batch", asked, "-o", target)
        Inside(eval.main, "dg-eval").refused(capsys, 1, "--task", "sudoku", "--count", 1, "--results", target)
        assert target.read_bytes() == text


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk without a free block."""
    if os.getuid():
        pytest.skip("only root may mount")
    folder = tmp_path / "full"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], capture_output=True).returncode:
        pytest.skip("nothing may be mounted here")
    try:
        with pytest.raises(OSError, match="No space"), open(folder / "filler", "wb", buffering=0) as filler:
            for _ in range(100):
                filler.write(bytes(4096))
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_told_before_a_model_is_opened(full: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for use in OUTPUTS:
        told = use.refused(capsys, 1, full / "none.gguf", *use.given(full / "target.svg"))
        assert f"target.svg: no file can be made in {full}: no space left on device" in told
    assert [path.name for path in full.iterdir()] == ["filler"]


def test_outputs_are_known_again_as_their_own_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every file that a command wrote is replaced when the same command is given again."""
    there = {name: tmp_path / name for name in ("f.json", "p.svg", "e.json", "b.npz", "q.png", "c.gguf", "i.gguf")}
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Sort:\nfig ant\n")
    model = tmp_path / "m.gguf"
    shutil.copy(bundled("tidy"), model)
    commands: list[tuple[click.Command, list[object]]] = [
        (bench.main, [model, "--runs", 1, "-o", there["f.json"], "--plot", there["p.svg"]]),
        (eval.main, [model, "--task", "json", "--count", 1, "-o", there["e.json"], "--plot", there["q.png"],
                     "--sweep", "steps=1,2", "--against", model, "--prompts", 1, "--save-base", there["b.npz"]]),
        (convert.main, [model, "-o", there["c.gguf"], "--type", "q8_0", "--calibrate", prompts, "--force",
                        "--calibrate-tokens", 40, "--save-imatrix", there["i.gguf"]]),
        *((run.main, [model, "-p", "Sort:\nfig", "--save-routing", "--quiet", "--record", tmp_path / f"r.{end}"])
          for end in ("cast", "svg", "gif")),
    ]  # fmt: skip
    for main, arguments in commands:
        for _ in range(2):
            code, _, err = Inside(main, str(main.name)).run(capsys, *arguments)
            assert code == 0, err
    assert all(path.stat().st_size for path in tmp_path.iterdir()), "an empty file stands for one that was lost"
    for name, path in there.items():
        if name != "f.json":  # and no other kind takes them for its own
            kept = path.read_bytes()
            Inside(bench.main, "dg-bench").refused(capsys, 1, model, "-o", path)
            assert path.read_bytes() == kept


def test_an_edit_leaves_a_file_that_was_changed_meanwhile(tmp_path: Path) -> None:
    """Someone saves the file in an editor while the model works."""
    notes = tmp_path / "notes.txt"
    notes.write_text("the sky is blue")
    child = (
        "import sys, dgemma; from dgemma.cli.run import main; edit = dgemma.Model.edit\n"
        "def slow(*a, **b):\n    done = edit(*a, **b); open(sys.argv[-1], 'w').write('what was typed'); return done\n"
        "dgemma.Model.edit = slow\n"
        "main.main([dgemma.model.bundled('tidy'), '--match', 'sky', '--instruct', 'x', '--lengths', '1', '--in-place',"
        " '--edit', sys.argv[-1]], prog_name='dg-run')"
    )
    done = subprocess.run([sys.executable, "-c", child, str(notes)], capture_output=True, text=True)
    assert done.returncode == 1 and "changed meanwhile" in done.stderr and done.stdout.startswith("--- ")
    assert notes.read_text() == "what was typed"


def test_a_result_is_told_even_if_its_file_cannot_be_written_any_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for main, arguments in ((bench.main, ["--runs", 1]), (eval.main, ["--task", "sudoku", "--count", 1])):
        out = tmp_path / "figures.json"
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", fails)
            code, printed, err = Inside(main, str(main.name)).run(capsys, *arguments, "-o", out)
        assert code == 1 and "figures.json: no space left" in err and "| " in printed
        assert not list(tmp_path.iterdir())


def test_a_name_that_is_no_text_works_everywhere(tmp_path: Path) -> None:
    """Bytes that are no UTF-8, in every name, with an output that takes plain ASCII alone."""
    odd = os.fsdecode(b"\xff\xfe")
    model, asked = tmp_path / f"m{odd}.gguf", tmp_path / f"a{odd}.jsonl"
    shutil.copy(bundled("tidy"), model)
    asked.write_text('{"prompt": "Sort:\\nfig"}\n')
    names = ["f.json", "p.svg", "o.jsonl", "e.json", "r.jsonl", "c.gguf", "r.svg"]
    out = {name: tmp_path / f"{odd}{name}" for name in names}
    for module, *arguments in (
        ("cli.info", model),
        ("cli.info", model, "--json"),
        ("cli.run", model, "-p", "Sort:\nfig", "--json"),
        ("cli.run", model, "-f", asked, "--raw", "--max-tokens", 3, "--record", out["r.svg"]),
        ("cli.run", model, "--batch", asked, "-o", out["o.jsonl"]),
        ("cli.bench", model, "--runs", 1, "-o", out["f.json"], "--plot", out["p.svg"]),
        ("cli.eval", model, "--task", "json", "--count", 1, "-o", out["e.json"], "--results", out["r.jsonl"]),
        ("convert.cli", model, "-o", out["c.gguf"], "--type", "q8_0", "--verify", "--json"),
    ):
        command = [sys.executable, "-m", f"dgemma.{module}", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
        assert done.returncode == 0, done.stderr
    assert all(path.stat().st_size for path in out.values())
    assert json.loads(out["f.json"].read_bytes())["model"]["path"] == str(model), "JSON keeps a name's bytes"


def test_standard_streams_are_inputs_and_outputs_too(tmp_path: Path) -> None:
    notes = tmp_path / "notes.svg"
    notes.write_bytes(STRANGER)
    run_it = [sys.executable, "-m", "dgemma.cli.run", "--record", str(notes)]
    with open(notes, "rb") as given:
        done = subprocess.run(run_it, stdin=given, capture_output=True, text=True)
    assert done.returncode == 2 and "this is standard input" in done.stderr
    bench_it = [sys.executable, "-m", "dgemma.cli.bench", "--runs", "1", "-o", str(notes)]
    with open(notes, "ab") as out:
        done = subprocess.run(bench_it, stdout=out, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and "this is standard output" in done.stderr
    with open(notes, "ab") as out:
        edit = ["--edit", str(notes), "--match", "my", "--instruct", "x", "--in-place"]
        done = subprocess.run([*run_it[:3], *edit], stdout=out, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and "this is standard output" in done.stderr
    assert notes.read_bytes() == STRANGER


def test_a_chat_is_not_saved_where_its_answers_go(tmp_path: Path) -> None:
    for stream in ("stdout", "stderr"):
        out = tmp_path / stream
        with open(out, "wb") as opened:
            streams: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stream: opened}
            given = f"/save {out}\n/save {bundled('tidy')}\nSort:\\\nfig\n".encode()
            chat = [sys.executable, "-m", "dgemma.cli.run", bundled("tidy"), "--chat", "--max-tokens", "9"]
            done = subprocess.run(chat, input=given, **streams)
        assert done.returncode == 1 and out.stat().st_size and b'"messages"' not in out.read_bytes()


@pytest.mark.parametrize("flags", [[], ["-f", "-"], ["--chat"], ["--fill", "-"], ["--canvas", "-", "--pin", "a"]])
def test_a_closed_standard_input_is_told(flags: list[str]) -> None:
    run_it = [sys.executable, "-m", "dgemma.cli.run", bundled("tidy"), *flags]
    done = subprocess.run(["sh", "-c", 'exec "$@" <&-', "sh", *run_it], capture_output=True, text=True)
    assert done.returncode in (1, 2) and "standard input is closed" in done.stderr and done.stderr.count("\n") == 1


def test_what_never_ends_is_not_read_for_ever(capsys: pytest.CaptureFixture[str]) -> None:
    dg_run = Inside(run.main, "dg-run")
    assert "/dev/zero: more than 256.0 MiB" in dg_run.refused(capsys, 2, bundled("tidy"), "-f", "/dev/zero")
    edit = ("--edit", "/dev/zero", "--span", "0:1", "--instruct", "x")
    assert "/dev/zero: expected a file" in dg_run.refused(capsys, 1, bundled("tidy"), *edit)


def test_python_replaces_no_strangers_file_either(tmp_path: Path) -> None:
    model, notes = tmp_path / "m.gguf", tmp_path / "notes"
    shutil.copy(bundled("tidy"), model)
    before = model.read_bytes()
    for target in (model, notes):
        notes.write_bytes(STRANGER)
        with dgemma.Model(model) as opened, pytest.raises(dgemma.Error):
            opened.save_routing(target)
        with pytest.raises(dgemma.Error):
            Base({}).save(target)
        for wanted in ({"out": target}, {"out": tmp_path / "o.gguf", "calibrate": notes, "save_imatrix": target}):
            with pytest.raises(dgemma.Error):
                convert.convert(model, type="q8_0", force=True, **wanted)
    assert model.read_bytes() == before and notes.read_bytes() == STRANGER
    assert {path.name for path in tmp_path.iterdir()} == {"m.gguf", "notes"}


def test_saved_counts_follow_no_link(tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    shutil.copy(bundled("tidy"), model)
    notes = tmp_path / "notes"
    notes.write_bytes(STRANGER)
    Path(f"{model}.routing.json.{os.getpid()}.part").symlink_to(notes)
    with dgemma.Model(model) as opened:
        opened.save_routing()
    assert notes.read_bytes() == STRANGER


def test_a_strangers_file_in_the_cache_is_not_replaced(tmp_path: Path) -> None:
    path = make(tmp_path, Synthetic("tiny"))
    path.write_bytes(STRANGER)
    with pytest.raises(dgemma.Error, match="another file than dg-bench would make"):
        make(tmp_path, Synthetic("tiny"))
    assert path.read_bytes() == STRANGER


def test_parts_of_two_conversions_never_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is half-way through naming its parts when the other is complete."""
    targets = [tmp_path / f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    halfway, rename = threading.Event(), NewFile.rename

    def slow(self: NewFile, force: bool) -> None:
        rename(self, force)
        if threading.current_thread() is first and not halfway.is_set():
            halfway.set()
            second.join(0.3)

    monkeypatch.setattr(NewFile, "rename", slow)

    def write(text: bytes) -> None:
        with NewFiles(targets, [9, 9, 9]) as new:
            for file in new.files:
                file.write(text)
            if text == b"GGUF 2":
                halfway.wait()
            new.commit(force=True)

    first = threading.Thread(target=write, args=(b"GGUF 1",))
    second = threading.Thread(target=write, args=(b"GGUF 2",))
    for thread in (second, first):
        thread.start()
    for thread in (first, second):
        thread.join()
    assert [path.read_bytes() for path in targets] == [b"GGUF 2"] * 3
    assert sorted(tmp_path.iterdir()) == targets


def test_a_part_that_is_a_link_stays_one(tmp_path: Path) -> None:
    target = tmp_path / "m.gguf"
    first = convert.convert(bundled("tidy"), target, "q8_0", split_max_size=1 << 20)
    second = first.paths[1]
    real = second.rename(tmp_path / "real.gguf")
    second.symlink_to(real)
    real.write_bytes(b"GGUF of before")
    convert.convert(bundled("tidy"), target, "q8_0", split_max_size=1 << 20, force=True)
    assert second.is_symlink() and real.stat().st_size > 100
    dgemma.Model(first.path).close()


def test_a_log_on_a_disk_that_fills_up_names_its_file(full: Path) -> None:
    (full / "filler").write_bytes(b"x" * 20_000)
    with (
        pytest.raises(dgemma.SystemFailure, match=r"log: no space left on device"),
        LineLog(full / "log", ANY, "x") as log,
    ):
        for i in range(100):
            log.append({"line": i, "text": 1000 * "x"})
    found: list[Any] = []
    with LineLog(full / "log", ANY, "x") as log:
        log.recover(found.append)
        log.mend()
    assert [value["line"] for value in found] == list(range(len(found))) and found


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "m.gguf"
    with pytest.raises(dgemma.Error, match="appeared meanwhile"), NewFile(target, 1) as new:
        new.write(b"x")
        finish = new.finish

        def appears(force: bool) -> None:
            finish(force)
            target.write_bytes(STRANGER)

        new.finish = appears  # type: ignore[method-assign]
        new.commit(force=False)
    assert target.read_bytes() == STRANGER and list(tmp_path.iterdir()) == [target]


# ---- the writer itself ----


def test_a_file_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"old")
    target.chmod(0o640)
    link.symlink_to(target)
    with pytest.raises(ZeroDivisionError), whole_file(link) as file:
        file.write(b"half")
        assert target.read_bytes() == b"old" and len(unfinished(target)) == 1
        raise ZeroDivisionError
    assert target.read_bytes() == b"old" and unfinished(target) == []
    write_whole(link, b"new")
    assert target.read_bytes() == b"new" and link.is_symlink() and stat.S_IMODE(target.stat().st_mode) == 0o640


def test_a_folders_name_is_no_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for use in OUTPUTS:
        for name in ("", f"{tmp_path}/new/", "/", "-"):
            assert "names no file" in use.refused(capsys, 2, *needed(use), *use.given(name))
    assert not list(tmp_path.iterdir())


def test_a_strangers_part_file_is_not_taken_for_one_of_ours(tmp_path: Path) -> None:
    for name in (".t.gguf.mine.part", ".t.gguf.0123456789abcdef.part", ".t.gguf.part", ".tXgguf.0123456789ab.part"):
        (tmp_path / name).write_bytes(STRANGER)
    ours = tmp_path / ".t.gguf.0123456789ab.part"
    ours.write_bytes(b"")
    assert unfinished(tmp_path / "t.gguf") == [ours]


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    target = tmp_path / ("é" * 125 + ".json")  # 255 bytes
    write_whole(target, b"x")
    assert target.read_bytes() == b"x" and len(list(tmp_path.iterdir())) == 1


def test_the_files_of_an_input(tmp_path: Path) -> None:
    names = ["m-00001-of-00003.gguf", "m-00002-of-00003.gguf", "m-00003-of-00003.gguf", "m-00001-of-00004.gguf"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in input_files(tmp_path / names[0])] == names[:3]
    (tmp_path / "config.json").write_bytes(b"")
    assert [path.name for path in input_files(tmp_path)] == ["config.json"]
    assert input_files("hf:owner/name") == []
    check_distinct([("out", tmp_path / "new")], [("source", tmp_path)])
