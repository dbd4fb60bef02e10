"""What a model, a file, a name or a message may hold never orders a terminal about; pipes get it exactly."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import numpy as np
import pytest
from conftest import CHAT_TEMPLATE
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import write_checkpoint
from support.terminal import INSTALLED, Typing, environment, on_terminal, streams

import dgemma
from dgemma.chat.answer_parser import Delta, Reader
from dgemma.cli import end
from dgemma.cli.display import Silent
from dgemma.cli.infill import diff
from dgemma.cli.info import printable
from dgemma.cli.output import Speaker, say, say_json
from dgemma.convert import convert
from dgemma.detokenizer import Detokenizer
from dgemma.errors import Error
from dgemma.infill.edit import Edited
from dgemma.model import bundled
from dgemma.serve.lifecycle import OneLine
from dgemma.ui.terminal import one_line, shown, tell

TITLE = "\x1b]0;PWNED\x07"  # an order to set the window's title
EVIL = f"a{TITLE}\x1b[31m\x1b[2J\x1b[?2004h\r\b\x7f\x9b31m\x85\u202e\u2066z"
# Our own: styles, and how a live region is drawn.
STYLES = re.compile(r"\x1b\[[\d;]*[mK]|\x1b\[\?25[lh]|\x1b\[H|\x1b\[2J|\x1b\[2K|\x1b\[1A|\r(?=\n|\x1b\[(2K|1A))")
ORDERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def orders(written: str) -> list[str]:
    """What of it a terminal would obey, beside styles and what a live region is drawn with."""
    return ORDERS.findall(STYLES.sub("", written))


def evil_checkpoint(folder: Path, template: str) -> Path:
    """A GGUF file of random weights whose words are orders to a terminal; it has the tokens of bytes too."""
    write_checkpoint(folder, layers=2, dtype="f32", context=512, chat_template=template)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    evil = {name: f"{EVIL}{i}" for name, i in vocabulary.items() if name.startswith("<unused")}
    assert len(evil) > 30
    tokenizer["model"]["vocab"] = {evil.get(name, name): i for name, i in vocabulary.items()}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    convert(folder, folder / "evil.gguf", type="f32")
    return folder / "evil.gguf"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(evil_checkpoint(tmp_path_factory.mktemp("evil"), CHAT_TEMPLATE))


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The answer begins inside of a thought, and does not leave it."""
    template = CHAT_TEMPLATE.partition("{% if not enable")[0] + "<|channel>thought\n"
    return str(evil_checkpoint(tmp_path_factory.mktemp("thinker"), template))


SHORT = ["--steps", "2", "--max-tokens", "96", "--threads", "1"]


# ---- what is shown ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b[31mred\x07", "^[[31mred^G"),
        ("\x00\r\x0c\x7f", "^@^M^L^?"),
        ("\x9b31m\x85", "<U+009B>31m<U+0085>"),
        ("\u202e\u2066", "<U+202E><U+2066>"),
        ("\udc9b\udcff\ud800", "<9B><FF><U+D800>"),
        ("a\tb\nc é 你 🎉 \u200f\u2028", "a\tb\nc é 你 🎉 \u200f\u2028"),
    ],
)
def test_controls_are_named_and_text_stays(text: str, expected: str) -> None:
    assert shown(text) == expected


class Tty(io.TextIOWrapper):
    """A stream that says it is a terminal, or not."""

    def __init__(self, terminal: bool) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", errors="backslashreplace", write_through=True)
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    @property
    def written(self) -> str:
        self.flush()
        data: bytes = self.buffer.getvalue()  # type: ignore[attr-defined]
        return data.decode()


@contextmanager
def standard(out: bool, err: bool) -> Iterator[tuple[Tty, Tty]]:
    with mock.patch.object(sys, "stdout", Tty(out)) as one, mock.patch.object(sys, "stderr", Tty(err)) as two:
        yield one, two


TEXTS = st.text(st.characters(codec=None) | st.sampled_from([chr(i) for i in range(160)] + list("\u202e\u2066")))


