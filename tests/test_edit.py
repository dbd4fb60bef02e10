"""Editing: one passage is rewritten, all else stays, and a file is never half-written."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import Case
from test_fill import refusal
from test_run import run

import dgemma
from dgemma.cli import infill as command
from dgemma.files.output import write_whole
from dgemma.infill.edit import FOLLOWS, Edited, lengths_for
from dgemma.model import bundled

TEXT = "the sky is blue and the sky is why\nit was on the sky\n"
NOTES = "# sea\nzoo fig bat\n- owl: 12\n"
LONG = "the sky is blue and " * 12 + "it was on the sky" + " you are with the sky" * 12


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edit")
    shape = dict(layers=2, hidden=32, ffn=32, heads=2, kv_heads=1, head_dim=16, global_head_dim=16, experts=4)
    case = Case("edit", seed=5, shape=dict(shape, canvas=32, context=512))
    with dgemma.Model(case.convert(folder / "hf", folder / "edit.gguf"), threads=1) as model:
        yield model


@pytest.mark.parametrize(
    ("text", "passage", "instruction", "written"),
    [
        (NOTES, "zoo fig bat", "Sort:", "bat fig zoo"),
        (NOTES, "zoo fig bat", "Upper case:", "ZOO FIG BAT"),
        ("# sea\nowl=12\nfig=red\n- hat\n", "owl=12\nfig=red", "Write JSON:", '{"owl": 12, "fig": "red"}'),
        ("ant {\nsea\n}\n- hat", "ant {\nsea\n}", "Indent:", "ant {\n  sea\n}"),
        ("sea fig: ({[ owl hat\n", "({[", "Close the brackets:", "({[]})"),
    ],
    ids=lambda value: None if "\n" in value else value,
)
def test_a_passage_is_rewritten_and_all_else_stays(
    tidy: dgemma.Model, text: str, passage: str, instruction: str, written: str
) -> None:
    begin = text.index(passage)
    edited = tidy.edit(text, (begin, begin + len(passage)), instruction)
    assert edited.passage == written
    assert edited.text == str(edited) == text.replace(passage, written) and edited.before == text
    tokens = len(tidy.tokenizer.encode(passage))
    assert [trial.lengths for trial in edited.filled.trials] == [(n,) for n in lengths_for(tokens)]


def test_the_prompt_is_instruction_and_passage(small):
    """And the canvas begins with what stands before the passage."""
    steps: list[dgemma.Step] = []
    edited = small.edit(TEXT, (0, 3), "Which?", lengths=[4], steps=1, on_step=steps.append)
    asked = small.tokenizer.chat([{"role": "user", "content": "Which?\nthe"}])
    assert edited.filled.best.result.prompt_tokens == len(asked)
    rest = small.tokenizer.encode(TEXT[3:], special=False)
    turn_end = next(i for i in asked[1:] if i in small.config.end_ids)
    assert steps[0].canvas.tolist()[4:] == [*rest, turn_end, *[0] * 32][:28]


def test_surroundings_that_do_not_fit_go_into_the_prompt(small):
    begin = LONG.index("it was")
    steps: list[dgemma.Step] = []
    edited = small.edit(LONG, (begin, begin + 6), "Now.", lengths=[6], steps=1, on_step=steps.append)
    assert edited.text[:begin] == LONG[:begin] and edited.text.endswith(LONG[begin + 6 :])
    ids = [*small.tokenizer.encode(LONG[:begin]), *[0] * 6, *small.tokenizer.encode(LONG[begin + 6 :])]
    message = small.tokenizer.chat([{"role": "user", "content": "Now.\nit was"}])
    begins = len(small.tokenizer.encode(LONG[:begin])) - 13  # 26 tokens beside the hole's 6
    follows = FOLLOWS + small.tokenizer.decode(ids[begins + 32 :])
    asked = small.tokenizer.chat([{"role": "user", "content": "Now.\nit was" + follows}])
    assert len(asked) > len(message) + 30
    assert edited.filled.best.result.prompt_tokens == len(asked) + begins
    assert steps[0].canvas.tolist()[:13] == ids[begins : begins + 13]


def test_an_insertion_and_a_whole_text_are_passages(small):
    inserted = small.edit(TEXT, (3, 3), "More.", steps=1, lengths=[2])
    assert inserted.text[:3] == "the" and inserted.text.endswith(TEXT[3:])
    whole = small.edit("the sky", (0, 7), "Less.", steps=1, lengths=[2])
    assert whole.text == whole.passage
    for span in ((-1, 2), (3, 2), (0, 99)):
        with pytest.raises(dgemma.UsageError, match="span must be within the text's 7"):
            small.edit("the sky", span, "Less.")
    with pytest.raises(dgemma.UsageError, match="instruction is empty"):
        small.edit("the sky", (0, 2), " ")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a\nb\nc\n", "a\nB\nc\n"),
        ("a\nb", "a\nb\n"),
        ("a\r\nb", "a\r\nc"),
        ("", "a\n"),
        ("x" * 9 + "\n\n", "\n"),
        ("a\n", "a\n"),
    ],
)
def test_a_diff_is_what_patch_reads(before, after, tmp_path):
    edited = Edited(after, before, (0, 0), filled=None)
    file = tmp_path / "text"
    file.write_bytes(before.encode())
    patch = edited.diff()
    assert bool(patch) == (before != after)
    if patch:
        subprocess.run(["git", "apply", "-"], input=patch.encode(), cwd=tmp_path, check=True)
    assert file.read_bytes().decode() == after


BREAKS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"  # where str.splitlines() ends a line; diffs do at \n alone
texts = st.text(st.sampled_from(BREAKS + "\n\n\nab-+@\\ \0") | st.characters(exclude_categories=["Cs"]), max_size=24)


def applied(diff: str, text: str) -> str:
    """A text with a unified diff applied, by the format's own rules and none of the code that wrote it."""
    old, made, at = text.split("\n"), [], 0
    old = [line + "\n" for line in old[:-1]] + [line for line in old[-1:] if line]
    lines = diff.split("\n")[2:-1]
    while lines:
        head = re.fullmatch(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@", lines.pop(0))
        assert head is not None
        start, gone, come = int(head[1]), int(head[2] or 1), int(head[4] or 1)
        begin = start - 1 if gone else start
        made += old[at:begin]
        at = begin
        assert len(made) == int(head[3]) - (1 if come else 0)
        while gone or come:
            mark, line = lines[0][0], lines.pop(0)[1:] + "\n"
            if lines and lines[0].startswith("\\"):
                lines.pop(0)
                line = line[:-1]
            if mark in " -":
                assert line == old[at]
                at, gone = at + 1, gone - 1
            if mark in " +":
                made.append(line)
                come -= 1
    return "".join(made + old[at:])


@settings(max_examples=500, deadline=None)
@given(texts, texts, texts, texts)
def test_a_diff_applied_is_the_edited_text(before: str, old: str, new: str, behind: str) -> None:
    """Whatever is in a text, and whatever passage is rewritten as whatever."""
    edited = Edited(before + new + behind, before + old + behind, (len(before), len(before + new)), filled=None)
    diff = edited.diff()
    assert applied(diff, edited.before) == edited.text if diff else old == new


@pytest.mark.parametrize("program", [["patch", "-p1", "--silent"], ["git", "apply", "-"]], ids=["patch", "git"])
@pytest.mark.parametrize(
    "name",
    [
        *("a b.txt", " a", "b ", "tab\tname", "new\nline", "r\rn", "\u00e9\u6f22.txt", 'quo"te', "back\\slash", "a/x"),
        *("./b/x", "\x01\x7f", os.fsdecode(b"latin-\xe9"), "it's $HOME", "-p0", "a/a b/c", "dir//x", "b\u2028c"),
        *("/dev/null2", "a\\", "a\n", "x\ty z", "@@ -1 +1 @@", "--- a", "p.orig"),
    ],
)
def test_patch_finds_the_file_whatever_its_name(name: str, program: list[str], tmp_path: Path) -> None:
    if shutil.which(program[0]) is None:
        pytest.skip(f"there is no {program[0]} here")
    edited = Edited("al\x0cpha\u2028\nbe\rta\r\nB", "al\x0cpha\u2028\nbe\rta\r\nb", (0, 0), filled=None)
    file = tmp_path / name.lstrip("/")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(edited.before.encode())
    done = subprocess.run(program, input=edited.diff(name).encode(), cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done
    assert file.read_bytes().decode() == edited.text


# ---- on the command line ----

TIDY = bundled("tidy")


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    file = tmp_path / "notes.md"
    file.write_text(NOTES)
    file.chmod(0o640)
    return file


def test_the_change_is_shown_and_written_only_if_asked_to(notes: Path) -> None:
    asked = (TIDY, "--edit", str(notes), "--span", "6:17", "--instruct", "Sort:")
    shown = run(*asked).stdout.decode()
    change = "@@ -1,3 +1,3 @@\n # sea\n-zoo fig bat\n+bat fig zoo\n - owl: 12\n"
    assert shown == f"--- a{notes}\n+++ b{notes}\n{change}" and notes.read_text() == NOTES
    told = json.loads(run(*asked, "--in-place", "--json", "--quiet").stdout)
    assert notes.read_text() == told["text"] == NOTES.replace("zoo fig bat", "bat fig zoo")
    assert (told["diff"], told["span"]) == (shown, [6, 17])
    assert stat.S_IMODE(notes.stat().st_mode) == 0o640 and os.listdir(notes.parent) == ["notes.md"]


def test_a_match_is_a_span(notes: Path) -> None:
    at = (TIDY, "--edit", str(notes), "--instruct", "Upper case:")
    assert b"+ZOO FIG BAT\n" in run(*at, "--match", "zoo fig bat").stdout
    assert "2 times, not once" in refusal(2, *at, "--match", "a") and "0 times" in refusal(2, *at, "--match", "x")


def test_colours_are_for_a_terminal() -> None:
    edited = Edited("a\nB\n", "a\nb\n", (0, 0), filled=None)
    coloured = command.diff(edited, "f", colour=True)
    assert "\x1b[31m-b" in coloured and "\x1b[32m+B" in coloured and "\x1b[1m--- a/f" in coloured
    assert command.diff(edited, "f", colour=False) == edited.diff("f")


def test_a_write_that_fails_leaves_the_old_file(notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device", str(notes))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(dgemma.SystemFailure, match=r"notes\.md: no space"):
        write_whole(str(notes), b"new")
    assert notes.read_text() == NOTES and os.listdir(notes.parent) == ["notes.md"]


def test_a_link_is_followed(notes: Path) -> None:
    link = notes.parent / "link"
    link.symlink_to(notes)
    write_whole(str(link), b"new")
    assert link.is_symlink() and notes.read_bytes() == b"new"


def test_half_an_edit_is_refused(notes: Path) -> None:
    at = ("--edit", str(notes))
    assert "--edit needs --instruct" in refusal(2, *at, "--span", "0:1")
    assert "--span A:B or --match" in refusal(2, *at, "--instruct", "1")
    assert "--span A:B or --match" in refusal(2, *at, "--instruct", "1", "--span", "0:1", "--match", "1")
    for span in ("1", "5:2", "0:99", "a:b"):
        assert "is no A:B within the 28" in refusal(2, *at, "--instruct", "1", "--span", span)
    assert "--instruct, not by -p" in refusal(2, *at, "--instruct", "1", "--span", "0:1", "-p", "1")
    assert "--in-place needs --edit" in refusal(2, "--in-place", "-p", "1")
    assert "cannot be edited" in refusal(2, "--edit", "-", "--instruct", "1", "--span", "0:1")
