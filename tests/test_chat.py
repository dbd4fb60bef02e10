"""dg-run --chat: through pipes, on a terminal, and its commands one by one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.terminal import RUN, Typing, on_terminal, screen

import dgemma
from dgemma.chat.answer_parser import read
from dgemma.cli.chat import Chat
from dgemma.cli.commands import TABLE
from dgemma.cli.prompt_input import Piped
from dgemma.model import bundled
from dgemma.options import options
from dgemma.session import Session

SHORT = ["--steps", "3", "--max-tokens", "70"]
TIDY = bundled("tidy")
PUZZLE = (Path(__file__).parent / "models" / "sudoku" / "puzzle.txt").read_text().rstrip("\n")


def piped(*arguments: str, given: str) -> tuple[int, str, list[str]]:
    """A chat's exit status, standard output, and the lines of standard error."""
    done = subprocess.run([*RUN, "--chat", *arguments], input=given.encode(), capture_output=True, timeout=60)
    return done.returncode, done.stdout.decode(), done.stderr.decode().splitlines()


def figures(lines: list[str]) -> list[tuple[int, int]]:
    """Of each answer: tokens encoded and reused."""
    found = [re.search(r"(\d+) encoded, (\d+) reused", line) for line in lines]
    return [(int(m.group(1)), int(m.group(2))) for m in found if m]


# ---- pipes ----


def test_lines_are_messages_and_every_turn_encodes_only_what_is_new() -> None:
    """A backslash goes on with the next line. Of the first turn's prompt all is reused but the empty thought."""
    given = "Sort:\\\nsea fig ant\n\nUpper case:\\\nowl tea\nAgain.\n"
    code, out, err = piped(TIDY, "--system", "Be brief.", given=given)
    assert (code, out) == (0, "ant fig sea\nOWL TEA\nOWL TEA\n")
    messages: list[dict[str, str]] = [{"role": "system", "content": "Be brief."}]
    with dgemma.Model(TIDY) as model:
        held = 0
        for said, answer, seen in zip(
            ("Sort:\nsea fig ant", "Upper case:\nowl tea", "Again."), out.splitlines(), figures(err), strict=True
        ):
            messages.append({"role": "user", "content": said})
            prompt = len(model.tokenizer.chat(messages))
            assert seen == (prompt - held, held)
            held = prompt - len(model.tokenizer.encode("<|channel>thought\n<channel|>"))
            messages.append({"role": "assistant", "content": answer})


def test_a_prompt_given_is_the_first_message(chatting: str) -> None:
    code, out, err = piped(chatting, *SHORT, "-p", "why", given="")
    assert code == 0 and out and len(figures(err)) == 1
    assert piped(chatting, *SHORT, given="why\n")[1] == out


def test_a_chat_is_saved_and_goes_on_elsewhere(tmp_path: Path) -> None:
    """With its messages, which the next answer needs, its settings, and whether the model thinks."""
    file = tmp_path / "chat.json"
    said = f"/steps 30\n/seed 5\n/settled on\nUpper case:\\\nfig ant\n/save {file}\nAgain.\n"
    code, out, err = piped(TIDY, given=said)
    assert (code, out) == (0, "FIG ANT\nFIG ANT\n") and f"2 messages in {file}" in err
    kept = json.loads(file.read_text())
    assert kept["settings"] == {"steps": 30, "seed": 5, "settled": True} and not kept["thinking"]
    assert [(m["role"], m["content"]) for m in kept["messages"]] == [
        ("user", "Upper case:\nfig ant"),
        ("assistant", "FIG ANT"),
    ]
    code, again, err = piped(TIDY, given=f"/load {file}\nAgain.\n/stats\n")
    assert (code, again) == (0, "FIG ANT\n") and f"2 messages from {file}" in err
    assert re.search("steps=30 .*seed=5 .*settled=True", err[-1])
    assert [f.name for f in tmp_path.iterdir()] == ["chat.json"]


def test_a_thinker_thinks_when_it_is_asked_to() -> None:
    """The thought is in no answer and in no later prompt."""
    given = "Sort, upper case:\\\nsea fig ant\n/thought\n/think\nSort:\\\nowl bee fox\n/thought\n"
    code, out, err = piped(TIDY, "--think", given=given)
    assert (code, out) == (0, "ANT FIG SEA\nbee fox owl\n")
    assert err[1:3] == ["ant fig sea", "thinking is off"] and err[-1] == "there is no thought"
    messages = [{"role": "user", "content": "Sort, upper case:\nsea fig ant"}]
    messages += [{"role": "assistant", "content": "ANT FIG SEA"}, {"role": "user", "content": "Sort:\nowl bee fox"}]
    with dgemma.Model(TIDY) as model:
        assert sum(figures(err)[1]) == len(model.tokenizer.chat(messages))


