"""dg-run: what its --help promises, on the bundled Sudoku model."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.cases import Case
from support.terminal import RUN, on_terminal, screen

import dgemma
from dgemma.convert import convert
from dgemma.model import bundled
from dgemma.options import options, samplers

SUDOKU = Path(__file__).parent / "models" / "sudoku"
FOREVER = ["--steps", "100000", "--confidence", "0"]


def puzzle(blanks: int) -> tuple[str, str]:
    for line in (SUDOKU / "puzzles_test.txt").read_text().splitlines():
        if line.startswith(f"{blanks} "):
            _, prompt, answer = line.replace("/", "\n").split(" ")
            return prompt + "\n", answer + "\n"
    raise AssertionError(f"no puzzle with {blanks} blanks")


PROMPT, ANSWER = puzzle(30)


def run(*arguments: str, given: str | bytes = b"") -> subprocess.CompletedProcess[bytes]:
    data = given.encode() if isinstance(given, str) else given
    return subprocess.run([*RUN, *arguments], input=data, capture_output=True, timeout=60)


def refused(code: int, *arguments: str, given: str | bytes = b"") -> str:
    """Runs what must fail, so: with this status, nothing on standard output, one line on standard error."""
    done = run(*arguments, given=given)
    told = done.stderr.decode()
    assert (done.returncode, done.stdout) == (code, b""), told
    assert told.startswith("dg-run: ") and told.count("\n") == 1 and told.endswith("\n"), told
    assert "Traceback" not in told and "internal error" not in told
    return told


# ---- answers ----


@pytest.mark.parametrize("way", ["-p", "-f", "-f -", "standard input"])
def test_a_prompt_comes_from_text_file_or_standard_input(way: str, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    arguments = {"-p": ["-p", PROMPT], "-f": ["-f", str(file)], "-f -": ["-f", "-"], "standard input": []}[way]
    done = run(*arguments, given=PROMPT if way in ("-f -", "standard input") else "")
    assert (done.returncode, done.stdout.decode()) == (0, ANSWER)


def test_the_answer_alone_is_on_standard_output_and_figures_on_standard_error() -> None:
    done = run(bundled(), "-p", PROMPT)
    assert done.stdout.decode() == ANSWER
    figure = r"90 tokens, 1 canvas of \d+ steps?, \d+\.\d\d s, \d+ tokens/s, converged, seed 0\n"
    assert re.fullmatch(figure, done.stderr.decode())
    quiet = run("-p", PROMPT, "--quiet")
    assert (quiet.stdout.decode(), quiet.stderr) == (ANSWER, b"")


def test_a_prompt_is_never_trimmed() -> None:
    def tokens(text: str) -> int:
        return int(json.loads(run("--json", "--steps", "1", given=text).stdout)["prompt_tokens"])

    assert [tokens(PROMPT), tokens(PROMPT[:-1]), tokens("\n" + PROMPT + "\n\n")] == [91, 90, 94]


def test_a_cut_answer_is_exact_and_hinted_at() -> None:
    done = run("-p", PROMPT, "--max-tokens", "25")
    assert done.stdout.decode() == ANSWER[:25]  # no newline of ours
    assert done.stderr.decode().splitlines()[1].startswith("cut at --max-tokens")


def test_a_degenerate_answer_is_told() -> None:
    assert "the answer is empty; --retries N" in run("-p", "\n", "--steps", "2").stderr.decode()
    told = run("-p", "\n", "--steps", "2", "--retries", "2").stderr.decode()
    assert "drawn again 2 times, at last from seed 2" in told


def test_an_answer_that_did_not_settle_is_told() -> None:
    assert "1 of 1 canvas not converged" in run("-p", PROMPT, "--steps", "2", "--confidence", "0").stderr.decode()


def test_json_is_one_object_with_everything() -> None:
    done = run("-p", PROMPT, "--json", "--quiet", "--threads", "2", "--seed", "7")
    assert done.stderr == b"" and done.stdout.count(b"\n") == 1
    told = json.loads(done.stdout)
    assert told["text"] == ANSWER and len(told["ids"]) == 90
    assert told["blocks"] == [
        {"index": 0, "steps": told["steps"], "tokens": 90, "converged": True, "ids": told["ids"], "fault": None},
    ]
    assert (told["converged"], told["finish_reason"], told["prompt_tokens"]) == (True, "stop", 91)
    assert told["tokens_per_second"] == pytest.approx(90 / told["seconds"])
    assert list(told["settings"]) == list(options()) and told["settings"]["seed"] == 7
    assert (told["model"], told["threads"]) == (bundled(), 2) and told["backend"].startswith("cpu")


def test_same_tokens_on_any_number_of_threads() -> None:
    hard, _ = puzzle(54)
    told = [json.loads(run("--json", "--threads", n, "--steps", "12", given=hard).stdout) for n in ("1", "2", "2")]
    assert told[0]["ids"] == told[1]["ids"] == told[2]["ids"] and told[0]["steps"] == told[1]["steps"]


def test_bytes_that_are_no_text_do_not_stop_it() -> None:
    assert run("--steps", "1", given=b"12\xff\xc3(\x0034\n").returncode == 0


def test_every_generation_option_is_a_flag_and_reaches_the_model() -> None:
    flags = []
    for name, option in options().items():
        flags += ["--" + name.replace("_", "-")] + ([] if option.flag else [list(option.choices or ["1"])[-1]])
    told = json.loads(run("--json", *flags, given=PROMPT).stdout)
    assert told["settings"] == dict.fromkeys(options(), 1) | {"sampler": list(samplers())[-1]}


def test_samplers_are_told_by_name_and_others_refused() -> None:
    text = " ".join(run("--help").stdout.decode().split())
    assert next(iter(samplers())) == "entropy-bound" and all(name in text for name in samplers())
    assert "'greedy'" in (line := refused(2, "--sampler", "greedy", "-p", PROMPT)) and "entropy-bound" in line


def test_an_effort_is_the_settings_that_its_help_names() -> None:
    text = " ".join(run("--help").stdout.decode().split())
    for name, effort in dgemma.efforts().items():
        flags = ["--reference"] if name == "reference" else ["--effort", name]
        told = json.loads(run("--json", *flags, "--seed", "3", "--max-tokens", "1", given=PROMPT).stdout)["settings"]
        assert {key: told[key] for key in effort.settings} == effort.settings and told["seed"] == 3
        assert str(effort) in text
    assert "both choose" in refused(2, "--reference", "--effort", "low", "-p", PROMPT)
    assert "both choose" in refused(2, "--effort", "low", "--reference", "-p", PROMPT)
    assert "plateau 4" in refused(2, "--reference", "--plateau", "4", "-p", PROMPT)
    assert "'lazy'" in refused(2, "--effort", "lazy", "-p", PROMPT)


def test_several_canvases_are_counted() -> None:
    done = run("-p", "." * 200, "--max-tokens", "250", "--steps", "2")
    assert re.match(r"\d+ tokens, [23] canvases of 2 steps, ", done.stderr.decode())
    code, written = on_terminal("-p", "." * 200, "--max-tokens", "250", "--steps", "2", "--visual")
    assert code == 0 and "canvas 2 · step 2 of 2" in written
    assert "\n".join(screen(written)).startswith(done.stdout.decode().rstrip("\n") + "\n")


# ---- chat templates ----

TEMPLATE = """{{ bos_token }}
{%- for m in messages %}{{ {'system': '11', 'user': '2'}[m.role] }}{{ m.content }}{% endfor %}
{%- if enable_thinking %}333{% endif %}"""


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The Sudoku model with a chat template that only counts."""
    folder = tmp_path_factory.mktemp("chatty")
    for file in SUDOKU.iterdir():
        if file.suffix in (".json", ".safetensors"):
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    convert(folder, folder / "chatty.gguf", type="q8_0")
    return str(folder / "chatty.gguf")


