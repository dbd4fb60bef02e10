"""dg-run --batch: a line for a line, whatever is in it, and none lost or doubled whenever it is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from models.tidy import tasks
from support.commands import Inside

import dgemma
from dgemma.batch import Batch
from dgemma.cli.run import main
from dgemma.convert import convert
from dgemma.model import bundled

RUN = Inside(main, "dg-run")
PATIENCE = 600  # seconds


@pytest.fixture(scope="module")
def tidy() -> Iterator[dgemma.Model]:
    with dgemma.Model(bundled("tidy")) as model:
        yield model


def written(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def told(path: Path) -> list[dict[str, Any]]:
    """The lines of answers, without what differs from run to run."""
    return told_of(path.read_bytes())


def test_every_line_is_answered_as_alone(tidy: dgemma.Model, tmp_path: Path, capsys: Any) -> None:
    think, tool = tasks.cases("think", 1)[0], tasks.cases("tool", 1)[0]
    lines = [
        {"prompt": "Sort:\nsea fig ant", "id": "a", "seed": 4},
        {"messages": list(think.messages), "thinking": True, "max_tokens": 60},
        {"messages": list(tool.messages), "tools": list(tool.tools)},
        {"prompt": "Sort:\nsea fig ant", "effort": "low", "system": "Be brief."},
        {"prompt": "<bos>fig (", "raw": True, "steps": 3},
    ]
    prompts, out = written(tmp_path / "p.jsonl", *lines, ""), tmp_path / "a.jsonl"
    arguments = (bundled("tidy"), "--batch", prompts, "-o", out, "--seed", 1)
    status, printed, err = RUN.run(capsys, *arguments)
    assert (status, printed) == (0, "") and "5 lines answered: " in err
    found = told(out)
    assert [line["line"] for line in found] == [1, 2, 3, 4, 5] and found[0]["id"] == "a" and "id" not in found[1]
    assert found[0]["text"] == tidy.generate([{"role": "user", "content": "Sort:\nsea fig ant"}], seed=4).text
    prompt = tidy.tokenizer.chat(think.messages, thinking=True)
    alone = tidy.generate(prompt, seed=1, max_tokens=60)
    assert (found[1]["steps"], found[1]["tokens"], found[1]["seed"]) == (alone.steps, len(alone.ids), 1)
    assert (found[1]["thinking"], found[1]["text"]) == (think.thought, think.answer)
    assert found[2]["tool_calls"][0]["name"] in tool.answer and found[3]["text"] == "ant fig sea"
    assert found[4]["text"] == tidy.generate("<bos>fig (", seed=1, steps=3).text

    before = out.read_bytes()
    status, _, err = RUN.run(capsys, *arguments)
    assert status == 0 and out.read_bytes() == before and "0 lines answered, 5 were there already" in err


WRONG = [
    ("{", "the line is no JSON"),
    ("[1]", "no JSON object"),
    ({}, "a prompt or messages"),
    ({"prompt": "fig", "messages": []}, "a prompt or messages"),
    ({"prompt": 1}, "prompt must be a text"),
    ({"prompt": ""}, "empty prompt"),
    ({"prompt": "fig", "nonsense": 1}, "no field 'nonsense'"),
    ({"prompt": "fig", "steps": 0}, "steps must be"),
    ({"prompt": "fig", "steps": "3"}, "steps must be"),
    ({"prompt": "fig", "effort": "lazy"}, "effort must be"),
    ({"prompt": "fig", "raw": True, "system": "Be brief."}, "needs a chat template"),
    ({"prompt": "fig " * 3000}, "more than 2048"),
    ({"messages": [1]}, "a list of objects"),
    ({"messages": [{"content": 3}]}, ""),
]


@pytest.mark.parametrize(("line", "message"), WRONG)
def test_what_is_wrong_with_a_line_stands_in_its_answer(tidy: dgemma.Model, line: object, message: str) -> None:
    text = line if isinstance(line, str) else json.dumps(line)
    with Batch(tidy) as batch:
        answer = batch.answer(text)
        assert set(answer) == {"error"} and message in answer["error"]["message"]
        assert "\n" not in answer["error"]["message"]
        assert batch.answer('{"prompt": "Sort:\\nsea fig ant", "id": 0}')["text"] == "ant fig sea", "it goes on"


def test_lines_that_fail_do_not_stop_the_others(tmp_path: Path, capsys: Any) -> None:
    prompts = written(tmp_path / "p.jsonl", "{", {"prompt": "Sort:\nsea fig ant"}, {"id": 3, "prompt": 1})
    out = tmp_path / "a.jsonl"
    for again in ("", ", 3 were there already"):
        status, _, err = RUN.run(capsys, bundled("tidy"), "--batch", prompts, "-o", out)
        assert status == 1 and f"2 of 3 lines could not be answered; {out} says why" in err and again in err
    assert ["error" in line for line in told(out)] == [True, False, True] and told(out)[2]["id"] == 3


def test_a_kill_loses_and_doubles_no_line(tmp_path: Path, capsys: Any) -> None:
    """Killed while it works, and once more with its last line torn: then it goes on, as if nothing had been."""
    words = [case.messages[0]["content"] for case in tasks.cases("indent", 6)]
    prompts = written(tmp_path / "p.jsonl", *({"prompt": text, "seed": i} for i, text in enumerate(words)))
    whole, out = tmp_path / "whole.jsonl", tmp_path / "a.jsonl"
    slow = ("--steps", "24", "--stability", "23")
    assert RUN.run(capsys, bundled("tidy"), "--batch", prompts, "-o", whole, *slow)[0] == 0

    command = [sys.executable, "-m", "dgemma.cli.run", bundled("tidy"), "--batch", prompts, "-o", out, *slow]
    for least in (1, 3):
        process = subprocess.Popen([str(part) for part in command], stderr=subprocess.DEVNULL)
        end = time.monotonic() + PATIENCE
        while process.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < least):
            assert time.monotonic() < end, "no line was answered"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert told(out) == told(whole)[: out.read_bytes().count(b"\n")]
        os.truncate(out, out.stat().st_size - 5)
    status, _, err = RUN.run(capsys, bundled("tidy"), "--batch", prompts, "-o", out, *slow)
    assert status == 0 and told(out) == told(whole) and "were there already" in err


def test_another_files_answers_are_not_gone_on_with(tmp_path: Path, capsys: Any) -> None:
    prompts, out = written(tmp_path / "p.jsonl", {"prompt": "Sort:\nsea fig"}), tmp_path / "a.jsonl"
    assert RUN.run(capsys, bundled("tidy"), "--batch", prompts, "-o", out)[0] == 0
    prompts = written(tmp_path / "q.jsonl", {"prompt": "Sort:\nsea ant"})
    kept = out.read_bytes()
    assert "1 of its 1 line answer none of" in RUN.refused(capsys, 2, bundled("tidy"), "--batch", prompts, "-o", out)
    assert out.read_bytes() == kept
    out.write_text("my notes\n")
    RUN.refused(capsys, 1, bundled("tidy"), "--batch", prompts, "-o", out)
    assert out.read_text() == "my notes\n"


def test_answers_of_another_model_or_other_settings_are_not_mixed(tmp_path: Path, capsys: Any) -> None:
    prompts, out = written(tmp_path / "p.jsonl", {"prompt": "Sort:\nsea fig"}, {"prompt": "a"}), tmp_path / "a.jsonl"
    model, other = tmp_path / "m.gguf", tmp_path / "other.gguf"
    shutil.copy(bundled("tidy"), model)
    convert(model, other, "q4_0")
    asked = ("--batch", prompts, "-o", out)
    assert RUN.run(capsys, model, *asked, "--seed", 1)[0] == 0
    kept = out.read_bytes()
    for wrong, named in (
        ([other, "--seed", 1], "model "),
        ([model, "--seed", 2], "seed 1, not 2"),
        ([model, "--seed", 1, "--effort", "low"], "steps 48, not "),
        ([model, "--seed", 1, "--exact"], "exact False, not True"),
        ([model, "--seed", 1, "--system", "Be brief."], "system None, not Be brief."),
        ([model, "--seed", 1, "--raw"], "raw None, not True"),
    ):
        told = RUN.refused(capsys, 2, *wrong, *asked)
        assert named in told and "--restart" in told and out.read_bytes() == kept
    assert RUN.run(capsys, model, *asked, "--seed", 1, "--threads", 1, "--ram", "1G")[0] == 0
    assert out.read_bytes() == kept, "what makes no other answer is no other setting"
    shutil.move(model, tmp_path / "elsewhere.gguf")
    assert RUN.run(capsys, tmp_path / "elsewhere.gguf", *asked, "--seed", 1)[0] == 0 and out.read_bytes() == kept
    out.write_bytes(kept.replace(dgemma.__version__.encode(), b"0.0.9"))
    assert "version 0.0.9, not " in RUN.refused(capsys, 2, tmp_path / "elsewhere.gguf", *asked, "--seed", 1)
    assert RUN.run(capsys, other, *asked, "--seed", 1, "--restart")[0] == 0
    assert len(told_lines(out)) == 2 and out.read_bytes() != kept


def test_a_mended_line_does_not_void_the_other_answers(tmp_path: Path, capsys: Any) -> None:
    lines: list[object] = [{"prompt": "Sort:\nsea fig", "id": i} for i in range(4)]
    prompts, out = written(tmp_path / "p.jsonl", *lines[:2], '{"prompt": 7}', lines[3]), tmp_path / "a.jsonl"
    asked = (bundled("tidy"), "--batch", prompts, "-o", out)
    assert RUN.run(capsys, *asked)[0] == 1
    before = told_lines(out)
    written(prompts, *lines)
    _, _, err = RUN.run(capsys, *asked)
    assert "1 line answered, 3 were there already, 1 of changed lines were taken out" in err
    after = told_lines(out)
    assert [line["line"] for line in after] == [1, 2, 3, 4] and [line["id"] for line in after] == [0, 1, 2, 3]
    assert [after[i] for i in (0, 1, 3)] == [before[i] for i in (0, 1, 3)] and "error" not in after[2]
    written(prompts, "", lines[0], {"prompt": "new"}, *lines[1:])  # lines come in between, and numbers change
    _, _, err = RUN.run(capsys, *asked)
    assert "1 line answered, 4 were there already" in err
    last = told_lines(out)
    assert [line["line"] for line in last] == [2, 3, 4, 5, 6] and [line.get("id") for line in last] == [
        0,
        None,
        1,
        2,
        3,
    ]
    assert [{**line, "line": 0} for line in last if "id" in line] == [{**line, "line": 0} for line in after]


def test_the_only_answers_so_far_may_be_of_mended_lines(tmp_path: Path, capsys: Any) -> None:
    """A run that was ended early, of a file whose first line was wrong."""
    lines: list[object] = [{"prompt": "Sort:\nsea fig", "id": i} for i in range(3)]
    prompts, out = written(tmp_path / "p.jsonl", *lines), tmp_path / "a.jsonl"
    assert RUN.run(capsys, bundled("tidy"), "--batch", prompts, "-o", out)[0] == 0
    out.write_bytes(out.read_bytes().splitlines(keepends=True)[0])
    written(prompts, {"prompt": "Sort:\nsea ant", "id": 9}, *lines[1:])
    _, _, err = RUN.run(capsys, bundled("tidy"), "--batch", prompts, "-o", out)
    assert "3 lines answered, 1 of changed lines were taken out" in err
    assert [(line["line"], line["id"]) for line in told_lines(out)] == [(1, 9), (2, 1), (3, 2)]


def test_requests_that_change_while_they_are_answered(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    lines: list[object] = [
        {"prompt": "Sort:\nsea fig", "id": 9000 * f"{i}"} for i in range(3)
    ]  # more than is read at once
    prompts, out = tmp_path / "p.jsonl", tmp_path / "a.jsonl"
    answer = Batch.answer

    def changes(line: object) -> Any:
        def answer_and_write(self: Batch, asked: bytes) -> dict[str, Any]:
            written(prompts, *lines[:2], line, "more")
            return answer(self, asked)

        return answer_and_write

    for last, code, told_so in ((lines[2], 0, "3 lines answered"), ({"prompt": "x"}, 1, "line 3: it was changed")):
        written(prompts, *lines)
        with monkeypatch.context() as patched:
            patched.setattr(Batch, "answer", changes(last))
            status, _, err = RUN.run(capsys, bundled("tidy"), "--batch", prompts, "-o", out)
        assert status == code and told_so in err and "internal" not in err
        out.unlink()


@pytest.mark.parametrize("text", [
    b'{"line": 1, "input": "hello there", "label": "mine"}\n', b'{"line": 1, "input": "x"}',
    b'{"line": Infinity, "input": "x"}\n',
    b'{"line": 1, "input": "0123456789abcdef"}\n', b'{"line": 1, "input": "0123456789abcdef", "run": 5}',
])  # fmt: skip
def test_lines_of_others_are_no_answers(text: bytes, tmp_path: Path, capsys: Any) -> None:
    prompts, out = written(tmp_path / "p.jsonl", {"prompt": "Sort:\nsea fig"}), tmp_path / "a.jsonl"
    for more in ([], ["--restart"]):
        out.write_bytes(text)
        told = RUN.refused(capsys, 1, bundled("tidy"), "--batch", prompts, "-o", out, *more)
        assert "line 1: not a line of dg-run --batch" in told and out.read_bytes() == text


def test_a_refused_batch_leaves_even_a_half_line(tmp_path: Path, capsys: Any) -> None:
    prompts, out = written(tmp_path / "p.jsonl", {"prompt": "Sort:\nsea fig"}), tmp_path / "a.jsonl"
    asked = (bundled("tidy"), "--batch", prompts, "-o", out)
    assert RUN.run(capsys, *asked)[0] == 0
    for text in (out.read_bytes() + b'{"line": 2', out.read_bytes()[:-1]):
        out.write_bytes(text)
        assert "seed None, not 5" in RUN.refused(capsys, 2, *asked, "--seed", 5) and out.read_bytes() == text


def test_a_last_line_without_its_end_is_kept_if_it_is_whole(tmp_path: Path, capsys: Any) -> None:
    prompts, out = written(tmp_path / "p.jsonl", {"prompt": "Sort:\nsea fig"}, {"prompt": "a"}), tmp_path / "a.jsonl"
    asked = (bundled("tidy"), "--batch", prompts, "-o", out)
    assert RUN.run(capsys, *asked)[0] == 0
    whole = out.read_bytes()
    out.write_bytes(whole[:-1])
    assert "0 lines answered, 2 were there already" in RUN.run(capsys, *asked)[2] and out.read_bytes() == whole
    for cut in (whole[:-2], whole[: whole.index(b"\n") + 9], whole[: whole.index(b"\n") + 2], whole[:1]):
        out.write_bytes(cut)
        assert RUN.run(capsys, *asked)[0] == 0 and told(out) == told_of(whole), cut


def told_of(data: bytes) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in data.splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "encoded_tokens")} for line in lines]


def told_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_two_at_once_are_refused(tmp_path: Path, capsys: Any) -> None:
    fcntl = pytest.importorskip("fcntl")
    prompts, out = written(tmp_path / "p.jsonl", {"prompt": "Sort:\nsea fig"}), tmp_path / "a.jsonl"
    with open(out, "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        err = RUN.refused(capsys, 2, bundled("tidy"), "--batch", prompts, "-o", out)
    assert "is being written by another process" in err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--batch", "p"], "-o"),
        (["-o", "a"], "--batch"),
        (["--restart", "-p", "fig"], "--batch"),
        (["--batch", "p", "-o", "a", "-p", "fig"], "--prompt"),
        (["--batch", "p", "-o", "a", "--chat"], "--chat"),
        (["--batch", "p", "-o", "a", "--json"], "--json"),
        (["--batch", "p", "-o", "a", "--fill", "f"], "--fill"),
        (["--batch", "nothing.jsonl", "-o", "a"], "nothing.jsonl"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, flags: list[str], named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    status = 1 if named == "nothing.jsonl" else 2
    assert named in RUN.refused(capsys, status, bundled("tidy"), *flags)
    assert not Path("a").exists()


def test_help_tells_every_field(capsys: Any) -> None:
    from dgemma.batch import FIELDS

    _, out, _ = RUN.run(capsys, "--help")
    assert all(f"  {name}" in out for name in FIELDS) and "--batch FILE" in out
