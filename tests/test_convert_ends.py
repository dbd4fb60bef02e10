"""dg-convert: whatever ends it, and wherever, nothing half-written has a name, and the next run cleans up.

A child of this process dies before the first of the calls below that conversions make, then before the second, and so
on, until one is never reached: no point of time is left out, and none is waited for.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.checkpoints import write_checkpoint
from support.converting import leftovers

import dgemma
from dgemma.convert import convert
from dgemma.convert.imatrix import Sums, write_imatrix

CALLS = ("open", "write", "fsync", "replace", "rename", "unlink", "close")
LIMIT = 150_000  # bytes of a part


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "tiny-model"
    write_checkpoint(folder, layers=1)
    return folder


def dies_before(call: int, work: Callable[[], object]) -> bool:
    """Whether a child that works is killed before its n-th call; False where it has none and ends well."""
    child = os.fork()
    if child == 0:
        made = 0

        def counted(real: Callable[..., object]) -> Callable[..., object]:
            def function(*arguments: object, **named: object) -> object:
                nonlocal made
                made += 1
                if made == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **named)

            return function

        status = 1
        try:
            for name in CALLS:
                setattr(os, name, counted(getattr(os, name)))
            work()
            status = 0
        finally:
            os._exit(status)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), f"call {call}: ended with {code}"
    return code != 0


def deaths(work: Callable[[], object], least: int) -> Iterator[int]:
    """The number of each call that a child died before, when it just has."""
    call = 1
    while dies_before(call, work):
        yield call
        call += 1
    assert call > least, f"only {call - 1} calls"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.gguf"))}


def restore(folder: Path, files: dict[str, bytes]) -> None:
    """Each child finds what the first one found, so that their calls are the same."""
    for name in leftovers(folder):
        (folder / name).unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)


@pytest.mark.parametrize("replacing", [False, True])
def test_killed_anywhere_the_old_file_or_the_new_one_has_the_name(
    replacing: bool, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    convert(folder, out, "q8_0")
    new = out.read_bytes()
    out.unlink()
    old = convert(folder, out, "bf16").path.read_bytes() if replacing else None
    named = set()
    for call in deaths(lambda: convert(folder, out, "q8_0", threads=1, force=True), least=20):
        found = out.read_bytes() if out.exists() else None
        assert found in (old, new), f"call {call}: a file of {len(found or b'')} bytes"
        named.add(found)
        restore(tmp_path, {} if old is None else {"out.gguf": old})
    assert named == {old, new} and out.read_bytes() == new
    assert leftovers(tmp_path) == ["out.gguf"]


@pytest.mark.parametrize("replacing", [False, True])
def test_killed_anywhere_parts_are_all_old_or_all_new_or_cannot_be_opened(
    replacing: bool, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    convert(folder, out, "q8_0", split_max_size=LIMIT)
    new = contents(tmp_path)
    first, old = min(new), {name: b"GGUF, an old " + name.encode() for name in new if replacing}
    assert len(new) > 2

    restore(tmp_path, old)
    missing = 0
    work = lambda: convert(folder, out, "q8_0", split_max_size=LIMIT, threads=1, force=True)  # noqa: E731
    for call in deaths(work, least=30):
        found = contents(tmp_path)
        if first not in found:
            missing += 1
        else:
            assert found in (old, new), f"call {call}: parts of both, or not all"
        restore(tmp_path, old)
    assert missing >= len(new)
    assert contents(tmp_path) == new
    assert not any(name.endswith(".part") for name in leftovers(tmp_path))


def test_killed_anywhere_an_imatrix_is_whole_or_absent(tmp_path: Path) -> None:
    import numpy as np

    sums = {f"blk.0.{n}.weight": Sums(np.ones((1, 64), np.float32), np.ones(1, np.float32)) for n in ("a", "b")}
    path = tmp_path / "i.gguf"
    for _ in deaths(lambda: write_imatrix(path, sums, "", 1, 1, force=True), least=5):
        if path.exists():
            assert path.stat().st_size % 32 == 0 and path.read_bytes()[:4] == b"GGUF"
            path.unlink()
    assert leftovers(tmp_path) == ["i.gguf"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("split", [None, "150K"])
def test_who_asks_it_to_end_finds_nothing(how: signal.Signals, split: str | None, folder: Path, tmp_path: Path) -> None:
    """A conversion that waits in its fifth write until it is told to end."""
    waiting = (
        "import os, time; from dgemma.convert.cli import main; write, calls = os.write, []\n"
        "def waits(*a):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 5:\n"
        "        print('waiting', flush=True)\n"
        "        time.sleep(3600)\n"
        "    return write(*a)\n"
        "os.write = waits; main()"
    )
    flags = ["--split-max-size", split] if split else []
    command = [sys.executable, "-c", waiting, str(folder), "-o", str(tmp_path / "out.gguf"), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as work:
        assert work.stdout is not None and work.stdout.readline() == "waiting\n"
        assert leftovers(tmp_path) and all(name.endswith(".part") for name in leftovers(tmp_path))
        convert(folder, tmp_path / "second.gguf", "q8_0")  # beside it
        work.send_signal(how)
        _, err = work.communicate(timeout=120)
    assert work.returncode == 128 + how and "Traceback" not in err
    assert leftovers(tmp_path) == ["second.gguf"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_order_to_end_that_comes_in_a_finalizer_is_not_lost(how: signal.Signals) -> None:
    code = (
        "import click, os, sys, time, weakref; from dgemma.cli import Command\n"
        "def order(): os.kill(os.getpid(), int(sys.argv[1])); [None for _ in range(1000)]\n"
        "def work():\n"
        "    weakref.finalize(each := type('Each', (), {})(), order); del each\n"
        "    print('dropped', flush=True); time.sleep(60)\n"
        "Command('work', callback=work).main([])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(int(how))], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (128 + how, "dropped\n", "")


def test_a_dead_runs_temporary_is_removed_and_a_living_ones_is_not(folder: Path, tmp_path: Path) -> None:
    out, seen = tmp_path / "out.gguf", []
    endings = deaths(lambda: convert(folder, out, "q8_0", threads=1), least=5)
    dead = next(left[0] for _ in endings if (left := leftovers(tmp_path)))

    def second(done: int, total: int) -> None:
        if not seen:
            seen.append(leftovers(tmp_path))
            convert(folder, out, "q8_0")
            seen.append(leftovers(tmp_path))

    convert(folder, out, "q8_0", force=True, progress=second)
    [temporary] = seen[0]
    assert temporary != dead
    assert seen[1] == sorted([temporary, "out.gguf"])
    assert leftovers(tmp_path) == ["out.gguf"]
    with dgemma.Model(out) as model:
        assert model.config.n_layer == 1