@pytest.mark.parametrize(
    ("flags", "prompt_tokens"),
    [
        ([], 1 + 1 + 3),
        (["--think"], 1 + 1 + 3 + 3),
        (["--system", "ab"], 1 + 2 + 2 + 1 + 3),
        (["--system", "ab", "--think"], 1 + 2 + 2 + 1 + 3 + 3),
        (["--raw"], 1 + 3),
    ],
)
def test_a_prompt_goes_through_the_files_template(chatty: str, flags: list[str], prompt_tokens: int) -> None:
    done = run(chatty, "--json", "--steps", "1", *flags, given="\n7\n")
    assert json.loads(done.stdout)["prompt_tokens"] == prompt_tokens


# ---- help ----


def test_help_teaches() -> None:
    done = run("--help")
    told = done.stdout.decode()
    assert done.returncode == 0 and done.stderr == b""
    for name in options():
        assert "--" + name.replace("_", "-") in told
    assert "dg-run model.gguf -p" in told and "the file’s" in told
    assert run("-h").stdout == done.stdout
    assert re.fullmatch(r"dg-run \d+\.\d+\.\d+\n", run("--version").stdout.decode())


def test_the_example_of_the_help_is_solved() -> None:
    from dgemma.cli.run import PUZZLE

    rows = run(given=PUZZLE.replace(" ", "\n") + "\n").stdout.decode().split()
    assert all(a in (".", b) for a, b in zip("".join(PUZZLE.split()), "".join(rows), strict=True))
    columns = ["".join(row[i] for row in rows) for i in range(9)]
    boxes = ["".join(rows[r + i][c : c + 3] for i in range(3)) for r in (0, 3, 6) for c in (0, 3, 6)]
    assert all(sorted(unit) == list("123456789") for unit in (*rows, *columns, *boxes))