@given(st.lists(st.tuples(st.sampled_from(["thinking", "text", "call"]), TEXTS), max_size=6), st.booleans())
def test_no_answer_of_any_kind_orders_a_terminal_about(told: list[tuple[Any, str]], late: bool) -> None:
    with standard(True, True) as (out, err), Speaker(Silent(), late) as speaker:
        for kind, text in told:
            speaker.hear(Delta(kind, text))
    said = "".join(text for kind, text in told if kind != "thinking")
    assert not ORDERS.search(out.written) and not orders(err.written)
    assert out.written.rstrip("\n") == shown(said).rstrip("\n")  # whole, however it was cut

    with standard(False, True) as (out, _), Speaker(Silent(), late) as speaker:
        for kind, text in told:
            speaker.hear(Delta(kind, text))
    assert out.written == said.encode("utf-8", "replace").decode()


@given(TEXTS)
def test_no_line_for_people_orders_a_terminal_about(text: str) -> None:
    with standard(True, True) as (out, err):
        say(text)
        tell(text)
        tell(text, dim=True)
        with pytest.raises(SystemExit):
            end("dg-run", text, 1)
        changed = Edited(f"{text}\nb", f"{text}\na", (0, 0), None)  # type: ignore[arg-type]
        for name in (text.encode("utf-8", "replace"), text.encode("utf-16", "surrogatepass")):  # any bytes
            say(diff(changed, os.fsdecode(name), colour=True), safe=True)
    assert not orders(out.written) and not orders(err.written)
    assert "\n" not in one_line(text) and not ORDERS.search(one_line(text))
    assert "\n" not in printable(text) and not ORDERS.search(printable(text))
    assert not ORDERS.search(str(Error(text)))


@given(st.recursive(TEXTS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3)))
def test_json_is_the_same_value_on_a_terminal(value: Any) -> None:
    for terminal in (True, False):
        with standard(terminal, False) as (out, _):
            say_json(value)
        assert json.loads(out.written) == value
        assert not terminal or not ORDERS.search(out.written)


def test_in_a_pipe_a_line_is_exact() -> None:
    with standard(False, False) as (out, err):
        say(EVIL)
        tell(EVIL, dim=True)
    assert (out.written, err.written) == (EVIL, EVIL + "\n")


def test_a_control_whose_bytes_come_one_by_one_is_shown(model: str) -> None:
    """U+009B is the bytes C2 9B: tokens of their own, which may be in two canvases."""
    tokenizer = dgemma.Tokenizer.from_gguf(model)
    ids = tokenizer.encode("a\x9b31mb", special=False)
    assert sum(map(Detokenizer(tokenizer).byte, ids)) >= 2
    for terminal, expected in ((True, "a<U+009B>31mb\n"), (False, "a\x9b31mb")):
        reader = Reader(tokenizer)
        with standard(terminal, True) as (out, _), Speaker(Silent()) as speaker:
            for delta in [d for token in ids for d in reader.feed([token])] + reader.finish():
                speaker.hear(delta)
        assert out.written == expected


# ---- dg-run ----


@pytest.mark.parametrize("more", [[], ["--quiet"], ["--raw"]])
@pytest.mark.parametrize("terminals", [("out", "err"), ("out",), ("err",), ()])
def test_an_answer_is_shown_on_a_terminal_and_exact_in_a_pipe(
    model: str, terminals: Sequence[str], more: list[str]
) -> None:
    with dgemma.Model(model, threads=1) as opened:
        raw = "--raw" in more
        prompt = "Hi" if raw else opened.tokenizer.chat([{"role": "user", "content": "Hi"}])
        ids = opened.generate(prompt, steps=2, max_tokens=96).ids
        reader = Reader(opened.tokenizer, marks=not raw)
        told = [*reader.feed(ids), *reader.finish()]
    said = "".join(delta.text for delta in told if delta.kind != "thinking")
    assert TITLE in said and re.search("[\x80-\x9f]", said)
    code, out, err = streams("dg-run", model, "-p", "Hi", *SHORT, *more, terminals=terminals)
    assert code == 0 and not orders(err)
    assert out == (shown(said).rstrip("\n") + "\n" if "out" in terminals else said)


