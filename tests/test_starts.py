"""How commands start and end as processes: without some standard streams, and with a signal while they are imported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGUFWriter

from dgemma.convert import convert
from dgemma.model import bundled

COMMANDS = ["dg-convert", "dg-run", "dg-info", "dg-bench", "dg-eval", "dg-serve", "dg-models"]
PUZZLE = Path(__file__).parent / "models/sudoku/puzzle.txt"
BUNDLED = Path(bundled())


def binary(command: str) -> str:
    return str(Path(sys.executable).with_name(command))


def without(streams: str, command: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a command as a shell does with these redirections, such as >&-."""
    text = ["sh", "-c", f'exec "$0" "$@" {streams}', binary(command), *map(str, arguments)]
    return subprocess.run(text, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)


# ---- A closed standard output ----


def plain(folder: Path) -> Path:
    """A GGUF file of another program, and small."""
    file = folder / "plain.gguf"
    writer = GGUFWriter(file, "llama")
    writer.add_name("small")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def closed(command: str) -> str:
    return f"{command}: standard output: it is closed\n"


@pytest.mark.parametrize("flag", ["--help", "--version"])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_version_tell_that_standard_output_is_closed(command: str, flag: str) -> None:
    done = without(">&-", command, flag)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", closed(command))


@pytest.mark.parametrize("flags", [[], ["--tensors"], ["--json"], ["--plan"], ["--routing"]])
@pytest.mark.parametrize("make", [lambda folder: BUNDLED, plain])
def test_dg_info_tells_that_standard_output_is_closed(
    make: Callable[[Path], Path], flags: list[str], tmp_path: Path
) -> None:
    file = make(tmp_path)
    if without("", "dg-info", file, *flags).returncode == 0:
        done = without(">&-", "dg-info", file, *flags)
        assert (done.returncode, done.stdout, done.stderr) == (1, "", closed("dg-info"))
    else:
        assert (file != BUNDLED and flags == ["--plan"]) or flags == ["--routing"]


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("dg-convert", [BUNDLED, "--type", "q8_0", "--dry-run"]),
        ("dg-run", ["-f", PUZZLE]),
        ("dg-run", ["-f", PUZZLE, "--json"]),
        ("dg-bench", ["--runs", "1"]),
        ("dg-models", ["list"]),
        ("dg-models", ["path", "tidy"]),
        ("dg-eval", ["--against", BUNDLED, "--prompts", "1"]),
    ],
)
def test_what_prints_its_result_tells_that_standard_output_is_closed(command: str, arguments: list[object]) -> None:
    done = without(">&-", command, *arguments)
    assert done.returncode == 1 and done.stderr.endswith(closed(command)) and "Traceback" not in done.stderr


@pytest.mark.parametrize("streams", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_a_conversion_needs_no_standard_stream(streams: str, tmp_path: Path) -> None:
    """And no stream's number is the output's: nothing but the model is in it."""
    convert(BUNDLED, tmp_path / "wanted.gguf", "q8_0")
    done = without(streams, "dg-convert", BUNDLED, "-o", tmp_path / "out.gguf", "--type", "q8_0")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "wanted.gguf").read_bytes()


HELD = """
import os, sys
from dgemma.cli.streams import fail_on_closed_stdout
fail_on_closed_stdout()
opened = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
os.write(opened, str(opened).encode())
"""


@pytest.mark.parametrize("streams", ["<&-", ">&-", "2>&-", "<&- 2>&-", "<&- >&- 2>&-"])
def test_no_file_gets_the_number_of_a_closed_stream(streams: str, tmp_path: Path) -> None:
    text = ["sh", "-c", f'exec "$0" "$@" {streams}', sys.executable, "-c", HELD, str(tmp_path / "number")]
    assert subprocess.run(text, timeout=60).returncode == 0
    assert int((tmp_path / "number").read_text()) > 2


# ---- Signals while modules are imported ----

# Found by every Python that starts with this folder in PYTHONPATH. It counts the modules that are looked for from the
# first one of ours on, and raises a signal before the one of that number, or of that name.
SITE = """
import os, signal, sys

class Finder:
    count = None

    def find_spec(self, name, path=None, target=None):
        if self.count is None and name not in ("dgemma", "dgemma.cli", "importlib"):
            return None
        self.count = (self.count or 0) + 1
        with open(os.environ["SEEN"], "a") as seen:
            seen.write(name + "\\n")
        if os.environ.get("AT") in (name, str(self.count)):
            with open(os.environ["SEEN"] + ".raised", "a") as raised:
                raised.write(name)
            signal.raise_signal(int(os.environ["SIGNAL"]))
        return None

sys.meta_path.insert(0, Finder())
"""