# ---- refusals ----


def test_wrong_usage_is_one_line_and_status_2(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT)
    assert "--nonsense" in refused(2, "--nonsense")
    assert "'--steps'" in refused(2, "--steps", "0", "-p", PROMPT)
    assert "'--steps'" in refused(2, "--steps", "2.5", "-p", PROMPT)
    assert "'--seed'" in refused(2, "--seed", str(2**64), "-p", PROMPT)
    assert "'--threads'" in refused(2, "--threads", "0", "-p", PROMPT)
    assert "-p and -f" in refused(2, "-p", PROMPT, "-f", str(tmp_path / "prompt.txt"))
    assert "--think" in refused(2, "--think", "--raw", "-p", PROMPT)
    for flags in (["--think"], ["--system", "Be brief."]):
        told = refused(2, *flags, "-p", PROMPT)
        assert flags[0] in told and "chat template" in told and bundled() in told


def test_an_empty_prompt_is_refused() -> None:
    assert "empty prompt: standard input" in refused(2)
    assert "empty prompt: -p" in refused(2, "-p", "")
    assert "empty prompt: /dev/null" in refused(2, "-f", "/dev/null")


def test_a_prompt_longer_than_the_context_is_refused() -> None:
    told = refused(2, given="1" * 2000)
    assert "2001" in told and "1024" in told
    assert "max_tokens 100000" in refused(2, "--max-tokens", "100000", given=PROMPT)


