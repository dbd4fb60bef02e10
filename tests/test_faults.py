"""What goes wrong outside: files that shrink, forks, signals at any moment, no memory. Each in a process of its own,
which must say so in an error and go on."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest
from fuzz.seeds import finish, vocabulary

from dgemma.model import bundled as bundled_path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="as Linux does these things")

PUZZLE = Path(__file__).parent / "models" / "sudoku" / "puzzle.txt"
LONG = 300  # seconds after which a process is taken to hang, on however busy a machine
BEGIN = """
import os, resource, signal, sys, threading
import dgemma
from dgemma.files.gguf_file import File
PROMPT = open([puzzle]).read()
WANT = [ids]
def answer(model, **options):
    return model.generate(PROMPT, steps=3, **options).ids
def same(model):
    assert answer(model) == WANT[0], "other tokens"
"""


@pytest.fixture(scope="module")
def ids(bundled):
    found = bundled.generate(PUZZLE.read_text(), steps=3).ids
    assert len(found) > 50
    return found


def script(body: str, ids: list[int]) -> list[str]:
    return [sys.executable, "-c", BEGIN.replace("[ids]", repr([ids])).replace("[puzzle]", repr(str(PUZZLE))) + body]


def run(body: str, ids: list[int], *arguments: object, code: int = 0) -> str:
    """Runs a script; its output, once it has ended with this code."""
    done = subprocess.run(
        [*script(body, ids), *map(str, arguments)], capture_output=True, text=True, timeout=LONG, check=False
    )
    assert done.returncode == code, f"status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copy(bundled_path(), tmp_path / "model.gguf"))


# ---- A file that shrinks ----


def test_a_model_whose_file_shrinks_says_so_and_others_go_on(copy, ids):
    run(
        """