def test_regenerate_draws_from_the_next_seed_and_edit_says_it_differently(chatting: str) -> None:
    _, out, err = piped(chatting, *SHORT, given="why\n/regenerate\n/edit and\n/regenerate\n/steps 4\n/regenerate\n")
    assert [encoded for encoded, _ in figures(err)][1::2] == [0, 0] and len(figures(err)) == 5
    expected = ""
    with dgemma.Model(chatting) as model:
        for text, seed, steps in [("why", 0, 3), ("why", 1, 3), ("and", 0, 3), ("and", 1, 3), ("and", 1, 4)]:
            result = model.generate([{"role": "user", "content": text}], seed=seed, steps=steps, max_tokens=70)
            said = read(model.tokenizer, result.ids).text
            expected += said if said.endswith("\n") else said + "\n"
    assert out == expected


def test_every_command_is_in_the_help_and_every_option_is_a_command(chatting: str) -> None:
    _, out, err = piped(chatting, given="/help\n")
    told = "\n".join(err)
    assert out == "" and all(re.search(rf"^{re.escape(name)} .*  \S", told, re.M) for name in TABLE)
    assert {"/" + name.replace("_", "-") for name in [*options(), "effort"]} < set(TABLE)
    assert {"/edit", "/regenerate", "/save", "/load", "/stats", "/think", "/system", "/clear", "/quit"} < set(TABLE)


def test_what_is_wrong_is_told_in_a_line_and_the_chat_goes_on(chatting: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"messages": 1}')
    wrong = {
        "/nonsense": "there is no /nonsense",
        "/quit now": "/quit takes nothing",
        "/seed -1": "seed must be",
        "/steps many": "/steps takes a whole number",
        "/settled 1": "/settled takes on or off",
        "/sampler greedy": "sampler must be one of entropy-bound",
        "/effort lazy": "effort must be low, medium, high",
        "/regenerate": "nothing was said",
        "/edit": "nothing was said",
        "/save": "needs a file",
        f"/save {tmp_path}/none/a.json": "none/a.json: there is no folder",
        f"/load {tmp_path}/bad.json": "bad.json holds no chat",
        "/save ~nosuchuser/x.json": "there is no such user",
        "/load ~nosuchuser/x.json": "there is no such user",
        "/save a\0b": "cannot hold a null character",
        f"/load {tmp_path}/missing.json": "missing.json: no such file",
        "why " * 600: "need a context of",
    }
    code, out, err = piped(chatting, *SHORT, given="".join(f"{say}\n" for say in wrong) + "/clear\nwhy\n")
    assert code == 1 and out  # a failure in a pipe is one in the end
    for told, expected in zip(err, wrong.values(), strict=False):
        assert expected in told


def test_a_saved_chat_that_no_prompt_can_be_made_of_changes_nothing(tmp_path: Path, chatting: str) -> None:
    asked = {"role": "user", "content": "why"}
    wrong: dict[str, tuple[dict[str, Any], str]] = {
        "image": ({"messages": [asked | {"image": "sky.png"}]}, "messages[0]: unknown field 'image'"),
        "role": ({"messages": [asked, {"role": "poet", "content": "x"}]}, "messages[1]: unknown role poet"),
        "calls": ({"messages": [asked | {"tool_calls": [{}]}]}, "messages[0]: only an assistant calls tools"),
        "effort": ({"settings": {"effort": {}}}, "effort must be one of low, medium"),
        "steps": ({"settings": {"steps": "3"}}, "steps must be a whole number"),
        "option": ({"settings": {"speed": 3}}, "there is no option 'speed'"),
        "more": ({"tools": []}, "holds no chat that /save kept"),
    }
    kept = {"messages": [asked | {"content": "how"}], "thinking": False, "settings": {"steps": 3}}
    for name, (part, _) in wrong.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(kept | part))
    loads = "".join(f"/load {tmp_path}/{name}.json\n" for name in wrong)
    code, _, err = piped(chatting, given=f"/system before\n{loads}/save {tmp_path}/out.json\n")
    assert code == 1
    for line, (name, (_, expected)) in zip(err[-len(wrong) - 1 :], wrong.items(), strict=False):
        assert f"{name}.json" in line and expected in line
    after = json.loads((tmp_path / "out.json").read_text())
    assert after == {"messages": [{"role": "system", "content": "before"}], "thinking": False, "settings": {}}