class Start:
    """Starts of commands in which a signal comes at a moment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "sitecustomize.py").write_text(SITE)
        self.seen = folder / "seen"
        self.raised = folder / "seen.raised"

    def __call__(
        self, at: object, number: int, command: str, *arguments: object, ignored: bool = False
    ) -> subprocess.CompletedProcess[str]:
        for path in (self.seen, self.raised):
            path.unlink(missing_ok=True)
        more = {"PYTHONPATH": str(self.folder), "SEEN": str(self.seen), "AT": str(at), "SIGNAL": str(int(number))}
        text = [binary(command), *map(str, arguments)]
        if ignored:
            text = ["sh", "-c", 'trap "" INT TERM; exec "$0" "$@"', *text]
        return subprocess.run(text, env=os.environ | more, capture_output=True, text=True, timeout=120)

    def modules(self, command: str, *arguments: object) -> list[str]:
        """Return the names of the modules that are imported, in order."""
        assert self("never", signal.SIGINT, command, *arguments).returncode == 0
        return self.seen.read_text().split()


@pytest.fixture
def start(tmp_path: Path) -> Start:
    return Start(tmp_path)


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_while_modules_are_imported_ends_a_command_quietly(command: str, start: Start) -> None:
    modules = start.modules(command, "--version")
    assert len(modules) > 100 and "click" in modules
    named = [name for name in ("dgemma", "dgemma._native", "click") if name in modules]
    for at in (*named, *range(1, len(modules), len(modules) // 4)):
        done = start(at, signal.SIGINT, command, "--version")
        told = (done.returncode, done.stdout, done.stderr.strip())  # click ends the line of ^C once it runs
        assert start.raised.exists() and told == (130, "", ""), (at, done.stderr)


@pytest.mark.parametrize("command", COMMANDS)
def test_who_asks_a_command_to_end_while_it_is_imported_is_obeyed_quietly(command: str, start: Start) -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        done = start("click", number, command, "--version")
        assert start.raised.exists() and (done.stdout, done.stderr) == ("", "")
        assert done.returncode in (128 + number, -number)


def test_ctrl_c_while_a_command_at_work_imports_more_ends_it_quietly(start: Start) -> None:
    modules = start.modules("dg-info", BUNDLED)
    first = modules.index("dgemma.cli.plan")
    for at in range(first, len(modules), (len(modules) - first) // 8):
        done = start(at, signal.SIGINT, "dg-info", BUNDLED)
        assert start.raised.exists() and (done.returncode, done.stderr.strip()) == (130, ""), at


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_is_ignored_stays_so(number: int, start: Start) -> None:
    done = start("click", number, "dg-info", "--version", ignored=True)
    assert start.raised.exists() and (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("dg-info ")


LATE = """
import atexit, os, signal
atexit.register(lambda: signal.raise_signal(int(os.environ["SIGNAL"])))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_command_ends_is_obeyed_quietly(number: int, start: Start) -> None:
    """A signal at the end does not lose the output."""
    (start.folder / "sitecustomize.py").write_text(LATE)
    done = start("", number, "dg-info", "--version")
    assert done.stdout.startswith("dg-info ") and (done.returncode, done.stderr) == (128 + number, "")


# The process of its own that measures raises Ctrl-C for all that its terminal started, as it imports its modules.
APART = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "dgemma.bench.machine":
            with open(os.environ["SEEN"] + ".raised", "a") as raised:
                raised.write(name)
            os.killpg(0, signal.SIGINT)

if "--multiprocessing-fork" in sys.orig_argv:
    sys.meta_path.insert(0, Finder())
"""


def test_ctrl_c_while_another_process_measures_ends_both_quietly(start: Start) -> None:
    (start.folder / "sitecustomize.py").write_text(APART)
    more = {"PYTHONPATH": str(start.folder), "SEEN": str(start.seen)}
    text = [binary("dg-bench"), "--ram", "1G", "--runs", "1"]
    done = subprocess.run(
        text, env=os.environ | more, capture_output=True, text=True, timeout=120, start_new_session=True
    )
    assert start.raised.exists() and (done.returncode, done.stdout, done.stderr.strip()) == (130, "", "")