def test_a_thought_is_shown_while_it_lasts_and_its_text_in_a_chat(thinker: str) -> None:
    code, out, err = streams("dg-run", thinker, "-p", "Hi", *SHORT, "--visual")
    assert code == 0 and not orders(out + err) and "PWNED" in err and "thought of" in err
    code, out, err = streams("dg-run", thinker, "--chat", *SHORT, given=b"Hi\n/thought\n")
    assert code == 0 and not orders(out + err) and shown(TITLE) in err
    code, _, err = streams("dg-run", thinker, "--chat", *SHORT, given=b"Hi\n/thought\n", terminals=())
    assert code == 0 and EVIL in err


def test_the_canvas_and_what_is_before_it_are_shown(model: str) -> None:
    code, written = on_terminal(model, "-p", "Hi", *SHORT, "--visual")
    assert code == 0 and "PWNED" in written and not orders(written)


def test_json_on_a_terminal_is_json(model: str) -> None:
    code, out, _ = streams("dg-run", model, "-p", "Hi", *SHORT, "--json")
    assert code == 0 and not ORDERS.search(out) and TITLE in json.loads(out)["text"]


def test_what_is_filled_and_edited_is_shown(model: str, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(f"{EVIL}\nthe [[4]] sky", newline="")
    code, out, err = streams("dg-run", model, "--fill", str(file), *SHORT[:2])
    assert code == 0 and not orders(out + err) and shown(EVIL) in out
    assert EVIL in streams("dg-run", model, "--fill", str(file), *SHORT[:2], terminals=())[1]
    file.write_text(f"the {TITLE}\x9b sky")
    edit = ["--edit", str(file), "--match", "sky", "--instruct", "x", "--lengths", "2", *SHORT[:2]]
    code, out, err = streams("dg-run", model, *edit)
    assert code == 0 and not orders(out + err) and shown(f"-the {TITLE}\x9b") in out and "\x1b[31m-" in out
    assert f"-the {TITLE}\x9b" in streams("dg-run", model, *edit, terminals=())[1]


def test_a_recording_holds_no_orders_but_its_own(model: str, tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("a.cast", "a.svg", "a.gif")]
    code, *_ = streams("dg-run", model, "-p", "Hi", *SHORT, *(f"--record={file}" for file in files), terminals=())
    events = [json.loads(line)[2] for line in Path(files[0]).read_text().splitlines()[1:]]
    assert code == 0 and "PWNED" in "".join(events) and not orders("".join(events))
    assert not ORDERS.search("".join(ET.parse(files[1]).getroot().itertext()))


# ---- a chat ----


def test_a_chat_shows_messages_names_and_failures(model: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(
        json.dumps({"messages": [{"role": "system", "content": EVIL}], "thinking": False, "settings": {}})
    )
    given = f"/load {tmp_path}/a.json\n/stats\n/save {tmp_path}/{EVIL}/x\n/nope{EVIL}\n/steps {EVIL}\nHi\n".encode()
    code, out, err = streams("dg-run", model, "--chat", *SHORT, given=given)
    assert code == 1 and "PWNED" in out and not orders(out + err)
    told = {line.split(shown(TITLE))[0].removeprefix("\x1b[2m") for line in err.splitlines() if shown(TITLE) in line}
    assert "system: a" in told and "there is no /nopea?]0;PWNED?" in err  # as the library does
    assert f"{tmp_path}/a?]0;PWNED?" in err


def test_a_message_comes_back_to_the_line_without_orders(model: str) -> None:
    with Typing(model, "--chat", *SHORT, "-p", EVIL) as chat:
        chat.wait("encoded, 0 reused")
        chat.type("/edit\r")
        chat.wait(r"> a\^\[")
        chat.type("\x03\x1b[A\x1b[A")  # and through the history
        chat.wait(">")
        chat.type("\x03\x04")
        chat.end()
    assert TITLE not in chat.written and "\x1b]0;" not in chat.written and "\x9b" not in chat.written


# ---- names, metadata, messages ----


def test_metadata_tensors_and_names_of_a_file_are_shown(tmp_path: Path) -> None:
    file = tmp_path / f"{EVIL}.gguf"
    writer = gguf.GGUFWriter(file, "gemma4")
    writer.add_string("general.name", EVIL)
    writer.add_string(f"x.{EVIL}", EVIL)
    writer.add_array("x.list", [EVIL, "b"])
    writer.add_string("tokenizer.chat_template", f"{EVIL}\n{EVIL}")
    writer.add_tensor(EVIL, np.zeros((4, 32), "float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    code, out, err = streams("dg-info", str(file), "--tensors", COLUMNS="400")
    assert code == 0 and not orders(out + err) and out.replace("\n", "").count("PWNED") >= 7
    code, out, _ = streams("dg-info", str(file), "--json")
    assert code == 0 and not ORDERS.search(out) and json.loads(out)["metadata"]["general.name"]["value"] == EVIL
    code, out, err = streams("dg-run", str(file), "-p", "x")
    assert code == 1 and not orders(out + err) and err.count("\n") == 1


def test_figures_name_a_file_without_orders(tmp_path: Path) -> None:
    file = tmp_path / f"{EVIL}.gguf"
    file.symlink_to(bundled())
    for command in (
        ["dg-eval", str(file), "--task", "sudoku", "--count", "1"],
        ["dg-convert", str(file), "-o", str(tmp_path / f"{EVIL}2.gguf"), "--type", "q8_0"],
        ["dg-bench", str(file), "--runs", "1", "--prompt", "2"],
    ):
        code, out, err = streams(*command)
        assert code == 0 and "PWNED" in out + err and not orders(out + err), command


def test_what_a_template_says_is_told_in_a_line(tmp_path: Path) -> None:
    refuses = "{{ raise_exception(messages[0].content) }}"
    template = f"{{% if 'PWNED' in messages[0].content %}}{refuses}{{% endif %}}{{{{ messages[0].content }}}}"
    write_checkpoint(tmp_path, layers=1, chat_template=template)
    convert(tmp_path, tmp_path / "m.gguf", type="f32")
    code, out, err = streams("dg-run", str(tmp_path / "m.gguf"), "-p", EVIL)
    assert code != 0 and not orders(out + err) and err.count("\n") == 1 and "PWNED" in err


@pytest.mark.parametrize(
    "arguments", [["-f", f"/{EVIL}/x"], [f"--{EVIL}"], ["--steps", EVIL], ["-p", "x", "--record", f"{EVIL}.mp4"]]
)
def test_a_failure_is_one_line_without_orders(arguments: list[str]) -> None:
    for terminals in (("err",), ()):
        code, out, err = streams("dg-run", *arguments, terminals=terminals)
        assert code != 0 and out == "" and err.count("\n") == 1 and not ORDERS.search(err)
        assert "PWNED" in err


def test_a_bar_and_a_status_are_text() -> None:
    code = (
        "import sys; from dgemma.ui.progress import progress_bar, telling\n"
        "with progress_bar(sys.argv[1]) as bar: bar(1, 2)\n"
        "with telling() as tell: tell(sys.argv[1])"
    )
    done, _, err = streams("python", "-c", code, f"{EVIL}[bold]", COLUMNS="200")
    assert done == 0 and err.count(f"{shown(EVIL)}[bold]") >= 2
    assert not ORDERS.search(re.sub(r"\x1b\[[?\d;]*[A-Za-z]|\r", "", err))


def test_a_server_logs_lines_that_nobody_can_forge(tmp_path: Path) -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, "asked for %s", (f"/{EVIL}\n2030-01-01 all is well",), None)
    line = OneLine("%(message)s").format(record)
    assert line == f"asked for {one_line(f'/{EVIL} 2030-01-01 all is well')}" and not ORDERS.search(line)
    try:
        raise ValueError(EVIL)
    except ValueError:
        record.exc_info = sys.exc_info()
    assert not ORDERS.search(OneLine("%(message)s").format(record))


def test_a_server_names_its_model_in_a_line() -> None:
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    command = [str(INSTALLED.with_name("dg-serve")), "--port", "0", "--name", f"{EVIL}\nforged"]
    with subprocess.Popen(command, stderr=theirs, env=environment({})) as process:
        os.close(theirs)
        told = b""
        while b"\n" not in told:
            told += os.read(ours, 4096)
        process.kill()
    os.close(ours)
    line = told.decode().replace("\r\n", "\n")
    assert line.startswith("dg-serve: a^[]0;PWNED") and "forged at http" in line and not ORDERS.search(line)
