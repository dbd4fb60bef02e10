"""What one thread closes, others may be using: they end what they are within, and are refused afterwards."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest
from support import closing

import dgemma
from dgemma.files.gguf_file import File
from dgemma.model import bundled as bundled_path
from dgemma.native.handle import Handle

LONG = 300  # seconds after which a process is taken to hang, on however busy a machine


@pytest.mark.parametrize("name", closing.CLASSES)
def test_closing_beside_every_method_frees_nothing_that_is_in_use(name: str) -> None:
    """A crash is told with the line that each thread was at."""
    script = closing.__file__
    done = subprocess.run([sys.executable, script, name], capture_output=True, text=True, timeout=LONG, check=False)
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}{done.stderr[-4000:]}"
    assert int(done.stdout.split()[0]) > 0


@pytest.mark.parametrize("whose", ["model", "session"])
def test_a_session_that_is_being_closed_is_not_told_to_be_in_use(whose: str) -> None:
    """Closing waits for the thread that is inside; meanwhile another one comes."""
    with dgemma.Model(threads=1) as model:
        session = model.session(64)
        inside, leave = threading.Event(), threading.Event()

        def stay() -> None:
            with session._use():
                inside.set()
                leave.wait(60)

        with pytest.raises(dgemma.Error, match="in use by another thread"):
            threads = [threading.Thread(target=stay, daemon=True)]
            threads[0].start()
            inside.wait(60)
            session.rewind(0)
        threads.append(threading.Thread(target=(model if whose == "model" else session).close, daemon=True))
        threads[1].start()
        for _ in range(60_000):
            if "closed" in repr(model) if whose == "model" else session._closing:
                break
            time.sleep(0.001)
        try:
            with pytest.raises(dgemma.Error, match=f"this {whose} is closed"):
                session.rewind(0)
        finally:
            leave.set()
            for thread in threads:
                thread.join()
        with pytest.raises(dgemma.Error, match="this session is closed"):
            session.rewind(0)


def test_an_object_is_freed_when_its_last_pointer_is_dropped() -> None:
    ffi, freed = closing.ffi, []
    memory = ffi.new("int[2]")
    parent = Handle(ffi.addressof(memory, 0), lambda pointer: freed.append("parent"))
    child = Handle(ffi.addressof(memory, 1), lambda pointer: freed.append("child"), parent)
    held = child.pointer
    parent.close()
    child.close()
    del parent, child
    assert freed == []
    del held
    assert freed == ["child", "parent"]


def test_what_is_forgotten_in_a_circle_is_freed_in_order() -> None:
    freed: list[str] = []

    class Owner:
        handles: tuple[Handle, Handle]
        itself: Owner

    for first in (0, 1):
        memory = closing.ffi.new("int[2]")
        owner = Owner()
        parent = Handle(closing.ffi.addressof(memory, 0), lambda pointer: freed.append("parent"))
        child = Handle(closing.ffi.addressof(memory, 1), lambda pointer: freed.append("child"), parent)
        owner.handles = (child, parent) if first else (parent, child)
        owner.itself = owner
        gone = weakref.ref(owner)
        del owner, parent, child
        gc.collect()
        assert gone() is None
    assert freed == ["child", "parent"] * 2


def test_data_of_a_file_outlives_it() -> None:
    with File(bundled_path()) as file:
        tensor, value = max(file.tensors, key=lambda one: one.bytes), file.values["tokenizer.ggml.tokens"]
        want, tokens = bytes(tensor.data), value.value
    gc.collect()
    assert bytes(tensor.data) == want and value.value == tokens
    with pytest.raises(dgemma.Error, match="this file is closed"):
        file.check()


def test_ids_are_taken_as_they_are_when_they_are_given(bundled) -> None:
    """What the caller writes into an array later is not seen, where it was checked already."""
    from dgemma.session import id_array

    ids = np.array([2, 7], np.int32)
    taken = id_array(ids, 64, "ids")
    ids[:] = 10**6
    assert taken.tolist() == [2, 7]