path = sys.argv[1]
size = os.path.getsize(path)
other = dgemma.Model()
with dgemma.Model(path, threads=2) as model, model.session() as session:
    session.encode(model.prompt_ids(PROMPT))
    events = session.stream(steps=40, confidence=0.0)
    next(events)
    os.truncate(path, size // 3)
    wanted = f"{path}: shrank while it was in use: it had {size} bytes and has {size // 3}"
    def fails(call):
        try:
            call()
        except dgemma.SystemFailure as failure:
            assert str(failure) == wanted, failure
        else:
            raise AssertionError("no error")
    fails(lambda: list(events))
    fails(lambda: answer(model))
    fails(lambda: model.session().encode([2, 7]))
    fails(lambda: model.tokenizer.encode("1"))
same(other)
""",
        ids,
        copy,
    )


def test_a_page_that_cannot_be_read_is_told_from_a_file_that_shrank(copy, ids):
    """As after an error of the disk: the page is lost, and the file has the size that it had."""
    run(
        """
path = sys.argv[1]
size = os.path.getsize(path)
with dgemma.Model(path, threads=2) as model:
    os.truncate(path, size // 3)
    try:
        answer(model)
    except dgemma.SystemFailure:
        os.truncate(path, size)
    for _ in range(2):
        try:
            answer(model)
        except dgemma.SystemFailure as failure:
            assert str(failure).startswith(f"{path}: cannot be read any more: an error of the disk"), failure
        else:
            raise AssertionError("no error")
same(dgemma.Model())
""",
        ids,
        copy,
    )


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """The image of a file system, and the model on it: what is cut off the image is a disk's error."""
    image, files, at = tmp_path / "disk", tmp_path / "files", tmp_path / "at"
    files.mkdir()
    at.mkdir()
    shutil.copy(bundled_path(), files / "model.gguf")
    try:
        subprocess.run(["/sbin/mke2fs", "-q", "-d", files, image, "8M"], check=True, capture_output=True)
        subprocess.run(["mount", "-o", "loop,ro", image, at], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as failure:
        pytest.skip(f"no file system can be mounted here: {failure}")
    yield image, at / "model.gguf"
    subprocess.run(["umount", at], check=True)


@pytest.mark.parametrize("options, said", [("{}", "cannot be read any more: an error of the disk"),
                                           ("dict(ram='300M')", "cannot read .*: Input/output error")])  # fmt: skip
def test_a_disk_that_fails_is_an_error(options: str, said: str, disk, ids):
    """A real one, under the map and under reads past it: an error object, closing works, and the process goes on."""
    run(
        f"""
import re
image, path = sys.argv[1:]
with dgemma.Model(path, threads=2, **{options}) as model:
    os.truncate(image, 64 << 10)
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    for _ in range(2):
        try:
            answer(model)
        except dgemma.SystemFailure as failure:
            assert re.match(re.escape(path) + {": " + said!r}, str(failure)), failure
        else:
            raise AssertionError("no error")
same(dgemma.Model())
""",
        ids,
        *disk,
    )


def test_a_file_may_shrink_while_threads_compute(copy, ids):
    run(
        """
path = sys.argv[1]
stepped, failures = threading.Barrier(3), []
with dgemma.Model(path, threads=2) as model:
    def work():
        first = True
        try:
            while True:
                for event in model.stream(PROMPT, steps=20, confidence=0.0):
                    if first:
                        stepped.wait()
                        first = False
        except dgemma.SystemFailure as failure:
            failures.append(str(failure))
    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    stepped.wait()
    os.truncate(path, 5000)
    for worker in workers:
        worker.join()
assert len(failures) == 2 and all("shrank while it was in use" in failure for failure in failures), failures
same(dgemma.Model())
""",
        ids,
        copy,
    )


def test_a_mapped_file_that_shrinks_reads_as_zeros_and_says_so(copy, ids):
    run(
        """
path = sys.argv[1]
with File(path) as file:
    file.check()
    os.truncate(path, 8192)
    for tensor in file.tensors:
        assert not any(bytes(tensor.data)[-64:])
    try:
        file.check()
    except dgemma.SystemFailure as failure:
        assert "shrank while it was in use" in str(failure)
    else:
        raise AssertionError("no error")
""",
        ids,
        copy,
    )


def test_a_conversion_of_a_file_that_shrinks_leaves_nothing(copy, ids, tmp_path):
    run(
        """
from dgemma.convert import source
from dgemma.convert import convert
read = source.Gguf.read
def cut(self, *given):
    os.truncate(sys.argv[1], 8192)
    return read(self, *given)
source.Gguf.read = cut
try:
    convert(sys.argv[1], sys.argv[2], type="q4_0")
except dgemma.Error as failure:
    assert "shrank while it was in use" in str(failure), failure
else:
    raise AssertionError("no error")
""",
        ids,
        copy,
        tmp_path / "out.gguf",
    )
    assert os.listdir(tmp_path) == ["model.gguf"]


@pytest.mark.parametrize("traced", [False, True], ids=["plain", "faulthandler"])
@pytest.mark.parametrize("kind", ["sent", "mapped"])
def test_a_bus_error_of_others_is_not_ours(ids, tmp_path, traced, kind):
    victim = tmp_path / "victim"
    victim.write_bytes(bytes(1 << 16))
    run(
        f"""
import faulthandler, mmap
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
if {traced}:
    faulthandler.enable()
model = dgemma.Model()
if {kind!r} == "sent":
    os.kill(os.getpid(), signal.SIGBUS)
else:
    with open(sys.argv[1], "r+b") as file:
        map = mmap.mmap(file.fileno(), 0)
    os.truncate(sys.argv[1], 0)
    map[40000]
print("still here")
""",
        ids,
        victim,
        code=-signal.SIGBUS,
    )


# ---- Forks ----


@pytest.mark.parametrize("options", ["threads=2", "threads=2, ram='2G'", "threads=1"])
def test_a_forked_process_goes_on_with_a_model(ids, options):
    run(
        f"""
def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as failure:
            print(repr(failure), file=sys.stderr, flush=True)
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0, "the child failed"

model = dgemma.Model({options})
same(model)
def goes_on():
    same(model)
    with model.session() as session:
        session.encode([2, 7])
    child(lambda: same(model))
    model.close()
    same(dgemma.Model({options}))
child(goes_on)
same(model)

session = model.session()
session.encode([2, 7, 8])
stop = threading.Event()
def busy():
    while not stop.is_set():
        answer(model)
workers = [threading.Thread(target=busy) for _ in range(2)]
for worker in workers:
    worker.start()
for _ in range(10):  # whatever the others were within
    child(lambda: (same(model), session.denoise([5, 6]), model.close()))
stop.set()
for worker in workers:
    worker.join()
same(model)
""",
        ids,
    )


def small_file(folder: Path) -> Path:
    """A vocabulary alone."""
    writer = gguf.GGUFWriter(folder / "small.gguf", "any")
    vocabulary(writer)
    finish(writer)
    return folder / "small.gguf"


def test_a_process_may_fork_while_threads_open_and_close_files(ids, copy, tmp_path):
    """Whatever lock they hold at that moment: each child opens the same files, and ends."""
    run(
        """
path, small, stop = *sys.argv[1:], threading.Event()
def open_all():
    dgemma.Tokenizer.from_gguf(path)
    with File(path), dgemma.Model(path, threads=1), dgemma.Model(path, threads=1, ram="1G"):
        pass
def busy(opening):
    while not stop.is_set():
        opening()
def open_small():  # most of its time goes by in the library's locks
    dgemma.Tokenizer.from_gguf(small)
open_all()  # and so all modules are there
workers = [threading.Thread(target=busy, args=(opening,)) for opening in (open_all, open_small, open_small)]
for worker in workers:
    worker.start()
ended = []
for _ in range(200):
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        open_all()
        for _ in range(20):
            open_small()
        os._exit(0)
    ended.append(os.waitpid(pid, 0)[1])
    if ended[-1]:
        break
stop.set()
for worker in workers:
    worker.join()
assert not any(ended), f"child {len(ended)} of 200 ended with {ended[-1]}: {signal.SIGALRM} is one that hung"
""",
        ids,
        copy,
        small_file(tmp_path),
    )


def test_a_forked_process_is_refused_what_a_thread_was_using_or_goes_on_with_it(ids):
    """A session that answers in another thread at the fork: no call hangs, errors are in words, and closing works."""
    run(
        """
model = dgemma.Model(threads=2)
session, stop, stepped = model.session(), threading.Event(), threading.Event()
def busy():
    while not stop.is_set():
        for event in session.stream(PROMPT, steps=20, confidence=0.0, on_encode=lambda done, total: stepped.set()):
            stepped.set()
worker = threading.Thread(target=busy)
worker.start()
stepped.wait()
for _ in range(30):
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        try:
            for use in (lambda: session.length, lambda: session.ids, lambda: repr(session),
                        lambda: session.denoise([5, 6]), lambda: session.generate(PROMPT, steps=3)):
                try:
                    use()
                except dgemma.Error as failure:
                    assert "this session is generating; finish its stream or close it first" in str(failure), failure
            session.close()
            same(model)
            model.close()
        except BaseException as failure:
            print(repr(failure), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0, "the child failed"
stop.set()
worker.join()
""",
        ids,
    )


# ---- Signals ----


def test_ctrl_c_at_any_moment_leaves_a_model_usable(ids):
    process = subprocess.Popen(
        script(
            """
armed, hits, done = False, 0, 0
def heard(number, frame):  # the usual exception, where it is awaited
    global armed
    if armed:
        armed = False
        raise KeyboardInterrupt
signal.signal(signal.SIGINT, heard)
model = dgemma.Model(threads=2)
session = model.session()
print("ready", flush=True)
while hits < 60:
    try:
        armed = True
        ids = session.generate(PROMPT, steps=3).ids if done % 2 else answer(model)
        armed = False
        done += 1
        assert ids == WANT[0]
    except KeyboardInterrupt:
        hits += 1
signal.signal(signal.SIGINT, signal.SIG_IGN)
same(model)
assert session.generate(PROMPT, steps=3).ids == WANT[0]
print("usable", flush=True)
""",
            ids,
        ),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    dice = random.Random(0)
    ends = time.monotonic() + LONG
    while process.poll() is None and time.monotonic() < ends:
        process.send_signal(signal.SIGINT)
        time.sleep(dice.random() * 0.05)
    rest = process.communicate(timeout=LONG)[0]
    assert (process.returncode, rest) == (0, "usable\n")


# ---- No memory ----


def test_without_memory_there_is_an_error_and_then_memory_is_all_it_takes(ids):
    out = run(
        """
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
with dgemma.Model(threads=2) as model:
    same(model)  # and so all modules are there
with open("/proc/self/statm") as file:
    now = int(file.read().split()[0]) * resource.getpagesize()
refused = 0
for extra in [*range(0, 64, 3), *range(64, 400, 16)]:
    resource.setrlimit(resource.RLIMIT_AS, (now + (extra << 20), hard))
    try:
        with dgemma.Model(threads=2) as model:
            same(model)
    except (dgemma.SystemFailure, MemoryError) as failure:
        assert str(failure) or isinstance(failure, MemoryError)
        refused += 1
resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
same(dgemma.Model(threads=2))
print(refused)
""",
        ids,
    )
    assert 1 <= int(out) < 43