def test_a_file_without_a_template_is_chatted_with_message_by_message() -> None:
    puzzle = PUZZLE.replace("\n", "\\\n")
    code, out, err = piped(given=f"{puzzle}\n/think\n/system x\n{puzzle}\n")
    assert code == 1 and "no chat template" in err[0]
    assert [told.split(" needs a chat template")[0] for told in err if "needs" in told] == ["/think", "/system"]
    assert out[: len(out) // 2] == out[len(out) // 2 :] and figures(err)[1] == (0, figures(err)[0][0])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--raw"], "--raw and --chat"),
        (["--json"], "--json and --chat"),
        (["--record", "a.svg"], "--record and --chat"),
        (["--fill", "a.txt"], "--fill and --chat"),
        (["-f", "-"], "standard input"),
        (["--think"], "--think needs a chat template"),
        (["-p", ""], "empty prompt"),
    ],
)
def test_what_does_not_go_with_a_chat_is_refused(arguments: list[str], told: str) -> None:
    code, out, err = piped(*arguments, given="")
    assert (code, out, len(err)) == (2, "", 1) and told in err[0]


# ---- a terminal ----


def test_a_chat_at_a_terminal() -> None:
    with Typing(TIDY, "--chat", "--think", "--visual") as chat:
        chat.wait("/help lists the commands")
        chat.type("Sort, upper case:\x1b\rsea fig ant\r")  # Alt-Enter: another line
        answer = chat.wait(r"(?s)thought of 3 words\s+ANT FIG SEA\s.*encoded, 0 reused")  # the thought is folded
        asked = "Sort, upper case:\nsea fig ant"
        assert figures(answer.splitlines())[-1] == (tokens(TIDY, asked, thinking=True), 0)
        chat.type("/think\r")
        chat.wait("thinking is off")
        chat.type("Upper case:\\\rowl tea\r")  # and so does a backslash
        chat.wait(r"(?s)OWL TEA.*encoded, \d+ reused")
        chat.type("/edit\r")
        chat.wait(r"Upper case:\s+\. owl tea")  # what was said is there to be edited
        chat.type("\b\b\bbee\r")
        edited = chat.wait(r"(?s)OWL BEE.* encoded, \d+ reused")
        encoded, reused = figures(edited.splitlines())[-1]
        assert 0 < encoded < 12 < reused  # what follows "owl" alone
        chat.type("/confidence 0\r/steps 100000\rAgain.\r")
        chat.wait("canvas 1 · step")
        chat.type("\x03")  # Ctrl-C
        chat.wait("stopped: nothing was finished")
        chat.type("/confidence 0.005\r/steps 48\r/regenerate\r")
        chat.wait(r"(?s)OWL BEE.*tokens/s.*reused")
        chat.type("\x03")
        chat.wait(r"Ctrl-D or /quit leaves\s+>")  # it listens again
        chat.type("\x04")  # Ctrl-D
        assert chat.end() == 0 and "Traceback" not in chat.written
        assert chat.written.count("\x1b[?25l") <= chat.written.count("\x1b[?25h")  # the cursor is back


HASTY = """
import os, signal, sys
from asyncio.selector_events import BaseSelectorEventLoop
from dgemma.cli.run import main
begin, count = BaseSelectorEventLoop.__init__, 0
def interrupted(self, *arguments):
    global count
    count += 1
    if count in (2, 3):
        os.kill(os.getpid(), signal.SIGINT)
    begin(self, *arguments)
BaseSelectorEventLoop.__init__ = interrupted
main.main(sys.argv[1:], prog_name="dg-run")
"""