def broken(kind: str) -> bytes:
    """The bundled file, damaged."""
    data = bytearray(Path(bundled()).read_bytes())
    if kind == "truncated":
        return bytes(data[: len(data) // 2])
    if kind == "cut in the header":
        return bytes(data[:500])
    if kind == "empty":
        return b""
    if kind == "wrong magic":
        data[:4] = b"PNG\0"
    if kind == "another architecture":
        at = data.index(b"diffusion-gemma", data.index(b"general.architecture"))
        data[at : at + 15] = b"diffusion-llama"
    if kind == "unsupported type":
        name = b"blk.0.attn_q.weight"
        at = data.index(name) + len(name)
        (dims,) = struct.unpack_from("<I", data, at)
        struct.pack_into("<I", data, at + 4 + 8 * dims, 99)
    return bytes(data)


@pytest.mark.parametrize(
    "kind", ["truncated", "cut in the header", "empty", "wrong magic", "another architecture", "unsupported type"]
)
def test_a_damaged_file_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(broken(kind))
    told = refused(1, str(file), "-p", PROMPT)
    assert "broken.gguf" in told
    if kind == "another architecture":
        assert "diffusion-llama" in told
    if kind == "unsupported type":
        assert "blk.0.attn_q.weight" in told


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    assert "nothing.gguf" in refused(1, str(tmp_path / "nothing.gguf"), "-p", PROMPT)
    assert "nothing.txt" in refused(1, "-f", str(tmp_path / "nothing.txt"))
    assert str(tmp_path) in refused(1, str(tmp_path), "-p", PROMPT)
    assert "abacus" in refused(1, "--backend", "abacus", "-p", PROMPT)


# ---- ends ----


def test_ctrl_c_ends_it_with_130() -> None:
    process = subprocess.Popen([*RUN, *FOREVER, "-p", PROMPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    used = Path(f"/proc/{process.pid}/maps")
    began = time.monotonic()
    while ".gguf" not in used.read_text() and time.monotonic() - began < 60:  # then it is at work
        time.sleep(0.01)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, b"") and b"\n" not in err.strip()
    assert err.strip() in (b"", b"stopped by Ctrl-C before a canvas was finished")  # while it opened the file, or later


def test_a_reader_that_left_is_no_accident() -> None:
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run([*RUN, "-p", PROMPT], stdout=write, stderr=subprocess.PIPE, timeout=60)
    os.close(write)
    assert process.returncode == 1 and process.stderr == b""


def test_a_full_disk_is_told() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with open("/dev/full", "wb") as full:
        process = subprocess.run([*RUN, "-p", PROMPT], stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert process.returncode == 1 and process.stderr.count(b"\n") == 1 and b"standard output" in process.stderr


# ---- terminals ----


def test_visual_draws_and_leaves_the_screen_clean() -> None:
    code, written = on_terminal("--visual", "-p", PROMPT)
    assert code == 0 and "canvas 1 · step 1 of 48" in written and "\x1b[2m" in written
    *answer, figures = screen(written)
    assert "\n".join(answer) + "\n" == ANSWER and figures.startswith("90 tokens")
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h")  # the cursor is back


@pytest.mark.parametrize(("rows", "columns"), [(5, 80), (24, 6), (2, 3)])
def test_visual_fits_a_small_terminal(rows: int, columns: int) -> None:
    code, written = on_terminal("--visual", "--quiet", "-p", PROMPT, rows=rows, columns=columns)
    assert code == 0 and "\n".join(screen(written)) + "\n" == ANSWER
    frames = re.split(r"\x1b\[2K", written)
    assert all(frame.count("\n") < rows for frame in frames[:-1])


def test_visual_without_a_terminal_prints_nothing_more() -> None:
    done = run("--visual", "--quiet", "-p", PROMPT)
    assert (done.stdout.decode(), done.stderr) == (ANSWER, b"")


def test_long_work_shows_progress_on_a_terminal_and_ctrl_c_clears_it() -> None:
    code, written = on_terminal(*FOREVER, "-p", PROMPT, stop_at=["canvas 1 · step"])
    assert code == 130 and "canvas 1 · step" in written and "Traceback" not in written
    assert screen(written) == ["stopped by Ctrl-C before a canvas was finished"]


# A step that nothing can interrupt, as one layer of a large model: the library does not look at signals, or at Python.
STUCK = """
import hashlib, sys, numpy, dgemma
from dgemma.cli.run import main
def stream(session, ids, **_):
    yield dgemma.Step(0, 0, 0, 0.5, numpy.array(ids), numpy.ones(len(ids), "f4"), numpy.array(ids) > 0, 3.0, False, ids)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
dgemma.Session.stream = stream
main.main(sys.argv[1:], prog_name="dg-run")
"""


@pytest.mark.parametrize("flags", [[], ["--visual"]])
def test_the_clock_ticks_ctrl_c_is_acknowledged_at_once_and_the_second_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    (tmp_path / "stuck.py").write_text(STUCK)
    monkeypatch.setattr("support.terminal.RUN", [sys.executable, str(tmp_path / "stuck.py")])
    code, written = on_terminal("-p", PROMPT, *flags, stop_at=["· 3 s", "stopping"])
    assert code == 130 and "· 2 s" in written and "Traceback" not in written
    assert screen(written) == [""] and written.count("\x1b[?25l") == written.count("\x1b[?25h")


def test_ctrl_c_keeps_the_canvases_that_are_finished(tmp_path: Path) -> None:
    """They are printed, by --json with their figures, and are those of the whole answer."""
    case = Case("talker", seed=6, shape=dict(layers=3, hidden=64, canvas=32, eos=[1, 6]))
    flags = [str(case.convert(tmp_path / "hf", tmp_path / "talker.gguf")), "-p", "the sky", "--steps", "40"]
    flags += ["--backend", "reference", "--threads", "1"]
    whole = run(*flags, "--max-tokens", "96", "--json").stdout
    code, written = on_terminal(*flags, "--max-tokens", "900", "--json", stop_at=["canvas 4"])
    kept = json.loads(next(line for line in screen(written) if line.startswith("{")))
    assert code == 130 and kept["finish_reason"] == "stopped" and len(kept["blocks"]) >= 3
    assert kept["ids"][:96] == json.loads(whole)["ids"]
    code, written = on_terminal(*flags, "--max-tokens", "900", stop_at=["canvas 4"])
    assert code == 130 and "stopped by Ctrl-C" in screen(written)[-1] and "finished canvases" in screen(written)[-1]
    assert screen(written)[0]  # of the text


def test_an_answer_on_a_terminal_ends_its_line() -> None:
    _, written = on_terminal("-p", PROMPT, "--max-tokens", "25", "--quiet")
    assert written.replace("\r\n", "\n") == ANSWER[:25] + "\n"


def test_no_arguments_on_a_terminal_explain_instead_of_waiting() -> None:
    code, written = on_terminal()
    assert code == 2 and "printf" in written and "dg-run --help" in written
    code, written = on_terminal(bundled())
    assert code == 2 and screen(written) == ["dg-run: no prompt: give -p TEXT, -f FILE or standard input"]
