"""Closes what threads are using: python tests/support/closing.py Model.

Run in a process of its own, since what goes wrong there may end it. Every public method and property of the class is
tried, as the class itself lists them. First each of its calls into the library in turn is held up, and what it uses is
closed meanwhile; then all of them race with close().
"""

from __future__ import annotations

import asyncio
import faulthandler
import inspect
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import dgemma
import dgemma._native
from dgemma.bench import batched, device, flops, profile
from dgemma.chat.conversation import Conversation
from dgemma.files.gguf_file import File
from dgemma.model import bundled

PATIENCE = 0.03  # seconds that close() has to come back, where it does not wait for the call
MOST = 60  # calls of one method that are tried
ROUNDS = 8  # of the race
PATH = bundled("tidy")
FOLDER = tempfile.TemporaryDirectory()
PROMPT = [2, 7, 8]

ffi, library = dgemma._native.ffi, dgemma._native.lib

# What a method's parameters are given, by their names. A new name is told here.
SAMPLES: dict[str, Callable[[Any], Any]] = {
    "canvas": lambda subject: [5, 6],
    "canvases": lambda subject: [(subject.session(16), [5, 6], None)],
    "ids": lambda subject: PROMPT,
    "instruction": lambda subject: "shorter",
    "key": lambda subject: "general.architecture",
    "length": lambda subject: 1,
    "messages": lambda subject: [{"role": "user", "content": "Hi"}],
    "path": lambda subject: Path(FOLDER.name) / "routing.json",
    "prompt": lambda subject: PROMPT,
    "span": lambda subject: (0, 2),
    "text": lambda subject: "a [[1]] b",
    "tokens": lambda subject: 10,
}
ALWAYS = {"canvas", "prompt", "path"}  # are given where they need not be
NOT_WITH = {"generate": {"canvas"}, "stream": {"canvas"}, "fill": {"prompt"}, "edit": {"prompt"}}
FEW = {"steps": 1, "max_tokens": 8}  # for the options of generate()


class Watch:
    """The library: one call of the threads beside the main one is held up until `go` is set."""

    def __init__(self) -> None:
        self.freed: list[tuple[str, int]] = []
        self.begin(0)

    def begin(self, at: int) -> None:
        self.at, self.calls, self.held = at, 0, ""
        self.inside, self.go = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        real = getattr(library, name)
        if not callable(real) or isinstance(real, dgemma._native.ffi.CData):  # a callback
            return real

        def call(*arguments: Any) -> Any:
            if name.endswith("_free"):
                self.freed += [(kind(item), address(item)) for item in arguments]
            elif threading.current_thread() is not threading.main_thread():
                self._hold(name, arguments)
            return real(*arguments)

        return call

    def _hold(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.calls += 1
        if self.calls != self.at:
            return
        before = len(self.freed)
        self.held = name
        self.inside.set()
        self.go.wait(PATIENCE)
        gone = set(self.freed[before:])
        for item in arguments:
            assert (kind(item), address(item)) not in gone, f"the {kind(item)} was freed while {name}() was using it"


def kind(item: Any) -> str:
    return ffi.typeof(item).cname if isinstance(item, ffi.CData) else ""


def address(item: Any) -> int:
    return int(ffi.cast("uintptr_t", item)) if kind(item).endswith("*") else 0


def watch_library() -> Watch:
    """Puts the watch in the library's place, in all modules."""
    watch = Watch()
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType) and module.__name__.startswith("dgemma") and hasattr(module, "lib"):
            module.lib = watch  # type: ignore[attr-defined]
    return watch


# ---- What is closed, and used ----


def subjects(name: str) -> Iterator[tuple[Any, list[Callable[[], None]]]]:
    """One of the class, new, with the ways to close what it lives in."""
    if name == "File":
        file = File(PATH)
        yield file, [file.close]
        return
    model = dgemma.Model(PATH, threads=1)
    if name == "Session":
        session = model.session(64)
        session.encode(PROMPT)
        yield session, [session.close, model.close]
    elif name == "Conversation":
        chat = Conversation(model, SAMPLES["messages"](None))
        yield chat, [chat.close, model.close]
    elif name == "Tokenizer":
        yield model.tokenizer, [model.close]
    elif name == "bench":
        yield Bench(model), [model.close]
    else:
        yield model, [model.close]
    model.close()