def test_ctrl_c_while_the_line_is_being_set_up_breaks_nothing(
    chatting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hasty.py").write_text(HASTY)
    monkeypatch.setattr("support.terminal.RUN", [sys.executable, str(tmp_path / "hasty.py")])
    with Typing(chatting, "--chat", *SHORT) as chat:
        chat.wait("/help lists the commands")
        chat.type("/seed 7\r")
        chat.wait(r"(?s)Ctrl-D or /quit leaves.*Ctrl-D or /quit leaves\s+>")
        chat.type("/stats\r")
        chat.wait(r"seed=7[^>]*>")  # it listens again
        chat.type("\x04")
        assert chat.end() == 0 and not re.search("Traceback|Exception|Warning", chat.written)


def tokens(path: str, text: str, thinking: bool = False) -> int:
    with dgemma.Model(path) as model:
        return len(model.tokenizer.chat([{"role": "user", "content": text}], thinking=thinking))


def test_ctrl_c_keeps_the_canvases_that_are_finished() -> None:
    """The second canvas goes on for ever: the first is kept, and the next answer knows it."""
    with Typing(bundled(), "--chat", "--steps", "20", "--confidence", "0", "--max-tokens", "960", "--visual") as chat:
        chat.wait("every message is a prompt")
        chat.type("." * 100 + "\r")
        chat.wait("canvas 2 · step")
        chat.type("\x03")
        chat.wait("stopped: what is above is kept")
        chat.type("/stats\r")
        chat.wait("2 messages")
        chat.type("/quit\r")
        assert chat.end() == 0


# ---- thoughts ----


class Script:
    """The model's answers, put there instead of its own."""

    def __init__(self, model: dgemma.Model, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: list[str] = []

        def stream(
            session: Session, ids: list[int], **_: object
        ) -> Iterator[dgemma.Step | dgemma.Block | dgemma.Result]:
            parts, blocks = [], []
            for i, part in enumerate(self.answers.pop(0).split("¦")):  # one with a ~ before it is a loop
                parts.append(model.tokenizer.encode(part.removeprefix("~")))
                one = np.ones(len(parts[-1]), np.float32)
                yield dgemma.Step(i, 0, 0, 0.5, np.array(parts[-1]), one, one > 0, 1.0, True, np.array(parts[-1]))
                blocks.append(dgemma.Block(i, 1, len(one), True, parts[-1], "loop" if part[0] == "~" else None))
                yield blocks[-1]
            every = [token for part in parts for token in part]
            yield dgemma.Result(
                "", every, blocks, len(blocks), True, "stop", len(ids), 0, 0, 0, None, 1.0, float(len(every))
            )

        monkeypatch.setattr(Session, "stream", stream)


@pytest.fixture
def script(chatting: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Chat, Script]]:
    monkeypatch.setattr("dgemma.cli.chat.lines", lambda commands: Piped())
    with dgemma.Model(chatting) as model:
        yield Chat(model, {}, thinking=True), Script(model, monkeypatch)


def test_an_answer_that_is_a_loop_is_stopped_unless_its_length_was_asked_for(
    script: tuple[Chat, Script], capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    chat, said = script
    said.answers += ["the sky¦~is is¦ blue", "the sky¦~is is¦ blue"]
    chat.say("why")
    out, err = capfdbinary.readouterr()
    assert out == b"the skyis is\n" and b"it was a loop; /regenerate draws another" in err
    assert chat.conversation.messages[-1]["content"] == "the skyis is"
    chat.change({"max_tokens": 96})
    chat.say("why")
    out, err = capfdbinary.readouterr()
    assert out == b"the skyis is blue\n" and b"the answer ends in a loop; /retries N draws it again" in err


def test_an_empty_answer_is_told(script: tuple[Chat, Script], capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    chat, said = script
    said.answers.append("<|channel>thought\nis it")
    chat.say("why")
    assert b"an empty answer; /regenerate draws another" in capfdbinary.readouterr().err


THINKER = """
import sys, numpy, dgemma
from dgemma.cli.run import main
TEXTS = ["<|channel>thought\\nis it", " blue<channel|>the sky\\nis", " that"]
def stream(session, prompt, **_):
    self, blocks = session.model, []
    for i, text in enumerate(TEXTS):
        ids = self.tokenizer.encode(text)
        n = len(ids)
        for j in range(4):
            sure, seen = numpy.arange(n) < n * j / 3, numpy.array(ids)
            yield dgemma.Step(i, j, 0, 0.5, seen, numpy.ones(n, "f4"), sure, 3.0 - j, j == 3, seen)
        blocks.append(dgemma.Block(i, 4, n, True, ids))
        yield blocks[-1]
    every = [token for block in blocks for token in block.ids]
    yield dgemma.Result("", every, blocks, 12, True, "stop", 9, 0, 0, 0, None, 1.0, 1.0)
dgemma.Session.stream = stream
main.main(sys.argv[1:], prog_name="dg-run")
"""


def test_on_a_terminal_a_thought_is_dimmed_then_folded_and_lines_are_printed_as_they_are_final(
    chatting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thinker.py").write_text(THINKER)
    monkeypatch.setattr("support.terminal.RUN", [sys.executable, str(tmp_path / "thinker.py")])
    flags = [chatting, "--think", "--visual", "-p", "why"]
    code, written = on_terminal(*flags)
    assert code == 0
    assert screen(written)[:3] == ["thought of 3 words", "the sky", "is that"]
    assert "\x1b[2mis it\x1b[0m" in written  # dim, while it was thought
    assert written.index("the sky") < written.index("canvas 3 · step 1")  # printed while the rest was to come
    json_flags = [f for f in flags if f != "--visual"] + ["--json", "--quiet"]
    done = subprocess.run([sys.executable, str(tmp_path / "thinker.py"), *json_flags], capture_output=True, timeout=60)
    told = json.loads(done.stdout)
    assert (told["text"], told["thinking"], told["tool_calls"]) == ("the sky\nis that", "is it blue", [])