class Bench:
    """What dg-bench asks of a model."""

    def __init__(self, model: dgemma.Model) -> None:
        self._model = model

    def rates(self) -> object:
        return device.rates_of(self._model)

    def step_bytes(self) -> object:
        return flops.step_bytes(self._model)

    def file_formats(self) -> object:
        return flops.file_formats(self._model)

    def profile(self) -> object:
        with profile.Profile(self._model) as watched:
            return watched.lap()

    def together(self) -> object:
        return batched.together(self._model, 2, runs=1, prompt=3, temperature=0.5, seed=0, say=lambda text: None)


CLASSES = {
    "Model": dgemma.Model, "Session": dgemma.Session, "Tokenizer": dgemma.Tokenizer, "Conversation": Conversation,
    "File": File, "bench": Bench,
}  # fmt: skip


def members(of: type) -> list[str]:
    public = [name for name, member in inspect.getmembers(of) if not name.startswith("_")]
    return [name for name in public if not isinstance(inspect.getattr_static(of, name), classmethod)] + ["__repr__"]


def use(subject: Any, name: str) -> None:
    """Reads a property, or calls a method and takes all that it gives."""
    found = getattr(subject, name)
    if not inspect.ismethod(found):
        return
    given: dict[str, Any] = {}
    for parameter in inspect.signature(found).parameters.values():
        left_out = parameter.name in NOT_WITH.get(name, ())
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= FEW if "canvas" not in given else {"steps": 1}
        elif parameter.default is parameter.empty or (parameter.name in ALWAYS and not left_out):
            assert parameter.name in SAMPLES, f"{name}(): tests/support/closing.py has no sample for {parameter.name!r}"
            given[parameter.name] = SAMPLES[parameter.name](subject)
    drain(found(**given))


def drain(found: Any) -> None:
    if inspect.isgenerator(found):
        for _ in found:
            pass
    elif inspect.isasyncgen(found):

        async def collect() -> None:
            async for _ in found:
                pass

        asyncio.run(collect())
    elif inspect.iscoroutine(found):
        asyncio.run(found)


def attempt(subject: Any, name: str, failures: list[str], said: str) -> bool:
    """False once it is refused."""
    try:
        use(subject, name)
    except dgemma.Error:
        return False
    except BaseException as failure:
        failures.append(f"{said}: {type(failure).__name__}: {failure}")
        return False
    return True


# ---- One call after the other is held up ----


def hold_up(name: str, watch: Watch, failures: list[str]) -> int:
    """Returns how many calls were held up."""
    held = 0
    for member in members(CLASSES[name]):
        at, way, ways = 1, 0, 1
        while way < ways:
            for subject, closers in subjects(name):
                ways = len(closers)
                watch.begin(at)
                said = f"{name}.{member}, call {at} of the library"
                worker = threading.Thread(target=attempt, args=(subject, member, failures, said))
                worker.start()
                while not watch.inside.wait(0.002) and worker.is_alive():
                    pass
                reached = watch.inside.is_set()
                if reached:
                    closers[way]()
                watch.go.set()
                worker.join()
                held += reached
            at += 1
            if not reached or at > MOST:
                at, way = 1, way + 1
    return held


# ---- All at once ----


def race(name: str, failures: list[str]) -> None:
    sys.setswitchinterval(1e-5)
    names = members(CLASSES[name])
    for turn in range(ROUNDS):
        for subject, closers in subjects(name):
            ready = threading.Barrier(len(names) + 1)

            def work(member: str, subject: Any = subject, ready: Any = ready) -> None:
                ready.wait()
                for _ in range(20):
                    if not attempt(subject, member, failures, f"{name}.{member}, in the race"):
                        break

            workers = [threading.Thread(target=work, args=(member,)) for member in names]
            for worker in workers:
                worker.start()
            ready.wait()
            with suppress(dgemma.Error):
                closers[turn % len(closers)]()
            for worker in workers:
                worker.join()


def main(name: str) -> None:
    faulthandler.enable()
    failures: list[str] = []
    held = hold_up(name, watch_library(), failures)
    if not failures and name != "bench":  # else it would crash; and nobody measures beside other work
        race(name, failures)
    print(f"{held} calls", *dict.fromkeys(failures), sep="\n")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main(sys.argv[1])
